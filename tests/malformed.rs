//! What is not HTTP, or two things at once, is answered at the edge and never reaches an origin.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use peregrine_bench::origin::{Origin, OriginOptions};

use crate::support::server::Peregrine;

/// A request, and the statuses of which one has to be the answer.
type Case = (&'static str, Vec<u8>, &'static [u16]);

fn cases() -> Vec<Case> {
    let get = "GET / HTTP/1.1\r\nhost: shop.test\r\n";
    let post = "POST / HTTP/1.1\r\nhost: shop.test\r\n";
    let text = |s: String| s.into_bytes();
    vec![
        (
            "content-length and transfer-encoding",
            text(format!("{post}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
            &[400],
        ),
        (
            "two different content-lengths",
            text(format!("{post}content-length: 5\r\ncontent-length: 6\r\n\r\nhello")),
            &[400],
        ),
        ("a content-length with a sign", text(format!("{post}content-length: +5\r\n\r\nhello")), &[400]),
        (
            "a content-length that is no number",
            text(format!("{post}content-length: five\r\n\r\nhello")),
            &[400],
        ),
        (
            "a transfer-encoding other than chunked",
            text(format!("{post}transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n")),
            &[400, 501],
        ),
        (
            "chunked twice",
            text(format!("{post}transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
            &[400, 501],
        ),
        (
            "a transfer-encoding that only looks like chunked",
            text(format!("{post}transfer-encoding: xchunked\r\n\r\n0\r\n\r\n")),
            &[400, 501],
        ),
        ("an obsolete fold", text(format!("{get}x-folded: a\r\n b\r\n\r\n")), &[400]),
        ("a NUL in a value", text(format!("{get}x-nul: a\0b\r\n\r\n")), &[400]),
        ("a space before the colon", text(format!("{get}x-space : a\r\n\r\n")), &[400]),
        ("a bare carriage return", text(format!("{get}x-cr: a\rb\r\n\r\n")), &[400]),
        ("no host", text("GET / HTTP/1.1\r\n\r\n".to_owned()), &[400]),
        ("two hosts", text(format!("{get}host: other.test\r\n\r\n")), &[400]),
        ("a host that is none", text("GET / HTTP/1.1\r\nhost: a b\r\n\r\n".to_owned()), &[400]),
        (
            "a host with user information",
            text("GET / HTTP/1.1\r\nhost: user@shop.test\r\n\r\n".to_owned()),
            &[400],
        ),
        ("huge headers", text(format!("{get}x-huge: {}\r\n\r\n", "a".repeat(200_000))), &[431]),
        ("too many headers", text(format!("{get}{}\r\n", "x-many: a\r\n".repeat(2_000))), &[431]),
        (
            "an upgrade with a body",
            text(format!(
                "{post}connection: upgrade\r\nupgrade: websocket\r\ncontent-length: 5\r\n\r\nhello"
            )),
            &[400],
        ),
        ("an unknown version", text("GET / HTTP/3.7\r\nhost: shop.test\r\n\r\n".to_owned()), &[400, 505]),
        ("no method", text(" / HTTP/1.1\r\nhost: shop.test\r\n\r\n".to_owned()), &[400]),
        (
            "connect",
            text("CONNECT shop.test:443 HTTP/1.1\r\nhost: shop.test:443\r\n\r\n".to_owned()),
            &[400, 405, 501],
        ),
        ("rubbish", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not http at all\r\n\r\n".to_vec(), &[400]),
    ]
}

#[test]
fn malformed_requests_are_answered_and_closed_and_never_reach_the_origin() {
    let (runtime, origin, server) = edge_before_an_origin();
    for (what, request, statuses) in cases() {
        let mut stream = connect(&server);
        // A refusal may come, with the end of the connection, before everything is written.
        let _early_end = stream.write_all(&request);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        let status: Option<u16> = text.split(' ').nth(1).and_then(|status| status.parse().ok());
        assert!(status.is_some_and(|status| statuses.contains(&status)), "{what}: {text:?}");
        assert!(ended.is_ok() || !answer.is_empty(), "{what}: the connection has to end: {ended:?}");
    }
    assert_eq!(origin.stats().requests, 0, "none of them may reach the origin: {:?}", origin.stats());
    runtime.block_on(origin.shutdown());
}

#[test]
fn a_bad_chunk_is_the_clients_fault_and_never_the_origins() {
    let (runtime, origin, server) = edge_before_an_origin();
    for chunk in [
        "zz\r\nhello\r\n0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "fffffffffffffffff\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
    ] {
        for _ in 0..10 {
            let mut stream = connect(&server);
            let head = "POST /upload HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\n";
            let _early_end = stream.write_all(format!("{head}{chunk}").as_bytes());
            let mut answer = Vec::new();
            let _ended = stream.read_to_end(&mut answer);
            let text = String::from_utf8_lossy(&answer);
            assert!(text.is_empty() || text.starts_with("HTTP/1.1 400"), "{chunk:?}: {text:?}");
        }
    }
    // Forty bad clients later the origin is as trusted as before.
    let answer = crate::support::server::http_get(server.edge(), "/").expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    runtime.block_on(origin.shutdown());
}

fn edge_before_an_origin() -> (tokio::runtime::Runtime, Origin, Peregrine) {
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = threads.worker_threads(1).enable_all().build().expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::named("origin"))).expect("an origin");
    let server =
        Peregrine::start(&format!("[service.web]\nhosts = [\"*\"]\nupstreams = [\"{}\"]\n", origin.addr()));
    (runtime, origin, server)
}

fn connect(server: &Peregrine) -> TcpStream {
    let stream = TcpStream::connect(server.edge()).expect("the edge accepts");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    stream
}
