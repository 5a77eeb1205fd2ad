//! An edge under test, origins that follow a script and remember what they saw, and a client that sends
//! exactly the bytes that it is told to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use peregrine_proxy::{Config, Edge};
use peregrine_routing::{
    Address, Balance, Change, Generation, HostPattern, PoolSpec, RouteSpec, ServicePolicy, ServiceSpec,
    TableWriter, Upstream, UpstreamProtocol, UpstreamSpec,
};
use tokio::sync::oneshot;

/// No test waits longer than this for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until a state is reached.
pub(crate) fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Waits until a connection that was idle for as long as a busy machine pauses is trusted with requests that must
/// not be sent twice. Those that are idle now are older than that.
pub(crate) fn until_trusted(upstream: &Upstream) {
    until("idle connections are trusted", || upstream.trusted_idle_ms(peregrine_proxy::now_ms()) >= 1_000);
}

// --- services -------------------------------------------------------------------------------------------

static GENERATIONS: AtomicU64 = AtomicU64::new(1);

pub(crate) fn upstream(address: SocketAddr) -> UpstreamSpec {
    let generation = Generation(GENERATIONS.fetch_add(1, Ordering::Relaxed));
    UpstreamSpec {
        generation,
        name: format!("copy-{}", generation.0).into(),
        address: Address::Socket(address),
        protocol: UpstreamProtocol::Http1,
        weight: 1,
        ready_connections: 0,
    }
}

pub(crate) fn h2c(address: SocketAddr) -> UpstreamSpec {
    UpstreamSpec { protocol: UpstreamProtocol::H2c, ..upstream(address) }
}

/// A catch-all service.
pub(crate) fn service(upstreams: Vec<UpstreamSpec>) -> ServiceSpec {
    ServiceSpec {
        name: "web".into(),
        routes: vec![RouteSpec { host: HostPattern::Any, path_prefix: "/".into() }],
        pools: vec![PoolSpec { name: "main".into(), weight: 1, standby: false, upstreams }],
        balance: Balance::default(),
        policy: ServicePolicy::default(),
    }
}

// --- the edge -------------------------------------------------------------------------------------------

pub(crate) struct TestEdge {
    pub(crate) addr: SocketAddr,
    https: Option<SocketAddr>,
    pub(crate) writer: TableWriter,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) fn config() -> Config {
    Config { cores: 1, drain_timeout_ms: 2_000, ..Config::default() }
}

impl TestEdge {
    pub(crate) fn start(service: ServiceSpec) -> Self {
        Self::start_with(config(), vec![service])
    }

    pub(crate) fn start_with(config: Config, services: Vec<ServiceSpec>) -> Self {
        Self::start_full(config, services, &[], |edge| edge)
    }

    /// As `start_with`, with more in the table, and an edge that is told more.
    pub(crate) fn start_full(
        mut config: Config,
        services: Vec<ServiceSpec>,
        more: &[Change],
        told: impl FnOnce(Edge) -> Edge,
    ) -> Self {
        let (mut writer, reader) = peregrine_routing::table();
        let mut changes: Vec<Change> = services.into_iter().map(Change::Put).collect();
        changes.extend_from_slice(more);
        writer.apply(&changes).expect("the services are accepted");
        if config.http.is_empty() {
            config.http = vec!["127.0.0.1:0".parse().expect("address")];
        }
        let edge = told(Edge::bind(config, reader).expect("binds"));
        let (addr, https) = (edge.addrs()[0], edge.https_addrs().first().copied());
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(edge.run(async move { drop(stopped.await) })).expect("ends as asked");
        });
        Self { addr, https, writer, stop: Some(stop), thread: Some(thread) }
    }

    /// An edge in front of one origin.
    pub(crate) fn before(origin: &Origin) -> Self {
        Self::start(service(vec![upstream(origin.addr)]))
    }

    /// An edge in front of one origin, with the origin's upstream.
    pub(crate) fn with_upstream(origin: &Origin) -> (Self, Arc<Upstream>) {
        let spec = upstream(origin.addr);
        let edge = Self::start(service(vec![spec.clone()]));
        let upstream = edge.upstream(&spec);
        (edge, upstream)
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.addr)
    }

    pub(crate) fn https(&self) -> SocketAddr {
        self.https.expect("speaks TLS")
    }

    pub(crate) fn upstream(&self, spec: &UpstreamSpec) -> Arc<Upstream> {
        Arc::clone(self.writer.upstream(spec.generation).expect("is known"))
    }

    pub(crate) fn put(&mut self, service: ServiceSpec) -> u64 {
        self.writer.apply(&[Change::Put(service)]).expect("is accepted").version
    }

    pub(crate) fn wait_acknowledged(&self, version: u64) {
        block_on(self.writer.acknowledged(version));
    }

    /// Asks for a shutdown without waiting for it.
    pub(crate) fn ask_to_stop(&mut self) {
        drop(self.stop.take());
    }

    pub(crate) fn wait_stopped(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the edge does not panic");
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for TestEdge {
    fn drop(&mut self) {
        self.ask_to_stop();
        if !std::thread::panicking() {
            self.wait_stopped();
        }
    }
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await.expect("comes in time") })
}

// --- origins --------------------------------------------------------------------------------------------

/// A request as an origin saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }

    /// Every value of a field.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        fields(&self.head, name)
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }
}

fn fields<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines.filter(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

/// One connection of an origin's script.
pub(crate) struct OriginConn {
    pub(crate) socket: TcpStream,
    seen: Arc<Mutex<Vec<Seen>>>,
    pub(crate) unread: Vec<u8>,
}

impl OriginConn {
    /// Reads a request head; `None` when the edge has closed.
    pub(crate) fn head(&mut self) -> Option<String> {
        loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                let rest = self.unread.split_off(end + 4);
                let head = std::mem::replace(&mut self.unread, rest);
                return Some(String::from_utf8(head).expect("is text"));
            }
            self.more()?;
        }
    }

    pub(crate) fn more(&mut self) -> Option<usize> {
        let mut chunk = [0; 16 * 1024];
        let read = self.socket.read(&mut chunk).ok().filter(|read| *read > 0)?;
        self.unread.extend_from_slice(&chunk[..read]);
        Some(read)
    }

    /// Reads a whole request and remembers it.
    pub(crate) fn request(&mut self) -> Option<Seen> {
        let head = self.head()?;
        let body = if fields(&head, "transfer-encoding").is_empty() {
            let length = fields(&head, "content-length").first().map_or(0, |v| v.parse().expect("length"));
            while self.unread.len() < length {
                self.more()?;
            }
            self.unread.drain(..length).collect()
        } else {
            self.chunked()?
        };
        let seen = Seen { head, body };
        self.seen.lock().expect("lock").push(seen.clone());
        Some(seen)
    }

    fn chunked(&mut self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            if let Some((parts, used)) = dechunk(&self.unread) {
                self.unread.drain(..used);
                body.extend(parts.0);
                return Some(body);
            }
            self.more()?;
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        // The edge may have left, which the test then sees elsewhere.
        drop(self.socket.write_all(bytes));
    }

    pub(crate) fn answer(&mut self, body: &str) {
        self.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
    }
}

pub(crate) fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Body and trailer section of a complete chunked body at the start of `bytes`, and its length.
pub(crate) fn dechunk(bytes: &[u8]) -> Option<((Vec<u8>, String), usize)> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        // The end of the last chunk may be on its way still.
        let line = find(bytes.get(at..)?, b"\r\n")?;
        let text = std::str::from_utf8(&bytes[at..at + line]).expect("size is text");
        let size = usize::from_str_radix(text.split(';').next().unwrap_or(text), 16).expect("size is hex");
        at += line + 2;
        if size == 0 {
            if bytes.get(at..at + 2)? == b"\r\n" {
                return Some(((body, String::new()), at + 2));
            }
            let end = find(&bytes[at..], b"\r\n\r\n")?;
            let trailers = String::from_utf8(bytes[at..at + end + 2].to_vec()).expect("is text");
            return Some(((body, trailers), at + end + 4));
        }
        body.extend_from_slice(bytes.get(at..at + size)?);
        at += size + 2;
    }
}

pub(crate) struct Origin {
    pub(crate) addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
}

impl Origin {
    /// Runs `script` for every connection, each in a thread.
    pub(crate) fn scripted(script: impl Fn(&mut OriginConn) + Send + Sync + 'static) -> Self {
        Self::scripted_on(TcpListener::bind("127.0.0.1:0").expect("binds"), script)
    }

    pub(crate) fn scripted_on(
        listener: TcpListener,
        script: impl Fn(&mut OriginConn) + Send + Sync + 'static,
    ) -> Self {
        let addr = listener.local_addr().expect("address");
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let connections = Arc::new(AtomicUsize::new(0));
        let (all, count, script) = (Arc::clone(&seen), Arc::clone(&connections), Arc::new(script));
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                socket.set_nodelay(true).expect("nodelay");
                count.fetch_add(1, Ordering::SeqCst);
                let (seen, script) = (Arc::clone(&all), Arc::clone(&script));
                std::thread::spawn(move || {
                    script(&mut OriginConn { socket, seen, unread: Vec::new() });
                });
            }
        });
        Self { addr, seen, connections }
    }

    /// Answers every request with "ok" and keeps the connection.
    pub(crate) fn ok() -> Self {
        Self::scripted(|conn| {
            while conn.request().is_some() {
                conn.answer("ok");
            }
        })
    }

    /// Answers every request with this text.
    pub(crate) fn saying(text: &'static str) -> Self {
        Self::scripted(move |conn| {
            while conn.request().is_some() {
                conn.answer(text);
            }
        })
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("lock").clone()
    }

    pub(crate) fn last(&self) -> Seen {
        self.seen().pop().expect("a request was seen")
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// An address where nobody listens.
pub(crate) fn dead_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    listener.local_addr().expect("address")
}

// --- clients --------------------------------------------------------------------------------------------

/// An answer as a client saw it.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: String,
}

impl Answer {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        fields(&self.head, name)
    }

    pub(crate) fn reason(&self) -> &str {
        self.field("x-peregrine-reason").unwrap_or("-")
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("is text")
    }
}

/// A client that speaks HTTP/1.1 byte by byte.
pub(crate) struct Client<S = TcpStream> {
    pub(crate) socket: S,
    pub(crate) unread: Vec<u8>,
}

impl Client {
    pub(crate) fn connect(addr: SocketAddr) -> Self {
        let socket = TcpStream::connect(addr).expect("connects");
        socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
        socket.set_nodelay(true).expect("nodelay");
        Self::over(socket)
    }
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn over(socket: S) -> Self {
        Self { socket, unread: Vec::new() }
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.socket.write_all(bytes.as_ref()).expect("is sent");
        self
    }

    /// As `send`, for bytes that the edge may refuse to take.
    pub(crate) fn send_anyhow(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        drop(self.socket.write_all(bytes.as_ref()));
        self
    }

    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: a.test\r\n\r\n")).answer()
    }

    pub(crate) fn post(&mut self, path: &str, body: &str) -> Answer {
        let length = body.len();
        self.send(format!("POST {path} HTTP/1.1\r\nHost: a.test\r\nContent-Length: {length}\r\n\r\n{body}"))
            .answer()
    }

    /// Reads more; 0 at the end, and also when the connection was reset.
    pub(crate) fn more(&mut self) -> usize {
        let mut chunk = [0; 64 * 1024];
        match self.socket.read(&mut chunk) {
            Ok(read) => {
                self.unread.extend_from_slice(&chunk[..read]);
                read
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("nothing came: {error}; so far {:?}", String::from_utf8_lossy(&self.unread)),
        }
    }

    pub(crate) fn head(&mut self) -> String {
        loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                let rest = self.unread.split_off(end + 4);
                let head = std::mem::replace(&mut self.unread, rest);
                return String::from_utf8(head).expect("is text");
            }
            assert!(self.more() > 0, "closed before the head: {:?}", String::from_utf8_lossy(&self.unread));
        }
    }

    /// Reads one answer.
    pub(crate) fn answer(&mut self) -> Answer {
        self.answer_to("GET")
    }

    pub(crate) fn answer_to(&mut self, method: &str) -> Answer {
        let head = self.head();
        let status = head.get(9..12).and_then(|s| s.parse().ok()).expect("status line");
        let mut trailers = String::new();
        let body = if method == "HEAD" || matches!(status, 100..=199 | 204 | 304) {
            Vec::new()
        } else if let Some(length) = fields(&head, "content-length").first() {
            let length: usize = length.parse().expect("length");
            while self.unread.len() < length {
                assert!(self.more() > 0, "closed in the body");
            }
            self.unread.drain(..length).collect()
        } else if fields(&head, "transfer-encoding") == ["chunked"] {
            loop {
                if let Some(((body, after), used)) = dechunk(&self.unread) {
                    self.unread.drain(..used);
                    trailers = after;
                    break body;
                }
                assert!(self.more() > 0, "closed in the body");
            }
        } else {
            while self.more() > 0 {}
            std::mem::take(&mut self.unread)
        };
        Answer { status, head, body, trailers }
    }

    /// Whether the edge closes, without sending anything more.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && self.more() == 0
    }
}
