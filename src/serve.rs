//! `peregrine serve`: the one place where the rooms are put together.
//!
//! ```text
//!   configuration ─► store ─► engine ─┬─ TableWriter ─► TableReader ─► edge (a thread for each core)
//!                                     └─ EngineHandle ─► API
//!                            TableReader ─► link ═══► edges in other processes, if [link] says where they connect
//! ```
//!
//! Start: what can fail without a trace fails first (configuration, data folder, addresses), then the engine
//! takes up where it stood. End: the API and the edge stop accepting and finish what is in flight, bounded;
//! then the engine rests at the last thing that it wrote down.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use peregrine_config::{LinkSettings, Mistakes, ServerConfig};
use peregrine_engine::model::Machine;
use peregrine_engine::store::{SqliteStore, StoreError};
use peregrine_engine::{Engine, EngineConfig, EngineHandle, runtime};
use peregrine_link::{Link, LinkConfig};
use peregrine_proxy::Edge;
use peregrine_routing::TableReader;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cli::args::{EngineArgs, LogFormat, ServeArgs};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::edges::LinkedEdges;
use crate::{standby, telemetry};

/// Folder of the link in the data folder: its authority, and who belongs to it.
const LINK_FOLDER: &str = "link";

/// Whoever stands by takes over when the one that leads has not shown for so long that it lives.
pub(crate) const LEAD_PATIENCE_MS: u64 = 6_000;
/// So often does the one that leads show it.
const LEAD_RENEW_MS: u64 = 1_000;

/// What runs in this process besides the engine and the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rooms {
    /// An edge.
    WithEdge,
    /// Nothing: every edge is elsewhere.
    EngineAlone,
}

/// A server that runs: edge, engine and API in this process.
pub(crate) struct Server {
    engine: EngineHandle,
    edge_addrs: Vec<SocketAddr>,
    link_addr: Option<SocketAddr>,
    api_addr: SocketAddr,
    stop: watch::Sender<bool>,
    parts: Vec<(&'static str, JoinHandle<Result>)>,
}

impl Server {
    /// Starts everything and applies the machines and services of the configuration.
    pub(crate) async fn start(config: ServerConfig, data: &Path, rooms: Rooms) -> Result<Self> {
        let store = SqliteStore::open(data).map_err(|error| store_failure(data, &error))?;
        Self::start_on(store, config, data, rooms).await
    }

    /// As [`Self::start`], on a store that was opened.
    async fn start_on(store: SqliteStore, config: ServerConfig, data: &Path, rooms: Rooms) -> Result<Self> {
        let metrics = telemetry::metrics().map_err(|error| internal("server.metrics", &error))?;
        peregrine_proxy::describe();
        let store = Arc::new(store);
        let (lead, lead_until) = watch::channel(lead_from(Instant::now()));
        let (writer, reader) = peregrine_routing::table();
        let edge = match rooms {
            Rooms::WithEdge => Some(
                Edge::bind(config.edge, reader.clone())
                    .map_err(|error| Failure::new(Exit::Failed, "edge.bind", error.to_string()))?,
            ),
            Rooms::EngineAlone => None,
        };
        // Before the engine publishes anything: edges that were there when it last ran are waited for from the start.
        let settings = config.link.or_else(|| (rooms == Rooms::EngineAlone).then(LinkSettings::default));
        let link = match settings {
            Some(settings) => Some(open_link(&settings, &store, data, reader).await?),
            None => None,
        };
        let engine_config = engine_config(link.is_some());
        let (engine, handle) =
            Engine::open(engine_config, Arc::clone(&store) as _, connector(data, lead_until.clone()), writer)
                .await
                .map_err(|error| Failure::new(Exit::Failed, error.code, error.message).hint(error.hint))?;
        let api_config = peregrine_api::Config {
            allow_clear_text_on_public_address: config.api.allow_clear_text_on_public_address,
            allowed_hosts: config.api.allowed_hosts,
            metrics_without_token: config.api.metrics_without_token,
            metrics: Some(Arc::new(move || metrics.render())),
            edges: link.as_ref().map(|link| Arc::new(LinkedEdges::new(link.handle(), link.addr())) as _),
            readiness: Some(readiness(handle.clone(), lead_until.clone())),
            ..peregrine_api::Config::new(config.api.listen, data)
        };
        let api = peregrine_api::Api::bind(api_config, handle.clone())
            .await
            .map_err(|error| Failure::new(Exit::Failed, "api.bind", error.to_string()))?;

        let (stop, stopped) = watch::channel(false);
        let edge_addrs = edge.as_ref().map(Edge::addrs).unwrap_or_default();
        let (link_addr, api_addr) = (link.as_ref().map(Link::addr), api.addr());
        let engine_stop = ended(&stopped);
        let mut server = Self { engine: handle, edge_addrs, link_addr, api_addr, stop, parts: Vec::new() };
        // First in, last out: `stop` awaits them from the end.
        let (lead_stop, told) = (ended(&stopped), server.engine.clone());
        server.part("lead", async move {
            tokio::select! {
                failure = keep_lead(&store, &lead, &told) => Err(failure),
                () = lead_stop => Ok(()),
            }
        });
        server.part("engine", async move {
            engine.run(engine_stop).await;
            Ok(())
        });
        // Before anybody is answered: a ready server has the routes of its configuration.
        server.apply(config.machines, config.services).await;
        if let Some(link) = link {
            // From here on: an edge must not be told a table that is not complete yet.
            let link_stop = ended(&stopped);
            server.part("link", async move {
                link.run(link_stop).await;
                Ok(())
            });
        }
        if let Some(edge) = edge {
            let edge_stop = ended(&stopped);
            server.part("edge", async move {
                edge.run(edge_stop)
                    .await
                    .map_err(|error| Failure::new(Exit::Failed, "edge.failed", error.to_string()))
            });
        }
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
    run_rooms(&args.config, &args.data, args.log_format, Rooms::WithEdge, false)
}

/// Runs `peregrine engine`.
pub(crate) fn run_engine(args: &EngineArgs) -> Result {
    run_rooms(&args.config, &args.data, args.log_format, Rooms::EngineAlone, args.standby)
}

fn run_rooms(file: &Path, data: &Path, log: Option<LogFormat>, rooms: Rooms, standby: bool) -> Result {
    let config = ServerConfig::load(file).map_err(|mistakes| configuration(&mistakes))?;
    telemetry::log(log);
    if config.edge_admin.is_some() {
        tracing::warn!("[edge] admin is for `peregrine edge`: this process answers probes at its API");
    }
    block_on(serve(config, file, data, rooms, standby))
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

async fn serve(config: ServerConfig, file: &Path, data: &Path, rooms: Rooms, standby: bool) -> Result {
    let mut signals = Signals::new()?;
    let mut reload = listen(SignalKind::hangup())?;
    let mut server = if standby {
        let Some(store) = standby::stand_by(config.api.listen, data, &mut signals).await? else {
            return Ok(());
        };
        Server::start_on(store, config, data, rooms).await?
    } else {
        Server::start(config, data, rooms).await?
    };
    announce(&server, data);
    loop {
        tokio::select! {
            () = signals.stop() => break,
            _ = reload.recv() => apply_again(&server, file).await,
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

pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Listens for both from here on.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// Waits for one of them.
    pub(crate) async fn stop(&mut self) {
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
    if let Some(link) = server.link_addr {
        tracing::info!(link = %link, "edges in other processes may connect");
    }
    tracing::info!(edge = edge.join(" "), api = %format!("http://{}", server.api_addr()), data = %data.display(), "serving");
}

fn engine_config(edges_elsewhere: bool) -> EngineConfig {
    // One clock: the engine reads ejections that the edge has written.
    EngineConfig { edge_clock: Arc::new(peregrine_proxy::now_ms), edges_elsewhere, ..EngineConfig::default() }
}

/// How long a process that has shown at `shown` that it leads is certain to lead.
fn lead_from(shown: Instant) -> Instant {
    // Half of the patience: the other half is for what was begun in the last moment.
    shown + Duration::from_millis(LEAD_PATIENCE_MS / 2)
}

/// Shows again and again that this process leads, and tells of those before it that went on; ends when it is replaced.
async fn keep_lead(store: &SqliteStore, lead: &watch::Sender<Instant>, engine: &EngineHandle) -> Failure {
    loop {
        let shown = Instant::now();
        match store.renew().await {
            Ok(refused) => {
                lead.send_replace(lead_from(shown));
                for late in refused {
                    tracing::warn!(
                        epoch = late.epoch,
                        writes = late.batches,
                        "late writes of an engine that was replaced were refused"
                    );
                    if let Err(error) = engine.tell_fenced(late.epoch, late.batches).await {
                        tracing::error!(%error, "that cannot be stored as an event");
                    }
                    let what = format!(
                        "{} late writes of an engine that was replaced (epoch {})",
                        late.batches, late.epoch
                    );
                    if let Err(error) = engine.note_refusal(None, what).await {
                        tracing::error!(%error, "that cannot be written into the audit");
                    }
                }
            }
            Err(error @ StoreError::Fenced { .. }) => {
                return Failure::new(Exit::Conflict, "engine.fenced", error.to_string())
                    .hint("start it again with --standby, to be there when the other one ends");
            }
            // Nobody else can write either, if it is the disk: going on is right, and nothing new is acknowledged.
            Err(error) => tracing::error!(%error, "that this engine leads cannot be written down"),
        }
        tokio::time::sleep(Duration::from_millis(LEAD_RENEW_MS)).await;
    }
}

async fn open_link(
    settings: &LinkSettings,
    store: &SqliteStore,
    data: &Path,
    reader: TableReader,
) -> Result<Link> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failed, "link.open", error.to_string());
    let config = LinkConfig {
        lease_ms: settings.lease_ms,
        ..LinkConfig::new(settings.listen, store.epoch(), Arc::new(peregrine_proxy::now_ms))
    };
    Link::open(config, &data.join(LINK_FOLDER), reader).await.map_err(|error| failed(&error))
}

/// The edge serves whatever the store does; the server takes work only while it leads and can write it down.
fn readiness(engine: EngineHandle, lead: runtime::LeadUntil) -> peregrine_api::ReadinessChecks {
    Arc::new(move || {
        let problem = engine.store_problem();
        let leads = Instant::now() < *lead.borrow();
        let lead =
            if leads { "this engine leads" } else { "this engine has not shown for long that it leads" };
        let check = |name: &str, ok, detail: String| peregrine_api::types::ReadinessCheck {
            name: name.to_owned(),
            ok,
            detail,
        };
        let store = problem.as_ref().map_or_else(
            || "it takes writes".to_owned(),
            |problem| format!("{}. {}", problem.message, problem.hint),
        );
        vec![check("store", problem.is_none(), store), check("lead", leads, lead.to_owned())]
    })
}

fn connector(data: &Path, lead: runtime::LeadUntil) -> peregrine_engine::Connect {
    let data: PathBuf = data.to_owned();
    Arc::new(move |machine: &Machine| {
        runtime::while_leading(runtime::connect_or_refuse(&machine.spec, &data), lead.clone())
    })
}

/// Waits until the stop is told.
pub(crate) fn ended(stopped: &watch::Receiver<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stopped = stopped.clone();
    async move {
        // The sender gone is as good as a stop.
        let _stopped = stopped.wait_for(|stopped| *stopped).await;
    }
}

/// The failure that mistakes in a configuration are.
pub(crate) fn configuration(mistakes: &Mistakes) -> Failure {
    let list = mistakes.list();
    Failure::new(Exit::Usage, "config.invalid", mistakes.to_string()).detail("mistakes", list)
}

/// The failure that a store is which cannot be opened.
pub(crate) fn store_failure(data: &Path, error: &StoreError) -> Failure {
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

/// The failure that is nobody's fault but ours, or the system's.
pub(crate) fn internal(code: &str, error: &anyhow::Error) -> Failure {
    Failure::new(Exit::Failed, code, format!("{error:#}"))
}
