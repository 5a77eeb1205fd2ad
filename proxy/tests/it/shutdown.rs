//! The end of an edge.

use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use peregrine_proxy::{Config, Edge, Ending, RunError, Sockets, Speaks};
use tokio::sync::watch;

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
    let edge = Edge::with_listeners(Config { cores: 2, ..config() }, vec![listener], reader).expect("binds");
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

/// An edge on sockets that others have too.
struct Shared {
    ending: watch::Sender<Ending>,
    thread: std::thread::JoinHandle<Result<(), RunError>>,
}

impl Shared {
    fn start(sockets: &Sockets, reader: &peregrine_routing::TableReader) -> Self {
        let sockets = sockets.try_clone().expect("descriptors");
        let edge =
            Edge::with_sockets(Config { cores: 1, ..config() }, sockets, reader.clone()).expect("binds");
        let (ending, told) = watch::channel(Ending::No);
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(edge.run_until(told))
        });
        Self { ending, thread }
    }

    fn wait_ended(self) {
        until("its end", || self.thread.is_finished());
        self.thread.join().expect("no panic").expect("a clean end");
    }
}

#[test]
fn an_edge_that_hands_over_leaves_the_queue_to_the_next_one_and_ends_its_connections_after_their_next_answer()
{
    let (origin, go) = held();
    let (mut writer, reader) = peregrine_routing::table();
    let put = peregrine_routing::Change::Put(service(vec![upstream(origin.addr)]));
    writer.apply(&[put]).expect("is accepted");
    let any = "127.0.0.1:0".parse().expect("an address");
    let sockets = Sockets::bind(&Config { cores: 1, http: vec![any], ..config() }).expect("binds");
    let before = Shared::start(&sockets, &reader);
    let addr = sockets.addrs(Speaks::Http)[0];
    let mut idle: Vec<_> = (0..4).map(|_| super::support::Client::connect(addr)).collect();
    for client in &mut idle {
        assert_eq!(client.get("/").field("connection"), None);
    }
    let mut busy = super::support::Client::connect(addr);
    busy.send("GET /held HTTP/1.1\r\nHost: a\r\n\r\n");
    until("it is inside", || origin.seen().len() == 5);
    before.ending.send_replace(Ending::HandOver);
    until("it to say so", || idle[0].get("/").field("connection") == Some("close"));
    assert!(idle[0].is_closed());
    for client in &mut idle[1..] {
        let answer = client.get("/");
        assert_eq!((answer.text(), answer.field("connection")), ("done", Some("close")));
        assert!(client.is_closed());
    }
    // Not one of these is accepted before the next edge is there; nor refused.
    let mut waiting: Vec<_> = (0..16).map(|_| super::support::Client::connect(addr)).collect();
    for client in &mut waiting {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    assert!(!before.thread.is_finished(), "it has a request");
    let after = Shared::start(&sockets, &reader);
    for client in &mut waiting {
        assert_eq!(client.answer().field("connection"), None, "of the next one");
    }
    go.send(()).expect("the origin waits");
    assert_eq!(busy.answer().field("connection"), Some("close"));
    before.wait_ended();
    assert_eq!(waiting[0].get("/").status, 200);
    after.ending.send_replace(Ending::Stop);
    after.wait_ended();
}

#[test]
fn what_goes_on_after_a_hand_over_is_ended_by_the_time_of_its_class_and_a_stop_bounds_it() {
    let (origin, _go) = held();
    let (mut writer, reader) = peregrine_routing::table();
    let mut one = service(vec![upstream(origin.addr)]);
    let cut = peregrine_routing::DrainTime { close_ms: 500, cut_ms: 700 };
    one.policy.drain[peregrine_routing::TrafficClass::Request] = cut;
    writer.apply(&[peregrine_routing::Change::Put(one)]).expect("is accepted");
    let any = "127.0.0.1:0".parse().expect("an address");
    let limited = Config { cores: 1, http: vec![any], ..config() };
    let sockets = Sockets::bind(&limited).expect("binds");
    let addr = sockets.addrs(Speaks::Http)[0];
    let edge = Shared::start(&sockets, &reader);
    let mut busy = super::support::Client::connect(addr);
    busy.send("GET /held HTTP/1.1\r\nHost: a\r\n\r\n");
    until("it is inside", || origin.seen().len() == 1);
    let begun = Instant::now();
    edge.ending.send_replace(Ending::HandOver);
    assert_eq!(busy.answer().status, 503);
    assert!(begun.elapsed() >= Duration::from_millis(700), "{:?}", begun.elapsed());
    edge.wait_ended();
}
