//! Floods of HTTP/2 frames, written byte by byte: each ends its own connection, or is bounded, and meanwhile another
//! client is served.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use peregrine_proxy::{Config, Limits};

use super::support::{Origin, PATIENCE, TestEdge, config, service, until, upstream};

const FRAMES: u32 = 20_000;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// `:method GET`, `:scheme http`, `:path /`, `:authority a.test` (RFC 7541 §6).
const GET: &[u8] = b"\x82\x86\x84\x41\x06a.test";
const POST: &[u8] = b"\x83\x86\x84\x41\x06a.test";

const DATA: u8 = 0x0;
const HEADERS: u8 = 0x1;
const PRIORITY: u8 = 0x2;
const RST_STREAM: u8 = 0x3;
const SETTINGS: u8 = 0x4;
const PUSH_PROMISE: u8 = 0x5;
const PING: u8 = 0x6;
const WINDOW_UPDATE: u8 = 0x8;
const CONTINUATION: u8 = 0x9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, high, mid, low] = (payload.len() as u32).to_be_bytes();
    [&[high, mid, low, kind, flags][..], &stream.to_be_bytes(), payload].concat()
}

/// Streams of a client are odd.
const fn stream(n: u32) -> u32 {
    2 * n + 1
}

/// A block with a field that fills the dynamic table, and then thousands of references to it.
fn bomb(n: u32) -> Vec<u8> {
    let mut block = GET.to_vec();
    if n == 0 {
        // Literal with incremental indexing, a name of one byte and a value of 3,900.
        block.extend([0x40, 1, b'x', 0x7f, 0xbd, 0x1d]);
        block.extend(vec![b'v'; 3_900]);
    } else {
        block.extend(vec![0xbe; 4_000]);
    }
    frame(HEADERS, END_HEADERS | END_STREAM, stream(n), &block)
}

/// One kind of flood: what opens it, and the frames of it by number.
struct Kind {
    name: &'static str,
    opening: Vec<u8>,
    nth: fn(u32) -> Vec<u8>,
}

fn kinds() -> Vec<Kind> {
    let post = frame(HEADERS, END_HEADERS, 1, POST);
    let endless = frame(HEADERS, 0, 1, GET);
    let kind = |name, opening: &[u8], nth| Kind { name, opening: opening.to_vec(), nth };
    vec![
        kind("PING", b"", |n| frame(PING, 0, 0, &u64::from(n).to_be_bytes())),
        kind("acknowledged PING", b"", |n| frame(PING, 1, 0, &u64::from(n).to_be_bytes())),
        kind("SETTINGS", b"", |n| {
            frame(SETTINGS, 0, 0, &[&[0, 4][..], &(65_535 + n % 2).to_be_bytes()].concat())
        }),
        kind("empty SETTINGS", b"", |_| frame(SETTINGS, 0, 0, b"")),
        kind("PRIORITY", b"", |n| frame(PRIORITY, 0, stream(n), &[0, 0, 0, 0, 7])),
        kind("WINDOW_UPDATE of the connection", b"", |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        kind("WINDOW_UPDATE of a stream", &post, |_| frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1])),
        kind("empty DATA", &post, |_| frame(DATA, 0, 1, b"")),
        kind("unknown type", b"", |_| frame(0xbb, 0, 0, b"x")),
        kind("PRIORITY_UPDATE", b"", |_| frame(0x10, 0, 0, b"\0\0\0\x01u=1")),
        kind("empty CONTINUATION", &endless, |_| frame(CONTINUATION, 0, 1, b"")),
        kind("CONTINUATION", &endless, |_| frame(CONTINUATION, 0, 1, b"\x40\x01x\x01y")),
        kind("rapid reset", b"", |n| {
            [
                frame(HEADERS, END_HEADERS | END_STREAM, stream(n), GET),
                frame(RST_STREAM, 0, stream(n), &[0, 0, 0, 8]),
            ]
            .concat()
        }),
        kind(
            "RST_STREAM of a closed stream",
            &[post.clone(), frame(RST_STREAM, 0, 1, &[0; 4])].concat(),
            |_| frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
        ),
        kind("made you reset by a window of 0", b"", |n| {
            [
                frame(HEADERS, END_HEADERS | END_STREAM, stream(n), GET),
                frame(WINDOW_UPDATE, 0, stream(n), &[0; 4]),
            ]
            .concat()
        }),
        kind("made you reset by DATA behind the end", b"", |n| {
            [frame(HEADERS, END_HEADERS | END_STREAM, stream(n), GET), frame(DATA, 0, stream(n), b"x")]
                .concat()
        }),
        kind("PUSH_PROMISE", b"", |n| {
            frame(PUSH_PROMISE, END_HEADERS, 1, &[&stream(n).to_be_bytes()[..], GET].concat())
        }),
        kind("HEADERS without their end", b"", |n| frame(HEADERS, 0, stream(n), b"")),
    ]
}

/// Reads until the edge closes.
fn read_to_end(mut socket: TcpStream) -> std::thread::JoinHandle<usize> {
    std::thread::spawn(move || {
        let (mut sink, mut total) = (vec![0; 64 * 1024], 0);
        while let Ok(read @ 1..) = socket.read(&mut sink) {
            total += read;
        }
        total
    })
}

fn connect(edge: &TestEdge) -> TcpStream {
    let socket = TcpStream::connect(edge.addr).expect("connects");
    socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
    socket.set_write_timeout(Some(PATIENCE)).expect("time-out");
    socket
}

#[test]
fn every_kind_of_flood_is_ended_and_another_client_is_served_meanwhile() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for Kind { name, opening, nth } in kinds() {
        let mut socket = connect(&edge);
        let reader = read_to_end(socket.try_clone().expect("clones"));
        socket.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, b""), &opening].concat()).expect("is sent");
        let mut other = edge.client();
        let (mut ended, mut batch) = (false, Vec::new());
        for n in 0..FRAMES {
            batch.extend(nth(n));
            if batch.len() > 8 * 1024 || n + 1 == FRAMES {
                ended = socket.write_all(&batch).is_err();
                batch.clear();
            }
            if n == FRAMES / 2 || ended {
                assert_eq!(other.get("/").status, 200, "{name}");
            }
            if ended {
                break;
            }
        }
        // A small flood fits into the buffers on the way: the end shows behind it.
        let started = Instant::now();
        while !ended {
            assert!(started.elapsed() < PATIENCE, "{name}: the connection goes on");
            ended = socket.write_all(&nth(FRAMES)).is_err() || reader.is_finished();
        }
        reader.join().expect("reads");
        assert_eq!(edge.client().get("/").status, 200, "{name}");
    }
    assert!(origin.seen().len() < 2_000, "{} requests came through", origin.seen().len());
}

#[test]
fn a_bomb_of_references_is_refused_stream_by_stream_and_costs_no_memory() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let mut socket = connect(&edge);
    let reader = read_to_end(socket.try_clone().expect("clones"));
    socket.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, b"")].concat()).expect("is sent");
    let before = resident_bytes();
    for n in 0..2_000 {
        if socket.write_all(&bomb(n)).is_err() {
            break;
        }
    }
    assert_eq!(edge.client().get("/").status, 200);
    // 2,000 heads of 15 MB each would be 30 GB.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 256 << 20, "{grown} bytes");
    drop(socket.shutdown(std::net::Shutdown::Both));
    reader.join().expect("reads");
    assert!(origin.seen().len() <= 2, "only what fits goes on");
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("is told");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("has the line");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

#[test]
fn a_client_that_opens_no_window_is_let_go_with_all_that_it_asked_for() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.answer(&"x".repeat(100_000));
        }
    });
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.body_idle_timeout_ms = 500;
    let edge = TestEdge::start_with(config(), vec![web]);
    let mut socket = connect(&edge);
    let reader = read_to_end(socket.try_clone().expect("clones"));
    // SETTINGS_INITIAL_WINDOW_SIZE of 0.
    let mut bytes = [PREFACE, &frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0])].concat();
    for n in 0..100 {
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream(n), GET));
    }
    socket.write_all(&bytes).expect("is sent");
    until("the requests are under way", || origin.seen().len() == 100);
    assert_eq!(edge.client().get("/").status, 200, "another client is served");
    until("nothing is held for it", || edge.upstream(&spec).in_flight() == 0);
    assert!(reader.join().expect("reads") < 100_000);
}

#[test]
fn a_client_that_keeps_its_connection_alive_is_left_alone() {
    let origin = Origin::ok();
    let limits = Limits { http2_max_glitches: 100, ..Limits::default() };
    let edge =
        TestEdge::start_with(Config { limits, ..config() }, vec![service(vec![upstream(origin.addr)])]);
    let mut socket = connect(&edge);
    let mut bytes = [PREFACE, &frame(SETTINGS, 0, 0, b"")].concat();
    // Each request with two pings, an update of a window and a priority: in proportion.
    for n in 0..500 {
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream(n), GET));
        bytes.extend(frame(PRIORITY, 0, stream(n), &[0, 0, 0, 0, 7]));
        bytes.extend(frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 100]));
        bytes.extend(frame(PING, 0, 0, &[0; 8]));
        socket.write_all(&bytes).expect("goes on");
        bytes.clear();
        // The answer's last frame has END_STREAM: wait for it before the next.
        let mut answer = Vec::new();
        while !has_end_of_stream(&answer) {
            let mut piece = [0; 4096];
            let read = socket.read(&mut piece).expect("is answered");
            assert!(read > 0, "closed at request {n}");
            answer.extend_from_slice(&piece[..read]);
        }
    }
    assert_eq!(origin.seen().len(), 500);
}

fn has_end_of_stream(mut bytes: &[u8]) -> bool {
    while let [high, mid, low, kind, flags, _, _, _, _, rest @ ..] = bytes {
        let length = u32::from_be_bytes([0, *high, *mid, *low]) as usize;
        if *kind <= HEADERS && flags & END_STREAM != 0 && rest.len() >= length {
            return true;
        }
        bytes = rest.get(length..).unwrap_or_default();
    }
    false
}
