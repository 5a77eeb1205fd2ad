//! The link between an engine and an edge in another process, by its semantics alone: whole tables with a term and
//! a number go down, again and again until they are acknowledged; what an edge uses and who is still inside comes
//! up. Every message may be lost, doubled, late or overtaken.
//!
//! The engine's own upstreams are kept from being empty by one lease for each edge that may be inside. An edge that
//! was not heard of for [`LEASE_MS`] is not waited for any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peregrine_routing::{
    Acknowledger, Change, Generation, Lease, ServiceSpec, TableReader, TableWriter, TrafficClass, Upstream,
};
use tokio::sync::mpsc;

use crate::book::Book;
use crate::edge::{Core, named};
use crate::life::Life;
use crate::report::Faults;
use crate::world::World;

/// How long an edge is waited for that nobody hears of.
pub(crate) const LEASE_MS: u64 = 3_000;
/// Between two sendings of what is not acknowledged, and between two words of an edge while somebody leaves.
const AGAIN_MS: u64 = 100;
/// Between two words of an edge that has nothing to say.
const HEARTBEAT_MS: u64 = 500;

/// What goes down.
#[derive(Clone)]
pub(crate) struct Down {
    term: u64,
    version: u64,
    services: Arc<Vec<ServiceSpec>>,
    /// Classes whose time is up, by retired generation: closed, cut.
    due: Arc<Vec<(u64, TrafficClass, bool)>>,
}

/// What comes up.
#[derive(Clone)]
pub(crate) struct Up {
    term: u64,
    version: u64,
    inside: BTreeSet<u64>,
}

/// The wires of one edge. They outlive both ends.
pub(crate) struct Wires {
    world: World,
    pub(crate) cut: AtomicBool,
    /// The core at the lower end.
    pub(crate) core: AtomicUsize,
    /// When it was cut last.
    pub(crate) cut_ms: AtomicU64,
    down: Mutex<Option<mpsc::UnboundedSender<Down>>>,
    up: Mutex<Option<mpsc::UnboundedSender<Up>>>,
}

impl Wires {
    pub(crate) fn new(world: &World) -> Arc<Self> {
        Arc::new(Self {
            world: world.clone(),
            cut: AtomicBool::new(false),
            core: AtomicUsize::new(0),
            cut_ms: AtomicU64::new(0),
            down: Mutex::default(),
            up: Mutex::default(),
        })
    }

    fn carry<T: Clone + Send + 'static>(
        self: &Arc<Self>,
        message: &T,
        end: fn(&Self) -> &Mutex<Option<mpsc::UnboundedSender<T>>>,
    ) {
        if self.cut.load(Ordering::SeqCst) {
            return;
        }
        let mut times = 1;
        if self.world.one_in(15) {
            self.world.fault(Faults::LinkLost);
            times = 0;
        } else if self.world.one_in(15) {
            self.world.fault(Faults::LinkDoubled);
            times = 2;
        }
        for _ in 0..times {
            let late_ms = if self.world.one_in(10) { 250 } else { 6 };
            let (wires, message) = (Arc::clone(self), message.clone());
            let late_ms = self.world.between(0, late_ms);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(late_ms)).await;
                if let Some(end) = &*end(&wires).lock().expect("not poisoned") {
                    drop(end.send(message)); // nobody is there any more: it is lost
                }
            });
        }
    }
}

/// What the engine's end knows of an edge.
struct Seat {
    acknowledger: Acknowledger,
    /// One lease for each upstream that the edge may be inside of.
    expected: BTreeMap<u64, (Arc<Upstream>, Lease)>,
    /// The last version that named a generation.
    named_in: BTreeMap<u64, u64>,
}

/// The engine's end, in one life. The edge is known from before: nobody takes the engine's word as acknowledged
/// until the edge was heard, or its time is up.
pub(crate) fn serve(
    world: &World,
    wires: &Arc<Wires>,
    reader: &TableReader,
    life: &Arc<Life>,
) -> tokio::task::AbortHandle {
    let term = world.lock().term;
    let (send, receive) = mpsc::unbounded_channel();
    *wires.up.lock().expect("not poisoned") = Some(send);
    let server = Server {
        world: world.clone(),
        wires: Arc::clone(wires),
        reader: reader.clone(),
        life: Arc::clone(life),
        term,
        seat: Some(Seat {
            acknowledger: reader.register(),
            expected: BTreeMap::new(),
            named_in: BTreeMap::new(),
        }),
        heard_ms: world.elapsed_ms(),
        acknowledged: 0,
    };
    tokio::spawn(server.run(receive)).abort_handle()
}

struct Server {
    world: World,
    wires: Arc<Wires>,
    reader: TableReader,
    life: Arc<Life>,
    term: u64,
    seat: Option<Seat>,
    heard_ms: u64,
    acknowledged: u64,
}

impl Server {
    async fn run(mut self, mut up: mpsc::UnboundedReceiver<Up>) {
        let mut sent = 0;
        loop {
            tokio::select! {
                biased;
                Some(up) = up.recv() => self.hear(&up),
                version = self.reader.newer_than(sent) => { sent = version; self.tell(); }
                () = tokio::time::sleep(Duration::from_millis(AGAIN_MS)) => self.again(),
            }
            if self.life.is_over() {
                return;
            }
        }
    }

    fn again(&mut self) {
        if self.seat.is_some() && self.world.elapsed_ms() > self.heard_ms + LEASE_MS {
            let core = self.wires.core.load(Ordering::SeqCst);
            self.world.note(format_args!("core {core} is given up"));
            self.world.lock().given_up.insert(core);
            self.seat = None;
        }
        let open = self.seat.as_ref().is_none_or(|seat| seat.expected.values().any(|(u, _)| u.is_retired()));
        if open || self.acknowledged < self.reader.load().version() {
            self.tell();
        }
    }

    fn tell(&mut self) {
        let table = self.reader.load();
        if table.version() == 0 {
            return; // the engine is not open yet: an edge keeps what it has
        }
        let mut services = Vec::new();
        let mut upstreams = Vec::new();
        table.for_each_service(|service| {
            services.push(service.spec().clone());
            upstreams.extend(service.upstreams().map(|(_, upstream)| Arc::clone(upstream)));
        });
        let mut due = Vec::new();
        if let Some(seat) = &mut self.seat {
            for upstream in upstreams {
                let generation = upstream.generation().0;
                seat.named_in.insert(generation, table.version());
                // Before the edge hears of it. One that is retired already is not sent any more.
                if !seat.expected.contains_key(&generation)
                    && let Ok(lease) = upstream.enter(TrafficClass::Held)
                {
                    seat.expected.insert(generation, (upstream, lease));
                }
            }
            for (generation, (upstream, _)) in seat.expected.iter().filter(|(_, (u, _))| u.is_retired()) {
                for class in TrafficClass::ALL.into_iter().filter(|class| upstream.is_closing(*class)) {
                    due.push((*generation, class, upstream.is_class_cut(class)));
                }
            }
        }
        let down = Down {
            term: self.term,
            version: table.version(),
            services: Arc::new(services),
            due: Arc::new(due),
        };
        self.wires.carry(&down, |wires| &wires.down);
    }

    fn hear(&mut self, up: &Up) {
        self.heard_ms = self.world.elapsed_ms();
        if self.seat.is_none() {
            let (expected, named_in) = (BTreeMap::new(), BTreeMap::new());
            self.seat = Some(Seat { acknowledger: self.reader.register(), expected, named_in });
            self.tell();
        }
        // An edge that was started again begins with nothing, and says so.
        self.acknowledged = if up.term == self.term { up.version } else { 0 };
        if up.term != self.term {
            return;
        }
        if up.version == self.reader.load().version() {
            self.world.taken_back(self.wires.core.load(Ordering::SeqCst), &named(&self.reader.load()));
        }
        let Some(seat) = &mut self.seat else { return };
        seat.acknowledger.acknowledge(up.version);
        let named_in = &seat.named_in;
        seat.expected.retain(|generation, _| {
            up.inside.contains(generation) || named_in.get(generation).is_some_and(|last| *last >= up.version)
        });
    }
}

/// The edge's end, for the life of its process.
pub(crate) async fn follow(core: Core, wires: Arc<Wires>, mut writer: TableWriter, book: Book) {
    let (send, mut down) = mpsc::unbounded_channel();
    *wires.down.lock().expect("not poisoned") = Some(send);
    wires.core.store(core.number, Ordering::SeqCst);
    let mut have: BTreeMap<Arc<str>, ServiceSpec> = BTreeMap::new();
    let mut applied = (0, 0);
    let mut said_ms = 0;
    let mut last_inside = BTreeSet::new();
    loop {
        tokio::select! {
            biased;
            message = down.recv() => {
                let Some(message) = message else { return };
                if (message.term, message.version) > applied {
                    apply(&core.world, &mut writer, &mut have, &message);
                    core.let_go_late().await;
                    core.let_go();
                    applied = (message.term, message.version);
                    core.world.note(format_args!("core {} uses table {applied:?}", core.number));
                }
                enforce(&writer, &message);
            }
            () = tokio::time::sleep(Duration::from_millis(AGAIN_MS)) => {
                let inside = leaving(&book, &core);
                let quiet = inside == last_inside && core.world.elapsed_ms() < said_ms + HEARTBEAT_MS;
                if quiet {
                    continue;
                }
                last_inside = inside;
            }
        }
        said_ms = core.world.elapsed_ms();
        // Everybody who is inside, of what is retired or not: what is named is expected anyway.
        let up = Up { term: applied.0, version: applied.1, inside: book.inhabited() };
        wires.carry(&up, |wires| &wires.up);
    }
}

fn leaving(book: &Book, core: &Core) -> BTreeSet<u64> {
    let named = named(&core.reader.load());
    book.inhabited().into_iter().filter(|generation| !named.contains(generation)).collect()
}

fn apply(
    world: &World,
    writer: &mut TableWriter,
    have: &mut BTreeMap<Arc<str>, ServiceSpec>,
    message: &Down,
) {
    let mut changes = Vec::new();
    let mut next = BTreeMap::new();
    for spec in message.services.iter() {
        if have.get(&spec.name) != Some(spec) {
            changes.push(Change::Put(spec.clone()));
        }
        next.insert(Arc::clone(&spec.name), spec.clone());
    }
    changes.extend(
        have.keys().filter(|name| !next.contains_key(*name)).map(|name| Change::Remove(Arc::clone(name))),
    );
    if let Err(error) = writer.apply(&changes) {
        world.violated(format_args!("an edge refuses a table of its engine: {error}"));
    }
    *have = next;
}

/// Passes the deadlines of a drain on to those who are inside.
fn enforce(writer: &TableWriter, message: &Down) {
    for (generation, class, cut) in message.due.iter() {
        if let Some(upstream) =
            writer.upstream(Generation(*generation)).filter(|upstream| upstream.is_retired())
        {
            // Politely first, also when both have become due while nobody could tell.
            if *cut && upstream.is_closing(*class) {
                upstream.cut_class(*class);
            }
            upstream.close_class(*class);
        }
    }
}
