//! What is held because this version cannot read it, and waits for a person. Everything else goes on.

use crate::error::{EngineError, ErrorKind};
use crate::keys;
use crate::model::{Finding, PLAN_FORMAT, Rollout};
use crate::state::State;

/// Every alarm of a state.
pub(crate) fn of(state: &State) -> Vec<Finding> {
    let held = state.rollouts.values().filter_map(|rollout| held(state, rollout));
    held.chain(state.aside.iter().map(|(key, reason)| aside(key, reason))).collect()
}

/// A record that cannot be read.
pub(crate) fn aside(key: &str, reason: &str) -> Finding {
    Finding {
        code: "store.record_aside".to_owned(),
        message: format!("the stored record {key} is kept aside: {reason}"),
        hint: "What depends on it is held. Run the version that wrote it, or restore a backup.".to_owned(),
    }
}

/// A store that is damaged where nobody has read yet.
pub(crate) fn damage(reason: &str) -> Finding {
    Finding {
        code: "store.damaged".to_owned(),
        message: format!("the store is damaged: {reason}"),
        hint: "What can be read of it is served. Restore a backup (peregrine server restore).".to_owned(),
    }
}

/// Why a rollout is held, if it is: its plan, or the record of its service, cannot be read.
pub(crate) fn held(state: &State, rollout: &Rollout) -> Option<Finding> {
    if rollout.state.is_terminal() {
        return None;
    }
    let (id, service, format) = (&rollout.id, &rollout.plan.service, rollout.plan.format);
    if format != PLAN_FORMAT {
        return Some(Finding {
            code: "plan.unknown_format".to_owned(),
            message: format!(
                "{id} of {service} is held: its plan is of format {format}, and this version knows {PLAN_FORMAT}"
            ),
            hint: "Its service goes on as it is. Run the version that has begun it, and let it end there."
                .to_owned(),
        });
    }
    is_service_aside(state, service).then(|| Finding {
        code: "service.aside".to_owned(),
        message: format!("{id} of {service} is held: the record of its service cannot be read"),
        hint: ASIDE_HINT.to_owned(),
    })
}

/// Whether the record of a service is there and cannot be read: that is not the same as no service.
pub(crate) fn is_service_aside(state: &State, service: &str) -> bool {
    state.aside.contains_key(&keys::service(service))
}

/// Services whose records cannot be read.
pub(crate) fn services_aside(state: &State) -> impl Iterator<Item = &str> {
    state.aside.keys().filter_map(|key| key.strip_prefix(keys::SERVICES))
}

/// Refuses what would be decided without knowing the service.
pub(crate) fn refuse_aside(state: &State, service: &str) -> Result<(), EngineError> {
    if !is_service_aside(state, service) {
        return Ok(());
    }
    let message = format!("the record of service {service} cannot be read, so nothing about it is changed");
    Err(EngineError::new(ErrorKind::Conflict, "service.aside", message, ASIDE_HINT))
}

const ASIDE_HINT: &str =
    "Its copies run on, and edges in other processes serve it as they did. Restore a backup of the store.";
