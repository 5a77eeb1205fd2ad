//! The way back: every step with an intent is undone, the latest first, settled or not.
//!
//! An undo that fails is tried again a few times and then written down; the next one goes on. If the old
//! copies die before the new ones are gone, and those are well, the rollout turns forward again.

use std::sync::Arc;
use std::time::Duration;

use super::Run;
use super::executor::{begin, defect, finish, note_refusal, pause_for_store};
use super::supervisor::Signals;
use crate::core::Core;
use crate::journal::{Direction, JournalRecord};
use crate::model::{Control, Finding, InstanceState, Plan, Rollout, RolloutState, Step};
use crate::order::{self, Traffic, Undo};
use crate::state::State;
use crate::steps::{self, Problem, StepContext};

/// Attempts of one undo before it is left to the reconciler and the operator.
const MAX_UNDO_ATTEMPTS: u32 = 3;
/// Between them.
const UNDO_RETRY_MS: u64 = 500;

/// Goes back to the end; says whether the engine stops.
pub(super) async fn go_back(core: &Arc<Core>, run: &Arc<Run>, plan: &Arc<Plan>) -> bool {
    for index in to_undo(&core.state(), run, plan) {
        if core.stop.is_cancelled() {
            return true;
        }
        if let Some(why) = wants_forward(core, run, plan) {
            turn_forward(core, run, plan, why).await;
            return false;
        }
        match undo(core, run, plan, index).await {
            Undone::Yes => {}
            Undone::Forward(why) => {
                turn_forward(core, run, plan, why).await;
                return false;
            }
            Undone::Stopped => return true,
        }
    }
    let problem = core.state().rollouts.get(&run.id).and_then(|rollout| rollout.problem.clone());
    let was_aborted = problem.as_ref().is_some_and(|problem| problem.code == "move.aborted");
    let end = if was_aborted {
        RolloutState::Aborted
    } else if was_noticed(&core.state(), run, plan) {
        RolloutState::RolledBack
    } else {
        RolloutState::Failed
    };
    finish(core, run, end, problem).await;
    false
}

enum Undone {
    Yes,
    Forward(Finding),
    Stopped,
}

/// Steps with an intent, the latest first. Several of one kind that are undone by one deed come once.
fn to_undo(state: &State, run: &Run, plan: &Plan) -> Vec<usize> {
    let intents = forward_intents(state, run);
    let kinds: Vec<_> = plan.steps.iter().map(Step::kind).collect();
    order::to_undo(&kinds, |index| intents.contains(&index))
}

fn forward_intents(state: &State, run: &Run) -> Vec<usize> {
    let journal = state.journals.get(&run.id).into_iter().flat_map(|journal| journal.values());
    journal
        .filter_map(|record| match record {
            JournalRecord::Intent { step, direction: Direction::Forward, .. } => Some(*step),
            _ => None,
        })
        .collect()
}

fn had_shifted(state: &State, run: &Run, plan: &Plan) -> bool {
    let first = plan.retire.is_empty() && plan.keep.is_empty();
    let shifted = forward_intents(state, run)
        .iter()
        .any(|index| plan.steps[*index].kind().row().traffic != Traffic::Old);
    shifted && !first
}

/// Whether clients have noticed something that was taken back.
fn was_noticed(state: &State, run: &Run, plan: &Plan) -> bool {
    let first = plan.retire.is_empty() && plan.keep.is_empty();
    !first && forward_intents(state, run).iter().any(|index| plan.steps[*index].kind().is_noticed())
}

async fn undo(core: &Arc<Core>, run: &Arc<Run>, plan: &Arc<Plan>, index: usize) -> Undone {
    let mut failed = 0;
    loop {
        let Some(intent) = begin(core, run, plan, index, Direction::Back).await else {
            if core.stop.is_cancelled() {
                return Undone::Stopped;
            }
            continue;
        };
        let context = StepContext::new(core, run, plan, intent);
        let mut deed = tokio::spawn(steps::back(context, plan.steps[index].clone()));
        let mut signals = run.signals.subscribe();
        let result = loop {
            tokio::select! {
                biased;
                done = &mut deed => break done,
                () = signals.changed() => {
                    signals.borrow_and_update();
                    if let Some(why) = wants_forward(core, run, plan) {
                        deed.abort();
                        return Undone::Forward(why);
                    }
                }
                () = core.stop.cancelled() => {
                    deed.abort();
                    return Undone::Stopped;
                }
            }
        };
        let problem = match result {
            Ok(Ok(done)) => {
                settle(core, run, intent, Ok(done.output)).await;
                return Undone::Yes;
            }
            Ok(Err(Problem::Store(error))) => {
                tracing::warn!(rollout = %run.id, %error, "an undo is begun again");
                pause_for_store().await;
                continue;
            }
            Ok(Err(Problem::Failed(problem))) => problem,
            Err(error) => defect(&error),
        };
        failed += 1;
        let gives_up = failed >= MAX_UNDO_ATTEMPTS && !must_succeed(plan, index);
        settle(core, run, intent, Err((problem, gives_up))).await;
        if gives_up {
            return Undone::Yes; // written down as left over; what comes next is undone all the same
        }
        tokio::time::sleep(Duration::from_millis(UNDO_RETRY_MS)).await;
    }
}

/// Where at most one copy may run, the old one must not be started while it is not sure that the new one is gone.
fn must_succeed(plan: &Plan, index: usize) -> bool {
    let removes = plan.steps[index].kind().row().undo == Undo::Remove;
    removes && plan.steps.iter().any(|step| step.kind().row().undo == Undo::Restart)
}

async fn settle(core: &Arc<Core>, run: &Run, intent: u64, result: Result<String, (Finding, bool)>) {
    let id = run.id.clone();
    let stored = core.commit(move |draft| {
        let at = draft.now();
        let Some(rollout) = draft.state().rollouts.get(&id) else { return Ok(()) };
        if let (Err((problem, _)), Some(rollout)) = (&result, draft.state().rollouts.get(&id).cloned()) {
            note_refusal(draft, &rollout, problem);
        }
        if let Err((problem, true)) = &result {
            let mut rollout = Rollout::clone(rollout);
            rollout.leftovers.push(problem.message.clone());
            draft.put_rollout(&rollout);
        }
        let (output, error) = match result {
            Ok(output) => (Some(output), None),
            Err((problem, _)) => (None, Some(problem)),
        };
        draft.journal(&id, &JournalRecord::Settled { at, intent, output, error });
        Ok(())
    });
    if let Err(error) = stored.await {
        tracing::warn!(rollout = %run.id, %error, "the settlement of an undo cannot be stored");
        pause_for_store().await;
    }
}

/// Whether going on back would leave the traffic on dead copies while the new ones are there and well.
fn wants_forward(core: &Core, run: &Run, plan: &Plan) -> Option<Finding> {
    let signals: Signals = run.signals.borrow().clone();
    let state = core.state();
    if !order::is_stranded(signals.old, signals.new) || !had_shifted(&state, run, plan) {
        return None;
    }
    let there = plan.add.iter().all(|added| {
        state.instances.get(&added.id).is_some_and(|i| {
            i.address.is_some() && !matches!(i.state, InstanceState::Planned | InstanceState::Releasing)
        })
    });
    there.then(|| Finding {
        code: "instance.old_died".to_owned(),
        message: format!("the old copies died on the way back: {}", signals.old_why),
        hint: "The new copies are well and keep the traffic; look at the old ones' output.".to_owned(),
    })
}

async fn turn_forward(core: &Arc<Core>, run: &Run, plan: &Arc<Plan>, why: Finding) {
    let (id, plan) = (run.id.clone(), Arc::clone(plan));
    let turned = core.commit(move |draft| {
        let Some(rollout) = draft.state().rollouts.get(&id).filter(|r| r.state == RolloutState::RollingBack)
        else {
            return Ok(());
        };
        let mut rollout = Rollout::clone(rollout);
        rollout.state = RolloutState::Running;
        rollout.control = Control::Run;
        rollout.problem = Some(why.clone());
        // The last shift gives the new copies everything, and a new stretch of service if they need one.
        rollout.step =
            plan.steps.iter().rposition(|step| matches!(step, Step::Shift { .. })).unwrap_or(rollout.step);
        let at = draft.now();
        draft.journal(&id, &JournalRecord::Turn { at, direction: Direction::Forward, why });
        draft.put_rollout(&rollout);
        Ok(())
    });
    if turned.await.is_err() {
        pause_for_store().await;
    }
}
