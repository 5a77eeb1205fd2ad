//! Holds as they travel: their end as how long they still last, because the clocks of two processes differ.

use peregrine_routing::{HoldCounts, HoldSpec};
use serde::{Deserialize, Serialize};

/// A [`HoldSpec`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireHold {
    id: u64,
    /// On its way how long it still lasts; before and after it the moment, by the clock of the place.
    until_ms: u64,
    max_requests: u32,
    max_bytes: u64,
    max_age_ms: u32,
    release_per_s: u32,
}

impl WireHold {
    pub(super) const fn departs(&mut self, now_ms: u64) {
        self.until_ms = self.until_ms.saturating_sub(now_ms);
    }

    pub(super) const fn arrives(&mut self, now_ms: u64) {
        self.until_ms = self.until_ms.saturating_add(now_ms);
    }
}

impl From<&HoldSpec> for WireHold {
    fn from(hold: &HoldSpec) -> Self {
        let HoldSpec { id, until_ms, max_requests, max_bytes, max_age_ms, release_per_s } = *hold;
        Self { id, until_ms, max_requests, max_bytes, max_age_ms, release_per_s }
    }
}

impl From<WireHold> for HoldSpec {
    fn from(hold: WireHold) -> Self {
        let WireHold { id, until_ms, max_requests, max_bytes, max_age_ms, release_per_s } = hold;
        Self { id, until_ms, max_requests, max_bytes, max_age_ms, release_per_s }
    }
}

/// A [`HoldCounts`] on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireHoldCounts {
    waiting: u64,
    bytes: u64,
    held: u64,
    released: u64,
    overflowed: u64,
    aged_out: u64,
    left: u64,
    unserved: u64,
    hold: Option<u64>,
    longest_wait_us: u64,
}

impl From<HoldCounts> for WireHoldCounts {
    fn from(counts: HoldCounts) -> Self {
        let HoldCounts {
            waiting,
            bytes,
            held,
            released,
            overflowed,
            aged_out,
            left,
            unserved,
            hold,
            longest_wait_us,
        } = counts;
        Self { waiting, bytes, held, released, overflowed, aged_out, left, unserved, hold, longest_wait_us }
    }
}

impl From<WireHoldCounts> for HoldCounts {
    fn from(counts: WireHoldCounts) -> Self {
        let WireHoldCounts {
            waiting,
            bytes,
            held,
            released,
            overflowed,
            aged_out,
            left,
            unserved,
            hold,
            longest_wait_us,
        } = counts;
        Self { waiting, bytes, held, released, overflowed, aged_out, left, unserved, hold, longest_wait_us }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_a_hold_arrive_as_they_were_sent() {
        let counts = HoldCounts {
            waiting: 1,
            bytes: 2,
            held: 3,
            released: 4,
            overflowed: 5,
            aged_out: 6,
            left: 7,
            unserved: 8,
            hold: Some(9),
            longest_wait_us: 10,
        };
        assert_eq!(HoldCounts::from(WireHoldCounts::from(counts)), counts);
    }
}
