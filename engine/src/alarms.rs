//! What is held because this version cannot read it, and waits for a person. Everything else goes on.

use crate::model::{Finding, PLAN_FORMAT, Rollout};
use crate::state::State;

/// Every alarm of now.
pub(crate) fn of(state: &State) -> Vec<Finding> {
    let held = state.rollouts.values().filter_map(held);
    let aside = state.aside.iter().map(|(key, reason)| Finding {
        code: "store.record_aside".to_owned(),
        message: format!("the stored record {key} is kept aside: {reason}"),
        hint: "What depends on it is held. Run the version that wrote it, or restore a backup.".to_owned(),
    });
    held.chain(aside).collect()
}

/// Why a rollout is held for its plan, if it is.
pub(crate) fn held(rollout: &Rollout) -> Option<Finding> {
    let format = rollout.plan.format;
    (!rollout.state.is_terminal() && format != PLAN_FORMAT).then(|| Finding {
        code: "plan.unknown_format".to_owned(),
        message: format!(
            "{} of {} is held: its plan is of format {format}, and this version knows {PLAN_FORMAT}",
            rollout.id, rollout.plan.service
        ),
        hint: "Its service goes on as it is. Run the version that has begun it, and let it end there."
            .to_owned(),
    })
}
