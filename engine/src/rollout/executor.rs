//! The executor of one rollout: one step at a time, intent before the deed and settlement after it.
//!
//! Each deed runs in a task of its own that can be abandoned: what it started is named by ids that were
//! committed before, so the undo finds it. What an abandoned deed still wants to commit is refused, because
//! its intent is not the newest record any more.

use std::sync::Arc;
use std::time::Duration;

use peregrine_routing::HoldCounts;

use super::supervisor::Signals;
use super::{Run, back};
use crate::alarms;
use crate::audit::AuditAct;
use crate::core::Core;
use crate::draft::Draft;
use crate::error::{EngineError, ErrorKind, FENCED_CODE};
use crate::journal::{Direction, JournalRecord, ServiceChange};
use crate::model::{Control, EventBody, Finding, Phase, Plan, Rollout, RolloutState, Service, Step};
use crate::order::{self, Kind, Vital};
use crate::state::State;
use crate::steps::{self, Done, Problem, StepContext};

/// Longest time that the first look at the new copies is waited for; one that gets no answer is one, too.
const FIRST_LOOK_LIMIT_MS: u64 = 5_000;
/// Between attempts when the store cannot be written.
const STORE_RETRY_MS: u64 = 500;
/// Ended rollouts that are kept, with their receipts: some years of a daily deploy.
pub(crate) const MAX_ENDED_ROLLOUTS: usize = 1_000;

/// How a deed came out.
enum Ran {
    Done(Done),
    Failed(Finding),
    /// Health, or an operator, wants the other way.
    Turn(Finding),
    /// The deed has to be begun again: the store was in trouble, or the deed is not the newest any more.
    Again,
    Stopped,
}

pub(super) async fn execute(core: Arc<Core>, run: Arc<Run>) {
    loop {
        let state = core.state();
        let Some(rollout) = state.rollouts.get(&run.id).filter(|rollout| !rollout.state.is_terminal()) else {
            break;
        };
        if let Some(problem) = alarms::held(&state, rollout) {
            drop(state);
            tell_held(&core, &run, problem).await;
            break;
        }
        let plan = Arc::new(rollout.plan.clone());
        let (step, back_wanted) = (rollout.step, rollout.state == RolloutState::RollingBack);
        drop(state);
        let stopped = if back_wanted {
            back::go_back(&core, &run, &plan).await
        } else if step >= plan.steps.len() {
            finish(&core, &run, RolloutState::Succeeded, None).await;
            false
        } else {
            forward(&core, &run, &plan, step).await
        };
        if stopped || core.stop.is_cancelled() {
            return;
        }
    }
    run.ledger.release(&core);
}

/// An alarm: in the log, and once for each process as an event. The record is left as it is: what this version cannot read
/// it would not write back whole.
async fn tell_held(core: &Arc<Core>, run: &Run, problem: Finding) {
    if !core.runs.first_time_held(&run.id) {
        return;
    }
    tracing::error!(rollout = %run.id, code = %problem.code, hint = %problem.hint, "{}", problem.message);
    let service = core.state().rollouts.get(&run.id).map(|rollout| rollout.plan.service.clone());
    if let Err(error) = core.tell(service.as_deref(), Some(&run.id), EventBody::Held { problem }).await {
        tracing::warn!(rollout = %run.id, %error, "that it is held cannot be stored as an event");
    }
}

/// Does one step; says whether the engine stops.
async fn forward(core: &Arc<Core>, run: &Arc<Run>, plan: &Arc<Plan>, index: usize) -> bool {
    let step = plan.steps[index].clone();
    match wait_while_paused(core, run, &step).await {
        Ran::Turn(why) => return turn_back(core, run, why).await,
        Ran::Stopped => return true,
        _ => {}
    }
    let Some(intent) = begin(core, run, plan, index, Direction::Forward).await else {
        return core.stop.is_cancelled();
    };
    let context = StepContext::new(core, run, plan, intent);
    match run_deed(core, run, &step, steps::forward(context, step.clone())).await {
        Ran::Done(done) => settle(core, run, plan, intent, index, done).await,
        Ran::Failed(problem) if matches!(step, Step::Release { .. }) => {
            leave_over(core, run, intent, index, problem).await
        }
        Ran::Failed(problem) if !step.kind().row().returns => {
            tracing::error!(rollout = %run.id, problem = %problem.message, "a step without a way back is begun again");
            pause_for_store().await;
        }
        Ran::Failed(problem) | Ran::Turn(problem) => return turn_back(core, run, problem).await,
        Ran::Again => pause_for_store().await,
        Ran::Stopped => return true,
    }
    false
}

/// Runs a deed while watching the signals.
async fn run_deed(
    core: &Arc<Core>,
    run: &Run,
    step: &Step,
    deed: impl Future<Output = Result<Done, Problem>> + Send + 'static,
) -> Ran {
    let mut deed = AbortOnDrop(tokio::spawn(deed));
    let mut signals = run.signals.subscribe();
    loop {
        let now = signals.borrow_and_update().clone();
        let turn = core.state().rollouts.get(&run.id).and_then(|rollout| wants_back(rollout, step, &now));
        if let Some(why) = turn {
            return Ran::Turn(why);
        }
        tokio::select! {
            biased; // what is done is done, whatever else has happened
            done = &mut deed.0 => return match done {
                Ok(Ok(done)) => Ran::Done(done),
                Ok(Err(Problem::Failed(finding))) => Ran::Failed(finding),
                Ok(Err(Problem::Store(error))) => {
                    tracing::warn!(rollout = %run.id, %error, "a step is begun again");
                    Ran::Again
                }
                Err(error) => Ran::Failed(defect(&error)),
            },
            () = signals.changed() => {}
            () = core.stop.cancelled() => return Ran::Stopped,
        }
    }
}

pub(crate) fn defect(error: &tokio::task::JoinError) -> Finding {
    Finding {
        code: "engine.defect".to_owned(),
        message: format!("the step met a defect: {error}"),
        hint: "Please report it with the log of the engine.".to_owned(),
    }
}

/// Whether the rollout is to go back now. Direction is by health once the shift has begun: the side that
/// does better is where the traffic goes, and an ask to go back does not send it to a dead copy.
fn wants_back(rollout: &Rollout, step: &Step, signals: &Signals) -> Option<Finding> {
    if is_past_return(rollout) {
        return None;
    }
    let shifted = !rollout.plan.add.is_empty() && step.kind().row().by_health;
    if signals.control == Control::Abort {
        return (!(shifted && is_stranded(signals))).then(aborted);
    }
    let new = signals.new.unwrap_or(Vital::Good);
    (shifted && order::turns_back(step.kind(), signals.old, signals.new)).then(|| Finding {
        code: if new == Vital::Dead { "instance.died" } else { "instance.unwell" }.to_owned(),
        message: format!("a new copy failed: {}", signals.new_why),
        hint: "Read its output (logs) and correct the version, then deploy again.".to_owned(),
    })
}

/// The old copies are dead and the new ones well: going back would help nobody.
fn is_stranded(signals: &Signals) -> bool {
    order::is_stranded(signals.old, signals.new)
}

/// Old copies are being removed, or the only one that may run is the new one: there is no way back any more, but a rollout of its own.
pub(crate) fn is_past_return(rollout: &Rollout) -> bool {
    let is_switch = |step: &Step| step.kind() == Kind::Switch;
    let switch = rollout.plan.steps.iter().position(is_switch);
    let switched =
        switch.is_some_and(|at| rollout.step > at || (rollout.step == at && rollout.phase == Phase::Shift));
    switched || rollout.phase == Phase::Release
}

/// From the intent of the hold to the settlement of the switch: nobody serves for much of that time, and clients wait. What stood
/// still in there would be an outage without an end.
pub(crate) fn is_cutting_over(state: &State, rollout: &Rollout) -> bool {
    let at = |kind| rollout.plan.steps.iter().position(|step| step.kind() == kind);
    let (Some(hold), Some(switch)) = (at(Kind::Hold), at(Kind::Switch)) else { return false };
    let begun =
        |record: &JournalRecord| matches!(record, JournalRecord::Intent { step, .. } if *step == hold);
    let journal = state.journals.get(&rollout.id);
    (hold + 1..=switch).contains(&rollout.step)
        || (rollout.step == hold && journal.is_some_and(|journal| journal.values().any(begun)))
}

fn aborted() -> Finding {
    Finding {
        code: "move.aborted".to_owned(),
        message: "it was asked to go back".to_owned(),
        hint: "Nothing to do: the service is on its old copies.".to_owned(),
    }
}

/// A pause holds before each step outside of a cutover. Traffic stays as it is; health still decides.
async fn wait_while_paused(core: &Core, run: &Run, step: &Step) -> Ran {
    let mut signals = run.signals.subscribe();
    let look_by = tokio::time::Instant::now() + Duration::from_millis(FIRST_LOOK_LIMIT_MS);
    loop {
        let mut now = signals.borrow_and_update().clone();
        let state = core.state();
        let Some(rollout) = state.rollouts.get(&run.id) else { return Ran::Again };
        now.control = rollout.control; // the supervisor may not have looked yet
        if let Some(why) = wants_back(rollout, step, &now) {
            return Ran::Turn(why);
        }
        // An engine that has just begun may find a new copy dead: before the old ones go, it has to have looked.
        let sure = step.kind() != Kind::Release || now.looked || tokio::time::Instant::now() >= look_by;
        if sure && (now.control != Control::Pause || is_cutting_over(&state, rollout)) {
            return Ran::Again;
        }
        drop(state);
        tokio::select! {
            biased;
            () = signals.changed() => {}
            () = tokio::time::sleep_until(look_by), if !sure => {}
            () = core.stop.cancelled() => return Ran::Stopped,
        }
    }
}

/// Commits the intent. `None` if the rollout is not where this was decided any more.
pub(super) async fn begin(
    core: &Arc<Core>,
    run: &Run,
    plan: &Arc<Plan>,
    index: usize,
    direction: Direction,
) -> Option<u64> {
    let (id, plan) = (run.id.clone(), Arc::clone(plan));
    let stranded = is_stranded(&run.signals.borrow());
    let made = core.commit(move |draft| {
        let Some(rollout) = draft.state().rollouts.get(&id) else { return Ok(None) };
        let going_back = rollout.state == RolloutState::RollingBack;
        if rollout.state.is_terminal() || going_back != (direction == Direction::Back) {
            return Ok(None);
        }
        let step = &plan.steps[index];
        let too_late = rollout.control == Control::Abort && !stranded && !is_past_return(rollout);
        // It was asked for after the last look, and before anything of this step.
        let paused = rollout.control == Control::Pause && !is_cutting_over(draft.state(), rollout);
        if direction == Direction::Forward && (rollout.step != index || too_late || paused) {
            return Ok(None);
        }
        let mut rollout = Rollout::clone(rollout);
        let phase = steps::phase(step);
        let entered = rollout.phase != phase || rollout.phases.is_empty();
        if direction == Direction::Forward {
            rollout.waiting_for = None;
            if entered {
                rollout.phase = phase;
                rollout.phases.push((phase, draft.now()));
            }
            draft.put_rollout(&rollout);
            if entered {
                draft.event(Some(&plan.service), Some(&id), EventBody::Phase { phase });
            }
        }
        let attempt = 1 + attempts(draft, &rollout, index, direction);
        let at = draft.now();
        let way = if direction == Direction::Forward { "forward" } else { "back" };
        let intent = JournalRecord::Intent {
            at,
            step: index,
            direction,
            attempt,
            token: format!("{id}/{index}/{way}"),
            deadline: deadline(draft, &rollout, index, direction)
                .unwrap_or(at + steps::limit_ms(step, &plan.settings)),
        };
        Ok(Some(draft.journal(&id, &intent)))
    });
    match made.await {
        Ok(intent) => {
            if intent.is_none() {
                // Somebody asked for the other way in between; the supervisor will have told by then.
                core.until_signal(run).await;
            }
            intent
        }
        Err(error) => {
            tracing::warn!(rollout = %run.id, %error, "the intent of a step cannot be stored");
            pause_for_store().await;
            None
        }
    }
}

fn attempts(draft: &Draft<'_>, rollout: &Rollout, index: usize, direction: Direction) -> u32 {
    let journal = draft.state().journals.get(&rollout.id);
    let same = |record: &&JournalRecord| matches!(record, JournalRecord::Intent { step, direction: d, .. } if *step == index && *d == direction);
    u32::try_from(journal.map_or(0, |journal| journal.values().filter(same).count())).unwrap_or(u32::MAX)
}

/// A step that is begun again keeps its first deadline: a restart must not prolong a soak.
fn deadline(draft: &Draft<'_>, rollout: &Rollout, index: usize, direction: Direction) -> Option<u64> {
    let journal = draft.state().journals.get(&rollout.id)?;
    let turned =
        journal.iter().rev().find(|(_, r)| matches!(r, JournalRecord::Turn { .. })).map_or(0, |(s, _)| *s);
    journal.range(turned..).find_map(|(_, record)| match record {
        JournalRecord::Intent { step, direction: d, deadline, .. } if *step == index && *d == direction => {
            Some(*deadline)
        }
        _ => None,
    })
}

async fn settle(core: &Arc<Core>, run: &Run, plan: &Arc<Plan>, intent: u64, index: usize, done: Done) {
    let (id, service) = (run.id.clone(), plan.service.clone());
    let step = plan.steps[index].clone();
    let settled = core.commit(move |draft| {
        let Some(rollout) = draft.state().rollouts.get(&id) else { return Ok(()) };
        let mut rollout = Rollout::clone(rollout);
        if rollout.step != index || rollout.state == RolloutState::RollingBack {
            return Ok(());
        }
        rollout.step = index + 1;
        rollout.waiting_for = None;
        if rollout.control == Control::Promote && matches!(step, Step::Shift { .. } | Step::Soak) {
            rollout.control = Control::Run;
        }
        let at = draft.now();
        draft.journal(&id, &JournalRecord::Settled { at, intent, output: Some(done.output), error: None });
        draft.put_rollout(&rollout);
        for event in done.events {
            draft.event(Some(&service), Some(&id), event);
        }
        Ok(())
    });
    if let Err(error) = settled.await {
        tracing::warn!(rollout = %run.id, %error, "the settlement of a step cannot be stored; it is begun again");
        pause_for_store().await;
    }
}

/// An old copy that cannot be removed stops nothing: it is written down, and the reconciler tries again.
async fn leave_over(core: &Arc<Core>, run: &Run, intent: u64, index: usize, problem: Finding) {
    let id = run.id.clone();
    let stored = core.commit(move |draft| {
        let Some(rollout) = draft.state().rollouts.get(&id).filter(|rollout| rollout.step == index) else {
            return Ok(());
        };
        let mut rollout = Rollout::clone(rollout);
        rollout.step = index + 1;
        rollout.leftovers.push(problem.message.clone());
        note_refusal(draft, &rollout, &problem);
        let at = draft.now();
        draft.journal(&id, &JournalRecord::Settled { at, intent, output: None, error: Some(problem) });
        draft.put_rollout(&rollout);
        Ok(())
    });
    if stored.await.is_err() {
        pause_for_store().await;
    }
}

/// Turns back, durably; says whether the engine stops.
pub(super) async fn turn_back(core: &Arc<Core>, run: &Run, why: Finding) -> bool {
    let id = run.id.clone();
    let turned = core.commit(move |draft| {
        let Some(rollout) = draft.state().rollouts.get(&id) else { return Ok(()) };
        if rollout.state.is_terminal() || rollout.state == RolloutState::RollingBack {
            return Ok(());
        }
        let mut rollout = Rollout::clone(rollout);
        rollout.state = RolloutState::RollingBack;
        rollout.problem = Some(why.clone());
        rollout.waiting_for = None;
        let at = draft.now();
        draft.journal(&id, &JournalRecord::Turn { at, direction: Direction::Back, why: why.clone() });
        draft.put_rollout(&rollout);
        note_refusal(draft, &rollout, &why);
        draft.event(Some(&rollout.plan.service), Some(&id), EventBody::TurnedBack { problem: why });
        Ok(())
    });
    if turned.await.is_err() {
        pause_for_store().await;
    }
    core.stop.is_cancelled()
}

/// What a machine refused because somebody with a higher epoch was there before is told in the audit.
pub(super) fn note_refusal(draft: &mut Draft<'_>, rollout: &Rollout, problem: &Finding) {
    if problem.code == FENCED_CODE {
        let what = problem.message.clone();
        draft.audit(Some(&rollout.plan.service), Some(&rollout.id), AuditAct::Refused { what });
    }
}

pub(super) async fn pause_for_store() {
    tokio::time::sleep(Duration::from_millis(STORE_RETRY_MS)).await;
}

/// Ends the rollout: the claim is released, the receipt written, the journal closed, all in one commit.
pub(super) async fn finish(core: &Arc<Core>, run: &Arc<Run>, end: RolloutState, problem: Option<Finding>) {
    let (id, shared) = (run.id.clone(), Arc::clone(run));
    let service = core.state().rollouts.get(&id).map(|rollout| rollout.plan.service.clone());
    let holds = service.map(|service| core.table.hold_counts(&service)).unwrap_or_default();
    let ended = core.commit(move |draft| end_rollout(draft, &id, &holds, &shared, end, problem)).await;
    match ended {
        Ok(service) => {
            metrics::counter!("peregrine_rollouts_total", "end" => end_name(end)).increment(1);
            if let Err(error) = core.publish(&service).await {
                tracing::error!(%service, %error, "the table does not take the service");
            }
        }
        Err(error) => {
            tracing::warn!(rollout = %run.id, %error, "the end of a rollout cannot be stored yet");
            pause_for_store().await;
        }
    }
}

const fn end_name(end: RolloutState) -> &'static str {
    match end {
        RolloutState::Succeeded => "succeeded",
        RolloutState::RolledBack => "rolled_back",
        RolloutState::Aborted => "aborted",
        RolloutState::NeedsOperator => "needs_operator",
        _ => "failed",
    }
}

fn end_rollout(
    draft: &mut Draft<'_>,
    id: &crate::model::RolloutId,
    holds: &HoldCounts,
    run: &Run,
    end: RolloutState,
    problem: Option<Finding>,
) -> Result<String, EngineError> {
    let state = draft.state();
    let Some(rollout) = state.rollouts.get(id) else {
        return Err(EngineError::new(ErrorKind::Internal, "move.unknown", format!("{id} is gone"), ""));
    };
    let mut rollout = Rollout::clone(rollout);
    let end = if rollout.leftovers.is_empty() { end } else { RolloutState::NeedsOperator };
    let succeeded = rollout.state != RolloutState::RollingBack;
    rollout.state = end;
    rollout.ended_at = Some(draft.now());
    rollout.waiting_for = None;
    rollout.control = Control::Run;
    rollout.problem = problem.or(rollout.problem);
    rollout.receipt = Some(run.ledger.receipt(&rollout, holds));
    let name = rollout.plan.service.clone();
    if let Some(service) = state.services.get(&name).filter(|service| service.rollout.as_ref() == Some(id)) {
        release_claim(draft, service, state.changes.get(id), &rollout.plan, succeeded);
    }
    draft.put_rollout(&rollout);
    draft.close_rollout(id);
    prune(draft);
    let act = AuditAct::Ended {
        state: end,
        problem: rollout.problem.as_ref().map(|problem| problem.code.clone()),
        receipt: rollout.receipt.map(Box::new),
    };
    draft.audit(Some(&name), Some(id), act);
    draft.event(Some(&name), Some(id), EventBody::Done { state: end, problem: rollout.problem });
    Ok(name)
}

fn release_claim(
    draft: &mut Draft<'_>,
    service: &Service,
    change: Option<&ServiceChange>,
    plan: &Plan,
    succeeded: bool,
) {
    let mut service = service.clone();
    service.rollout = None;
    let gone =
        change.is_some_and(|change| if succeeded { change.after.is_none() } else { change.before.is_none() });
    if gone {
        let name = service.spec.name.clone();
        let versions = draft.state().versions.keys().filter(|(of, _)| *of == name).map(|(_, number)| *number);
        for number in versions.collect::<Vec<_>>() {
            draft.delete_version(&name, number);
        }
        draft.delete_service(&name);
        draft.event(Some(&name), None, EventBody::ServiceRemoved {});
        return;
    }
    if let Some(change) = change {
        if succeeded {
            adopt(&mut service, change, plan);
        } else {
            restore(&mut service, change);
        }
    }
    draft.put_service(&service);
    draft.event(Some(&service.spec.name), None, EventBody::ServiceChanged {});
}

/// The service as it is after the rollout.
pub(crate) fn adopt(service: &mut Service, change: &ServiceChange, plan: &Plan) {
    if let Some(after) = &change.after {
        service.spec = (**after).clone();
    }
    if service.version != Some(plan.to_version) {
        service.previous_version = plan.from_version;
        service.version = Some(plan.to_version);
    }
}

/// The service as it was before the rollout.
pub(crate) fn restore(service: &mut Service, change: &ServiceChange) {
    if let Some(before) = &change.before {
        service.spec = (**before).clone();
    }
    service.version = change.version_before;
    service.previous_version = change.previous_before;
}

fn prune(draft: &mut Draft<'_>) {
    let ended: Vec<_> =
        draft.state().rollouts.values().filter(|r| r.state.is_terminal()).map(|r| r.id.clone()).collect();
    let keeps_leftovers = |id: &crate::model::RolloutId| draft.state().rollouts[id].leftovers.is_empty();
    let too_many = ended.len().saturating_sub(MAX_ENDED_ROLLOUTS);
    let old: Vec<_> = ended.into_iter().filter(keeps_leftovers).take(too_many).collect();
    for id in old {
        draft.delete_rollout(&id);
    }
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Core {
    /// Waits for the next signal of a rollout, or a moment: after a decision that was overtaken.
    async fn until_signal(&self, run: &Run) {
        let mut signals = run.signals.subscribe();
        let moment = Duration::from_millis(50);
        let _ = tokio::time::timeout(moment, signals.changed()).await; // either way: decide anew
    }
}
