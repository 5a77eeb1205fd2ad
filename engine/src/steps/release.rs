//! Release: a copy is stopped and removed, and confirmed to be gone. It needs its empty receipt.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Done, Problem, StepContext, drain};
use crate::core::Core;
use crate::draft::Draft;
use crate::model::{EventBody, Finding, InstanceId, InstanceState, Rollout};
use crate::runtime::RuntimeError;

/// Beyond the grace: how long a runtime may take to remove a copy and confirm it.
pub(super) const REMOVE_LIMIT_MS: u64 = 20_000;

pub(super) async fn forward(context: &StepContext, id: &InstanceId) -> Result<Done, Problem> {
    let retired = id.clone();
    context
        .commit(move |draft, _| {
            if let Some(instance) = draft.state().instances.get(&retired) {
                drain::retire(draft, instance, InstanceState::Releasing);
            }
            Ok(())
        })
        .await?;
    context.publish().await?;
    drain::drained(context, std::slice::from_ref(id)).await?;
    remove_instance(&context.core, id, context.plan.settings.stop_grace_ms).await?;
    Ok(Done::new(format!("{id} is gone")))
}

/// Between two asks of a machine that does not answer.
const UNREACHABLE_RETRY_MS: u64 = 250;

/// Removes a copy and, when it is confirmed to be gone, its record. One without a record is a success.
pub(crate) async fn remove_instance(core: &Arc<Core>, id: &InstanceId, grace_ms: u32) -> Result<(), Problem> {
    let Some(instance) = core.state().instances.get(id).cloned() else { return Ok(()) };
    if instance.state != InstanceState::Releasing {
        let retired = id.clone();
        core.commit(move |draft| {
            if let Some(instance) = draft.state().instances.get(&retired) {
                drain::retire(draft, instance, InstanceState::Releasing);
            }
            Ok(())
        })
        .await?;
        core.publish(&instance.service).await?;
    }
    // Also what an earlier rollout has given up, or no rollout has waited for.
    let drain = core.state().services.get(&instance.service).map(|s| s.spec.move_settings.drain.clone());
    drain::see_out(&core.table.leaving(id), &drain.unwrap_or_default()).await;
    let lock = core.instance_lock(id);
    let limit = Duration::from_millis(u64::from(grace_ms) + REMOVE_LIMIT_MS);
    let removal = async {
        let _alone = lock.lock().await;
        let begun = Instant::now();
        let patience = Duration::from_millis(core.config.unreachable_patience_ms);
        loop {
            let Some(runtime) = core.runtime(&instance.machine) else {
                return Err(left(id, &instance.machine, "the machine is not known any more"));
            };
            match runtime.remove(id, grace_ms).await {
                // Nothing uses the copy any more, so nothing is lost by asking again: most cuts are short.
                Err(RuntimeError::Unreachable { .. }) if begun.elapsed() < patience => {
                    tokio::time::sleep(Duration::from_millis(UNREACHABLE_RETRY_MS)).await;
                }
                removed => return removed.map_err(|error| left(id, &instance.machine, &error.to_string())),
            }
        }
    };
    match tokio::time::timeout(limit, removal).await {
        Ok(result) => result?,
        Err(_) => return Err(left(id, &instance.machine, "it was not confirmed in time")),
    }
    core.note_removed(id);
    core.table.forget_copy(id);
    let id = id.clone();
    core.commit(move |draft| {
        if let Some(instance) = draft.state().instances.get(&id) {
            draft.delete_instance(&id);
            no_longer_left(draft, &id);
            let body = EventBody::InstanceChanged { instance: id.clone(), change: "removed".to_owned() };
            draft.event(Some(&instance.service), None, body);
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// Takes a copy off the lists of what rollouts have left over: in the commit that forgets it, so that no list
/// names what nobody knows any more, or when it runs as it should.
pub(crate) fn no_longer_left(draft: &mut Draft<'_>, id: &InstanceId) {
    for rollout in draft.state().rollouts.values() {
        if rollout.leftovers.iter().any(|left| left.contains(id.as_str())) {
            let mut rollout = Rollout::clone(rollout);
            rollout.leftovers.retain(|left| !left.contains(id.as_str()));
            draft.put_rollout(&rollout);
        }
    }
}

fn left(id: &InstanceId, machine: &str, why: &str) -> Problem {
    Problem::Failed(Finding {
        code: "instance.not_removed".to_owned(),
        message: format!("{id} on {machine} could not be removed: {why}"),
        hint: "It is tried again by itself when the machine answers; nothing uses it.".to_owned(),
    })
}
