//! A watch: the log up to now, then live, and back to the log whenever it has fallen behind.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{mpsc, oneshot};

use super::fault::closed;
use super::reader::Query;
use crate::store::{Committed, Revision, StoreError};

/// One watch. It holds no part of the store open: when the store is closed, the watch ends with an error.
pub(super) struct Watch {
    after: Revision,
    /// Subscribed before the log is read for the first time: what is not in the log by then comes here.
    live: broadcast::Receiver<Arc<Committed>>,
    reader: mpsc::WeakSender<Query>,
    page: VecDeque<Committed>,
    behind: bool,
}

impl Watch {
    pub(super) const fn new(
        after: Revision,
        live: broadcast::Receiver<Arc<Committed>>,
        reader: mpsc::WeakSender<Query>,
    ) -> Self {
        Self { after, live, reader, page: VecDeque::new(), behind: true }
    }

    pub(super) fn into_stream(self) -> BoxStream<'static, Result<Committed, StoreError>> {
        stream::unfold(Some(self), |watch| async move {
            let mut watch = watch?; // it has ended with an error
            match watch.next().await {
                Ok(committed) => Some((Ok(committed), Some(watch))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn next(&mut self) -> Result<Committed, StoreError> {
        loop {
            if let Some(committed) = self.page.pop_front() {
                self.after = committed.revision;
                return Ok(committed);
            }
            if self.behind {
                self.page = self.read_log().await?.into();
                self.behind = !self.page.is_empty();
                continue;
            }
            match self.live.recv().await {
                Ok(committed) if committed.revision <= self.after => {} // the log had it already
                Ok(committed) if committed.revision == self.after + 1 => {
                    self.after = committed.revision;
                    return Ok(Arc::unwrap_or_clone(committed));
                }
                Ok(_) | Err(RecvError::Lagged(_)) => self.behind = true,
                Err(RecvError::Closed) => return Err(closed()),
            }
        }
    }

    async fn read_log(&self) -> Result<Vec<Committed>, StoreError> {
        let (reply, answer) = oneshot::channel();
        let reader = self.reader.upgrade().ok_or_else(closed)?;
        reader.send(Query::Page { after: self.after, reply }).await.map_err(|_| closed())?;
        drop(reader);
        answer.await.map_err(|_| closed())?
    }
}
