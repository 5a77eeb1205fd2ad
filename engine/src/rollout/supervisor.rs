//! The supervisor of one rollout: it watches what was asked and how both sides are, and tells the executor.
//!
//! It does nothing to the world and waits for no step, so no failing step can block it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Run;
use super::copy::{Known, Watched};
use super::ledger::{LastSample, Side};
use crate::core::Core;
use crate::model::{Control, EventBody, InstanceId, InstanceState, Phase, Rollout, Sample};
use crate::order::Vital;
use crate::state::State;

/// Between two live readings.
const SAMPLE_INTERVAL_MS: u64 = 1_000;

/// What the executor has to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signals {
    pub(crate) control: Control,
    /// The old side; `None` if there is none (or none any more).
    pub(crate) old: Option<Vital>,
    /// The new side; `None` before it was started.
    pub(crate) new: Option<Vital>,
    /// Each of the new copies was looked at in this life of the engine.
    pub(crate) looked: bool,
    /// What is wrong with the new side.
    pub(crate) new_why: String,
    /// What is wrong with the old side.
    pub(crate) old_why: String,
}

pub(super) async fn supervise(core: Arc<Core>, run: Arc<Run>) {
    let changed = Arc::new(Notify::new());
    let mut watched: BTreeMap<InstanceId, Watched> = BTreeMap::new();
    let mut readings = Readings::new();
    let mut revisions = core.revisions();
    // A new copy that died is not trusted again in this rollout, even if something restarts it.
    let mut died = Known::default();
    loop {
        let state = core.state();
        let Some(rollout) = state.rollouts.get(&run.id).filter(|rollout| !rollout.state.is_terminal()) else {
            return;
        };
        let (old, new) = (old_copies(&state, rollout), new_copies(&state, rollout));
        watched.retain(|id, _| old.contains(id) || new.contains(id));
        for id in old.iter().chain(&new) {
            watched.entry(id.clone()).or_insert_with(|| Watched::begin(&core, id, Arc::clone(&changed)));
        }
        let known = |ids: &[InstanceId]| -> Vec<Known> {
            ids.iter().filter_map(|id| watched.get(id)).map(Watched::known).collect()
        };
        // A side of old copies lives while one of them does; a new side has to be whole.
        let old_side = known(&old).into_iter().min_by_key(|known| known.vital);
        let looked = known(&new).iter().all(|known| known.looked);
        let new_side = known(&new).into_iter().max_by_key(|known| known.vital);
        if let Some(side) =
            new_side.as_ref().filter(|side| side.vital == Vital::Dead && rollout.phase != Phase::Warm)
        {
            died.clone_from(side);
        }
        let new_side = new_side.map(|side| if died.vital > side.vital { died.clone() } else { side });
        let next = Signals {
            control: rollout.control,
            old: old_side.as_ref().map(|side| side.vital),
            new: new_side.as_ref().map(|side| side.vital),
            looked,
            old_why: old_side.map(|side| side.why).unwrap_or_default(),
            new_why: new_side.map(|side| side.why).unwrap_or_default(),
        };
        run.signals.send_if_modified(|signals| {
            let differs = *signals != next;
            signals.clone_from(&next);
            differs
        });
        let (service, weight) = (rollout.plan.service.clone(), rollout.weight_percent);
        drop(state);
        tokio::select! {
            biased; // the rare ones first: no crowd of changes keeps a reading waiting
            () = run.sample_now.notified() => readings.take(&core, &run, &service, weight),
            () = tokio::time::sleep_until(readings.due()) => readings.take(&core, &run, &service, weight),
            () = changed.notified() => {}
            () = revisions.changed() => {}
        }
    }
}

fn old_copies(state: &State, rollout: &Rollout) -> Vec<InstanceId> {
    let lives = |id: &&InstanceId| {
        state.instances.get(*id).is_some_and(|i| {
            use InstanceState::{Planned, Releasing, Stopped};
            !matches!(i.state, Planned | Stopped | Releasing)
        })
    };
    rollout.plan.retire.iter().chain(&rollout.plan.keep).filter(lives).cloned().collect()
}

fn new_copies(state: &State, rollout: &Rollout) -> Vec<InstanceId> {
    let runs = |id: &&InstanceId| {
        state
            .instances
            .get(*id)
            .is_some_and(|i| !matches!(i.state, InstanceState::Planned | InstanceState::Releasing))
    };
    rollout.plan.add.iter().map(|added| &added.id).filter(runs).cloned().collect()
}

struct Readings {
    old: LastSample,
    new: LastSample,
    at: Instant,
}

impl Readings {
    fn new() -> Self {
        Self { old: LastSample::default(), new: LastSample::default(), at: Instant::now() }
    }

    fn due(&self) -> Instant {
        self.at + Duration::from_millis(SAMPLE_INTERVAL_MS)
    }

    fn take(&mut self, core: &Core, run: &Run, service: &str, weight_percent: u8) {
        let seconds = self.at.elapsed().as_secs_f64();
        self.at = Instant::now();
        let sample = Sample {
            at: core.now(),
            weight_percent,
            from: run.ledger.side_sample(Side::Old, &mut self.old, seconds),
            to: run.ledger.side_sample(Side::New, &mut self.new, seconds),
            totals: run.ledger.totals(),
        };
        *run.sample.lock().unwrap_or_else(PoisonError::into_inner) = Some(sample.clone());
        core.tell_live(service, &run.id, EventBody::Sample(sample));
    }
}
