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
    /// Generations of earlier stretches that were given up before they were known to be empty: somebody may be inside
    /// still, at an edge that outlives the engine. The newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<u64>,
    /// Where it is in its life.
    pub state: InstanceState,
    /// When it was planned.
    pub created_at: UnixMs,
}

/// Most stretches of a copy that are remembered after they were given up. Each is one way back; who stays inside over
/// so many of them is cut by the deadlines of the first.
const MAX_FORMER: usize = 8;

impl Instance {
    /// Begins a new stretch of service although somebody may be inside of the present one.
    pub fn begin_stretch(&mut self, generation: u64) {
        if self.generation > 0 {
            self.former.push(self.generation);
        }
        if self.former.len() > MAX_FORMER {
            self.former.remove(0);
        }
        self.generation = generation;
    }
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
    /// It does not run: another one is taking over, and there is a way back to this one.
    Stopped,
    /// Empty, kept ready for the way back.
    Soaking,
    /// Being stopped and removed.
    Releasing,
}
