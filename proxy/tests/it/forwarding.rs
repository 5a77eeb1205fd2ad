//! What an origin gets of a request, and a client of an answer.

use std::collections::HashSet;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use peregrine_proxy::Config;
use peregrine_routing::{Balance, HashKey, HostPattern, RouteSpec, ServicePolicy};

use super::support::{Origin, TestEdge, block_on, config, service, until_trusted, upstream};

type H2<B> = hyper::client::conn::http2::SendRequest<B>;

async fn http2<B>(edge: &TestEdge) -> H2<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
    let (sender, conn) = handshake.await.expect("handshake");
    tokio::spawn(conn);
    sender
}

#[test]
fn a_request_goes_on_with_the_marks_of_the_edge() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let answer = edge.client().get("/path?query=1");
    assert_eq!((answer.status, answer.text()), (200, "ok"));
    let seen = origin.last();
    assert_eq!(seen.line(), "GET /path?query=1 HTTP/1.1");
    assert_eq!(seen.all("host"), ["a.test"]);
    assert_eq!(seen.all("via"), ["1.1 peregrine"]);
    assert_eq!(seen.all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(seen.all("x-forwarded-proto"), ["http"]);
    assert_eq!(seen.all("x-forwarded-host"), ["a.test"]);
    assert_eq!(seen.all("forwarded"), ["for=127.0.0.1;host=a.test;proto=http"]);
    let trace = seen.field("traceparent").expect("is made");
    assert_eq!(trace.len(), 55);
    assert_eq!(seen.field("x-request-id"), Some(&trace[3..35]));
}

#[test]
fn names_that_the_client_gave_are_passed_on() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = format!("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: my-id\r\ntraceparent: {trace}\r\n\r\n");
    assert_eq!(edge.client().send(request).answer().status, 200);
    assert_eq!(origin.last().all("x-request-id"), ["my-id"]);
    assert_eq!(origin.last().all("traceparent"), [trace]);
}

#[test]
fn fields_of_the_connection_do_not_pass_in_either_direction() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(
                b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Inner\r\nX-Inner: 1\r\nKeep-Alive: timeout=5\r\n\
                  Proxy-Connection: keep-alive\r\nX-Peregrine-Reason: forged\r\nX-Kept: 1\r\nContent-Length: 2\r\n\r\nok",
            );
        }
    });
    let edge = TestEdge::before(&origin);
    let request = "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Secret, X-Forwarded-For, Host\r\n\
        X-Secret: 1\r\nKeep-Alive: 5\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\n\
        TE: gzip\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nX-Kept: 1\r\n\r\n";
    let answer = edge.client().send(request).answer();
    let seen = origin.last();
    for gone in [
        "connection",
        "x-secret",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
        "upgrade",
        "http2-settings",
    ] {
        assert_eq!(seen.all(gone), Vec::<&str>::new(), "{gone} reached the origin");
    }
    assert_eq!(seen.all("x-forwarded-for"), ["127.0.0.1"], "a client cannot nominate what the edge adds");
    assert_eq!(seen.all("host"), ["a"]);
    assert_eq!(seen.all("x-kept"), ["1"]);
    for gone in ["connection", "x-inner", "keep-alive", "proxy-connection", "x-peregrine-reason"] {
        assert_eq!(answer.all(gone), Vec::<&str>::new(), "{gone} reached the client");
    }
    assert_eq!(answer.all("x-kept"), ["1"]);
}

#[test]
fn a_strangers_forwarding_fields_are_dropped_and_a_trusted_proxys_extended() {
    let origin = Origin::ok();
    let request = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 198.51.100.1\r\nX-Forwarded-Proto: https\r\n\
        X-Real-IP: 198.51.100.1\r\nForwarded: for=198.51.100.1\r\nX_Forwarded_For: 198.51.100.1\r\n\r\n";
    let edge = TestEdge::before(&origin);
    edge.client().send(request).answer();
    let seen = origin.last();
    assert_eq!(seen.all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(seen.all("x-forwarded-proto"), ["http"]);
    assert_eq!(seen.all("forwarded"), ["for=127.0.0.1;host=a;proto=http"]);
    assert!(seen.all("x-real-ip").is_empty() && seen.all("x_forwarded_for").is_empty());
    let trusting = Config { trusted_proxies: vec!["127.0.0.0/8".parse().expect("network")], ..config() };
    let edge = TestEdge::start_with(trusting, vec![service(vec![upstream(origin.addr)])]);
    edge.client().send(request).answer();
    let seen = origin.last();
    assert_eq!(seen.all("x-forwarded-for"), ["198.51.100.1, 127.0.0.1"]);
    assert_eq!(seen.all("x-forwarded-proto"), ["https"]);
    assert_eq!(seen.all("forwarded"), ["for=198.51.100.1, for=127.0.0.1;host=a;proto=http"]);
}

#[test]
fn hosts_and_paths_lead_to_their_services() {
    let (shop, api) = (Origin::saying("shop"), Origin::saying("api"));
    let route = |host: &str, path: &str| RouteSpec {
        host: HostPattern::parse(host).expect("pattern"),
        path_prefix: path.into(),
    };
    let mut one = service(vec![upstream(shop.addr)]);
    one.routes = vec![route("shop.test", "/")];
    let mut two = service(vec![upstream(api.addr)]);
    (two.name, two.routes) = ("api".into(), vec![route("shop.test", "/api"), route("*.api.test", "/")]);
    let edge = TestEdge::start_with(config(), vec![one, two]);
    let ask = |host: &str, target: &str| {
        let answer = edge.client().send(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).answer();
        (
            answer.status,
            if answer.status == 200 { answer.text().to_owned() } else { answer.reason().to_owned() },
        )
    };
    assert_eq!(ask("SHOP.test:80", "/"), (200, "shop".into()));
    assert_eq!(ask("shop.test.", "/api/x"), (200, "api".into()));
    assert_eq!(ask("shop.test", "/apix"), (200, "shop".into()));
    assert_eq!(ask("v1.api.test", "/"), (200, "api".into()));
    assert_eq!(ask("other", "http://shop.test/api"), (200, "api".into()), "the target's host counts");
    assert_eq!(ask("other.test", "/"), (404, "no_route".into()));
    assert_eq!(api.last().all("host"), ["shop.test"], "and goes on as Host");
}

#[test]
fn http_1_0_without_a_host_is_served_by_the_catch_all_and_closed() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    let answer = client.send("GET / HTTP/1.0\r\n\r\n").answer();
    assert_eq!((answer.status, answer.text()), (200, "ok"));
    assert!(client.is_closed());
    assert_eq!(origin.last().line(), "GET / HTTP/1.1");
    assert_eq!(origin.last().all("host"), [origin.addr.to_string()]);
    assert_eq!(origin.last().all("via"), ["1.0 peregrine"]);
}

#[test]
fn the_upstreams_own_host_is_sent_when_the_service_says_so() {
    let origin = Origin::ok();
    let mut web = service(vec![upstream(origin.addr)]);
    web.policy.preserve_host = false;
    let edge = TestEdge::start(web);
    edge.client().get("/");
    assert_eq!(origin.last().all("host"), [origin.addr.to_string()]);
    assert_eq!(origin.last().all("x-forwarded-host"), ["a.test"]);
}

#[test]
fn a_get_body_of_http2_without_a_length_reaches_an_http1_upstream() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    block_on(async {
        let mut sender = http2(&edge).await;
        let frames = futures_util::stream::iter(
            ["hel", "lo"]
                .map(|part| Ok::<_, std::convert::Infallible>(http_body::Frame::data(Bytes::from(part)))),
        );
        let request =
            http::Request::get("http://a.test/search").body(StreamBody::new(frames)).expect("request");
        let answer = sender.send_request(request).await.expect("answer");
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.into_body().collect().await.expect("body").to_bytes(), "ok");
    });
    assert_eq!(origin.last().body, b"hello");
    assert_eq!(origin.last().all("transfer-encoding"), ["chunked"]);
}

#[test]
fn cookie_crumbs_of_http2_become_one_cookie() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    block_on(async {
        let mut sender = http2(&edge).await;
        let request = http::Request::get("http://a.test/")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .body(Full::<Bytes>::default())
            .expect("request");
        assert_eq!(sender.send_request(request).await.expect("answer").status(), 200);
    });
    assert_eq!(origin.last().all("cookie"), ["a=1; b=2"]);
    assert_eq!(origin.last().all("via"), ["2.0 peregrine"]);
}

#[test]
fn authority_and_host_of_http2_have_to_agree() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let ask = |host: &'static str| {
        block_on(async {
            let mut sender = http2(&edge).await;
            let request = http::Request::get("http://a.test/")
                .header("host", host)
                .body(Full::<Bytes>::default())
                .expect("request");
            let answer = sender.send_request(request).await.expect("answer");
            (answer.status().as_u16(), answer.headers().get("x-peregrine-reason").cloned())
        })
    };
    assert_eq!(ask("A.test:80"), (200, None));
    assert_eq!(ask("evil.test"), (400, Some(http::HeaderValue::from_static("bad_host"))));
    assert_eq!(origin.seen().len(), 1);
}

#[test]
fn connection_fields_in_http2_are_refused() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for (name, value) in
        [("connection", "close"), ("transfer-encoding", "chunked"), ("upgrade", "x"), ("te", "gzip")]
    {
        block_on(async {
            let socket = tokio::net::TcpStream::connect(edge.addr).await.expect("connects");
            let (mut client, conn) = h2::client::handshake(socket).await.expect("handshake");
            tokio::spawn(conn);
            let request = http::Request::get("http://a.test/").header(name, value).body(()).expect("request");
            // The client's library may refuse to send it, which is as good.
            if let Ok((answer, _)) = client.send_request(request, true) {
                let error = answer.await.expect_err(name);
                assert_eq!(error.reason(), Some(h2::Reason::PROTOCOL_ERROR), "{name}");
            }
        });
    }
    assert!(origin.seen().is_empty());
}

#[test]
fn a_client_keeps_its_connection_and_so_does_the_upstream() {
    let origin = Origin::ok();
    let (edge, upstream) = TestEdge::with_upstream(&origin);
    let mut client = edge.client();
    assert_eq!(client.get("/").status, 200);
    until_trusted(&upstream);
    for _ in 0..50 {
        assert_eq!(client.get("/").status, 200);
        assert_eq!(client.post("/", "x").status, 200);
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let origin = Origin::scripted(|conn| {
        while let Some(seen) = conn.request() {
            let line = seen.line().to_owned();
            conn.answer(&line);
        }
    });
    let edge = TestEdge::before(&origin);
    let mut client = edge.client();
    let all: String = (0..20).map(|i| format!("GET /{i} HTTP/1.1\r\nHost: a\r\n\r\n")).collect();
    client.send(all);
    for i in 0..20 {
        assert_eq!(client.answer().text(), format!("GET /{i} HTTP/1.1"));
    }
}

#[test]
fn a_sticky_cookie_is_a_preference_and_never_a_pin() {
    let (one, two) = (Origin::saying("one"), Origin::saying("two"));
    let specs = vec![upstream(one.addr), upstream(two.addr)];
    let mut web = service(specs.clone());
    web.policy = ServicePolicy {
        sticky: Some(peregrine_routing::Sticky { cookie: "session".into() }),
        ..ServicePolicy::default()
    };
    let mut edge = TestEdge::start(web.clone());
    let first = edge.client().get("/");
    let cookie = first.field("set-cookie").and_then(|c| c.split(';').next()).expect("is set").to_owned();
    let home = first.text().to_owned();
    let with_cookie = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {cookie}\r\n\r\n");
    for _ in 0..20 {
        let answer = edge.client().send(&with_cookie).answer();
        assert_eq!((answer.text(), answer.field("set-cookie")), (&*home, None));
    }
    let keep = usize::from(home == "one");
    web.pools[0].upstreams = vec![specs[keep].clone()];
    let version = edge.put(web);
    edge.wait_acknowledged(version);
    let moved = edge.client().send(&with_cookie).answer();
    assert_ne!(moved.text(), home);
    assert!(moved.field("set-cookie").is_some_and(|set| !set.starts_with(&cookie)));
}

#[test]
fn a_hash_on_a_header_sends_a_key_to_one_copy() {
    let origins: Vec<Origin> = ["a", "b", "c"].map(Origin::saying).into();
    let mut web = service(origins.iter().map(|origin| upstream(origin.addr)).collect());
    web.balance = Balance::ConsistentHash(HashKey::Header("x-key".into()));
    let edge = TestEdge::start(web);
    let mut homes = HashSet::new();
    for key in 0..30 {
        let ask = || {
            let request = format!("GET / HTTP/1.1\r\nHost: a\r\nX-Key: {key}\r\n\r\n");
            edge.client().send(request).answer().text().to_owned()
        };
        let home = ask();
        assert_eq!(ask(), home);
        homes.insert(home);
    }
    assert_eq!(homes.len(), 3);
}

#[test]
fn a_hash_on_a_cookie_sends_its_value_to_one_copy_whatever_comes_with_it() {
    let origins: Vec<Origin> = ["a", "b", "c"].map(Origin::saying).into();
    let mut web = service(origins.iter().map(|origin| upstream(origin.addr)).collect());
    web.balance = Balance::ConsistentHash(HashKey::Cookie("session".into()));
    let edge = TestEdge::start(web);
    let ask = |cookies: &str| {
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {cookies}\r\n\r\n");
        edge.client().send(request).answer().text().to_owned()
    };
    let mut homes = HashSet::new();
    for value in 0..30 {
        let home = ask(&format!("session={value}"));
        assert_eq!(ask(&format!("theme=dark; session={value}")), home);
        assert_eq!(ask(&format!("session={value}; session2=x; counter={}", value * 7)), home);
        homes.insert(home);
    }
    assert_eq!(homes.len(), 3);
}

#[test]
fn a_hash_on_the_clients_address_takes_the_one_that_the_edge_believes() {
    let origins: Vec<Origin> = ["a", "b", "c"].map(Origin::saying).into();
    let mut web = service(origins.iter().map(|origin| upstream(origin.addr)).collect());
    web.balance = Balance::ConsistentHash(HashKey::ClientAddress);
    let homes = |edge: &TestEdge| -> Vec<String> {
        let ask = |client: u8| {
            let request =
                format!("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 198.51.100.{client}\r\n\r\n");
            edge.client().send(request).answer().text().to_owned()
        };
        let first: Vec<String> = (1..=30).map(ask).collect();
        // Another connection has another port, and is the same client.
        assert_eq!((1..=30).map(ask).collect::<Vec<_>>(), first);
        first
    };
    let trusting = Config { trusted_proxies: vec!["127.0.0.0/8".parse().expect("network")], ..config() };
    let behind_a_proxy = homes(&TestEdge::start_with(trusting, vec![web.clone()]));
    assert_eq!(behind_a_proxy.iter().collect::<HashSet<_>>().len(), 3);
    // A stranger cannot choose a copy: all of these are one client, whatever they say.
    let of_strangers = homes(&TestEdge::start(web));
    assert_eq!(of_strangers.iter().collect::<HashSet<_>>().len(), 1);
}
