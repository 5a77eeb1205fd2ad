//! Upstreams that are told for whom a connection is: a header of the PROXY protocol comes first, and nobody else's bytes
//! come after it.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use peregrine_proxy::Config;
use peregrine_routing::{
    DomainPolicy, Health, HealthCheck, HealthCheckKind, MirrorSpec, ProxyProtocol, ServiceSpec, TlsMode,
};
use rustls::{ServerConnection, StreamOwned};

use super::support::{Origin, OriginConn, TestEdge, config, find, service, until, upstream};
use super::tls_support::{self as tls, Authority};

const BOTH: [ProxyProtocol; 2] = [ProxyProtocol::V1, ProxyProtocol::V2];
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// For whom a connection is, as its first bytes say; `None` inside is nobody.
type Told = Option<(SocketAddr, SocketAddr)>;

/// Reads the header of a connection in its one way: the edge's own parser is not asked.
fn told(conn: &mut OriginConn, version: ProxyProtocol) -> Option<Told> {
    match version {
        ProxyProtocol::V1 => {
            let end = loop {
                match find(&conn.unread, b"\r\n") {
                    Some(end) => break end,
                    None => conn.more()?,
                };
            };
            let line: Vec<u8> = conn.unread.drain(..end + 2).collect();
            let line = String::from_utf8(line).expect("is text");
            let words: Vec<&str> = line.trim_end().split(' ').collect();
            match words[..] {
                ["PROXY", "UNKNOWN"] => Some(None),
                ["PROXY", "TCP4" | "TCP6", from, to, from_port, to_port] => {
                    let end = |ip: &str, port: &str| {
                        SocketAddr::new(ip.parse().expect("an address"), port.parse().expect("a port"))
                    };
                    Some(Some((end(from, from_port), end(to, to_port))))
                }
                _ => panic!("no header: {line:?}"),
            }
        }
        ProxyProtocol::V2 => {
            while conn.unread.len() < 16 {
                conn.more()?;
            }
            let head: Vec<u8> = conn.unread.drain(..16).collect();
            assert_eq!(&head[..12], SIGNATURE);
            let length = usize::from(u16::from_be_bytes([head[14], head[15]]));
            while conn.unread.len() < length {
                conn.more()?;
            }
            let body: Vec<u8> = conn.unread.drain(..length).collect();
            match (head[12], head[13], &body[..]) {
                (0x20, 0, []) => Some(None),
                (0x21, 0x11, [a, b, c, d, e, f, g, h, p, q, r, s]) => Some(Some((
                    (Ipv4Addr::new(*a, *b, *c, *d), u16::from_be_bytes([*p, *q])).into(),
                    (Ipv4Addr::new(*e, *f, *g, *h), u16::from_be_bytes([*r, *s])).into(),
                ))),
                other => panic!("no header: {other:?}"),
            }
        }
    }
}

/// What came on each connection: for whom it is, and the paths of its requests.
type Connections = Arc<Mutex<Vec<(Told, Vec<String>)>>>;

/// An origin that insists on a header.
fn insisting(version: ProxyProtocol) -> (Origin, Connections) {
    let connections = Connections::default();
    let all = Arc::clone(&connections);
    let origin = Origin::scripted(move |conn| {
        let Some(told) = told(conn, version) else { return };
        let mine = {
            let mut all = all.lock().expect("lock");
            all.push((told, Vec::new()));
            all.len() - 1
        };
        while let Some(seen) = conn.request() {
            let path = seen.line().split(' ').nth(1).expect("a path").to_owned();
            all.lock().expect("lock")[mine].1.push(path);
            conn.answer("ok");
        }
    });
    (origin, connections)
}

fn telling(origin: &Origin, version: ProxyProtocol) -> ServiceSpec {
    let mut web = service(vec![upstream(origin.addr)]);
    web.policy.send_proxy_protocol = Some(version);
    web
}

fn trusting() -> Config {
    Config { trusted_proxies: vec!["127.0.0.1".parse().expect("a network")], ..config() }
}

#[test]
fn two_clients_never_share_a_connection_that_is_for_one_of_them() {
    const CLIENTS: usize = 4;
    const REQUESTS: usize = 50;
    for version in BOTH {
        let (origin, connections) = insisting(version);
        let edge = TestEdge::start(telling(&origin, version));
        let addr = edge.addr;
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                std::thread::spawn(move || {
                    let mut client = super::support::Client::connect(addr);
                    let own = client.socket.local_addr().expect("an address");
                    for round in 0..REQUESTS {
                        let path = format!("/{}", own.port());
                        let answer =
                            if round % 3 == 0 { client.post(&path, "body") } else { client.get(&path) };
                        assert_eq!((answer.status, answer.text()), (200, "ok"));
                        assert_eq!(answer.all("connection"), Vec::<&str>::new(), "the client's own is kept");
                    }
                })
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().expect("no request fails"));
        let connections = connections.lock().expect("lock");
        assert_eq!(connections.len(), CLIENTS * REQUESTS);
        for (told, paths) in &*connections {
            let (source, destination) = told.expect("it is for somebody");
            assert_eq!((source.ip(), destination), (Ipv4Addr::LOCALHOST.into(), addr));
            assert_eq!(*paths, [format!("/{}", source.port())], "one request, of whom it is for");
        }
        assert!(origin.seen().iter().all(|seen| seen.all("connection") == ["close"]));
    }
}

#[test]
fn the_client_is_whom_the_edge_believes_in() {
    let asked = |version, fields: &str| {
        let (origin, connections) = insisting(version);
        let edge = TestEdge::start_with(trusting(), vec![telling(&origin, version)]);
        let answer = edge.client().send(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).answer();
        assert_eq!(answer.status, 200, "{fields}");
        let (source, destination) = connections.lock().expect("lock")[0].0.expect("it is for somebody");
        assert_eq!(destination.port(), edge.addr.port());
        source
    };
    for version in BOTH {
        // His port is not known, and an address that cannot be read is nobody's, and never the edge's.
        for (fields, client) in [
            ("X-Forwarded-For: 198.51.100.7\r\n", "198.51.100.7:0"),
            ("Forwarded: for=\"198.51.100.7:4711\"\r\n", "198.51.100.7:0"),
            ("X-Forwarded-For: 198.51.100.7, x\r\n", "0.0.0.0:0"),
        ] {
            assert_eq!(asked(version, fields).to_string(), client, "{fields}");
        }
    }
    let source = asked(ProxyProtocol::V1, "X-Forwarded-For: 2001:db8::7\r\n");
    assert_eq!(source.to_string(), "[2001:db8::7]:0");
}

#[test]
fn what_a_balancer_says_of_both_ends_goes_on() {
    let (origin, connections) = insisting(ProxyProtocol::V2);
    let from = vec!["127.0.0.1".parse().expect("a network")];
    let behind = Config { proxy_protocol_from: from, ..config() };
    let edge = TestEdge::start_with(behind, vec![telling(&origin, ProxyProtocol::V2)]);
    let mut client = edge.client();
    client.send("PROXY TCP4 198.51.100.7 192.0.2.1 56789 443\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.answer().status, 200);
    let (source, destination) = connections.lock().expect("lock")[0].0.expect("it is for somebody");
    assert_eq!(
        (source.to_string(), destination.to_string()),
        ("198.51.100.7:56789".into(), "192.0.2.1:443".into())
    );
}

#[test]
fn a_tunnel_begins_with_the_header_of_its_client() {
    for version in BOTH {
        let origin = Origin::scripted(move |conn| {
            let Some(Some((source, _))) = told(conn, version) else { return };
            let Some(seen) = conn.request() else { return };
            assert_eq!(seen.all("connection"), ["upgrade"]);
            conn.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\n");
            conn.write(format!("{source}\n").as_bytes());
            while conn.more().is_some() {
                let echoed = std::mem::take(&mut conn.unread);
                conn.write(&echoed);
            }
        });
        let edge = TestEdge::start(telling(&origin, version));
        let mut client = edge.client();
        let own = format!("{}\n", client.socket.local_addr().expect("an address"));
        client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\n");
        assert!(client.head().starts_with("HTTP/1.1 101"));
        client.send("hello");
        let expected = [own.as_bytes(), b"hello"].concat();
        while client.unread.len() < expected.len() {
            assert!(client.more() > 0, "closed");
        }
        assert_eq!(client.unread, expected);
    }
}

#[test]
fn a_name_that_is_passed_through_has_the_header_before_the_hello() {
    for version in BOTH {
        let ca = Authority::new();
        let id = ca.issue(&["pass.test"]);
        let settings = tls::server(ca.forget(id).expect("was issued"));
        let connections = Connections::default();
        let all = Arc::clone(&connections);
        let origin = Origin::scripted(move |conn| {
            let Some(told) = told(conn, version) else { return };
            all.lock().expect("lock").push((told, Vec::new()));
            let mut session = ServerConnection::new(Arc::clone(&settings)).expect("a session");
            let mut early = &std::mem::take(&mut conn.unread)[..];
            while !early.is_empty() {
                session.read_tls(&mut early).expect("is read");
            }
            drop(session.process_new_packets());
            let mut stream = StreamOwned::new(session, conn.socket.try_clone().expect("a socket"));
            let mut chunk = [0; 1024];
            while let Ok(read @ 1..) = stream.read(&mut chunk) {
                if stream.write_all(&chunk[..read]).and_then(|()| stream.flush()).is_err() {
                    return;
                }
            }
        });
        let policy = DomainPolicy { mode: TlsMode::PassThrough, ..DomainPolicy::default() };
        let changes = [tls::put("pass.test", None, policy)];
        let edge = tls::edge(config(), vec![telling(&origin, version)], &ca, &changes);
        let mut client = tls::connect(edge.https(), "pass.test", tls::client(&ca, &[]));
        client.send("through");
        while client.unread.len() < 7 {
            assert!(client.more() > 0, "closed");
        }
        assert_eq!(client.unread, b"through");
        let (source, destination) = connections.lock().expect("lock")[0].0.expect("it is for somebody");
        assert_eq!(source, client.socket.sock.local_addr().expect("an address"));
        assert_eq!(destination, edge.https());
    }
}

#[test]
fn probes_of_an_origin_that_insists_say_that_they_are_for_nobody() {
    let http = HealthCheckKind::Http { path: "/healthz".into(), host: None };
    for (version, kind) in BOTH.into_iter().flat_map(|v| [(v, http.clone()), (v, HealthCheckKind::Tcp)]) {
        let (origin, connections) = insisting(version);
        let mut web = telling(&origin, version);
        web.policy.health = Some(HealthCheck {
            kind: kind.clone(),
            interval_ms: 20,
            timeout_ms: 1_000,
            healthy_threshold: 2,
            unhealthy_threshold: 2,
        });
        let spec = web.pools[0].upstreams[0].clone();
        let edge = TestEdge::start(web);
        let upstream = edge.upstream(&spec);
        until("it is healthy", || upstream.health() == Health::Healthy);
        until("the origin was told", || !connections.lock().expect("lock").is_empty());
        for (told, paths) in &*connections.lock().expect("lock") {
            assert_eq!(*told, None);
            assert!(paths.iter().all(|path| path == "/healthz"));
        }
    }
}

#[test]
fn a_setting_that_changes_holds_for_probes_and_requests_of_the_same_copy() {
    let (origin, connections) = insisting(ProxyProtocol::V2);
    let mut web = telling(&origin, ProxyProtocol::V2);
    let spec = web.pools[0].upstreams[0].clone();
    let plain = Origin::ok();
    // A connection without a header is at hand, and is not for those who are to have one.
    web.pools[0].upstreams[0] = upstream(plain.addr);
    web.policy.send_proxy_protocol = None;
    let mut edge = TestEdge::start(web.clone());
    let mut client = edge.client();
    assert_eq!(client.get("/").status, 200);
    assert_eq!(client.get("/").status, 200);
    assert_eq!(plain.connections(), 1, "it is kept");
    web.policy.send_proxy_protocol = Some(ProxyProtocol::V1);
    let version = edge.put(web.clone());
    edge.wait_acknowledged(version);
    // What comes is a header, which this one does not take for a request.
    drop(client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").answer());
    assert_eq!(plain.connections(), 2, "another connection");
    web.pools[0].upstreams[0] = spec;
    web.policy.send_proxy_protocol = Some(ProxyProtocol::V2);
    edge.put(web);
    assert_eq!(edge.client().get("/").status, 200);
    assert_eq!(connections.lock().expect("lock").len(), 1);
}

#[test]
fn no_connection_is_opened_ahead_for_nobody_knows_whom() {
    let (origin, connections) = insisting(ProxyProtocol::V1);
    let mut web = telling(&origin, ProxyProtocol::V1);
    web.pools[0].upstreams[0].ready_connections = 3;
    let mut edge = TestEdge::start(web.clone());
    // The table before the last one was followed to its end.
    for _ in 0..2 {
        let version = edge.put(web.clone());
        edge.wait_acknowledged(version);
    }
    assert_eq!(edge.client().get("/").status, 200);
    assert_eq!((origin.connections(), connections.lock().expect("lock").len()), (1, 1));
}

#[test]
fn a_copy_of_a_request_is_for_its_client_too() {
    let ((old, _), (new, connections)) = (insisting(ProxyProtocol::V2), insisting(ProxyProtocol::V2));
    let mut web = telling(&old, ProxyProtocol::V2);
    let mut pool = web.pools[0].clone();
    let target = upstream(new.addr);
    (pool.name, pool.weight, pool.upstreams) = ("new".into(), 0, vec![target.clone()]);
    web.pools.push(pool);
    web.policy.mirror = Some(Box::new(MirrorSpec {
        pool: "new".into(),
        sample_permille: 1_000,
        max_requests_per_s: 100_000,
        max_concurrent: 1_000,
        timeout_ms: 5_000,
        max_body_bytes: 1 << 20,
        with_credentials: false,
        lasts_ms: 60_000,
    }));
    let edge = TestEdge::start_with(trusting(), vec![web]);
    let mut client = edge.client();
    for number in 1..=3_u8 {
        let address = IpAddr::from([198, 51, 100, number]);
        client.send(format!("GET /{number} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {address}\r\n\r\n"));
        assert_eq!(client.answer().status, 200);
        until("its copy has ended", || edge.upstream(&target).mirrored().judged() == u64::from(number));
    }
    for (told, paths) in &*connections.lock().expect("lock") {
        let (source, _) = told.expect("it is for somebody");
        let IpAddr::V4(source) = source.ip() else { panic!("of IPv4") };
        assert_eq!(*paths, [format!("/{}", source.octets()[3])]);
    }
    assert_eq!(connections.lock().expect("lock").len(), 3);
}
