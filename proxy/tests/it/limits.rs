//! Time-outs and limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use peregrine_proxy::{Config, Limits};
use peregrine_routing::TrafficClass;

use super::support::{Origin, PATIENCE, TestEdge, block_on, config, find, service, until, upstream};

/// Time between two pieces of a body that goes on and on.
const DRIP: Duration = Duration::from_millis(20);

fn with_limits(limits: Limits, origin: &Origin) -> TestEdge {
    TestEdge::start_with(Config { limits, ..config() }, vec![service(vec![upstream(origin.addr)])])
}

#[test]
fn a_head_that_does_not_come_in_time_is_answered_and_closed() {
    let origin = Origin::ok();
    let edge = with_limits(Limits { head_timeout_ms: 300, ..Limits::default() }, &origin);
    let mut client = edge.client();
    let started = Instant::now();
    client.send("GET / HTTP/1.1\r\nHost:");
    let answer = client.answer();
    assert_eq!((answer.status, answer.reason()), (408, "head_timeout"));
    assert!(client.is_closed());
    assert!(started.elapsed() >= Duration::from_millis(290));
    // Also on a connection that has served before, and drop by drop.
    let mut client = edge.client();
    assert_eq!(client.get("/").status, 200);
    client.send("GET /");
    assert_eq!(client.answer().reason(), "head_timeout");
}

#[test]
fn a_connection_that_says_nothing_is_closed() {
    let origin = Origin::ok();
    let limits = Limits { head_timeout_ms: 200, idle_timeout_ms: 400, ..Limits::default() };
    let edge = with_limits(limits, &origin);
    assert!(edge.client().is_closed(), "a new one after the head's time");
    let mut client = edge.client();
    assert_eq!(client.get("/").status, 200);
    let started = Instant::now();
    assert!(client.is_closed(), "a used one after the idle time");
    assert!(started.elapsed() >= Duration::from_millis(290), "{:?}", started.elapsed());
}

#[test]
fn an_answer_that_does_not_come_in_time_is_a_gateway_timeout() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        while conn.more().is_some() {}
    });
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.response_head_timeout_ms = 200;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    let answer = client.get("/");
    assert_eq!((answer.status, answer.reason()), (504, "upstream_timeout"));
    assert_eq!(edge.upstream(&spec).outcomes().failed, 1);
    assert_eq!(client.get("/").status, 504, "the client's connection goes on");
}

#[test]
fn a_connection_that_does_not_open_in_time_is_a_gateway_timeout() {
    // A listener whose backlog is full takes no further connection and refuses none.
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = socket.local_addr().expect("address");
    let mut fillers = Vec::new();
    while let Ok(filler) = std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(100)) {
        fillers.push(filler);
        assert!(fillers.len() < 10_000, "the backlog never fills");
    }
    let mut web = service(vec![upstream(addr)]);
    web.policy.connect_timeout_ms = 200;
    let edge = TestEdge::start(web);
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (504, "upstream_connect_timeout"));
}

#[test]
fn an_answer_that_stands_still_is_broken_off() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        while conn.more().is_some() {}
    });
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.body_idle_timeout_ms = 200;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").head();
    while client.more() > 0 {}
    assert_eq!(client.unread, b"hello");
    until("the lease is back", || edge.upstream(&spec).in_flight() == 0);
}

#[test]
fn an_upload_that_stands_still_is_the_clients_fault() {
    let origin = Origin::ok();
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.body_idle_timeout_ms = 200;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello");
    let answer = client.answer();
    assert_eq!((answer.status, answer.reason()), (408, "body_timeout"));
    assert!(client.is_closed());
    assert_eq!(edge.upstream(&spec).outcomes().failed, 0);
}

#[test]
fn a_client_that_takes_nothing_is_let_go() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
        let chunk = vec![b'x'; 1 << 20];
        while std::io::Write::write_all(&mut conn.socket, &chunk).is_ok() {}
    });
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.body_idle_timeout_ms = 300;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").head();
    until("the lease is back", || edge.upstream(&spec).in_flight() == 0);
    assert_eq!(edge.upstream(&spec).outcomes().failed, 0);
}

#[test]
fn connections_above_the_limit_wait_for_one_to_end() {
    let origin = Origin::ok();
    let edge = with_limits(Limits { max_connections: 2, ..Limits::default() }, &origin);
    let mut first = edge.client();
    let mut second = edge.client();
    assert_eq!((first.get("/").status, second.get("/").status), (200, 200));
    let mut third = edge.client();
    third.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    third.socket.set_read_timeout(Some(Duration::from_millis(300))).expect("time-out");
    let mut byte = [0];
    assert!(third.socket.peek(&mut byte).is_err(), "it is not served yet");
    drop(first);
    third.socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
    assert_eq!(third.answer().status, 200);
}

#[test]
fn a_rapid_reset_ends_the_connection_and_not_the_edge() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    block_on(async {
        let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
        let (client, conn) = h2::client::handshake(socket).await.expect("handshake");
        tokio::spawn(conn);
        for sent in 0.. {
            assert!(sent < 100_000, "the edge lets the client go on for ever");
            let Ok(mut ready) = client.clone().ready().await else { break };
            let request = http::Request::get("http://a.test/").body(()).expect("request");
            let Ok((answer, mut stream)) = ready.send_request(request, false) else { break };
            stream.send_reset(h2::Reason::CANCEL);
            drop(answer);
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(edge.client().get("/").status, 200);
}

#[test]
fn a_long_transfer_becomes_one_in_the_account_only_when_it_is_long() {
    /// The edge's own, so that a drain gives a long body more time than a request.
    const TRANSFER_AFTER: Duration = Duration::from_secs(10);
    let stop = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&stop);
    let origin = Origin::scripted(move |conn| match conn.head() {
        Some(head) if head.starts_with("GET /down ") => {
            conn.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            while !over.load(Ordering::SeqCst) {
                conn.write(b"1\r\nx\r\n");
                std::thread::park_timeout(DRIP);
            }
            conn.write(b"0\r\n\r\n");
        }
        Some(head) if head.starts_with("POST /up ") => {
            while find(&conn.unread, b"0\r\n\r\n").is_none() && conn.more().is_some() {}
            conn.answer("ok");
        }
        _ => conn.answer("ok"),
    });
    let spec = upstream(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let account = || edge.upstream(&spec).receipt();
    edge.client().get("/short");
    until("the short one is over", || account().completed[TrafficClass::Request] == 1);

    let began = Instant::now();
    let (mut down, mut up) = (edge.client(), edge.client());
    down.send("GET /down HTTP/1.1\r\nHost: a\r\n\r\n").head();
    up.send("POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    until("both are under way", || account().in_flight[TrafficClass::Request] == 2);
    let mut first_seen = None;
    while account().in_flight[TrafficClass::Transfer] < 2 {
        if account().in_flight[TrafficClass::Transfer] > 0 {
            first_seen.get_or_insert(began.elapsed());
        }
        assert!(
            began.elapsed() < TRANSFER_AFTER + PATIENCE,
            "still in the account as {:?}",
            account().in_flight
        );
        up.send("1\r\nx\r\n");
        std::thread::park_timeout(DRIP);
    }
    let changed = first_seen.unwrap_or_else(|| began.elapsed());
    assert!(changed >= TRANSFER_AFTER, "a transfer already after {changed:?}");
    assert_eq!(account().in_flight[TrafficClass::Request], 0, "it is in the account once");

    stop.store(true, Ordering::SeqCst);
    assert_eq!(up.send("0\r\n\r\n").answer().status, 200);
    while find(&down.unread, b"0\r\n\r\n").is_none() {
        assert!(down.more() > 0, "the answer comes to its end");
    }
    until("both are over", || account().completed[TrafficClass::Transfer] == 2);
    // The origin closes behind the short one; who meets that is sent again, and counts as over before it has begun.
    let account = account();
    assert_eq!(account.completed[TrafficClass::Request], 1 + account.retried, "the short one");
}
