//! Where certificates, orders and accounts are kept: durable records with a revision each. Whoever writes names the
//! revision that they have read, so that of two managers one wins and the other is told.
//!
//! A vault holds bytes and knows nothing of them; secrets come to it sealed ([`crate::SealKey`]).

mod folder;
mod memory;

pub use folder::FolderVault;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
pub use memory::MemoryVault;

/// Counts the writes of a record. No two contents of a key have the same one, also not with a deletion between.
pub type Revision = u64;

/// What lies under a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: String,
    /// The content.
    pub bytes: Vec<u8>,
    /// Its revision.
    pub revision: Revision,
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{} ({} bytes)", self.key, self.revision, self.bytes.len())
    }
}

/// What has to be true of a record for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// There is none.
    Absent,
    /// It has this revision.
    Revision(Revision),
    /// Nothing: the content follows from the key, so whoever writes writes the same.
    Anything,
}

/// One write of a commit.
#[derive(Clone)]
pub struct Write {
    /// Which record.
    pub key: String,
    /// Its new content; `None` deletes it.
    pub bytes: Option<Vec<u8>>,
    /// The condition.
    pub expected: Expected,
}

impl Write {
    /// Writes `bytes`.
    pub fn put(key: impl Into<String>, bytes: impl Into<Vec<u8>>, expected: Expected) -> Self {
        Self { key: key.into(), bytes: Some(bytes.into()), expected }
    }

    /// Deletes the record.
    pub fn delete(key: impl Into<String>, expected: Expected) -> Self {
        Self { key: key.into(), bytes: None, expected }
    }
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.bytes.is_some() { "put" } else { "delete" };
        write!(f, "{what} {} if {:?}", self.key, self.expected)
    }
}

/// Why a vault did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VaultError {
    /// Somebody else has written in between: read again. Nothing of the commit was written.
    #[error("record {key} has changed meanwhile")]
    Conflict {
        /// The first record that is not as expected.
        key: String,
    },
    /// It cannot be read or written now. A commit was written wholly or not at all; a retry is safe.
    #[error("records cannot be kept: {cause}")]
    Unavailable {
        /// Why.
        cause: String,
    },
    /// What lies there is not what was written.
    #[error("record {key} is damaged: {cause}")]
    Damaged {
        /// Which one.
        key: String,
        /// How one sees that.
        cause: String,
    },
}

/// Durable records. Cheap to share.
pub trait Vault: Send + Sync + 'static {
    /// All records whose key begins with `prefix`, by key.
    ///
    /// # Errors
    /// [`VaultError::Unavailable`], [`VaultError::Damaged`].
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Record>, VaultError>>;

    /// As [`Vault::list`], one after the other, for whoever does not want all of them in memory at once.
    ///
    /// # Errors
    /// As [`Vault::list`]. Some records may have been visited then.
    fn for_each<'a>(
        &'a self,
        prefix: &'a str,
        visit: &'a mut (dyn FnMut(Record) + Send),
    ) -> BoxFuture<'a, Result<(), VaultError>> {
        async move {
            self.list(prefix).await?.into_iter().for_each(visit);
            Ok(())
        }
        .boxed()
    }

    /// One record.
    ///
    /// # Errors
    /// As [`Vault::list`].
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, VaultError>>;

    /// Writes all or none. When it returns, they are durable. The revision is that of all that was written.
    ///
    /// # Errors
    /// [`VaultError::Conflict`] if an expectation is not met; otherwise as [`Vault::list`].
    fn commit(&self, writes: Vec<Write>) -> BoxFuture<'_, Result<Revision, VaultError>>;
}

/// Whether a record with this revision (`None`: no record) is as expected.
pub(crate) fn met(expected: Expected, found: Option<Revision>) -> bool {
    match expected {
        Expected::Absent => found.is_none(),
        Expected::Revision(revision) => found == Some(revision),
        Expected::Anything => true,
    }
}
