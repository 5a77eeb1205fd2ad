//! The end of an edge.

use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use peregrine_proxy::Config;

use super::support::{Origin, PATIENCE, TestEdge, config, service, until, upstream};

fn held() -> (Origin, mpsc::Sender<()>) {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let origin = Origin::scripted(move |conn| {
        while let Some(seen) = conn.request() {
            if seen.line().contains("/held") {
                let _ = wait.lock().expect("lock").recv();
            }
            conn.answer("done");
        }
    });
    (origin, go)
}

#[test]
fn a_shutdown_lets_requests_finish_and_tells_their_clients() {
    let (origin, go) = held();
    let mut edge = TestEdge::before(&origin);
    let mut idle = edge.client();
    assert_eq!(idle.get("/").status, 200);
    let mut busy = edge.client();
    busy.send("GET /held HTTP/1.1\r\nHost: a\r\n\r\n");
    until("it is inside", || origin.seen().len() == 2);
    edge.ask_to_stop();
    assert!(idle.is_closed(), "an idle connection is closed at once");
    until("nobody is accepted", || std::net::TcpStream::connect(edge.addr).is_err());
    assert!(!edge.is_stopped());
    go.send(()).expect("the origin waits");
    let answer = busy.answer();
    assert_eq!((answer.text(), answer.field("connection")), ("done", Some("close")));
    assert!(busy.is_closed());
    edge.wait_stopped();
}

#[test]
fn a_shutdown_is_bounded() {
    let (origin, _go) = held();
    let limited = Config { drain_timeout_ms: 300, ..config() };
    let mut edge = TestEdge::start_with(limited, vec![service(vec![upstream(origin.addr)])]);
    let mut client = edge.client();
    client.send("GET /held HTTP/1.1\r\nHost: a\r\n\r\n");
    until("it is inside", || origin.seen().len() == 1);
    let started = Instant::now();
    edge.ask_to_stop();
    edge.wait_stopped();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(client.is_closed());
}

#[test]
fn an_http2_client_is_told_to_go_and_its_streams_finish() {
    let (origin, go) = held();
    let mut edge = TestEdge::before(&origin);
    let addr = edge.addr;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let (mut sender, conn) = runtime.block_on(async {
        let socket = tokio::net::TcpStream::connect(addr).await.expect("connects");
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
        handshake.await.expect("handshake")
    });
    let conn = runtime.spawn(conn);
    let request = http::Request::get("http://a.test/held").body(Full::<Bytes>::default()).expect("request");
    let answer = runtime.spawn(async move { sender.send_request(request).await });
    until("it is inside", || origin.seen().len() == 1);
    edge.ask_to_stop();
    until("nobody is accepted", || std::net::TcpStream::connect(addr).is_err());
    go.send(()).expect("the origin waits");
    runtime.block_on(async {
        let answer = tokio::time::timeout(PATIENCE, answer)
            .await
            .expect("in time")
            .expect("no panic")
            .expect("answer");
        assert_eq!(answer.into_body().collect().await.expect("body").to_bytes(), "done");
        tokio::time::timeout(PATIENCE, conn).await.expect("in time").expect("no panic").expect("a clean end");
    });
    edge.wait_stopped();
}

#[test]
fn several_cores_share_an_address_and_end_together() {
    let origin = Origin::ok();
    let mut edge =
        TestEdge::start_with(Config { cores: 3, ..config() }, vec![service(vec![upstream(origin.addr)])]);
    let mut clients: Vec<_> = (0..24).map(|_| edge.client()).collect();
    for client in &mut clients {
        assert_eq!(client.get("/").status, 200);
    }
    let version = edge.put(service(vec![upstream(origin.addr)]));
    edge.wait_acknowledged(version);
    edge.ask_to_stop();
    edge.wait_stopped();
}

#[test]
fn an_edge_serves_on_sockets_that_were_bound_before() {
    let origin = Origin::ok();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = listener.local_addr().expect("address");
    let (mut writer, reader) = peregrine_routing::table();
    writer
        .apply(&[peregrine_routing::Change::Put(service(vec![upstream(origin.addr)]))])
        .expect("is accepted");
    let edge = peregrine_proxy::Edge::with_listeners(Config { cores: 2, ..config() }, vec![listener], reader)
        .expect("binds");
    assert_eq!(edge.addrs(), [addr]);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(edge.run(async move { drop(stopped.await) }))
    });
    assert_eq!(super::support::Client::connect(addr).get("/").status, 200);
    drop(stop);
    thread.join().expect("no panic").expect("a clean end");
}
