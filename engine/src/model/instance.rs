//! Instances: running copies of a version on a machine.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{InstanceId, RolloutId, UnixMs};

/// One running copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Id; also the container's or process's name.
    pub id: InstanceId,
    /// Service.
    pub service: String,
    /// Version number.
    pub version: u32,
    /// Machine.
    pub machine: String,
    /// Epoch of the rollout that made it.
    pub epoch: u64,
    /// The rollout that made it.
    pub rollout: RolloutId,
    /// Where it listens, once it runs.
    pub address: Option<SocketAddr>,
    /// Routing generation of its present stretch of service; 0 before the first.
    pub generation: u64,
    /// Where it is in its life.
    pub state: InstanceState,
    /// When it was planned.
    pub created_at: UnixMs,
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Its id is known, nothing runs yet (or it is being started).
    Planned,
    /// It runs and gets no traffic yet.
    Started,
    /// It has a share of the traffic.
    Serving,
    /// It is retired; what is inside finishes.
    Draining,
    /// Empty, kept ready for the way back.
    Soaking,
    /// Being stopped and removed.
    Releasing,
}
