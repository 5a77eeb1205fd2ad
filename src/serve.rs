//! `peregrine serve`: the one place where the rooms are put together.
//!
//! ```text
//!   configuration ─► store ─► engine ─┬─ TableWriter ─► TableReader ─► edge (a thread for each core)
//!                                     └─ EngineHandle ─► API
//! ```
//!
//! Start: what can fail without a trace fails first (configuration, data folder, addresses), then the engine
//! takes up where it stood. End: the API and the edge stop accepting and finish what is in flight, bounded;
//! then the engine rests at the last thing that it wrote down.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use peregrine_config::{Mistakes, ServerConfig};
use peregrine_engine::model::Machine;
use peregrine_engine::store::SqliteStore;
use peregrine_engine::{Engine, EngineConfig, EngineHandle, runtime};
use peregrine_proxy::Edge;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cli::args::ServeArgs;
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::telemetry;

/// A server that runs: edge, engine and API in this process.
pub(crate) struct Server {
    engine: EngineHandle,
    edge_addrs: Vec<SocketAddr>,
    api_addr: SocketAddr,
    stop: watch::Sender<bool>,
    parts: Vec<(&'static str, JoinHandle<Result>)>,
}

impl Server {
    /// Starts everything and applies the machines and services of the configuration.
    pub(crate) async fn start(config: ServerConfig, data: &Path) -> Result<Self> {
        let metrics = telemetry::metrics().map_err(|error| internal("server.metrics", &error))?;
        peregrine_proxy::describe();
        let store = SqliteStore::open(data).map_err(|error| store_failure(data, &error))?;
        let (writer, reader) = peregrine_routing::table();
        let edge = Edge::bind(config.edge, reader)
            .map_err(|error| Failure::new(Exit::Failed, "edge.bind", error.to_string()))?;
        let (engine, handle) = Engine::open(engine_config(), Arc::new(store), connector(data), writer)
            .await
            .map_err(|error| Failure::new(Exit::Failed, error.code, error.message).hint(error.hint))?;
        let api_config = peregrine_api::Config {
            allow_clear_text_on_public_address: config.api.allow_clear_text_on_public_address,
            allowed_hosts: config.api.allowed_hosts,
            metrics_without_token: config.api.metrics_without_token,
            metrics: Some(Arc::new(move || metrics.render())),
            readiness: Some(readiness(handle.clone())),
            ..peregrine_api::Config::new(config.api.listen, data)
        };
        let api = peregrine_api::Api::bind(api_config, handle.clone())
            .await
            .map_err(|error| Failure::new(Exit::Failed, "api.bind", error.to_string()))?;

        let (stop, stopped) = watch::channel(false);
        let (edge_addrs, api_addr) = (edge.addrs(), api.addr());
        let engine_stop = ended(&stopped);
        let mut server = Self { engine: handle, edge_addrs, api_addr, stop, parts: Vec::new() };
        // First in, last out: `stop` awaits them from the end.
        server.part("engine", async move {
            engine.run(engine_stop).await;
            Ok(())
        });
        // Before anybody is answered: a ready server has the routes of its configuration.
        server.apply(config.machines, config.services).await;
        let edge_stop = ended(&stopped);
        server.part("edge", async move {
            edge.run(edge_stop)
                .await
                .map_err(|error| Failure::new(Exit::Failed, "edge.failed", error.to_string()))
        });
        let api_stop = ended(&stopped);
        server.part("api", async move {
            api.run(api_stop)
                .await
                .map_err(|error| Failure::new(Exit::Failed, "api.failed", error.to_string()))
        });
        Ok(server)
    }

    fn part(&mut self, name: &'static str, run: impl Future<Output = Result> + Send + 'static) {
        self.parts.push((name, tokio::spawn(run)));
    }

    /// Brings machines and services of the configuration file about. A service that cannot be brought about
    /// is told and stays as it was; it does not keep the others from being served.
    async fn apply(
        &self,
        machines: Vec<peregrine_engine::model::MachineSpec>,
        services: Vec<peregrine_config::ServiceEntry>,
    ) {
        let services = services.into_iter().map(|entry| (entry.spec, entry.machine)).collect();
        match self.engine.apply_config(machines, services).await {
            Ok(applied) => {
                for (name, error) in &applied.problems {
                    tracing::error!(name, code = error.code, hint = %error.hint, "not applied: {error}");
                }
                for rollout in &applied.rollouts {
                    tracing::info!(%rollout, "a service of the configuration file is being deployed");
                }
            }
            Err(error) => tracing::error!(code = error.code, hint = %error.hint, "not applied: {error}"),
        }
    }

    /// Addresses of the edge.
    pub(crate) fn edge_addrs(&self) -> &[SocketAddr] {
        &self.edge_addrs
    }

    /// Address of the API.
    pub(crate) const fn api_addr(&self) -> SocketAddr {
        self.api_addr
    }

    /// The engine.
    pub(crate) const fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Waits until a part ends by itself, which none should.
    pub(crate) async fn part_failed(&mut self) -> Failure {
        let running = self.parts.iter_mut().map(|(name, task)| Box::pin(async move { (*name, task.await) }));
        let ((name, result), number, _) = futures_util::future::select_all(running).await;
        drop(self.parts.remove(number));
        match result {
            Ok(Err(failure)) => failure,
            Ok(Ok(())) => Failure::new(Exit::Failed, "server.ended", format!("the {name} ended by itself")),
            Err(error) => {
                Failure::new(Exit::Failed, "server.panicked", format!("the {name} failed: {error}"))
            }
        }
    }

    /// Stops accepting, lets what is in flight finish, and ends.
    pub(crate) async fn stop(mut self) -> Result {
        self.stop.send_replace(true);
        let mut result = Ok(());
        while let Some((name, task)) = self.parts.pop() {
            let ended = task.await.unwrap_or_else(|error| {
                Err(Failure::new(Exit::Failed, "server.panicked", format!("the {name} failed: {error}")))
            });
            result = result.and(ended);
        }
        result
    }
}

/// Runs the command.
pub(crate) fn run(args: &ServeArgs) -> Result {
    let config = ServerConfig::load(&args.config).map_err(|mistakes| configuration(&mistakes))?;
    telemetry::log(args.log_format);
    block_on(serve(config, args))
}

/// A runtime for control work: the edge has threads of its own.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .enable_all()
        .build()
        .map_err(|error| internal("server.runtime", &error.into()))?;
    runtime.block_on(work)
}

/// The engine and the API wait far more than they work.
const CONTROL_THREADS: usize = 2;

async fn serve(config: ServerConfig, args: &ServeArgs) -> Result {
    let mut signals = Signals::new()?;
    let mut reload = listen(SignalKind::hangup())?;
    let mut server = Server::start(config, &args.data).await?;
    announce(&server, &args.data);
    loop {
        tokio::select! {
            () = signals.stop() => break,
            _ = reload.recv() => apply_again(&server, &args.config).await,
            failure = server.part_failed() => {
                tracing::error!("{}", failure.message);
                let _first_failure_counts = server.stop().await;
                return Err(failure);
            }
        }
    }
    tracing::info!("stopping: no new connections; a second signal ends at once");
    tokio::select! {
        result = server.stop() => result,
        () = signals.stop() => Err(Failure::new(Exit::Failed, "server.interrupted", "ended before requests in flight had finished")),
    }
}

/// SIGHUP: machines and services of the file are applied anew. Listeners and limits need a restart.
async fn apply_again(server: &Server, file: &Path) {
    match ServerConfig::load(file) {
        Ok(config) => {
            server.apply(config.machines, config.services).await;
            tracing::info!(file = %file.display(), "configuration applied");
        }
        Err(mistakes) => {
            tracing::error!("configuration not applied, everything stays as it was:\n{mistakes}")
        }
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| internal("server.signals", &error.into()))
}

fn announce(server: &Server, data: &Path) {
    let edge: Vec<String> = server.edge_addrs().iter().map(|addr| format!("http://{addr}")).collect();
    tracing::info!(edge = edge.join(" "), api = %format!("http://{}", server.api_addr()), data = %data.display(), "serving");
}

fn engine_config() -> EngineConfig {
    // One clock: the engine reads ejections that the edge has written.
    EngineConfig { edge_clock: Arc::new(peregrine_proxy::now_ms), ..EngineConfig::default() }
}

/// The edge serves whatever the store does; the server takes work only while it can write it down.
fn readiness(engine: EngineHandle) -> peregrine_api::ReadinessChecks {
    Arc::new(move || {
        let problem = engine.store_problem();
        vec![peregrine_api::types::ReadinessCheck {
            name: "store".to_owned(),
            ok: problem.is_none(),
            detail: problem.map_or_else(
                || "it takes writes".to_owned(),
                |problem| format!("{}. {}", problem.message, problem.hint),
            ),
        }]
    })
}

fn connector(data: &Path) -> peregrine_engine::Connect {
    let data: PathBuf = data.to_owned();
    Arc::new(move |machine: &Machine| runtime::connect_or_refuse(&machine.spec, &data))
}

fn ended(stopped: &watch::Receiver<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stopped = stopped.clone();
    async move {
        // The sender gone is as good as a stop.
        let _stopped = stopped.wait_for(|stopped| *stopped).await;
    }
}

fn configuration(mistakes: &Mistakes) -> Failure {
    let list = mistakes.list();
    Failure::new(Exit::Usage, "config.invalid", mistakes.to_string()).detail("mistakes", list)
}

fn store_failure(data: &Path, error: &peregrine_engine::store::StoreError) -> Failure {
    use peregrine_engine::store::StoreError;
    let failure = Failure::new(
        Exit::Failed,
        "store.open",
        format!("the data folder {} cannot be used: {error}", data.display()),
    );
    match error {
        StoreError::Locked => Failure { exit: Exit::Conflict, ..failure }
            .hint("another peregrine serves from it: stop that one, or choose another folder with --data"),
        StoreError::Full(_) => failure.hint("make room on that disk"),
        StoreError::Corrupt(_) => failure.hint("restore it from a backup; nothing was changed"),
        _ => failure.hint("check that the folder can be written by this user, or choose another with --data"),
    }
}

fn internal(code: &str, error: &anyhow::Error) -> Failure {
    Failure::new(Exit::Failed, code, format!("{error:#}"))
}
