//! TLS at the edge: handshakes, protocols, certificates.

use std::io::Write;
use std::sync::Arc;

use peregrine_proxy::{Config, Limits};
use peregrine_routing::{Change, DomainPolicy, TlsVersion};
use rustls::AlertDescription;

use crate::support::{Origin, TestEdge, config, service, until, upstream};
use crate::tls_support::{self as tls, Authority, domain};

const HTTP11: &[&[u8]] = &[b"http/1.1"];

fn edge(origin: &Origin, ca: &Arc<Authority>, changes: &[Change]) -> TestEdge {
    tls::edge(config(), vec![service(vec![upstream(origin.addr)])], ca, changes)
}

#[test]
fn a_request_over_tls_reaches_its_upstream_which_hears_of_https() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    let answer = client.get("/");
    assert_eq!((answer.status, answer.text()), (200, "ok"));
    let seen = origin.last();
    assert_eq!(seen.field("x-forwarded-proto"), Some("https"));
    assert!(seen.field("forwarded").is_some_and(|text| text.ends_with(";proto=https")), "{}", seen.head);
    assert_eq!(client.get("/again").status, 200, "the connection is kept");
    assert_eq!(origin.connections(), 1);
    assert_eq!(ca.loads(), 1);
}

#[test]
fn each_name_has_its_own_certificate_which_is_loaded_once() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test"), domain(&ca, "*.b.test")]);
    for name in ["a.test", "x.b.test", "A.test", "y.b.test", "a.test"] {
        let client = tls::connect(edge.https(), name, tls::client(&ca, HTTP11));
        assert!(!client.socket.conn.is_handshaking(), "{name}");
    }
    assert_eq!(ca.loads(), 2);
}

#[test]
fn a_name_that_is_nobodys_is_refused_by_an_alert_and_costs_the_source_nothing() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    for _ in 0..3 {
        let alert = tls::alert(edge.https(), "other.test", tls::client(&ca, HTTP11));
        assert_eq!(alert, Some(AlertDescription::UnrecognisedName));
    }
    assert_eq!(ca.loads(), 0);
    assert_eq!(*ca.wanted.lock().unwrap(), ["other.test"], "it is told once");
}

#[test]
fn alpn_decides_the_protocol_and_without_it_it_is_http11() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    for (offered, chosen) in
        [(&[&b"h2"[..], b"http/1.1"][..], Some(&b"h2"[..])), (&[b"http/1.1"], Some(b"http/1.1")), (&[], None)]
    {
        let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, offered));
        assert_eq!(client.socket.conn.alpn_protocol(), chosen);
        if chosen != Some(b"h2") {
            assert_eq!(client.get("/").status, 200, "{chosen:?}");
        }
    }
    let alert = tls::alert(edge.https(), "a.test", tls::client(&ca, &[b"ftp"]));
    assert_eq!(alert, Some(AlertDescription::NoApplicationProtocol));
}

#[test]
fn many_streams_of_one_http2_connection_over_tls_are_answered() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let statuses = tls::h2_get(edge.https(), "a.test", tls::client(&ca, &[b"h2"]), &["https://a.test/"; 40]);
    assert_eq!(statuses, [200; 40]);
    assert_eq!(origin.last().field("x-forwarded-proto"), Some("https"));
}

#[test]
fn tls12_and_tls13_are_spoken_with_the_post_quantum_group_first_and_older_ones_refused_where_the_domain_says_so()
 {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let modern = DomainPolicy { min_version: TlsVersion::Tls13, ..DomainPolicy::default() };
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test"), tls::domain_with(&ca, "modern.test", modern)]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut client = tls::connect(edge.https(), "a.test", tls::client_of(&ca, version));
        assert_eq!(client.get("/").status, 200);
        assert_eq!(client.socket.conn.protocol_version(), Some(version.version));
        let group = client.socket.conn.negotiated_key_exchange_group().map(|group| group.name());
        let expected = match version.version {
            rustls::ProtocolVersion::TLSv1_3 => rustls::NamedGroup::X25519MLKEM768,
            _ => rustls::NamedGroup::X25519,
        };
        assert_eq!(group, Some(expected));
    }
    let old = tls::client_of(&ca, &rustls::version::TLS12);
    assert_eq!(tls::alert(edge.https(), "modern.test", old), Some(AlertDescription::ProtocolVersion));
}

#[test]
fn a_certificate_that_cannot_be_had_is_asked_for_once_in_a_while_and_leaves_others_alone() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let id = ca.issue(&["gone.test"]);
    assert!(ca.forget(id).is_some());
    let gone = tls::put("gone.test", Some(id), DomainPolicy::default());
    let none_yet = tls::put("new.test", None, DomainPolicy::default());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test"), gone, none_yet]);
    for _ in 0..3 {
        let alert = tls::alert(edge.https(), "gone.test", tls::client(&ca, HTTP11));
        assert_eq!(alert, Some(AlertDescription::InternalError));
    }
    assert_eq!(ca.loads(), 1);
    let alert = tls::alert(edge.https(), "new.test", tls::client(&ca, HTTP11));
    assert_eq!(alert, Some(AlertDescription::UnrecognisedName));
    assert_eq!(*ca.wanted.lock().unwrap(), ["new.test"], "somebody may order it");
    assert_eq!(tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11)).get("/").status, 200);
}

#[test]
fn a_new_certificate_is_presented_from_the_next_handshake_on_and_the_connection_before_it_lives() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let mut edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut before = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    assert_eq!(before.get("/").status, 200);
    let version = edge.writer.apply(&[domain(&ca, "a.test")]).unwrap().version;
    edge.wait_acknowledged(version);
    let after = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    assert_ne!(tls::presented(&before), tls::presented(&after));
    assert_eq!(before.get("/").status, 200);
}

#[test]
fn a_bounded_cache_forgets_what_was_not_used_for_long_and_loads_it_again() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let names: Vec<String> = (0..6).map(|number| format!("n{number}.test")).collect();
    let domains: Vec<Change> = names.iter().map(|name| domain(&ca, name)).collect();
    let limits = Limits { max_certificates: 4, ..Limits::default() };
    let services = vec![service(vec![upstream(origin.addr)])];
    let edge = tls::edge(Config { limits, ..config() }, services, &ca, &domains);
    let ask = |name: &str| drop(tls::connect(edge.https(), name, tls::client(&ca, HTTP11)));
    names.iter().for_each(|name| ask(name));
    assert_eq!(ca.loads(), 6);
    ask(&names[5]);
    assert_eq!(ca.loads(), 6, "used a moment ago");
    ask(&names[0]);
    assert_eq!(ca.loads(), 7, "forgotten");
}

#[test]
fn large_bodies_pass_whole_in_both_directions_over_tls() {
    let body: Vec<u8> = (0..3_000_000_u32).map(|at| (at * 7 / 3) as u8).collect();
    let sent = body.clone();
    let origin = Origin::scripted(move |conn| {
        while let Some(seen) = conn.request() {
            conn.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", seen.body.len()).as_bytes());
            conn.write(&seen.body);
        }
    });
    let ca = Authority::new();
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    for _ in 0..2 {
        client.send(format!("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: {}\r\n\r\n", sent.len()));
        client.send(&sent);
        let answer = client.answer();
        assert!(answer.status == 200 && answer.body == body);
    }
}

#[test]
fn a_tunnel_works_over_tls_and_what_was_sent_with_the_request_arrives() {
    let origin = Origin::scripted(|conn| {
        let Some(_) = conn.request() else { return };
        conn.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly");
        let mut come = std::mem::take(&mut conn.unread);
        while !come.is_empty() || conn.more().is_some() {
            come.append(&mut conn.unread);
            conn.write(&std::mem::take(&mut come));
        }
    });
    let ca = Authority::new();
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nfirst");
    assert!(client.head().starts_with("HTTP/1.1 101"));
    let expect = |client: &mut crate::support::Client<tls::Tls>, bytes: &[u8]| {
        while client.unread.len() < bytes.len() {
            assert!(client.more() > 0, "closed");
        }
        assert_eq!(client.unread.drain(..bytes.len()).collect::<Vec<_>>(), bytes);
    };
    expect(&mut client, b"earlyfirst");
    for round in 0..50_u32 {
        let message = round.to_le_bytes().repeat(5_000);
        client.send(&message);
        expect(&mut client, &message);
    }
}

#[test]
fn interim_answers_and_refusals_reach_a_client_over_tls_and_the_end_is_said() {
    let origin = Origin::scripted(|conn| {
        while conn.request().is_some() {
            conn.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n");
            conn.answer("ok");
        }
    });
    let ca = Authority::new();
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    let hints = client.get("/");
    assert_eq!((hints.status, hints.field("link")), (103, Some("</a.css>")));
    assert_eq!(client.answer().text(), "ok");
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\nX: \0\r\n\r\n");
    assert_eq!(client.answer().reason(), "bad_request_head");
    assert!(client.is_closed(), "with a close_notify, or the client would report an error");
}

#[test]
fn an_edge_that_stops_finishes_what_it_has_over_tls_and_says_the_end() {
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let (tell_asked, asked) = std::sync::mpsc::channel::<()>();
    let told = std::sync::Mutex::new(told);
    let origin = Origin::scripted(move |conn| {
        while conn.request().is_some() {
            tell_asked.send(()).expect("is awaited");
            told.lock().expect("lock").recv().expect("is told");
            conn.answer("late");
        }
    });
    let ca = Authority::new();
    let mut edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n");
    asked.recv().expect("reaches the origin");
    edge.ask_to_stop();
    until("it stops to listen", || std::net::TcpStream::connect(edge.https()).is_err());
    tell.send(()).expect("is awaited");
    let answer = client.answer();
    assert_eq!((answer.text(), answer.field("connection")), ("late", Some("close")));
    assert!(client.is_closed());
    edge.wait_stopped();
}

#[test]
fn a_body_in_large_and_small_records_that_come_at_once_arrives_whole() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let mut client = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    let mut body = Vec::new();
    let mut burst = Vec::new();
    client.send("POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 47152\r\n\r\n");
    // More than the edge reads at once, and more plain bytes in it than a session keeps.
    for length in [16_384].into_iter().chain([48; 300]).chain([16_368]) {
        let piece: Vec<u8> = (0..length).map(|at| (at + body.len()) as u8).collect();
        let session = &mut client.socket.conn;
        session.writer().write_all(&piece).expect("is taken");
        while session.wants_write() {
            session.write_tls(&mut burst).expect("is written");
        }
        body.extend(piece);
    }
    assert_eq!(body.len(), 47_152);
    client.socket.sock.write_all(&burst).expect("is sent");
    assert_eq!(client.answer().status, 200);
    assert!(origin.last().body == body);
}
