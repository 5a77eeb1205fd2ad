//! Two real engines for the tests, an image to run on them, and the certificates of their TLS sockets.
//!
//! The engines are shared by the tests that run at the same time and stopped with the last of them.
//! Without root or Docker a test says so and is skipped; with `PEREGRINE_REQUIRE_DOCKER=1` that is a failure.
//! `PEREGRINE_TEST_DOCKER=/path/of/docker.sock` is taken as the first engine, if set.

pub(crate) mod image;
#[path = "../../../tests/support/ports.rs"]
pub(crate) mod ports;
pub(crate) mod program;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use peregrine_engine::model::{InstanceId, Resources};
use peregrine_engine::runtime::local_engines::{LocalEngine, LocalEngines, LocalEnginesOptions};
use peregrine_engine::runtime::{InstanceSpec, Run, Runtime, connect};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// Installation of every container of the tests.
pub(crate) const INSTALL: &str = "runtime-test";
/// Port inside: one that only a privileged process may listen on elsewhere.
pub(crate) const PORT: u16 = 80;
/// The engines' TLS sockets, in their namespaces.
pub(crate) const TLS_PORT: u16 = 2376;

pub(crate) struct Engines {
    pub(crate) engines: LocalEngines,
    pub(crate) certificates: Certificates,
    pub(crate) image: image::Packed,
    _dir: tempfile::TempDir,
}

static SHARED: tokio::sync::Mutex<Weak<Engines>> = tokio::sync::Mutex::const_new(Weak::new());

/// The engines, with the image on the first one; `None` if the test is to be skipped.
pub(crate) async fn engines() -> Option<Arc<Engines>> {
    let mut shared = SHARED.lock().await;
    if let Some(engines) = shared.upgrade() {
        return Some(engines);
    }
    if !allowed(LocalEngines::check().err().map(|error| error.to_string())) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(dir.path());
    let file = |name: &str| dir.path().join(name).display().to_string();
    let options = LocalEnginesOptions {
        running: std::env::var_os("PEREGRINE_TEST_DOCKER").map(PathBuf::from),
        dockerd_arguments: vec![
            "--tlsverify".to_owned(),
            format!("--tlscacert={}", file("ca.pem")),
            format!("--tlscert={}", file("server.pem")),
            format!("--tlskey={}", file("server.key")),
            format!("--host=tcp://0.0.0.0:{TLS_PORT}"),
        ],
    };
    let engines = LocalEngines::start(&dir.path().join("engines"), &options).await.unwrap();
    let image = image::packed();
    let first = runtime(engines.first());
    first.import(&image.id, image.stream(), &|_, _| {}).await.unwrap();
    let engines = Arc::new(Engines { engines, certificates, image, _dir: dir });
    *shared = Arc::downgrade(&engines);
    Some(engines)
}

/// What most tests need: the first engine's runtime and an instance for it. The engines live as long as this.
pub(crate) struct OnFirst {
    pub(crate) engines: Arc<Engines>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) spec: InstanceSpec,
}

/// [`OnFirst`]; `None` if the test is to be skipped.
pub(crate) async fn on_first() -> Option<OnFirst> {
    let engines = engines().await?;
    let first = engines.engines.first();
    let (runtime, spec) = (runtime(first), spec(first, &engines.image.id));
    Some(OnFirst { engines, runtime, spec })
}

/// Whether the test can go on: it can if nothing is missing.
pub(crate) fn allowed(missing: Option<String>) -> bool {
    let Some(missing) = missing else { return true };
    assert!(std::env::var_os("PEREGRINE_REQUIRE_DOCKER").is_none_or(|value| value != "1"), "{missing}");
    // Past the harness, which would keep it to itself.
    std::io::stderr().write_all(format!("SKIPPED: {missing}\n").as_bytes()).unwrap();
    false
}

pub(crate) fn runtime(engine: &LocalEngine) -> Arc<dyn Runtime> {
    connect(&engine.machine("host"), Path::new("/nowhere")).unwrap()
}

/// An instance on `engine` that listens and answers with what it is, see [`program`].
pub(crate) fn spec(engine: &LocalEngine, image: &str) -> InstanceSpec {
    InstanceSpec {
        install: INSTALL.to_owned(),
        id: InstanceId::generate(),
        // A service for each instance: the tests share the engines, and fences go by service.
        service: InstanceId::generate().to_string(),
        version: 1,
        epoch: 1,
        run: Run::Container { image: image.to_owned(), command: None, port: PORT, capabilities: Vec::new() },
        env: BTreeMap::new(),
        resources: Resources { memory_bytes: 128 << 20, cpu_millis: 500, pids: 64 },
        publish: engine.address,
    }
}

/// The same with another of [`program`]'s roles.
pub(crate) fn playing(role: &str, mut spec: InstanceSpec) -> InstanceSpec {
    if let Run::Container { command, .. } = &mut spec.run {
        *command = Some(program::arguments(role));
    }
    spec
}

/// The same with capabilities given back.
pub(crate) fn allowing(names: &[&str], mut spec: InstanceSpec) -> InstanceSpec {
    if let Run::Container { capabilities, .. } = &mut spec.run {
        *capabilities = names.iter().map(|&name| name.to_owned()).collect();
    }
    spec
}

/// What a listening instance answers; `None` if it does not.
pub(crate) fn ask(address: SocketAddr) -> Option<BTreeMap<String, String>> {
    use std::io::Read;
    let mut connection = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
    connection.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    let pairs = answer.lines().filter_map(|line| line.split_once('='));
    let pairs: BTreeMap<_, _> = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    (!pairs.is_empty()).then_some(pairs)
}

pub(crate) async fn answer_of(address: SocketAddr) -> BTreeMap<String, String> {
    eventually(&format!("{address} answers"), || async { ask(address).is_some() }).await;
    ask(address).unwrap()
}

pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, state: impl Fn() -> F) {
    let started = Instant::now();
    while !state().await {
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Docker's own command line, as an independent look at the engine.
pub(crate) fn docker(engine: &LocalEngine, arguments: &[&str]) -> String {
    let output = Command::new("docker")
        .arg("-H")
        .arg(format!("unix://{}", engine.socket.display()))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A port on loopback whose connections go to `to`.
pub(crate) async fn forwarder(to: SocketAddr) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut far) = tokio::net::TcpStream::connect(to).await else { return };
                drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
            });
        }
    });
    address
}

/// A process that ends with its owner.
pub(crate) struct Daemon(pub(crate) std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Files of a small authority: the engines' certificate, ours, and one of another authority.
pub(crate) struct Certificates {
    pub(crate) ca: PathBuf,
    pub(crate) client: PathBuf,
    pub(crate) client_key: PathBuf,
    pub(crate) other_ca: PathBuf,
    pub(crate) other_client: PathBuf,
    pub(crate) other_client_key: PathBuf,
}

impl Certificates {
    fn make(dir: &Path) -> Self {
        let file = |name: &str, text: String| {
            std::fs::write(dir.join(name), text).unwrap();
            dir.join(name)
        };
        let authority = |name: &str| {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
        };
        let leaf = |issuer: &CertifiedIssuer<'static, KeyPair>, purpose| {
            let mut params =
                CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
            params.extended_key_usages = vec![purpose];
            let key = KeyPair::generate().unwrap();
            (params.signed_by(&key, issuer).unwrap().pem(), key.serialize_pem())
        };
        let (ours, other) = (authority("ours"), authority("other"));
        let (server, server_key) = leaf(&ours, ExtendedKeyUsagePurpose::ServerAuth);
        file("server.pem", server);
        file("server.key", server_key);
        let (client, client_key) = leaf(&ours, ExtendedKeyUsagePurpose::ClientAuth);
        let (other_client, other_client_key) = leaf(&other, ExtendedKeyUsagePurpose::ClientAuth);
        Self {
            ca: file("ca.pem", ours.pem()),
            client: file("client.pem", client),
            client_key: file("client.key", client_key),
            other_ca: file("other-ca.pem", other.pem()),
            other_client: file("other-client.pem", other_client),
            other_client_key: file("other-client.key", other_client_key),
        }
    }
}
