//! Retry classes: what was not sent, not processed, or may be executed twice is sent again, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::support::{Origin, TestEdge, block_on, dead_address, h2c, service, upstream};

#[test]
fn a_dead_upstream_is_not_noticed_while_another_lives() {
    let origin = Origin::ok();
    let (dead, alive) = (upstream(dead_address()), upstream(origin.addr));
    let edge = TestEdge::start(service(vec![dead.clone(), alive]));
    let mut client = edge.client();
    for i in 0..40 {
        assert_eq!(client.post("/", &format!("body {i}")).status, 200);
    }
    assert_eq!(origin.seen().len(), 40);
    let mut bodies: Vec<Vec<u8>> = origin.seen().into_iter().map(|seen| seen.body).collect();
    bodies.dedup();
    assert_eq!(bodies.len(), 40, "each was sent once, in order");
    let dead = edge.upstream(&dead);
    assert!(dead.ejected_until_ms() > 0, "it was ejected");
    let receipt = dead.receipt();
    assert_eq!(receipt.started, 0, "nothing was ever sent to it");
    assert!(receipt.retried >= 5, "what was tried there first is counted: {}", receipt.retried);
}

#[test]
fn the_last_upstream_is_asked_even_if_it_fails() {
    let spec = upstream(dead_address());
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let mut client = edge.client();
    for _ in 0..8 {
        let answer = client.get("/");
        assert_eq!((answer.status, answer.reason()), (502, "upstream_connect_failed"));
    }
    assert!(edge.upstream(&spec).ejected_until_ms() > 0);
    // Panic rule: ejected, but there is no other, so it is still tried and still told truthfully.
    assert_eq!(client.get("/").reason(), "upstream_connect_failed");
}

#[test]
fn retries_end_when_their_budget_is_spent() {
    let specs: Vec<_> = (0..3).map(|_| upstream(dead_address())).collect();
    let mut web = service(specs);
    web.policy.passive.consecutive_failures = 0;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    for _ in 0..100 {
        assert_eq!(client.get("/").status, 502);
    }
}

#[test]
fn a_service_without_upstreams_says_so() {
    let edge = TestEdge::start(service(Vec::new()));
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (503, "no_upstream"));
    assert_eq!(answer.field("retry-after"), Some("1"));
}

#[test]
fn a_connection_that_the_upstream_closed_while_idle_is_not_noticed() {
    let (closed, wait) = std::sync::mpsc::channel();
    let closed = std::sync::Mutex::new(closed);
    let origin = Origin::scripted(move |conn| {
        // One request per connection, and the close is not announced.
        conn.request();
        conn.answer("ok");
        drop(conn.socket.shutdown(std::net::Shutdown::Both));
        closed.lock().expect("lock").send(()).expect("the test listens");
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    for i in 0..30 {
        assert_eq!(client.post("/", "x").status, 200, "request {i}");
        wait.recv_timeout(super::support::PATIENCE).expect("the origin closes");
    }
    assert_eq!(origin.seen().len(), 30);
}

#[test]
fn a_request_that_was_written_is_not_sent_twice() {
    let origin = Origin::scripted(|conn| {
        // Reads and leaves without a word.
        conn.request();
    });
    let edge = TestEdge::before(&origin);
    let answer = edge.client().post("/", "once");
    assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
    assert_eq!(origin.seen().len(), 1);
}

/// An origin that reads the first request, says `first`, and hangs up; every other request is answered.
fn hangs_up_once(first: &'static str) -> Origin {
    let asked = AtomicUsize::new(0);
    Origin::scripted(move |conn| {
        while let Some(seen) = conn.request() {
            if asked.fetch_add(1, Ordering::SeqCst) == 0 {
                conn.write(first.as_bytes());
                return;
            }
            let length = seen.body.len();
            conn.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes());
            conn.write(&seen.body);
        }
    })
}

#[test]
fn an_idempotent_request_is_sent_again_when_nothing_came_back() {
    let send = |request: &str| {
        let origin = hangs_up_once("");
        let edge = TestEdge::before(&origin);
        let answer = edge.client().send(request.as_bytes()).answer();
        (answer.status, String::from_utf8(answer.body).expect("text"), origin.seen().len())
    };
    assert_eq!(send("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), (200, String::new(), 2));
    // With its body, whichever way that is delimited.
    let sized = "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
    assert_eq!(send(sized), (200, "hello".into(), 2));
    let chunked =
        "DELETE / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
    assert_eq!(send(chunked), (200, "hello".into(), 2));
    // The origin tells the two apart by itself.
    let key = "POST / HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nContent-Length: 5\r\n\r\nhello";
    assert_eq!(send(key), (200, "hello".into(), 2));
}

#[test]
fn a_request_whose_body_is_too_large_to_keep_is_not_sent_again() {
    let origin = hangs_up_once("");
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    client.send("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n").send(vec![b'x'; 100_000]);
    assert_eq!(client.answer().status, 502);
    assert_eq!(origin.seen().len(), 1);
}

#[test]
fn a_request_that_was_answered_in_part_is_not_sent_again() {
    for part in ["H", "HTTP/1.1 200 OK\r\nContent-Le"] {
        let origin = hangs_up_once(part);
        let edge = TestEdge::before(&origin);
        let answer = edge.client().get("/");
        assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"), "{part}");
        assert_eq!(origin.seen().len(), 1);
    }
}

#[test]
fn what_is_not_http_is_a_bad_gateway() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        conn.write(b"SSH-2.0-OpenSSH_9.2\r\n");
        while conn.more().is_some() {}
    });
    let edge = TestEdge::before(&origin);
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (502, "upstream_protocol"));
}

/// An HTTP/2 origin that refuses so many streams first.
fn refusing(first: usize, goaway: bool) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = listener.local_addr().expect("address");
    listener.set_nonblocking(true).expect("non-blocking");
    let served = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&served);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            let refused = Arc::new(AtomicUsize::new(0));
            while let Ok((socket, _)) = listener.accept().await {
                let (refused, count) = (Arc::clone(&refused), Arc::clone(&count));
                tokio::spawn(serve_refusing(socket, first, goaway, refused, count));
            }
        });
    });
    (addr, served)
}

async fn serve_refusing(
    socket: tokio::net::TcpStream,
    first: usize,
    goaway: bool,
    refused: Arc<AtomicUsize>,
    served: Arc<AtomicUsize>,
) {
    let mut conn = h2::server::handshake(socket).await.expect("handshake");
    while let Some(Ok((request, mut respond))) = conn.accept().await {
        if refused.load(Ordering::SeqCst) < first {
            refused.fetch_add(1, Ordering::SeqCst);
            if goaway {
                conn.abrupt_shutdown(h2::Reason::NO_ERROR);
            } else {
                respond.send_reset(h2::Reason::REFUSED_STREAM);
            }
            continue;
        }
        let served = Arc::clone(&served);
        tokio::spawn(async move {
            let mut body = request.into_body();
            let mut total = 0;
            while let Some(Ok(data)) = body.data().await {
                total += data.len();
                drop(body.flow_control().release_capacity(data.len()));
            }
            served.fetch_add(1, Ordering::SeqCst);
            let answer = http::Response::builder().header("x-body", total).body(()).expect("answer");
            drop(respond.send_response(answer, true));
        });
    }
}

#[test]
fn a_refused_stream_is_sent_again_with_its_body() {
    let (addr, served) = refusing(2, false);
    let edge = TestEdge::start(service(vec![h2c(addr)]));
    let answer = edge.client().post("/", "hello");
    assert_eq!((answer.status, answer.field("x-body")), (200, Some("5")));
    assert_eq!(served.load(Ordering::SeqCst), 1);
}

#[test]
fn a_stream_that_is_refused_again_and_again_is_told_truthfully() {
    let (addr, served) = refusing(100, false);
    let edge = TestEdge::start(service(vec![h2c(addr)]));
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (503, "upstream_refused"));
    assert_eq!(served.load(Ordering::SeqCst), 0);
}

#[test]
fn requests_of_many_clients_share_an_http2_connection() {
    let (addr, served) = refusing(0, false);
    let edge = TestEdge::start(service(vec![h2c(addr)]));
    let mut clients: Vec<_> = (0..10).map(|_| edge.client()).collect();
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    for client in &mut clients {
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(served.load(Ordering::SeqCst), 10);
}

#[test]
fn everything_retired_at_once_means_a_look_at_the_new_table() {
    let (old, new) = (Origin::saying("old"), Origin::saying("new"));
    let mut edge = TestEdge::before(&old);
    let mut client = edge.client();
    assert_eq!(client.get("/").text(), "old");
    for _ in 0..50 {
        let version = edge.put(service(vec![upstream(new.addr)]));
        assert_eq!(client.get("/").text(), "new");
        block_on(edge.writer.acknowledged(version));
    }
}
