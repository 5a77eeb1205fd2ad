//! The writer: one thread that has the only connection that writes.
//!
//! Batches that wait together share one transaction, and so one flush of the disk; each still is a commit
//! with a revision of its own, and is acknowledged only after the transaction is durable.

use std::sync::Arc;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::fault::{is_io_failure, store_error};
use super::leader::{self, RefusedWrites};
use super::reader::span;
use crate::store::{
    Batch, Committed, LeaseGrant, MAX_BATCH_BYTES, MAX_HISTORY_BYTES, MIN_HISTORY_COMMITS, Precondition,
    Revision, StoreError, Write, record,
};

/// Most jobs in one transaction.
const MAX_GROUP_JOBS: usize = 64;
/// The log is cut in strides of this many commits, so that not every commit has to.
const COMPACTION_STRIDE_COMMITS: u64 = 256;

/// How much of the log is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct History {
    pub(super) min_commits: u64,
    pub(super) max_bytes: u64,
    pub(super) stride_commits: u64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            min_commits: MIN_HISTORY_COMMITS,
            max_bytes: MAX_HISTORY_BYTES,
            stride_commits: COMPACTION_STRIDE_COMMITS,
        }
    }
}

/// Something to write.
pub(super) enum Job {
    /// A batch within the limits.
    Commit { batch: Batch, reply: oneshot::Sender<Result<Revision, StoreError>> },
    /// A lease.
    Lease { ask: LeaseAsk, reply: oneshot::Sender<Result<LeaseGrant, StoreError>> },
    /// A sign of life.
    Renew { reply: oneshot::Sender<Result<Vec<RefusedWrites>, StoreError>> },
    /// A note that was told.
    Forget { told: RefusedWrites, reply: oneshot::Sender<Result<(), StoreError>> },
}

/// Who wants which lease for how long.
pub(super) struct LeaseAsk {
    pub(super) name: String,
    pub(super) holder: String,
    pub(super) now_ms: u64,
    pub(super) ttl_ms: u64,
}

/// What became of a job in a transaction that is durable.
enum Outcome {
    Committed(Committed),
    Refused(String),
    Lease(LeaseGrant),
    Renewed(Vec<RefusedWrites>),
    Forgotten,
    /// Another process leads, under this epoch.
    Fenced(u64),
}

/// What the next transaction begins with.
#[derive(Clone, Copy)]
struct Position {
    /// The log begins after this.
    oldest: Revision,
    newest: Revision,
    log_bytes: u64,
}

pub(super) struct Writer {
    connection: Connection,
    history: History,
    position: Position,
    live: broadcast::Sender<Arc<Committed>>,
    /// A write failed in a way that leaves unknown what is on the disk. Nothing is written after it: a later
    /// flush can succeed without the data of the one that failed, so going on could acknowledge what is lost.
    broken: Option<Arc<rusqlite::Error>>,
    /// Who we are, and the epoch that we lead under.
    holder: String,
    epoch: u64,
}

impl Writer {
    pub(super) fn new(
        connection: Connection,
        history: History,
        live: broadcast::Sender<Arc<Committed>>,
        (holder, epoch): (String, u64),
    ) -> Result<Self, StoreError> {
        let read = || {
            let (oldest, newest) = span(&connection)?;
            let bytes: i64 =
                connection.query_row("SELECT coalesce(sum(length(record)), 0) FROM log", (), |r| r.get(0))?;
            Ok(Position { oldest, newest, log_bytes: bytes.cast_unsigned() })
        };
        let position = read().map_err(|e: rusqlite::Error| store_error(&Arc::new(e)))?;
        Ok(Self { connection, history, position, live, broken: None, holder, epoch })
    }

    /// Works until every asker is gone.
    pub(super) fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.blocking_recv() {
            let mut bytes = first.bytes();
            let mut group = vec![first];
            while group.len() < MAX_GROUP_JOBS && bytes < MAX_BATCH_BYTES {
                let Ok(next) = jobs.try_recv() else { break };
                bytes += next.bytes();
                group.push(next);
            }
            self.settle(group);
        }
    }

    fn settle(&mut self, group: Vec<Job>) {
        if let Some(error) = &self.broken {
            let text = format!(
                "an earlier write failed ({error}), so nothing more is written: check the disk, then restart"
            );
            return group.into_iter().for_each(|job| job.fail(StoreError::Io(text.clone().into())));
        }
        match self.write_or_make_room(&group) {
            Ok(outcomes) => {
                group.into_iter().zip(outcomes).for_each(|(job, outcome)| self.acknowledge(job, outcome));
            }
            Err(error) if is_io_failure(&error) => {
                let error = Arc::new(error);
                self.broken = Some(Arc::clone(&error));
                group.into_iter().for_each(|job| job.fail(store_error(&error)));
            }
            // The transaction is rolled back. Each alone, so that one that has no room takes no other with it.
            Err(_) if group.len() > 1 => group.into_iter().for_each(|job| self.settle(vec![job])),
            Err(error) => {
                let error = Arc::new(error);
                group.into_iter().for_each(|job| job.fail(store_error(&error)));
            }
        }
    }

    /// On a small disk the write-ahead log alone may fill it, long before it is brought home by itself.
    fn write_or_make_room(&mut self, group: &[Job]) -> Result<Vec<Outcome>, rusqlite::Error> {
        let written = self.write(group);
        match &written {
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) => {}
            _ => return written,
        }
        let brought_home = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |_| Ok(()));
        if brought_home.is_err() { written } else { self.write(group) }
    }

    fn write(&mut self, group: &[Job]) -> Result<Vec<Outcome>, rusqlite::Error> {
        let mut position = self.position;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if let Some(theirs) = leader::overtaken(&transaction, self.epoch)? {
            let refused = group.iter().filter(|job| matches!(job, Job::Commit { .. })).count();
            // Also of one that wrote nothing and only showed that it takes itself for the leader.
            if refused > 0 || group.iter().any(|job| matches!(job, Job::Renew { .. })) {
                leader::note(&transaction, self.epoch, refused)?;
                transaction.commit()?;
            }
            return Ok(group.iter().map(|_| Outcome::Fenced(theirs)).collect());
        }
        let mut outcomes = Vec::with_capacity(group.len());
        for job in group {
            outcomes.push(match job {
                Job::Commit { batch, .. } => apply(&transaction, batch, &mut position)?,
                Job::Lease { ask, .. } => Outcome::Lease(lease(&transaction, ask)?),
                Job::Renew { .. } => {
                    leader::renew(&transaction, &self.holder, self.epoch)?;
                    Outcome::Renewed(leader::notes(&transaction)?)
                }
                Job::Forget { told, .. } => {
                    leader::forget(&transaction, told)?;
                    Outcome::Forgotten
                }
            });
        }
        compact(&transaction, &mut position, self.history)?;
        transaction.commit()?;
        self.position = position;
        Ok(outcomes)
    }

    fn acknowledge(&self, job: Job, outcome: Outcome) {
        match (job, outcome) {
            (Job::Commit { reply, .. }, Outcome::Committed(committed)) => {
                let revision = committed.revision;
                // Watchers first: who has the acknowledgement finds the commit in every watch.
                drop(self.live.send(Arc::new(committed))); // without a watcher there is nobody to tell
                drop(reply.send(Ok(revision)));
            }
            (Job::Commit { reply, .. }, Outcome::Refused(why)) => {
                drop(reply.send(Err(StoreError::Conflict(why))));
            }
            (Job::Lease { reply, .. }, Outcome::Lease(grant)) => drop(reply.send(Ok(grant))),
            (Job::Renew { reply }, Outcome::Renewed(notes)) => drop(reply.send(Ok(notes))),
            (Job::Forget { reply, .. }, Outcome::Forgotten) => drop(reply.send(Ok(()))),
            (job, Outcome::Fenced(theirs)) => job.fail(StoreError::Fenced { ours: self.epoch, theirs }),
            _ => unreachable!("`write` answers each job in its own kind"),
        }
    }
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Commit { batch, .. } => batch.bytes(),
            Self::Lease { .. } | Self::Renew { .. } | Self::Forget { .. } => 0,
        }
    }

    fn fail(self, error: StoreError) {
        match self {
            Self::Commit { reply, .. } => drop(reply.send(Err(error))),
            Self::Lease { reply, .. } => drop(reply.send(Err(error))),
            Self::Renew { reply } => drop(reply.send(Err(error))),
            Self::Forget { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

impl Batch {
    /// Bytes of the keys and values that are written.
    pub(super) fn bytes(&self) -> usize {
        self.writes.iter().map(|write| write.key().len() + write.value().map_or(0, Bytes::len)).sum()
    }
}

impl Write {
    pub(super) const fn key(&self) -> &String {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }

    pub(super) const fn value(&self) -> Option<&Bytes> {
        match self {
            Self::Put(_, value) => Some(value),
            Self::Delete(_) => None,
        }
    }
}

fn apply(
    transaction: &Transaction<'_>,
    batch: &Batch,
    position: &mut Position,
) -> Result<Outcome, rusqlite::Error> {
    for precondition in &batch.preconditions {
        if let Some(why) = refusal(transaction, precondition)? {
            return Ok(Outcome::Refused(why));
        }
    }
    let revision = position.newest + 1;
    for write in &batch.writes {
        match write {
            Write::Put(key, value) => transaction
                .prepare_cached(
                    "REPLACE INTO entry (key, value, revision, checksum) VALUES (?1, ?2, ?3, ?4)",
                )?
                .execute(params![
                    key,
                    &value[..],
                    revision.cast_signed(),
                    record::entry_checksum(key, revision, value)
                ])?,
            Write::Delete(key) => {
                transaction.prepare_cached("DELETE FROM entry WHERE key = ?1")?.execute([key])?
            }
        };
    }
    let record = record::encode(revision, &batch.writes);
    transaction
        .prepare_cached("INSERT INTO log (revision, record) VALUES (?1, ?2)")?
        .execute(params![revision.cast_signed(), record])?;
    position.newest = revision;
    position.log_bytes += record.len() as u64;
    Ok(Outcome::Committed(Committed { revision, writes: batch.writes.clone() }))
}

/// Why a precondition does not hold, in words without any value: values may be secret.
fn refusal(
    transaction: &Transaction<'_>,
    precondition: &Precondition,
) -> Result<Option<String>, rusqlite::Error> {
    let revision_of = |key: &str| {
        transaction
            .prepare_cached("SELECT revision FROM entry WHERE key = ?1")?
            .query_row([key], |row| row.get::<_, i64>(0))
            .optional()
    };
    Ok(match precondition {
        Precondition::Absent(key) => {
            revision_of(key)?.map(|at| format!("{key} is there, since revision {at}"))
        }
        Precondition::Present(key) => match revision_of(key)? {
            Some(_) => None,
            None => Some(format!("{key} is not there")),
        },
        Precondition::Unchanged(key, expected) => match revision_of(key)? {
            Some(at) if at.cast_unsigned() == *expected => None,
            Some(at) => Some(format!("{key} was changed at revision {at}, not {expected}")),
            None => Some(format!("{key} is not there, it was expected as of revision {expected}")),
        },
        Precondition::Equals(key, expected) => {
            let value: Option<Vec<u8>> = transaction
                .prepare_cached("SELECT value FROM entry WHERE key = ?1")?
                .query_row([key], |row| row.get(0))
                .optional()?;
            match value {
                Some(value) if value == expected[..] => None,
                Some(_) => Some(format!("{key} has another value")),
                None => Some(format!("{key} is not there")),
            }
        }
    })
}

fn lease(transaction: &Transaction<'_>, ask: &LeaseAsk) -> Result<LeaseGrant, rusqlite::Error> {
    let present = transaction
        .prepare_cached("SELECT holder, token, expires_at FROM lease WHERE name = ?1")?
        .query_row([&ask.name], |row| {
            Ok(LeaseGrant {
                holder: row.get(0)?,
                token: row.get::<_, i64>(1)?.cast_unsigned(),
                expires_at: row.get::<_, i64>(2)?.cast_unsigned(),
                granted: false,
            })
        })
        .optional()?;
    let token = match present {
        None => 1,
        Some(grant) if grant.holder == ask.holder => grant.token,
        Some(grant) if grant.expires_at > ask.now_ms => return Ok(grant),
        Some(grant) => grant.token + 1,
    };
    let latest = i64::MAX.cast_unsigned();
    let expires_at = ask.now_ms.saturating_add(ask.ttl_ms).min(latest);
    transaction
        .prepare_cached("REPLACE INTO lease (name, holder, token, expires_at) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![ask.name, ask.holder, token.cast_signed(), expires_at.cast_signed()])?;
    Ok(LeaseGrant { holder: ask.holder.clone(), token, expires_at, granted: true })
}

/// Cuts the log when it is a stride too long, or too heavy. The newest commit stays: it says where we are.
fn compact(
    transaction: &Transaction<'_>,
    position: &mut Position,
    history: History,
) -> Result<(), rusqlite::Error> {
    let too_long = position.newest - position.oldest >= history.min_commits + history.stride_commits;
    let too_heavy = position.log_bytes > history.max_bytes;
    if !too_long && !too_heavy {
        return Ok(());
    }
    let mut cut = position.newest.saturating_sub(history.min_commits).max(position.oldest);
    let mut bytes = position.log_bytes - log_bytes(transaction, position.oldest, cut)?;
    // Down to three quarters, so that a heavy log is not cut at every commit.
    while bytes > history.max_bytes / 4 * 3 && cut + 1 < position.newest {
        bytes -= log_bytes(transaction, cut, cut + 1)?;
        cut += 1;
    }
    transaction.prepare_cached("DELETE FROM log WHERE revision <= ?1")?.execute([cut.cast_signed()])?;
    position.oldest = cut;
    position.log_bytes = bytes;
    Ok(())
}

fn log_bytes(transaction: &Transaction<'_>, after: Revision, to: Revision) -> Result<u64, rusqlite::Error> {
    let bytes: i64 = transaction
        .prepare_cached(
            "SELECT coalesce(sum(length(record)), 0) FROM log WHERE revision > ?1 AND revision <= ?2",
        )?
        .query_row([after.cast_signed(), to.cast_signed()], |row| row.get(0))?;
    Ok(bytes.cast_unsigned())
}
