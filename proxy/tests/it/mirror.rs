//! Copies of requests: which are made, that no client notices, and that what is counted is what happened.

use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_routing::{MirrorCounts, MirrorSpec, ServiceSpec, Upstream, UpstreamSpec};

use super::support::{Origin, OriginConn, TestEdge, config, dead_address, h2c, service, until, upstream};

/// Everything that may be mirrored is, with no cap that matters.
fn all() -> MirrorSpec {
    MirrorSpec {
        pool: "new".into(),
        sample_permille: 1_000,
        max_requests_per_s: 100_000,
        max_concurrent: 1_000,
        timeout_ms: 5_000,
        max_body_bytes: 1 << 20,
        with_credentials: false,
        lasts_ms: 60_000,
    }
}

/// A service whose requests are mirrored to a copy that serves nobody.
fn mirroring(old: &UpstreamSpec, new: &UpstreamSpec, mirror: MirrorSpec) -> ServiceSpec {
    let mut web = service(vec![old.clone()]);
    let mut pool = web.pools[0].clone();
    (pool.name, pool.weight, pool.upstreams) = ("new".into(), 0, vec![new.clone()]);
    web.pools.push(pool);
    web.policy.mirror = Some(Box::new(mirror));
    web
}

/// An edge that mirrors from one origin to another.
struct World {
    edge: TestEdge,
    old: UpstreamSpec,
    new: UpstreamSpec,
    target: Arc<Upstream>,
}

impl World {
    fn new(old: &Origin, new: UpstreamSpec, mirror: MirrorSpec) -> Self {
        let old = upstream(old.addr);
        let edge = TestEdge::start(mirroring(&old, &new, mirror));
        let target = edge.upstream(&new);
        Self { edge, old, new, target }
    }

    fn between(old: &Origin, new: &Origin) -> Self {
        Self::new(old, upstream(new.addr), all())
    }

    fn counts(&self) -> MirrorCounts {
        self.target.mirrored()
    }

    /// Waits until that many copies have ended, one way or the other.
    fn ended(&self, count: u64) -> MirrorCounts {
        until("the copies have ended", || self.counts().judged() + self.counts().unfinished >= count);
        let counts = self.counts();
        assert_eq!(counts.judged() + counts.unfinished, count, "{counts:?}");
        counts
    }

    /// Takes the mirror out of the table, and waits until every core has said so.
    fn turn_off(&mut self) {
        let mut web = mirroring(&self.old, &self.new, all());
        web.policy.mirror = None;
        let version = self.edge.put(web);
        self.edge.wait_acknowledged(version);
    }
}

#[test]
fn a_copy_goes_to_the_new_one_as_the_request_went_to_the_old_one_with_a_mark() {
    let (old, new) = (Origin::saying("old"), Origin::saying("new"));
    let world = World::between(&old, &new);
    let mut client = world.edge.client();
    client.send("GET /a?b=c HTTP/1.1\r\nHost: a.test\r\nX-Own: 1\r\nX-Request-Id: r-1\r\n\r\n");
    assert_eq!(client.answer().text(), "old");
    let counts = world.ended(1);
    assert_eq!((counts.sent, counts.compared(), counts.unequal), (1, 1, 0));
    let (original, copy) = (old.last(), new.last());
    assert_eq!(copy.field("peregrine-mirror"), Some("1"));
    assert_eq!(original.field("peregrine-mirror"), None);
    let without_mark: Vec<_> = copy.head.lines().filter(|line| *line != "peregrine-mirror: 1").collect();
    assert_eq!(without_mark, original.head.lines().collect::<Vec<_>>());
    assert_eq!(copy.field("host"), Some("a.test"), "the same application expects the same host");
}

#[test]
fn only_safe_requests_whose_answer_depends_on_nothing_else_are_copied() {
    let (old, new) = (Origin::ok(), Origin::ok());
    let world = World::between(&old, &new);
    let mut client = world.edge.client();
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"] {
        client.send(format!("{method} /no HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0\r\n\r\n"));
        assert_eq!(client.answer().status, 200);
    }
    client.send("GET /no HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(client.answer().status, 200);
    for field in ["Range: bytes=0-1", "If-Range: \"x\"", "If-None-Match: \"x\"", "If-Match: \"x\""] {
        client.send(format!("GET /no HTTP/1.1\r\nHost: a.test\r\n{field}\r\n\r\n"));
        assert_eq!(client.answer().status, 200);
    }
    for field in ["Cookie: a=b", "Authorization: Basic eA=="] {
        client.send(format!("GET /no HTTP/1.1\r\nHost: a.test\r\n{field}\r\n\r\n"));
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(client.get("/yes").status, 200);
    client.send("HEAD /yes HTTP/1.1\r\nHost: a.test\r\n\r\n");
    assert_eq!(client.answer_to("HEAD").status, 200);
    let counts = world.ended(2);
    assert_eq!((counts.sent, counts.left_out, counts.skipped), (2, 2, 0));
    let seen: Vec<_> = new.seen().iter().map(|seen| seen.line().to_owned()).collect();
    assert!(seen.iter().all(|line| line.contains("/yes")) && seen.len() == 2, "{seen:?}");
}

#[test]
fn requests_with_credentials_are_copied_where_the_table_says_so() {
    let (old, new) = (Origin::ok(), Origin::ok());
    let world = World::new(&old, upstream(new.addr), MirrorSpec { with_credentials: true, ..all() });
    let mut client = world.edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\nCookie: a=b\r\n\r\n");
    assert_eq!(client.answer().status, 200);
    assert_eq!(world.ended(1).left_out, 0);
    assert_eq!(new.last().field("cookie"), Some("a=b"));
}

#[test]
fn whether_a_request_has_credentials_is_what_its_client_sent_whatever_rules_make_of_it() {
    use peregrine_routing::{HeaderEdits, Rules};
    let (old, new) = (Origin::ok(), Origin::ok());
    let mut web = mirroring(&upstream(old.addr), &upstream(new.addr), all());
    web.policy.rules = Some(Box::new(Rules {
        request_headers: HeaderEdits {
            remove: vec!["cookie".into()],
            set: vec![("authorization".into(), "Bearer own".into())],
            ..HeaderEdits::default()
        },
        ..Rules::default()
    }));
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    client.send("GET /signed-in HTTP/1.1\r\nHost: a.test\r\nCookie: a=b\r\n\r\n").answer();
    client.get("/anonymous");
    until("one is copied", || !new.seen().is_empty());
    assert_eq!(new.seen().len(), 1);
    assert!(new.last().line().contains("/anonymous"), "{}", new.last().head);
}

#[test]
fn the_mark_of_a_stranger_is_taken_off_and_a_copy_of_a_trusted_edge_is_not_copied_again() {
    let marked = "GET / HTTP/1.1\r\nHost: a.test\r\nPeregrine-Mirror: 1\r\nPeregrine_Mirror: 1\r\n\r\n";
    let (old, new) = (Origin::ok(), Origin::ok());
    let world = World::between(&old, &new);
    world.edge.client().send(marked).answer();
    world.ended(1);
    assert_eq!((old.last().field("peregrine-mirror"), old.last().field("peregrine_mirror")), (None, None));

    let trusting = peregrine_proxy::Config {
        trusted_proxies: vec!["127.0.0.0/8".parse().expect("a network")],
        ..config()
    };
    let (first, second) = (upstream(old.addr), upstream(new.addr));
    let edge = TestEdge::start_with(trusting, vec![mirroring(&first, &second, all())]);
    edge.client().send(marked).answer();
    assert_eq!(old.last().field("peregrine-mirror"), Some("1"));
    edge.client().get("/copied");
    let target = edge.upstream(&second);
    until("the other is copied", || target.mirrored().judged() == 1);
    assert_eq!(target.mirrored().sent, 1);
}

/// Ways for a copy to go wrong.
fn bad_targets() -> Vec<(&'static str, UpstreamSpec)> {
    let scripted = |script: fn(&mut OriginConn)| upstream(Origin::scripted(script).addr);
    vec![
        ("nobody listens", upstream(dead_address())),
        ("never answers", scripted(|conn| while conn.more().is_some() {})),
        ("hangs up", scripted(|conn| drop(conn.head()))),
        (
            "is no HTTP",
            scripted(|conn| {
                conn.head();
                conn.write(b"hello\r\n\r\n");
            }),
        ),
        (
            "breaks off",
            scripted(|conn| {
                conn.head();
                conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort");
            }),
        ),
        (
            "sends 100 MB",
            scripted(|conn| {
                conn.head();
                conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n");
                let piece = vec![b'x'; 1 << 16];
                (0..1_600).for_each(|_| conn.write(&piece));
            }),
        ),
        (
            "drips",
            scripted(|conn| {
                conn.head();
                conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n");
                for _ in 0..1_000 {
                    conn.write(b"x");
                    std::thread::park_timeout(Duration::from_millis(20));
                }
            }),
        ),
    ]
}

#[test]
fn whatever_becomes_of_copies_clients_get_the_same_answers_as_quickly() {
    const REQUESTS: u32 = 200;
    let old = Origin::saying("old");
    let asked = |edge: &TestEdge| {
        let mut client = edge.client();
        assert_eq!(client.get("/").text(), "old", "the first one opens the connection");
        let mut times: Vec<Duration> = (0..REQUESTS)
            .map(|_| {
                let begun = Instant::now();
                let answer = client.get("/");
                assert_eq!((answer.status, answer.text()), (200, "old"));
                begun.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    let alone = asked(&TestEdge::before(&old));
    for (what, target) in bad_targets() {
        let world = World::new(&old, target, MirrorSpec { timeout_ms: 60_000, ..all() });
        let (before, connections) = (old.seen().len(), old.connections());
        let median = asked(&world.edge);
        // The answer to a copy that never comes takes a minute; a median is not moved by a busy machine's pauses.
        assert!(median < alone * 4 + Duration::from_millis(5), "{what}: {median:?}, alone {alone:?}");
        let seen = old.seen().len() - before;
        assert_eq!((seen, old.connections() - connections), (REQUESTS as usize + 1, 1), "{what}");
        let target = &world.target;
        assert!(target.is_usable(peregrine_proxy::now_ms()), "{what}: a copy says nothing of health");
        assert_eq!((target.outcomes().samples(), target.receipt().started, target.in_flight()), (0, 0, 0));
        // That the edge ends at once, whatever is under way, is seen by its end here.
    }
}

#[test]
fn what_is_counted_is_what_the_origins_have_seen_and_answered() {
    let status = |seen: &super::support::Seen| -> u16 {
        seen.line().split('/').nth(1).and_then(|path| path[..3].parse().ok()).unwrap_or(200)
    };
    let answering = move |conn: &mut OriginConn, shift: u16| {
        while let Some(seen) = conn.request() {
            let status = status(&seen) + shift;
            conn.write(format!("HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\nok").as_bytes());
        }
    };
    let old = Origin::scripted(move |conn| answering(conn, 0));
    let new = Origin::scripted(move |conn| answering(conn, 100));
    let world = World::between(&old, &new);
    let mut client = world.edge.client();
    for path in ["/200", "/201", "/302", "/404", "/200"] {
        client.get(path);
    }
    let counts = world.ended(5);
    assert_eq!((counts.sent, counts.unequal, counts.failed()), (5, 5, 0));
    assert_eq!(new.seen().len() as u64, counts.sent);
    assert_eq!((counts.pairs[1][2], counts.pairs[2][3], counts.pairs[3][4]), (3, 1, 1));
    assert_eq!((counts.client_latency.count(), counts.mirror_latency.count()), (5, 5));
    assert!(new.connections() <= 5, "connections of copies are kept for copies");
}

#[test]
fn a_copy_without_an_answer_is_the_targets_fault_and_one_that_the_client_waited_for_as_long_is_not() {
    let old = Origin::ok();
    let silent = Origin::scripted(|conn| while conn.more().is_some() {});
    let world = World::new(&old, upstream(silent.addr), MirrorSpec { timeout_ms: 300, ..all() });
    world.edge.client().get("/");
    assert_eq!(world.ended(1).failed(), 1);

    let slow = Origin::scripted(|conn| {
        while conn.request().is_some() {
            std::thread::park_timeout(Duration::from_millis(300));
            conn.answer("at last");
        }
    });
    let world = World::new(&slow, upstream(silent.addr), MirrorSpec { timeout_ms: 300, ..all() });
    assert_eq!(world.edge.client().get("/").text(), "at last");
    let counts = world.ended(1);
    assert_eq!((counts.failed(), counts.unfinished), (0, 1));
}

#[test]
fn no_more_copies_are_under_way_or_in_a_second_than_the_caps_say() {
    let old = Origin::ok();
    let silent = Origin::scripted(|conn| while conn.more().is_some() {});
    let few = MirrorSpec { max_concurrent: 3, timeout_ms: 60_000, ..all() };
    let world = World::new(&old, upstream(silent.addr), few);
    let mut client = world.edge.client();
    (0..50).for_each(|_| assert_eq!(client.get("/").status, 200));
    until("the copies are there", || (world.counts().sent, silent.connections()) == (3, 3));
    assert_eq!(world.counts().skipped, 47);

    let new = Origin::ok();
    let slowly = MirrorSpec { max_requests_per_s: 10, ..all() };
    let world = World::new(&old, upstream(new.addr), slowly);
    let mut client = world.edge.client();
    let begun = Instant::now();
    (0..200).for_each(|_| assert_eq!(client.get("/").status, 200));
    let allowed = 10 * (begun.elapsed().as_secs() + 1) + 1;
    let counts = world.ended(200 - world.counts().skipped);
    assert!(counts.sent <= allowed && counts.sent >= 1, "{} of {allowed}", counts.sent);
    assert_eq!(counts.sent + counts.skipped, 200);
}

#[test]
fn a_share_of_the_requests_is_copied() {
    let (old, new) = (Origin::ok(), Origin::ok());
    let world = World::new(&old, upstream(new.addr), MirrorSpec { sample_permille: 200, ..all() });
    let mut client = world.edge.client();
    (0..1_000).for_each(|_| assert_eq!(client.get("/").status, 200));
    let sent = world.counts().sent;
    // Seven standard deviations.
    assert!((111..290).contains(&sent), "{sent} of 1,000 at a share of 20 %");
}

#[test]
fn nothing_is_sent_after_the_end_of_a_mirror_is_acknowledged_and_what_is_under_way_is_dropped() {
    let old = Origin::ok();
    let silent = Origin::scripted(|conn| while conn.request().is_some() {});
    let mut world = World::new(&old, upstream(silent.addr), MirrorSpec { timeout_ms: 60_000, ..all() });
    let mut client = world.edge.client();
    (0..10).for_each(|_| assert_eq!(client.get("/").status, 200));
    until("they are under way", || silent.seen().len() == 10);
    world.turn_off();
    assert_eq!(world.ended(10).unfinished, 10);
    (0..50).for_each(|_| assert_eq!(client.get("/").status, 200));
    assert_eq!((world.counts().sent, silent.seen().len()), (10, 10));
}

#[test]
fn a_request_that_is_answered_after_the_end_of_the_mirror_is_not_copied() {
    let (gate, opened) = std::sync::mpsc::channel::<()>();
    let opened = std::sync::Mutex::new(opened);
    let old = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            opened.lock().expect("lock").recv().expect("is opened");
            conn.answer("late");
        }
    });
    let new = Origin::ok();
    let mut world = World::between(&old, &new);
    let mut client = world.edge.client();
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    until("it is under way", || old.seen().len() == 1);
    world.turn_off();
    gate.send(()).expect("is taken");
    assert_eq!(client.answer().text(), "late");
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    gate.send(()).expect("is taken");
    assert_eq!(client.answer().text(), "late");
    assert_eq!((world.counts().sent, new.connections()), (0, 0));
}

#[test]
fn a_target_that_is_retired_with_copies_under_way_is_empty_at_once() {
    let old = Origin::ok();
    let silent = Origin::scripted(|conn| while conn.more().is_some() {});
    let mut world = World::new(&old, upstream(silent.addr), MirrorSpec { timeout_ms: 60_000, ..all() });
    assert_eq!(world.edge.client().get("/").status, 200);
    until("it is under way", || world.counts().sent == 1);
    let web = service(vec![world.old.clone()]);
    let version = world.edge.put(web);
    world.edge.wait_acknowledged(version);
    let receipt = world.target.receipt();
    assert!(receipt.empty && receipt.hard_cut.is_empty() && receipt.started == 0, "{receipt:?}");
}

#[test]
fn copies_take_none_of_the_connections_that_were_opened_for_clients() {
    let (old, new) = (Origin::ok(), Origin::ok());
    let ready = UpstreamSpec { ready_connections: 2, ..upstream(new.addr) };
    let mut world = World::new(&old, ready, all());
    until("they are open", || world.target.ready_connections() == 2);
    let mut client = world.edge.client();
    for asked in 1..=5 {
        assert_eq!(client.get("/").status, 200);
        world.ended(asked);
    }
    assert_eq!(world.target.ready_connections(), 2, "they wait for clients");
    let connections = new.connections();
    // None is asked for any more, so that none takes the place of the one that is used.
    let serving = UpstreamSpec { ready_connections: 0, ..world.new.clone() };
    let version = world.edge.put(service(vec![serving]));
    world.edge.wait_acknowledged(version);
    assert_eq!(world.edge.client().get("/").status, 200);
    assert_eq!((new.connections(), world.target.ready_connections()), (connections, 1));
}

#[test]
fn a_connection_that_the_target_has_closed_is_no_failure_of_it() {
    let old = Origin::ok();
    let closing = Origin::scripted(|conn| {
        if conn.request().is_some() {
            conn.answer("ok"); // and hangs up without saying so
        }
    });
    let world = World::between(&old, &closing);
    let mut client = world.edge.client();
    for asked in 1..=30 {
        assert_eq!(client.get("/").status, 200);
        world.ended(asked);
    }
    let counts = world.counts();
    assert_eq!((counts.compared(), counts.failed(), counts.sent), (30, 0, 30));
    assert_eq!(closing.seen().len(), 30);
}

#[test]
fn a_mirror_that_nobody_ends_is_over_when_its_time_is() {
    let (old, new) = (Origin::ok(), Origin::ok());
    let world = World::new(&old, upstream(new.addr), MirrorSpec { lasts_ms: 200, ..all() });
    let mut client = world.edge.client();
    let begun = Instant::now();
    client.get("/");
    until("its time is over", || begun.elapsed() > Duration::from_millis(400));
    let before = world.ended(1).sent;
    (0..20).for_each(|_| assert_eq!(client.get("/").status, 200));
    assert_eq!((world.counts().sent, new.seen().len() as u64), (before, before));
}

#[test]
fn a_stream_of_events_is_not_copied() {
    let old = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: 1\n\n",
            );
        }
    });
    let new = Origin::ok();
    let world = World::between(&old, &new);
    assert_eq!(world.edge.client().get("/").status, 200);
    assert_eq!(world.edge.client().get("/").status, 200);
    assert_eq!((world.counts().sent, new.connections()), (0, 0));
}

#[test]
fn a_client_that_leaves_in_its_answer_ends_no_copy_and_one_that_leaves_before_it_makes_none() {
    let old = Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            if seen.line().contains("/never") {
                continue;
            }
            conn.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nstart");
        }
    });
    let new = Origin::ok();
    let world = World::between(&old, &new);
    let mut client = world.edge.client();
    client.send("GET /begun HTTP/1.1\r\nHost: a.test\r\n\r\n").head();
    drop(client);
    let mut client = world.edge.client();
    client.send("GET /never HTTP/1.1\r\nHost: a.test\r\n\r\n");
    until("it is under way", || old.seen().len() == 2);
    drop(client);
    let serving = world.edge.upstream(&world.old);
    until("it has left", || serving.in_flight() == 0);
    assert_eq!(world.ended(1).compared(), 1);
    assert!(new.seen().iter().all(|seen| seen.line().contains("/begun")));
}

#[test]
fn a_target_that_speaks_http2_gets_its_copies_in_http2() {
    let old = Origin::ok();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let addr = listener.local_addr().expect("address");
    listener.set_nonblocking(true).expect("non-blocking");
    let marks = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&marks);
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("listens");
        let (socket, _) = listener.accept().await.expect("accepts");
        let mut conn = h2::server::handshake(socket).await.expect("shakes hands");
        while let Some(Ok((request, mut respond))) = conn.accept().await {
            let mark = request.headers().get("peregrine-mirror").cloned();
            seen.lock().expect("lock").push((request.uri().path().to_owned(), mark.is_some()));
            let head = http::Response::builder().status(503).body(()).expect("a head");
            let mut body = respond.send_response(head, false).expect("is sent");
            body.send_data(bytes::Bytes::from_static(b"no"), true).expect("is sent");
        }
    });
    let world = World::new(&old, h2c(addr), all());
    let mut client = world.edge.client();
    for path in ["/1", "/2", "/3"] {
        assert_eq!(client.get(path).text(), "ok");
    }
    let counts = world.ended(3);
    assert_eq!((counts.sent, counts.pairs[1][4], counts.failed()), (3, 3, 0));
    let mut marks = marks.lock().expect("lock").clone();
    marks.sort();
    assert_eq!(marks, ["/1", "/2", "/3"].map(|path| (path.to_owned(), true)));
}
