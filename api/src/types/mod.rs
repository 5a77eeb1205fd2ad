//! Wire types: the public JSON, and nothing else.
//!
//! They are written by hand and converted by hand, so that a change inside the engine can never change the
//! public contract unnoticed. Names are snake_case, instants are RFC 3339 in UTC, durations are integers
//! whose unit is the end of the name (`_ms`, `_us`), ids are strings. A reader ignores fields that it does
//! not know; the server refuses them in requests (`server/extract.rs`).

mod audit;
mod domain;
mod edge;
mod event;
mod instance;
mod logs;
mod machine;
mod page;
mod plan;
mod problem;
mod receipt;
mod requests;
mod rollout;
mod rules;
mod service;
mod settings;
mod status;
mod system;
mod time;

pub use audit::{AuditBreak, AuditEntry, AuditReport};
pub use domain::{
    CaaCheck, Certificate, CertificateExport, CertificateImport, CertificateSource, ClientAuth,
    ClientAuthRequest, Domain, DomainCheck, DomainOrigin, DomainRequest, DomainState, Hsts,
};
pub use edge::{Edge, EdgeState, Invite, InviteRequest};
pub use event::{Event, EventBody};
pub use instance::{Instance, InstanceHealth, InstanceState, InstanceUsage};
pub use logs::{LogLine, LogSource};
pub use machine::{DockerEndpoint, Machine, MachineCheck, MachineSpec, RuntimeInfo, RuntimeKind, TlsFiles};
pub use page::Page;
pub use plan::{Estimate, Finding, Plan, PlannedInstance, Step};
pub use problem::{FieldError, Problem, ProblemKind};
pub use receipt::{ClassCounts, InstanceReceipt, MirrorReport, PhaseDuration, Receipt};
pub use requests::{Applied, DeployRequest, DryRun, MoveRequest, Overrides, RollbackRequest, ScaleRequest};
pub use rollout::{
    Action, Control, Guard, Links, Move, MoveKind, MoveState, Phase, PhaseTime, Place, Sample, SideSample,
    StepPosition, Totals,
};
pub use rules::{
    BasicAuth, Coding, Compression, ForwardAuth, HeaderEdits, Headers, RateKey, RateLimit, Redirect, Rewrite,
    Rules,
};
pub use service::{Deployment, FixedUpstream, REDACTED, Route, Service, ServiceSpec, ServiceState, Workload};
pub use settings::{
    Balance, Cutover, DrainDeadlines, Guards, Health, HoldThen, Mirror, MoveSettings, Probe, Protocol,
    ProxyProtocol, Resources, Traffic, Warm,
};
pub use status::{MachineStatus, PlaceStatus, ServiceStatus, Status};
pub use system::{Readiness, ReadinessCheck, Version};
pub use time::instant;
