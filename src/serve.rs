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
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use peregrine_config::{LinkSettings, Mistakes, ServerConfig};
use peregrine_engine::model::Machine;
use peregrine_engine::store::{RefusedWrites, SqliteStore, StoreError};
use peregrine_engine::{DomainChange, Engine, EngineConfig, EngineHandle, runtime};
use peregrine_link::{Link, LinkConfig};
use peregrine_proxy::{BindError, Edge, Sockets};
use peregrine_routing::{DomainSpec, TableReader};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::certificates::{self, AllCertificates, FileCertificates, Loaded};
use crate::cli::args::{EngineArgs, LogFormat, ServeArgs};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::domains::Kept;
use crate::edges::{Handed, LinkedEdges};
use crate::ticket_keys::{self, InstallationKeys};
use crate::{certificate_metrics, domains, privileges, standby, systemd, telemetry};

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
    https_addrs: Vec<SocketAddr>,
    certificates: Arc<FileCertificates>,
    /// The domains of the configuration, as they were published last.
    domains: Vec<DomainSpec>,
    /// Those that were added.
    kept: Arc<Kept>,
    link_addr: Option<SocketAddr>,
    api_addr: SocketAddr,
    stop: watch::Sender<bool>,
    parts: Vec<(&'static str, JoinHandle<Result>)>,
}

impl Server {
    /// Starts everything and applies the machines and services of the configuration.
    pub(crate) async fn start(config: ServerConfig, data: &Path, rooms: Rooms) -> Result<Self> {
        let sockets = bind(&config, rooms)?;
        Self::start_with(sockets, config, data).await
    }

    /// As [`Self::start`], with an edge on sockets that were bound, or with none.
    async fn start_with(sockets: Option<Sockets>, config: ServerConfig, data: &Path) -> Result<Self> {
        if sockets.is_none() || config.link.is_some() {
            belongs_to_link(data)?;
        }
        let store = SqliteStore::open(data).map_err(|error| store_failure(data, &error))?;
        Self::start_on(store, sockets, config, data).await
    }

    /// As [`Self::start_with`], on a store that was opened.
    async fn start_on(
        store: SqliteStore,
        sockets: Option<Sockets>,
        config: ServerConfig,
        data: &Path,
    ) -> Result<Self> {
        let metrics = telemetry::metrics().map_err(|error| internal("server.metrics", &error))?;
        peregrine_proxy::describe();
        certificate_metrics::describe();
        telemetry::describe();
        let store = Arc::new(store);
        let (lead, lead_until) = watch::channel(lead_from(Instant::now()));
        let (writer, reader) = peregrine_routing::table();
        let loaded = certificates::load(&config.domains).map_err(wrong_certificates)?;
        // Filled when the domains are published, which drops what no published domain names.
        let certificates = Arc::<FileCertificates>::default();
        let kept_later = Arc::new(OnceLock::new());
        let engine_alone = sockets.is_none();
        let edge = sockets.map(|sockets| Edge::with_sockets(config.edge, sockets, reader.clone()));
        let edge = edge.transpose().map_err(|error| bind_failure(&error))?;
        let all = Arc::new(AllCertificates::new(Arc::clone(&certificates), Arc::clone(&kept_later)));
        let tickets = ticket_keys::to_come().map_err(|error| internal("server.tickets", &error))?;
        let edge =
            edge.map(|edge| edge.with_certificates(Arc::clone(&all) as _).with_tickets(tickets.clone()));
        // Before the engine publishes anything: edges that were there when it last ran are waited for from the start.
        let settings = config.link.or_else(|| engine_alone.then(LinkSettings::default));
        let link = match settings {
            Some(settings) => Some(open_link(&settings, &store, data, reader.clone()).await?),
            None => None,
        };
        let table = reader;
        let engine_config = engine_config(link.is_some());
        let (engine, handle) =
            Engine::open(engine_config, Arc::clone(&store) as _, connector(data, lead_until.clone()), writer)
                .await
                .map_err(|error| Failure::new(Exit::Failed, error.code, error.message).hint(error.hint))?;
        let configured = loaded.names();
        let kept = Kept::open(&handle, config.acme.as_ref(), data, configured, table).await;
        let kept = Arc::new(kept.map_err(|error| internal("server.domains", &error))?);
        // Nobody else sets it.
        let _first = kept_later.set(Arc::clone(&kept));
        let keys = InstallationKeys::open(kept.vault(), &data.join(domains::KEY_FILE)).await;
        let keys = Arc::new(keys.map_err(|error| internal("server.tickets", &error))?);
        keys.have(&tickets);
        let api_config = peregrine_api::Config {
            domains: Some(Arc::clone(&kept) as _),
            allow_clear_text_on_public_address: config.api.allow_clear_text_on_public_address,
            allowed_hosts: config.api.allowed_hosts,
            metrics_without_token: config.api.metrics_without_token,
            metrics: Some(metrics_text(metrics, Arc::clone(&kept))),
            edges: link.as_ref().map(|link| Arc::new(LinkedEdges::new(link.handle(), link.addr())) as _),
            readiness: Some(readiness(handle.clone(), lead_until.clone())),
            ..peregrine_api::Config::new(config.api.listen, data)
        };
        let api = peregrine_api::Api::bind(api_config, handle.clone())
            .await
            .map_err(|error| Failure::new(Exit::Failed, "api.bind", error.to_string()))?;

        let (stop, stopped) = watch::channel(false);
        let edge_addrs = edge.as_ref().map(Edge::addrs).unwrap_or_default();
        let https_addrs = edge.as_ref().map(Edge::https_addrs).unwrap_or_default();
        let (link_addr, api_addr) = (link.as_ref().map(Link::addr), api.addr());
        let engine_stop = ended(&stopped);
        let mut server = Self {
            engine: handle,
            edge_addrs,
            https_addrs,
            certificates,
            domains: Vec::new(),
            kept: Arc::clone(&kept),
            link_addr,
            api_addr,
            stop,
            parts: Vec::new(),
        };
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
        server.publish_domains(loaded);
        server.apply(config.machines, config.services).await;
        if let Some(edge) = edge {
            let edge_stop = ended(&stopped);
            server.part("edge", async move {
                edge.run(edge_stop)
                    .await
                    .map_err(|error| Failure::new(Exit::Failed, "edge.failed", error.to_string()))
            });
        }
        // The edge serves already; whoever asks for domains waits for them.
        kept.read().await.map_err(|error| internal("server.domains", &error))?;
        let kept_stop = ended(&stopped);
        server.part("certificates", async move {
            tokio::select! {
                () = kept.run() => {}
                () = kept_stop => {}
            }
            Ok(())
        });
        let (ticket_keys, keys_stop) = (Arc::clone(&keys), ended(&stopped));
        server.part("tickets", async move {
            tokio::select! {
                () = ticket_keys.run(&tickets) => {}
                () = keys_stop => {}
            }
            Ok(())
        });
        if let Some(link) = link {
            let link = link.with_secrets(Arc::new(Handed { certificates: all, ticket_keys: keys }));
            // A service of which the record is damaged was not taken away by anybody.
            let link = link.keeping(server.engine.unreadable_services());
            // From here on: an edge must not be told a table that is not complete yet.
            let link_stop = ended(&stopped);
            server.part("link", async move {
                link.run(link_stop).await;
                Ok(())
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

    /// Brings the domains of the configuration file about: those that are not in it any more go.
    fn publish_domains(&mut self, mut loaded: Loaded) {
        // Those before stay for one reload more: an edge may go by the table before for a moment.
        self.certificates.keep(&self.domains);
        self.certificates.add(&mut loaded);
        let gone = self.domains.iter().filter(|old| loaded.domains.iter().all(|new| new.name != old.name));
        let gone = gone.map(|old| DomainChange::Remove(old.name.clone()));
        let new = loaded.domains.iter().filter(|new| !self.domains.contains(new));
        let changes: Vec<_> = gone.chain(new.map(|new| DomainChange::Put(new.clone()))).collect();
        if changes.is_empty() {
            return;
        }
        match self.engine.publish_domains(changes) {
            Ok(_) => {
                self.kept.configure(loaded.names());
                self.domains = loaded.domains;
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
    let sockets = bind(&config, rooms)?;
    // Before any thread: from here on nothing needs root.
    if config.user.is_some() {
        privileges::lower(config.user.as_deref())?;
    }
    block_on(serve(config, sockets, file, data, standby))
}

/// The sockets of an edge in this process. Nobody is listened to yet.
fn bind(config: &ServerConfig, rooms: Rooms) -> Result<Option<Sockets>> {
    let sockets = (rooms == Rooms::WithEdge).then(|| Sockets::bind(&config.edge));
    sockets.transpose().map_err(|error| bind_failure(&error))
}

fn bind_failure(error: &BindError) -> Failure {
    Failure::new(Exit::Failed, "edge.bind", error.to_string())
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

async fn serve(
    config: ServerConfig,
    sockets: Option<Sockets>,
    file: &Path,
    data: &Path,
    standby: bool,
) -> Result {
    let mut signals = Signals::new()?;
    let mut reload = listen(SignalKind::hangup())?;
    let mut upgrade = listen(SignalKind::user_defined2())?;
    let mut server = if standby {
        let Some(store) = standby::stand_by(config.api.listen, data, &mut signals).await? else {
            return Ok(());
        };
        Server::start_on(store, sockets, config, data).await?
    } else {
        Server::start_with(sockets, config, data).await?
    };
    announce(&server, data);
    systemd::ready();
    loop {
        tokio::select! {
            () = signals.stop() => break,
            _ = reload.recv() => apply_again(&mut server, file).await,
            _ = upgrade.recv() => tracing::error!("{NO_UPGRADE}"),
            failure = server.part_failed() => {
                tracing::error!("{}", failure.message);
                let _first_failure_counts = server.stop().await;
                return Err(failure);
            }
        }
    }
    tracing::info!("stopping: no new connections; a second signal ends at once");
    systemd::stopping();
    tokio::select! {
        result = server.stop() => result,
        () = signals.stop() => Err(Failure::new(Exit::Failed, "server.interrupted", "ended before requests in flight had finished")),
    }
}

/// Why a process with an engine is not taken over. Its engine alone may have the store, and has to count what is in flight
/// at the edge beside it until it ends: a second engine could do neither.
const NO_UPGRADE: &str = "SIGUSR2: a process with an engine is not upgraded in place, because one engine at a time has the store; \
    run `peregrine engine` and `peregrine edge` apart: the edge serves while the engine is restarted, and is itself upgraded without a gap";

/// SIGHUP: machines, services and domains of the file are applied anew. Listeners and limits need a restart.
async fn apply_again(server: &mut Server, file: &Path) {
    match ServerConfig::load(file) {
        Ok(config) => {
            match certificates::load(&config.domains) {
                Ok(loaded) => server.publish_domains(loaded),
                Err(wrong) => tracing::error!("domains not applied, they stay as they were:\n{wrong}"),
            }
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

pub(crate) fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| internal("server.signals", &error.into()))
}

fn announce(server: &Server, data: &Path) {
    let http = server.edge_addrs().iter().map(|addr| format!("http://{addr}"));
    let https = server.https_addrs.iter().map(|addr| format!("https://{addr}"));
    let edge: Vec<String> = http.chain(https).collect();
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
                    tell_refused(store, engine, late).await;
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

/// Tells of late writes, in the audit first: until it is there the store keeps its note, also over a kill.
async fn tell_refused(store: &SqliteStore, engine: &EngineHandle, late: RefusedWrites) {
    let RefusedWrites { epoch, batches } = late;
    tracing::warn!(epoch, writes = batches, "late writes of an engine that was replaced were refused");
    let what = format!("{batches} late writes of an engine that was replaced (epoch {epoch})");
    if let Err(error) = engine.note_refusal(None, what).await {
        tracing::error!(%error, "that cannot be written into the audit; it is tried again");
        return;
    }
    if let Err(error) = store.forget_refused(late).await {
        tracing::error!(%error, "that it is in the audit cannot be noted; it will be there twice");
    }
    if let Err(error) = engine.tell_fenced(epoch, batches).await {
        tracing::error!(%error, "that cannot be stored as an event");
    }
}

/// Refuses a store that is older than what the link's folder has seen, before an epoch is used up: otherwise it would be started again
/// and again until its epoch is high enough, and edges would take its old table.
fn belongs_to_link(data: &Path) -> Result {
    let Some(theirs) = peregrine_link::newest_epoch(&data.join(LINK_FOLDER)) else { return Ok(()) };
    // What cannot be read is told when it is opened.
    let Ok(stored) = SqliteStore::stored_epoch(data) else { return Ok(()) };
    let ours = stored.unwrap_or(0);
    if ours >= theirs {
        return Ok(());
    }
    let error = peregrine_link::RegistryError::Replaced { ours, theirs };
    Err(Failure::new(Exit::Failed, "link.open", error.to_string()))
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

/// Metrics of this process, with a line for each domain.
fn metrics_text(metrics: PrometheusHandle, kept: Arc<Kept>) -> peregrine_api::MetricsText {
    Arc::new(move || {
        // First: it tells the recorder, too.
        let domains = kept.measured();
        telemetry::tell_tasks();
        metrics.render() + &domains
    })
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

/// The failure that files of certificates are which cannot be used.
pub(crate) fn wrong_certificates(wrong: String) -> Failure {
    Failure::new(Exit::Usage, "domain.files", wrong)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_older_than_what_edges_have_heard_is_refused_and_its_epoch_stays_however_often_it_is_tried()
     {
        let data = tempfile::tempdir().unwrap();
        drop(SqliteStore::open(data.path()).unwrap());
        assert!(belongs_to_link(data.path()).is_ok(), "nobody has written there");
        std::fs::create_dir_all(data.path().join("link/edges/3")).unwrap();
        let before = SqliteStore::stored_epoch(data.path()).unwrap();
        for _ in 0..5 {
            let refused = belongs_to_link(data.path()).unwrap_err();
            assert!(refused.message.contains("of epoch 3 has the edges"), "{refused:?}");
        }
        assert_eq!(SqliteStore::stored_epoch(data.path()).unwrap(), before);
        // The one that belongs there is at least as far.
        (0..3).for_each(|_| drop(SqliteStore::open(data.path()).unwrap()));
        assert!(belongs_to_link(data.path()).is_ok());
    }
}
