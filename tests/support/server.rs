//! A running `peregrine serve`, and the command line against it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::wait_for;

/// The built binary with its data folder. Killed when dropped, with everything that it started.
pub(crate) struct Peregrine {
    dir: TempDir,
    edge: SocketAddr,
    api: SocketAddr,
    child: Option<Child>,
    /// Levels of its log, unless the tests themselves are told others.
    levels: &'static str,
    /// The command that it is run by: `serve`, or `engine` with edges elsewhere.
    command: &'static str,
    /// What it is started with besides what the tests themselves are.
    environment: Vec<(String, PathBuf)>,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) json: Value,
    /// What was told to people; shown when a test fails.
    #[allow(dead_code, reason = "read by Debug")]
    pub(crate) stderr: String,
}

impl Said {
    /// The `data` of a success.
    #[track_caller]
    pub(crate) fn data(&self) -> &Value {
        assert!(self.json.get("data").is_some(), "no data: {self:?}");
        &self.json["data"]
    }

    /// The `error` of a failure.
    #[track_caller]
    pub(crate) fn error(&self) -> &Value {
        assert!(self.json.get("error").is_some(), "no error: {self:?}");
        &self.json["error"]
    }
}

impl Peregrine {
    /// Starts a server. `more` is put behind the `[edge]` and `[api]` parts of its configuration.
    pub(crate) fn start(more: &str) -> Self {
        Self::start_logging(more, "info")
    }

    /// The same with other levels of its log.
    pub(crate) fn start_logging(more: &str, levels: &'static str) -> Self {
        Self::start_as("serve", more, levels)
    }

    /// Starts `peregrine engine`; its edges are for the test to start.
    pub(crate) fn start_engine(more: &str) -> Self {
        Self::start_as("engine", more, "info")
    }

    fn start_as(command: &'static str, more: &str, levels: &'static str) -> Self {
        let dir = tempfile::Builder::new().prefix("peregrine-test-").tempdir().expect("a scratch folder");
        let (edge, api) = (free_address(), free_address());
        let mut server = Self { dir, edge, api, child: None, levels, command, environment: Vec::new() };
        server.configure(more);
        server.start_again();
        server
    }

    /// Writes the configuration file (anew).
    pub(crate) fn configure(&self, more: &str) {
        let Self { edge, api, .. } = self;
        let config = format!("[edge]\nhttp = [\"{edge}\"]\n\n[api]\nlisten = \"{api}\"\n{more}\n");
        std::fs::write(self.dir.path().join("server.toml"), config).expect("configuration is written");
    }

    /// What it is started with from the next start on.
    pub(crate) fn set_environment(&mut self, environment: Vec<(String, PathBuf)>) {
        self.environment = environment;
    }

    /// What `/metrics` says.
    #[track_caller]
    pub(crate) fn metrics(&self) -> String {
        let (api, token) = (self.api(), self.token());
        let asked = format!(
            "GET /metrics HTTP/1.1\r\nhost: {api}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n"
        );
        let answer = http(api, &asked).expect("is answered");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer
    }

    /// Asks the server to read its configuration again.
    pub(crate) fn reload(&self) {
        signal(self.child.as_ref().expect("it runs").id(), "HUP");
    }

    /// Starts the server (again) on the same data and addresses, and waits until it is ready.
    pub(crate) fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("log file");
        let child = Command::new(env!("CARGO_BIN_EXE_peregrine"))
            .args([self.command, "--log-format", "text", "--config"])
            .arg(self.dir.path().join("server.toml"))
            .arg("--data")
            .arg(self.data())
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| self.levels.to_owned()))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log file"))
            .stderr(log)
            .spawn()
            .expect("peregrine starts");
        self.child = Some(child);
        let mut ended = None;
        wait_for("the server to be ready", || {
            ended = self.child.as_mut().and_then(|child| child.try_wait().expect("a child can be asked"));
            let ready =
                http_get(self.api, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"));
            (ready || ended.is_some()).then_some(())
        });
        assert!(ended.is_none(), "serve ended with {ended:?}:\n{}", self.log_text());
    }

    /// Ends the server as a power cut would.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it can be killed");
        child.wait().expect("it is gone");
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut().expect("it was started");
        child.try_wait().expect("a child can be asked").is_some()
    }

    /// Waits until the server ends by itself; its exit code.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("it runs");
        let mut ended = None;
        wait_for("the server to end by itself", || {
            ended = child.try_wait().expect("a child can be asked");
            ended
        });
        ended.and_then(|status| status.code())
    }

    /// Ends the server politely and returns its exit code.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("it runs");
        signal(child.id(), "TERM");
        child.wait().expect("it ends").code()
    }

    pub(crate) const fn edge(&self) -> SocketAddr {
        self.edge
    }

    pub(crate) const fn api(&self) -> SocketAddr {
        self.api
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("server.log")
    }

    /// Everything that the server logged.
    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    pub(crate) fn token(&self) -> String {
        std::fs::read_to_string(self.data().join("api-token"))
            .expect("the token of the first start")
            .trim()
            .to_owned()
    }

    /// Runs a command with `--json`, and parses its one document.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Said {
        said(&self.command(arguments).output().expect("peregrine runs"), arguments)
    }

    /// As [`Self::run`], with nothing but success.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> Value {
        let said = self.run(arguments);
        assert_eq!(said.code, 0, "{arguments:?}: {said:#?}\n--- server log\n{}", self.log_text());
        said.data().clone()
    }

    /// Begins a command with `--json`.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().expect("peregrine runs")
    }

    /// Follows the events. What happens while the listener connects is told, too.
    #[track_caller]
    pub(crate) fn listen(&self) -> Child {
        let last = self.ok(&["status"])["last_event"].as_u64().expect("the newest event");
        self.spawn(&["events", "-f", "--after", &last.to_string()])
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peregrine"));
        command.args(["--json", "--api", &format!("http://{}", self.api), "--data"]).arg(self.data());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Writes a file beside the data and returns its path.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("file is written");
        path.display().to_string()
    }
}

impl Drop for Peregrine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- server log\n{}", self.log_text());
        }
        if let Some(mut child) = self.child.take() {
            let _killed = child.kill();
            let _gone = child.wait();
        }
        self.kill_processes();
    }
}

impl Peregrine {
    /// The process runtime's children outlive the server on purpose; a test must not leave them.
    fn kill_processes(&self) {
        for pid in self.pids_of("") {
            signal(pid, "KILL");
        }
    }

    /// Processes that run for an instance (all of them for ""), found by what the runtime puts into their
    /// environment and by this server's data folder.
    pub(crate) fn pids_of(&self, instance: &str) -> Vec<u32> {
        let home = self.data().join("processes").display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let environment = String::from_utf8_lossy(&environment);
            let mut variables = environment.split('\0');
            let ours = variables
                .clone()
                .any(|v| v.strip_prefix("HOME=").is_some_and(|value| value.starts_with(&home)));
            let this = variables.any(|v| {
                v.strip_prefix("PEREGRINE_INSTANCE=").is_some_and(|id| instance.is_empty() || id == instance)
            });
            if ours && this {
                found.push(pid);
            }
        }
        found
    }
}

#[track_caller]
pub(crate) fn said(output: &Output, arguments: &[&str]) -> Said {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_str(&stdout).unwrap_or_else(|why| {
        panic!("{arguments:?}: stdout is not one JSON document ({why}):\n{stdout}\n--- stderr\n{stderr}")
    });
    Said { code: output.status.code().unwrap_or(-1), json, stderr }
}

/// Sends a signal by name to one process.
pub(crate) fn signal(pid: u32, name: &str) {
    let status =
        Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
    assert!(status.is_ok(), "kill cannot be run");
}

/// Starts a command that goes on by itself, reads its first line, and ends it with Ctrl-C: the line and the exit code.
pub(crate) fn first_line_then_ctrl_c(command: &mut Command) -> (String, Option<i32>) {
    use std::io::BufRead;
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut lines = std::io::BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let (send, receive) = std::sync::mpsc::channel();
    // It reads on: a full pipe would hold the end back.
    std::thread::spawn(move || lines.by_ref().map_while(Result::ok).for_each(|line| drop(send.send(line))));
    let first = receive.recv_timeout(super::STATE_TIMEOUT);
    signal(child.id(), "INT");
    let mut status = None;
    wait_for("the end after Ctrl-C", || {
        status = child.try_wait().expect("a child can be asked");
        status
    });
    (first.expect("a line in time"), status.and_then(|status| status.code()))
}

/// An address of this machine that nobody listens on.
pub(crate) fn free_address() -> SocketAddr {
    ([127, 0, 0, 1], super::ports::free_port()).into()
}

/// A GET over a fresh connection; the whole answer as text, or `None` if nobody answers.
pub(crate) fn http_get(address: SocketAddr, path: &str) -> Option<String> {
    http(address, &format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"))
}

/// Sends raw bytes and reads to the end.
pub(crate) fn http(address: SocketAddr, request: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(15))).ok()?;
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    // A reset after an early answer is still an answer.
    let _ended = stream.read_to_end(&mut answer);
    (!answer.is_empty()).then(|| String::from_utf8_lossy(&answer).into_owned())
}
