//! The edge's one clock: monotonic, the same in every core, so that what one core writes into an
//! upstream (an ejection, a slow start) means the same to another.

use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// Where the clock starts. Not 0, because routing takes 0 for "never".
const START_US: u64 = 1_000_000;

/// Microseconds of the edge's monotonic clock, never 0.
#[must_use]
pub fn now_us() -> u64 {
    let elapsed = START.get_or_init(Instant::now).elapsed();
    START_US + elapsed.as_secs() * 1_000_000 + u64::from(elapsed.subsec_micros())
}

/// Milliseconds of the same clock.
#[must_use]
pub fn now_ms() -> u64 {
    now_us() / 1_000
}
