//! An HTTP/1.1 and h2c server that remembers every request id it executed.
//!
//! It is the workload of tests and of the demo: in-process through [`Origin::bind`], or as a small static binary in a
//! container (`peregrine-bench origin`). It can be born broken ([`OriginOptions::fault`]) or be broken while it runs
//! (`POST /__origin/fault`). It never merges, retries or forgets a request: what it recorded is what happened.
//!
//! | path | answer |
//! |---|---|
//! | `/` | a small page that names the instance |
//! | `/healthz` | 200, or 503 while starting or told to be unhealthy |
//! | `/bytes/N` | N bytes; the byte at offset i is `a` + i mod 26 |
//! | `/slow?ms=` | the page after a wait |
//! | `/stream?chunks=&ms=` | chunks with a wait before each, without a length |
//! | `/sse?ms=&count=` | events with ids, resumed after `Last-Event-ID`; `count=0` goes on until shutdown |
//! | `/echo` | the request's body streamed back, its method in `x-method` |
//! | `/upload` | length and SHA-256 of the body, as JSON |
//! | `/ws` | WebSocket echo |
//! | `/trailers` | a gRPC-shaped answer with trailers |
//! | `/messages?ms=` | gRPC messages with a wait before each, until shutdown |
//! | `/status/N` | status N |
//! | `/headers` | the request as it arrived, as JSON |
//! | `/cookie` | two `Set-Cookie` lines; the body is the request's cookies |
//! | `/__origin/stats`, `/__origin/ids` | the oracle |
//! | `/__origin/fault` | GET tells the faults, POST changes some |
//!
//! Every answer carries `x-instance` and, where the request had one, its `x-req-id`.

mod body;
mod fault;
mod record;
mod respond;
mod route;
mod serve;
mod websocket;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::Method;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) use self::body::pattern_matches;
pub use self::fault::{Fault, FaultChange};
use self::record::Ledger;
pub use self::record::{Protocol, Record, Stats, unix_ns};

/// The header by which clients name a request.
pub const REQUEST_ID_HEADER: &str = "x-req-id";
/// The header by which origins name themselves.
pub const INSTANCE_HEADER: &str = "x-instance";
/// How long a shutdown waits for requests in flight, in milliseconds.
pub const SHUTDOWN_TIMEOUT_MS: u64 = 10_000;

/// What an origin is.
#[derive(Debug, Clone)]
pub struct OriginOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The name in `x-instance`; `None` takes the address it listens on.
    pub instance: Option<String>,
    /// The version in `x-version` and on the page.
    pub version: Option<String>,
    /// Every route, `/healthz` included, answers 503 for this long after the start, in milliseconds.
    pub startup_ms: u64,
    /// The faults that it is born with.
    pub fault: Fault,
    /// A file that gets one line per request with an id, which several origins may share; or `tcp://HOST:PORT`, the
    /// address of a [`crate::collector::Collector`].
    pub record: Option<PathBuf>,
}

impl Default for OriginOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            instance: None,
            version: None,
            startup_ms: 0,
            fault: Fault::default(),
            record: None,
        }
    }
}

impl OriginOptions {
    /// Options of an origin with a name, on a free loopback port.
    #[must_use]
    pub fn named(instance: &str) -> Self {
        Self { instance: Some(instance.to_owned()), ..Self::default() }
    }
}

/// A running origin. Dropping it cuts its connections at once, as a crash would; [`Origin::shutdown`] is polite.
#[derive(Debug)]
pub struct Origin {
    addr: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl Origin {
    /// Starts an origin on the current tokio runtime.
    ///
    /// # Errors
    /// The address cannot be bound or the record file cannot be opened.
    pub async fn bind(options: OriginOptions) -> io::Result<Self> {
        let listener = TcpListener::bind(options.listen).await?;
        let addr = listener.local_addr()?;
        let instance = options.instance.unwrap_or_else(|| addr.to_string());
        if !instance.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("instance name `{instance}` has characters that do not fit a header"),
            ));
        }
        let shared = Arc::new(Shared {
            ledger: Ledger::open(options.record.as_deref(), &instance)?,
            instance,
            version: options.version,
            ready_at: Instant::now() + Duration::from_millis(options.startup_ms),
            faults: fault::Faults::new(options.fault),
            stopping: watch::Sender::new(false),
            counters: Counters::default(),
        });
        let serving = tokio::spawn(serve::accept_until_stopped(listener, shared.clone()));
        Ok(Self { addr, shared, serving })
    }

    /// The address that it listens on.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it did so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Every execution so far, in order of arrival.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.shared.ledger.records()
    }

    /// Every id so far with its number of executions.
    #[must_use]
    pub fn ids(&self) -> HashMap<Arc<str>, u64> {
        self.shared.ledger.executions()
    }

    /// Changes some faults, as `POST /__origin/fault` does.
    pub fn change_fault(&self, change: FaultChange) -> Fault {
        self.shared.faults.change(change)
    }

    /// Stops accepting, finishes what is in flight within [`SHUTDOWN_TIMEOUT_MS`], cuts the rest; returns the last count.
    pub async fn shutdown(mut self) -> Stats {
        self.shared.stopping.send_replace(true);
        if let Err(error) = (&mut self.serving).await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
        self.shared.stats()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// What the connections of one origin share.
#[derive(Debug)]
struct Shared {
    instance: String,
    version: Option<String>,
    ready_at: Instant,
    faults: fault::Faults,
    ledger: Ledger,
    stopping: watch::Sender<bool>,
    counters: Counters,
}

impl Shared {
    fn stats(&self) -> Stats {
        Stats {
            connections: self.counters.accepted.load(Ordering::Relaxed),
            open_connections: self.counters.open.load(Ordering::Relaxed),
            in_flight: self.counters.in_flight.load(Ordering::Relaxed),
            ..self.ledger.stats(&self.instance)
        }
    }

    /// Records how a WebSocket ended, as the execution of "`<id>/closed`": its status is the code of the client's close
    /// frame, 1006 if there was none or a frame was torn.
    fn websocket_ended(&self, id: Option<&str>, connection: &serve::Connection, code: u16) {
        let Some(id) = id.map(|id| format!("{id}/closed")) else { return };
        let via = (connection.protocol, connection.number);
        let close = Method::from_bytes(b"CLOSE").expect("a token");
        if let Err(error) = self.ledger.arrived(Some(&id), &close, via, code) {
            eprintln!("origin {}: cannot record: {error}", self.instance);
        }
    }

    fn is_ready(&self) -> bool {
        Instant::now() >= self.ready_at
    }

    /// Returns once the origin shuts down.
    async fn stopped(&self) {
        // The sender lives in `self`, so the wait cannot fail.
        drop(self.stopping.subscribe().wait_for(|stopping| *stopping).await);
    }
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    open: AtomicU64,
    in_flight: AtomicU64,
}

/// Counts one up while it lives.
#[derive(Debug)]
struct Gauge {
    shared: Arc<Shared>,
    of: fn(&Counters) -> &AtomicU64,
}

impl Gauge {
    fn raise(shared: &Arc<Shared>, of: fn(&Counters) -> &AtomicU64) -> Self {
        of(&shared.counters).fetch_add(1, Ordering::Relaxed);
        Self { shared: shared.clone(), of }
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        (self.of)(&self.shared.counters).fetch_sub(1, Ordering::Relaxed);
    }
}
