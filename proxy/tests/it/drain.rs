//! A retired upstream: nothing new goes there, what is inside may finish, and a cut ends the rest.

use std::sync::Mutex;
use std::sync::mpsc;

use super::support::{Origin, TestEdge, service, until, upstream};

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
                    let mut client = super::support::Client::connect(addr);
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
