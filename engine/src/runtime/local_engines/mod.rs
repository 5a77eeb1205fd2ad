//! Two Docker engines on one machine, for the demo and the tests: a move needs two hosts.
//!
//! ```text
//!   this machine ── veth ── namespace prg-<id>-a: dockerd ── its containers      address 10.x.y.2
//!        │
//!        └───────── veth ── namespace prg-<id>-b: dockerd ── its containers      address 10.x.y.6
//! ```
//!
//! An engine that runs here already is taken as the first one (and left as it is); every engine that is started
//! lives in a network namespace of its own, so that its bridges and packet filter rules go when the namespace
//! goes. Nothing is routed further: containers there reach this machine and nothing behind it.
//!
//! What is made is written down first, in `engines.json` in the given folder, and taken away by
//! [`LocalEngines::stop`], by dropping, or, after a kill, by the next start with the same folder. Needs root.

mod engine;
mod host;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::engine::{Made, Started};
use super::{DockerRuntime, Runtime};
use crate::model::{DockerEndpoint, MachineKind, MachineSpec};

/// A new engine answers within this time, or it is broken.
const START_TIMEOUT_MS: u64 = 60_000;
/// Time between two questions to an engine that is starting.
const POLL_INTERVAL_MS: u64 = 50;
/// An engine that runs here already answers within this time.
const RUNNING_TIMEOUT_MS: u64 = 2_000;
/// What was made, in the given folder.
const LEDGER: &str = "engines.json";
/// Locked for as long as the owner lives, so that nobody takes a living owner's engines away.
const LOCK: &str = "engines.lock";

/// Programs that are needed, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 4] =
    [("dockerd", "docker.io"), ("ip", "iproute2"), ("nsenter", "util-linux"), ("iptables", "iptables")];

/// How the engines are to be.
#[derive(Clone, Debug)]
pub struct LocalEnginesOptions {
    /// An engine at this socket is taken as the first one if it answers; else the first one is started too.
    pub running: Option<PathBuf>,
    /// Further arguments of the engines that are started.
    pub dockerd_arguments: Vec<String>,
}

impl Default for LocalEnginesOptions {
    fn default() -> Self {
        Self { running: Some("/var/run/docker.sock".into()), dockerd_arguments: Vec::new() }
    }
}

/// Why there are no two engines.
#[derive(Debug, thiserror::Error)]
pub enum LocalEnginesError {
    /// Namespaces need root.
    #[error("two Docker engines on one machine need root (for network namespaces)")]
    NotRoot,
    /// A program is not installed.
    #[error("{program} is not installed (Debian package {package})")]
    Missing {
        /// Name of the program.
        program: &'static str,
        /// Package that has it.
        package: &'static str,
    },
    /// Somebody has engines there already.
    #[error("the engines in {0} belong to a Peregrine that still runs; end it, or use another folder")]
    InUse(PathBuf),
    /// An engine did not come up.
    #[error("the engine in namespace {namespace} did not start: {detail}")]
    Engine {
        /// Its namespace.
        namespace: String,
        /// Its last words.
        detail: String,
    },
    /// A command failed.
    #[error("{what}: {detail}")]
    Command {
        /// What was done.
        what: String,
        /// What came of it.
        detail: String,
    },
    /// A file or folder.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Some things could not be taken away.
    #[error("left behind: {0}")]
    Left(String),
}

/// One of the two engines.
#[derive(Clone, Debug)]
pub struct LocalEngine {
    /// Its unix socket.
    pub socket: PathBuf,
    /// Where its published ports are reached from this machine.
    pub address: IpAddr,
    /// Its network namespace; `None` for the engine that ran already.
    pub namespace: Option<String>,
}

impl LocalEngine {
    /// The engine as a machine.
    #[must_use]
    pub fn machine(&self, name: &str) -> MachineSpec {
        MachineSpec {
            name: name.to_owned(),
            kind: MachineKind::Docker { endpoint: DockerEndpoint::Unix { path: self.socket.clone() } },
            address: self.address,
            labels: std::collections::BTreeMap::new(),
        }
    }
}

/// Two engines, until they are stopped or dropped.
#[derive(Debug)]
pub struct LocalEngines {
    first: LocalEngine,
    second: LocalEngine,
    ledger: Ledger,
}

impl LocalEngines {
    /// Says why there cannot be two engines here, if so. Asks no engine and makes nothing.
    ///
    /// # Errors
    ///
    /// Not root, or a program is missing.
    pub fn check() -> Result<(), LocalEnginesError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LocalEnginesError::NotRoot);
        }
        for (program, package) in PROGRAMS {
            if host::find_program(program).is_none() {
                return Err(LocalEnginesError::Missing { program, package });
            }
        }
        Ok(())
    }

    /// Starts what is missing of two engines, with their state in `dir`, and waits until both answer. What an
    /// earlier start with the same folder has left is taken away first.
    ///
    /// # Errors
    ///
    /// See [`LocalEnginesError`]; what was made until then is taken away again.
    pub async fn start(dir: &Path, options: &LocalEnginesOptions) -> Result<Self, LocalEnginesError> {
        Self::check()?;
        let ledger = Ledger::open(dir)?;
        // Dropping it takes away what was made, whichever step fails.
        let mut engines = Self {
            first: LocalEngine::running(Path::new("")),
            second: LocalEngine::running(Path::new("")),
            ledger,
        };
        let running = match &options.running {
            Some(socket) if answers(&LocalEngine::running(socket)).await => {
                Some(LocalEngine::running(socket))
            }
            _ => None,
        };
        let id: String = uuid::Uuid::new_v4().simple().to_string().chars().take(6).collect();
        let mut started = Vec::new();
        for letter in if running.is_some() { vec!['b'] } else { vec!['a', 'b'] } {
            started.push(engines.ledger.start(&id, letter, &options.dockerd_arguments).await?);
        }
        let mut up = Vec::new();
        for started in started {
            up.push(wait_until_up(started).await?);
        }
        up.splice(0..0, running);
        if let Ok([first, second]) = <[LocalEngine; 2]>::try_from(up) {
            (engines.first, engines.second) = (first, second);
        }
        Ok(engines)
    }

    /// The first engine: the one that ran already, or a started one.
    #[must_use]
    pub const fn first(&self) -> &LocalEngine {
        &self.first
    }

    /// The second engine, always one that was started here.
    #[must_use]
    pub const fn second(&self) -> &LocalEngine {
        &self.second
    }

    /// Stops the engines that were started, with all their containers, and takes everything away.
    ///
    /// # Errors
    ///
    /// [`LocalEnginesError::Left`] lists what could not be taken away.
    pub async fn stop(mut self) -> Result<(), LocalEnginesError> {
        let stopped = tokio::task::spawn_blocking(move || self.ledger.finish()).await;
        stopped.unwrap_or_else(|error| Err(LocalEnginesError::Left(error.to_string())))
    }
}

impl Drop for LocalEngines {
    fn drop(&mut self) {
        if let Err(error) = self.ledger.finish() {
            tracing::warn!(%error, "Docker engines of this machine");
        }
    }
}

impl LocalEngine {
    fn running(socket: &Path) -> Self {
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self { socket: socket.to_owned(), address, namespace: None }
    }

    fn runtime(&self) -> Option<DockerRuntime> {
        let endpoint = DockerEndpoint::Unix { path: self.socket.clone() };
        DockerRuntime::new(&self.machine("local"), &endpoint).ok()
    }
}

async fn answers(engine: &LocalEngine) -> bool {
    let Some(runtime) = engine.runtime() else { return false };
    let asked = tokio::time::timeout(Duration::from_millis(RUNNING_TIMEOUT_MS), runtime.info()).await;
    matches!(asked, Ok(Ok(_)))
}

async fn wait_until_up(started: Started) -> Result<LocalEngine, LocalEnginesError> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(START_TIMEOUT_MS);
    loop {
        if started.socket.exists() && answers(&started.engine()).await {
            return Ok(started.engine());
        }
        if tokio::time::Instant::now() >= deadline || started.has_ended() {
            return Err(LocalEnginesError::Engine {
                namespace: started.namespace.clone(),
                detail: started.last_words(),
            });
        }
        tokio::time::sleep(Duration::from_millis(POLL_INTERVAL_MS)).await;
    }
}

/// What was made and has to be taken away.
#[derive(Debug)]
struct Ledger {
    dir: PathBuf,
    entries: Entries,
    children: Vec<std::process::Child>,
    making: Arc<Mutex<Making>>,
    /// `None` once everything is taken away.
    lock: Option<std::fs::File>,
}

/// What is being made in a thread of its own, which goes on when nobody waits for it any more: whoever takes
/// things away waits for it, and gets what it has made.
#[derive(Debug, Default)]
struct Making {
    /// Nothing more is to be made.
    over: bool,
    made: Vec<(Made, std::process::Child)>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Entries {
    made: Vec<Made>,
}

impl Ledger {
    fn open(dir: &Path) -> Result<Self, LocalEnginesError> {
        let file = |error| LocalEnginesError::File { path: dir.to_owned(), error };
        std::fs::create_dir_all(dir).map_err(file)?;
        let lock = std::fs::File::create(dir.join(LOCK)).map_err(file)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(LocalEnginesError::InUse(dir.to_owned())),
            Err(std::fs::TryLockError::Error(error)) => return Err(file(error)),
        }
        let entries = match std::fs::read(dir.join(LEDGER)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Entries::default(),
            Err(error) => return Err(file(error)),
            Ok(text) => serde_json::from_slice(&text).map_err(|error| file(error.into()))?,
        };
        let mut ledger = Self {
            dir: dir.to_owned(),
            entries,
            children: Vec::new(),
            making: Arc::default(),
            lock: Some(lock),
        };
        ledger.clear()?;
        Ok(ledger)
    }

    async fn start(
        &mut self,
        id: &str,
        letter: char,
        arguments: &[String],
    ) -> Result<Started, LocalEnginesError> {
        let made = Made::plan(&self.dir, id, letter)?;
        self.entries.made.push(made.clone());
        self.save()?;
        let (arguments, making, plan) = (arguments.to_vec(), Arc::clone(&self.making), made.clone());
        let begun = tokio::task::spawn_blocking(move || {
            let mut making = making.lock().unwrap_or_else(PoisonError::into_inner);
            if !making.over {
                let made = plan.make(&arguments)?;
                making.made.push(made);
            }
            Ok(())
        });
        begun.await.map_err(|error| LocalEnginesError::Command {
            what: "starting an engine".to_owned(),
            detail: error.to_string(),
        })??;
        self.take_in_made(false);
        let made = self.entries.made.last().cloned().unwrap_or(made);
        let started = Started { made: Arc::new(made.clone()), ..Started::of(&made) };
        self.save()?;
        Ok(started)
    }

    /// Waits for what is being made, and writes down what came of it.
    fn take_in_made(&mut self, over: bool) {
        let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        making.over |= over;
        for (made, child) in making.made.drain(..) {
            self.children.push(child);
            let planned = self.entries.made.iter_mut().find(|planned| planned.namespace == made.namespace);
            if let Some(planned) = planned {
                *planned = made;
            }
        }
    }

    fn save(&self) -> Result<(), LocalEnginesError> {
        let path = self.dir.join(LEDGER);
        let text = serde_json::to_vec_pretty(&self.entries)
            .map_err(|error| LocalEnginesError::File { path: path.clone(), error: error.into() })?;
        std::fs::write(&path, text).map_err(|error| LocalEnginesError::File { path, error })
    }

    /// Takes everything away, for good.
    fn finish(&mut self) -> Result<(), LocalEnginesError> {
        if self.lock.is_none() {
            return Ok(());
        }
        self.take_in_made(true);
        self.clear()?;
        self.lock = None;
        host::remove_file(&self.dir.join(LOCK))
    }

    /// Takes everything away; what cannot be stays in the ledger, for the next time.
    fn clear(&mut self) -> Result<(), LocalEnginesError> {
        if self.entries.made.is_empty() {
            return Ok(());
        }
        let mut left = Vec::new();
        // All are told first, so that they end at the same time.
        for made in &self.entries.made {
            made.tell_to_end();
        }
        self.entries.made.retain(|made| match made.take_away(&mut self.children) {
            Ok(()) => false,
            Err(error) => {
                left.push(format!("{}: {error}", made.namespace));
                true
            }
        });
        if left.is_empty() {
            return host::remove_file(&self.dir.join(LEDGER));
        }
        self.save()?;
        Err(LocalEnginesError::Left(left.join("; ")))
    }
}
