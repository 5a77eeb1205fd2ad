//! One service's changes are none of another's business.

use peregrine_routing::{Change, HostPattern, RouteSpec, ServiceSpec, TrafficClass, UpstreamSpec};

use super::support::{Client, Origin, TestEdge, config, dead_address, service, until, upstream};

fn of_host(host: &str, upstreams: Vec<UpstreamSpec>) -> ServiceSpec {
    ServiceSpec {
        name: host.into(),
        routes: vec![RouteSpec { host: HostPattern::Exact(host.into()), path_prefix: "/".into() }],
        ..service(upstreams)
    }
}

/// Tunnels on `/ws`, a stream of events that never ends on `/events`, "ok" on everything else.
fn everything() -> Origin {
    Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            if seen.line().contains("/ws") {
                conn.write(
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
                );
                while conn.more().is_some() {
                    let bytes = std::mem::take(&mut conn.unread);
                    conn.write(&bytes);
                }
            } else if seen.line().contains("/events") {
                conn.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n");
            } else {
                conn.answer("ok");
            }
        }
    })
}

fn ask(edge: &TestEdge, path: &str, more: &str) -> Client {
    let mut client = edge.client();
    client.send(format!("GET {path} HTTP/1.1\r\nHost: quiet.test\r\n{more}\r\n"));
    client
}

#[test]
fn two_hundred_changes_of_other_services_close_and_forget_nothing_of_this_one() {
    let (origin, others) = (everything(), [Origin::ok(), Origin::ok()]);
    let (own, dead) = (upstream(origin.addr), upstream(dead_address()));
    let services =
        vec![of_host("quiet.test", vec![own.clone(), dead.clone()]), of_host("busy.test", Vec::new())];
    let mut edge = TestEdge::start_with(config(), services);
    let (inside, ejected) = (edge.upstream(&own), edge.upstream(&dead));

    let mut idle = edge.client();
    let get = |client: &mut Client| client.send("GET / HTTP/1.1\r\nHost: quiet.test\r\n\r\n").answer().status;
    until("the dead one is ejected", || {
        assert_eq!(get(&mut idle), 200);
        ejected.ejected_until_ms() > 0
    });
    let mut tunnels: Vec<Client> = (0..10)
        .map(|_| {
            let mut client = ask(&edge, "/ws", "Connection: Upgrade\r\nUpgrade: websocket\r\n");
            assert!(client.head().starts_with("HTTP/1.1 101"));
            client
        })
        .collect();
    let mut events: Vec<Client> = (0..10).map(|_| ask(&edge, "/events", "")).collect();
    for client in &mut events {
        assert!(client.head().starts_with("HTTP/1.1 200"));
    }
    assert_eq!(get(&mut idle), 200);
    let (connections, ejected_until_ms) = (origin.connections(), ejected.ejected_until_ms());

    for turn in 0..200 {
        let busy = of_host("busy.test", vec![upstream(others[turn % 2].addr)]);
        let passing: std::sync::Arc<str> = format!("passing-{}.test", turn / 2).into();
        let other = if turn % 2 == 0 {
            Change::Put(of_host(&passing, vec![upstream(others[0].addr)]))
        } else {
            Change::Remove(passing)
        };
        let version = edge.writer.apply(&[Change::Put(busy), other]).expect("is accepted").version;
        edge.wait_acknowledged(version);
        let mut client = edge.client();
        let answer = client.send("GET / HTTP/1.1\r\nHost: busy.test\r\n\r\n").answer();
        assert_eq!(answer.status, 200, "change {turn}");
    }

    // A frame as a client masks it, so that the tunnel stays at a border.
    let frame = [0x81, 0x82, 1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2];
    for tunnel in &mut tunnels {
        tunnel.send(frame);
        while tunnel.unread.len() < frame.len() {
            assert!(tunnel.more() > 0, "a tunnel was closed");
        }
        assert_eq!(tunnel.unread, frame);
    }
    let receipt = inside.receipt();
    assert_eq!(receipt.in_flight[TrafficClass::WebSocket], 10);
    assert_eq!(receipt.in_flight[TrafficClass::Sse], 10);
    assert_eq!((receipt.soft_closed.total(), receipt.hard_cut.len()), (0, 0));
    assert_eq!(ejected.ejected_until_ms(), ejected_until_ms, "its health is remembered");
    assert_eq!(get(&mut idle), 200, "the client's connection is open");
    assert_eq!(origin.connections(), connections, "and so is the one to its upstream");
}
