//! How well an upstream does: what probes say, whether it is ejected, how long it takes to answer.
//!
//! Written by every core without a lock. A reading may be a request old; none of these decides whether a
//! request is lost, only where the next one goes.

use std::sync::atomic::{
    AtomicU8, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use super::Health;
use crate::spec::Passive;

/// Time constant of the latency estimate.
const EWMA_TAU_MS: f64 = 10_000.0;

/// Least share of its weight that an upstream gets in its slow start: less would take for ever to learn.
const MIN_RAMP_PERMILLE: u64 = 100;

#[derive(Debug, Default)]
pub(super) struct Vitals {
    health: AtomicU8,
    ready_since_ms: AtomicU64,
    pub(super) probe_latency_us: AtomicU64,
    consecutive_failures: AtomicU32,
    ejections: AtomicU32,
    pub(super) ejected_until_ms: AtomicU64,
    /// Peak-EWMA of the time to the response head: bits of an `f64` in microseconds, and when.
    ewma_us: AtomicU64,
    ewma_at_ms: AtomicU64,
}

impl Vitals {
    pub(super) fn health(&self) -> Health {
        match self.health.load(Relaxed) {
            1 => Health::Healthy,
            2 => Health::Unhealthy,
            _ => Health::Unknown,
        }
    }

    pub(super) fn set_health(&self, health: Health, now_ms: u64) {
        let value = match health {
            Health::Unknown => 0,
            Health::Healthy => 1,
            Health::Unhealthy => 2,
        };
        if health == Health::Healthy && self.health.load(Relaxed) != value {
            // Before the health, so that nobody sees it healthy and takes the slow start as over.
            self.ready_since_ms.store(now_ms, Relaxed);
            self.ejected_until_ms.store(0, Relaxed);
            self.ejections.store(0, Relaxed);
            self.consecutive_failures.store(0, Relaxed);
        }
        self.health.store(value, Release);
    }

    pub(super) fn is_well(&self, now_ms: u64) -> bool {
        self.health.load(Acquire) != 2 && !self.is_ejected(now_ms)
    }

    fn is_ejected(&self, now_ms: u64) -> bool {
        self.ejected_until_ms.load(Relaxed) > now_ms
    }

    /// Weight in thousandths of its own, while the slow start lasts.
    pub(super) fn ramp_permille(&self, now_ms: u64, slow_start_ms: u32) -> u64 {
        if slow_start_ms == 0 {
            return 1_000;
        }
        let since = self.ready_since_ms.load(Relaxed);
        let age = now_ms.saturating_sub(since);
        if since == 0 || age >= u64::from(slow_start_ms) {
            return 1_000;
        }
        (age * 1_000 / u64::from(slow_start_ms)).max(MIN_RAMP_PERMILLE)
    }

    /// A good answer: the failures in a row are over, and so is the memory of earlier ejections.
    pub(super) fn clear_strikes(&self, now_ms: u64) {
        if self.consecutive_failures.load(Relaxed) != 0 {
            self.consecutive_failures.store(0, Relaxed);
        }
        // An answer that was under way when the upstream was ejected says nothing of what came later.
        if self.ejections.load(Relaxed) != 0 && !self.is_ejected(now_ms) {
            self.ejections.store(0, Relaxed);
        }
    }

    pub(super) fn strike(&self, passive: &Passive, now_ms: u64) {
        let until = self.ejected_until_ms.load(Relaxed);
        // What fails during an ejection was under way when it began, or had no other place to go (the
        // panic rule): it is no news, and must not lengthen the ejection.
        if passive.consecutive_failures == 0 || until > now_ms {
            return;
        }
        let strikes = self.consecutive_failures.fetch_add(1, Relaxed) + 1;
        if strikes < passive.consecutive_failures {
            return;
        }
        let times = u64::from(self.ejections.load(Relaxed)) + 1;
        let ejection_ms =
            (u64::from(passive.base_ejection_ms) * times).min(u64::from(passive.max_ejection_ms));
        // Of several cores that come here at once, one ejects.
        let ours = self.ejected_until_ms.compare_exchange(until, now_ms + ejection_ms, AcqRel, Relaxed);
        if ours.is_ok() {
            self.ejections.fetch_add(1, Relaxed);
            self.consecutive_failures.store(0, Relaxed);
        }
    }

    /// The estimate decayed to now, in microseconds; 0 before the first sample.
    pub(super) fn latency_estimate_us(&self, now_ms: u64) -> f64 {
        let value = f64::from_bits(self.ewma_us.load(Relaxed));
        value * decay(now_ms.saturating_sub(self.ewma_at_ms.load(Relaxed)))
    }

    pub(super) fn learn_latency(&self, latency_us: u64, now_ms: u64) {
        #[expect(clippy::cast_precision_loss)]
        let sample = latency_us as f64;
        let at = self.ewma_at_ms.swap(now_ms, Relaxed);
        let keep = decay(now_ms.saturating_sub(at));
        let before = f64::from_bits(self.ewma_us.load(Relaxed));
        // A peak is believed at once, an improvement slowly (Finagle's peak-EWMA). Two cores that write
        // at the same time lose one sample, which an estimate can bear and a lock is not worth.
        let next = if sample > before * keep { sample } else { before * keep + sample * (1.0 - keep) };
        self.ewma_us.store(next.to_bits(), Relaxed);
    }
}

fn decay(elapsed_ms: u64) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let elapsed = elapsed_ms as f64;
    (-elapsed / EWMA_TAU_MS).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSIVE: Passive =
        Passive { consecutive_failures: 5, base_ejection_ms: 5_000, max_ejection_ms: 12_000 };

    fn fail(vitals: &Vitals, times: u32, now_ms: u64) {
        (0..times).for_each(|_| vitals.strike(&PASSIVE, now_ms));
    }

    #[test]
    fn a_burst_of_failures_ejects_once_for_the_base_time() {
        let vitals = Vitals::default();
        fail(&vitals, 4, 1_000);
        assert!(vitals.is_well(1_000), "four of five");
        fail(&vitals, 200, 1_000);
        assert!(!vitals.is_well(5_999));
        assert!(vitals.is_well(6_000), "until {:?}", vitals.ejected_until_ms);
    }

    #[test]
    fn each_ejection_without_a_success_between_is_longer_up_to_the_limit() {
        let vitals = Vitals::default();
        let mut now_ms = 1_000;
        for expected_ms in [5_000, 10_000, 12_000, 12_000] {
            fail(&vitals, 5, now_ms);
            assert_eq!(vitals.ejected_until_ms.load(Relaxed), now_ms + expected_ms);
            now_ms += expected_ms;
        }
    }

    #[test]
    fn a_success_after_the_ejection_makes_the_next_one_short_again() {
        let vitals = Vitals::default();
        fail(&vitals, 5, 1_000);
        vitals.clear_strikes(2_000);
        fail(&vitals, 5, 6_000);
        assert_eq!(vitals.ejected_until_ms.load(Relaxed), 16_000, "a late answer is not a recovery");
        vitals.clear_strikes(16_000);
        fail(&vitals, 5, 20_000);
        assert_eq!(vitals.ejected_until_ms.load(Relaxed), 25_000);
    }

    #[test]
    fn a_success_between_failures_keeps_the_upstream_in() {
        let vitals = Vitals::default();
        for _ in 0..100 {
            fail(&vitals, 4, 1_000);
            vitals.clear_strikes(1_000);
        }
        assert!(vitals.is_well(1_000));
    }

    #[test]
    fn zero_allowed_failures_means_never_ejected() {
        let vitals = Vitals::default();
        let never = Passive { consecutive_failures: 0, ..PASSIVE };
        (0..1_000).for_each(|_| vitals.strike(&never, 1_000));
        assert!(vitals.is_well(1_000));
    }

    #[test]
    fn a_probe_that_finds_it_healthy_again_ends_an_ejection_and_starts_the_ramp() {
        let vitals = Vitals::default();
        vitals.set_health(Health::Unhealthy, 1_000);
        fail(&vitals, 5, 1_000);
        vitals.set_health(Health::Healthy, 2_000);
        assert!(vitals.is_well(2_000));
        let ramp: Vec<u64> =
            [2_000, 7_000, 11_999, 12_000].iter().map(|now| vitals.ramp_permille(*now, 10_000)).collect();
        assert_eq!(ramp, [100, 500, 999, 1_000]);
        vitals.set_health(Health::Healthy, 50_000);
        assert_eq!(vitals.ramp_permille(50_000, 10_000), 1_000, "staying healthy does not start it again");
    }

    #[test]
    fn a_latency_peak_is_believed_at_once_and_an_improvement_slowly() {
        let vitals = Vitals::default();
        assert_eq!(vitals.latency_estimate_us(1).to_bits(), 0.0_f64.to_bits());
        vitals.learn_latency(1_000, 1_000);
        vitals.learn_latency(90_000, 1_001);
        assert!(vitals.latency_estimate_us(1_001) >= 90_000.0);
        vitals.learn_latency(1_000, 1_101);
        assert!(vitals.latency_estimate_us(1_101) > 85_000.0);
        for now_ms in (2_000..62_000).step_by(100) {
            vitals.learn_latency(1_000, now_ms);
        }
        assert!(vitals.latency_estimate_us(62_000) < 2_000.0);
    }
}
