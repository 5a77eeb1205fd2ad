//! Removing services.

use std::sync::Arc;

use super::{control, rollouts};
use crate::core::Core;
use crate::error::{EngineError, ErrorKind};
use crate::model::{EventBody, RolloutState};
use crate::plan;
use crate::rollout;

pub(crate) async fn remove(core: &Arc<Core>, name: &str) -> Result<(), EngineError> {
    let (core, name) = (Arc::clone(core), name.to_owned());
    super::to_the_end(async move { remove_here(&core, &name).await }).await
}

async fn remove_here(core: &Arc<Core>, name: &str) -> Result<(), EngineError> {
    let (service, id) = (name.to_owned(), core.new_rollout_id());
    let removal = core
        .commit(move |draft| {
            let Some(planned) = plan::plan_removal(draft.state(), &service)? else {
                let versions: Vec<u32> =
                    draft.state().versions.keys().filter(|(of, _)| *of == service).map(|(_, n)| *n).collect();
                versions.into_iter().for_each(|number| draft.delete_version(&service, number));
                draft.delete_service(&service);
                draft.event(Some(&service), None, EventBody::ServiceRemoved {});
                return Ok(None);
            };
            let rollout = rollouts::accept(draft, &id, planned, "removal of the service".to_owned(), false);
            Ok(Some(rollout.id))
        })
        .await?;
    let Some(id) = removal else {
        core.publish(name).await?;
        return Ok(());
    };
    rollout::spawn(core, &id, false);
    let ended = control::ended(core, &id).await?;
    if ended.state == RolloutState::Succeeded {
        return Ok(());
    }
    let (message, hint) = match ended.problem {
        Some(problem) => (problem.message, problem.hint),
        None => {
            (ended.leftovers.join("; "), "What is left is removed when its machine answers again.".to_owned())
        }
    };
    let mut error = EngineError::new(ErrorKind::Failed, "service.not_removed", message, hint);
    error.rollout = Some(id);
    Err(error)
}
