//! The store: everything durable is a keyed object.
//!
//! `commit` is the only way to change anything: a batch of writes with preconditions that is applied
//! whole, durably, or not at all, and gets the next revision. `watch` gives every commit in order.
//! Nothing in here knows what the values mean; that is `state`'s business.

pub mod record;
mod sqlite;

pub(crate) use sqlite::{FILE as STORE_FILE, LOCK_FILE, check as check_file, copy as copy_file, lock};

pub use sqlite::{RefusedWrites, SqliteStore};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use crate::model::HiddenBytes;

/// Number of a commit. Rises by one with each; 0 is before the first.
pub type Revision = u64;

/// Longest key.
pub const MAX_KEY_BYTES: usize = 512;
/// Largest value.
pub const MAX_VALUE_BYTES: usize = 4 << 20;
/// Most writes, and most preconditions, in one batch.
pub const MAX_BATCH_WRITES: usize = 1_024;
/// Keys and values of one batch together.
pub const MAX_BATCH_BYTES: usize = 16 << 20;

/// The log keeps at least so many commits: enough for any reader that is not stuck (a rollout is some
/// fifty commits), and small enough to be nothing on a disk.
pub const MIN_HISTORY_COMMITS: u64 = 10_000;
/// Beyond so many bytes the log keeps less than [`MIN_HISTORY_COMMITS`]: values may be megabytes, and a
/// reader that is behind can always start again from [`Store::range`].
pub const MAX_HISTORY_BYTES: u64 = 64 << 20;

/// Writes that are applied whole or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// What has to be true of the store for the batch to be applied.
    pub preconditions: Vec<Precondition>,
    /// The writes, in order.
    pub writes: Vec<Write>,
}

/// What has to be true of a key. `Debug` hides values.
#[derive(Clone, PartialEq, Eq)]
pub enum Precondition {
    /// It is not there.
    Absent(String),
    /// It is there.
    Present(String),
    /// Its last change was this revision.
    Unchanged(String, Revision),
    /// Its value is this.
    Equals(String, Bytes),
}

/// One write. `Debug` hides values.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put(String, Bytes),
    /// Removes a key; one that is not there stays so.
    Delete(String),
}

/// A key with its value, which `Debug` hides.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Bytes,
    /// Revision of its last change.
    pub revision: Revision,
}

impl std::fmt::Debug for Precondition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Absent(key) => f.debug_tuple("Absent").field(key).finish(),
            Self::Present(key) => f.debug_tuple("Present").field(key).finish(),
            Self::Unchanged(key, at) => f.debug_tuple("Unchanged").field(key).field(at).finish(),
            Self::Equals(key, value) => {
                f.debug_tuple("Equals").field(key).field(&HiddenBytes(value.len())).finish()
            }
        }
    }
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put(key, value) => {
                f.debug_tuple("Put").field(key).field(&HiddenBytes(value.len())).finish()
            }
            Self::Delete(key) => f.debug_tuple("Delete").field(key).finish(),
        }
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("key", &self.key)
            .field("value", &HiddenBytes(self.value.len()))
            .field("revision", &self.revision)
            .finish()
    }
}

/// A batch that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its revision.
    pub revision: Revision,
    /// Its writes.
    pub writes: Vec<Write>,
}

/// Everything with a prefix, sound or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The revision that it is of.
    pub revision: Revision,
    /// What is sound, in order of keys.
    pub entries: Vec<Entry>,
    /// Keys of what is not, with the reason.
    pub unsound: Vec<(String, String)>,
}

impl Survey {
    /// Whether nothing is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.unsound.is_empty()
    }

    /// The last key of it, sound or not.
    #[must_use]
    pub fn last_key(&self) -> Option<&str> {
        let sound = self.entries.last().map(|entry| entry.key.as_str());
        let unsound = self.unsound.iter().map(|(key, _)| key.as_str()).max();
        sound.max(unsound)
    }

    /// Keeps the first `max` keys.
    fn cut_to(&mut self, max: usize) {
        let entries = self.entries.iter().map(|entry| &entry.key);
        let mut keys: Vec<&String> = entries.chain(self.unsound.iter().map(|(key, _)| key)).collect();
        keys.sort_unstable();
        let Some(beyond) = keys.get(max).map(|key| (*key).clone()) else { return };
        self.entries.retain(|entry| entry.key < beyond);
        self.unsound.retain(|(key, _)| *key < beyond);
    }
}

/// A lease that was given, or who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseGrant {
    /// Who has it.
    pub holder: String,
    /// Rises each time that the lease changes hands: a fencing token.
    pub token: u64,
    /// When it ends, in Unix milliseconds.
    pub expires_at: u64,
    /// Whether the one who asked has it.
    pub granted: bool,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A precondition does not hold; nothing was written. Look again and decide anew.
    #[error("the store has moved on: {0}")]
    Conflict(String),
    /// Key, value or batch beyond its limit.
    #[error("{0}")]
    TooLarge(String),
    /// The disk is full. Nothing acknowledged is lost; nothing new is taken until there is room.
    #[error("the disk with the data folder is full")]
    Full(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The data is damaged.
    #[error("the store is damaged: {0}")]
    Corrupt(String),
    /// The data was written by a later version, in a form that this one does not know.
    #[error(
        "the store was written by a later version of peregrine (schema {found}, this one knows {known}): \
         start that version, or restore a backup made before the upgrade"
    )]
    Newer {
        /// Schema of the data.
        found: i64,
        /// Latest schema that this version knows.
        known: i64,
    },
    /// A watch asked for commits that the log does not have (any more): start again from `range`.
    #[error(
        "commits after revision {after} are not in the log, which begins after {oldest} and ends at {newest}"
    )]
    Compacted {
        /// Where the watch stood.
        after: Revision,
        /// Earliest revision that a watch can begin after.
        oldest: Revision,
        /// Newest revision.
        newest: Revision,
    },
    /// Reading or writing failed.
    #[error("the store cannot be read or written")]
    Io(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another process has taken over: this one writes nothing any more.
    #[error(
        "another engine leads (epoch {theirs}), this one (epoch {ours}) was replaced while it stood still"
    )]
    Fenced {
        /// Our epoch.
        ours: u64,
        /// The epoch of who leads.
        theirs: u64,
    },
    /// Another process has it open.
    #[error("the data folder is in use by another process")]
    Locked,
}

/// The store. Implementations: SQLite; etcd for more than one machine, later.
pub trait Store: Send + Sync + 'static {
    /// Applies a batch and returns once it is durable. A future that is dropped before that takes nothing
    /// back: the batch may still be applied.
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// Every entry whose key begins with `prefix`, in order of keys, and the revision they are of.
    fn range(&self, prefix: &str) -> BoxFuture<'_, Result<(Revision, Vec<Entry>), StoreError>>;

    /// As [`Store::range`], but an entry that cannot be trusted is named, and does not hide the others. A store
    /// that cannot tell one from the other fails as a whole.
    fn survey(&self, prefix: &str) -> BoxFuture<'_, Result<Survey, StoreError>> {
        let range = self.range(prefix);
        async move {
            let (revision, entries) = range.await?;
            Ok(Survey { revision, entries, unsound: Vec::new() })
        }
        .boxed()
    }

    /// As [`Store::survey`] of everything but one family, whose keys begin with `family`: it may be larger than what there is memory
    /// for, and is read by its own.
    fn survey_without<'a>(&'a self, family: &'a str) -> BoxFuture<'a, Result<Survey, StoreError>> {
        async move {
            let mut survey = self.survey("").await?;
            survey.entries.retain(|entry| !entry.key.starts_with(family));
            survey.unsound.retain(|(key, _)| !key.starts_with(family));
            Ok(survey)
        }
        .boxed()
    }

    /// As [`Store::survey`] of the first `max` entries whose key is `from` or after it: for families that are too large to
    /// be read for what is new of them. Entries that cannot be trusted count.
    fn survey_from<'a>(
        &'a self,
        prefix: &'a str,
        from: &'a str,
        max: usize,
    ) -> BoxFuture<'a, Result<Survey, StoreError>> {
        async move {
            let mut survey = self.survey(prefix).await?;
            survey.entries.retain(|entry| entry.key.as_str() >= from);
            survey.unsound.retain(|(key, _)| key.as_str() >= from);
            survey.cut_to(max);
            Ok(survey)
        }
        .boxed()
    }

    /// What is known to be wrong with it, of which not everything was looked at before it was opened.
    fn damage(&self) -> Option<String> {
        None
    }

    /// Every commit after `after`, in order and without a gap, for ever. History may be compacted: a
    /// watch from before the oldest kept commit, or from a revision that does not exist yet, ends with
    /// [`StoreError::Compacted`], and the reader starts again from `range`.
    fn watch(&self, after: Revision) -> BoxStream<'static, Result<Committed, StoreError>>;

    /// Takes or renews a lease for `holder` until `now_ms + ttl_ms`, unless another one has it.
    fn lease(
        &self,
        name: &str,
        holder: &str,
        now_ms: u64,
        ttl_ms: u64,
    ) -> BoxFuture<'_, Result<LeaseGrant, StoreError>>;
}
