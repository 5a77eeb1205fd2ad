//! One seed: a world is built, troubled for a while, healed, and looked at when it has come to rest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peregrine_engine::model::{
    BalanceSpec, Control, CutoverSettings, DrainDeadlines, Guards, HealthKind, HealthSpec, HoldThen,
    InstanceState, MachineKind, MachineSpec, MoveSettings, Resources, RolloutState, Route, ServiceSpec,
    TrafficPolicy, WarmSettings, Workload,
};
use peregrine_engine::{Ask, EngineHandle, MoveOverrides, State};
use peregrine_routing::{PoolSpec, table};
use tokio::task::AbortHandle;

use crate::SINGLE_WRITER_FROM;
use crate::book::Book;
use crate::edge::{Answer, Core, HOST, Kind, keep_holds, named};
use crate::engine::{Ground, Process};
use crate::faults;
use crate::life::End;
use crate::link::{self, Wires};
use crate::memory::MemoryStore;
use crate::report::{Faults, Report};
use crate::runtime::machine_name;
use crate::world::{Trouble, World};

/// Longest time from the healing to the rest: three attempts at an undo that waits for a machine, and some.
const MAX_REST_MS: u64 = 400_000;
/// Between two looks whether all is at rest.
const LOOK_MS: u64 = 500;
/// The only service.
const SHOP: &str = "shop";

/// An edge in a process of its own.
struct Away {
    wires: Arc<Wires>,
    core: Core,
    book: Book,
    tasks: Vec<AbortHandle>,
}

/// Everything of one seed.
pub(crate) struct Sim {
    pub(crate) ground: Ground,
    pub(crate) machines: usize,
    process: Mutex<Option<Process>>,
    away: Mutex<Vec<Option<Away>>>,
    spec: ServiceSpec,
    /// Versions deployed so far.
    versions: Mutex<u32>,
}

/// Runs a seed to its end, on a paused clock. With `trace`, also every event as a line.
pub(crate) async fn run(seed: u64, trace: bool) -> (Report, Vec<String>) {
    let mut dice = fastrand::Rng::with_seed(seed);
    let machines = dice.usize(2..=3);
    let world = World::new(seed, machines, trace);
    let apart = world.one_in(2);
    let edges = if apart { usize::try_from(world.between(1, 3)).unwrap_or(1) } else { 0 };
    let cores = if apart { 0 } else { usize::try_from(world.between(1, 2)).unwrap_or(1) };
    let ground = Ground {
        world: world.clone(),
        store: Arc::new(MemoryStore::default()),
        full: Arc::new(AtomicBool::new(false)),
        cores,
        wires: (0..edges).map(|_| Wires::new(&world)).collect(),
        clients: usize::try_from(world.between(1, 3)).unwrap_or(1),
        // In half of the worlds nothing dies that has clients inside: then none of them may notice anything.
        // A single writer cannot promise it: while its only copy is on its way, so are the clients.
        strict: world.one_in(2) && seed < SINGLE_WRITER_FROM,
        clients_on: Arc::new(AtomicBool::new(false)),
    };
    let mut spec = shop(&world);
    if seed >= SINGLE_WRITER_FROM {
        single_writer(&world, &mut spec);
    }
    world.note(format_args!(
        "{machines} machines, {edges} edges apart, {cores} cores, strict: {}",
        ground.strict
    ));
    let sim = Arc::new(Sim {
        ground,
        machines,
        process: Mutex::default(),
        away: Mutex::new((0..edges).map(|_| None).collect()),
        spec,
        versions: Mutex::new(1),
    });
    sim.play().await;
    let virtual_ms = world.elapsed_ms();
    let (mut report, lines) = world.finish();
    report.virtual_ms = virtual_ms;
    (report, lines)
}

impl Sim {
    pub(crate) fn world(&self) -> &World {
        &self.ground.world
    }

    pub(crate) fn is_apart(&self) -> bool {
        self.ground.cores == 0
    }

    async fn play(self: &Arc<Self>) {
        for edge in 0..self.ground.wires.len() {
            self.open_edge(edge);
        }
        self.open_engine().await;
        if let Err(error) = self.set_up().await {
            self.world()
                .violated(format_args!("nothing is wrong, and the service does not come up: {error}"));
            return;
        }
        self.start_clients();
        let trouble = tokio::spawn(faults::trouble(Arc::clone(self)));
        let asks = tokio::spawn(Arc::clone(self).operate());
        let chaos_ms = self.world().between(2_000, 10_000);
        tokio::time::sleep(Duration::from_millis(chaos_ms)).await;
        trouble.abort();
        asks.abort();
        self.heal().await;
        self.rest().await;
    }

    // --- processes --------------------------------------------------------------------------------

    pub(crate) async fn open_engine(&self) {
        match Process::open(&self.ground).await {
            Ok(mut process) => {
                if self.ground.clients_are_on() {
                    process.start_clients(&self.ground);
                }
                *self.process.lock().expect("not poisoned") = Some(process);
            }
            // It needs a commit to begin: whoever keeps it running tries again.
            Err(error) if error.contains("is full") => {
                self.world().note(format_args!("the engine does not open: the store is full"));
            }
            Err(error) => self.world().violated(format_args!("the engine does not open: {error}")),
        }
    }

    pub(crate) fn with_engine<T>(&self, look: impl FnOnce(&mut Process) -> T) -> Option<T> {
        self.process.lock().expect("not poisoned").as_mut().map(look)
    }

    pub(crate) fn kill_engine(&self) {
        if let Some(mut process) = self.process.lock().expect("not poisoned").take() {
            process.kill(self.world());
        }
    }

    fn handle(&self) -> Option<EngineHandle> {
        self.with_engine(|process| process.handle.clone())
    }

    pub(crate) fn open_edge(&self, edge: usize) {
        let world = self.world();
        let (writer, reader) = table();
        let book = Book::new(world);
        let number = world.new_core();
        let strict = self.ground.strict;
        let core = Core { world: world.clone(), number, reader, book: book.clone(), strict };
        let wires = Arc::clone(&self.ground.wires[edge]);
        let keep = keep_holds(world.clone(), core.reader.clone());
        let follow = link::follow(core.clone(), Arc::clone(&wires), writer, book.clone());
        let mut away = Away {
            wires,
            core,
            book,
            tasks: vec![tokio::spawn(follow).abort_handle(), tokio::spawn(keep).abort_handle()],
        };
        if self.ground.clients_are_on() {
            away.start_clients(self.ground.clients);
        }
        self.away.lock().expect("not poisoned")[edge] = Some(away);
    }

    pub(crate) fn kill_edge(&self, edge: usize) {
        let Some(away) = self.away.lock().expect("not poisoned")[edge].take() else { return };
        away.book.check();
        for task in &away.tasks {
            task.abort();
        }
        self.world().drop_idle(away.core.number, |_| true);
    }

    pub(crate) fn edge_is_up(&self, edge: usize) -> bool {
        self.away.lock().expect("not poisoned")[edge].is_some()
    }

    fn start_clients(&self) {
        self.ground.clients_on.store(true, Ordering::SeqCst);
        let ground = self.ground.clone();
        self.with_engine(|process| process.start_clients(&ground));
        for away in self.away.lock().expect("not poisoned").iter_mut().flatten() {
            away.start_clients(self.ground.clients);
        }
    }

    // --- the operator -----------------------------------------------------------------------------

    async fn set_up(&self) -> Result<(), String> {
        let handle = self.handle().ok_or("no engine")?;
        for machine in 0..self.machines {
            let spec = MachineSpec {
                name: machine_name(machine),
                kind: MachineKind::Process,
                address: [10, 0, 0, u8::try_from(machine).unwrap_or(u8::MAX)].into(),
                labels: Default::default(),
            };
            handle.add_machine(spec).await.map_err(|error| error.to_string())?;
        }
        let spec = Box::new(self.spec.clone());
        let ask = Ask::Deploy { spec, machine: Some(machine_name(0)), overrides: MoveOverrides::default() };
        let started = handle.start(ask, "set-up".to_owned(), None, None).await.map_err(|e| e.to_string())?;
        let ended = handle.ended(&started.ok_or("no rollout")?.id).await.map_err(|e| e.to_string())?;
        if ended.state != RolloutState::Succeeded {
            return Err(format!("{:?}", ended.problem));
        }
        // Edges elsewhere hear of it a moment later.
        for _ in 0..100 {
            if self.cores().iter().all(|core| !named(&core.reader.load()).is_empty()) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err("an edge does not hear of it".to_owned())
    }

    async fn operate(self: Arc<Self>) {
        let world = self.world().clone();
        loop {
            world.sleep(50, 1_500).await;
            let Some(handle) = self.handle() else { continue };
            let sim = Arc::clone(&self);
            // An ask that meets a dead engine is never answered.
            let ask = tokio::spawn(async move { sim.ask(&handle).await });
            drop(tokio::time::timeout(Duration::from_millis(3_000), ask).await);
        }
    }

    async fn ask(&self, handle: &EngineHandle) {
        let world = self.world();
        let state = handle.state();
        let running =
            state.rollouts.values().find(|rollout| !rollout.state.is_terminal()).map(|r| r.id.clone());
        drop(state);
        if let Some(id) = running {
            if !world.one_in(3) {
                return;
            }
            world.fault(Faults::OperatorAborts);
            let what = world.below(6);
            let done = match what {
                0 | 1 => handle.abort(&id).await,
                2 => handle.pause(&id).await,
                3 => handle.resume(&id).await,
                4 => handle.promote(&id).await,
                _ => handle.rollback_rollout(&id, None).await,
            };
            world.note(format_args!(
                "operator {what} {id}: {}",
                if done.is_ok() { "heard" } else { "refused" }
            ));
            return;
        }
        let ask = self.draw_ask();
        let text = format!("{ask:?}");
        let text: String = text.chars().take(60).collect();
        let done = handle.start(ask, "simulated".to_owned(), None, None).await;
        let done = match done {
            Ok(Some(rollout)) => rollout.id.to_string(),
            Ok(None) => "settings".to_owned(),
            Err(error) => error.code.to_owned(),
        };
        world.note(format_args!("operator asks {text}: {done}"));
    }

    fn draw_ask(&self) -> Ask {
        let world = self.world();
        let machine = || machine_name(usize::try_from(world.below(self.machines as u64)).unwrap_or(0));
        match world.below(10) {
            0..=4 => {
                let overrides = MoveOverrides::default();
                Ask::Move { service: SHOP.to_owned(), to: machine(), from: None, overrides }
            }
            5 | 6 => {
                let mut versions = self.versions.lock().expect("not poisoned");
                *versions += 1;
                let mut spec = self.spec.clone();
                spec.workload = command(*versions);
                let machine = world.one_in(2).then(machine);
                Ask::Deploy { spec: Box::new(spec), machine, overrides: MoveOverrides::default() }
            }
            7 | 8 => {
                let replicas = u32::try_from(world.between(1, 3)).unwrap_or(1);
                Ask::Scale { service: SHOP.to_owned(), replicas, machine: world.one_in(2).then(machine) }
            }
            _ => Ask::Rollback { service: SHOP.to_owned(), to_version: None },
        }
    }

    // --- the end ----------------------------------------------------------------------------------

    /// Takes every fault away, and lets rollouts that were paused go on.
    async fn heal(&self) {
        let world = self.world();
        {
            let mut inner = world.lock();
            inner.troubles.fill(Trouble::None);
            inner.cut_off.clear();
            inner.bad_version = None;
        }
        self.ground.full.store(false, Ordering::SeqCst);
        for wires in &self.ground.wires {
            wires.cut.store(false, Ordering::SeqCst);
        }
        for edge in 0..self.ground.wires.len() {
            if !self.edge_is_up(edge) {
                self.open_edge(edge);
            }
        }
        let over = self.with_engine(|process| {
            process.life.end_at(End { commit: usize::MAX, after: true }); // not any more
            process.life.is_over()
        });
        if over != Some(false) {
            self.kill_engine();
            self.open_engine().await;
        }
        world.note(format_args!("healed"));
    }

    async fn rest(&self) {
        let world = self.world();
        let begun_ms = world.elapsed_ms();
        loop {
            // Its end was begun before the healing, in a commit that was under way.
            if self.with_engine(|process| process.life.is_over()) == Some(true) {
                self.kill_engine();
                self.open_engine().await;
            }
            let Some(restless) = self.restless().await else { break };
            if world.elapsed_ms() > begun_ms + MAX_REST_MS {
                world.violated(format_args!("no rest: {restless}"));
                break;
            }
            tokio::time::sleep(Duration::from_millis(LOOK_MS)).await;
        }
        for core in self.cores() {
            let answer = core.request(Kind::PROBE).await;
            if self.has_service() && !matches!(answer, Answer::Whole(_)) {
                world.violated(format_args!("at rest, core {} answers {answer:?}", core.number));
            }
        }
        if let Some(state) = self.handle().map(|handle| handle.state()) {
            count_ends(world, &state);
        }
        self.with_engine(|process| process.check());
        for away in self.away.lock().expect("not poisoned").iter().flatten() {
            away.book.check();
        }
    }

    fn has_service(&self) -> bool {
        self.handle().is_some_and(|handle| handle.state().services.contains_key(SHOP))
    }

    fn cores(&self) -> Vec<Core> {
        let mut cores = self.with_engine(|process| process.cores.clone()).unwrap_or_default();
        cores.extend(self.away.lock().expect("not poisoned").iter().flatten().map(|away| away.core.clone()));
        cores
    }

    /// Why it is not at rest yet.
    async fn restless(&self) -> Option<String> {
        let Some(handle) = self.handle() else { return Some("no engine".to_owned()) };
        let state = handle.state();
        if let Some(rollout) = state.rollouts.values().find(|rollout| !rollout.state.is_terminal()) {
            if rollout.control == Control::Pause {
                drop(handle.resume(&rollout.id).await); // it may have turned back meanwhile
            }
            return Some(format!(
                "{} is {:?} in {:?}, waits for {:?}",
                rollout.id, rollout.state, rollout.phase, rollout.waiting_for
            ));
        }
        if let Some(left) = state.rollouts.values().find(|rollout| !rollout.leftovers.is_empty()) {
            return Some(format!("{} has left {:?}", left.id, left.leftovers));
        }
        if !state.journals.is_empty() || !state.changes.is_empty() || !state.aside.is_empty() {
            return Some(format!("the store keeps what belongs to no rollout: {:?}", state.aside));
        }
        self.unlike(&state)
    }

    /// What the store, the machines and the edges do not agree on.
    fn unlike(&self, state: &State) -> Option<String> {
        if let Some(instance) = state.instances.values().find(|i| i.state != InstanceState::Serving) {
            return Some(format!("{} is {:?}", instance.id, instance.state));
        }
        if let Some(service) = state.services.get(SHOP) {
            let copies = state.instances_of(SHOP).count();
            if copies != service.spec.replicas as usize {
                return Some(format!("{copies} copies serve, {} are wanted", service.spec.replicas));
            }
        }
        {
            let inner = self.world().lock();
            for (id, copy) in &inner.copies {
                let known = state.instances.get(id);
                if known.is_none_or(|known| known.machine != machine_name(copy.machine)) {
                    return Some(format!("{id} is an orphan on host-{}", copy.machine));
                }
            }
            for instance in state.instances.values() {
                let there = inner.copies.get(&instance.id).filter(|copy| copy.runs());
                if there.is_none_or(|copy| Some(copy.address) != instance.address) {
                    return Some(format!("{} does not run where the store says", instance.id));
                }
            }
        }
        let waits = |core: &Core| {
            core.reader
                .load()
                .held_services()
                .any(|service| service.hold().is_some_and(|queue| !queue.is_idle()))
        };
        if let Some(core) = self.cores().into_iter().find(waits) {
            return Some(format!("core {} has not released everybody", core.number));
        }
        // An edge that was cut off in the middle of a cutover has the new copy without a share until it hears more.
        let has_no_share = |core: &Core| {
            let mut without = false;
            core.reader.load().for_each_service(|service| {
                let has_share = |pool: &PoolSpec| pool.weight > 0 && !pool.upstreams.is_empty();
                without |= !service.spec().pools.iter().any(has_share);
            });
            without
        };
        if let Some(core) = self.cores().into_iter().find(has_no_share) {
            return Some(format!("core {} gives nobody a share", core.number));
        }
        let serving = state.instances.values().map(|instance| instance.generation).collect();
        let stale = |core: &Core| named(&core.reader.load()) != serving;
        let stale = self.cores().into_iter().find(stale)?;
        Some(format!("core {} does not use the table of the store", stale.number))
    }
}

impl Away {
    fn start_clients(&mut self, clients: usize) {
        for _ in 0..clients {
            self.tasks.push(tokio::spawn(self.core.clone().client()).abort_handle());
        }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        self.wires.cut.store(false, Ordering::SeqCst);
    }
}

fn count_ends(world: &World, state: &State) {
    let mut inner = world.lock();
    for rollout in state.rollouts.values() {
        let end = match rollout.state {
            RolloutState::Succeeded => 0,
            RolloutState::RolledBack => 1,
            RolloutState::Aborted => 2,
            RolloutState::NeedsOperator => 4,
            _ => 3,
        };
        inner.report.ends[end] += 1;
    }
}

fn command(version: u32) -> Workload {
    Workload::Command {
        command: vec![SHOP.to_owned(), version.to_string()],
        directory: None,
        env: Default::default(),
    }
}

/// A service with settings that are drawn, and short: a rollout takes a second or two of virtual time.
fn shop(world: &World) -> ServiceSpec {
    let steps = match world.below(4) {
        0 => vec![100],
        1 => vec![50, 100],
        2 => vec![10, 100],
        _ => vec![1, 10, 50, 100],
    };
    let kind = if world.one_in(6) {
        HealthKind::Http { path: "/healthz".to_owned() }
    } else {
        HealthKind::Tcp // a connection costs the simulation a hundredth of an exchange
    };
    let balance = match world.below(4) {
        0 => BalanceSpec::RoundRobin,
        1 => BalanceSpec::PeakEwma,
        2 => BalanceSpec::ConsistentHash(peregrine_engine::model::HashBy::ClientAddress),
        _ => BalanceSpec::LeastInFlight,
    };
    ServiceSpec {
        name: SHOP.to_owned(),
        routes: vec![Route { host: HOST.to_owned(), path: "/".to_owned() }],
        workload: command(1),
        health: HealthSpec { kind, interval_ms: 500, timeout_ms: 200, healthy: 1, unhealthy: 2 },
        resources: Resources::default(),
        replicas: u32::try_from(world.between(1, 2)).unwrap_or(1),
        traffic: TrafficPolicy { balance, ..TrafficPolicy::default() },
        move_settings: MoveSettings {
            steps,
            step_hold_ms: u32::try_from(world.between(20, 200)).unwrap_or(20),
            step_min_samples: 2,
            step_max_ms: 300,
            // Nobody is there to decide.
            hold_max_ms: 3_000,
            hold_then: if world.one_in(2) { HoldThen::GoOn } else { HoldThen::GoBack },
            guards: Guards { p95_increase: None, ..Guards::default() },
            warm: WarmSettings { probes: 2, probe_interval_ms: 20, paths: Vec::new(), mirror: None },
            start_timeout_ms: 2_000,
            soak_ms: if world.one_in(2) { 0 } else { world.between(100, 2_000) },
            drain: DrainDeadlines {
                request_ms: 400, // longer than any request
                transfer_ms: 1_800,
                sse_ms: world.between(50, 1_000),
                grpc_stream_ms: world.between(50, 1_000),
                websocket_ms: world.between(50, 1_000),
            },
            stop_grace_ms: 500,
            ..MoveSettings::default()
        },
        labels: Default::default(),
    }
}

/// Makes the service one of which one copy runs, with a hold that may be too short and a queue that may be too small.
fn single_writer(world: &World, spec: &mut ServiceSpec) {
    spec.replicas = 1;
    spec.move_settings.single_writer = true;
    let hold_deadline_ms = u32::try_from(world.between(1_000, 6_000)).unwrap_or(1_000);
    spec.move_settings.cutover = CutoverSettings {
        hold_deadline_ms,
        hold_max_requests: u32::try_from(world.between(1, 8)).unwrap_or(1),
        hold_max_age_ms: u32::try_from(world.between(300, 6_000)).unwrap_or(300),
        hold_release_per_s: u32::try_from(world.between(5, 1_000)).unwrap_or(5),
        drain_max_ms: u32::try_from(world.between(50, 800)).unwrap_or(50),
        ..CutoverSettings::default()
    };
}
