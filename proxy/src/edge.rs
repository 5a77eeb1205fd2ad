//! The edge as a whole: binding, one thread per core, one for control, and the end of them all.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use peregrine_routing::TableReader;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{oneshot, watch};

use crate::access_log::{self, LogError, LogSender};
use crate::config::{Config, ConfigError};
use crate::core::Core;
use crate::crew::Crew;
use crate::listen::{self, Stop};
use crate::probe;
use crate::resolve::{self, Lookups, Resolver};
use crate::serve::Servers;

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

/// An edge that is bound and not running yet: connections wait in the accept queue.
pub struct Edge {
    config: Arc<Config>,
    table: TableReader,
    /// For each core its listeners.
    listeners: Vec<Vec<StdListener>>,
    addrs: Vec<SocketAddr>,
    log: Option<(LogSender, JoinHandle<()>)>,
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
    /// Checks the configuration and binds its addresses, one socket per core and address.
    ///
    /// # Errors
    /// [`BindError`] says which address, and what to do.
    pub fn bind(config: Config, table: TableReader) -> Result<Self, BindError> {
        if config.http.is_empty() {
            return Err(ConfigError::NoAddress.into());
        }
        Self::with_listeners(config, Vec::new(), table)
    }

    /// As [`Edge::bind`], with sockets that were bound before (by a parent process, by a test). Cores
    /// share each of them.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn with_listeners(
        config: Config,
        ready: Vec<StdListener>,
        table: TableReader,
    ) -> Result<Self, BindError> {
        config.check()?;
        let cores = config.core_count();
        let mut listeners: Vec<Vec<StdListener>> = (0..cores).map(|_| Vec::new()).collect();
        let mut addrs = Vec::new();
        for address in &config.http {
            let failed = |source| BindError::Listen { address: *address, source };
            let mut address = *address;
            for core in &mut listeners {
                let listener = listen::bind(address).map_err(failed)?;
                // Port 0 is chosen once; the other cores join it.
                address = listener.local_addr().map_err(failed)?;
                core.push(listener);
            }
            addrs.push(address);
        }
        for listener in ready {
            let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
            let address = listener.local_addr().unwrap_or(unknown);
            let failed = |source| BindError::Listen { address, source };
            listener.set_nonblocking(true).map_err(failed)?;
            for core in &mut listeners {
                core.push(listener.try_clone().map_err(failed)?);
            }
            addrs.push(address);
        }
        let log = config.access_log.as_ref().map(access_log::start).transpose()?;
        Ok(Self { config: Arc::new(config), table, listeners, addrs, log })
    }

    /// The addresses that it listens on.
    #[must_use]
    pub fn addrs(&self) -> Vec<SocketAddr> {
        self.addrs.clone()
    }

    /// Serves until `shutdown` is ready, then stops accepting, lets requests finish for no longer than
    /// `drain_timeout_ms`, and returns when every thread has ended.
    ///
    /// # Errors
    /// [`RunError`] when a thread cannot be started, or ends by itself.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), RunError> {
        let (resolver, lookups) = resolve::resolver();
        let (stop, stopped) = watch::channel(false);
        let (control_stop, control_stopped) = oneshot::channel();
        let control = start_control(self.table.clone(), resolver.clone(), lookups, control_stopped)?;
        let mut cores = Vec::new();
        let log = self.log.as_ref().map(|(sender, _)| sender.clone());
        for (number, listeners) in self.listeners.into_iter().enumerate() {
            let own = CoreStart {
                config: Arc::clone(&self.config),
                table: self.table.clone(),
                resolver: resolver.clone(),
                log: log.clone(),
                listeners,
                stopped: stopped.clone(),
            };
            cores.push(start_core(number, own)?);
        }
        drop((log, resolver));
        let mut shutdown = pin!(shutdown);
        let mut failed = false;
        let mut threads = Vec::new();
        let mut asked = false;
        for (thread, mut ended) in cores {
            if !asked {
                tokio::select! {
                    () = &mut shutdown => {}
                    _ = &mut ended => failed = true,
                }
                asked = true;
                // Nobody is listening only if every core has failed.
                let _ = stop.send(true);
            }
            if !failed {
                failed = ended.await.is_err();
            }
            threads.push(thread);
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

fn start_control(
    table: TableReader,
    resolver: Resolver,
    lookups: Lookups,
    stopped: oneshot::Receiver<()>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("edge-control".into()).spawn(move || {
        let Some(runtime) = runtime() else { return };
        runtime.block_on(async {
            tokio::task::spawn_local(lookups.run());
            tokio::task::spawn_local(probe::run(table, resolver));
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
    listeners: Vec<StdListener>,
    stopped: watch::Receiver<bool>,
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
    let core = Core::new(Arc::clone(&own.config), &own.table, own.resolver, core_log);
    let crew = Crew::new(Rc::clone(&core), Servers::new(&own.config.limits));
    let stop = Rc::new(Stop::default());
    tokio::task::spawn_local(Rc::clone(&core).follow_table(own.table, acknowledger));
    tokio::task::spawn_local(Rc::clone(&core).keep_time());
    let mut acceptors = Vec::new();
    for listener in own.listeners {
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => {
                let accept = listen::accept(Rc::clone(&core), Rc::clone(&crew), listener, Rc::clone(&stop));
                acceptors.push(tokio::task::spawn_local(accept));
            }
            Err(error) => tracing::error!(%error, "cannot listen"),
        }
    }
    // The sender lives as long as the edge runs; when it is gone, that is a shutdown too.
    drop(stopped.wait_for(|stopped| *stopped).await);
    stop.ask();
    for acceptor in acceptors {
        drop(acceptor.await);
    }
    core.drain();
    let deadline = Duration::from_millis(own.config.drain_timeout_ms);
    let empty = async {
        while core.conns.len() > 0 {
            core.conns.ended.notified().await;
        }
    };
    if tokio::time::timeout(deadline, empty).await.is_err() {
        tracing::warn!(connections = core.conns.len(), "shutdown deadline: connections are broken off");
    }
    core.aborting.set(true);
    core.metrics.flush(0, 0);
}
