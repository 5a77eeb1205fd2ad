//! Faults that a running origin can be given: what a broken version or a dying copy looks like from outside.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How an origin misbehaves. The default is a sound origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Percentage of requests answered with 500, spread evenly; health probes are not touched by it.
    pub error_percent: u8,
    /// Wait before every answer, in milliseconds.
    pub latency_ms: u64,
    /// What `/healthz` says: 200 or 503.
    pub healthy: bool,
    /// Take requests and answer none, not even health probes, until it is switched off.
    pub hang: bool,
}

impl Default for Fault {
    fn default() -> Self {
        Self { error_percent: 0, latency_ms: 0, healthy: true, hang: false }
    }
}

/// A change of some faults: absent fields stay as they are.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultChange {
    /// See [`Fault::error_percent`].
    pub error_percent: Option<u8>,
    /// See [`Fault::latency_ms`].
    pub latency_ms: Option<u64>,
    /// See [`Fault::healthy`].
    pub healthy: Option<bool>,
    /// See [`Fault::hang`].
    pub hang: Option<bool>,
}

impl FaultChange {
    fn apply(self, fault: &mut Fault) {
        fault.error_percent = self.error_percent.unwrap_or(fault.error_percent);
        fault.latency_ms = self.latency_ms.unwrap_or(fault.latency_ms);
        fault.healthy = self.healthy.unwrap_or(fault.healthy);
        fault.hang = self.hang.unwrap_or(fault.hang);
    }
}

/// The switchboard of one origin.
#[derive(Debug)]
pub(super) struct Faults {
    now: watch::Sender<Fault>,
    rolled: AtomicU64,
}

impl Faults {
    pub(super) fn new(fault: Fault) -> Self {
        Self { now: watch::Sender::new(fault), rolled: AtomicU64::new(0) }
    }

    pub(super) fn now(&self) -> Fault {
        *self.now.borrow()
    }

    pub(super) fn change(&self, change: FaultChange) -> Fault {
        self.now.send_modify(|fault| change.apply(fault));
        self.now()
    }

    /// Whether the next request is one of the failing percentage. Counted, not drawn, so that 10 % of 1,000 is 100.
    pub(super) fn next_fails(&self, error_percent: u8) -> bool {
        let percent = u64::from(error_percent.min(100));
        if percent == 0 {
            return false;
        }
        let rolled = self.rolled.fetch_add(1, Ordering::Relaxed);
        (rolled + 1) * percent / 100 > rolled * percent / 100
    }

    /// Returns once the origin does not hang.
    pub(super) async fn not_hanging(&self) {
        let mut watching = self.now.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        drop(watching.wait_for(|fault| !fault.hang).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failing_percentage_is_exact_and_spread() {
        let faults = Faults::new(Fault::default());
        let failed: Vec<bool> = (0..1000).map(|_| faults.next_fails(10)).collect();
        assert_eq!(failed.iter().filter(|failed| **failed).count(), 100);
        assert!(failed.chunks(10).all(|ten| ten.iter().filter(|failed| **failed).count() == 1));
        assert!((0..100).all(|_| faults.next_fails(100)));
        assert!(!(0..100).any(|_| faults.next_fails(0)));
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let faults = Faults::new(Fault { latency_ms: 7, ..Fault::default() });
        let now = faults.change(FaultChange { healthy: Some(false), ..FaultChange::default() });
        assert_eq!(now, Fault { latency_ms: 7, healthy: false, ..Fault::default() });
    }
}
