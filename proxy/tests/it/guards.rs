//! What one client may take of what all share: connections, memory, time.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use peregrine_proxy::{Config, Limits};

use super::support::{Client, Origin, PATIENCE, TestEdge, config, service, until, upstream};

fn edge(config: Config, origin: &Origin) -> TestEdge {
    TestEdge::start_with(config, vec![service(vec![upstream(origin.addr)])])
}

#[test]
fn a_source_has_so_many_connections_over_all_cores_and_another_is_still_served() {
    let origin = Origin::ok();
    let limits = Limits { max_connections_per_source: 4, ..Limits::default() };
    let edge = edge(Config { cores: 2, limits, ..config() }, &origin);
    let mut held: Vec<Client> = (0..4).map(|_| edge.client()).collect();
    for client in &mut held {
        assert_eq!(client.get("/").status, 200);
    }
    for _ in 0..10 {
        assert!(edge.client().is_closed(), "one too many");
    }
    let from_elsewhere = || {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
        let own: std::net::SocketAddr = "127.0.0.2:0".parse().expect("address");
        socket.bind(&own.into()).expect("binds");
        socket.connect(&edge.addr.into()).expect("connects");
        let socket = std::net::TcpStream::from(socket);
        socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
        Client { socket, unread: Vec::new() }
    };
    assert_eq!(from_elsewhere().get("/").status, 200);
    drop(held.pop());
    until("there is room again", || {
        let mut client = edge.client();
        client.send_anyhow("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
        client.more() > 0
    });
}

#[test]
fn above_its_memory_the_edge_tells_new_requests_to_come_later_unless_hardly_any_are_under_way() {
    let go_on = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&go_on);
    let origin = Origin::scripted(move |conn| {
        while let Some(seen) = conn.request() {
            if seen.line().contains("/held") {
                until("it may go on", || may.load(Ordering::SeqCst));
            }
            conn.answer("ok");
        }
    });
    let limits = Limits { max_memory_bytes: 1, ..Limits::default() };
    let edge_without = edge(Config { limits, ..config() }, &origin);
    let mut held: Vec<Client> = (0..4).map(|_| edge_without.client()).collect();
    for client in &mut held {
        client.send("GET /held HTTP/1.1\r\nHost: a\r\n\r\n");
    }
    until("they are inside", || origin.seen().len() == 4);
    let mut client = edge_without.client();
    for _ in 0..3 {
        let answer = client.get("/");
        assert_eq!((answer.status, answer.reason()), (503, "overloaded"));
        assert!(answer.field("retry-after").is_some());
    }
    assert_eq!(origin.seen().len(), 4);
    go_on.store(true, Ordering::SeqCst);
    for client in &mut held {
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!(client.get("/").status, 200, "it does not shed for ever");
    let limits = Limits { max_memory_bytes: 1 << 50, ..Limits::default() };
    let edge_with = edge(Config { limits, ..config() }, &origin);
    assert_eq!(edge_with.client().get("/").status, 200);
}

#[test]
fn an_upload_that_drips_is_cut_and_one_that_flows_is_not() {
    let origin = Origin::ok();
    let edge = TestEdge::before(&origin);
    let head = "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 100000\r\n\r\n";
    let (mut drips, mut flows) = (edge.client(), edge.client());
    drips.send(head);
    flows.send(head);
    drips.socket.set_read_timeout(Some(Duration::from_millis(1))).expect("time-out");
    let started = std::time::Instant::now();
    let mut sent = 0;
    // Looked at every ten seconds, and ended by two looks.
    let mut byte = [0];
    while drips.socket.peek(&mut byte).is_err() {
        assert!(started.elapsed() < Duration::from_secs(20) + PATIENCE, "it goes on dripping");
        drips.send_anyhow("x");
        flows.send("x".repeat(100));
        sent += 100;
        std::thread::park_timeout(Duration::from_millis(500));
    }
    drips.socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
    let answer = drips.answer();
    assert_eq!((answer.status, answer.reason()), (408, "body_timeout"));
    assert!(started.elapsed() >= Duration::from_secs(9));
    assert_eq!(flows.send("x".repeat(100_000 - sent)).answer().status, 200);
}

fn behind_a_balancer(origin: &Origin) -> TestEdge {
    let from = vec!["127.0.0.1".parse().expect("network")];
    edge(Config { proxy_protocol_from: from, ..config() }, origin)
}

#[test]
fn a_balancer_says_in_both_versions_for_whom_it_connects() {
    let origin = Origin::ok();
    let edge = behind_a_balancer(&origin);
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc6\x33\x64\x08\xc0\0\x02\x01\xdd\xd5\0\x50";
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
    for (header, client) in [
        (&b"PROXY TCP4 198.51.100.7 192.0.2.1 56789 80\r\n"[..], "198.51.100.7"),
        (b"PROXY TCP6 2001:db8::9 2001:db8::1 258 443\r\n", "2001:db8::9"),
        (v2, "198.51.100.8"),
        (local, "127.0.0.1"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    ] {
        let mut at_once = edge.client();
        let answer = at_once.send([header, request.as_bytes()].concat()).answer();
        assert_eq!(answer.status, 200, "{client}");
        assert_eq!(origin.last().all("x-forwarded-for"), [client]);
        assert_eq!(at_once.get("/again").status, 200, "there is one header for a connection");
        let mut in_pieces = edge.client();
        for byte in [header, request.as_bytes()].concat() {
            in_pieces.send([byte]);
        }
        assert_eq!(in_pieces.answer().status, 200);
        let seen = origin.last();
        assert_eq!(seen.all("x-forwarded-for"), [client]);
        let address: IpAddr = client.parse().expect("address");
        assert!(seen.field("forwarded").expect("is there").contains(&address.to_string()));
    }
}

#[test]
fn who_has_to_introduce_a_client_and_does_not_is_not_served() {
    let origin = Origin::ok();
    let edge = behind_a_balancer(&origin);
    for bytes in [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
        "\r\n\r\n\0\r\nQUIT\nxxxxxxxx",
    ] {
        let mut client = edge.client();
        assert!(client.send_anyhow(bytes).is_closed(), "{bytes:?}");
    }
    assert!(origin.seen().is_empty());
    let limits = Limits { head_timeout_ms: 300, ..Limits::default() };
    let from = vec!["127.0.0.1".parse().expect("network")];
    let impatient = super::guards::edge(Config { proxy_protocol_from: from, limits, ..config() }, &origin);
    assert!(impatient.client().send_anyhow("PROXY TCP4 1.2").is_closed(), "a header does not take for ever");
}

#[test]
fn a_strangers_header_of_the_proxy_protocol_is_a_malformed_request() {
    let origin = Origin::ok();
    let from = vec!["192.0.2.0/24".parse().expect("network")];
    for edge in [TestEdge::before(&origin), edge(Config { proxy_protocol_from: from, ..config() }, &origin)] {
        for header in
            [&b"PROXY TCP4 198.51.100.7 192.0.2.1 56789 80\r\n"[..], b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"]
        {
            let mut client = edge.client();
            let answer = client.send_anyhow([header, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"].concat()).answer();
            assert_eq!((answer.status, answer.reason()), (400, "bad_request_head"));
            assert!(client.is_closed());
        }
    }
    assert!(origin.seen().is_empty());
}

#[test]
fn connections_of_one_source_are_counted_by_whom_they_are_for() {
    let origin = Origin::ok();
    let limits = Limits { max_connections_per_source: 1, ..Limits::default() };
    let from = vec!["127.0.0.1".parse().expect("network")];
    let edge = edge(Config { proxy_protocol_from: from, limits, ..config() }, &origin);
    let connect = |client: &str| {
        let mut conn = edge.client();
        conn.send_anyhow(format!("PROXY TCP4 {client} 192.0.2.1 5 80\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        conn
    };
    let (mut one, mut other) = (connect("198.51.100.1"), connect("198.51.100.2"));
    assert_eq!((one.answer().status, other.answer().status), (200, 200));
    assert!(connect("198.51.100.1").is_closed());
}

#[test]
fn an_edge_that_ends_does_not_wait_for_a_client_who_was_introduced_meanwhile() {
    let origin = Origin::ok();
    let from = vec!["127.0.0.1".parse().expect("network")];
    let patient = Config { proxy_protocol_from: from, drain_timeout_ms: 120_000, ..config() };
    let mut edge = edge(patient, &origin);
    let mut client = edge.client();
    client.send("PROXY TCP4 198.51.100.7 192.0.2.1 ");
    // Accepted later than this one, so it is accepted.
    let mut other = edge.client();
    other.send("PROXY UNKNOWN\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(other.answer().status, 200);
    edge.ask_to_stop();
    assert!(other.is_closed(), "it was told");
    client.send("56789 80\r\n");
    assert!(client.is_closed(), "and so is this one, as soon as it is known whose it is");
}

#[test]
fn a_place_that_is_free_again_goes_to_whoever_waits_at_whichever_address() {
    let origin = Origin::ok();
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().expect("address");
    let limits = Limits { max_connections: 1, ..Limits::default() };
    let (mut writer, reader) = peregrine_routing::table();
    let put = peregrine_routing::Change::Put(service(vec![upstream(origin.addr)]));
    writer.apply(&[put]).expect("is accepted");
    let both = Config { limits, http: vec![any, any], ..config() };
    let edge = peregrine_proxy::Edge::bind(both, reader).expect("binds");
    let addrs = edge.addrs();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(edge.run(async move { drop(stopped.await) })).expect("ends as asked");
    });
    let mut last = Client::connect(addrs[0]);
    assert_eq!(last.get("/").status, 200);
    for turn in 1..6 {
        // The acceptor of the address that has the place waits for one, too.
        let mut next = Client::connect(addrs[turn % 2]);
        next.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        drop(last);
        assert_eq!(next.answer().status, 200, "turn {turn}");
        last = next;
    }
    drop((last, stop));
    thread.join().expect("no panic");
}
