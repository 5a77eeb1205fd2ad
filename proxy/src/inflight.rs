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
    /// Somebody was asked who its client is, which may have taken a while.
    pub(crate) asked: Cell<bool>,
    pub(crate) attempts: Cell<u8>,
    pub(crate) bytes_in: Cell<u64>,
    pub(crate) bytes_out: Cell<u64>,
    pub(crate) head_us: Cell<u64>,
    /// How long it had to wait because its service was held.
    pub(crate) held_us: Cell<u64>,
    /// The answer was handed over whole.
    pub(crate) complete: Cell<bool>,
    /// When a client that asks too often may come back; 0 if it does not.
    pub(crate) retry_after_s: Cell<u32>,
    pub(crate) waits: Cell<Waits>,
    /// How many more times a stream that its client does not take is waited for.
    patience: Cell<u8>,
    deadline_ms: Cell<u64>,
    timeout_ms: Cell<u32>,
    expired: Cell<bool>,
    /// Bytes of the body that had come at the last look at its pace, if the edge was waiting for more.
    pace_mark: Cell<Option<u64>>,
    closing: Cell<bool>,
    cut: Cell<bool>,
    /// It is a call of gRPC over HTTP/2, whose end can be said in its own terms.
    pub(crate) grpc: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// So many more times as long a stream of HTTP/2 is waited for that its client does not take, while other bytes flow on its
/// connection.
const HTTP2_PATIENCE: u8 = 9;
/// After this time an exchange is no mere request: a drain gives it more time.
pub(crate) const LONG_AFTER_MS: u64 = 10_000;

/// Longest time that anything goes on after a hand-over, also if its service has set none: a process that stays for ever
/// keeps its memory and an old version.
const LONGEST_AFTER_HAND_OVER_MS: u64 = 24 * 3_600_000;

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
            asked: Cell::new(false),
            attempts: Cell::new(0),
            bytes_in: Cell::new(0),
            bytes_out: Cell::new(0),
            head_us: Cell::new(0),
            held_us: Cell::new(0),
            complete: Cell::new(false),
            retry_after_s: Cell::new(0),
            waits: Cell::new(Waits::Connect),
            patience: Cell::new(HTTP2_PATIENCE),
            deadline_ms: Cell::new(0),
            timeout_ms: Cell::new(0),
            expired: Cell::new(false),
            pace_mark: Cell::new(None),
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
        self.patience.set(HTTP2_PATIENCE);
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
        if deadline_ms == 0 || now_ms < deadline_ms {
            return;
        }
        let timeout_ms = u64::from(self.timeout_ms.get());
        let flows_until_ms = self.conn.wrote_ms.get() + timeout_ms;
        let (to_client, flows) = (self.waits.get() == Waits::Client, flows_until_ms > now_ms);
        let http2 = self.conn.http2.get();
        if to_client && !flows && (http2 || !self.expired.get()) {
            self.let_go_of_upstream(Reason::ClientStalled);
            self.conn.kill(Kill::Abort);
        }
        if self.expired.get() {
            return;
        }
        // One piece of a body may take a slow client far longer than this; what counts is that bytes flow. On a connection of
        // HTTP/2 they may be another stream's: then this one has so many times as long.
        let patience = u64::from(self.patience.get());
        if to_client && flows && (!http2 || patience > 0) {
            self.patience.set(self.patience.get().saturating_sub(1));
            self.deadline_ms.set(if http2 { now_ms + timeout_ms } else { flows_until_ms });
            return;
        }
        self.expired.set(true);
        if to_client && flows {
            // The others of its connection go on, and it is broken off when its client takes anything of it (RFC 9113 §5.4.2).
            self.let_go_of_upstream(Reason::ClientStalled);
        }
        self.wake();
    }

    /// Ends a request whose body came slower since the last look, although the edge waited for it at both.
    fn look_at_pace(&self, least_bytes: u64) {
        let waits = self.waits.get() == Waits::RequestBody && !self.grpc.get() && !self.expired.get();
        let bytes = self.bytes_in.get();
        match self.pace_mark.replace(waits.then_some(bytes)) {
            Some(before) if waits && bytes - before < least_bytes => {
                self.expired.set(true);
                self.wake();
            }
            _ => {}
        }
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

    /// From when on what it transfers has taken long.
    pub(crate) fn long_from_ms(&self) -> u64 {
        // Whoever was asked about it may have taken his time.
        let from_ms = if self.asked.get() { self.core.coarse_now_ms() } else { self.started_us / 1_000 };
        from_ms + LONG_AFTER_MS
    }

    /// What a client is told that has to say who it is (RFC 9110 §11.6.1).
    pub(crate) fn challenge(&self) -> Option<HeaderValue> {
        self.service.borrow().as_ref()?.rules.as_ref()?.challenge().cloned()
    }

    /// The service's own page for an answer that the edge makes. Nothing that is filled in needs escaping.
    pub(crate) fn error_page(&self, reason: Reason, request_id: &str) -> Option<bytes::Bytes> {
        let service = self.service.borrow();
        let page = service.as_ref()?.rules.as_ref()?.error_page(reason.status_code())?;
        let status = reason.status_code().to_string();
        let filled = page.html.replace("{status}", &status).replace("{reason}", reason.as_str());
        Some(filled.replace("{request_id}", request_id).into())
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

    /// The class of what has gone on for longer than a request should, also when nothing has passed since then by which
    /// that could have been noticed: a call may be silent, and a slow peer takes its time between two pieces of
    /// a body, because the kernel's buffers run down first.
    fn late_class(&self, now_ms: u64) -> Option<TrafficClass> {
        if now_ms <= self.started_us / 1_000 + LONG_AFTER_MS {
            return None;
        }
        if self.grpc.get() {
            return Some(TrafficClass::GrpcStream);
        }
        let uploads =
            self.bytes_in.get() > 0 && matches!(self.waits.get(), Waits::RequestBody | Waits::UpstreamReads);
        let late = self.body.borrow().as_ref().map(|body| body.late_class);
        late.or_else(|| uploads.then_some(TrafficClass::Transfer))
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
            // What was sent nowhere, because its service is held, has cost nobody anything.
            if self.attempts.get() > 0 || self.asked.get() {
                self.note_cancelled(cancelled);
            }
        }
        if leaving {
            self.cut_lease();
        }
    }

    fn note_cancelled(&self, before: u32) {
        self.conn.cancelled.set(before + 1);
        if self.conn.http2.get() && before >= MAX_CANCELLED {
            tracing::info!(peer = %self.conn.peer, "an HTTP/2 client cancels all of its requests: closed");
            self.conn.kill(Kill::Abort);
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
            // A stream that was let go is there until its client takes something of it, or its connection is silent.
            let let_go = flight.waits.get() == Waits::Client && flight.conn.http2.get();
            deadline_ms != 0 && now_ms >= deadline_ms && (let_go || !flight.expired.get())
        };
        for flight in self.snapshot(due) {
            flight.look_at_clock(now_ms);
        }
    }

    /// Ends requests whose bodies come slower than this. Called every ten seconds.
    pub(crate) fn look_at_pace(&self, least_bytes_per_s: u32) {
        let least_bytes = u64::from(least_bytes_per_s) * 10;
        if least_bytes > 0 {
            for flight in self.snapshot(|flight| {
                flight.waits.get() == Waits::RequestBody || flight.pace_mark.get().is_some()
            }) {
                flight.look_at_pace(least_bytes);
            }
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

    /// Ends what has used up the time that its service gives its class, as it does when an upstream leaves.
    pub(crate) fn look_at_hand_over(&self, since_ms: u64) {
        for flight in self.snapshot(|flight| !flight.cut.get()) {
            let class_now = || flight.lease.borrow().as_ref().map_or(TrafficClass::Held, Lease::class);
            if class_now() == TrafficClass::Request {
                let late = flight.late_class(flight.core.coarse_now_ms());
                late.into_iter().for_each(|class| flight.reclassify(class));
            }
            let class = class_now();
            let time = flight.service.borrow().as_ref().map(|entry| entry.service.policy().drain[class]);
            let Some(time) = time else { continue };
            if since_ms >= time.cut_ms.min(LONGEST_AFTER_HAND_OVER_MS) {
                flight.cut_now();
            } else if since_ms >= time.close_ms && !flight.is_closing() {
                flight.close_now();
            }
        }
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
                let late = flight.late_class(flight.core.coarse_now_ms());
                late.into_iter().for_each(|class| flight.reclassify(class));
                late.is_none()
            });
        }
        due
    }
}
