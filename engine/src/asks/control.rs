//! Steering a rollout that runs, and looking back at one that has ended.

use std::sync::Arc;

use super::rollouts;
use crate::alarms;
use crate::audit::AuditAct;
use crate::core::Core;
use crate::error::{EngineError, ErrorKind};
use crate::handle::{Ask, IdempotencyKey, MoveOverrides};
use crate::model::{Control, Receipt, Rollout, RolloutId, RolloutKind, RolloutState};
use crate::reconcile;
use crate::rollout::{is_cutting_over, is_past_return};

pub(crate) async fn pause(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    steer(core, id, Control::Pause).await
}

pub(crate) async fn resume(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    steer(core, id, Control::Run).await
}

pub(crate) async fn promote(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    steer(core, id, Control::Promote).await
}

pub(crate) async fn abort(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    steer(core, id, Control::Abort).await
}

async fn steer(core: &Arc<Core>, id: &RolloutId, control: Control) -> Result<Rollout, EngineError> {
    let id = id.clone();
    core.commit(move |draft| {
        let mut rollout =
            draft.state().rollouts.get(&id).map(|known| Rollout::clone(known)).ok_or_else(|| unknown(&id))?;
        if rollout.state.is_terminal() {
            return Err(refused(
                &rollout,
                "move.ended",
                format!("{id} has ended"),
                "To take it back: peregrine moves rollback.",
            ));
        }
        if rollout.state == RolloutState::RollingBack {
            if control == Control::Abort {
                return Ok(rollout);
            }
            return Err(refused(
                &rollout,
                "move.going_back",
                format!("{id} is on its way back"),
                "Wait for its end, then start anew.",
            ));
        }
        if rollout.control == Control::Abort {
            if control == Control::Abort {
                return Ok(rollout);
            }
            return Err(refused(
                &rollout,
                "move.going_back",
                format!("{id} was asked to go back"),
                "Wait for its end, then start anew.",
            ));
        }
        if control == Control::Abort && is_past_return(&rollout) {
            return Err(refused(
                &rollout,
                "move.past_return",
                format!("{id} is removing the old copies already"),
                "Wait for its end, then take it back: peregrine moves rollback.",
            ));
        }
        if control == Control::Pause && is_cutting_over(draft.state(), &rollout) {
            return Err(holding(&rollout));
        }
        rollout.control = control;
        rollout.state = if control == Control::Pause { RolloutState::Paused } else { RolloutState::Running };
        draft.put_rollout(&rollout);
        draft.audit(Some(&rollout.plan.service), Some(&id), AuditAct::Steered { control });
        Ok(rollout)
    })
    .await
}

/// A cutover that stood still would keep every client waiting, with no copy that serves.
fn holding(rollout: &Rollout) -> EngineError {
    let (id, plan) = (&rollout.id, &rollout.plan);
    refused(
        rollout,
        "move.holding",
        format!("{id} cannot be paused now: the requests of {} wait for it", plan.service),
        &format!(
            "It switches or goes back by itself within {} ms. To go back at once: peregrine moves abort {id}.",
            plan.settings.cutover.hold_deadline_ms
        ),
    )
}

pub(crate) async fn rollback(
    core: &Arc<Core>,
    id: &RolloutId,
    key: IdempotencyKey,
) -> Result<Rollout, EngineError> {
    let known =
        core.state().rollouts.get(id).map(|known| Rollout::clone(known)).ok_or_else(|| unknown(id))?;
    if !known.state.is_terminal() && !is_past_return(&known) {
        return abort(core, id).await;
    }
    let known = ended(core, id).await?;
    if !matches!(known.state, RolloutState::Succeeded | RolloutState::NeedsOperator) {
        return Err(refused(&known, "rollback.nothing", format!("{id} went back already"), "Nothing to do."));
    }
    let ask = way_back(&known)?;
    let started = rollouts::start(core, ask, format!("rollback of {id}"), None, key).await?;
    started.ok_or_else(|| {
        refused(
            &known,
            "rollback.nothing",
            format!("{id} changed nothing that could be taken back"),
            "Nothing to do.",
        )
    })
}

/// The ask that takes an ended rollout back.
fn way_back(rollout: &Rollout) -> Result<Ask, EngineError> {
    let plan = &rollout.plan;
    let service = plan.service.clone();
    let nothing = |why: String, hint: &str| refused(rollout, "rollback.nothing", why, hint);
    match plan.kind {
        RolloutKind::Deploy | RolloutKind::Rollback if plan.from_version != Some(plan.to_version) => {
            let Some(to_version) = plan.from_version else {
                let why = format!("{} was the first deploy of {service}", rollout.id);
                return Err(nothing(why, "To stop the service, remove it."));
            };
            Ok(Ask::Rollback { service, to_version: Some(to_version) })
        }
        RolloutKind::Scale => {
            let before = plan.keep.len() + plan.retire.len();
            Ok(Ask::Scale { service, replicas: u32::try_from(before).unwrap_or(u32::MAX), machine: None })
        }
        _ => {
            let instances = rollout.receipt.iter().flat_map(|receipt| &receipt.instances);
            let mut machines: Vec<&String> = instances
                .filter(|entry| plan.retire.contains(&entry.instance))
                .map(|entry| &entry.machine)
                .collect();
            machines.sort_unstable();
            machines.dedup();
            let [machine] = machines[..] else {
                let why = format!("the old copies of {service} were on {} machines", machines.len());
                return Err(nothing(why, "Move the service yourself: peregrine move --from … --to …."));
            };
            let overrides = MoveOverrides::default();
            Ok(Ask::Move { service, to: machine.clone(), from: None, overrides })
        }
    }
}

/// Retries what an ended rollout left undone.
pub(crate) async fn cleanup(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    let (core, id) = (Arc::clone(core), id.clone());
    super::to_the_end(async move { cleanup_here(&core, &id).await }).await
}

async fn cleanup_here(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    let state = core.state();
    let known = state.rollouts.get(id).map(|known| Rollout::clone(known)).ok_or_else(|| unknown(id))?;
    if !known.state.is_terminal() {
        return Err(refused(
            &known,
            "move.running",
            format!("{id} has not ended: it may still clean up by itself"),
            "Wait for its end: peregrine moves watch.",
        ));
    }
    let service = &known.plan.service;
    alarms::refuse_aside(&state, service)?;
    if let Some(running) = state.services.get(service).and_then(|service| service.rollout.clone()) {
        let mut error = refused(
            &known,
            "move.second",
            format!("{running} has service {service} now, and sees to its copies"),
            "Wait for its end, then clean up.",
        );
        error.rollout = Some(running);
        return Err(error);
    }
    drop(state);
    // What is no copy is a table that was not taken: it is rendered anew from the state.
    core.publish(service).await?;
    let kept = reconcile::clear_left(core, &known).await;
    let id = id.clone();
    let problems = kept.clone();
    let rollout = core
        .commit(move |draft| {
            let mut rollout = draft
                .state()
                .rollouts
                .get(&id)
                .map(|known| Rollout::clone(known))
                .ok_or_else(|| unknown(&id))?;
            let left: Vec<String> = problems.into_iter().map(|problem| problem.message).collect();
            if rollout.leftovers != left {
                rollout.leftovers = left;
                draft.put_rollout(&rollout);
            }
            let left = rollout.leftovers.len();
            draft.audit(Some(&rollout.plan.service), Some(&id), AuditAct::CleanedUp { left });
            Ok(rollout)
        })
        .await?;
    if kept.is_empty() {
        return Ok(rollout);
    }
    let message =
        format!("{} of {} are still left: {}", kept.len(), rollout.id, rollout.leftovers.join("; "));
    let hint =
        "Check the machines (peregrine machines check), then clean up again; it is also tried by itself.";
    let mut error = EngineError::new(ErrorKind::Failed, "cleanup.incomplete", message, hint);
    error.rollout = Some(rollout.id);
    error.findings = kept;
    Err(error)
}

pub(crate) async fn ended(core: &Arc<Core>, id: &RolloutId) -> Result<Rollout, EngineError> {
    core.until(|state| match state.rollouts.get(id) {
        None => Some(Err(unknown(id))),
        Some(rollout) if rollout.state.is_terminal() => Some(Ok(Rollout::clone(rollout))),
        Some(_) => None,
    })
    .await
}

pub(crate) fn receipt(core: &Arc<Core>, id: &RolloutId) -> Result<Receipt, EngineError> {
    let state = core.state();
    let rollout = state.rollouts.get(id).ok_or_else(|| unknown(id))?;
    rollout.receipt.clone().ok_or_else(|| {
        refused(
            rollout,
            "move.running",
            format!("{id} has not ended"),
            "The receipt is written at the end: peregrine moves watch.",
        )
    })
}

fn unknown(id: &RolloutId) -> EngineError {
    EngineError::new(
        ErrorKind::NotFound,
        "move.unknown",
        format!("there is no rollout {id}"),
        "See the rollouts: peregrine moves list.",
    )
}

fn refused(rollout: &Rollout, code: &'static str, message: String, hint: &str) -> EngineError {
    let mut error = EngineError::new(ErrorKind::Conflict, code, message, hint);
    error.rollout = Some(rollout.id.clone());
    error
}
