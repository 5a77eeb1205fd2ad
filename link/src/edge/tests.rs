//! Each side of the link against a hand-made other one, which says what the real one hardly ever does.

use std::net::SocketAddr;

use peregrine_routing::{
    Address, Balance, Change, Generation, HostPattern, PoolSpec, RouteSpec, ServicePolicy, ServiceSpec,
    UpstreamProtocol, UpstreamSpec,
};
use tempfile::TempDir;
use tokio::io::{AsyncWriteExt, ReadHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;
use crate::authority::Authority;
use crate::server::{EdgeState, Link, LinkConfig, LinkHandle, PATIENCE_LEASES};
use crate::tls;
use crate::wire::{self, Attach, Down, Greeting, MAX_FRAME_BYTES, Reply, Up};

const STATE_TIMEOUT: Duration = Duration::from_secs(30);
const LEASE_MS: u32 = 1_000;

/// In the place of this host one is sent that cannot be read.
const SPOILT: &str = "spoilt.test";

fn service(name: &str, generations: std::ops::Range<u64>) -> ServiceSpec {
    service_at(&format!("{name}.test"), name, generations)
}

fn service_at(host: &str, name: &str, generations: std::ops::Range<u64>) -> ServiceSpec {
    let upstream = |generation| UpstreamSpec {
        generation: Generation(generation),
        name: format!("copy-{generation}").into(),
        address: Address::Socket(([127, 0, 0, 1], 1).into()),
        protocol: UpstreamProtocol::Http1,
        weight: 1,
        ready_connections: 0,
    };
    let host = HostPattern::parse(host).expect("a host");
    let upstreams = generations.map(upstream).collect();
    ServiceSpec {
        name: name.into(),
        routes: vec![RouteSpec { host, path_prefix: "/".into() }],
        pools: vec![PoolSpec { name: "serving".into(), weight: 1, standby: false, upstreams }],
        balance: Balance::default(),
        policy: ServicePolicy::default(),
    }
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(STATE_TIMEOUT, work).await.unwrap_or_else(|_| panic!("waited for {what}"))
}

async fn until(what: &str, reached: impl Fn() -> bool) {
    within(what, async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// The engine's side as it is shipped, on its folder.
async fn engine(folder: &Path) -> (Link, LinkHandle, peregrine_routing::TableWriter) {
    let (writer, reader) = peregrine_routing::table();
    let anywhere = ([127, 0, 0, 1], 0).into();
    let config = LinkConfig { lease_ms: LEASE_MS, ..LinkConfig::new(anywhere, 1, Arc::new(|| 1_000)) };
    let link = Link::open(config, folder, reader).await.expect("a link");
    let handle = link.handle();
    (link, handle, writer)
}

/// An edge that has joined, in a folder.
async fn joined(handle: &LinkHandle, engine: SocketAddr) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let invite = handle.invite("edge-1", 60_000).expect("a token");
    join(folder.path(), &engine.to_string(), &invite.token).await.expect("it joins");
    folder
}

/// An edge with a hand-made engine.
struct ByHand {
    edge: TempDir,
    listener: TcpListener,
    acceptor: TlsAcceptor,
    _authority: TempDir,
}

impl ByHand {
    async fn open() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (link, handle, _writer) = engine(folder.path()).await;
        let addr = link.addr();
        let run = tokio::spawn(link.run(std::future::pending()));
        let edge = joined(&handle, addr).await;
        run.abort();
        let authority = Authority::open(folder.path()).expect("the same authority");
        let tls = tls::server(authority.certificate(), authority.engine().expect("an identity"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self { edge, listener, acceptor: TlsAcceptor::from(tls.expect("TLS")), _authority: folder }
    }

    fn start(&self) -> EdgeLink {
        let addr = self.listener.local_addr().expect("an address").to_string();
        EdgeLink::open(self.edge.path(), &[addr], 1, Arc::new(|| 5_000)).expect("a link")
    }

    /// The edge's next connection, when it has been let in.
    async fn accept(&self) -> TlsStream<TcpStream> {
        within("the edge", async {
            let (stream, _) = self.listener.accept().await.expect("a connection");
            let mut stream = self.acceptor.accept(stream).await.expect("TLS");
            let greeting = wire::read::<Greeting>(&mut stream, MAX_FRAME_BYTES).await.expect("a greeting");
            assert!(matches!(greeting, Greeting::Attach(_)), "{greeting:?}");
            let reply = Reply::Attached { epoch: 1, lease_ms: 60_000 };
            wire::write(&mut stream, &reply).await.expect("it is taken");
            stream
        })
        .await
    }
}

/// A frame as it is, but for a host: what no engine can say, because its own table does not take it.
fn with_host(frame: &[u8], host: &str) -> Vec<u8> {
    let text = |text: &str| postcard::to_stdvec(text).expect("plain data can be written");
    let (spoilt, message) = (text(SPOILT), &frame[4..]);
    let at = message.windows(spoilt.len()).position(|bytes| bytes == spoilt);
    let Some(at) = at else { return frame.to_owned() };
    let message = [&message[..at], &text(host), &message[at + spoilt.len()..]].concat();
    let length = u32::try_from(message.len()).expect("below the limit").to_be_bytes();
    [&length[..], &message].concat()
}

async fn publish(stream: &mut TlsStream<TcpStream>, whole: bool, services: &[&ServiceSpec], version: u64) {
    let change = |spec: &&ServiceSpec| Down::Change(Box::new((&Change::Put((*spec).clone())).into()));
    let frames = std::iter::once(Down::Begin { whole }).chain(services.iter().map(change));
    for down in frames.chain([Down::Publish { version }]) {
        let frame = with_host(&wire::frame(&down).expect("a frame"), "spoilt..test");
        stream.write_all(&frame).await.expect("it is taken");
    }
    stream.flush().await.expect("it is taken");
}

/// What the edge says next, reports aside.
async fn heard(stream: &mut TlsStream<TcpStream>) -> Up {
    loop {
        let up = within("a word", wire::read(stream, MAX_FRAME_BYTES)).await.expect("a frame");
        if !matches!(up, Up::Report { .. } | Up::Known(_)) {
            return up;
        }
    }
}

#[tokio::test]
async fn a_service_that_cannot_be_read_leaves_the_table_as_it_was_up_to_the_next_whole_one() {
    let by_hand = ByHand::open().await;
    let link = by_hand.start();
    let (reader, status) = (link.reader(), link.status());
    let knows = |host: &str| reader.load().lookup(host, "/").is_some();
    let run = tokio::spawn(link.run(std::future::pending()));
    let mut stream = by_hand.accept().await;
    assert_eq!(heard(&mut stream).await, Up::Ready);
    let (a, b, c) = (service("a", 1..2), service("b", 2..3), service("c", 4..5));
    let spoilt = service_at(SPOILT, "b", 3..4);
    publish(&mut stream, true, &[&a, &b], 1).await;
    assert!(matches!(heard(&mut stream).await, Up::Acknowledged { version: 1, .. }));
    publish(&mut stream, true, &[&a, &spoilt], 2).await;
    let Up::Unusable { version: 2, why } = heard(&mut stream).await else { panic!("it cannot be used") };
    assert!(why.contains("spoilt..test"), "{why}");
    assert_eq!(status.borrow().problem.as_ref(), Some(&why));
    assert!(knows("a.test") && knows("b.test"), "as it was");
    // An acknowledgement of the third would be one of the second, too.
    publish(&mut stream, false, &[&c], 3).await;
    assert_eq!(heard(&mut stream).await, Up::Unusable { version: 3, why });
    assert!(!knows("c.test"), "what it is different from is not here");
    publish(&mut stream, true, &[&a, &c], 4).await;
    assert!(matches!(heard(&mut stream).await, Up::Acknowledged { version: 4, .. }));
    assert!(knows("a.test") && knows("c.test") && !knows("b.test"));
    assert_eq!(status.borrow().problem, None);
    publish(&mut stream, false, &[&service("d", 5..6)], 5).await;
    assert!(matches!(heard(&mut stream).await, Up::Acknowledged { version: 5, .. }));
    run.abort();
}

#[tokio::test]
async fn a_disk_that_hangs_keeps_no_acknowledgement_and_is_told_when_it_goes_on() {
    let by_hand = ByHand::open().await;
    let mut link = by_hand.start();
    link.save_patience = Duration::from_millis(200);
    let (disk, status) = (Arc::clone(&link.place.disk), link.status());
    let run = tokio::spawn(link.run(std::future::pending()));
    let mut stream = by_hand.accept().await;
    assert_eq!(heard(&mut stream).await, Up::Ready);
    let acknowledged = |version, saved| Up::Acknowledged { version, open: Vec::new(), saved };
    publish(&mut stream, true, &[&service("a", 1..2)], 1).await;
    assert_eq!(heard(&mut stream).await, acknowledged(1, true));
    let (hang, hangs) = std::sync::mpsc::channel::<()>();
    let (hung, is_hung) = oneshot::channel();
    let disk = std::thread::spawn(move || {
        let _turn = disk.ours().expect("it is ours");
        hung.send(()).expect("somebody waits for it");
        hangs.recv().expect_err("nothing is said, but by leaving");
    });
    is_hung.await.expect("it hangs");
    publish(&mut stream, false, &[&service("b", 2..3)], 2).await;
    assert_eq!(heard(&mut stream).await, acknowledged(2, false));
    // Nothing has changed, and it is not on the disk all the same.
    publish(&mut stream, true, &[&service("a", 1..2), &service("b", 2..3)], 3).await;
    assert_eq!(heard(&mut stream).await, acknowledged(3, false));
    assert!(!status.borrow().saved);
    for version in 4..200 {
        publish(&mut stream, false, &[&service("c", version..version + 1)], version).await;
    }
    // As many as may be are begun, and nobody waits for the others.
    let mut last = 3;
    while last < 199 {
        last += 1;
        assert_eq!(heard(&mut stream).await, acknowledged(last, false));
    }
    drop(hang);
    disk.join().expect("no panic");
    // Also what could not even be begun. It may have to wait in line for longer than it is waited for.
    while heard(&mut stream).await != acknowledged(199, true) {}
    assert!(status.borrow().saved);
    let again = saved::load(by_hand.edge.path());
    let Saved::Last(on_disk) = again else { panic!("it is whole") };
    assert!(on_disk.services.iter().any(|spec| spec.pools[0].upstreams[0].generation == Generation(199)));
    run.abort();
}

/// More than the buffers between two sockets hold.
const LONG_BYTES: usize = 12 << 20;
/// Turns of the runtime in which everything is done that can be done.
const TURNS: usize = 1_000;

#[tokio::test]
async fn an_edge_that_is_stopped_in_the_middle_of_a_frame_ends_it_before_it_says_farewell() {
    let by_hand = ByHand::open().await;
    let mut link = by_hand.start();
    link.farewell = STATE_TIMEOUT;
    let (stop, stopped) = oneshot::channel::<()>();
    let run = tokio::spawn(link.run(async {
        drop(stopped.await);
    }));
    let mut stream = by_hand.accept().await;
    assert_eq!(heard(&mut stream).await, Up::Ready);
    // What it cannot use it repeats, in one long frame that nobody reads. All of this is on one thread: when it is our turn
    // again, it has come as far as it can.
    let long = service_at(SPOILT, "b", 3..4);
    let put = Down::Change(Box::new((&Change::Put(long)).into()));
    let put = with_host(&wire::frame(&put).expect("a frame"), &".".repeat(LONG_BYTES));
    let ends = [Down::Begin { whole: true }, Down::Publish { version: 1 }];
    let [begin, publish] = ends.map(|down| wire::frame(&down).expect("a frame"));
    for frame in [begin, put, publish] {
        stream.write_all(&frame).await.expect("it is taken");
    }
    stream.flush().await.expect("it is taken");
    within("its first bytes", stream.get_ref().0.readable()).await.expect("it is open");
    let turns = async || {
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
    };
    turns().await;
    drop(stop);
    turns().await;
    let mut refused = 0;
    loop {
        match within("a word", wire::read(&mut stream, MAX_FRAME_BYTES)).await.expect("whole frames") {
            Up::Unusable { why, .. } => refused += why.len(),
            Up::Report { number, .. } => {
                wire::write(&mut stream, &Down::Received { report: number }).await.expect("it is taken");
            }
            Up::Leaving => break,
            _ => {}
        }
    }
    assert!(refused > LONG_BYTES, "{refused} bytes of a reason");
    within("its end", run).await.expect("no panic");
}

/// A hand-made edge at a shipped engine: it says what it is told to, and a report between, so that it is heard.
struct EdgeByHand {
    incoming: ReadHalf<tokio_rustls::client::TlsStream<TcpStream>>,
    says: mpsc::Sender<Up>,
    beats: JoinHandle<()>,
}

impl EdgeByHand {
    async fn attach(folder: &Path, engine: SocketAddr) -> Self {
        let identity = Identity::read(folder).expect("it has joined");
        let (beside, handed_over) = (Vec::new(), false);
        let attach =
            Attach { version: wire::VERSION, incarnation: 7, cores: 1, epoch: 1, beside, handed_over };
        let attached = identity::attach(&identity, &engine.to_string(), &attach).await;
        let (incoming, mut outgoing) = tokio::io::split(attached.expect("it is let in").0);
        let (says, mut said) = mpsc::channel(8);
        let beats = tokio::spawn(async move {
            for number in 1.. {
                let beat = Duration::from_millis(u64::from(LEASE_MS) / 10);
                let report = Up::Report { number, tallies: Vec::new(), ended: Vec::new() };
                let up = match tokio::time::timeout(beat, said.recv()).await {
                    Ok(None) => return,
                    Ok(Some(up)) => up,
                    Err(_) => report,
                };
                if wire::write(&mut outgoing, &up).await.is_err() {
                    return; // it was sent away
                }
            }
        });
        Self { incoming, says, beats }
    }

    async fn say(&self, up: Up) {
        self.says.send(up).await.expect("it goes on");
    }

    /// The next publication: whether it is whole, its changes and its version.
    async fn publication(&mut self) -> (bool, usize, u64) {
        let (mut is_whole, mut changes) = (false, 0);
        loop {
            let down = wire::read(&mut self.incoming, MAX_FRAME_BYTES);
            match within("a publication", down).await.expect("a frame") {
                Down::Begin { whole } => (is_whole, changes) = (whole, 0),
                Down::Change(_) => changes += 1,
                Down::Publish { version } => return (is_whole, changes, version),
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn an_edge_that_cannot_use_a_publication_is_told_everything_after_a_lease_and_nothing_before() {
    let folder = tempfile::tempdir().expect("a folder");
    let (link, handle, mut writer) = engine(folder.path()).await;
    let addr = link.addr();
    let run = tokio::spawn(link.run(std::future::pending()));
    let own = joined(&handle, addr).await;
    let mut edge = EdgeByHand::attach(own.path(), addr).await;
    edge.say(Up::Ready).await;
    writer.apply(&[Change::Put(service("a", 1..2))]).expect("accepted");
    while edge.publication().await.2 < 1 {}
    let begun = Instant::now();
    let why = "a reason".to_owned();
    edge.say(Up::Unusable { version: 1, why: why.clone() }).await;
    until("the problem", || handle.edges()[0].problem.as_ref() == Some(&why)).await;
    // An acknowledgement of what was before it is none of it.
    edge.say(Up::Acknowledged { version: 0, open: Vec::new(), saved: true }).await;
    until("the acknowledgement", || handle.edges()[0].saved).await;
    assert_eq!(handle.edges()[0].problem.as_ref(), Some(&why));
    for (name, generation) in [("b", 2), ("c", 3)] {
        let added = service(name, generation..generation + 1);
        writer.apply(&[Change::Put(added)]).expect("accepted");
    }
    assert_eq!(edge.publication().await, (true, 3, 3), "everything at once");
    assert!(begun.elapsed() >= Duration::from_millis(u64::from(LEASE_MS)), "it may be the same again");
    edge.say(Up::Acknowledged { version: 3, open: Vec::new(), saved: true }).await;
    within("the acknowledgement", writer.acknowledged(3)).await;
    until("no problem", || handle.edges()[0].problem.is_none()).await;
    edge.beats.abort();
    run.abort();
}

#[tokio::test]
async fn an_edge_that_never_acknowledges_is_given_up_told_and_taken_in_again_when_it_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let (link, handle, mut writer) = engine(folder.path()).await;
    let addr = link.addr();
    let run = tokio::spawn(link.run(std::future::pending()));
    let own = joined(&handle, addr).await;
    let mut edge = EdgeByHand::attach(own.path(), addr).await;
    edge.say(Up::Ready).await;
    let version = writer.apply(&[Change::Put(service("a", 1..2))]).expect("accepted").version;
    while edge.publication().await.2 < version {}
    edge.say(Up::Acknowledged { version, open: Vec::new(), saved: true }).await;
    within("the acknowledgement", writer.acknowledged(version)).await;
    // From here on it beats, and says nothing of what it is told.
    let old = Arc::clone(writer.upstream(Generation(1)).expect("it is known"));
    let begun = Instant::now();
    let version = writer.apply(&[Change::Put(service("a", 2..3))]).expect("accepted").version;
    within("the publication to end", writer.acknowledged(version)).await;
    let patience = Duration::from_millis(u64::from(LEASE_MS * PATIENCE_LEASES));
    assert!(begun.elapsed() >= patience, "it has had its time: {:?}", begun.elapsed());
    within("the drain to end", old.drained()).await;
    assert_eq!(old.receipt().lost.len(), 1, "it is told");
    assert_eq!(handle.edges()[0].state, EdgeState::Lost);
    edge.beats.abort();

    // It comes back, and is as it was: nobody waits for it.
    let mut edge = EdgeByHand::attach(own.path(), addr).await;
    edge.say(Up::Ready).await;
    until("the edge", || handle.edges()[0].state == EdgeState::Connected).await;
    assert!(handle.edges()[0].problem.as_ref().is_some_and(|why| why.contains("do not wait for it")));
    let begun = Instant::now();
    let version = writer.apply(&[Change::Put(service("a", 3..4))]).expect("accepted").version;
    within("the publication to end", writer.acknowledged(version)).await;
    assert!(begun.elapsed() < patience, "{:?}", begun.elapsed());
    while edge.publication().await.2 < version {}
    edge.say(Up::Acknowledged { version, open: Vec::new(), saved: true }).await;
    until("it to be waited for", || handle.edges()[0].table_version == version).await;
    assert_eq!(handle.edges()[0].problem, None);
    let version = writer.apply(&[Change::Put(service("a", 4..5))]).expect("accepted").version;
    let soon = Duration::from_millis(u64::from(LEASE_MS));
    assert!(tokio::time::timeout(soon, writer.acknowledged(version)).await.is_err(), "as any other");
    while edge.publication().await.2 < version {}
    edge.say(Up::Acknowledged { version, open: Vec::new(), saved: true }).await;
    within("the acknowledgement", writer.acknowledged(version)).await;
    edge.beats.abort();
    run.abort();
}
