//! How long an upstream keeps idle connections, as far as that is known.
//!
//! A request that must not be sent twice needs a connection that the upstream is not about to close. Three things
//! tell: what the upstream announces, how long connections were seen to last, and how soon one was found closed.
//! The shortest of them counts, and half of it is safe. As long as nothing is known, nothing is.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Lasting for less than this is no proof of anything: a server that closes at once has not been told apart yet.
const MIN_PROVEN_MS: u32 = 100;
/// After so long without another, a connection that was found closed early was an accident (a reload, a restart).
const FORGET_AFTER_MS: u64 = 60_000;

#[derive(Debug)]
pub(super) struct KeepAlive {
    /// Longest idle time after which a connection was seen open.
    proven_ms: AtomicU32,
    /// What the upstream says (`Keep-Alive: timeout`); `u32::MAX` is nothing.
    announced_ms: AtomicU32,
    /// Shortest idle time after which a connection was found closed, and when that was last so; `u32::MAX` is never.
    closed_ms: AtomicU32,
    closed_at_ms: AtomicU64,
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self {
            proven_ms: AtomicU32::new(0),
            announced_ms: AtomicU32::new(u32::MAX),
            closed_ms: AtomicU32::new(u32::MAX),
            closed_at_ms: AtomicU64::new(0),
        }
    }
}

impl KeepAlive {
    pub(super) fn note_open(&self, idle_ms: u64) {
        self.proven_ms.fetch_max(saturate(idle_ms), Relaxed);
    }

    pub(super) fn note_announced(&self, timeout_ms: u32) {
        self.announced_ms.store(timeout_ms, Relaxed);
    }

    pub(super) fn note_closed(&self, idle_ms: u64, now_ms: u64) {
        if now_ms.saturating_sub(self.closed_at_ms.load(Acquire)) > FORGET_AFTER_MS {
            self.closed_ms.store(u32::MAX, Relaxed);
        }
        self.closed_ms.fetch_min(saturate(idle_ms), Relaxed);
        self.closed_at_ms.store(now_ms, Release);
    }

    /// Idle time below which a connection may be trusted with a request that must not be sent twice.
    pub(super) fn trusted_ms(&self, now_ms: u64) -> u64 {
        let announced_ms = self.announced_ms.load(Relaxed);
        let proven_ms = match (self.proven_ms.load(Relaxed), announced_ms) {
            (proven_ms @ MIN_PROVEN_MS.., u32::MAX) => proven_ms,
            (_, u32::MAX) => return 0,
            (_, announced_ms) => announced_ms,
        };
        let is_recent = now_ms.saturating_sub(self.closed_at_ms.load(Acquire)) <= FORGET_AFTER_MS;
        let closed_ms = if is_recent { self.closed_ms.load(Relaxed) } else { u32::MAX };
        u64::from(proven_ms.min(closed_ms) / 2)
    }

    /// Takes over what is known of another copy of the same service: most likely the same program.
    pub(super) fn inherit(&self, other: &Self) {
        self.proven_ms.fetch_max(other.proven_ms.load(Relaxed), Relaxed);
        self.announced_ms.fetch_min(other.announced_ms.load(Relaxed), Relaxed);
        self.closed_ms.fetch_min(other.closed_ms.load(Relaxed), Relaxed);
        self.closed_at_ms.fetch_max(other.closed_at_ms.load(Relaxed), Relaxed);
    }
}

fn saturate(ms: u64) -> u32 {
    u32::try_from(ms).unwrap_or(u32::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_trusted_before_a_connection_has_lasted() {
        let known = KeepAlive::default();
        assert_eq!(known.trusted_ms(1_000), 0);
        known.note_open(99);
        assert_eq!(known.trusted_ms(1_000), 0);
        known.note_open(300);
        known.note_open(200);
        assert_eq!(known.trusted_ms(1_000), 150);
    }

    #[test]
    fn half_of_what_is_announced_is_trusted_at_once() {
        let known = KeepAlive::default();
        known.note_announced(5_000);
        assert_eq!(known.trusted_ms(1_000), 2_500);
        known.note_open(60_000);
        assert_eq!(known.trusted_ms(1_000), 2_500, "what is said counts more than what was seen");
    }

    #[test]
    fn a_connection_that_was_found_closed_halves_the_trust_until_it_is_forgotten() {
        let known = KeepAlive::default();
        known.note_open(4_000);
        known.note_closed(10, 5_000);
        known.note_closed(900, 6_000);
        assert_eq!(known.trusted_ms(65_000), 5);
        assert_eq!(known.trusted_ms(66_001), 2_000);
        known.note_closed(900, 80_000);
        assert_eq!(known.trusted_ms(80_000), 450, "the old one does not come back");
    }

    #[test]
    fn a_new_copy_begins_with_what_is_known_of_the_others() {
        let (known, fresh) = (KeepAlive::default(), KeepAlive::default());
        known.note_open(4_000);
        known.note_closed(1_000, 5_000);
        fresh.inherit(&known);
        assert_eq!(fresh.trusted_ms(5_000), 500);
    }
}
