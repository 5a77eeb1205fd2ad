//! The verdict on what was mirrored: the new copies' answers beside those that clients got to the same requests.
//!
//! * **Worse**: an answer 5xx or none, or 4xx where the other side's is below 400. Both sides are counted alike and
//!   compared by the same bet as in a shift (`errors.rs`). A pair is one request, so that the two sides are more alike
//!   than two samples are: the bet is only the more careful for it.
//! * **Other**: both are below 400, and of another class (200 and a redirect). Neither is an error, so that one side is
//!   no measure of the other: the bet is against the share that is tolerated.

use peregrine_routing::MirrorCounts;

use super::Verdict;
use super::errors::{Errors, Finding, Table, alone};

/// 6 is no answer.
const fn mirror_is_bad(client: usize, mirror: usize) -> bool {
    mirror >= 5 || (mirror == 4 && client < 4)
}

const fn client_is_bad(client: usize, mirror: usize) -> bool {
    client >= 5 || (client == 4 && mirror < 4)
}

const fn is_other(client: usize, mirror: usize) -> bool {
    client < 4 && mirror < 4 && client != mirror
}

fn table(counts: &MirrorCounts) -> Table {
    let n = counts.judged();
    Table { n, bad: counts.pairs_where(mirror_is_bad), old_n: n, old_bad: counts.pairs_where(client_is_bad) }
}

/// What was seen of one mirror so far.
#[derive(Debug)]
pub(crate) struct MirrorJudge {
    errors: Errors,
    /// The share of copies that may be answered worse.
    tolerated: f64,
    min_samples: u64,
}

impl MirrorJudge {
    /// Nothing is counted yet. Times are in milliseconds of one monotonic clock.
    pub(crate) fn begin(at_ms: u64, tolerated: f64, min_samples: u64) -> Self {
        Self { errors: Errors::begin(at_ms, Table::default()), tolerated, min_samples }
    }

    /// Takes in what was counted up to now, and says what is to be thought of it.
    pub(crate) fn look(&mut self, at_ms: u64, now: &MirrorCounts) -> Verdict {
        self.errors.look(at_ms, table(now));
        let other = Table { n: now.judged(), bad: now.pairs_where(is_other), ..Table::default() };
        if alone(other, (0, 0), self.tolerated).is_some() {
            return Verdict::Fail(format!(
                "{} of {} answers are of another class than the clients' (tolerated: {:.2} %)",
                other.bad,
                other.n,
                self.tolerated * 100.0
            ));
        }
        match self.errors.finding(self.tolerated) {
            Finding::Worse(why) => Verdict::Fail(why),
            _ if now.judged() < self.min_samples => Verdict::TooFew,
            Finding::Suspicion(why) => Verdict::Suspicion(why),
            Finding::Nothing => Verdict::Pass,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Dice;
    use super::*;

    /// Looks after each pair that a function of its number gives.
    fn judged(count: u64, tolerated: f64, pair: impl Fn(u64) -> (usize, usize)) -> (u64, Verdict) {
        let mut judge = MirrorJudge::begin(0, tolerated, 50);
        let mut counts = MirrorCounts::default();
        let mut last = Verdict::TooFew;
        for number in 0..count {
            let (client, mirror) = pair(number);
            counts.pairs[client - 1][mirror - 1] += 1;
            last = judge.look(number * 10, &counts);
            if matches!(last, Verdict::Fail(_)) {
                return (number + 1, last);
            }
        }
        (count, last)
    }

    fn fails_within(most: u64, pair: impl Fn(u64) -> (usize, usize)) {
        let (count, verdict) = judged(5_000, 0.01, pair);
        assert!(matches!(verdict, Verdict::Fail(_)) && count <= most, "{verdict:?} after {count}");
    }

    #[test]
    fn a_copy_that_fails_what_the_old_one_answers_is_found_out_within_a_dozen_answers() {
        fails_within(12, |_| (2, 5));
        fails_within(12, |_| (2, 6)); // no answer
        fails_within(12, |_| (3, 4));
        fails_within(12, |_| (4, 5));
        fails_within(12, |_| (2, 3)); // every answer is a redirect
    }

    #[test]
    fn a_copy_that_fails_one_path_of_ten_is_found_out_within_three_hundred_answers() {
        fails_within(300, |number| if number.is_multiple_of(10) { (2, 5) } else { (2, 2) });
        fails_within(300, |number| if number.is_multiple_of(10) { (2, 4) } else { (2, 2) });
    }

    #[test]
    fn copies_that_answer_alike_pass_whatever_they_answer() {
        for class in [2, 3, 4, 5] {
            assert_eq!(judged(1_000, 0.01, |_| (class, class)), (1_000, Verdict::Pass));
        }
        // What is better than before is no fault either.
        assert_eq!(judged(1_000, 0.01, |_| (5, 2)), (1_000, Verdict::Pass));
        assert_eq!(judged(1_000, 0.01, |_| (4, 2)), (1_000, Verdict::Pass));
    }

    #[test]
    fn copies_that_fail_alike_and_at_random_are_rarely_failed() {
        let failed = (0..1_000_u64).filter(|seed| {
            let mut dice = Dice::new(*seed);
            let mut class = || if dice.chance(0.05) { 5 } else { 2 };
            let pairs: Vec<(usize, usize)> = (0..500).map(|_| (class(), class())).collect();
            let (_, verdict) = judged(500, 0.01, |number| pairs[usize::try_from(number).expect("few")]);
            matches!(verdict, Verdict::Fail(_))
        });
        assert!(failed.count() <= 20, "2 % by the bet's own terms");
    }

    #[test]
    fn what_is_tolerated_passes() {
        let some = |number: u64| if number.is_multiple_of(10) { (2, 5) } else { (2, 2) };
        assert!(matches!(judged(2_000, 0.2, some).1, Verdict::Pass | Verdict::Suspicion(_)));
        let moved = |number: u64| if number.is_multiple_of(10) { (2, 3) } else { (2, 2) };
        assert_eq!(judged(2_000, 0.2, moved).1, Verdict::Pass);
        fails_within(300, moved);
    }

    #[test]
    fn too_few_answers_are_no_verdict_even_if_some_are_worse() {
        assert_eq!(judged(49, 0.01, |_| (2, 2)).1, Verdict::TooFew);
        assert_eq!(judged(3, 0.01, |_| (2, 5)).1, Verdict::TooFew);
    }
}
