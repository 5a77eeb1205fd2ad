//! The engine's side: a listener, a session for each edge that is connected, and the leases of those that are not.
//!
//! ```text
//!   accept ─► TLS ─► greeting ─┬─ join: token ─► certificate, and the end
//!                              └─ attach: certificate ─► session ─► RemoteEdge
//!   leases: an edge that is silent for longer than its lease is given up: its RemoteEdge is dropped
//! ```
//!
//! An edge that was there when the engine last ran is waited for from the start, as if it were connected: until it
//! comes back or its lease ends, nothing is taken as acknowledged by it or as empty of its requests.

mod session;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use peregrine_routing::{EdgeId, RemoteEdge, TableReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use crate::authority::{Authority, AuthorityError};
use crate::registry::{EdgeRecord, Invite, Registry, RegistryError, now};
use crate::{BEATS_PER_LEASE, DEFAULT_LEASE_MS, tls};

/// Longest time for TLS and the greeting.
const GREETING_TIMEOUT_MS: u64 = 5_000;
/// Connections at a time, of edges and of whoever else finds the port.
const MAX_CONNECTIONS: usize = 1_024;
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
    edges: Mutex<HashMap<String, Edge>>,
}

/// What is known of an edge while this process runs.
struct Edge {
    record: EdgeRecord,
    /// It takes part: it is connected, or its lease has not ended.
    remote: Option<Arc<RemoteEdge>>,
    seen: Instant,
    /// Its session, if it is connected: ended when it is replaced or removed.
    session: Option<(SocketAddr, Arc<Notify>)>,
    lost: bool,
    saved: bool,
    problem: Option<String>,
}

impl Edge {
    fn new(record: EdgeRecord) -> Self {
        Self {
            record,
            remote: None,
            seen: Instant::now(),
            session: None,
            lost: false,
            saved: false,
            problem: None,
        }
    }

    fn state(&self) -> EdgeState {
        match (&self.session, &self.remote) {
            (Some(_), _) => EdgeState::Connected,
            (None, Some(_)) => EdgeState::Waited,
            (None, None) if self.lost => EdgeState::Lost,
            (None, None) => EdgeState::Away,
        }
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
        let registry = Registry::open(folder)?;
        let tls = tls::server(authority.certificate(), authority.engine()?)?;
        let failed = |source| LinkError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let mut edges = HashMap::new();
        for (name, record) in registry.edges()? {
            let mut edge = Edge::new(record);
            if let Some(incarnation) = edge.record.incarnation.filter(|_| !edge.record.away) {
                let cores = edge.record.cores as usize;
                let remote = reader.join(EdgeId(incarnation), &name.as_str().into(), cores);
                edge.remote = Some(Arc::new(remote));
            }
            edges.insert(name, edge);
        }
        let shared = Shared { config, authority, registry, reader, edges: Mutex::new(edges) };
        Ok(Self { shared: Arc::new(shared), listener, address, acceptor: TlsAcceptor::from(tls) })
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

    fn lease(&self) -> Duration {
        Duration::from_millis(u64::from(self.config.lease_ms))
    }

    fn beat(&self) -> Duration {
        self.lease() / BEATS_PER_LEASE
    }

    /// `deaf` is how long this process did not listen: that is no silence of theirs.
    fn look_at_leases(&self, deaf: Duration) {
        let mut given_up = Vec::new();
        for (name, edge) in self.edges().iter_mut().filter(|(_, edge)| edge.remote.is_some()) {
            edge.seen += deaf;
            if edge.seen.elapsed() < self.lease() {
                continue;
            }
            tracing::warn!(edge = %name, lease_ms = self.config.lease_ms, "an edge was not heard of until its lease ended: it is not waited for any more");
            edge.lost = true;
            edge.record.away = true;
            if let Some((_, end)) = edge.session.take() {
                end.notify_one();
            }
            given_up.push((name.clone(), edge.record.clone(), edge.remote.take()));
        }
        for (name, record, remote) in given_up {
            self.keep(&name, &record);
            // Its session may hold it for a moment longer; the last one who lets go of it gives it up.
            drop(remote);
        }
    }

    /// Writes an edge's record down. Without it the edge is waited for, or not, as it was before: told, no more.
    fn keep(&self, name: &str, record: &EdgeRecord) {
        if let Err(error) = self.registry.put(name, record) {
            tracing::error!(edge = name, %error, "how an edge stands cannot be written down");
        }
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

    /// Shuts an edge out. It goes on serving its last table until it is stopped, and is heard no more.
    ///
    /// # Errors
    /// There is no such edge, or the data folder cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), RegistryError> {
        self.shared.registry.remove(name)?;
        let gone = self.shared.edges().remove(name);
        if let Some((_, end)) = gone.and_then(|edge| edge.session) {
            end.notify_one();
        }
        Ok(())
    }

    /// Every edge, by name.
    #[must_use]
    pub fn edges(&self) -> Vec<EdgeView> {
        let newest_version = self.shared.reader.load().version();
        let lease = self.shared.lease();
        let edges = self.shared.edges();
        let view = |(name, edge): (&String, &Edge)| EdgeView {
            name: name.clone(),
            state: edge.state(),
            address: edge.session.as_ref().map(|(address, _)| *address),
            cores: edge.record.cores,
            lease_ms: edge.remote.as_ref().map(|_| {
                u64::try_from(lease.saturating_sub(edge.seen.elapsed()).as_millis()).unwrap_or(u64::MAX)
            }),
            table_version: edge.remote.as_ref().map_or(0, |remote| remote.acknowledged()),
            newest_version,
            saved: edge.saved,
            problem: edge.problem.clone(),
            seen_at: match edge.session {
                Some(_) => now().saturating_sub(edge.seen.elapsed().as_millis() as u64),
                None => edge.record.seen_at,
            },
            joined_at: edge.record.joined_at,
        };
        let mut views: Vec<_> = edges.iter().map(view).collect();
        views.sort_by(|one, other| one.name.cmp(&other.name));
        views
    }
}
