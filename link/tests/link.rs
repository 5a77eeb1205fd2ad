//! An engine's table and an edge's, with the link between them and a way to cut it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use peregrine_link::{
    Before, EdgeLink, EdgeState, KeyedCertificate, Link, LinkConfig, LinkHandle, NotGiven, PlaceHandle,
    Secret, Secrets, SecretsHandle, Staple, join,
};
use peregrine_routing::{
    Address, Balance, CertificateId, Change, DomainPolicy, DomainSpec, Enter, Generation, HoldSpec,
    HostPattern, Joined, Lease, Outcome, Passive, PoolSpec, RouteSpec, ServicePolicy, ServiceSpec,
    TableReader, TableWriter, TrafficClass, Upstream, UpstreamProtocol, UpstreamSpec,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

const LEASE_MS: u32 = 1_500;
const STATE_TIMEOUT: Duration = Duration::from_secs(30);

fn service(name: &str, generations: &[u64]) -> Change {
    let upstream = |generation: &u64| UpstreamSpec {
        generation: Generation(*generation),
        name: format!("copy-{generation}").into(),
        address: Address::Socket(([127, 0, 0, 1], 1).into()),
        protocol: UpstreamProtocol::Http1,
        weight: 1,
        ready_connections: 0,
    };
    let upstreams = generations.iter().map(upstream).collect();
    Change::Put(ServiceSpec {
        name: name.into(),
        routes: vec![RouteSpec {
            host: HostPattern::parse(&format!("{name}.test")).expect("a host"),
            path_prefix: "/".into(),
        }],
        pools: vec![PoolSpec { name: "serving".into(), weight: 1, standby: false, upstreams }],
        balance: Balance::default(),
        policy: ServicePolicy::default(),
    })
}

#[track_caller]
fn within<T>(what: &str, work: impl Future<Output = T>) -> impl Future<Output = T> {
    let what = what.to_owned();
    async move { tokio::time::timeout(STATE_TIMEOUT, work).await.unwrap_or_else(|_| panic!("waited for {what}")) }
}

async fn until(what: &str, reached: impl Fn() -> bool) {
    within(what, async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// The engine's side.
struct Engine {
    writer: TableWriter,
    handle: LinkHandle,
    addr: SocketAddr,
    secrets: Arc<Store>,
    stop: Option<oneshot::Sender<()>>,
    run: JoinHandle<()>,
}

/// What the engine hands out: for each id a certificate of its own.
struct Store {
    questions: AtomicUsize,
    wanted: Mutex<Vec<String>>,
    ticket_keys: watch::Sender<Secret>,
}

impl Store {
    fn new() -> Arc<Self> {
        let ticket_keys = watch::Sender::new(Secret::new(vec![1]));
        Arc::new(Self { questions: AtomicUsize::new(0), wanted: Mutex::default(), ticket_keys })
    }

    fn certificate(id: u8) -> KeyedCertificate {
        let staple = Some(Staple { response: vec![id; 7], until_ms: 5 });
        KeyedCertificate { chain: vec![vec![id; 900]], key: Secret::new(vec![id; 40]), staple }
    }
}

impl Secrets for Store {
    fn certificate(&self, id: CertificateId) -> BoxFuture<'_, Result<Option<KeyedCertificate>, String>> {
        self.questions.fetch_add(1, Ordering::SeqCst);
        let found = match id.0[0] {
            0 => Ok(None),
            255 => Err("the disk is on fire".to_owned()),
            id => Ok(Some(Self::certificate(id))),
        };
        std::future::ready(found).boxed()
    }

    /// Who is called new has a certificate, who is called late never an answer.
    fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        self.wanted.lock().expect("a lock").push(name.to_owned());
        match name.split('.').next() {
            Some("late") => std::future::pending().boxed(),
            first => std::future::ready(first == Some("new")).boxed(),
        }
    }

    fn ticket_keys(&self) -> watch::Receiver<Secret> {
        self.ticket_keys.subscribe()
    }
}

fn domain(name: &str, id: u8) -> Change {
    let (name, certificate) = (pattern(name), Some(CertificateId([id; 32])));
    Change::PutDomain(DomainSpec { name, certificate, staple: None, policy: DomainPolicy::default() })
}

fn pattern(name: &str) -> HostPattern {
    HostPattern::parse(name).expect("a name")
}

impl Engine {
    async fn open(folder: &Path, epoch: u64, listen: SocketAddr, services: &[Change]) -> Self {
        Self::open_keeping(folder, epoch, listen, services, Vec::new()).await
    }

    async fn open_keeping(
        folder: &Path,
        epoch: u64,
        listen: SocketAddr,
        services: &[Change],
        kept: Vec<String>,
    ) -> Self {
        let (mut writer, reader) = peregrine_routing::table();
        let config = LinkConfig { lease_ms: LEASE_MS, ..LinkConfig::new(listen, epoch, Arc::new(|| 1_000)) };
        let link = Link::open(config, folder, reader).await.expect("a link").keeping(kept);
        let secrets = Store::new();
        let link = link.with_secrets(Arc::clone(&secrets) as _);
        writer.apply(services).expect("it is accepted");
        let (stop, stopped) = oneshot::channel::<()>();
        let (handle, addr) = (link.handle(), link.addr());
        let run = tokio::spawn(link.run(async {
            drop(stopped.await);
        }));
        Self { writer, handle, addr, secrets, stop: Some(stop), run }
    }

    async fn kill(mut self) {
        self.stop.take();
        self.run.await.expect("no panic");
    }

    fn state(&self) -> EdgeState {
        self.handle.edges()[0].state
    }

    fn upstream(&self, generation: u64) -> Arc<Upstream> {
        Arc::clone(self.writer.upstream(Generation(generation)).expect("it is known"))
    }

    async fn acknowledged(&self, version: u64) {
        within("the acknowledgement", self.writer.acknowledged(version)).await;
    }
}

/// The edge's side, with one core that acknowledges as long as it is not held.
struct Edge {
    folder: Arc<TempDir>,
    place: Option<PlaceHandle>,
    secrets: Option<SecretsHandle>,
    reader: TableReader,
    held: watch::Sender<bool>,
    stop: Option<oneshot::Sender<()>>,
    run: Option<JoinHandle<()>>,
}

impl Edge {
    async fn join(engine: &Engine) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let invite = engine.handle.invite("edge-1", 60_000).expect("a token");
        join(folder.path(), &engine.addr.to_string(), &invite.token).await.expect("it joins");
        let reader = peregrine_routing::table().1;
        Self::of(Arc::new(folder), reader)
    }

    fn of(folder: Arc<TempDir>, reader: TableReader) -> Self {
        Self {
            folder,
            place: None,
            secrets: None,
            reader,
            held: watch::Sender::new(false),
            stop: None,
            run: None,
        }
    }

    /// Another process of it, which takes over.
    fn next(&self, engine: SocketAddr) -> Self {
        let mut next = Self::of(Arc::clone(&self.folder), self.reader.clone());
        next.start_after(engine, Some(self.place().hand_on().expect("a descriptor")));
        next
    }

    fn place(&self) -> &PlaceHandle {
        self.place.as_ref().expect("it was started")
    }

    fn start(&mut self, engine: SocketAddr) {
        self.start_after(engine, None);
    }

    fn start_after(&mut self, engine: SocketAddr, before: Option<Before>) {
        let (folder, engines) = (self.folder.path(), [engine.to_string()]);
        let link = EdgeLink::take_over(folder, &engines, 1, Arc::new(|| 5_000), before).expect("a link");
        (self.place, self.secrets) = (Some(link.place()), Some(link.secrets()));
        self.reader = link.reader();
        let (stop, stopped) = oneshot::channel::<()>();
        let (reader, mut held) = (self.reader.clone(), self.held.subscribe());
        let core = reader.register();
        tokio::spawn(async move {
            let mut version = 0;
            loop {
                version = reader.newer_than(version).await;
                if held.wait_for(|held| !held).await.is_err() {
                    return;
                }
                core.acknowledge(version);
            }
        });
        self.stop = Some(stop);
        self.run = Some(tokio::spawn(link.run(async {
            drop(stopped.await);
        })));
    }

    /// As a crash: nothing is said.
    async fn kill(&mut self) {
        let run = self.run.take().expect("it runs");
        run.abort();
        drop(run.await);
        (self.stop, self.place) = (None, None);
    }

    /// In order.
    async fn leave(&mut self) {
        (self.stop, self.place) = (None, None);
        within("the end of the edge", self.run.take().expect("it runs")).await.expect("no panic");
    }

    async fn enter(&self, service: &str) -> Lease {
        let host = format!("{service}.test");
        until("the service", || self.reader.load().lookup(&host, "/").is_some()).await;
        let ask = Enter {
            now_ms: 5_000,
            random: 1,
            hash: None,
            prefer: None,
            tried: &[],
            class: TrafficClass::Request,
        };
        let table = self.reader.load();
        let found = table.lookup(&host, "/").expect("it is there");
        let mut lease = found.service.enter(ask).expect("an upstream");
        lease.mark_sent();
        lease
    }
}

/// A way between the two that can be cut: then nothing passes, and nobody is told.
struct Way {
    addr: SocketAddr,
    open: watch::Sender<bool>,
    /// Connections that reached an engine and are over.
    ended: Arc<AtomicUsize>,
}

impl Way {
    async fn to(engine: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let open = watch::Sender::new(true);
        let gate = open.clone();
        let ended = Arc::new(AtomicUsize::new(0));
        let over = Arc::clone(&ended);
        tokio::spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else { return };
                let mut opened = gate.subscribe();
                if opened.wait_for(|open| *open).await.is_err() {
                    return;
                }
                let Ok(far) = TcpStream::connect(engine).await else { continue };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                let up = carry(near_in, far_out, gate.subscribe());
                let down = carry(far_in, near_out, gate.subscribe());
                let over = Arc::clone(&over);
                tokio::spawn(async move {
                    tokio::join!(up, down);
                    over.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        Self { addr, open, ended }
    }

    fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut open: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        if open.wait_for(|open| *open).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

fn anywhere() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// An engine with these services, and an edge that is connected to it. The folder is the engine's.
async fn connected(services: &[Change]) -> (TempDir, Engine, Edge) {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = Engine::open(folder.path(), 1, anywhere(), services).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(engine.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
    (folder, engine, edge)
}

/// The same over a way that can be cut, with a request that the engine knows of.
async fn connected_by_a_way() -> (TempDir, Engine, Edge, Way, Lease) {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = Engine::open(folder.path(), 1, anywhere(), &[service("a", &[1])]).await;
    let way = Way::to(engine.addr).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(way.addr);
    let lease = edge.enter("a").await;
    let old = engine.upstream(1);
    until("the request to be seen", || old.in_flight() == 1).await;
    (folder, engine, edge, way, lease)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_is_acknowledged_when_every_core_of_the_edge_uses_it() {
    let (_folder, mut engine, edge) = connected(&[service("a", &[1])]).await;
    engine.acknowledged(1).await;
    until("the edge to be counted", || engine.writer.edges() == 1).await;
    edge.held.send_replace(true);
    let version =
        engine.writer.apply(&[service("a", &[1, 2]), service("b", &[3])]).expect("accepted").version;
    until("the edge to have it", || edge.reader.load().lookup("b.test", "/").is_some()).await;
    let acknowledged = engine.writer.acknowledged(version);
    let soon = tokio::time::timeout(Duration::from_millis(200), acknowledged).await;
    assert!(soon.is_err(), "a core has not let go of the old table");
    edge.held.send_replace(false);
    engine.acknowledged(version).await;
    assert_eq!(engine.handle.edges()[0].table_version, version);
    assert!(engine.handle.edges()[0].saved);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_at_the_edge_is_counted_at_the_engine_to_the_end_of_a_drain() {
    let (_folder, mut engine, edge) = connected(&[service("a", &[1])]).await;
    let mut lease = edge.enter("a").await;
    lease.reclassify(TrafficClass::WebSocket);
    lease.upstream().record(Outcome::Response { status: 200, latency_us: 900 }, &Passive::default(), 5_000);
    let old = engine.upstream(1);
    until("the request to be seen", || old.in_flight() == 1 && old.outcomes().samples() == 1).await;
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert!(old.is_retired() && !old.is_empty(), "somebody is inside at the edge");
    assert_eq!(old.receipt().in_flight[TrafficClass::WebSocket], 1);
    old.close_class(TrafficClass::WebSocket);
    let there = Arc::clone(lease.upstream());
    until("the deadline to come down", || there.is_closing(TrafficClass::WebSocket)).await;
    assert!(!there.is_class_cut(TrafficClass::WebSocket) && !there.is_closing(TrafficClass::Request));
    lease.soft_close();
    lease.add_bytes(3, 4);
    drop(lease);
    within("the drain", old.drained()).await;
    let receipt = old.receipt();
    assert!(receipt.empty && receipt.lost.is_empty());
    assert_eq!((receipt.started, receipt.soft_closed[TrafficClass::WebSocket]), (1, 1));
    assert_eq!((receipt.bytes_to_upstream, receipt.bytes_to_client), (3, 4));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_that_heals_within_the_lease_loses_and_tells_nothing() {
    let (_folder, mut engine, _edge, way, lease) = connected_by_a_way().await;
    let old = engine.upstream(1);
    way.open.send_replace(false);
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    let waits = tokio::time::timeout(
        Duration::from_millis(u64::from(LEASE_MS) / 2),
        engine.writer.acknowledged(version),
    );
    assert!(waits.await.is_err(), "an edge that is cut off is waited for");
    assert!(!old.is_empty());
    drop(lease);
    way.open.send_replace(true);
    engine.acknowledged(version).await;
    within("the drain", old.drained()).await;
    let receipt = old.receipt();
    assert_eq!((receipt.completed.total(), receipt.lost), (1, vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_that_outlasts_the_lease_is_told_and_the_edge_is_counted_again_when_it_is_back() {
    let (_folder, mut engine, edge, way, lease) = connected_by_a_way().await;
    let old = engine.upstream(1);
    way.open.send_replace(false);
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert_eq!(engine.state(), EdgeState::Lost);
    within("the drain", old.drained()).await;
    let lost = old.receipt().lost;
    assert_eq!(lost.iter().map(|lost| (&*lost.edge, lost.in_flight)).collect::<Vec<_>>(), [("edge-1", 1)]);
    way.open.send_replace(true);
    until("the edge to be back", || engine.state() == EdgeState::Connected).await;
    engine.acknowledged(version).await;
    drop(lease);
    let next = edge.enter("a").await;
    assert_eq!(next.upstream().generation(), Generation(2), "it has the table of now");
    let new = engine.upstream(2);
    until("its requests to be seen again", || new.in_flight() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_back_after_its_lease_is_waited_for_in_a_drain_that_still_goes_on() {
    let (_folder, mut engine, _edge, way, lease) = connected_by_a_way().await;
    let old = engine.upstream(1);
    let elsewhere = old.enter(TrafficClass::Request).expect("it serves");
    way.open.send_replace(false);
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert_eq!(engine.state(), EdgeState::Lost);
    way.open.send_replace(true);
    until("the edge to be back", || engine.state() == EdgeState::Connected).await;
    drop(elsewhere);
    engine.acknowledged(version).await;
    assert!(!old.is_empty(), "it is connected, and inside");
    assert_eq!((old.in_flight(), old.receipt().lost), (1, vec![]));
    drop(lease);
    within("the drain", old.drained()).await;
    let receipt = old.receipt();
    assert_eq!((receipt.started, receipt.completed.total(), receipt.lost), (1, 1, vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_dies_and_one_that_ends_in_order_are_told_apart() {
    let (_folder, mut engine, mut edge) = connected(&[service("a", &[1])]).await;
    drop(edge.enter("a").await);
    engine.acknowledged(1).await;
    edge.leave().await;
    until("the farewell", || engine.state() == EdgeState::Away).await;
    let one = engine.upstream(1);
    assert_eq!((one.receipt().completed.total(), one.receipt().lost), (1, vec![]), "its last word is in");
    until("nobody to wait for it", || engine.writer.edges() == 0).await;
    edge.start(engine.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
    let lease = edge.enter("a").await;
    until("the request to be seen", || one.in_flight() == 1).await;
    edge.kill().await;
    drop(lease);
    until("the end of the connection", || engine.state() == EdgeState::Waited).await;
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert_eq!(engine.state(), EdgeState::Lost);
    assert_eq!(one.receipt().lost.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_starts_again_waits_for_the_edge_that_was_there_and_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let tables = [service("a", &[1]), service("b", &[2])];
    let engine = Engine::open(folder.path(), 1, anywhere(), &tables).await;
    let addr = engine.addr;
    let mut edge = Edge::join(&engine).await;
    edge.start(addr);
    let lease = edge.enter("a").await;
    engine.acknowledged(1).await;
    until("the request to be seen", || engine.upstream(1).in_flight() == 1).await;
    engine.kill().await;
    let before = edge.reader.load().version();
    // The copy was on its way out when the engine died: it is in the new one's state and not in its table.
    let mut engine = Engine::open(folder.path(), 2, addr, &tables[1..]).await;
    assert_eq!(engine.writer.edges(), 1, "it is waited for before it has said a word");
    let Change::Put(old) = &tables[0] else { unreachable!() };
    let old = engine.writer.adopt_retired(&old.pools[0].upstreams[0]);
    assert!(old.is_retired() && !old.is_empty(), "the edge may be inside");
    engine.acknowledged(1).await;
    assert!(!old.is_empty(), "the edge is inside");
    assert_eq!(edge.reader.load().version(), before + 1, "the copy went, and nothing else was touched");
    drop(lease);
    within("the drain", old.drained()).await;
    assert_eq!(old.receipt().completed.total(), 1);
    assert_eq!(old.receipt().started, 0, "what was sent before this engine is not its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_the_engine_cannot_read_stays_as_the_edge_has_it() {
    let tables = [service("a", &[1]), service("b", &[2]), service("c", &[3])];
    let (folder, engine, edge) = connected(&tables).await;
    let addr = engine.addr;
    engine.acknowledged(1).await;
    engine.kill().await;
    // It has lost the record of one service; another one was taken away.
    let kept = vec!["a".to_owned(), "unknown".to_owned()];
    let engine = Engine::open_keeping(folder.path(), 2, addr, &tables[2..], kept).await;
    engine.acknowledged(1).await;
    let table = edge.reader.load();
    let serves = |host: &str| table.lookup(host, "/").is_some();
    assert!(serves("a.test") && serves("c.test") && !serves("b.test"), "{table:?}");
    assert!(!serves("unknown.test"), "what it never knew is not made up");
    drop(edge.enter("a").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_of_a_lower_epoch_is_not_listened_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = Engine::open(folder.path(), 6, anywhere(), &[]).await;
    let mut edge = Edge::join(&engine).await;
    engine.kill().await;
    let before = tempfile::tempdir().expect("a folder");
    copy_folder(folder.path(), before.path());
    let engine = Engine::open(folder.path(), 7, anywhere(), &[service("a", &[1])]).await;
    let way = Way::to(engine.addr).await;
    edge.start(way.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
    engine.acknowledged(1).await;
    let addr = engine.addr;
    engine.kill().await;
    until("the end of their connection", || way.ended() == 1).await;
    let old = Engine::open(before.path(), 6, addr, &[service("b", &[9])]).await;
    until("two refusals", || way.ended() >= 3).await;
    assert_ne!(old.state(), EdgeState::Connected);
    assert!(
        edge.reader.load().lookup("a.test", "/").is_some()
            && edge.reader.load().lookup("b.test", "/").is_none()
    );
    edge.kill().await;
    let way = Way::to(addr).await;
    edge.start(way.addr);
    assert!(edge.reader.load().lookup("a.test", "/").is_some(), "a restart does not forget it");
    until("two refusals", || way.ended() >= 2).await;
    assert_ne!(old.state(), EdgeState::Connected);
    assert!(edge.reader.load().lookup("b.test", "/").is_none());
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a folder") {
        let from = entry.expect("an entry").path();
        let to = to.join(from.file_name().expect("a name"));
        if from.is_dir() {
            std::fs::create_dir(&to).expect("made");
            copy_folder(&from, &to);
        } else {
            std::fs::copy(&from, &to).expect("copied");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_was_replaced_does_not_bring_back_an_edge_that_was_removed_since() {
    let (folder, first, mut edge) = connected(&[service("a", &[1])]).await;
    first.acknowledged(1).await;
    // The first one stands still: it has not heard that another one leads, nor that its edge was removed.
    let second = Engine::open(folder.path(), 2, anywhere(), &[service("a", &[1])]).await;
    second.handle.remove("edge-1").expect("it is known");
    // It goes on, and finds that the edge has gone.
    edge.kill().await;
    until("the end of the connection", || first.state() == EdgeState::Waited).await;
    first.kill().await;
    second.kill().await;
    let third = Engine::open(folder.path(), 3, anywhere(), &[service("a", &[1])]).await;
    let known: Vec<_> = third.handle.edges().into_iter().map(|edge| edge.name).collect();
    assert_eq!(known, Vec::<String>::new(), "it was removed");
    let way = Way::to(third.addr).await;
    edge.start(way.addr);
    until("two refusals", || way.ended() >= 2).await;
    assert!(third.handle.edges().is_empty());
}

fn held_service(name: &str, generations: &[u64]) -> Change {
    let Change::Put(mut spec) = service(name, generations) else { unreachable!("a service is put") };
    // By the engine's clock, which shows 1,000: it lasts for 400 ms more.
    spec.policy.hold = Some(Box::new(HoldSpec {
        id: 1,
        until_ms: 1_400,
        max_requests: 10,
        max_bytes: 1_000,
        max_age_ms: 60_000,
        release_per_s: 1_000,
    }));
    Change::Put(spec)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_is_acknowledged_ends_by_the_edges_clock_is_counted_at_the_engine_and_never_on_the_disk() {
    let (_folder, mut engine, mut edge) = connected(&[service("a", &[1])]).await;
    let version = engine.writer.apply(&[held_service("a", &[1])]).expect("accepted").version;
    engine.acknowledged(version).await;
    let queue = |edge: &Edge| {
        edge.reader.load().lookup("a.test", "/").and_then(|found| found.service.hold().cloned())
    };
    let held = queue(&edge).expect("it is held at the edge");
    let Joined::Wait(_waits) = held.join(100, 5_000_000) else { panic!("it has to wait") };
    let Joined::Wait(leaves) = held.join(100, 5_000_000) else { panic!("it has to wait") };
    until("the engine to know", || engine.writer.hold_counts("a").waiting == 2).await;
    drop(leaves);
    until("the engine to know", || engine.writer.hold_counts("a").left == 1).await;
    // The edge's clock shows 5,000.
    assert_eq!(held.turn(5_399_000), Some(5_400_000), "nothing is due before");
    assert!(held.is_held());
    let _ = held.turn(5_400_000);
    assert!(!held.is_held(), "it is over without a word of the engine");
    until("the engine to know", || engine.writer.hold_counts("a").released == 1).await;
    let counts = engine.writer.hold_counts("a");
    assert_eq!((counts.held, counts.waiting, counts.refused()), (2, 0, 0));
    // What starts from the disk holds nobody.
    edge.kill().await;
    let addr = engine.addr;
    engine.kill().await;
    edge.start(addr);
    until("the table of the disk", || edge.reader.load().lookup("a.test", "/").is_some()).await;
    assert!(queue(&edge).is_none());
}

/// An edge that another process takes over from while it has a request inside: both, and the request.
async fn taken_over() -> (TempDir, Engine, Edge, Edge, Lease) {
    let (folder, engine, before) = connected(&[service("a", &[1])]).await;
    let lease = before.enter("a").await;
    let old = engine.upstream(1);
    until("the request to be seen", || old.in_flight() == 1).await;
    let after = before.next(engine.addr);
    until("both to be waited for", || engine.writer.edges() == 2).await;
    // What it has before its first words is of the time before this engine: it is to have said them.
    until("the new one to have the table", || engine.handle.edges()[0].table_version == 1).await;
    before.place().set_handed_over(true);
    after.place().take_disk();
    assert_eq!(old.in_flight(), 1, "what the one before has is counted");
    (folder, engine, before, after, lease)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_inside_of_the_process_before_is_counted_until_it_ends() {
    let (_folder, mut engine, mut before, after, lease) = taken_over().await;
    let old = engine.upstream(1);
    drop(after.enter("a").await);
    until("the other one's to be seen", || old.receipt().completed.total() == 1).await;
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert!(old.is_retired() && !old.is_empty(), "the process before is inside");
    until("the table on the disk", || engine.handle.edges()[0].saved).await;
    drop(lease);
    within("the drain", old.drained()).await;
    let receipt = old.receipt();
    assert_eq!((receipt.completed.total(), receipt.started, receipt.lost), (2, 2, vec![]));
    before.leave().await;
    until("nobody to wait for it", || engine.writer.edges() == 1).await;
    assert_eq!((engine.state(), engine.handle.edges()[0].ending), (EdgeState::Connected, 0));
    let next = after.enter("a").await;
    until("its requests to be seen", || engine.upstream(2).in_flight() == 1).await;
    drop(next);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_dies_after_it_has_handed_over_is_told_as_lost_and_the_other_one_is_not() {
    let (_folder, mut engine, mut before, after, lease) = taken_over().await;
    let inside = after.enter("a").await;
    let old = engine.upstream(1);
    until("both to be seen", || old.in_flight() == 2).await;
    before.kill().await;
    drop(lease);
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert!(!old.is_empty(), "the other one is inside");
    assert_eq!(engine.state(), EdgeState::Connected);
    drop(inside);
    within("the drain", old.drained()).await;
    let receipt = old.receipt();
    assert_eq!(receipt.completed.total(), 1);
    assert_eq!(receipt.lost.iter().map(|lost| lost.in_flight).collect::<Vec<_>>(), [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_starts_again_waits_for_both_processes_of_an_edge() {
    let (folder, engine, before, after, lease) = taken_over().await;
    let addr = engine.addr;
    engine.kill().await;
    let tables = [service("a", &[1])];
    let mut engine = Engine::open(folder.path(), 2, addr, &tables).await;
    assert_eq!(engine.writer.edges(), 2, "before they have said a word");
    engine.acknowledged(1).await;
    let old = engine.upstream(1);
    until("the request to be seen", || old.in_flight() == 1).await;
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert_eq!(engine.writer.edges(), 2, "whoever came first has not sent the other one away");
    assert!(!old.is_empty());
    drop(lease);
    within("the drain", old.drained()).await;
    assert_eq!(old.receipt().lost, vec![]);
    drop((before, after));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_processes_one_writes_the_files_at_a_time() {
    let (_folder, mut engine, before) = connected(&[service("a", &[1])]).await;
    until("the table on the disk", || engine.handle.edges()[0].saved).await;
    let after = before.next(engine.addr);
    until("both to be waited for", || engine.writer.edges() == 2).await;
    let kept = || std::fs::read(before.folder.path().join("table")).expect("a table");
    let first = kept();
    before.place().set_handed_over(true);
    let version = engine.writer.apply(&[service("a", &[2])]).expect("accepted").version;
    engine.acknowledged(version).await;
    assert_eq!(kept(), first, "it is used by both and written by none");
    assert!(!engine.handle.edges()[0].saved);
    after.place().take_disk();
    until("the table on the disk", || engine.handle.edges()[0].saved).await;
    let second = kept();
    assert_ne!(second, first);
    // And back, as when the one that has taken over is gone.
    let version = engine.writer.apply(&[service("a", &[3])]).expect("accepted").version;
    engine.acknowledged(version).await;
    until("the table on the disk", || kept() != second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lock_of_another_folder_is_no_lock_of_this_one() {
    let (_folder, engine, edge) = connected(&[service("a", &[1])]).await;
    let mut other = Edge::join(&engine).await;
    other.start(engine.addr);
    let before = other.place().hand_on().expect("a descriptor");
    let taken = EdgeLink::take_over(edge.folder.path(), &[], 1, Arc::new(|| 0), Some(before));
    assert!(matches!(taken, Err(peregrine_link::EdgeError::OtherFolder(_))), "{taken:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_is_given_the_certificates_that_the_table_names_for_a_domain_and_no_others() {
    let tables = [service("a", &[1]), domain("a.test", 7), domain("*.b.test", 8), domain("none.test", 0)];
    let (_folder, engine, edge) = connected(&tables).await;
    engine.acknowledged(1).await;
    let secrets = edge.secrets.clone().expect("it was started");
    let ask = |id: u8, name: &str| {
        let (secrets, name) = (secrets.clone(), pattern(name));
        async move { within("an answer", secrets.certificate(CertificateId([id; 32]), &name)).await }
    };
    assert_eq!(ask(7, "a.test").await, Ok(Some(Store::certificate(7))));
    assert_eq!(ask(8, "*.b.test").await, Ok(Some(Store::certificate(8))));
    assert_eq!(engine.secrets.questions.load(Ordering::SeqCst), 2);
    for (id, name) in [(7, "*.b.test"), (7, "other.test"), (9, "a.test")] {
        assert_eq!(ask(id, name).await, Ok(None), "{id} for {name}");
    }
    assert_eq!(engine.secrets.questions.load(Ordering::SeqCst), 2, "nobody has looked for those");
    assert_eq!(ask(0, "none.test").await, Ok(None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_ask_at_once_are_all_answered_and_without_an_engine_nobody_waits_for_long() {
    let tables: Vec<Change> = (1..=200).map(|id| domain(&format!("n{id}.test"), id)).collect();
    let (_folder, engine, edge) = connected(&tables).await;
    engine.acknowledged(1).await;
    let secrets = edge.secrets.clone().expect("it was started");
    let ask_all = |secrets: SecretsHandle| async move {
        let asking = (1..=200_u8).flat_map(|id| [id, id]).map(|id| {
            let secrets = secrets.clone();
            async move { secrets.certificate(CertificateId([id; 32]), &pattern(&format!("n{id}.test"))).await }
        });
        futures_util::future::join_all(asking).await
    };
    let answers = within("all answers", ask_all(secrets)).await;
    for (n, answer) in answers.into_iter().enumerate() {
        let id = u8::try_from(n / 2 + 1).expect("at most 200");
        assert_eq!(answer, Ok(Some(Store::certificate(id))));
    }
    // Without an engine there is no answer, and nobody waits for ever.
    engine.kill().await;
    let secrets = edge.secrets.clone().expect("it was started");
    let none = within("no answer", secrets.certificate(CertificateId([1; 32]), &pattern("n1.test"))).await;
    assert_eq!(none, Err(NotGiven::NoAnswer));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_given_now_says_why() {
    let (_folder, engine, edge) = connected(&[domain("a.test", 255)]).await;
    engine.acknowledged(1).await;
    let secrets = edge.secrets.clone().expect("it was started");
    let answer = within("an answer", secrets.certificate(CertificateId([255; 32]), &pattern("a.test"))).await;
    assert_eq!(answer, Err(NotGiven::NotNow("the disk is on fire".to_owned())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ticket_keys_reach_an_edge_and_wanted_names_the_engine() {
    let (_folder, engine, edge) = connected(&[service("a", &[1])]).await;
    engine.acknowledged(1).await;
    let secrets = edge.secrets.clone().expect("it was started");
    let told = |expected: Vec<u8>| {
        let mut keys = secrets.ticket_keys();
        async move {
            let is_it = |keys: &Option<Secret>| keys.as_ref().is_some_and(|keys| keys.bytes() == expected);
            within("the keys", keys.wait_for(is_it)).await.expect("the link is there").clone()
        }
    };
    told(vec![1]).await;
    engine.secrets.ticket_keys.send_replace(Secret::new(vec![2, 1]));
    told(vec![2, 1]).await;
    let wanted = |name: &str| within("an answer", secrets.wanted(name));
    assert!(wanted("new.test").await);
    assert!(!wanted("").await && !wanted(&"a".repeat(300)).await, "they are no names");
    // Two that want the same wait for one answer.
    let both = futures_util::future::join(wanted("other.test"), wanted("other.test"));
    assert_eq!(both.await, (false, false));
    drop(secrets.wanted("last.test"));
    let names = || engine.secrets.wanted.lock().expect("a lock").clone();
    until("all names", || names().last().is_some_and(|last| last == "last.test")).await;
    let mut told = names();
    told.dedup();
    assert_eq!(told, ["new.test", "other.test", "last.test"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_a_name_hears_at_once_when_the_connection_ends_and_without_an_engine() {
    let (_folder, engine, edge) = connected(&[service("a", &[1])]).await;
    engine.acknowledged(1).await;
    let secrets = edge.secrets.clone().expect("it was started");
    let waiting = tokio::spawn(secrets.wanted("late.test"));
    until("it is told", || !engine.secrets.wanted.lock().expect("a lock").is_empty()).await;
    assert!(!waiting.is_finished());
    engine.kill().await;
    assert!(!within("an answer", waiting).await.expect("it ends"), "nobody knows");
    until("it is alone", || !secrets.is_connected()).await;
    assert!(!within("an answer", secrets.wanted("new.test")).await);
}
