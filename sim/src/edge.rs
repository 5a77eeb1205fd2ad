//! A simulated core of an edge with its clients: the table, the choice of an upstream, the lease, the classes of
//! retries and the budget are the real ones; the network and the copies behind it are the world's.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use peregrine_engine::model::InstanceId;
use peregrine_routing::{
    Acknowledger, Address, Enter, Evidence, Failure, Generation, HoldVerdict, Joined, NoUpstream, Outcome,
    Passive, RetryClass, RoutingTable, Service, TableReader, TrafficClass,
};

use crate::book::{Book, Booked};
use crate::report::Faults;
use crate::world::World;

/// The host that clients ask for.
pub(crate) const HOST: &str = "shop.test";
/// Attempts for one request, the first one included: as the real edge.
const MAX_ATTEMPTS: u8 = 3;
/// Looks at a newer table when everything in one was retired meanwhile: as the real edge.
const MAX_TABLE_LOADS: u8 = 3;
/// Times that one request may be held: as the real edge.
const MAX_HOLDS: u8 = 3;
/// What is kept of a request that is held.
const HELD_BYTES: u64 = 500;

/// Lost by a generation of an engine that is dead, over an edge that outlived it: the engine of now knows nothing of
/// who is inside of it.
const BEFORE: Answer = Answer::Lost("by a generation of an engine before");

/// One core.
#[derive(Clone)]
pub(crate) struct Core {
    pub(crate) world: World,
    /// Number of the core, over all edges and their lives.
    pub(crate) number: usize,
    pub(crate) reader: TableReader,
    pub(crate) book: Book,
    /// Nothing that runs now is allowed to fail.
    pub(crate) strict: bool,
}

/// How a request ended for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// With an answer of the copy, its errors included.
    Whole(u16),
    /// Closed politely by a drain.
    Closed,
    /// Cut at a hard deadline, and named in the receipt.
    Cut,
    /// Lost: why.
    Lost(&'static str),
}

impl Core {
    /// Follows the table as a core of the real edge does: it lets go of idle connections, then acknowledges.
    pub(crate) async fn follow(self, acknowledger: Acknowledger) {
        let mut version = 0;
        loop {
            version = self.reader.newer_than(version).await;
            self.let_go_late().await;
            self.let_go();
            acknowledger.acknowledge(version);
            self.world.note(format_args!("core {} acknowledges table {version}", self.number));
        }
    }

    /// A core may be busy for a while before it looks.
    pub(crate) async fn let_go_late(&self) {
        if self.world.one_in(12) {
            self.world.fault(Faults::LateAcknowledgement);
            self.world.sleep(50, 400).await;
        } else if self.world.one_in(2) {
            self.world.sleep(0, 3).await;
        }
    }

    pub(crate) fn let_go(&self) {
        let named = named(&self.reader.load());
        self.world.drop_idle(self.number, |generation| !named.contains(&generation));
        self.book.close_all_but(&named);
    }

    /// A client that asks one thing after the other, for ever.
    pub(crate) async fn client(self) {
        loop {
            self.world.sleep(20, 150).await;
            let kind = Kind::draw(&self.world);
            let term = self.world.lock().term;
            let answer = self.request(kind).await;
            let mut inner = self.world.lock();
            inner.report.requests += 1;
            let excused = matches!(answer, Answer::Lost(_) | Answer::Cut);
            inner.report.excused += u64::from(excused);
            drop(inner);
            if excused && self.strict && answer != BEFORE && term == self.world.lock().term {
                self.world.violated(format_args!("a request was lost without a reason: {answer:?}"));
            }
        }
    }

    /// One request, with the retries that its evidence allows.
    pub(crate) async fn request(&self, kind: Kind) -> Answer {
        let id = self.world.bits() >> 1;
        let mut tried: Vec<Generation> = Vec::new();
        let mut earned = false;
        if let Err(answer) = self.pass().await {
            return answer;
        }
        for attempt in 1..=MAX_ATTEMPTS {
            let (service, lease) = match self.enter(&mut tried, kind) {
                Ok(found) => found,
                Err(answer) => return answer,
            };
            if !earned {
                service.retry_budget().earn();
                earned = true;
            }
            let (evidence, why, before) = match self.attempt(&service, lease, id, kind).await {
                Ok(answer) => return answer,
                Err((generation, evidence, why)) => {
                    tried.push(generation);
                    (evidence, why, generation.0 < self.world.lock().first_generation)
                }
            };
            let safe = match evidence.class() {
                RetryClass::A | RetryClass::B => true,
                RetryClass::C => kind.idempotent,
                RetryClass::D => false,
            };
            if attempt == MAX_ATTEMPTS || !safe || !service.retry_budget().spend(self.world.edge_now_ms()) {
                return if before { BEFORE } else { Answer::Lost(why) };
            }
            self.world.lock().report.retried += 1;
        }
        Answer::Lost("every attempt failed")
    }

    /// Waits for its turn while the service is held. A client may not have the patience.
    async fn pass(&self) -> Result<(), Answer> {
        for _ in 0..MAX_HOLDS {
            let table = self.reader.load();
            let Some(found) = table.lookup(HOST, "/") else { return Ok(()) };
            let Some(queue) = found.service.hold().filter(|queue| queue.is_closed()) else { return Ok(()) };
            let mut ticket = match queue.join(HELD_BYTES, self.world.edge_now_ms() * 1_000) {
                Joined::Pass => return Ok(()),
                Joined::Full => return Err(Answer::Lost("the queue of the hold is full")),
                Joined::Wait(ticket) => ticket,
            };
            drop(table);
            self.world.lock().report.held += 1;
            let patience_ms = if self.world.one_in(8) { self.world.between(1, 400) } else { u64::MAX >> 16 };
            let verdict = std::future::poll_fn(|cx| ticket.poll_verdict(cx));
            match tokio::time::timeout(Duration::from_millis(patience_ms), verdict).await {
                Ok(HoldVerdict::Go) => {}
                Ok(HoldVerdict::TooOld) => return Err(Answer::Lost("it was held for too long")),
                Err(_) => return Err(Answer::Lost("its client had left")),
            }
            let held = |table: &RoutingTable| {
                let queue = table.lookup(HOST, "/").and_then(|found| found.service.hold().cloned());
                queue.is_some_and(|queue| queue.is_held())
            };
            if !held(&self.reader.load()) {
                return Ok(());
            }
        }
        Err(Answer::Lost("it was held again and again"))
    }

    fn enter(&self, tried: &mut Vec<Generation>, kind: Kind) -> Result<(Arc<Service>, Booked), Answer> {
        for _ in 0..MAX_TABLE_LOADS {
            let table = self.reader.load();
            let Some(found) = table.lookup(HOST, "/") else { return Err(Answer::Lost("no route")) };
            let ask = Enter {
                now_ms: self.world.edge_now_ms(),
                random: self.world.bits(),
                hash: Some(kind.sticky),
                prefer: None,
                tried,
                class: if kind.class == TrafficClass::WebSocket { kind.class } else { TrafficClass::Request },
            };
            match found.service.enter(ask) {
                Ok(lease) => return Ok((Arc::clone(found.service), self.book.enter(lease))),
                Err(NoUpstream::Empty) => return Err(Answer::Lost("the service has no copy")),
                Err(NoUpstream::Exhausted) => tried.clear(),
            }
        }
        Err(Answer::Lost("no copy could be entered"))
    }

    async fn attempt(
        &self,
        service: &Service,
        mut lease: Booked,
        id: u64,
        kind: Kind,
    ) -> Result<Answer, (Generation, Evidence, &'static str)> {
        let upstream = Arc::clone(lease.upstream());
        let generation = upstream.generation();
        let passive: &Passive = &service.policy().passive;
        let now_ms = || self.world.edge_now_ms();
        let Address::Socket(address) = *upstream.address() else { return Ok(Answer::Lost("a name")) };
        tokio::time::sleep(Duration::from_millis(1)).await;
        let Some(copy) = self.world.dial(address) else {
            upstream.strike(passive, now_ms());
            return Err((generation, Evidence::NotSent, "nobody listens there"));
        };
        lease.mark_sent();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let Some(visit) = self.world.visit(&copy, (self.number, generation.0), id) else {
            upstream.record(Outcome::Failed(Failure::Reset), passive, now_ms());
            return Err((generation, Evidence::Ambiguous, "the copy died before it was asked"));
        };
        if visit.times > 1 && !kind.idempotent {
            self.world.violated(format_args!("request {id:x} was executed {} times", visit.times));
        }
        let begun_ms = now_ms();
        let head = tokio::select! {
            biased;
            () = visit.ended() => false,
            () = tokio::time::sleep(Duration::from_millis(kind.head_ms)) => true,
        };
        if !head {
            upstream.record(Outcome::Failed(Failure::Reset), passive, now_ms());
            return Err((generation, Evidence::Ambiguous, "the copy died before it answered"));
        }
        let status = if visit.sick { 500 } else { 200 };
        let latency_us = (now_ms() - begun_ms) * 1_000;
        upstream.record(Outcome::Response { status, latency_us }, passive, now_ms());
        if kind.class != lease.class() {
            lease.reclassify(kind.class);
        }
        let ended = tokio::select! {
            biased;
            () = visit.ended() => Answer::Lost("the copy died while it answered"),
            () = tokio::time::sleep(Duration::from_millis(kind.body_ms)) => Answer::Whole(status),
            due = due(&upstream, kind.class) => due,
        };
        match ended {
            Answer::Closed => lease.soft_close(),
            Answer::Cut => lease.cut(&format!("{id:x}")),
            Answer::Whole(_) => self.keep(&copy, &lease),
            Answer::Lost(_) => {}
        }
        // First out of the copy, then out of the account: whoever sees it empty finds nobody inside.
        drop(visit);
        drop(lease);
        let before = matches!(ended, Answer::Lost(_)) && generation.0 < self.world.lock().first_generation;
        Ok(if before { BEFORE } else { ended })
    }

    /// A connection goes back to the pool of its generation, unless that is retired.
    fn keep(&self, copy: &InstanceId, lease: &Booked) {
        if !lease.upstream().is_retired() && lease.class() != TrafficClass::WebSocket {
            self.world.keep_idle(self.number, lease.upstream().generation().0, copy);
        }
    }
}

/// Keeps the queue of the service going while it is held, for all cores of a process.
pub(crate) async fn keep_holds(world: World, reader: TableReader) {
    let mut version = 0;
    let mut queue = None;
    loop {
        queue = reader.load().held_services().next().and_then(|service| service.hold().cloned()).or(queue);
        let Some(known) = &queue else {
            version = reader.newer_than(version).await;
            continue;
        };
        let changed = known.listen();
        let now_us = world.edge_now_ms() * 1_000;
        let next_us = known.turn(now_us);
        let wait_us = next_us.map_or(u64::MAX >> 16, |next_us| next_us.saturating_sub(now_us));
        tokio::select! {
            biased;
            newer = reader.newer_than(version) => version = newer,
            () = changed => {}
            () = tokio::time::sleep(Duration::from_micros(wait_us)) => {}
        }
    }
}

/// The deadline of a class in a drain.
async fn due(upstream: &peregrine_routing::Upstream, class: TrafficClass) -> Answer {
    let closable = matches!(class, TrafficClass::Sse | TrafficClass::GrpcStream | TrafficClass::WebSocket);
    loop {
        let turn = upstream.listen();
        // First what comes first: both may have been told since the last look, and here a stream that is asked to end does so
        // at once.
        if closable && upstream.is_closing(class) {
            return Answer::Closed;
        }
        if upstream.is_class_cut(class) {
            return Answer::Cut;
        }
        turn.await;
    }
}

/// Every generation that a table names.
pub(crate) fn named(table: &RoutingTable) -> BTreeSet<u64> {
    let mut named = BTreeSet::new();
    table.for_each_service(|service| named.extend(service.upstreams().map(|(_, u)| u.generation().0)));
    named
}

/// What a client asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    class: TrafficClass,
    idempotent: bool,
    head_ms: u64,
    body_ms: u64,
    sticky: u64,
}

impl Kind {
    /// A short GET.
    pub(crate) const PROBE: Self =
        Self { class: TrafficClass::Request, idempotent: true, head_ms: 2, body_ms: 1, sticky: 1 };

    fn draw(world: &World) -> Self {
        let (class, body_ms) = match world.below(20) {
            0 => (TrafficClass::Sse, world.between(100, 6_000)),
            1 => (TrafficClass::WebSocket, world.between(100, 6_000)),
            2 => (TrafficClass::GrpcStream, world.between(50, 3_000)),
            3 => (TrafficClass::Transfer, world.between(100, 1_500)),
            _ => (TrafficClass::Request, world.between(0, 60)),
        };
        let head_ms = world.between(1, 60);
        Self { class, idempotent: !world.one_in(2), head_ms, body_ms, sticky: world.below(8) }
    }
}
