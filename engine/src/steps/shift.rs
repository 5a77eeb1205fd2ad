//! Shift: the new copies get their share, and are judged while they have it. Back: the old ones get all of it.
//!
//! A step passes, fails (the rollout goes back) or is held. What holds it is a suspicion, which more requests
//! clear or confirm, or probes that are bad where there is too little traffic to judge by. A hold ends: after
//! `hold_max_ms` the plan's rule decides.

use std::time::Duration;

use tokio::time::Instant;

use super::{Done, Problem, StepContext, drain, warm};
use crate::draft::Draft;
use crate::error::EngineError;
use crate::model::{Control, EventBody, Finding, HoldThen, InstanceState, Plan, Rollout, RolloutState};
use crate::order::Vital;
use crate::rollout::{Reading, Side, Terms, Verdict};

/// How often a step is judged while it is held.
const JUDGE_INTERVAL_MS: u64 = 25;
/// Between two rounds of probes in a step that has too little traffic, while they are bad.
const PROBE_INTERVAL_MS: u64 = 200;

pub(super) async fn forward(context: &StepContext, percent: u8) -> Result<Done, Problem> {
    let mut percent = percent;
    if old_is_lost(context) {
        percent = 100; // there is no better place for the rest
    }
    let judged = Judged { context, percent };
    judged.begin();
    set_weight(context, percent).await?;
    let first = context.plan.retire.is_empty() && context.plan.keep.is_empty();
    if first {
        return Ok(Done::new("the first copy serves"));
    }
    judged.judge().await
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
                let mut rollout = Rollout::clone(rollout);
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
pub(super) fn serve(draft: &mut Draft<'_>, plan: &Plan) {
    for added in &plan.add {
        let Some(instance) = draft.state().instances.get(&added.id) else { continue };
        if instance.state == InstanceState::Serving {
            continue;
        }
        let mut instance = instance.clone();
        if instance.state != InstanceState::Started || instance.generation == 0 {
            instance.begin_stretch(draft.generation());
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

/// A step that is being judged.
struct Judged<'a> {
    context: &'a StepContext,
    percent: u8,
}

/// Why a step is held, and since when.
struct Held {
    since: Instant,
    why: String,
}

impl Judged<'_> {
    fn begin(&self) {
        self.context.run.judge().begin_step(self.context.run.elapsed_ms(), self.reading());
    }

    fn reading(&self) -> Reading {
        let ledger = &self.context.run.ledger;
        Reading { new: ledger.outcomes(Side::New), old: ledger.outcomes(Side::Old) }
    }

    /// One look: takes in what was measured, and says what is to be thought of it.
    fn look(&self, now: &Reading) -> Verdict {
        let settings = &self.context.plan.settings;
        let terms = Terms {
            guards: &settings.guards,
            min_samples: u64::from(settings.step_min_samples),
            // At 100 % the old copies get nothing: there is nothing of the same time to compare with.
            side_by_side: self.percent < 100,
        };
        let mut judge = self.context.run.judge();
        judge.look(self.context.run.elapsed_ms(), now, &settings.guards);
        judge.verdict(now, terms)
    }

    async fn judge(&self) -> Result<Done, Problem> {
        let settings = &self.context.plan.settings;
        let begun = Instant::now();
        let shortest = Duration::from_millis(u64::from(settings.step_hold_ms));
        let longest = Duration::from_millis(u64::from(settings.step_max_ms.max(settings.step_hold_ms)));
        let mut signals = self.context.run.signals.subscribe();
        let mut held: Option<Held> = None;
        loop {
            let signal = signals.borrow_and_update().clone();
            let now = self.reading();
            if old_is_lost(self.context) {
                if self.percent < 100 {
                    set_weight(self.context, 100).await?;
                }
                return Ok(self.done("pass", &now, &format!("the old copies are lost: {}", signal.old_why)));
            }
            let verdict = self.look(&now);
            if let Verdict::Fail(why) = verdict {
                return Err(guard_failed(self.context, self.percent, why).await);
            }
            if signal.control == Control::Promote {
                return Ok(self.done("pass", &now, "promoted by the operator"));
            }
            if signal.control == Control::Pause {
                held = None; // the operator has it in hand, for as long as it takes
            } else {
                let why = match verdict {
                    Verdict::Pass if begun.elapsed() >= shortest => {
                        return Ok(self.done("pass", &now, "nothing speaks against the new copies"));
                    }
                    Verdict::TooFew if begun.elapsed() >= longest => match self.probe().await {
                        Ok(good) => return Ok(self.done("inconclusive", &now, &good)),
                        Err(bad) => Some(bad),
                    },
                    Verdict::Suspicion(why) => Some(why),
                    _ => None,
                };
                held = match why {
                    Some(why) if begun.elapsed() >= shortest => Some(self.hold(held, why).await),
                    _ => None,
                };
                if let Some(done) = self.end_hold(held.as_ref(), &now).await? {
                    return Ok(done);
                }
            }
            tokio::select! {
                biased;
                () = signals.changed() => {}
                () = tokio::time::sleep(Duration::from_millis(JUDGE_INTERVAL_MS)) => {}
            }
        }
    }

    /// Where there is too little traffic, the engine's own requests show whether the new copies still work. They
    /// are no traffic: what follows from them is no verdict.
    async fn probe(&self) -> Result<String, String> {
        let good = warm::probe_new_copies(self.context).await;
        if good.is_err() {
            tokio::time::sleep(Duration::from_millis(PROBE_INTERVAL_MS)).await;
        }
        good.map(|count| format!("too few requests; {count} probes of the new copies were good"))
    }

    /// Begins or prolongs a hold; tells at its beginning.
    async fn hold(&self, held: Option<Held>, why: String) -> Held {
        if let Some(held) = held {
            return Held { why, ..held };
        }
        self.context.waiting_for(Some(format!("a verdict at {} %: {why}", self.percent))).await;
        Held { since: Instant::now(), why }
    }

    /// When a hold has lasted long enough, the plan's rule decides.
    async fn end_hold(&self, held: Option<&Held>, now: &Reading) -> Result<Option<Done>, Problem> {
        let settings = &self.context.plan.settings;
        let limit = Duration::from_millis(settings.hold_max_ms);
        let Some(held) = held.filter(|held| held.since.elapsed() >= limit) else { return Ok(None) };
        let why = format!("held for {} s without a verdict: {}", limit.as_secs(), held.why);
        match settings.hold_then {
            HoldThen::Pause => {
                self.pause(now, &why).await?;
                Ok(None)
            }
            HoldThen::GoOn => Ok(Some(self.done("inconclusive", now, &why))),
            HoldThen::GoBack => Err(guard_failed(self.context, self.percent, why).await),
        }
    }

    /// Stays at these weights until somebody decides, and says so. What somebody has decided just before it stands.
    async fn pause(&self, now: &Reading, why: &str) -> Result<(), EngineError> {
        let message = self.message(now, why);
        tracing::warn!(rollout = %self.context.id(), %message, "a step had no verdict for long: without one of a person the move is paused");
        let service = self.context.plan.service.clone();
        self.context
            .commit(move |draft, rollout| {
                if rollout.control != Control::Run {
                    return Ok(());
                }
                let mut rollout = rollout.clone();
                rollout.control = Control::Pause;
                rollout.state = RolloutState::Paused;
                rollout.waiting_for = Some(format!("a decision (resume, promote or abort); {message}"));
                draft.put_rollout(&rollout);
                let body = EventBody::Guard { verdict: "inconclusive".to_owned(), message };
                draft.event(Some(&service), Some(&rollout.id), body);
                Ok(())
            })
            .await?;
        // The supervisor passes it on; until then this step would pause again at every look.
        let mut signals = self.context.run.signals.subscribe();
        // The sender lives as long as the run, of which this step is a part.
        while signals.borrow_and_update().control == Control::Run {
            signals.changed().await;
        }
        Ok(())
    }

    fn message(&self, now: &Reading, why: &str) -> String {
        format!("{} %: {}: {why}", self.percent, self.context.run.judge().step_numbers(now))
    }

    fn done(&self, verdict: &str, now: &Reading, why: &str) -> Done {
        let message = self.message(now, why);
        Done {
            output: message.clone(),
            events: vec![EventBody::Guard { verdict: verdict.to_owned(), message }],
        }
    }
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

pub(super) fn restore(draft: &mut Draft<'_>, rollout: &Rollout, plan: &Plan) -> Result<(), EngineError> {
    for id in &plan.retire {
        let Some(instance) = draft.state().instances.get(id) else { continue };
        if instance.state == InstanceState::Serving {
            continue;
        }
        let mut instance = instance.clone();
        if instance.state != InstanceState::Soaking {
            instance.begin_stretch(draft.generation());
        }
        instance.state = InstanceState::Serving;
        draft.put_instance(&instance);
    }
    let mut rollout = Rollout::clone(rollout);
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
