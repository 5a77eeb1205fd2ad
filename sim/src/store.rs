//! The store under the engine: the memory of the engine's own tests, which outlives every engine, with a disk
//! that is slow or full at times. It looks at every receipt that is written.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use peregrine_engine::model::Rollout;
use peregrine_engine::store::{Batch, Committed, Entry, LeaseGrant, Revision, Store, StoreError, Write};

use crate::memory::MemoryStore;
use crate::world::World;

/// What is told of every rollout that is written for the last time.
pub(crate) type Ended = Arc<dyn Fn(&Rollout) + Send + Sync>;

/// So much of a record is shown in a trace.
const MAX_SHOWN_CHARS: usize = 2_000;

pub(crate) struct SimStore {
    pub(crate) world: World,
    pub(crate) inner: Arc<MemoryStore>,
    pub(crate) ended: Ended,
    pub(crate) full: Arc<std::sync::atomic::AtomicBool>,
}

impl SimStore {
    fn look(&self, batch: &Batch) {
        for write in &batch.writes {
            let Write::Put(key, value) = write else { continue };
            if !key.starts_with("rollouts/") {
                continue;
            }
            match serde_json::from_slice::<Rollout>(value) {
                Ok(rollout) if rollout.state.is_terminal() => (self.ended)(&rollout),
                Ok(_) => {}
                Err(error) => self.world.violated(format_args!("{key} cannot be read: {error}")),
            }
        }
    }
}

impl Store for SimStore {
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<Revision, StoreError>> {
        // Before anything is waited for: the counts that a receipt was made from have not moved on.
        self.look(&batch);
        Box::pin(async move {
            if self.full.load(std::sync::atomic::Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(1)).await;
                return Err(StoreError::Full("simulated".into()));
            }
            if self.world.one_in(4) {
                self.world.sleep(1, 4).await;
            }
            for write in &batch.writes {
                self.world.explain(|| match write {
                    Write::Put(key, value) => {
                        let text = String::from_utf8_lossy(value);
                        format!("store {key} = {}", text.chars().take(MAX_SHOWN_CHARS).collect::<String>())
                    }
                    Write::Delete(key) => format!("store {key} is gone"),
                });
            }
            self.inner.commit(batch).await
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
