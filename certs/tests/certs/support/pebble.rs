//! Debian's pebble, a real authority for tests.

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_certs::{BudgetLimit, CaConfig, ExternalAccount};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::ports::free_port;

/// Where it listens, and what it has said.
pub(crate) struct Pebble {
    child: Child,
    pub(crate) address: SocketAddr,
    management: SocketAddr,
    pub(crate) root_pem: String,
    folder: tempfile::TempDir,
}

impl Drop for Pebble {
    fn drop(&mut self) {
        self.kill();
    }
}

#[derive(Clone, Default)]
pub(crate) struct PebbleOptions {
    pub(crate) refused_nonces_percent: u8,
    pub(crate) external_account: Option<(String, String)>,
    /// The responder that its certificates name.
    pub(crate) responder: String,
}

/// Whether there is one; `None` is told, and is a failure where `PEREGRINE_REQUIRE_PEBBLE=1` says so.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&paths).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
    let found = folders.map(|folder| folder.join(program)).find(|path| path.is_file());
    if found.is_none() {
        assert!(
            std::env::var_os("PEREGRINE_REQUIRE_PEBBLE").is_none_or(|value| value != "1"),
            "{program} is not installed, and PEREGRINE_REQUIRE_PEBBLE=1: run scripts/setup test"
        );
        eprintln!("skipped: {program} is not installed (scripts/setup test installs it)");
    }
    found
}

impl Pebble {
    /// Starts it: it asks `dns` for names, and `http` and `tls` are the ports that it validates at.
    pub(crate) fn start(
        program: &PathBuf,
        dns: SocketAddr,
        http: SocketAddr,
        tls: SocketAddr,
        options: &PebbleOptions,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let own = rcgen::generate_simple_self_signed(names).expect("a certificate");
        let root_pem = own.cert.pem();
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        std::fs::write(&cert, &root_pem).unwrap();
        std::fs::write(&key, own.signing_key.serialize_pem()).unwrap();
        let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let management: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let mut config = serde_json::json!({
            "listenAddress": address.to_string(),
            "managementListenAddress": management.to_string(),
            "certificate": cert,
            "privateKey": key,
            "httpPort": http.port(),
            "tlsPort": tls.port(),
            "ocspResponderURL": options.responder,
            "externalAccountBindingRequired": options.external_account.is_some(),
        });
        if let Some((id, key)) = &options.external_account {
            config["externalAccountMACKeys"] = serde_json::json!({ id: key });
        }
        let config_path = folder.path().join("config.json");
        std::fs::write(&config_path, serde_json::json!({ "pebble": config }).to_string()).unwrap();
        // A file and no pipe: what it has done it has written before it answers, and nobody has to read along.
        let log = File::create(folder.path().join("log")).unwrap();
        let child = Command::new(program)
            .args(["-config".as_ref(), config_path.as_os_str()])
            .args(["-dnsserver", &dns.to_string()])
            .env("PEBBLE_VA_NOSLEEP", "1")
            .env("PEBBLE_AUTHZREUSE", "0")
            .env("PEBBLE_WFE_NONCEREJECT", options.refused_nonces_percent.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("pebble starts");
        let mut started = Self { child, address, management, root_pem, folder };
        started.wait();
        started
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(self.address).is_err() {
            if let Some(status) = self.child.try_wait().expect("its state") {
                panic!("pebble ended ({status}): {}", self.log());
            }
            assert!(Instant::now() < deadline, "pebble does not listen");
            std::thread::yield_now();
        }
    }

    pub(crate) fn kill(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }

    /// How many lines of its log have this in them.
    pub(crate) fn count(&self, what: &str) -> usize {
        self.log().lines().filter(|line| line.contains(what)).count()
    }

    /// Orders that were created.
    pub(crate) fn orders(&self) -> usize {
        self.count("orders in the db")
    }

    /// Certificates that were issued.
    pub(crate) fn issued(&self) -> usize {
        self.count("Issued certificate serial")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The authority that signs certificates, with its key: what a responder of its has to sign with.
    pub(crate) async fn issuer(&self) -> (String, String) {
        (self.managed("/intermediates/0").await, self.managed("/intermediate-keys/0").await)
    }

    async fn managed(&self, path: &str) -> String {
        let mut roots = rustls::RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(self.root_pem.as_bytes()).expect("a certificate");
        roots.add(root).expect("an authority");
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
        let socket = tokio::net::TcpStream::connect(self.management).await.expect("it listens");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from("localhost").expect("a name");
        let mut stream = connector.connect(name, socket).await.expect("it shakes hands");
        let question = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        stream.write_all(question.as_bytes()).await.expect("is taken");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        body.to_owned()
    }

    pub(crate) fn directory(&self) -> String {
        format!("https://{}/dir", self.address)
    }
}

/// An authority's configuration, with budgets that do not matter.
pub(crate) fn ca(id: &str, directory_url: String, root_pem: &str) -> CaConfig {
    let much = BudgetLimit { orders: 10_000, window_ms: 3_600_000 };
    CaConfig {
        id: id.to_owned(),
        directory_url,
        contacts: vec!["mailto:test@example.com".to_owned()],
        terms_agreed: true,
        roots_pem: Some(root_pem.as_bytes().to_vec()),
        external_account: None::<ExternalAccount>,
        profile: None,
        caa_identities: Vec::new(),
        orders: much,
        orders_per_domain: much,
    }
}
