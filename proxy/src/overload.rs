//! Memory bounded by configuration: while this process has more than it may have, new requests are told to come back
//! later. What is under way goes on, and its end is what gives memory back.
//!
//! A few requests of each core go on whatever the memory: where nothing is under way nothing gives memory back either, and
//! the edge would shed for ever what little it could serve.
//!
//! The resident memory is read by the control thread four times a second. A core looks at one flag per request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Time between two looks at the memory.
const INTERVAL: Duration = Duration::from_millis(250);
/// Shedding ends at this share of the limit, so that it does not begin again at once. In percent.
const RESUME_PERCENT: u64 = 95;
/// Requests of a core that are never too many.
const NEVER_SHED_REQUESTS: usize = 4;
/// An edge that has this share of its limit before it has served anybody is told of, in percent.
const TIGHT_PERCENT: u64 = 80;

/// Whether there is too little memory for more requests.
#[derive(Debug)]
pub(crate) struct Overload {
    max_bytes: u64,
    sheds: AtomicBool,
}

impl Overload {
    pub(crate) fn new(max_bytes: u64) -> Arc<Self> {
        let overload = Arc::new(Self { max_bytes, sheds: AtomicBool::new(false) });
        // Not only from the first look on: an edge that begins above its limit serves nobody.
        overload.look();
        if let Some(resident_bytes) = resident_bytes()
            && is_tight(resident_bytes, max_bytes)
        {
            tracing::warn!(
                resident_bytes,
                max_memory_bytes = max_bytes,
                "the edge has most of its memory before it serves anybody: it will shed load soon; give it more"
            );
        }
        overload
    }

    /// Whether a new request is refused; so many are under way on its core, with it.
    pub(crate) fn sheds(&self, in_flight: usize) -> bool {
        self.is_over() && in_flight > NEVER_SHED_REQUESTS
    }

    fn is_over(&self) -> bool {
        self.sheds.load(Ordering::Relaxed)
    }

    /// Looks at the memory again and again.
    pub(crate) async fn keep(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look();
        }
    }

    fn look(&self) {
        if let Some(resident_bytes) = resident_bytes() {
            self.update(resident_bytes);
        }
    }

    fn update(&self, resident_bytes: u64) {
        let sheds = self.is_over();
        let resume_bytes = self.max_bytes / 100 * RESUME_PERCENT;
        let next = resident_bytes > if sheds { resume_bytes } else { self.max_bytes };
        if next == sheds {
            return;
        }
        self.sheds.store(next, Ordering::Relaxed);
        metrics::gauge!("peregrine_edge_sheds_load").set(if next { 1.0 } else { 0.0 });
        if next {
            tracing::warn!(
                resident_bytes,
                max_memory_bytes = self.max_bytes,
                "more memory than allowed: new requests are refused until it is less; give the edge more, or lower \
                 max_connections and the windows of HTTP/2"
            );
        } else {
            tracing::info!(resident_bytes, max_memory_bytes = self.max_bytes, "new requests are taken again");
        }
    }
}

const fn is_tight(resident_bytes: u64, max_bytes: u64) -> bool {
    resident_bytes / TIGHT_PERCENT >= max_bytes / 100
}

/// Memory of this process that lies in RAM (proc(5), VmRSS). `None` where the system does not tell.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_shed_above_the_limit_and_until_it_is_well_below() {
        let overload = Overload { max_bytes: 1_000, sheds: AtomicBool::new(false) };
        for (resident, sheds) in [
            (900, false),
            (1_000, false),
            (1_001, true),
            (980, true),
            (951, true),
            (950, false),
            (999, false),
        ] {
            overload.update(resident);
            assert_eq!(overload.sheds(usize::MAX), sheds, "{resident}");
            assert!(!overload.sheds(NEVER_SHED_REQUESTS), "what may give memory back is taken: {resident}");
        }
    }

    #[test]
    fn a_limit_that_leaves_no_room_is_noticed() {
        assert!(is_tight(90_000, 100_000) && is_tight(80_000, 100_000) && is_tight(200_000, 100_000));
        assert!(!is_tight(79_000, 100_000) && !is_tight(0, 100_000));
    }

    #[test]
    fn the_memory_of_this_process_is_known() {
        let before = resident_bytes().expect("is told");
        let block = vec![7_u8; 64 << 20];
        let after = resident_bytes().expect("is told");
        assert!(after >= before + (block.len() as u64) / 2, "{before} {after}");
    }
}
