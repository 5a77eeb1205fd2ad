//! The verdict on a shift step: the new copies compared with the old ones, measured at the same time.
//!
//! Pure. A difference counts only when chance does not explain it: a few samples with one slow or failed
//! request among them must not turn a good rollout back, and a copy that fails every request must not need
//! a hundred of them to be found out. Lack of data is never a failure.

use peregrine_routing::{LatencyBuckets, OutcomeCounts};

use crate::model::Guards;

/// Probability of a false alarm that is accepted for one look. A step is looked at some ten times and a
/// rollout has some four steps: about one false alarm in 2,500 rollouts of equal copies.
const MAX_CHANCE: f64 = 1e-5;

/// Below this difference nobody feels a slower p95.
const MIN_P95_DIFFERENCE_US: u64 = 5_000;

/// What was measured on both sides.
#[derive(Clone, Debug, Default)]
pub(crate) struct Compared {
    /// New copies, in this step.
    pub(crate) new: OutcomeCounts,
    /// Old copies, at the same time (or, when they get nothing any more, earlier in this rollout).
    pub(crate) old: OutcomeCounts,
}

/// Whether the new copies fail more requests than the old ones, beyond what is allowed and what chance
/// explains; with the numbers.
#[expect(clippy::cast_precision_loss, reason = "counts of requests are far below 2^52")]
pub(crate) fn more_errors(compared: &Compared, guards: &Guards) -> Option<String> {
    let (new, old) = (&compared.new, &compared.old);
    let (n, bad) = (new.samples(), new.errors());
    let (old_n, old_bad) = (old.samples(), old.errors());
    let ratio = |bad: u64, n: u64| if n == 0 { 0.0 } else { bad as f64 / n as f64 };
    if n == 0 || ratio(bad, n) - ratio(old_bad, old_n) <= guards.error_ratio_increase {
        return None;
    }
    // Two questions: could both be equally bad (the old side's sample may be small), and could the new
    // side be within what is allowed?
    let by_chance = fisher_upper_tail(bad, n, old_bad, old_n);
    let allowed = (ratio(old_bad, old_n) + guards.error_ratio_increase).clamp(0.0, 1.0);
    let within = binomial_upper_tail(bad, n, allowed);
    let chance = if old_n == 0 { within } else { by_chance.max(within) };
    (chance < MAX_CHANCE).then(|| {
        format!(
            "{bad} of {n} requests failed on the new copies, {old_bad} of {old_n} on the old ones (allowed: {:.2} % more)",
            guards.error_ratio_increase * 100.0
        )
    })
}

/// Whether the new copies are slower than the old ones, beyond what is allowed and what chance explains.
///
/// Chance is reckoned as if requests were slow one by one. A pause of the copy makes many slow at once, so
/// a single finding is a suspicion: the caller looks at a fresh stretch of time before it believes it.
pub(crate) fn slower(compared: &Compared, guards: &Guards, min_samples: u64) -> Option<String> {
    let increase = guards.p95_increase?;
    let (new, old) = (&compared.new.latency, &compared.old.latency);
    let n = new.count();
    if n < min_samples.max(1) || old.count() < min_samples.max(1) {
        return None;
    }
    let old_p95 = old.quantile_us(0.95)?;
    let new_p95 = new.quantile_us(0.95)?;
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let limit = ((old_p95 as f64) * (1.0 + increase)) as u64;
    let limit = limit.max(old_p95 + MIN_P95_DIFFERENCE_US);
    if new_p95 <= limit {
        return None;
    }
    // Were both alike, a twentieth of the new samples would lie above the old p95, let alone the limit.
    let above = count_above(new, limit);
    (binomial_upper_tail(above, n, 0.05) < MAX_CHANCE).then(|| {
        format!(
            "p95 is {:.1} ms on the new copies and {:.1} ms on the old ones (allowed: {:.1} ms)",
            ms(new_p95),
            ms(old_p95),
            ms(limit)
        )
    })
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn ms(us: u64) -> f64 {
    us as f64 / 1_000.0
}

/// How many samples lie above a limit, by bisection over the ranks.
#[expect(clippy::cast_precision_loss, reason = "counts of requests are far below 2^52")]
fn count_above(latency: &LatencyBuckets, limit_us: u64) -> u64 {
    let n = latency.count();
    let (mut low, mut high) = (0, n); // ranks up to `low` are within the limit, those above `high` are not
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        let at = (middle as f64 - 0.5) / n as f64;
        if latency.quantile_us(at).is_some_and(|us| us <= limit_us) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    n - low
}

/// P(X ≥ k) for n trials of probability p.
#[expect(clippy::cast_precision_loss, reason = "counts of requests are far below 2^52")]
fn binomial_upper_tail(k: u64, n: u64, p: f64) -> f64 {
    if k == 0 || p >= 1.0 {
        return 1.0;
    }
    if p <= 0.0 {
        return 0.0;
    }
    let log = |i: u64| ln_choose(n, i) + i as f64 * p.ln() + (n - i) as f64 * (1.0 - p).ln();
    sum_tail(k, n, log)
}

/// Fisher's exact test, one-sided: the chance of at least `bad` failures among the `n` of the new side, if
/// all failures were dealt out at random over both sides.
fn fisher_upper_tail(bad: u64, n: u64, old_bad: u64, old_n: u64) -> f64 {
    let failures = bad + old_bad;
    let all = ln_choose(n + old_n, failures);
    let log = |i: u64| {
        if failures - i > old_n {
            f64::NEG_INFINITY
        } else {
            ln_choose(n, i) + ln_choose(old_n, failures - i) - all
        }
    };
    sum_tail(bad, n.min(failures), log)
}

/// Sums exp(log(i)) from `from` to `to`. The terms fall after their peak, so the sum ends early.
fn sum_tail(from: u64, to: u64, log: impl Fn(u64) -> f64) -> f64 {
    let mut sum = 0.0;
    let mut last = f64::NEG_INFINITY;
    for i in from..=to {
        let term = log(i);
        sum += term.exp();
        if term < last && term < -60.0 {
            break;
        }
        last = term;
    }
    sum.min(1.0)
}

fn ln_choose(n: u64, k: u64) -> f64 {
    ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k)
}

/// Stirling's series, exact to 1e-10 from 10 on; by addition below.
#[expect(clippy::cast_precision_loss, reason = "counts of requests are far below 2^52")]
fn ln_factorial(n: u64) -> f64 {
    if n < 10 {
        return (2..=n).map(|i| (i as f64).ln()).sum();
    }
    let x = n as f64 + 1.0;
    (x - 0.5).mul_add(x.ln(), -x) + 0.5 * std::f64::consts::TAU.ln() + 1.0 / (12.0 * x)
        - 1.0 / (360.0 * x.powi(3))
        + 1.0 / (1_260.0 * x.powi(5))
}

#[cfg(test)]
mod tests {
    use super::*;
    use peregrine_routing as routing;
    use std::sync::Arc;

    /// Counts as the edge makes them: `latencies` in microseconds, and so many answers 500.
    fn counts(latencies_us: impl IntoIterator<Item = u64>, errors: u64) -> OutcomeCounts {
        let (mut writer, _reader) = routing::table();
        let spec = routing::UpstreamSpec {
            generation: routing::Generation(1),
            name: "copy".into(),
            address: routing::Address::Socket(([127, 0, 0, 1], 1).into()),
            protocol: routing::UpstreamProtocol::Http1,
            weight: 1,
            ready_connections: 0,
        };
        let pool =
            routing::PoolSpec { name: "pool".into(), weight: 1, standby: false, upstreams: vec![spec] };
        writer
            .apply(&[routing::Change::Put(routing::ServiceSpec {
                name: "shop".into(),
                routes: Vec::new(),
                pools: vec![pool],
                balance: routing::Balance::default(),
                policy: routing::ServicePolicy::default(),
            })])
            .expect("the table takes it");
        let upstream = Arc::clone(writer.upstream(routing::Generation(1)).expect("it is there"));
        let passive = routing::Passive::default();
        for latency_us in latencies_us {
            upstream.record(routing::Outcome::Response { status: 200, latency_us }, &passive, 1);
        }
        for _ in 0..errors {
            upstream.record(routing::Outcome::Response { status: 500, latency_us: 1_000 }, &passive, 1);
        }
        upstream.outcomes()
    }

    /// A deterministic noise: xorshift, so that a failing seed can be looked at.
    struct Noise(u64);

    impl Noise {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        /// Mostly 1–3 ms, one in thirty slow, up to 60 ms: a service with a heavy tail.
        fn latency_us(&mut self) -> u64 {
            let base = 1_000 + self.next() % 2_000;
            if self.next().is_multiple_of(30) { base + self.next() % 60_000 } else { base }
        }
    }

    fn is_worse(compared: &Compared, guards: &Guards) -> bool {
        more_errors(compared, guards).or_else(|| slower(compared, guards, 20)).is_some()
    }

    #[test]
    fn equal_copies_with_noise_are_hardly_ever_called_worse() {
        let guards = Guards::default();
        let mut alarms = 0;
        for seed in 1..=3_000_u64 {
            let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (n, old_n) = (20 + noise.next() % 80, 20 + noise.next() % 2_000);
            let errors =
                |noise: &mut Noise, n: u64| (0..n).filter(|_| noise.next().is_multiple_of(50)).count() as u64;
            let (bad, old_bad) = (errors(&mut noise, n), errors(&mut noise, old_n));
            let new = counts((0..n).map(|_| noise.latency_us()).collect::<Vec<_>>(), bad);
            let old = counts((0..old_n).map(|_| noise.latency_us()).collect::<Vec<_>>(), old_bad);
            alarms += u32::from(is_worse(&Compared { new, old }, &guards));
        }
        assert!(alarms <= 1, "{alarms} false alarms in 3,000 looks");
    }

    #[test]
    fn a_copy_that_fails_every_request_is_found_out_within_a_few() {
        let old = counts((0..400).map(|_| 1_000), 0);
        let new = counts([], 4);
        assert!(is_worse(&Compared { new, old }, &Guards::default()));
    }

    #[test]
    fn one_failed_request_of_twenty_proves_nothing() {
        let old = counts((0..1_000).map(|_| 1_000), 0);
        let new = counts((0..19).map(|_| 1_000), 1);
        assert!(!is_worse(&Compared { new, old }, &Guards::default()));
    }

    #[test]
    fn a_copy_that_fails_a_tenth_is_found_out_where_the_old_one_fails_none() {
        let old = counts((0..500).map(|_| 1_000), 0);
        let new = counts((0..180).map(|_| 1_000), 20);
        assert!(is_worse(&Compared { new, old }, &Guards::default()));
    }

    #[test]
    fn both_sides_failing_alike_is_not_the_new_copys_fault() {
        let old = counts((0..500).map(|_| 1_000), 500);
        let new = counts((0..100).map(|_| 1_000), 100);
        assert!(!is_worse(&Compared { new, old }, &Guards::default()));
    }

    #[test]
    fn without_any_request_on_the_old_side_more_errors_than_allowed_are_still_seen() {
        let new = counts((0..10).map(|_| 1_000), 40);
        let compared = Compared { new, old: OutcomeCounts::default() };
        assert!(is_worse(&compared, &Guards::default()));
    }

    #[test]
    fn a_copy_that_is_five_times_slower_is_worse_and_may_be_when_the_guard_is_off() {
        let old = counts((0..500).map(|i| 10_000 + i), 0);
        let new = counts((0..60).map(|i| 50_000 + i), 0);
        let compared = Compared { new, old };
        assert!(is_worse(&compared, &Guards::default()));
        let off = Guards { p95_increase: None, ..Guards::default() };
        assert!(!is_worse(&compared, &off));
    }

    #[test]
    fn a_difference_that_nobody_feels_is_none() {
        let old = counts((0..500).map(|_| 500), 0);
        let new = counts((0..60).map(|_| 4_000), 0);
        assert!(!is_worse(&Compared { new, old }, &Guards::default()));
    }

    #[test]
    fn the_tails_agree_with_known_values() {
        assert!((binomial_upper_tail(3, 10, 0.5) - 0.945_312_5).abs() < 1e-9);
        assert!((fisher_upper_tail(3, 4, 1, 4) - 0.242_857_142).abs() < 1e-6);
        assert!((ln_factorial(20) - 42.335_616_460_753_485).abs() < 1e-9);
    }
}
