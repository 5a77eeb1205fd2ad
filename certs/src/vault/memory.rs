//! Records in memory: for tests, and for whoever needs nothing to outlive the process.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};

use super::{Record, Revision, Vault, VaultError, Write, met};

#[derive(Default)]
struct Records {
    by_key: BTreeMap<String, (Vec<u8>, Revision)>,
    last: Revision,
}

/// Records that end with the process.
#[derive(Default)]
pub struct MemoryVault {
    records: Mutex<Records>,
}

impl MemoryVault {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn with<T>(&self, read: impl FnOnce(&mut Records) -> T) -> T {
        read(&mut self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Vault for MemoryVault {
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Record>, VaultError>> {
        let found = self.with(|records| {
            let from = records.by_key.range(prefix.to_owned()..);
            from.take_while(|(key, _)| key.starts_with(prefix))
                .map(|(key, (bytes, revision))| Record {
                    key: key.clone(),
                    bytes: bytes.clone(),
                    revision: *revision,
                })
                .collect()
        });
        ready(Ok(found)).boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, VaultError>> {
        let found = self.with(|records| {
            records.by_key.get(key).map(|(bytes, revision)| Record {
                key: key.to_owned(),
                bytes: bytes.clone(),
                revision: *revision,
            })
        });
        ready(Ok(found)).boxed()
    }

    fn commit(&self, writes: Vec<Write>) -> BoxFuture<'_, Result<Revision, VaultError>> {
        let done = self.with(|records| {
            for write in &writes {
                let found = records.by_key.get(&write.key).map(|(_, revision)| *revision);
                if !met(write.expected, found) {
                    return Err(VaultError::Conflict { key: write.key.clone() });
                }
            }
            records.last += 1;
            let revision = records.last;
            for write in writes {
                match write.bytes {
                    Some(bytes) => drop(records.by_key.insert(write.key, (bytes, revision))),
                    None => drop(records.by_key.remove(&write.key)),
                }
            }
            Ok(revision)
        });
        ready(done).boxed()
    }
}
