//! A runtime whose instances are HTTP servers in the test process, with faults at will.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use peregrine_engine::model::InstanceId;
use peregrine_engine::runtime::{
    ImageInfo, InstanceSpec, InstanceStats, InstanceStatus, LogLine, LogOptions, Progress, Runtime,
    RuntimeError, RuntimeInfo,
};

use super::instance::{Behaviour, Running, Seen};
use super::life::Life;

/// All machines with what runs on them. Outlives every engine.
#[derive(Default)]
pub(crate) struct World {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    machines: BTreeMap<String, Machine>,
    /// What every instance that ever ran has seen.
    seen: BTreeMap<InstanceId, Arc<Seen>>,
    /// Most copies of a service that ever ran at one moment.
    most: BTreeMap<String, usize>,
}

#[derive(Default)]
struct Machine {
    faults: Faults,
    instances: BTreeMap<InstanceId, Placed>,
    architecture: String,
    images: BTreeMap<String, ImageInfo>,
    calls: BTreeMap<&'static str, u32>,
}

struct Placed {
    spec: InstanceSpec,
    running: Option<Running>,
    exit_code: Option<i64>,
}

/// What goes wrong on a machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) unreachable: bool,
    /// Verbs that fail so many times.
    pub(crate) fail: BTreeMap<&'static str, u32>,
    /// Verbs that never answer.
    pub(crate) hang: BTreeSet<&'static str>,
    /// New instances exit at once with this code.
    pub(crate) exit_at_start: Option<i64>,
    /// New instances answer `/healthz` with this.
    pub(crate) health_status: Option<u16>,
    /// New instances answer everything else with this.
    pub(crate) status: Option<u16>,
    /// New instances take so long.
    pub(crate) delay_ms: Option<u64>,
    /// New instances take so long for `/healthz`.
    pub(crate) health_delay_ms: Option<u64>,
    /// The highest epoch that the machine has seen of any service.
    pub(crate) epoch_seen: u64,
    /// Copies that start end their connections after each answer.
    pub(crate) closes: bool,
    /// Copies that are told to end still run and answer for so long, whether somebody waits for it or not.
    pub(crate) exits_after_ms: u64,
}

impl World {
    pub(crate) fn new(machines: &[&str]) -> Arc<Self> {
        let world = Arc::new(Self::default());
        for name in machines {
            let machine = Machine { architecture: "amd64".to_owned(), ..Machine::default() };
            world.lock().machines.insert((*name).to_owned(), machine);
        }
        world
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("not poisoned")
    }

    pub(crate) fn faults(&self, machine: &str, change: impl FnOnce(&mut Faults)) {
        change(&mut self.lock().machines.get_mut(machine).expect("a known machine").faults);
    }

    pub(crate) fn runs(&self, machine: &str, id: &InstanceId) -> bool {
        self.lock().machines[machine].instances.get(id).is_some_and(|copy| copy.running.is_some())
    }

    /// Everything on every machine, running or not.
    pub(crate) fn inventory(&self) -> Vec<(String, InstanceId)> {
        let inner = self.lock();
        let all = inner
            .machines
            .iter()
            .flat_map(|(name, m)| m.instances.keys().map(move |id| (name.clone(), id.clone())));
        all.collect()
    }

    /// Kills an instance as the kernel would.
    pub(crate) fn kill(&self, id: &InstanceId) {
        for machine in self.lock().machines.values_mut() {
            if let Some(copy) = machine.instances.get_mut(id) {
                if let Some(running) = copy.running.take() {
                    running.kill();
                }
                copy.exit_code = Some(137);
            }
        }
    }

    pub(crate) fn behaviour(&self, id: &InstanceId) -> Arc<Behaviour> {
        let inner = self.lock();
        let copy =
            inner.machines.values().find_map(|machine| machine.instances.get(id)).expect("it is there");
        Arc::clone(&copy.running.as_ref().expect("it runs").behaviour)
    }

    /// What an instance has seen, whether it is still there or not.
    pub(crate) fn seen(&self, id: &InstanceId) -> Arc<Seen> {
        Arc::clone(&self.lock().seen[id])
    }

    pub(crate) fn all_seen(&self) -> Vec<Arc<Seen>> {
        self.lock().seen.values().cloned().collect()
    }

    /// An instance that nobody knows, with the label of an installation.
    pub(crate) async fn plant(&self, machine: &str, install: &str) -> InstanceId {
        let id = InstanceId::generate();
        self.plant_as(machine, install, &id).await;
        id
    }

    /// An instance of this id, behind the engine's back.
    pub(crate) async fn plant_as(&self, machine: &str, install: &str, id: &InstanceId) {
        let running = Running::start(Arc::default(), Arc::default()).await;
        let mut spec = blank_spec(id);
        spec.install = install.to_owned();
        let copy = Placed { spec, running: Some(running), exit_code: None };
        self.lock().machines.get_mut(machine).expect("a known machine").instances.insert(id.clone(), copy);
    }

    /// What a runtime was told of an instance that is there.
    pub(crate) fn spec(&self, machine: &str, id: &InstanceId) -> InstanceSpec {
        self.lock().machines[machine].instances[id].spec.clone()
    }

    /// Most copies of a service that ever ran at one moment.
    pub(crate) fn most_at_once(&self, service: &str) -> usize {
        self.lock().most.get(service).copied().unwrap_or(0)
    }

    pub(crate) fn calls(&self, machine: &str, verb: &str) -> u32 {
        self.lock().machines[machine].calls.get(verb).copied().unwrap_or(0)
    }
}

fn blank_spec(id: &InstanceId) -> InstanceSpec {
    InstanceSpec {
        install: String::new(),
        id: id.clone(),
        service: "stranger".to_owned(),
        version: 1,
        epoch: 1,
        run: peregrine_engine::runtime::Run::Process { command: vec!["x".to_owned()], directory: None },
        env: BTreeMap::new(),
        resources: Default::default(),
        publish: [127, 0, 0, 1].into(),
    }
}

pub(crate) struct FakeRuntime {
    world: Arc<World>,
    machine: String,
    life: Arc<Life>,
}

impl FakeRuntime {
    pub(crate) fn new(world: Arc<World>, machine: String, life: Arc<Life>) -> Self {
        Self { world, machine, life }
    }

    async fn enter(&self, verb: &'static str) -> Result<(), RuntimeError> {
        self.life.go_on().await;
        let (hangs, refused) = {
            let mut inner = self.world.lock();
            let machine = inner.machines.get_mut(&self.machine).expect("a known machine");
            *machine.calls.entry(verb).or_default() += 1;
            let left = machine.faults.fail.get_mut(verb).filter(|left| **left > 0);
            let failed = left.map(|left| *left -= 1).is_some();
            let unreachable = machine.faults.unreachable;
            (machine.faults.hang.contains(verb), unreachable.then_some(true).or(failed.then_some(false)))
        };
        if hangs {
            std::future::pending::<()>().await;
        }
        let machine = self.machine.clone();
        match refused {
            Some(true) => Err(RuntimeError::Unreachable { machine, detail: "connection refused".to_owned() }),
            Some(false) => Err(RuntimeError::Other { machine, detail: format!("{verb} fails") }),
            None => Ok(()),
        }
    }

    fn status(&self, id: &InstanceId) -> Option<InstanceStatus> {
        let inner = self.world.lock();
        inner.machines[&self.machine].instances.get(id).map(|copy| status(id, copy))
    }
}

fn status(id: &InstanceId, copy: &Placed) -> InstanceStatus {
    InstanceStatus {
        id: id.clone(),
        service: copy.spec.service.clone(),
        epoch: copy.spec.epoch,
        running: copy.running.is_some(),
        exit_code: copy.exit_code,
        out_of_memory: false,
        restarts: 0,
        address: copy.running.as_ref().map(|running| running.address),
    }
}

impl Runtime for FakeRuntime {
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>> {
        Box::pin(async move {
            self.enter("info").await?;
            let architecture = self.world.lock().machines[&self.machine].architecture.clone();
            Ok(RuntimeInfo { version: "Fake 1".to_owned(), architecture, os: "linux".to_owned() })
        })
    }

    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>> {
        Box::pin(async move {
            self.enter("ensure").await?;
            if let Some(address) = self.status(&spec.id).and_then(|status| status.address) {
                return Ok(address);
            }
            let faults = self.world.lock().machines[&self.machine].faults.clone();
            if faults.epoch_seen > spec.epoch {
                let (machine, ours, theirs) = (self.machine.clone(), spec.epoch, faults.epoch_seen);
                return Err(RuntimeError::Fenced { machine, ours, theirs });
            }
            let behaviour = Arc::new(Behaviour::default());
            behaviour.status.store(faults.status.unwrap_or(200), Ordering::SeqCst);
            behaviour.health_status.store(faults.health_status.unwrap_or(200), Ordering::SeqCst);
            behaviour.delay_ms.store(faults.delay_ms.unwrap_or(0), Ordering::SeqCst);
            behaviour.health_delay_ms.store(faults.health_delay_ms.unwrap_or(0), Ordering::SeqCst);
            behaviour.closes.store(faults.closes, Ordering::SeqCst);
            let seen = Arc::clone(self.world.lock().seen.entry(spec.id.clone()).or_default());
            let running = Running::start(behaviour, seen).await;
            let address = running.address;
            let exits = faults.exit_at_start;
            let mut copy = Placed { spec: spec.clone(), running: Some(running), exit_code: None };
            if exits.is_some() {
                copy.running = None;
                copy.exit_code = exits;
            }
            let mut inner = self.world.lock();
            let machine = inner.machines.get_mut(&self.machine).expect("a known machine");
            machine.instances.insert(spec.id.clone(), copy);
            let copies = inner.machines.values().flat_map(|machine| machine.instances.values());
            let running = copies.filter(|c| c.running.is_some() && c.spec.service == spec.service).count();
            let most = inner.most.entry(spec.service.clone()).or_default();
            *most = running.max(*most);
            Ok(address)
        })
    }

    fn remove<'a>(&'a self, id: &'a InstanceId, _grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(async move {
            self.enter("remove").await?;
            let exits_after_ms = self.world.lock().machines[&self.machine].faults.exits_after_ms;
            if exits_after_ms > 0 && self.world.runs(&self.machine, id) {
                let (world, told) = (Arc::clone(&self.world), id.clone());
                // Its own affair from here on: the signal is out.
                let exit = tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(exits_after_ms)).await;
                    world.kill(&told);
                });
                exit.await.expect("a copy ends without a panic");
            }
            self.world.lock().machines.get_mut(&self.machine).expect("a known machine").instances.remove(id);
            Ok(())
        })
    }

    fn inspect<'a>(
        &'a self,
        id: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>> {
        Box::pin(async move {
            self.enter("inspect").await?;
            Ok(self.status(id))
        })
    }

    fn list<'a>(&'a self, install: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>> {
        Box::pin(async move {
            self.enter("list").await?;
            let inner = self.world.lock();
            let ours = inner.machines[&self.machine]
                .instances
                .iter()
                .filter(|(_, copy)| copy.spec.install == install);
            Ok(ours.map(|(id, copy)| status(id, copy)).collect())
        })
    }

    fn logs(
        &self,
        id: &InstanceId,
        _options: LogOptions,
    ) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
        let text = format!("last words of {id}");
        stream::iter([Ok(LogLine { at: 1, stderr: true, text })]).boxed()
    }

    fn stats<'a>(&'a self, _id: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>> {
        Box::pin(async move {
            self.enter("stats").await?;
            Ok(InstanceStats { cpu_seconds: 1.0, memory_bytes: 1 << 20, pids: 1 })
        })
    }

    fn image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>> {
        Box::pin(async move {
            self.enter("image").await?;
            let inner = self.world.lock();
            let images = &inner.machines[&self.machine].images;
            Ok(images.get(reference).or_else(|| images.values().find(|image| image.id == reference)).cloned())
        })
    }

    fn pull<'a>(
        &'a self,
        reference: &'a str,
        _progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        Box::pin(async move {
            self.enter("pull").await?;
            let (image, machine) = (reference.to_owned(), self.machine.clone());
            Err(RuntimeError::NoImage { image, machine, detail: "there is no registry".to_owned() })
        })
    }

    fn export(&self, image: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        let bytes = Bytes::from(image.to_owned());
        stream::iter([Ok(bytes)]).boxed()
    }

    fn import<'a>(
        &'a self,
        image: &'a str,
        mut stream: BoxStream<'static, Result<Bytes, RuntimeError>>,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>> {
        Box::pin(async move {
            self.enter("import").await?;
            let mut bytes = 0;
            while let Some(chunk) = stream.next().await {
                bytes += chunk?.len() as u64;
                progress(bytes, None);
            }
            let info = image_info(image);
            let mut inner = self.world.lock();
            let machine = inner.machines.get_mut(&self.machine).expect("a known machine");
            machine.images.insert(image.to_owned(), info.clone());
            Ok(info)
        })
    }
}

pub(crate) fn image_info(id: &str) -> ImageInfo {
    ImageInfo {
        id: id.to_owned(),
        repo_digests: Vec::new(),
        size_bytes: 1_000,
        architecture: "amd64".to_owned(),
        os: "linux".to_owned(),
        exposed_ports: vec![80],
    }
}

impl World {
    pub(crate) fn put_image(&self, machine: &str, reference: &str, id: &str) {
        let mut inner = self.lock();
        let machine = inner.machines.get_mut(machine).expect("a known machine");
        machine.images.insert(reference.to_owned(), image_info(id));
    }
}
