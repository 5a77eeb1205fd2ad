//! One engine in its namespace: made, and taken away completely.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::host::{self, ProcessName};
use super::{LocalEngine, LocalEnginesError};

/// The engine's own bridge. It is in the engine's namespace, where nothing else is.
const BRIDGE: &str = "172.29.251.1/24";
/// An engine that is told to end gives its containers so long …
const SHUTDOWN_TIMEOUT_S: u64 = 2;
/// … and gets this much itself before it is killed.
const END_TIMEOUT_MS: u64 = 15_000;
/// After SIGKILL.
const KILL_TIMEOUT_MS: u64 = 5_000;
/// Lines of the engine's log in an error.
const LAST_LINES: usize = 5;

/// Everything that belongs to one engine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Made {
    /// Network namespace.
    pub(super) namespace: String,
    /// This machine's end of the veth pair.
    link: String,
    /// Address of this machine's end.
    near: Ipv4Addr,
    /// Address of the namespace's end.
    far: Ipv4Addr,
    /// Images and containers.
    data: PathBuf,
    /// Sockets and mounts; outside the data folder, because a socket's path must be short.
    run: PathBuf,
    /// The engine's own log.
    log: PathBuf,
    /// The engine's process, once it is started.
    process: Option<ProcessName>,
}

/// An engine that was started.
#[derive(Clone, Debug)]
pub(super) struct Started {
    pub(super) namespace: String,
    pub(super) socket: PathBuf,
    pub(super) made: Arc<Made>,
}

impl Started {
    pub(super) fn of(made: &Made) -> Self {
        Self { namespace: made.namespace.clone(), socket: made.socket(), made: Arc::new(made.clone()) }
    }

    pub(super) fn engine(&self) -> LocalEngine {
        LocalEngine {
            socket: self.socket.clone(),
            address: IpAddr::V4(self.made.far),
            namespace: Some(self.namespace.clone()),
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.made.process.as_ref().is_none_or(|process| !host::is_alive(process))
    }

    pub(super) fn last_words(&self) -> String {
        let log = fs::read(&self.made.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join(" | ")
    }
}

impl Made {
    /// Chooses names and addresses that nobody uses.
    pub(super) fn plan(dir: &Path, id: &str, letter: char) -> Result<Self, LocalEnginesError> {
        let [near, far] = host::free_pair().ok_or_else(|| LocalEnginesError::Command {
            what: "choosing a network".to_owned(),
            detail: "no network of 10.224.0.0/11 is free".to_owned(),
        })?;
        let namespace = format!("prg-{id}-{letter}");
        Ok(Self {
            link: format!("prg{id}{letter}"),
            near,
            far,
            data: dir.join(&namespace),
            run: PathBuf::from(format!("/run/{namespace}")),
            log: dir.join(format!("{namespace}.log")),
            namespace,
            process: None,
        })
    }

    /// Makes the namespace and starts the engine in it.
    pub(super) fn make(mut self, arguments: &[String]) -> Result<(Self, Child), LocalEnginesError> {
        let (namespace, link) = (self.namespace.as_str(), self.link.as_str());
        let near = format!("{}/30", self.near);
        let far = format!("{}/30", self.far);
        host::ip(&["netns", "add", namespace])?;
        host::ip(&["link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace])?;
        host::ip(&["addr", "add", &near, "dev", link])?;
        host::ip(&["link", "set", link, "up"])?;
        host::ip(&["-n", namespace, "addr", "add", &far, "dev", "eth0"])?;
        host::ip(&["-n", namespace, "link", "set", "eth0", "up"])?;
        host::ip(&["-n", namespace, "link", "set", "lo", "up"])?;
        let child = self.spawn(arguments)?;
        self.process = host::name_of(child.id());
        Ok((self, child))
    }

    pub(super) fn tell_to_end(&self) {
        if let Some(process) = &self.process {
            host::signal(process, Signal::TERM);
        }
    }

    /// Ends the engine and all that it has started, and takes away what it has mounted and written.
    pub(super) fn take_away(&self, children: &mut Vec<Child>) -> Result<(), LocalEnginesError> {
        if let Some(process) = &self.process {
            host::signal(process, Signal::TERM);
            if !host::wait_for_end(process, END_TIMEOUT_MS) {
                host::signal(process, Signal::KILL);
                host::wait_for_end(process, KILL_TIMEOUT_MS);
            }
            reap(children, process);
        }
        // A killed engine leaves its containers, their keepers and containerd.
        let containers = self.container_ids();
        for process in host::processes_of(&self.namespace_file(), &containers) {
            host::signal(&process, Signal::KILL);
            host::wait_for_end(&process, KILL_TIMEOUT_MS);
        }
        host::unmount_below(&[&self.data, &self.run])?;
        if host::link_exists(&self.link) {
            host::ip(&["link", "del", &self.link])?;
        }
        if self.namespace_file().exists() {
            host::ip(&["netns", "del", &self.namespace])?;
        }
        host::remove_folder(&self.run)?;
        host::remove_folder(&self.data)?;
        host::remove_file(&self.log)
    }

    fn socket(&self) -> PathBuf {
        self.run.join("docker.sock")
    }

    fn namespace_file(&self) -> PathBuf {
        Path::new("/var/run/netns").join(&self.namespace)
    }

    fn spawn(&self, arguments: &[String]) -> Result<Child, LocalEnginesError> {
        let file = |path: &Path, error| LocalEnginesError::File { path: path.to_owned(), error };
        for folder in [&self.data, &self.run] {
            fs::create_dir_all(folder).map_err(|error| file(folder, error))?;
        }
        let log = fs::File::create(&self.log).map_err(|error| file(&self.log, error))?;
        let errors = log.try_clone().map_err(|error| file(&self.log, error))?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.namespace_file().display()))
            .args(["--", "dockerd"])
            .arg("--data-root")
            .arg(&self.data)
            .arg("--exec-root")
            .arg(self.run.join("exec"))
            .arg("--pidfile")
            .arg(self.run.join("docker.pid"))
            .arg("--host")
            .arg(format!("unix://{}", self.socket().display()))
            .args(["--bip", BRIDGE])
            // Not the machine's own: it might have a configuration that does not fit, or two values for a flag.
            .arg("--config-file")
            .arg(self.run.join("daemon.json"))
            // The machine's containerd may be shared with another engine.
            .args(["--containerd-namespace", &self.namespace])
            .args(["--containerd-plugins-namespace", &format!("{}-plugins", self.namespace)])
            .args(["--shutdown-timeout", &SHUTDOWN_TIMEOUT_S.to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0); // a Ctrl-C is for us; the engine is told to end in order
        let configuration = self.run.join("daemon.json");
        fs::write(&configuration, "{}").map_err(|error| file(&configuration, error))?;
        command.spawn().map_err(|error| LocalEnginesError::Command {
            what: "starting dockerd".to_owned(),
            detail: error.to_string(),
        })
    }

    fn container_ids(&self) -> Vec<String> {
        let entries = fs::read_dir(self.data.join("containers")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

fn reap(children: &mut Vec<Child>, process: &ProcessName) {
    if let Some(index) = children.iter().position(|child| host::is_pid(child.id(), process)) {
        // It has ended: this returns at once.
        if let Err(error) = children.swap_remove(index).wait() {
            tracing::debug!(%error, "reaping an engine");
        }
    }
}
