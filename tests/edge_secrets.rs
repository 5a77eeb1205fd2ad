//! What an edge in a process of its own is handed besides the table: certificates, which it keeps sealed, and the keys of
//! session tickets, which are those of every edge.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use peregrine_bench::origin::{Origin, OriginOptions};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;

use crate::support::apart::{Edge, LEASE_MS, files_below, wait_for_state};
use crate::support::pebble::Pebble;
use crate::support::server::{Peregrine, free_address, http_get};
use crate::support::tls::{TlsClient, over_tls};
use crate::support::wait_for;

const NAME: &str = "shop.test";
const OTHER: &str = "other.test";

fn origin() -> (tokio::runtime::Runtime, Origin) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    (runtime, origin)
}

fn engine(link: SocketAddr, origin: SocketAddr, acme: &str) -> Peregrine {
    Peregrine::start_engine(&format!(
        "[link]\nlisten = \"{link}\"\nlease = \"{LEASE_MS}ms\"\n\n{acme}\n\
         [service.shop]\nhosts = [\"*\"]\nupstreams = [\"{origin}\"]\n"
    ))
}

/// Brings a certificate of this name to the engine.
fn import(server: &Peregrine, name: &str) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    let chain = server.file("chain.pem", &made.cert.pem());
    let key = server.file("key.pem", &made.signing_key.serialize_pem());
    server.ok(&["certs", "import", name, "--chain", &chain, "--key", &key]);
}

/// The private key of a name: the number that is nobody else's to know.
fn private_number(server: &Peregrine, name: &str) -> Vec<u8> {
    let out = |kind: &str| server.dir().join(format!("{name}.{kind}")).display().to_string();
    server.ok(&["certs", "export", name, "--chain", &out("chain"), "--key", &out("key")]);
    let pem = std::fs::read(out("key")).expect("is exported");
    let key = PrivateKeyDer::from_pem_slice(&pem).expect("a key");
    // PKCS #8 with an ECPrivateKey (RFC 5915 §3): its number follows the octet string's head.
    let der = key.secret_der();
    let at = der.windows(3).position(|window| window == [1, 4, 32]).expect("a key of P-256") + 3;
    der[at..at + 32].to_vec()
}

fn has(file: &Path, number: &[u8]) -> bool {
    std::fs::read(file).expect("is read").windows(number.len()).any(|window| window == number)
}

fn certificates_of(edge: &Edge) -> usize {
    std::fs::read_dir(edge.data().join("certificates")).map_or(0, Iterator::count)
}

#[test]
fn an_edge_apart_is_given_certificates_and_presents_them_without_an_engine_and_has_no_key_in_clear() {
    let (_runtime, origin) = origin();
    let (link, https) = (free_address(), free_address());
    let edge = Edge::fresh("edge-1");
    let Some(pebble) = Pebble::start(edge.http(), https) else { return };
    let mut server = engine(link, origin.addr(), &pebble.configuration());
    let mut edge = edge.join_with_https(&server, link, https);

    assert!(over_tls(https, NAME).is_none(), "nobody has added it");
    server.ok(&["domains", "add", NAME]);
    let (answer, presented) = wait_for("https", || over_tls(https, NAME));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(server.ok(&["domains", "list"])[0]["certificate"], presented.as_str());
    // One that nobody has asked for yet is there before anybody does.
    import(&server, OTHER);
    wait_for("both on the edge's disk", || (certificates_of(&edge) == 2).then_some(()));

    for name in [NAME, OTHER] {
        let number = private_number(&server, name);
        let clear = server.dir().join("number");
        std::fs::write(&clear, [b"before", &number[..], b"after"].concat()).expect("is written");
        assert!(has(&clear, &number), "it would be found");
        // Besides files there is the socket at which an upgrade is asked for.
        for file in files_below(&edge.data()).into_iter().filter(|file| file.is_file()) {
            assert!(!has(&file, &number), "{} holds a private key", file.display());
        }
    }
    for file in
        files_below(&edge.data()).iter().filter(|file| file.to_string_lossy().contains("certificates"))
    {
        let mode = std::fs::metadata(file).expect("it is there").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{} is its owner's", file.display());
    }

    server.kill();
    assert_eq!(edge.stop(), Some(0));
    edge.start_with_https();
    let (answer, again) = wait_for("https without an engine", || over_tls(https, NAME));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(again, presented);
    assert!(over_tls(https, OTHER).is_some(), "also the one that nobody had asked for");
    // Without the key file what is on the disk is worth nothing, and the engine is asked again.
    edge.stop();
    std::fs::remove_file(edge.data().join("certificates.key")).expect("it is there");
    edge.start_with_https();
    wait_for("the edge to listen", || std::net::TcpStream::connect(https).ok());
    assert!(over_tls(https, NAME).is_none(), "nobody can open it");
    server.start_again();
    wait_for_state(&server, "edge-1", "connected");
    let (_, again) = wait_for("https", || over_tls(https, NAME));
    assert_eq!(again, presented);

    server.ok(&["domains", "remove", NAME, "--yes"]);
    wait_for("it to be forgotten", || (certificates_of(&edge) == 1).then_some(()));
    assert!(over_tls(https, NAME).is_none() && over_tls(https, OTHER).is_some());
}

#[test]
fn a_first_handshake_at_an_edge_apart_waits_for_a_certificate_on_demand_which_comes_over_the_link() {
    let (_runtime, origin) = origin();
    let (link, https) = (free_address(), free_address());
    let edge = Edge::fresh("edge-1");
    let Some(pebble) = Pebble::start(edge.http(), https) else { return };
    let server = Peregrine::start_engine(&format!(
        "[link]\nlisten = \"{link}\"\nlease = \"{LEASE_MS}ms\"\n\n{}on_demand = \"owned\"\n\n\
         [service.shop]\nhosts = [\"{NAME}\", \"*\"]\nupstreams = [\"{}\"]\n",
        pebble.configuration(),
        origin.addr(),
    ));
    let edge = edge.join_with_https_and(&server, link, https, "[edge.limits]\ncertificate_wait = \"60s\"\n");
    wait_for("the edge to serve", || http_get(edge.http(), "/"));
    assert!(over_tls(https, OTHER).is_none(), "it is nobody's");
    let (answer, presented) = over_tls(https, NAME).expect("the first handshake has it");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let domains = server.ok(&["domains", "list"]);
    assert_eq!((&domains[0]["origin"], &domains[0]["certificate"]), (&"on_demand".into(), &presented.into()));
    assert_eq!((domains.as_array().map(Vec::len), pebble.issued()), (Some(1), 1));
}

#[test]
fn a_session_is_resumed_at_another_edge_and_after_restarts_and_an_upgrade() {
    let (_runtime, origin) = origin();
    let (link, https, https_2) = (free_address(), free_address(), free_address());
    let mut server = engine(link, origin.addr(), "");
    let mut edge = Edge::fresh("edge-1").join_with_https(&server, link, https);
    let edge_2 = Edge::fresh("edge-2").join_with_https(&server, link, https_2);
    import(&server, NAME);
    for address in [https, https_2] {
        wait_for("https", || over_tls(address, NAME));
    }
    let client = TlsClient::new();
    let resumed = |address| client.get(address, NAME).map(|answer| answer.resumed);
    assert_eq!(resumed(https), Some(false), "it was never there");
    assert_eq!(resumed(https), Some(true));
    assert_eq!(resumed(https_2), Some(true), "another edge has the same keys");

    edge.upgrade();
    assert_eq!(resumed(https), Some(true), "the process that took over has them, too");
    assert_eq!(resumed(https_2), Some(true));
    edge.stop();
    edge.start_with_https();
    wait_for("https", || over_tls(https, NAME));
    assert_eq!(resumed(https), Some(true), "after a restart");
    server.kill();
    edge.stop();
    edge.start_with_https();
    wait_for("https", || over_tls(https, NAME));
    assert_eq!(resumed(https), Some(true), "without an engine");
    server.start_again();
    wait_for_state(&server, "edge-1", "connected");
    wait_for_state(&server, &edge_2.name, "connected");
    assert_eq!(resumed(https), Some(true), "an engine that comes back has the keys that it had");
    assert_eq!(resumed(https_2), Some(true));
}

#[test]
fn a_session_is_resumed_after_a_restart_of_the_whole_server() {
    let (_runtime, origin) = origin();
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let config = format!(
        "[edge]\nhttp = [\"{}\"]\nhttps = [\"{https}\"]\n\n[api]\nlisten = \"{}\"\n\n\
         [service.shop]\nhosts = [\"*\"]\nupstreams = [\"{}\"]\n",
        server.edge(),
        server.api(),
        origin.addr(),
    );
    server.file("server.toml", &config);
    server.start_again();
    import(&server, NAME);
    wait_for("https", || over_tls(https, NAME));
    let client = TlsClient::new();
    let resumed = || client.get(https, NAME).map(|answer| answer.resumed);
    assert_eq!((resumed(), resumed()), (Some(false), Some(true)));
    server.kill();
    server.start_again();
    assert_eq!(resumed(), Some(true));
}
