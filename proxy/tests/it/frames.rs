//! An HTTP/2 origin whose test writes the frames (RFC 9113).

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::support::PATIENCE;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
/// RFC 9113 §6.5.2.
const MAX_CONCURRENT_STREAMS: u16 = 3;
const END_HEADERS: u8 = 4;
/// RFC 7541, appendix A: the whole head of an answer.
pub(crate) const STATUS_200: u8 = 0x88;
pub(crate) const STATUS_204: u8 = 0x89;
pub(crate) const STATUS_304: u8 = 0x8b;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What an origin has got of a stream so far.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) conn: usize,
    pub(crate) stream: u32,
    pub(crate) data: Vec<u8>,
    pub(crate) is_whole: bool,
}

/// An HTTP/2 origin whose test writes the frames.
pub(crate) struct Origin {
    pub(crate) addr: SocketAddr,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
    got: Receiver<Got>,
    /// What a new connection begins with.
    settings: Arc<Mutex<Vec<u8>>>,
}

impl Origin {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let addr = listener.local_addr().expect("address");
        let sockets = Arc::<Mutex<Vec<TcpStream>>>::default();
        let all = Arc::clone(&sockets);
        let settings = Arc::<Mutex<Vec<u8>>>::default();
        let first = Arc::clone(&settings);
        let (tell, got) = channel();
        std::thread::spawn(move || {
            for (conn, socket) in listener.incoming().map_while(Result::ok).enumerate() {
                socket.set_nodelay(true).expect("nodelay");
                let mut all_now = all.lock().expect("lock");
                all_now.push(socket.try_clone().expect("clones"));
                let payload = first.lock().expect("lock").clone();
                all_now[conn].write_all(&frame(SETTINGS, 0, 0, &payload)).expect("is sent");
                drop(all_now);
                let (all, tell) = (Arc::clone(&all), tell.clone());
                std::thread::spawn(move || read(conn, socket, &all, &tell));
            }
        });
        Self { addr, sockets, got, settings }
    }

    pub(crate) fn send(&self, conn: usize, frame: &[u8]) {
        self.sockets.lock().expect("lock")[conn].write_all(frame).expect("is sent");
    }

    /// "I have processed nothing above this stream", without an error.
    pub(crate) fn go_away(&self, conn: usize, last_stream: u32) {
        let no_error = 0_u32;
        self.send(conn, &frame(GOAWAY, 0, 0, &[last_stream.to_be_bytes(), no_error.to_be_bytes()].concat()));
    }

    pub(crate) fn answer(&self, got: &Got, text: &str) {
        self.answer_as(got, STATUS_200, text);
    }

    /// An answer with a status of the static table (RFC 7541, appendix A), and a body whatever that says of bodies.
    pub(crate) fn answer_as(&self, got: &Got, status: u8, text: &str) {
        let head = frame(HEADERS, END_HEADERS, got.stream, &[status]);
        let body = frame(DATA, END_STREAM, got.stream, text.as_bytes());
        self.send(got.conn, &[head, body].concat());
    }

    /// The head of an answer and a part of its body.
    pub(crate) fn answer_in_part(&self, got: &Got, text: &str) {
        let head = frame(HEADERS, END_HEADERS, got.stream, &[STATUS_200]);
        let body = frame(DATA, 0, got.stream, text.as_bytes());
        self.send(got.conn, &[head, body].concat());
    }

    /// Resets a stream with this error code (RFC 9113 §7).
    pub(crate) fn reset_stream(&self, got: &Got, code: u32) {
        self.send(got.conn, &frame(RST_STREAM, 0, got.stream, &code.to_be_bytes()));
    }

    /// Allows so many streams at a time, on every connection that there is and on those to come.
    pub(crate) fn allow_streams(&self, count: u32) {
        let limit = [&MAX_CONCURRENT_STREAMS.to_be_bytes()[..], &count.to_be_bytes()].concat();
        // In this order: whoever is accepted now is among them, or begins with it.
        let all = self.sockets.lock().expect("lock");
        self.settings.lock().expect("lock").clone_from(&limit);
        for mut socket in &*all {
            // Some are closed already.
            drop(socket.write_all(&frame(SETTINGS, 0, 0, &limit)));
        }
    }

    pub(crate) fn close(&self, conn: usize) {
        self.sockets.lock().expect("lock")[conn].shutdown(Shutdown::Both).expect("closes");
    }

    pub(crate) fn next(&self) -> Got {
        self.got.recv_timeout(PATIENCE).expect("something comes from the edge")
    }

    /// Nothing was sent more often than once.
    #[track_caller]
    pub(crate) fn got_nothing_more(&self) {
        let more: Vec<Got> = self.got.try_iter().collect();
        assert!(more.is_empty(), "sent more often than once: {more:?}");
    }

    /// The next request that is there as a whole, if one comes within this time.
    pub(crate) fn request_within(&self, limit: std::time::Duration) -> Option<Got> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let got = self.got.recv_timeout(left).ok()?;
            if got.is_whole {
                return Some(got);
            }
        }
    }

    /// The next request that is there as a whole.
    pub(crate) fn request(&self) -> Got {
        loop {
            let got = self.next();
            if got.is_whole {
                return got;
            }
        }
    }
}

fn read(conn: usize, mut socket: TcpStream, all: &Mutex<Vec<TcpStream>>, tell: &Sender<Got>) {
    let mut preface = [0; PREFACE.len()];
    if socket.read_exact(&mut preface).is_err() {
        return;
    }
    assert_eq!(preface, PREFACE);
    let mut streams = std::collections::HashMap::<u32, Vec<u8>>::new();
    let mut head = [0; 9];
    while socket.read_exact(&mut head).is_ok() {
        let [_, _, _, kind, flags, stream @ ..] = head;
        let stream = u32::from_be_bytes(stream);
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        if socket.read_exact(&mut payload).is_err() {
            return;
        }
        if kind == SETTINGS && flags & ACK == 0 {
            // The test may have closed.
            drop(all.lock().expect("lock")[conn].write_all(&frame(SETTINGS, ACK, 0, &[])));
        }
        if kind == HEADERS || kind == DATA {
            let so_far = streams.entry(stream).or_default();
            if kind == DATA {
                so_far.extend(payload);
            }
            let got = Got { conn, stream, data: so_far.clone(), is_whole: flags & END_STREAM != 0 };
            if tell.send(got).is_err() {
                return;
            }
        }
    }
}
