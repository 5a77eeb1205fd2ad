//! Origins that break off in the middle of something, by script: each request is executed at most once, what was not
//! executed is not noticed, and what was cut off never looks whole.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::frames;
use super::support::{
    Client, Origin, OriginConn, PATIENCE, TestEdge, block_on, h2c, service, until, until_trusted, upstream,
};

/// RFC 9113 §7.
const NO_ERROR: u32 = 0;
const INTERNAL_ERROR: u32 = 2;
const CANCEL: u32 = 8;

/// Whatever closes the connection now resets it.
fn reset(conn: &OriginConn) {
    socket2::SockRef::from(&conn.socket).set_linger(Some(Duration::ZERO)).expect("is set");
}

/// Answers what is not a POST; reads a POST and resets the connection.
fn resets_posts() -> Origin {
    Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            if seen.line().starts_with("POST") {
                return reset(conn);
            }
            conn.answer("ok");
        }
    })
}

#[test]
fn a_post_that_is_read_and_then_reset_is_one_502_and_executed_once_with_another_upstream_at_hand() {
    const POSTS: usize = 10;
    let origins = [resets_posts(), resets_posts()];
    let specs = [upstream(origins[0].addr), upstream(origins[1].addr)];
    let mut web = service(specs.to_vec());
    web.policy.passive.consecutive_failures = 0; // nobody is left out of the choice
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    for number in 0..POSTS {
        // On a connection that has served before, and on a new one.
        if number % 2 == 0 {
            while specs.iter().any(|spec| edge.upstream(spec).receipt().completed.total() == 0) {
                assert_eq!(client.get("/").status, 200);
            }
            specs.iter().for_each(|spec| until_trusted(&edge.upstream(spec)));
        }
        let answer = client.post("/", &format!("order {number}"));
        assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"), "order {number}");
    }
    let seen = origins.iter().flat_map(Origin::seen).filter(|seen| seen.line().starts_with("POST"));
    let mut executed: Vec<_> = seen.map(|seen| String::from_utf8(seen.body).expect("text")).collect();
    executed.sort();
    let sent: Vec<_> = (0..POSTS).map(|number| format!("order {number}")).collect();
    assert_eq!(executed, sent, "each once");
}

#[test]
fn a_post_whose_stream_is_reset_after_it_was_read_is_one_502_and_executed_once() {
    let origin = frames::Origin::start();
    let spec = h2c(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    // A connection that has just been used, of an upstream that is known to keep them.
    let get = || {
        let mut client = edge.client();
        client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
        let got = origin.request();
        origin.answer(&got, "ok");
        assert_eq!((client.answer().status, got.conn), (200, 0));
    };
    get();
    until_trusted(&edge.upstream(&spec));
    get();
    for code in [NO_ERROR, INTERNAL_ERROR, CANCEL] {
        let mut client = edge.client();
        client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\norder");
        let got = origin.request();
        assert_eq!((got.conn, &*got.data), (0, &b"order"[..]), "the connection stays");
        origin.reset_stream(&got, code);
        let answer = client.answer();
        assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"), "error code {code}");
    }
    let mut client = edge.client();
    client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\norder");
    let got = origin.request();
    origin.close(got.conn);
    let answer = client.answer();
    assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
    origin.got_nothing_more();
}

// --- uploads ------------------------------------------------------------------------------------------------

/// Reads so much of an upload's body, tells, and resets; whatever it is asked for after that is answered.
fn resets_uploads(after_bytes: usize) -> (Origin, Receiver<()>) {
    let (tell, told) = channel();
    let first = Mutex::new(Some(tell));
    let origin = Origin::scripted(move |conn| {
        let tell: Option<Sender<()>> = first.lock().expect("lock").take();
        if let Some(tell) = tell {
            conn.head().expect("the edge sends");
            while conn.unread.len() < after_bytes {
                conn.more().expect("the edge sends more");
            }
            reset(conn);
            tell.send(()).expect("the test listens");
            return;
        }
        while let Some(seen) = conn.request() {
            conn.answer(&format!("{} bytes", seen.body.len()));
        }
    });
    (origin, told)
}

#[test]
fn an_upload_that_is_reset_half_way_is_told_once_and_not_sent_again() {
    const WHOLE: usize = 16_000_000;
    for (method, framing) in [("POST", "sized"), ("POST", "chunked"), ("PUT", "sized"), ("PUT", "chunked")] {
        let (origin, told) = resets_uploads(WHOLE / 40);
        let edge = TestEdge::start(service(vec![upstream(origin.addr)]));
        let mut client = edge.client();
        let head = match framing {
            "sized" => format!("Content-Length: {WHOLE}"),
            _ => "Transfer-Encoding: chunked".to_owned(),
        };
        client.send(format!("{method} / HTTP/1.1\r\nHost: a.test\r\n{head}\r\n\r\n"));
        let piece = vec![b'x'; 40_000];
        let piece = match framing {
            "sized" => piece,
            _ => [format!("{:x}\r\n", piece.len()).as_bytes(), &piece, b"\r\n"].concat(),
        };
        for _ in 0..WHOLE / 40_000 / 8 {
            client.send(&piece);
        }
        told.recv_timeout(PATIENCE).expect("some of it comes");
        // The client goes on while its answer is under way; the edge may refuse to take the rest.
        let mut writer = client.socket.try_clone().expect("another handle");
        let sending = std::thread::spawn(move || {
            use std::io::Write;
            let _left = (0..WHOLE / 40_000 * 7 / 8).find(|_| writer.write_all(&piece).is_err());
        });
        let answer = client.answer();
        assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"), "{method}, {framing}");
        assert_eq!(answer.field("connection"), Some("close"), "{method}, {framing}: nobody wants the rest");
        sending.join().expect("no panic");
        assert_eq!((origin.connections(), origin.seen().len()), (1, 0), "{method}, {framing}: not again");
    }
}

#[test]
fn a_small_idempotent_upload_that_is_reset_half_way_is_sent_again_as_a_whole_and_a_post_is_not() {
    for method in ["PUT", "POST"] {
        let (origin, told) = resets_uploads(5);
        let edge = TestEdge::start(service(vec![upstream(origin.addr)]));
        let mut client = edge.client();
        client.send(format!("{method} / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 10\r\n\r\nhello"));
        told.recv_timeout(PATIENCE).expect("half of it comes");
        client.send_anyhow("world");
        let answer = client.answer();
        if method == "PUT" {
            assert_eq!((answer.status, answer.text()), (200, "10 bytes"));
            assert_eq!(origin.last().body, b"helloworld");
        } else {
            assert_eq!((answer.status, answer.reason()), (502, "upstream_reset"));
            assert_eq!((origin.connections(), origin.seen().len()), (1, 0));
        }
    }
}

// --- HTTP/2 upstreams under load ----------------------------------------------------------------------------

/// Clients that each send so many requests, one after the other, every second one a POST; what came back.
fn load(edge: SocketAddr, clients: usize, requests: usize) -> Vec<std::thread::JoinHandle<Vec<String>>> {
    let client = move |number: usize| {
        let mut client = Client::connect(edge);
        let mut answers = Vec::new();
        for request in 0..requests {
            let id = format!("{number}-{request}");
            // The origin reads no fields, so the body is the name; a GET may have one (RFC 9110 §9.3.1).
            let method = if request % 2 == 0 { "POST" } else { "GET" };
            let length = id.len();
            client
                .send(format!("{method} / HTTP/1.1\r\nHost: a.test\r\nContent-Length: {length}\r\n\r\n{id}"));
            let answer = client.answer();
            answers.push(format!("{} {}", answer.status, answer.text()));
        }
        answers
    };
    (0..clients).map(|number| std::thread::spawn(move || client(number))).collect()
}

/// Every client has 200 for every request, and every request was executed once.
fn assert_executed_once(
    load: Vec<std::thread::JoinHandle<Vec<String>>>,
    executed: &mut Vec<String>,
    requests: usize,
) {
    let mut sent = Vec::new();
    for (number, client) in load.into_iter().enumerate() {
        let answers = client.join().expect("no client panics");
        for (request, answer) in answers.iter().enumerate() {
            assert_eq!(*answer, format!("200 {number}-{request}"));
            sent.push(format!("{number}-{request}"));
        }
        assert_eq!(answers.len(), requests);
    }
    sent.sort();
    executed.sort();
    assert_eq!(*executed, sent);
}

#[test]
fn a_goaway_that_names_no_stream_under_load_is_not_noticed_and_nothing_is_executed_twice() {
    const CLIENTS: usize = 60;
    const ROUNDS: usize = 10;
    let origin = frames::Origin::start();
    let spec = h2c(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let load = load(edge.addr, CLIENTS, ROUNDS);
    let (mut executed, mut last_streams) = (Vec::new(), HashMap::new());
    let mut left = HashSet::new();
    for _ in 0..ROUNDS {
        // All of them are under way, and none is executed: many more than the budget of retries has saved.
        let refused = next_on_others(&origin, CLIENTS, &left);
        leave(&origin, &refused, &last_streams, &mut left);
        let again = next_on_others(&origin, CLIENTS, &left);
        let [before, after] = [&refused, &again].map(|round| {
            let mut ids: Vec<_> = round.iter().map(|got| String::from_utf8_lossy(&got.data)).collect();
            ids.sort();
            ids
        });
        assert_eq!(before, after, "each comes again, as a whole");
        for got in &again {
            executed.push(String::from_utf8(got.data.clone()).expect("text"));
            last_streams.insert(got.conn, got.stream);
            origin.answer(got, executed.last().expect("was pushed"));
        }
    }
    assert_executed_once(load, &mut executed, ROUNDS);
    let upstream = edge.upstream(&spec);
    assert_eq!(
        (upstream.outcomes().failed, upstream.ejected_until_ms()),
        (0, 0),
        "it has done nothing wrong"
    );
}

/// "I have processed none of these", on every connection that has one: GOAWAY(0), if it never processed any.
fn leave(
    origin: &frames::Origin,
    under_way: &[frames::Got],
    last_streams: &HashMap<usize, u32>,
    left: &mut HashSet<usize>,
) {
    for conn in under_way.iter().map(|got| got.conn) {
        if left.insert(conn) {
            origin.go_away(conn, last_streams.get(&conn).copied().unwrap_or(0));
        }
    }
}

/// The next requests, but for those on connections that the origin has left: what meets a GOAWAY is not processed.
fn next_on_others(origin: &frames::Origin, count: usize, left: &HashSet<usize>) -> Vec<frames::Got> {
    let mut found = Vec::new();
    while found.len() < count {
        found.extend(Some(origin.request()).filter(|got| !left.contains(&got.conn)));
    }
    found
}

#[test]
fn a_limit_of_streams_that_falls_to_one_under_load_delays_and_fails_nobody() {
    const CLIENTS: usize = 30;
    const REQUESTS: usize = 40;
    let origin = frames::Origin::start();
    let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
    let load = load(edge.addr, CLIENTS, REQUESTS);
    let (mut executed, mut fallen_at) = (Vec::new(), None);
    let mut under_way: Vec<frames::Got> = Vec::new();
    let begun = std::time::Instant::now();
    while !load.iter().all(std::thread::JoinHandle::is_finished) {
        assert!(begun.elapsed() < 3 * PATIENCE, "it stands still after {} answers", executed.len());
        let wait = if under_way.is_empty() { PATIENCE / 100 } else { Duration::from_millis(2) };
        match origin.request_within(wait) {
            Some(got) => under_way.push(got),
            None if under_way.is_empty() => continue,
            None => {}
        }
        // In the middle, with all of them on one connection.
        if fallen_at.is_none() && executed.len() > CLIENTS * REQUESTS / 4 && under_way.len() >= CLIENTS / 2 {
            origin.allow_streams(1);
            fallen_at = Some(executed.len());
        }
        // A few at a time, so that some are always under way.
        if fallen_at.is_some() || under_way.len() >= CLIENTS / 2 || executed.len() % 2 == 0 {
            let got = under_way.remove(0);
            executed.push(String::from_utf8(got.data.clone()).expect("text"));
            origin.answer(&got, executed.last().expect("was pushed"));
        }
    }
    let at = fallen_at.expect("it fell in the middle");
    assert!(executed.len() - at > CLIENTS * REQUESTS / 2, "the greater part came after it");
    assert_executed_once(load, &mut executed, REQUESTS);
}

// --- answers that break off ---------------------------------------------------------------------------------

/// What an origin has begun an answer with when it resets the connection.
#[derive(Clone, Copy, Debug)]
enum Begun {
    Length,
    Chunked,
    UntilClose,
    Http2,
    Http2Closed,
}

/// An edge in front of an origin that has begun an answer.
struct BreaksOff {
    edge: TestEdge,
    break_off: Box<dyn FnOnce()>,
    /// How many requests the origin has had.
    requests: Box<dyn Fn() -> usize>,
}

/// An origin that begins an answer so, and breaks off when it is told to.
fn breaks_off(begun: Begun) -> BreaksOff {
    let start: &[u8] = match begun {
        Begun::Length => b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        Begun::Chunked => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        Begun::UntilClose => b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
        Begun::Http2 | Begun::Http2Closed => {
            let origin = frames::Origin::start();
            let edge = TestEdge::start(service(vec![h2c(origin.addr)]));
            let origin = Arc::new(Mutex::new(origin));
            let (here, seen) = (Arc::clone(&origin), Arc::<Mutex<usize>>::default());
            let count = Arc::clone(&seen);
            let (go, told) = channel::<()>();
            std::thread::spawn(move || {
                let origin = here.lock().expect("lock");
                let got = origin.request();
                *count.lock().expect("lock") += 1;
                origin.answer_in_part(&got, "hello");
                told.recv_timeout(PATIENCE).expect("the test goes on");
                match begun {
                    Begun::Http2 => origin.reset_stream(&got, INTERNAL_ERROR),
                    _ => origin.close(got.conn),
                }
                while origin.request_within(Duration::from_millis(300)).is_some() {
                    *count.lock().expect("lock") += 1;
                }
            });
            let requests = move || {
                drop(origin.lock().expect("lock")); // it has looked for more
                *seen.lock().expect("lock")
            };
            let break_off = Box::new(move || go.send(()).expect("it listens"));
            return BreaksOff { edge, break_off, requests: Box::new(requests) };
        }
    };
    let (go, told) = channel::<()>();
    let told = Mutex::new(told);
    let origin = Origin::scripted(move |conn| {
        let Some(_) = conn.request() else { return };
        conn.write(start);
        told.lock().expect("lock").recv_timeout(PATIENCE).expect("the test goes on");
        reset(conn);
    });
    let edge = TestEdge::before(&origin);
    let requests = move || origin.seen().len();
    let break_off = Box::new(move || go.send(()).expect("it listens"));
    BreaksOff { edge, break_off, requests: Box::new(requests) }
}

const EVERY_BEGINNING: [Begun; 5] =
    [Begun::Length, Begun::Chunked, Begun::UntilClose, Begun::Http2, Begun::Http2Closed];

#[test]
fn an_answer_that_is_reset_after_its_head_never_looks_whole_over_http1_and_is_not_asked_for_again() {
    for begun in EVERY_BEGINNING {
        let BreaksOff { edge, break_off, requests } = breaks_off(begun);
        let mut client = edge.client();
        client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
        let head = client.head();
        assert!(head.starts_with("HTTP/1.1 200"), "{begun:?}: {head}");
        let length = head.to_ascii_lowercase().contains("content-length: 10");
        assert_eq!(length, matches!(begun, Begun::Length), "{begun:?}: {head}");
        assert!(length || head.to_ascii_lowercase().contains("transfer-encoding: chunked"), "{head}");
        while !client.unread.ends_with(if length { b"hello" } else { b"hello\r\n" }) {
            assert!(client.more() > 0, "{begun:?}: what has come is passed on");
        }
        break_off();
        while client.more() > 0 {}
        let body = String::from_utf8_lossy(&client.unread).into_owned();
        assert!(!body.contains("0\r\n\r\n"), "{begun:?}: it looks whole: {body:?}");
        assert_eq!(requests(), 1, "{begun:?}");
    }
}

#[test]
fn an_answer_that_is_reset_after_its_head_never_looks_whole_over_http2_and_the_connection_goes_on() {
    for begun in EVERY_BEGINNING {
        let BreaksOff { edge, break_off, requests } = breaks_off(begun);
        block_on(async {
            let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
            let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
            let (mut sender, conn) = handshake.await.expect("handshake");
            tokio::spawn(conn);
            let get = || http::Request::get("http://a.test/").body(Empty::<Bytes>::new()).expect("request");
            let mut body = sender.send_request(get()).await.expect("a head").into_body();
            let first = body.frame().await.expect("a frame").expect("is whole");
            assert_eq!(first.into_data().expect("data"), "hello", "{begun:?}");
            break_off();
            let error = loop {
                match body.frame().await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break error,
                    None => panic!("{begun:?}: it looks whole"),
                }
            };
            let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<h2::Error>());
            assert!(cause.is_some_and(h2::Error::is_reset), "{begun:?}: the stream alone ends: {error:?}");
            assert_eq!(requests(), 1, "{begun:?}");
            // Nobody answers any more, which is another matter: the connection does.
            sender.ready().await.unwrap_or_else(|why| panic!("{begun:?}: the connection went too: {why}"));
        });
    }
}

#[test]
fn an_answer_that_is_reset_after_its_head_is_counted_as_a_failure_of_its_upstream() {
    let origin = Origin::scripted(|conn| {
        let Some(_) = conn.request() else { return };
        conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello");
        reset(conn);
    });
    let (edge, upstream) = TestEdge::with_upstream(&origin);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    while client.more() > 0 {}
    until("the lease is back", || upstream.in_flight() == 0);
    assert_eq!(upstream.outcomes().failed, 1, "{:?}", upstream.outcomes());
}
