//! The engine's side: a listener, a session for each edge that is connected, and the leases of those that are not.
//!
//! ```text
//!   accept ─► TLS ─► greeting ─┬─ join: token ─► certificate, and the end
//!                              └─ attach: certificate ─► session ─► RemoteEdge
//!   leases: an edge that is silent for longer than its lease is given up: its RemoteEdge is dropped
//!           so is one that is heard of and does not use the table for PATIENCE_LEASES of them
//! ```
//!
//! One that was given up because it did not use a table is told all the same when it is back, and waited for again when it
//! uses the newest: whatever an edge does, a publication ends.
//!
//! An edge that was there when the engine last ran is waited for from the start, as if it were connected: until it
//! comes back or its lease ends, nothing is taken as acknowledged by it or as empty of its requests.

mod session;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use peregrine_routing::{EdgeId, RemoteEdge, TableReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use crate::authority::{Authority, AuthorityError};
use crate::registry::{Admitted, EdgeRecord, Invite, Registry, RegistryError, now};
use crate::secrets::Secrets;
use crate::{BEATS_PER_LEASE, DEFAULT_LEASE_MS, tls};

/// Longest time for TLS and the greeting.
const GREETING_TIMEOUT_MS: u64 = 5_000;
/// Connections at a time, of edges and of whoever else finds the port.
const MAX_CONNECTIONS: usize = 1_024;
/// Leases for which an edge that is heard of is waited for to use a table. One that takes longer, or says that it cannot, is
/// as good as one that is silent: it serves the table that it has.
pub const PATIENCE_LEASES: u32 = 3;
/// Processes of an edge that are remembered because they did not use a table in time; they come back within seconds.
const MAX_STALLED: usize = 16;
/// Between two looks at the leases.
const LEASE_LOOK_MS: u64 = 50;
/// A look that is later than this means that this process stood still: nobody was listening to the edges meanwhile.
const STOOD_STILL_MS: u64 = 500;
/// Pause after a failed accept (out of file descriptors): the next one would fail at once too.
const ACCEPT_PAUSE_MS: u64 = 100;

/// What the link has to be told.
#[derive(Clone)]
pub struct LinkConfig {
    /// Where edges connect.
    pub listen: SocketAddr,
    /// How long an edge that is not heard of is waited for.
    pub lease_ms: u32,
    /// Fencing epoch of this engine: edges refuse a lower one than they have heard.
    pub epoch: u64,
    /// The clock that the engine reads ejections in.
    pub clock: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl LinkConfig {
    /// With the default lease.
    #[must_use]
    pub fn new(listen: SocketAddr, epoch: u64, clock: Arc<dyn Fn() -> u64 + Send + Sync>) -> Self {
        Self { listen, lease_ms: DEFAULT_LEASE_MS, epoch, clock }
    }
}

/// Why the link does not start.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The registry of edges.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up for edges: {0}")]
    Tls(#[from] rustls::Error),
    /// The address.
    #[error("cannot listen for edges on {address}: {source}")]
    Listen {
        /// Address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// How an edge stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeState {
    /// It is connected.
    Connected,
    /// It is not connected, and is waited for until its lease ends.
    Waited,
    /// It was not heard of until its lease ended.
    Lost,
    /// It ended in order, or has never been there.
    Away,
}

/// An edge as people see it.
#[derive(Clone, Debug)]
pub struct EdgeView {
    /// Name.
    pub name: String,
    /// How it stands.
    pub state: EdgeState,
    /// Where it is connected from.
    pub address: Option<SocketAddr>,
    /// Cores that serve.
    pub cores: u32,
    /// How long it is still waited for, in milliseconds, if it is waited for or connected.
    pub lease_ms: Option<u64>,
    /// Version of the table that it uses.
    pub table_version: u64,
    /// Version of the newest table.
    pub newest_version: u64,
    /// The table that it uses is on its disk.
    pub saved: bool,
    /// Why it could not use the newest table.
    pub problem: Option<String>,
    /// When it was last heard of, in Unix milliseconds; 0 is never.
    pub seen_at: u64,
    /// When it joined, in Unix milliseconds.
    pub joined_at: u64,
    /// Processes of it that have handed over and still end what they have.
    pub ending: usize,
}

/// The link, opened and listening; [`Link::run`] does the work.
pub struct Link {
    shared: Arc<Shared>,
    listener: TcpListener,
    address: SocketAddr,
    acceptor: TlsAcceptor,
}

struct Shared {
    config: LinkConfig,
    authority: Authority,
    registry: Registry,
    reader: TableReader,
    /// Services that edges keep as they have them.
    kept: OnceLock<Vec<String>>,
    /// What edges are handed besides the table.
    secrets: OnceLock<Arc<dyn Secrets>>,
    edges: Mutex<HashMap<String, Edge>>,
    /// Held while a record is written or removed, and never taken by whoever holds `edges`: what is written is what is
    /// known at that moment, also after a removal, and no edge waits for the disk of another.
    writing: Mutex<()>,
}

/// What is known of an edge while this process runs.
struct Edge {
    record: EdgeRecord,
    /// Its processes that take part: connected, or with a lease that has not ended. Nearly always it is one; while one takes
    /// over from another, both are waited for, and what is inside of the one before is not lost. The last came last.
    processes: Vec<Process>,
    lost: bool,
    /// Those that were given up because they did not use a table, the last one last.
    stalled: Vec<EdgeId>,
}

/// A process of an edge.
struct Process {
    remote: Arc<RemoteEdge>,
    cores: u32,
    seen: Instant,
    /// Its session, if it is connected: ended when it is replaced or removed.
    session: Option<(SocketAddr, Arc<Notify>)>,
    saved: bool,
    /// The version that it could not use, and why.
    problem: Option<(u64, String)>,
    /// A version that it has to use, and since when.
    owes: Option<(u64, Instant)>,
}

impl Process {
    fn new(remote: RemoteEdge, cores: u32) -> Self {
        let (remote, seen) = (Arc::new(remote), Instant::now());
        Self { remote, cores, seen, session: None, saved: false, problem: None, owes: None }
    }

    /// How long it has owed the use of a table by now. A new connection is no new beginning.
    fn look_at_debt(&mut self, newest: u64) -> Duration {
        let used = self.remote.acknowledged();
        // Who is not waited for owes nothing.
        if !self.remote.is_waited() || used >= newest {
            self.owes = None;
            return Duration::ZERO;
        }
        self.owes.take_if(|(version, _)| used >= *version);
        let (_, since) = self.owes.get_or_insert_with(|| (newest, Instant::now()));
        since.elapsed()
    }

    /// It could not be heard meanwhile.
    fn was_not_heard(&mut self, deaf: Duration) {
        self.seen += deaf;
        if let Some((_, since)) = &mut self.owes {
            *since += deaf;
        }
    }

    fn end_session(&mut self) {
        if let Some((_, end)) = self.session.take() {
            end.notify_one();
        }
    }
}

impl Edge {
    fn new(record: EdgeRecord) -> Self {
        Self { record, processes: Vec::new(), lost: false, stalled: Vec::new() }
    }

    /// The process that people mean by the edge: the last one that is connected, or else the last one.
    fn main(&self) -> Option<&Process> {
        let connected = self.processes.iter().rfind(|process| process.session.is_some());
        connected.or(self.processes.last())
    }

    fn state(&self) -> EdgeState {
        match self.main() {
            Some(process) if process.session.is_some() => EdgeState::Connected,
            Some(_) => EdgeState::Waited,
            None if self.lost => EdgeState::Lost,
            None => EdgeState::Away,
        }
    }

    fn note_stalled(&mut self, id: EdgeId) {
        self.stalled.push(id);
        let too_many = self.stalled.len().saturating_sub(MAX_STALLED);
        self.stalled.drain(..too_many);
    }

    /// Has the record say which processes take part.
    fn note_processes(&mut self) {
        let Some((last, beside)) = self.processes.split_last() else {
            self.record.beside.clear();
            self.record.away = true;
            return;
        };
        (self.record.incarnation, self.record.cores) = (Some(last.remote.id().0), last.cores);
        self.record.beside = beside.iter().map(|process| (process.remote.id().0, process.cores)).collect();
        self.record.away = false;
    }
}

impl Link {
    /// Opens the authority and the registry in a folder, has every edge that was there last waited for, and listens.
    /// Call it before anything is published that an edge has to acknowledge.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn open(config: LinkConfig, folder: &Path, reader: TableReader) -> Result<Self, LinkError> {
        let authority = Authority::open(folder)?;
        let registry = Registry::open(folder, config.epoch)?;
        let tls = tls::server(authority.certificate(), authority.engine()?)?;
        let failed = |source| LinkError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let mut edges = HashMap::new();
        for (name, record) in registry.edges()? {
            let mut edge = Edge::new(record);
            let last = edge.record.incarnation.map(|incarnation| (incarnation, edge.record.cores));
            let known = edge.record.beside.iter().copied().chain(last).filter(|_| !edge.record.away);
            for (incarnation, cores) in known.collect::<Vec<_>>() {
                let remote = reader.join(EdgeId(incarnation), &name.as_str().into(), cores as usize);
                edge.processes.push(Process::new(remote, cores));
            }
            edges.insert(name, edge);
        }
        let (edges, writing) = (Mutex::new(edges), Mutex::new(()));
        let (kept, secrets) = (OnceLock::new(), OnceLock::new());
        let shared = Shared { config, authority, registry, reader, kept, secrets, edges, writing };
        Ok(Self { shared: Arc::new(shared), listener, address, acceptor: TlsAcceptor::from(tls) })
    }

    /// Has edges keep these services as they have them, although they are in no table of this engine: it cannot read what
    /// they are to be. Said once, before [`Link::run`].
    #[must_use]
    pub fn keeping(self, services: Vec<String>) -> Self {
        self.shared.kept.get_or_init(|| services);
        self
    }

    /// What edges are handed besides the table; without it nothing. Said once, before [`Link::run`].
    #[must_use]
    pub fn with_secrets(self, secrets: Arc<dyn Secrets>) -> Self {
        self.shared.secrets.get_or_init(|| secrets);
        self
    }

    /// Where it listens.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.address
    }

    /// The way to ask it.
    #[must_use]
    pub fn handle(&self) -> LinkHandle {
        LinkHandle { shared: Arc::clone(&self.shared) }
    }

    /// Serves edges until `shutdown`. Edges go on with their tables after it.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) {
        let Self { shared, listener, acceptor, .. } = self;
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut sessions = JoinSet::new();
        sessions.spawn(keep_leases(Arc::clone(&shared)));
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            while sessions.try_join_next().is_some() {} // those that have ended
            let accepted = tokio::select! {
                () = &mut shutdown => break,
                accepted = accept(&listener, &places) => accepted,
            };
            let (stream, peer, place) = accepted;
            let (shared, acceptor) = (Arc::clone(&shared), acceptor.clone());
            sessions.spawn(async move {
                session::serve(&shared, &acceptor, stream, peer).await;
                drop(place);
            });
        }
        // Dropping the tasks closes the connections.
        sessions.shutdown().await;
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit) {
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(places).acquire_owned().await else { std::future::pending().await };
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, place),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of an edge");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

/// Gives up edges whose lease has ended.
async fn keep_leases(shared: Arc<Shared>) {
    let look = Duration::from_millis(LEASE_LOOK_MS);
    let mut last = Instant::now();
    loop {
        tokio::time::sleep(look).await;
        let late = last.elapsed().saturating_sub(look);
        last = Instant::now();
        shared.look_at_leases(if late > Duration::from_millis(STOOD_STILL_MS) {
            late
        } else {
            Duration::ZERO
        });
    }
}

impl Shared {
    fn edges(&self) -> MutexGuard<'_, HashMap<String, Edge>> {
        self.edges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(u64::from(self.config.lease_ms))
    }

    fn beat(&self) -> Duration {
        self.lease() / BEATS_PER_LEASE
    }

    /// `deaf` is how long this process did not listen: that is no silence of theirs.
    fn look_at_leases(&self, deaf: Duration) {
        let (lease, newest, mut given_up) = (self.lease(), self.reader.load().version(), Vec::new());
        let patience = lease * PATIENCE_LEASES;
        for (name, edge) in self.edges().iter_mut().filter(|(_, edge)| !edge.processes.is_empty()) {
            edge.processes.iter_mut().for_each(|process| process.was_not_heard(deaf));
            let is_silent = |process: &mut Process| process.seen.elapsed() >= lease;
            let mut late: Vec<Process> = edge.processes.extract_if(.., is_silent).collect();
            let is_stalled = |process: &mut Process| process.look_at_debt(newest) >= patience;
            let stalled: Vec<Process> = edge.processes.extract_if(.., is_stalled).collect();
            if late.is_empty() && stalled.is_empty() {
                continue;
            }
            if !late.is_empty() {
                tracing::warn!(edge = %name, lease_ms = self.config.lease_ms, "an edge was not heard of until its lease ended: it is not waited for any more");
            }
            for process in stalled {
                tracing::error!(edge = %name, patience_ms = patience.as_millis(), uses = process.remote.acknowledged(), newest, "an edge is heard of and does not use the newest table: it is not waited for until it does");
                edge.note_stalled(process.remote.id());
                late.push(process);
            }
            late.iter_mut().for_each(Process::end_session);
            edge.lost = edge.processes.is_empty();
            edge.note_processes();
            given_up.push((name.clone(), late));
        }
        for (name, late) in given_up {
            self.keep(&name);
            // Its session may hold it for a moment longer; the last one who lets go of it gives it up.
            drop(late);
        }
    }

    /// Writes down how an edge stands now, unless it was removed. Without it the edge is waited for, or not, as it was
    /// before: told, no more. False if the edges are another engine's by now.
    fn keep(&self, name: &str) -> bool {
        let _writing = self.writing();
        let Some(record) = self.edges().get(name).map(|edge| edge.record.clone()) else { return true };
        let kept = self.registry.put(name, &record);
        if let Err(error) = &kept {
            tracing::error!(edge = name, %error, "how an edge stands cannot be written down");
        }
        !matches!(kept, Err(RegistryError::Replaced { .. }))
    }

    /// Lets an edge in that has a token: its name and its certificate. Whoever had that name before is shut out.
    fn admit(&self, secret: &[u8], public_key: Vec<u8>) -> Result<(String, Vec<u8>), RegistryError> {
        let _writing = self.writing();
        let Admitted { name, certificate, record } =
            self.registry.admit(&self.authority, secret, public_key)?;
        let replaced = self.edges().insert(name.clone(), Edge::new(record));
        replaced.into_iter().flat_map(|edge| edge.processes).for_each(|mut process| process.end_session());
        Ok((name, certificate))
    }
}

/// The way to ask the link. Cheap to clone.
#[derive(Clone)]
pub struct LinkHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for LinkHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkHandle").finish_non_exhaustive()
    }
}

impl LinkHandle {
    /// Makes a token with which an edge of this name can join, once, within `lifetime_ms`. An edge of that name that
    /// is there already goes on until the new one joins.
    ///
    /// # Errors
    /// The name is no label of a host name, or the data folder cannot be written.
    pub fn invite(&self, name: &str, lifetime_ms: u64) -> Result<Invite, RegistryError> {
        self.shared.registry.invite(&self.shared.authority, name, lifetime_ms)
    }

    /// Shuts an edge out. It goes on serving its last table until it is stopped, and is heard no more: a drain does not
    /// wait for who is inside of it.
    ///
    /// # Errors
    /// There is no such edge, or the data folder cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), RegistryError> {
        let _writing = self.shared.writing();
        self.shared.registry.remove(name)?;
        let gone = self.shared.edges().remove(name);
        gone.into_iter().flat_map(|edge| edge.processes).for_each(|mut process| process.end_session());
        Ok(())
    }

    /// Every edge, by name.
    #[must_use]
    pub fn edges(&self) -> Vec<EdgeView> {
        let newest_version = self.shared.reader.load().version();
        let lease = self.shared.lease();
        let edges = self.shared.edges();
        let view = |(name, edge): (&String, &Edge)| {
            let main = edge.main();
            let is_connected = |process: &&Process| process.session.is_some();
            EdgeView {
                name: name.clone(),
                state: edge.state(),
                address: main.and_then(|process| process.session.as_ref()).map(|(address, _)| *address),
                cores: main.map_or(edge.record.cores, |process| process.cores),
                lease_ms: main.map(|process| {
                    u64::try_from(lease.saturating_sub(process.seen.elapsed()).as_millis())
                        .unwrap_or(u64::MAX)
                }),
                table_version: main.map_or(0, |process| process.remote.acknowledged()),
                newest_version,
                saved: main.is_some_and(|process| process.saved),
                problem: main.and_then(|process| process.problem.as_ref()).map(|(_, why)| why.clone()),
                seen_at: match main.filter(is_connected) {
                    Some(process) => now().saturating_sub(process.seen.elapsed().as_millis() as u64),
                    None => edge.record.seen_at,
                },
                joined_at: edge.record.joined_at,
                ending: edge.processes.len().saturating_sub(1),
            }
        };
        let mut views: Vec<_> = edges.iter().map(view).collect();
        views.sort_by(|one, other| one.name.cmp(&other.name));
        views
    }
}
