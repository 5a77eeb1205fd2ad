//! The steady comparison of what is wanted with what runs.
//!
//! * A copy that serves and does not run is started again, with growing pauses.
//! * A copy that listens somewhere else gets a new stretch of service there.
//! * A copy that no rollout needs any more is removed: the ledger of what could not be removed at once.
//! * An instance with our label that the store does not know is removed after a grace. Nothing else is touched.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use crate::alarms;
use crate::core::Core;
use crate::model::{EventBody, Finding, Instance, InstanceId, InstanceState, Rollout};
use crate::state::State;
use crate::steps::{Problem, instance_spec, no_longer_left, remove_instance};

/// Longest time that a runtime may take to say what runs.
const INSPECT_LIMIT_MS: u64 = 5_000;
/// Longest time for a copy to be started again.
const ENSURE_LIMIT_MS: u64 = 60_000;
/// Longest pause between two attempts on the same copy.
const MAX_BACKOFF_MS: u64 = 60_000;
/// First pause.
const BASE_BACKOFF_MS: u64 = 1_000;
/// Beyond the grace: longest time for an orphan to be removed.
const REMOVE_LIMIT_MS: u64 = 20_000;
/// Grace for what is removed outside of a rollout.
const REMOVE_GRACE_MS: u32 = 10_000;

pub(crate) fn spawn(core: &Arc<Core>) {
    let steady = Arc::clone(core);
    core.tasks.spawn(async move {
        let mut reconciler = Reconciler {
            core: steady,
            backoff: Backoff::default(),
            work: JoinSet::new(),
            busy: HashSet::new(),
        };
        let stop = reconciler.core.stop.clone();
        tokio::select! {
            biased;
            () = reconciler.keep_on() => {}
            () = stop.cancelled() => {}
        }
    });
    let sweeping = Arc::clone(core);
    core.tasks.spawn(async move {
        let stop = sweeping.stop.clone();
        tokio::select! {
            biased;
            () = keep_sweeping(&sweeping) => {}
            () = crate::recovery::keep_resuming(&sweeping) => {}
            () = stop.cancelled() => {}
        }
    });
}

/// A machine that does not answer holds up its own copies only: each copy is seen to in a task of its own,
/// which may outlast a round.
struct Reconciler {
    core: Arc<Core>,
    backoff: Backoff,
    work: JoinSet<(InstanceId, Result<(), Finding>)>,
    busy: HashSet<InstanceId>,
}

impl Reconciler {
    async fn keep_on(&mut self) {
        loop {
            self.begin_round();
            let next = Instant::now() + Duration::from_millis(self.core.config.reconcile_interval_ms);
            loop {
                tokio::select! {
                    biased;
                    Some(done) = self.work.join_next() => self.settle(done),
                    () = tokio::time::sleep_until(next) => break,
                }
            }
        }
    }

    fn begin_round(&mut self) {
        let state = self.core.state();
        let keep = wanted(&state).map(|id| (id, true));
        for (id, keep) in keep.chain(strays(&state).map(|id| (id, false))) {
            if !self.backoff.is_due(&id) || !self.busy.insert(id.clone()) {
                continue;
            }
            let core = Arc::clone(&self.core);
            self.work.spawn(async move {
                let result = if keep { ensure(&core, &id).await } else { clear(&core, &id).await };
                (id, result)
            });
        }
    }

    fn settle(&mut self, done: Result<(InstanceId, Result<(), Finding>), JoinError>) {
        match done {
            Ok((id, result)) => {
                self.busy.remove(&id);
                if let Err(problem) = result {
                    tracing::warn!(instance = %id, problem = %problem.message, "a copy is not as it should be");
                    self.backoff.failed(&id);
                } else {
                    self.backoff.clear(&id);
                }
            }
            Err(error) => tracing::error!(%error, "the reconciler met a defect"),
        }
    }
}

async fn keep_sweeping(core: &Arc<Core>) {
    let mut seen = HashMap::new();
    loop {
        core.try_store_again().await;
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("peregrine_alarms").set(core.alarms().len() as f64);
        sweep(core, &mut seen).await;
        tokio::time::sleep(Duration::from_millis(core.config.reconcile_interval_ms)).await;
    }
}

type Seen = HashMap<(String, InstanceId), Instant>;

/// Copies that are to run whatever happens. New copies of a running rollout are its own business: one that
/// dies there is a verdict.
fn wanted(state: &State) -> impl Iterator<Item = InstanceId> {
    state
        .instances
        .values()
        .filter(|i| matches!(i.state, InstanceState::Serving | InstanceState::Soaking))
        .filter(|i| {
            let running = state.rollout_of(&i.service);
            !running.is_some_and(|rollout| rollout.plan.add.iter().any(|added| added.id == i.id))
        })
        .map(|i| i.id.clone())
}

/// Copies in passing states that no running rollout will see to.
fn strays(state: &State) -> impl Iterator<Item = InstanceId> {
    state
        .instances
        .values()
        .filter(|i| i.state != InstanceState::Serving)
        // A service that is held by a rollout whose record cannot be read is left alone, and one whose own cannot be.
        .filter(|i| state.services.get(&i.service).is_none_or(|service| service.rollout.is_none()))
        .filter(|i| !alarms::is_service_aside(state, &i.service))
        .map(|i| i.id.clone())
}

/// Makes sure that one copy runs and that the table knows where.
pub(crate) async fn ensure(core: &Arc<Core>, id: &InstanceId) -> Result<(), Finding> {
    let lock = core.instance_lock(id);
    let _alone = lock.lock().await;
    let state = core.state();
    let Some(instance) = state.instances.get(id).cloned() else { return Ok(()) };
    let lives =
        matches!(instance.state, InstanceState::Started | InstanceState::Serving | InstanceState::Soaking);
    let Some(runtime) = core.runtime(&instance.machine).filter(|_| lives) else { return Ok(()) };
    let inspect = Duration::from_millis(INSPECT_LIMIT_MS);
    let status = tokio::time::timeout(inspect, runtime.inspect(id)).await.map_err(|_| silent(&instance))?;
    let address = match status.map_err(|error| Finding::from(&error))? {
        Some(status) if status.running && status.address.is_some() => status.address,
        found => {
            let change = match found.filter(|status| status.exit_code.is_some() || status.out_of_memory) {
                Some(status) => format!("exited with {}", status.ending()),
                None => "was not running".to_owned(),
            };
            tell(core, &instance, &change).await;
            let spec = instance_spec(&state, &instance, &core.install()).map_err(finding)?;
            let limit = Duration::from_millis(ENSURE_LIMIT_MS);
            let ensured = tokio::time::timeout(limit, runtime.ensure(&spec)).await;
            let address = ensured.map_err(|_| silent(&instance))?.map_err(|error| Finding::from(&error))?;
            tell(core, &instance, "started again").await;
            Some(address)
        }
    };
    drop(state);
    if address != instance.address {
        moved(core, id, address).await.map_err(|error| finding(error.into()))?;
    }
    let names_it = |rollout: &Arc<Rollout>| rollout.leftovers.iter().any(|left| left.contains(id.as_str()));
    if core.state().rollouts.values().any(names_it) {
        // A way back could not start it again: now it runs.
        let known = id.clone();
        let stored = core.commit(move |draft| {
            no_longer_left(draft, &known);
            Ok(())
        });
        stored.await.map_err(|error| finding(error.into()))?;
    }
    Ok(())
}

async fn moved(
    core: &Arc<Core>,
    id: &InstanceId,
    address: Option<std::net::SocketAddr>,
) -> Result<(), crate::error::EngineError> {
    let known = id.clone();
    let service = core
        .commit(move |draft| {
            let Some(instance) = draft.state().instances.get(&known) else { return Ok(None) };
            let mut instance = instance.clone();
            instance.address = address;
            instance.generation = draft.generation();
            draft.put_instance(&instance);
            let change = format!("listens on {}", address.map_or_else(|| "?".to_owned(), |a| a.to_string()));
            let body = EventBody::InstanceChanged { instance: known.clone(), change };
            draft.event(Some(&instance.service), None, body);
            Ok(Some(instance.service))
        })
        .await?;
    if let Some(service) = service {
        core.publish(&service).await?;
    }
    Ok(())
}

/// Removes a copy that nobody needs.
async fn clear(core: &Arc<Core>, id: &InstanceId) -> Result<(), Finding> {
    remove_instance(core, id, REMOVE_GRACE_MS).await.map_err(finding)
}

/// Removes the copies that an ended rollout left behind, all at once; what is still left.
pub(crate) async fn clear_left(core: &Arc<Core>, rollout: &Rollout) -> Vec<Finding> {
    let state = core.state();
    let own = rollout.plan.add.iter().map(|added| &added.id).chain(&rollout.plan.retire);
    let is_left =
        |id: &&InstanceId| state.instances.get(*id).is_some_and(|i| i.state != InstanceState::Serving);
    let left: Vec<InstanceId> = own.filter(is_left).cloned().collect();
    drop(state);
    let mut clearing = JoinSet::new();
    for id in left {
        let core = Arc::clone(core);
        clearing.spawn(async move { clear(&core, &id).await });
    }
    let mut kept = Vec::new();
    while let Some(done) = clearing.join_next().await {
        match done {
            Ok(result) => kept.extend(result.err()),
            Err(error) => kept.push(crate::rollout::defect(&error)),
        }
    }
    kept.sort_by(|a, b| a.message.cmp(&b.message));
    kept
}

/// Machines first, then the store: what is started in between is known by then.
async fn sweep(core: &Arc<Core>, seen: &mut Seen) {
    let machines: Vec<String> = core.state().machines.keys().cloned().collect();
    let install = core.install();
    let mut found = Vec::new();
    let mut lists = JoinSet::new();
    for machine in machines {
        let Some(runtime) = core.runtime(&machine) else { continue };
        let install = install.clone();
        lists.spawn(async move {
            let limit = Duration::from_millis(INSPECT_LIMIT_MS);
            match tokio::time::timeout(limit, runtime.list(&install)).await {
                Ok(Ok(instances)) => instances.into_iter().map(|i| (machine.clone(), i.id)).collect(),
                _ => Vec::new(), // it does not answer: nothing is known, nothing is done
            }
        });
    }
    while let Some(Ok(list)) = lists.join_next().await {
        found.extend(list);
    }
    let state = core.state();
    // One whose record cannot be read is not unknown.
    let is_aside = |id: &InstanceId| state.aside.contains_key(&crate::keys::instance(id));
    found.retain(|(_, id)| !state.instances.contains_key(id) && !is_aside(id));
    seen.retain(|orphan, _| found.contains(orphan));
    for orphan in found {
        // A start that was abandoned may come to its end after the copy was removed: that one needs no grace.
        let since = *seen.entry(orphan.clone()).or_insert_with(Instant::now);
        let grace = Duration::from_millis(core.config.orphan_grace_ms);
        if since.elapsed() < grace && !core.has_removed(&orphan.1) {
            continue;
        }
        let (machine, id) = orphan;
        let Some(runtime) = core.runtime(&machine) else { continue };
        tracing::warn!(instance = %id, %machine, "an instance of ours that the store does not know is removed");
        let limit = Duration::from_millis(u64::from(REMOVE_GRACE_MS) + REMOVE_LIMIT_MS);
        match tokio::time::timeout(limit, runtime.remove(&id, REMOVE_GRACE_MS)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(instance = %id, %machine, %error, "it could not be removed; it is tried again");
            }
            Err(_) => {
                tracing::warn!(instance = %id, %machine, "its removal was not confirmed; it is tried again")
            }
        }
    }
}

async fn tell(core: &Arc<Core>, instance: &Instance, change: &str) {
    let body = EventBody::InstanceChanged { instance: instance.id.clone(), change: change.to_owned() };
    if let Err(error) = core.tell(Some(&instance.service), None, body).await {
        tracing::warn!(%error, "an event cannot be stored");
    }
}

fn silent(instance: &Instance) -> Finding {
    Finding {
        code: "machine.unreachable".to_owned(),
        message: format!("{} does not answer for {}", instance.machine, instance.id),
        hint: "Check the machine: peregrine machines check.".to_owned(),
    }
}

fn finding(problem: Problem) -> Finding {
    match problem {
        Problem::Failed(finding) => finding,
        Problem::Store(error) => {
            Finding { code: error.code.to_owned(), message: error.message, hint: error.hint }
        }
    }
}

/// Growing pauses between attempts on the same copy.
#[derive(Default)]
struct Backoff {
    failures: HashMap<InstanceId, (u32, Instant)>,
}

impl Backoff {
    fn is_due(&self, id: &InstanceId) -> bool {
        self.failures.get(id).is_none_or(|(_, due)| Instant::now() >= *due)
    }

    fn failed(&mut self, id: &InstanceId) {
        let times = self.failures.get(id).map_or(0, |(times, _)| *times);
        let pause = (BASE_BACKOFF_MS << times.min(10)).min(MAX_BACKOFF_MS);
        self.failures.insert(id.clone(), (times + 1, Instant::now() + Duration::from_millis(pause)));
    }

    fn clear(&mut self, id: &InstanceId) {
        self.failures.remove(id);
    }
}
