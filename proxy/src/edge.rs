//! The edge as a whole: binding, one thread per core, one for control, and the end of them all.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use peregrine_routing::TableReader;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{oneshot, watch};

use crate::access_log::{self, LogError, LogSender};
use crate::config::{Config, ConfigError};
use crate::core::{Core, Guards};
use crate::crew::Crew;
use crate::hold;
use crate::listen::{self, Orphans, Speaks, Stop};
use crate::probe;
use crate::resolve::{self, Lookups, Resolver};
use crate::serve::Servers;
use crate::sockets::{Group, Sockets};
use crate::tls::{self, CertificateSource, CoreTls, EdgeTls, Tickets};

/// Why an edge could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address could not be bound.
    #[error("cannot listen on {address}: {source}{}", hint(source))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The access log could not be opened.
    #[error(transparent)]
    AccessLog(#[from] LogError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there: stop it, or choose another port",
        io::ErrorKind::PermissionDenied => {
            "; ports below 1024 need root, CAP_NET_BIND_SERVICE or another value of net.ipv4.ip_unprivileged_port_start"
        }
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
        _ => "",
    }
}

/// Why an edge ended otherwise than by its shutdown.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A thread or its runtime could not be started.
    #[error("cannot start an edge thread: {0}")]
    Start(#[from] io::Error),
    /// A core came to an end that nobody asked for.
    #[error("a core of the edge has failed; its panic is in the log")]
    CoreFailed,
}

/// Whether an edge goes on, and how it ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// It serves.
    #[default]
    No,
    /// Somebody else accepts on the same sockets from now on: what waits in their queues is left to him. What is in flight
    /// may go on until the deadline of its class, and a connection is closed after its next answer.
    HandOver,
    /// Nobody comes after: what waits in the queues is taken first, and what is in flight has
    /// [`Config::drain_timeout_ms`].
    Stop,
}

/// An edge that listens and is not running yet: connections wait in the accept queue.
pub struct Edge {
    config: Arc<Config>,
    table: TableReader,
    /// For each core its listeners.
    listeners: Vec<Vec<(StdListener, Speaks)>>,
    addrs: Vec<SocketAddr>,
    https_addrs: Vec<SocketAddr>,
    certificates: Option<Arc<dyn CertificateSource>>,
    tickets: Option<Tickets>,
    log: Option<(LogSender, JoinHandle<()>)>,
    orphans: Orphans,
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge")
            .field("addrs", &self.addrs)
            .field("cores", &self.listeners.len())
            .finish_non_exhaustive()
    }
}

impl Edge {
    /// Checks the configuration, and listens on its addresses, with one socket for each core and address.
    ///
    /// # Errors
    /// [`BindError`] says which address, and what to do.
    pub fn bind(config: Config, table: TableReader) -> Result<Self, BindError> {
        let sockets = Sockets::bind(&config)?;
        Self::with_sockets(config, sockets, table)
    }

    /// As [`Edge::bind`], on sockets that were bound before (by a parent process, by a test) instead of the addresses of
    /// the configuration. Cores share each of them.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn with_listeners(
        config: Config,
        ready: Vec<StdListener>,
        table: TableReader,
    ) -> Result<Self, BindError> {
        let groups = ready.into_iter().map(Group::of).collect::<Result<Vec<_>, _>>()?;
        Self::with_sockets(config, Sockets::from(groups), table)
    }

    /// As [`Edge::bind`], on sockets that were bound or taken over.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn with_sockets(config: Config, sockets: Sockets, table: TableReader) -> Result<Self, BindError> {
        config.check()?;
        sockets.listen()?;
        let (addrs, https_addrs) = (sockets.addrs(Speaks::Http), sockets.addrs(Speaks::Https));
        let listeners = sockets.by_core(config.core_count())?;
        let log = config.access_log.as_ref().map(access_log::start).transpose()?;
        Ok(Self {
            config: Arc::new(config),
            table,
            listeners,
            addrs,
            https_addrs,
            certificates: None,
            tickets: None,
            log,
            orphans: Orphans::default(),
        })
    }

    /// Where the certificates that the table names come from. Without it no handshake succeeds.
    #[must_use]
    pub fn with_certificates(mut self, source: Arc<dyn CertificateSource>) -> Self {
        self.certificates = Some(source);
        self
    }

    /// The keys of session tickets, which the caller replaces in time. Without them the edge has its own, which end with it.
    #[must_use]
    pub fn with_tickets(mut self, tickets: Tickets) -> Self {
        self.tickets = Some(tickets);
        self
    }

    /// Where it is told of addresses that nobody else accepts on after a hand-over.
    #[must_use]
    pub fn orphans(&self) -> Orphans {
        self.orphans.clone()
    }

    /// The addresses that it listens on for clear text.
    #[must_use]
    pub fn addrs(&self) -> Vec<SocketAddr> {
        self.addrs.clone()
    }

    /// The addresses that it listens on for TLS.
    #[must_use]
    pub fn https_addrs(&self) -> Vec<SocketAddr> {
        self.https_addrs.clone()
    }

    /// Serves until `shutdown` is ready, then stops accepting, lets requests finish for no longer than
    /// `drain_timeout_ms`, and returns when every thread has ended.
    ///
    /// # Errors
    /// [`RunError`] when a thread cannot be started, or ends by itself.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), RunError> {
        let (tell, told) = watch::channel(Ending::No);
        let mut running = pin!(self.run_until(told));
        tokio::select! {
            ended = &mut running => return ended,
            () = shutdown => drop(tell.send_replace(Ending::Stop)),
        }
        running.await
    }

    /// Serves until it is told how to end, and returns when every thread has ended. [`Ending::Stop`] may follow on
    /// [`Ending::HandOver`]. That nobody is there any more who could say is [`Ending::Stop`].
    ///
    /// # Errors
    /// [`RunError`] when a thread cannot be started, or ends by itself.
    pub async fn run_until(self, mut ending: watch::Receiver<Ending>) -> Result<(), RunError> {
        let (resolver, lookups) = resolve::resolver();
        let (stop, stopped) = watch::channel(Ending::No);
        let (control_stop, control_stopped) = oneshot::channel();
        let guards = Guards::new(&self.config.limits);
        let (tls, tls_work) = EdgeTls::new(self.certificates, self.tickets, &self.config.limits)?;
        let work = ControlWork {
            table: self.table.clone(),
            resolver: resolver.clone(),
            lookups,
            tls: tls_work,
            guards: guards.clone(),
        };
        let control = start_control(work, control_stopped)?;
        let (mut threads, mut cores) = (Vec::new(), FuturesUnordered::new());
        let log = self.log.as_ref().map(|(sender, _)| sender.clone());
        for (number, listeners) in self.listeners.into_iter().enumerate() {
            let own = CoreStart {
                config: Arc::clone(&self.config),
                table: self.table.clone(),
                resolver: resolver.clone(),
                log: log.clone(),
                guards: guards.clone(),
                tls: Arc::clone(&tls),
                listeners,
                orphans: self.orphans.clone(),
                stopped: stopped.clone(),
            };
            let (thread, ended) = start_core(number, own)?;
            threads.push(thread);
            cores.push(ended);
        }
        drop((log, resolver));
        let (mut failed, mut asked) = (false, Ending::No);
        while !cores.is_empty() {
            tokio::select! {
                Some(ended) = cores.next() => {
                    failed |= ended.is_err() || asked == Ending::No;
                    if failed {
                        asked = Ending::Stop;
                    }
                }
                changed = ending.changed(), if asked < Ending::Stop => {
                    let told = *ending.borrow_and_update();
                    asked = if changed.is_ok() { told.max(asked) } else { Ending::Stop };
                }
            }
            stop.send_if_modified(|told| std::mem::replace(told, asked) != asked);
        }
        drop(control_stop);
        threads.push(control);
        let mut log_writer = None;
        if let Some((sender, writer)) = self.log {
            drop(sender);
            log_writer = Some(writer);
        }
        for thread in threads.into_iter().chain(log_writer) {
            failed |= thread.join().is_err();
        }
        if failed { Err(RunError::CoreFailed) } else { Ok(()) }
    }
}

/// What the control thread does.
struct ControlWork {
    table: TableReader,
    resolver: Resolver,
    lookups: Lookups,
    tls: tls::Work,
    guards: Guards,
}

fn start_control(work: ControlWork, stopped: oneshot::Receiver<()>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("edge-control".into()).spawn(move || {
        let Some(runtime) = runtime() else { return };
        runtime.block_on(async {
            let ControlWork { table, resolver, lookups, tls, guards } = work;
            tokio::task::spawn_local(lookups.run());
            tokio::task::spawn_local(tls.run());
            tokio::task::spawn_local(hold::keep(table.clone()));
            tokio::task::spawn_local(probe::run(table, resolver));
            if let Some(overload) = guards.overload {
                tokio::task::spawn_local(overload.keep());
            }
            // An error means that the edge has let go of its end, which is the sign.
            let _ = stopped.await;
        });
    })
}

/// What a core's thread is started with.
struct CoreStart {
    config: Arc<Config>,
    table: TableReader,
    resolver: Resolver,
    log: Option<LogSender>,
    guards: Guards,
    tls: Arc<EdgeTls>,
    listeners: Vec<(StdListener, Speaks)>,
    orphans: Orphans,
    stopped: watch::Receiver<Ending>,
}

fn start_core(number: usize, own: CoreStart) -> io::Result<(JoinHandle<()>, oneshot::Receiver<()>)> {
    let (ended, end) = oneshot::channel();
    // Registered here, so that nobody believes a table acknowledged before this core has seen it.
    let acknowledger = own.table.register();
    let thread = std::thread::Builder::new().name(format!("edge-{number}")).spawn(move || {
        let Some(runtime) = runtime() else { return };
        runtime.block_on(run_core(own, acknowledger));
        // What has not ended by now is dropped here, before the end is told.
        drop(runtime);
        // The receiver is gone only if the edge itself was dropped.
        let _ = ended.send(());
    })?;
    Ok((thread, end))
}

fn runtime() -> Option<LocalRuntime> {
    match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => Some(runtime),
        Err(error) => {
            tracing::error!(%error, "cannot start a runtime");
            None
        }
    }
}

async fn run_core(own: CoreStart, acknowledger: peregrine_routing::Acknowledger) {
    let mut stopped = own.stopped;
    let core_log = own.log.map(|log| log.core());
    let tls = CoreTls::new(own.tls, &own.config.limits, own.table.clone());
    let core = Core::new(Arc::clone(&own.config), &own.table, own.resolver, core_log, own.guards, tls);
    let crew = Crew::new(Rc::clone(&core), Servers::new(&own.config.limits));
    let stop = Rc::new(Stop::new(own.orphans));
    tokio::task::spawn_local(Rc::clone(&core).follow_table(own.table, acknowledger));
    tokio::task::spawn_local(Rc::clone(&core).keep_time());
    let mut acceptors = Vec::new();
    for (listener, speaks) in own.listeners {
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => {
                let from = (listener, speaks);
                let accept = listen::accept(Rc::clone(&core), Rc::clone(&crew), from, Rc::clone(&stop));
                acceptors.push(tokio::task::spawn_local(accept));
            }
            Err(error) => tracing::error!(%error, "cannot listen"),
        }
    }
    let asked = asked(&mut stopped, Ending::HandOver).await;
    stop.ask(asked == Ending::HandOver);
    for acceptor in acceptors {
        drop(acceptor.await);
    }
    let empty = || core.conns.fewer_than(1);
    if asked == Ending::HandOver {
        core.hand_over();
        tokio::select! {
            () = empty() => {}
            _ = self::asked(&mut stopped, Ending::Stop) => {}
        }
    }
    core.drain();
    let deadline = Duration::from_millis(own.config.drain_timeout_ms);
    if tokio::time::timeout(deadline, empty()).await.is_err() {
        tracing::warn!(connections = core.conns.len(), "shutdown deadline: connections are broken off");
    }
    core.aborting.set(true);
    core.metrics.flush(0, (0, 0), 0);
}

/// Waits until that end or a harder one is asked for. The sender lives as long as the edge runs; when it is gone, that is
/// a shutdown too.
async fn asked(stopped: &mut watch::Receiver<Ending>, least: Ending) -> Ending {
    stopped.wait_for(|ending| *ending >= least).await.map_or(Ending::Stop, |ending| *ending)
}
