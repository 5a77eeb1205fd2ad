//! First handshakes for names whose certificate is on its way.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_proxy::{Config, Limits};
use peregrine_routing::DomainPolicy;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConnection};

use crate::support::{Origin, PATIENCE, TestEdge, config, service, until, upstream};
use crate::tls_support::{self as tls, Authority, domain};

const HTTP11: &[&[u8]] = &[b"http/1.1"];
/// How long somebody who is refused waits for that, at the least; who waits is not answered in this time.
const NOT_REFUSED_WITHIN: Duration = Duration::from_millis(200);

fn edge(origin: &Origin, ca: &Arc<Authority>, limits: Limits) -> TestEdge {
    let services = vec![service(vec![upstream(origin.addr)])];
    tls::edge(Config { limits, ..config() }, services, ca, &[domain(ca, "a.test")])
}

fn refused(edge: &TestEdge, ca: &Authority, name: &str) -> bool {
    tls::alert(edge.https(), name, tls::client(ca, HTTP11)) == Some(AlertDescription::UnrecognisedName)
}

/// A client that says its hello and no more; `None` if it is refused.
fn waiting(address: SocketAddr, ca: &Authority, name: &str) -> Option<TcpStream> {
    let server = ServerName::try_from(name.to_owned()).expect("name");
    let mut session = ClientConnection::new(Arc::new(tls::client(ca, HTTP11)), server).expect("session");
    let mut socket = TcpStream::connect(address).expect("connects");
    session.write_tls(&mut socket).expect("is taken");
    socket.set_read_timeout(Some(NOT_REFUSED_WITHIN)).expect("time-out");
    let answer = socket.read(&mut [0; 7]);
    match answer {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Some(socket),
        _ => None,
    }
}

#[test]
fn one_handshake_waits_for_the_certificate_and_is_asked_for_no_retry() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let limits = Limits { handshake_timeout_ms: 400, ..Limits::default() };
    let mut edge = edge(&origin, &ca, limits);
    let coming = ca.is_coming();
    let address = edge.https();
    std::thread::scope(|scope| {
        let visit = || {
            let mut client = tls::connect(address, "new.test", tls::client(&ca, HTTP11));
            client.send("GET / HTTP/1.1\r\nHost: new.test\r\n\r\n").answer().status
        };
        let visits: Vec<_> = (0..3).map(|_| scope.spawn(visit)).collect();
        until("the source was told", || *ca.wanted.lock().unwrap() == ["new.test"]);
        // Longer than a hello that stalls has.
        let begun = Instant::now();
        until("its time would be over", || begun.elapsed() > Duration::from_millis(800));
        assert!(visits.iter().all(|visit| !visit.is_finished()));
        assert_eq!(tls::connect(address, "a.test", tls::client(&ca, HTTP11)).get("/").status, 200);
        edge.writer.apply(&[domain(&ca, "new.test")]).expect("is accepted");
        for visit in visits {
            assert_eq!(visit.join().expect("shakes hands"), 200);
        }
    });
    assert_eq!(*ca.wanted.lock().unwrap(), ["new.test"], "it is told once, however many want it");
    drop(coming);
}

#[test]
fn who_waits_is_refused_when_the_source_says_that_nothing_comes_and_the_next_one_at_once() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, Limits::default());
    let coming = ca.is_coming();
    std::thread::scope(|scope| {
        let visit = scope.spawn(|| refused(&edge, &ca, "new.test"));
        until("the source was told", || !ca.wanted.lock().unwrap().is_empty());
        assert!(!visit.is_finished());
        coming.send_replace(Some(false));
        assert!(visit.join().expect("ends"));
    });
    assert!(refused(&edge, &ca, "new.test"));
    assert_eq!(*ca.wanted.lock().unwrap(), ["new.test"], "what was said is remembered");
}

#[test]
fn a_handshake_waits_no_longer_than_the_limit_also_if_the_source_promises_for_ever() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let limits = Limits { certificate_wait_ms: 500, handshake_timeout_ms: 200, ..Limits::default() };
    let edge = edge(&origin, &ca, limits);
    let coming = ca.is_coming();
    for says in [None, Some(true)] {
        coming.send_replace(says);
        let begun = Instant::now();
        assert!(refused(&edge, &ca, &format!("{}.new.test", says.is_some())));
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(500) && took < PATIENCE, "{took:?}");
    }
    // Where nobody waits it is refused at once; the source is told all the same.
    let limits = Limits { certificate_wait_ms: 0, ..Limits::default() };
    let edge = self::edge(&origin, &ca, limits);
    coming.send_replace(None);
    assert!(refused(&edge, &ca, "other.test"));
    assert_eq!(ca.wanted.lock().unwrap().last().map(String::as_str), Some("other.test"));
}

#[test]
fn so_many_wait_and_no_more_they_keep_nobody_out_and_one_that_leaves_makes_room() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let limits = Limits {
        max_certificate_waits_per_network: 2,
        // Who waits takes no place of these.
        max_handshakes_per_core: 1,
        max_handshakes_per_network: 1,
        ..Limits::default()
    };
    let mut edge = edge(&origin, &ca, limits);
    let _coming = ca.is_coming();
    let first = waiting(edge.https(), &ca, "new.test").expect("it waits");
    let mut second = waiting(edge.https(), &ca, "other.test").expect("it waits");
    for name in ["new.test", "third.test"] {
        assert!(refused(&edge, &ca, name), "{name} is one too many");
    }
    for _ in 0..3 {
        assert_eq!(tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11)).get("/").status, 200);
    }
    // Some bytes behind a hello are none of an answer; more than anybody sends so early are its end.
    second.write_all(&[23; 100]).expect("is taken");
    assert!(waiting(edge.https(), &ca, "new.test").is_none(), "both wait still");
    drop(first);
    let mut again = None;
    until("there is room", || {
        again = waiting(edge.https(), &ca, "new.test");
        again.is_some()
    });
    // A flood behind a hello ends it; the socket may break under it.
    drop(second.write_all(&[23; 200 * 1024]));
    let mut third = None;
    until("there is room", || {
        third = waiting(edge.https(), &ca, "third.test");
        third.is_some()
    });
    edge.writer.apply(&[tls::put("third.test", None, DomainPolicy::default())]).expect("is accepted");
    let mut third = third.expect("it waits");
    assert!(third.read(&mut [0; 7]).is_err(), "a domain without a certificate is none yet");
}
