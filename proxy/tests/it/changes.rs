//! What rules change on the way: header fields, paths, and where a client is sent.

use peregrine_routing::{HeaderEdits, HostPattern, Redirect, Rewrite, RouteSpec, Rules};

use super::rules::ruled;
use super::support::{Origin, TestEdge, config, h2c, service, upstream};

fn fields(fields: &[(&str, &str)]) -> Vec<(std::sync::Arc<str>, std::sync::Arc<str>)> {
    fields.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn names(names: &[&str]) -> Vec<std::sync::Arc<str>> {
    names.iter().map(|name| (*name).into()).collect()
}

fn edits(remove: &[&str], set: &[(&str, &str)], add: &[(&str, &str)]) -> HeaderEdits {
    HeaderEdits { remove: names(remove), set: fields(set), add: fields(add) }
}

/// Answers with these fields.
fn answering(head: &'static str) -> Origin {
    Origin::scripted(move |conn| {
        while conn.request().is_some() {
            conn.write(format!("HTTP/1.1 200 OK\r\n{head}Content-Length: 2\r\n\r\nok").as_bytes());
        }
    })
}

#[test]
fn fields_of_requests_and_answers_are_removed_set_and_added() {
    let origin = answering("Server: secret/1.0\r\nX-Cache: a\r\nX-Cache: b\r\nVary: Cookie\r\n");
    let edge = TestEdge::start(ruled(
        &origin,
        Rules {
            request_headers: edits(
                &["x-debug"],
                &[("x-tenant", "blue"), ("authorization", "Bearer t")],
                &[("x-list", "2")],
            ),
            response_headers: edits(&["server"], &[("x-cache", "none")], &[("vary", "Accept")]),
            ..Rules::default()
        },
    ));
    let answer = edge
        .client()
        .send("GET / HTTP/1.1\r\nHost: a\r\nX-Debug: 1\r\nX-Tenant: red\r\nX-Tenant: green\r\nX-List: 1\r\n\r\n")
        .answer();
    let seen = origin.last();
    assert_eq!(seen.all("x-debug"), Vec::<&str>::new());
    assert_eq!(seen.all("x-tenant"), ["blue"]);
    assert_eq!(seen.all("authorization"), ["Bearer t"]);
    assert_eq!(seen.all("x-list"), ["1", "2"]);
    assert_eq!((answer.status, answer.all("server").len(), answer.text()), (200, 0, "ok"));
    assert_eq!(answer.all("x-cache"), ["none"]);
    assert_eq!(answer.all("vary"), ["Cookie", "Accept"]);
}

#[test]
fn a_client_cannot_have_a_field_taken_off_that_the_edge_sets_for_the_origin() {
    let origin = Origin::ok();
    let rules = Rules { request_headers: edits(&[], &[("x-tenant", "blue")], &[]), ..Rules::default() };
    let edge = TestEdge::start(ruled(&origin, rules));
    edge.client()
        .send("GET / HTTP/1.1\r\nHost: a\r\nX-Tenant: red\r\nConnection: x-tenant, x-other\r\nX-Other: 1\r\n\r\n")
        .answer();
    let seen = origin.last();
    assert_eq!((seen.all("x-tenant"), seen.all("x-other").len()), (vec!["blue"], 0));
}

#[test]
fn fields_that_are_the_edges_alone_stay_whatever_a_table_says() {
    let origin = Origin::ok();
    let guarded =
        [("host", "evil"), ("content-length", "7"), ("x-forwarded-for", "6.6.6.6"), ("x_real_ip", "6.6.6.6")];
    let rules = Rules {
        request_headers: edits(&["x-forwarded-for", "via"], &guarded, &guarded),
        response_headers: edits(&["content-length"], &[("transfer-encoding", "chunked")], &[]),
        ..Rules::default()
    };
    let edge = TestEdge::start(ruled(&origin, rules));
    let answer = edge.client().post("/", "order");
    assert_eq!((answer.status, answer.text()), (200, "ok"));
    let seen = origin.last();
    assert_eq!((seen.body, seen.head.matches("6.6.6.6").count()), (b"order".to_vec(), 0));
    let seen = origin.last();
    assert_eq!((seen.field("host"), seen.all("x-forwarded-for")), (Some("a.test"), vec!["127.0.0.1"]));
}

#[test]
fn an_origin_of_http2_gets_the_same_fields_and_path() {
    let (seen, heads) = std::sync::mpsc::channel();
    let addr = super::bodies::h2_origin(move |request: http::Request<hyper::body::Incoming>| {
        seen.send(request.into_parts().0).expect("the test listens");
        async { http::Response::new(super::bodies::full("ok")) }
    });
    let mut web = service(vec![h2c(addr)]);
    web.policy.rules = Some(Box::new(Rules {
        request_headers: edits(&["x-debug"], &[("x-tenant", "blue")], &[]),
        response_headers: edits(&[], &[("x-seen", "1")], &[]),
        rewrite: Some(Rewrite { strip_prefix: Some("/api".into()), add_prefix: None }),
        ..Rules::default()
    }));
    let edge = TestEdge::start(web);
    let answer = edge.client().send("GET /api/x?q HTTP/1.1\r\nHost: a\r\nX-Debug: 1\r\n\r\n").answer();
    assert_eq!((answer.text(), answer.field("x-seen")), ("ok", Some("1")));
    let head = heads.recv_timeout(super::support::PATIENCE).expect("a request comes");
    assert_eq!(head.uri.path_and_query().map(|path| path.as_str()), Some("/x?q"));
    assert_eq!((head.headers["x-tenant"].as_bytes(), head.headers.get("x-debug")), (&b"blue"[..], None));
}

fn redirect(from: &str, below: bool, to: &str, status: u16) -> Redirect {
    Redirect { from: from.into(), below, to: to.into(), status }
}

#[test]
fn a_redirect_is_answered_by_the_edge_and_the_connection_goes_on() {
    let origin = Origin::ok();
    let redirects = vec![
        redirect("/old/exact", false, "/first", 302),
        redirect("/old", true, "https://new.test/shop", 308),
        redirect("/here", true, "/", 301),
    ];
    let edge = TestEdge::start(ruled(&origin, Rules { redirects, ..Rules::default() }));
    let mut client = edge.client();
    for (path, status, to) in [
        ("/old/exact?a=b", 302, "/first?a=b"),
        ("/old/exact/x", 308, "https://new.test/shop/exact/x"),
        ("/%6fld/./x%2fy?q", 308, "https://new.test/shop/x%2Fy?q"),
        ("/old", 308, "https://new.test/shop"),
        ("/here//evil.test", 301, "/evil.test"),
    ] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.field("location")), (status, Some(to)), "{path}");
    }
    assert_eq!(origin.seen().len(), 0, "no upstream hears of it");
    assert_eq!(client.get("/older").status, 200);
    // A body of such a request is nobody's.
    let answer = edge.client().post("/old", "order");
    assert_eq!((answer.status, origin.seen().len()), (308, 1));
}

#[test]
fn who_is_not_let_in_is_not_told_where_to_go() {
    let origin = Origin::ok();
    let rules = Rules {
        deny: vec!["127.0.0.1".parse().expect("a network")],
        redirects: vec![redirect("", true, "https://new.test", 308)],
        ..Rules::default()
    };
    let answer = TestEdge::start(ruled(&origin, rules)).client().get("/");
    assert_eq!((answer.status, answer.field("location")), (403, None));
}

#[test]
fn a_path_is_rewritten_for_the_origin_and_routed_as_it_was_sent() {
    let (origin, other) = (Origin::ok(), Origin::saying("other"));
    let mut api = service(vec![upstream(origin.addr)]);
    api.routes[0].path_prefix = "/api".into();
    api.policy.rules = Some(Box::new(Rules {
        rewrite: Some(Rewrite { strip_prefix: Some("/api".into()), add_prefix: Some("/v2".into()) }),
        ..Rules::default()
    }));
    // What the rewritten path would be routed to.
    let mut guarded = service(vec![upstream(other.addr)]);
    guarded.name = "guarded".into();
    guarded.routes = vec![RouteSpec { host: HostPattern::Any, path_prefix: "/v2".into() }];
    let edge = TestEdge::start_with(config(), vec![api, guarded]);
    for (sent, line) in [
        ("/api/x?q=/api", "GET /v2/x?q=/api HTTP/1.1"),
        ("/api", "GET /v2 HTTP/1.1"),
        ("/api/", "GET /v2/ HTTP/1.1"),
        ("/x/../%61pi/%7ey%2fz", "GET /v2/~y%2Fz HTTP/1.1"),
    ] {
        assert_eq!(edge.client().get(sent).text(), "ok", "{sent}");
        assert_eq!(origin.last().line(), line, "{sent}");
    }
    assert_eq!(edge.client().get("/v2/x").text(), "other");
    assert_eq!(edge.client().get("/api/..%2fsecret").status, 400);
    let absolute = "GET http://a.test/api/x HTTP/1.1\r\nHost: a.test\r\n\r\n";
    assert_eq!(edge.client().send(absolute).answer().status, 200);
    assert_eq!(origin.last().line(), "GET /v2/x HTTP/1.1");
}

#[test]
fn without_rules_nothing_of_a_message_is_changed() {
    let origin = answering("Server: origin\r\nVary: Cookie\r\n");
    let answer = TestEdge::before(&origin).client().get("/old");
    assert_eq!((answer.field("server"), answer.field("vary")), (Some("origin"), Some("Cookie")));
    assert_eq!(origin.last().line(), "GET /old HTTP/1.1");
}

#[test]
fn another_spelling_of_a_field_that_is_set_or_taken_off_does_not_go_on_either() {
    let origin = Origin::ok();
    let rules =
        Rules { request_headers: edits(&["x-debug"], &[("x-tenant", "blue")], &[]), ..Rules::default() };
    let edge = TestEdge::start(ruled(&origin, rules));
    edge.client()
        .send(
            "POST / HTTP/1.1\r\nHost: a\r\nX_Tenant: red\r\nX_Debug: 1\r\nX_Kept: 1\r\nTrailer: x-tenant, x-sum\r\n\
             Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Tenant: red\r\nX-Sum: 7\r\n\r\n",
        )
        .answer();
    let seen = origin.last();
    assert_eq!((seen.all("x-tenant"), seen.all("x_kept")), (vec!["blue"], vec!["1"]));
    assert!(!seen.head.contains("red") && !seen.head.to_lowercase().contains("debug"), "{}", seen.head);
}

#[test]
fn trailers_do_not_say_what_was_taken_off_before_the_body() {
    let origin = Origin::scripted(|conn| {
        while conn.head().is_some() {
            while super::support::dechunk(&conn.unread).is_none() {
                if conn.more().is_none() {
                    return;
                }
            }
            let ((_, trailers), used) = super::support::dechunk(&conn.unread).expect("whole");
            conn.unread.drain(..used);
            conn.answer(&trailers.to_lowercase().replace("\r\n", "|"));
        }
    });
    let rules = Rules { request_headers: edits(&[], &[("x-tenant", "blue")], &[]), ..Rules::default() };
    let edge = TestEdge::start(ruled(&origin, rules));
    let answer = edge
        .client()
        .send(
            "POST / HTTP/1.1\r\nHost: a\r\nTrailer: x-tenant, x-sum\r\nTransfer-Encoding: chunked\r\n\r\n\
             2\r\nok\r\n0\r\nX-Tenant: red\r\nX-Sum: 7\r\n\r\n",
        )
        .answer();
    assert_eq!(answer.text(), "x-sum: 7|");
}

#[test]
fn a_path_that_would_be_too_long_when_it_is_rewritten_goes_nowhere() {
    let origin = Origin::ok();
    let rewrite = Rewrite { strip_prefix: None, add_prefix: Some(format!("/{}", "x".repeat(1_000)).into()) };
    let edge = TestEdge::start(ruled(&origin, Rules { rewrite: Some(rewrite), ..Rules::default() }));
    let mut request = b"GET /admin/".to_vec();
    // Each of its bytes becomes three.
    request.extend_from_slice("é".repeat(10_850).as_bytes());
    request.extend_from_slice(b" HTTP/1.1\r\nHost: a.test\r\n\r\n");
    let answer = edge.client().send(request).answer();
    assert_eq!((answer.status, answer.reason()), (414, "uri_too_long"));
    assert_eq!(origin.seen().len(), 0);
}
