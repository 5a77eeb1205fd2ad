//! Bodies of requests that change something.

use peregrine_engine as engine;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{Move, Plan, Service, ServiceSpec};

/// Settings of one rollout; what is left out is the service's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Overrides {
    /// Weights of the new copies in percent, rising, the last one 100.
    #[serde(default)]
    pub steps: Option<Vec<u8>>,
    /// The old copies stay ready for so long after the drain.
    #[serde(default)]
    pub soak_ms: Option<u64>,
    /// Limit on the error ratio of the new copies above that of the old ones.
    #[serde(default)]
    pub error_ratio_increase: Option<f64>,
    /// Limit on the p95 of the new copies above that of the old ones (1.0 is twice); `null` switches it off.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<f64>)]
    pub p95_increase: Option<Option<f64>>,
    /// Copies so many of a thousand safe requests to the new copies while they warm; 0 switches it off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror_permille: Option<u16>,
}

/// Tells `null` (`Some(None)`) from a field that is not there (`None`).
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<f64>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl From<&Overrides> for engine::MoveOverrides {
    fn from(overrides: &Overrides) -> Self {
        Self {
            steps: overrides.steps.clone(),
            soak_ms: overrides.soak_ms,
            error_ratio_increase: overrides.error_ratio_increase,
            p95_increase: overrides.p95_increase,
            mirror_permille: overrides.mirror_permille,
        }
    }
}

/// Bring a service to a machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveRequest {
    /// Service.
    pub service: String,
    /// Machine that it goes to.
    pub to: String,
    /// Only the copies on this machine.
    #[serde(default)]
    pub from: Option<String>,
    /// Settings of this move.
    #[serde(default)]
    pub settings: Overrides,
    /// Why; kept with the move.
    #[serde(default)]
    pub reason: Option<String>,
    /// Start only if the plan is still this one (`hash` of a plan).
    #[serde(default)]
    pub plan_hash: Option<String>,
}

/// Bring a new version of a service to its machines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeployRequest {
    /// The service as it is to be; left out, it stays as it is but for `image`.
    #[serde(default)]
    pub service: Option<ServiceSpec>,
    /// Another image for the service as it is (or as `service` says).
    #[serde(default)]
    pub image: Option<String>,
    /// Machine for the first deploy; later ones stay where they are unless it is given.
    #[serde(default)]
    pub machine: Option<String>,
    /// Settings of this rollout.
    #[serde(default)]
    pub settings: Overrides,
    /// Why; kept with the move.
    #[serde(default)]
    pub reason: Option<String>,
    /// Start only if the plan is still this one (`hash` of a plan).
    #[serde(default)]
    pub plan_hash: Option<String>,
}

/// Back to an earlier version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RollbackRequest {
    /// Version; left out, it is the one before.
    #[serde(default)]
    pub to_version: Option<u32>,
    /// Why; kept with the move.
    #[serde(default)]
    pub reason: Option<String>,
    /// Start only if the plan is still this one (`hash` of a plan).
    #[serde(default)]
    pub plan_hash: Option<String>,
}

/// Another number of copies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ScaleRequest {
    /// How many.
    pub replicas: u32,
    /// Machine for new ones; left out, it is where the others are.
    #[serde(default)]
    pub machine: Option<String>,
    /// Why; kept with the move.
    #[serde(default)]
    pub reason: Option<String>,
    /// Start only if the plan is still this one (`hash` of a plan).
    #[serde(default)]
    pub plan_hash: Option<String>,
}

/// What came of a change of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Applied {
    /// The service as it is now wanted.
    pub service: Service,
    /// The move that brings it about; `null` when only settings changed, which is done already.
    #[serde(rename = "move")]
    pub rollout: Option<Move>,
}

/// Answer to `?dry_run=true`: what would be done, and that nothing was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DryRun {
    /// Always true.
    pub dry_run: bool,
    /// It would be started: nothing blocks it.
    pub would_start: bool,
    /// The plan.
    pub plan: Plan,
}

impl From<Plan> for DryRun {
    fn from(plan: Plan) -> Self {
        Self { dry_run: true, would_start: plan.blockers.is_empty(), plan }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_that_is_null_is_switched_off_and_one_that_is_missing_is_kept() {
        let off: Overrides = serde_json::from_str(r#"{"p95_increase":null}"#).unwrap();
        assert_eq!(off.p95_increase, Some(None));
        let kept: Overrides = serde_json::from_str("{}").unwrap();
        assert_eq!(kept.p95_increase, None);
        let set: Overrides = serde_json::from_str(r#"{"p95_increase":0.5}"#).unwrap();
        assert_eq!(set.p95_increase, Some(Some(0.5)));
        for overrides in [off, kept, set] {
            let text = serde_json::to_string(&overrides).unwrap();
            assert_eq!(serde_json::from_str::<Overrides>(&text).unwrap(), overrides, "{text}");
        }
    }
}
