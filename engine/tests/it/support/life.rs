//! An engine's life: after its end nothing that it calls ever answers, as for a process that was killed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use peregrine_engine::journal::{Direction, JournalRecord};
use peregrine_engine::model::Rollout;
use peregrine_engine::store::{
    Batch, Committed, Entry, LeaseGrant, Revision, Store, StoreError, Survey, Write,
};

#[derive(Default)]
pub(crate) struct Life {
    over: AtomicBool,
    /// Commits that matter so far.
    commits: AtomicUsize,
    plan: std::sync::Mutex<Option<End>>,
    border: std::sync::Mutex<Option<Border>>,
    /// What is kept back in the store.
    gate: std::sync::Mutex<Option<Arc<Gate>>>,
    /// The step and direction of every intent of this life, by the key of its record.
    intents: std::sync::Mutex<BTreeMap<String, (usize, Direction)>>,
}

/// Keeps back the first commit that writes such a rollout, and with it every commit that is asked for meanwhile.
pub(crate) struct Gate {
    wanted: Box<dyn Fn(&Rollout) -> bool + Send + Sync>,
    reached: AtomicBool,
    open: tokio::sync::Semaphore,
}

impl Gate {
    pub(crate) fn is_reached(&self) -> bool {
        self.reached.load(Ordering::SeqCst)
    }

    pub(crate) fn open(&self) {
        self.open.add_permits(1);
    }

    fn wants(&self, batch: &Batch) -> bool {
        batch.writes.iter().any(|write| match write {
            Write::Put(key, value) if key.starts_with("rollouts/") => {
                serde_json::from_slice(value).is_ok_and(|rollout| (self.wanted)(&rollout))
            }
            _ => false,
        })
    }
}

/// The end of a life at a step: it has been begun, or it has been done and that is not written down yet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Border {
    Begun(usize, Direction),
    Done(usize, Direction),
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

    /// Ends at a step, whenever that comes.
    pub(crate) fn end_at_step(&self, border: Border) {
        *self.border.lock().expect("not poisoned") = Some(border);
    }

    /// Keeps back the next commit that writes such a rollout, until the gate is opened.
    pub(crate) fn keep_back(&self, wanted: impl Fn(&Rollout) -> bool + Send + Sync + 'static) -> Arc<Gate> {
        let gate = Arc::new(Gate {
            wanted: Box::new(wanted),
            reached: AtomicBool::new(false),
            open: tokio::sync::Semaphore::new(0),
        });
        *self.gate.lock().expect("not poisoned") = Some(Arc::clone(&gate));
        gate
    }

    async fn pass_gate(&self, batch: &Batch) {
        let gate = self.gate.lock().expect("not poisoned").take_if(|gate| gate.wants(batch));
        if let Some(gate) = gate {
            gate.reached.store(true, Ordering::SeqCst);
            gate.open.acquire().await.expect("a gate is never closed").forget();
        }
    }

    /// The steps that were begun in this life, in order.
    pub(crate) fn begun(&self) -> Vec<(usize, Direction)> {
        self.intents.lock().expect("not poisoned").values().copied().collect()
    }

    /// Whether a batch is the border: before it is durable (`Done`), or after (`Begun`).
    fn reaches(&self, batch: &Batch) -> Option<Border> {
        let border = *self.border.lock().expect("not poisoned");
        for write in &batch.writes {
            let Write::Put(key, value) = write else { continue };
            if !key.starts_with("journal/") {
                continue;
            }
            match serde_json::from_slice(value) {
                Ok(JournalRecord::Intent { step, direction, .. }) => {
                    self.intents.lock().expect("not poisoned").insert(key.clone(), (step, direction));
                    if matches!(border, Some(Border::Begun(s, d)) if (s, d) == (step, direction)) {
                        return border;
                    }
                }
                Ok(JournalRecord::Settled { intent, error: None, .. }) => {
                    let of = key.rsplit_once('/').expect("a journal key").0;
                    let intents = self.intents.lock().expect("not poisoned");
                    let settled = intents.get(&format!("{of}/{intent:08}"));
                    if matches!(border, Some(Border::Done(s, d)) if Some(&(s, d)) == settled) {
                        return border;
                    }
                }
                _ => {}
            }
        }
        None
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
            self.life.pass_gate(&batch).await;
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
            let border = self.life.reaches(&batch);
            if matches!(border, Some(Border::Done(..))) {
                self.life.end();
                self.life.go_on().await;
            }
            let done = self.inner.commit(batch).await;
            if end.is_some() || border.is_some() {
                self.life.end();
            }
            self.life.go_on().await;
            done
        })
    }

    fn range(&self, prefix: &str) -> BoxFuture<'_, Result<(Revision, Vec<Entry>), StoreError>> {
        self.inner.range(prefix)
    }

    fn survey(&self, prefix: &str) -> BoxFuture<'_, Result<Survey, StoreError>> {
        self.inner.survey(prefix)
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
