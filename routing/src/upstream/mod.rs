//! An upstream in one stretch of service: its gate, its leases, its health and its receipt.

mod deadlines;
mod gate;
mod keep_alive;
mod lease;
mod remote;
mod vitals;

use std::sync::atomic::{
    AtomicI64, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed},
};
use std::sync::{Arc, Mutex, PoisonError};

use event_listener::{Event, EventListener};

use crate::class::{PerClass, TrafficClass};
use crate::hash::stable_hash;
use crate::mirror::{MirrorCounters, MirrorCounts, MirrorOutcome};
use crate::outcome::{Outcome, OutcomeCounters, OutcomeCounts};
use crate::spec::{Address, Passive, UpstreamProtocol, UpstreamSpec};

use deadlines::Deadlines;
use gate::Gate;
use keep_alive::KeepAlive;
pub use lease::Lease;
use remote::Remote;
pub use remote::{EdgeId, LostEdge, Tally};
use vitals::Vitals;

/// Identity of one stretch of service of one copy. Given out by the engine, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u64);

impl std::fmt::Display for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// The answer of a retired upstream to [`Upstream::enter`]: pick again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("upstream {0} is retired")]
pub struct Draining(pub Generation);

/// What active probes say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// Not probed yet, or not probed at all. Usable.
    #[default]
    Unknown,
    /// The last probes were good.
    Healthy,
    /// The last probes were bad. Used only when nothing better is there.
    Unhealthy,
}

/// An upstream with its live state. Shared by all tables that name its generation.
#[derive(Debug)]
pub struct Upstream {
    generation: Generation,
    name: Arc<str>,
    address: Address,
    protocol: UpstreamProtocol,
    sticky_key: u64,
    gate: Gate,
    /// Leases out by class, without [`TrafficClass::Request`], which is the gate's count less these.
    in_flight: [AtomicU32; TrafficClass::COUNT],
    completed: [AtomicU64; TrafficClass::COUNT],
    soft_closed: [AtomicU64; TrafficClass::COUNT],
    started: AtomicU64,
    bytes_to_upstream: AtomicU64,
    bytes_to_client: AtomicU64,
    hard_cut: Mutex<Vec<(TrafficClass, String)>>,
    retried: AtomicU64,
    deadlines: Deadlines,
    /// Connections that edges have opened ahead and not used yet.
    ready: AtomicI64,
    /// Told when the upstream was retired, when a class of it was closed or cut, when it has become empty,
    /// and when connections were opened ahead.
    turned: Event,
    vitals: Vitals,
    keep_alive: KeepAlive,
    outcomes: OutcomeCounters,
    mirrored: MirrorCounters,
    /// What edges in other processes say. Last, so that what requests touch lies together.
    remote: Remote,
}

/// What an upstream's stretch of service amounted to. `hard_cut` empty is what zero downtime means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainReceipt {
    /// Whose receipt it is.
    pub generation: Generation,
    /// No lease was out when it was written. Only then may the copy be stopped.
    pub empty: bool,
    /// Requests that were sent to the upstream.
    pub started: u64,
    /// Leases that ended by themselves, by class.
    pub completed: PerClass<u64>,
    /// Long-lived traffic that was closed politely at its soft deadline, by class.
    pub soft_closed: PerClass<u64>,
    /// Ids of the requests that were cut at the hard deadline.
    pub hard_cut: Vec<String>,
    /// The class of each of them, in the same order.
    pub hard_cut_classes: Vec<TrafficClass>,
    /// Attempts that failed here and were made again without the client noticing.
    pub retried: u64,
    /// Leases still out, by class.
    pub in_flight: PerClass<u64>,
    /// Body bytes sent to the upstream.
    pub bytes_to_upstream: u64,
    /// Body bytes sent to clients.
    pub bytes_to_client: u64,
    /// Edges that were given up while they may have been inside: what they did after their last word is in no count. One
    /// that comes back is not among them.
    pub lost: Vec<LostEdge>,
}

impl Upstream {
    pub(crate) fn new(spec: &UpstreamSpec) -> Self {
        Self {
            generation: spec.generation,
            name: Arc::clone(&spec.name),
            address: spec.address.clone(),
            protocol: spec.protocol,
            sticky_key: stable_hash(spec.name.as_bytes()),
            gate: Gate::default(),
            in_flight: Default::default(),
            completed: Default::default(),
            soft_closed: Default::default(),
            started: AtomicU64::new(0),
            bytes_to_upstream: AtomicU64::new(0),
            bytes_to_client: AtomicU64::new(0),
            hard_cut: Mutex::new(Vec::new()),
            retried: AtomicU64::new(0),
            deadlines: Deadlines::default(),
            ready: AtomicI64::new(0),
            turned: Event::new(),
            vitals: Vitals::default(),
            keep_alive: KeepAlive::default(),
            outcomes: OutcomeCounters::default(),
            mirrored: MirrorCounters::default(),
            remote: Remote::default(),
        }
    }

    /// Whether `spec` names the same copy in the same place. Its weight is the pool's matter.
    pub(crate) fn is_same_copy(&self, spec: &UpstreamSpec) -> bool {
        self.name == spec.name && self.address == spec.address && self.protocol == spec.protocol
    }

    /// Identity of this stretch of service.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Stable name of the copy.
    #[must_use]
    pub const fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// What it speaks.
    #[must_use]
    pub const fn protocol(&self) -> UpstreamProtocol {
        self.protocol
    }

    /// Value of a sticky cookie that prefers this copy. It tells nothing about the copy's name.
    #[must_use]
    pub const fn sticky_key(&self) -> u64 {
        self.sticky_key
    }

    // --- the gate ---------------------------------------------------------------------------------

    /// Takes a lease, or tells that the upstream is retired. Lock-free.
    ///
    /// # Errors
    /// [`Draining`] once [`Upstream::retire`] was called: the caller picks again.
    pub fn enter(self: &Arc<Self>, class: TrafficClass) -> Result<Lease, Draining> {
        if self.gate.enter() {
            Ok(Lease::new(Arc::clone(self), class))
        } else {
            Err(Draining(self.generation))
        }
    }

    /// Closes the gate, for good. After it returns, no [`Upstream::enter`] succeeds.
    pub fn retire(&self) {
        self.gate.retire();
        self.turned.notify(usize::MAX);
    }

    /// Whether the gate is closed.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.gate.state().retired
    }

    /// Leases out, all classes, at every edge.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let elsewhere = self.remote.sum().map_or(0, |sum| sum.tally.in_flight.total());
        self.in_flight_here() + elsewhere
    }

    /// Leases out at the edge in this process: one load, for the request path.
    pub(crate) fn in_flight_here(&self) -> u64 {
        self.gate.state().inside
    }

    /// Whether the gate is closed and nobody is inside, at no edge. Once true, it stays so, unless an edge that was
    /// given up comes back.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gate.state().is_drained() && self.remote.is_empty()
    }

    /// Waits until the upstream is retired and empty. Needs no runtime.
    pub async fn drained(&self) {
        self.turned_until(Self::is_empty).await;
    }

    // --- the deadlines of a drain -----------------------------------------------------------------

    /// Asks the edges to end what is inside of a class politely, where its protocol has a way to: the soft
    /// deadline of the class has passed. What was ended so is told by [`Lease::soft_close`].
    pub fn close_class(&self, class: TrafficClass) {
        self.deadlines.close(class);
        self.turned.notify(usize::MAX);
    }

    /// Whether [`Upstream::close_class`] was called for a class, or it was cut.
    #[must_use]
    pub fn is_closing(&self, class: TrafficClass) -> bool {
        self.deadlines.is_closing(class)
    }

    /// Asks the edges to end what is still inside of a class: its hard deadline has passed. Each request
    /// that is ended so is named by [`Lease::cut`].
    pub fn cut_class(&self, class: TrafficClass) {
        self.deadlines.cut(class);
        self.turned.notify(usize::MAX);
    }

    /// Whether [`Upstream::cut_class`] was called for a class.
    #[must_use]
    pub fn is_class_cut(&self, class: TrafficClass) -> bool {
        self.deadlines.is_cut(class)
    }

    /// Waits until a class is cut.
    pub async fn class_cut_asked(&self, class: TrafficClass) {
        self.turned_until(|upstream| upstream.is_class_cut(class)).await;
    }

    /// Cuts every class.
    pub fn cut(&self) {
        TrafficClass::ALL.into_iter().for_each(|class| self.deadlines.cut(class));
        self.turned.notify(usize::MAX);
    }

    /// Whether every class is cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        TrafficClass::ALL.into_iter().all(|class| self.deadlines.is_cut(class))
    }

    /// Waits until every class is cut.
    pub async fn cut_asked(&self) {
        self.turned_until(Self::is_cut).await;
    }

    /// A listener for the next turn (retired, closed, cut, empty, connections opened ahead); read the state
    /// after taking it.
    #[must_use]
    pub fn listen(&self) -> EventListener {
        self.turned.listen()
    }

    // --- connections opened ahead -----------------------------------------------------------------

    /// Counts connections that an edge has opened ahead of any request (positive), and those of them that
    /// were used or closed (negative). An HTTP/2 connection counts for all that the core was asked for.
    pub fn note_ready(&self, delta: i64) {
        self.ready.fetch_add(delta, Relaxed);
        self.turned.notify(usize::MAX);
    }

    /// Connections that are open ahead and were not used yet, over all cores of all edges.
    #[must_use]
    pub fn ready_connections(&self) -> u64 {
        let elsewhere = self.remote.sum().map_or(0, |sum| sum.tally.ready_connections);
        self.ready_here() + elsewhere
    }

    fn ready_here(&self) -> u64 {
        u64::try_from(self.ready.load(Acquire)).unwrap_or(0)
    }

    async fn turned_until(&self, reached: impl Fn(&Self) -> bool) {
        loop {
            if reached(self) {
                return;
            }
            let listener = self.turned.listen();
            if reached(self) {
                return;
            }
            listener.await;
        }
    }

    fn begin(&self, class: TrafficClass) {
        if class != TrafficClass::Request {
            self.in_flight[class.index()].fetch_add(1, Relaxed);
        }
    }

    fn finish(&self, class: TrafficClass) {
        if class != TrafficClass::Request {
            self.in_flight[class.index()].fetch_sub(1, Relaxed);
        }
    }

    fn leave(&self) {
        if self.gate.leave() {
            self.turned.notify(usize::MAX);
        }
    }

    fn list_cut(&self, class: TrafficClass, request_id: &str) {
        let mut cut = self.hard_cut.lock().unwrap_or_else(PoisonError::into_inner);
        cut.push((class, request_id.to_owned()));
    }

    /// Counts an attempt that failed here and is made again.
    pub fn note_retried(&self) {
        self.retried.fetch_add(1, Relaxed);
    }

    /// What this stretch of service amounts to so far, over all edges.
    #[must_use]
    pub fn receipt(&self) -> DrainReceipt {
        let mut receipt = self.receipt_here();
        let Some(sum) = self.remote.sum() else { return receipt };
        receipt.empty = self.is_empty();
        receipt.started += sum.tally.started;
        receipt.retried += sum.tally.retried;
        receipt.completed.add(&sum.tally.completed);
        receipt.soft_closed.add(&sum.tally.soft_closed);
        receipt.in_flight.add(&sum.tally.in_flight);
        receipt.bytes_to_upstream += sum.tally.bytes_to_upstream;
        receipt.bytes_to_client += sum.tally.bytes_to_client;
        for (class, id) in sum.tally.hard_cut {
            receipt.hard_cut.push(id);
            receipt.hard_cut_classes.push(class);
        }
        receipt.lost = sum.lost;
        receipt
    }

    fn receipt_here(&self) -> DrainReceipt {
        // The gate is read first: what is counted after it can only be more complete.
        let gate = self.gate.state();
        let mut in_flight = PerClass(std::array::from_fn(|i| u64::from(self.in_flight[i].load(Acquire))));
        let others = in_flight.total();
        in_flight[TrafficClass::Request] = gate.inside.saturating_sub(others);
        let cut = self.hard_cut.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (hard_cut_classes, hard_cut) = cut.into_iter().unzip();
        DrainReceipt {
            generation: self.generation,
            empty: gate.is_drained(),
            started: self.started.load(Acquire),
            completed: PerClass(std::array::from_fn(|i| self.completed[i].load(Acquire))),
            soft_closed: PerClass(std::array::from_fn(|i| self.soft_closed[i].load(Acquire))),
            hard_cut,
            hard_cut_classes,
            retried: self.retried.load(Acquire),
            in_flight,
            bytes_to_upstream: self.bytes_to_upstream.load(Acquire),
            bytes_to_client: self.bytes_to_client.load(Acquire),
            lost: Vec::new(),
        }
    }

    // --- health -----------------------------------------------------------------------------------

    /// What active probes say: the worst of what any edge has found.
    #[must_use]
    pub fn health(&self) -> Health {
        let elsewhere = self.remote.sum().map_or(Health::Unknown, |sum| sum.tally.health);
        remote::worse(self.health_here(), elsewhere)
    }

    /// What the probes of the edge in this process say.
    #[must_use]
    pub fn health_here(&self) -> Health {
        self.vitals.health()
    }

    /// Sets what active probes say. Coming back to health starts the slow start and ends an ejection.
    pub fn set_health(&self, health: Health, now_ms: u64) {
        self.vitals.set_health(health, now_ms);
    }

    /// Time of the last good probe, in microseconds; 0 before the first. Of several edges the longest.
    #[must_use]
    pub fn probe_latency_us(&self) -> u64 {
        let elsewhere = self.remote.sum().map_or(0, |sum| sum.tally.probe_latency_us);
        self.vitals.probe_latency_us.load(Relaxed).max(elsewhere)
    }

    /// Records how long a good probe took.
    pub fn set_probe_latency_us(&self, latency_us: u64) {
        self.vitals.probe_latency_us.store(latency_us, Relaxed);
    }

    /// Until when the upstream is ejected by passive observation, at any edge; in the past or 0 if it is not.
    #[must_use]
    pub fn ejected_until_ms(&self) -> u64 {
        let elsewhere = self.remote.sum().map_or(0, |sum| sum.tally.ejected_until_ms);
        self.vitals.ejected_until_ms.load(Relaxed).max(elsewhere)
    }

    /// Whether a request should be sent here at all, if there is a choice.
    #[must_use]
    pub fn is_usable(&self, now_ms: u64) -> bool {
        !self.is_retired() && self.vitals.is_well(now_ms)
    }

    /// Weight in thousandths of its own, while the slow start lasts.
    pub(crate) fn ramp_permille(&self, now_ms: u64, slow_start_ms: u32) -> u64 {
        self.vitals.ramp_permille(now_ms, slow_start_ms)
    }

    // --- idle connections -------------------------------------------------------------------------

    /// Says that a connection was seen open after it had been idle for so long.
    pub fn note_idle_open(&self, idle_ms: u64) {
        self.keep_alive.note_open(idle_ms);
    }

    /// Says that a connection was found closed by the upstream after it had been idle for so long.
    pub fn note_idle_closed(&self, idle_ms: u64, now_ms: u64) {
        self.keep_alive.note_closed(idle_ms, now_ms);
    }

    /// Says how long the upstream promises to keep an idle connection (`Keep-Alive: timeout`).
    pub fn note_idle_announced(&self, timeout_ms: u32) {
        self.keep_alive.note_announced(timeout_ms);
    }

    /// Idle time below which a connection may be trusted with a request that must not be sent twice: half of
    /// what the upstream is known to keep connections for, 0 while nothing is known.
    #[must_use]
    pub fn trusted_idle_ms(&self, now_ms: u64) -> u64 {
        self.keep_alive.trusted_ms(now_ms)
    }

    /// Takes over what is known of another copy of the same service.
    pub(crate) fn inherit(&self, other: &Self) {
        self.keep_alive.inherit(&other.keep_alive);
    }

    // --- outcomes ---------------------------------------------------------------------------------

    /// A reading of the counters, over all edges.
    #[must_use]
    pub fn outcomes(&self) -> OutcomeCounts {
        let mut outcomes = self.outcomes.read();
        if let Some(sum) = self.remote.sum() {
            outcomes.add(&sum.tally.outcomes);
        }
        outcomes
    }

    /// Counts an outcome, learns the latency and ejects the upstream if it keeps failing.
    pub fn record(&self, outcome: Outcome, passive: &Passive, now_ms: u64) {
        self.outcomes.record(outcome);
        match outcome {
            Outcome::Response { status, latency_us } => {
                self.vitals.learn_latency(latency_us, now_ms);
                if matches!(status, 502..=504) {
                    self.strike(passive, now_ms);
                } else {
                    self.vitals.clear_strikes(now_ms);
                }
            }
            Outcome::Failed(_) => self.strike(passive, now_ms),
            Outcome::ClientGone => {}
        }
    }

    /// Counts a failed attempt that became no request of its own (a dial that a retry made good).
    pub fn strike(&self, passive: &Passive, now_ms: u64) {
        self.vitals.strike(passive, now_ms);
    }

    /// Peak-EWMA of the time to the response head, decayed to now, in microseconds; 0 before the first answer.
    #[must_use]
    pub fn latency_estimate_us(&self, now_ms: u64) -> f64 {
        self.vitals.latency_estimate_us(now_ms)
    }

    // --- copies of requests -----------------------------------------------------------------------

    /// Counts a copy of a request that is about to be written here.
    pub fn note_mirrored(&self) {
        self.mirrored.note_sent();
    }

    /// Counts how a copy of a request ended, or why there is none. It says nothing about health.
    pub fn record_mirrored(&self, outcome: MirrorOutcome) {
        self.mirrored.record(outcome);
    }

    /// A reading of what was mirrored here, over all edges.
    #[must_use]
    pub fn mirrored(&self) -> MirrorCounts {
        let mut counts = self.mirrored.read().map_or_else(MirrorCounts::default, |counts| *counts);
        if let Some(elsewhere) = self.remote.sum().and_then(|sum| sum.tally.mirrored) {
            counts.add(&elsewhere);
        }
        counts
    }

    // --- edges in other processes -----------------------------------------------------------------

    /// What the edge in this process has to say of it to the engine in another.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let receipt = self.receipt_here();
        Tally {
            started: receipt.started,
            completed: receipt.completed,
            soft_closed: receipt.soft_closed,
            in_flight: receipt.in_flight,
            bytes_to_upstream: receipt.bytes_to_upstream,
            bytes_to_client: receipt.bytes_to_client,
            retried: receipt.retried,
            hard_cut: receipt.hard_cut_classes.into_iter().zip(receipt.hard_cut).collect(),
            outcomes: self.outcomes.read(),
            ready_connections: self.ready_here(),
            health: self.health_here(),
            ejected_until_ms: self.vitals.ejected_until_ms.load(Relaxed),
            probe_latency_us: self.vitals.probe_latency_us.load(Relaxed),
            mirrored: self.mirrored.read(),
        }
    }

    /// False if that edge has let go of it for good.
    pub(crate) fn expect_edge(&self, id: EdgeId, name: &Arc<str>) -> bool {
        self.remote.expect(id, name)
    }

    /// True if that edge was lost inside, and is expected again from now on.
    pub(crate) fn take_edge_back(&self, id: EdgeId) -> bool {
        self.remote.take_back(id)
    }

    pub(crate) fn report_of(&self, id: EdgeId, tally: Tally, from_before: bool) {
        if self.remote.report(id, tally, from_before) {
            self.turned.notify(usize::MAX);
        }
    }

    pub(crate) fn let_go_of(&self, id: EdgeId) {
        self.remote.let_go(id);
        self.turned.notify(usize::MAX);
    }

    pub(crate) fn left_by(&self, id: EdgeId) {
        self.remote.leave(id);
        self.turned.notify(usize::MAX);
    }

    pub(crate) fn lose_edge(&self, id: EdgeId) {
        self.remote.lose(id);
        self.turned.notify(usize::MAX);
    }
}
