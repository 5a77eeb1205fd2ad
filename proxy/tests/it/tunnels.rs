//! Upgraded connections.

use std::io::{Read, Write};

use peregrine_routing::TrafficClass;

use super::support::{Client, Origin, OriginConn, TestEdge, service, until, upstream};

const ASK: &str = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
const SWITCH: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

fn echo(conn: &mut OriginConn) {
    let Some(seen) = conn.request() else { return };
    assert_eq!(seen.all("upgrade"), ["websocket"]);
    assert_eq!(seen.all("connection"), ["upgrade"]);
    // What is sent with the head must arrive as well.
    conn.write(&[SWITCH, b"early"].concat());
    let mut chunk = [0; 4096];
    while let Ok(read) = conn.socket.read(&mut chunk) {
        if read == 0 || conn.socket.write_all(&chunk[..read]).is_err() {
            return;
        }
    }
}

fn expect_bytes(client: &mut Client, bytes: &[u8]) {
    while client.unread.len() < bytes.len() {
        assert!(client.more() > 0, "closed");
    }
    assert_eq!(client.unread.drain(..bytes.len()).collect::<Vec<_>>(), bytes);
}

#[test]
fn a_tunnel_echoes_is_counted_and_ends_with_its_client() {
    let origin = Origin::scripted(echo);
    let spec = upstream(origin.addr);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let mut client = edge.client();
    let head = client.send(ASK).head();
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    assert!(head.to_ascii_lowercase().contains("upgrade: websocket"), "{head}");
    expect_bytes(&mut client, b"early");
    let upstream = edge.upstream(&spec);
    assert_eq!(upstream.receipt().in_flight[TrafficClass::WebSocket], 1);
    for round in 0..50_u32 {
        let message = round.to_le_bytes().repeat(1_000);
        client.send(&message);
        expect_bytes(&mut client, &message);
    }
    drop(client);
    until("the tunnel has ended", || upstream.in_flight() == 0);
    let receipt = upstream.receipt();
    assert_eq!(receipt.completed[TrafficClass::WebSocket], 1);
    assert_eq!((receipt.bytes_to_upstream, receipt.bytes_to_client), (200_000, 200_005));
}

#[test]
fn bytes_that_come_with_the_request_wait_for_the_switch() {
    let origin = Origin::scripted(echo);
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    client.send(format!("{ASK}first"));
    client.head();
    expect_bytes(&mut client, b"earlyfirst");
}

#[test]
fn an_upgrade_that_is_refused_is_an_answer_like_any_other() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    assert_eq!(client.send(ASK).answer().text(), "ok");
    assert_eq!(client.get("/").text(), "ok", "and the connection goes on");
}

#[test]
fn a_switch_that_nobody_asked_for_is_a_bad_gateway() {
    let origin = Origin::scripted(|conn| {
        conn.request();
        conn.write(SWITCH);
        while conn.more().is_some() {}
    });
    let edge = TestEdge::before(&origin);
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (502, "upstream_protocol"));
}

#[test]
fn a_silent_tunnel_ends_when_its_time_is_over() {
    let origin = Origin::scripted(echo);
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.tunnel_idle_timeout_ms = 300;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    client.send(ASK).head();
    expect_bytes(&mut client, b"early");
    assert!(client.is_closed());
    until("the lease is back", || edge.upstream(&spec).in_flight() == 0);
}

#[test]
fn a_tunnel_ends_when_its_upstream_is_cut_and_the_receipt_names_it() {
    let origin = Origin::scripted(echo);
    let spec = upstream(origin.addr);
    let mut edge = TestEdge::start(service(vec![spec.clone()]));
    let mut client = edge.client();
    client.send(ASK.replace("Host: a", "Host: a\r\nX-Request-Id: tunnel-7")).head();
    expect_bytes(&mut client, b"early");
    let upstream = edge.upstream(&spec);
    let version = edge.put(service(vec![super::support::upstream(origin.addr)]));
    edge.wait_acknowledged(version);
    client.send("still there");
    expect_bytes(&mut client, b"still there");
    upstream.cut();
    assert!(client.is_closed());
    until("it is empty", || upstream.is_empty());
    assert_eq!(upstream.receipt().hard_cut, ["tunnel-7"]);
}
