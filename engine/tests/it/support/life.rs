//! An engine's life: after its end nothing that it calls ever answers, as for a process that was killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use peregrine_engine::store::{Batch, Committed, Entry, LeaseGrant, Revision, Store, StoreError, Write};

#[derive(Default)]
pub(crate) struct Life {
    over: AtomicBool,
    /// Commits that matter so far.
    commits: AtomicUsize,
    plan: std::sync::Mutex<Option<End>>,
}

/// When the life ends by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// At this commit from the first rollout on, counted from 0.
    pub(crate) commit: usize,
    /// After it is durable, or before.
    pub(crate) after: bool,
}

impl Life {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Counts from now on, and ends there.
    pub(crate) fn end_at(&self, end: End) {
        self.commits.store(0, Ordering::SeqCst);
        *self.plan.lock().expect("not poisoned") = Some(end);
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub(crate) fn commits(&self) -> usize {
        self.commits.load(Ordering::SeqCst)
    }

    /// Never returns once the life is over.
    pub(crate) async fn go_on(&self) {
        if self.is_over() {
            std::future::pending::<()>().await;
        }
    }
}

pub(crate) struct MortalStore {
    inner: Arc<dyn Store>,
    life: Arc<Life>,
}

impl MortalStore {
    pub(crate) fn new(inner: Arc<dyn Store>, life: Arc<Life>) -> Self {
        Self { inner, life }
    }
}

impl Store for MortalStore {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move {
            self.life.go_on().await;
            // Every commit that touches a rollout, its journal or its copies.
            let matters = batch.writes.iter().any(|write| {
                let (Write::Put(key, _) | Write::Delete(key)) = write;
                ["journal/", "rollouts/", "instances/"].iter().any(|family| key.starts_with(family))
            });
            let number = if matters { Some(self.life.commits.fetch_add(1, Ordering::SeqCst)) } else { None };
            let end = self.life.plan.lock().expect("not poisoned").filter(|end| Some(end.commit) == number);
            if end.is_some_and(|end| !end.after) {
                self.life.end();
                self.life.go_on().await;
            }
            let done = self.inner.commit(batch).await;
            if end.is_some() {
                self.life.end();
            }
            self.life.go_on().await;
            done
        })
    }

    fn range(&self, prefix: &str) -> BoxFuture<'_, Result<(Revision, Vec<Entry>), StoreError>> {
        self.inner.range(prefix)
    }

    fn watch(&self, after: Revision) -> BoxStream<'static, Result<Committed, StoreError>> {
        self.inner.watch(after)
    }

    fn lease(
        &self,
        name: &str,
        holder: &str,
        now_ms: u64,
        ttl_ms: u64,
    ) -> BoxFuture<'_, Result<LeaseGrant, StoreError>> {
        self.inner.lease(name, holder, now_ms, ttl_ms)
    }
}
