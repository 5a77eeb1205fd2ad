//! An edge in another process, as the writer's side sees it: what it has to be told, what it has acknowledged, and
//! which upstreams it may be inside of.
//!
//! It is waited for as a core of an edge in this process is, from [`TableReader::join`] until it is dropped. Who
//! keeps it decides how long an edge that is not heard of is waited for: there is no clock here. One that was given up
//! because it does not use what it is told can take part without being waited for, until it does.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use event_listener::Event;

use crate::channel::{Acknowledger, TableReader};
use crate::hold::{HoldCounts, HoldQueue};
use crate::spec::Change;
use crate::table::RoutingTable;
use crate::upstream::{EdgeId, Generation, Tally, Upstream};

/// Publications that wait for a slow edge. One that is further behind gets a whole table instead.
const MAX_QUEUED_PUBLICATIONS: usize = 1_024;

/// What an edge has to be told next.
#[derive(Clone, Debug)]
pub enum Publication {
    /// The differences from the version before.
    Changes(u64, Arc<[Change]>),
    /// Everything: it has been told nothing yet, or has fallen behind.
    Whole(Arc<RoutingTable>),
}

/// What the channel and the keeper of a remote edge share.
#[derive(Debug)]
pub(crate) struct Seat {
    id: EdgeId,
    name: Arc<str>,
    /// Somebody waits for it. Turned on between publications, and never off.
    is_waited: AtomicBool,
    queue: Mutex<Queue>,
    pushed: Event,
    inside: Mutex<HashMap<Generation, Inside>>,
    /// Queues of services that the edge has said something of.
    held: Mutex<HashMap<Arc<str>, Held>>,
}

/// What the edge says of a service that it holds or has held.
#[derive(Debug, Default)]
struct Held {
    /// Where it is added up; `None` while nobody here has held the service.
    queue: Option<Arc<HoldQueue>>,
    /// What the edge had counted before we knew it.
    base: HoldCounts,
}

#[derive(Debug, Default)]
struct Queue {
    publications: VecDeque<(u64, Arc<[Change]>)>,
    /// What is queued does not follow on what was told.
    behind: bool,
    /// Number of the conversation that is told.
    turn: u64,
}

/// An upstream that the edge may be inside of.
#[derive(Debug)]
struct Inside {
    upstream: Arc<Upstream>,
    /// Version of the table that has retired it.
    retired_at: Option<u64>,
}

impl Seat {
    pub(crate) fn is_waited(&self) -> bool {
        self.is_waited.load(Ordering::Acquire)
    }

    pub(crate) fn wait_for(&self) {
        self.is_waited.store(true, Ordering::Release);
    }

    /// Called with each publication, before anybody can see it.
    pub(crate) fn push(
        &self,
        version: u64,
        changes: &Arc<[Change]>,
        named: &[Arc<Upstream>],
        retired: &[Arc<Upstream>],
    ) {
        for upstream in named {
            self.expect(upstream, None);
        }
        let mut inside = self.inside();
        for upstream in retired {
            if let Some(entry) = inside.get_mut(&upstream.generation()) {
                entry.retired_at.get_or_insert(version);
            }
        }
        drop(inside);
        let mut queue = self.queue();
        if queue.publications.len() >= MAX_QUEUED_PUBLICATIONS {
            queue.publications.clear();
            queue.behind = true;
        }
        if !queue.behind {
            queue.publications.push_back((version, Arc::clone(changes)));
        }
        drop(queue);
        self.pushed.notify(usize::MAX);
    }

    pub(crate) fn expect(&self, upstream: &Arc<Upstream>, retired_at: Option<u64>) {
        if self.is_waited() {
            upstream.expect_edge(self.id, &self.name);
        }
        self.inside()
            .entry(upstream.generation())
            .or_insert_with(|| Inside { upstream: Arc::clone(upstream), retired_at });
    }

    /// It was lost inside, and may have come back.
    pub(crate) fn take_back(&self, upstream: &Arc<Upstream>, retired_at: u64) {
        if upstream.take_edge_back(self.id) {
            self.insert(upstream, retired_at);
        }
    }

    /// It says that it knows a retired upstream. False if it has let go of it before, or nobody waits for it.
    pub(crate) fn expect_again(&self, upstream: &Arc<Upstream>, retired_at: u64) -> bool {
        let expected = self.is_waited() && upstream.expect_edge(self.id, &self.name);
        if expected {
            self.insert(upstream, retired_at);
        }
        expected
    }

    fn insert(&self, upstream: &Arc<Upstream>, retired_at: u64) {
        let inside = Inside { upstream: Arc::clone(upstream), retired_at: Some(retired_at) };
        self.inside().entry(upstream.generation()).or_insert(inside);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Arc<str>, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn for_each_hold_queue(&self, work: impl Fn(&HoldQueue)) {
        self.held().values().filter_map(|held| held.queue.as_ref()).for_each(|queue| work(queue));
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inside(&self) -> MutexGuard<'_, HashMap<Generation, Inside>> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An edge in another process. Dropping it gives it up: nobody waits for it any more, and what it had out is told as
/// lost in the receipts of its upstreams.
#[derive(Debug)]
pub struct RemoteEdge {
    seat: Arc<Seat>,
    reader: TableReader,
    cores: usize,
    /// While it is waited for.
    acknowledger: OnceLock<Acknowledger>,
}

impl RemoteEdge {
    pub(crate) fn waited(reader: &TableReader, id: EdgeId, name: &Arc<str>, cores: usize) -> Self {
        let edge = Self::new(reader, id, name, cores);
        edge.seat.wait_for();
        // It has seen nothing yet: also a publication that is under way waits for it.
        drop(edge.acknowledger.set(reader.seat_waited(&edge.seat, cores)));
        edge
    }

    pub(crate) fn unawaited(reader: &TableReader, id: EdgeId, name: &Arc<str>, cores: usize) -> Self {
        let edge = Self::new(reader, id, name, cores);
        reader.seat(&edge.seat);
        edge
    }

    fn new(reader: &TableReader, id: EdgeId, name: &Arc<str>, cores: usize) -> Self {
        let seat = Arc::new(Seat {
            id,
            name: Arc::clone(name),
            is_waited: AtomicBool::new(false),
            queue: Mutex::new(Queue { publications: VecDeque::new(), behind: true, turn: 0 }),
            pushed: Event::new(),
            inside: Mutex::default(),
            held: Mutex::default(),
        });
        Self { seat, reader: reader.clone(), cores, acknowledger: OnceLock::new() }
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> EdgeId {
        self.seat.id
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.seat.name
    }

    /// Version of the last table that it has acknowledged; 0 before one for which it was waited.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledger.get().map_or(0, Acknowledger::reached)
    }

    /// Whether publications and drains wait for it.
    #[must_use]
    pub fn is_waited(&self) -> bool {
        self.acknowledger.get().is_some()
    }

    /// A new conversation with the edge: whatever it was told before, the next publication is whole. Returns the
    /// number to ask [`RemoteEdge::next`] with; an earlier conversation is told nothing more.
    #[must_use]
    pub fn start_over(&self) -> u64 {
        let mut queue = self.seat.queue();
        queue.publications.clear();
        queue.behind = true;
        queue.turn += 1;
        queue.turn
    }

    /// The next thing to tell it in this conversation; waits until there is one.
    pub async fn next(&self, turn: u64) -> Publication {
        loop {
            let pushed = self.seat.pushed.listen();
            if let Some(next) = self.take(turn) {
                return next;
            }
            pushed.await;
        }
    }

    fn take(&self, turn: u64) -> Option<Publication> {
        // No publication comes in between: what is queued after a whole table follows on it.
        self.reader.between_publications(|reader| {
            let mut queue = self.seat.queue();
            if queue.turn != turn {
                return None;
            }
            if std::mem::take(&mut queue.behind) {
                queue.publications.clear();
                return Some(Publication::Whole(reader.load()));
            }
            let next = queue.publications.pop_front();
            next.map(|(version, changes)| Publication::Changes(version, changes))
        })
    }

    /// Takes the edge's word on an upstream; `from_before` says that it knew it before it joined (again). One that was
    /// retired while nobody expected this edge in it, and is not forgotten, waits for it from here on.
    pub fn report(&self, generation: Generation, tally: Tally, from_before: bool) {
        let known = self.seat.inside().get(&generation).map(|entry| Arc::clone(&entry.upstream));
        let upstream = known.or_else(|| self.reader.named_retired(&self.seat, generation));
        if let Some(upstream) = upstream {
            upstream.report_of(self.seat.id, tally, from_before);
        }
    }

    /// Takes the edge's word on the requests of a service that it holds or has held; `from_before` says that it is of
    /// what was before it joined (again).
    pub fn report_hold(&self, service: &str, counts: HoldCounts, from_before: bool) {
        let mut held = self.seat.held();
        let known = held.contains_key(service);
        let entry = held.entry(service.into()).or_default();
        if from_before && !known {
            entry.base = counts;
        }
        let table = self.reader.load();
        let found = table.held_services().find(|one| **one.name() == *service).and_then(|one| one.hold());
        let is_other = |queue: &&Arc<HoldQueue>| entry.queue.as_ref().is_none_or(|q| !Arc::ptr_eq(q, queue));
        // A service that went away and was made anew has another queue, and its edges count anew.
        if let Some(queue) = found.filter(is_other)
            && entry.queue.replace(Arc::clone(queue)).is_some()
        {
            entry.base = HoldCounts::default();
        }
        if let Some(queue) = &entry.queue {
            queue.report_of(self.seat.id, counts, entry.base);
        }
    }

    /// The edge uses table `version`, and of what that table and those before it have retired it is inside of `open`
    /// alone. One that was not waited for is from here on, if that is the newest table.
    pub fn acknowledge(&self, version: u64, open: &[Generation]) {
        if !self.is_waited()
            && let Some(acknowledger) = self.reader.take_in(&self.seat, version, self.cores)
        {
            drop(self.acknowledger.set(acknowledger));
            for generation in open {
                self.reader.named_retired(&self.seat, *generation);
            }
        }
        let gone = |entry: &Inside| {
            entry.retired_at.is_some_and(|at| at <= version) && !open.contains(&entry.upstream.generation())
        };
        self.let_go_of(gone);
        if let Some(acknowledger) = self.acknowledger.get() {
            acknowledger.acknowledge(version);
        }
    }

    /// The edge has let go of a retired upstream: its last word on it was the last.
    pub fn let_go(&self, generation: Generation) {
        self.let_go_of(|entry| entry.retired_at.is_some() && entry.upstream.generation() == generation);
    }

    /// The edge has ended in order: nothing of it is inside of anything. Drop this after it.
    pub fn leave(&self) {
        self.seat.for_each_hold_queue(|queue| queue.end_edge(self.seat.id));
        let inside = std::mem::take(&mut *self.seat.inside());
        inside.into_values().for_each(|entry| entry.upstream.left_by(self.seat.id));
    }

    fn let_go_of(&self, gone: impl Fn(&Inside) -> bool) {
        let mut left = Vec::new();
        self.seat.inside().retain(|_, entry| {
            let goes = gone(entry);
            if goes {
                left.push(Arc::clone(&entry.upstream));
            }
            !goes
        });
        for upstream in left {
            upstream.let_go_of(self.seat.id);
        }
    }

    /// Retired upstreams that it may still be inside of.
    #[must_use]
    pub fn draining(&self) -> Vec<Arc<Upstream>> {
        let inside = self.seat.inside();
        let retired = inside.values().filter(|entry| entry.retired_at.is_some());
        retired.map(|entry| Arc::clone(&entry.upstream)).collect()
    }
}

impl Drop for RemoteEdge {
    fn drop(&mut self) {
        self.reader.unseat(&self.seat);
        let inside = std::mem::take(&mut *self.seat.inside());
        self.seat.for_each_hold_queue(|queue| queue.lose_edge(self.seat.id));
        for entry in inside.into_values() {
            entry.upstream.lose_edge(self.seat.id);
        }
        // The acknowledger goes last, and wakes whoever waits for this edge.
    }
}
