//! Large answers of known length, which go from socket to socket inside the kernel, and slow clients.

use std::io::Read;
use std::time::Duration;

use super::support::{Client, Origin, TestEdge, service, until, upstream};

/// Bytes of which none is where another one could be.
fn pattern(length: usize) -> Vec<u8> {
    (0_u32..).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).take(length).collect()
}

/// Answers `GET /N` with N bytes, written in pieces of uneven sizes.
fn origin() -> Origin {
    Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            let length = seen.line()[5..].split(' ').next().and_then(|n| n.parse().ok()).expect("a length");
            conn.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes());
            let (body, mut sent) = (pattern(length), 0);
            for piece in [1, 700, 17_000, 65_536, 3, 150_001].iter().cycle() {
                let end = (sent + piece).min(length);
                conn.write(&body[sent..end]);
                sent = end;
                if sent == length {
                    break;
                }
            }
        }
    })
}

const LENGTHS: [usize; 9] = [65_535, 65_536, 65_537, 90_000, 262_143, 262_145, 524_288, 1_048_576, 5_000_001];

#[test]
fn large_answers_of_every_length_pass_byte_by_byte_on_one_connection() {
    let origin = origin();
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    for length in LENGTHS.iter().chain(&[10]).chain(&LENGTHS) {
        assert!(client.get(&format!("/{length}")).body == pattern(*length), "{length} bytes");
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn large_answers_to_many_at_once_are_not_mixed_up() {
    let origin = origin();
    let edge = TestEdge::before(&origin);
    std::thread::scope(|scope| {
        for first in 0..LENGTHS.len() {
            let mut client = edge.client();
            scope.spawn(move || {
                // All at once on this connection, so that answers stand one behind the other.
                for length in LENGTHS.iter().cycle().skip(first).take(5) {
                    client.send(format!("GET /{length} HTTP/1.1\r\nHost: a\r\n\r\n"));
                }
                for length in LENGTHS.iter().cycle().skip(first).take(5) {
                    assert!(client.answer().body == pattern(*length), "{length} bytes");
                }
            });
        }
    });
}

#[test]
fn a_large_answer_that_breaks_off_brings_what_there_was_and_no_more() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
        conn.write(&pattern(300_000));
    });
    let spec = upstream(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").head();
    while client.more() > 0 {}
    assert!(client.unread == pattern(300_000), "{} bytes came", client.unread.len());
    until("the lease is back", || edge.upstream(&spec).in_flight() == 0);
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_large_answer_takes_nothing_with_it() {
    let origin = origin();
    let spec = upstream(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    for _ in 0..50 {
        let mut client = edge.client();
        client.send("GET /5000001 HTTP/1.1\r\nHost: a\r\n\r\n").head();
    }
    until("the leases are back", || edge.upstream(&spec).in_flight() == 0);
    let mut client = edge.client();
    assert!(client.get("/1048576").body == pattern(1_048_576));
    assert_eq!(edge.upstream(&spec).outcomes().failed, 0);
}

/// A client with room for little.
fn narrow(edge: &TestEdge) -> Client {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.set_recv_buffer_size(8 * 1024).expect("a small buffer");
    socket.connect(&edge.addr.into()).expect("connects");
    Client { socket: socket.into(), unread: Vec::new() }
}

#[test]
fn a_client_that_reads_slowly_is_not_cut_off_while_bytes_flow() {
    let body = pattern(800_000);
    let origin = Origin::scripted(|conn| {
        let Some(seen) = conn.request() else { return };
        let body = pattern(800_000);
        if seen.line().contains("chunked") {
            conn.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            conn.write(format!("{:x}\r\n", body.len()).as_bytes());
            conn.write(&body);
            conn.write(b"\r\n0\r\n\r\n");
        } else {
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 800000\r\n\r\n");
            conn.write(&body);
        }
    });
    let mut web = service(vec![upstream(origin.addr)]);
    // A piece of the body takes longer than this.
    web.policy.body_idle_timeout_ms = 400;
    let edge = TestEdge::start(web);
    let read = |path: &str| {
        let mut client = narrow(&edge);
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
        let (mut came, mut chunk) = (Vec::new(), [0; 2 * 1024]);
        loop {
            // The pace of the client is what this is about.
            std::thread::park_timeout(Duration::from_millis(5));
            match client.socket.read(&mut chunk).expect("comes") {
                0 => break came,
                read => came.extend_from_slice(&chunk[..read]),
            }
        }
    };
    std::thread::scope(|scope| {
        let copied = scope.spawn(|| read("/chunked"));
        assert!(read("/length").ends_with(&body));
        assert!(copied.join().expect("is read").ends_with(b"\r\n0\r\n\r\n"));
    });
}
