//! The demo's two hosts: Docker engines where they can be had, else plain processes on two addresses.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use peregrine_bench::image::{ImageRecipe, pack};
use peregrine_engine::model::{DockerEndpoint, MachineKind, MachineSpec, Workload};
use peregrine_engine::runtime::local_engines::{LocalEngines, LocalEnginesOptions};
use peregrine_engine::runtime::{Runtime, RuntimeError, connect};

use super::screen::Screen;
use super::{SHOP_COMMAND, failed_text};
use crate::cli::args::DemoRuntime;
use crate::cli::failure::{Failure, Result};

/// Where the shop is first.
pub(super) const HOST_A: &str = "host-a";
/// Where it is moved to.
pub(super) const HOST_B: &str = "host-b";
/// Port of the shop inside its container.
pub(super) const SHOP_PORT: u16 = 8080;
/// Name under which engines know the shop's image.
const IMAGE: &str = "peregrine-demo-shop:1";
/// What is left on a host is gone within this time, or it is told.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two attempts.
const EMPTY_POLL: Duration = Duration::from_millis(100);
/// Where a Docker engine listens on most machines.
const LOCAL_SOCKET: &str = "/var/run/docker.sock";

/// The two hosts.
pub(super) struct Hosts {
    kind: Kind,
    machines: Vec<MachineSpec>,
    image: Option<String>,
}

enum Kind {
    /// Two engines, the second one in a network namespace of its own.
    TwoEngines(Option<Box<LocalEngines>>),
    /// One engine that publishes on two loopback addresses: all that can be had without root.
    OneEngine,
    /// No engine.
    Processes {
        /// Why not.
        because: String,
    },
}

impl Hosts {
    /// Decides what the hosts are to be. Makes nothing yet.
    pub(super) fn find(wish: DemoRuntime) -> Result<Self> {
        let kind = match (wish, LocalEngines::check()) {
            (DemoRuntime::Process, _) => Kind::Processes { because: "as asked for".to_owned() },
            (DemoRuntime::Auto | DemoRuntime::Docker, Ok(())) => Kind::TwoEngines(None),
            (_, Err(_)) if std::os::unix::net::UnixStream::connect(LOCAL_SOCKET).is_ok() => Kind::OneEngine,
            (DemoRuntime::Docker, Err(why)) => {
                return Err(failed_text(&format!("no Docker engine: {why}"))
                    .hint("start Docker, run the demo as root, or take plain processes: --runtime process"));
            }
            (DemoRuntime::Auto, Err(why)) => Kind::Processes {
                because: format!("no Docker engine answers and none can be started: {why}"),
            },
        };
        Ok(Self { kind, machines: Vec::new(), image: None })
    }

    /// Brings them up; with Docker, the shop's image is on host-a alone afterwards.
    pub(super) async fn bring_up(&mut self, data: &Path, screen: &Screen) -> Result {
        match &mut self.kind {
            Kind::TwoEngines(engines) => {
                let up = LocalEngines::start(&data.join("engines"), &LocalEnginesOptions::default())
                    .await
                    .map_err(|error| {
                        failed_text(&format!("two Docker engines: {error}"))
                            .hint("take plain processes: --runtime process")
                    })?;
                let up = engines.insert(Box::new(up));
                self.machines = vec![up.first().machine(HOST_A), up.second().machine(HOST_B)];
            }
            Kind::OneEngine => {
                let unix =
                    || MachineKind::Docker { endpoint: DockerEndpoint::Unix { path: LOCAL_SOCKET.into() } };
                self.machines = vec![machine(HOST_A, unix(), 1), machine(HOST_B, unix(), 2)];
            }
            Kind::Processes { .. } => {
                self.machines =
                    vec![machine(HOST_A, MachineKind::Process, 1), machine(HOST_B, MachineKind::Process, 2)];
            }
        }
        if !matches!(self.kind, Kind::Processes { .. }) {
            self.bring_image(data, screen).await?;
        }
        Ok(())
    }

    async fn bring_image(&mut self, data: &Path, screen: &Screen) -> Result {
        let recipe = ImageRecipe {
            reference: IMAGE.to_owned(),
            program: std::env::current_exe()
                .map_err(|error| super::failed("this program's own file", &error))?,
            arguments: vec![SHOP_COMMAND.to_owned()],
            env: Vec::new(),
            port: SHOP_PORT,
        };
        let packed = tokio::task::spawn_blocking(move || pack(&recipe)).await;
        let packed = packed
            .map_err(|error| failed_text(&error.to_string()))?
            .map_err(|error| super::failed("packing the image", &error))?;
        screen.say(&format!("the shop's image is on {HOST_A} alone, {:.1} MiB", mib(packed.archive.len())));
        let runtime = self.runtime(0, data)?;
        self.image = Some(packed.id.clone()); // before the deed: an interrupted one is taken away too
        let chunks: Vec<_> =
            packed.archive.chunks(1 << 20).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
        let stream = futures_util::stream::iter(chunks).boxed();
        runtime.import(&packed.id, stream, &|_, _| {}).await.map_err(runtime_failed)?;
        Ok(())
    }

    fn runtime(&self, number: usize, data: &Path) -> Result<std::sync::Arc<dyn Runtime>> {
        connect(&self.machines[number], data).map_err(runtime_failed)
    }

    /// What they are, in words.
    pub(super) fn words(&self) -> String {
        match &self.kind {
            Kind::TwoEngines(engines) => {
                let first = engines.as_ref().is_some_and(|engines| engines.first().namespace.is_none());
                let a = if first { "this machine's engine" } else { "an engine of its own" };
                format!("Docker: {HOST_A} is {a}, {HOST_B} an engine in a network namespace of its own")
            }
            Kind::OneEngine => format!(
                "Docker: {HOST_A} and {HOST_B} are one engine on two addresses (two engines need root)"
            ),
            Kind::Processes { because } => format!("plain processes on 127.0.0.1 and 127.0.0.2 ({because})"),
        }
    }

    /// As the engine is to know them.
    pub(super) fn machines(&self) -> Vec<MachineSpec> {
        self.machines.clone()
    }

    /// What the shop runs.
    pub(super) fn workload(&self) -> Result<Workload> {
        let env = std::collections::BTreeMap::new();
        if self.image.is_some() {
            let (image, capabilities) = (IMAGE.to_owned(), std::collections::BTreeSet::new());
            return Ok(Workload::Image { image, port: SHOP_PORT, command: None, env, capabilities });
        }
        let program =
            std::env::current_exe().map_err(|error| super::failed("this program's own file", &error))?;
        let command = vec![program.display().to_string(), SHOP_COMMAND.to_owned()];
        Ok(Workload::Command { command, directory: None, env })
    }

    /// Takes away what [`Hosts::bring_up`] has made, and what the engine of this installation has left on it.
    pub(super) async fn take_down(self, data: &Path, install: Option<&str>) -> Result {
        let mut result = Ok(());
        for number in 0..self.machines.len() {
            let emptied = match self.runtime(number, data) {
                Ok(runtime) => self.empty(&*runtime, install).await,
                Err(failure) => Err(failure),
            };
            result = result.and(emptied);
        }
        if let Kind::TwoEngines(Some(engines)) = self.kind {
            result = result.and(engines.stop().await.map_err(|error| failed_text(&error.to_string())));
        }
        result
    }
}

impl Hosts {
    /// Removes what is left there, then the image. A container whose start was abandoned may come up behind the
    /// engine's back; the engine would sweep it away later, but it has ended.
    async fn empty(&self, runtime: &dyn Runtime, install: Option<&str>) -> Result {
        let deadline = Instant::now() + EMPTY_TIMEOUT;
        loop {
            match self.emptied(runtime, install).await {
                Err(_) if Instant::now() < deadline => tokio::time::sleep(EMPTY_POLL).await,
                result => return result.map_err(runtime_failed),
            }
        }
    }

    async fn emptied(&self, runtime: &dyn Runtime, install: Option<&str>) -> Result<(), RuntimeError> {
        if let Some(install) = install {
            for left in runtime.list(install).await? {
                runtime.remove(&left.id, 0).await?;
            }
        }
        if self.image.is_some() { runtime.remove_image(IMAGE).await } else { Ok(()) }
    }
}

fn machine(name: &str, kind: MachineKind, last_byte: u8) -> MachineSpec {
    let address = IpAddr::V4(Ipv4Addr::new(127, 0, 0, last_byte));
    MachineSpec { name: name.to_owned(), kind, address, labels: std::collections::BTreeMap::new() }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn runtime_failed(error: RuntimeError) -> Failure {
    failed_text(&error.to_string())
}

fn mib(bytes: usize) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}
