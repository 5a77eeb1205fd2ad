//! The life of an edge's process: from its table to its last report, with the upgrades in between.
//!
//! ```text
//!   (takes over) ─► table ─► serves ─► stops: what is in flight has the drain's time ─► last report ─► ends
//!                              │ ▲
//!                              ▼ │ the new process has ended
//!                    another one serves: what is in flight has the time of its class ─► last report ─► ends
//! ```

use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use metrics_exporter_prometheus::PrometheusHandle;
use peregrine_api::probes::Probes;
use peregrine_link::{Before, EdgeLink, LinkStatus, PlaceHandle};
use peregrine_proxy::{Config, Edge, Ending, Orphans, RunError, Sockets};
use peregrine_routing::TableReader;
use rustix::process::{Pid, Signal as Kill, kill_process};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::certificates::{self, FileCertificates};
use crate::cli::args::EdgeArgs;
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::edge::failure;
use crate::edge_secrets::EdgeSecrets;
use crate::hand_over::{self, Asked, Control, Ends, Heir, Offer, Predecessor, Ready};
use crate::serve::{Signals, ended, listen};
use crate::{edge_admin, systemd, telemetry};

/// Longest time for a process that takes over to be told the newest table by the engine that the one before has.
const TABLE_WITHIN: Duration = Duration::from_secs(20);
/// Longest time for the table in use to be on the disk, from which the next process begins.
const SAVED_WITHIN: Duration = Duration::from_secs(5);
/// Pause after an attempt to serve again that has failed.
const AGAIN_PAUSE: Duration = Duration::from_secs(1);

/// What a process of an edge has from its start to its end.
pub(crate) struct Own<'a> {
    pub(crate) args: &'a EdgeArgs,
    pub(crate) config: Config,
    /// Those that this process has: fewer once another one serves on other addresses.
    pub(crate) sockets: RefCell<Sockets>,
    /// The socket for probes, and the address that it was asked for.
    pub(crate) admin: RefCell<Option<(SocketAddr, TcpListener)>>,
    pub(crate) asked_admin: Option<SocketAddr>,
    pub(crate) certificates: Arc<FileCertificates>,
}

impl Own<'_> {
    /// Binds what was closed for a process that is gone.
    fn bind_again(&self) -> Result {
        let bind = |error: &dyn std::fmt::Display| Failure::new(Exit::Failed, "edge.bind", error.to_string());
        let there = self.sockets.borrow().try_clone().map_err(|error| bind(&error))?;
        match Sockets::take_over(&self.config, there.into_groups()) {
            Ok(sockets) => drop(self.sockets.replace(sockets)),
            Err(error) if self.sockets.borrow().groups().is_empty() => return Err(bind(&error)),
            // Better on some addresses than on none.
            Err(error) => tracing::error!(%error, "an address that was given up is not to be had again"),
        }
        if self.admin.borrow().is_none()
            && let Some(asked) = self.asked_admin
        {
            match edge_admin::bind(asked) {
                Ok(listener) => drop(self.admin.replace(Some((asked, listener)))),
                Err(failure) => tracing::error!(error = failure.message, "probes are not answered"),
            }
        }
        Ok(())
    }
}

/// How a life begins.
pub(crate) struct Start {
    /// Who was there before, if the data folder was handed over.
    pub(crate) before: Option<Before>,
    pub(crate) control: Option<UnixListener>,
    /// Who was there before has an engine.
    pub(crate) connected: bool,
    pub(crate) predecessor: Option<Predecessor>,
    /// The process before serves still, and waits for this one to be ready.
    pub(crate) takes_over: bool,
    /// Addresses of which the sockets were handed over.
    pub(crate) taken: Vec<SocketAddr>,
}

impl Start {
    /// Nobody was there before.
    pub(crate) const fn fresh() -> Self {
        Self {
            before: None,
            control: None,
            connected: false,
            predecessor: None,
            takes_over: false,
            taken: Vec::new(),
        }
    }
}

/// Serves to the end of this process.
pub(crate) async fn serve(own: &Own<'_>, mut start: Start) -> Result {
    let metrics = telemetry::metrics()
        .map_err(|error| Failure::new(Exit::Failed, "edge.metrics", format!("{error:#}")))?;
    peregrine_proxy::describe();
    let mut asks = Asks { stop: Signals::new()?, upgrade: listen(SignalKind::user_defined2())? };
    // It does not end an edge, also where there is nothing to be read anew.
    let _hangup = listen(SignalKind::hangup())?;
    while let Some(next) = live(own, &metrics, &mut asks, start).await? {
        start = next;
    }
    Ok(())
}

/// What a person asks for by signals.
struct Asks {
    stop: Signals,
    upgrade: Signal,
}

/// From the table to the last report. What comes next, if the process that took over has ended at the last moment.
async fn live(
    own: &Own<'_>,
    metrics: &PrometheusHandle,
    asks: &mut Asks,
    start: Start,
) -> Result<Option<Start>> {
    let cores = u32::try_from(own.config.core_count()).unwrap_or(u32::MAX);
    let (data, clock) = (&own.args.data, Arc::new(peregrine_proxy::now_ms));
    let link = EdgeLink::take_over(data, &own.args.engine, cores, clock, start.before)
        .map_err(|error| failure(&error))?;
    let place = link.place();
    if !start.takes_over {
        place.take_disk();
    }
    let (certificates, secrets) = (Arc::clone(&own.certificates), link.secrets());
    let secrets = EdgeSecrets::open(data, certificates, secrets, link.reader(), place.clone())
        .map_err(|error| failed("edge.secrets", &format!("{error:#}")))?;
    tracing::info!(edge = link.name(), engines = link.engines().join(" "), data = %data.display(), "an edge");
    let (stop_link, link_stopped) = watch::channel(false);
    let (serving, told_serving) = watch::channel(false);
    let told = edge_admin::Told {
        name: link.name().to_owned(),
        link: link.status(),
        serving: told_serving,
        metrics: metrics.clone(),
    };
    let (reader, mut ready, status) = (link.reader(), link.ready(), link.status());
    // To the end of this life.
    let mut reloading = JoinSet::new();
    if let Some(file) = own.args.config.clone() {
        let certificates = Arc::clone(&own.certificates);
        reloading.spawn(certificates::reload_at_hangup(file, certificates, reader.clone()));
    }
    let mut keeping = JoinSet::new();
    keeping.spawn(Arc::clone(&secrets).run(link.ready()));
    let mut life = Life {
        own,
        secrets,
        reader,
        place,
        status,
        serving,
        told,
        probes: None,
        edges: JoinSet::new(),
        current: None,
        leaving: Vec::new(),
        control: None,
        predecessor: start.predecessor,
        takes_over: start.takes_over,
        taken: start.taken,
        again: None,
        heir: None,
        stopping: false,
    };
    life.answer_probes()?;
    let link = tokio::spawn(link.run(ended(&link_stopped)));
    let has_table = tokio::select! {
        has_table = life.table(&mut ready, start.connected) => has_table?,
        () = asks.stop.stop() => false,
    };
    let result = if has_table { life.serve(asks, start.control).await } else { Ok(()) };
    drop(keeping);
    // Last: the counts of what has finished are told too.
    stop_link.send_replace(true);
    if let Err(error) = link.await {
        let failed = Failure::new(Exit::Failed, "edge.panicked", format!("the link failed: {error}"));
        return result.and(Err(failed));
    }
    result?;
    life.next()
}

struct Life<'a> {
    own: &'a Own<'a>,
    secrets: Arc<EdgeSecrets>,
    reader: TableReader,
    place: PlaceHandle,
    status: watch::Receiver<LinkStatus>,
    serving: watch::Sender<bool>,
    told: edge_admin::Told,
    probes: Option<Probes>,
    /// The edge that accepts, and those that end what they have.
    edges: JoinSet<Result<(), RunError>>,
    /// Tells the edge that accepts how to end; `None` while none does.
    current: Option<(watch::Sender<Ending>, Orphans)>,
    leaving: Vec<watch::Sender<Ending>>,
    control: Option<(Control, JoinSet<()>, mpsc::Sender<Asked>)>,
    /// The process before this one, and those before it: they may still end what they have.
    predecessor: Option<Predecessor>,
    takes_over: bool,
    taken: Vec<SocketAddr>,
    /// The process that has taken over.
    heir: Option<Heir>,
    /// When to try to serve again; `None` while nothing is to be tried.
    again: Option<Instant>,
    /// Nobody comes after.
    stopping: bool,
}

/// An upgrade that was asked for, and waits for the table to be on the disk.
struct Pending {
    asked: Asked,
    until: Instant,
}

/// An upgrade that has begun.
struct Attempt {
    pid: u32,
    asked: Asked,
    ready: BoxFuture<'static, (Heir, Result<Ready, String>)>,
}

impl Asked {
    fn tell(self, outcome: Result<(u32, String), String>) {
        // Whoever has asked may be gone.
        if let Some(reply) = self.reply {
            drop(reply.send(outcome));
        }
    }
}

impl Life<'_> {
    /// Waits for a table to serve from. One who takes over from an edge that an engine counts on has to be counted on too,
    /// and to have its newest table, before anybody is served.
    async fn table(&self, ready: &mut watch::Receiver<bool>, connected: bool) -> Result<bool> {
        if connected {
            let mut status = self.status.clone();
            let told = status.wait_for(|status| status.table_version.is_some());
            let told = tokio::time::timeout(TABLE_WITHIN, told).await;
            if told.is_err() {
                let what = format!(
                    "the engine did not tell the new process its table within {} s",
                    TABLE_WITHIN.as_secs()
                );
                return Err(Failure::new(Exit::Unreachable, "edge.no_table", what));
            }
        }
        Ok(ready.wait_for(|ready| *ready).await.is_ok())
    }

    fn answer_probes(&mut self) -> Result {
        if let Some((asked, listener)) = &*self.own.admin.borrow() {
            let probes = edge_admin::start(*asked, listener, self.told.clone())?;
            tracing::info!(admin = %format!("http://{}", probes.address()), "probes are answered");
            self.probes = Some(probes);
        }
        Ok(())
    }

    /// Accepts on every socket.
    fn accept(&mut self) -> Result {
        let bind = |error: &dyn std::fmt::Display| Failure::new(Exit::Failed, "edge.bind", error.to_string());
        let sockets = self.own.sockets.borrow().try_clone().map_err(|error| bind(&error))?;
        let edge = Edge::with_sockets(self.own.config.clone(), sockets, self.reader.clone())
            .map_err(|error| bind(&error))?
            .with_certificates(Arc::clone(&self.secrets) as _)
            .with_tickets(self.secrets.tickets());
        let http = edge.addrs().into_iter().map(|addr| format!("http://{addr}"));
        let https = edge.https_addrs().into_iter().map(|addr| format!("https://{addr}"));
        let addrs: Vec<String> = http.chain(https).collect();
        let ((tell, told), orphans) = (watch::channel(Ending::No), edge.orphans());
        self.edges.spawn(edge.run_until(told));
        self.current = Some((tell, orphans));
        self.serving.send_replace(true);
        tracing::info!(edge = addrs.join(" "), "serving");
        Ok(())
    }

    async fn serve(&mut self, asks: &mut Asks, control: Option<UnixListener>) -> Result {
        self.accept()?;
        let mut before = match &self.predecessor {
            Some(predecessor) if self.takes_over => {
                predecessor.ready(&self.taken);
                Some(predecessor.watch().map_err(|error| failed("edge.hand_over", &error))?)
            }
            _ => {
                systemd::ready();
                None
            }
        };
        let (ask, mut asked) = mpsc::channel(1);
        self.open_control(control, &ask);
        let (mut pending, mut attempt) = (None::<Pending>, None::<Attempt>);
        loop {
            if self.edges.is_empty() && (self.again.is_none() || self.stopping) {
                return Ok(());
            }
            let busy = pending.is_some()
                || attempt.is_some()
                || before.is_some()
                || self.heir.is_some()
                || self.again.is_some()
                || self.stopping;
            let mut wanted = None;
            tokio::select! {
                Some(ran) = self.edges.join_next() => {
                    ran.map_err(|error| failed("edge.failed", &error))?
                        .map_err(|error| failed("edge.failed", &error))?;
                }
                () = asks.stop.stop() => {
                    if self.stopping {
                        let what = "ended before requests in flight had finished";
                        return Err(Failure::new(Exit::Failed, "edge.interrupted", what));
                    }
                    if let Some(attempt) = attempt.take() {
                        attempt.give_up();
                    }
                    self.stop();
                }
                () = hands_over(&mut before) => {
                    before = None;
                    self.place.take_disk();
                    systemd::ready();
                }
                Some(one) = asked.recv() => wanted = Some(one),
                _ = asks.upgrade.recv() => wanted = Some(Asked { binary: None, reply: None }),
                saved = saved(&mut self.status, &pending), if pending.is_some() => {
                    if let Some(pending) = pending.take() {
                        attempt = self.begin(pending.asked, saved);
                    }
                }
                (heir, ready) = ready(&mut attempt), if attempt.is_some() => {
                    if let Some(attempt) = attempt.take() {
                        self.attempted(attempt.asked, heir, ready).await?;
                    }
                }
                ends = ends(&mut self.heir), if !self.stopping => match ends {
                    Ends::Died => {
                        self.heir = None;
                        self.again = Some(Instant::now());
                    }
                    Ends::Stopped => self.stop(),
                },
                () = at(self.again), if !self.stopping => {
                    self.again = None;
                    if let Err(failure) = self.accept_again(&ask) {
                        tracing::error!(error = failure.message, "cannot serve again yet");
                        self.again = Some(Instant::now() + AGAIN_PAUSE);
                    }
                }
            }
            match wanted {
                Some(asked) if busy => {
                    tracing::warn!("an upgrade is under way already, or the edge is ending");
                    asked.tell(Err("an upgrade is under way already, or the edge is ending".to_owned()));
                }
                Some(asked) => pending = Some(Pending { asked, until: Instant::now() + SAVED_WITHIN }),
                None => {}
            }
        }
    }

    fn open_control(&mut self, before: Option<UnixListener>, ask: &mpsc::Sender<Asked>) {
        let control = Control::open(&self.own.args.data, before);
        let opened = control.and_then(|control| Ok((control.answer(ask.clone())?, control)));
        match opened {
            Ok((answering, control)) => self.control = Some((control, answering, ask.clone())),
            Err(error) => {
                tracing::warn!(%error, "`peregrine edge upgrade` will not find this edge; SIGUSR2 upgrades it too");
            }
        }
    }

    /// Nobody comes after.
    fn stop(&mut self) {
        self.stopping = true;
        if self.heir.is_none() {
            systemd::stopping();
        }
        if let Some(before) = &self.predecessor {
            before.stopping();
        }
        tracing::info!("stopping: no new connections; a second signal ends at once");
        // Told first: whoever sends requests here looks elsewhere from now on.
        self.serving.send_replace(false);
        self.leaving.extend(self.current.take().map(|(edge, _)| edge));
        for edge in &self.leaving {
            edge.send_replace(Ending::Stop);
        }
    }

    // --- upgrades

    fn begin(&self, asked: Asked, saved: bool) -> Option<Attempt> {
        match self.try_begin(&asked, saved) {
            Ok(heir) => {
                let pid = heir.pid();
                tracing::info!(pid, "another process is to take over");
                systemd::handing_over(pid);
                Some(Attempt { pid, asked, ready: ready_or_not(heir).boxed() })
            }
            Err(why) => {
                not_upgraded(asked, why);
                None
            }
        }
    }

    fn try_begin(&self, asked: &Asked, saved: bool) -> Result<Heir, String> {
        if !saved {
            return Err("the table in use is not on the disk, from which the next process begins".to_owned());
        }
        if std::process::id() == 1 {
            return Err(
                "this is the first process of a container, which ends with it: replace the container"
                    .to_owned(),
            );
        }
        let text = |error: std::io::Error| error.to_string();
        let program = asked.binary.clone().unwrap_or_else(|| PathBuf::from(hand_over::program()));
        let (sockets, admin) = (self.own.sockets.borrow(), self.own.admin.borrow());
        let offer = Offer {
            before: self.place.hand_on().map_err(text)?,
            connected: self.status.borrow().engine.is_some(),
            sockets: &sockets,
            admin: admin.as_ref().map(|(asked, listener)| (*asked, listener)),
            control: self.control.as_ref().map(|(control, ..)| control.listener()),
            elders: self.predecessor.as_ref().map(Predecessor::living).unwrap_or_default(),
        };
        hand_over::begin(&program, &offer)
            .map_err(|error| format!("cannot start {}: {error}", program.display()))
    }

    async fn attempted(&mut self, asked: Asked, heir: Heir, ready: Result<Ready, String>) -> Result {
        match ready {
            Ok(Ready { version, taken }) => {
                let pid = heir.pid();
                self.hand_over(heir, taken.as_deref()).await?;
                tracing::info!(pid, version, "another process serves; this one ends what it has");
                asked.tell(Ok((pid, version)));
            }
            Err(why) => {
                heir.end().await;
                not_upgraded(asked, why);
            }
        }
        Ok(())
    }

    /// It accepts on every socket; this process does so no more, and leaves the files to it.
    async fn hand_over(&mut self, mut heir: Heir, taken: Option<&[SocketAddr]>) -> Result {
        self.serving.send_replace(false);
        let closed = taken.map(|taken| self.close_others(taken)).unwrap_or_default();
        if let Some((edge, orphans)) = self.current.take() {
            orphans.are(closed);
            edge.send_replace(Ending::HandOver);
            self.leaving.push(edge);
        }
        self.probes = None;
        if let Some((_, answering, _)) = &mut self.control {
            answering.abort_all();
        }
        let place = self.place.clone();
        // A write to the disk may be under way.
        tokio::task::spawn_blocking(move || place.set_handed_over(true))
            .await
            .map_err(|error| failed("edge.failed", &error))?;
        if let Err(error) = heir.yours().await {
            tracing::debug!(%error, "the process that has taken over is gone");
        }
        self.heir = Some(heir);
        Ok(())
    }

    /// Closes what the process that takes over has no use for: whoever connected there would wait for nobody.
    fn close_others(&self, taken: &[SocketAddr]) -> Vec<SocketAddr> {
        let closed = self.own.sockets.borrow_mut().keep(taken);
        let mut admin = self.own.admin.borrow_mut();
        if let Some((_, listener)) = &mut *admin
            && listener.local_addr().is_ok_and(|address| !taken.contains(&address))
        {
            *admin = None;
        }
        if !closed.is_empty() {
            tracing::info!(?closed, "the process that takes over serves on other addresses");
        }
        closed
    }

    /// Nobody is left who has taken over: this process serves again. What it was ending goes on to its end.
    fn accept_again(&mut self, ask: &mpsc::Sender<Asked>) -> Result {
        let why = "the process that had taken over has ended";
        self.own.bind_again()?;
        self.accept()?;
        self.place.set_handed_over(false);
        tracing::error!("{why}: this one serves again");
        // Clients come first: what is said to others is not worth an end.
        if let Err(failure) = self.answer_probes() {
            tracing::error!(error = failure.message, "probes are not answered");
        }
        if let Some((control, answering, _)) = &mut self.control {
            match control.answer(ask.clone()) {
                Ok(again) => *answering = again,
                Err(error) => tracing::error!(%error, "upgrades can be asked for by SIGUSR2 alone"),
            }
        }
        systemd::kept(why);
        Ok(())
    }

    /// After the last report: the end, unless the process that has taken over is gone.
    fn next(self) -> Result<Option<Start>> {
        let Some(mut heir) = self.heir else {
            if let Some((control, ..)) = self.control {
                control.remove();
            }
            return Ok(None);
        };
        if self.stopping || heir.ends().now_or_never() != Some(Ends::Died) {
            return Ok(None);
        }
        tracing::error!("the process that had taken over has ended: this one begins anew");
        self.own.bind_again()?;
        let text = |error: std::io::Error| failed("edge.failed", &error);
        let before = Some(self.place.hand_on().map_err(text)?);
        let control = self.control.map(|(control, ..)| control.listener().try_clone());
        let control = control.transpose().map_err(text)?;
        // Those before go on waiting for the end of whoever serves.
        let predecessor = self.predecessor;
        Ok(Some(Start { before, control, predecessor, ..Start::fresh() }))
    }
}

impl Attempt {
    /// The edge ends, and so does the process that was to take over. First that one, or it would serve alone.
    fn give_up(self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if let Some(Err(error)) = pid.map(|pid| kill_process(pid, Kill::KILL)) {
            tracing::debug!(%error, "the process that was to take over is gone");
        }
        self.asked.tell(Err("the edge is ending".to_owned()));
    }
}

async fn ready_or_not(mut heir: Heir) -> (Heir, Result<Ready, String>) {
    let ready = heir.ready().await;
    (heir, ready)
}

fn not_upgraded(asked: Asked, why: String) {
    tracing::error!(%why, "not upgraded: this process goes on");
    systemd::kept(&why);
    asked.tell(Err(why));
}

fn failed(code: &'static str, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, code, error.to_string())
}

/// Whether the table in use is on the disk, at once or within the time.
async fn saved(status: &mut watch::Receiver<LinkStatus>, pending: &Option<Pending>) -> bool {
    let Some(pending) = pending else { return std::future::pending().await };
    let saved = status.wait_for(|status| status.saved);
    tokio::time::timeout_at(pending.until, saved).await.is_ok_and(|saved| saved.is_ok())
}

async fn ready(attempt: &mut Option<Attempt>) -> (Heir, Result<Ready, String>) {
    match attempt {
        Some(attempt) => (&mut attempt.ready).await,
        None => std::future::pending().await,
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn ends(heir: &mut Option<Heir>) -> Ends {
    match heir {
        Some(heir) => heir.ends().await,
        None => std::future::pending().await,
    }
}

async fn hands_over(before: &mut Option<hand_over::Watch>) {
    match before {
        Some(before) => before.hands_over().await,
        None => std::future::pending().await,
    }
}
