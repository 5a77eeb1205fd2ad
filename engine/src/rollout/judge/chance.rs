//! What chance does: factorials, binomial ranks, and evidence that may be looked at at any time.

/// Evidence against "the new copies are no worse", as the value of a bet at fair odds (an e-process).
///
/// Each piece multiplies the stake of every alternative by its likelihood ratio; the value is their mean. As
/// long as the copies are equal, the value is a non-negative supermartingale that begins at 1, so the chance
/// that it *ever* reaches 1/α is at most α, however often it is looked at (Ville 1939; Robbins, "Statistical
/// methods related to the law of the iterated logarithm", Ann. Math. Stat. 41, 1970).
///
/// Half of the stake is on a copy that was bad from the beginning. The other half is put down piece by piece at
/// later beginnings, the k-th with a share of 1/(k(k+1)), so that a copy that was good for long and gets bad is
/// found as well; what is not put down yet keeps its value. A mixture of e-processes is one.
#[derive(Clone, Debug)]
pub(super) struct Evidence<const K: usize> {
    whole: [f64; K],
    recent: [f64; K],
    restarts: u32,
}

impl<const K: usize> Default for Evidence<K> {
    fn default() -> Self {
        Self { whole: [0.0; K], recent: [0.0; K], restarts: 0 }
    }
}

impl<const K: usize> Evidence<K> {
    /// Takes in a piece: the logarithm of the likelihood ratio of each alternative.
    pub(super) fn add(&mut self, log_ratios: &[f64; K]) {
        for (sum, log) in self.whole.iter_mut().zip(log_ratios) {
            *sum += log;
        }
        for (sum, log) in self.recent.iter_mut().zip(log_ratios) {
            *sum += log;
        }
    }

    /// A beginning: from here on, what came before counts for the whole only.
    pub(super) fn restart(&mut self) {
        self.recent = [0.0; K];
        self.restarts += 1;
    }

    /// How many times its stake the bet is worth.
    pub(super) fn value(&self) -> f64 {
        let k = f64::from(self.restarts);
        let recent = if self.restarts == 0 { 0.0 } else { mean_exp(&self.recent) / (k * (k + 1.0)) };
        0.5 * (mean_exp(&self.whole) + recent + 1.0 / (k + 1.0))
    }
}

fn mean_exp(logs: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a handful of alternatives")]
    let count = logs.len() as f64;
    logs.iter().map(|log| log.min(700.0).exp()).sum::<f64>() / count // beyond e^700 there is only infinity
}

/// For each alternative odds ratio ω, the logarithm of its likelihood over that of equal copies: `bad` of the
/// `failures` fell on the `n` requests of one side, the others on the `m` of the other side.
///
/// Given the number of failures, how they fall is Fisher's noncentral hypergeometric distribution, whatever the
/// common error rate was in that stretch of time: a database that fails both sides for a while is no evidence.
pub(super) fn log_odds_ratios<const K: usize>(
    odds: &[f64; K],
    (bad, n): (u64, u64),
    (other_bad, m): (u64, u64),
) -> [f64; K] {
    let failures = bad + other_bad;
    let (from, to) = (failures.saturating_sub(m), failures.min(n));
    if failures == 0 || from == to {
        return [0.0; K]; // it could not have fallen otherwise
    }
    let weight = |x: u64| ln_choose(n, x) + ln_choose(m, failures - x);
    let top = (from..=to).map(weight).fold(f64::NEG_INFINITY, f64::max);
    let central: f64 = (from..=to).map(|x| (weight(x) - top).exp()).sum::<f64>().ln();
    odds.map(|odds| {
        let log_odds = odds.ln();
        // P_ω(x) / P_1(x) = ω^x · Σ w(y) / Σ w(y)·ω^y; counted from `to`, so that nothing overflows.
        let tilted: f64 =
            (from..=to).map(|y| (weight(y) - top - log_odds * count(to - y)).exp()).sum::<f64>().ln();
        central - tilted - log_odds * count(to - bad)
    })
}

/// Rank of a lower confidence bound of the `q`-quantile among `n` ordered samples: the sample of this rank
/// lies above the quantile with a chance of at most 10 %. Distribution-free (Conover, "Practical Nonparametric
/// Statistics", 3rd ed., §3.2). `n` is at least 1.
pub(super) fn lower_rank(n: u64, q: f64) -> u64 {
    if n > MAX_EXACT_SAMPLES {
        return normal_rank(n, q).max(1);
    }
    // P(X_(r) > Q) = P(Bin(n, q) < r) ≤ 10 %  ⇔  P(Bin ≥ r) ≥ 90 %.
    let (mut at_least, mut pmf, mut r) = (0.0, q.powf(count(n)), n);
    while r > 1 {
        at_least += pmf;
        if at_least >= 0.9 {
            return r;
        }
        pmf *= count(r) * (1.0 - q) / (q * count(n - r + 1));
        r -= 1;
    }
    1
}

/// Above this the binomial distribution is as good as normal.
const MAX_EXACT_SAMPLES: u64 = 1_000;
/// 90th percentile of the normal distribution.
const Z_90: f64 = 1.281_6;

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank between 0 and n")]
fn normal_rank(n: u64, q: f64) -> u64 {
    let n = count(n);
    (-Z_90).mul_add((n * q * (1.0 - q)).sqrt(), n * q).clamp(0.0, n) as u64
}

/// An upper bound of a proportion (Wilson's score interval, one-sided, 99 %).
pub(super) fn wilson_upper(bad: u64, n: u64) -> f64 {
    const Z: f64 = 2.326;
    if n == 0 {
        return 1.0;
    }
    let (p, n) = (count(bad) / count(n), count(n));
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((middle + half) / (1.0 + Z * Z / n)).min(1.0)
}

#[expect(clippy::cast_precision_loss, reason = "counts of requests are far below 2^52")]
pub(super) const fn count(n: u64) -> f64 {
    n as f64
}

fn ln_choose(n: u64, k: u64) -> f64 {
    ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k)
}

/// Stirling's series, exact to 1e-10 from 10 on; by addition below.
fn ln_factorial(n: u64) -> f64 {
    if n < 10 {
        return (2..=n).map(|i| count(i).ln()).sum();
    }
    let x = count(n) + 1.0;
    (x - 0.5).mul_add(x.ln(), -x) + 0.5 * std::f64::consts::TAU.ln() + 1.0 / (12.0 * x)
        - 1.0 / (360.0 * x.powi(3))
        + 1.0 / (1_260.0 * x.powi(5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factorials_agree_with_known_values() {
        assert!((ln_factorial(20) - 42.335_616_460_753_485).abs() < 1e-9);
        assert!((ln_choose(10, 3) - 120.0_f64.ln()).abs() < 1e-9);
    }

    #[test]
    fn a_likelihood_ratio_is_that_of_fishers_distribution() {
        // One failure, one request of one side and nineteen of the other: chance 1/20 against ω/(ω + 19).
        let [two, many] = log_odds_ratios(&[2.0, 256.0], (1, 1), (0, 19));
        assert!((two.exp() - 20.0 * 2.0 / 21.0).abs() < 1e-9, "{}", two.exp());
        assert!((many.exp() - 20.0 * 256.0 / 275.0).abs() < 1e-9, "{}", many.exp());
        let [other] = log_odds_ratios(&[2.0], (0, 1), (1, 19));
        assert!((other.exp() - 20.0 / 21.0).abs() < 1e-9, "{}", other.exp());
        // Everything failed: it could not have fallen otherwise.
        assert_eq!(log_odds_ratios(&[2.0], (5, 5), (100, 100)), [0.0]);
    }

    #[test]
    fn the_bet_is_fair_when_the_copies_are_equal() {
        // The mean of the likelihood ratio over the central distribution is one.
        let (n, m, failures) = (7_u64, 31_u64, 5_u64);
        let all = ln_choose(n + m, failures);
        for odds in [2.0, 16.0, 256.0] {
            let mean: f64 = (0..=failures)
                .map(|x| {
                    let chance = (ln_choose(n, x) + ln_choose(m, failures - x) - all).exp();
                    let [log] = log_odds_ratios(&[odds], (x, n), (failures - x, m));
                    chance * log.exp()
                })
                .sum();
            assert!((mean - 1.0).abs() < 1e-9, "{odds}: {mean}");
        }
    }

    #[test]
    fn the_lower_rank_is_below_the_quantile_in_nine_of_ten_samples() {
        assert_eq!([1, 2, 5, 10, 20].map(|n| lower_rank(n, 0.95)), [1, 2, 4, 9, 18]);
        let (exact, normal) = (lower_rank(1_000, 0.95), lower_rank(1_001, 0.95));
        assert!(exact.abs_diff(normal) <= 2, "{exact} {normal}");
    }

    #[test]
    fn the_upper_bound_of_a_proportion_shrinks_with_what_is_known() {
        assert_eq!(wilson_upper(0, 0), 1.0);
        assert!(wilson_upper(0, 10) > wilson_upper(0, 1_000));
        assert!((wilson_upper(0, 1_000) - 0.005_38).abs() < 1e-4, "{}", wilson_upper(0, 1_000));
    }

    #[test]
    fn a_stake_that_is_not_put_down_keeps_its_value() {
        let mut evidence = Evidence::<2>::default();
        assert!((evidence.value() - 1.0).abs() < 1e-12);
        for _ in 0..5 {
            evidence.restart();
            assert!((evidence.value() - 0.5 * (1.0 + share(&evidence))).abs() < 1e-12);
        }
        evidence.add(&[f64::NEG_INFINITY; 2]);
        assert!(evidence.value() < 0.1, "{}", evidence.value());
    }

    fn share(evidence: &Evidence<2>) -> f64 {
        let k = f64::from(evidence.restarts);
        1.0 / (k * (k + 1.0)) + 1.0 / (k + 1.0)
    }
}
