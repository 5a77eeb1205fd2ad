//! Instances: running copies of a service.

use jiff::Timestamp;
use peregrine_engine::{InstanceView, model as engine};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::instant;

/// One running copy of a service, with its live reading.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Id; also the container's or process's name.
    pub id: String,
    /// Service.
    pub service: String,
    /// Version number.
    pub version: u32,
    /// Machine.
    pub machine: String,
    /// The move that made it.
    #[serde(rename = "move")]
    pub move_id: String,
    /// Where it listens, once it runs.
    pub address: Option<String>,
    /// Where it is in its life.
    pub state: InstanceState,
    /// What the edge thinks of it.
    pub health: InstanceHealth,
    /// Percent of its service's traffic.
    pub weight_percent: f64,
    /// Requests and connections inside it now.
    pub in_flight: u64,
    /// Requests sent to it since it entered the table.
    pub requests: u64,
    /// Answers 5xx and requests without an answer since then.
    pub errors: u64,
    /// Median time to the response head.
    pub p50_us: Option<u64>,
    /// 95th percentile of it.
    pub p95_us: Option<u64>,
    /// Round trip of the latest active probe.
    pub probe_latency_us: Option<u64>,
    /// What it uses; only with `?stats=true`.
    pub usage: Option<InstanceUsage>,
    /// When it was planned.
    pub created_at: Timestamp,
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Its id is known; nothing runs yet, or it is being started.
    Planned,
    /// It runs and gets no traffic yet.
    Started,
    /// It has a share of the traffic.
    Serving,
    /// It is retired; what is inside finishes.
    Draining,
    /// It does not run: another one is taking over, and there is a way back to this one.
    Stopped,
    /// Empty, kept ready for the way back.
    Soaking,
    /// Being stopped and removed.
    Releasing,
}

/// What the edge thinks of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceHealth {
    /// Its probes are good.
    Healthy,
    /// Its probes fail.
    Unhealthy,
    /// Taken out of the balance because its answers failed.
    Ejected,
    /// It gets nothing new.
    Retired,
    /// Not probed yet.
    Unknown,
}

/// What an instance uses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceUsage {
    /// CPU time since it started.
    pub cpu_seconds: f64,
    /// Memory in use.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

impl From<&InstanceView> for Instance {
    fn from(view: &InstanceView) -> Self {
        let stored = &view.instance;
        Self {
            id: stored.id.to_string(),
            service: stored.service.clone(),
            version: stored.version,
            machine: stored.machine.clone(),
            move_id: stored.rollout.to_string(),
            address: stored.address.map(|address| address.to_string()),
            state: stored.state.into(),
            health: InstanceHealth::named(view.health),
            weight_percent: view.weight_percent,
            in_flight: view.in_flight,
            requests: view.requests,
            errors: view.errors,
            p50_us: view.p50_us,
            p95_us: view.p95_us,
            probe_latency_us: view.probe_latency_us,
            usage: view.stats.map(|stats| InstanceUsage {
                cpu_seconds: stats.cpu_seconds,
                memory_bytes: stats.memory_bytes,
                pids: stats.pids,
            }),
            created_at: instant(stored.created_at),
        }
    }
}

impl InstanceHealth {
    fn named(name: &str) -> Self {
        match name {
            "healthy" => Self::Healthy,
            "unhealthy" => Self::Unhealthy,
            "ejected" => Self::Ejected,
            "retired" => Self::Retired,
            _ => Self::Unknown,
        }
    }
}

impl From<engine::InstanceState> for InstanceState {
    fn from(state: engine::InstanceState) -> Self {
        match state {
            engine::InstanceState::Planned => Self::Planned,
            engine::InstanceState::Started => Self::Started,
            engine::InstanceState::Serving => Self::Serving,
            engine::InstanceState::Draining => Self::Draining,
            engine::InstanceState::Stopped => Self::Stopped,
            engine::InstanceState::Soaking => Self::Soaking,
            engine::InstanceState::Releasing => Self::Releasing,
        }
    }
}
