//! An edge in another process, as the writer's side sees it: what it has to be told, what it has acknowledged, and
//! which upstreams it may be inside of.
//!
//! It is waited for as a core of an edge in this process is, from [`TableReader::join`] until it is dropped. Who
//! keeps it decides how long an edge that is not heard of is waited for: there is no clock here.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::Event;

use crate::channel::{Acknowledger, TableReader};
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
    queue: Mutex<Queue>,
    pushed: Event,
    inside: Mutex<HashMap<Generation, Inside>>,
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
        upstream.expect_edge(self.id, &self.name);
        self.inside()
            .entry(upstream.generation())
            .or_insert_with(|| Inside { upstream: Arc::clone(upstream), retired_at });
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
    acknowledger: Acknowledger,
}

impl RemoteEdge {
    pub(crate) fn new(reader: &TableReader, id: EdgeId, name: &Arc<str>, cores: usize) -> Self {
        let seat = Arc::new(Seat {
            id,
            name: Arc::clone(name),
            queue: Mutex::new(Queue { publications: VecDeque::new(), behind: true, turn: 0 }),
            pushed: Event::new(),
            inside: Mutex::default(),
        });
        // It has seen nothing yet: also a publication that is under way waits for it.
        let acknowledger = reader.seat(&seat, Arc::new(AtomicU64::new(0)), cores);
        Self { seat, reader: reader.clone(), acknowledger }
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

    /// Version of the last table that it has acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledger.reached()
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

    /// Takes the edge's word on an upstream; `from_before` says that it knew it before it joined (again).
    pub fn report(&self, generation: Generation, tally: Tally, from_before: bool) {
        let upstream = self.seat.inside().get(&generation).map(|entry| Arc::clone(&entry.upstream));
        if let Some(upstream) = upstream {
            upstream.report_of(self.seat.id, tally, from_before);
        }
    }

    /// The edge uses table `version`, and of what that table and those before it have retired it is inside of `open`
    /// alone.
    pub fn acknowledge(&self, version: u64, open: &[Generation]) {
        let gone = |entry: &Inside| {
            entry.retired_at.is_some_and(|at| at <= version) && !open.contains(&entry.upstream.generation())
        };
        self.let_go_of(gone);
        self.acknowledger.acknowledge(version);
    }

    /// The edge has let go of a retired upstream: its last word on it was the last.
    pub fn let_go(&self, generation: Generation) {
        self.let_go_of(|entry| entry.retired_at.is_some() && entry.upstream.generation() == generation);
    }

    /// The edge has ended in order: nothing of it is inside of anything. Drop this after it.
    pub fn leave(&self) {
        self.let_go_of(|_| true);
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
        for entry in inside.into_values() {
            entry.upstream.lose_edge(self.seat.id);
        }
        // The acknowledger goes last, and wakes whoever waits for this edge.
    }
}
