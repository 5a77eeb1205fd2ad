//! The vault: durable records of a room that the engine knows nothing of, in the engine's store, so that they are led,
//! fenced and backed up with everything else. They are not part of the [`crate::State`]: nobody pays for a million
//! certificates in memory.
//!
//! Who keeps secrets here has sealed them before; the engine neither reads nor logs what is inside.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;

use crate::core::Core;
use crate::error::EngineError;
use crate::keys;
use crate::store::{Entry, Precondition, Revision, StoreError, Write};

/// Records that are read at once.
const MAX_PAGE_RECORDS: usize = 1_000;

/// What lies under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultRecord {
    /// The key.
    pub key: String,
    /// The content.
    pub bytes: Bytes,
    /// Revision of its last change; never that of another content, also not with a deletion between.
    pub revision: Revision,
}

/// What has to be true of a record for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VaultExpected {
    /// There is none.
    Absent,
    /// It has this revision.
    Revision(Revision),
    /// Nothing.
    Anything,
}

/// One write. All of a commit are done, or none.
#[derive(Clone, PartialEq, Eq)]
pub struct VaultWrite {
    /// Which record.
    pub key: String,
    /// Its new content; `None` deletes it.
    pub bytes: Option<Bytes>,
    /// The condition.
    pub expected: VaultExpected,
}

/// The way to the vault. Cheap to clone.
#[derive(Clone)]
pub struct Vault {
    core: Arc<Core>,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vault").finish_non_exhaustive()
    }
}

impl Vault {
    pub(crate) const fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// All records whose key begins with `prefix`, by key. One that is damaged is told in the log and left out: it is no reason
    /// to do without the others.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn list(&self, prefix: &str) -> Result<Vec<VaultRecord>, EngineError> {
        let mut records = Vec::new();
        self.for_each(prefix, |record| records.push(record)).await?;
        Ok(records)
    }

    /// As [`Self::list`], one after the other: there may be more than anybody wants in memory at once.
    ///
    /// # Errors
    /// The store cannot be read. Some records may have been visited then.
    pub async fn for_each(
        &self,
        prefix: &str,
        mut visit: impl FnMut(VaultRecord),
    ) -> Result<(), EngineError> {
        let family = keys::vault(prefix);
        let mut page = self.core.store.survey_from(&family, "", MAX_PAGE_RECORDS).await?;
        loop {
            for (key, why) in &page.unsound {
                tracing::error!(%key, %why, "a stored record is damaged and left out");
                self.core.note_unsound(key, Some(why));
            }
            let Some(last) = page.last_key() else { return Ok(()) };
            let from = format!("{last}\0"); // the next key there can be
            let mut next = self.core.store.survey_from(&family, &from, MAX_PAGE_RECORDS);
            // Asked for before this one is looked at: the store reads while we do that.
            let asked = (&mut next).now_or_never();
            page.entries.into_iter().map(record).for_each(&mut visit);
            page = match asked {
                Some(next) => next?,
                None => next.await?,
            };
        }
    }

    /// Keys that begin so whose records were found damaged: [`Self::for_each`] has left them out, and nobody has written them since.
    #[must_use]
    pub fn damaged(&self, prefix: &str) -> Vec<String> {
        let keys = self.core.unsound(&keys::vault(prefix)).into_iter();
        keys.map(|key| key.strip_prefix(keys::VAULT).unwrap_or(&key).to_owned()).collect()
    }

    /// One record.
    ///
    /// # Errors
    /// The store cannot be read, or the record is damaged.
    pub async fn get(&self, key: &str) -> Result<Option<VaultRecord>, EngineError> {
        let key = keys::vault(key);
        let found = self.core.store.survey_from(&key, &key, 1).await?;
        if let Some((_, why)) = found.unsound.iter().find(|(unsound, _)| *unsound == key) {
            self.core.note_unsound(&key, Some(why));
            return Err(StoreError::Corrupt(format!("{key}: {why}")).into());
        }
        Ok(found.entries.into_iter().find(|entry| entry.key == key).map(record))
    }

    /// Writes all or none. When it returns they are durable, with this revision.
    ///
    /// # Errors
    /// `store.conflict` if an expectation is not met; otherwise why the store does not take it. Nothing was written then.
    pub async fn commit(&self, writes: Vec<VaultWrite>) -> Result<Revision, EngineError> {
        let written: Vec<String> = writes.iter().map(|write| keys::vault(&write.key)).collect();
        let ((), revision) = self
            .core
            .commit_at(move |draft| {
                for VaultWrite { key, bytes, expected } in writes {
                    let key = keys::vault(&key);
                    match expected {
                        VaultExpected::Absent => draft.require(Precondition::Absent(key.clone())),
                        VaultExpected::Revision(at) => {
                            draft.require(Precondition::Unchanged(key.clone(), at))
                        }
                        VaultExpected::Anything => {}
                    }
                    draft.vault(match bytes {
                        Some(bytes) => Write::Put(key, bytes),
                        None => Write::Delete(key),
                    });
                }
                Ok(())
            })
            .await?;
        written.iter().for_each(|key| self.core.note_unsound(key, None));
        Ok(revision)
    }
}

fn record(entry: Entry) -> VaultRecord {
    let key = entry.key.strip_prefix(keys::VAULT).unwrap_or(&entry.key).to_owned();
    VaultRecord { key, bytes: entry.value, revision: entry.revision }
}
