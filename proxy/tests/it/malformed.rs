//! Malformed and dangerous requests: refused, closed, counted, and never seen by an origin.

use super::support::{Client, Origin, TestEdge, until};

/// Sends bytes, expects this answer, a close, and an origin that heard nothing.
fn refused(edge: &TestEdge, origin: &Origin, bytes: &[u8], status: u16, reason: &str) {
    let before = origin.seen().len();
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
    let mut client = edge.client();
    let answer = client.send_anyhow(bytes).answer();
    assert_eq!((answer.status, answer.reason()), (status, reason), "{shown}");
    assert!(answer.text().contains(reason), "{shown}: the page names the reason");
    assert!(client.is_closed(), "{shown}: the connection is closed");
    assert_eq!(origin.seen().len(), before, "{shown}: reached the origin");
}

#[test]
fn a_request_that_two_parsers_may_read_in_two_ways_is_refused() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let te = "Transfer-Encoding: chunked\r\n";
    for (fields, body, reason) in [
        (format!("{te}Content-Length: 5\r\n"), "0\r\n\r\n", "conflicting_length"),
        (format!("Content-Length: 5\r\n{te}"), "0\r\n\r\n", "conflicting_length"),
        (format!("cOnTeNt-LeNgTh: 5\r\nX: y\r\n{te}"), "0\r\n\r\n", "conflicting_length"),
        ("Content-Length: 5\r\nContent-Length: 6\r\n".into(), "hello!", "bad_request_head"),
        ("Content-Length: 5, 6\r\n".into(), "hello!", "bad_request_head"),
        ("Content-Length: +5\r\n".into(), "hello", "bad_request_head"),
        ("Content-Length: -1\r\n".into(), "", "bad_request_head"),
        ("Content-Length: 0x5\r\n".into(), "hello", "bad_request_head"),
        ("Content-Length: 99999999999999999999999\r\n".into(), "", "bad_request_head"),
        ("Transfer-Encoding: gzip, chunked\r\n".into(), "0\r\n\r\n", "bad_transfer_encoding"),
        ("Transfer-Encoding: chunked, chunked\r\n".into(), "0\r\n\r\n", "bad_transfer_encoding"),
        (format!("{te}{te}"), "0\r\n\r\n", "bad_transfer_encoding"),
        ("Transfer-Encoding: identity\r\n".into(), "", "bad_request_head"),
        ("Transfer-Encoding: xchunked\r\n".into(), "", "bad_request_head"),
        ("Transfer-Encoding : chunked\r\n".into(), "0\r\n\r\n", "bad_request_head"),
        ("X: a\r\n b\r\n".into(), "", "bad_request_head"),
        ("X: a\0b\r\n".into(), "", "bad_request_head"),
        ("X\0: ab\r\n".into(), "", "bad_request_head"),
        (": ab\r\n".into(), "", "bad_request_head"),
        ("no colon\r\n".into(), "", "bad_request_head"),
        ("X: a\rb\r\n".into(), "", "bad_request_head"),
        ("X: a\n".into(), "", "bad_request_head"),
        ("X: a\nY: b\r\n".into(), "", "bad_request_head"),
        ("X: a\r\r\n".into(), "", "bad_request_head"),
        ("X: a\x01b\r\n".into(), "", "bad_request_head"),
        ("X: a\x7fb\r\n".into(), "", "bad_request_head"),
        ("X\t: a\r\n".into(), "", "bad_request_head"),
        ("X : a\r\n".into(), "", "bad_request_head"),
        (" X: a\r\n".into(), "", "bad_request_head"),
        ("\tX: a\r\n".into(), "", "bad_request_head"),
        ("X(y): a\r\n".into(), "", "bad_request_head"),
        ("Xé: a\r\n".into(), "", "bad_request_head"),
        ("\x0bContent-Length: 5\r\n".into(), "hello", "bad_request_head"),
        ("Content-Length: \x0b5\r\n".into(), "hello", "bad_request_head"),
        ("Content-Length: 5 5\r\n".into(), "hello", "bad_request_head"),
        ("Content-Length: 5;x\r\n".into(), "hello", "bad_request_head"),
        ("Content-Length: \r\n".into(), "", "bad_request_head"),
        ("Content-Length: 5_0\r\n".into(), "", "bad_request_head"),
        ("Transfer-Encoding:\r\n".into(), "", "bad_request_head"),
        ("Transfer-Encoding: chunked;q=1\r\n".into(), "0\r\n\r\n", "bad_request_head"),
        ("Transfer-Encoding: \"chunked\"\r\n".into(), "0\r\n\r\n", "bad_request_head"),
        ("Transfer-Encoding: chunked,\r\n".into(), "0\r\n\r\n", "bad_request_head"),
        ("Transfer-Encoding: ,chunked\r\n".into(), "0\r\n\r\n", "bad_transfer_encoding"),
        ("Transfer-Encoding: \x0bchunked\r\n".into(), "0\r\n\r\n", "bad_request_head"),
    ] {
        let request = format!("POST / HTTP/1.1\r\nHost: a.test\r\n{fields}\r\n{body}");
        refused(&edge, &origin, request.as_bytes(), 400, reason);
    }
}

#[test]
fn a_malformed_request_is_refused_also_behind_a_good_one() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let good = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    for bad in [
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nX: a\0\r\n\r\n",
    ] {
        let before = origin.seen().len();
        let mut client = edge.client();
        client.send(format!("{good}{good}{bad}"));
        assert_eq!(client.answer().status, 200);
        assert_eq!(client.answer().status, 200);
        assert_eq!(client.answer().status, 400, "{bad}");
        assert!(client.is_closed());
        assert_eq!(origin.seen().len(), before + 2);
    }
}

#[test]
fn a_request_line_that_is_none_is_refused() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for (line, status, reason) in [
        ("GET /", 400, "bad_request_head"),
        ("GET / HTTP/1.2", 400, "bad_request_head"),
        ("GET / HTTP/3.0", 400, "bad_request_head"),
        ("GET  / HTTP/1.1", 400, "bad_request_head"),
        ("GE T / HTTP/1.1", 400, "bad_request_head"),
        ("GET /a b HTTP/1.1", 400, "bad_request_head"),
        ("GET\t/ HTTP/1.1", 400, "bad_request_head"),
        ("GET /\tHTTP/1.1", 400, "bad_request_head"),
        (" GET / HTTP/1.1", 400, "bad_request_head"),
        ("GET / HTTP/1.1 ", 400, "bad_request_head"),
        ("GET / HTTP/1.1\t", 400, "bad_request_head"),
        ("GET / http/1.1", 400, "bad_request_head"),
        ("GET / HTTP/1.10", 400, "bad_request_head"),
        ("GET / HTTP/01.1", 400, "bad_request_head"),
        ("GET / HTTP/ 1.1", 400, "bad_request_head"),
        ("GET / HTTP/2.0", 400, "bad_request_head"),
        ("G{T / HTTP/1.1", 400, "bad_request_head"),
        ("GÉT / HTTP/1.1", 400, "bad_request_head"),
        ("GET:/ HTTP/1.1", 400, "bad_request_head"),
        ("GET /a\0b HTTP/1.1", 400, "bad_request_head"),
        ("GET /a<b HTTP/1.1", 400, "bad_request_head"),
        ("GET a HTTP/1.1", 400, "bad_target"),
        ("GET /a#b HTTP/1.1", 400, "bad_target"),
        ("GET http:///a HTTP/1.1", 400, "bad_request_head"),
        ("GET http://a.test:x/ HTTP/1.1", 400, "bad_host"),
        ("GET ?a HTTP/1.1", 400, "bad_request_head"),
        ("GET * HTTP/1.1", 400, "bad_target"),
        ("GET ftp://a.test/ HTTP/1.1", 400, "bad_target"),
        ("TRACE / HTTP/1.1", 405, "method_not_allowed"),
        ("CONNECT a.test:443 HTTP/1.1", 501, "connect_not_supported"),
    ] {
        refused(&edge, &origin, format!("{line}\r\nHost: a.test\r\n\r\n").as_bytes(), status, reason);
    }
}

#[test]
fn a_host_that_is_missing_doubled_or_rubbish_is_refused() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for hosts in
        ["", "Host: a\r\nHost: a\r\n", "Host: a b\r\n", "Host: \r\n", "Host: u@a\r\n", "Host: a/b\r\n"]
    {
        refused(&edge, &origin, format!("GET / HTTP/1.1\r\n{hosts}\r\n").as_bytes(), 400, "bad_host");
    }
}

#[test]
fn a_head_that_is_too_large_is_refused_with_the_right_status() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let large = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(40_000));
    refused(&edge, &origin, large.as_bytes(), 431, "head_too_large");
    let huge = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(2_000_000));
    refused(&edge, &origin, huge.as_bytes(), 431, "head_too_large");
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(101));
    refused(&edge, &origin, many.as_bytes(), 431, "head_too_large");
}

#[test]
fn a_bad_chunk_is_the_clients_fault() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunk in [
        "xyz\r\n",
        "-1\r\n",
        "0x5\r\nhello\r\n",
        "5 5\r\nhello\r\n",
        "\r\n",
        "fffffffffffffffff\r\n",
        "5\nhello\r\n",
        "5 \r\nhello\r\n",
        "5\t;a\r\nhello\r\n",
        "5;a\nhello\r\n",
        "5\rhello\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhelloo\r\n0\r\n\r\n",
        "5\r\nhell\r\n0\r\n\r\n",
        "0\r\nX: a\n\r\n",
        "0\r\n\n",
        "0\r\nX : a\r\n\r\n",
        "0\r\n X: a\r\n\r\n",
        "0\r\nX\r\n\r\n",
        "0;\0\r\n\r\n",
    ] {
        refused(&edge, &origin, format!("{head}{chunk}").as_bytes(), 400, "bad_request_body");
    }
}

#[test]
fn chunks_are_refused_in_a_version_that_has_none() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let request = "POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    refused(&edge, &origin, request.as_bytes(), 400, "bad_request_head");
}

#[test]
fn extensions_and_trailers_have_limits() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long = format!("{head}5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1025));
    refused(&edge, &origin, long.as_bytes(), 400, "bad_request_body");
    let fits = format!("{head}5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1024));
    assert_eq!(edge.client().send(&fits).answer().status, 200);
    assert_eq!((origin.last().body.as_slice(), origin.last().head.contains("xxx")), (&b"hello"[..], false));
    for endless in [
        "1;x\r\na\r\n".repeat(20_000),
        format!("0\r\n{}", "T: v\r\n".repeat(20_000)),
        format!("0\r\nT: {}", "v".repeat(100_000)),
    ] {
        let before = origin.seen().len();
        let mut client = edge.client();
        let answer = client.send_anyhow(format!("{head}{endless}")).answer();
        assert_eq!((answer.status, answer.reason()), (400, "bad_request_body"), "{}", &endless[..20]);
        assert_eq!(origin.seen().len(), before);
    }
}

#[test]
fn a_chunk_that_breaks_off_the_grammar_later_is_refused_too() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    for later in ["5 \r\nhello\r\n0\r\n\r\n", "5;a\nhello\r\n0\r\n\r\n", "0\r\nX: a\n\r\n"] {
        let (before, mut client) = (origin.seen().len(), edge.client());
        client.send(head);
        until("the request is on its way", || origin.connections() > 0);
        let answer = client.send(later).answer();
        assert_eq!((answer.status, answer.reason()), (400, "bad_request_body"), "{later:?}");
        assert!(client.is_closed());
        assert_eq!(origin.seen().len(), before, "no whole request has come");
    }
}

#[test]
fn a_field_that_frames_the_message_cannot_be_nominated_away() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for option in ["content-length", "Content-Length, close", "keep-alive, content-length, host"] {
        let smuggled = "GET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n";
        let length = smuggled.len();
        let request = format!(
            "POST /outer HTTP/1.1\r\nHost: a.test\r\nConnection: {option}\r\nContent-Length: {length}\r\n\r\n{smuggled}"
        );
        assert_eq!(edge.client().send(request).answer().status, 200);
        let seen = origin.last();
        assert_eq!(
            (seen.line(), seen.body.as_slice()),
            ("POST /outer HTTP/1.1", smuggled.as_bytes()),
            "{option}"
        );
        assert_eq!(seen.all("host"), ["a.test"]);
    }
}

#[test]
fn clients_that_break_their_bodies_do_not_eject_an_upstream() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.answer("ok");
        }
    });
    let spec = super::support::upstream(origin.addr);
    let edge = TestEdge::start(super::support::service(vec![spec.clone()]));
    let upstream = edge.upstream(&spec);
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    for _ in 0..10 {
        let mut client = edge.client();
        client.send(format!("{head}5\r\nhello\r\n"));
        until("the request is on its way", || upstream.in_flight() == 1);
        let answer = client.send("rubbish\r\n").answer();
        assert_eq!((answer.status, answer.reason()), (400, "bad_request_body"));
        assert!(client.is_closed());
    }
    for _ in 0..10 {
        let mut client = edge.client();
        client.send(format!("{head}5\r\nhello\r\n"));
        until("the request is on its way", || upstream.in_flight() == 1);
        drop(client);
        until("the request has ended", || upstream.in_flight() == 0);
    }
    let counts = upstream.outcomes();
    assert_eq!((counts.failed, counts.client_gone), (0, 20));
    assert_eq!(upstream.ejected_until_ms(), 0);
    assert_eq!(edge.client().get("/").status, 200);
}

#[test]
fn an_upgrade_with_a_body_is_refused() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for framing in ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"] {
        let request =
            format!("POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n{framing}");
        refused(&edge, &origin, request.as_bytes(), 400, "upgrade_with_body");
    }
}

#[test]
fn a_bad_preface_of_http2_is_refused_and_not_swallowed() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for bytes in [
        "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
        "PRI * HTTP/2.0\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n",
    ] {
        let mut client = edge.client();
        assert_eq!(client.send_anyhow(bytes).answer().status, 400, "{bytes}");
        assert!(client.is_closed());
    }
    assert!(origin.seen().is_empty());
}

#[test]
fn an_unknown_expectation_is_refused() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let request = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 200-maybe\r\nContent-Length: 1\r\n\r\nx";
    refused(&edge, &origin, request.as_bytes(), 417, "expectation_failed");
}

#[test]
fn a_request_cut_into_single_bytes_is_served() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let mut client: Client = edge.client();
    for byte in
        b"POST /slow HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    {
        client.send([*byte]);
    }
    assert_eq!(client.answer().status, 200);
    assert_eq!(origin.last().body, b"hi");
}
