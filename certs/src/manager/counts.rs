//! How attempts ended, since the start of this process.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::domain::Outcome;

/// How often attempts ended how, since the start of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// There is a certificate.
    pub issued: u64,
    /// The order, or the attempt at one, was lost.
    pub failed: u64,
    /// Nothing was ordered: the name does not lead here.
    pub waited_for_dns: u64,
    /// Nothing was ordered: a budget, or an authority, said not now.
    pub put_off: u64,
    /// The order is alive, and goes on later.
    pub continued: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    issued: AtomicU64,
    failed: AtomicU64,
    waited_for_dns: AtomicU64,
    put_off: AtomicU64,
    continued: AtomicU64,
}

impl Counters {
    pub(super) fn count(&self, outcome: &Outcome) {
        let counter = match outcome {
            Outcome::Issued(_) => &self.issued,
            Outcome::WaitingForDns(_) => &self.waited_for_dns,
            Outcome::NotNow { .. } => &self.put_off,
            Outcome::GoesOn { .. } => &self.continued,
            Outcome::Lost { .. } => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            issued: read(&self.issued),
            failed: read(&self.failed),
            waited_for_dns: read(&self.waited_for_dns),
            put_off: read(&self.put_off),
            continued: read(&self.continued),
        }
    }
}
