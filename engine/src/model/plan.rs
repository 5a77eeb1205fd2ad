//! Plans: everything that a rollout will do, decided before it does anything.

use serde::{Deserialize, Serialize};

use super::{InstanceId, MoveSettings};

/// Format of [`Plan`]. A plan of a format that this binary does not know is held, never guessed at.
pub const PLAN_FORMAT: u32 = 1;

/// What kind of change a rollout is. The machine is the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutKind {
    /// A new version.
    Deploy,
    /// A new place.
    Move,
    /// An earlier version or place.
    Rollback,
    /// Another number of copies.
    Scale,
}

/// An immutable plan with nothing left to choose.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`PLAN_FORMAT`].
    pub format: u32,
    /// Service.
    pub service: String,
    /// Kind.
    pub kind: RolloutKind,
    /// Version that serves before; `None` at the first deploy.
    pub from_version: Option<u32>,
    /// Version that serves after.
    pub to_version: u32,
    /// Copies to start.
    pub add: Vec<PlannedInstance>,
    /// Copies to drain and release.
    pub retire: Vec<InstanceId>,
    /// Copies that serve before and after.
    pub keep: Vec<InstanceId>,
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Settings, resolved.
    pub settings: MoveSettings,
    /// Why it cannot be done. Not empty: it is not started.
    pub blockers: Vec<Finding>,
    /// What the operator should know.
    pub warnings: Vec<Finding>,
    /// What it is expected to take.
    pub estimate: Estimate,
    /// SHA-256 over all of the above but the ids of new instances, in hex: the same ask on the same
    /// state gives the same hash.
    pub hash: String,
}

/// A copy that a plan starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedInstance {
    /// Its id, given here so that starting it can be repeated.
    pub id: InstanceId,
    /// Machine.
    pub machine: String,
    /// Version number.
    pub version: u32,
}

/// One step of a plan. Each is idempotent, forward and back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Take the service for this rollout, and an epoch.
    Claim,
    /// Bring the image to a machine, by digest.
    Prepare {
        /// Machine.
        machine: String,
    },
    /// Hold the requests of the service, until nobody is inside of the old copies.
    Hold,
    /// Stop an old copy before a new one is started, and confirm that it does not run.
    Stop {
        /// Instance.
        instance: InstanceId,
    },
    /// Start a copy.
    Start {
        /// Instance.
        instance: InstanceId,
    },
    /// Wait until the new copies have shown that they work.
    Warm,
    /// Give the new copies this share of the traffic, and judge them.
    Shift {
        /// Percent.
        percent: u8,
    },
    /// Retire the old copies and wait for their receipts.
    Drain,
    /// Keep the old copies ready.
    Soak,
    /// The new copy gets the requests: those that wait, and all others.
    Switch,
    /// Stop and remove a copy, and confirm that it is gone.
    Release {
        /// Instance.
        instance: InstanceId,
    },
}

/// Something that a plan found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable code, such as `machine.unreachable`.
    pub code: String,
    /// What it is.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// What a rollout is expected to take.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Time without image transfer and container start.
    pub duration_ms: u64,
    /// Pause that clients see: 0 for stateless services.
    pub pause_ms: u64,
    /// Bytes of image to bring to the target; `None` if not known.
    pub transfer_bytes: Option<u64>,
}
