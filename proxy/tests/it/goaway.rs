//! GOAWAY from an upstream (RFC 9113 §6.8): streams above the last one that it names were not processed and are sent
//! again, once and with any method; the others end as the upstream lets them, and are never sent again.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::support::{Client, PATIENCE, TestEdge, h2c, service, until};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
/// The first of two GOAWAYs of a polite upstream: nothing new, everything that is under way.
const EVERY_STREAM: u32 = (1 << 31) - 1;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What an origin has got of a stream so far.
#[derive(Debug)]
struct Got {
    conn: usize,
    stream: u32,
    data: Vec<u8>,
    is_whole: bool,
}

/// An HTTP/2 origin whose test writes the frames.
struct Origin {
    addr: SocketAddr,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
    got: Receiver<Got>,
}

impl Origin {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let addr = listener.local_addr().expect("address");
        let sockets = Arc::<Mutex<Vec<TcpStream>>>::default();
        let all = Arc::clone(&sockets);
        let (tell, got) = channel();
        std::thread::spawn(move || {
            for (conn, socket) in listener.incoming().map_while(Result::ok).enumerate() {
                socket.set_nodelay(true).expect("nodelay");
                let mut all_now = all.lock().expect("lock");
                all_now.push(socket.try_clone().expect("clones"));
                all_now[conn].write_all(&frame(SETTINGS, 0, 0, &[])).expect("is sent");
                drop(all_now);
                let (all, tell) = (Arc::clone(&all), tell.clone());
                std::thread::spawn(move || read(conn, socket, &all, &tell));
            }
        });
        Self { addr, sockets, got }
    }

    fn send(&self, conn: usize, frame: &[u8]) {
        self.sockets.lock().expect("lock")[conn].write_all(frame).expect("is sent");
    }

    /// "I have processed nothing above this stream", without an error.
    fn go_away(&self, conn: usize, last_stream: u32) {
        let no_error = 0_u32;
        self.send(conn, &frame(GOAWAY, 0, 0, &[last_stream.to_be_bytes(), no_error.to_be_bytes()].concat()));
    }

    fn answer(&self, got: &Got, text: &str) {
        let status_200 = 0x88; // RFC 7541, appendix A
        let head = frame(HEADERS, END_HEADERS, got.stream, &[status_200]);
        let body = frame(DATA, END_STREAM, got.stream, text.as_bytes());
        self.send(got.conn, &[head, body].concat());
    }

    fn close(&self, conn: usize) {
        self.sockets.lock().expect("lock")[conn].shutdown(Shutdown::Both).expect("closes");
    }

    fn next(&self) -> Got {
        self.got.recv_timeout(PATIENCE).expect("something comes from the edge")
    }

    /// The next request that is there as a whole.
    fn request(&self) -> Got {
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

fn post(edge: &TestEdge, body: &str) -> Client {
    let mut client = edge.client();
    let length = body.len();
    client.send(format!("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: {length}\r\n\r\n{body}"));
    client
}

/// Four requests that are under way on one connection; the last one is a GET.
fn four_under_way(edge: &TestEdge, origin: &Origin) -> (Vec<Client>, Vec<Got>) {
    let (mut clients, mut under_way) = (Vec::new(), Vec::new());
    for body in ["first", "second", "third"] {
        clients.push(post(edge, body));
        under_way.push(origin.request());
    }
    let mut get = edge.client();
    get.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    clients.push(get);
    under_way.push(origin.request());
    let places: Vec<_> = under_way.iter().map(|got| (got.conn, got.stream)).collect();
    assert_eq!(places, [(0, 1), (0, 3), (0, 5), (0, 7)]);
    (clients, under_way)
}

/// Those above the second stream come again, on new connections (two if both dial at once), and are answered there.
fn the_last_two_come_again(origin: &Origin, clients: &mut [Client]) {
    let mut again = [origin.request(), origin.request()];
    again.sort_by_key(|got| std::cmp::Reverse(got.data.len()));
    assert!(again.iter().all(|got| got.conn > 0), "{again:?}");
    assert_eq!([&*again[0].data, &*again[1].data], [&b"third"[..], b""]);
    for (got, client) in again.iter().zip(&mut clients[2..]) {
        origin.answer(got, "new connection");
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, "new connection"));
    }
}

fn nothing_more_comes(origin: &Origin) {
    let more: Vec<Got> = origin.got.try_iter().collect();
    assert!(more.is_empty(), "sent more often than once: {more:?}");
}

#[test]
fn streams_above_the_last_one_of_a_goaway_are_sent_again_and_the_others_are_left_alone() {
    let origin = Origin::start();
    let spec = h2c(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let (mut clients, under_way) = four_under_way(&edge, &origin);
    origin.go_away(0, 3);
    // They do not wait for those that are still under way.
    the_last_two_come_again(&origin, &mut clients);
    for (got, client) in under_way.iter().zip(&mut clients).take(2) {
        origin.answer(got, "first connection");
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, "first connection"));
    }
    nothing_more_comes(&origin);
    let upstream = edge.upstream(&spec);
    until("every lease is back", || upstream.in_flight() == 0);
    assert_eq!(
        (upstream.outcomes().failed, upstream.ejected_until_ms()),
        (0, 0),
        "it has done nothing wrong"
    );
}

#[test]
fn streams_up_to_the_last_one_of_a_goaway_fail_once_if_the_connection_breaks() {
    let origin = Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let (mut clients, _) = four_under_way(&edge, &origin);
    origin.go_away(0, 3);
    the_last_two_come_again(&origin, &mut clients);
    origin.close(0);
    // They may have been processed: told as they are, and not sent again.
    for client in &mut clients[..2] {
        let answer = client.answer();
        assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
    }
    nothing_more_comes(&origin);
}

#[test]
fn a_goaway_and_a_close_at_once_are_told_apart_by_stream() {
    let origin = Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let (mut clients, _) = four_under_way(&edge, &origin);
    origin.go_away(0, 3);
    origin.close(0);
    the_last_two_come_again(&origin, &mut clients);
    for client in &mut clients[..2] {
        let answer = client.answer();
        assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
    }
    nothing_more_comes(&origin);
}

#[test]
fn an_upload_that_a_goaway_meets_half_way_is_sent_again_as_a_whole() {
    let origin = Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 10\r\n\r\nhello");
    let got = loop {
        let got = origin.next();
        if got.data == b"hello" {
            break got;
        }
    };
    assert!(!got.is_whole && got.conn == 0, "{got:?}");
    origin.go_away(0, 0);
    client.send("world");
    let again = origin.request();
    assert_eq!((again.conn, &*again.data), (1, &b"helloworld"[..]));
    origin.answer(&again, "ok");
    assert_eq!(client.answer().status, 200);
    nothing_more_comes(&origin);
}

#[test]
fn a_goaway_that_refuses_nothing_only_sends_new_requests_elsewhere() {
    let origin = Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let mut first = post(&edge, "first");
    let under_way = origin.request();
    origin.go_away(0, EVERY_STREAM);
    // The edge hears of it at some time; what it sends on the old connection until then is served there.
    let mut sent = 0;
    until("a new connection is used", || {
        sent += 1;
        let mut client = post(&edge, "another");
        let got = origin.request();
        origin.answer(&got, "ok");
        assert_eq!(client.answer().status, 200, "request {sent}");
        got.conn == 1
    });
    origin.answer(&under_way, "at last");
    assert_eq!(first.answer().text(), "at last");
    nothing_more_comes(&origin);
}
