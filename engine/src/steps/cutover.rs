//! Cutover of a single-writer service: hold its requests, stop the old copy, (start and warm the new one,) switch.
//!
//! At no moment do two copies run: a new one is started when the old one is confirmed to be stopped, and on the way
//! back the old one is started again when the new one is confirmed to be gone. Until the old copy is retired edges
//! that release by themselves (the engine is gone) find it in their table.
//!
//! A start that was given up in the middle does not come to effect after the removal that confirms its end: a
//! process is started on a thread that keeps the lock which its removal takes, and a container is made by one call
//! and started by another, which finds nothing to start once the container was removed.

use std::sync::Arc;
use std::time::Duration;

use peregrine_routing::{TrafficClass, Upstream};
use tokio::time::Instant;

use super::{Done, Problem, StepContext, drain, instance_spec, shift};
use crate::model::{DrainDeadlines, EventBody, Finding, Hold, Instance, InstanceId, InstanceState, Rollout};
use crate::probe::Probe;
use crate::render;
use crate::rollout::adopt;
use crate::runtime::Runtime;

/// How often it is read who is inside of the old copies; a few atomic loads.
const LOOK_INTERVAL_MS: u64 = 5;
/// Longest time that the end of a cutover waits for the last request that was held.
const RELEASED_WAIT_MS: u64 = 10_000;
/// Between two probes of a copy that is started again.
const PROBE_INTERVAL_MS: u64 = 50;
/// Beyond the grace: how long a runtime may take to stop a copy and confirm it.
const STOP_LIMIT_MS: u64 = 20_000;
/// Who is still inside when the old copy has to go has had its time.
const AT_ONCE: DrainDeadlines =
    DrainDeadlines { request_ms: 0, transfer_ms: 0, sse_ms: 0, grpc_stream_ms: 0, websocket_ms: 0 };

// --- hold

/// Every edge holds; then what is inside of the old copies is waited for. Long-lived traffic is not: it would not end.
pub(super) async fn hold(context: &StepContext) -> Result<Done, Problem> {
    let deadline_ms = u64::from(context.plan.settings.cutover.hold_deadline_ms);
    context
        .commit(move |draft, rollout| {
            if rollout.hold.is_none() {
                let since = draft.now();
                let until = since + deadline_ms;
                let hold = Hold { id: rollout.epoch, since, until, released_at: None };
                draft.put_rollout(&Rollout { hold: Some(hold), ..rollout.clone() });
            }
            Ok(())
        })
        .await?;
    // Clients wait from here on: an edge that says nothing must not make them wait for a switch that never comes.
    within(context, held(context), &NOT_HELD).await
}

async fn held(context: &StepContext) -> Result<Done, Problem> {
    context.publish().await?;
    let olds = context.plan.retire.iter();
    let upstreams: Vec<_> = olds.filter_map(|id| serving_upstream(context, id)).collect();
    let limit = Duration::from_millis(u64::from(context.plan.settings.cutover.drain_max_ms));
    let quiet = tokio::time::timeout(limit, quiet(&upstreams)).await.is_ok();
    Ok(Done::new(if quiet { "requests are held" } else { "requests are held; some are still inside" }))
}

fn serving_upstream(context: &StepContext, id: &InstanceId) -> Option<Arc<Upstream>> {
    let generation = context.core.state().instances.get(id)?.generation;
    context.core.table.upstream(generation)
}

async fn quiet(upstreams: &[Arc<Upstream>]) {
    let ends_soon = [TrafficClass::Request, TrafficClass::Transfer];
    let busy = |upstream: &Arc<Upstream>| {
        let in_flight = upstream.receipt().in_flight;
        ends_soon.into_iter().any(|class| in_flight[class] > 0)
    };
    while upstreams.iter().any(busy) {
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
}

/// The old copies get the requests back, those that wait first.
pub(super) async fn release_to_old(context: &StepContext) -> Result<Done, Problem> {
    let plan = Arc::clone(&context.plan);
    context
        .commit(move |draft, rollout| {
            shift::restore(draft, rollout, &plan)?;
            let Some(rollout) = draft.state().rollouts.get(&rollout.id).cloned() else { return Ok(()) };
            let released = released(&rollout, draft.now());
            draft.put_rollout(&released);
            Ok(())
        })
        .await?;
    context.publish().await?;
    for upstream in context.plan.retire.iter().flat_map(|id| context.core.table.leaving(id)) {
        context.core.see_off(upstream, context.plan.settings.drain.clone());
    }
    all_released(context).await;
    Ok(Done::new("requests go to the old copy"))
}

fn released(rollout: &Rollout, now: u64) -> Rollout {
    let mut rollout = Rollout::clone(rollout);
    if let Some(hold) = &mut rollout.hold {
        hold.released_at.get_or_insert(now);
    }
    rollout
}

/// For the receipt: who is still in the queue is in no count of a copy. No condition of anything.
async fn all_released(context: &StepContext) {
    let begun = Instant::now();
    let waits = || context.core.table.hold_counts(&context.plan.service).waiting > 0;
    while waits() && begun.elapsed() < Duration::from_millis(RELEASED_WAIT_MS) {
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
}

// --- stop

/// The old copy leaves the table, is emptied, and does not run any more.
pub(super) async fn stop(context: &StepContext, id: &InstanceId) -> Result<Done, Problem> {
    set_state(context, id, InstanceState::Draining).await?;
    context.publish().await?;
    drain::see_out(&context.core.table.leaving(id), &AT_ONCE).await;
    // Before the deed: from here on nobody else brings it up.
    set_state(context, id, InstanceState::Stopped).await?;
    let Some(instance) = context.core.state().instances.get(id).cloned() else {
        return Ok(Done::new(format!("{id} is not there")));
    };
    let runtime = context.runtime(&instance.machine)?;
    let lock = context.core.instance_lock(id);
    let _alone = lock.lock().await;
    remove(context, &*runtime, &instance).await?;
    Ok(Done::new(format!("{id} is stopped")))
}

/// Nothing of the copy runs any more. Who calls has its lock.
async fn remove(context: &StepContext, runtime: &dyn Runtime, instance: &Instance) -> Result<(), Problem> {
    let grace_ms = context.plan.settings.stop_grace_ms;
    let limit = Duration::from_millis(u64::from(grace_ms) + STOP_LIMIT_MS);
    match tokio::time::timeout(limit, runtime.remove(&instance.id, grace_ms)).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(not_stopped(instance)),
    }
}

async fn set_state(context: &StepContext, id: &InstanceId, state: InstanceState) -> Result<(), Problem> {
    let id = id.clone();
    context
        .commit(move |draft, _| {
            // A step that is begun again does not bring back what has been stopped.
            if let Some(instance) = draft.state().instances.get(&id)
                && instance.state != InstanceState::Stopped
            {
                drain::retire(draft, instance, state);
            }
            Ok(())
        })
        .await?;
    Ok(())
}

fn not_stopped(instance: &Instance) -> Problem {
    Problem::Failed(Finding {
        code: "instance.not_stopped".to_owned(),
        message: format!("{} on {} was not confirmed to be stopped in time", instance.id, instance.machine),
        hint: "Check the machine (machines check); the service goes on where it was.".to_owned(),
    })
}

/// The old copy runs again, and answers. By now no new one runs: what was started later was undone before.
pub(super) async fn restart(context: &StepContext, id: &InstanceId) -> Result<Done, Problem> {
    let state = context.core.state();
    let Some(instance) = state.instances.get(id).cloned() else {
        return Ok(Done::new(format!("{id} is not there")));
    };
    if instance.state == InstanceState::Serving {
        return Ok(Done::new(format!("{id} was not stopped")));
    }
    let spec = instance_spec(&state, &instance, &context.core.install())?;
    drop(state);
    let runtime = context.runtime(&instance.machine)?;
    let lock = context.core.instance_lock(id);
    let alone = lock.lock().await;
    // A stop that was given up in the middle has had its effect all the same: a copy that was told to end still runs and
    // answers, and is gone a moment later. Only one that is started after its end will stay.
    if instance.state == InstanceState::Stopped {
        remove(context, &*runtime, &instance).await.map_err(|problem| not_restarted(&instance, problem))?;
    }
    let deadline = Instant::now() + Duration::from_millis(u64::from(context.plan.settings.start_timeout_ms));
    let Ok(ensured) = tokio::time::timeout_at(deadline, runtime.ensure(&spec)).await else {
        return Err(not_back(&instance, "it did not start in time"));
    };
    let address = ensured.map_err(|error| not_restarted(&instance, error.into()))?;
    drop(alone);
    let known = id.clone();
    context
        .commit(move |draft, _| {
            if let Some(instance) = draft.state().instances.get(&known).cloned() {
                draft.put_instance(&Instance { address: Some(address), ..instance });
            }
            Ok(())
        })
        .await?;
    answers(context, id, deadline).await?;
    Ok(Done::new(format!("{id} runs again on {address}")))
}

/// The problem with the name of the copy: it is taken off the list of what is left once that copy runs.
fn not_restarted(instance: &Instance, problem: Problem) -> Problem {
    let Problem::Failed(cause) = problem else { return problem };
    let message =
        format!("{} on {} could not be started again: {}", instance.id, instance.machine, cause.message);
    Problem::Failed(Finding { message, ..cause })
}

async fn answers(context: &StepContext, id: &InstanceId, deadline: Instant) -> Result<(), Problem> {
    let state = context.core.state();
    let Some(instance) = state.instances.get(id).cloned() else { return Ok(()) };
    let service = state.services.get(&instance.service).map(|service| service.spec.clone());
    let health = state.version(&instance.service, instance.version).map(|version| version.health.clone());
    drop(state);
    let (Some(spec), Some(health), Some(address)) = (service, health, instance.address) else {
        return Ok(());
    };
    let probe = Probe {
        address,
        protocol: spec.traffic.protocol,
        send_proxy_protocol: spec.traffic.send_proxy_protocol,
        host: render::probe_host(&spec),
        health,
        dial: context.core.config.outside.dial.clone(),
    };
    loop {
        match probe.once().await {
            Ok(_) => return Ok(()),
            Err(why) if Instant::now() >= deadline => return Err(not_back(&instance, &why)),
            Err(_) => tokio::time::sleep(Duration::from_millis(PROBE_INTERVAL_MS)).await,
        }
    }
}

fn not_back(instance: &Instance, why: &str) -> Problem {
    Problem::Failed(Finding {
        code: "instance.not_restarted".to_owned(),
        message: format!("{} on {} does not serve again: {why}", instance.id, instance.machine),
        hint: "Check the machine and the output of the copy; it is tried again by itself.".to_owned(),
    })
}

// --- within the deadline

/// What was not done in time, and what to do about it.
struct TooLong {
    what: &'static str,
    hint: &'static str,
}

const NOT_HELD: TooLong = TooLong {
    what: "not every edge had said that it holds requests",
    hint: "See which edge is not connected: peregrine edges list.",
};

const NOT_READY: TooLong = TooLong {
    what: "the new copy was not ready",
    hint: "Make it start faster, or raise move.cutover.hold_deadline.",
};

/// Runs a deed while requests are held, for no longer than leaves time for the way back.
pub(super) async fn in_time(
    context: &StepContext,
    deed: impl Future<Output = Result<Done, Problem>>,
) -> Result<Done, Problem> {
    within(context, deed, &NOT_READY).await
}

async fn within(
    context: &StepContext,
    deed: impl Future<Output = Result<Done, Problem>>,
    too_long: &TooLong,
) -> Result<Done, Problem> {
    let held = context.core.state().rollouts.get(context.id()).and_then(|rollout| rollout.hold.clone());
    let Some(hold) = held else { return deed.await };
    let turn_back_after_ms = context.plan.settings.cutover.turn_back_after_ms();
    // A wall clock that jumps back cannot prolong it.
    let left_ms =
        (hold.since + turn_back_after_ms).saturating_sub(context.core.now()).min(turn_back_after_ms);
    match tokio::time::timeout(Duration::from_millis(left_ms), deed).await {
        Ok(done) => done,
        Err(_) => Err(Problem::Failed(Finding {
            code: "cutover.too_long".to_owned(),
            message: format!("{} {turn_back_after_ms} ms after requests began to be held", too_long.what),
            hint: too_long.hint.to_owned(),
        })),
    }
}

// --- switch

/// The new copy gets the requests. From here on there is no way back: the old one is stopped and falls behind.
pub(super) async fn switch(context: &StepContext) -> Result<Done, Problem> {
    let plan = Arc::clone(&context.plan);
    context
        .commit(move |draft, rollout| {
            shift::serve(draft, &plan);
            let now = draft.now();
            let mut rollout = released(rollout, now);
            rollout.weight_percent = 100;
            draft.put_rollout(&rollout);
            let state = draft.state();
            if let (Some(service), Some(change)) =
                (state.services.get(&plan.service), state.changes.get(&rollout.id))
            {
                let mut service = service.clone();
                adopt(&mut service, change, &plan);
                draft.put_service(&service);
            }
            draft.event(Some(&plan.service), Some(&rollout.id), EventBody::Weight { percent: 100 });
            Ok(())
        })
        .await?;
    context.publish().await?;
    context.run.sample_now.notify_one();
    all_released(context).await;
    Ok(Done::new("the new copy serves"))
}
