//! Rules of a service, asked before a request goes anywhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use peregrine_proxy::Config;
use peregrine_routing::{RateKey, RateLimit, Rules, ServiceSpec};

use super::support::{Origin, TestEdge, config, service, until, upstream};

pub(crate) fn ruled(origin: &Origin, rules: Rules) -> ServiceSpec {
    let mut web = service(vec![upstream(origin.addr)]);
    web.policy.rules = Some(Box::new(rules));
    web
}

fn a_minute(requests: u32, burst: u32, by: RateKey) -> Rules {
    Rules { rate: Some(RateLimit { requests, per_ms: 60_000, burst, by }), ..Rules::default() }
}

#[test]
fn who_is_not_allowed_or_denied_is_refused_and_the_origin_hears_nothing() {
    let origin = Origin::ok();
    let nets = |text: &str| vec![text.parse().expect("a network")];
    for (rules, status) in [
        (Rules { allow: nets("127.0.0.0/8"), ..Rules::default() }, 200),
        (Rules { allow: nets("10.0.0.0/8"), ..Rules::default() }, 403),
        (Rules { deny: nets("127.0.0.1"), ..Rules::default() }, 403),
        (Rules { allow: nets("127.0.0.0/8"), deny: nets("127.0.0.1"), ..Rules::default() }, 403),
        (Rules { deny: nets("127.0.0.2"), ..Rules::default() }, 200),
    ] {
        let (before, edge) = (origin.seen().len(), TestEdge::start(ruled(&origin, rules.clone())));
        let mut client = edge.client();
        for _ in 0..2 {
            let answer = client.get("/");
            assert_eq!(answer.status, status, "{rules:?}");
            assert_eq!(answer.reason(), if status == 200 { "-" } else { "address_denied" });
        }
        assert_eq!(origin.seen().len() - before, if status == 200 { 2 } else { 0 });
    }
}

#[test]
fn behind_a_trusted_proxy_the_client_is_judged_and_a_stranger_cannot_say_who_he_is() {
    let origin = Origin::ok();
    let rules = Rules { allow: vec!["198.51.100.0/24".parse().expect("a network")], ..Rules::default() };
    let request = |fields: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    let said = request("X-Forwarded-For: 198.51.100.7\r\n");
    let hidden = request("X-Forwarded-For: 198.51.100.7\r\nConnection: x-forwarded-for\r\n");
    let trusted = Config { trusted_proxies: vec!["127.0.0.1".parse().expect("a network")], ..config() };
    let edge = TestEdge::start_with(trusted, vec![ruled(&origin, rules.clone())]);
    assert_eq!(edge.client().send(&said).answer().status, 200);
    assert_eq!(edge.client().send(&hidden).answer().status, 200);
    assert_eq!(edge.client().send(request("")).answer().status, 403);
    for (fields, status) in [
        ("X-Forwarded-For: 198.51.100.7:4711\r\n", 200),
        ("Forwarded: for=\"198.51.100.7:4711\";proto=https\r\n", 200),
        ("Forwarded: for=198.51.100.7, for=203.0.113.1\r\n", 403),
    ] {
        assert_eq!(edge.client().send(request(fields)).answer().status, status, "{fields}");
    }
    let edge = TestEdge::start(ruled(&origin, rules));
    assert_eq!(edge.client().send(&said).answer().status, 403);
}

#[test]
fn a_client_whom_a_trusted_proxy_does_not_name_is_not_taken_for_the_proxy() {
    let origin = Origin::ok();
    let inside = Rules { allow: vec!["127.0.0.0/8".parse().expect("a network")], ..Rules::default() };
    let trusted = Config { trusted_proxies: vec!["127.0.0.1".parse().expect("a network")], ..config() };
    let edge = TestEdge::start_with(trusted, vec![ruled(&origin, inside)]);
    for fields in
        ["X-Forwarded-For: unknown", "X-Forwarded-For: 127.0.0.2, x", "Forwarded: for=_hidden;by=127.0.0.1"]
    {
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
        assert_eq!(edge.client().send(request).answer().status, 403, "{fields}");
    }
    assert!(origin.seen().is_empty());
    assert_eq!(edge.client().get("/").status, 200, "the proxy's own request");
}

#[test]
fn a_client_whom_a_trusted_proxy_does_not_name_may_be_who_is_denied() {
    let origin = Origin::ok();
    let outside = Rules { deny: vec!["198.51.100.0/24".parse().expect("a network")], ..Rules::default() };
    let trusted = Config { trusted_proxies: vec!["127.0.0.1".parse().expect("a network")], ..config() };
    let edge = TestEdge::start_with(trusted, vec![ruled(&origin, outside)]);
    for fields in ["X-Forwarded-For: 198.51.100.7, x", "X-Forwarded-For: unknown", "Forwarded: for=_hidden"] {
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
        let answer = edge.client().send(request).answer();
        assert_eq!((answer.status, answer.reason()), (403, "address_denied"), "{fields}");
    }
    assert!(origin.seen().is_empty());
    let named = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n";
    assert_eq!(edge.client().send(named).answer().status, 200);
}

#[test]
fn above_its_rate_a_client_is_told_when_to_come_back_also_on_another_connection_and_core() {
    let origin = Origin::ok();
    let web = ruled(&origin, a_minute(6, 3, RateKey::ClientAddress));
    let edge = TestEdge::start_with(Config { cores: 2, ..config() }, vec![web]);
    let mut served = 0;
    for _ in 0..12 {
        let mut client = edge.client();
        let answer = client.get("/");
        match answer.status {
            200 => served += 1,
            429 => {
                assert_eq!(answer.reason(), "rate_limited");
                let wait: u32 = answer.field("retry-after").expect("is said").parse().expect("seconds");
                assert!((1..=10).contains(&wait), "{wait}");
                assert_eq!(client.get("/").status, 429, "the connection goes on");
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!((served, origin.seen().len()), (3, 3));
}

#[test]
fn requests_are_counted_by_a_header_or_a_cookie_and_without_it_by_the_address() {
    let origin = Origin::ok();
    for (by, field) in [
        (RateKey::Header("x-api-key".into()), "X-Api-Key: "),
        (RateKey::Cookie("s".into()), "Cookie: a=b; s="),
    ] {
        let edge = TestEdge::start(ruled(&origin, a_minute(1, 2, by)));
        let ask = |fields: &str| {
            edge.client().send(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).answer().status
        };
        for key in ["one", "two"] {
            let fields = format!("{field}{key}\r\n");
            assert_eq!([ask(&fields), ask(&fields), ask(&fields)], [200, 200, 429], "{field}{key}");
        }
        assert_eq!([ask(""), ask(""), ask("")], [200, 200, 429], "who leaves it out is one client");
    }
}

#[test]
fn a_change_of_the_table_keeps_what_was_used_up() {
    let origin = Origin::ok();
    let web = ruled(&origin, a_minute(1, 2, RateKey::ClientAddress));
    let mut edge = TestEdge::start(web.clone());
    assert_eq!([edge.client().get("/").status, edge.client().get("/").status], [200, 200]);
    let version = edge.put(web.clone());
    edge.wait_acknowledged(version);
    assert_eq!(edge.client().get("/").status, 429);
    let mut free = web;
    free.policy.rules = None;
    let version = edge.put(free);
    edge.wait_acknowledged(version);
    assert_eq!(edge.client().get("/").status, 200);
}

#[test]
fn above_its_requests_in_flight_a_service_is_busy_and_another_is_not() {
    let go_on = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&go_on);
    let origin = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            until("it may answer", || may.load(Ordering::SeqCst));
            conn.answer("ok");
        }
    });
    let free = Origin::ok();
    let mut other = service(vec![upstream(free.addr)]);
    (other.name, other.routes[0].path_prefix) = ("other".into(), "/other".into());
    let web = ruled(&origin, Rules { max_in_flight: 2, ..Rules::default() });
    let edge = TestEdge::start_with(config(), vec![web, other]);
    let mut waiting = [edge.client(), edge.client()];
    for client in &mut waiting {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    until("both are in flight", || origin.seen().len() == 2);
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (503, "service_busy"));
    assert!(answer.field("retry-after").is_some());
    assert_eq!(edge.client().get("/other").status, 200);
    go_on.store(true, Ordering::SeqCst);
    for client in &mut waiting {
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(edge.client().get("/").status, 200);
}
