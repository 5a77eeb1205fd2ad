//! Rollouts: a plan on its way.

use serde::{Deserialize, Serialize};

use super::{Hold, Plan, Receipt, RolloutId, UnixMs};

/// The phases, under the same names everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Deciding.
    Plan,
    /// Getting a machine.
    Provision,
    /// Bringing the image.
    Prepare,
    /// Copying volumes.
    Copy,
    /// Starting the copies.
    Start,
    /// Probing them.
    Warm,
    /// Shifting the traffic.
    Shift,
    /// Draining the old copies.
    Drain,
    /// Keeping them ready.
    Soak,
    /// Giving them back.
    Release,
}

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutState {
    /// On its way forward.
    Running,
    /// Held by the operator, or by a shift without a verdict.
    Paused,
    /// On its way back.
    RollingBack,
    /// Done.
    Succeeded,
    /// Back on the old copies because of a failure or a guard.
    RolledBack,
    /// Back on the old copies because it was asked for.
    Aborted,
    /// It could not be done; the service is as it was (or had no copy before).
    Failed,
    /// An undo failed; [`Rollout::leftovers`] says what is left.
    NeedsOperator,
}

impl RolloutState {
    /// Whether it has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(self, Self::Running | Self::Paused | Self::RollingBack)
    }
}

/// What an operator asked of a running rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Nothing: go on.
    #[default]
    Run,
    /// Stay at the present weights.
    Pause,
    /// Skip what is left of the present step's waiting, or the soak.
    Promote,
    /// Go back to the old copies.
    Abort,
}

/// A plan on its way, with what is known of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Id.
    pub id: RolloutId,
    /// The plan; it never changes.
    pub plan: Plan,
    /// Where it stands.
    pub state: RolloutState,
    /// Phase of the present step.
    pub phase: Phase,
    /// Index of the present step in the plan.
    pub step: usize,
    /// Fencing epoch.
    pub epoch: u64,
    /// What was asked of it.
    pub control: Control,
    /// Percent of the traffic on the new copies.
    pub weight_percent: u8,
    /// Who asked for it, and why.
    pub reason: String,
    /// When it began.
    pub started_at: UnixMs,
    /// When it ended.
    pub ended_at: Option<UnixMs>,
    /// Begin of each phase, in order.
    pub phases: Vec<(Phase, UnixMs)>,
    /// What the present step waits for, in words.
    pub waiting_for: Option<String>,
    /// Why it failed or went back: code, message, hint.
    pub problem: Option<super::Finding>,
    /// The hold of its service's requests.
    #[serde(default)]
    pub hold: Option<Hold>,
    /// What an undo could not clean up.
    pub leftovers: Vec<String>,
    /// Bytes of image brought to targets.
    pub transferred_bytes: u64,
    /// What mirroring has shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<super::MirrorReport>,
    /// The receipt, at the end.
    pub receipt: Option<Receipt>,
}

/// Counts over the whole rollout so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests sent to old and new copies.
    pub requests: u64,
    /// Answers 5xx and requests without an answer.
    pub failed: u64,
    /// Longest time to a response head, in microseconds, bucketed.
    pub longest_us: u64,
    /// Median time to a response head, in microseconds, bucketed.
    #[serde(default)]
    pub typical_us: u64,
}

impl Totals {
    /// How much longer than the typical answer the slowest one took, in microseconds: the longest extra wait of a
    /// receipt, unless a request was held for longer.
    #[must_use]
    pub const fn longest_extra_us(&self) -> u64 {
        self.longest_us.saturating_sub(self.typical_us)
    }
}

/// A live reading of a rollout, about once a second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When.
    pub at: UnixMs,
    /// Percent on the new copies.
    pub weight_percent: u8,
    /// Old copies.
    pub from: SideSample,
    /// New copies.
    pub to: SideSample,
    /// Since the rollout began.
    pub totals: Totals,
}

/// One side of a [`Sample`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SideSample {
    /// Requests per second since the last sample.
    pub requests_per_s: f64,
    /// Leases out now.
    pub in_flight: u64,
    /// Errors since the last sample.
    pub errors: u64,
    /// Time to the response head since the last sample, in microseconds; `None` without samples.
    pub p50_us: Option<u64>,
    /// 95th percentile.
    pub p95_us: Option<u64>,
    /// 99th percentile.
    pub p99_us: Option<u64>,
}
