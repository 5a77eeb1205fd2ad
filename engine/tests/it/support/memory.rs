//! A store in memory that outlives the engine on it: what a disk is to a killed process.

use std::collections::BTreeMap;
use std::sync::Mutex;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use peregrine_engine::store::{
    Batch, Committed, Entry, LeaseGrant, Precondition, Revision, Store, StoreError, Write,
};

#[derive(Default)]
pub(crate) struct MemoryStore {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    revision: Revision,
    entries: BTreeMap<String, (Bytes, Revision)>,
    commits: Vec<Committed>,
}

impl Inner {
    fn holds(&self, precondition: &Precondition) -> bool {
        match precondition {
            Precondition::Absent(key) => !self.entries.contains_key(key),
            Precondition::Present(key) => self.entries.contains_key(key),
            Precondition::Unchanged(key, at) => {
                self.entries.get(key).is_some_and(|(_, revision)| revision == at)
            }
            Precondition::Equals(key, value) => self.entries.get(key).is_some_and(|(have, _)| have == value),
        }
    }
}

impl MemoryStore {
    pub(crate) fn commits(&self) -> Vec<Committed> {
        self.inner.lock().expect("not poisoned").commits.clone()
    }
}

impl Store for MemoryStore {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move {
            let mut inner = self.inner.lock().expect("not poisoned");
            if let Some(precondition) = batch.preconditions.iter().find(|p| !inner.holds(p)) {
                return Err(StoreError::Conflict(format!("{precondition:?}")));
            }
            inner.revision += 1;
            let revision = inner.revision;
            for write in &batch.writes {
                match write {
                    Write::Put(key, value) => {
                        inner.entries.insert(key.clone(), (value.clone(), revision));
                    }
                    Write::Delete(key) => {
                        inner.entries.remove(key);
                    }
                }
            }
            inner.commits.push(Committed { revision, writes: batch.writes });
            Ok(revision)
        })
    }

    fn range(&self, prefix: &str) -> BoxFuture<'_, Result<(Revision, Vec<Entry>), StoreError>> {
        let inner = self.inner.lock().expect("not poisoned");
        let entries = inner
            .entries
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, (value, revision))| Entry {
                key: key.clone(),
                value: value.clone(),
                revision: *revision,
            })
            .collect();
        let found = (inner.revision, entries);
        Box::pin(async move { Ok(found) })
    }

    fn watch(&self, after: Revision) -> BoxStream<'static, Result<Committed, StoreError>> {
        let known: Vec<_> =
            self.commits().into_iter().filter(|committed| committed.revision > after).map(Ok).collect();
        stream::iter(known).chain(stream::pending()).boxed()
    }

    fn lease(
        &self,
        _name: &str,
        holder: &str,
        now_ms: u64,
        ttl_ms: u64,
    ) -> BoxFuture<'_, Result<LeaseGrant, StoreError>> {
        let grant =
            LeaseGrant { holder: holder.to_owned(), token: 1, expires_at: now_ms + ttl_ms, granted: true };
        Box::pin(async move { Ok(grant) })
    }
}
