//! An engine, and edges in processes of their own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::docker::processes_with;
use super::server::{Peregrine, Said, free_address, http_get, said, signal};
use super::shop::{Shop, TWO_HOSTS};
use super::wait_for;
use super::wires::Wires;

/// Short enough for a test to see its end, long enough for a busy machine.
pub(crate) const LEASE_MS: u64 = 4_000;

/// An edge of an installation. Killed when dropped.
pub(crate) struct Edge {
    dir: TempDir,
    pub(crate) name: String,
    http: SocketAddr,
    /// Network namespace of its process, if it has one of its own.
    namespace: Option<String>,
    child: Option<Child>,
    /// Processes that were started by it and have handed over.
    before: Vec<Child>,
    /// The process that has taken over last.
    heir: Option<u32>,
    /// Variables for its process besides those of the test.
    pub(crate) environment: Vec<(String, String)>,
}

/// The configuration of an engine with two hosts that listens for edges there.
pub(crate) fn engine_configuration(link: SocketAddr) -> String {
    format!("{TWO_HOSTS}\n[link]\nlisten = \"{link}\"\nlease = \"{LEASE_MS}ms\"\n")
}

/// An engine, an edge that has joined, and the shop on host-a.
pub(crate) struct Apart {
    pub(crate) shop: Shop,
    pub(crate) edge: Edge,
    pub(crate) link: SocketAddr,
}

impl Apart {
    /// Starts everything.
    pub(crate) fn open(settings: &str) -> Self {
        let link = free_address();
        let server = Peregrine::start_engine(&engine_configuration(link));
        let edge = Edge::join(&server, link, "edge-1");
        let shop = Shop::closed(server);
        shop.deploy(&[], settings);
        wait_for("the edge to serve", || answers(edge.http).then_some(()));
        Self { shop, edge, link }
    }
}

/// Whether the shop answers there.
pub(crate) fn answers(edge: SocketAddr) -> bool {
    http_get(edge, "/").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// A token for an edge.
#[track_caller]
pub(crate) fn invite(server: &Peregrine, name: &str) -> String {
    let invite = server.ok(&["edges", "invite", name]);
    invite["token"].as_str().expect("a token").to_owned()
}

/// How the engine sees an edge.
#[track_caller]
pub(crate) fn seen(server: &Peregrine, name: &str) -> Value {
    let edges = server.ok(&["edges", "list"]);
    let edges = edges.as_array().expect("a list").clone();
    edges.into_iter().find(|edge| edge["name"] == name).unwrap_or_else(|| panic!("no edge {name}"))
}

/// Waits until the engine sees an edge so.
#[track_caller]
pub(crate) fn wait_for_state(server: &Peregrine, name: &str, state: &str) {
    wait_for(&format!("{name} to be {state}"), || (seen(server, name)["state"] == state).then_some(()));
}

impl Edge {
    /// A folder that has not joined.
    pub(crate) fn fresh(name: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("peregrine-edge-").tempdir().expect("a scratch folder");
        Self {
            dir,
            name: name.to_owned(),
            http: free_address(),
            namespace: None,
            child: None,
            before: Vec::new(),
            heir: None,
            environment: Vec::new(),
        }
    }

    /// Joins and starts an edge that lives in a network namespace and listens there.
    #[track_caller]
    pub(crate) fn join_within(server: &Peregrine, name: &str, wires: &Wires) -> Self {
        let mut edge = Self::fresh(name);
        edge.http = wires.edge_at(edge.http.port());
        edge.namespace = Some(wires.edge_namespace().to_owned());
        let joined = edge.try_join(&invite(server, name), wires.engine());
        assert!(joined.status.success(), "{joined:?}");
        edge.start();
        wait_for_state(server, name, "connected");
        edge
    }

    /// Joins and starts an edge, and waits until the engine sees it.
    #[track_caller]
    pub(crate) fn join(server: &Peregrine, link: SocketAddr, name: &str) -> Self {
        let mut edge = Self::fresh(name);
        let joined = edge.try_join(&invite(server, name), link);
        assert!(joined.status.success(), "{joined:?}");
        edge.start();
        wait_for_state(server, name, "connected");
        edge
    }

    /// Joins and starts an edge that speaks TLS there too, and waits until the engine sees it.
    #[track_caller]
    pub(crate) fn join_with_https(self, server: &Peregrine, link: SocketAddr, https: SocketAddr) -> Self {
        self.join_with_https_and(server, link, https, "")
    }

    /// As [`Self::join_with_https`], with more in its configuration.
    #[track_caller]
    pub(crate) fn join_with_https_and(
        mut self,
        server: &Peregrine,
        link: SocketAddr,
        https: SocketAddr,
        more: &str,
    ) -> Self {
        let joined = self.try_join(&invite(server, &self.name), link);
        assert!(joined.status.success(), "{joined:?}");
        let config = format!("[edge]\nhttps = [\"{https}\"]\n\n{more}");
        std::fs::write(self.dir.path().join("edge.toml"), config).expect("a file");
        self.start_with_https();
        wait_for_state(server, &self.name, "connected");
        self
    }

    /// Starts the process (again) with its configuration file.
    pub(crate) fn start_with_https(&mut self) {
        let config = self.dir.path().join("edge.toml").display().to_string();
        self.start_with_arguments(&["--config", &config]);
    }

    /// Tries to join with a token.
    pub(crate) fn try_join(&self, token: &str, link: SocketAddr) -> Output {
        let file = self.dir.path().join("token");
        std::fs::write(&file, token).expect("a file");
        let joined = self
            .command(&["edge", "join", "--engine", &link.to_string(), "--join-token-file"])
            .arg(&file)
            .output()
            .expect("peregrine runs");
        std::fs::remove_file(&file).expect("it is there");
        joined
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peregrine"));
        command.args(["--json", "--data"]).arg(self.data()).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts the process; it may have no table yet.
    pub(crate) fn start(&mut self) {
        self.start_with(&[]);
    }

    /// Starts the process with an address for probes.
    pub(crate) fn start_with_admin(&mut self, admin: SocketAddr) {
        self.start_as(&["--admin".to_owned(), admin.to_string()]);
    }

    /// Starts the process with more engines to ask.
    pub(crate) fn start_with(&mut self, engines: &[SocketAddr]) {
        let more: Vec<_> = engines.iter().flat_map(|at| ["--engine".to_owned(), at.to_string()]).collect();
        self.start_as(&more);
    }

    /// Starts the process with a configuration that says where it listens.
    pub(crate) fn start_by_file(&mut self, config: &Path) {
        let words = ["--config".to_owned(), config.display().to_string()];
        self.start_with_words(&words);
    }

    fn start_as(&mut self, more: &[String]) {
        let http = ["--http".to_owned(), self.http.to_string()];
        self.start_with_words(&[&http, more].concat());
    }

    fn start_with_words(&mut self, more: &[String]) {
        assert!(self.child.is_none(), "it runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("log file");
        let mut command = match &self.namespace {
            None => Command::new(env!("CARGO_BIN_EXE_peregrine")),
            // It becomes the program that it starts: the process is the edge's.
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/var/run/netns/{namespace}")).arg("--");
                command.arg(env!("CARGO_BIN_EXE_peregrine"));
                command
            }
        };
        command.args(["edge", "--log-format", "text", "--data"]);
        command.arg(self.data());
        command.args(more);
        command.env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()));
        command.envs(self.environment.clone());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log file")).stderr(log);
        self.child = Some(command.spawn().expect("peregrine starts"));
    }

    /// Where it listens.
    pub(crate) const fn http(&self) -> SocketAddr {
        self.http
    }

    /// Starts the process with these arguments besides.
    pub(crate) fn start_with_arguments(&mut self, more: &[&str]) {
        self.start_as(&more.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
    }

    /// The process that serves.
    pub(crate) fn pid(&self) -> u32 {
        self.heir.unwrap_or_else(|| self.child.as_ref().expect("it runs").id())
    }

    /// Asks it to be taken over.
    pub(crate) fn ask_upgrade(&self, more: &[&str]) -> Said {
        let arguments = [&["edge", "upgrade"], more].concat();
        said(&self.command(&arguments).output().expect("peregrine runs"), &arguments)
    }

    /// Has it taken over, by the same program: the process that was there before.
    #[track_caller]
    pub(crate) fn upgrade(&mut self) -> u32 {
        let (before, said) = (self.pid(), self.ask_upgrade(&[]));
        assert_eq!(said.code, 0, "{}\n{}", said.stderr, self.log_text());
        let pid = said.data()["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        self.is_taken_over_by(pid.expect("a process"));
        before
    }

    /// Another process of it serves.
    pub(crate) fn is_taken_over_by(&mut self, pid: u32) {
        self.heir = Some(pid);
        self.before.extend(self.child.take());
    }

    /// Every process of it that lives, the last that was started last.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let mut pids = processes_with(&self.data().display().to_string());
        pids.retain(|pid| is_alive(*pid));
        pids.sort_unstable();
        pids
    }

    /// Waits until that process has ended.
    #[track_caller]
    pub(crate) fn wait_gone(&mut self, pid: u32) {
        wait_for(&format!("process {pid} to end"), || {
            for child in &mut self.before {
                child.try_wait().expect("a child can be asked");
            }
            (!is_alive(pid)).then_some(())
        });
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("edge.log")
    }

    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        if let Some(pid) = self.heir.take() {
            signal(pid, "KILL");
            return self.wait_gone(pid);
        }
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it can be killed");
        child.wait().expect("it is gone");
    }

    /// Ends it politely; its exit code, if it is ours to know.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        if let Some(pid) = self.heir.take() {
            signal(pid, "TERM");
            self.wait_gone(pid);
            return None;
        }
        let mut child = self.child.take().expect("it runs");
        signal(child.id(), "TERM");
        child.wait().expect("it ends").code()
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}", self.name, self.log_text());
        }
        for mut child in self.child.take().into_iter().chain(self.before.drain(..)) {
            let _killed = child.kill();
            let _gone = child.wait();
        }
        // Those that nobody here has started, and those that they are starting.
        while let Some(pid) = self.pids().first() {
            signal(*pid, "KILL");
        }
    }
}

/// Whether a process runs: it is there, and more than its exit code.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// A way between an edge and an engine that can be cut: then nothing passes in either direction, and nobody is told.
pub(crate) struct Way {
    addr: SocketAddr,
    open: tokio::sync::watch::Sender<bool>,
    _runtime: tokio::runtime::Runtime,
}

impl Way {
    /// To an engine.
    pub(crate) fn to(engine: SocketAddr) -> Self {
        let mut threads = tokio::runtime::Builder::new_multi_thread();
        let runtime = threads.worker_threads(1).enable_all().build().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let addr = listener.local_addr().expect("an address");
        let open = tokio::sync::watch::Sender::new(true);
        let gate = open.clone();
        runtime.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = tokio::net::TcpStream::connect(engine).await else { continue };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                tokio::spawn(carry(near_in, far_out, gate.subscribe()));
                tokio::spawn(carry(far_in, near_out, gate.subscribe()));
            }
        });
        Self { addr, open, _runtime: runtime }
    }

    /// Where the edge finds it.
    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Cuts it.
    pub(crate) fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Heals it: what was on its way arrives.
    pub(crate) fn heal(&self) {
        self.open.send_replace(true);
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut open: tokio::sync::watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if open.wait_for(|open| *open).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// A second engine on the store of the first. Killed when dropped.
pub(crate) struct Standby {
    pub(crate) link: SocketAddr,
    api: SocketAddr,
    data: PathBuf,
    child: Child,
}

impl Standby {
    /// Starts it; it waits.
    pub(crate) fn start(apart: &Apart) -> Self {
        let (link, api) = (free_address(), free_address());
        let config = format!("[api]\nlisten = \"{api}\"\n{}", engine_configuration(link));
        let config = apart.shop.server.file("standby.toml", &config);
        let data = apart.shop.server.data();
        let log = apart.shop.server.dir().join("standby.log");
        let log = std::fs::File::create(log).expect("log file");
        let child = Command::new(env!("CARGO_BIN_EXE_peregrine"))
            .args(["engine", "--standby", "--log-format", "text", "--config", &config, "--data"])
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log file"))
            .stderr(log)
            .spawn()
            .expect("peregrine starts");
        Self { link, api, data, child }
    }

    /// Where its API is, or will be.
    pub(crate) const fn api(&self) -> SocketAddr {
        self.api
    }

    /// Waits until it has taken over and answers.
    pub(crate) fn wait_until_it_leads(&mut self) {
        wait_for("the other engine to lead", || {
            assert!(self.child.try_wait().expect("a child can be asked").is_none(), "it has ended");
            http_get(self.api, "/readyz").filter(|answer| answer.starts_with("HTTP/1.1 200"))
        });
    }

    fn run(&self, arguments: &[&str]) -> Value {
        let output = Command::new(env!("CARGO_BIN_EXE_peregrine"))
            .args(["--json", "--api", &format!("http://{}", self.api), "--data"])
            .arg(&self.data)
            .args(arguments)
            .output()
            .expect("peregrine runs");
        said(&output, arguments).data().clone()
    }

    /// Waits until the move has ended.
    pub(crate) fn ended(&self, id: &str) -> Value {
        wait_for("the move to end", || {
            let now = self.run(&["moves", "show", id]);
            let state = now["state"].as_str().expect("state");
            (!matches!(state, "running" | "paused" | "rolling_back")).then_some(now)
        })
    }

    /// Every entry of the audit.
    pub(crate) fn audit(&self) -> Value {
        self.run(&["audit", "list"])
    }

    /// Every stored event, as text.
    pub(crate) fn events(&self) -> String {
        self.run(&["events"]).to_string()
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.data.with_file_name("standby.log");
            eprintln!("--- log of the standby\n{}", std::fs::read_to_string(log).unwrap_or_default());
        }
        let _killed = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// What a process holds open, as the kernel names it.
pub(crate) fn open_files(pid: u32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is ours");
    let target = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
    entries.filter_map(target).map(|path| path.display().to_string()).collect()
}

/// Every file below a folder.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        if entry.path().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}
