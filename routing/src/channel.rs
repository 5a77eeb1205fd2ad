//! One writer, many readers: publication of snapshots and their acknowledgement by the edges.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::{ArcSwap, Cache};
use event_listener::Event;

use crate::builder::{Builder, TableError};
use crate::domain::Domains;
use crate::hold::{HoldCounts, HoldQueue};
use crate::remote::{RemoteEdge, Seat};
use crate::spec::{Change, ServiceSpec, UpstreamSpec};
use crate::table::RoutingTable;
use crate::upstream::{EdgeId, Generation, Upstream};

/// Makes an empty table with its one writer and a first reader.
#[must_use]
pub fn table() -> (TableWriter, TableReader) {
    let shared = Arc::new(Channel {
        current: ArcSwap::from_pointee(RoutingTable::default()),
        settled: AtomicU64::new(0),
        published: Event::new(),
        acknowledged: Event::new(),
        edges: Mutex::new(Vec::new()),
        remote: Mutex::default(),
    });
    (
        TableWriter { builder: Builder::default(), channel: Arc::clone(&shared) },
        TableReader { channel: shared },
    )
}

#[derive(Debug)]
struct Channel {
    current: ArcSwap<RoutingTable>,
    /// The last version whose publication is complete: visible, and what it retires is retired.
    settled: AtomicU64,
    published: Event,
    acknowledged: Event,
    /// Last version acknowledged by each living edge core. Not on the request path.
    edges: Mutex<Vec<Registered>>,
    /// Edges in other processes. Locked over each publication, so that an edge has either joined before it or finds
    /// it in the table.
    remote: Mutex<Remote>,
}

#[derive(Debug, Default)]
struct Remote {
    seats: Vec<Arc<Seat>>,
    /// Retired upstreams that were not forgotten, each with the version that retired it: an edge that was given up may
    /// come back and be inside.
    retired: HashMap<Generation, (Arc<Upstream>, u64)>,
}

/// Who is waited for.
#[derive(Debug)]
struct Registered {
    reached: Weak<AtomicU64>,
    cores: usize,
}

/// The only way to change the table. Purposefully not `Clone`: that there is one writer is a fact of the type.
#[derive(Debug)]
pub struct TableWriter {
    builder: Builder,
    channel: Arc<Channel>,
}

/// What a publication did.
#[derive(Debug)]
pub struct Applied {
    /// Version of the table that is now visible.
    pub version: u64,
    /// Upstreams that have lost their place. They are retired: nobody enters them any more.
    pub retired: Vec<Arc<Upstream>>,
}

impl TableWriter {
    /// Applies changes, all or none, publishes the result and retires what has lost its place. When it
    /// returns, no request that is selected later goes to a retired upstream.
    ///
    /// The changes are one: only how they leave each service counts, so that a route may pass from one
    /// service to another in any order. The cost grows with the touched services, not with the table.
    ///
    /// # Errors
    /// [`TableError`]; nothing was changed then.
    pub fn apply(&mut self, changes: &[Change]) -> Result<Applied, TableError> {
        let queues = self.hold_queues(changes);
        let retired = self.builder.apply(changes)?;
        let mut remote = self.channel.remote();
        let version = self.version();
        remote.retired.extend(retired.iter().map(|u| (u.generation(), (Arc::clone(u), version))));
        if !remote.seats.is_empty() {
            self.tell(&remote.seats, changes, &retired);
        }
        self.channel.current.store(Arc::new(self.builder.table().clone()));
        drop(remote);
        // After the store: whoever is released goes on with the new table.
        self.settle_holds(changes, queues);
        // After the store: whoever is refused from here on finds the new table when looking again.
        for upstream in &retired {
            upstream.retire();
        }
        self.channel.settled.store(self.builder.table().version(), Ordering::Release);
        self.channel.published.notify(usize::MAX);
        Ok(Applied { version: self.builder.table().version(), retired })
    }

    /// The queues of what is changed, of those that were ever held.
    fn hold_queues(&self, changes: &[Change]) -> Vec<Arc<HoldQueue>> {
        let names = changes.iter().filter_map(Change::service);
        let known = names.filter_map(|name| self.builder.service(name)?.hold_queue());
        known.map(Arc::clone).collect()
    }

    /// `before` are the queues that were there already: that of a service which goes away is released.
    fn settle_holds(&self, changes: &[Change], mut before: Vec<Arc<HoldQueue>>) {
        for name in changes.iter().filter_map(Change::service) {
            let Some(service) = self.builder.service(name) else { continue };
            if let Some(queue) = service.hold_queue() {
                before.retain(|gone| !Arc::ptr_eq(gone, queue));
                queue.settle(service.policy().hold.as_deref());
            }
        }
        before.iter().for_each(|gone| gone.settle(None));
    }

    /// What became of the requests of a service that were held, over all edges; nothing if it was never held.
    #[must_use]
    pub fn hold_counts(&self, service: &str) -> HoldCounts {
        self.builder.service(service).map(|service| service.hold_counts()).unwrap_or_default()
    }

    /// Every edge elsewhere is expected inside of what is named, before anybody can see that it is named.
    fn tell(&self, seats: &[Arc<Seat>], changes: &[Change], retired: &[Arc<Upstream>]) {
        let shared: Arc<[Change]> = changes.into();
        let specs = changes
            .iter()
            .filter_map(Change::put)
            .flat_map(|spec| spec.pools.iter().flat_map(|pool| &pool.upstreams));
        let named: Vec<_> = specs.filter_map(|spec| self.upstream(spec.generation).cloned()).collect();
        for seat in seats {
            seat.push(self.version(), &shared, &named, retired);
        }
    }

    /// Takes in an upstream that was retired by an earlier writer, and that edges in other processes may still be
    /// inside of: it is closed, and empty when all of those that have joined before say so. One that is known
    /// already stays as it is.
    pub fn adopt_retired(&mut self, spec: &UpstreamSpec) -> Arc<Upstream> {
        let upstream = self.builder.adopt(spec);
        let (version, mut remote) = (self.version(), self.channel.remote());
        for seat in &remote.seats {
            seat.expect(&upstream, Some(version));
        }
        if upstream.is_retired() {
            remote.retired.entry(upstream.generation()).or_insert_with(|| (Arc::clone(&upstream), version));
        }
        drop(remote);
        upstream
    }

    /// The service as it was last put.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<&ServiceSpec> {
        self.builder.spec(name)
    }

    /// What is served over TLS, and which validations are answered.
    #[must_use]
    pub const fn domains(&self) -> &Domains {
        self.builder.table().domains()
    }

    /// An upstream that is in the table, or was retired and not forgotten yet.
    #[must_use]
    pub fn upstream(&self, generation: Generation) -> Option<&Arc<Upstream>> {
        self.builder.upstream(generation)
    }

    /// Lets go of a retired upstream whose receipt has been kept elsewhere. Its generation stays used. An edge that was
    /// given up and comes back is not expected in it any more.
    pub fn forget(&mut self, generation: Generation) {
        self.builder.forget(generation);
        if self.builder.upstream(generation).is_none() {
            self.channel.remote().retired.remove(&generation);
        }
    }

    /// Version of the table that is visible now.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.builder.table().version()
    }

    /// Edge cores that are registered and alive, those in other processes among them.
    #[must_use]
    pub fn edges(&self) -> usize {
        self.channel.living_edges().iter().map(|edge| edge.cores).sum()
    }

    /// A future that waits until every living edge core has acknowledged `version`: it has let go of its
    /// connections to retired upstreams and uses the new table. It borrows nothing from the writer.
    pub fn acknowledged(&self, version: u64) -> impl Future<Output = ()> + Send + use<> {
        let channel = Arc::clone(&self.channel);
        async move {
            loop {
                let listener = channel.acknowledged.listen();
                if channel.all_reached(version) {
                    return;
                }
                listener.await;
            }
        }
    }
}

impl Channel {
    fn all_reached(&self, version: u64) -> bool {
        let edges = self.living_edges();
        let mut reached = edges.iter().filter_map(|edge| edge.reached.upgrade());
        reached.all(|reached| reached.load(Ordering::Acquire) >= version)
    }

    fn living_edges(&self) -> MutexGuard<'_, Vec<Registered>> {
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        edges.retain(|edge| edge.reached.strong_count() > 0);
        edges
    }

    fn remote(&self) -> MutexGuard<'_, Remote> {
        self.remote.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the table. Clone it for each core.
#[derive(Clone, Debug)]
pub struct TableReader {
    channel: Arc<Channel>,
}

impl TableReader {
    /// The current snapshot. Lock-free; do not keep it over an `await`.
    #[must_use]
    pub fn load(&self) -> Arc<RoutingTable> {
        self.channel.current.load_full()
    }

    /// A reader with a cache of its own, for one core's request path: loading costs one comparison
    /// while the table does not change.
    #[must_use]
    pub fn cached(&self) -> CachedReader {
        CachedReader { cache: Cache::new(SharedSwap(Arc::clone(&self.channel))) }
    }

    /// Waits until the publication of a table newer than `version` is complete, and returns its version.
    /// What that table retires is retired by then, so whoever lets go of retired upstreams after this
    /// and acknowledges the version has kept none.
    pub async fn newer_than(&self, version: u64) -> u64 {
        loop {
            let listener = self.channel.published.listen();
            let now = self.channel.settled.load(Ordering::Acquire);
            if now > version {
                return now;
            }
            listener.await;
        }
    }

    /// Registers an edge core: from now on publications wait for its acknowledgement, until it is dropped.
    /// Call it before the core first loads a table: what is visible now counts as acknowledged.
    #[must_use]
    pub fn register(&self) -> Acknowledger {
        // Under the lock: a publication that does not see this core comes before it, and so before its
        // first load.
        let mut edges = self.channel.edges.lock().unwrap_or_else(PoisonError::into_inner);
        let reached = Arc::new(AtomicU64::new(self.channel.current.load().version()));
        edges.push(Registered { reached: Arc::downgrade(&reached), cores: 1 });
        Acknowledger { channel: Arc::clone(&self.channel), reached }
    }

    /// Lets an edge in another process take part: publications wait for it until it is dropped, and every upstream
    /// of the table counts it as inside until it says otherwise; so does every retired one that it was lost in.
    /// `cores` is how many it has.
    #[must_use]
    pub fn join(&self, id: EdgeId, name: &Arc<str>, cores: usize) -> RemoteEdge {
        RemoteEdge::waited(self, id, name, cores)
    }

    /// As [`TableReader::join`], for an edge that was given up because it did not use what it was told: it is told all
    /// the same, and neither publications nor drains wait for it until it uses the newest table.
    #[must_use]
    pub fn join_unawaited(&self, id: EdgeId, name: &Arc<str>, cores: usize) -> RemoteEdge {
        RemoteEdge::unawaited(self, id, name, cores)
    }

    pub(crate) fn seat_waited(&self, seat: &Arc<Seat>, cores: usize) -> Acknowledger {
        let mut remote = self.channel.remote();
        self.expect(seat, &remote);
        remote.seats.push(Arc::clone(seat));
        self.register_remote(0, cores)
    }

    pub(crate) fn seat(&self, seat: &Arc<Seat>) {
        let mut remote = self.channel.remote();
        self.expect(seat, &remote);
        remote.seats.push(Arc::clone(seat));
    }

    /// Waits from now on for an edge that was not waited for, if `version` is the newest.
    pub(crate) fn take_in(&self, seat: &Arc<Seat>, version: u64, cores: usize) -> Option<Acknowledger> {
        let remote = self.channel.remote();
        if version < self.load().version() {
            return None;
        }
        seat.wait_for();
        self.expect(seat, &remote);
        Some(self.register_remote(version, cores))
    }

    fn expect(&self, seat: &Arc<Seat>, remote: &Remote) {
        self.load().for_each_service(|service| {
            service.upstreams().for_each(|(_, upstream)| seat.expect(upstream, None));
        });
        if seat.is_waited() {
            remote.retired.values().for_each(|(upstream, retired_at)| seat.take_back(upstream, *retired_at));
        }
    }

    fn register_remote(&self, version: u64, cores: usize) -> Acknowledger {
        let reached = Arc::new(AtomicU64::new(version));
        let mut edges = self.channel.edges.lock().unwrap_or_else(PoisonError::into_inner);
        edges.push(Registered { reached: Arc::downgrade(&reached), cores });
        Acknowledger { channel: Arc::clone(&self.channel), reached }
    }

    /// Runs while nothing is published.
    pub(crate) fn between_publications<T>(&self, work: impl FnOnce(&Self) -> T) -> T {
        let _no_publication = self.channel.remote();
        work(self)
    }

    pub(crate) fn unseat(&self, seat: &Arc<Seat>) {
        self.channel.remote().seats.retain(|other| !Arc::ptr_eq(other, seat));
    }

    /// A retired upstream that an edge names although nobody expected it there: it is expected from now on, unless it
    /// has let go before.
    pub(crate) fn named_retired(&self, seat: &Arc<Seat>, generation: Generation) -> Option<Arc<Upstream>> {
        let remote = self.channel.remote();
        let (upstream, retired_at) = remote.retired.get(&generation)?;
        seat.expect_again(upstream, *retired_at).then(|| Arc::clone(upstream))
    }
}

/// One core's cached view of the table.
#[derive(Debug)]
pub struct CachedReader {
    cache: Cache<SharedSwap, Arc<RoutingTable>>,
}

impl CachedReader {
    /// The current snapshot.
    pub fn load(&mut self) -> &Arc<RoutingTable> {
        self.cache.load()
    }
}

#[derive(Debug)]
struct SharedSwap(Arc<Channel>);

impl std::ops::Deref for SharedSwap {
    type Target = ArcSwap<RoutingTable>;
    fn deref(&self) -> &Self::Target {
        &self.0.current
    }
}

/// A registered edge core's way to acknowledge.
#[derive(Debug)]
pub struct Acknowledger {
    channel: Arc<Channel>,
    reached: Arc<AtomicU64>,
}

impl Acknowledger {
    pub(crate) fn reached(&self) -> u64 {
        self.reached.load(Ordering::Acquire)
    }

    /// Says that this core uses table `version` and keeps nothing of what it retired.
    pub fn acknowledge(&self, version: u64) {
        self.reached.fetch_max(version, Ordering::AcqRel);
        self.channel.acknowledged.notify(usize::MAX);
    }
}

impl Drop for Acknowledger {
    fn drop(&mut self) {
        // Emptied first, so that whoever is woken does not wait for this core.
        self.reached.store(u64::MAX, Ordering::Release);
        self.channel.acknowledged.notify(usize::MAX);
    }
}
