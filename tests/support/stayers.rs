//! Clients that stay for long: WebSockets, event streams, calls, slow downloads and slow uploads. Each knows byte for
//! byte what it has to see, comes back when it was ended politely, and panics at everything else.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use sha2::{Digest, Sha256};
use socket2::{Domain, Socket, Type};

use super::{STATE_TIMEOUT, wait_for};

/// How often a client that waits looks whether it is over.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Between the two halves of a WebSocket's message.
const HALF_EVERY: Duration = Duration::from_millis(200);
/// Lengths of messages: some for each form of a frame's header.
const MESSAGE_BYTES: [usize; 5] = [5, 126, 1_000, 20_000, 70_000];
/// A slow transfer goes so far in one step.
const STEP_BYTES: usize = 16 * 1024;
/// Between two steps of a slow transfer.
const STEP_EVERY: Duration = Duration::from_millis(400);
/// More than a slow client takes or sends in two minutes: a transfer is under way until it is told to finish. A download
/// is longer by [`bytes_in_the_kernel`].
const TRANSFER_BYTES: usize = 6_000_000;
/// Asked for by clients that read slowly. Without it the kernel takes up to 32 MB off the edge for them, once they have read
/// fast: then the edge has been through with a download for long.
const RECEIVE_BUFFER_BYTES: usize = 128 * 1024;

const FIN_BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
/// RFC 6455 §7.4.1 and its registry: "normal", and "service restart".
const NORMAL: u16 = 1000;
const RESTART: u16 = 1012;

/// How it stands with the clients of one kind.
#[derive(Debug, Default)]
pub(crate) struct Kind {
    /// Streams that were opened.
    pub(crate) opened: AtomicU64,
    /// Streams that the edge has ended politely, or transfers that are through.
    pub(crate) ended: AtomicU64,
    /// Whole messages and events that came, steps of a transfer.
    pub(crate) progress: AtomicU64,
}

impl Kind {
    fn more(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until so many were opened.
    #[track_caller]
    pub(crate) fn wait_opened(&self, count: u64) {
        wait_for(&format!("{count} to be open: {self:?}"), || {
            (self.opened.load(Ordering::SeqCst) >= count).then_some(())
        });
    }

    pub(crate) fn ended(&self) -> u64 {
        self.ended.load(Ordering::SeqCst)
    }

    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::SeqCst)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Shared {
    stop: AtomicBool,
    /// Transfers of rounds below this one go as fast as they can.
    finish: Mutex<u64>,
    /// One of the two above has changed.
    told: Condvar,
    pub(crate) websockets: Kind,
    pub(crate) events: Kind,
    pub(crate) calls: Kind,
    pub(crate) transfers: Kind,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Lets the transfers of this round, counted from 0, and of those before it come to their end.
    pub(crate) fn finish_transfers(&self, round: u64) {
        *self.finish() = round + 1;
        self.told.notify_all();
    }

    fn leave(&self) {
        let finish = self.finish();
        self.stop.store(true, Ordering::SeqCst);
        drop(finish);
        self.told.notify_all();
    }

    fn finish(&self) -> MutexGuard<'_, u64> {
        self.finish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One step of a transfer is done. Waits, until the next one is due or it may go on as fast as it can; says whether
    /// it has been told so.
    fn step(&self, round: u64) -> bool {
        Kind::more(&self.transfers.progress);
        let is_slow = |finish: &mut u64| !self.is_over() && *finish <= round;
        let waited = self.told.wait_timeout_while(self.finish(), STEP_EVERY, is_slow);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// How many of each kind there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) websockets: u64,
    pub(crate) events: u64,
    pub(crate) calls: u64,
    /// Of downloads, and of uploads.
    pub(crate) transfers: u64,
}

/// The clients. They run until [`Stayers::leave`].
pub(crate) struct Stayers {
    pub(crate) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Stayers {
    /// Starts them all, and waits until each has come in.
    pub(crate) fn come(edge: SocketAddr, counts: Counts) -> Self {
        let shared = Arc::<Shared>::default();
        let mut threads = Vec::new();
        let mut start = |count: u64, client: fn(SocketAddr, u64, &Shared)| {
            for number in 0..count {
                let shared = Arc::clone(&shared);
                threads.push(std::thread::spawn(move || client(edge, number, &shared)));
            }
        };
        start(counts.websockets, websocket);
        start(counts.events, events);
        start(counts.transfers, download);
        start(counts.transfers, upload);
        start(counts.calls, call);
        shared.websockets.wait_opened(counts.websockets);
        shared.events.wait_opened(counts.events);
        shared.transfers.wait_opened(2 * counts.transfers);
        shared.calls.wait_opened(counts.calls);
        Self { shared, threads }
    }

    /// None of them has found anything wrong so far.
    #[track_caller]
    pub(crate) fn assert_well(&self) {
        assert!(!self.threads.iter().any(JoinHandle::is_finished), "a client has given up");
    }

    /// They end by themselves.
    #[track_caller]
    pub(crate) fn leave(self) -> Arc<Shared> {
        self.shared.leave();
        let failed = self.threads.into_iter().filter_map(|thread| thread.join().err()).count();
        assert_eq!(failed, 0, "clients that saw what they should not");
        self.shared
    }
}

/// A connection that is read with patience.
struct Conn {
    socket: TcpStream,
    unread: Vec<u8>,
    at: usize,
}

impl Conn {
    fn open(edge: SocketAddr) -> Self {
        Self::of(TcpStream::connect(edge).expect("the edge accepts"))
    }

    /// One that takes no more than it reads.
    fn open_narrow(edge: SocketAddr) -> Self {
        let socket = Socket::new(Domain::for_address(edge), Type::STREAM, None).expect("a socket");
        // Before it is connected: the window is agreed upon then.
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES).expect("a size");
        socket.connect(&edge.into()).expect("the edge accepts");
        Self::of(socket.into())
    }

    fn of(socket: TcpStream) -> Self {
        socket.set_read_timeout(Some(LOOK_EVERY)).expect("a time-out");
        socket.set_nodelay(true).expect("no delay");
        Self { socket, unread: Vec::new(), at: 0 }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the edge takes it");
    }

    fn rest(&self) -> &[u8] {
        &self.unread[self.at..]
    }

    fn take(&mut self, length: usize) {
        self.at += length;
        if self.at == self.unread.len() {
            self.unread.clear();
            self.at = 0;
        }
    }

    /// Reads more: how much; 0 is the end, `None` that nothing came for a while.
    fn more(&mut self) -> Option<usize> {
        let mut chunk = [0; STEP_BYTES];
        match self.socket.read(&mut chunk) {
            Ok(read) => {
                self.unread.extend_from_slice(&chunk[..read]);
                Some(read)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
            Err(error) => panic!("the edge broke off: {error}"),
        }
    }

    /// Waits until `found` finds something in what has come.
    fn until<T>(&mut self, what: &str, mut found: impl FnMut(&[u8]) -> Option<(T, usize)>) -> T {
        let begun = Instant::now();
        loop {
            if let Some((found, used)) = found(self.rest()) {
                self.take(used);
                return found;
            }
            assert_ne!(self.more(), Some(0), "the edge closed before {what}");
            assert!(begun.elapsed() < STATE_TIMEOUT, "waited for {what}");
        }
    }

    fn head(&mut self) -> Head {
        let text = self.until("a head", |bytes| {
            let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
            Some((String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase(), end))
        });
        Head { text }
    }
}

struct Head {
    text: String,
}

impl Head {
    #[track_caller]
    fn expect(self, status: u16) -> Self {
        assert!(self.text.starts_with(&format!("http/1.1 {status}")), "{}", self.text);
        assert!(!self.text.contains("connection: close"), "{}", self.text);
        self
    }

    #[track_caller]
    fn field(&self, name: &str) -> &str {
        let line = self.text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name} in {}", self.text))
    }
}

/// The copy that a client is with, which has to be another one each time that it was sent away.
#[derive(Default)]
struct Place(String);

impl Place {
    #[track_caller]
    fn is_now(&mut self, instance: &str) {
        assert_ne!(self.0, instance, "sent back to the copy that leaves");
        instance.clone_into(&mut self.0);
    }
}

// --- WebSockets ---------------------------------------------------------------------------------------------

fn message(number: u64, at: u64) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| (0..=255_u8).cycle().take(80_000).collect());
    let length = MESSAGE_BYTES[usize::try_from((number + at) % MESSAGE_BYTES.len() as u64).expect("small")];
    let first = usize::try_from((number + at) % 251).expect("small");
    &BYTES[first..first + length]
}

/// A frame of a client, whose mask is zero: legal, and the edge's own mask is another one.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..126 => bytes.push(0x80 | u8::try_from(length).expect("short")),
        length @ 126..65_536 => {
            bytes.push(0x80 | 126);
            bytes.extend(u16::try_from(length).expect("fits").to_be_bytes());
        }
        length => {
            bytes.push(0x80 | 127);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

/// The first whole frame of a server: its first byte, its payload, its length.
fn take_frame(bytes: &[u8]) -> Option<((u8, Vec<u8>), usize)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    assert_eq!(second & 0x80, 0, "a server does not mask");
    let (length, at) = match second {
        126 => (usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
        127 => (usize::try_from(u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?)).ok()?, 10),
        short => (usize::from(short), 2),
    };
    Some(((first, bytes.get(at..at + length)?.to_vec()), at + length))
}

fn websocket(edge: SocketAddr, number: u64, shared: &Shared) {
    let mut place = Place::default();
    for round in 0.. {
        let mut conn = Conn::open(edge);
        let ask = format!(
            "GET /ws HTTP/1.1\r\nhost: shop.test\r\nx-req-id: ws-{number}-{round}\r\nconnection: upgrade\r\n\
             upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        conn.send(ask.as_bytes());
        place.is_now(conn.head().expect(101).field("x-instance"));
        Kind::more(&shared.websockets.opened);
        talk(&mut conn, number, shared);
        // The edge hangs up, and nothing follows the close.
        let begun = Instant::now();
        while conn.more() != Some(0) {
            assert!(begun.elapsed() < STATE_TIMEOUT, "the edge does not hang up");
        }
        assert_eq!(conn.rest(), b"", "something follows the close");
        if shared.is_over() {
            return;
        }
        Kind::more(&shared.websockets.ended);
    }
}

/// Sends messages and awaits their echoes, until the edge closes or it is over; answers or says the close.
fn talk(conn: &mut Conn, number: u64, shared: &Shared) {
    let (mut begun, mut echoed, mut last) = (0, 0, Instant::now());
    // Of a frame that is torn at almost any moment.
    let mut half = Vec::new();
    let mut said_close = false;
    loop {
        if let Some(((first, payload), used)) = take_frame(conn.rest()) {
            conn.take(used);
            if first == CLOSE {
                let code = u16::from_be_bytes([payload[0], payload[1]]);
                if said_close && code == NORMAL {
                    assert_eq!(echoed, begun, "echoes are missing");
                    return;
                }
                assert_eq!(code, RESTART);
                if !said_close {
                    half.extend(frame(CLOSE, &RESTART.to_be_bytes()));
                    conn.send(&half);
                }
                return;
            }
            assert_eq!(first, FIN_BINARY, "not what was sent");
            assert!(payload == message(number, echoed), "echo {echoed} of {number} is another one");
            echoed += 1;
            Kind::more(&shared.websockets.progress);
            continue;
        }
        if shared.is_over() && !said_close {
            half.extend(frame(CLOSE, &NORMAL.to_be_bytes()));
            conn.send(&half);
            said_close = true;
        }
        if !said_close && begun <= echoed + 2 && last.elapsed() >= HALF_EVERY {
            let next = frame(FIN_BINARY, message(number, begun));
            let (before, behind) = next.split_at(next.len() / 2);
            half.extend(before);
            conn.send(&half);
            (half, begun, last) = (behind.to_vec(), begun + 1, Instant::now());
        }
        assert_ne!(conn.more(), Some(0), "closed without a close frame, {:?} unread", conn.rest().len());
    }
}

// --- event streams ------------------------------------------------------------------------------------------

/// The first whole chunk: its data, its length.
fn take_chunk(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let line = bytes.windows(2).position(|two| two == b"\r\n")?;
    let size = std::str::from_utf8(&bytes[..line]).expect("a size");
    let size = usize::from_str_radix(size, 16).expect("a size");
    let end = line + 2 + size;
    assert!(bytes.len() < end + 2 || bytes[end..end + 2] == *b"\r\n", "a torn chunk");
    (bytes.len() >= end + 2).then(|| (bytes[line + 2..end].to_vec(), end + 2))
}

/// Always on the same connection: an end of a stream is none of it.
fn events(edge: SocketAddr, number: u64, shared: &Shared) {
    let (mut conn, mut place, mut last) = (Conn::open(edge), Place::default(), 0_u64);
    for round in 0.. {
        let ask = format!(
            "GET /sse?count=0&ms=40 HTTP/1.1\r\nhost: shop.test\r\nx-req-id: sse-{number}-{round}\r\n\
             accept: text/event-stream\r\nlast-event-id: {last}\r\n\r\n"
        );
        conn.send(ask.as_bytes());
        let head = conn.head().expect(200);
        assert_eq!(head.field("transfer-encoding"), "chunked");
        place.is_now(head.field("x-instance"));
        Kind::more(&shared.events.opened);
        let mut text = String::new();
        loop {
            if shared.is_over() {
                return;
            }
            let Some((data, used)) = take_chunk(conn.rest()) else {
                assert_ne!(conn.more(), Some(0), "the connection went with the stream");
                continue;
            };
            conn.take(used);
            if data.is_empty() {
                break;
            }
            text.push_str(std::str::from_utf8(&data).expect("text"));
            while let Some(end) = text.find("\n\n") {
                assert_eq!(
                    text[..end],
                    format!("id: {}\ndata: {}", last + 1, place.0),
                    "an event is missing"
                );
                last += 1;
                text.drain(..end + 2);
                Kind::more(&shared.events.progress);
            }
        }
        assert_eq!(text, "", "ended within an event");
        Kind::more(&shared.events.ended);
    }
}

// --- transfers ----------------------------------------------------------------------------------------------

/// Most that lies between the edge and a client that reads slowly: what the edge may have written, and what the client may
/// have been sent. (The kernel doubles a size that it is asked for, for its own use.)
fn bytes_in_the_kernel() -> usize {
    let sizes = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").expect("Linux tells");
    let most: usize = sizes.split_whitespace().last().and_then(|most| most.parse().ok()).expect("a size");
    most + 2 * RECEIVE_BUFFER_BYTES
}

const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz";

/// The body of the origin's `/bytes/N`, and of an upload: the alphabet, from this offset on.
fn pattern(offset: usize, length: usize) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| ALPHABET.repeat(STEP_BYTES / ALPHABET.len() + 2));
    &BYTES[offset % ALPHABET.len()..][..length]
}

fn assert_pattern(bytes: &[u8], mut offset: usize, whose: &str) {
    for part in bytes.chunks(STEP_BYTES) {
        assert!(part == pattern(offset, part.len()), "{whose} has other bytes behind {offset}");
        offset += part.len();
    }
}

fn sha256(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// No two lengths are the same.
fn length_of(least: usize, number: u64, round: u64) -> usize {
    least + usize::try_from(number * 1_009 + round).expect("small")
}

fn download(edge: SocketAddr, number: u64, shared: &Shared) {
    let mut conn = Conn::open_narrow(edge);
    for round in 0.. {
        let length = length_of(TRANSFER_BYTES + bytes_in_the_kernel(), number, round);
        let id = format!("down-{number}-{round}");
        let ask = format!("GET /bytes/{length} HTTP/1.1\r\nhost: shop.test\r\nx-req-id: {id}\r\n\r\n");
        conn.send(ask.as_bytes());
        let head = conn.head().expect(200);
        assert_eq!(head.field("content-length"), length.to_string());
        Kind::more(&shared.transfers.opened);
        let (mut read, mut slow) = (0, true);
        while read < length {
            let here = conn.rest().len();
            assert!(here <= length - read, "more than was said");
            assert_pattern(conn.rest(), read, &id);
            conn.take(here);
            read += here;
            assert!(read == length || conn.more() != Some(0), "{id} ends behind {read} bytes");
            if slow && shared.step(round) {
                slow = false;
                // Else the edge could be through with it, and the receipt would be right not to have it.
                assert!(length - read > bytes_in_the_kernel(), "too late: {read} bytes of {id} are here");
            }
        }
        Kind::more(&shared.transfers.ended);
        if shared.is_over() {
            return;
        }
    }
}

fn upload(edge: SocketAddr, number: u64, shared: &Shared) {
    let mut conn = Conn::open(edge);
    for round in 0.. {
        let length = length_of(TRANSFER_BYTES, number, round);
        let id = format!("up-{number}-{round}");
        let ask = format!(
            "POST /upload HTTP/1.1\r\nhost: shop.test\r\nx-req-id: {id}\r\ncontent-length: {length}\r\n\r\n"
        );
        conn.send(ask.as_bytes());
        Kind::more(&shared.transfers.opened);
        let (mut sent, mut slow, mut digest) = (0, true, Sha256::new());
        while sent < length {
            let step = pattern(sent, STEP_BYTES.min(length - sent));
            conn.send(step);
            digest.update(step);
            sent += step.len();
            slow = slow && !shared.step(round);
        }
        let said: usize = conn.head().expect(200).field("content-length").parse().expect("a length");
        let told = conn.until("the answer", |bytes| Some((bytes.get(..said)?.to_vec(), said)));
        let told: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
        assert_eq!(told["length"], length, "{id}");
        assert_eq!(told["sha256"], sha256(digest), "{id}");
        Kind::more(&shared.transfers.ended);
        if shared.is_over() {
            return;
        }
    }
}

// --- calls --------------------------------------------------------------------------------------------------

/// A gRPC client with streams from the server, always on the same connection.
fn call(edge: SocketAddr, number: u64, shared: &Shared) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let socket = tokio::net::TcpStream::connect(edge).await.expect("the edge accepts");
        let (mut sender, conn) = h2::client::handshake(socket).await.expect("HTTP/2");
        tokio::spawn(conn);
        let mut place = Place::default();
        for round in 0.. {
            sender = sender.ready().await.expect("the connection stays");
            let request = http::Request::post("http://calls.test/messages?ms=40")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("x-req-id", format!("call-{number}-{round}"))
                .body(())
                .expect("a request");
            let (answer, mut body) = sender.send_request(request, false).expect("it is taken");
            body.send_data(bytes::Bytes::from_static(&[0; 5]), true).expect("an empty message");
            let answer = answer.await.expect("an answer");
            assert_eq!(answer.status(), 200);
            place.is_now(answer.headers()["x-instance"].to_str().expect("text"));
            Kind::more(&shared.calls.opened);
            let Some(status) = read_messages(answer.into_body(), &place, shared).await else { return };
            assert_eq!(status, "14", "UNAVAILABLE: it may be called again");
            Kind::more(&shared.calls.ended);
        }
    });
}

/// Reads to the end; the status, or `None` when it is over.
async fn read_messages(mut body: h2::RecvStream, place: &Place, shared: &Shared) -> Option<String> {
    let mut unread = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data.expect("the stream is not broken off");
        drop(body.flow_control().release_capacity(data.len()));
        unread.extend_from_slice(&data);
        while unread.len() >= 5
            && unread.len() >= 5 + u32::from_be_bytes([unread[1], unread[2], unread[3], unread[4]]) as usize
        {
            let length = u32::from_be_bytes([unread[1], unread[2], unread[3], unread[4]]) as usize;
            assert_eq!(unread[5..5 + length], *place.0.as_bytes(), "a message of another one");
            unread.advance(5 + length);
            Kind::more(&shared.calls.progress);
        }
        if shared.is_over() {
            return None;
        }
    }
    assert_eq!(unread.len(), 0, "ended within a message");
    let trailers = body.trailers().await.expect("the stream is not broken off").expect("trailers");
    Some(trailers["grpc-status"].to_str().expect("text").to_owned())
}
