//! The engine as the API sees it: ask, read, listen.

use std::sync::Arc;

use futures_util::stream::BoxStream;

use crate::error::EngineError;
use crate::model::{
    Event, Instance, InstanceId, Machine, MachineSpec, Plan, Receipt, Rollout, RolloutId, Sample, ServiceSpec,
};
use crate::runtime::{InstanceStats, LogLine, LogOptions, RuntimeInfo};
use crate::state::State;

/// A change of the settings of one rollout; `None` keeps the service's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MoveOverrides {
    /// Weights in percent.
    pub steps: Option<Vec<u8>>,
    /// Soak.
    pub soak_ms: Option<u64>,
    /// Guard on errors.
    pub error_ratio_increase: Option<f64>,
    /// Guard on p95; `Some(None)` switches it off.
    pub p95_increase: Option<Option<f64>>,
}

/// What is asked of the engine, for any kind of rollout. The same ask can be planned or started.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// Create or change a service and bring its version to the machines. Without changes of the workload
    /// only the settings are applied.
    Deploy {
        /// The service as it is to be.
        spec: Box<ServiceSpec>,
        /// Machine for the first deploy; later ones stay where they are unless it is given.
        machine: Option<String>,
        /// Settings of this rollout.
        overrides: MoveOverrides,
    },
    /// Bring every copy of a service to a machine.
    Move {
        /// Service.
        service: String,
        /// Machine.
        to: String,
        /// Only the copies on this machine.
        from: Option<String>,
        /// Settings of this rollout.
        overrides: MoveOverrides,
    },
    /// Back to an earlier version (`None`: the one before).
    Rollback {
        /// Service.
        service: String,
        /// Version number.
        to_version: Option<u32>,
    },
    /// Another number of copies.
    Scale {
        /// Service.
        service: String,
        /// How many.
        replicas: u32,
        /// Where new ones go; `None` is where the others are.
        machine: Option<String>,
    },
}

/// What a machine check found.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineCheck {
    /// What it is, if it answers.
    pub info: Option<RuntimeInfo>,
    /// Round trip to it.
    pub latency_ms: f64,
    /// Why not, and what to do.
    pub problem: Option<EngineProblem>,
    /// Instances of this installation there: known to the store, and unknown ones.
    pub instances: usize,
    /// Instances of this installation that the store does not know.
    pub orphans: Vec<String>,
}

/// A problem in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineProblem {
    /// Code.
    pub code: String,
    /// What.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// A live picture of one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceView {
    /// As stored.
    pub instance: Instance,
    /// Percent of its service's traffic.
    pub weight_percent: f64,
    /// `healthy`, `unhealthy`, `unknown`, `ejected`, `retired`.
    pub health: &'static str,
    /// Leases out.
    pub in_flight: u64,
    /// Requests sent to it since it entered the table.
    pub requests: u64,
    /// Errors since then.
    pub errors: u64,
    /// p50 and p95 to the response head in microseconds.
    pub p50_us: Option<u64>,
    /// 95th percentile.
    pub p95_us: Option<u64>,
    /// Latest active probe.
    pub probe_latency_us: Option<u64>,
    /// What it uses; only when asked for.
    pub stats: Option<InstanceStats>,
}

/// A request key that makes a repeated ask the same ask.
pub type IdempotencyKey = Option<String>;

/// The way to ask the engine. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<dyn Asks>,
}

/// What the engine answers to; one real implementation, in `engine.rs`, kept as a trait object so that the
/// API needs none of the engine's insides.
trait Asks: Send + Sync {}

#[allow(clippy::unused_async, missing_docs, clippy::needless_pass_by_value, unused_variables)]
impl EngineHandle {
    /// The present state: reads never queue behind writes.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        unimplemented!()
    }

    /// Id of this installation.
    #[must_use]
    pub fn install(&self) -> String {
        unimplemented!()
    }

    // --- machines
    pub async fn add_machine(&self, spec: MachineSpec) -> Result<Machine, EngineError> {
        unimplemented!()
    }
    pub async fn remove_machine(&self, name: &str) -> Result<(), EngineError> {
        unimplemented!()
    }
    /// Asks the machine itself: answers even for an unreachable one, with the problem.
    pub async fn check_machine(&self, name: &str) -> Result<MachineCheck, EngineError> {
        unimplemented!()
    }

    // --- services
    /// Removes a service: drains, stops and removes its copies, then forgets it. Long work: follows the rollout machine.
    pub async fn remove_service(&self, name: &str) -> Result<(), EngineError> {
        unimplemented!()
    }
    /// Live picture of the instances of a service (or of all).
    pub async fn instances(
        &self,
        service: Option<&str>,
        with_stats: bool,
    ) -> Result<Vec<InstanceView>, EngineError> {
        unimplemented!()
    }

    // --- rollouts
    /// What would be done; changes nothing, starts nothing.
    pub async fn plan(&self, ask: Ask) -> Result<Plan, EngineError> {
        unimplemented!()
    }
    /// Starts a rollout. `expect_hash` refuses if the plan is not that one any more. The same key gives the
    /// same rollout. A deploy that changes only settings (or fixed upstreams) needs no rollout: `None`.
    pub async fn start(
        &self,
        ask: Ask,
        reason: String,
        expect_hash: Option<String>,
        key: IdempotencyKey,
    ) -> Result<Option<Rollout>, EngineError> {
        unimplemented!()
    }
    pub async fn pause(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        unimplemented!()
    }
    /// Goes on after a pause.
    pub async fn resume(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        unimplemented!()
    }
    /// Skips what is left of a step's waiting, or of the soak.
    pub async fn promote(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        unimplemented!()
    }
    /// Goes back, whatever the phase; returns once the ask is durable.
    pub async fn abort(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        unimplemented!()
    }
    /// Goes back after the end (or during the soak): a running rollout is aborted, an ended one gets a
    /// rollback rollout of its own, which is returned.
    pub async fn rollback_rollout(
        &self,
        id: &RolloutId,
        key: IdempotencyKey,
    ) -> Result<Rollout, EngineError> {
        unimplemented!()
    }
    /// Waits until the rollout has ended.
    pub async fn ended(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        unimplemented!()
    }
    pub async fn receipt(&self, id: &RolloutId) -> Result<Receipt, EngineError> {
        unimplemented!()
    }
    /// Latest live reading of a running rollout.
    #[must_use]
    pub fn sample(&self, id: &RolloutId) -> Option<Sample> {
        unimplemented!()
    }

    // --- streams
    /// Stored events after `after` (0: from the oldest kept), then live ones for ever. Samples are live only.
    #[must_use]
    pub fn events(&self, after: u64) -> BoxStream<'static, Event> {
        unimplemented!()
    }
    /// Id of the newest stored event.
    #[must_use]
    pub fn last_event(&self) -> u64 {
        unimplemented!()
    }
    /// Output of an instance.
    pub async fn logs(
        &self,
        id: &InstanceId,
        options: LogOptions,
    ) -> Result<BoxStream<'static, Result<LogLine, EngineError>>, EngineError> {
        unimplemented!()
    }
}
