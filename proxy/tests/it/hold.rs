//! A service that is held: its requests wait at the edge, bounded, in order, and go on at a pace.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};
use peregrine_proxy::now_ms;
use peregrine_routing::{HoldCounts, HoldSpec, ServiceSpec, UpstreamSpec};

use super::support::{Client, Origin, TestEdge, config, service, until, upstream};

static HOLDS: AtomicU64 = AtomicU64::new(1);

fn hold() -> HoldSpec {
    HoldSpec {
        id: HOLDS.fetch_add(1, Ordering::Relaxed),
        until_ms: now_ms() + 60_000,
        max_requests: 1_000,
        max_bytes: 1 << 20,
        max_age_ms: 60_000,
        release_per_s: 1_000,
    }
}

fn held(upstreams: Vec<UpstreamSpec>, hold: HoldSpec) -> ServiceSpec {
    let mut service = service(upstreams);
    service.policy.hold = Some(Box::new(hold));
    service
}

/// Begins to hold and waits until every core does.
fn begin(edge: &mut TestEdge, service: ServiceSpec) {
    let version = edge.put(service);
    edge.wait_acknowledged(version);
}

fn counts(edge: &TestEdge) -> HoldCounts {
    edge.writer.hold_counts("web")
}

fn until_waiting(edge: &TestEdge, requests: u64) {
    until("the requests wait", || counts(edge).waiting == requests);
}

fn paths(origin: &Origin) -> Vec<String> {
    origin.seen().iter().map(|seen| seen.line().split(' ').nth(1).unwrap_or("?").to_owned()).collect()
}

fn ask(client: &mut Client, path: &str) {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a.test\r\n\r\n"));
}

#[test]
fn a_request_of_a_held_service_waits_and_goes_to_whoever_serves_at_its_release() {
    let (old, new) = (Origin::saying("old"), Origin::saying("new"));
    let before = upstream(old.addr);
    let mut edge = TestEdge::start(service(vec![before.clone()]));
    let mut client = edge.client();
    assert_eq!(client.get("/before").text(), "old");
    begin(&mut edge, held(vec![before], hold()));
    ask(&mut client, "/during");
    until_waiting(&edge, 1);
    begin(&mut edge, service(vec![upstream(new.addr)]));
    let answer = client.answer();
    assert_eq!((answer.status, answer.text()), (200, "new"));
    let counts = counts(&edge);
    assert_eq!((counts.held, counts.released, counts.waiting, counts.bytes), (1, 1, 0, 0));
    assert!(counts.longest_wait_us > 0, "{counts:?}");
    assert_eq!(paths(&old), ["/before"], "what was released reads the table anew");
}

#[test]
fn a_service_that_is_held_touches_no_other() {
    let (one, other) = (Origin::saying("one"), Origin::saying("other"));
    let mut neighbour = service(vec![upstream(other.addr)]);
    neighbour.name = "neighbour".into();
    neighbour.routes[0].path_prefix = "/other".into();
    let mine = upstream(one.addr);
    let mut edge = TestEdge::start_with(config(), vec![service(vec![mine.clone()]), neighbour]);
    begin(&mut edge, held(vec![mine], hold()));
    let mut waits = edge.client();
    ask(&mut waits, "/");
    until_waiting(&edge, 1);
    assert_eq!(edge.client().get("/other").text(), "other");
    assert!(one.seen().is_empty());
}

#[test]
fn the_first_that_came_is_the_first_that_goes_over_all_cores_and_both_protocols() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let two_cores = peregrine_proxy::Config { cores: 2, ..config() };
    let mut edge = TestEdge::start_with(two_cores, vec![service(vec![spec.clone()])]);
    // Slow enough that the origin, which hears each on a connection of its own, hears them one after another.
    begin(&mut edge, held(vec![spec.clone()], HoldSpec { release_per_s: 20, ..hold() }));
    let h2 = H2Clients::connect(edge.addr, 2);
    let mut h1: Vec<Client> = (0..8).map(|_| edge.client()).collect();
    let mut answers = Vec::new();
    for number in 0..16_usize {
        let path = format!("/{number}");
        if number % 2 == 0 {
            ask(&mut h1[number / 2], &path);
        } else {
            answers.push(h2.get(number / 2, edge.addr, &path));
        }
        until_waiting(&edge, number as u64 + 1);
    }
    begin(&mut edge, service(vec![spec]));
    for client in &mut h1 {
        assert_eq!(client.answer().status, 200);
    }
    for answer in answers {
        assert_eq!(h2.wait(answer), Some(200));
    }
    let paths = paths(&origin);
    assert_eq!(paths.len(), 16, "each once");
    // A core that the machine lets wait on the way to the origin is passed by the other one.
    let displaced = |(at, path): (usize, &String)| path[1..].parse::<usize>().expect("a number").abs_diff(at);
    assert!(paths.iter().enumerate().map(displaced).all(|places| places <= 2), "{paths:?}");
}

#[test]
fn what_comes_during_a_release_goes_behind_those_that_wait() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], HoldSpec { release_per_s: 10, ..hold() }));
    let mut clients: Vec<Client> = (0..5).map(|_| edge.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        ask(client, &format!("/{number}"));
        until_waiting(&edge, number as u64 + 1);
    }
    let begun = Instant::now();
    begin(&mut edge, service(vec![spec]));
    assert_eq!(edge.client().get("/late").status, 200);
    // Twice as many as come, six in a second, are a little more.
    assert!(
        begun.elapsed() >= Duration::from_millis(380),
        "five places at ten a second: {:?}",
        begun.elapsed()
    );
    assert_eq!(paths(&origin).last().map(String::as_str), Some("/late"));
    // Nobody waits any more: at once.
    until_waiting(&edge, 0);
    let begun = Instant::now();
    assert_eq!(edge.client().get("/after").status, 200);
    assert!(begun.elapsed() < Duration::from_millis(90), "{:?}", begun.elapsed());
    assert_eq!(counts(&edge).released, 6);
}

#[test]
fn a_request_that_finds_no_room_is_told_when_to_come_back() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], HoldSpec { max_requests: 2, ..hold() }));
    let mut waiting: Vec<Client> = (0..2).map(|_| edge.client()).collect();
    waiting.iter_mut().for_each(|client| ask(client, "/"));
    until_waiting(&edge, 2);
    let mut refused = edge.client();
    let answer = refused.get("/too-many");
    assert_eq!((answer.status, answer.reason()), (503, "hold_full"));
    assert!(answer.field("retry-after").and_then(|s| s.parse::<u32>().ok()).is_some(), "{}", answer.head);
    assert_eq!(answer.field("content-type"), Some("application/problem+json"));
    begin(&mut edge, service(vec![spec]));
    waiting.iter_mut().for_each(|client| assert_eq!(client.answer().status, 200));
    assert_eq!(refused.get("/later").status, 200, "its connection was not closed");
    assert_eq!(counts(&edge).overflowed, 1);
}

#[test]
fn a_body_that_finds_no_room_stays_with_its_client_and_its_request_waits_all_the_same() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], HoldSpec { max_bytes: 40_000, ..hold() }));
    let body = "x".repeat(30_000);
    let post = format!("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut first = edge.client();
    first.send(&post);
    until("its body is there", || counts(&edge).bytes >= 30_000);
    let mut second = edge.client();
    second.send(&post);
    until_waiting(&edge, 2);
    let kept = counts(&edge).bytes;
    assert!((30_000..31_000).contains(&kept), "{kept}");
    begin(&mut edge, service(vec![spec]));
    assert_eq!((first.answer().status, second.answer().status), (200, 200));
    assert_eq!((counts(&edge).bytes, counts(&edge).overflowed), (0, 0));
    let bodies: Vec<usize> = origin.seen().iter().map(|seen| seen.body.len()).collect();
    assert_eq!(bodies, [30_000, 30_000], "whole, and once");
}

#[test]
fn calls_whose_length_nobody_knows_are_counted_by_what_they_have_sent() {
    const CALLS: usize = 100;
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], HoldSpec { max_bytes: 64 << 10, ..hold() }));
    let mut calls: Vec<Client> = (0..CALLS).map(|_| edge.client()).collect();
    for (number, call) in calls.iter_mut().enumerate() {
        call.send("POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        until_waiting(&edge, number as u64 + 1);
        call.send("5\r\nworld\r\n");
    }
    until("what they send is taken in", || counts(&edge).bytes > CALLS as u64 * 10);
    assert_eq!((counts(&edge).waiting, counts(&edge).overflowed), (CALLS as u64, 0));
    begin(&mut edge, service(vec![spec]));
    for call in &mut calls {
        assert_eq!(call.send("0\r\n\r\n").answer().status, 200);
    }
    assert_eq!(origin.seen().len(), CALLS);
    assert!(origin.seen().iter().all(|seen| seen.body == b"helloworld"));
}

#[test]
fn a_body_in_pieces_of_a_byte_goes_on_whole_and_in_order() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], hold()));
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n");
    until_waiting(&edge, 1);
    let sent: Vec<u8> = (0..10_000_u32).map(|n| b'a' + (n % 26) as u8).collect();
    client.send(sent.iter().map(|byte| format!("1\r\n{}\r\n", *byte as char)).collect::<String>());
    until("they are taken in", || counts(&edge).bytes > 10_000);
    begin(&mut edge, service(vec![spec]));
    assert_eq!(client.send("0\r\n\r\n").answer().status, 200);
    assert_eq!(origin.last().body, sent);
}

#[test]
fn requests_for_which_no_copy_is_there_when_the_hold_is_over_are_counted() {
    let mut edge = TestEdge::start(service(Vec::new()));
    assert_eq!(edge.client().get("/").reason(), "no_upstream");
    begin(&mut edge, held(Vec::new(), HoldSpec { until_ms: now_ms() + 300, ..hold() }));
    let mut waits: Vec<Client> = (0..2).map(|_| edge.client()).collect();
    waits.iter_mut().for_each(|client| ask(client, "/"));
    for client in &mut waits {
        let answer = client.answer();
        assert_eq!((answer.status, answer.reason()), (503, "no_upstream"));
    }
    assert_eq!(edge.client().get("/").reason(), "no_upstream", "it comes after the deadline");
    let now = counts(&edge);
    assert_eq!((now.released, now.unserved, now.refused()), (2, 3, 3));
    // Without a hold nobody has promised a copy.
    begin(&mut edge, service(Vec::new()));
    assert_eq!(edge.client().get("/").reason(), "no_upstream");
    assert_eq!(counts(&edge).unserved, 3);
}

#[test]
fn who_waited_while_the_rules_changed_is_not_let_on_by_the_old_ones() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], hold()));
    let mut client = edge.client();
    ask(&mut client, "/held");
    until_waiting(&edge, 1);
    let mut guarded = service(vec![spec]);
    let deny = vec!["127.0.0.1".parse().expect("a network")];
    guarded.policy.rules = Some(Box::new(peregrine_routing::Rules { deny, ..Default::default() }));
    begin(&mut edge, guarded);
    let answer = client.answer();
    assert_eq!((answer.status, answer.reason()), (503, "rules_changed"));
    assert!(answer.field("retry-after").is_some());
    assert_eq!(origin.seen().len(), 0);
    assert_eq!(client.get("/again").status, 403);
}

#[test]
fn held_requests_that_are_reset_do_not_end_the_connection_of_the_others() {
    const AT_ONCE: usize = 100;
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], hold()));
    let h2 = H2Clients::connect(edge.addr, 1);
    for _ in 0..3 {
        let resets: Vec<_> = (0..AT_ONCE).map(|_| h2.get(0, edge.addr, "/resets")).collect();
        until_waiting(&edge, AT_ONCE as u64);
        resets.iter().for_each(tokio::task::JoinHandle::abort);
        until_waiting(&edge, 0);
    }
    assert_eq!(counts(&edge).left, 3 * AT_ONCE as u64);
    let stays = h2.get(0, edge.addr, "/stays");
    until_waiting(&edge, 1);
    begin(&mut edge, service(vec![spec]));
    assert_eq!(h2.wait(stays), Some(200));
    assert_eq!(paths(&origin), ["/stays"]);
}

#[test]
fn a_request_that_has_waited_for_too_long_is_told_so() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec], HoldSpec { max_age_ms: 200, ..hold() }));
    let begun = Instant::now();
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (503, "hold_too_old"));
    assert!(answer.field("retry-after").is_some());
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!((counts(&edge).aged_out, counts(&edge).waiting), (1, 0));
    assert!(origin.seen().is_empty());
}

#[test]
fn without_a_word_of_anybody_the_edge_releases_at_the_deadline_and_does_not_hold_again() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    let hold = HoldSpec { until_ms: now_ms() + 400, ..hold() };
    let held = held(vec![spec], hold);
    begin(&mut edge, held.clone());
    let begun = Instant::now();
    let mut clients: Vec<Client> = (0..3).map(|_| edge.client()).collect();
    clients.iter_mut().for_each(|client| ask(client, "/"));
    clients.iter_mut().for_each(|client| assert_eq!(client.answer().status, 200));
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(counts(&edge).released, 3);
    assert_eq!(edge.client().get("/").status, 200, "it is over");
    // The same hold once more, in a table with another copy in it.
    let mut again = held;
    again.pools[0].upstreams.push(upstream(origin.addr));
    begin(&mut edge, again);
    assert_eq!(edge.client().get("/").status, 200, "a hold that is over is not taken up again");
}

#[test]
fn a_client_that_leaves_frees_its_place_and_is_never_sent_on() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    begin(&mut edge, held(vec![spec.clone()], hold()));
    let h2 = H2Clients::connect(edge.addr, 1);
    let mut stays = edge.client();
    ask(&mut stays, "/stays");
    until_waiting(&edge, 1);
    let one_request = counts(&edge).bytes;
    let mut closes = edge.client();
    ask(&mut closes, "/closes");
    let mut uploads = edge.client();
    uploads.send("POST /uploads HTTP/1.1\r\nHost: a.test\r\nContent-Length: 100\r\n\r\nhalf of it");
    let mut has_sent = edge.client();
    has_sent.send("POST /sent HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody");
    let resets = h2.get(0, edge.addr, "/resets");
    until_waiting(&edge, 5);
    drop((closes, uploads, has_sent));
    resets.abort();
    until_waiting(&edge, 1);
    let now = counts(&edge);
    assert_eq!((now.left, now.bytes), (4, one_request));
    begin(&mut edge, service(vec![spec]));
    assert_eq!(stays.answer().status, 200);
    assert_eq!(edge.client().get("/last").status, 200);
    assert_eq!(paths(&origin), ["/stays", "/last"]);
}

#[test]
fn a_request_that_looked_before_the_hold_and_finds_its_copy_retired_waits_too() {
    // It is inside of the old copy when the hold begins, and its connection breaks: the next attempt has to wait.
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().expect("lock");
    let opened = Arc::clone(&gate);
    let old = Origin::scripted(move |conn| {
        conn.request();
        drop(opened.lock());
    });
    let new = Origin::saying("new");
    let spec = upstream(old.addr);
    let mut edge = TestEdge::start(service(vec![spec]));
    let mut client = edge.client();
    ask(&mut client, "/");
    until("it is inside", || old.seen().len() == 1);
    begin(&mut edge, held(Vec::new(), hold()));
    drop(closed);
    until_waiting(&edge, 1);
    begin(&mut edge, service(vec![upstream(new.addr)]));
    assert_eq!(client.answer().text(), "new");
}

fn logging_to(path: &std::path::Path) -> peregrine_proxy::AccessLogConfig {
    peregrine_proxy::AccessLogConfig {
        target: peregrine_proxy::AccessLogTarget::File(path.to_owned()),
        format: peregrine_proxy::AccessLogFormat::Json,
    }
}

#[test]
fn the_time_that_a_request_was_held_is_in_the_access_log() {
    let origin = Origin::ok();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("access.log");
    let log = logging_to(&path);
    let config = peregrine_proxy::Config { access_log: Some(log), ..config() };
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start_with(config, vec![service(vec![spec.clone()])]);
    assert_eq!(edge.client().get("/at-once").status, 200);
    begin(&mut edge, held(vec![spec.clone()], hold()));
    let mut client = edge.client();
    ask(&mut client, "/held");
    until_waiting(&edge, 1);
    begin(&mut edge, service(vec![spec]));
    assert_eq!(client.answer().status, 200);
    drop(edge);
    let lines = std::fs::read_to_string(path).expect("a log");
    let line = |path: &str| lines.lines().find(|line| line.contains(path)).expect("a line").to_owned();
    assert!(line("/held").contains("\"held_us\":"), "{lines}");
    assert!(!line("/at-once").contains("held_us"), "{lines}");
}

/// Clients of HTTP/2, each with one connection.
struct H2Clients {
    runtime: tokio::runtime::Runtime,
    senders: Vec<hyper::client::conn::http2::SendRequest<Empty<Bytes>>>,
}

impl H2Clients {
    fn connect(addr: SocketAddr, count: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime");
        let senders = runtime.block_on(async {
            let mut senders = Vec::new();
            for _ in 0..count {
                let socket = tokio::net::TcpStream::connect(addr).await.expect("connects");
                let (sender, conn) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
                        .await
                        .expect("handshake");
                tokio::spawn(conn);
                senders.push(sender);
            }
            senders
        });
        Self { runtime, senders }
    }

    /// Asks in the background.
    fn get(&self, client: usize, addr: SocketAddr, path: &str) -> tokio::task::JoinHandle<u16> {
        let mut sender = self.senders[client % self.senders.len()].clone();
        let request = Request::get(format!("http://{addr}{path}")).body(Empty::new()).expect("a request");
        self.runtime.spawn(async move {
            sender.ready().await.expect("is open");
            sender.send_request(request).await.map_or(0, |response| response.status().as_u16())
        })
    }

    fn wait(&self, answer: tokio::task::JoinHandle<u16>) -> Option<u16> {
        self.runtime.block_on(answer).ok()
    }
}

// --- five seconds at 2,000 requests a second, of which half leave

const RATE_PER_S: usize = 2_000;
const HOLD_S: usize = 5;
const REQUESTS: usize = RATE_PER_S * HOLD_S;
/// More than twice as many as come, also where some of them come late and at once: the pace is the one that was asked for.
const RELEASE_PER_S: u32 = 5_000;
const CONNECTIONS: usize = 100;
/// What the edge may keep for them: heads of less than this, and no bodies.
const MAX_HEAD_BYTES: u64 = 200;

/// Notes when it has heard of which request.
fn noting(heard: Arc<Mutex<Vec<(usize, Instant)>>>) -> Origin {
    Origin::scripted(move |conn| {
        while let Some(head) = conn.head() {
            let number = head.split(' ').nth(1).and_then(|path| path[1..].parse().ok()).expect("a number");
            heard.lock().expect("lock").push((number, Instant::now()));
            conn.answer("ok");
        }
    })
}

/// What the edge says of a request that was held and went on, in Unix milliseconds.
struct Held {
    came: u64,
    went_on: u64,
}

impl Held {
    /// Of everybody in an access log who was answered by the origin.
    fn all(log: &str) -> Vec<Self> {
        let lines = log.lines().map(|line| serde_json::from_str(line).expect("a line of JSON"));
        let held = lines.filter(|line: &serde_json::Value| line["status"] == 200 && line["held_us"].is_u64());
        let read = |line: serde_json::Value| {
            let time: jiff::Timestamp = line["time"].as_str().expect("a time").parse().expect("a time");
            let came = u64::try_from(time.as_millisecond()).expect("after 1970");
            Self { came, went_on: came + line["held_us"].as_u64().expect("a number") / 1_000 }
        };
        held.map(read).collect()
    }
}

/// How many milliseconds somebody went on before the time that the pace gives to its place in the order of arrival.
fn earliest(mut held: Vec<Held>) -> u64 {
    held.sort_by_key(|one| one.came);
    let first = held.iter().map(|one| one.went_on).min().unwrap_or_default();
    let due = |place: usize| first + place as u64 * 1_000 / u64::from(RELEASE_PER_S);
    let early = held.iter().enumerate().map(|(place, one)| due(place).saturating_sub(one.went_on));
    early.max().unwrap_or_default()
}

/// Memory of this process: the edge, its origin and its clients.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("it is there");
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("a number") * 4_096
}

#[test]
fn five_seconds_at_two_thousand_a_second_of_which_half_leave_are_held_within_bounds_and_released_in_order() {
    let heard: Arc<Mutex<Vec<(usize, Instant)>>> = Arc::default();
    let origin = noting(Arc::clone(&heard));
    let spec = upstream(origin.addr);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("access.log");
    let log = logging_to(&path);
    let two_cores = peregrine_proxy::Config { cores: 2, access_log: Some(log), ..config() };
    let mut edge = TestEdge::start_with(two_cores, vec![service(vec![spec.clone()])]);
    let max_bytes = REQUESTS as u64 * MAX_HEAD_BYTES;
    let bounds = HoldSpec { max_requests: 10_000, max_bytes, release_per_s: RELEASE_PER_S, ..hold() };
    begin(&mut edge, held(vec![spec.clone()], bounds));
    let clients = H2Clients::connect(edge.addr, CONNECTIONS);
    let resident_before = resident_bytes();
    let (begun, mut most_bytes, mut most_waiting) = (Instant::now(), 0, 0);
    let mut stays = Vec::new();
    let mut leaves = std::collections::VecDeque::new();
    for number in 0..REQUESTS {
        let due = Duration::from_secs_f64(number as f64 / RATE_PER_S as f64);
        while begun.elapsed() < due {
            std::thread::park_timeout(Duration::from_micros(300));
        }
        let answer = clients.get(number, edge.addr, &format!("/{number}"));
        if number % 2 == 0 {
            stays.push(answer);
        } else {
            leaves.push_back(answer);
        }
        // They have a second of patience.
        if leaves.len() > RATE_PER_S / 2 {
            leaves.pop_front().into_iter().for_each(|answer: tokio::task::JoinHandle<u16>| answer.abort());
        }
        let now = counts(&edge);
        (most_bytes, most_waiting) = (now.bytes.max(most_bytes), now.waiting.max(most_waiting));
    }
    // Who has not arrived cannot leave.
    until("all have arrived", || counts(&edge).held == REQUESTS as u64);
    leaves.drain(..).for_each(|answer| answer.abort());
    until_waiting(&edge, stays.len() as u64);
    let growth = resident_bytes().saturating_sub(resident_before);
    let now = counts(&edge);
    assert_eq!((now.held, now.left, now.overflowed), (REQUESTS as u64, REQUESTS as u64 / 2, 0));
    assert!(now.bytes <= stays.len() as u64 * MAX_HEAD_BYTES && most_bytes <= max_bytes, "{now:?}");
    assert!(heard.lock().expect("lock").is_empty(), "nobody goes on before the release");
    let released = Instant::now();
    begin(&mut edge, service(vec![spec]));
    let count = stays.len();
    for answer in stays {
        assert_eq!(clients.wait(answer), Some(200));
    }
    let heard = heard.lock().expect("lock").clone();
    assert_eq!(heard.len(), count, "each once, and of those that left none");
    assert!(heard.iter().all(|(number, _)| number % 2 == 0), "somebody who left was sent on");
    let took = heard.last().expect("some").1 - released;
    let now = counts(&edge);
    drop(edge);
    let held = Held::all(&std::fs::read_to_string(path).expect("a log"));
    assert_eq!(held.len(), count, "each of them is in the log");
    let early_ms = earliest(held);
    println!(
        "held {} (most at once {most_waiting}, {most_bytes} bytes), left {}, released {} in {} ms ({} a second, \
         nobody earlier than {early_ms} ms before the time of its place), longest wait {} ms, \
         resident memory of edge, origin and clients grew by {} KiB",
        now.held,
        now.left,
        now.released,
        took.as_millis(),
        (count as f64 / took.as_secs_f64()).round(),
        now.longest_wait_us / 1_000,
        growth / 1_024,
    );
    assert_eq!((now.waiting, now.bytes, now.released), (0, 0, count as u64));
    // Nobody goes on before its turn, at the pace. How late somebody is, is the machine's matter.
    assert!(early_ms <= 30, "{early_ms} ms before its time");
    assert!(growth < 256 << 20, "{growth} bytes");
}
