//! The core that every part of the engine shares: the store with the state over it, the table, the runtimes.
//!
//! One commit at a time: made from the present state, checked by [`State::check`], durable in the store, then
//! applied, then told. A commit that was begun is finished, even if whoever asked for it has gone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::alarms;
use crate::draft::Draft;
use crate::error::{EngineError, ErrorKind};
use crate::events::Events;
use crate::latest::{Follower, Latest};
use crate::model::{Event, EventBody, Finding, InstanceId, Machine, RolloutId, UnixMs};
use crate::runtime::Runtime;
use crate::state::State;
use crate::store::{Batch, Committed, Revision, Store, Write};
use crate::table::Table;

/// How a machine is reached. Given from outside, so that tests and the binary decide.
pub type Connect = Arc<dyn Fn(&Machine) -> Arc<dyn Runtime> + Send + Sync>;

/// The edge's monotonic clock in milliseconds, never 0: ejections are written in it.
pub type EdgeClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Codes of a store that takes nothing, whatever is asked.
const STORE_TROUBLES: [&str; 3] = ["store.full", "store.io", "store.corrupt"];
/// Removed copies that are remembered; those before them are swept like any that nobody knows.
const MAX_REMOVED: usize = 1_024;
/// Taken by whoever looks whether the store can be written.
const TRIAL_LEASE: &str = "trial";

/// A runtime, and the machine's record that it was connected by.
type Connected = (Machine, Arc<dyn Runtime>);

pub(crate) struct Core {
    pub(crate) config: crate::engine::EngineConfig,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) table: Table,
    pub(crate) events: Events,
    pub(crate) runs: crate::rollout::Runs,
    pub(crate) tasks: tokio_util::task::TaskTracker,
    pub(crate) stop: tokio_util::sync::CancellationToken,
    connect: Connect,
    state: RwLock<Arc<State>>,
    revision: Latest<u64>,
    commit: tokio::sync::Mutex<()>,
    runtimes: Mutex<HashMap<String, Connected>>,
    /// Why the store takes nothing, since its last refusal.
    store_problem: Mutex<Option<EngineError>>,
    /// Records of the vault that cannot be trusted, with the reason, as far as they were read.
    unsound: Mutex<BTreeMap<String, String>>,
    /// Copies that this process has removed, the last ones: one that comes up after it is nobody's.
    removed: Mutex<VecDeque<InstanceId>>,
    /// One at a time acts on an instance: a restart must not meet a removal.
    instances: Mutex<HashMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Core {
    pub(crate) fn new(
        config: crate::engine::EngineConfig,
        store: Arc<dyn Store>,
        connect: Connect,
        table: Table,
        state: State,
    ) -> Self {
        let events = Events::new(Arc::clone(&store));
        Self {
            config,
            store,
            table,
            events,
            runs: crate::rollout::Runs::default(),
            tasks: tokio_util::task::TaskTracker::new(),
            stop: tokio_util::sync::CancellationToken::new(),
            connect,
            revision: Latest::new(state.revision),
            state: RwLock::new(Arc::new(state)),
            commit: tokio::sync::Mutex::new(()),
            runtimes: Mutex::default(),
            instances: Mutex::default(),
            unsound: Mutex::default(),
            removed: Mutex::default(),
            store_problem: Mutex::default(),
        }
    }

    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is held, or damaged, and waits for a person.
    pub(crate) fn alarms(&self) -> Vec<Finding> {
        let unsound = self.unsound.lock().unwrap_or_else(PoisonError::into_inner);
        let unsound = unsound.iter().map(|(key, why)| alarms::aside(key, why));
        let damage = self.store.damage().map(|why| alarms::damage(&why));
        alarms::of(&self.state()).into_iter().chain(unsound).chain(damage).collect()
    }

    /// Keys of the vault that begin so, as far as they were read and cannot be trusted.
    pub(crate) fn unsound(&self, family: &str) -> Vec<String> {
        let unsound = self.unsound.lock().unwrap_or_else(PoisonError::into_inner);
        unsound.keys().filter(|key| key.starts_with(family)).cloned().collect()
    }

    /// A record of the vault cannot be trusted, or was written anew (`None`).
    pub(crate) fn note_unsound(&self, key: &str, why: Option<&str>) {
        let mut unsound = self.unsound.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => drop(unsound.insert(key.to_owned(), why.to_owned())),
            None => drop(unsound.remove(key)),
        }
    }

    pub(crate) fn install(&self) -> String {
        self.state().install.as_ref().map(|install| install.id.clone()).unwrap_or_default()
    }

    /// Makes, checks, stores, applies and tells one commit. `make` may refuse; then nothing is changed.
    pub(crate) async fn commit<T, F>(self: &Arc<Self>, make: F) -> Result<T, EngineError>
    where
        F: FnOnce(&mut Draft<'_>) -> Result<T, EngineError> + Send + 'static,
        T: Send + 'static,
    {
        self.commit_at(make).await.map(|(value, _)| value)
    }

    /// The same, with the revision that it got; that of the state if there was nothing to write.
    pub(crate) async fn commit_at<T, F>(self: &Arc<Self>, make: F) -> Result<(T, Revision), EngineError>
    where
        F: FnOnce(&mut Draft<'_>) -> Result<T, EngineError> + Send + 'static,
        T: Send + 'static,
    {
        let core = Arc::clone(self);
        // A task of its own: dropping the asker must not part the store from the state.
        let done = tokio::spawn(async move { core.commit_here(make).await }).await;
        done.unwrap_or_else(|error| {
            Err(EngineError::new(
                ErrorKind::Internal,
                "engine.stopped",
                format!("the commit was not finished: {error}"),
                "The engine is stopping or met a defect; see its log.",
            ))
        })
    }

    async fn commit_here<T, F>(&self, make: F) -> Result<(T, Revision), EngineError>
    where
        F: FnOnce(&mut Draft<'_>) -> Result<T, EngineError>,
    {
        let _one_at_a_time = self.commit.lock().await;
        let state = self.state();
        let mut draft = Draft::new(&state, self.now());
        let value = make(&mut draft)?;
        let (batch, events) = draft.finish();
        if batch.writes.is_empty() {
            return Ok((value, state.revision));
        }
        refuse_illegal(&state, &batch)?;
        drop(state); // so that it is changed in place unless somebody reads it
        let writes = batch.writes.clone();
        let stored = self.store.commit(batch).await.map_err(EngineError::from);
        self.note_store(stored.as_ref().err());
        let revision = stored?;
        self.apply(&Committed { revision, writes });
        self.events.tell(events);
        Ok((value, revision))
    }

    /// Why the store takes nothing at present.
    pub(crate) fn store_problem(&self) -> Option<EngineError> {
        self.store_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Trouble with the store is told once when it begins, and once when it is over.
    fn note_store(&self, error: Option<&EngineError>) {
        let error = error.filter(|error| STORE_TROUBLES.contains(&error.code));
        let mut known = self.store_problem.lock().unwrap_or_else(PoisonError::into_inner);
        match (known.as_ref().map(|known| known.code), error) {
            (None, Some(error)) => {
                tracing::error!(code = error.code, hint = %error.hint, "nothing new can be stored, so nothing new is done; the edge goes on: {error}");
            }
            (Some(_), None) => tracing::info!("the store takes writes again"),
            _ => {}
        }
        metrics::gauge!("peregrine_store_writable").set(if error.is_some() { 0.0 } else { 1.0 });
        *known = error.cloned();
    }

    /// Where the store took nothing, looks whether it does again: without work there would be no commit to tell.
    /// A lease is no commit: it leaves no trace in the log.
    pub(crate) async fn try_store_again(&self) {
        if self.store_problem().is_none() {
            return;
        }
        let taken =
            self.store.lease(TRIAL_LEASE, &self.install(), self.now(), 0).await.map_err(EngineError::from);
        self.note_store(taken.as_ref().err());
    }

    fn apply(&self, committed: &Committed) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(illegal) = Arc::make_mut(&mut state).apply(committed) {
            tracing::error!(key = %illegal.key, reason = %illegal.reason, "a committed record was kept aside");
        }
        drop(state);
        self.revision.send_replace(committed.revision);
    }

    /// A receiver that is told of every commit that was applied.
    pub(crate) fn revisions(&self) -> Follower<u64> {
        self.revision.subscribe()
    }

    /// Waits until the state answers.
    pub(crate) async fn until<T>(&self, mut answer: impl FnMut(&State) -> Option<T>) -> T {
        let mut revisions = self.revisions();
        loop {
            if let Some(found) = answer(&self.state()) {
                return found;
            }
            revisions.changed().await;
        }
    }

    /// Stores and tells one event.
    pub(crate) async fn tell(
        self: &Arc<Self>,
        service: Option<&str>,
        rollout: Option<&RolloutId>,
        body: EventBody,
    ) -> Result<(), EngineError> {
        let (service, rollout) = (service.map(str::to_owned), rollout.cloned());
        self.commit(move |draft| {
            draft.event(service.as_deref(), rollout.as_ref(), body);
            Ok(())
        })
        .await
    }

    /// Tells without storing: live readings.
    pub(crate) fn tell_live(&self, service: &str, rollout: &RolloutId, body: EventBody) {
        self.events.tell_live(Event {
            id: self.state().last_event,
            at: self.now(),
            service: Some(service.to_owned()),
            rollout: Some(rollout.clone()),
            body,
        });
    }

    /// The runtime of a machine; connected anew when the machine's record has changed.
    pub(crate) fn runtime(&self, machine: &str) -> Option<Arc<dyn Runtime>> {
        let known = self.state().machines.get(machine)?.clone();
        Some(self.runtime_of(&known))
    }

    pub(crate) fn runtime_of(&self, machine: &Machine) -> Arc<dyn Runtime> {
        let mut runtimes = self.runtimes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, runtime)) = runtimes.get(&machine.spec.name)
            && of.spec == machine.spec
        {
            return Arc::clone(runtime);
        }
        let runtime = (self.connect)(machine);
        runtimes.insert(machine.spec.name.clone(), (machine.clone(), Arc::clone(&runtime)));
        runtime
    }

    pub(crate) fn instance_lock(&self, id: &InstanceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(locks.entry(id.clone()).or_default())
    }

    /// Notes that a copy was removed for good: ids are never used again.
    pub(crate) fn note_removed(&self, id: &InstanceId) {
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        if removed.len() >= MAX_REMOVED {
            removed.pop_front();
        }
        removed.push_back(id.clone());
    }

    /// Whether this process has removed a copy.
    pub(crate) fn has_removed(&self, id: &InstanceId) -> bool {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// Wall time.
    pub(crate) fn now(&self) -> UnixMs {
        (self.config.outside.wall_clock)()
    }

    pub(crate) fn new_instance_id(&self) -> InstanceId {
        InstanceId::of((self.config.outside.ids)())
    }

    pub(crate) fn new_rollout_id(&self) -> RolloutId {
        RolloutId::of((self.config.outside.ids)())
    }

    pub(crate) fn edge_now_ms(&self) -> u64 {
        (self.config.edge_clock)()
    }
}

fn refuse_illegal(state: &State, batch: &Batch) -> Result<(), EngineError> {
    // Journal records follow on one another inside a batch too, so they are judged on the way.
    let mut journals = State { journals: state.journals.clone(), ..State::default() };
    for write in &batch.writes {
        let key = match write {
            Write::Put(key, _) | Write::Delete(key) => key,
        };
        let judged = if key.starts_with("journal/") {
            journals.apply(&Committed { revision: 0, writes: vec![write.clone()] })
        } else {
            state.check(write)
        };
        judged.map_err(|illegal| {
            EngineError::new(
                ErrorKind::Internal,
                "state.illegal",
                format!("refused to store {illegal}"),
                "This is a defect of the engine; nothing was changed. Please report it with the log.",
            )
        })?;
    }
    Ok(())
}
