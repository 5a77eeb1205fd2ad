//! One canonical path decides the route and goes on; hosts in every spelling lead to one route.

use peregrine_proxy::Config;
use peregrine_routing::{HostPattern, RouteSpec, ServiceSpec};

use super::support::{Answer, Origin, TestEdge, block_on, config, service, upstream};

fn route(host: &str, path: &str) -> RouteSpec {
    RouteSpec { host: HostPattern::parse(host).expect("is a pattern"), path_prefix: path.into() }
}

fn named(name: &str, origin: &Origin, routes: Vec<RouteSpec>) -> ServiceSpec {
    ServiceSpec { name: name.into(), routes, ..service(vec![upstream(origin.addr)]) }
}

/// An open service at `/`, and one at `/admin` that something guards.
struct Guarded {
    edge: TestEdge,
    open: Origin,
    admin: Origin,
}

impl Guarded {
    fn start() -> Self {
        let (open, admin) = (Origin::saying("open"), Origin::saying("admin"));
        let services = vec![
            named("open", &open, vec![route("a.test", "/")]),
            named("admin", &admin, vec![route("a.test", "/admin")]),
        ];
        Self { edge: TestEdge::start_with(config(), services), open, admin }
    }

    fn get(&self, path: &str) -> Answer {
        self.edge.client().send_anyhow(format!("GET {path} HTTP/1.1\r\nHost: a.test\r\n\r\n")).answer()
    }
}

/// What went to an origin, as the most generous origins would read it.
fn as_some_origin_reads(line: &str) -> String {
    let mut path = line.split(' ').nth(1).expect("a path").to_ascii_lowercase();
    for _ in 0..3 {
        for (escape, meant) in
            [("%25", "%"), ("%2f", "/"), ("%5c", "/"), ("\\", "/"), ("%2e", "."), ("%3b", ";"), ("%61", "a")]
        {
            path = path.replace(escape, meant);
        }
    }
    let mut segments = Vec::new();
    for segment in path.split(['?', '#']).next().expect("a path").split('/') {
        match segment.split(';').next().expect("a part") {
            "" | "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other.to_owned()),
        }
    }
    format!("/{}", segments.join("/"))
}

const WAYS: [&str; 40] = [
    "/admin",
    "/admin/",
    "/admin?x",
    "/%61dmin",
    "/%61%64%6d%69%6e/x",
    "/./admin",
    "/x/../admin",
    "/x/%2e%2e/admin",
    "/x/%2E./admin",
    "/x/.%2e/admin/x",
    "//admin",
    "///admin//x",
    "/x/..//admin",
    "/../admin",
    "/%2e%2e/admin",
    "/x/../../admin",
    "/admin;x",
    "/admin;x=1/y",
    "/;/admin",
    "/x/..;/admin",
    "/x/..;a=b/admin",
    "/.;/admin",
    "/%2fadmin",
    "/%2Fadmin",
    "/admin%2fx",
    "/x%2f..%2fadmin",
    "/x/..%2fadmin",
    "/..%2fadmin",
    "/%5cadmin",
    "/\\admin",
    "/x\\..\\admin",
    "/x/..%5Cadmin",
    "/admin%5cx",
    "/%252fadmin",
    "/x/%252e%252e/admin",
    "/%2561dmin",
    "/admin%00",
    "/admin%",
    "/admin#x",
    "/x#/../admin",
];

#[test]
fn no_spelling_of_a_guarded_path_reaches_the_service_beside_it() {
    let world = Guarded::start();
    for way in WAYS {
        let (open, admin) = (world.open.seen().len(), world.admin.seen().len());
        let answer = world.get(way);
        let opened = world.open.seen().len() - open;
        if opened > 0 {
            let read = as_some_origin_reads(world.open.last().line());
            assert!(read != "/admin" && !read.starts_with("/admin/"), "{way} went past: {read}");
        }
        if world.admin.seen().len() > admin {
            let line = world.admin.last().line().to_owned();
            assert!(line.starts_with("GET /admin"), "{way}: what was routed is what goes on: {line}");
        }
        match answer.status {
            200 => assert_eq!(opened + world.admin.seen().len() - admin, 1, "{way}"),
            400 => assert!(
                ["ambiguous_path", "bad_target", "bad_request_head"].contains(&answer.reason()),
                "{way}"
            ),
            other => panic!("{way}: {other}"),
        }
    }
    // Some are let through, or nothing would have been shown.
    assert!(world.admin.seen().len() > 8);
}

#[test]
fn no_spelling_goes_past_over_http2_either() {
    let world = Guarded::start();
    block_on(async {
        let socket = tokio::net::TcpStream::connect(world.edge.addr).await.expect("connects");
        let (mut client, conn) = h2::client::handshake(socket).await.expect("handshake");
        tokio::spawn(conn);
        for way in WAYS {
            let open = world.open.seen().len();
            let Ok(uri) = format!("http://a.test{way}").parse::<http::Uri>() else { continue };
            let request = http::Request::get(uri).body(()).expect("a request");
            client = client.ready().await.expect("goes on");
            let (answer, _) = client.send_request(request, true).expect("is sent");
            let answer = answer.await.expect("is answered");
            assert!(matches!(answer.status().as_u16(), 200 | 400), "{way}: {}", answer.status());
            if world.open.seen().len() > open {
                let read = as_some_origin_reads(world.open.last().line());
                assert!(read != "/admin" && !read.starts_with("/admin/"), "{way} went past: {read}");
            }
        }
    });
}

#[test]
fn the_canonical_path_is_what_goes_on() {
    let world = Guarded::start();
    for (sent, line) in [
        ("/x/../%61dmin/./y?%61", "GET /admin/y?%61 HTTP/1.1"),
        ("/%41dmin/caf%c3%a9", "GET /Admin/caf%C3%A9 HTTP/1.1"),
        ("/a%2fb//c;d?e=/../f", "GET /a%2Fb//c;d?e=/../f HTTP/1.1"),
        ("/a/b/..", "GET /a/ HTTP/1.1"),
    ] {
        assert_eq!(world.get(sent).status, 200, "{sent}");
        let seen: Vec<_> = [&world.open, &world.admin].iter().flat_map(|o| o.seen()).collect();
        assert!(seen.iter().any(|seen| seen.line() == line), "{sent}: {seen:?}");
    }
}

#[test]
fn where_no_path_decides_origins_get_their_own_readings() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    for path in ["//x", "/@scope%2Fname", "/a;v=1/b", "/a%252Fb", "/a/%5Cb"] {
        assert_eq!(edge.client().get(path).status, 200, "{path}");
        assert_eq!(origin.last().line(), format!("GET {path} HTTP/1.1"));
    }
    // Steps up that only some see are refused everywhere.
    assert_eq!(edge.client().get("/static/..%2f..%2fetc/passwd").reason(), "ambiguous_path");
}

#[test]
fn a_host_in_every_spelling_leads_to_one_route_at_every_table_size() {
    let (shop, other) = (Origin::saying("shop"), Origin::saying("other"));
    for size in [0, 1, 11, 12, 100, 2_000] {
        let hosts = (0..size).map(|n| route(&format!("host-{n}.example"), "/"));
        let services = vec![
            named("shop", &shop, vec![route("bücher.example", "/"), route("*.shop.example", "/")]),
            named("other", &other, hosts.chain([route("*", "/")]).collect()),
        ];
        let edge = TestEdge::start_with(Config { cores: 1, ..config() }, services);
        for host in [
            "xn--bcher-kva.example",
            "XN--Bcher-KVA.example",
            "xn--bcher-kva.example.",
            "xn--bcher-kva.example:8080",
            "xn--bcher-kva.Example.:80",
            "bücher.example",
            "BÜCHER.example.",
            "Bücher.example:8080",
            "a.shop.example",
            "A.B.Shop.EXAMPLE.:1",
        ] {
            // Twice, because what was found once is remembered.
            for _ in 0..2 {
                let answer = edge.client().send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).answer();
                assert_eq!((answer.status, answer.text()), (200, "shop"), "{host} among {size}");
            }
            let sent = shop.last().field("host").expect("a host").to_owned();
            assert!(
                sent.is_ascii() && sent.to_ascii_lowercase().trim_end_matches('.').contains("example"),
                "{sent}"
            );
        }
        let answer = edge.client().send("GET / HTTP/1.1\r\nHost: bucher.example\r\n\r\n").answer();
        assert_eq!(answer.text(), "other");
    }
}

#[test]
fn twins_with_underscores_of_what_the_edge_says_do_not_go_on() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let twins = [
        "X_Forwarded_For",
        "X-Forwarded_For",
        "x_forwarded_proto",
        "x_forwarded_host",
        "x_forwarded_port",
        "X_Real_IP",
        "X_Request_Id",
        "X_Request-Id",
        "Content_Length",
        "Transfer_Encoding",
        "Proxy_Authorization",
        "Peregrine_Mirror",
    ];
    let fields: String = twins.iter().map(|name| format!("{name}: 7\r\n")).collect();
    let request = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{fields}My_Own: 1\r\nConnection: X_Forwarded_For, X-Request-Id, x-forwarded-for\r\nX-Request-Id: mine\r\n\r\n"
    );
    assert_eq!(edge.client().send(request).answer().status, 200);
    let seen = origin.last();
    for twin in twins {
        assert_eq!(seen.all(twin), Vec::<&str>::new(), "{twin} went on");
    }
    assert_eq!((seen.all("my_own"), seen.all("x-forwarded-for")), (vec!["1"], vec!["127.0.0.1"]));
    assert_eq!(seen.all("x-request-id"), ["mine"]);
}
