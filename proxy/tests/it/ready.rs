//! Connections that are opened ahead of the first request.

use std::sync::{Arc, Barrier, Mutex, mpsc};

use peregrine_routing::{ServiceSpec, Upstream, UpstreamSpec};

use super::support::{Origin, TestEdge, dead_address, h2c, service, until, upstream};

fn ready(count: u16, spec: UpstreamSpec) -> UpstreamSpec {
    UpstreamSpec { ready_connections: count, ..spec }
}

/// A service with a copy that gets no traffic yet.
fn warming(serving: UpstreamSpec, new: UpstreamSpec) -> ServiceSpec {
    let mut web = service(vec![serving]);
    let mut pool = web.pools[0].clone();
    (pool.name, pool.weight, pool.upstreams) = ("new".into(), 0, vec![new]);
    web.pools.push(pool);
    web
}

fn until_ready(upstream: &Upstream, count: u64) {
    until("the connections are counted", || upstream.ready_connections() == count);
}

#[test]
fn the_origin_sees_the_connections_before_the_first_request_which_opens_none() {
    let (serving, new) = (Origin::saying("old"), Origin::saying("new"));
    let (old, copy) = (upstream(serving.addr), upstream(new.addr));
    let mut edge = TestEdge::before(&serving);
    edge.put(warming(old, ready(3, copy.clone())));
    let upstream = edge.upstream(&copy);
    until_ready(&upstream, 3);
    until("the origin sees them", || new.connections() == 3);
    assert_eq!((edge.client().get("/").text(), new.seen().len()), ("old", 0));
    edge.put(service(vec![copy]));
    let mut client = edge.client();
    assert_eq!(client.get("/").text(), "new");
    assert_eq!((new.connections(), upstream.ready_connections()), (3, 2));
    assert_eq!(client.get("/").text(), "new");
    assert_eq!(
        (new.connections(), upstream.ready_connections()),
        (3, 2),
        "what was used is used again first"
    );
}

#[test]
fn as_many_requests_at_a_time_as_there_are_connections_open_none() {
    let together = Arc::new(Barrier::new(3));
    let origin = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            together.wait();
            conn.answer("ok");
        }
    });
    let copy = ready(3, upstream(origin.addr));
    let edge = TestEdge::start(service(vec![copy.clone()]));
    until_ready(&edge.upstream(&copy), 3);
    let mut clients: Vec<_> = (0..3).map(|_| edge.client()).collect();
    for client in &mut clients {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    for client in &mut clients {
        assert_eq!(client.answer().text(), "ok");
    }
    assert_eq!((origin.connections(), edge.upstream(&copy).ready_connections()), (3, 0));
}

#[test]
fn an_http2_connection_stands_for_all_that_were_asked_for() {
    let origin = Origin::scripted(|conn| while conn.more().is_some() {});
    let copy = ready(5, h2c(origin.addr));
    let edge = TestEdge::start(service(vec![copy.clone()]));
    until_ready(&edge.upstream(&copy), 5);
    until("the origin sees it", || origin.connections() == 1);
    let mut client = edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    until_ready(&edge.upstream(&copy), 0);
    assert_eq!(origin.connections(), 1, "the request is on it");
}

#[test]
fn what_was_used_up_is_opened_again_when_the_table_asks_again_and_not_before() {
    let (serving, new) = (Origin::ok(), Origin::scripted(|conn| drop(conn.head())));
    let (old, copy) = (upstream(serving.addr), upstream(new.addr));
    // Closes when it is told to, and each further one when the test is over.
    let (close, closes) = mpsc::channel::<()>();
    let closes = Mutex::new(closes);
    let closing = Origin::scripted(move |_| {
        let _told = closes.lock().expect("no panic").recv();
    });
    let spare = upstream(closing.addr);
    let mut web = warming(old, ready(2, copy.clone()));
    web.pools[1].upstreams.push(ready(1, spare.clone()));
    let mut edge = TestEdge::start(web.clone());
    until("both were connected to", || new.connections() == 2 && closing.connections() == 1);
    // Counted before it closes: none would be 0, too, before it is counted at all.
    until_ready(&edge.upstream(&copy), 2);
    until_ready(&edge.upstream(&spare), 1);
    close.send(()).expect("it waits");
    until_ready(&edge.upstream(&spare), 0);
    for _ in 0..20 {
        assert_eq!(edge.client().get("/").text(), "ok");
    }
    assert_eq!(closing.connections(), 1, "nobody has asked again");
    web.pools[0].weight = 2;
    edge.put(web);
    until("it is connected to again", || closing.connections() == 2);
    assert_eq!((new.connections(), edge.upstream(&copy).ready_connections()), (2, 2), "they are still there");
}

#[test]
fn a_copy_that_cannot_be_reached_holds_nothing_up() {
    let serving = Origin::ok();
    let (old, copy) = (upstream(serving.addr), upstream(dead_address()));
    let mut edge = TestEdge::before(&serving);
    let version = edge.put(warming(old, ready(100, copy.clone())));
    edge.wait_acknowledged(version);
    assert_eq!(edge.client().get("/").text(), "ok");
    let copy = edge.upstream(&copy);
    assert_eq!((copy.ready_connections(), copy.is_usable(peregrine_proxy::now_ms())), (0, true));
}

#[test]
fn connections_to_a_copy_that_is_retired_before_its_first_request_are_closed() {
    let (serving, new) = (Origin::ok(), Origin::scripted(|conn| while conn.more().is_some() {}));
    let (old, copy) = (upstream(serving.addr), upstream(new.addr));
    let mut edge = TestEdge::start(warming(old.clone(), ready(2, copy.clone())));
    let retired = edge.upstream(&copy);
    until_ready(&retired, 2);
    let version = edge.put(service(vec![old]));
    edge.wait_acknowledged(version);
    assert_eq!(retired.ready_connections(), 0);
}

#[test]
fn every_core_opens_its_own() {
    let origin = Origin::ok();
    let copy = ready(2, upstream(origin.addr));
    let config = peregrine_proxy::Config { cores: 3, ..super::support::config() };
    let edge = TestEdge::start_with(config, vec![service(vec![copy.clone()])]);
    until_ready(&edge.upstream(&copy), 6);
    assert_eq!(edge.writer.edges(), 3);
    until("the origin sees them", || origin.connections() == 6);
}
