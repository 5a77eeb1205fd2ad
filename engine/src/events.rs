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
/// Stored events that a reader takes at once: of ten thousand it has one part in memory at a time, and one that knows all
/// but the last few reads those alone.
const MAX_PAGE_EVENTS: usize = 500;

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
            read: 0,
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
    /// Newest stored event that was read, also of those that cannot be told.
    read: u64,
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
                self.behind = self.read_history().await;
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

    /// Reads on in what is stored; says whether there may be more.
    async fn read_history(&mut self) -> bool {
        let from = keys::event(self.read.max(self.seen).saturating_add(1));
        match self.store.survey_from(keys::EVENTS, &from, MAX_PAGE_EVENTS).await {
            Ok(survey) => {
                for (key, why) in &survey.unsound {
                    tracing::error!(%key, %why, "a stored event cannot be read; the others are told");
                }
                // By the key: the last of a page may be one that cannot be read.
                let last = survey.last_key().and_then(keys::event_number);
                self.read = last.unwrap_or(self.read);
                let entries = survey.entries.into_iter();
                let events: Vec<Event> =
                    entries.filter_map(|entry| serde_json::from_slice(&entry.value).ok()).collect();
                self.history = events.into_iter();
                last.is_some()
            }
            Err(error) => {
                tracing::error!(%error, "stored events cannot be read; only live ones follow");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UnixMs;
    use crate::store::{Batch, SqliteStore, Write};

    const STORED: u64 = 3 * MAX_PAGE_EVENTS as u64 + 7;

    fn event(id: u64) -> Event {
        let body = EventBody::MachineRemoved { machine: format!("m-{id}") };
        Event { id, at: id as UnixMs, service: None, rollout: None, body }
    }

    async fn stored(dir: &std::path::Path, unreadable: u64) -> Events {
        let store = SqliteStore::open(dir).unwrap();
        let write = |id: u64| {
            let value =
                if id == unreadable { b"{".to_vec() } else { serde_json::to_vec(&event(id)).unwrap() };
            Write::Put(keys::event(id), value.into())
        };
        for first in (1..=STORED).step_by(500) {
            let writes = (first..=STORED.min(first + 499)).map(write).collect();
            store.commit(Batch { preconditions: Vec::new(), writes }).await.unwrap();
        }
        Events::new(Arc::new(store))
    }

    #[tokio::test]
    async fn a_reader_gets_every_stored_event_once_page_by_page_and_then_the_live_ones() {
        let dir = tempfile::tempdir().unwrap();
        // The last one of the first page: whoever reads on from what was told would read that page for ever.
        let unreadable = MAX_PAGE_EVENTS as u64;
        let events = stored(dir.path(), unreadable).await;
        for after in [0, STORED - 3, STORED] {
            let mut reader = events.after(after);
            for expected in (after + 1..=STORED).filter(|id| *id != unreadable) {
                assert_eq!(reader.next().await.unwrap().id, expected);
            }
            let live = event(STORED + 1 + after);
            events.tell(vec![live.clone()]);
            assert_eq!(reader.next().await, Some(live));
        }
    }
}
