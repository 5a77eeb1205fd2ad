//! Requests in flight on one core: what each is waiting for, until when, and what became of it.
//!
//! A [`Flight`] begins when a request head is complete and ends when the last frame of the answer has
//! been handed over, when a tunnel is closed, or when either side has gone. Its end is in one place
//! ([`Flight::finish`]): the lease goes back, the request is counted and logged.
//!
//! Deadlines are fields that the core's timekeeper looks at ten times a second. A timer for each request
//! would cost more than the request's own bookkeeping.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};

use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Method, Version};
use peregrine_routing::{Generation, Lease, Outcome, TrafficClass, Upstream};

use crate::body::{Events, UpstreamBody};
use crate::clock::now_us;
use crate::conn::{ConnState, Kill};
use crate::core::{Core, ServiceEntry};
use crate::error::Reason;
use crate::ids::Ids;

/// What a request is waiting for. Decides who is to blame when it waits for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// A connection to the upstream.
    Connect,
    /// The next part of the request body.
    RequestBody,
    /// The upstream to take the request body.
    UpstreamReads,
    /// The head of the answer.
    Head,
    /// The next part of the answer's body.
    Body,
    /// The client to take what is there.
    Client,
    /// Either side of a tunnel.
    Tunnel,
}

/// The host that a request is for, as it was sent.
#[derive(Debug, Clone)]
pub(crate) enum HostText {
    None,
    Field(HeaderValue),
    Authority(Authority),
}

impl HostText {
    /// As the value of a field.
    pub(crate) fn value(&self) -> Option<HeaderValue> {
        match self {
            Self::None => None,
            Self::Field(value) => Some(value.clone()),
            Self::Authority(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::None => b"",
            Self::Field(value) => value.as_bytes(),
            Self::Authority(authority) => authority.as_str().as_bytes(),
        }
    }
}

/// A request in flight.
pub(crate) struct Flight {
    pub(crate) core: Rc<Core>,
    pub(crate) conn: Rc<ConnState>,
    slot: Cell<usize>,
    pub(crate) started_us: u64,
    pub(crate) ids: Ids,
    pub(crate) method: Method,
    pub(crate) version: Version,
    pub(crate) client: std::net::IpAddr,
    pub(crate) host: RefCell<HostText>,
    pub(crate) path: Option<PathAndQuery>,
    /// Referer and user agent, if the log wants them.
    pub(crate) agent: Option<Box<(Option<HeaderValue>, Option<HeaderValue>)>>,
    pub(crate) service: RefCell<Option<Rc<ServiceEntry>>>,
    pub(crate) lease: RefCell<Option<Lease>>,
    /// The upstream of the last attempt.
    pub(crate) upstream: RefCell<Option<Arc<Upstream>>>,
    pub(crate) body: RefCell<Option<UpstreamBody>>,
    /// Where the events of an event stream end; `None` for any other answer.
    pub(crate) events: RefCell<Option<Box<Events>>>,
    pub(crate) status: Cell<u16>,
    pub(crate) reason: Cell<Option<Reason>>,
    pub(crate) attempts: Cell<u8>,
    pub(crate) bytes_in: Cell<u64>,
    pub(crate) bytes_out: Cell<u64>,
    pub(crate) head_us: Cell<u64>,
    /// The answer was handed over whole.
    pub(crate) complete: Cell<bool>,
    pub(crate) waits: Cell<Waits>,
    deadline_ms: Cell<u64>,
    timeout_ms: Cell<u32>,
    expired: Cell<bool>,
    closing: Cell<bool>,
    cut: Cell<bool>,
    /// It is a call of gRPC over HTTP/2, whose end can be said in its own terms.
    pub(crate) grpc: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// After this time an exchange is no mere request: a drain gives it more time.
pub(crate) const LONG_AFTER_MS: u64 = 10_000;

/// Requests that one HTTP/2 client may cancel more than it lets be answered, before its connection ends:
/// each has cost an upstream a request already (CVE-2023-44487).
const MAX_CANCELLED: u32 = 200;

/// Ends the flight when it is dropped: held by the request's future, then by the answer's body.
pub(crate) struct FlightGuard(pub(crate) Rc<Flight>);

impl Drop for FlightGuard {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// What is known of a request when its flight begins.
pub(crate) struct Start {
    pub(crate) ids: Ids,
    pub(crate) method: Method,
    pub(crate) version: Version,
    pub(crate) client: std::net::IpAddr,
    pub(crate) host: HostText,
    pub(crate) path: Option<PathAndQuery>,
    pub(crate) agent: Option<Box<(Option<HeaderValue>, Option<HeaderValue>)>>,
}

impl Flight {
    pub(crate) fn begin(core: &Rc<Core>, conn: &Rc<ConnState>, start: Start) -> FlightGuard {
        let flight = Rc::new(Self {
            core: Rc::clone(core),
            conn: Rc::clone(conn),
            slot: Cell::new(0),
            started_us: now_us(),
            ids: start.ids,
            method: start.method,
            version: start.version,
            client: start.client,
            host: RefCell::new(start.host),
            path: start.path,
            agent: start.agent,
            service: RefCell::new(None),
            lease: RefCell::new(None),
            upstream: RefCell::new(None),
            body: RefCell::new(None),
            events: RefCell::new(None),
            status: Cell::new(0),
            reason: Cell::new(None),
            attempts: Cell::new(0),
            bytes_in: Cell::new(0),
            bytes_out: Cell::new(0),
            head_us: Cell::new(0),
            complete: Cell::new(false),
            waits: Cell::new(Waits::Connect),
            deadline_ms: Cell::new(0),
            timeout_ms: Cell::new(0),
            expired: Cell::new(false),
            closing: Cell::new(false),
            cut: Cell::new(false),
            grpc: Cell::new(false),
            waker: RefCell::new(None),
        });
        core.set_now(flight.started_us / 1_000);
        flight.slot.set(core.flights.insert(Rc::clone(&flight)));
        conn.begin();
        FlightGuard(flight)
    }

    // --- waiting ------------------------------------------------------------------------------------

    /// Sets what is waited for from now on, and for how long at most.
    pub(crate) fn wait(&self, waits: Waits, timeout_ms: u32) {
        self.waits.set(waits);
        self.expired.set(false);
        self.timeout_ms.set(timeout_ms);
        self.deadline_ms.set(self.core.coarse_now_ms() + u64::from(timeout_ms));
    }

    /// Notes whom to wake when the wait is over for a reason other than bytes.
    pub(crate) fn note_waker(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Whether the deadline has passed.
    pub(crate) fn is_expired(&self) -> bool {
        self.expired.get()
    }

    /// Whether the soft drain deadline of its class has passed at its upstream: it is to end politely.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.get()
    }

    /// Whether the hard drain deadline of its class has passed at its upstream.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.get()
    }

    /// The reason that a wait which ended by time deserves.
    pub(crate) fn timeout_reason(&self) -> Reason {
        match self.waits.get() {
            Waits::Connect => Reason::ConnectTimeout,
            Waits::RequestBody => Reason::BodyTimeout,
            Waits::UpstreamReads | Waits::Head => Reason::UpstreamTimeout,
            Waits::Body => Reason::UpstreamBodyTimeout,
            Waits::Client | Waits::Tunnel => Reason::ClientStalled,
        }
    }

    /// Called by the timekeeper.
    fn look_at_clock(&self, now_ms: u64) {
        let deadline_ms = self.deadline_ms.get();
        if deadline_ms == 0 || now_ms < deadline_ms || self.expired.get() {
            return;
        }
        if self.waits.get() == Waits::Client && !self.conn.http2.get() {
            // One piece of a body may take a slow client far longer than this; what counts is that bytes flow.
            let extended_ms = self.conn.wrote_ms.get() + u64::from(self.timeout_ms.get());
            if extended_ms > now_ms {
                self.deadline_ms.set(extended_ms);
                return;
            }
        }
        self.expired.set(true);
        if self.waits.get() == Waits::Client {
            self.let_go_of_upstream(Reason::ClientStalled);
            self.conn.kill(Kill::Abort);
        }
        self.wake();
    }

    fn close_now(&self) {
        self.closing.set(true);
        self.wake();
    }

    fn cut_now(&self) {
        self.cut.set(true);
        let stalled = self.waits.get() == Waits::Client;
        let in_body = self.body.borrow().is_some();
        if in_body && (stalled || !self.grpc.get()) {
            self.cut_lease();
            self.let_go_of_upstream(Reason::UpstreamCut);
            if stalled && !self.conn.http2.get() {
                self.conn.kill(Kill::Abort);
            }
        }
        self.wake();
    }

    /// Names this request in the receipt of its upstream as one that was cut.
    pub(crate) fn cut_lease(&self) {
        if let Some(lease) = &mut *self.lease.borrow_mut() {
            lease.cut(self.ids.request.to_str().unwrap_or("-"));
        }
    }

    /// Counts this request in the receipt of its upstream as one that ended politely.
    pub(crate) fn soft_close_lease(&self) {
        if let Some(lease) = &mut *self.lease.borrow_mut() {
            lease.soft_close();
        }
    }

    /// Drops the upstream's half at once, although the client's half may not be able to move.
    fn let_go_of_upstream(&self, reason: Reason) {
        self.reason.set(Some(reason));
        drop(self.body.borrow_mut().take());
        self.release_lease();
    }

    // --- the lease ------------------------------------------------------------------------------------

    pub(crate) fn take_lease(&self, lease: Lease) {
        // What was asked of it at another upstream is over.
        self.closing.set(false);
        *self.upstream.borrow_mut() = Some(Arc::clone(lease.upstream()));
        *self.lease.borrow_mut() = Some(lease);
    }

    pub(crate) fn mark_sent(&self) {
        if let Some(lease) = &mut *self.lease.borrow_mut() {
            lease.mark_sent();
        }
    }

    /// Moves the request to another class. If the time of that class is over already, so is the request's.
    pub(crate) fn reclassify(&self, class: TrafficClass) {
        if class == TrafficClass::Sse {
            *self.events.borrow_mut() = Some(Box::default());
        }
        let mut lease = self.lease.borrow_mut();
        let Some(lease) = &mut *lease else { return };
        lease.reclassify(class);
        let upstream = lease.upstream();
        if upstream.is_class_cut(class) {
            let (core, generation) = (Rc::clone(&self.core), upstream.generation());
            // Later, because whoever has found the class out is at work on the body.
            tokio::task::spawn_local(async move { core.flights.cut(generation, class) });
        } else if upstream.is_closing(class) {
            self.close_now();
        }
    }

    /// Counts an outcome with the upstream of this attempt.
    pub(crate) fn record(&self, outcome: Outcome) {
        if let (Some(upstream), Some(service)) = (&*self.upstream.borrow(), &*self.service.borrow()) {
            upstream.record(outcome, &service.service.policy().passive, self.core.coarse_now_ms());
        }
    }

    /// Counts a failure that became no request of its own.
    pub(crate) fn strike(&self) {
        if let (Some(upstream), Some(service)) = (&*self.upstream.borrow(), &*self.service.borrow()) {
            upstream.strike(&service.service.policy().passive, self.core.coarse_now_ms());
        }
    }

    pub(crate) fn release_lease(&self) {
        if let Some(lease) = self.lease.borrow_mut().take() {
            lease.add_bytes(self.bytes_in.get(), self.bytes_out.get());
        }
    }

    /// Whether it is a call that counts as a stream.
    pub(crate) fn is_grpc_stream(&self) -> bool {
        let lease = self.lease.borrow();
        self.grpc.get() && lease.as_ref().is_some_and(|lease| lease.class() == TrafficClass::GrpcStream)
    }

    /// A call that has gone on for longer than a request should is a stream, also when nothing passes by which
    /// that could have been noticed.
    fn is_silent_stream(&self, now_ms: u64) -> bool {
        self.grpc.get() && now_ms > self.started_us / 1_000 + LONG_AFTER_MS
    }

    /// Whether it holds a lease of this class at this upstream.
    fn is_of(&self, generation: Generation, class: TrafficClass) -> bool {
        let lease = self.lease.borrow();
        lease.as_ref().is_some_and(|l| l.class() == class && l.upstream().generation() == generation)
    }

    pub(crate) fn generation(&self) -> Option<Generation> {
        self.lease.borrow().as_ref().map(|lease| lease.upstream().generation())
    }

    // --- the end --------------------------------------------------------------------------------------

    fn finish(&self) {
        self.judge();
        drop(self.body.borrow_mut().take());
        self.release_lease();
        let now_us = now_us();
        let total_us = now_us - self.started_us;
        self.core.metrics.request(self.service.borrow().as_deref(), self.status.get(), total_us);
        if let Some(reason) = self.reason.get() {
            self.core.metrics.error(reason);
        }
        if let Some(log) = &self.core.log {
            log.push(self, total_us);
        }
        self.core.flights.remove(self.slot.get());
        self.conn.end(now_us / 1_000);
    }

    /// An answer that was not handed over whole, without a known reason: the client has gone.
    fn judge(&self) {
        let cancelled = self.conn.cancelled.get();
        if self.complete.get() || self.reason.get().is_some() {
            self.conn.cancelled.set(cancelled.saturating_sub(1));
            return;
        }
        let leaving = self.core.aborting.get();
        self.reason.set(Some(if leaving { Reason::ShuttingDown } else { Reason::ClientClosed }));
        if self.status.get() == 0 {
            self.status.set(Reason::ClientClosed.status_code());
            if self.lease.borrow().is_some() {
                self.record(Outcome::ClientGone);
            }
            self.conn.cancelled.set(cancelled + 1);
            if self.conn.http2.get() && cancelled >= MAX_CANCELLED {
                tracing::info!(peer = %self.conn.peer, "an HTTP/2 client cancels all of its requests: closed");
                self.conn.kill(Kill::Abort);
            }
        }
        if leaving {
            self.cut_lease();
        }
    }
}

/// All flights of a core.
#[derive(Default)]
pub(crate) struct Flights {
    slots: RefCell<Vec<Option<Rc<Flight>>>>,
    free: RefCell<Vec<usize>>,
}

impl Flights {
    fn insert(&self, flight: Rc<Flight>) -> usize {
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = self.free.borrow_mut().pop() {
            slots[slot] = Some(flight);
            return slot;
        }
        slots.push(Some(flight));
        slots.len() - 1
    }

    fn remove(&self, slot: usize) {
        let gone = self.slots.borrow_mut()[slot].take();
        self.free.borrow_mut().push(slot);
        // Dropped after the borrow has ended.
        drop(gone);
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.borrow().len() - self.free.borrow().len()
    }

    fn snapshot(&self, fit: impl Fn(&Flight) -> bool) -> Vec<Rc<Flight>> {
        self.slots.borrow().iter().flatten().filter(|flight| fit(flight)).map(Rc::clone).collect()
    }

    /// Ends every wait whose deadline has passed.
    pub(crate) fn look_at_clock(&self, now_ms: u64) {
        let due = |flight: &Flight| {
            let deadline_ms = flight.deadline_ms.get();
            deadline_ms != 0 && now_ms >= deadline_ms && !flight.expired.get()
        };
        for flight in self.snapshot(due) {
            flight.look_at_clock(now_ms);
        }
    }

    /// Upstreams with a flight that are retired.
    pub(crate) fn retired_upstreams(&self) -> Vec<Arc<Upstream>> {
        let mut found: Vec<Arc<Upstream>> = Vec::new();
        for flight in self.slots.borrow().iter().flatten() {
            let lease = flight.lease.borrow();
            let Some(upstream) = lease.as_ref().map(Lease::upstream).filter(|u| u.is_retired()) else {
                continue;
            };
            if !found.iter().any(|known| Arc::ptr_eq(known, upstream)) {
                found.push(Arc::clone(upstream));
            }
        }
        found
    }

    /// Asks the flights of a class at an upstream to end politely.
    pub(crate) fn close(&self, generation: Generation, class: TrafficClass) {
        for flight in self.due(generation, class) {
            flight.close_now();
        }
    }

    /// Ends the flights of a class at an upstream.
    pub(crate) fn cut(&self, generation: Generation, class: TrafficClass) {
        for flight in self.due(generation, class) {
            flight.cut_now();
        }
    }

    /// The flights of a class at an upstream. Those that turn out to be of another are moved there.
    fn due(&self, generation: Generation, class: TrafficClass) -> Vec<Rc<Flight>> {
        let mut due = self.snapshot(|flight| flight.is_of(generation, class));
        if class == TrafficClass::Request {
            due.retain(|flight| {
                let is_stream = flight.is_silent_stream(flight.core.coarse_now_ms());
                if is_stream {
                    flight.reclassify(TrafficClass::GrpcStream);
                }
                !is_stream
            });
        }
        due
    }
}
