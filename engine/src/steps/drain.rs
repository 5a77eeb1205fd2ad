//! Drain: the old copies are retired, and their receipts awaited. Each class of traffic has its deadline.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use peregrine_routing::{DrainTime, PerClass, TrafficClass, Upstream};
use tokio::time::Instant;

use super::{Done, Problem, StepContext};
use crate::draft::Draft;
use crate::model::{DrainDeadlines, EventBody, Instance, InstanceId, InstanceState};
use crate::rollout::adopt;

pub(super) async fn forward(context: &StepContext) -> Result<Done, Problem> {
    let plan = Arc::clone(&context.plan);
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

/// Takes a copy out of the table with the next publication. One that is being released is out of it, and stays known as
/// such: its removal may be on its way to the machine, whoever asked for it.
pub(super) fn retire(draft: &mut Draft<'_>, instance: &Instance, state: InstanceState) {
    if instance.state == state || instance.state == InstanceState::Releasing {
        return;
    }
    let mut instance = instance.clone();
    instance.state = state;
    draft.put_instance(&instance);
    let change = match state {
        InstanceState::Draining => "draining",
        InstanceState::Soaking => "soaking",
        InstanceState::Stopped => "stopped",
        _ => "releasing",
    };
    let body = EventBody::InstanceChanged { instance: instance.id.clone(), change: change.to_owned() };
    draft.event(Some(&instance.service), None, body);
}

/// Waits until copies are empty, over every stretch of service that they had. An upstream that this process does
/// not know was retired with the process that knew it: nobody is inside.
pub(super) async fn drained(context: &StepContext, ids: &[InstanceId]) -> Result<(), Problem> {
    let upstreams: Vec<_> = ids.iter().flat_map(|id| context.core.table.leaving(id)).collect();
    let inside: u64 = upstreams.iter().map(|upstream| upstream.in_flight()).sum();
    if inside > 0 {
        context.waiting_for(Some(format!("{inside} requests to finish on the copies that leave"))).await;
    }
    see_out(&upstreams, &context.plan.settings.drain).await;
    Ok(())
}

/// Waits until retired upstreams are empty, all at once: the deadlines of one must not wait for what is inside
/// another.
pub(super) async fn see_out(upstreams: &[Arc<Upstream>], deadlines: &DrainDeadlines) {
    let begun = Instant::now();
    join_all(upstreams.iter().map(|upstream| drain_one(upstream, deadlines, begun))).await;
}

/// Waits until a retired upstream is empty. Each class is closed at its own deadline and cut after its grace,
/// whatever else is inside: no class waits for the patience of another.
pub(crate) async fn drain_one(upstream: &Upstream, deadlines: &DrainDeadlines, begun: Instant) {
    let mut drained = std::pin::pin!(upstream.drained());
    for (due_ms, due, class) in times(deadlines).timetable() {
        // The time that is left, and not a point in time: a deadline of centuries is no overflow.
        let left = Duration::from_millis(due_ms).saturating_sub(begun.elapsed());
        tokio::select! {
            biased;
            () = &mut drained => return,
            () = tokio::time::sleep(left) => {}
        }
        // Also a class without anybody inside: what turns out to be of it later has had its time.
        due.tell(upstream, class);
    }
    drained.await;
}

/// The time of every class, as edges are told.
pub(crate) fn times(deadlines: &DrainDeadlines) -> PerClass<DrainTime> {
    PerClass(TrafficClass::ALL.map(|class| {
        let close_ms = deadline_ms(class, deadlines);
        DrainTime { close_ms, cut_ms: close_ms.saturating_add(grace_ms(class, deadlines)) }
    }))
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

/// Time between the polite end of a class and the hard one, for those that have a polite end.
fn grace_ms(class: TrafficClass, deadlines: &DrainDeadlines) -> u64 {
    match class {
        TrafficClass::Request | TrafficClass::Held | TrafficClass::Transfer => 0,
        TrafficClass::Sse | TrafficClass::GrpcStream => 1_000,
        // Each is closed somewhere in the window, and its answer is awaited by the edge; the rest is for those
        // whose clients take nothing.
        TrafficClass::WebSocket => u64::from(deadlines.websocket_spread_ms()) + 6_000,
    }
}

/// When the last class is cut.
pub(super) fn longest_ms(deadlines: &DrainDeadlines) -> u64 {
    times(deadlines).timetable().last().map_or(0, |(due_ms, ..)| *due_ms)
}

#[cfg(test)]
mod tests {
    use peregrine_routing::Due;

    use super::*;

    fn due(deadlines: &DrainDeadlines) -> Vec<(u64, Due, &'static str)> {
        let timetable = times(deadlines).timetable();
        timetable.into_iter().map(|(due_ms, due, class)| (due_ms, due, class.name())).collect()
    }

    #[test]
    fn every_class_is_closed_at_its_deadline_and_cut_after_its_grace() {
        let deadlines = DrainDeadlines {
            request_ms: 100,
            transfer_ms: 2_000,
            sse_ms: 300,
            grpc_stream_ms: 400,
            websocket_ms: 500,
        };
        let expected = [
            (100, Due::Close, "request"),
            (100, Due::Close, "held"),
            (100, Due::Cut, "request"),
            (100, Due::Cut, "held"),
            (300, Due::Close, "sse"),
            (400, Due::Close, "grpc_stream"),
            (500, Due::Close, "websocket"),
            (1_300, Due::Cut, "sse"),
            (1_400, Due::Cut, "grpc_stream"),
            (2_000, Due::Close, "transfer"),
            (2_000, Due::Cut, "transfer"),
            (6_550, Due::Cut, "websocket"),
        ];
        assert_eq!(due(&deadlines), expected);
        assert_eq!(longest_ms(&deadlines), 6_550);
    }

    #[test]
    fn a_deadline_that_never_comes_is_no_overflow() {
        let deadlines = DrainDeadlines { websocket_ms: u64::MAX, ..DrainDeadlines::default() };
        assert_eq!(longest_ms(&deadlines), u64::MAX);
    }
}
