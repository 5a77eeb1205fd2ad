//! The origin seen from its socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use peregrine_bench::oracle::read_records;
use peregrine_bench::origin::{Fault, FaultChange, Origin, OriginOptions, Protocol};
use tokio_tungstenite::tungstenite::Message;

/// Sends one request over a connection of its own.
async fn send(addr: SocketAddr, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let io = TokioIo::new(tokio::net::TcpStream::connect(addr).await.expect("a connection"));
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("a handshake");
    tokio::spawn(connection);
    sender.send_request(request).await.expect("an answer")
}

fn request(method: Method, uri: &str, body: &str) -> Request<Full<Bytes>> {
    let body = Full::new(Bytes::from(body.to_owned()));
    Request::builder().method(method).uri(uri).header("host", "origin.test").body(body).expect("a request")
}

async fn get(addr: SocketAddr, uri: &str) -> (StatusCode, Bytes) {
    let (head, body) = send(addr, request(Method::GET, uri, "")).await.into_parts();
    (head.status, body.collect().await.expect("a whole body").to_bytes())
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).expect("JSON")
}

#[tokio::test]
async fn every_answer_names_the_instance_and_its_request() {
    let origin = Origin::bind(OriginOptions::named("alpha")).await.expect("bound");
    let mut named = request(Method::GET, "/", "");
    named.headers_mut().insert("x-req-id", "run-1".parse().expect("a value"));
    let answer = send(origin.addr(), named).await;
    assert_eq!(answer.headers()["x-instance"], "alpha");
    assert_eq!(answer.headers()["x-req-id"], "run-1");
    let page = answer.into_body().collect().await.expect("a page").to_bytes();
    assert!(String::from_utf8_lossy(&page).contains("alpha"));
}

#[tokio::test]
async fn executions_are_recorded_with_protocol_method_and_connection() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let mut post = request(Method::POST, "/status/201", "x");
    post.headers_mut().insert("x-req-id", "run-1".parse().expect("a value"));
    assert_eq!(send(origin.addr(), post.clone()).await.status(), StatusCode::CREATED);
    let io = TokioIo::new(tokio::net::TcpStream::connect(origin.addr()).await.expect("a connection"));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.expect("a handshake");
    tokio::spawn(connection);
    *post.uri_mut() = "http://origin.test/".parse().expect("a URI");
    post.headers_mut().remove("host");
    assert_eq!(sender.send_request(post).await.expect("an answer").status(), StatusCode::OK);

    let records = origin.records();
    assert_eq!(records.len(), 2);
    assert_eq!(
        (records[0].protocol, records[0].status, &records[0].method),
        (Protocol::H1, 201, &Method::POST)
    );
    assert_eq!((records[1].protocol, records[1].status), (Protocol::H2, 200));
    assert_ne!(records[0].connection, records[1].connection);
    let stats = origin.stats();
    assert_eq!((stats.requests, stats.distinct_ids, stats.duplicates), (2, 1, 1));
    let (status, body) = get(origin.addr(), "/__origin/stats").await;
    assert_eq!((status, &json(&body)["duplicates"]), (StatusCode::OK, &1.into()));
    assert_eq!(json(&get(origin.addr(), "/__origin/ids").await.1)["run-1"], 2);
    assert_eq!(origin.ids()["run-1"], 2);
}

#[tokio::test]
async fn health_probes_and_the_oracle_are_not_counted_as_requests() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    for uri in ["/healthz", "/__origin/stats", "/__origin/fault"] {
        assert_eq!(get(origin.addr(), uri).await.0, StatusCode::OK, "{uri}");
    }
    assert_eq!(origin.stats().requests, 0);
}

#[tokio::test]
async fn bodies_come_whole_in_each_shape() {
    let origin = Origin::bind(OriginOptions::named("alpha")).await.expect("bound");
    let addr = origin.addr();
    assert_eq!(get(addr, "/bytes/100000").await.1.len(), 100_000);
    assert_eq!(get(addr, "/bytes/3").await.1, "abc");
    assert_eq!(get(addr, "/stream?chunks=3&ms=1").await.1, "chunk 1 of 3\nchunk 2 of 3\nchunk 3 of 3\n");
    assert_eq!(get(addr, "/sse?count=2&ms=1").await.1, "id: 1\ndata: alpha\n\nid: 2\ndata: alpha\n\n");
    assert_eq!(get(addr, "/status/204").await, (StatusCode::NO_CONTENT, Bytes::new()));

    let echo = send(addr, request(Method::PUT, "/echo", "hello")).await;
    assert_eq!(echo.headers()["x-method"], "PUT");
    assert_eq!(echo.into_body().collect().await.expect("a body").to_bytes(), "hello");

    let upload = send(addr, request(Method::POST, "/upload", "abc")).await;
    let upload = json(&upload.into_body().collect().await.expect("a body").to_bytes());
    assert_eq!(upload["length"], 3);
    // FIPS 180-2, appendix B.1.
    assert_eq!(upload["sha256"], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");

    let mut cookie = request(Method::GET, "/cookie", "");
    cookie.headers_mut().insert("cookie", "a=1; b=2".parse().expect("a value"));
    let cookie = send(addr, cookie).await;
    assert_eq!(cookie.headers().get_all("set-cookie").iter().count(), 2);
    assert_eq!(cookie.into_body().collect().await.expect("a body").to_bytes(), "a=1; b=2\n");

    let seen = json(&get(addr, "/headers").await.1);
    assert_eq!(seen["headers"][0], serde_json::json!(["host", "origin.test"]));
}

#[tokio::test]
async fn head_tells_the_length_that_get_would_have() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let answer = send(origin.addr(), request(Method::HEAD, "/bytes/77", "")).await;
    assert_eq!(answer.headers()["content-length"], "77");
    assert!(answer.into_body().collect().await.expect("no body").to_bytes().is_empty());
}

#[tokio::test]
async fn trailers_follow_the_message_over_http2() {
    let origin = Origin::bind(OriginOptions::named("alpha")).await.expect("bound");
    let io = TokioIo::new(tokio::net::TcpStream::connect(origin.addr()).await.expect("a connection"));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.expect("a handshake");
    tokio::spawn(connection);
    let mut trailers = request(Method::POST, "http://origin.test/trailers", "");
    trailers.headers_mut().remove("host");
    let answer = sender.send_request(trailers).await.expect("an answer");
    let body = answer.into_body().collect().await.expect("a body");
    assert_eq!(body.trailers().expect("trailers")["grpc-status"], "0");
    assert_eq!(&body.to_bytes()[..], b"\0\0\0\0\x05alpha");
}

#[tokio::test]
async fn a_websocket_echoes_and_hears_that_the_origin_stops() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let url = format!("ws://{}/ws", origin.addr());
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await.expect("a WebSocket");
    socket.send(Message::text("hello")).await.expect("sent");
    assert_eq!(socket.next().await.expect("a message").expect("sound"), Message::text("hello"));
    let stopping = tokio::spawn(origin.shutdown());
    let close = socket.next().await.expect("a message").expect("sound");
    let Message::Close(Some(close)) = close else { panic!("{close:?} is not a close with a reason") };
    assert_eq!(u16::from(close.code), 1001);
    while socket.next().await.is_some() {}
    stopping.await.expect("stopped");
}

#[tokio::test]
async fn faults_come_and_go_while_it_runs() {
    let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
    let addr = origin.addr();
    let change = |body: &'static str| async move {
        send(addr, request(Method::POST, "/__origin/fault", body)).await.status()
    };
    assert_eq!(change(r#"{"error_percent":100}"#).await, StatusCode::OK);
    assert_eq!(get(addr, "/").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(get(addr, "/healthz").await.0, StatusCode::OK, "errors do not make it unhealthy");
    assert_eq!(change(r#"{"error_percent":0,"healthy":false}"#).await, StatusCode::OK);
    assert_eq!(get(addr, "/").await.0, StatusCode::OK);
    assert_eq!(get(addr, "/healthz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    for bad in [r#"{"error_percent":101}"#, r#"{"helthy":true}"#, "no JSON"] {
        assert_eq!(change(bad).await, StatusCode::BAD_REQUEST, "{bad}");
    }
}

#[tokio::test]
async fn a_hanging_origin_records_and_answers_once_it_stops_hanging() {
    let fault = Fault { hang: true, ..Fault::default() };
    let origin = Origin::bind(OriginOptions { fault, ..OriginOptions::default() }).await.expect("bound");
    let waiting = tokio::spawn(get_owned(origin.addr()));
    while origin.stats().requests == 0 {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished());
    assert_eq!(origin.stats().in_flight, 1);
    origin.change_fault(FaultChange { hang: Some(false), ..FaultChange::default() });
    assert_eq!(waiting.await.expect("answered"), StatusCode::OK);
}

async fn get_owned(addr: SocketAddr) -> StatusCode {
    get(addr, "/").await.0
}

#[tokio::test]
async fn a_starting_origin_refuses_until_it_is_ready() {
    let options = OriginOptions { startup_ms: 200, ..OriginOptions::default() };
    let started = Instant::now();
    let origin = Origin::bind(options).await.expect("bound");
    assert_eq!(get(origin.addr(), "/").await.0, StatusCode::SERVICE_UNAVAILABLE);
    while get(origin.addr(), "/healthz").await.0 != StatusCode::OK {
        assert!(started.elapsed() < Duration::from_secs(5), "never ready");
        tokio::task::yield_now().await;
    }
    assert!(started.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_in_flight_and_a_drop_cuts_it() {
    for polite in [true, false] {
        let origin = Origin::bind(OriginOptions::default()).await.expect("bound");
        let addr = origin.addr();
        let io = TokioIo::new(tokio::net::TcpStream::connect(addr).await.expect("a connection"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(io).await.expect("a handshake");
        tokio::spawn(connection);
        let slow =
            tokio::spawn(async move { sender.send_request(request(Method::GET, "/slow?ms=300", "")).await });
        while origin.stats().in_flight == 0 {
            tokio::task::yield_now().await;
        }
        if polite {
            assert_eq!(origin.shutdown().await.in_flight, 0);
        } else {
            drop(origin);
        }
        assert_eq!(slow.await.expect("joined").is_ok(), polite);
        assert!(tokio::net::TcpStream::connect(addr).await.is_err(), "the listener is closed");
    }
}

#[test]
fn the_binary_honours_host_port_and_environment_and_ends_with_0_on_sigterm_after_the_request_in_flight() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let record = scratch.path().join("records");
    let mut child = Command::new(env!("CARGO_BIN_EXE_peregrine-bench"))
        .args(["origin", "--record"])
        .arg(&record)
        .envs([("HOST", "127.0.0.2"), ("PORT", "0"), ("ORIGIN_INSTANCE", "beta"), ("ORIGIN_HEALTHY", "0")])
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("a line");
    let addr: SocketAddr = line.trim().rsplit(' ').next().expect("an address").parse().expect("an address");
    assert_eq!(addr.ip().to_string(), "127.0.0.2");

    let exchange = |path: &str, id: &str| {
        let mut stream = TcpStream::connect(addr).expect("a connection");
        write!(stream, "GET {path} HTTP/1.1\r\nhost: o\r\nx-req-id: {id}\r\nconnection: close\r\n\r\n")
            .expect("sent");
        stream
    };
    let answer = |mut stream: TcpStream| {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    assert!(answer(exchange("/healthz", "probe")).starts_with("HTTP/1.1 503"), "born unhealthy");
    let slow = exchange("/slow?ms=300", "run-1");
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::fs::read_to_string(&record).map_or(0, |text| text.lines().count()) == 0 {
        assert!(Instant::now() < deadline, "the request was not recorded on arrival");
        std::thread::yield_now();
    }
    let terminated =
        Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill runs");
    assert!(terminated.success());
    let slow = answer(slow);
    assert!(slow.starts_with("HTTP/1.1 200") && slow.contains("x-instance: beta"), "{slow}");
    assert_eq!(child.wait().expect("ended").code(), Some(0));
    let records = read_records(&record).expect("whole lines");
    assert_eq!(records.iter().map(|record| &*record.id).collect::<Vec<_>>(), ["run-1"]);
}
