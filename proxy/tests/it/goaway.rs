//! GOAWAY from an upstream (RFC 9113 §6.8): streams above the last one that it names were not processed and are sent
//! again, once and with any method; the others end as the upstream lets them, and are never sent again.

use super::frames::{Got, Origin};
use super::support::{Client, TestEdge, h2c, service, until};

/// The first of two GOAWAYs of a polite upstream: nothing new, everything that is under way.
const EVERY_STREAM: u32 = (1 << 31) - 1;

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
    origin.got_nothing_more();
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
    origin.got_nothing_more();
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
    origin.got_nothing_more();
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
    origin.got_nothing_more();
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
    origin.got_nothing_more();
}
