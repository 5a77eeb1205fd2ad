//! The table's one writer, and what the engine remembers of it: upstreams by generation.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peregrine_routing::{
    Change, Generation, HoldCounts, HoldSpec, MirrorSpec, PoolSpec, TableError, TableWriter, Upstream,
    UpstreamSpec,
};

use crate::core::Core;
use crate::draft::Draft;
use crate::error::{EngineError, ErrorKind};
use crate::model::{DrainDeadlines, InstanceId, InstanceState, Phase, Rollout, RolloutState, Workload};
use crate::render::{FixedGeneration, render};
use crate::state::State;

pub(crate) struct Table {
    inner: Mutex<Inner>,
}

struct Inner {
    writer: TableWriter,
    fixed: HashMap<String, Vec<FixedGeneration>>,
    /// Retired upstreams that were not forgotten. A copy may have several: a way back gives it a new stretch of service
    /// before the one that was given up is empty. One that is empty may not stay so: an edge that was given up inside
    /// of it comes back.
    leaving: Vec<Arc<Upstream>>,
    /// New copies that edges open connections to before their first request, by generation, with how many.
    ready: HashMap<u64, u16>,
    holds: Holds,
    /// Services whose new copies get copies of requests, with the attempt that wants it. Kept nowhere else: a table
    /// that is made anew mirrors nothing.
    mirrors: HashMap<String, (u64, MirrorSpec)>,
}

/// When the holds that are in force end by the edges' clock, by service. Read off once, so that a table that is
/// rendered again says the same.
#[derive(Default)]
struct Holds(HashMap<String, (u64, u64)>);

impl Holds {
    fn of(&mut self, core: &Core, rollout: &Rollout) -> Option<HoldSpec> {
        let service = &rollout.plan.service;
        let Some(hold) = rollout.hold.as_ref().filter(|hold| hold.released_at.is_none()) else {
            self.0.remove(service);
            return None;
        };
        let settings = &rollout.plan.settings.cutover;
        let known = self.0.get(service).filter(|(id, _)| *id == hold.id).map(|(_, until_ms)| *until_ms);
        let until_ms = known.unwrap_or_else(|| {
            let longest_ms = u64::from(settings.hold_deadline_ms);
            core.edge_now_ms() + hold.until.saturating_sub(core.now()).min(longest_ms)
        });
        self.0.insert(service.clone(), (hold.id, until_ms));
        Some(HoldSpec {
            id: hold.id,
            until_ms,
            max_requests: settings.hold_max_requests,
            max_bytes: settings.hold_max_bytes,
            max_age_ms: settings.hold_max_age_ms,
            release_per_s: settings.hold_release_per_s,
        })
    }
}

/// A publication.
pub(crate) struct Published {
    /// Version of the table that says it.
    pub(crate) version: u64,
    /// Upstreams that have lost their place.
    pub(crate) retired: Vec<Arc<Upstream>>,
}

impl Table {
    pub(crate) fn new(writer: TableWriter) -> Self {
        Self {
            inner: Mutex::new(Inner {
                writer,
                fixed: HashMap::new(),
                leaving: Vec::new(),
                ready: HashMap::new(),
                holds: Holds::default(),
                mirrors: HashMap::new(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn upstream(&self, generation: u64) -> Option<Arc<Upstream>> {
        self.lock().writer.upstream(Generation(generation)).cloned()
    }

    /// Share of its service's traffic that a generation is given, in percent.
    pub(crate) fn share_percent(&self, service: &str, generation: u64) -> f64 {
        let inner = self.lock();
        let Some(spec) = inner.writer.service(service) else { return 0.0 };
        let total: u64 = spec.pools.iter().map(|pool| u64::from(pool.weight)).sum();
        let own = |pool: &&PoolSpec| pool.upstreams.iter().any(|u| u.generation == Generation(generation));
        let Some(pool) = spec.pools.iter().find(own).filter(|_| total > 0) else { return 0.0 };
        #[expect(clippy::cast_precision_loss, reason = "a share for people")]
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let weights = |of: &dyn Fn(&UpstreamSpec) -> bool| -> u64 {
            pool.upstreams.iter().filter(|u| of(u)).map(|u| u64::from(u.weight)).sum()
        };
        let inside = share(weights(&|u| u.generation == Generation(generation)), weights(&|_| true));
        100.0 * share(u64::from(pool.weight), total) * inside
    }

    /// Every retired stretch of service of a copy that somebody is still inside of.
    pub(crate) fn leaving(&self, copy: &InstanceId) -> Vec<Arc<Upstream>> {
        let inner = self.lock();
        let own = |u: &&Arc<Upstream>| **u.name() == *copy.as_str() && !u.is_empty();
        inner.leaving.iter().filter(own).cloned().collect()
    }

    /// Lets go of a stretch of service whose receipt is written. As long as its copy is there, one in which edges were
    /// given up is kept: whoever comes back is found inside.
    pub(crate) fn forget(&self, state: &State, upstream: &Upstream) {
        let is_there = state.instances.keys().any(|id| *id.as_str() == **upstream.name());
        if !is_there || upstream.receipt().lost.is_empty() {
            self.lock().forget(upstream.generation());
        }
    }

    /// Lets go of every stretch of service of a copy that was removed.
    pub(crate) fn forget_copy(&self, copy: &InstanceId) {
        let mut inner = self.lock();
        let own = |u: &&Arc<Upstream>| **u.name() == *copy.as_str();
        let gone: Vec<_> = inner.leaving.iter().filter(own).map(|upstream| upstream.generation()).collect();
        gone.into_iter().for_each(|generation| inner.forget(generation));
    }

    /// Has the next publication ask every core of every edge for connections to a copy without traffic. The
    /// first publication that gives it traffic ends that.
    pub(crate) fn ask_for_connections(&self, generation: u64, count: u16) {
        self.lock().ready.insert(generation, count);
    }

    /// Has the publications from now on mirror requests of a service to its new copies, while they warm.
    pub(crate) fn mirror(&self, service: &str, attempt: u64, spec: MirrorSpec) {
        self.lock().mirrors.insert(service.to_owned(), (attempt, spec));
    }

    /// Ends what this attempt has begun; says whether that was still there. The next publication tells the edges.
    pub(crate) fn end_mirror(&self, service: &str, attempt: u64) -> bool {
        let mut inner = self.lock();
        let own = inner.mirrors.get(service).is_some_and(|(of, _)| *of == attempt);
        own && inner.mirrors.remove(service).is_some()
    }

    /// Takes in a copy that was retired before this process began, and that edges elsewhere may be inside of.
    pub(crate) fn adopt_retired(&self, copy: &UpstreamSpec) {
        let mut inner = self.lock();
        let upstream = inner.writer.adopt_retired(copy);
        inner.leaving.push(upstream);
    }

    /// Cores of edges.
    pub(crate) fn edges(&self) -> usize {
        self.lock().writer.edges()
    }

    /// Renders a service from the newest state and publishes it. Whoever publishes last has rendered last.
    pub(crate) fn publish(&self, core: &Core, service: &str) -> Result<Published, EngineError> {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let state = core.state();
        // What is not waiting for its first traffic any more is not asked for again.
        let waits = |generation: &u64| {
            let of_service = state.instances_of(service).find(|i| i.generation == *generation);
            of_service.is_none_or(|instance| instance.state == InstanceState::Started)
        };
        inner.ready.retain(|generation, _| waits(generation));
        let hold = state.rollout_of(service).and_then(|rollout| inner.holds.of(core, rollout));
        let fixed = inner.fixed.get(service).map_or(&[][..], Vec::as_slice);
        let mut spec = render(&state, service, fixed, &inner.ready, hold);
        if let Some(spec) = &mut spec {
            spec.policy.mirror = inner.mirror_of(&state, service, &spec.pools);
        }
        let change = match spec {
            Some(spec) if inner.writer.service(service) == Some(&spec) => None,
            Some(spec) => Some(Change::Put(spec)),
            None if inner.writer.service(service).is_none() => None,
            None => Some(Change::Remove(service.into())),
        };
        let Some(change) = change else {
            return Ok(Published { version: inner.writer.version(), retired: Vec::new() });
        };
        let applied = inner.writer.apply(&[change]).map_err(|error| refused(&error))?;
        inner.leaving.extend(applied.retired.iter().cloned());
        Ok(Published { version: applied.version, retired: applied.retired })
    }

    /// Applies changes that are about no service; says with which version.
    pub(crate) fn apply_domains(&self, changes: &[Change]) -> Result<u64, EngineError> {
        let applied = self.lock().writer.apply(changes).map_err(|error| refused(&error))?;
        Ok(applied.version)
    }

    /// What became of the requests of a service that were held, over all edges.
    pub(crate) fn hold_counts(&self, service: &str) -> HoldCounts {
        self.lock().writer.hold_counts(service)
    }

    /// Waits until every edge uses table `version`.
    pub(crate) async fn acknowledged(&self, version: u64) {
        let acknowledged = self.lock().writer.acknowledged(version);
        acknowledged.await;
    }

    fn set_fixed(&self, service: &str, fixed: Vec<FixedGeneration>) {
        self.lock().fixed.insert(service.to_owned(), fixed);
    }

    fn drop_fixed(&self, service: &str) {
        self.lock().fixed.remove(service);
    }
}

impl Inner {
    fn forget(&mut self, generation: Generation) {
        self.writer.forget(generation);
        self.ready.remove(&generation.0);
        self.leaving.retain(|upstream| upstream.generation() != generation);
    }

    /// What edges are to mirror of a service: only while its new copies warm, whatever is remembered.
    fn mirror_of(&self, state: &State, service: &str, pools: &[PoolSpec]) -> Option<Box<MirrorSpec>> {
        let (_, mirror) = self.mirrors.get(service)?;
        let rollout = state.rollout_of(service)?;
        let warms = rollout.phase == Phase::Warm && rollout.state != RolloutState::RollingBack;
        let waits = pools.iter().any(|pool| pool.name == mirror.pool && pool.weight == 0);
        (warms && waits).then(|| Box::new(mirror.clone()))
    }
}

/// A generation for each fixed upstream: the one that it has, or a new one. One that goes away and comes back gets a
/// new one, because its old one was retired.
fn fixed_generations(draft: &mut Draft<'_>, service: &str) -> BTreeMap<String, u64> {
    let Some(mut service) = draft.state().services.get(service).cloned() else { return BTreeMap::new() };
    let Workload::Fixed { upstreams } = &service.spec.workload else { return BTreeMap::new() };
    let mut generations = BTreeMap::new();
    for upstream in upstreams {
        let known = service.fixed_generations.get(&upstream.address).copied();
        generations.insert(upstream.address.clone(), known.unwrap_or_else(|| draft.generation()));
    }
    if generations != service.fixed_generations {
        service.fixed_generations.clone_from(&generations);
        draft.put_service(&service);
    }
    generations
}

fn refused(error: &TableError) -> EngineError {
    let hint = match error {
        TableError::RouteTaken { .. } => "Give one of the two services another host or path.",
        TableError::BadPath { .. } => "Correct the path prefix of the route.",
        _ => "This is a defect of the engine; the table stayed as it was. Please report it with the log.",
    };
    EngineError::new(ErrorKind::Conflict, "route.refused", error.to_string(), hint)
}

impl Core {
    /// Publishes a service outside of a rollout, and sees to what it retires.
    pub(crate) async fn publish(self: &Arc<Self>, service: &str) -> Result<u64, EngineError> {
        self.give_fixed_generations(service).await?;
        let published = self.table.publish(self, service)?;
        let deadlines = self.state().services.get(service).map(|s| s.spec.move_settings.drain.clone());
        for upstream in published.retired {
            self.see_off(upstream, deadlines.clone().unwrap_or_default());
        }
        Ok(published.version)
    }

    /// Lets a retired upstream finish in the background: cut at its deadlines, then forgotten.
    pub(crate) fn see_off(self: &Arc<Self>, upstream: Arc<Upstream>, deadlines: DrainDeadlines) {
        let core = Arc::clone(self);
        self.tasks.spawn(async move {
            let left = crate::steps::drain_one(&upstream, &deadlines, tokio::time::Instant::now());
            tokio::select! {
                biased;
                () = left => core.table.forget(&core.state(), &upstream),
                () = core.stop.cancelled() => {}
            }
        });
    }

    /// Fixed upstreams have no record of their own; their generations are given out when they appear.
    async fn give_fixed_generations(self: &Arc<Self>, service: &str) -> Result<(), EngineError> {
        let workload = self.state().services.get(service).map(|s| s.spec.workload.clone());
        let Some(Workload::Fixed { upstreams: wanted }) = workload else {
            self.table.drop_fixed(service);
            return Ok(());
        };
        let name = service.to_owned();
        let generations = self.commit(move |draft| Ok(fixed_generations(draft, &name))).await?;
        let fixed = wanted.into_iter().filter_map(|upstream| {
            let generation = *generations.get(&upstream.address)?;
            Some((upstream, generation))
        });
        self.table.set_fixed(service, fixed.collect());
        Ok(())
    }
}
