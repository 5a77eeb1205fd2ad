//! The event stream: stored history, then live, without a gap and without a doubled event.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::sync::broadcast;

use crate::keys;
use crate::model::{Event, EventBody};
use crate::store::Store;

/// Live events that a slow reader may be behind before it has to go back to the stored ones.
const MAX_LIVE_BACKLOG: usize = 1_024;

pub(crate) struct Events {
    store: Arc<dyn Store>,
    live: broadcast::Sender<Arc<Event>>,
}

impl Events {
    pub(crate) fn new(store: Arc<dyn Store>) -> Self {
        Self { store, live: broadcast::channel(MAX_LIVE_BACKLOG).0 }
    }

    /// Called with the commit lock held, so in order.
    pub(crate) fn tell(&self, events: Vec<Event>) {
        for event in events {
            drop(self.live.send(Arc::new(event))); // nobody listens: fine, it is stored
        }
    }

    pub(crate) fn tell_live(&self, event: Event) {
        drop(self.live.send(Arc::new(event))); // nobody listens: a sample is only for those who do
    }

    /// Stored events after `after`, then live ones for ever.
    pub(crate) fn after(&self, after: u64) -> BoxStream<'static, Event> {
        let reader = Reader {
            store: Arc::clone(&self.store),
            // Subscribed before the history is read: what comes in between is seen twice and told once.
            live: self.live.subscribe(),
            seen: after,
            history: Vec::new().into_iter(),
            behind: true,
        };
        stream::unfold(reader, |mut reader| async move { reader.next().await.map(|event| (event, reader)) })
            .boxed()
    }
}

struct Reader {
    store: Arc<dyn Store>,
    live: broadcast::Receiver<Arc<Event>>,
    seen: u64,
    history: std::vec::IntoIter<Event>,
    behind: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.history.next() {
                self.seen = event.id;
                return Some(event);
            }
            if self.behind {
                self.behind = false;
                self.read_history().await;
                continue;
            }
            match self.live.recv().await {
                Ok(event) if matches!(event.body, EventBody::Sample(_)) => return Some((*event).clone()),
                Ok(event) if event.id <= self.seen => {}
                Ok(event) => {
                    self.seen = event.id;
                    return Some((*event).clone());
                }
                Err(broadcast::error::RecvError::Lagged(_)) => self.behind = true,
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }

    async fn read_history(&mut self) {
        match self.store.range(keys::EVENTS).await {
            Ok((_, entries)) => {
                let from = keys::event(self.seen + 1);
                let events: Vec<Event> = entries
                    .into_iter()
                    .filter(|entry| entry.key >= from)
                    .filter_map(|entry| serde_json::from_slice(&entry.value).ok())
                    .collect();
                self.history = events.into_iter();
            }
            Err(error) => tracing::error!(%error, "stored events cannot be read; only live ones follow"),
        }
    }
}
