//! Runtimes: what runs instances on a machine. Every verb is idempotent by instance id.
//!
//! A runtime knows nothing of services beyond the labels that it is given, nothing of traffic, and
//! decides nothing: it makes real what it is told, and tells what is there.

mod docker;
mod leading;
pub mod local_engines;
mod process;
mod refusing;
mod transfer;

pub use docker::DockerRuntime;
pub use leading::{LeadUntil, while_leading};
pub use process::ProcessRuntime;
pub use transfer::transfer_image;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use crate::model::{HiddenValues, InstanceId, MachineKind, MachineSpec, Resources};

/// The runtime of a machine. Nothing is connected yet: that happens at the first use, and anew after a failure.
///
/// Keep one runtime for each machine: two of them would not see each other's verbs under way.
///
/// # Errors
///
/// The machine's description cannot be used (a key file that cannot be read, clear text to another host).
pub fn connect(machine: &MachineSpec, data_dir: &Path) -> Result<Arc<dyn Runtime>, RuntimeError> {
    match &machine.kind {
        MachineKind::Process => Ok(Arc::new(ProcessRuntime::new(machine, data_dir))),
        MachineKind::Docker { endpoint } => Ok(Arc::new(DockerRuntime::new(machine, endpoint)?)),
    }
}

/// As [`connect`]; a machine that cannot even be tried answers every ask with the reason.
#[must_use]
pub fn connect_or_refuse(machine: &MachineSpec, data_dir: &Path) -> Arc<dyn Runtime> {
    connect(machine, data_dir)
        .unwrap_or_else(|error| Arc::new(refusing::RefusingRuntime::new(&machine.name, &error)))
}

/// What is to run, with nothing left to choose. `Debug` hides the values of the environment.
#[derive(Clone, PartialEq)]
pub struct InstanceSpec {
    /// Id of this installation; other installations' instances are never touched.
    pub install: String,
    /// Name of the container or process.
    pub id: InstanceId,
    /// Label.
    pub service: String,
    /// Label.
    pub version: u32,
    /// Label, and the fence against a controller that was replaced: the epoch that the caller holds *now*, also
    /// when it starts an instance again that an earlier epoch made. Nothing is created or started while
    /// another instance of the service bears a higher one.
    pub epoch: u64,
    /// What runs.
    pub run: Run,
    /// Environment. Values are never logged.
    pub env: BTreeMap<String, String>,
    /// Limits.
    pub resources: Resources,
    /// Address of the machine on which the port is published.
    pub publish: IpAddr,
}

impl std::fmt::Debug for InstanceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InstanceSpec")
            .field("install", &self.install)
            .field("id", &self.id)
            .field("service", &self.service)
            .field("version", &self.version)
            .field("epoch", &self.epoch)
            .field("run", &self.run)
            .field("env", &HiddenValues(&self.env))
            .field("resources", &self.resources)
            .field("publish", &self.publish)
            .finish()
    }
}

/// What runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// A container of an image that is on the machine.
    Container {
        /// Image id, `sha256:…`.
        image: String,
        /// Replaces the image's command.
        command: Option<Vec<String>>,
        /// Port inside.
        port: u16,
        /// What is given back of the capabilities that are dropped: names without `CAP_`.
        capabilities: Vec<String>,
    },
    /// A process. `{port}` and `{host}` in the command are replaced; `PORT` and `HOST` are set.
    Process {
        /// Program and arguments.
        command: Vec<String>,
        /// Working directory.
        directory: Option<PathBuf>,
    },
}

/// What a runtime says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeInfo {
    /// For people: `Docker 20.10.24, API 1.41`.
    pub version: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `linux`.
    pub os: String,
}

/// What is known of an instance on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceStatus {
    /// Id.
    pub id: InstanceId,
    /// Label.
    pub service: String,
    /// Label.
    pub epoch: u64,
    /// It runs now.
    pub running: bool,
    /// How it ended last, if it did.
    pub exit_code: Option<i64>,
    /// It ended because it took more memory than its limit.
    pub out_of_memory: bool,
    /// How often it was restarted.
    pub restarts: u64,
    /// Where it listens.
    pub address: Option<SocketAddr>,
}

impl InstanceStatus {
    /// How it ended last, in words that follow on "exited with".
    #[must_use]
    pub fn ending(&self) -> String {
        let code = self.exit_code.map_or_else(|| "an unknown code".to_owned(), |code| format!("code {code}"));
        if self.out_of_memory { format!("{code}, {OUT_OF_MEMORY}") } else { code }
    }
}

/// Why the kernel ended an instance, in words.
const OUT_OF_MEMORY: &str = "for it took more memory than its limit";

/// An image on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Image id, `sha256:…`: the digest of its configuration, the same on every engine.
    pub id: String,
    /// Digest references under which a registry has it, `name@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Size on disk.
    pub size_bytes: u64,
    /// `amd64`, …
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Whether it has a health check, and which ports it exposes: for the planner's advice.
    pub exposed_ports: Vec<u16>,
}

/// Bytes done, and in all if that is known.
pub type Progress<'a> = &'a (dyn Fn(u64, Option<u64>) + Send + Sync);

/// Which log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on with new lines.
    pub follow: bool,
    /// So many of the last lines first; `None` is all.
    pub tail: Option<usize>,
    /// Lines since this Unix time in milliseconds.
    pub since: Option<u64>,
}

/// A line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// When it was written.
    pub at: u64,
    /// It came from standard error.
    pub stderr: bool,
    /// The line without its end; invalid UTF-8 is replaced.
    pub text: String,
}

/// What an instance uses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct InstanceStats {
    /// CPU time since it started.
    pub cpu_seconds: f64,
    /// Memory in use.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// Why a runtime did not do it.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The engine does not answer. Whether something was done is not known: look again before repeating.
    #[error("{machine} cannot be reached: {detail}")]
    Unreachable {
        /// Which engine.
        machine: String,
        /// What was tried and what came of it.
        detail: String,
    },
    /// No such image there, nor at the registry.
    #[error("image {image} is not on {machine} and cannot be pulled: {detail}")]
    NoImage {
        /// Reference.
        image: String,
        /// Machine.
        machine: String,
        /// What the registry said.
        detail: String,
    },
    /// The engine refuses: the specification cannot be run there.
    #[error("{machine} refuses to run it: {detail}")]
    Refused {
        /// Machine.
        machine: String,
        /// What it said.
        detail: String,
    },
    /// It was started and ended at once.
    #[error(
        "the instance exited with code {code:?}{} before it listened: {last_output}",
        if *out_of_memory { format!(", {OUT_OF_MEMORY},") } else { String::new() }
    )]
    Exited {
        /// Exit code.
        code: Option<i64>,
        /// It took more memory than its limit.
        out_of_memory: bool,
        /// Its last lines.
        last_output: String,
    },
    /// A newer controller has been here (a higher epoch for the same service).
    #[error("epoch {ours} is behind epoch {theirs} on {machine}")]
    Fenced {
        /// Machine.
        machine: String,
        /// Our epoch.
        ours: u64,
        /// The epoch found.
        theirs: u64,
    },
    /// Not supported by this runtime.
    #[error("{0}")]
    Unsupported(String),
    /// Anything else.
    #[error("{machine}: {detail}")]
    Other {
        /// Machine.
        machine: String,
        /// What happened.
        detail: String,
    },
}

/// What runs instances. Implementations: Docker engines, and plain processes.
pub trait Runtime: Send + Sync + 'static {
    /// Asks whether it is there, and what it is.
    fn info(&self) -> BoxFuture<'_, Result<RuntimeInfo, RuntimeError>>;

    /// Makes sure that the instance runs, and returns where it listens. One that runs already is left alone.
    fn ensure<'a>(&'a self, spec: &'a InstanceSpec) -> BoxFuture<'a, Result<SocketAddr, RuntimeError>>;

    /// Stops and removes the instance and confirms that it is gone. One that is not there is a success.
    fn remove<'a>(&'a self, id: &'a InstanceId, grace_ms: u32) -> BoxFuture<'a, Result<(), RuntimeError>>;

    /// What is known of one instance; `None` if it is not there.
    fn inspect<'a>(
        &'a self,
        id: &'a InstanceId,
    ) -> BoxFuture<'a, Result<Option<InstanceStatus>, RuntimeError>>;

    /// Every instance that bears the label of this installation, running or not.
    fn list<'a>(&'a self, install: &'a str) -> BoxFuture<'a, Result<Vec<InstanceStatus>, RuntimeError>>;

    /// Output of an instance.
    fn logs(&self, id: &InstanceId, options: LogOptions)
    -> BoxStream<'static, Result<LogLine, RuntimeError>>;

    /// What an instance uses.
    fn stats<'a>(&'a self, id: &'a InstanceId) -> BoxFuture<'a, Result<InstanceStats, RuntimeError>>;

    /// Finds an image by reference or id on the machine; asks no registry.
    fn image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<Option<ImageInfo>, RuntimeError>>;

    /// Pulls an image from its registry.
    fn pull<'a>(
        &'a self,
        reference: &'a str,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>>;

    /// The image as a stream, to be given to another engine's [`Runtime::import`].
    fn export(&self, image: &str) -> BoxStream<'static, Result<Bytes, RuntimeError>>;

    /// Takes an image from a stream and confirms that it is `image`.
    fn import<'a>(
        &'a self,
        image: &'a str,
        stream: BoxStream<'static, Result<Bytes, RuntimeError>>,
        progress: Progress<'a>,
    ) -> BoxFuture<'a, Result<ImageInfo, RuntimeError>>;

    /// Takes an image's name away, and the image with its last one. One that is not there is a success; so is
    /// any on a runtime without images.
    fn remove_image<'a>(&'a self, _reference: &'a str) -> BoxFuture<'a, Result<(), RuntimeError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
