//! Drain: the old copies are retired, and their receipts awaited. Each class of traffic has its deadline.

use std::time::Duration;

use peregrine_routing::{TrafficClass, Upstream};
use tokio::time::Instant;

use super::{Done, Problem, StepContext};
use crate::draft::Draft;
use crate::model::{DrainDeadlines, EventBody, Instance, InstanceId, InstanceState};
use crate::rollout::adopt;

/// How often the classes that are left are looked at again.
const LOOK_INTERVAL_MS: u64 = 500;

pub(super) async fn forward(context: &StepContext) -> Result<Done, Problem> {
    let plan = std::sync::Arc::clone(&context.plan);
    context
        .commit(move |draft, rollout| {
            for id in &plan.retire {
                if let Some(instance) = draft.state().instances.get(id) {
                    retire(draft, instance, InstanceState::Draining);
                }
            }
            if rollout.weight_percent != 100 {
                let mut rollout = rollout.clone();
                rollout.weight_percent = 100;
                draft.put_rollout(&rollout);
            }
            // The new version is the service's own from here on.
            if let (Some(service), Some(change)) =
                (draft.state().services.get(&plan.service), draft.state().changes.get(&rollout.id))
            {
                let mut service = service.clone();
                adopt(&mut service, change, &plan);
                draft.put_service(&service);
            }
            Ok(())
        })
        .await?;
    context.publish().await?;
    drained(context, &context.plan.retire).await?;
    Ok(Done::new("the old copies are empty"))
}

/// Takes a copy out of the table with the next publication.
pub(super) fn retire(draft: &mut Draft<'_>, instance: &Instance, state: InstanceState) {
    if instance.state == state {
        return;
    }
    let mut instance = instance.clone();
    instance.state = state;
    draft.put_instance(&instance);
    let change = match state {
        InstanceState::Draining => "draining",
        InstanceState::Soaking => "soaking",
        _ => "releasing",
    };
    let body = EventBody::InstanceChanged { instance: instance.id.clone(), change: change.to_owned() };
    draft.event(Some(&instance.service), None, body);
}

/// Waits until copies are empty. An upstream that this process does not know was retired with the process
/// that knew it: nobody is inside.
pub(super) async fn drained(context: &StepContext, ids: &[InstanceId]) -> Result<(), Problem> {
    let state = context.core.state();
    let generations = ids.iter().filter_map(|id| state.instances.get(id)).map(|instance| instance.generation);
    let upstreams: Vec<_> =
        generations.filter_map(|generation| context.core.table.upstream(generation)).collect();
    drop(state);
    let inside: u64 = upstreams.iter().map(|upstream| upstream.in_flight()).sum();
    if inside > 0 {
        context.waiting_for(Some(format!("{inside} requests to finish on the copies that leave"))).await;
    }
    let begun = Instant::now();
    for upstream in &upstreams {
        // Its gate is closed by the publication; an upstream that is still in the table would never be empty.
        if upstream.is_retired() {
            drain_one(upstream, &context.plan.settings.drain, begun.into_std()).await;
        }
    }
    Ok(())
}

/// Waits until a retired upstream is empty, and cuts what is left at the deadline of its class.
pub(crate) async fn drain_one(upstream: &Upstream, deadlines: &DrainDeadlines, begun: std::time::Instant) {
    let mut drained = std::pin::pin!(upstream.drained());
    loop {
        let look = Duration::from_millis(LOOK_INTERVAL_MS);
        let deadline = begun + Duration::from_millis(deadline_of_rest_ms(upstream, deadlines));
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() && !upstream.is_empty() {
            // What is cut is named in the receipt; the copy is stopped only when it is empty.
            upstream.cut();
            return drained.await;
        }
        tokio::select! {
            () = &mut drained => return,
            () = tokio::time::sleep(left.min(look)) => {}
        }
    }
}

/// The edge cuts an upstream as a whole, so the most patient class that is still inside decides.
fn deadline_of_rest_ms(upstream: &Upstream, deadlines: &DrainDeadlines) -> u64 {
    let inside = upstream.receipt().in_flight;
    let classes = TrafficClass::ALL.into_iter().filter(|class| inside[*class] > 0);
    classes.map(|class| deadline_ms(class, deadlines)).max().unwrap_or(deadlines.request_ms)
}

const fn deadline_ms(class: TrafficClass, deadlines: &DrainDeadlines) -> u64 {
    match class {
        TrafficClass::Request | TrafficClass::Held => deadlines.request_ms,
        TrafficClass::Transfer => deadlines.transfer_ms,
        TrafficClass::Sse => deadlines.sse_ms,
        TrafficClass::GrpcStream => deadlines.grpc_stream_ms,
        TrafficClass::WebSocket => deadlines.websocket_ms,
    }
}

pub(super) fn longest_ms(deadlines: &DrainDeadlines) -> u64 {
    TrafficClass::ALL.into_iter().map(|class| deadline_ms(class, deadlines)).max().unwrap_or(0)
}
