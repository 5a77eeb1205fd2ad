//! After a start: the table is rendered, then every unfinished rollout goes on, each on its own.

use std::sync::Arc;
use std::time::Duration;

use crate::core::Core;
use crate::model::{InstanceId, InstanceState, RolloutId};
use crate::reconcile;
use crate::rollout;

/// How long a resumed rollout waits for its copies to be made sure of. A machine that does not answer by
/// then is the rollout's own business.
const ENSURE_LIMIT_MS: u64 = 15_000;

/// Between two looks for rollouts that stand still.
const RESUME_INTERVAL_MS: u64 = 30_000;

/// Puts every service into the table. One that the table refuses stops no other.
pub(crate) async fn render_all(core: &Arc<Core>) {
    let services: Vec<String> = core.state().services.keys().cloned().collect();
    for service in services {
        if let Err(error) = core.publish(&service).await {
            tracing::error!(%service, %error, "the table does not take the service");
        }
    }
}

/// Resumes every rollout that has not ended.
pub(crate) fn resume_all(core: &Arc<Core>) {
    let state = core.state();
    for rollout in state.rollouts.values().filter(|rollout| !rollout.state.is_terminal()) {
        let (core, id) = (Arc::clone(core), rollout.id.clone());
        let tracker = core.tasks.clone();
        tracker.spawn(async move {
            let ensured = ensure_copies(&core, &id);
            tokio::select! {
                biased;
                () = ensured => rollout::spawn(&core, &id, true),
                () = core.stop.cancelled() => {}
            }
        });
    }
}

/// Takes up rollouts that should run and do not: their executor met a defect. Not only at a start.
pub(crate) async fn keep_resuming(core: &Arc<Core>) {
    loop {
        tokio::time::sleep(Duration::from_millis(RESUME_INTERVAL_MS)).await;
        let state = core.state();
        for rollout in state.rollouts.values().filter(|rollout| !rollout.state.is_terminal()) {
            rollout::spawn(core, &rollout.id, true);
        }
    }
}

/// The copies of a rollout may have died with the engine (processes do): both sides are brought up again
/// before the rollout judges them.
async fn ensure_copies(core: &Arc<Core>, id: &RolloutId) {
    let state = core.state();
    let Some(rollout) = state.rollouts.get(id) else { return };
    let lives = |state: InstanceState| {
        matches!(state, InstanceState::Started | InstanceState::Serving | InstanceState::Soaking)
    };
    let copies: Vec<InstanceId> =
        state.instances_of(&rollout.plan.service).filter(|i| lives(i.state)).map(|i| i.id.clone()).collect();
    drop(state);
    let mut ensuring = tokio::task::JoinSet::new();
    for copy in copies {
        let core = Arc::clone(core);
        ensuring.spawn(async move { reconcile::ensure(&core, &copy).await });
    }
    let all = async {
        while let Some(done) = ensuring.join_next().await {
            if let Ok(Err(problem)) = done {
                tracing::warn!(rollout = %id, problem = %problem.message, "a copy could not be made sure of");
            }
        }
    };
    if tokio::time::timeout(Duration::from_millis(ENSURE_LIMIT_MS), all).await.is_err() {
        tracing::warn!(rollout = %id, "not every copy could be made sure of in time; the rollout goes on");
    }
}
