//! The store on SQLite: one file in the data folder of one process.
//!
//! ```text
//!   commit, lease ──► queue ──► writer thread ──► transaction, flushed ──► watchers ──► acknowledgement
//!   range, watch  ──► queue ──► reader thread ──► snapshot
//! ```
//!
//! What is acknowledged is on the disk (`synchronous=FULL`). A second process is turned away at once, by a
//! lock that the kernel gives back however the first one ends; one that stands by takes over from a process that stands
//! still (see `leader`), which then writes nothing any more. No two processes ever write.

mod backup;
mod fault;
mod leader;
mod reader;
mod schema;
mod watch;
mod writer;

pub(crate) use self::backup::{check, copy};
pub(crate) use self::schema::{FILE, LOCK_FILE, lock};

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::sync::{broadcast, mpsc, oneshot};

use self::fault::{closed, file_error};
pub use self::leader::RefusedWrites;
use self::reader::{Part, Query};
use self::watch::Watch;
use self::writer::{History, Job, LeaseAsk, Writer};
use super::{
    Batch, Committed, Entry, LeaseGrant, MAX_BATCH_BYTES, MAX_BATCH_WRITES, MAX_KEY_BYTES, MAX_VALUE_BYTES,
    Precondition, Revision, Store, StoreError, Survey,
};

/// Most jobs that wait for each thread; who comes later waits for room.
const MAX_QUEUED_JOBS: usize = 256;
/// Looks at who leads within the patience of who stands by.
const LOOKS_PER_PATIENCE: u32 = 20;
/// Commits that a watch may be behind before it goes back to the log.
const MAX_LIVE_COMMITS: usize = 256;

/// What `nice` calls so.
const LOWEST_PRIORITY: i32 = 19;

/// The store on SQLite. Closing it (dropping it) waits until what is queued is written, and leaves one
/// file without a write-ahead log.
#[derive(Debug)]
pub struct SqliteStore {
    jobs: Option<mpsc::Sender<Job>>,
    queries: Option<mpsc::Sender<Query>>,
    live: broadcast::WeakSender<Arc<Committed>>,
    writer: Option<JoinHandle<()>>,
    reader: Option<JoinHandle<()>>,
    check: Option<Check>,
    /// Given back when everything above is gone. `None` after taking over from a process that stands still and has it.
    lock: Mutex<Option<File>>,
    dir: PathBuf,
    epoch: u64,
}

impl SqliteStore {
    /// Opens the store in a data folder, and makes both if they are not there: the folder 0700, files 0600.
    /// A folder that is there keeps its mode.
    ///
    /// # Errors
    ///
    /// [`StoreError::Locked`] when another process has it open, [`StoreError::Corrupt`] when the file is
    /// damaged, [`StoreError::Newer`] when a later version wrote it, [`StoreError::Io`] or
    /// [`StoreError::Full`] when it cannot be opened.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_with(dir, History::default(), |_| Ok(()))
    }

    /// The epoch of the last leader of a store, which is not opened for that; `None` if there never was one.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn stored_epoch(dir: &Path) -> Result<Option<u64>, StoreError> {
        Ok(schema::leader(dir)?.map(|leader| leader.epoch()))
    }

    /// As [`Self::open`], and leads under an epoch that is higher by more than `step` than the one that is written down.
    pub(crate) fn open_for_reign(dir: &Path, step: u64) -> Result<Self, StoreError> {
        Self::open_with(dir, History::default(), |connection| leader::skip(connection, step))
    }

    fn open_with(
        dir: &Path,
        history: History,
        prepare: impl FnOnce(&rusqlite::Connection) -> Result<(), rusqlite::Error>,
    ) -> Result<Self, StoreError> {
        let lock = lock(dir)?;
        let connection = schema::open_writer(dir)?;
        prepare(&connection).map_err(|e| fault::store_error(&Arc::new(e)))?;
        let seen = leader::present(&connection).map_err(|e| fault::store_error(&Arc::new(e)))?;
        // The kernel has given us the folder: whoever led is gone, or finds out that it was replaced.
        Self::lead(dir, history, connection, seen.as_ref(), Some(lock))?.ok_or(StoreError::Locked)
    }

    /// Waits until the store is free, or until who leads has not shown for `patience` that it lives; then takes over
    /// under a higher epoch. Blocks the thread; `None` when `stop` says so. Which of the two it was is not told: after
    /// either, the one before writes nothing any more.
    ///
    /// # Errors
    ///
    /// As [`SqliteStore::open`], but for [`StoreError::Locked`].
    pub fn stand_by(
        dir: &Path,
        patience: Duration,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Self>, StoreError> {
        let mut seen = None;
        let mut since = Instant::now();
        while !stop() {
            match Self::open(dir) {
                Err(StoreError::Locked) => {}
                opened => return opened.map(Some),
            }
            let now = schema::leader(dir)?;
            if now.is_none() || now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() >= patience {
                let connection = schema::open_writer(dir)?;
                if let Some(store) = Self::lead(dir, History::default(), connection, seen.as_ref(), None)? {
                    return Ok(Some(store));
                }
            }
            std::thread::park_timeout(patience / LOOKS_PER_PATIENCE);
        }
        Ok(None)
    }

    fn lead(
        dir: &Path,
        history: History,
        mut connection: rusqlite::Connection,
        seen: Option<&leader::Leader>,
        lock: Option<File>,
    ) -> Result<Option<Self>, StoreError> {
        let holder = format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple());
        let taken = leader::take(&mut connection, &holder, seen);
        let Some(epoch) = taken.map_err(|e| fault::store_error(&Arc::new(e)))? else { return Ok(None) };
        let read_connection = schema::open_reader(dir)?;
        let check = if schema::is_large(&read_connection)? { Some(Check::begin(dir)?) } else { None };
        let (live, _) = broadcast::channel(MAX_LIVE_COMMITS);
        let weak_live = live.downgrade(); // the writer thread has the strong one: when it is gone, watches end
        let writer = Writer::new(connection, history, live, (holder, epoch))?;
        let (jobs, job_queue) = mpsc::channel(MAX_QUEUED_JOBS);
        let (queries, query_queue) = mpsc::channel(MAX_QUEUED_JOBS);
        Ok(Some(Self {
            jobs: Some(jobs),
            queries: Some(queries),
            live: weak_live,
            writer: Some(spawn(dir, "store-writer", move || writer.run(job_queue))?),
            reader: Some(spawn(dir, "store-reader", move || reader::run(read_connection, query_queue))?),
            check,
            lock: Mutex::new(lock),
            dir: dir.to_owned(),
            epoch,
        }))
    }

    /// The fencing epoch: it rises each time that a process takes the lead on this store.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Shows whoever stands by that this process lives, and reads the notes of refused writes of those before it: the
    /// same again and again, until [`SqliteStore::forget_refused`]. Call it several times within their patience.
    ///
    /// # Errors
    ///
    /// [`StoreError::Fenced`] when another process leads.
    pub async fn renew(&self) -> Result<Vec<RefusedWrites>, StoreError> {
        let renewed = self.write(|reply| Job::Renew { reply }).await?;
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_none() {
            *lock = schema::lock(&self.dir).ok(); // as soon as the one that we took over from is gone
        }
        Ok(renewed)
    }

    /// Forgets a note of refused writes, once what it says is written down elsewhere; not what was refused since it was
    /// read.
    ///
    /// # Errors
    ///
    /// [`StoreError::Fenced`] when another process leads; the note is still there.
    pub async fn forget_refused(&self, told: RefusedWrites) -> Result<(), StoreError> {
        self.write(|reply| Job::Forget { told, reply }).await
    }

    async fn write<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(closed)?;
        jobs.send(job(reply)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn read_survey(&self, prefix: String, part: Part) -> Result<Survey, StoreError> {
        let (reply, answer) = oneshot::channel();
        let queries = self.queries.as_ref().ok_or_else(closed)?;
        queries.send(Query::Survey { prefix, part, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn read_range(&self, prefix: String) -> Result<(Revision, Vec<Entry>), StoreError> {
        let (reply, answer) = oneshot::channel();
        let queries = self.queries.as_ref().ok_or_else(closed)?;
        queries.send(Query::Range { prefix, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

impl Store for SqliteStore {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Revision, StoreError>> {
        async move {
            check_batch(&batch)?;
            self.write(|reply| Job::Commit { batch, reply }).await
        }
        .boxed()
    }

    fn range(&self, prefix: &str) -> BoxFuture<'_, Result<(Revision, Vec<Entry>), StoreError>> {
        self.read_range(prefix.to_owned()).boxed()
    }

    fn survey(&self, prefix: &str) -> BoxFuture<'_, Result<Survey, StoreError>> {
        self.read_survey(prefix.to_owned(), Part::ALL).boxed()
    }

    fn survey_without<'a>(&'a self, family: &'a str) -> BoxFuture<'a, Result<Survey, StoreError>> {
        self.read_survey(String::new(), Part { without: Some(family.to_owned()), ..Part::ALL }).boxed()
    }

    fn survey_from<'a>(
        &'a self,
        prefix: &'a str,
        from: &'a str,
        max: usize,
    ) -> BoxFuture<'a, Result<Survey, StoreError>> {
        self.read_survey(prefix.to_owned(), Part { from: from.to_owned(), max, ..Part::ALL }).boxed()
    }

    fn damage(&self) -> Option<String> {
        self.check.as_ref()?.damage.get().cloned()
    }

    fn watch(&self, after: Revision) -> BoxStream<'static, Result<Committed, StoreError>> {
        let (Some(live), Some(queries)) = (self.live.upgrade(), self.queries.as_ref()) else {
            return Box::pin(futures_util::stream::once(async { Err(closed()) }));
        };
        Watch::new(after, live.subscribe(), queries.downgrade()).into_stream()
    }

    fn lease(
        &self,
        name: &str,
        holder: &str,
        now_ms: u64,
        ttl_ms: u64,
    ) -> BoxFuture<'_, Result<LeaseGrant, StoreError>> {
        let ask = LeaseAsk { name: name.to_owned(), holder: holder.to_owned(), now_ms, ttl_ms };
        async move {
            check_key(&ask.name)?;
            check_key(&ask.holder)?;
            self.write(|reply| Job::Lease { ask, reply }).await
        }
        .boxed()
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        drop(self.check.take());
        // One after the other: the last connection brings the write-ahead log home, and two that close at
        // once would each leave that to the other. A thread that panicked has said so already.
        self.queries = None;
        drop(self.reader.take().map(JoinHandle::join));
        self.jobs = None;
        drop(self.writer.take().map(JoinHandle::join));
    }
}

/// The look at every page of a large store, beside its use.
struct Check {
    damage: Arc<OnceLock<String>>,
    interrupt: rusqlite::InterruptHandle,
    thread: Option<JoinHandle<()>>,
}

impl Check {
    fn begin(dir: &Path) -> Result<Self, StoreError> {
        let connection = schema::open_reader(dir)?;
        let interrupt = connection.get_interrupt_handle();
        let damage = Arc::<OnceLock<String>>::default();
        let found = Arc::clone(&damage);
        let check = move || {
            // There is no hurry, and others are starting. That it cannot be had does no harm.
            let _ = rustix::process::setpriority_process(None, LOWEST_PRIORITY);
            if let Err(StoreError::Corrupt(why)) = schema::check_pages(&connection) {
                tracing::error!(%why, "the store is damaged: what can be read of it is served; restore a backup (peregrine server restore)");
                let _first = found.set(why);
            }
        };
        Ok(Self { damage, interrupt, thread: Some(spawn(dir, "store-check", check)?) })
    }
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check").field("damage", &self.damage).finish_non_exhaustive()
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        self.interrupt.interrupt();
        // A thread that panicked has said so already.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn spawn(dir: &Path, name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StoreError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|e| file_error("cannot start a thread for", dir, &e))
}

fn check_batch(batch: &Batch) -> Result<(), StoreError> {
    for (what, count) in [("writes", batch.writes.len()), ("preconditions", batch.preconditions.len())] {
        if count > MAX_BATCH_WRITES {
            return Err(StoreError::TooLarge(format!(
                "a batch has {count} {what}, the limit is {MAX_BATCH_WRITES}: commit them in several batches"
            )));
        }
    }
    for precondition in &batch.preconditions {
        let (Precondition::Absent(key)
        | Precondition::Present(key)
        | Precondition::Unchanged(key, _)
        | Precondition::Equals(key, _)) = precondition;
        check_key(key)?;
    }
    for write in &batch.writes {
        check_key(write.key())?;
        let bytes = write.value().map_or(0, bytes::Bytes::len);
        if bytes > MAX_VALUE_BYTES {
            let key = write.key();
            return Err(StoreError::TooLarge(format!(
                "the value of {key} has {bytes} bytes, the limit is {MAX_VALUE_BYTES}"
            )));
        }
    }
    let bytes = batch.bytes();
    if bytes > MAX_BATCH_BYTES {
        return Err(StoreError::TooLarge(format!(
            "a batch has {bytes} bytes, the limit is {MAX_BATCH_BYTES}: commit it in several batches"
        )));
    }
    Ok(())
}

fn check_key(key: &str) -> Result<(), StoreError> {
    if key.len() > MAX_KEY_BYTES {
        let shown: String = key.chars().take(40).collect();
        return Err(StoreError::TooLarge(format!(
            "the key {shown}… has {} bytes, the limit is {MAX_KEY_BYTES}",
            key.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
