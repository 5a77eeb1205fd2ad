//! The world outside of the engine: machines with their copies, the clock, chance, and what is wrong right now.
//! It outlives every engine and every edge, and it knows the truth: who is inside which copy, who executed what.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use peregrine_engine::model::InstanceId;
use peregrine_engine::runtime::InstanceSpec;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::report::{Faults, Report};

/// Wall time at the beginning: any day will do.
const WALL_EPOCH_MS: u64 = 1_700_000_000_000;
/// The edge's clock begins here: it is never 0.
const EDGE_CLOCK_BASE_MS: u64 = 1_000;

/// What is wrong with a machine's runtime right now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing: it answers within milliseconds.
    #[default]
    None,
    /// It refuses connections: nothing is executed.
    Unreachable,
    /// It executes and its answer gets lost: an error, whatever was done.
    Ambiguous,
    /// It never answers. Half of what is asked is executed all the same.
    Hangs,
    /// It executes seconds later.
    Slow,
    /// It says that it failed, and did nothing.
    Fails,
}

/// A copy on a machine.
pub(crate) struct Placed {
    pub(crate) spec: InstanceSpec,
    pub(crate) machine: usize,
    pub(crate) address: SocketAddr,
    /// Told when this process ends; `None` if it has.
    process: Option<Arc<Life>>,
    pub(crate) exit_code: Option<i64>,
    /// Requests inside, each with the core and the generation that it came by.
    inside: BTreeMap<u64, (usize, u64)>,
    /// It answers requests with errors.
    pub(crate) sick: bool,
}

impl Placed {
    pub(crate) const fn runs(&self) -> bool {
        self.process.is_some()
    }
}

/// The life of a process. (A `watch` wakes its receivers in an order of its own choice.)
#[derive(Default)]
struct Life {
    over: AtomicBool,
    told: Notify,
}

impl Life {
    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.told.notify_waiters();
    }

    async fn ended(&self) {
        let told = self.told.notified();
        if !self.over.load(Ordering::SeqCst) {
            told.await;
        }
    }
}

pub(crate) struct Inner {
    pub(crate) rng: fastrand::Rng,
    pub(crate) copies: BTreeMap<InstanceId, Placed>,
    pub(crate) troubles: Vec<Trouble>,
    /// Machines that edges cannot reach.
    pub(crate) cut_off: BTreeSet<usize>,
    /// Of the service at most one copy may run.
    pub(crate) single_writer: bool,
    /// New copies exit at once, or answer with errors.
    pub(crate) bad_version: Option<bool>,
    /// Removed for certain, and when.
    graves: BTreeMap<InstanceId, u64>,
    starts: BTreeMap<(InstanceId, u64), u32>,
    executed: BTreeMap<u64, u32>,
    /// Idle connections of edges' cores, by core and generation.
    idle: BTreeMap<(usize, u64), InstanceId>,
    skew_ms: i64,
    next_port: u16,
    next_id: u64,
    next_token: u64,
    /// Lives of the engine so far.
    pub(crate) term: u64,
    next_core: usize,
    /// The first generation that the present engine has given out, where edges outlive engines: it knows nothing
    /// of those before.
    pub(crate) first_generation: u64,
    /// Cores that the engine does not wait for any more.
    pub(crate) given_up: BTreeSet<usize>,
    trace: fnv::Fnv,
    lines: Option<Vec<String>>,
    pub(crate) report: Report,
}

/// The world. Cheap to clone.
#[derive(Clone)]
pub(crate) struct World {
    begun: Instant,
    inner: Arc<Mutex<Inner>>,
}

mod fnv {
    /// FNV-1a: the hash of a trace has to be the same on every machine and in every version.
    pub(super) struct Fnv(pub(super) u64);

    impl std::hash::Hasher for Fnv {
        fn finish(&self) -> u64 {
            self.0
        }

        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
}

/// What came of asking a copy for a start.
pub(crate) enum Started {
    At(SocketAddr),
    /// It ended at once.
    Exited,
    /// A higher epoch was here.
    Fenced(u64),
}

impl World {
    pub(crate) fn new(seed: u64, machines: usize, trace: bool) -> Self {
        let inner = Inner {
            rng: fastrand::Rng::with_seed(seed),
            copies: BTreeMap::new(),
            troubles: vec![Trouble::None; machines],
            cut_off: BTreeSet::new(),
            single_writer: seed >= crate::SINGLE_WRITER_FROM,
            bad_version: None,
            graves: BTreeMap::new(),
            starts: BTreeMap::new(),
            executed: BTreeMap::new(),
            idle: BTreeMap::new(),
            skew_ms: 0,
            next_port: 10_000,
            next_id: 1,
            next_token: 1,
            term: 0,
            next_core: 0,
            first_generation: 0,
            given_up: BTreeSet::new(),
            trace: fnv::Fnv(0xcbf2_9ce4_8422_2325),
            lines: trace.then(Vec::new),
            report: Report::new(seed),
        };
        Self { begun: Instant::now(), inner: Arc::new(Mutex::new(inner)) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics with the world in hand")
    }

    // --- time and chance --------------------------------------------------------------------------

    /// Milliseconds since the beginning.
    pub(crate) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The edges' monotonic clock.
    pub(crate) fn edge_now_ms(&self) -> u64 {
        EDGE_CLOCK_BASE_MS + self.elapsed_ms()
    }

    /// The time of day, which jumps.
    pub(crate) fn wall_ms(&self) -> u64 {
        let skew_ms = self.lock().skew_ms;
        (WALL_EPOCH_MS + self.elapsed_ms()).saturating_add_signed(skew_ms)
    }

    pub(crate) fn jump(&self, by_ms: i64) {
        self.lock().skew_ms += by_ms;
        self.note(format_args!("clock jumps by {by_ms} ms"));
    }

    /// An id as a UUIDv7 is: by the time of day, so that one after a jump back sorts before its elders.
    pub(crate) fn uuid(&self) -> uuid::Uuid {
        let wall_ms = self.wall_ms();
        let mut inner = self.lock();
        inner.next_id += 1;
        uuid::Uuid::from_u64_pair(wall_ms << 16, inner.next_id)
    }

    pub(crate) fn new_core(&self) -> usize {
        let mut inner = self.lock();
        inner.next_core += 1;
        inner.next_core
    }

    pub(crate) fn below(&self, limit: u64) -> u64 {
        self.lock().rng.u64(0..limit.max(1))
    }

    pub(crate) fn between(&self, from: u64, to: u64) -> u64 {
        self.lock().rng.u64(from..=to)
    }

    pub(crate) fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn bits(&self) -> u64 {
        self.lock().rng.u64(..)
    }

    pub(crate) async fn sleep(&self, from_ms: u64, to_ms: u64) {
        let time = self.between(from_ms, to_ms);
        tokio::time::sleep(Duration::from_millis(time)).await;
    }

    // --- the trace --------------------------------------------------------------------------------

    /// Takes an event into the trace: the same seed gives the same events at the same times.
    /// As `note`, for who reads the trace: no part of what a seed is known by.
    pub(crate) fn explain(&self, detail: impl FnOnce() -> String) {
        let at = self.elapsed_ms();
        if let Some(lines) = &mut self.lock().lines {
            lines.push(format!("{at:>8}   {}", detail()));
        }
    }

    pub(crate) fn note(&self, event: std::fmt::Arguments<'_>) {
        let at = self.elapsed_ms();
        let mut inner = self.lock();
        let text = format!("{at:>8} {event}");
        inner.trace.write(text.as_bytes());
        inner.report.events += 1;
        if let Some(lines) = &mut inner.lines {
            lines.push(text);
        }
    }

    /// An invariant does not hold.
    pub(crate) fn violated(&self, what: std::fmt::Arguments<'_>) {
        let at = self.elapsed_ms();
        self.note(format_args!("VIOLATED {what}"));
        self.lock().report.violations.push(format!("at {at} ms: {what}"));
    }

    pub(crate) fn fault(&self, kind: Faults) {
        self.lock().report.tried(kind);
    }

    pub(crate) fn finish(&self) -> (Report, Vec<String>) {
        let mut inner = self.lock();
        let hash = inner.trace.finish();
        let mut report = std::mem::take(&mut inner.report);
        report.trace_hash = hash;
        (report, inner.lines.take().unwrap_or_default())
    }

    // --- copies -----------------------------------------------------------------------------------

    /// What a runtime does when it is asked to make sure of a copy. `asked_ms` is when it was asked.
    pub(crate) fn start(&self, machine: usize, spec: &InstanceSpec, asked_ms: u64) -> Started {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let others = inner.copies.values().filter(|copy| {
            copy.machine == machine && copy.spec.service == spec.service && copy.spec.id != spec.id
        });
        if let Some(theirs) = others.map(|copy| copy.spec.epoch).max().filter(|theirs| *theirs > spec.epoch) {
            return Started::Fenced(theirs);
        }
        if let Some(copy) = inner.copies.get(&spec.id)
            && copy.runs()
        {
            let elsewhere = copy.machine != machine;
            let address = copy.address;
            if elsewhere {
                inner.report.violations.push(format!("{} was started on two machines", spec.id));
            }
            return Started::At(address);
        }
        let buried_ms = inner.graves.get(&spec.id).copied();
        if inner.single_writer {
            // The old copy is started again on the way back. What was asked before its removal finds nothing to start:
            // see `steps::cutover`.
            if buried_ms.is_some_and(|buried_ms| asked_ms <= buried_ms) {
                return Started::Exited;
            }
        } else if let Some(buried_ms) = buried_ms.filter(|buried_ms| *buried_ms < asked_ms) {
            let text = format!("{} was asked for again after its removal at {buried_ms} ms", spec.id);
            inner.report.violations.push(text);
        }
        let exits = inner.bad_version == Some(true) && spec.version > 1;
        let runs =
            |copy: &&Placed| copy.runs() && copy.spec.service == spec.service && copy.spec.id != spec.id;
        if inner.single_writer
            && !exits
            && let Some(other) = inner.copies.values().find(runs)
        {
            let text = format!("two copies of a single writer run: {} beside {}", spec.id, other.spec.id);
            inner.report.violations.push(text);
        }
        inner.next_port += 1;
        let address =
            SocketAddr::from(([10, 0, 0, u8::try_from(machine).unwrap_or(u8::MAX)], inner.next_port));
        let sick = inner.bad_version == Some(false) && spec.version > 1;
        let placed = Placed {
            spec: spec.clone(),
            machine,
            address,
            process: (!exits).then(Arc::default),
            exit_code: exits.then_some(3),
            inside: BTreeMap::new(),
            sick,
        };
        inner.copies.insert(spec.id.clone(), placed);
        *inner.starts.entry((spec.id.clone(), spec.epoch)).or_default() += 1;
        if exits { Started::Exited } else { Started::At(address) }
    }

    /// What a runtime does when it is asked to remove a copy. Nobody whom a living edge still serves may be inside.
    pub(crate) fn remove(&self, machine: usize, id: &InstanceId) {
        let found = {
            let mut inner = self.lock();
            let here = inner.copies.get(id).is_some_and(|copy| copy.machine == machine);
            let found = here.then(|| inner.copies.remove(id)).flatten();
            let now = self.elapsed_ms();
            inner.graves.insert(id.clone(), now);
            found
        };
        let Some(copy) = found else { return };
        if copy.runs() {
            let cut_off = self.lock().cut_off.contains(&machine);
            let (inside, idle) = {
                let inner = self.lock();
                let answers_for = |core: usize, generation: u64| {
                    generation >= inner.first_generation && !inner.given_up.contains(&core)
                };
                let inside: Vec<_> =
                    copy.inside.values().filter(|(c, g)| answers_for(*c, *g)).copied().collect();
                let idle = inner.idle.iter().filter(|((c, g), of)| *of == id && answers_for(*c, *g));
                let idle: Vec<_> = idle.map(|(by, _)| *by).collect();
                (inside, idle)
            };
            if !inside.is_empty() && !cut_off {
                self.violated(format_args!(
                    "{id} was stopped with requests inside, by core and generation {inside:?}"
                ));
            }
            if !idle.is_empty() {
                self.violated(format_args!(
                    "{id} was stopped with idle connections to it, by core and generation {idle:?}"
                ));
            }
        }
        self.note(format_args!("{id} is removed"));
        if let Some(process) = copy.process {
            process.end();
        }
    }

    /// The process of a copy ends by itself.
    pub(crate) fn kill(&self, id: &InstanceId) {
        let mut inner = self.lock();
        let Some(copy) = inner.copies.get_mut(id) else { return };
        copy.exit_code = Some(137);
        copy.inside.clear();
        if let Some(process) = copy.process.take() {
            process.end();
        }
        inner.idle.retain(|_, of| of != id);
    }

    pub(crate) fn running(&self) -> Vec<InstanceId> {
        self.lock().copies.iter().filter(|(_, copy)| copy.runs()).map(|(id, _)| id.clone()).collect()
    }

    /// Whether something listens at an address, for probes of the engine.
    pub(crate) fn listens(&self, address: SocketAddr) -> Option<bool> {
        let inner = self.lock();
        inner.copies.values().find(|copy| copy.address == address && copy.runs()).map(|copy| copy.sick)
    }

    // --- requests ---------------------------------------------------------------------------------

    /// A connection of an edge to a copy: `None` if nobody listens there, or it cannot be reached.
    pub(crate) fn dial(&self, address: SocketAddr) -> Option<InstanceId> {
        let inner = self.lock();
        let (id, copy) = inner.copies.iter().find(|(_, copy)| copy.address == address && copy.runs())?;
        (!inner.cut_off.contains(&copy.machine)).then(|| id.clone())
    }

    /// A request arrives at a copy and is executed.
    pub(crate) fn visit(&self, id: &InstanceId, by: (usize, u64), request: u64) -> Option<Visit> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.next_token += 1;
        let token = inner.next_token;
        let copy = inner.copies.get_mut(id)?;
        let process = Arc::clone(copy.process.as_ref()?);
        copy.inside.insert(token, by);
        let sick = copy.sick;
        let times = inner.executed.entry(request).or_default();
        *times += 1;
        let times = *times;
        Some(Visit { world: self.clone(), id: id.clone(), token, process, sick, times })
    }

    /// An edge that was given up is waited for again. Who has stayed inside of what was retired meanwhile is what the
    /// cut has made unreachable: the engine will not learn of them.
    pub(crate) fn taken_back(&self, core: usize, named: &BTreeSet<u64>) {
        let mut inner = self.lock();
        if !inner.given_up.remove(&core) {
            return;
        }
        let inside = inner.copies.values_mut().flat_map(|copy| copy.inside.values_mut());
        for (of, generation) in inside.filter(|(of, generation)| *of == core && !named.contains(generation)) {
            (*of, *generation) = (core, 0);
        }
    }

    pub(crate) fn keep_idle(&self, core: usize, generation: u64, id: &InstanceId) {
        let mut inner = self.lock();
        if inner.copies.get(id).is_some_and(Placed::runs) {
            inner.idle.insert((core, generation), id.clone());
        }
    }

    /// A core lets go of its idle connections to generations that pass `leaves`.
    pub(crate) fn drop_idle(&self, core: usize, leaves: impl Fn(u64) -> bool) {
        self.lock().idle.retain(|(of, generation), _| *of != core || !leaves(*generation));
    }
}

/// A request inside a copy, to its end.
pub(crate) struct Visit {
    world: World,
    id: InstanceId,
    token: u64,
    process: Arc<Life>,
    pub(crate) sick: bool,
    /// How often this request has been executed by now.
    pub(crate) times: u32,
}

impl Visit {
    /// Until the copy ends.
    pub(crate) async fn ended(&self) {
        self.process.ended().await;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Some(copy) = self.world.lock().copies.get_mut(&self.id) {
            copy.inside.remove(&self.token);
        }
    }
}
