//! Connections that the upstream closes while they are idle, and upstreams that leave in the middle.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::support::{Client, Origin, OriginConn, PATIENCE, TestEdge, until, until_trusted};

/// Requests of the long test.
const REQUESTS: usize = 100_000;
const CLIENTS: usize = 8;

/// Pseudo-random numbers (splitmix64): the same in each run but for the order of threads.
pub(super) fn next(state: &AtomicU64) -> u64 {
    let mut x = state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Counts each request by its id, and closes each connection when it was idle for 0 to 5 ms.
fn impatient(executed: Arc<Vec<AtomicUsize>>) -> Origin {
    let random = AtomicU64::new(1);
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    Origin::scripted_on(listener, move |conn| {
        conn.socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
        // Not remembered as others are: there are many.
        while let Some(head) = conn.head() {
            let path = head.split(' ').nth(1).expect("a path");
            let length = if head.starts_with("POST") { 4 } else { 0 };
            while conn.unread.len() < length {
                if conn.more().is_none() {
                    return;
                }
            }
            conn.unread.drain(..length);
            let id: usize = path[1..].parse().expect("an id");
            executed[id].fetch_add(1, Ordering::SeqCst);
            conn.answer("ok");
            let idle_us = next(&random) % 5_000;
            if idle_us < 500 {
                return;
            }
            conn.socket.set_read_timeout(Some(Duration::from_micros(idle_us))).expect("time-out");
        }
    })
}

#[test]
fn an_origin_that_closes_idle_connections_at_once_costs_no_request_and_doubles_none() {
    let executed: Arc<Vec<AtomicUsize>> = Arc::new((0..REQUESTS).map(|_| AtomicUsize::new(0)).collect());
    let origin = impatient(Arc::clone(&executed));
    let edge = TestEdge::before(&origin);
    let addr = edge.addr;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            std::thread::spawn(move || {
                let mut client = Client::connect(addr);
                let random = AtomicU64::new(number as u64);
                for id in (number..REQUESTS).step_by(CLIENTS) {
                    let path = format!("/{id}");
                    let answer = if (id / CLIENTS).is_multiple_of(2) {
                        client.get(&path)
                    } else {
                        client.post(&path, "body")
                    };
                    assert_eq!((answer.status, answer.reason()), (200, "-"), "request {id}");
                    // Now and then somebody thinks for a moment: some connections grow as old as they get.
                    if next(&random).is_multiple_of(64) {
                        std::thread::park_timeout(Duration::from_micros(next(&random) % 6_000));
                    }
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().expect("no request fails"));
    let wrong = executed.iter().filter(|count| count.load(Ordering::SeqCst) != 1).count();
    assert_eq!(wrong, 0, "each request is executed exactly once");
}

#[test]
fn a_request_that_must_not_be_sent_twice_takes_no_connection_before_one_has_lasted() {
    let origin = Origin::ok();
    let (edge, upstream) = TestEdge::with_upstream(&origin);
    let mut client = edge.client();
    assert_eq!(client.get("/").status, 200);
    assert_eq!(client.post("/", "x").status, 200);
    assert_eq!(origin.connections(), 2, "a connection of its own");
    until_trusted(&upstream);
    assert_eq!(client.get("/").status, 200);
    assert_eq!(client.post("/", "x").status, 200);
    assert_eq!(origin.connections(), 2);
}

#[test]
fn what_the_upstream_announces_is_trusted_by_half() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(b"HTTP/1.1 200 OK\r\nKeep-Alive: max=9, timeout=3\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let (edge, upstream) = TestEdge::with_upstream(&origin);
    let mut client = edge.client();
    let answer = client.get("/");
    assert_eq!((answer.status, answer.field("keep-alive")), (200, None), "it is the edge's own matter");
    until("it is known", || upstream.trusted_idle_ms(peregrine_proxy::now_ms()) == 1_500);
    assert_eq!(client.post("/", "x").status, 200);
    assert_eq!(origin.connections(), 1);
}

/// Ends a connection with a reset.
fn reset(conn: &OriginConn) {
    socket2::SockRef::from(&conn.socket).set_linger(Some(Duration::ZERO)).expect("linger");
}

#[test]
fn a_post_that_was_read_before_a_reset_is_told_and_executed_once() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        reset(conn);
    });
    let edge = TestEdge::before(&origin);
    let answer = edge.client().post("/", "once");
    assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
    assert_eq!(origin.seen().len(), 1);
}

#[test]
fn an_upload_that_is_reset_half_way_is_told_and_not_begun_again() {
    let origin = Origin::scripted(|conn| {
        if conn.head().is_some() {
            while conn.unread.len() < 500_000 && conn.more().is_some() {}
            reset(conn);
        }
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n").send(vec![b'x'; 600_000]);
    let answer = client.answer();
    assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
    assert_eq!(origin.connections(), 1);
}

#[test]
fn an_answer_that_is_reset_behind_its_head_is_seen_to_be_broken() {
    for body in ["Content-Length: 100\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
        let origin = Origin::scripted(move |conn| {
            conn.request();
            conn.write(format!("HTTP/1.1 200 OK\r\n{body}").as_bytes());
            until("the edge has read it", || {
                let mut queued = [0];
                // A reset would take what was not read with it.
                socket2::SockRef::from(&conn.socket).set_nonblocking(true).is_ok()
                    && conn.socket.peek(&mut queued).is_err()
            });
            reset(conn);
        });
        let edge = TestEdge::before(&origin);
        let mut client = edge.client();
        client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\n\r\n");
        while client.more() > 0 {}
        let seen = String::from_utf8_lossy(&client.unread).into_owned();
        assert!(!seen.ends_with("0\r\n\r\n") && seen.len() < 1_000, "{seen:?}");
        assert!(seen.contains(" 200 ") || seen.contains(" 502 "), "{seen:?}");
        assert_eq!(origin.seen().len(), 1);
    }
}
