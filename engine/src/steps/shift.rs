//! Shift: the new copies get their share, and are judged while they have it. Back: the old ones get all of it.

use std::time::Duration;

use peregrine_routing::OutcomeCounts;
use tokio::time::Instant;

use super::{Done, Problem, StepContext, drain};
use crate::draft::Draft;
use crate::error::EngineError;
use crate::model::{Control, EventBody, Finding, InstanceState, Plan, Rollout};
use crate::order::Vital;
use crate::rollout::{Compared, Side, more_errors, slower};

/// How often a step is judged while it is held.
const JUDGE_INTERVAL_MS: u64 = 25;
/// Stretch of time that has to confirm that the new copies are slow.
const CONFIRM_SLOW_MS: u64 = 200;
/// So many pauses in one step are not pauses any more.
const MAX_SUSPICIONS: u32 = 3;

pub(super) async fn forward(context: &StepContext, percent: u8) -> Result<Done, Problem> {
    let mut percent = percent;
    if old_is_lost(context) {
        percent = 100; // there is no better place for the rest
    }
    let (base, old_before) = (readings(context), context.run.ledger.outcomes(Side::Old));
    set_weight(context, percent).await?;
    let first = context.plan.retire.is_empty() && context.plan.keep.is_empty();
    if first {
        return Ok(Done::new("the first copy serves"));
    }
    judge_step(context, percent, &base, &old_before).await
}

/// Outcomes of both sides when the step begins.
struct Base {
    new: OutcomeCounts,
    old: OutcomeCounts,
}

fn readings(context: &StepContext) -> Base {
    let ledger = &context.run.ledger;
    Base { new: ledger.outcomes(Side::New), old: ledger.outcomes(Side::Old) }
}

fn old_is_lost(context: &StepContext) -> bool {
    let signals = context.run.signals.borrow();
    signals.old.is_some_and(|old| old > signals.new.unwrap_or(Vital::Good))
}

/// Durable, then visible, then acknowledged by every edge.
async fn set_weight(context: &StepContext, percent: u8) -> Result<(), Problem> {
    let plan = std::sync::Arc::clone(&context.plan);
    context
        .commit(move |draft, rollout| {
            serve(draft, &plan);
            if rollout.weight_percent != percent {
                let mut rollout = rollout.clone();
                rollout.weight_percent = percent;
                draft.put_rollout(&rollout);
            }
            Ok(())
        })
        .await?;
    context.publish().await?;
    tell_weight(context, percent).await?;
    Ok(())
}

async fn tell_weight(context: &StepContext, percent: u8) -> Result<(), EngineError> {
    let service = context.plan.service.clone();
    context
        .commit(move |draft, rollout| {
            draft.event(Some(&service), Some(&rollout.id), EventBody::Weight { percent });
            Ok(())
        })
        .await?;
    context.run.sample_now.notify_one();
    Ok(())
}

/// New copies serve from now on; one that was retired on a way back gets a new stretch of service.
fn serve(draft: &mut Draft<'_>, plan: &Plan) {
    for added in &plan.add {
        let Some(instance) = draft.state().instances.get(&added.id) else { continue };
        if instance.state == InstanceState::Serving {
            continue;
        }
        let mut instance = instance.clone();
        if instance.state != InstanceState::Started || instance.generation == 0 {
            instance.generation = draft.generation();
        }
        instance.state = InstanceState::Serving;
        draft.put_instance(&instance);
        draft.event(
            Some(&plan.service),
            None,
            EventBody::InstanceChanged { instance: instance.id, change: "serving".to_owned() },
        );
    }
}

async fn judge_step(
    context: &StepContext,
    percent: u8,
    base: &Base,
    old_before: &OutcomeCounts,
) -> Result<Done, Problem> {
    let settings = &context.plan.settings;
    let begun = Instant::now();
    let hold = Duration::from_millis(u64::from(settings.step_hold_ms));
    let longest = Duration::from_millis(u64::from(settings.step_max_ms.max(settings.step_hold_ms)));
    let min_samples = u64::from(settings.step_min_samples);
    let mut signals = context.run.signals.subscribe();
    let mut suspicion = Suspicion::default();
    loop {
        let now = signals.borrow_and_update().clone();
        let compared = compare(context, percent, base, old_before);
        if old_is_lost(context) {
            if percent < 100 {
                set_weight(context, 100).await?;
            }
            return Ok(verdict(
                "pass",
                percent,
                &compared,
                &format!("the old copies are lost: {}", now.old_why),
            ));
        }
        let worse = more_errors(&compared, &settings.guards);
        // At 100 % the old copies get nothing: there is no latency of the same time to compare with.
        let slow = if percent < 100 { suspicion.look(context, percent, &compared) } else { None };
        if let Some(why) = worse.or(slow) {
            return Err(guard_failed(context, percent, why).await);
        }
        let held = now.control == Control::Pause || suspicion.is_open();
        if now.control == Control::Promote {
            return Ok(verdict("pass", percent, &compared, "promoted by the operator"));
        }
        let samples = compared.new.samples();
        if !held && begun.elapsed() >= hold && samples >= min_samples {
            return Ok(verdict("pass", percent, &compared, "nothing speaks against the new copies"));
        }
        if !held && begun.elapsed() >= longest {
            // Too little traffic for a verdict: the probes, which are good or this would not go on, decide.
            return Ok(verdict("inconclusive", percent, &compared, "too few requests; the probes are good"));
        }
        tokio::select! {
            biased;
            () = signals.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(JUDGE_INTERVAL_MS)) => {}
        }
    }
}

/// The suspicion that the new copies are slow. It is believed when a fresh stretch of time says the same, or
/// when it comes up again and again: one pause of a copy is no verdict.
#[derive(Default)]
struct Suspicion {
    open: Option<(Instant, Base)>,
    /// What came before is told off: it was a pause.
    since: Option<Base>,
    times: u32,
}

impl Suspicion {
    const fn is_open(&self) -> bool {
        self.open.is_some()
    }

    fn look(&mut self, context: &StepContext, percent: u8, whole: &Compared) -> Option<String> {
        let settings = &context.plan.settings;
        let min_samples = u64::from(settings.step_min_samples);
        let is_slower = |compared: &Compared| slower(compared, &settings.guards, min_samples);
        let over = |base: &Base| compare(context, percent, base, &OutcomeCounts::default());
        match &self.open {
            None => {
                let found =
                    self.since.as_ref().map_or_else(|| is_slower(whole), |base| is_slower(&over(base)));
                found.as_ref()?;
                self.times += 1;
                if self.times > MAX_SUSPICIONS {
                    return found;
                }
                self.open = Some((Instant::now(), readings(context)));
                None
            }
            Some((since, _)) if since.elapsed() < Duration::from_millis(CONFIRM_SLOW_MS) => None,
            Some((_, base)) => {
                let confirmed = is_slower(&over(base));
                self.open = None;
                self.since = Some(readings(context));
                confirmed
            }
        }
    }
}

/// Both sides over this step. Where the old side gets nothing any more, what it did earlier in this
/// rollout is the measure.
fn compare(context: &StepContext, percent: u8, base: &Base, old_before: &OutcomeCounts) -> Compared {
    let ledger = &context.run.ledger;
    let new = ledger.outcomes(Side::New).since(&base.new);
    let old = if percent == 100 { old_before.clone() } else { ledger.outcomes(Side::Old).since(&base.old) };
    Compared { new, old }
}

fn verdict(verdict: &str, percent: u8, compared: &Compared, why: &str) -> Done {
    let (new, old) = (&compared.new, &compared.old);
    let message = format!(
        "{percent} %: new {} requests, {} failed; old {} requests, {} failed: {why}",
        new.samples(),
        new.errors(),
        old.samples(),
        old.errors()
    );
    Done { output: message.clone(), events: vec![EventBody::Guard { verdict: verdict.to_owned(), message }] }
}

async fn guard_failed(context: &StepContext, percent: u8, why: String) -> Problem {
    let service = context.plan.service.clone();
    let message = format!("{percent} %: {why}");
    let told = message.clone();
    let result = context
        .commit(move |draft, rollout| {
            let body = EventBody::Guard { verdict: "fail".to_owned(), message: told };
            draft.event(Some(&service), Some(&rollout.id), body);
            Ok(())
        })
        .await;
    if let Err(error) = result {
        return Problem::Store(error);
    }
    Problem::Failed(Finding {
        code: "guard.failed".to_owned(),
        message: format!("the new copies do worse at {message}"),
        hint: "Read the new version's output; if the difference is meant, widen move.guards.".to_owned(),
    })
}

/// The old copies get everything back, with a new stretch of service where theirs had ended; then the new
/// ones are drained.
pub(super) async fn back(context: &StepContext) -> Result<Done, Problem> {
    let plan = std::sync::Arc::clone(&context.plan);
    context.commit(move |draft, rollout| restore(draft, rollout, &plan)).await?;
    context.publish().await?;
    // A drain that was begun and given up: whoever is inside keeps the deadlines that the drain gave.
    let drain = &context.plan.settings.drain;
    for upstream in context.plan.retire.iter().flat_map(|id| context.core.table.leaving(id)) {
        context.core.see_off(upstream, drain.clone());
    }
    tell_weight(context, 0).await?;
    let plan = std::sync::Arc::clone(&context.plan);
    context
        .commit(move |draft, _| {
            for added in &plan.add {
                if let Some(instance) = draft.state().instances.get(&added.id) {
                    drain::retire(draft, instance, InstanceState::Draining);
                }
            }
            Ok(())
        })
        .await?;
    context.publish().await?;
    drain::drained(context, &context.new_ids()).await?;
    Ok(Done::new("the old copies serve"))
}

fn restore(draft: &mut Draft<'_>, rollout: &Rollout, plan: &Plan) -> Result<(), EngineError> {
    for id in &plan.retire {
        let Some(instance) = draft.state().instances.get(id) else { continue };
        if instance.state == InstanceState::Serving {
            continue;
        }
        let mut instance = instance.clone();
        if instance.state != InstanceState::Soaking {
            instance.generation = draft.generation();
        }
        instance.state = InstanceState::Serving;
        draft.put_instance(&instance);
    }
    let mut rollout = rollout.clone();
    rollout.weight_percent = 0;
    draft.put_rollout(&rollout);
    let service = draft.state().services.get(&plan.service);
    if let (Some(service), Some(change)) = (service, draft.state().changes.get(&rollout.id)) {
        let mut service = service.clone();
        crate::rollout::restore(&mut service, change);
        draft.put_service(&service);
    }
    Ok(())
}
