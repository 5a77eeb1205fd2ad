//! Single-writer services: of these at most one copy runs at any moment, so their clients wait while one takes over
//! from the other.

use serde::{Deserialize, Serialize};

use super::UnixMs;

/// Bounds of a cutover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutoverSettings {
    /// Longest time that requests are held. Edges release by themselves after it, whatever became of the engine; the
    /// engine turns back when two thirds of it are over.
    pub hold_deadline_ms: u32,
    /// Requests that each edge may keep waiting.
    pub hold_max_requests: u32,
    /// Bytes of their heads and bodies that each edge may keep.
    pub hold_max_bytes: u64,
    /// How long one request may wait.
    pub hold_max_age_ms: u32,
    /// Requests per second that each edge releases, at first; it doubles every 5 s. Where requests come more than half as
    /// often, it is twice as many as come.
    pub hold_release_per_s: u32,
    /// How long what is inside of the old copy may take to finish while the others wait.
    pub drain_max_ms: u32,
}

impl Default for CutoverSettings {
    fn default() -> Self {
        Self {
            hold_deadline_ms: 30_000, // what clients and balancers in front of an edge wait for
            hold_max_requests: 10_000,
            hold_max_bytes: 64 << 20,
            hold_max_age_ms: 30_000,
            hold_release_per_s: 1_000,
            drain_max_ms: 5_000,
        }
    }
}

impl CutoverSettings {
    /// Shortest [`CutoverSettings::hold_deadline_ms`]: edges hear of a hold within some milliseconds, and two thirds are for a copy
    /// to stop and another one to start.
    pub const MIN_HOLD_DEADLINE_MS: u32 = 1_000;
    /// Longest of any of its times: no client waits for an hour.
    pub const MAX_MS: u32 = 3_600_000;
    /// Most of [`CutoverSettings::hold_max_requests`].
    pub const MAX_HOLD_REQUESTS: u32 = 1_000_000;
    /// Least [`CutoverSettings::hold_max_bytes`]: the head of one request.
    pub const MIN_HOLD_BYTES: u64 = 1_024;
    /// Most of [`CutoverSettings::hold_max_bytes`]: a tebibyte.
    pub const MAX_HOLD_BYTES: u64 = 1 << 40;
    /// Most of [`CutoverSettings::hold_release_per_s`].
    pub const MAX_HOLD_RELEASE_PER_S: u32 = 1_000_000;

    /// After this time of holding a new copy that is not ready is given up: the rest is for the way back.
    #[must_use]
    pub const fn turn_back_after_ms(&self) -> u64 {
        self.hold_deadline_ms as u64 * 2 / 3
    }
}

/// That the requests of a rollout's service are held, or were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Edges know it by this: the epoch of the rollout.
    pub id: u64,
    /// When it began.
    pub since: UnixMs,
    /// When edges release by themselves.
    pub until: UnixMs,
    /// When it was ended.
    #[serde(default)]
    pub released_at: Option<UnixMs>,
}
