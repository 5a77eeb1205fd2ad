//! Connections of one request: how they begin and how they end.

use std::io::Read;
use std::time::{Duration, Instant};

use super::support::{Client, Origin, PATIENCE, TestEdge};

const LARGE_BYTES: usize = 300_000;

/// Answers by path: nothing, a little, a lot, in chunks, or up to the end of the connection.
fn origin() -> Origin {
    Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            match seen.line().split(' ').nth(1).expect("target") {
                "/none" => conn.write(b"HTTP/1.1 204 No Content\r\n\r\n"),
                "/large" => conn.answer(&"x".repeat(LARGE_BYTES)),
                "/chunks" => {
                    conn.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
                }
                "/to-the-end" => {
                    conn.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc");
                    return;
                }
                _ => conn.answer("ok"),
            }
        }
    })
}

#[test]
fn the_end_of_a_last_answer_waits_for_nothing() {
    let origin = origin();
    let edge = TestEdge::before(&origin);
    let started = Instant::now();
    let mut count = 0_u32;
    for _ in 0..12 {
        for (path, body_bytes) in
            [("/", 2), ("/none", 0), ("/large", LARGE_BYTES), ("/chunks", 3), ("/to-the-end", 3)]
        {
            let mut client = edge.client();
            client.send(format!("GET {path} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"));
            let answer = client.answer();
            assert_eq!(answer.body.len(), body_bytes, "{path}");
            assert!(client.is_closed(), "{path}");
            count += 1;
        }
    }
    // The end is kept back to go with the FIN. Did the socket stay open, the kernel would let it go after 200 ms.
    let mean = started.elapsed() / count;
    assert!(mean < Duration::from_millis(100), "{mean:?} for each connection");
}

#[test]
fn a_last_answer_that_comes_before_the_request_has_ended_waits_for_nothing() {
    let origin = Origin::scripted(|conn| {
        conn.head();
        conn.answer("no");
        while conn.more().is_some() {}
    });
    let edge = TestEdge::before(&origin);
    let started = Instant::now();
    for _ in 0..20 {
        let mut client = edge.client();
        client.send(
            "POST / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: 100000\r\n\r\nabc",
        );
        assert_eq!(client.answer().text(), "no");
    }
    let mean = started.elapsed() / 20;
    assert!(mean < Duration::from_millis(100), "{mean:?} for each connection");
}

#[test]
fn a_client_that_thinks_before_it_speaks_is_served() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    // Beyond the time for which the kernel keeps a connection back.
    let mut silent = edge.client();
    silent.socket.set_read_timeout(Some(Duration::from_millis(1_500))).expect("time-out");
    assert!(silent.socket.read(&mut [0]).is_err(), "nothing comes, and it is not closed");
    silent.socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
    assert_eq!(silent.get("/").status, 200);
}

#[test]
fn many_connections_at_once_and_again_are_each_served_to_their_end() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for _ in 0..3 {
        let mut clients: Vec<Client> = (0..400).map(|_| edge.client()).collect();
        for client in &mut clients {
            client.send("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n");
        }
        for client in &mut clients {
            assert_eq!(client.answer().text(), "ok");
            assert!(client.is_closed());
        }
    }
}
