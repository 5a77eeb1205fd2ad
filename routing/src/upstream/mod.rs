//! An upstream in one stretch of service: its gate, its leases, its health and its receipt.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU8, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::{Mutex, PoisonError};

use event_listener::{Event, EventListener};

use crate::class::{PerClass, TrafficClass};
use crate::hash::stable_hash;
use crate::outcome::{Outcome, OutcomeCounters, OutcomeCounts};
use crate::spec::{Address, Passive, UpstreamProtocol, UpstreamSpec};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not probed yet, or not probed at all. Usable.
    Unknown,
    /// The last probes were good.
    Healthy,
    /// The last probes were bad. Used only when nothing better is there.
    Unhealthy,
}

const RETIRED: u64 = 1 << 63;
const COUNT: u64 = RETIRED - 1;

/// An upstream with its live state. Shared by all tables that name its generation.
#[derive(Debug)]
pub struct Upstream {
    spec: UpstreamSpec,
    sticky_key: u64,
    /// Bit 63: retired. The rest: leases out. One word, so that entering and retiring are ordered.
    gate: AtomicU64,
    /// Leases out by class, without [`TrafficClass::Request`], which is the gate's count less these.
    in_flight: [AtomicU32; TrafficClass::COUNT],
    completed: [AtomicU64; TrafficClass::COUNT],
    soft_closed: [AtomicU64; TrafficClass::COUNT],
    started: AtomicU64,
    bytes_to_upstream: AtomicU64,
    bytes_to_client: AtomicU64,
    hard_cut: Mutex<Vec<String>>,
    cut: AtomicU8,
    /// Told when the upstream was retired, was cut, or has become empty.
    turned: Event,
    health: AtomicU8,
    ready_since_ms: AtomicU64,
    probe_latency_us: AtomicU64,
    consecutive_failures: AtomicU32,
    ejections: AtomicU32,
    ejected_until_ms: AtomicU64,
    /// Peak-EWMA of the time to the response head: bits of an `f64` in microseconds, and when.
    ewma_us: AtomicU64,
    ewma_at_ms: AtomicU64,
    outcomes: OutcomeCounters,
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
    /// Leases still out, by class.
    pub in_flight: PerClass<u64>,
    /// Body bytes sent to the upstream.
    pub bytes_to_upstream: u64,
    /// Body bytes sent to clients.
    pub bytes_to_client: u64,
}

impl Upstream {
    pub(crate) fn new(spec: UpstreamSpec) -> Self {
        let sticky_key = stable_hash(spec.name.as_bytes());
        Self {
            spec,
            sticky_key,
            gate: AtomicU64::new(0),
            in_flight: Default::default(),
            completed: Default::default(),
            soft_closed: Default::default(),
            started: AtomicU64::new(0),
            bytes_to_upstream: AtomicU64::new(0),
            bytes_to_client: AtomicU64::new(0),
            hard_cut: Mutex::new(Vec::new()),
            cut: AtomicU8::new(0),
            turned: Event::new(),
            health: AtomicU8::new(0),
            ready_since_ms: AtomicU64::new(0),
            probe_latency_us: AtomicU64::new(0),
            consecutive_failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            ejected_until_ms: AtomicU64::new(0),
            ewma_us: AtomicU64::new(0),
            ewma_at_ms: AtomicU64::new(0),
            outcomes: OutcomeCounters::default(),
        }
    }

    /// Identity of this stretch of service.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.spec.generation
    }

    /// Stable name of the copy.
    #[must_use]
    pub const fn name(&self) -> &Arc<str> {
        &self.spec.name
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.spec.address
    }

    /// What it speaks.
    #[must_use]
    pub const fn protocol(&self) -> UpstreamProtocol {
        self.spec.protocol
    }

    /// Relative capacity inside its pool.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.spec.weight.max(1)
    }

    /// Value of a sticky cookie that prefers this copy. It tells nothing about the copy's name.
    #[must_use]
    pub const fn sticky_key(&self) -> u64 {
        self.sticky_key
    }

    // --- the gate ---------------------------------------------------------------------------------

    /// Takes a lease, or tells that the upstream is retired. Wait-free.
    ///
    /// # Errors
    /// [`Draining`] once [`Upstream::retire`] was called: the caller picks again.
    pub fn enter(self: &Arc<Self>, class: TrafficClass) -> Result<Lease, Draining> {
        let before = self.gate.fetch_add(1, AcqRel);
        if before & RETIRED != 0 {
            self.leave_gate();
            return Err(Draining(self.generation()));
        }
        if class != TrafficClass::Request {
            self.in_flight[class.index()].fetch_add(1, Relaxed);
        }
        Ok(Lease { upstream: Arc::clone(self), class, sent: false, end: LeaseEnd::Completed })
    }

    /// Closes the gate, for good. After it returns, no [`Upstream::enter`] succeeds.
    pub fn retire(&self) {
        self.gate.fetch_or(RETIRED, AcqRel);
        self.turned.notify(usize::MAX);
    }

    /// Whether the gate is closed.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.gate.load(Acquire) & RETIRED != 0
    }

    /// Leases out, all classes.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.gate.load(Relaxed) & COUNT
    }

    /// Whether the gate is closed and nobody is inside.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gate.load(Acquire) == RETIRED
    }

    /// Waits until the upstream is retired and empty. Needs no runtime.
    pub async fn drained(&self) {
        self.turned_until(Self::is_empty).await;
    }

    /// Waits until [`Upstream::cut`] is called.
    pub async fn cut_asked(&self) {
        self.turned_until(Self::is_cut).await;
    }

    /// Asks the edges to end what is still inside: the hard deadline has passed. Each request that is
    /// ended so is named by [`Lease::cut`].
    pub fn cut(&self) {
        self.cut.store(1, Release);
        self.turned.notify(usize::MAX);
    }

    /// Whether [`Upstream::cut`] was called.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut.load(Acquire) != 0
    }

    /// A listener for the next turn (retired, cut, empty); read the state after taking it.
    #[must_use]
    pub fn listen(&self) -> EventListener {
        self.turned.listen()
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

    fn leave_gate(&self) {
        let before = self.gate.fetch_sub(1, AcqRel);
        if before == RETIRED | 1 {
            self.turned.notify(usize::MAX);
        }
    }

    /// What this stretch of service amounts to so far.
    #[must_use]
    pub fn receipt(&self) -> DrainReceipt {
        // The gate is read first: what is counted after it can only be more complete.
        let gate = self.gate.load(Acquire);
        let mut in_flight = PerClass(std::array::from_fn(|i| u64::from(self.in_flight[i].load(Acquire))));
        let others = in_flight.total();
        in_flight[TrafficClass::Request] = (gate & COUNT).saturating_sub(others);
        DrainReceipt {
            generation: self.generation(),
            empty: gate == RETIRED,
            started: self.started.load(Acquire),
            completed: PerClass(std::array::from_fn(|i| self.completed[i].load(Acquire))),
            soft_closed: PerClass(std::array::from_fn(|i| self.soft_closed[i].load(Acquire))),
            hard_cut: self.hard_cut.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            in_flight,
            bytes_to_upstream: self.bytes_to_upstream.load(Acquire),
            bytes_to_client: self.bytes_to_client.load(Acquire),
        }
    }

    // --- health -----------------------------------------------------------------------------------

    /// What active probes say.
    #[must_use]
    pub fn health(&self) -> Health {
        match self.health.load(Relaxed) {
            1 => Health::Healthy,
            2 => Health::Unhealthy,
            _ => Health::Unknown,
        }
    }

    /// Sets what active probes say. Coming back to health starts the slow start and ends an ejection.
    pub fn set_health(&self, health: Health, now_ms: u64) {
        let value = match health {
            Health::Unknown => 0,
            Health::Healthy => 1,
            Health::Unhealthy => 2,
        };
        let before = self.health.swap(value, AcqRel);
        if health == Health::Healthy && before != value {
            self.ready_since_ms.store(now_ms, Relaxed);
            self.ejected_until_ms.store(0, Relaxed);
            self.consecutive_failures.store(0, Relaxed);
        }
    }

    /// Time of the last good probe, in microseconds; 0 before the first.
    #[must_use]
    pub fn probe_latency_us(&self) -> u64 {
        self.probe_latency_us.load(Relaxed)
    }

    /// Records how long a good probe took.
    pub fn set_probe_latency_us(&self, latency_us: u64) {
        self.probe_latency_us.store(latency_us, Relaxed);
    }

    /// Until when the upstream is ejected by passive observation; in the past or 0 if it is not.
    #[must_use]
    pub fn ejected_until_ms(&self) -> u64 {
        self.ejected_until_ms.load(Relaxed)
    }

    /// Whether a request should be sent here at all, if there is a choice.
    #[must_use]
    pub fn is_usable(&self, now_ms: u64) -> bool {
        !self.is_retired() && self.health.load(Relaxed) != 2 && self.ejected_until_ms.load(Relaxed) <= now_ms
    }

    /// Weight in thousandths of its own, while the slow start lasts.
    pub(crate) fn ramp_permille(&self, now_ms: u64, slow_start_ms: u32) -> u64 {
        if slow_start_ms == 0 {
            return 1_000;
        }
        let since = self.ready_since_ms.load(Relaxed);
        let age = now_ms.saturating_sub(since);
        if since == 0 || age >= u64::from(slow_start_ms) {
            return 1_000;
        }
        (age * 1_000 / u64::from(slow_start_ms)).max(100)
    }

    // --- outcomes ---------------------------------------------------------------------------------

    /// A reading of the counters.
    #[must_use]
    pub fn outcomes(&self) -> OutcomeCounts {
        self.outcomes.read()
    }

    /// Counts an outcome, learns the latency and ejects the upstream if it keeps failing.
    pub fn record(&self, outcome: Outcome, passive: &Passive, now_ms: u64) {
        self.outcomes.record(outcome);
        match outcome {
            Outcome::Response { status, latency_us } => {
                self.learn_latency(latency_us, now_ms);
                if matches!(status, 502..=504) {
                    self.strike(passive, now_ms);
                } else if self.consecutive_failures.load(Relaxed) != 0 {
                    self.consecutive_failures.store(0, Relaxed);
                    self.ejections.store(0, Relaxed);
                }
            }
            Outcome::Failed(_) => self.strike(passive, now_ms),
            Outcome::ClientGone => {}
        }
    }

    /// Counts a failed attempt that became no request of its own (a dial that a retry made good).
    pub fn strike(&self, passive: &Passive, now_ms: u64) {
        if passive.consecutive_failures == 0 {
            return;
        }
        let strikes = self.consecutive_failures.fetch_add(1, Relaxed) + 1;
        if strikes < passive.consecutive_failures {
            return;
        }
        self.consecutive_failures.store(0, Relaxed);
        let times = u64::from(self.ejections.fetch_add(1, Relaxed)) + 1;
        let ejection_ms =
            (u64::from(passive.base_ejection_ms) * times).min(u64::from(passive.max_ejection_ms));
        self.ejected_until_ms.store(now_ms + ejection_ms, Relaxed);
    }

    /// Peak-EWMA of the time to the response head, decayed to now, in microseconds.
    #[must_use]
    pub fn latency_estimate_us(&self, now_ms: u64) -> f64 {
        let value = f64::from_bits(self.ewma_us.load(Relaxed));
        value * decay(now_ms.saturating_sub(self.ewma_at_ms.load(Relaxed)))
    }

    fn learn_latency(&self, latency_us: u64, now_ms: u64) {
        #[expect(clippy::cast_precision_loss)]
        let sample = latency_us as f64;
        let at = self.ewma_at_ms.swap(now_ms, Relaxed);
        let keep = decay(now_ms.saturating_sub(at));
        let before = f64::from_bits(self.ewma_us.load(Relaxed));
        // A peak is believed at once, an improvement slowly (Finagle's peak-EWMA). Two cores that write
        // at the same time lose one sample, which an estimate can bear and a lock is not worth.
        let next = if sample > before * keep { sample } else { before * keep + sample * (1.0 - keep) };
        self.ewma_us.store(next.to_bits(), Relaxed);
    }
}

/// Time constant of the latency estimate.
const EWMA_TAU_MS: f64 = 10_000.0;

fn decay(elapsed_ms: u64) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let elapsed = elapsed_ms as f64;
    (-elapsed / EWMA_TAU_MS).exp()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeaseEnd {
    Completed,
    SoftClosed,
    Cut,
}

/// The right to use an upstream for one request. It ends when it is dropped: keep it to the last frame
/// of the body, or to the end of the tunnel.
#[derive(Debug)]
#[must_use = "a lease that is dropped at once counts nothing"]
pub struct Lease {
    upstream: Arc<Upstream>,
    class: TrafficClass,
    sent: bool,
    end: LeaseEnd,
}

impl Lease {
    /// The upstream that it is for.
    #[must_use]
    pub const fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The class that it is counted in.
    #[must_use]
    pub const fn class(&self) -> TrafficClass {
        self.class
    }

    /// Says that the request is about to be written. A lease that was never sent leaves no trace in the receipt.
    pub fn mark_sent(&mut self) {
        if !self.sent {
            self.sent = true;
            self.upstream.started.fetch_add(1, Relaxed);
        }
    }

    /// Moves the lease to another class, when the answer shows what the request really is.
    pub fn reclassify(&mut self, class: TrafficClass) {
        if class == self.class {
            return;
        }
        if class != TrafficClass::Request {
            self.upstream.in_flight[class.index()].fetch_add(1, Relaxed);
        }
        if self.class != TrafficClass::Request {
            self.upstream.in_flight[self.class.index()].fetch_sub(1, Relaxed);
        }
        self.class = class;
    }

    /// Counts body bytes.
    pub fn add_bytes(&self, to_upstream: u64, to_client: u64) {
        if to_upstream > 0 {
            self.upstream.bytes_to_upstream.fetch_add(to_upstream, Relaxed);
        }
        if to_client > 0 {
            self.upstream.bytes_to_client.fetch_add(to_client, Relaxed);
        }
    }

    /// Says that the traffic was closed politely because its soft deadline passed.
    pub fn soft_close(&mut self) {
        self.end = LeaseEnd::SoftClosed;
    }

    /// Says that the request was cut at the hard deadline; its id goes into the receipt.
    pub fn cut(&mut self, request_id: &str) {
        if self.end != LeaseEnd::Cut {
            self.end = LeaseEnd::Cut;
            let mut cut = self.upstream.hard_cut.lock().unwrap_or_else(PoisonError::into_inner);
            cut.push(request_id.to_owned());
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let class = self.class.index();
        if self.sent {
            match self.end {
                LeaseEnd::Completed => {
                    self.upstream.completed[class].fetch_add(1, Relaxed);
                }
                LeaseEnd::SoftClosed => {
                    self.upstream.soft_closed[class].fetch_add(1, Relaxed);
                }
                LeaseEnd::Cut => {}
            }
        }
        if self.class != TrafficClass::Request {
            self.upstream.in_flight[class].fetch_sub(1, Relaxed);
        }
        // Last, and with release: whoever sees the gate empty sees all of the counts above.
        self.upstream.leave_gate();
    }
}
