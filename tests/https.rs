//! HTTPS from files: a domain in the configuration is served, a new certificate counts after a reload, and what cannot
//! be used is refused with what to do.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use peregrine_bench::origin::{Origin, OriginOptions};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::support::server::{Peregrine, free_address, http};
use crate::support::wait_for;

const NAME: &str = "shop.test";

/// Writes a certificate that signs itself, and its key.
fn certificate(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    std::fs::write(dir.join("chain.pem"), made.cert.pem()).expect("is written");
    let key = dir.join("key.pem");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("is written");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("is its owner's");
    made.cert.der().clone()
}

fn file(https: SocketAddr, edge: SocketAddr, api: SocketAddr, shop: SocketAddr) -> String {
    format!(
        r#"
[edge]
http = ["{edge}"]
https = ["{https}"]

[api]
listen = "{api}"

[domain."{NAME}"]
certificate = "chain.pem"
key = "key.pem"
hsts = "1h"

[service.shop]
hosts = ["{NAME}"]
upstreams = ["{shop}"]
"#
    )
}

/// The head of the answer over TLS, from somebody who trusts this certificate alone; `None` if there is none.
fn over_tls(address: SocketAddr, trusted: &CertificateDer<'static>) -> Option<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = TcpStream::connect(address).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a time-out");
    let session =
        ClientConnection::new(Arc::new(config), ServerName::try_from(NAME).expect("a name")).ok()?;
    let mut stream = StreamOwned::new(session, socket);
    let request = format!("GET / HTTP/1.1\r\nhost: {NAME}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    String::from_utf8(answer).ok()
}

#[test]
fn a_domain_of_the_file_is_served_over_tls_and_a_new_certificate_counts_after_a_reload() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let (https, dir) = (free_address(), server.dir().to_owned());
    let first = certificate(&dir);
    let config = file(https, server.edge(), server.api(), origin.addr());
    std::fs::write(dir.join("server.toml"), config).expect("is written");
    server.start_again();

    let answer = over_tls(https, &first).expect("is answered");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("strict-transport-security: max-age=3600\r\n"), "{answer}");
    let clear = http(server.edge(), &format!("GET /a HTTP/1.1\r\nhost: {NAME}\r\nconnection: close\r\n\r\n"));
    let clear = clear.expect("is answered");
    assert!(clear.starts_with("HTTP/1.1 308") && clear.contains("https://shop.test/a"), "{clear}");

    // A key that others can read is refused, and everything stays as it was.
    std::fs::set_permissions(dir.join("key.pem"), std::fs::Permissions::from_mode(0o644)).expect("is set");
    server.reload();
    wait_for("the refusal", || server.log_text().contains("chmod 600").then_some(()));
    assert!(over_tls(https, &first).is_some());

    let second = certificate(&dir);
    server.reload();
    wait_for("the new certificate", || over_tls(https, &second));
    assert!(over_tls(https, &first).is_none(), "the old one is not presented any more");

    // At a start there is nothing that could stay as it was.
    server.stop();
    std::fs::write(dir.join("chain.pem"), "no certificate").expect("is written");
    let said = std::process::Command::new(env!("CARGO_BIN_EXE_peregrine"))
        .args(["serve", "--config"])
        .arg(dir.join("server.toml"))
        .arg("--data")
        .arg(server.data())
        .output()
        .expect("it ends");
    let told = String::from_utf8_lossy(&said.stderr);
    assert!(!said.status.success() && told.contains("holds no certificate in PEM"), "{told}");
    assert!(told.contains("[domain.\"shop.test\"]"), "{told}");
}
