//! The engine as a whole: opened on a store and a table, run until it is told to stop.

use std::sync::Arc;

use peregrine_routing::TableWriter;
use uuid::Uuid;

use crate::core::{Connect, Core, EdgeClock};
use crate::error::EngineError;
use crate::handle::EngineHandle;
use crate::journal::Install;
use crate::keys;
use crate::model::InstanceState;
use crate::outside::Outside;
use crate::reconcile;
use crate::recovery;
use crate::state::State;
use crate::store::{Committed, Store, StoreError, Survey, Write};
use crate::table::Table;

/// What the engine has to be told.
#[derive(Clone)]
pub struct EngineConfig {
    /// Id of this installation, for a store that has none yet; `None` makes one up.
    pub install: Option<String>,
    /// The edge's clock; it has to be the one that the edge writes ejections in.
    pub edge_clock: EdgeClock,
    /// Between two comparisons of what is wanted with what runs.
    pub reconcile_interval_ms: u64,
    /// How long an unknown instance with our label has to be seen before it is removed.
    pub orphan_grace_ms: u64,
    /// How long a machine that cannot be reached is asked again to remove a copy, before that is left over for the reconciler.
    pub unreachable_patience_ms: u64,
    /// Connections that each core of an edge opens to a new copy before its first request; 0 is none.
    pub ready_connections: u16,
    /// Edges in other processes may have gone on while no engine ran: copies keep their generations over a start, and
    /// those that were retired before it are waited for until these edges have let go of them.
    pub edges_elsewhere: bool,
    /// The time of day, ids, and connections of probes.
    pub outside: Outside,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let begun = std::time::Instant::now();
        Self {
            install: None,
            edge_clock: Arc::new(move || {
                1 + u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
            }),
            reconcile_interval_ms: 3_000,
            unreachable_patience_ms: 15_000, // beyond one dial that found nobody, within the limit of a removal
            orphan_grace_ms: 30_000,         // longer than any answer of a runtime that is still under way
            ready_connections: 2,            // a first step sends few requests at a time to a copy
            edges_elsewhere: false,
            outside: Outside::default(),
        }
    }
}

/// The engine. [`Engine::run`] does the work; [`EngineHandle`] is the way to ask.
pub struct Engine {
    core: Arc<Core>,
}

impl Engine {
    /// Reads the store, makes the state from it and puts every service into the table, with new generations.
    ///
    /// # Errors
    /// The store cannot be read or written. A record that cannot be read is no error: it is kept aside.
    pub async fn open(
        config: EngineConfig,
        store: Arc<dyn Store>,
        connect: Connect,
        writer: TableWriter,
    ) -> Result<(Self, EngineHandle), EngineError> {
        let survey = store.survey_without(keys::VAULT).await?;
        refuse_without_meta(&survey)?;
        let state = replay(survey);
        for (key, reason) in &state.aside {
            tracing::error!(%key, %reason, "a stored record is kept aside; what depends on it is held");
        }
        let core = Arc::new(Core::new(config, store, connect, Table::new(writer), state));
        take_install(&core).await?;
        give_generations(&core).await?;
        if core.config.edges_elsewhere {
            adopt_retired(&core);
        }
        recovery::render_all(&core).await;
        Ok((Self { core: Arc::clone(&core) }, EngineHandle::new(core)))
    }

    /// Resumes what was under way and keeps reality like the intent, until `shutdown`. Rollouts stop where
    /// they are and are resumed by the next start; nothing that runs is touched.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) {
        recovery::resume_all(&self.core);
        reconcile::spawn(&self.core);
        shutdown.await;
        self.core.stop.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }
}

/// One damaged record is kept aside; without the records of the installation itself, ids and generations would
/// be given out twice.
fn refuse_without_meta(survey: &Survey) -> Result<(), EngineError> {
    match survey.unsound.iter().find(|(key, _)| key.starts_with("meta/")) {
        Some((_, why)) => Err(StoreError::Corrupt(why.clone()).into()),
        None => Ok(()),
    }
}

pub(crate) fn replay(survey: Survey) -> State {
    let Survey { revision, entries, unsound } = survey;
    let mut state = State { aside: unsound.into_iter().collect(), ..State::default() };
    let writes = entries.into_iter().map(|entry| Write::Put(entry.key, entry.value)).collect();
    // What is kept aside is told by the caller, record by record.
    drop(state.apply(&Committed { revision, writes }));
    state
}

async fn take_install(core: &Arc<Core>) -> Result<(), EngineError> {
    if core.state().install.is_some() {
        return Ok(());
    }
    let id = core.config.install.clone().unwrap_or_else(|| format!("pg_{}", Uuid::new_v4().simple()));
    core.commit(move |draft| {
        let created_at = draft.now();
        draft.put_install(&Install { id, created_at });
        Ok(())
    })
    .await
}

/// What is inside of a copy that is on its way out, or of a stretch of service that was given up, did not end with the
/// engine: edges elsewhere carried it on.
fn adopt_retired(core: &Arc<Core>) {
    let state = core.state();
    let leaving = |state: InstanceState| matches!(state, InstanceState::Draining | InstanceState::Releasing);
    for instance in state.instances.values() {
        let present =
            Some(instance.generation).filter(|generation| leaving(instance.state) && *generation > 0);
        for generation in instance.former.iter().copied().chain(present) {
            if let Some(copy) = crate::render::copy(&state, instance, generation) {
                core.table.adopt_retired(&copy);
            }
        }
    }
}

/// The edge begins with an empty memory, so every copy in the table begins a new stretch of service.
async fn give_generations(core: &Arc<Core>) -> Result<(), EngineError> {
    let state = core.state();
    let routed = |state: InstanceState| {
        matches!(state, InstanceState::Started | InstanceState::Serving | InstanceState::Soaking)
    };
    // An edge elsewhere remembers: for it a copy goes on as the same.
    let anew = |generation: u64| generation == 0 || !core.config.edges_elsewhere;
    let ids: Vec<_> = state
        .instances
        .values()
        .filter(|i| routed(i.state) && i.address.is_some() && anew(i.generation))
        .map(|i| i.id.clone())
        .collect();
    drop(state);
    for batch in ids.chunks(crate::store::MAX_BATCH_WRITES / 2) {
        let batch = batch.to_vec();
        core.commit(move |draft| {
            for id in &batch {
                if let Some(instance) = draft.state().instances.get(id) {
                    let mut instance = instance.clone();
                    instance.generation = draft.generation();
                    draft.put_instance(&instance);
                }
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}
