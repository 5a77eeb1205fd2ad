//! A whole server in a test: engine, SQLite, processes, API. The test binary plays the instances itself.

mod raw;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_api::client::{Client, ClientConfig, ClientError, PutService, Submit};
use peregrine_api::types::{
    Applied, Health, MachineSpec, Move, MoveSettings, Probe, Problem, Resources, RuntimeKind, ServiceSpec,
    Warm, Workload,
};
use peregrine_api::{Api, Config, read_token};
use peregrine_engine::store::SqliteStore;
use peregrine_engine::{Connect, Engine, EngineConfig, EngineHandle, runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) use raw::{Answer, exchange, read_answer};

/// Longest time that a test waits for a state.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A server with two process machines, `host-a` and `host-b`, and nothing on them.
pub(crate) struct Server {
    pub(crate) client: Client,
    pub(crate) engine: EngineHandle,
    pub(crate) token: String,
    pub(crate) address: std::net::SocketAddr,
    pub(crate) folder: Arc<tempfile::TempDir>,
    stop_api: Option<oneshot::Sender<()>>,
    api: Option<JoinHandle<std::io::Result<()>>>,
    stop_engine: Option<oneshot::Sender<()>>,
    running_engine: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let server = Self::open(Arc::new(tempfile::tempdir().unwrap()), change).await;
        for (name, address) in [("host-a", "127.0.0.2"), ("host-b", "127.0.0.3")] {
            server.client.add_machine(&machine(name, address), &Submit::default()).await.unwrap();
        }
        server
    }

    async fn open(folder: Arc<tempfile::TempDir>, change: impl FnOnce(&mut Config)) -> Self {
        let store = Arc::new(SqliteStore::open(folder.path()).unwrap());
        let data = folder.path().to_owned();
        let connect: Connect = Arc::new(move |machine| runtime::connect_or_refuse(&machine.spec, &data));
        let (writer, _) = peregrine_routing::table();
        let (engine, handle) = Engine::open(EngineConfig::default(), store, connect, writer).await.unwrap();
        let (stop_engine, stopped) = oneshot::channel::<()>();
        let running_engine = tokio::spawn(engine.run(async {
            let _ = stopped.await;
        }));
        let mut server = Self {
            client: Client::new(&ClientConfig::new("http://127.0.0.1:1", None)).unwrap(),
            engine: handle,
            token: String::new(),
            address: ([127, 0, 0, 1], 0).into(),
            folder,
            stop_api: None,
            api: None,
            stop_engine: Some(stop_engine),
            running_engine: Some(running_engine),
        };
        server.start_api(change).await;
        server
    }

    /// Starts the API (again), on the same address if it had one.
    pub(crate) async fn start_api(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = Config::new(self.address, self.folder.path());
        change(&mut config);
        let api = Api::bind(config, self.engine.clone()).await.unwrap();
        self.address = api.addr();
        self.token = read_token(self.folder.path()).unwrap();
        self.client = self.client_with(Some(&self.token));
        let (stop, stopped) = oneshot::channel::<()>();
        self.stop_api = Some(stop);
        self.api = Some(tokio::spawn(api.run(async {
            let _ = stopped.await;
        })));
    }

    /// Stops the API; the engine goes on.
    pub(crate) async fn stop_api(&mut self) {
        drop(self.stop_api.take());
        if let Some(api) = self.api.take() {
            tokio::time::timeout(PATIENCE, api).await.expect("the API stops").unwrap().unwrap();
        }
    }

    pub(crate) fn client_with(&self, token: Option<&str>) -> Client {
        let config = ClientConfig::new(format!("http://{}", self.address), token.map(str::to_owned));
        Client::new(&config).unwrap()
    }

    /// One request as it is written, with the token; the answer as it comes.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        head.push_str(&format!("Authorization: Bearer {}\r\n", self.token));
        if let Some(body) = body {
            head.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        exchange(self.address, &format!("{head}\r\n{}", body.unwrap_or_default())).await
    }

    /// With these further lines of the head.
    pub(crate) async fn ask_with(&self, method: &str, path: &str, lines: &[&str], body: &str) -> Answer {
        let length = format!("Content-Length: {}", body.len());
        let token = format!("Authorization: Bearer {}", self.token);
        let first = format!("{method} {path} HTTP/1.1");
        let mut head = vec![first.as_str(), "Host: localhost", "Connection: close", &token, &length];
        head.extend(lines);
        exchange(self.address, &format!("{}\r\n\r\n{body}", head.join("\r\n"))).await
    }

    /// The shop on `host-a`, deployed by API.
    pub(crate) async fn with_shop(&self) -> Applied {
        self.put(&shop()).await
    }

    /// Puts a service and waits until it is there.
    pub(crate) async fn put(&self, spec: &ServiceSpec) -> Applied {
        let put = PutService { machine: Some("host-a".into()), submit: patient(), ..PutService::default() };
        let applied = self.client.put_service(spec, &put).await.unwrap();
        if let Some(rollout) = &applied.rollout {
            assert_eq!(format!("{:?}", rollout.state), "Succeeded", "{rollout:#?}");
        }
        applied
    }

    /// Waits until a move says so.
    pub(crate) async fn until(&self, id: &str, what: &str, reached: impl Fn(&Move) -> bool) -> Move {
        let begun = Instant::now();
        loop {
            let now = self.client.get_move(id).await.unwrap();
            if reached(&now) {
                return now;
            }
            assert!(begun.elapsed() < PATIENCE, "waited for {what}: {now:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Server {
    /// Instances are processes that outlive their engine; a test takes them along.
    fn drop(&mut self) {
        drop((self.stop_api.take(), self.stop_engine.take()));
        self.running_engine.take().inspect(JoinHandle::abort);
        kill_instances(&self.folder.path().join("processes"));
    }
}

/// Ends what the process runtime has started below a folder, by the pids in its records.
fn kill_instances(root: &Path) {
    let Ok(machines) = std::fs::read_dir(root) else { return };
    for instance in
        machines.flatten().filter_map(|machine| std::fs::read_dir(machine.path()).ok()).flatten().flatten()
    {
        let Ok(record) = std::fs::read_to_string(instance.path().join("process.json")) else { continue };
        let record: serde_json::Value = serde_json::from_str(&record).unwrap_or_default();
        if let Some(pid) = find_pid(&record) {
            drop(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status());
        }
    }
}

fn find_pid(record: &serde_json::Value) -> Option<u64> {
    let map = record.as_object()?;
    map.get("pid").and_then(serde_json::Value::as_u64).or_else(|| map.values().find_map(find_pid))
}

pub(crate) fn patient() -> Submit {
    Submit { wait_ms: Some(30_000), ..Submit::default() }
}

pub(crate) fn keyed(key: &str) -> Submit {
    Submit { idempotency_key: Some(key.to_owned()), ..Submit::default() }
}

pub(crate) fn machine(name: &str, address: &str) -> MachineSpec {
    MachineSpec {
        name: name.to_owned(),
        runtime: RuntimeKind::Process,
        endpoint: None,
        address: address.parse().unwrap(),
        labels: BTreeMap::new(),
    }
}

/// A shop with quick settings.
pub(crate) fn shop() -> ServiceSpec {
    ServiceSpec {
        name: "shop".to_owned(),
        routes: vec![peregrine_api::types::Route { host: "shop.test".into(), path: "/".into() }],
        workload: instance(&[("SECRET", "not-to-be-shown")]),
        health: Health {
            probe: Probe::Http,
            path: Some("/healthz".into()),
            interval_ms: 200,
            ..Health::default()
        },
        resources: Resources::default(),
        replicas: 1,
        traffic: peregrine_api::types::Traffic::default(),
        move_settings: MoveSettings {
            step_hold_ms: 5,
            step_min_samples: 1,
            step_max_ms: 20,
            warm: Warm { probes: 1, probe_interval_ms: 5, paths: Vec::new(), mirror: None },
            start_timeout_ms: 10_000,
            stop_grace_ms: 100,
            ..MoveSettings::default()
        },
        labels: BTreeMap::new(),
    }
}

/// This test binary as an instance.
pub(crate) fn instance(env: &[(&str, &str)]) -> Workload {
    let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    Workload::Command {
        command: [&own, "support::instance_main", "--exact", "--ignored", "--nocapture"]
            .map(str::to_owned)
            .to_vec(),
        directory: None,
        env: env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
    }
}

/// Ends this instance when the tests that play with it have ended. An engine that is dropped in the middle of a start goes
/// on with it on a thread of its runtime: what starts then is in no record that [`Server`] has seen when it was dropped.
fn end_with_the_tests() {
    let tests = std::os::unix::process::parent_id();
    std::thread::spawn(move || {
        while std::os::unix::process::parent_id() == tests {
            std::thread::park_timeout(Duration::from_millis(50));
        }
        std::process::exit(0);
    });
}

/// The problem that a call ended with.
pub(crate) fn problem<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Problem {
    match result {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("no problem: {other:?}"),
    }
}

#[test]
#[ignore = "played as a program by the tests"]
fn instance_main() {
    let (Ok(host), Ok(port)) = (std::env::var("HOST"), std::env::var("PORT")) else { return };
    end_with_the_tests();
    let sick = std::env::var("SICK").is_ok();
    let listener = std::net::TcpListener::bind((host.as_str(), port.parse().unwrap())).unwrap();
    println!("listening");
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut head = [0; 4096];
        let read = connection.read(&mut head).unwrap_or(0);
        let head = String::from_utf8_lossy(&head[..read]);
        let path = head.split(' ').nth(1).unwrap_or("/");
        if let Some(text) = path.strip_prefix("/say/") {
            println!("{text}");
        }
        let status = if sick { "503 Service Unavailable" } else { "200 OK" };
        drop(write!(connection, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
    }
}
