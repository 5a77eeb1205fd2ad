//! HTTP/2 connections that the upstream closes while they are idle.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::frames;
use super::stale::next;
use super::support::{Client, TestEdge, h2c, service, until, until_trusted};

/// Requests of the long test.
const REQUESTS: usize = 8_000;
/// The origin closes a connection when it was idle for so long at the most.
const MAX_IDLE_MS: u64 = 5;
/// Idle HTTP/2 connections beside which one core opens another (`MAX_IDLE_HTTP2_CONNECTIONS`).
const MAX_IDLE_CONNECTIONS: usize = 4;

/// An origin that speaks HTTP/2 with prior knowledge and closes idle connections without a word.
struct Impatient {
    addr: SocketAddr,
    /// How often each request was executed.
    executed: Arc<Vec<AtomicUsize>>,
    open: Arc<AtomicUsize>,
    opened: Arc<AtomicUsize>,
}

/// What is under way on a connection, and when the last of it ended.
#[derive(Clone, Copy)]
struct Use {
    in_flight: usize,
    /// Not before the first request: who closes a connection before anything has come on it fails what is on its way, whoever asks.
    ended: Option<Instant>,
}

impl Impatient {
    /// `idle_ms` says after how long the next connection is closed.
    fn start(requests: usize, idle_ms: impl Fn() -> u64 + Send + 'static) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        listener.set_nonblocking(true).expect("no waiting");
        let addr = listener.local_addr().expect("address");
        let executed: Arc<Vec<_>> = Arc::new((0..requests).map(|_| AtomicUsize::new(0)).collect());
        let (open, opened) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let (all, now_open, count) = (Arc::clone(&executed), Arc::clone(&open), Arc::clone(&opened));
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
                while let Ok((socket, _)) = listener.accept().await {
                    socket.set_nodelay(true).expect("nodelay");
                    count.fetch_add(1, Ordering::SeqCst);
                    now_open.fetch_add(1, Ordering::SeqCst);
                    let (executed, open) = (Arc::clone(&all), Arc::clone(&now_open));
                    let idle = Duration::from_millis(idle_ms());
                    tokio::spawn(async move {
                        serve(socket, executed, idle).await;
                        open.fetch_sub(1, Ordering::SeqCst);
                    });
                }
            });
        });
        Self { addr, executed, open, opened }
    }
}

/// Serves a connection until it has been idle for so long. What it is drops it, and nobody is told.
async fn serve(socket: TcpStream, executed: Arc<Vec<AtomicUsize>>, idle: Duration) {
    let usage = Arc::new(std::sync::Mutex::new(Use { in_flight: 0, ended: None }));
    let shared = Arc::clone(&usage);
    let answer = service_fn(move |request: Request<Incoming>| {
        let (executed, usage) = (Arc::clone(&executed), Arc::clone(&shared));
        usage.lock().expect("lock").in_flight += 1;
        async move {
            let id: usize = request.uri().path()[1..].parse().expect("an id");
            drop(request.into_body().collect().await);
            executed[id].fetch_add(1, Ordering::SeqCst);
            let mut usage = usage.lock().expect("lock");
            *usage = Use { in_flight: usage.in_flight - 1, ended: Some(Instant::now()) };
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok"))))
        }
    });
    let http = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), answer);
    let mut http = std::pin::pin!(http);
    loop {
        let Use { in_flight, ended } = *usage.lock().expect("lock");
        let idle_since = ended.filter(|_| in_flight == 0);
        let until = idle_since.unwrap_or_else(Instant::now) + idle;
        if idle_since.is_some() && until <= Instant::now() {
            return;
        }
        tokio::select! {
            // What was answered is written before anything is closed.
            biased;
            _ = &mut http => return,
            () = tokio::time::sleep_until(until.into()) => {}
        }
    }
}

#[test]
fn an_http2_origin_that_closes_idle_connections_at_once_costs_no_request_and_doubles_none() {
    let random = AtomicU64::new(1);
    let origin = Impatient::start(REQUESTS, move || 1 + next(&random) % MAX_IDLE_MS);
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    // One client: a stream that is in flight for the edge is not over for the origin.
    let mut client = edge.client();
    let random = AtomicU64::new(2);
    let mut failed = Vec::new();
    for id in 0..REQUESTS {
        let path = format!("/{id}");
        let answer = if id.is_multiple_of(2) { client.get(&path) } else { client.post(&path, "body") };
        if (answer.status, answer.reason()) != (200, "-") {
            failed.push((id, answer.status, answer.reason().to_owned()));
        }
        // Connections become as old as they get, at any moment of which the next request comes.
        if next(&random).is_multiple_of(4) {
            std::thread::park_timeout(Duration::from_micros(next(&random) % (1_000 * (MAX_IDLE_MS + 1))));
        }
    }
    assert!(failed.is_empty(), "{} requests failed: {failed:?}", failed.len());
    let wrong = origin.executed.iter().filter(|count| count.load(Ordering::SeqCst) != 1).count();
    assert_eq!(wrong, 0, "each request is executed exactly once");
    assert!(origin.opened.load(Ordering::SeqCst) > 1, "it closes connections");
}

fn get(client: &mut Client, origin: &frames::Origin) -> usize {
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    answered(client, origin)
}

fn post(client: &mut Client, origin: &frames::Origin) -> usize {
    client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\n\r\nx");
    answered(client, origin)
}

/// The connection on which a request came.
fn answered(client: &mut Client, origin: &frames::Origin) -> usize {
    let got = origin.request();
    origin.answer(&got, "ok");
    assert_eq!(client.answer().status, 200);
    got.conn
}

#[test]
fn a_request_that_must_not_be_sent_twice_takes_no_idle_http2_connection_before_one_has_lasted() {
    let origin = frames::Origin::start();
    let spec = h2c(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let upstream = edge.upstream(&spec);
    let mut client = edge.client();
    let first = get(&mut client, &origin);
    until("the connection is idle", || upstream.in_flight() == 0);
    let second = post(&mut client, &origin);
    assert_ne!(first, second, "a connection of its own");
    until_trusted(&upstream);
    let third = get(&mut client, &origin);
    assert_eq!(post(&mut client, &origin), third, "it was used a moment ago");
}

#[test]
fn an_http2_connection_with_a_stream_in_flight_is_not_idle() {
    let origin = frames::Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let (mut slow, mut client) = (edge.client(), edge.client());
    slow.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    let under_way = origin.request();
    assert_eq!(post(&mut client, &origin), under_way.conn);
    origin.answer(&under_way, "late");
    assert_eq!(slow.answer().text(), "late");
}

#[test]
fn an_idle_http2_connection_that_is_closed_teaches_how_long_they_are_kept() {
    let origin = frames::Origin::start();
    let spec = h2c(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let upstream = edge.upstream(&spec);
    let mut client = edge.client();
    let conn = get(&mut client, &origin);
    until_trusted(&upstream);
    let trusted_ms = || upstream.trusted_idle_ms(peregrine_proxy::now_ms());
    let again = get(&mut client, &origin);
    assert_eq!(conn, again);
    until("the connection is idle", || upstream.in_flight() == 0);
    origin.close(again);
    until("it is known", || trusted_ms() < 500);
    // A connection that breaks under a stream says nothing of idle ones; that was the other one.
    assert_eq!(get(&mut client, &origin), 1);
}

#[test]
fn requests_that_trust_no_idle_connection_leave_no_heap_of_them() {
    let origin = Impatient::start(1, || 60_000);
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let mut client = edge.client();
    for _ in 0..40 {
        assert_eq!(client.post("/0", "x").status, 200);
    }
    assert!(origin.opened.load(Ordering::SeqCst) > MAX_IDLE_CONNECTIONS, "nothing was trusted yet");
    until("the others are closed", || origin.open.load(Ordering::SeqCst) <= MAX_IDLE_CONNECTIONS + 1);
}
