//! The engine as the API sees it: ask, read, listen.

use std::sync::Arc;

use futures_util::stream::BoxStream;

use crate::asks;
use crate::audit::{AuditEntry, AuditReport};
use crate::core::Core;
use crate::error::EngineError;
use crate::model::{
    Event, Instance, InstanceId, Machine, MachineSpec, Plan, Receipt, Rollout, RolloutId, Sample, ServiceSpec,
};
use crate::runtime::{InstanceStats, LogLine, LogOptions, RuntimeInfo};
use crate::state::State;
use crate::vault::Vault;

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
    /// Copies so many of a thousand safe requests to the new copies while they warm; 0 switches it off.
    pub mirror_permille: Option<u16>,
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

impl Ask {
    /// The service that it is about.
    #[must_use]
    pub fn service(&self) -> &str {
        match self {
            Self::Deploy { spec, .. } => &spec.name,
            Self::Move { service, .. } | Self::Rollback { service, .. } | Self::Scale { service, .. } => {
                service
            }
        }
    }
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

/// What came of a configuration file.
#[derive(Clone, Debug, Default)]
pub struct ConfigApplied {
    /// Rollouts that it started.
    pub rollouts: Vec<RolloutId>,
    /// What could not be applied, by machine or service; the rest was.
    pub problems: Vec<(String, EngineError)>,
}

/// The way to ask the engine. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    pub(crate) core: Arc<Core>,
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").field("install", &self.install()).finish_non_exhaustive()
    }
}

impl EngineHandle {
    pub(crate) const fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// The present state: reads never queue behind writes.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        self.core.state()
    }

    /// Id of this installation.
    #[must_use]
    pub fn install(&self) -> String {
        self.core.install()
    }

    /// Durable records of a room that the engine knows nothing of.
    #[must_use]
    pub fn vault(&self) -> Vault {
        Vault::new(Arc::clone(&self.core))
    }

    // --- machines

    /// Adds a machine, or changes one; an unreachable one may be added. A machine with copies keeps its runtime.
    ///
    /// # Errors
    /// The name is no DNS label, or the machine has copies and another runtime is asked for.
    pub async fn add_machine(&self, spec: MachineSpec) -> Result<Machine, EngineError> {
        asks::machines::add(&self.core, spec, false).await
    }

    /// Forgets a machine; it has to be without copies.
    ///
    /// # Errors
    /// It is not known, or has copies.
    pub async fn remove_machine(&self, name: &str) -> Result<(), EngineError> {
        asks::machines::remove(&self.core, name).await
    }

    /// Asks the machine itself: answers even for an unreachable one, with the problem.
    ///
    /// # Errors
    /// It is not known.
    pub async fn check_machine(&self, name: &str) -> Result<MachineCheck, EngineError> {
        asks::machines::check(&self.core, name).await
    }

    // --- services

    /// Removes a service: drains, stops and removes its copies, then forgets it. Long work: follows the rollout
    /// machine; dropping the future does not stop it.
    ///
    /// # Errors
    /// It is not known, another rollout has it, or the removal failed.
    pub async fn remove_service(&self, name: &str) -> Result<(), EngineError> {
        asks::services::remove(&self.core, name).await
    }

    /// Live picture of the instances of a service (or of all).
    ///
    /// # Errors
    /// The service is not known.
    pub async fn instances(
        &self,
        service: Option<&str>,
        with_stats: bool,
    ) -> Result<Vec<InstanceView>, EngineError> {
        asks::views::instances(&self.core, service, with_stats).await
    }

    /// Applies what `serve`'s configuration file says: machines and services (with the machine of the first
    /// deploy). Those that came from an earlier file and are not in this one are removed; what was made in
    /// another way is left alone. Rollouts go on in the background.
    ///
    /// # Errors
    /// The store cannot be written. What is wrong with one machine or service is in the answer.
    pub async fn apply_config(
        &self,
        machines: Vec<MachineSpec>,
        services: Vec<(ServiceSpec, Option<String>)>,
    ) -> Result<ConfigApplied, EngineError> {
        asks::config::apply(&self.core, machines, services).await
    }

    // --- rollouts

    /// What would be done; changes nothing, starts nothing.
    ///
    /// # Errors
    /// The ask is wrong in itself, names what is not there, or another rollout has the service.
    pub async fn plan(&self, ask: Ask) -> Result<Plan, EngineError> {
        asks::rollouts::plan(&self.core, ask).await
    }

    /// Starts a rollout. `expect_hash` refuses if the plan is not that one any more. The same key gives the
    /// same rollout. A deploy that changes only settings (or fixed upstreams) needs no rollout: `None`.
    ///
    /// # Errors
    /// As [`EngineHandle::plan`]; the plan has blockers or has changed; the key was used for another ask.
    pub async fn start(
        &self,
        ask: Ask,
        reason: String,
        expect_hash: Option<String>,
        key: IdempotencyKey,
    ) -> Result<Option<Rollout>, EngineError> {
        asks::rollouts::start(&self.core, ask, reason, expect_hash, key).await
    }

    /// Stays at the present weights.
    ///
    /// # Errors
    /// It is not known, has ended, or is on its way back.
    pub async fn pause(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        asks::control::pause(&self.core, id).await
    }

    /// Goes on after a pause.
    ///
    /// # Errors
    /// It is not known, has ended, or is on its way back.
    pub async fn resume(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        asks::control::resume(&self.core, id).await
    }

    /// Skips what is left of a step's waiting, or of the soak.
    ///
    /// # Errors
    /// It is not known, has ended, or is on its way back.
    pub async fn promote(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        asks::control::promote(&self.core, id).await
    }

    /// Goes back; returns once the ask is durable.
    ///
    /// # Errors
    /// It is not known, has ended, or is past its return: it is removing the old copies already, or the new copy of a
    /// single-writer service takes over.
    pub async fn abort(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        asks::control::abort(&self.core, id).await
    }

    /// Goes back after the end (or during the soak): a running rollout is aborted, an ended one gets a
    /// rollback rollout of its own, which is returned.
    ///
    /// # Errors
    /// There is nothing to go back to, or as [`EngineHandle::start`].
    pub async fn rollback_rollout(
        &self,
        id: &RolloutId,
        key: IdempotencyKey,
    ) -> Result<Rollout, EngineError> {
        asks::control::rollback(&self.core, id, key).await
    }

    /// Retries what an ended rollout could not undo ([`Rollout::leftovers`]). It is a success when nothing is
    /// left, also when nothing was; the rollout stays `needs_operator`, with an empty list. Safe to repeat.
    ///
    /// # Errors
    /// It is not known or has not ended, another rollout has its service, or something is still left: the
    /// error's findings say what.
    pub async fn cleanup(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        asks::control::cleanup(&self.core, id).await
    }

    /// Waits until the rollout has ended.
    ///
    /// # Errors
    /// It is not known.
    pub async fn ended(&self, id: &RolloutId) -> Result<Rollout, EngineError> {
        asks::control::ended(&self.core, id).await
    }

    /// The receipt.
    ///
    /// # Errors
    /// The rollout is not known, or has not ended.
    pub async fn receipt(&self, id: &RolloutId) -> Result<Receipt, EngineError> {
        asks::control::receipt(&self.core, id)
    }

    /// Latest live reading of a running rollout.
    #[must_use]
    pub fn sample(&self, id: &RolloutId) -> Option<Sample> {
        self.core.runs.sample(id)
    }

    /// Stores that late writes of an engine that was replaced were refused.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn tell_fenced(&self, epoch: u64, writes: u64) -> Result<(), EngineError> {
        self.core.tell(None, None, crate::model::EventBody::EngineFenced { epoch, writes }).await
    }

    /// Why nothing can be stored at present: a full or failing disk, or damage. Traffic goes on.
    #[must_use]
    pub fn store_problem(&self) -> Option<EngineError> {
        self.core.store_problem()
    }

    /// What is held because this version cannot read it, or is damaged, and waits for a person.
    #[must_use]
    pub fn alarms(&self) -> Vec<crate::model::Finding> {
        self.core.alarms()
    }

    /// Services whose records cannot be read: they are in no table of this process, and nobody has taken them away.
    #[must_use]
    pub fn unreadable_services(&self) -> Vec<String> {
        crate::alarms::services_aside(&self.core.state()).map(str::to_owned).collect()
    }

    // --- audit

    /// Who asked for what and how it ended, oldest first. An entry that cannot be read is left out: see
    /// [`EngineHandle::verify_audit`].
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn audit(&self) -> Result<Vec<AuditEntry>, EngineError> {
        asks::audit::list(&self.core).await
    }

    /// Looks whether every entry of the audit is the one that was written.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn verify_audit(&self) -> Result<AuditReport, EngineError> {
        asks::audit::verify(&self.core).await
    }

    /// Writes down that something was refused because of a higher epoch: `what`, and whose it was.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn note_refusal(&self, service: Option<&str>, what: String) -> Result<(), EngineError> {
        asks::audit::note_refusal(&self.core, service, what).await
    }

    // --- streams

    /// Stored events after `after` (0: from the oldest kept), then live ones for ever. Samples are live only.
    #[must_use]
    pub fn events(&self, after: u64) -> BoxStream<'static, Event> {
        self.core.events.after(after)
    }

    /// Id of the newest stored event.
    #[must_use]
    pub fn last_event(&self) -> u64 {
        self.core.state().last_event
    }

    /// Output of an instance.
    ///
    /// # Errors
    /// The instance or its machine is not known.
    pub async fn logs(
        &self,
        id: &InstanceId,
        options: LogOptions,
    ) -> Result<BoxStream<'static, Result<LogLine, EngineError>>, EngineError> {
        asks::views::logs(&self.core, id, options)
    }
}
