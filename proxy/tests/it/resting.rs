//! Clients that say nothing for a moment take little room, and notice nothing of it.

use std::time::{Duration, Instant};

use peregrine_proxy::{Config, Limits};

use super::observe::{recorder, value};
use super::support::{Client, Origin, config, service, until, upstream};
use super::tls_support::{self, Authority};

const CLIENTS: usize = 50;

/// Other tests have connections too, but never so many that are silent.
fn until_they_rest(count: usize) {
    until("they rest", || value("peregrine_edge_connections_at_rest") >= count as u64);
}

#[test]
fn clients_that_are_silent_for_a_moment_rest_and_are_served_on_the_same_connections() {
    recorder();
    let origin = Origin::ok();
    let ca = Authority::new();
    let edge = tls_support::edge(
        config(),
        vec![service(vec![upstream(origin.addr)])],
        &ca,
        &[tls_support::domain(&ca, "a.test")],
    );
    let mut clear: Vec<_> = (0..CLIENTS).map(|_| edge.client()).collect();
    let mut sealed: Vec<_> = (0..CLIENTS)
        .map(|_| tls_support::connect(edge.https(), "a.test", tls_support::client(&ca, &[b"http/1.1"])))
        .collect();
    for round in 0..2 {
        clear.iter_mut().for_each(|client| assert_eq!(client.get("/").text(), "ok", "round {round}"));
        sealed.iter_mut().for_each(|client| assert_eq!(client.get("/").text(), "ok", "round {round}"));
        until_they_rest(2 * CLIENTS);
    }
    // A head in pieces, two requests in one piece, and a body.
    let client = &mut clear[0];
    client.send("GET / HTT");
    assert_eq!(client.send("P/1.1\r\nHost: a.test\r\n\r\n").answer().status, 200);
    let two = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n".repeat(2);
    for client in &mut clear[1..3] {
        client.send(&two);
        assert_eq!([client.answer().status, client.answer().status], [200, 200]);
    }
    assert_eq!(clear[3].post("/", "five!").status, 200);
    assert_eq!(origin.last().body, b"five!");
    assert_eq!(sealed[0].post("/", "sealed").status, 200);
    assert_eq!(origin.last().body, b"sealed");
    // What is no request is refused as ever.
    let refused = clear[4].send("GET / HTTP/1.1\r\nX: \0\r\n\r\n").answer();
    assert_eq!((refused.status, refused.reason()), (400, "bad_request_head"));
}

#[test]
fn who_rests_is_closed_after_the_idle_time_and_when_the_edge_stops() {
    let origin = Origin::ok();
    let ca = Authority::new();
    let limits = Limits { idle_timeout_ms: 2_500, ..Limits::default() };
    let start = |config: Config| {
        let services = vec![service(vec![upstream(origin.addr)])];
        tls_support::edge(config, services, &ca, &[tls_support::domain(&ca, "a.test")])
    };
    let edge = start(Config { limits, ..config() });
    let mut client = edge.client();
    let mut sealed = tls_support::connect(edge.https(), "a.test", tls_support::client(&ca, &[b"http/1.1"]));
    assert_eq!([client.get("/").status, sealed.get("/").status], [200, 200]);
    let started = Instant::now();
    assert!(client.is_closed());
    assert!(started.elapsed() >= Duration::from_millis(2_390), "{:?}", started.elapsed());
    assert_eq!(sealed.more(), 0, "over TLS it is told that this is the end");

    recorder();
    let mut edge = start(Config { drain_timeout_ms: 60_000, ..config() });
    let mut all: Vec<_> = (0..CLIENTS).map(|_| edge.client()).collect();
    all.iter_mut().for_each(|client| assert_eq!(client.get("/").status, 200));
    until_they_rest(CLIENTS);
    edge.ask_to_stop();
    assert!(all.iter_mut().all(Client::is_closed));
    until("nobody is waited for", || edge.is_stopped());
}

#[test]
fn a_client_that_reads_slowly_gets_the_whole_answer_although_its_connection_looks_idle() {
    const STEP: usize = 48 * 1024;
    let origin = Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            let steps: usize =
                seen.line().split(['/', ' ']).nth(2).expect("a path").parse().expect("a number");
            let body: Vec<u8> = (0..steps * STEP).map(|at| (at % 251) as u8).collect();
            conn.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes());
            conn.write(&body);
        }
    });
    let ca = Authority::new();
    let services = vec![service(vec![upstream(origin.addr)])];
    let edge = tls_support::edge(config(), services, &ca, &[tls_support::domain(&ca, "a.test")]);
    // So many sizes that of some the end is in the edge's hands when the client's system takes no more.
    let sizes = 1..=64;
    let ask = |steps: usize| format!("GET /{steps} HTTP/1.1\r\nHost: a.test\r\n\r\n");
    let mut clear: Vec<_> = sizes.clone().map(|steps| (steps, edge.client())).collect();
    let tls = tls_support::client(&ca, &[b"http/1.1"]);
    let mut sealed: Vec<_> =
        sizes.map(|steps| (steps, tls_support::connect(edge.https(), "a.test", tls.clone()))).collect();
    for (steps, client) in &mut clear {
        client.send(ask(*steps));
    }
    for (steps, client) in &mut sealed {
        client.send(ask(*steps));
    }
    // The time itself is the state that is awaited: longer than what makes a connection rest.
    std::thread::park_timeout(Duration::from_millis(2_000));
    for (steps, client) in &mut clear {
        assert_eq!(client.answer().body.len(), *steps * STEP);
    }
    for (steps, client) in &mut sealed {
        let body = client.answer().body;
        assert_eq!(body.len(), *steps * STEP);
        assert!(body.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
    }
}
