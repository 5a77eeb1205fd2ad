//! When traffic that is inside of an upstream that leaves has used up its time. Goes down with the table, so that an edge
//! ends a drain by itself, whatever has become of its engine.

use crate::class::{PerClass, TrafficClass};
use crate::upstream::Upstream;

/// The time of one class, in milliseconds after the upstream was retired. [`u64::MAX`] is never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainTime {
    /// What is inside is asked to end politely.
    pub close_ms: u64,
    /// What is inside is ended, and named in the receipt.
    pub cut_ms: u64,
}

impl Default for DrainTime {
    /// Never: nothing is ended that nobody has set a time for.
    fn default() -> Self {
        Self { close_ms: u64::MAX, cut_ms: u64::MAX }
    }
}

/// What becomes due in a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// What is inside is asked to end politely.
    Close,
    /// What is inside is ended, and named in the receipt; the copy is stopped only when it is empty.
    Cut,
}

impl Due {
    /// Says so to a retired upstream. Doing it again changes nothing.
    pub fn tell(self, upstream: &Upstream, class: TrafficClass) {
        match self {
            Self::Close if !upstream.is_closing(class) => upstream.close_class(class),
            Self::Cut if !upstream.is_class_cut(class) => upstream.cut_class(class),
            Self::Close | Self::Cut => {}
        }
    }
}

impl PerClass<DrainTime> {
    /// Everything that becomes due, in milliseconds after the beginning of the drain, the next one first.
    #[must_use]
    pub fn timetable(&self) -> Vec<(u64, Due, TrafficClass)> {
        let of_class = |class: TrafficClass| {
            let DrainTime { close_ms, cut_ms } = self[class];
            [(close_ms, Due::Close, class), (cut_ms, Due::Cut, class)]
        };
        let mut timetable: Vec<_> = TrafficClass::ALL.into_iter().flat_map(of_class).collect();
        timetable.sort_unstable();
        timetable
    }
}
