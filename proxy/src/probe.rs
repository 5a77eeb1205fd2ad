//! Active health checks. One task per upstream that has a check asks it again and again, sets its health
//! by thresholds and its latency by measurement. A result that comes after its upstream was retired
//! changes nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HOST, USER_AGENT};
use http::{HeaderValue, Request, Uri};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use peregrine_routing::{
    Generation, Health, HealthCheck, HealthCheckKind, ProxyProtocol, TableReader, Upstream, UpstreamProtocol,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::body::ForwardBody;
use crate::clock::{now_ms, now_us};
use crate::core::LocalExecutor;
use crate::ids::Random;
use crate::proxy_protocol;
use crate::resolve::{DialError, Resolver};

/// Shortest time between two looks at the table: a burst of changes is taken in at once.
const SETTLE: Duration = Duration::from_millis(50);
/// Shortest time between two probes of one upstream.
const MIN_INTERVAL_MS: u32 = 10;

/// Why a probe was bad.
#[derive(Debug, thiserror::Error)]
enum Bad {
    #[error("no answer in time")]
    Timeout,
    #[error("status {0}")]
    Status(u16),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("{0:?} is no path to probe")]
    Path(String),
}

struct Probed {
    asks: Asks,
    task: JoinHandle<()>,
}

/// What is asked, and what its connections begin with: an upstream that insists on that would take no probe without it.
#[derive(Clone, PartialEq, Eq)]
struct Asks {
    check: HealthCheck,
    introduction: Option<ProxyProtocol>,
}

impl Drop for Probed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Keeps one prober per upstream of the table that has a check. Runs until it is dropped.
pub(crate) async fn run(table: TableReader, resolver: Resolver) {
    let mut probed: HashMap<Generation, Probed> = HashMap::new();
    let mut version = table.load().version();
    loop {
        reconcile(&table, &resolver, &mut probed);
        version = table.newer_than(version).await;
        tokio::time::sleep(SETTLE).await;
    }
}

fn reconcile(table: &TableReader, resolver: &Resolver, probed: &mut HashMap<Generation, Probed>) {
    let snapshot = table.load();
    let mut wanted: HashMap<Generation, (Arc<Upstream>, Asks)> = HashMap::new();
    snapshot.for_each_service(|service| {
        let Some(check) = &service.policy().health else { return };
        for (_, upstream) in service.upstreams() {
            let introduction = proxy_protocol::wanted(service.policy(), upstream);
            let asks = Asks { check: check.clone(), introduction };
            wanted.insert(upstream.generation(), (Arc::clone(upstream), asks));
        }
    });
    probed.retain(|generation, probed| wanted.get(generation).is_some_and(|(_, asks)| *asks == probed.asks));
    for (generation, (upstream, asks)) in wanted {
        probed.entry(generation).or_insert_with(|| {
            let task = tokio::task::spawn_local(probe_on(upstream, asks.clone(), resolver.clone()));
            Probed { asks, task }
        });
    }
}

async fn probe_on(upstream: Arc<Upstream>, asks: Asks, resolver: Resolver) {
    let random = Random::new();
    let check = &asks.check;
    let interval = u64::from(check.interval_ms.max(MIN_INTERVAL_MS));
    let (mut good, mut bad) = (0_u32, 0_u32);
    while !upstream.is_retired() {
        let result = probe(&upstream, &asks, &resolver, random.next()).await;
        if upstream.is_retired() {
            return;
        }
        match result {
            Ok(latency_us) => {
                (good, bad) = (good.saturating_add(1), 0);
                upstream.set_probe_latency_us(latency_us);
                if good >= check.healthy_threshold {
                    tell(&upstream, Health::Healthy, None);
                }
            }
            Err(cause) => {
                (good, bad) = (0, bad.saturating_add(1));
                if bad >= check.unhealthy_threshold {
                    tell(&upstream, Health::Unhealthy, Some(&cause));
                }
            }
        }
        // A tenth of jitter, so that probes of many upstreams do not fall into step.
        let jitter = interval / 10;
        let pause = interval - jitter / 2 + random.next() % (jitter + 1);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

fn tell(upstream: &Upstream, health: Health, cause: Option<&Bad>) {
    if upstream.health_here() != health {
        let cause = cause.map(ToString::to_string);
        tracing::info!(upstream = %upstream.name(), generation = %upstream.generation(), ?health, cause, "health has changed");
    }
    upstream.set_health(health, now_ms());
}

/// Asks once; how long it took in microseconds, from the start of the connection.
async fn probe(upstream: &Upstream, asks: &Asks, resolver: &Resolver, random: u64) -> Result<u64, Bad> {
    let started_us = now_us();
    let timeout = Duration::from_millis(u64::from(asks.check.timeout_ms.max(1)));
    let asked = tokio::time::timeout(timeout, ask(upstream, asks, resolver, random));
    asked.await.map_err(|_| Bad::Timeout)??;
    Ok(now_us() - started_us)
}

async fn ask(upstream: &Upstream, asks: &Asks, resolver: &Resolver, random: u64) -> Result<(), Bad> {
    let mut socket = resolver.dial(upstream.address(), random).await?;
    if let Some(version) = asks.introduction {
        socket.write_all(proxy_protocol::of_nobody(version)).await?;
    }
    let HealthCheckKind::Http { path, host } = &asks.check.kind else { return Ok(()) };
    let host = host.as_ref().map_or_else(|| upstream.address().to_string(), ToString::to_string);
    let status = match upstream.protocol() {
        UpstreamProtocol::Http1 => ask_http1(socket, path, &host).await?,
        UpstreamProtocol::H2c => ask_http2(socket, path, &host).await?,
    };
    if (200..400).contains(&status) { Ok(()) } else { Err(Bad::Status(status)) }
}

const AGENT: HeaderValue = HeaderValue::from_static("peregrine-probe");

fn request(uri: Uri, host: Option<&str>) -> Request<ForwardBody> {
    let mut request = Request::new(ForwardBody::Empty);
    *request.uri_mut() = uri;
    request.headers_mut().insert(USER_AGENT, AGENT);
    if let Some(host) = host.and_then(|host| HeaderValue::from_str(host).ok()) {
        request.headers_mut().insert(HOST, host);
    }
    request
}

fn bad_path(path: &str) -> Bad {
    Bad::Path(path.to_owned())
}

async fn ask_http1(socket: TcpStream, path: &str, host: &str) -> Result<u16, Bad> {
    let uri: Uri = path.parse().map_err(|_| bad_path(path))?;
    let (mut sender, conn) = http1::handshake(TokioIo::new(socket)).await?;
    let answer = sender.send_request(request(uri, Some(host)));
    tokio::select! {
        biased;
        answer = answer => Ok(answer?.status().as_u16()),
        ended = conn => Err(ended.err().map_or(Bad::Timeout, Bad::Http)),
    }
}

async fn ask_http2(socket: TcpStream, path: &str, host: &str) -> Result<u16, Bad> {
    let uri = Uri::builder().scheme("http").authority(host).path_and_query(path).build();
    let uri = uri.map_err(|_| bad_path(path))?;
    let builder = http2::Builder::new(LocalExecutor).timer(TokioTimer::new()).clone();
    let (mut sender, conn) = builder.handshake(TokioIo::new(socket)).await?;
    let answer = sender.send_request(request(uri, None));
    tokio::select! {
        biased;
        answer = answer => Ok(answer?.status().as_u16()),
        ended = conn => Err(ended.err().map_or(Bad::Timeout, Bad::Http)),
    }
}
