//! The steps: one file each, forward and back, every one idempotent.
//!
//! A deed may be run again after any part of it was done, and may be abandoned at any await. It changes the
//! state only through [`StepContext::commit`], which refuses a deed that is not the newest.

mod cutover;
mod drain;
mod mirroring;
mod pace;
mod prepare;
mod release;
mod shift;
mod soak;
mod start;
mod warm;

use std::sync::Arc;

use crate::core::Core;
use crate::draft::{Draft, last_sequence};
use crate::error::{EngineError, ErrorKind};
use crate::journal::JournalRecord;
use crate::model::{EventBody, Finding, InstanceId, MoveSettings, Phase, Plan, Rollout, RolloutId, Step};
use crate::order::Undo;
use crate::rollout::Run;
use crate::runtime::{Runtime, RuntimeError};

pub(crate) use drain::{drain_one, times as drain_times};
pub(crate) use release::{no_longer_left, remove_instance};
pub(crate) use start::instance_spec;

/// Edges take milliseconds to acknowledge; what takes longer is told.
const ACKNOWLEDGED_SOON_MS: u64 = 300;

/// What a deed has done.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// In words, for the journal.
    pub(crate) output: String,
    /// Told with the settlement.
    pub(crate) events: Vec<EventBody>,
}

impl Done {
    fn new(output: impl Into<String>) -> Self {
        Self { output: output.into(), events: Vec::new() }
    }
}

/// Why a deed was not done.
#[derive(Debug)]
pub(crate) enum Problem {
    /// The world does not let it.
    Failed(Finding),
    /// The engine's own store is in trouble, or the deed was overtaken: nothing speaks against the rollout.
    Store(EngineError),
}

impl From<EngineError> for Problem {
    fn from(error: EngineError) -> Self {
        if error.code.starts_with("store.")
            || error.code.starts_with("engine.")
            || error.code.starts_with("state.")
        {
            return Self::Store(error);
        }
        Self::Failed(Finding { code: error.code.to_owned(), message: error.message, hint: error.hint })
    }
}

impl From<RuntimeError> for Problem {
    fn from(error: RuntimeError) -> Self {
        Self::Failed(Finding::from(&error))
    }
}

/// What a deed works with.
#[derive(Clone)]
pub(crate) struct StepContext {
    pub(crate) core: Arc<Core>,
    pub(crate) run: Arc<Run>,
    pub(crate) plan: Arc<Plan>,
    intent: u64,
}

impl StepContext {
    pub(crate) fn new(core: &Arc<Core>, run: &Arc<Run>, plan: &Arc<Plan>, intent: u64) -> Self {
        Self { core: Arc::clone(core), run: Arc::clone(run), plan: Arc::clone(plan), intent }
    }

    pub(crate) fn id(&self) -> &RolloutId {
        &self.run.id
    }

    /// Commits, unless this deed was overtaken: its intent is not the newest record any more.
    pub(crate) async fn commit<T, F>(&self, make: F) -> Result<T, EngineError>
    where
        F: FnOnce(&mut Draft<'_>, &Rollout) -> Result<T, EngineError> + Send + 'static,
        T: Send + 'static,
    {
        let (id, intent) = (self.run.id.clone(), self.intent);
        self.core
            .commit(move |draft| {
                let state = draft.state();
                match state.rollouts.get(&id) {
                    Some(rollout) if last_sequence(state, &id) == intent && !rollout.state.is_terminal() => {
                        make(draft, rollout)
                    }
                    _ => Err(EngineError::new(
                        ErrorKind::Conflict,
                        "engine.overtaken",
                        format!("a step of {id} was overtaken"),
                        "",
                    )),
                }
            })
            .await
    }

    /// When the step is given up, in wall time.
    pub(crate) fn deadline(&self) -> u64 {
        let state = self.core.state();
        match state.journals.get(self.id()).and_then(|journal| journal.get(&self.intent)) {
            Some(JournalRecord::Intent { deadline, .. }) => *deadline,
            _ => 0,
        }
    }

    /// Says what the step waits for; for people, so an error is no reason to stop.
    pub(crate) async fn waiting_for(&self, what: Option<String>) {
        let said = self
            .commit(move |draft, rollout| {
                if rollout.waiting_for != what {
                    let mut rollout = Rollout::clone(rollout);
                    rollout.waiting_for = what;
                    draft.put_rollout(&rollout);
                }
                Ok(())
            })
            .await;
        if let Err(error) = said {
            tracing::debug!(rollout = %self.run.id, %error, "what a step waits for cannot be stored");
        }
    }

    /// Publishes the service from the newest state and waits for the edges. What is retired outside of a
    /// drain is seen off in the background.
    pub(crate) async fn publish(&self) -> Result<(), EngineError> {
        let service = &self.plan.service;
        let published = self.core.table.publish(&self.core, service)?;
        self.enter_ledger();
        let mut acknowledged = std::pin::pin!(self.core.table.acknowledged(published.version));
        let soon = std::time::Duration::from_millis(ACKNOWLEDGED_SOON_MS);
        if tokio::time::timeout(soon, &mut acknowledged).await.is_err() {
            self.waiting_for(Some("every edge to use the new table".to_owned())).await;
            acknowledged.await;
        }
        Ok(())
    }

    /// Publishes without waiting: for what takes no traffic yet.
    fn publish_unawaited(&self) -> Result<(), EngineError> {
        self.core.table.publish(&self.core, &self.plan.service)?;
        self.enter_ledger();
        Ok(())
    }

    /// Takes every copy that is in the table now into the account.
    fn enter_ledger(&self) {
        let state = self.core.state();
        let Some(rollout) = state.rollouts.get(self.id()) else { return };
        for instance in state.instances_of(&self.plan.service) {
            self.run.ledger.enter(&self.core, rollout, instance, false);
        }
    }

    pub(crate) fn runtime(&self, machine: &str) -> Result<Arc<dyn Runtime>, Problem> {
        self.core.runtime(machine).ok_or_else(|| {
            Problem::Failed(Finding {
                code: "machine.unknown".to_owned(),
                message: format!("there is no machine {machine} any more"),
                hint: "Add it again, or choose another one.".to_owned(),
            })
        })
    }

    fn new_ids(&self) -> Vec<InstanceId> {
        self.plan.add.iter().map(|added| added.id.clone()).collect()
    }
}

/// The phase that a step belongs to.
pub(crate) const fn phase(step: &Step) -> Phase {
    step.kind().row().phase
}

/// How long a step may take, in milliseconds.
pub(crate) fn limit_ms(step: &Step, settings: &MoveSettings) -> u64 {
    match step {
        Step::Claim => 10_000,
        Step::Prepare { .. } => prepare::TRANSFER_LIMIT_MS,
        Step::Start { .. } => u64::from(settings.start_timeout_ms),
        Step::Warm => {
            let mirror = settings.warm.mirror.as_ref().map_or(0, mirroring::longest_ms);
            u64::from(settings.start_timeout_ms) + mirror
        }
        Step::Shift { .. } => u64::from(settings.step_max_ms),
        Step::Hold => u64::from(settings.cutover.drain_max_ms) + u64::from(settings.cutover.hold_deadline_ms),
        Step::Stop { .. } => u64::from(settings.stop_grace_ms) + release::REMOVE_LIMIT_MS,
        Step::Switch => u64::from(settings.cutover.hold_deadline_ms),
        Step::Drain => drain::longest_ms(&settings.drain),
        Step::Soak => settings.soak_ms,
        Step::Release { .. } => u64::from(settings.stop_grace_ms) + release::REMOVE_LIMIT_MS,
    }
}

/// Does a step.
pub(crate) async fn forward(context: StepContext, step: Step) -> Result<Done, Problem> {
    match step {
        Step::Claim => claim(&context).await,
        Step::Prepare { machine } => prepare::forward(&context, &machine).await,
        Step::Hold => cutover::hold(&context).await,
        Step::Stop { instance } => cutover::in_time(&context, cutover::stop(&context, &instance)).await,
        Step::Start { instance } => cutover::in_time(&context, start::forward(&context, &instance)).await,
        Step::Warm => cutover::in_time(&context, warm::forward(&context)).await,
        Step::Switch => cutover::switch(&context).await,
        Step::Shift { percent } => shift::forward(&context, percent).await,
        Step::Drain => drain::forward(&context).await,
        Step::Soak => soak::forward(&context).await,
        Step::Release { instance } => release::forward(&context, &instance).await,
    }
}

/// Undoes a step.
pub(crate) async fn back(context: StepContext, step: Step) -> Result<Done, Problem> {
    match (step.kind().row().undo, step) {
        (Undo::Remove, Step::Start { instance }) => start::back(&context, &instance).await,
        (Undo::Traffic, _) => shift::back(&context).await,
        (Undo::Release, _) => cutover::release_to_old(&context).await,
        (Undo::Restart, Step::Stop { instance }) => cutover::restart(&context, &instance).await,
        (Undo::Nothing | Undo::Remove | Undo::Restart, _) => Ok(Done::new("nothing to undo")),
    }
}

/// The claim was taken with the acceptance of the rollout, in one commit; here it is confirmed.
async fn claim(context: &StepContext) -> Result<Done, Problem> {
    let service = context.plan.service.clone();
    let id = context.id().clone();
    let epoch = context
        .commit(move |draft, rollout| {
            let holds = draft.state().services.get(&service).is_some_and(|s| s.rollout.as_ref() == Some(&id));
            if holds {
                return Ok(rollout.epoch);
            }
            let message = format!("service {service} is not claimed by {id} any more");
            Err(EngineError::new(ErrorKind::Conflict, "claim.lost", message, "Start it again."))
        })
        .await?;
    Ok(Done::new(format!("epoch {epoch}")))
}
