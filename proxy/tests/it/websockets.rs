//! WebSockets when their upstream leaves: closed at the end of a frame, in both directions, by the edge.

use std::io::Read;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use peregrine_proxy::now_ms;
use peregrine_routing::{HoldSpec, ServiceSpec, TrafficClass, Upstream};

use super::support::{Client, Origin, PATIENCE, TestEdge, service, until, upstream};

const ASK: &str = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    X-Request-Id: socket\r\n\r\n";
const SWITCH: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
const KEY: [u8; 4] = [0x5a, 0x01, 0xff, 0x77];

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const FIN: u8 = 0x80;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

/// A frame as its sender writes it: a client masks, a server does not.
fn frame(first: u8, payload: &[u8], masked: bool) -> Vec<u8> {
    let mask = if masked { 0x80 } else { 0 };
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..126 => bytes.push(mask | u8::try_from(length).expect("short")),
        length @ 126..65_536 => {
            bytes.push(mask | 126);
            bytes.extend(u16::try_from(length).expect("fits").to_be_bytes());
        }
        length => {
            bytes.push(mask | 127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    if masked {
        bytes.extend(KEY);
        bytes.extend(payload.iter().zip(KEY.iter().cycle()).map(|(byte, key)| byte ^ key));
    } else {
        bytes.extend(payload);
    }
    bytes
}

/// The first whole frame of `bytes`: its first byte, its payload without mask, whether it had one, its length.
fn take_frame(bytes: &[u8]) -> Option<(u8, Vec<u8>, bool, usize)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    let (length, mut at) = match second & 0x7f {
        126 => (usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
        127 => (usize::try_from(u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?)).ok()?, 10),
        short => (usize::from(short), 2),
    };
    let masked = second & 0x80 != 0;
    let mut key = [0; 4];
    if masked {
        key.copy_from_slice(bytes.get(at..at + 4)?);
        at += 4;
    }
    let payload = bytes.get(at..at + length)?.iter().zip(key.iter().cycle()).map(|(b, k)| b ^ k).collect();
    Some((first, payload, masked, at + length))
}

fn restart() -> Vec<u8> {
    1012_u16.to_be_bytes().to_vec()
}

/// Both ends of one tunnel, in the hands of the test.
struct Ends {
    edge: TestEdge,
    inside: Arc<Upstream>,
    client: Client,
    /// What the origin is to write, byte for byte.
    origin: Sender<Vec<u8>>,
    /// What has come to the origin, byte for byte.
    at_origin: Arc<Mutex<Vec<u8>>>,
    close_spread_ms: u32,
}

/// Without a copy.
fn nobody(close_spread_ms: u32) -> ServiceSpec {
    let mut web = service(Vec::new());
    web.policy.websocket_close_spread_ms = close_spread_ms;
    web
}

impl Ends {
    fn open(close_spread_ms: u32) -> Self {
        let (write, script): (_, Receiver<Vec<u8>>) = channel();
        let script = Mutex::new(script);
        let at_origin: Arc<Mutex<Vec<u8>>> = Arc::default();
        let seen = Arc::clone(&at_origin);
        let origin = Origin::scripted(move |conn| {
            let Some(_) = conn.request() else { return };
            conn.write(SWITCH);
            let mut reader = conn.socket.try_clone().expect("another handle");
            let seen = Arc::clone(&seen);
            let reading = std::thread::spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(read @ 1..) = reader.read(&mut chunk) {
                    seen.lock().expect("lock").extend_from_slice(&chunk[..read]);
                }
            });
            while let Ok(bytes) = script.lock().expect("lock").recv() {
                conn.write(&bytes);
            }
            drop(conn.socket.shutdown(std::net::Shutdown::Both));
            reading.join().expect("no panic");
        });
        let spec = upstream(origin.addr);
        let mut web = service(vec![spec.clone()]);
        web.policy.websocket_close_spread_ms = close_spread_ms;
        let edge = TestEdge::start(web);
        let inside = edge.upstream(&spec);
        let mut client = edge.client();
        assert!(client.send(ASK).head().starts_with("HTTP/1.1 101"));
        Self { edge, inside, client, origin: write, at_origin, close_spread_ms }
    }

    fn leave(&mut self) {
        let version = self.edge.put(nobody(self.close_spread_ms));
        self.edge.wait_acknowledged(version);
        self.inside.close_class(TrafficClass::WebSocket);
    }

    fn origin_writes(&self, bytes: impl Into<Vec<u8>>) {
        self.origin.send(bytes.into()).expect("the origin runs");
    }

    fn origin_has(&self, bytes: &[u8]) {
        until("the origin has it", || self.at_origin.lock().expect("lock").len() >= bytes.len());
        assert_eq!(*self.at_origin.lock().expect("lock"), bytes);
    }

    fn client_frame(&mut self) -> (u8, Vec<u8>, bool) {
        loop {
            if let Some((first, payload, masked, used)) = take_frame(&self.client.unread) {
                self.client.unread.drain(..used);
                return (first, payload, masked);
            }
            assert!(self.client.more() > 0, "closed within {:?}", self.client.unread);
        }
    }

    /// The frame at the origin behind `before` bytes.
    fn origin_frame(&self, before: usize) -> (u8, Vec<u8>, bool) {
        let mut found = None;
        until("a frame comes to the origin", || {
            found = self.at_origin.lock().expect("lock").get(before..).and_then(take_frame);
            found.is_some()
        });
        let (first, payload, masked, used) = found.expect("was found");
        assert_eq!(self.at_origin.lock().expect("lock").len(), before + used, "nothing follows a close");
        (first, payload, masked)
    }

    fn ends_softly(mut self) {
        assert!(self.client.is_closed(), "{:?}", self.client.unread);
        until("it is empty", || self.inside.is_empty());
        let receipt = self.inside.receipt();
        assert_eq!((receipt.soft_closed[TrafficClass::WebSocket], receipt.completed.total()), (1, 0));
        assert_eq!(receipt.hard_cut, [] as [String; 0]);
    }
}

#[test]
fn a_websocket_is_closed_with_1012_in_both_directions_and_both_answers_are_awaited() {
    let mut ends = Ends::open(0);
    ends.leave();
    assert_eq!(ends.client_frame(), (CLOSE, restart(), false));
    assert_eq!(ends.origin_frame(0), (CLOSE, restart(), true));
    ends.client.send(frame(CLOSE, &restart(), true));
    // One answer is not two.
    std::thread::park_timeout(Duration::from_millis(50));
    assert_eq!(ends.inside.in_flight(), 1);
    ends.origin_writes(frame(CLOSE, &restart(), false));
    ends.ends_softly();
}

#[test]
fn frames_that_are_under_way_go_to_their_end_before_the_close() {
    let mut ends = Ends::open(0);
    let up = frame(FIN | TEXT, &[b'u'; 300], true);
    let down = frame(FIN | TEXT, &[b'd'; 70_000], false);
    // Up to the middle of a header, and to the middle of a payload.
    ends.client.send(&up[..3]);
    ends.origin_writes(&down[..40_000]);
    ends.origin_has(&up[..3]);
    while ends.client.unread.len() < 40_000 {
        assert!(ends.client.more() > 0);
    }
    ends.leave();
    ends.client.send(&up[3..]);
    ends.origin_writes(&down[40_000..]);
    assert_eq!(ends.client_frame(), (FIN | TEXT, vec![b'd'; 70_000], false));
    assert_eq!(ends.client_frame(), (CLOSE, restart(), false));
    assert_eq!(ends.origin_frame(up.len()), (CLOSE, restart(), true));
    assert_eq!(ends.at_origin.lock().expect("lock")[..up.len()], up);
    // What was under way before the answers is not passed on: nothing may follow a close.
    ends.client.send([frame(FIN | TEXT, b"late", true), frame(CLOSE, b"", true)].concat());
    ends.origin_writes([frame(FIN | TEXT, b"late", false), frame(CLOSE, b"", false)].concat());
    let at_origin = Arc::clone(&ends.at_origin);
    ends.ends_softly();
    assert_eq!(at_origin.lock().expect("lock").len(), up.len() + 8, "the close is the last");
}

#[test]
fn fragments_with_control_frames_between_them_pass_byte_for_byte_however_they_are_cut_up() {
    let mut ends = Ends::open(0);
    let message = |masked| {
        let frames = [
            frame(TEXT, &[b'a'; 130], masked),
            frame(PING, b"are you there", masked),
            frame(CONTINUATION, b"", masked),
            frame(FIN | CONTINUATION, &[b'c'; 66_000], masked),
        ];
        frames.concat()
    };
    let (up, down) = (message(true), message(false));
    for piece in up[..200].chunks(1).chain(up[200..].chunks(977)) {
        ends.client.send(piece);
    }
    for piece in down[..200].chunks(1).chain(down[200..].chunks(977)) {
        ends.origin_writes(piece);
    }
    ends.origin_has(&up);
    while ends.client.unread.len() < down.len() {
        assert!(ends.client.more() > 0);
    }
    assert_eq!(std::mem::take(&mut ends.client.unread), down);
    // Between the fragments of another message.
    let fragment = frame(TEXT, b"begins", false);
    ends.origin_writes(fragment.clone());
    assert_eq!(ends.client_frame(), (TEXT, b"begins".to_vec(), false));
    ends.leave();
    assert_eq!(ends.client_frame(), (CLOSE, restart(), false));
    ends.origin_frame(up.len());
    let receipt = ends.inside.receipt();
    assert_eq!(receipt.in_flight[TrafficClass::WebSocket], 1, "the answers are awaited");
    ends.client.send(frame(CLOSE, &restart(), true));
    ends.origin_writes(frame(CLOSE, &restart(), false));
    let inside = Arc::clone(&ends.inside);
    ends.ends_softly();
    // The edge's own frames are nobody's bytes.
    let receipt = inside.receipt();
    assert_eq!(receipt.bytes_to_upstream, up.len() as u64);
    assert_eq!(receipt.bytes_to_client, (down.len() + fragment.len()) as u64);
}

#[test]
fn a_websocket_that_closes_by_itself_gets_no_second_close() {
    let mut ends = Ends::open(0);
    let close = frame(CLOSE, &1000_u16.to_be_bytes(), true);
    ends.client.send(&close);
    ends.origin_has(&close);
    ends.leave();
    ends.origin_writes(frame(CLOSE, &1000_u16.to_be_bytes(), false));
    assert_eq!(ends.client_frame(), (CLOSE, 1000_u16.to_be_bytes().to_vec(), false));
    ends.origin_has(&close);
    ends.ends_softly();
}

#[test]
fn a_peer_that_does_not_answer_a_close_is_left_after_five_seconds() {
    let mut ends = Ends::open(0);
    let begun = Instant::now();
    ends.leave();
    assert_eq!(ends.client_frame().0, CLOSE);
    ends.client.send(frame(CLOSE, b"", true));
    until("it is empty", || ends.inside.is_empty());
    assert!(begun.elapsed() >= Duration::from_secs(5), "{:?}", begun.elapsed());
    ends.ends_softly();
}

#[test]
fn a_websocket_inside_a_frame_that_does_not_end_is_cut_at_the_hard_deadline() {
    let mut ends = Ends::open(0);
    ends.client.send(&frame(FIN | TEXT, b"never whole", true)[..8]);
    until("it has passed", || ends.at_origin.lock().expect("lock").len() == 8);
    ends.leave();
    assert_eq!(ends.client_frame(), (CLOSE, restart(), false));
    ends.inside.cut_class(TrafficClass::WebSocket);
    assert!(ends.client.is_closed());
    until("it is empty", || ends.inside.is_empty());
    assert_eq!(ends.inside.receipt().hard_cut, ["socket"]);
}

/// An origin that answers each close with one, and echoes the rest.
fn polite() -> Origin {
    Origin::scripted(|conn| {
        let Some(_) = conn.request() else { return };
        conn.write(SWITCH);
        loop {
            while let Some((first, payload, _, used)) = take_frame(&conn.unread) {
                conn.unread.drain(..used);
                conn.write(&frame(first, &payload, false));
                if first == CLOSE {
                    return;
                }
            }
            if conn.more().is_none() {
                return;
            }
        }
    })
}

/// Sixty tunnels that were opened when closing was to be spread over `opened_ms`, and are closed when it is to be over
/// `closing_ms`: when each was told to come back.
fn close_times(opened_ms: u32, closing: ServiceSpec) -> Vec<Duration> {
    const SOCKETS: usize = 60;
    let origin = polite();
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.websocket_close_spread_ms = opened_ms;
    let mut edge = TestEdge::start(web);
    let inside = edge.upstream(&spec);
    let clients: Vec<Client> = (0..SOCKETS)
        .map(|_| {
            let mut client = edge.client();
            assert!(client.send(ASK).head().starts_with("HTTP/1.1 101"));
            client
        })
        .collect();
    let version = edge.put(closing);
    edge.wait_acknowledged(version);
    let begun = Instant::now();
    inside.close_class(TrafficClass::WebSocket);
    let told: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            std::thread::spawn(move || {
                while take_frame(&client.unread).is_none() {
                    assert!(client.more() > 0, "closed without a word");
                }
                let at = begun.elapsed();
                client.send(frame(CLOSE, &restart(), true));
                assert_eq!(client.unread, frame(CLOSE, &restart(), false));
                client.unread.clear();
                assert!(client.is_closed());
                at
            })
        })
        .collect();
    let mut times: Vec<Duration> = told.into_iter().map(|thread| thread.join().expect("closes")).collect();
    times.sort_unstable();
    until("they are all gone", || inside.is_empty());
    let receipt = inside.receipt();
    assert_eq!(receipt.soft_closed[TrafficClass::WebSocket], SOCKETS as u64);
    assert_eq!(receipt.hard_cut, [] as [String; 0]);
    times
}

#[test]
fn many_websockets_are_closed_over_a_window_and_not_at_one_moment() {
    let times = close_times(1_500, nobody(1_500));
    assert!(times[times.len() - 1] - times[0] > Duration::from_millis(500), "all at once: {times:?}");
    assert!(times[times.len() - 1] < PATIENCE);
}

#[test]
fn websockets_that_were_opened_when_there_was_time_are_closed_at_once_when_others_wait() {
    let mut held = nobody(0);
    held.policy.hold = Some(Box::new(HoldSpec {
        id: 1,
        until_ms: now_ms() + 60_000,
        max_requests: 1_000,
        max_bytes: 1 << 20,
        max_age_ms: 60_000,
        release_per_s: 1_000,
    }));
    // Six seconds after they were asked to end they are cut; with what was said at their upgrade, 40 of 100 would be.
    let times = close_times(10_000, held);
    assert!(times[times.len() - 1] < Duration::from_secs(4), "{times:?}");
}

#[test]
fn wherever_a_stream_of_frames_is_when_it_is_closed_whole_frames_have_passed_and_nothing_else() {
    for round in 0..12_usize {
        let mut ends = Ends::open(0);
        let lengths = [0, 1, 125, 126, 127, 1_000, 65_535, 65_536, 5];
        let frames = |masked: bool| -> Vec<u8> {
            let of = |i: usize| frame(FIN | TEXT, &vec![b'x'; lengths[(i + round) % lengths.len()]], masked);
            (0..40).flat_map(of).collect()
        };
        let (up, down) = (frames(true), frames(false));
        let (half_up, half_down) = (up.len() * (round + 1) / 14, down.len() * (13 - round) / 14);
        let mut writer = ends.client.socket.try_clone().expect("another handle");
        let first = up[..half_up].to_vec();
        let upwards = std::thread::spawn(move || std::io::Write::write_all(&mut writer, &first));
        ends.origin_writes(&down[..half_down]);
        let inside = Arc::clone(&ends.inside);
        ends.leave();
        upwards.join().expect("no panic").expect("is taken");
        // Both go on as if they had not heard yet.
        ends.client.send_anyhow(&up[half_up..]);
        ends.origin_writes(&down[half_down..]);
        let check = |all: &[u8], got: &[u8], masked: bool| {
            let mut at = 0;
            while let Some((first, payload, has_mask, used)) = take_frame(&got[at..]) {
                assert_eq!(has_mask, masked);
                if first == CLOSE {
                    assert_eq!((payload, at + used), (restart(), got.len()), "the close is the last");
                    assert_eq!(got[..at], all[..at]);
                    return;
                }
                at += used;
            }
            panic!("no close behind {at} of {} bytes", got.len());
        };
        until("the origin has a close", || {
            let got = ends.at_origin.lock().expect("lock");
            got.len() >= 8 && got[got.len() - 8] == CLOSE && got[got.len() - 7] == 0x82
        });
        ends.client.send_anyhow(frame(CLOSE, &restart(), true));
        ends.origin_writes(frame(CLOSE, &restart(), false));
        while ends.client.more() > 0 {}
        check(&down, &ends.client.unread, false);
        check(&up, &ends.at_origin.lock().expect("lock"), true);
        until("it is empty", || inside.is_empty());
        assert_eq!(inside.receipt().soft_closed[TrafficClass::WebSocket], 1);
    }
}
