//! Probes, ejection, panic and slow start.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use peregrine_routing::{Health, HealthCheck, HealthCheckKind};

use super::support::{Origin, TestEdge, dead_address, service, until, upstream};

fn check(kind: HealthCheckKind) -> HealthCheck {
    HealthCheck { kind, interval_ms: 20, timeout_ms: 500, healthy_threshold: 2, unhealthy_threshold: 3 }
}

fn http(path: &str) -> HealthCheckKind {
    HealthCheckKind::Http { path: path.into(), host: Some("probe.test".into()) }
}

/// An origin whose health can be switched.
fn switchable(healthy: &Arc<AtomicBool>) -> Origin {
    let healthy = Arc::clone(healthy);
    Origin::scripted(move |conn| {
        while let Some(seen) = conn.request() {
            if seen.line().starts_with("GET /healthz ") && !healthy.load(Ordering::SeqCst) {
                conn.write(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
            } else {
                conn.answer("ok");
            }
        }
    })
}

#[test]
fn probes_find_out_what_is_healthy_and_measure_it() {
    let healthy = Arc::new(AtomicBool::new(true));
    let origin = switchable(&healthy);
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    web.policy.health = Some(check(http("/healthz")));
    let edge = TestEdge::start(web);
    let upstream = edge.upstream(&spec);
    until("it is healthy", || upstream.health() == Health::Healthy);
    assert!(upstream.probe_latency_us() > 0);
    assert_eq!(origin.last().all("host"), ["probe.test"]);
    assert_eq!(origin.last().all("user-agent"), ["peregrine-probe"]);
    healthy.store(false, Ordering::SeqCst);
    until("it is unhealthy", || upstream.health() == Health::Unhealthy);
    healthy.store(true, Ordering::SeqCst);
    until("it is healthy again", || upstream.health() == Health::Healthy);
    assert_eq!(upstream.receipt().started, 0, "probes are no requests");
}

#[test]
fn an_unhealthy_copy_gets_nothing_unless_all_are() {
    let (good, bad) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let (one, two) = (switchable(&good), switchable(&bad));
    let specs = vec![upstream(one.addr), upstream(two.addr)];
    let mut web = service(specs.clone());
    web.policy.health = Some(check(http("/healthz")));
    let edge = TestEdge::start(web);
    let (first, second) = (edge.upstream(&specs[0]), edge.upstream(&specs[1]));
    until("both are known", || first.health() == Health::Healthy && second.health() == Health::Unhealthy);
    let mut client = edge.client();
    for _ in 0..30 {
        assert_eq!(client.get("/").status, 200);
    }
    assert_eq!(second.receipt().started, 0);
    good.store(false, Ordering::SeqCst);
    until("none is healthy", || first.health() == Health::Unhealthy);
    assert_eq!(client.get("/").status, 200, "the panic rule: a bad copy is better than none");
}

#[test]
fn tcp_probes_need_nothing_but_a_listener() {
    let origin = Origin::ok();
    let specs = vec![upstream(origin.addr), upstream(dead_address())];
    let mut web = service(specs.clone());
    web.policy.health = Some(check(HealthCheckKind::Tcp));
    let edge = TestEdge::start(web);
    until("both are known", || {
        edge.upstream(&specs[0]).health() == Health::Healthy
            && edge.upstream(&specs[1]).health() == Health::Unhealthy
    });
}

#[test]
fn probes_follow_the_table() {
    let probes = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&probes);
    let origin = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            count.fetch_add(1, Ordering::SeqCst);
            conn.answer("ok");
        }
    });
    let spec = upstream(origin.addr);
    let mut web = service(vec![spec.clone()]);
    let mut edge = TestEdge::start(web.clone());
    let retired = edge.upstream(&spec);
    assert_eq!(retired.health(), Health::Unknown);
    web.policy.health = Some(check(http("/")));
    edge.put(web.clone());
    until("the check is taken up", || retired.health() == Health::Healthy);
    let next = upstream(origin.addr);
    web.pools[0].upstreams = vec![next.clone()];
    edge.put(web);
    let next = edge.upstream(&next);
    until("the new one is probed", || next.health() == Health::Healthy);
    let latency = retired.probe_latency_us();
    let now = probes.load(Ordering::SeqCst);
    until("more probes have come", || probes.load(Ordering::SeqCst) > now + 3);
    assert_eq!(retired.probe_latency_us(), latency, "a retired one is left alone");
}

#[test]
fn a_copy_that_answers_503_is_ejected_and_comes_back() {
    let failing = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&failing);
    let sick = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            if state.load(Ordering::SeqCst) {
                conn.write(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
            } else {
                conn.answer("back");
            }
        }
    });
    let well = Origin::saying("well");
    let specs = vec![upstream(sick.addr), upstream(well.addr)];
    let mut web = service(specs.clone());
    web.policy.passive.base_ejection_ms = 300;
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    until("it is ejected", || {
        client.get("/");
        edge.upstream(&specs[0]).ejected_until_ms() > 0
    });
    let seen = sick.seen().len();
    for _ in 0..10 {
        assert_eq!(client.get("/").text(), "well");
    }
    assert_eq!(sick.seen().len(), seen);
    failing.store(false, Ordering::SeqCst);
    until("it is back", || client.get("/").text() == "back");
}

#[test]
fn a_copy_that_comes_back_gets_its_share_slowly() {
    let healthy = Arc::new(AtomicBool::new(false));
    let (fresh, old) = (switchable(&healthy), Origin::ok());
    let specs = vec![upstream(fresh.addr), upstream(old.addr)];
    let mut web = service(specs.clone());
    web.policy.health = Some(check(http("/healthz")));
    web.policy.slow_start_ms = 3_600_000;
    let edge = TestEdge::start(web);
    let (first, second) = (edge.upstream(&specs[0]), edge.upstream(&specs[1]));
    until("both are known", || first.health() == Health::Unhealthy && second.health() == Health::Healthy);
    // The old one's slow start is over: it never was away.
    healthy.store(true, Ordering::SeqCst);
    until("it is back", || first.health() == Health::Healthy);
    let mut client = edge.client();
    for _ in 0..300 {
        client.get("/");
    }
    let (started, rest) = (first.receipt().started, second.receipt().started);
    assert!(started > 0 && rest > 0, "{started} and {rest}: both in their slow start share what there is");
}
