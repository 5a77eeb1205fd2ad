//! Two Docker engines for the stories, and what is left of them.

use std::process::Command;

use peregrine_bench::image::{ImageRecipe, pack};
use peregrine_engine::model::{DockerEndpoint, MachineKind, MachineSpec};
use peregrine_engine::runtime::connect;
use peregrine_engine::runtime::local_engines::{LocalEngines, LocalEnginesOptions};

use super::origin_program;

/// Name of the origin's image on the first engine.
pub(crate) const ORIGIN_IMAGE: &str = "peregrine-test-origin:1";
/// Port of the origin in its container.
pub(crate) const ORIGIN_PORT: u16 = 8080;

/// Whether engines can be started here. `PEREGRINE_REQUIRE_DOCKER` turns "no" into a failure.
pub(crate) fn is_there() -> bool {
    match LocalEngines::check() {
        Ok(()) => true,
        Err(why) => {
            let required = std::env::var_os("PEREGRINE_REQUIRE_DOCKER").is_some();
            assert!(!required, "Docker is required here: {why}");
            eprintln!("skipped without Docker: {why}");
            false
        }
    }
}

/// Port at which engines that are reached over their network listen.
const ENGINE_PORT: u16 = 2375;

/// Two engines of their own; the origin's image is on the first one alone.
pub(crate) struct Engines {
    engines: Option<LocalEngines>,
    pub(crate) machines: [MachineSpec; 2],
    _folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Engines {
    pub(crate) fn start() -> Self {
        Self::start_with(Vec::new())
    }

    /// Engines that listen on their network too, as engines on other machines do.
    pub(crate) fn start_on_the_network() -> Self {
        // Said in so many words that it is clear text: else the engine waits before it starts.
        Self::start_with(vec!["--tls=false".to_owned(), format!("--host=tcp://0.0.0.0:{ENGINE_PORT}")])
    }

    fn start_with(dockerd_arguments: Vec<String>) -> Self {
        let folder =
            tempfile::Builder::new().prefix("peregrine-engines-").tempdir().expect("a scratch folder");
        let mut threads = tokio::runtime::Builder::new_multi_thread();
        let runtime = threads.worker_threads(1).enable_all().build().expect("a runtime");
        // Never an engine that runs here already: a test must not touch what is not its own.
        let options = LocalEnginesOptions { running: None, dockerd_arguments };
        let engines = runtime.block_on(LocalEngines::start(folder.path(), &options)).expect("two engines");
        let machines = [engines.first().machine("host-a"), engines.second().machine("host-b")];
        open_way_to_the_collector(&engines);
        let recipe = ImageRecipe {
            reference: ORIGIN_IMAGE.to_owned(),
            program: origin_program(),
            arguments: vec!["origin".to_owned()],
            env: Vec::new(),
            port: ORIGIN_PORT,
        };
        let packed = pack(&recipe).expect("the origin is packed");
        let first = connect(&machines[0], folder.path()).expect("a runtime");
        let chunks: Vec<_> = packed.archive.chunks(1 << 20).map(|chunk| Ok(chunk.to_vec().into())).collect();
        let stream = Box::pin(futures_util::stream::iter(chunks));
        runtime.block_on(first.import(&packed.id, stream, &|_, _| {})).expect("the image is taken");
        Self { engines: Some(engines), machines, _folder: folder, runtime }
    }

    /// The machines as a server's configuration.
    pub(crate) fn configuration(&self) -> String {
        let one = |machine: &MachineSpec| match &machine.kind {
            MachineKind::Docker { endpoint: DockerEndpoint::Unix { path } } => format!(
                "[machine.{}]\ndocker = \"unix://{}\"\naddress = \"{}\"\n",
                machine.name,
                path.display(),
                machine.address
            ),
            other => panic!("{other:?}"),
        };
        self.machines.iter().map(one).collect()
    }

    /// The machines as a server's configuration that reaches them over the network alone.
    pub(crate) fn configuration_on_the_network(&self) -> String {
        let one = |machine: &MachineSpec| {
            let MachineSpec { name, address, .. } = machine;
            format!("[machine.{name}]\ndocker = \"tcp://{address}:{ENGINE_PORT}\"\nallow_clear_text = true\n")
        };
        self.machines.iter().map(one).collect()
    }

    /// The network namespace of a host.
    pub(crate) fn namespace(&self, host: usize) -> String {
        let engines = self.engines.as_ref().expect("they run");
        let engine = if host == 0 { engines.first() } else { engines.second() };
        engine.namespace.clone().expect("every engine here has one")
    }

    /// Address of this machine as containers on that host see it.
    pub(crate) fn this_machine(&self, host: usize) -> String {
        // The other end of the veth pair is the address before the host's own.
        match self.machines[host].address {
            std::net::IpAddr::V4(address) => std::net::Ipv4Addr::from(u32::from(address) - 1).to_string(),
            other @ std::net::IpAddr::V6(_) => panic!("{other}"),
        }
    }

    /// Containers of both engines, running or not.
    pub(crate) fn containers(&self) -> usize {
        self.machines.iter().map(|machine| docker(machine, &["ps", "-aq"]).lines().count()).sum()
    }

    /// What `docker inspect --format` says of every container.
    pub(crate) fn inspect(&self, format: &str) -> Vec<String> {
        let one = |machine: &MachineSpec| {
            let ids = docker(machine, &["ps", "-aq"]);
            ids.lines()
                .map(|id| docker(machine, &["inspect", "--format", format, id]).trim().to_owned())
                .collect::<Vec<_>>()
        };
        self.machines.iter().flat_map(one).collect()
    }
}

/// What the command of an engine prints.
fn docker(machine: &MachineSpec, arguments: &[&str]) -> String {
    let MachineKind::Docker { endpoint: DockerEndpoint::Unix { path } } = &machine.kind else {
        panic!("{machine:?}");
    };
    let host = format!("unix://{}", path.display());
    let output = Command::new("docker").args(["-H", &host]).args(arguments).output().expect("docker runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Containers on host-b reach this machine at its side of their own link only. Records of both hosts go to one
/// address, so host-b is told that host-a's side of this machine is here as well.
fn open_way_to_the_collector(engines: &LocalEngines) {
    let namespace = engines.second().namespace.clone().expect("the second engine has a namespace");
    let side = |engine: &peregrine_engine::runtime::local_engines::LocalEngine| match engine.address {
        std::net::IpAddr::V4(address) => std::net::Ipv4Addr::from(u32::from(address) - 1).to_string(),
        other @ std::net::IpAddr::V6(_) => panic!("{other}"),
    };
    let (to, via) = (side(engines.first()), side(engines.second()));
    let output = Command::new("ip")
        .args(["-n", &namespace, "route", "add", &to, "via", &via])
        .output()
        .expect("ip runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

impl Drop for Engines {
    fn drop(&mut self) {
        if let Some(engines) = self.engines.take() {
            let stopped = self.runtime.block_on(engines.stop());
            if !std::thread::panicking() {
                stopped.expect("nothing is left behind");
            }
        }
    }
}

/// Namespaces, links, packet filter rules and mounts of this machine.
pub(crate) fn network() -> Vec<String> {
    let lines = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    };
    let links = lines("ip", &["-o", "link"]);
    let links = links.lines().filter_map(|line| line.split(": ").nth(1));
    let rules = lines("iptables", &["-S"]) + &lines("iptables", &["-t", "nat", "-S"]);
    let mounts = std::fs::read_to_string("/proc/mounts").expect("mounts");
    let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let namespaces = lines("ip", &["netns", "list"]);
    namespaces.lines().chain(links).chain(rules.lines()).chain(mounts).map(str::to_owned).collect()
}

/// Processes whose environment names this folder: whatever a program that was started with it has started.
pub(crate) fn processes_of(folder: &std::path::Path) -> Vec<u32> {
    let folder = folder.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if String::from_utf8_lossy(&environment).contains(&folder) {
            found.push(pid);
        }
    }
    found
}

/// Processes that have this word as an argument.
pub(crate) fn processes_with(argument: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes()) {
            found.push(pid);
        }
    }
    found
}
