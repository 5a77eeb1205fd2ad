//! The nouns of the engine: what is stored, planned and told. Plain data, no behaviour beyond
//! validation, so that a record written today is read by any later version.

mod answers;
mod cutover;
mod event;
mod hidden;
mod ids;
mod instance;
mod machine;
mod mirror;
mod plan;
mod receipt;
mod rollout;
mod rules;
mod service;

pub use answers::{CodingSpec, CompressionSpec};
pub use cutover::{CutoverSettings, Hold};
pub use event::{Event, EventBody};
pub(crate) use hidden::{HiddenBytes, HiddenValues};
pub use ids::{InstanceId, RolloutId};
pub use instance::{Instance, InstanceState};
pub use machine::{DockerEndpoint, Machine, MachineKind, MachineSpec, TlsFiles};
pub use mirror::{MirrorReport, MirrorSettings};
pub use plan::{Estimate, Finding, PLAN_FORMAT, Plan, PlannedInstance, RolloutKind, Step};
pub use receipt::{ClassCounts, InstanceReceipt, PhaseTime, Receipt};
pub use rollout::{Control, Phase, Rollout, RolloutState, Sample, SideSample, Totals};
pub use rules::{
    BasicAuthSpec, ForwardAuthSpec, HeaderEditsSpec, HeadersSpec, RateLimitSpec, RedirectSpec, RewriteSpec,
    RulesSpec, Unfit,
};
pub use service::{
    BalanceSpec, CAPABILITIES, DrainDeadlines, FixedUpstream, Guards, HashBy, HealthKind, HealthSpec,
    HoldThen, MoveSettings, Protocol, ProxyProtocol, Resources, Route, Service, ServiceSpec, TrafficPolicy,
    Version, WarmSettings, Workload,
};

/// Milliseconds since the Unix epoch. Wall time is for people and deadlines in the store, never for order.
pub type UnixMs = u64;
