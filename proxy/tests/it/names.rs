//! Upstreams by DNS name. The answers come from a name server of the test's own, on port 53 of a network namespace of
//! its own, where a `resolv.conf` of its own points at it: the edge looks names up as it does on any machine.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use peregrine_routing::{Address, UpstreamSpec};

use super::support::{Origin, PATIENCE, TestEdge, service, until, upstream};

/// Set for the half of a test that runs inside the namespace.
const INSIDE: &str = "PEREGRINE_TEST_NAMESPACE";
const NAME: &str = "copy.peregrine.internal";

fn named(host: &str, port: u16) -> UpstreamSpec {
    let address = Address::Name { host: host.into(), port };
    UpstreamSpec { address, ..upstream(SocketAddr::from(([127, 0, 0, 1], port))) }
}

/// Whether the caller is inside; if not, the test is run again inside, and has passed when this returns. Without
/// the right to make namespaces it is skipped, or fails where everything has to run.
fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let enter = ["--mount", "--net", "--map-root-user", "sh", "-ec"];
    let can = Command::new("unshare").args(enter).arg("ip link set lo up").output();
    if !can.as_ref().is_ok_and(|output| output.status.success()) {
        let required = std::env::var_os("PEREGRINE_REQUIRE_DOCKER").is_some_and(|value| value == "1");
        assert!(!required, "no network namespace can be made here: {can:?}");
        eprintln!(
            "skipped: no network namespace can be made here (needs unshare, ip and the right to use them)"
        );
        return false;
    }
    let conf = tempfile::NamedTempFile::new().expect("temporary file");
    let options = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    std::fs::write(conf.path(), options).expect("is written");
    let script = "ip link set lo up; mount --bind \"$1\" /etc/resolv.conf; shift; exec \"$@\"";
    let output = Command::new("unshare")
        .args(enter)
        .args([script, "sh"])
        .arg(conf.path())
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "--nocapture", &format!("names::{test}")])
        .env(INSIDE, "1")
        .output()
        .expect("unshare runs");
    let said = [&*output.stdout, &*output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "inside the namespace: {said}");
    false
}

/// A name server that knows one name, with one IPv4 address and a lifetime of a second.
struct NameServer {
    address: Arc<AtomicU32>,
    is_silent: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    others: Arc<Mutex<Vec<String>>>,
}

impl NameServer {
    fn start(address: Ipv4Addr) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:53").expect("port 53 of the namespace is free");
        let server = Self {
            address: Arc::new(AtomicU32::new(address.to_bits())),
            is_silent: Arc::default(),
            asked: Arc::default(),
            others: Arc::default(),
        };
        let (address, is_silent) = (Arc::clone(&server.address), Arc::clone(&server.is_silent));
        let (asked, others) = (Arc::clone(&server.asked), Arc::clone(&server.others));
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut query) {
                let (name, after) = name_of(&query[..length]);
                asked.fetch_add(1, Ordering::SeqCst);
                if name != NAME {
                    others.lock().expect("lock").push(name.clone());
                }
                if !is_silent.load(Ordering::SeqCst) {
                    let address = (name == NAME).then(|| address.load(Ordering::SeqCst));
                    socket.send_to(&answer(&query[..length], after, address), from).expect("is sent");
                }
            }
        });
        server
    }

    fn move_to(&self, address: Ipv4Addr) {
        self.address.store(address.to_bits(), Ordering::SeqCst);
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// The name in the question of a query (RFC 1035 §4.1.2), and where its type begins.
fn name_of(query: &[u8]) -> (String, usize) {
    let (mut labels, mut at) = (Vec::new(), 12);
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).to_ascii_lowercase());
        at = end;
    }
    (labels.join("."), at + 1)
}

/// The answer to a query: one A record, nothing for another type, NXDOMAIN without an address.
fn answer(query: &[u8], question_type: usize, address: Option<u32>) -> Vec<u8> {
    let is_a = query[question_type..question_type + 2] == [0, 1];
    let found = address.filter(|_| is_a);
    let code = if address.is_some() { 0 } else { 3 };
    let mut answer = query[..2].to_vec();
    answer.extend([0x84, code, 0, 1, 0, u8::from(found.is_some()), 0, 0, 0, 0]);
    answer.extend(&query[12..question_type + 4]);
    if let Some(address) = found {
        let second = 1_u32;
        answer.extend([0xc0, 12, 0, 1, 0, 1]);
        answer.extend(second.to_be_bytes());
        answer.extend([0, 4]);
        answer.extend(address.to_be_bytes());
    }
    answer
}

/// An origin on an address of its own that says who it is, and ends the connection after each answer.
fn origin(at: SocketAddr, text: &'static str) -> Origin {
    Origin::scripted_on(TcpListener::bind(at).expect("binds"), move |conn| {
        if conn.request().is_some() {
            let length = text.len();
            let head =
                format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{text}");
            conn.write(head.as_bytes());
        }
    })
}

#[test]
fn a_name_is_looked_up_and_followed_when_its_address_changes() {
    if !is_inside("a_name_is_looked_up_and_followed_when_its_address_changes") {
        return;
    }
    let (one, two) = (Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3));
    let first = origin((one, 0).into(), "one");
    let port = first.addr.port();
    let second = origin((two, port).into(), "two");
    let names = NameServer::start(one);
    let edge = TestEdge::start(service(vec![named(NAME, port)]));
    let mut client = edge.client();
    let answer = client.get("/");
    assert_eq!((answer.status, answer.text()), (200, "one"));
    assert_eq!(first.last().field("host"), Some("a.test"), "the client's host goes on, not the name");
    names.move_to(two);
    until("the new address is used", || client.get("/").text() == "two");
    let served = first.seen().len();
    for _ in 0..10 {
        assert_eq!(client.get("/").text(), "two");
    }
    assert_eq!(first.seen().len(), served, "the old address gets nothing more");
    assert!(second.seen().len() > 10);
    assert!(names.others.lock().expect("lock").is_empty(), "no other name is asked for");
}

#[test]
fn a_name_that_cannot_be_looked_up_any_more_keeps_its_last_address() {
    if !is_inside("a_name_that_cannot_be_looked_up_any_more_keeps_its_last_address") {
        return;
    }
    let address = Ipv4Addr::new(127, 0, 0, 2);
    let first = origin((address, 0).into(), "one");
    let names = NameServer::start(address);
    let edge = TestEdge::start(service(vec![named(NAME, first.addr.port())]));
    let mut client = edge.client();
    assert_eq!(client.get("/").status, 200);
    names.is_silent.store(true, Ordering::SeqCst);
    let asked = names.asked();
    // Far beyond the answer's lifetime: it has been asked for again and again.
    until("it is asked for in vain", || {
        assert_eq!(client.get("/").status, 200, "an outage of DNS is no outage of the site");
        names.asked() >= asked + 4
    });
    names.is_silent.store(false, Ordering::SeqCst);
    let second = origin((Ipv4Addr::new(127, 0, 0, 3), first.addr.port()).into(), "two");
    names.move_to(Ipv4Addr::new(127, 0, 0, 3));
    until("the name server is believed again", || client.get("/").text() == "two");
    assert!(!second.seen().is_empty());
}

#[test]
fn a_name_that_nobody_knows_is_told_as_such() {
    if !is_inside("a_name_that_nobody_knows_is_told_as_such") {
        return;
    }
    let names = NameServer::start(Ipv4Addr::LOCALHOST);
    let spec = named("nobody.peregrine.internal", 80);
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (502, "upstream_dns_failed"));
    assert_eq!(edge.upstream(&spec).receipt().started, 0, "nothing was ever sent");
    assert!(names.others.lock().expect("lock").iter().any(|name| name == "nobody.peregrine.internal"));
}

#[test]
fn a_name_server_that_says_nothing_does_not_hold_a_request_for_ever() {
    if !is_inside("a_name_server_that_says_nothing_does_not_hold_a_request_for_ever") {
        return;
    }
    let names = NameServer::start(Ipv4Addr::LOCALHOST);
    names.is_silent.store(true, Ordering::SeqCst);
    let mut web = service(vec![named(NAME, 80)]);
    web.policy.connect_timeout_ms = 300;
    let edge = TestEdge::start(web);
    let started = std::time::Instant::now();
    let answer = edge.client().get("/");
    assert_eq!((answer.status, answer.reason()), (504, "upstream_connect_timeout"));
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn a_name_that_is_an_address_needs_no_name_server() {
    let origin = Origin::ok();
    let edge = TestEdge::start(service(vec![named("127.0.0.1", origin.addr.port())]));
    assert_eq!(edge.client().get("/").status, 200);
}

/// A name may have addresses of both families, of which one leads nowhere: `localhost`, with an origin that listens
/// on 127.0.0.1 only. Whichever of the two is tried first, the other is tried after it.
#[test]
fn a_name_with_an_address_that_leads_nowhere_is_reached_by_the_other() {
    let origin = Origin::scripted(|conn| {
        if conn.request().is_some() {
            conn.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let spec = named("localhost", origin.addr.port());
    let edge = TestEdge::start(service(vec![spec.clone()]));
    let mut client = edge.client();
    for i in 0..100 {
        assert_eq!(client.get("/").status, 200, "request {i}");
    }
    assert_eq!(edge.upstream(&spec).ejected_until_ms(), 0, "the copy has done nothing wrong");
}
