//! What the edge makes of answers: compressed bodies, and pages of the operator's own.

use std::io::{Read, Write};
use std::sync::mpsc;

use peregrine_routing::{Coding, Compression, ErrorPage, Rules};

use super::rules::ruled;
use super::support::{Answer, Origin, PATIENCE, TestEdge, dead_address, h2c, service, upstream};

fn compressing() -> Rules {
    let types = vec!["text/*".into(), "application/json".into()];
    let compression = Compression { codings: Coding::ALL.to_vec(), types, min_bytes: 1_024 };
    Rules { compression: Some(compression), ..Rules::default() }
}

fn accepting(path: &str, codings: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a.test\r\nAccept-Encoding: {codings}\r\n\r\n")
}

fn decoded(answer: &Answer) -> Vec<u8> {
    let (body, mut out) = (&answer.body[..], Vec::new());
    match answer.field("content-encoding") {
        Some("zstd") => out = zstd::stream::decode_all(body).expect("zstd"),
        Some("br") => brotli::Decompressor::new(body, 4_096).read_to_end(&mut out).map(drop).expect("br"),
        Some("gzip") => flate2::read::GzDecoder::new(body).read_to_end(&mut out).map(drop).expect("gzip"),
        other => panic!("{other:?}"),
    }
    out
}

/// Text of about so many bytes, for which a path asks.
fn text(bytes: usize) -> String {
    (0..bytes / 10).map(|n| format!("line {:04}\n", n % 7_919)).collect()
}

/// `/BYTES` is answered with text of that length, `/BYTES/chunked` in chunks.
fn texts() -> Origin {
    Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            let path = seen.line().split(' ').nth(1).expect("a path").to_owned();
            let mut parts = path[1..].split('/');
            let text = text(parts.next().and_then(|bytes| bytes.parse().ok()).expect("a length"));
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nETag: \"v1\"\r\n";
            if parts.next().is_some() {
                conn.write(format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes());
                for piece in text.as_bytes().chunks(3_001) {
                    conn.write(format!("{:x}\r\n", piece.len()).as_bytes());
                    conn.write(piece);
                    conn.write(b"\r\n");
                }
                conn.write(b"0\r\n\r\n");
            } else {
                conn.write(format!("{head}Content-Length: {}\r\n\r\n{text}", text.len()).as_bytes());
            }
        }
    })
}

#[test]
fn answers_are_compressed_as_the_client_likes_it_and_say_the_same() {
    let origin = texts();
    let edge = TestEdge::start(ruled(&origin, compressing()));
    let mut client = edge.client();
    for path in ["/5000", "/5000/chunked", "/300000", "/300000/chunked", "/8000000"] {
        let expected = text(path[1..].split('/').next().and_then(|n| n.parse().ok()).expect("a length"));
        for (codings, coding) in
            [("gzip, br;q=0.9", "gzip"), ("br", "br"), ("gzip, deflate, br, zstd", "zstd")]
        {
            let answer = client.send(accepting(path, codings)).answer();
            assert_eq!(answer.field("content-encoding"), Some(coding), "{path}");
            assert_eq!((answer.field("content-length"), answer.field("etag")), (None, Some("W/\"v1\"")));
            assert_eq!(answer.field("vary"), Some("accept-encoding"));
            assert!(decoded(&answer) == expected.as_bytes(), "{path} {coding}");
            assert!(answer.body.len() < expected.len() / 3, "{path} {coding}: {}", answer.body.len());
        }
        let plain = client.get(path);
        assert_eq!((plain.field("content-encoding"), plain.field("etag")), (None, Some("\"v1\"")));
        assert_eq!(plain.field("vary"), Some("accept-encoding"), "a cache has to know");
        assert!(plain.text() == expected, "{path}");
    }
    assert_eq!(origin.connections(), 1, "the upstream's connection is used again");
    let small = client.send(accepting("/500", "gzip")).answer();
    assert_eq!((small.field("content-encoding"), small.field("content-length")), (None, Some("500")));
}

#[test]
fn a_client_of_http_1_0_gets_a_compressed_answer_that_ends_with_the_connection() {
    let edge = TestEdge::start(ruled(&texts(), compressing()));
    let mut client = edge.client();
    let answer = client.send("GET /5000 HTTP/1.0\r\nHost: a.test\r\nAccept-Encoding: gzip\r\n\r\n").answer();
    assert!(decoded(&answer) == text(5_000).as_bytes());
    assert!(client.is_closed());
}

#[test]
fn without_the_rule_nothing_is_compressed() {
    let edge = TestEdge::before(&texts());
    let answer = edge.client().send(accepting("/5000", "gzip")).answer();
    assert_eq!((answer.field("content-encoding"), answer.field("vary")), (None, None));
}

#[test]
fn an_answer_to_head_has_the_head_of_the_compressed_one() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/css\r\nContent-Length: 5000\r\n\r\n");
        }
    });
    let edge = TestEdge::start(ruled(&origin, compressing()));
    let mut client = edge.client();
    let answer = client.send(accepting("/", "br").replace("GET", "HEAD")).answer_to("HEAD");
    assert_eq!((answer.field("content-encoding"), answer.field("content-length")), (Some("br"), None));
    assert!(client.send(accepting("/", "br").replace("GET", "HEAD")).answer_to("HEAD").status == 200);
}

#[test]
fn what_an_origin_has_sent_reaches_the_client_before_it_sends_more() {
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let may_go_on = std::sync::Mutex::new(may_go_on);
    let origin = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n");
            conn.write(b"6\r\nfirst\n\r\n");
            may_go_on.lock().expect("lock").recv_timeout(PATIENCE).expect("the client has the first");
            conn.write(b"5\r\nlast\n\r\n0\r\n\r\n");
        }
    });
    let edge = TestEdge::start(ruled(&origin, compressing()));
    let mut client = edge.client();
    client.send(accepting("/", "gzip"));
    let head = client.head();
    assert!(head.contains("content-encoding: gzip"), "{head}");
    let mut decoder = flate2::write::GzDecoder::new(Vec::new());
    // Chunks of the edge's are taken apart by hand: there is no end yet.
    let mut whole = Vec::new();
    let mut read_until = |expected: &[u8]| {
        loop {
            while let Some(at) = super::support::find(&client.unread, b"\r\n") {
                let size = std::str::from_utf8(&client.unread[..at]).expect("a size");
                let size = usize::from_str_radix(size, 16).expect("a size in hex");
                if client.unread.len() < at + 2 + size + 2 {
                    break;
                }
                whole.extend_from_slice(&client.unread[at + 2..at + 2 + size]);
                decoder.write_all(&client.unread[at + 2..at + 2 + size]).expect("gzip");
                client.unread.drain(..at + 2 + size + 2);
                if size == 0 {
                    break;
                }
            }
            decoder.flush().expect("gzip");
            if decoder.get_ref() == expected {
                return;
            }
            assert!(client.more() > 0, "so far {:?}", decoder.get_ref());
        }
    };
    read_until(b"first\n");
    go_on.send(()).expect("the origin waits");
    read_until(b"first\nlast\n");
}

#[test]
fn an_answer_that_breaks_off_does_not_end_properly_when_it_is_compressed() {
    let origin = Origin::scripted(|conn| {
        if conn.request().is_some() {
            let half = "x".repeat(5_000);
            conn.write(
                format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10000\r\n\r\n{half}")
                    .as_bytes(),
            );
        }
    });
    let edge = TestEdge::start(ruled(&origin, compressing()));
    let mut client = edge.client();
    client.send(accepting("/", "gzip"));
    assert!(client.head().contains("content-encoding: gzip"));
    while client.more() > 0 {}
    assert!(!client.unread.ends_with(b"0\r\n\r\n"), "a client would take it for whole");
}

#[test]
fn trailers_come_after_the_last_of_a_compressed_body() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            let body = text(2_000);
            conn.write(
                format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTrailer: x-sum\r\nTransfer-Encoding: \
                     chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\nx-sum: 7\r\n\r\n",
                    body.len()
                )
                .as_bytes(),
            );
        }
    });
    let edge = TestEdge::start(ruled(&origin, compressing()));
    let request = accepting("/", "zstd").replace("\r\n\r\n", "\r\nTE: trailers\r\nConnection: TE\r\n\r\n");
    let answer = edge.client().send(request).answer();
    assert!(decoded(&answer) == text(2_000).as_bytes());
    assert_eq!(answer.trailers, "x-sum: 7\r\n");
}

#[test]
fn an_answer_of_an_http2_origin_is_compressed_too() {
    let addr = super::bodies::h2_origin(|_| async {
        let mut response = http::Response::new(super::bodies::full(Box::leak(text(50_000).into_boxed_str())));
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("text/html"));
        response
    });
    let mut web = service(vec![h2c(addr)]);
    web.policy.rules = Some(Box::new(compressing()));
    let edge = TestEdge::start(web);
    let answer = edge.client().send(accepting("/", "zstd")).answer();
    assert!(decoded(&answer) == text(50_000).as_bytes());
}

fn paged(service: &mut peregrine_routing::ServiceSpec) {
    let page = |status, html: &str| ErrorPage { status, html: html.into() };
    let error_pages =
        vec![page(5, "<h1>{status} {reason}</h1><p>{request_id}</p>"), page(403, "<h1>Not you</h1>")];
    service.policy.rules = Some(Box::new(Rules { error_pages, ..Rules::default() }));
}

const BROWSER: &str = "GET / HTTP/1.1\r\nHost: a.test\r\nAccept: text/html\r\nX-Request-Id: 7777-id\r\n\r\n";

#[test]
fn a_browser_gets_the_operators_page_for_what_the_edge_answers_itself_and_a_program_does_not() {
    let mut dead = service(vec![upstream(dead_address())]);
    paged(&mut dead);
    let edge = TestEdge::start(dead);
    let answer = edge.client().send(BROWSER).answer();
    let id = answer.field("x-request-id").expect("an id").to_owned();
    assert_eq!(answer.text(), format!("<h1>502 upstream_connect_failed</h1><p>{id}</p>"));
    assert_eq!((answer.status, answer.reason()), (502, "upstream_connect_failed"));
    assert_eq!(answer.field("content-type"), Some("text/html; charset=utf-8"));
    let program = edge.client().get("/");
    assert_eq!(program.field("content-type"), Some("application/problem+json"));
}

#[test]
fn a_status_without_a_page_and_an_origins_own_error_stay_as_they_are() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(b"HTTP/1.1 500 X\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\nown");
        }
    });
    let mut web = service(vec![upstream(origin.addr)]);
    paged(&mut web);
    let edge = TestEdge::start(web);
    assert_eq!(edge.client().send(BROWSER).answer().text(), "own");
    // A 400 has no page of the operator's.
    let broken = BROWSER
        .replace("Accept:", "Upgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 1\r\nAccept:");
    let answer = edge.client().send(broken).answer();
    assert_eq!(answer.status, 400);
    assert!(!answer.text().contains("<p>7777-id</p>") && !answer.text().contains("Not you"));
}
