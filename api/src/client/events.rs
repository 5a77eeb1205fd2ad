//! Streams of events that go on after a broken connection, without a gap and without a duplicate.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::sse::SseParser;
use super::transport::{Call, Transport, not_understood, understood};
use super::{ClientError, STREAM_IDLE_TIMEOUT_MS, STREAM_RECONNECT_MS, STREAM_RETRY_MAX_MS, STREAM_RETRY_MS};
use crate::types::{Event, EventBody};

/// A stream of events. A connection that breaks is opened again after the last event seen; when the server
/// has not been reached for [`STREAM_RECONNECT_MS`], the stream ends with the error.
pub struct EventStream {
    transport: Transport,
    segments: Vec<String>,
    topics: Option<String>,
    of_move: Option<String>,
    last_id: Option<u64>,
    connection: Option<Connection>,
    ended: bool,
}

struct Connection {
    url: String,
    body: Incoming,
    parser: SseParser,
    ready: std::collections::VecDeque<Vec<u8>>,
}

impl EventStream {
    pub(super) fn new(
        transport: Transport,
        segments: &[&str],
        topics: Option<String>,
        of_move: Option<String>,
        after: Option<u64>,
    ) -> Self {
        Self {
            transport,
            segments: segments.iter().map(ToString::to_string).collect(),
            topics,
            of_move,
            last_id: after,
            connection: None,
            ended: false,
        }
    }

    /// Opens the connection if there is none, so that an error comes at once rather than with the first event.
    ///
    /// # Errors
    /// As of any call; nothing is tried twice.
    pub async fn connect(&mut self) -> Result<(), ClientError> {
        if self.connection.is_none() && !self.ended {
            self.connection = self.open().await?;
            self.ended = self.connection.is_none();
        }
        Ok(())
    }

    /// The id of the last stored event that was given out: a later stream goes on `after` it.
    #[must_use]
    pub fn last_id(&self) -> Option<u64> {
        self.last_id
    }

    /// The next event; `None` after the last event of a move that has ended. The stream of all events never ends.
    ///
    /// # Errors
    /// A problem that the server names, an answer that is not understood, or a server that stays away.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        let mut away_since = None;
        let mut wait_ms = STREAM_RETRY_MS;
        loop {
            if self.ended {
                return Ok(None);
            }
            match self.attempt().await {
                Ok(Some(event)) => return Ok(Some(event)),
                Ok(None) => (away_since, wait_ms) = (None, STREAM_RETRY_MS),
                Err(ClientError::Unreachable { url, detail, .. }) => {
                    let since = *away_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > Duration::from_millis(STREAM_RECONNECT_MS) {
                        return Err(ClientError::Unreachable { url, detail, sent: false });
                    }
                    self.connection = None;
                    tokio::time::sleep(Duration::from_millis(wait_ms)).await; // a pause between attempts, not a wait for a state
                    wait_ms = (wait_ms * 2).min(STREAM_RETRY_MAX_MS);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One event, or `None` when there is something else to look at first.
    async fn attempt(&mut self) -> Result<Option<Event>, ClientError> {
        self.connect().await?;
        let Some(connection) = &mut self.connection else { return Ok(None) };
        let Some(data) = connection.ready.pop_front() else {
            connection.read().await?;
            return Ok(None);
        };
        let event: Event = understood(&connection.url, &data)?;
        Ok(self.accepted(event))
    }

    fn accepted(&mut self, event: Event) -> Option<Event> {
        if event.body.is_stored() {
            if self.last_id.is_some_and(|last| event.id <= last) {
                return None; // seen before the connection broke
            }
            self.last_id = Some(event.id);
        }
        let done = matches!(event.body, EventBody::MoveDone { .. });
        self.ended = done && self.of_move.is_some() && event.move_id == self.of_move;
        Some(event)
    }

    async fn open(&self) -> Result<Option<Connection>, ClientError> {
        let segments: Vec<&str> = self.segments.iter().map(String::as_str).collect();
        let call = Call::new(Method::GET, &segments)
            .accept("text/event-stream")
            .query("topics", self.topics.as_deref())
            .header("last-event-id", self.last_id.map(|id| id.to_string()));
        let (url, answer) = self.transport.open(call).await?;
        if answer.status() == StatusCode::NO_CONTENT {
            return Ok(None); // the move has ended and everything has been told
        }
        Ok(Some(Connection {
            url,
            body: answer.into_body(),
            parser: SseParser::default(),
            ready: std::collections::VecDeque::new(),
        }))
    }
}

impl Connection {
    async fn read(&mut self) -> Result<(), ClientError> {
        let chunk = next_chunk(&self.url, &mut self.body).await?;
        let events =
            self.parser.take(&chunk).map_err(|_| not_understood(&self.url, "an event without an end"))?;
        self.ready.extend(events);
        Ok(())
    }
}

/// The next piece of a stream. Its end and its silence are errors: streams of this API say when they are done.
pub(super) async fn next_chunk(url: &str, body: &mut Incoming) -> Result<Bytes, ClientError> {
    let broken = |detail: String| ClientError::Unreachable { url: url.to_owned(), detail, sent: true };
    loop {
        let frame = tokio::time::timeout(Duration::from_millis(STREAM_IDLE_TIMEOUT_MS), body.frame())
            .await
            .map_err(|_| broken(format!("nothing came for {STREAM_IDLE_TIMEOUT_MS} ms")))?
            .ok_or_else(|| broken("the stream was closed".to_owned()))?
            .map_err(|error| broken(format!("the stream broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            return Ok(data);
        }
    }
}
