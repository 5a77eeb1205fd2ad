//! A retired upstream: nothing new goes there, what is inside may finish, and a cut ends the rest.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use peregrine_routing::{TrafficClass, Upstream};

use super::support::{Client, Origin, OriginConn, TestEdge, service, until, upstream};

#[test]
fn after_the_acknowledgement_the_old_copy_gets_nothing_and_no_client_is_closed() {
    let (old, new) = (Origin::saying("old"), Origin::saying("new"));
    let mut edge = TestEdge::before(&old);
    let mut clients: Vec<_> = (0..8).map(|_| edge.client()).collect();
    for client in &mut clients {
        assert_eq!(client.get("/").text(), "old");
    }
    let version = edge.put(service(vec![upstream(new.addr)]));
    edge.wait_acknowledged(version);
    let seen = old.seen().len();
    for client in &mut clients {
        for _ in 0..10 {
            assert_eq!(client.get("/").text(), "new");
        }
    }
    assert_eq!(old.seen().len(), seen);
}

#[test]
fn idle_connections_to_a_retired_upstream_are_closed_by_the_acknowledgement() {
    let (closed, closes) = mpsc::channel();
    let closed = Mutex::new(closed);
    let old = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            conn.answer("ok");
        }
        closed.lock().expect("lock").send(()).expect("the test listens");
    });
    let new = Origin::ok();
    let mut edge = TestEdge::before(&old);
    edge.client().get("/");
    let version = edge.put(service(vec![upstream(new.addr)]));
    edge.wait_acknowledged(version);
    closes.recv_timeout(super::support::PATIENCE).expect("the connection was closed");
}

#[test]
fn what_is_inside_finishes_and_the_receipt_counts_it() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let old = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            let _ = wait.lock().expect("lock").recv();
            conn.answer("finished");
        }
    });
    let new = Origin::saying("new");
    let spec = upstream(old.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    let inside = edge.upstream(&spec);
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc");
    until("it is inside", || old.seen().len() == 1);
    let version = edge.put(service(vec![upstream(new.addr)]));
    edge.wait_acknowledged(version);
    assert!(!inside.receipt().empty);
    go.send(()).expect("the origin waits");
    assert_eq!(client.answer().text(), "finished");
    until("it is empty", || inside.is_empty());
    let receipt = inside.receipt();
    assert_eq!((receipt.started, receipt.completed.total(), receipt.hard_cut.len()), (1, 1, 0));
    assert_eq!((receipt.bytes_to_upstream, receipt.bytes_to_client), (3, 8));
    assert_eq!(client.get("/").text(), "new", "on the same client connection");
}

/// Starts a request, retires its upstream, cuts it, and returns what the client saw and the receipt.
fn cut(first: &'static [u8]) -> (String, Vec<String>) {
    let origin = Origin::scripted(move |conn| {
        conn.request();
        conn.write(first);
        while conn.more().is_some() {}
    });
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    let inside = edge.upstream(&spec);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: cut-me\r\n\r\n");
    until("it is inside", || origin.seen().len() == 1);
    if !first.is_empty() {
        while !String::from_utf8_lossy(&client.unread).contains("hello") {
            assert!(client.more() > 0);
        }
    }
    let version = edge.put(service(Vec::new()));
    edge.wait_acknowledged(version);
    inside.cut();
    until("it is empty", || inside.is_empty());
    if first.is_empty() {
        let answer = client.answer();
        return (format!("{} {}", answer.status, answer.reason()), inside.receipt().hard_cut);
    }
    while client.more() > 0 {}
    (String::from_utf8_lossy(&client.unread).into_owned(), inside.receipt().hard_cut)
}

#[test]
fn a_cut_before_the_head_is_told_and_listed() {
    assert_eq!(cut(b""), ("503 upstream_cut".to_owned(), vec!["cut-me".to_owned()]));
}

#[test]
fn a_cut_in_the_body_breaks_off_without_a_clean_end_and_is_listed() {
    let (seen, listed) = cut(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
    assert!(!seen.contains("0\r\n\r\n"), "{seen:?}");
    assert_eq!(listed, ["cut-me"]);
}

#[test]
fn a_cut_ends_the_lease_also_when_the_client_reads_nothing() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
        let chunk = vec![b'x'; 1 << 20];
        loop {
            if std::io::Write::write_all(&mut conn.socket, &chunk).is_err() {
                return;
            }
        }
    });
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    let inside = edge.upstream(&spec);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: stuck\r\n\r\n").head();
    let version = edge.put(service(Vec::new()));
    edge.wait_acknowledged(version);
    inside.cut();
    until("it is empty", || inside.is_empty());
    assert_eq!(inside.receipt().hard_cut, ["stuck"]);
    while client.more() > 0 {
        client.unread.clear();
    }
}

// --- by class ---------------------------------------------------------------------------------------------

/// An origin of everything: `/ws` is a tunnel of no known protocol that echoes, `/events` and what begins so is a stream that begins
/// with what the test says, the rest hangs until the test says how it goes on.
struct Everything {
    origin: Origin,
    more: mpsc::Sender<&'static [u8]>,
}

impl Everything {
    /// What every answer to a request (not of a tunnel) begins with.
    fn beginning(first: &'static [u8]) -> Self {
        let (more, rest) = mpsc::channel::<&'static [u8]>();
        let rest = Mutex::new(rest);
        let origin = Origin::scripted(move |conn| {
            let Some(seen) = conn.request() else { return };
            if seen.line().contains("/ws") {
                return echo(conn);
            }
            conn.write(first);
            while let Ok(bytes) = rest.lock().expect("lock").recv() {
                conn.write(bytes);
            }
            while conn.more().is_some() {}
        });
        Self { origin, more }
    }
}

fn echo(conn: &mut OriginConn) {
    conn.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tunnel/1\r\n\r\n");
    while conn.more().is_some() {
        let bytes = std::mem::take(&mut conn.unread);
        conn.write(&bytes);
    }
}

fn ask(edge: &TestEdge, path: &str, id: &str) -> Client {
    let mut client = edge.client();
    client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-Id: {id}\r\n\r\n"));
    client
}

fn ask_tunnel(edge: &TestEdge, id: &str) -> Client {
    let mut client = edge.client();
    client.send(format!(
        "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: tunnel/1\r\nX-Request-Id: {id}\r\n\r\n"
    ));
    assert!(client.head().starts_with("HTTP/1.1 101"));
    client
}

fn assert_echoes(tunnel: &mut Client) {
    tunnel.send("still there");
    while tunnel.unread.len() < 11 {
        assert!(tunnel.more() > 0, "the tunnel is closed");
    }
    assert_eq!(std::mem::take(&mut tunnel.unread), b"still there");
}

fn begins(client: &mut Client, with: &str) {
    while !String::from_utf8_lossy(&client.unread).contains(with) {
        assert!(client.more() > 0, "closed after {:?}", String::from_utf8_lossy(&client.unread));
    }
}

/// Everything that comes until the edge closes.
fn rest(client: &mut Client) -> String {
    while client.more() > 0 {}
    String::from_utf8_lossy(&client.unread).into_owned()
}

/// An edge with everything behind it.
fn before(everything: &Everything) -> (TestEdge, Arc<Upstream>) {
    let spec = upstream(everything.origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let inside = edge.upstream(&spec);
    (edge, inside)
}

fn retire(edge: &mut TestEdge) {
    let version = edge.put(service(Vec::new()));
    edge.wait_acknowledged(version);
}

const EVENTS: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n\
    10\r\ndata: 1\n\ndata: 2\r\n";

#[test]
fn requests_are_cut_at_the_deadline_of_their_class_while_a_tunnel_lives_on() {
    let everything = Everything::beginning(b"");
    let (mut edge, inside) = before(&everything);
    let mut tunnel = ask_tunnel(&edge, "tunnel");
    let mut hanging = [ask(&edge, "/1", "hangs-1"), ask(&edge, "/2", "hangs-2")];
    until("all are inside", || everything.origin.seen().len() == 3);
    retire(&mut edge);
    inside.cut_class(TrafficClass::Request);
    for client in &mut hanging {
        let answer = client.answer();
        assert_eq!((answer.status, answer.reason()), (503, "upstream_cut"));
    }
    until("the requests are out", || inside.in_flight() == 1);
    assert_echoes(&mut tunnel);
    let mut receipt = inside.receipt();
    receipt.hard_cut.sort_unstable();
    assert_eq!(receipt.hard_cut, ["hangs-1", "hangs-2"]);
    assert_eq!(receipt.hard_cut_classes, [TrafficClass::Request; 2]);
    assert_eq!(receipt.in_flight[TrafficClass::WebSocket], 1);
    inside.cut_class(TrafficClass::WebSocket);
    assert!(tunnel.is_closed());
    until("it is empty", || inside.is_empty());
    assert_eq!(inside.receipt().hard_cut.last().map(String::as_str), Some("tunnel"));
}

#[test]
fn a_tunnel_is_cut_at_the_deadline_of_its_class_while_a_request_goes_on() {
    let everything = Everything::beginning(b"");
    let (mut edge, inside) = before(&everything);
    let mut tunnel = ask_tunnel(&edge, "tunnel");
    let mut slow = ask(&edge, "/", "slow");
    until("both are inside", || everything.origin.seen().len() == 2);
    retire(&mut edge);
    inside.close_class(TrafficClass::WebSocket);
    assert_echoes(&mut tunnel);
    inside.cut_class(TrafficClass::WebSocket);
    assert!(tunnel.is_closed());
    until("the tunnel is out", || inside.in_flight() == 1);
    everything.more.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone").expect("the origin waits");
    assert_eq!(slow.answer().text(), "done");
    until("it is empty", || inside.is_empty());
    let receipt = inside.receipt();
    assert_eq!((receipt.hard_cut, receipt.completed.total()), (vec!["tunnel".to_owned()], 1));
}

#[test]
fn a_closing_event_stream_ends_cleanly_after_the_event_that_is_under_way() {
    let everything = Everything::beginning(EVENTS);
    let (mut edge, inside) = before(&everything);
    let mut client = ask(&edge, "/events", "stream");
    begins(&mut client, "data: 2");
    retire(&mut edge);
    inside.close_class(TrafficClass::Sse);
    // Pieces that hold the end of one event and the beginning of the next. How many go on before the edge has
    // heard of the deadline is its own matter.
    until("it is empty", || {
        everything.more.send(b"a\r\n+\n\ndata: 3\r\n").expect("the origin waits");
        inside.is_empty()
    });
    let answer = client.answer();
    let events = answer.text().strip_prefix("data: 1\n\ndata: 2+\n\n").expect("the event that was begun");
    assert_eq!(events.replace("data: 3+\n\n", ""), "", "whole events only");
    let receipt = inside.receipt();
    assert_eq!((receipt.soft_closed[TrafficClass::Sse], receipt.completed.total()), (1, 0));
    assert_eq!(receipt.hard_cut, [] as [String; 0]);
}

#[test]
fn an_event_stream_that_is_silent_between_events_ends_cleanly_at_once() {
    let everything = Everything::beginning(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n\
        9\r\ndata: 1\n\n\r\n",
    );
    let (mut edge, inside) = before(&everything);
    let mut client = ask(&edge, "/events", "stream");
    begins(&mut client, "data: 1\n\n");
    retire(&mut edge);
    inside.close_class(TrafficClass::Sse);
    assert_eq!(client.answer().text(), "data: 1\n\n");
    until("it is empty", || inside.is_empty());
    assert_eq!(inside.receipt().soft_closed[TrafficClass::Sse], 1);
    assert_eq!(client.get("/").status, 503, "the client's connection goes on");
}

#[test]
fn an_event_stream_that_cannot_be_ended_politely_is_cut_at_the_hard_deadline() {
    let everything = Everything::beginning(EVENTS);
    let (mut edge, inside) = before(&everything);
    let mut client = ask(&edge, "/events", "stream");
    begins(&mut client, "data: 2");
    retire(&mut edge);
    inside.close_class(TrafficClass::Sse);
    inside.cut_class(TrafficClass::Sse);
    let seen = rest(&mut client);
    assert!(!seen.contains("0\r\n\r\n"), "{seen:?}");
    until("it is empty", || inside.is_empty());
    assert_eq!(inside.receipt().hard_cut, ["stream"]);
    assert_eq!(inside.receipt().soft_closed.total(), 0);
}

#[test]
fn a_request_that_turns_out_to_be_of_a_class_that_is_cut_is_ended_and_listed() {
    let everything = Everything::beginning(b"");
    let (mut edge, inside) = before(&everything);
    let mut client = ask(&edge, "/events", "late");
    until("it is inside", || everything.origin.seen().len() == 1);
    retire(&mut edge);
    inside.cut_class(TrafficClass::Sse);
    // As a request it has its time; as a stream of events it has none.
    everything.more.send(EVENTS).expect("the origin waits");
    let seen = rest(&mut client);
    assert!(!seen.contains("0\r\n\r\n"), "{seen:?}");
    until("it is empty", || inside.is_empty());
    assert_eq!(inside.receipt().hard_cut, ["late"]);
}

#[test]
fn a_request_that_turns_out_to_be_of_a_class_that_is_closing_ends_politely() {
    let everything = Everything::beginning(b"");
    let (mut edge, inside) = before(&everything);
    let mut client = ask(&edge, "/events", "late");
    until("it is inside", || everything.origin.seen().len() == 1);
    retire(&mut edge);
    inside.close_class(TrafficClass::Sse);
    everything.more.send(EVENTS).expect("the origin waits");
    let answer = client.answer();
    assert!(matches!(answer.text(), "" | "data: 1\n\n"), "{:?}", answer.text());
    until("it is empty", || inside.is_empty());
    assert_eq!(inside.receipt().soft_closed[TrafficClass::Sse], 1);
}

#[test]
fn two_hundred_switches_under_load_lose_nothing() {
    let origins = [Origin::saying("even"), Origin::saying("odd")];
    let mut edge = TestEdge::before(&origins[0]);
    let addr = edge.addr;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = Client::connect(addr);
                    let mut sent = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        assert_eq!(client.post("/", "x").status, 200);
                        assert_eq!(client.get("/").status, 200);
                        sent += 2;
                    }
                    sent
                })
            })
            .collect();
        for turn in 1..=200 {
            let version = edge.put(service(vec![upstream(origins[turn % 2].addr)]));
            edge.wait_acknowledged(version);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        workers.into_iter().map(|worker| worker.join().expect("no failure")).sum::<usize>()
    });
    let seen: usize = origins.iter().map(|origin| origin.seen().len()).sum();
    assert_eq!(seen, sent, "every request was executed exactly once");
}

// --- transfers of which nobody has seen a byte for long ---------------------------------------------------

/// More than the kernel holds on its way: the rest is with whoever sends it.
fn long_body() -> Vec<u8> {
    b"abcdefghijklmnopqrstuvwxyz".repeat(2_500_000)
}

/// Retires the upstream after a time at which nothing in it is a mere request any more, and cuts the requests.
fn cut_requests_late(edge: &mut TestEdge, inside: &Upstream) {
    std::thread::park_timeout(std::time::Duration::from_millis(10_500));
    retire(edge);
    inside.close_class(TrafficClass::Request);
    inside.cut_class(TrafficClass::Request);
    until("it is a transfer", || inside.receipt().in_flight[TrafficClass::Transfer] == 1);
}

fn assert_completed(inside: &Upstream) {
    until("it is empty", || inside.is_empty());
    let receipt = inside.receipt();
    assert_eq!((receipt.completed[TrafficClass::Transfer], receipt.hard_cut), (1, Vec::new()));
}

#[test]
fn a_download_whose_client_takes_its_time_is_not_cut_as_a_request() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        let body = long_body();
        conn.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes());
        conn.write(&body);
    });
    let (mut edge, inside) = TestEdge::with_upstream(&origin);
    let mut client = ask(&edge, "/", "slow");
    until("it is inside", || inside.in_flight() == 1);
    cut_requests_late(&mut edge, &inside);
    assert!(client.answer().body == long_body(), "byte for byte");
    assert_completed(&inside);
}

#[test]
fn an_upload_whose_origin_takes_its_time_is_not_cut_as_a_request() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let origin = Origin::scripted(move |conn| {
        let _ = wait.lock().expect("lock").recv();
        conn.request();
        conn.answer("taken");
    });
    let (mut edge, inside) = TestEdge::with_upstream(&origin);
    let mut client = edge.client();
    let mut sender = client.socket.try_clone().expect("a second handle");
    let sends = std::thread::spawn(move || {
        let body = long_body();
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        std::io::Write::write_all(&mut sender, head.as_bytes()).expect("it is taken");
        std::io::Write::write_all(&mut sender, &body).expect("it is taken");
    });
    until("it is inside", || inside.in_flight() == 1);
    cut_requests_late(&mut edge, &inside);
    go.send(()).expect("the origin waits");
    assert_eq!(client.answer().text(), "taken");
    sends.join().expect("everything was sent");
    assert!(origin.last().body == long_body(), "byte for byte");
    assert_completed(&inside);
}
