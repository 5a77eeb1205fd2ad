//! Who clients are, sessions that are resumed, validations, what is passed through, and floods.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_proxy::{CertificateSource, Config, Edge, Limits, TicketKeys, Tickets};
use peregrine_routing::{
    ChallengeAnswer, ChallengeSpec, Change, ClientAuth, DomainPolicy, TlsMode, TrafficClass,
};
use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, HandshakeKind, ServerConnection, StreamOwned,
};

use crate::observe::{recorder, value};
use crate::support::{Client, Origin, PATIENCE, TestEdge, config, service, until, upstream};
use crate::tls_support::{self as tls, Authority, domain, domain_with};

const HTTP11: &[&[u8]] = &[b"http/1.1"];

fn edge(origin: &Origin, ca: &Arc<Authority>, changes: &[Change]) -> TestEdge {
    tls::edge(config(), vec![service(vec![upstream(origin.addr)])], ca, changes)
}

fn asks_clients(ca: &Authority, required: bool) -> DomainPolicy {
    let auth = ClientAuth { authorities: vec![Arc::from(ca.der().as_ref())], required };
    DomainPolicy { client_auth: Some(Arc::new(auth)), ..DomainPolicy::default() }
}

#[test]
fn a_client_with_a_certificate_is_named_to_the_upstream_and_nobody_can_forge_that() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let domains = [domain_with(&ca, "m.test", asks_clients(&ca, false)), domain(&ca, "a.test")];
    let edge = edge(&origin, &ca, &domains);
    let forged = |host: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nClient-Cert: :Zm9v:\r\nClient-Cert-Chain: :Zm9v:\r\n\
             X-Client-Cert-Subject: CN=root\r\nx_client_cert_subject: CN=root\r\n\r\n"
        )
    };
    let (chain, key) = ca.issue_client("ada");
    let der = chain[0].clone();
    let config = tls::builder(&ca).with_client_auth_cert(chain, key).expect("is a pair");
    let mut known = tls::connect(edge.https(), "m.test", config);
    assert_eq!(known.send(forged("m.test")).answer().status, 200);
    let seen = origin.last();
    assert_eq!(seen.all("x-client-cert-subject"), ["O=Example\\, Inc.,CN=ada"]);
    let sent = seen
        .field("client-cert")
        .and_then(|text| text.strip_prefix(':')?.strip_suffix(':'))
        .expect("is there");
    assert_eq!(
        base64::Engine::decode(&base64::prelude::BASE64_STANDARD, sent).expect("base64"),
        der.as_ref()
    );
    assert!(seen.all("client-cert-chain").is_empty() && seen.all("x_client_cert_subject").is_empty());

    // Somebody without one, somebody on another domain, and somebody on clear text.
    let mut optional = tls::connect(edge.https(), "m.test", tls::client(&ca, HTTP11));
    let mut other = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    assert_eq!(optional.send(forged("m.test")).answer().status, 200);
    assert_eq!(other.send(forged("a.test")).answer().status, 200);
    assert_eq!(edge.client().send(forged("a.test")).answer().status, 200);
    for seen in &origin.seen()[1..] {
        let names = ["client-cert", "client-cert-chain", "x-client-cert-subject", "x_client_cert_subject"];
        assert!(names.iter().all(|name| seen.all(name).is_empty()), "{}", seen.head);
    }
}

#[test]
fn where_a_clients_certificate_is_required_nobody_gets_in_without_one_or_with_a_strangers() {
    let (origin, ca, stranger) = (Origin::ok(), Authority::new(), Authority::new());
    let domains = [domain_with(&ca, "m.test", asks_clients(&ca, true)), domain(&ca, "a.test")];
    let edge = edge(&origin, &ca, &domains);
    let refused = |config: ClientConfig| {
        // With TLS 1.3 a client is done before it is judged: it hears of it at its first read.
        let Ok(mut client) = tls::try_connect(edge.https(), "m.test", &Arc::new(config)) else { return true };
        drop(client.socket.write_all(b"GET / HTTP/1.1\r\nHost: m.test\r\n\r\n"));
        client.socket.read(&mut [0; 1]).is_err()
    };
    assert!(refused(tls::client(&ca, HTTP11)));
    let (chain, key) = stranger.issue_client("mallory");
    assert!(refused(tls::builder(&ca).with_client_auth_cert(chain, key).expect("is a pair")));
    // Not over the connection of its neighbour either, whose certificate is another.
    let mut neighbour = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    assert_eq!(neighbour.send("GET / HTTP/1.1\r\nHost: m.test\r\n\r\n").answer().status, 421);
    // Nor on clear text, where nobody can prove anything.
    assert_eq!(edge.client().send("GET / HTTP/1.1\r\nHost: m.test\r\n\r\n").answer().status, 308);
    assert!(origin.seen().is_empty());
    let (chain, key) = ca.issue_client("ada");
    let config = tls::builder(&ca).with_client_auth_cert(chain, key).expect("is a pair");
    let mut known = tls::connect(edge.https(), "m.test", config);
    assert_eq!(known.send("GET / HTTP/1.1\r\nHost: m.test\r\n\r\n").answer().status, 200);
}

#[test]
fn one_certificate_for_two_names_does_not_let_past_the_client_authentication_of_one_of_them() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let shared = ca.issue(&["open.test", "closed.test"]);
    let edge = edge(
        &origin,
        &ca,
        &[
            tls::put("open.test", Some(shared), DomainPolicy::default()),
            tls::put("closed.test", Some(shared), asks_clients(&ca, true)),
        ],
    );
    let uris = ["https://open.test/", "https://closed.test/"];
    assert_eq!(tls::h2_get(edge.https(), "open.test", tls::client(&ca, &[b"h2"]), &uris), [200, 421]);
}

fn sharing(origin: &Origin, ca: &Arc<Authority>, changes: &[Change], keys: &Tickets) -> TestEdge {
    let mut config = config();
    config.https = vec!["127.0.0.1:0".parse().expect("address")];
    let (source, keys): (Arc<dyn CertificateSource>, _) = (Arc::clone(ca) as _, keys.clone());
    let told = move |edge: Edge| edge.with_certificates(source).with_tickets(keys);
    TestEdge::start_full(config, vec![service(vec![upstream(origin.addr)])], changes, told)
}

#[test]
fn a_session_is_resumed_at_another_edge_and_after_a_restart_until_its_key_is_gone() {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let (origin, ca) = (Origin::ok(), Authority::new());
        let changes = [domain(&ca, "a.test")];
        let keys = TicketKeys::generate(1).expect("random bytes");
        let config = Arc::new(tls::client_of(&ca, version));
        let visit = |edge: &TestEdge| {
            let mut client = tls::try_connect(edge.https(), "a.test", &config).expect("shakes hands");
            assert_eq!(client.get("/").status, 200);
            client.socket.conn.handshake_kind().expect("is done")
        };
        let first = sharing(&origin, &ca, &changes, &Tickets::new(&keys));
        assert_eq!(visit(&first), HandshakeKind::Full);
        assert_eq!(visit(&first), HandshakeKind::Resumed);
        drop(first);
        // As whoever starts an edge again has them.
        let stored = TicketKeys::from_bytes(&keys.to_bytes()).expect("are keys");
        let rotated = Tickets::new(&stored.rotated(2).expect("random bytes"));
        let second = sharing(&origin, &ca, &changes, &rotated);
        assert_eq!(visit(&second), HandshakeKind::Resumed);
        rotated.replace(&TicketKeys::generate(3).expect("random bytes"));
        assert_eq!(visit(&second), HandshakeKind::Full, "nobody has its key any more");
    }
}

#[test]
fn a_session_from_before_client_certificates_were_required_is_not_resumed() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let id = ca.issue(&["a.test"]);
    let mut edge = edge(&origin, &ca, &[tls::put("a.test", Some(id), DomainPolicy::default())]);
    let config = Arc::new(tls::client(&ca, HTTP11));
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let mut client = tls::try_connect(edge.https(), "a.test", &config).expect("shakes hands");
        let answer = client.send("GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").answer();
        assert_eq!((answer.status, client.socket.conn.handshake_kind()), (200, Some(kind)));
    }
    let version =
        edge.writer.apply(&[tls::put("a.test", Some(id), asks_clients(&ca, true))]).unwrap().version;
    edge.wait_acknowledged(version);
    let refused = match tls::try_connect(edge.https(), "a.test", &config) {
        Err(_) => true,
        Ok(mut client) => {
            drop(client.socket.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"));
            client.socket.read(&mut [0; 1]).is_err()
        }
    };
    assert!(refused);
}

#[test]
fn a_client_that_may_have_a_certificate_proves_who_it_is_at_every_connection() {
    for required in [true, false] {
        for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
            let (origin, ca) = (Origin::ok(), Authority::new());
            let edge = edge(&origin, &ca, &[domain_with(&ca, "m.test", asks_clients(&ca, required))]);
            let (chain, key) = ca.issue_client("ada");
            let mut config = tls::client_of(&ca, version);
            let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).expect("a key");
            let own = rustls::sign::CertifiedKey::new(chain, signer);
            config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(own));
            let config = Arc::new(config);
            for _ in 0..3 {
                let mut client = tls::try_connect(edge.https(), "m.test", &config).expect("shakes hands");
                let answer = client.send("GET / HTTP/1.1\r\nHost: m.test\r\n\r\n").answer();
                let kind = client.socket.conn.handshake_kind();
                assert_eq!((answer.status, kind), (200, Some(HandshakeKind::Full)), "{version:?} {required}");
            }
        }
    }
}

#[test]
fn a_validation_by_handshake_is_answered_with_the_digest_and_nothing_else() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let challenge =
        ChallengeSpec { name: "a.test".into(), answer: ChallengeAnswer::TlsAlpn01 { digest: [9; 32] } };
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test"), Change::PutChallenge(challenge)]);
    let blind = |alpn: &[&[u8]]| {
        let mut config = tls::blind_client();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config
    };
    let mut validator = tls::connect(edge.https(), "a.test", blind(&[b"acme-tls/1"]));
    assert_eq!(validator.socket.conn.alpn_protocol(), Some(&b"acme-tls/1"[..]));
    // RFC 8737 §3: critical, an OCTET STRING in it with 32 bytes.
    let extension = [
        &[
            0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x01, 0x1f, 0x01, 0x01, 0xff, 0x04, 0x22, 0x04,
            0x20,
        ][..],
        &[9; 32],
    ]
    .concat();
    let shown = tls::presented(&validator);
    assert!(
        crate::support::find(&shown, &extension).is_some()
            && crate::support::find(&shown, b"a.test").is_some()
    );
    assert!(validator.is_closed());
    assert_eq!(
        tls::alert(edge.https(), "b.test", blind(&[b"acme-tls/1"])),
        Some(AlertDescription::UnrecognisedName)
    );
    let mut both = tls::connect(edge.https(), "a.test", blind(&[b"acme-tls/1", b"http/1.1"]));
    assert_eq!(both.get("/").status, 200, "who offers more is a client");
    assert_eq!(ca.loads(), 1);
}

#[test]
fn a_name_that_is_passed_through_speaks_tls_with_its_service_and_holds_a_lease_meanwhile() {
    let ca = Authority::new();
    let id = ca.issue(&["pass.test"]);
    let settings = tls::server(ca.forget(id).expect("was issued"));
    let origin = Origin::scripted(move |conn| {
        let socket = conn.socket.try_clone().expect("a socket");
        let session = ServerConnection::new(Arc::clone(&settings)).expect("a session");
        let mut stream = StreamOwned::new(session, socket);
        let mut chunk = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut chunk) {
            if stream.write_all(&chunk[..read]).and_then(|()| stream.flush()).is_err() {
                return;
            }
        }
    });
    let spec = upstream(origin.addr);
    let policy = DomainPolicy { mode: TlsMode::PassThrough, ..DomainPolicy::default() };
    let changes = [tls::put("pass.test", None, policy)];
    let edge = tls::edge(config(), vec![service(vec![spec.clone()])], &ca, &changes);
    let upstream = edge.upstream(&spec);
    let mut client = tls::connect(edge.https(), "pass.test", tls::client(&ca, &[]));
    for round in 0..20_u8 {
        client.send([round; 700]);
        while client.unread.len() < 700 {
            assert!(client.more() > 0, "closed");
        }
        assert_eq!(client.unread.drain(..).collect::<Vec<_>>(), [round; 700]);
    }
    assert_eq!(upstream.receipt().in_flight[TrafficClass::WebSocket], 1);
    assert_eq!(ca.loads(), 0);
    drop(client);
    until("the lease is back", || upstream.in_flight() == 0);
}

#[test]
fn a_service_that_is_passed_through_answers_the_validations_that_it_has_asked_for_itself() {
    let ca = Authority::new();
    let id = ca.issue(&["pass.test"]);
    let settings = tls::server(ca.forget(id).expect("was issued"));
    let origin = Origin::scripted(move |conn| {
        let socket = conn.socket.try_clone().expect("a socket");
        let session = ServerConnection::new(Arc::clone(&settings)).expect("a session");
        let mut stream = StreamOwned::new(session, socket);
        while let Ok(1..) = stream.read(&mut [0; 1024]) {}
    });
    let policy = DomainPolicy { mode: TlsMode::PassThrough, ..DomainPolicy::default() };
    let changes = [tls::put("pass.test", None, policy)];
    let mut edge = tls::edge(config(), vec![service(vec![upstream(origin.addr)])], &ca, &changes);
    let validator = || {
        let mut config = tls::blind_client();
        config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
        tls::connect(edge.https(), "pass.test", config)
    };
    let own = tls::presented(&tls::connect(edge.https(), "pass.test", tls::client(&ca, &[])));
    assert_eq!(tls::presented(&validator()), own);
    // One that the edge has asked for is the edge's.
    let answer = ChallengeAnswer::TlsAlpn01 { digest: [9; 32] };
    let challenge = Change::PutChallenge(ChallengeSpec { name: "pass.test".into(), answer });
    let version = edge.writer.apply(&[challenge]).expect("is accepted").version;
    edge.wait_acknowledged(version);
    let mut config = tls::blind_client();
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    assert_ne!(tls::presented(&tls::connect(edge.https(), "pass.test", config)), own);
}

/// The first bytes that a client would send.
fn hello(ca: &Authority, name: &str) -> (ClientConnection, Vec<u8>) {
    let name = ServerName::try_from(name.to_owned()).expect("name");
    let mut session = ClientConnection::new(Arc::new(tls::client(ca, HTTP11)), name).expect("session");
    let mut bytes = Vec::new();
    session.write_tls(&mut bytes).expect("is written");
    (session, bytes)
}

#[test]
fn a_hello_in_many_small_records_gets_the_same_configuration_as_a_whole_one() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test"), domain(&ca, "b.test")]);
    for name in ["a.test", "b.test"] {
        let whole = tls::connect(edge.https(), name, tls::client(&ca, HTTP11));
        let (session, bytes) = hello(&ca, name);
        let mut socket = TcpStream::connect(edge.https()).expect("connects");
        socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
        socket.set_nodelay(true).expect("nodelay");
        for piece in bytes[5..].chunks(3) {
            let record = [&[22, 3, 1, 0, u8::try_from(piece.len()).unwrap()][..], piece].concat();
            socket.write_all(&record).expect("is taken");
        }
        let mut client = Client::over(StreamOwned::new(session, socket));
        let answer = client.send(format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")).answer();
        assert_eq!(answer.status, 200);
        assert_eq!(tls::presented(&client), tls::presented(&whole));
        assert_eq!(client.socket.conn.alpn_protocol(), whole.socket.conn.alpn_protocol());
    }
}

#[test]
fn a_handshake_that_trickles_is_cut_in_time_wherever_it_stands() {
    let (origin, ca) = (Origin::ok(), Authority::new());
    let limits = Limits { handshake_timeout_ms: 400, ..Limits::default() };
    let services = vec![service(vec![upstream(origin.addr)])];
    let edge = tls::edge(Config { limits, ..config() }, services, &ca, &[domain(&ca, "a.test")]);
    let (_, bytes) = hello(&ca, "a.test");
    let mut sockets: Vec<TcpStream> =
        (0..3).map(|_| TcpStream::connect(edge.https()).expect("connects")).collect();
    let begun = Instant::now();
    // One says nothing for long, one a byte at a time, and one stands still in the middle of the handshake.
    sockets[2].write_all(&bytes).expect("is taken");
    let mut sent = 0;
    for socket in &sockets {
        socket.set_nonblocking(true).expect("does not wait");
    }
    let mut open = [true; 3];
    until("all of them are cut", || {
        if open[1] && sent < bytes.len() - 1 {
            drop(sockets[1].write(&bytes[sent..=sent]));
            sent += 1;
        }
        for (socket, open) in sockets.iter_mut().zip(&mut open) {
            let mut chunk = [0; 4096];
            *open = *open
                && match socket.read(&mut chunk) {
                    Ok(0) => false,
                    Ok(_) => true,
                    Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                };
        }
        open == [false; 3]
    });
    assert!(begun.elapsed() >= Duration::from_millis(300), "not before its time");
    let mut good = tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11));
    assert_eq!(good.get("/").status, 200, "its first request has a time of its own");
}

#[test]
fn handshakes_above_the_cap_wait_for_a_place_and_none_is_refused() {
    const DELAYED: &str = "peregrine_edge_tls_handshakes_delayed_total";
    recorder();
    let (origin, ca) = (Origin::ok(), Authority::new());
    let limits = Limits { max_handshakes_per_core: 2, max_handshakes_per_network: 1, ..Limits::default() };
    let services = vec![service(vec![upstream(origin.addr)])];
    let edge = tls::edge(Config { limits, ..config() }, services, &ca, &[domain(&ca, "a.test")]);
    // It takes the only place of its network, and does not go on.
    let (_, bytes) = hello(&ca, "a.test");
    let mut stalled = TcpStream::connect(edge.https()).expect("connects");
    stalled.write_all(&bytes).expect("is taken");
    assert!(stalled.read(&mut [0; 1]).is_ok_and(|read| read == 1), "the edge has answered");
    let before = value(DELAYED);
    std::thread::scope(|scope| {
        let visit = || tls::connect(edge.https(), "a.test", tls::client(&ca, HTTP11)).get("/").status;
        let visits: Vec<_> = (0..8).map(|_| scope.spawn(visit)).collect();
        until("all of them wait", || value(DELAYED) >= before + 8);
        assert!(visits.iter().all(|visit| !visit.is_finished()));
        // Once the first one is gone the others follow one another.
        drop(stalled);
        assert!(visits.into_iter().all(|visit| visit.join().expect("is served") == 200));
    });
}

#[test]
fn handshakes_are_counted_by_version_and_result() {
    let series = |version: &str, result: &str| {
        value(&format!("peregrine_edge_tls_handshakes_total{{version=\"{version}\",result=\"{result}\"}}"))
    };
    let kinds =
        [("1.3", "full"), ("1.3", "resumed"), ("1.2", "full"), ("none", "unknown_name"), ("none", "failed")];
    recorder();
    let (origin, ca) = (Origin::ok(), Authority::new());
    let edge = edge(&origin, &ca, &[domain(&ca, "a.test")]);
    let before = kinds.map(|(version, result)| series(version, result));
    let config = Arc::new(tls::client(&ca, HTTP11));
    for _ in 0..2 {
        assert_eq!(
            tls::try_connect(edge.https(), "a.test", &config).expect("shakes hands").get("/").status,
            200
        );
    }
    drop(tls::connect(edge.https(), "a.test", tls::client_of(&ca, &rustls::version::TLS12)));
    assert!(tls::alert(edge.https(), "b.test", tls::client(&ca, HTTP11)).is_some());
    let mut garbage = TcpStream::connect(edge.https()).expect("connects");
    garbage.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").expect("is taken");
    until("each of them is counted", || {
        kinds.iter().zip(&before).all(|((version, result), before)| series(version, result) > *before)
    });
}
