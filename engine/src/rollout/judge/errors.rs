//! Whether the new copies fail more requests than the old ones.

use peregrine_routing::OutcomeCounts;

use super::chance::{Evidence, count, log_odds_ratios, wilson_upper};

/// Odds ratios that are bet on: from "twice as often" to "the old copies fail next to nothing".
const ODDS: [f64; 5] = [2.0, 4.0, 16.0, 64.0, 256.0];
/// The bet is won at this value: 2 % of the shifts of equal copies ever get there.
const ENOUGH: f64 = 50.0;
/// From this value on the step is not passed until more is known.
const SUSPICIOUS: f64 = 3.0;
/// One failed request is no verdict, wherever it falls.
const MIN_FAILURES: u64 = 2;
/// Answers of each side that make a block…
const BLOCK_SAMPLES: u64 = 5;
/// …or one of each side after so long.
const BLOCK_MS: u64 = 1_000;
/// Without an old side at the same time: 1 % of the shifts of equal copies ever get there.
const ENOUGH_ALONE: f64 = 100.0;
/// Error rates that are then bet on, in multiples of what would be fine.
const ALONE_MULTIPLES: [f64; 4] = [2.0, 4.0, 16.0, 64.0];
/// What would be fine is at least this, so that one stray failure is no disaster.
const MIN_FINE_RATIO: f64 = 0.005;

/// Answers and failures of both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) n: u64,
    pub(super) bad: u64,
    pub(super) old_n: u64,
    pub(super) old_bad: u64,
}

impl Table {
    pub(super) fn of(new: &OutcomeCounts, old: &OutcomeCounts) -> Self {
        Self { n: new.samples(), bad: new.errors(), old_n: old.samples(), old_bad: old.errors() }
    }

    const fn since(self, earlier: Self) -> Self {
        Self {
            n: self.n.saturating_sub(earlier.n),
            bad: self.bad.saturating_sub(earlier.bad),
            old_n: self.old_n.saturating_sub(earlier.old_n),
            old_bad: self.old_bad.saturating_sub(earlier.old_bad),
        }
    }

    /// How much more of its requests the new side fails.
    fn excess(self) -> f64 {
        let ratio = |bad: u64, n: u64| if n == 0 { 0.0 } else { count(bad) / count(n) };
        ratio(self.bad, self.n) - ratio(self.old_bad, self.old_n)
    }
}

/// The evidence of errors over one shift.
#[derive(Clone, Debug, Default)]
pub(super) struct Errors {
    evidence: Evidence<5>,
    /// What is in the evidence already.
    taken: Table,
    taken_at_ms: u64,
    /// Where the evidence began, and where it last restarted.
    whole_from: Table,
    recent_from: Table,
}

/// What the evidence amounts to.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Finding {
    Nothing,
    Suspicion(String),
    Worse(String),
}

impl Errors {
    pub(super) fn begin(at_ms: u64, now: Table) -> Self {
        Self { taken: now, taken_at_ms: at_ms, whole_from: now, recent_from: now, ..Self::default() }
    }

    pub(super) fn restart(&mut self) {
        self.evidence.restart();
        self.recent_from = self.taken;
    }

    /// Takes in what both sides have done since the last block, if that is a block. When a block ends depends on
    /// how many answers there are, never on how they are.
    pub(super) fn look(&mut self, at_ms: u64, now: Table) {
        let block = now.since(self.taken);
        let fewer = block.n.min(block.old_n);
        let late = at_ms.saturating_sub(self.taken_at_ms) >= BLOCK_MS;
        if fewer >= BLOCK_SAMPLES || (fewer >= 1 && late) {
            self.evidence.add(&log_odds_ratios(&ODDS, (block.bad, block.n), (block.old_bad, block.old_n)));
            self.taken = now;
            self.taken_at_ms = at_ms;
        }
    }

    /// `allowed`: the least difference that matters.
    pub(super) fn finding(&self, allowed: f64) -> Finding {
        let value = self.evidence.value();
        if value < SUSPICIOUS {
            return Finding::Nothing;
        }
        let scopes = [self.taken.since(self.whole_from), self.taken.since(self.recent_from)];
        let over = |share: f64, failures: u64| {
            scopes.into_iter().find(|scope| scope.bad >= failures && scope.excess() > allowed * share)
        };
        let told = |table: Table| {
            format!(
                "{} of {} requests failed on the new copies, {} of {} on the old ones at the same time \
                 (odds of {value:.0} to 1 against chance, {ENOUGH} are enough; allowed: {:.2} % more)",
                table.bad,
                table.n,
                table.old_bad,
                table.old_n,
                allowed * 100.0
            )
        };
        match (over(1.0, MIN_FAILURES), over(0.5, 1)) {
            (Some(table), _) if value >= ENOUGH => Finding::Worse(told(table)),
            (_, Some(table)) => Finding::Suspicion(told(table)),
            _ => Finding::Nothing,
        }
    }
}

/// Whether the new copies fail too much where no old copy answers at the same time: measured by what the old
/// ones did before (as an upper bound, because that was another time) and what is allowed above it.
pub(super) fn alone(step: Table, old_before: (u64, u64), allowed: f64) -> Option<String> {
    let (old_bad, old_n) = old_before;
    let old = if old_n == 0 { 0.0 } else { wilson_upper(old_bad, old_n) };
    let fine = (old + allowed).max(MIN_FINE_RATIO);
    if step.bad < MIN_FAILURES || fine >= 1.0 {
        return None;
    }
    let value = ALONE_MULTIPLES
        .map(|multiple| {
            let rate = (fine * multiple).min(0.95_f64.max(f64::midpoint(fine, 1.0)));
            let failed = count(step.bad) * (rate / fine).ln();
            let answered = count(step.n - step.bad) * ((1.0 - rate) / (1.0 - fine)).ln();
            (failed + answered).min(700.0).exp()
        })
        .iter()
        .sum::<f64>()
        / count(ALONE_MULTIPLES.len() as u64);
    (value >= ENOUGH_ALONE).then(|| {
        format!(
            "{} of {} requests failed on the new copies, {old_bad} of {old_n} on the old ones before \
             (odds of {value:.0} to 1 against at most {:.2} %)",
            step.bad,
            step.n,
            fine * 100.0
        )
    })
}
