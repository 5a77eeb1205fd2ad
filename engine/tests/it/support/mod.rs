//! A whole engine in a test: real HTTP instances on loopback, a small edge that uses the table, faults at will.

pub(crate) mod edge;
pub(crate) mod instance;
pub(crate) mod life;
pub(crate) mod memory;
pub(crate) mod runtime;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_engine::model::{
    DockerEndpoint, HealthKind, HealthSpec, Instance, InstanceState, MachineKind, MachineSpec, MoveSettings,
    Resources, Rollout, RolloutState, Route, ServiceSpec, TrafficPolicy, WarmSettings, Workload,
};
use peregrine_engine::store::{SqliteStore, Store, StoreError};
use peregrine_engine::{Ask, Engine, EngineConfig, EngineHandle, MoveOverrides, State};

use edge::Edge;
use life::{Life, MortalStore};
use memory::MemoryStore;
use runtime::{FakeRuntime, World};

/// Longest time that a test waits for a state.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Opens the store in a folder. The last task of an engine that was shut down there lets go of it when it has ended.
pub(crate) async fn open_store(folder: &Path) -> Arc<SqliteStore> {
    let begun = Instant::now();
    loop {
        match SqliteStore::open(folder) {
            Err(StoreError::Locked) if begun.elapsed() < PATIENCE => tokio::task::yield_now().await,
            opened => return Arc::new(opened.expect("the store opens")),
        }
    }
}

pub(crate) const HOST: &str = "shop.test";

/// One stretch of an engine's life, on a world and a store that outlive it.
pub(crate) struct Bench {
    pub(crate) world: Arc<World>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) life: Arc<Life>,
    pub(crate) engine: EngineHandle,
    pub(crate) edge: Edge,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    running: Option<tokio::task::JoinHandle<()>>,
}

impl Bench {
    /// Two machines, `host-a` and `host-b`, and nothing on them.
    pub(crate) async fn new() -> Self {
        let bench =
            Self::open(World::new(&["host-a", "host-b"]), Arc::new(MemoryStore::default()), Life::new())
                .await;
        for name in ["host-a", "host-b"] {
            bench.engine.add_machine(machine(name)).await.expect("a machine can be added");
        }
        bench
    }

    /// With the first version of the shop on `host-a`.
    pub(crate) async fn with_shop() -> Self {
        let bench = Self::new().await;
        bench.deploy(shop(), Some("host-a")).await;
        bench
    }

    /// Two Docker machines, `host-a` and `host-b`, and an image of the shop on the first.
    pub(crate) async fn with_image() -> Self {
        let world = World::new(&["host-a", "host-b"]);
        world.put_image("host-a", "shop:1", "sha256:1");
        let bench = Self::open(world, Arc::new(MemoryStore::default()), Life::new()).await;
        for name in ["host-a", "host-b"] {
            let mut spec = machine(name);
            spec.kind =
                MachineKind::Docker { endpoint: DockerEndpoint::Unix { path: "/run/docker.sock".into() } };
            bench.engine.add_machine(spec).await.expect("a machine can be added");
        }
        bench
    }

    pub(crate) async fn open(world: Arc<World>, store: Arc<dyn Store>, life: Arc<Life>) -> Self {
        Self::open_with(world, store, life, 300).await
    }

    /// With another grace for instances that nobody knows.
    pub(crate) async fn open_with(
        world: Arc<World>,
        store: Arc<dyn Store>,
        life: Arc<Life>,
        orphan_grace_ms: u64,
    ) -> Self {
        let (writer, reader) = peregrine_routing::table();
        let edge = Edge::new(reader);
        let mortal = Arc::new(MortalStore::new(Arc::clone(&store), Arc::clone(&life)));
        let config = EngineConfig {
            edge_clock: Arc::new(edge::now_ms),
            reconcile_interval_ms: 100,
            orphan_grace_ms,
            unreachable_patience_ms: 500,
            ..EngineConfig::default()
        };
        let (of, mortality) = (Arc::clone(&world), Arc::clone(&life));
        let connect: peregrine_engine::Connect = Arc::new(move |machine| {
            Arc::new(FakeRuntime::new(Arc::clone(&of), machine.spec.name.clone(), Arc::clone(&mortality)))
        });
        let (engine, handle) = Engine::open(config, mortal, connect, writer).await.expect("the engine opens");
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(engine.run(async {
            let _ = stopped.await;
        }));
        Self { world, store, life, engine: handle, edge, stop: Some(stop), running: Some(running) }
    }

    /// As after kill -9: nothing of this life does anything any more; the world and the store are as they are.
    pub(crate) fn crash(&self) {
        self.life.end();
        self.edge.stop();
    }

    /// A new engine on the same store and the same world.
    pub(crate) async fn reopened(&self) -> Self {
        Self::open(Arc::clone(&self.world), Arc::clone(&self.store), Life::new()).await
    }

    pub(crate) async fn shut_down(mut self) -> (Arc<World>, Arc<dyn Store>) {
        drop(self.stop.take());
        if let Some(running) = self.running.take() {
            tokio::time::timeout(PATIENCE, running)
                .await
                .expect("the engine stops")
                .expect("without a panic");
        }
        self.edge.stop();
        (Arc::clone(&self.world), Arc::clone(&self.store))
    }

    pub(crate) async fn deploy(&self, spec: ServiceSpec, machine: Option<&str>) -> Rollout {
        let ask = Ask::Deploy {
            spec: Box::new(spec),
            machine: machine.map(str::to_owned),
            overrides: MoveOverrides::default(),
        };
        self.done(ask).await
    }

    /// Starts, and expects it to succeed.
    pub(crate) async fn done(&self, ask: Ask) -> Rollout {
        let ended = self.ended(ask).await;
        assert_eq!(ended.state, RolloutState::Succeeded, "{:?} {:?}", ended.problem, ended.leftovers);
        ended
    }

    pub(crate) async fn ended(&self, ask: Ask) -> Rollout {
        let started = self.start(ask).await;
        self.end_of(&started).await
    }

    pub(crate) async fn start(&self, ask: Ask) -> Rollout {
        let started = self.engine.start(ask, "test".to_owned(), None, None).await;
        started.expect("the rollout is accepted").expect("it needs a rollout")
    }

    pub(crate) async fn end_of(&self, rollout: &Rollout) -> Rollout {
        match tokio::time::timeout(PATIENCE, self.engine.ended(&rollout.id)).await {
            Ok(ended) => ended.expect("the rollout is known"),
            Err(_) => panic!("the rollout has not ended: {:#?}", self.engine.state().rollouts[&rollout.id]),
        }
    }

    /// Waits until the rollout says so.
    pub(crate) async fn until(
        &self,
        rollout: &Rollout,
        what: &str,
        reached: impl Fn(&Rollout) -> bool,
    ) -> Rollout {
        until(what, || {
            self.engine.state().rollouts.get(&rollout.id).filter(|r| reached(r)).map(|r| Rollout::clone(r))
        })
        .await
    }

    pub(crate) fn serving(&self) -> Vec<Instance> {
        let state = self.engine.state();
        state.instances_of("shop").filter(|i| i.state == InstanceState::Serving).cloned().collect()
    }

    /// What has to hold when nothing is under way: every copy that is known serves and runs, and nothing else runs.
    pub(crate) async fn assert_tidy(&self, copies: usize) {
        until("the store and the machines to agree", || {
            let state = self.engine.state();
            let known: Vec<_> = state.instances.values().collect();
            let serving =
                known.iter().all(|i| i.state == InstanceState::Serving && self.world.runs(&i.machine, &i.id));
            let fine = known.len() == copies
                && serving
                && self.world.inventory().len() == copies
                && state.services.values().all(|service| service.rollout.is_none())
                && state.journals.is_empty()
                && state.changes.is_empty()
                && state.aside.is_empty();
            fine.then_some(())
        })
        .await;
    }
}

/// Polls a state with a deadline.
pub(crate) async fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, look).await
}

pub(crate) async fn until_within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < limit, "waited {limit:?} for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) fn machine(name: &str) -> MachineSpec {
    MachineSpec {
        name: name.to_owned(),
        kind: MachineKind::Process,
        address: [127, 0, 0, 1].into(),
        labels: Default::default(),
    }
}

/// A shop with quick settings, so that a move takes a tenth of a second.
pub(crate) fn shop() -> ServiceSpec {
    ServiceSpec {
        name: "shop".to_owned(),
        routes: vec![Route { host: HOST.to_owned(), path: "/".to_owned() }],
        workload: Workload::Command {
            command: vec!["shop".to_owned()],
            directory: None,
            env: Default::default(),
        },
        health: HealthSpec {
            kind: HealthKind::Http { path: "/healthz".to_owned() },
            interval_ms: 100,
            timeout_ms: 500,
            healthy: 1,
            unhealthy: 3,
        },
        resources: Resources::default(),
        replicas: 1,
        traffic: TrafficPolicy::default(),
        move_settings: MoveSettings {
            step_hold_ms: 5,
            step_min_samples: 1,
            step_max_ms: 20,
            warm: WarmSettings { probes: 1, probe_interval_ms: 5, paths: Vec::new(), mirror: None },
            start_timeout_ms: 5_000,
            ..MoveSettings::default()
        },
        labels: Default::default(),
    }
}

/// The shop as an image.
pub(crate) fn shop_image(image: &str) -> ServiceSpec {
    let mut spec = shop();
    spec.workload = Workload::Image {
        image: image.to_owned(),
        port: 80,
        command: None,
        env: Default::default(),
        capabilities: Default::default(),
    };
    spec
}

/// The shop as another version.
pub(crate) fn shop_version(name: &str) -> ServiceSpec {
    let mut spec = shop();
    spec.workload = Workload::Command {
        command: vec!["shop".to_owned(), name.to_owned()],
        directory: None,
        env: Default::default(),
    };
    spec
}

pub(crate) fn move_to(machine: &str) -> Ask {
    Ask::Move {
        service: "shop".to_owned(),
        to: machine.to_owned(),
        from: None,
        overrides: MoveOverrides::default(),
    }
}

/// A move whose first step holds until it is told: each step waits for samples that do not come.
pub(crate) fn slow_move_to(machine: &str, soak_ms: u64) -> Ask {
    let overrides = MoveOverrides { soak_ms: Some(soak_ms), ..MoveOverrides::default() };
    Ask::Move { service: "shop".to_owned(), to: machine.to_owned(), from: None, overrides }
}

pub(crate) fn machines_of(state: &State) -> Vec<String> {
    state.instances_of("shop").map(|instance| instance.machine.clone()).collect()
}
