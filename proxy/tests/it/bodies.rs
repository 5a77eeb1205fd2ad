//! Bodies: streamed both ways, with back-pressure, trailers, interim responses and truthful ends.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use bytes::Bytes;
use http::Method;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::frames;
use super::support::{Client, Origin, TestEdge, block_on, h2c, service, until, until_trusted, upstream};

/// An HTTP/2 origin (prior knowledge) in a thread of its own.
pub(crate) fn h2_origin<F, R>(answer: F) -> std::net::SocketAddr
where
    F: Fn(http::Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = http::Response<http_body_util::combinators::BoxBody<Bytes, std::io::Error>>>
        + Send
        + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = listener.local_addr().expect("address");
    listener.set_nonblocking(true).expect("non-blocking");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener");
            while let Ok((socket, _)) = listener.accept().await {
                let answer = answer.clone();
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, std::convert::Infallible>(answer.await) }
                });
                let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(http.serve_connection(TokioIo::new(socket), service));
            }
        });
    });
    addr
}

pub(crate) fn full(text: &'static str) -> http_body_util::combinators::BoxBody<Bytes, std::io::Error> {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed()
}

#[test]
fn answers_without_a_body_have_none_and_keep_their_length() {
    let origin = Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            let status =
                seen.line().split('/').nth(1).and_then(|s| s.split(' ').next()).unwrap_or("200").to_owned();
            let head = if seen.line().starts_with("HEAD") {
                "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n".to_owned()
            } else {
                format!("HTTP/1.1 {status} X\r\nETag: \"e\"\r\n\r\n")
            };
            conn.write(head.as_bytes());
        }
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    let head = client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").answer_to("HEAD");
    assert_eq!(head.field("content-length"), Some("1234"));
    for status in [204, 304] {
        let answer = client.get(&format!("/{status}"));
        assert_eq!((answer.status, answer.field("transfer-encoding")), (status, None));
    }
    assert_eq!(client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").answer_to("HEAD").status, 200);
    assert_eq!(origin.connections(), 1);
}

#[test]
fn large_bodies_pass_both_ways_byte_by_byte() {
    let origin = Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            conn.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", seen.body.len()).as_bytes());
            conn.write(&seen.body);
        }
    });
    let (edge, upstream) = TestEdge::with_upstream(&origin);
    let body: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).take(3_000_000).collect();
    let mut client = edge.client();
    for _ in 0..2 {
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()));
        client.send(&body);
        assert!(client.answer().body == body);
        until_trusted(&upstream);
        assert_eq!(client.get("/").status, 200);
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn an_upload_and_its_answer_run_at_the_same_time() {
    // The origin echoes while it reads, and the client reads nothing until it has sent everything.
    let origin = Origin::scripted(|conn| {
        let head = conn.head().expect("head");
        assert!(head.contains("POST"));
        conn.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        let mut out = conn.socket.try_clone().expect("clone");
        let mut chunk = vec![0; 64 * 1024];
        let mut left = 2_000_000;
        while left > 0 {
            let read = conn.socket.read(&mut chunk).expect("reads");
            left -= read;
            // A second thread's worth of patience is not needed: the edge keeps taking both ways.
            out.write_all(b".").expect("writes");
        }
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n");
    let head = client.head();
    assert!(head.starts_with("HTTP/1.1 200"), "the head comes before the upload is over: {head}");
    client.send(vec![b'x'; 2_000_000]);
    assert!(client.more() > 0);
}

#[test]
fn a_client_that_reads_slowly_holds_the_upstream_back() {
    let written = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&written);
    let origin = Origin::scripted(move |conn| {
        conn.request();
        conn.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let chunk = [&b"10000\r\n"[..], &[b'x'; 0x10000], b"\r\n"].concat();
        for _ in 0..2_000 {
            if conn.socket.write_all(&chunk).is_err() {
                return;
            }
            counter.fetch_add(chunk.len() as u64, Ordering::SeqCst);
        }
        conn.write(b"0\r\n\r\n");
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    client.head();
    // It stands still when the buffers on the way are full: the same count three looks in a row.
    let (mut last, mut same) = (0, 0);
    until("the upstream is held back", || {
        std::thread::park_timeout(std::time::Duration::from_millis(50));
        let now = written.load(Ordering::SeqCst);
        same = if now == last && now > 0 { same + 1 } else { 0 };
        last = now;
        same >= 3
    });
    assert!(last < 60_000_000, "{last} bytes were taken from the upstream although nobody read them");
    let mut total = client.unread.len();
    client.unread.clear();
    while total < 2_000 * 0x10000 {
        let read = client.more();
        assert!(read > 0, "ended after {total} bytes");
        total += read;
        client.unread.clear();
    }
}

#[test]
fn events_pass_one_by_one() {
    let (next, asked) = mpsc::channel::<()>();
    let asked = std::sync::Mutex::new(asked);
    let origin = Origin::scripted(move |conn| {
        conn.request();
        conn.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
        );
        for event in 0..5 {
            asked.lock().expect("lock").recv().expect("is asked");
            conn.write(format!("9\r\ndata: {event}\n\n\r\n").as_bytes());
        }
        conn.write(b"0\r\n\r\n");
    });
    let spec = upstream(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let mut client = edge.client();
    client.send("GET /events HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(client.head().contains("text/event-stream"));
    let receipt = edge.upstream(&spec).receipt();
    assert_eq!(receipt.in_flight[peregrine_routing::TrafficClass::Sse], 1);
    for event in 0..5 {
        next.send(()).expect("the origin lives");
        let wanted = format!("data: {event}\n\n");
        while !String::from_utf8_lossy(&client.unread).contains(&wanted) {
            assert!(client.more() > 0);
        }
    }
    until("the stream is over", || edge.upstream(&spec).in_flight() == 0);
    assert_eq!(edge.upstream(&spec).receipt().completed[peregrine_routing::TrafficClass::Sse], 1);
}

#[test]
fn trailers_pass_in_http1_if_the_client_wants_them() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n",
            );
        }
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    let with = client.send("GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\n\r\n").answer();
    assert_eq!((with.text(), with.trailers.to_ascii_lowercase().as_str()), ("ok", "x-sum: 42\r\n"));
    assert_eq!(origin.last().all("te"), ["trailers"]);
    assert_eq!(origin.last().all("connection"), ["te"]);
    let without = client.get("/");
    assert_eq!((without.text(), without.trailers.as_str()), ("ok", ""));
}

#[test]
fn a_grpc_call_keeps_its_trailers_over_h2c() {
    let addr = h2_origin(|request| async move {
        assert_eq!(request.headers()["te"], "trailers");
        assert_eq!(request.uri().authority().map(|a| a.as_str()), Some("a.test"));
        let sent = request.into_body().collect().await.expect("body").to_bytes();
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
        let body =
            Full::new(sent).map_err(|never| match never {}).with_trailers(async move { Some(Ok(trailers)) });
        http::Response::builder()
            .header("content-type", "application/grpc")
            .body(body.boxed())
            .expect("answer")
    });
    let edge = TestEdge::start(service(vec![h2c(addr)]));
    block_on(async {
        let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
        let (mut sender, conn) = handshake.await.expect("handshake");
        tokio::spawn(conn);
        for _ in 0..20 {
            let request = http::Request::post("http://a.test/pkg.Service/Call")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(Full::new(Bytes::from_static(b"\0\0\0\0\x02hi")))
                .expect("request");
            let answer = sender.send_request(request).await.expect("answer");
            assert_eq!(answer.status(), 200);
            let collected = answer.into_body().collect().await.expect("body");
            assert_eq!(collected.trailers().expect("trailers")["grpc-status"], "0");
            assert_eq!(collected.to_bytes(), &b"\0\0\0\0\x02hi"[..]);
        }
    });
}

#[test]
fn http1_clients_reach_h2c_upstreams() {
    let addr = h2_origin(|request| async move {
        let host = request.uri().host().unwrap_or_default().to_owned();
        assert!(request.headers().get("host").is_none());
        assert_eq!(host, "a.test");
        http::Response::new(full("h2"))
    });
    let edge = TestEdge::start(service(vec![h2c(addr)]));
    let mut client = edge.client();
    for _ in 0..5 {
        assert_eq!(client.get("/").text(), "h2");
        assert_eq!(client.post("/", "body").text(), "h2");
    }
}

#[test]
fn an_answer_that_can_have_no_content_has_none_whatever_an_h2c_upstream_sends() {
    let origin = frames::Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let answers = [
        (Method::GET, frames::STATUS_204, 204),
        (Method::GET, frames::STATUS_304, 304),
        (Method::HEAD, frames::STATUS_200, 200),
        (Method::DELETE, frames::STATUS_204, 204),
        (Method::GET, frames::STATUS_200, 200),
    ];
    let mut client = edge.client();
    for (method, octet, status) in &answers {
        client.send(format!("{method} / HTTP/1.1\r\nHost: a.test\r\n\r\n"));
        origin.answer_as(&origin.request(), *octet, "content");
        let answer = client.answer_to(method.as_str());
        let expected = if *status == 200 && *method == Method::GET { "content" } else { "" };
        assert_eq!(
            (answer.status, answer.text()),
            (*status, expected),
            "{method}: the next answer is the next one's"
        );
    }
    let answer_all =
        || answers.iter().for_each(|(_, octet, _)| origin.answer_as(&origin.request(), *octet, "content"));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            block_on(async {
                let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
                let handshake =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
                let (mut sender, conn) = handshake.await.expect("handshake");
                tokio::spawn(conn);
                for (method, _, status) in &answers {
                    let request = http::Request::builder().method(method).uri("http://a.test/");
                    let request = request.body(Full::new(Bytes::new())).expect("request");
                    let answer = sender.send_request(request).await.expect("answer");
                    assert_eq!(answer.status(), *status);
                    let body = answer.into_body().collect().await.expect("is well formed").to_bytes();
                    let expected = if *status == 200 && *method == Method::GET { "content" } else { "" };
                    assert_eq!(body, expected, "{method}");
                }
            });
        });
        answer_all();
        asked.join().expect("the client is content");
    });
}

#[test]
fn a_client_that_expects_continue_is_asked_when_the_origin_asks() {
    let origin = Origin::scripted(|conn| {
        let Some(head) = conn.head() else { return };
        assert!(head.to_ascii_lowercase().contains("expect: 100-continue"), "{head}");
        if head.contains("/refuse") {
            conn.write(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno");
            return;
        }
        conn.write(b"HTTP/1.1 100 Continue\r\n\r\n");
        if conn.more().is_some() {
            conn.answer("thanks");
        }
    });
    let edge = TestEdge::before(&origin);
    let ask = |path: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    };
    let mut client = edge.client();
    assert!(client.send(ask("/")).head().starts_with("HTTP/1.1 100"));
    assert_eq!(client.send("hello").answer().text(), "thanks");
    let mut client = edge.client();
    let refused = client.send(ask("/refuse")).answer();
    assert_eq!((refused.status, refused.text()), (417, "no"), "no 100 before the refusal");
    assert!(client.is_closed(), "the body was never asked for, so the connection ends");
}

#[test]
fn an_origin_that_ignores_the_expectation_gets_the_body_all_the_same() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
    assert!(client.head().starts_with("HTTP/1.1 100"));
    assert_eq!(client.send("hello").answer().text(), "ok");
    assert_eq!(origin.last().body, b"hello");
}

#[test]
fn early_hints_are_passed_on_in_front_of_the_answer() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n");
            conn.answer("ok");
        }
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    for _ in 0..3 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let hints = client.head();
        assert!(hints.starts_with("HTTP/1.1 103") && hints.contains("</a.css>; rel=preload"), "{hints}");
        assert_eq!(client.answer().text(), "ok");
    }
}

#[test]
fn an_answer_that_breaks_off_never_looks_complete() {
    let origin = Origin::scripted(|conn| {
        let Some(seen) = conn.request() else { return };
        if seen.line().contains("chunked") {
            conn.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        } else {
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        }
    });
    let edge = TestEdge::before(&origin);
    for path in ["/chunked", "/length"] {
        let mut client = edge.client();
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert!(client.head().starts_with("HTTP/1.1 200"));
        while client.more() > 0 {}
        let rest = String::from_utf8_lossy(&client.unread).into_owned();
        assert!(rest.contains("hello") && !rest.contains("0\r\n\r\n"), "{path}: {rest:?}");
    }
}

#[test]
fn a_body_that_is_larger_than_the_service_allows_is_refused() {
    let origin = Origin::ok();
    let mut web = service(vec![upstream(origin.addr)]);
    web.policy.max_request_body_bytes = 10;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    assert_eq!(client.post("/", "0123456789").status, 200);
    let answer = client.post("/", "0123456789a");
    assert_eq!((answer.status, answer.reason()), (413, "body_too_large"));
    let mut client: Client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n012345\r\n");
    let answer = client.send("6\r\n012345\r\n").answer();
    assert_eq!((answer.status, answer.reason()), (413, "body_too_large"));
}

/// A client of HTTP/2 with a large answer of which it takes hardly anything.
struct Stalling {
    edge: TestEdge,
    sender: hyper::client::conn::http2::SendRequest<http_body_util::Empty<Bytes>>,
    conn: tokio::task::JoinHandle<()>,
    large: Option<http::Response<Incoming>>,
    begun: std::time::Instant,
}

impl Stalling {
    /// Begins, and asks for small things until the origin has been let go.
    async fn until_let_go() -> Self {
        const LARGE_BYTES: usize = 8 << 20;
        let let_go = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let gone = Arc::clone(&let_go);
        let origin = Origin::scripted(move |conn| {
            while let Some(head) = conn.head() {
                if head.starts_with("GET /large ") {
                    conn.write(
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE_BYTES}\r\n\r\n").as_bytes(),
                    );
                    conn.write(&vec![b'x'; LARGE_BYTES]);
                    assert_eq!(conn.more(), None);
                    gone.store(true, Ordering::SeqCst);
                    return;
                }
                conn.answer("ok");
            }
        });
        let mut web = service(vec![upstream(origin.addr)]);
        web.policy.body_idle_timeout_ms = 100;
        let edge = TestEdge::start(web);
        let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
        let (sender, conn) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(10_000)
            .initial_connection_window_size(16 << 20)
            .handshake(TokioIo::new(socket))
            .await
            .expect("handshake");
        let conn = tokio::spawn(async move { drop(conn.await) });
        let begun = std::time::Instant::now();
        let mut sender = sender;
        let large = Self::ask(&mut sender, edge.addr, "/large").await;
        let mut this = Self { edge, sender, conn, large: Some(large), begun };
        while !let_go.load(Ordering::SeqCst) {
            assert!(begun.elapsed() < super::support::PATIENCE, "the origin is kept");
            this.ask_small().await;
        }
        this
    }

    async fn ask(
        sender: &mut hyper::client::conn::http2::SendRequest<http_body_util::Empty<Bytes>>,
        addr: std::net::SocketAddr,
        path: &str,
    ) -> http::Response<Incoming> {
        let request = http::Request::get(format!("http://{addr}{path}"));
        let request = request.body(http_body_util::Empty::new()).expect("a request");
        sender.ready().await.expect("the connection is open");
        sender.send_request(request).await.expect("an answer")
    }

    async fn ask_small(&mut self) {
        let small = Self::ask(&mut self.sender, self.edge.addr, "/small").await;
        assert_eq!(small.into_body().collect().await.expect("whole").to_bytes(), "ok");
    }
}

#[test]
fn a_stream_that_its_client_does_not_take_ends_alone_and_the_others_of_its_connection_go_on() {
    block_on(async {
        let mut stalling = Stalling::until_let_go().await;
        let patience = std::time::Duration::from_millis(900);
        assert!(stalling.begun.elapsed() >= patience, "it has had its time");
        let large = stalling.large.take().expect("it has begun");
        assert!(large.into_body().collect().await.is_err(), "what is left of it is told as broken off");
        stalling.ask_small().await;
    });
}

#[test]
fn a_connection_that_falls_silent_with_a_stream_that_was_let_go_is_closed() {
    block_on(async {
        let stalling = Stalling::until_let_go().await;
        let ended = tokio::time::timeout(super::support::PATIENCE, stalling.conn).await;
        ended.expect("nobody keeps it").expect("no panic");
    });
}

#[test]
fn an_answer_of_one_piece_that_its_client_leaves_no_room_for_does_not_keep_its_connection() {
    let (came, head_came) = mpsc::channel();
    let head_came = std::sync::Mutex::new(head_came);
    let origin = Origin::scripted(move |conn| {
        conn.head().expect("a request");
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n");
        head_came.lock().expect("no panic").recv().expect("the client has the head");
        conn.write(b"ok");
        conn.more();
    });
    let mut web = service(vec![upstream(origin.addr)]);
    web.policy.body_idle_timeout_ms = 200;
    let edge = TestEdge::start(web);
    block_on(async {
        let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
        let (mut sender, conn) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(0)
            .handshake(TokioIo::new(socket))
            .await
            .expect("handshake");
        let conn = tokio::spawn(async move { drop(conn.await) });
        let kept = Stalling::ask(&mut sender, edge.addr, "/").await;
        came.send(()).expect("the origin waits");
        let ended = tokio::time::timeout(super::support::PATIENCE, conn).await;
        ended.expect("nobody keeps it").expect("no panic");
        drop(kept);
    });
}

#[test]
fn white_space_around_values_of_http2_does_not_go_on() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    block_on(async {
        let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
        let (mut sender, conn) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket))
                .await
                .expect("handshake");
        tokio::spawn(conn);
        let request = http::Request::get(format!("http://{}/", edge.addr)).header("x-t", " \ta b ");
        let request =
            request.header("x-e", "  ").body(http_body_util::Empty::<Bytes>::new()).expect("a request");
        assert_eq!(sender.send_request(request).await.expect("an answer").status(), 200);
    });
    let seen = origin.last();
    let line = |name: &str| seen.head.lines().find(|line| line.starts_with(name)).map(str::to_owned);
    assert_eq!(line("x-t"), Some("x-t: a b".to_owned()), "{}", seen.head);
    assert_eq!(line("x-e").map(|line| line.trim_end().to_owned()), Some("x-e:".to_owned()));
}
