//! The edge's side: it owns the table of its process, fed by an engine or, without one, by its own disk.
//!
//! ```text
//!   start: disk ─► table ─► serve                      (an edge that has a table needs nobody)
//!   then, for ever:  connect ─► attach ─► known counts up ─► whole table down ─► differences down, counts up
//!                        ▲                                                            │
//!                        └────────────── the engine is silent or gone ◄───────────────┘
//! ```
//!
//! A table is used, then on the disk, then acknowledged: what the engine takes as acknowledged is what this edge
//! would start from, unless it says that it is not on the disk: one that fails or hangs keeps nobody waiting for long. The
//! engine's return changes nothing by itself: what is the same in both tables is not touched.

mod identity;
mod place;
mod secrets;
mod session;
mod status;
mod table;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peregrine_routing::{TableError, TableReader};
use tokio::sync::{oneshot, watch};

use self::identity::Identity;
pub use self::identity::{Joined, join};
pub use self::place::{Before, PlaceHandle};
use self::place::{Disk, Place};
use self::secrets::Asked;
pub use self::secrets::{NotGiven, SecretsHandle};
pub use self::status::LinkStatus;
use self::table::EdgeTable;
use crate::authority::AuthorityError;
use crate::files;
use crate::saved::{self, Saved};
use crate::wire::FrameError;

/// Pause after a connection that an engine had taken. Each attempt that fails doubles it, up to [`MAX_PAUSE_MS`].
const MIN_PAUSE_MS: u64 = 100;
/// Longest pause between two attempts: an engine that is back is found soon after.
const MAX_PAUSE_MS: u64 = 2_000;
/// Longest wait at the end for the engine to take the last report in.
const FAREWELL_MS: u64 = 2_000;
/// Longest wait for the disk before a table is acknowledged without it; a lease, if that is shorter.
const SAVE_PATIENCE_MS: u64 = 5_000;
const LOCK_FILE: &str = "edge.lock";

/// Why an edge does not start, or cannot join.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// Another process has the data folder.
    #[error("the data folder {0} is in use by another edge")]
    Locked(PathBuf),
    /// The process that this one takes over from has another data folder.
    #[error("{0} is not the data folder of the edge that this one takes over from")]
    OtherFolder(PathBuf),
    /// It has not joined.
    #[error("this edge has not joined an installation: {0} has no identity")]
    NotJoined(PathBuf),
    /// It has joined already.
    #[error("this edge has joined already: {0} has an identity")]
    HasJoined(PathBuf),
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The saved table cannot be used, which the routing has to say.
    #[error("the saved table cannot be used: {0}")]
    Table(#[from] TableError),
    /// A key or certificate.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No engine at that address.
    #[error("cannot reach the engine at {address}: {source}")]
    Unreachable {
        /// Address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The stream broke.
    #[error("the engine at {address}: {source}")]
    Stream {
        /// Address.
        address: String,
        /// Why.
        source: FrameError,
    },
    /// The engine said no.
    #[error("the engine refuses: {message}")]
    Refused {
        /// A stable code.
        code: String,
        /// What and why.
        message: String,
    },
    /// The address of an engine is none.
    #[error("{0:?} is no address of an engine: write HOST:PORT")]
    BadAddress(String),
}

/// The link of an edge. [`EdgeLink::run`] keeps it.
pub struct EdgeLink {
    identity: Identity,
    folder: PathBuf,
    table: EdgeTable,
    reader: TableReader,
    ready: watch::Sender<bool>,
    status: watch::Sender<LinkStatus>,
    cores: u32,
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Longest wait at the end: [`FAREWELL_MS`].
    farewell: Duration,
    /// Longest wait for the disk: [`SAVE_PATIENCE_MS`].
    save_patience: Duration,
    /// Its lock is given back when the process ends, however it ends, and no other process has taken over.
    place: PlaceHandle,
    /// An epoch was heard that is not on the disk, because that is another process's.
    epoch_unsaved: bool,
    /// It was begun, and the disk hangs.
    writing_epoch: Option<tokio::task::JoinHandle<Option<Result<(), EdgeError>>>>,
    secrets: SecretsHandle,
    asked: Asked,
}

impl std::fmt::Debug for EdgeLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EdgeLink").field("name", &self.identity.name).finish_non_exhaustive()
    }
}

impl EdgeLink {
    /// Opens the data folder of an edge that has joined, and fills the table from it. `engines` replaces the
    /// addresses that it joined with, unless it is empty. `clock` is the edge's own, in milliseconds.
    ///
    /// # Errors
    /// [`EdgeError`]. A saved table that is damaged is no error: see [`EdgeLink::ready`].
    pub fn open(
        folder: &Path,
        engines: &[String],
        cores: u32,
        clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    ) -> Result<Self, EdgeError> {
        let before = None;
        Self::take_over(folder, engines, cores, clock, before)
    }

    /// As [`EdgeLink::open`], after the process `before` of the same edge, which goes on for now: the folder is locked for
    /// both, and its files are written by that one until [`PlaceHandle::take_disk`].
    ///
    /// # Errors
    /// [`EdgeError`].
    pub fn take_over(
        folder: &Path,
        engines: &[String],
        cores: u32,
        clock: Arc<dyn Fn() -> u64 + Send + Sync>,
        before: Option<Before>,
    ) -> Result<Self, EdgeError> {
        let failed = |source| EdgeError::File { path: folder.to_owned(), source };
        let mut identity = Identity::read(folder)?;
        if !engines.is_empty() {
            identity.engines = engines.to_vec();
        }
        let disk = Arc::new(Disk::new(before.is_none()));
        let (lock, beside) = match before {
            Some(before) => (same_lock(folder, before.lock)?, before.incarnations),
            None => (lock(folder)?, Vec::new()),
        };
        let mut incarnation = [0; 8];
        getrandom::fill(&mut incarnation).map_err(|error| failed(io::Error::other(error.to_string())))?;
        let (writer, reader) = peregrine_routing::table();
        let heard = identity::read_epoch(folder)?;
        let mut table = EdgeTable::new(writer, folder.to_owned(), heard, Arc::clone(&disk));
        let found = match saved::load(folder) {
            Saved::Last(saved) => Some(saved),
            Saved::Before(saved, why) => {
                tracing::error!(%why, "the last table on the disk cannot be used; the one before it is");
                Some(saved)
            }
            Saved::Damaged(why) => {
                tracing::error!(%why, "no table on the disk can be used: nothing is served until an engine sends one");
                None
            }
            Saved::Never => None,
        };
        let has_table = found.is_some();
        if let Some(saved) = found {
            table.restore(saved)?;
        }
        let status = watch::Sender::new(LinkStatus::away(table.epoch(), has_table));
        let (secrets, asked) = secrets::channel(status.subscribe());
        let incarnation = u64::from_le_bytes(incarnation);
        let place = Arc::new(Mutex::new(Place { beside, handed_over: false }));
        let place = PlaceHandle { incarnation, place, disk, lock: Arc::new(lock) };
        Ok(Self {
            identity,
            status,
            folder: folder.to_owned(),
            table,
            reader,
            ready: watch::Sender::new(has_table),
            cores,
            clock,
            farewell: Duration::from_millis(FAREWELL_MS),
            save_patience: Duration::from_millis(SAVE_PATIENCE_MS),
            place,
            epoch_unsaved: false,
            writing_epoch: None,
            secrets,
            asked,
        })
    }

    /// The table, for the edge of this process.
    #[must_use]
    pub fn reader(&self) -> TableReader {
        self.reader.clone()
    }

    /// Turns true when there is a table to serve from: at once if one was on the disk. Before that, listening would
    /// answer everybody that nothing is here.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// How the link stands, from now on.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    /// The way to ask an engine for what the table names.
    #[must_use]
    pub fn secrets(&self) -> SecretsHandle {
        self.secrets.clone()
    }

    /// The place of this process among those of the same edge.
    #[must_use]
    pub fn place(&self) -> PlaceHandle {
        self.place.clone()
    }

    /// Its name in the installation.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    /// The engines that it looks for.
    #[must_use]
    pub fn engines(&self) -> &[String] {
        &self.identity.engines
    }

    /// Keeps the link until `shutdown`, then gives the last report.
    pub async fn run(mut self, shutdown: impl Future<Output = ()> + Send) {
        let mut shutdown = std::pin::pin!(shutdown);
        let mut pause_ms = MIN_PAUSE_MS;
        for engine in self.identity.engines.clone().iter().cycle() {
            let mut leaving = false;
            self.save_what_is_left().await;
            let ended = self.talk(engine, shutdown.as_mut(), &mut leaving).await;
            if leaving {
                return;
            }
            let (attached, why) = ended;
            pause_ms = if attached { MIN_PAUSE_MS } else { (pause_ms * 2).min(MAX_PAUSE_MS) };
            tracing::warn!(%engine, %why, "no engine: this edge serves the table that it has");
            tokio::select! {
                () = &mut shutdown => return,
                () = tokio::time::sleep(Duration::from_millis(pause_ms)) => {}
            }
        }
    }

    /// One connection, to its end; whether the engine took it, and why it ended.
    async fn talk(
        &mut self,
        engine: &str,
        mut shutdown: std::pin::Pin<&mut (impl Future<Output = ()> + Send)>,
        leaving: &mut bool,
    ) -> (bool, EdgeError) {
        let place = self.place.place().clone();
        let attach = self.table.attach(self.place.incarnation(), self.cores, &place);
        let connected = tokio::select! {
            () = &mut shutdown => {
                *leaving = true;
                return (false, EdgeError::BadAddress(engine.to_owned()));
            }
            connected = identity::attach(&self.identity, engine, &attach) => connected,
        };
        let (stream, epoch, lease_ms) = match connected {
            Ok(connected) => connected,
            Err(error) => return (false, error),
        };
        if let Err(error) = self.accept_epoch(epoch).await {
            return (false, error);
        }
        tracing::info!(%engine, epoch, "connected to the engine");
        self.status.send_modify(|status| status.connected(engine, epoch));
        let lease = Duration::from_millis(u64::from(lease_ms));
        let told = session::Told { ready: &self.ready, status: &self.status, ours: self.place.disk.watch() };
        let patience = session::Patience { lease, save: self.save_patience.min(lease) };
        let clock = Arc::clone(&self.clock);
        let mut session =
            session::Session::new(&mut self.table, &mut self.asked, stream, patience, told, clock);
        let (ask, asked) = oneshot::channel();
        let mut talking = Box::pin(session.run(asked));
        let ended = tokio::select! {
            ended = &mut talking => ended,
            () = shutdown => {
                *leaving = true;
                // It ends its frame first: what comes after half of one is not understood.
                drop(ask);
                match tokio::time::timeout(self.farewell, &mut talking).await {
                    Ok(ended) => ended,
                    Err(_) => Err(FrameError::from(io::Error::from(io::ErrorKind::TimedOut))),
                }
            }
        };
        drop(talking);
        drop(session);
        self.status.send_modify(LinkStatus::lost);
        let source = ended.err().unwrap_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof).into());
        (true, EdgeError::Stream { address: engine.to_owned(), source })
    }

    /// An engine of a lower epoch than this edge has heard was replaced: it is not listened to. A higher one is
    /// remembered, on the disk, before anything of it is used.
    async fn accept_epoch(&mut self, epoch: u64) -> Result<(), EdgeError> {
        let heard = self.table.epoch();
        if epoch < heard {
            return Err(EdgeError::Refused {
                code: "engine.outdated".to_owned(),
                message: format!("it is of epoch {epoch}, and this edge has heard one of epoch {heard}"),
            });
        }
        if epoch > heard {
            self.write_epoch(epoch).await?;
            self.table.set_epoch(epoch);
        }
        Ok(())
    }

    /// Writes it down, if the disk is ours and does not hang; otherwise later.
    async fn write_epoch(&mut self, epoch: u64) -> Result<(), EdgeError> {
        self.epoch_unsaved = true;
        if self.writing_epoch.as_ref().is_some_and(|writing| !writing.is_finished()) {
            return Ok(());
        }
        let (disk, folder) = (Arc::clone(&self.place.disk), self.folder.clone());
        let mut writing = tokio::task::spawn_blocking(move || {
            let turn = disk.ours();
            turn.map(|_turn| identity::write_epoch(&folder, epoch))
        });
        match tokio::time::timeout(self.save_patience, &mut writing).await {
            Ok(Ok(Some(written))) => {
                self.epoch_unsaved = false;
                written
            }
            Ok(_) => Ok(()),
            Err(_) => {
                tracing::error!(epoch, "the disk does not take the epoch of the engine: it goes on without");
                self.writing_epoch = Some(writing);
                Ok(())
            }
        }
    }

    /// What was heard while the disk was another process's, if it is not any more.
    async fn save_what_is_left(&mut self) {
        if self.epoch_unsaved
            && let Err(error) = self.write_epoch(self.table.epoch()).await
        {
            tracing::error!(%error, "the epoch of the engine cannot be written down");
        }
        if self.table.is_unsaved() {
            let (saved, _) = session::in_time(self.table.save(), self.save_patience).await;
            self.status.send_modify(|status| status.saved = saved);
        }
    }
}

/// The lock that the process before this one holds, if it is of this folder.
fn same_lock(folder: &Path, lock: File) -> Result<File, EdgeError> {
    let path = folder.join(LOCK_FILE);
    let here = std::fs::metadata(&path).and_then(|here| Ok((here, lock.metadata()?)));
    let (here, held) = here.map_err(|source| EdgeError::File { path, source })?;
    if (here.dev(), here.ino()) == (held.dev(), held.ino()) {
        return Ok(lock);
    }
    Err(EdgeError::OtherFolder(folder.to_owned()))
}

fn lock(folder: &Path) -> Result<File, EdgeError> {
    let path = folder.join(LOCK_FILE);
    let failed = |source| EdgeError::File { path: path.clone(), source };
    files::private_folder(folder).map_err(failed)?;
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(EdgeError::Locked(folder.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}
