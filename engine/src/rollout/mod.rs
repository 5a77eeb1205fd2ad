//! A plan on its way: the executor, its supervisor, and what they measure.
//!
//! ```text
//!   supervisor ── signals (control, health of both sides) ──► executor ── one deed at a time ──► steps
//!       │ probes, inspects, samples                               │ intent, settlement, turn
//!       └──────────────────────── ledger ◄────────────────────────┘
//! ```
//!
//! Each rollout has its own two tasks; a panic or an error in one touches no other.

mod back;
mod copy;
mod executor;
mod judge;
mod ledger;
mod supervisor;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::core::Core;
use crate::latest::Latest;
use crate::model::{RolloutId, Sample};

pub(crate) use executor::{adopt, defect, is_cutting_over, is_past_return, restore};
pub(crate) use judge::{Judge, MirrorJudge, Reading, Terms, Verdict};
pub(crate) use ledger::{Ledger, Side};
pub(crate) use supervisor::Signals;

/// Rollouts that run in this process.
#[derive(Default)]
pub(crate) struct Runs {
    inner: Mutex<HashMap<RolloutId, Arc<Run>>>,
    /// Those whose plan cannot be read, and that were told.
    held: Mutex<BTreeSet<RolloutId>>,
}

/// What the parts of one running rollout share.
pub(crate) struct Run {
    pub(crate) id: RolloutId,
    pub(crate) ledger: Ledger,
    pub(crate) signals: Latest<Signals>,
    pub(crate) sample: Mutex<Option<Sample>>,
    /// Asks the supervisor for a reading right now: the weights have changed.
    pub(crate) sample_now: tokio::sync::Notify,
    /// What the shift has shown so far, over all of its steps.
    judge: Mutex<Judge>,
    begun: tokio::time::Instant,
}

impl Run {
    pub(crate) fn judge(&self) -> MutexGuard<'_, Judge> {
        self.judge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since this process took the rollout up.
    pub(crate) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Runs {
    pub(crate) fn sample(&self, id: &RolloutId) -> Option<Sample> {
        let run = self.inner.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()?;
        run.sample.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn first_time_held(&self, id: &RolloutId) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone())
    }

    fn begin(&self, id: &RolloutId) -> Option<Arc<Run>> {
        let mut runs = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if runs.contains_key(id) {
            return None;
        }
        let run = Arc::new(Run {
            id: id.clone(),
            ledger: Ledger::default(),
            signals: Latest::new(Signals::default()),
            sample: Mutex::default(),
            sample_now: tokio::sync::Notify::new(),
            judge: Mutex::default(),
            begun: tokio::time::Instant::now(),
        });
        runs.insert(id.clone(), Arc::clone(&run));
        Some(run)
    }

    fn end(&self, id: &RolloutId) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

/// Starts or resumes a rollout in the background. One that runs already is left alone.
pub(crate) fn spawn(core: &Arc<Core>, id: &RolloutId, resumed: bool) {
    let Some(run) = core.runs.begin(id) else { return };
    run.ledger.begin(core, id, resumed);
    let core = Arc::clone(core);
    let tracker = core.tasks.clone();
    tracker.spawn(async move {
        // The supervisor runs apart: whatever the executor waits for, it goes on looking.
        let supervisor = tokio::spawn(supervisor::supervise(Arc::clone(&core), Arc::clone(&run)));
        let executor = tokio::spawn(executor::execute(Arc::clone(&core), Arc::clone(&run)));
        if let Err(error) = executor.await
            && error.is_panic()
        {
            // Held where it is: the journal says where, and the next start resumes it.
            tracing::error!(rollout = %run.id, %error, "a rollout met a defect and is held");
        }
        supervisor.abort();
        core.runs.end(&run.id);
    });
}
