//! A name is added, and HTTPS works: ordered from an authority (pebble, which refuses every second nonce), presented, kept over a
//! kill, exported and imported.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;

use peregrine_bench::origin::{Origin, OriginOptions};
use peregrine_engine::store::{Batch, SqliteStore, Store as _, Write};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;

use crate::support::knot::{KEY, Knot};
use crate::support::pebble::{EXTERNAL, Pebble};
use crate::support::server::{Peregrine, free_address, http};
use crate::support::tls::{TlsClient, over_tls};
use crate::support::wait_for;

const NAME: &str = "shop.test";

fn shop(server: &Peregrine, https: SocketAddr, origin: SocketAddr, acme: &str) -> String {
    format!(
        "[edge]\nhttp = [\"{}\"]\nhttps = [\"{https}\"]\n\n[api]\nlisten = \"{}\"\n\n{acme}\n\
         [service.shop]\nhosts = [\"*\"]\nupstreams = [\"{origin}\"]\n",
        server.edge(),
        server.api(),
    )
}

/// What metrics say of the one domain that there is.
fn assert_metrics(server: &Peregrine, domain: &serde_json::Value) {
    let lines = server.metrics();
    let lines: Vec<&str> = lines.lines().collect();
    let value = |name: &str| {
        let line = lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {lines:#?}")).parse::<f64>().expect("a number")
    };
    let not_after = value(&format!("peregrine_certificate_not_after_seconds{{domain=\"{NAME}\"}}"));
    let told: jiff::Timestamp = domain["not_after"].as_str().expect("a time").parse().expect("a time");
    assert!((not_after - told.as_second() as f64).abs() < 1.0, "{not_after} is not {told}");
    let renews = value("peregrine_certificate_next_renewal_seconds");
    assert!(renews > 0.0 && renews < not_after, "{renews}");
    assert!(value("peregrine_certificate_orders_total{outcome=\"issued\"}") >= 1.0);
    assert_eq!(value("peregrine_certificate_orders_total{outcome=\"failed\"}"), 0.0);
    assert_eq!(value("peregrine_domains{state=\"valid\"}"), 1.0);
}

#[test]
fn a_name_that_is_added_has_https_soon_and_after_a_kill_and_nothing_is_ordered_twice() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let Some(pebble) = Pebble::start(server.edge(), https) else { return };
    let config = shop(&server, https, origin.addr(), &pebble.configuration());
    server.file("server.toml", &config);
    server.start_again();

    assert!(over_tls(https, NAME).is_none(), "nobody has added it");
    let added = server.ok(&["domains", "add", NAME, "--hsts", "1h"]);
    assert_eq!((&added["name"], &added["redirect"]), (&NAME.into(), &true.into()), "{added:#}");
    let valid = wait_for("a certificate", || {
        let domains = server.ok(&["domains", "list"]);
        (domains[0]["state"] == "valid").then(|| domains[0].clone())
    });
    let (answer, presented) = wait_for("https", || over_tls(https, NAME));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("strict-transport-security: max-age=3600\r\n"), "{answer}");
    assert_eq!(valid["certificate"], presented.as_str(), "what is told is what is presented");
    assert!(valid["message"].as_str().is_some_and(|text| text.starts_with("valid until ")), "{valid:#}");
    let clear = http(server.edge(), &format!("GET /a HTTP/1.1\r\nhost: {NAME}\r\nconnection: close\r\n\r\n"));
    assert!(clear.expect("is answered").starts_with("HTTP/1.1 308"), "clear text is sent to https");
    let certificates = server.ok(&["certs", "list"]);
    assert_eq!(certificates[0]["names"], serde_json::json!([NAME]), "{certificates:#}");
    assert_metrics(&server, &valid);
    assert_eq!(server.run(&["domains", "check", NAME]).code, 0, "nothing is in its way");

    server.kill();
    server.start_again();
    let (answer, again) = over_tls(https, NAME).expect("a ready server has its certificates");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(again, presented);
    assert_eq!(pebble.issued(), 1, "a start orders nothing");

    // Nobody finds a private key in the data folder.
    let (chain, key) = (server.dir().join("out.pem"), server.dir().join("out.key"));
    let [chain, key] = [chain, key].map(|path| path.display().to_string());
    server.ok(&["certs", "export", "Shop.TEST.", "--chain", &chain, "--key", &key]);
    let secret = secret_of(&key);
    assert!(
        holds(&std::fs::read(&key).map(|pem| pem_body(&pem)).expect("it is there"), &secret),
        "it can be found"
    );
    let mut folders = vec![server.data()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("the data").flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let bytes = std::fs::read(entry.path()).unwrap_or_default();
            assert!(!holds(&bytes, &secret), "{} holds a private key", entry.path().display());
        }
    }
}

fn pem_body(pem: &[u8]) -> Vec<u8> {
    PrivateKeyDer::from_pem_slice(pem).expect("a key").secret_der().to_vec()
}

/// The number that is the secret of an ECDSA P-256 key in PKCS#8: the first octet string of 32 bytes (RFC 5915 §3).
fn secret_of(file: &str) -> Vec<u8> {
    let der = pem_body(&std::fs::read(file).expect("a key"));
    let at = der.windows(2).position(|pair| pair == [4, 32]).expect("an octet string");
    der[at + 2..at + 34].to_vec()
}

fn holds(bytes: &[u8], secret: &[u8]) -> bool {
    bytes.windows(secret.len()).any(|window| window == secret)
}

#[test]
fn a_certificate_is_exported_and_imported_and_a_domain_that_is_removed_is_presented_no_more() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let config = shop(&server, https, origin.addr(), "");
    server.file("server.toml", &config);
    server.start_again();

    let refused = server.run(&["domains", "add", NAME]);
    assert_eq!(
        (refused.code, &refused.error()["code"]),
        (5, &"certificate.no_authority".into()),
        "{refused:#?}"
    );
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    let chain = server.file("chain.pem", &made.cert.pem());
    let key = server.file("key.pem", &made.signing_key.serialize_pem());
    let other = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    let other = server.file("other.pem", &other.signing_key.serialize_pem());
    let wrong = server.run(&["certs", "import", NAME, "--chain", &chain, "--key", &other]);
    assert_eq!(wrong.error()["code"], "certificate.invalid", "{wrong:#?}");
    assert!(over_tls(https, NAME).is_none());

    server.ok(&["certs", "import", NAME, "--chain", &chain, "--key", &key]);
    let (answer, presented) = wait_for("https", || over_tls(https, NAME));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let out = |name: &str| server.dir().join(name).display().to_string();
    let (chain_out, key_out) = (out("out.pem"), out("out.key"));
    let export = ["certs", "export", NAME, "--chain", &chain_out, "--key", &key_out];
    server.ok(&export);
    let mode = std::fs::metadata(&key_out).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "a key is its owner's");
    assert_eq!(server.run(&export).code, 2, "what is there is not written over");
    server.ok(&["certs", "import", NAME, "--chain", &chain_out, "--key", &key_out]);
    assert_eq!(over_tls(https, NAME).map(|(_, id)| id), Some(presented), "what was exported can be imported");

    let upper = NAME.to_ascii_uppercase();
    server.ok(&["domains", "remove", &upper, "--yes"]);
    wait_for("it to be gone", || over_tls(https, NAME).is_none().then_some(()));
    assert_eq!(server.ok(&["domains", "list"]), serde_json::json!([]));
    assert!(server.metrics().lines().all(|line| !line.contains(NAME)), "it is not measured any more");
    server.stop();
    server.start_again();
    assert!(over_tls(https, NAME).is_none(), "it is gone for good");
}

/// A file that is its owner's alone.
fn secret(server: &Peregrine, name: &str, text: &str) -> String {
    let path = server.file(name, text);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("is its owner's");
    path
}

#[test]
fn a_wildcard_has_https_by_dns_01_with_an_external_account_and_no_secret_is_told() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let Some(knot) = Knot::start() else { return };
    let mut server = Peregrine::start_logging("", "info,peregrine=trace,peregrine_certs=trace");
    server.stop();
    let https = free_address();
    let Some(pebble) = Pebble::start_asking(server.edge(), https, knot.address) else { return };
    let (tsig, hmac) = (secret(&server, "tsig.key", KEY.1), secret(&server, "hmac.key", EXTERNAL.1));
    let acme = format!(
        "{}external_account = {{ key_id = \"{}\", hmac_key_file = \"{hmac}\" }}\n\n[[acme.dns]]\n\
         zone = \"example.com\"\nserver = \"{}\"\nkey_name = \"{}\"\nsecret_file = \"{tsig}\"\n",
        pebble.configuration(),
        EXTERNAL.0,
        knot.address,
        KEY.0,
    );
    let config = shop(&server, https, origin.addr(), &acme);
    server.file("server.toml", &config);
    server.start_again();
    server.ok(&["domains", "add", "*.example.com"]);
    let (answer, presented) = wait_for("https", || over_tls(https, "any.example.com"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(server.ok(&["domains", "list"])[0]["certificate"], presented.as_str());
    assert!(over_tls(https, "example.com").is_none(), "it is not below itself");
    assert!(over_tls(https, "a.b.example.com").is_none(), "nor is what is two labels below");
    for hidden in [KEY.1, EXTERNAL.1] {
        assert!(!server.log_text().contains(hidden), "a secret is in the log");
    }

    // A secret that others can read is none.
    server.stop();
    std::fs::set_permissions(&tsig, std::fs::Permissions::from_mode(0o644)).expect("is set");
    let said = std::process::Command::new(env!("CARGO_BIN_EXE_peregrine"))
        .args(["serve", "--config"])
        .arg(server.dir().join("server.toml"))
        .arg("--data")
        .arg(server.data())
        .output()
        .expect("it ends");
    let told = String::from_utf8_lossy(&said.stderr);
    assert!(!said.status.success() && told.contains("[[acme.dns]] secret_file"), "{told}");
    assert!(told.contains(&format!("chmod 600 {tsig}")), "{told}");
}

#[test]
fn the_first_handshake_for_a_name_that_a_service_owns_waits_for_its_certificate_and_another_does_not() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let Some(pebble) = Pebble::start(server.edge(), https) else { return };
    let acme = format!("{}on_demand = \"owned\"\n", pebble.configuration());
    let config = shop(&server, https, origin.addr(), &acme);
    // Pebble refuses nonces, and the machine may be busy: what is shown is that it waits, not for how long.
    let config = config.replace("[api]", "[edge.limits]\ncertificate_wait = \"60s\"\n\n[api]");
    let config = config.replace("hosts = [\"*\"]", &format!("hosts = [\"{NAME}\", \"*.below.test\", \"*\"]"));
    server.file("server.toml", &config);
    server.start_again();
    for name in ["other.test", "a.below.test", "below.test"] {
        assert!(over_tls(https, name).is_none(), "{name} is nobody's");
    }
    // One handshake of each of three clients at once, and no other.
    let visits: Vec<_> = (0..3).map(|_| std::thread::spawn(move || over_tls(https, NAME))).collect();
    for visit in visits {
        let (answer, _) = visit.join().expect("ends").expect("the first handshake has it");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    for name in ["other.test", "a.below.test", "below.test"] {
        assert!(over_tls(https, name).is_none(), "{name} is nobody's");
    }
    let domains = server.ok(&["domains", "list"]);
    assert_eq!(domains.as_array().map(Vec::len), Some(1), "{domains:#}");
    assert_eq!((&domains[0]["name"], &domains[0]["origin"]), (&NAME.into(), &"on_demand".into()));
    assert_eq!(pebble.issued(), 1);
}

#[test]
fn clients_of_an_added_domain_need_the_certificate_that_it_asks_for_also_after_a_restart() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let config = shop(&server, https, origin.addr(), "");
    server.file("server.toml", &config);
    server.start_again();
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    let chain = server.file("chain.pem", &made.cert.pem());
    let key = server.file("key.pem", &made.signing_key.serialize_pem());
    server.ok(&["certs", "import", NAME, "--chain", &chain, "--key", &key]);

    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().expect("a key"));
    let ca = ca.expect("an authority");
    let client = |issuer: Option<&rcgen::CertifiedIssuer<'_, rcgen::KeyPair>>| {
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let key = rcgen::KeyPair::generate().expect("a key");
        let made = match issuer {
            Some(issuer) => params.signed_by(&key, issuer),
            None => params.self_signed(&key),
        };
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
        TlsClient::with_certificate(made.expect("a certificate").der().clone(), key.into())
    };
    let answers = |client: &TlsClient| {
        client.get(https, NAME).is_some_and(|answer| answer.text.starts_with("HTTP/1.1 200"))
    };
    let (nobody, known, stranger) = (TlsClient::new(), client(Some(&ca)), client(None));
    wait_for("https", || answers(&nobody).then_some(()));

    let wrong = server.run(&["domains", "add", NAME, "--client-ca", &key]);
    assert_eq!(wrong.error()["code"], "certificate.invalid", "{wrong:#?}");
    assert!(answers(&nobody), "it is as it was");
    let authorities = server.file("clients.pem", &ca.pem());
    let added = server.ok(&["domains", "add", NAME, "--client-ca", &authorities]);
    assert_eq!(added["client_auth"], "required", "{added:#}");
    wait_for("those without one to be refused", || (!answers(&TlsClient::new())).then_some(()));
    assert!(answers(&known) && !answers(&stranger));
    assert!(!answers(&nobody), "a session from before is worth nothing");
    server.kill();
    server.start_again();
    assert!(answers(&known) && !answers(&TlsClient::new()));

    server.ok(&["domains", "add", NAME, "--client-ca", &authorities, "--client-optional"]);
    wait_for("those without one to be let in", || answers(&nobody).then_some(()));
    assert!(answers(&known) && !answers(&stranger), "who presents one presents one that counts");
    let added = server.ok(&["domains", "add", NAME]);
    assert!(added["client_auth"].is_null(), "{added:#}");
    wait_for("everybody to be let in", || answers(&stranger).then_some(()));
}

#[test]
fn a_server_that_starts_serves_by_its_short_records_and_corrects_those_that_are_wrong() {
    const STALE: &str = "stale.test";
    const GONE: &str = "gone.test";
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let config = shop(&server, https, origin.addr(), "");
    server.file("server.toml", &config);
    server.start_again();
    let presented = |name: &str| over_tls(https, name).map(|(_, id)| id);
    for name in [NAME, STALE] {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let chain = server.file("chain.pem", &made.cert.pem());
        let key = server.file("key.pem", &made.signing_key.serialize_pem());
        server.ok(&["certs", "import", name, "--chain", &chain, "--key", &key]);
    }
    let [first, second] = [NAME, STALE].map(|name| presented(name).expect("it is presented"));
    assert_ne!(first, second);
    let record = |name: &str| format!("vault/front/{name}");
    let write = |server: &Peregrine, writes: Vec<Write>| {
        let store = SqliteStore::open(&server.data()).expect("nobody else has it");
        let done = runtime.block_on(store.commit(Batch { preconditions: Vec::new(), writes }));
        done.expect("is written");
    };

    // As a version left it that knew nothing of these records: they are made at the first start.
    server.stop();
    let gone = [record(NAME), record(STALE), "vault/front-is-whole".to_owned()];
    write(&server, gone.into_iter().map(Write::Delete).collect());
    server.start_again();
    assert_eq!([NAME, STALE].map(presented), [Some(first.clone()), Some(second.clone())]);

    // As a process leaves it that is killed between two writes.
    server.stop();
    let other = format!(r#"{{"redirect":true,"hsts":null,"certificate":"{first}"}}"#);
    write(&server, [STALE, GONE].map(|name| Write::Put(record(name), other.clone().into())).into());
    server.start_again();
    wait_for("the certificate that the manager knows", || (presented(STALE)? == second).then_some(()));
    assert_eq!((presented(NAME), presented(GONE)), (Some(first), None), "nobody has added it");
    server.stop();
    let store = SqliteStore::open(&server.data()).expect("nobody else has it");
    let (_, kept) = runtime.block_on(store.range("vault/front/")).expect("is read");
    let kept = kept.iter().find(|entry| entry.key == record(STALE)).expect("it is there");
    assert!(holds(&kept.value, second.as_bytes()), "the next start has it right from the beginning");
}

#[test]
fn a_domain_whose_record_is_damaged_is_open_to_nobody_until_somebody_says_again_how_it_is_served() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let mut server = Peregrine::start("");
    server.stop();
    let https = free_address();
    let config = shop(&server, https, origin.addr(), "");
    server.file("server.toml", &config);
    server.start_again();
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).expect("a certificate");
    let chain = server.file("chain.pem", &made.cert.pem());
    let key = server.file("key.pem", &made.signing_key.serialize_pem());
    server.ok(&["certs", "import", NAME, "--chain", &chain, "--key", &key]);
    let is_open = || over_tls(https, NAME).is_some_and(|(answer, _)| answer.starts_with("HTTP/1.1 200"));
    assert!(is_open());
    server.stop();

    // In the record itself (in the log there is something between key and value), and in what is left of those before it.
    let file = server.data().join("store.db");
    let mut bytes = std::fs::read(&file).expect("the store is one file");
    let record = format!("vault/front/{NAME}{{\"redirect\":true");
    let length = record.len();
    let found: Vec<usize> =
        (0..bytes.len() - length).filter(|at| bytes[*at..at + length] == *record.as_bytes()).collect();
    assert!(!found.is_empty(), "it is there");
    found.iter().for_each(|at| bytes[at + length - 1] ^= 1);
    std::fs::write(&file, bytes).expect("it can be written");
    for _ in 0..2 {
        server.start_again();
        // It may have asked for clients' certificates.
        assert!(!is_open(), "nobody knows who may come");
        assert_eq!(server.ok(&["status"])["alarms"][0]["code"], "store.record_aside");
        server.stop();
    }
    server.start_again();
    server.ok(&["domains", "add", NAME]);
    wait_for("that it is open", || is_open().then_some(()));
    assert_eq!(server.ok(&["status"])["alarms"].as_array().map(Vec::len), Some(0), "it is mended");
}
