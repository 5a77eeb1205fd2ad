//! Soak: the old copies stay ready, as a standby without a share, until the time is up.

use std::time::Duration;

use tokio::time::Instant;

use super::{Done, Problem, StepContext, drain};
use crate::model::{Control, EventBody, InstanceState};

pub(super) async fn forward(context: &StepContext) -> Result<Done, Problem> {
    let plan = std::sync::Arc::clone(&context.plan);
    context
        .commit(move |draft, _| {
            for id in &plan.retire {
                let Some(instance) = draft.state().instances.get(id) else { continue };
                if instance.state != InstanceState::Draining {
                    continue;
                }
                // A new stretch of service, in which it is asked only if the new copies fail.
                let mut instance = instance.clone();
                instance.former.clear(); // the drain has seen everybody out
                instance.generation = draft.generation();
                instance.state = InstanceState::Soaking;
                draft.put_instance(&instance);
                let body = EventBody::InstanceChanged { instance: instance.id, change: "soaking".to_owned() };
                draft.event(Some(&plan.service), None, body);
            }
            Ok(())
        })
        .await?;
    context.publish().await?;
    wait(context).await;
    let plan = std::sync::Arc::clone(&context.plan);
    context
        .commit(move |draft, _| {
            for id in &plan.retire {
                if let Some(instance) = draft.state().instances.get(id) {
                    drain::retire(draft, instance, InstanceState::Draining);
                }
            }
            Ok(())
        })
        .await?;
    context.publish().await?;
    drain::drained(context, &context.plan.retire).await?;
    Ok(Done::new("the soak is over"))
}

/// The deadline is in the journal, in wall time; a clock that jumps can neither skip the soak nor prolong it
/// beyond its length.
async fn wait(context: &StepContext) {
    let left = context.deadline().saturating_sub(context.core.now()).min(context.plan.settings.soak_ms);
    let end = Instant::now() + Duration::from_millis(left);
    context.waiting_for(Some(format!("the end of the soak in {} s", left.div_ceil(1_000)))).await;
    let mut signals = context.run.signals.subscribe();
    loop {
        let control = signals.borrow_and_update().control;
        if control == Control::Promote || (Instant::now() >= end && control != Control::Pause) {
            return;
        }
        tokio::select! {
            biased;
            () = signals.changed() => {}
            () = tokio::time::sleep_until(end), if Instant::now() < end => {}
        }
    }
}
