//! What one core of the edge owns: its view of the table, its pools, its flights, its clock.
//!
//! A core is one thread with one runtime. Nothing in it is shared with another core except what the
//! routing room shares (upstreams with their counters) and the control side of the edge, so nothing on
//! the request path takes a lock, but for the queue of a service that is held and the passwords of one that has some.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::hash::BuildHasherDefault;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Version};
use hyper::client::conn::http2;
use hyper::rt::Executor;
use hyper_util::rt::TokioTimer;
use peregrine_routing::{
    Acknowledger, CachedReader, Generation, PerClass, Service, TableReader, TrafficClass, Upstream,
};

use crate::access_log::CoreLog;
use crate::clock::now_ms;
use crate::config::Config;
use crate::conn::{ConnState, Kill};
use crate::http1::{HeadLimits, SpareBuffers};
use crate::ids::{IdMaker, Random};
use crate::inflight::Flights;
use crate::metrics::{CoreMetrics, ServiceMetrics};
use crate::mirror::Mirrors;
use crate::overload::Overload;
use crate::pool::{GenerationHasher, Pools};
use crate::rates::Rates;
use crate::recent::RecentRoutes;
use crate::resolve::Resolver;
use crate::rules;
use crate::sources::Sources;
use crate::splice::Splicer;
use crate::tls::CoreTls;

/// How often the timekeeper looks at deadlines: the precision of every time-out.
const TICK: Duration = Duration::from_millis(100);
/// Ticks between two looks at idle connections to upstreams.
const SWEEP_TICKS: u32 = 3;
/// After a hand-over a client's idle connection is kept for so long for one more request: if it were closed at once, its
/// next request might be on its way.
const LAST_REQUEST_WITHIN_MS: u64 = 10_000;
/// A client's connection of HTTP/1.1 that is idle for so long lets go of what only requests need.
const REST_AFTER_MS: u64 = 1_000;
/// Ticks between two looks at how fast request bodies come.
const PACE_TICKS: u32 = 100;

/// Runs hyper's tasks on this core.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// A service in the version of the table that this core uses, with its metrics.
pub(crate) struct ServiceEntry {
    pub(crate) service: Arc<Service>,
    pub(crate) metrics: Rc<ServiceMetrics>,
    pub(crate) rules: Option<Box<rules::Ready>>,
}

type ServiceCache = HashMap<usize, Rc<ServiceEntry>, BuildHasherDefault<GenerationHasher>>;

/// What bounds all cores together; `None` where nothing is configured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guards {
    pub(crate) sources: Option<Arc<Sources>>,
    pub(crate) overload: Option<Arc<Overload>>,
    pub(crate) rates: Arc<Rates>,
    pub(crate) passwords: Arc<rules::Passwords>,
}

impl Guards {
    pub(crate) fn new(limits: &crate::config::Limits) -> Self {
        let most = limits.max_connections_per_source;
        let (v4, v6) = (limits.source_v4_prefix_bits, limits.source_v6_prefix_bits);
        Self {
            sources: (most > 0).then(|| Sources::new(most, v4, v6)),
            overload: (limits.max_memory_bytes > 0).then(|| Overload::new(limits.max_memory_bytes)),
            rates: Arc::default(),
            passwords: Arc::default(),
        }
    }
}

/// One core of the edge.
pub(crate) struct Core {
    pub(crate) config: Arc<Config>,
    pub(crate) via: Via,
    pub(crate) reader: RefCell<CachedReader>,
    pub(crate) pools: Pools,
    pub(crate) mirrors: Mirrors,
    /// Servers that decide on requests.
    pub(crate) authorities: rules::Authorities,
    /// Answers that are being compressed.
    pub(crate) compressing: Rc<Cell<u32>>,
    pub(crate) flights: Flights,
    pub(crate) conns: Conns,
    pub(crate) metrics: CoreMetrics,
    pub(crate) log: Option<CoreLog>,
    pub(crate) random: Random,
    pub(crate) ids: IdMaker,
    pub(crate) resolver: Resolver,
    pub(crate) head_limits: HeadLimits,
    pub(crate) http2: http2::Builder<LocalExecutor>,
    /// No new requests: connections end after the one they have.
    pub(crate) draining: Cell<bool>,
    /// Since when somebody else accepts; 0 while nobody does.
    handed_over_ms: Cell<u64>,
    /// The time for a shutdown is over: what still runs is broken off.
    pub(crate) aborting: Cell<bool>,
    clock_ms: Rc<Cell<u64>>,
    /// Room in which small answers are put together.
    pub(crate) joined: Rc<RefCell<Vec<u8>>>,
    /// Read buffers for answers.
    pub(crate) spares: SpareBuffers,
    /// Pipes for large answers.
    pub(crate) splicer: Rc<Splicer>,
    pub(crate) tls: CoreTls,
    services: RefCell<ServiceCache>,
    pub(crate) recent: RecentRoutes,
    pub(crate) guards: Guards,
}

/// The values of `Via` that this edge adds, by the protocol that a message was received in.
pub(crate) struct Via {
    pub(crate) http10: HeaderValue,
    pub(crate) http11: HeaderValue,
    pub(crate) http2: HeaderValue,
}

impl Via {
    pub(crate) const fn of(&self, version: Version) -> &HeaderValue {
        match version {
            Version::HTTP_10 => &self.http10,
            Version::HTTP_2 => &self.http2,
            _ => &self.http11,
        }
    }

    fn new(name: &str) -> Self {
        let value = |version: &str| {
            HeaderValue::from_str(&format!("{version} {name}"))
                .unwrap_or_else(|_| HeaderValue::from_static("1.1 proxy"))
        };
        Self { http10: value("1.0"), http11: value("1.1"), http2: value("2.0") }
    }
}

impl Core {
    pub(crate) fn new(
        config: Arc<Config>,
        table: &TableReader,
        resolver: Resolver,
        log: Option<CoreLog>,
        guards: Guards,
        tls: CoreTls,
    ) -> Rc<Self> {
        let clock_ms = Rc::new(Cell::new(now_ms()));
        let limits = &config.limits;
        // An answer's head may be as large as a request's.
        let head_limits =
            HeadLimits { bytes: limits.max_header_bytes as usize, fields: limits.max_headers as usize };
        let mut http2 = http2::Builder::new(LocalExecutor);
        http2
            .timer(TokioTimer::new())
            .initial_stream_window_size(limits.http2_stream_window_bytes)
            .initial_connection_window_size(limits.http2_connection_window_bytes)
            .max_header_list_size(limits.max_header_bytes);
        Rc::new(Self {
            via: Via::new(&config.via_name),
            reader: RefCell::new(table.cached()),
            pools: Pools::new(Rc::clone(&clock_ms)),
            mirrors: Mirrors::default(),
            authorities: rules::Authorities::default(),
            compressing: Rc::default(),
            flights: Flights::default(),
            conns: Conns::default(),
            metrics: CoreMetrics::new(),
            log,
            random: Random::new(),
            ids: IdMaker::new(),
            resolver,
            head_limits,
            http2,
            draining: Cell::new(false),
            handed_over_ms: Cell::new(0),
            aborting: Cell::new(false),
            clock_ms,
            joined: Rc::default(),
            spares: SpareBuffers::default(),
            splicer: Splicer::new(),
            tls,
            services: RefCell::default(),
            recent: RecentRoutes::default(),
            guards,
            config,
        })
    }

    /// The time of the last request or tick, whichever was later: at most one tick behind.
    pub(crate) fn coarse_now_ms(&self) -> u64 {
        self.clock_ms.get()
    }

    pub(crate) fn set_now(&self, now_ms: u64) {
        self.clock_ms.set(now_ms);
    }

    pub(crate) fn clock(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.clock_ms)
    }

    /// This core's entry for a service of the current table. The cache is emptied when the table
    /// changes; until then an entry keeps its service alive, so its address is its name.
    pub(crate) fn entry(&self, service: &Arc<Service>) -> Rc<ServiceEntry> {
        let key = Arc::as_ptr(service) as usize;
        if let Some(entry) = self.services.borrow().get(&key) {
            return Rc::clone(entry);
        }
        let metrics = self.metrics.service(service.name());
        let entry =
            Rc::new(ServiceEntry { service: Arc::clone(service), metrics, rules: rules::Ready::of(service) });
        self.services.borrow_mut().insert(key, Rc::clone(&entry));
        entry
    }

    /// Keeps time: deadlines, idle connections, batches for the log and the metrics.
    pub(crate) async fn keep_time(self: Rc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut count = 0_u32;
        loop {
            ticks.tick().await;
            let now_ms = now_ms();
            self.set_now(now_ms);
            self.flights.look_at_clock(now_ms);
            self.conns.look_at_clock(now_ms, &self.config.limits);
            if self.handed_over_ms.get() > 0 {
                self.look_at_hand_over(now_ms);
            }
            count = count.wrapping_add(1);
            if count.is_multiple_of(SWEEP_TICKS) {
                self.pools.sweep();
                self.mirrors.end_those_that_are_over(now_ms);
                self.mirrors.sweep();
                self.authorities.sweep(now_ms);
            }
            if count.is_multiple_of(PACE_TICKS) {
                self.flights.look_at_pace(self.config.limits.min_request_body_bytes_per_s);
            }
            let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
            self.metrics.flush(self.flights.len(), (self.conns.len(), self.conns.at_rest.get()), tasks);
            self.tls.flush();
            if let Some(log) = &self.log {
                log.flush();
                self.metrics.log_dropped(log.take_dropped());
            }
        }
    }

    /// Follows the table: lets go of what it has retired, then acknowledges it.
    pub(crate) async fn follow_table(self: Rc<Self>, table: TableReader, acknowledger: Acknowledger) {
        let mut version = 0;
        acknowledger.acknowledge(self.reader.borrow_mut().load().version());
        let mut watched: Vec<Generation> = Vec::new();
        loop {
            version = table.newer_than(version).await;
            let _ = self.reader.borrow_mut().load();
            self.services.borrow_mut().clear();
            self.recent.clear();
            self.pools.drop_retired();
            self.mirrors.end_those_that_are_over(self.coarse_now_ms());
            let retired = self.flights.retired_upstreams();
            watched.retain(|known| retired.iter().any(|upstream| upstream.generation() == *known));
            for upstream in retired {
                if !watched.contains(&upstream.generation()) {
                    watched.push(upstream.generation());
                    tokio::task::spawn_local(watch_deadlines(Rc::downgrade(&self), upstream));
                }
            }
            acknowledger.acknowledge(version);
            self.open_ahead();
        }
    }

    /// Opens the connections that the table wants to be there before the first request. Once for each
    /// version of the table, beside everything else.
    fn open_ahead(self: &Rc<Self>) {
        let table = Arc::clone(self.reader.borrow_mut().load());
        for service in table.ready_services() {
            if service.policy().send_proxy_protocol.is_some() {
                continue; // nobody knows for whom it would be
            }
            for (upstream, count) in service.ready_upstreams() {
                let pool = self.pools.of(upstream, service.policy());
                tokio::task::spawn_local(pool.open_ahead(Rc::clone(self), Arc::clone(upstream), count));
            }
        }
    }

    fn look_at_hand_over(&self, now_ms: u64) {
        let since_ms = self.handed_over_ms.get();
        self.conns.leave(now_ms, since_ms);
        self.flights.look_at_hand_over(now_ms.saturating_sub(since_ms));
    }

    /// Somebody else accepts from now on. Nobody is sent away: a connection of HTTP/1.1 ends with its next answer, or when
    /// it has none to wait for for a while; one of HTTP/2 is told to take its next requests elsewhere; what takes long may
    /// do so until the deadline of its class.
    pub(crate) fn hand_over(self: &Rc<Self>) {
        self.draining.set(true);
        self.handed_over_ms.set(now_ms());
    }

    /// Ends what it can end politely.
    pub(crate) fn drain(&self) {
        self.draining.set(true);
        self.conns.kill_all(Kill::Drain);
    }
}

/// Ends the requests of a retired upstream, class by class, as the deadlines of their classes pass.
async fn watch_deadlines(core: Weak<Core>, upstream: Arc<Upstream>) {
    let (mut closing, mut cut) = (PerClass::<bool>::default(), PerClass::<bool>::default());
    loop {
        let turn = upstream.listen();
        let Some(core) = core.upgrade() else { return };
        for class in TrafficClass::ALL {
            if upstream.is_class_cut(class) && !std::mem::replace(&mut cut[class], true) {
                core.flights.cut(upstream.generation(), class);
            } else if upstream.is_closing(class) && !std::mem::replace(&mut closing[class], true) {
                core.flights.close(upstream.generation(), class);
            }
        }
        drop(core);
        // What moves into a class later is judged there, see `Flight::reclassify`.
        if cut.0.iter().all(|cut| *cut) || upstream.is_empty() {
            return;
        }
        turn.await;
    }
}

/// All client connections of a core.
#[derive(Default)]
pub(crate) struct Conns {
    slots: RefCell<Vec<Option<Rc<ConnState>>>>,
    free: RefCell<Vec<usize>>,
    /// Told when a connection has ended.
    ended: tokio::sync::Notify,
    /// How many have nothing in memory but the socket and its session.
    pub(crate) at_rest: Cell<usize>,
}

/// A connection's place among the others; ends with its task.
pub(crate) struct ConnPlace {
    core: Rc<Core>,
    slot: usize,
}

impl Drop for ConnPlace {
    fn drop(&mut self) {
        let conns = &self.core.conns;
        drop(conns.slots.borrow_mut()[self.slot].take());
        conns.free.borrow_mut().push(self.slot);
        conns.ended.notify_waiters();
    }
}

impl ConnPlace {
    /// Puts another state in this place: what is known of the peer has changed.
    pub(crate) fn replace(&self, conn: &Rc<ConnState>) {
        self.core.conns.slots.borrow_mut()[self.slot] = Some(Rc::clone(conn));
    }
}

impl Conns {
    pub(crate) fn add(core: &Rc<Core>, conn: &Rc<ConnState>) -> ConnPlace {
        let conns = &core.conns;
        let mut slots = conns.slots.borrow_mut();
        let slot = conns.free.borrow_mut().pop().unwrap_or_else(|| {
            slots.push(None);
            slots.len() - 1
        });
        slots[slot] = Some(Rc::clone(conn));
        ConnPlace { core: Rc::clone(core), slot }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.borrow().len() - self.free.borrow().len()
    }

    /// Waits until there are so few. Everybody who waits is told: one alone might not want to know any more.
    pub(crate) async fn fewer_than(&self, limit: usize) {
        loop {
            let ended = self.ended.notified();
            if self.len() < limit {
                return;
            }
            ended.await;
        }
    }

    fn look_at_clock(&self, now_ms: u64, limits: &crate::config::Limits) {
        let due: Vec<(Rc<ConnState>, Kill)> = {
            let slots = self.slots.borrow();
            slots
                .iter()
                .flatten()
                .filter_map(|conn| Some((Rc::clone(conn), due(conn, now_ms, limits)?)))
                .collect()
        };
        for (conn, how) in due {
            conn.kill(how);
        }
    }

    /// Has clients go elsewhere, each when it does it no harm. Again and again: a connection may have become known as one of
    /// HTTP/2, or idle, just now.
    fn leave(&self, now_ms: u64, handed_over_ms: u64) {
        let goes = |conn: &&Rc<ConnState>| {
            if conn.http2.get() {
                // Before its first request it may still be at its handshake, which it would not survive.
                return conn.served.get() && !conn.draining.get();
            }
            let since_ms = conn.idle_since_ms.get().max(conn.wrote_ms.get()).max(handed_over_ms);
            let idle_ms = now_ms.saturating_sub(since_ms);
            conn.in_flight.get() == 0 && conn.head_since_ms.get() == 0 && idle_ms >= LAST_REQUEST_WITHIN_MS
        };
        let all: Vec<_> = self.slots.borrow().iter().flatten().filter(goes).map(Rc::clone).collect();
        for conn in all {
            conn.kill(Kill::Drain);
        }
    }

    fn kill_all(&self, how: Kill) {
        let all: Vec<_> = self.slots.borrow().iter().flatten().map(Rc::clone).collect();
        for conn in all {
            conn.kill(how);
        }
    }
}

fn due(conn: &ConnState, now_ms: u64, limits: &crate::config::Limits) -> Option<Kill> {
    if conn.in_flight.get() > 0 {
        return None;
    }
    let head_since_ms = conn.head_since_ms.get();
    if conn.handshaking.get() {
        let over = now_ms.saturating_sub(head_since_ms) >= u64::from(limits.handshake_timeout_ms);
        return (over && !conn.awaits_certificate.get()).then_some(Kill::Abort);
    }
    if head_since_ms != 0 && now_ms.saturating_sub(head_since_ms) >= u64::from(limits.head_timeout_ms) {
        return Some(Kill::HeadTimeout);
    }
    // The end of the last answer may still be on its way to a slow client.
    let idle_ms = now_ms.saturating_sub(conn.idle_since_ms.get().max(conn.wrote_ms.get()));
    if head_since_ms != 0 {
        return None;
    }
    if idle_ms >= u64::from(limits.idle_timeout_ms) {
        return Some(Kill::Idle);
    }
    (idle_ms >= REST_AFTER_MS && !conn.resting.get() && !conn.http2.get() && conn.can_rest())
        .then_some(Kill::Rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(conn: &ConnState) -> Kill {
        conn.asked(&std::task::Context::from_waker(std::task::Waker::noop()))
    }

    #[test]
    fn a_connection_that_was_idle_for_long_has_its_time_for_one_more_request_after_a_hand_over() {
        let [peer, local] = ["192.0.2.1:5", "192.0.2.9:80"].map(|text| text.parse().expect("an address"));
        let conn = ConnState::new(peer, local, false, 1_000);
        conn.head_since_ms.set(0);
        conn.served.set(true);
        let conns = Conns { slots: RefCell::new(vec![Some(Rc::clone(&conn))]), ..Conns::default() };
        let handed_over_ms = 50_000;
        for (now_ms, expected) in
            [(50_100, Kill::No), (59_999, Kill::No), (handed_over_ms + LAST_REQUEST_WITHIN_MS, Kill::Drain)]
        {
            conns.leave(now_ms, handed_over_ms);
            assert_eq!(asked(&conn), expected, "{now_ms}");
        }
    }
}
