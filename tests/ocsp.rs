//! What is stapled to certificates (RFC 6066 §8), as clients see it: what an authority's responder says is there soon, after restarts, and
//! at an edge apart; what it does not say is never there.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};

use peregrine_bench::origin::{Origin, OriginOptions};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DnType, IsCa, KeyPair,
    SerialNumber,
};

use crate::support::apart::{Edge, LEASE_MS};
use crate::support::ocsp::Responder;
use crate::support::server::{Peregrine, free_address};
use crate::support::tls::TlsClient;
use crate::support::wait_for;

const NAME: &str = "shop.test";
const SERIAL: (u8, &str) = (0x17, "17");

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn origin() -> (tokio::runtime::Runtime, Origin) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    (runtime, origin)
}

fn server(https: SocketAddr, origin: SocketAddr) -> Peregrine {
    let mut server = Peregrine::start("");
    server.stop();
    let config = format!(
        "[edge]\nhttp = [\"{}\"]\nhttps = [\"{https}\"]\n\n[api]\nlisten = \"{}\"\n\n\
         [service.shop]\nhosts = [\"*\"]\nupstreams = [\"{origin}\"]\n",
        server.edge(),
        server.api(),
    );
    server.file("server.toml", &config);
    server.start_again();
    server
}

fn authority() -> Issuer {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "Test authority");
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority")
}

/// The extension that names a responder (RFC 5280 §4.2.2.1): its content.
fn access(url: &str) -> Vec<u8> {
    const METHOD: [u8; 10] = [6, 8, 0x2b, 6, 1, 5, 5, 7, 0x30, 1];
    let tlv = |tag: u8, content: &[u8]| {
        let length = u8::try_from(content.len()).expect("it is short");
        assert!(length < 128, "one byte says its length");
        [&[tag, length], content].concat()
    };
    let described = [&METHOD[..], &tlv(0x86, url.as_bytes())].concat();
    tlv(0x30, &tlv(0x30, &described))
}

/// Brings a certificate of this name that names a responder, with its issuer's.
fn import(server: &Peregrine, issuer: &Issuer, name: &str, responder: &str) {
    let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    params.serial_number = Some(SerialNumber::from(vec![SERIAL.0]));
    const ACCESS: [u64; 9] = [1, 3, 6, 1, 5, 5, 7, 1, 1];
    params.custom_extensions = vec![CustomExtension::from_oid_content(&ACCESS, access(responder))];
    let key = KeyPair::generate().expect("a key");
    let made = params.signed_by(&key, issuer).expect("a certificate");
    let chain = server.file("chain.pem", &format!("{}{}", made.pem(), issuer.pem()));
    let key = server.file("key.pem", &key.serialize_pem());
    server.ok(&["certs", "import", name, "--chain", &chain, "--key", &key]);
}

/// A responder that says that everything is good, in the name of this authority.
fn responder(issuer: &Issuer, days: u32) -> Responder {
    let mut responder = Responder::new();
    responder.knows(&[(SERIAL.1, true)]);
    responder.start(&issuer.pem(), &issuer.key().serialize_pem(), days);
    responder
}

/// What is stapled there; `None` if there is no answer or nothing is.
fn stapled(https: SocketAddr, name: &str) -> Option<Vec<u8>> {
    let answer = TlsClient::new().get(https, name)?;
    assert!(answer.text.starts_with("HTTP/1.1 200"), "{}", answer.text);
    Some(answer.staple).filter(|staple| !staple.is_empty())
}

/// What a client that is not ours says of it.
fn openssl_says(server: &Peregrine, issuer: &Issuer, https: SocketAddr) -> String {
    let ca = server.file("ca.pem", &issuer.pem());
    let said = Command::new("openssl")
        .args(["s_client", "-status", "-servername", NAME, "-CAfile", &ca, "-connect", &https.to_string()])
        .stdin(Stdio::null())
        .output()
        .expect("openssl is installed");
    String::from_utf8_lossy(&said.stdout).into_owned()
}

#[test]
fn clients_see_what_the_responder_says_also_after_a_restart_without_it() {
    let (_runtime, origin) = origin();
    let https = free_address();
    let mut server = server(https, origin.addr());
    let issuer = authority();
    let responder = responder(&issuer, 7);
    import(&server, &issuer, NAME, &responder.url());
    let staple = wait_for("a staple", || stapled(https, NAME));
    let said = openssl_says(&server, &issuer, https);
    for expected in ["OCSP Response Status: successful", "Cert Status: good", "Verify return code: 0 (ok)"] {
        assert!(said.contains(expected), "{expected}:\n{said}");
    }
    drop(responder);
    server.kill();
    server.start_again();
    assert_eq!(wait_for("a staple", || stapled(https, NAME)), staple);
    assert_eq!(server.ok(&["domains", "list"])[0]["state"], "valid");
}

#[test]
fn an_edge_apart_is_told_of_staples_and_has_them_without_an_engine() {
    let (_runtime, origin) = origin();
    let (link, https) = (free_address(), free_address());
    let mut server = Peregrine::start_engine(&format!(
        "[link]\nlisten = \"{link}\"\nlease = \"{LEASE_MS}ms\"\n\n\
         [service.shop]\nhosts = [\"*\"]\nupstreams = [\"{}\"]\n",
        origin.addr()
    ));
    let mut edge = Edge::fresh("edge-1").join_with_https(&server, link, https);
    let issuer = authority();
    let mut responder = Responder::new();
    responder.knows(&[(SERIAL.1, true)]);
    import(&server, &issuer, NAME, &responder.url());
    // The certificate is there before the responder is.
    wait_for("https", || TlsClient::new().get(https, NAME));
    assert_eq!(stapled(https, NAME), None);
    responder.start(&issuer.pem(), &issuer.key().serialize_pem(), 7);
    // Whoever brings it again asks again.
    import(&server, &issuer, NAME, &responder.url());
    let staple = wait_for("a staple", || stapled(https, NAME));
    server.kill();
    assert_eq!(edge.stop(), Some(0));
    edge.start_with_https();
    assert_eq!(wait_for("a staple without an engine", || stapled(https, NAME)), staple);
}

/// Says the same to whoever asks, for as long as the test lives.
fn babbler(says: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut asked = Vec::new();
            // The question is the last thing in it, and of one piece.
            while !asked.windows(4).any(|window| window == b"\r\n\r\n") {
                let mut chunk = [0; 4096];
                match stream.read(&mut chunk) {
                    Ok(read @ 1..) => asked.extend_from_slice(&chunk[..read]),
                    _ => break,
                }
            }
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", says.len());
            // Who has heard enough may leave.
            drop(stream.write_all(&[head.as_bytes(), says].concat()));
        }
    });
    format!("http://{address}/")
}

#[test]
fn what_is_foreign_or_garbage_is_never_stapled_and_harms_nobody() {
    let (_runtime, origin) = origin();
    let https = free_address();
    let server = server(https, origin.addr());
    let (issuer, stranger) = (authority(), authority());
    let (good, foreign) = (responder(&issuer, 7), responder(&stranger, 7));
    for (name, url, why) in [
        ("foreign.test", foreign.url(), "not signed by the issuer"),
        ("garbage.test", babbler(b"<html>404</html>"), "cannot be read"),
        ("silence.test", babbler(b""), "cannot be read"),
    ] {
        import(&server, &issuer, name, &url);
        let told = |line: &str| line.contains("no staple") && line.contains(name) && line.contains(why);
        wait_for("it to be refused", || server.log_text().lines().any(told).then_some(()));
        assert!(TlsClient::new().get(https, name).is_some(), "{name} is served");
        assert_eq!(stapled(https, name), None, "{name}");
    }
    import(&server, &issuer, NAME, &good.url());
    assert!(wait_for("a staple", || stapled(https, NAME)).len() > 100);
    for name in ["foreign.test", "garbage.test", "silence.test"] {
        assert_eq!(stapled(https, name), None, "{name}");
    }
}
