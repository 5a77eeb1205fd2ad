//! An engine's table and an edge's, with the link between them and a way to cut it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use peregrine_link::{EdgeLink, EdgeState, Link, LinkConfig, LinkHandle, join};
use peregrine_routing::{
    Address, Balance, Change, Enter, Generation, HostPattern, Lease, Outcome, Passive, PoolSpec, RouteSpec,
    ServicePolicy, ServiceSpec, TableReader, TableWriter, TrafficClass, Upstream, UpstreamProtocol,
    UpstreamSpec,
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
    stop: Option<oneshot::Sender<()>>,
    run: JoinHandle<()>,
}

impl Engine {
    async fn open(folder: &Path, epoch: u64, listen: SocketAddr, services: &[Change]) -> Self {
        let (mut writer, reader) = peregrine_routing::table();
        let config = LinkConfig { lease_ms: LEASE_MS, ..LinkConfig::new(listen, epoch, Arc::new(|| 1_000)) };
        let link = Link::open(config, folder, reader).await.expect("a link");
        writer.apply(services).expect("it is accepted");
        let (stop, stopped) = oneshot::channel::<()>();
        let (handle, addr) = (link.handle(), link.addr());
        let run = tokio::spawn(link.run(async {
            drop(stopped.await);
        }));
        Self { writer, handle, addr, stop: Some(stop), run }
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
    folder: TempDir,
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
        Self { folder, reader, held: watch::Sender::new(false), stop: None, run: None }
    }

    fn start(&mut self, engine: SocketAddr) {
        let link =
            EdgeLink::open(self.folder.path(), &[engine.to_string()], 1, Arc::new(|| 5_000)).expect("a link");
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
        self.stop = None;
    }

    /// In order.
    async fn leave(&mut self) {
        self.stop = None;
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
}

impl Way {
    async fn to(engine: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let open = watch::Sender::new(true);
        let gate = open.clone();
        tokio::spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else { return };
                let mut opened = gate.subscribe();
                if opened.wait_for(|open| *open).await.is_err() {
                    return;
                }
                let Ok(far) = TcpStream::connect(engine).await else { continue };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                tokio::spawn(carry(near_in, far_out, gate.subscribe()));
                tokio::spawn(carry(far_in, near_out, gate.subscribe()));
            }
        });
        Self { addr, open }
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_is_acknowledged_when_every_core_of_the_edge_uses_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = Engine::open(folder.path(), 1, anywhere(), &[service("a", &[1])]).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(engine.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
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
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = Engine::open(folder.path(), 1, anywhere(), &[service("a", &[1])]).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(engine.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
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
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = Engine::open(folder.path(), 1, anywhere(), &[service("a", &[1])]).await;
    let way = Way::to(engine.addr).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(way.addr);
    let lease = edge.enter("a").await;
    let old = engine.upstream(1);
    until("the request to be seen", || old.in_flight() == 1).await;
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
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = Engine::open(folder.path(), 1, anywhere(), &[service("a", &[1])]).await;
    let way = Way::to(engine.addr).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(way.addr);
    let lease = edge.enter("a").await;
    let old = engine.upstream(1);
    until("the request to be seen", || old.in_flight() == 1).await;
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
async fn an_edge_that_dies_and_one_that_ends_in_order_are_told_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut engine = Engine::open(folder.path(), 1, anywhere(), &[service("a", &[1])]).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(engine.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
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
async fn an_engine_of_a_lower_epoch_is_not_listened_to() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = Engine::open(folder.path(), 7, anywhere(), &[service("a", &[1])]).await;
    let mut edge = Edge::join(&engine).await;
    edge.start(engine.addr);
    until("the edge to be connected", || engine.state() == EdgeState::Connected).await;
    engine.acknowledged(1).await;
    let addr = engine.addr;
    engine.kill().await;
    let old = Engine::open(folder.path(), 6, addr, &[service("b", &[9])]).await;
    // Long enough for it to have come and gone several times.
    tokio::time::sleep(Duration::from_millis(u64::from(LEASE_MS) * 2)).await;
    assert_ne!(old.state(), EdgeState::Connected);
    assert!(
        edge.reader.load().lookup("a.test", "/").is_some()
            && edge.reader.load().lookup("b.test", "/").is_none()
    );
    edge.kill().await;
    edge.start(addr);
    assert!(edge.reader.load().lookup("a.test", "/").is_some(), "a restart does not forget it");
    tokio::time::sleep(Duration::from_millis(u64::from(LEASE_MS))).await;
    assert_ne!(old.state(), EdgeState::Connected);
}
