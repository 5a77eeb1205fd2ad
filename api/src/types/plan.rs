//! Plans.

use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{MoveKind, MoveSettings};

/// Everything that a rollout would do, decided before it does anything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// Service.
    pub service: String,
    /// Kind of change.
    pub kind: MoveKind,
    /// Version that serves before; `null` at the first deploy.
    pub from_version: Option<u32>,
    /// Version that serves after.
    pub to_version: u32,
    /// Copies to start. Their ids are given anew for each plan.
    pub add: Vec<PlannedInstance>,
    /// Ids of the copies to drain and release.
    pub retire: Vec<String>,
    /// Ids of the copies that serve before and after.
    pub keep: Vec<String>,
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Settings, resolved.
    pub settings: MoveSettings,
    /// Why it cannot be done. Not empty: it would not be started.
    pub blockers: Vec<Finding>,
    /// What the operator should know.
    pub warnings: Vec<Finding>,
    /// What it is expected to take.
    pub estimate: Estimate,
    /// Hash of the plan: give it back as `plan_hash` to start this plan and no other.
    pub hash: String,
}

/// A copy that a plan starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedInstance {
    /// Instance id.
    pub id: String,
    /// Machine.
    pub machine: String,
    /// Version number.
    pub version: u32,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Take the service for this rollout.
    Claim,
    /// Bring the image to a machine.
    Prepare {
        /// Machine.
        machine: String,
    },
    /// Hold the requests of the service, until nobody is inside of the old copies.
    Hold,
    /// Stop an old copy before a new one is started, and confirm that it does not run.
    Stop {
        /// Instance id.
        instance: String,
    },
    /// Start a copy.
    Start {
        /// Instance id.
        instance: String,
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
        /// Instance id.
        instance: String,
    },
}

/// Something that a plan, a check or a rollout found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// Stable code, such as `machine.unreachable`.
    pub code: String,
    /// What it is.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// What a rollout is expected to take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// Time without image transfer and container start.
    pub duration_ms: u64,
    /// Pause that clients see: 0 for stateless services.
    pub pause_ms: u64,
    /// Bytes of image to bring to the target; `null` if not known.
    pub transfer_bytes: Option<u64>,
}

impl From<&engine::Plan> for Plan {
    fn from(plan: &engine::Plan) -> Self {
        let ids = |ids: &[engine::InstanceId]| ids.iter().map(ToString::to_string).collect();
        Self {
            service: plan.service.clone(),
            kind: plan.kind.into(),
            from_version: plan.from_version,
            to_version: plan.to_version,
            add: plan.add.iter().map(Into::into).collect(),
            retire: ids(&plan.retire),
            keep: ids(&plan.keep),
            steps: plan.steps.iter().map(Into::into).collect(),
            settings: (&plan.settings).into(),
            blockers: plan.blockers.iter().map(Into::into).collect(),
            warnings: plan.warnings.iter().map(Into::into).collect(),
            estimate: (&plan.estimate).into(),
            hash: plan.hash.clone(),
        }
    }
}

impl From<&engine::PlannedInstance> for PlannedInstance {
    fn from(planned: &engine::PlannedInstance) -> Self {
        Self { id: planned.id.to_string(), machine: planned.machine.clone(), version: planned.version }
    }
}

impl From<&engine::Step> for Step {
    fn from(step: &engine::Step) -> Self {
        match step {
            engine::Step::Claim => Self::Claim,
            engine::Step::Prepare { machine } => Self::Prepare { machine: machine.clone() },
            engine::Step::Hold => Self::Hold,
            engine::Step::Stop { instance } => Self::Stop { instance: instance.to_string() },
            engine::Step::Start { instance } => Self::Start { instance: instance.to_string() },
            engine::Step::Warm => Self::Warm,
            engine::Step::Shift { percent } => Self::Shift { percent: *percent },
            engine::Step::Drain => Self::Drain,
            engine::Step::Soak => Self::Soak,
            engine::Step::Switch => Self::Switch,
            engine::Step::Release { instance } => Self::Release { instance: instance.to_string() },
        }
    }
}

impl From<&engine::Finding> for Finding {
    fn from(finding: &engine::Finding) -> Self {
        Self { code: finding.code.clone(), message: finding.message.clone(), hint: finding.hint.clone() }
    }
}

impl From<&engine::Estimate> for Estimate {
    fn from(estimate: &engine::Estimate) -> Self {
        Self {
            duration_ms: estimate.duration_ms,
            pause_ms: estimate.pause_ms,
            transfer_bytes: estimate.transfer_bytes,
        }
    }
}
