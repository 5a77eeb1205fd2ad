//! Streams of log lines. Following goes on after a broken connection, without a gap and without a duplicate.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use http::Method;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use jiff::Timestamp;
use tokio::time::Instant;

use super::events::next_chunk;
use super::transport::{Call, Transport, not_understood, understood};
use super::{ClientError, STREAM_RECONNECT_MS, STREAM_RETRY_MAX_MS, STREAM_RETRY_MS};
use crate::types::{LogLine, LogSource};

/// Longest line of a log stream, in its JSON form.
const MAX_LINE_BYTES: usize = 4 << 20;

/// Which lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Go on with new lines.
    pub follow: bool,
    /// So many of the last lines first; `None` is all.
    pub tail: Option<u64>,
    /// Lines since then.
    pub since: Option<Timestamp>,
}

/// A stream of log lines.
pub struct LogStream {
    transport: Transport,
    segments: Vec<String>,
    query: LogQuery,
    seen: Seen,
    connection: Option<Connection>,
    was_open: bool,
    ended: bool,
}

struct Connection {
    url: String,
    body: Incoming,
    partial: Vec<u8>,
    ready: VecDeque<Vec<u8>>,
}

/// For each instance, the time of its last line and how many lines of that time were given out: enough to
/// find the place again, as an instance writes its lines in order.
#[derive(Default)]
struct Seen {
    last: HashMap<String, (Timestamp, u64)>,
    replayed: HashMap<String, u64>,
}

impl LogStream {
    pub(super) fn new(transport: Transport, segments: &[&str], query: LogQuery) -> Self {
        Self {
            transport,
            segments: segments.iter().map(ToString::to_string).collect(),
            query,
            seen: Seen::default(),
            connection: None,
            was_open: false,
            ended: false,
        }
    }

    /// Opens the connection if there is none, so that an error comes at once rather than with the first line.
    ///
    /// # Errors
    /// As of any call; nothing is tried twice.
    pub async fn connect(&mut self) -> Result<(), ClientError> {
        if self.connection.is_none() {
            self.connection = Some(self.open().await?);
            self.was_open = true;
        }
        Ok(())
    }

    /// The next line; `None` after the last line of a history, or when what is followed has been removed.
    ///
    /// # Errors
    /// A problem that the server names, an answer that is not understood, or a server that stays away.
    pub async fn next(&mut self) -> Result<Option<LogLine>, ClientError> {
        let mut away_since = None;
        let mut wait_ms = STREAM_RETRY_MS;
        while !self.ended {
            match self.attempt().await {
                Ok(Some(line)) if self.seen.is_new(&line) => return Ok(Some(line)),
                Ok(_) => (away_since, wait_ms) = (None, STREAM_RETRY_MS),
                Err(ClientError::Problem(problem)) if problem.status == 404 && self.was_open => {
                    self.ended = true
                }
                Err(ClientError::Unreachable { url, detail, sent }) => {
                    let since = *away_since.get_or_insert_with(Instant::now);
                    if !self.query.follow || since.elapsed() > Duration::from_millis(STREAM_RECONNECT_MS) {
                        return Err(ClientError::Unreachable { url, detail, sent });
                    }
                    self.connection = None;
                    self.seen.start_again();
                    tokio::time::sleep(Duration::from_millis(wait_ms)).await; // a pause between attempts, not a wait for a state
                    wait_ms = (wait_ms * 2).min(STREAM_RETRY_MAX_MS);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn attempt(&mut self) -> Result<Option<LogLine>, ClientError> {
        self.connect().await?;
        let Some(connection) = &mut self.connection else { return Ok(None) };
        if let Some(line) = connection.ready.pop_front() {
            return understood(&connection.url, &line).map(Some);
        }
        if self.query.follow {
            connection.read_on().await?;
        } else if !connection.read_to_end().await? {
            self.ended = true;
        }
        Ok(None)
    }

    async fn open(&self) -> Result<Connection, ClientError> {
        let segments: Vec<&str> = self.segments.iter().map(String::as_str).collect();
        let resumed = self.seen.since();
        let tail = if resumed.is_some() { None } else { self.query.tail };
        let call = Call::new(Method::GET, &segments)
            .accept("application/x-ndjson")
            .query("follow", self.query.follow.then_some(true))
            .query("tail", tail)
            .query("since", resumed.or(self.query.since));
        let (url, answer) = self.transport.open(call).await?;
        Ok(Connection { url, body: answer.into_body(), partial: Vec::new(), ready: VecDeque::new() })
    }
}

impl Connection {
    async fn read_on(&mut self) -> Result<(), ClientError> {
        let chunk = next_chunk(&self.url, &mut self.body).await?;
        self.take(&chunk)
    }

    /// Reads on; `false` at the end.
    async fn read_to_end(&mut self) -> Result<bool, ClientError> {
        let broken = |detail: String| ClientError::Unreachable { url: self.url.clone(), detail, sent: true };
        let limit = Duration::from_millis(super::STREAM_IDLE_TIMEOUT_MS);
        let frame = tokio::time::timeout(limit, self.body.frame())
            .await
            .map_err(|_| broken(format!("nothing came for {} ms", limit.as_millis())))?;
        let Some(frame) = frame else { return Ok(false) };
        let frame = frame.map_err(|error| broken(format!("the lines broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            self.take(&data)?;
        }
        Ok(true)
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), ClientError> {
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                if line.len() > 1 {
                    self.ready.push_back(line); // an empty line only says that the server is there
                }
            }
            if self.partial.len() > MAX_LINE_BYTES {
                return Err(not_understood(&self.url, "a line without an end"));
            }
        }
        Ok(())
    }
}

impl Seen {
    /// Whether a line has not been given out before; it counts as given out then.
    fn is_new(&mut self, line: &LogLine) -> bool {
        if line.source == LogSource::Notice {
            return true;
        }
        let Some((last, count)) = self.last.get_mut(&line.instance) else {
            self.last.insert(line.instance.clone(), (line.time, 1));
            return true;
        };
        if let Some(replayed) = self.replayed.get_mut(&line.instance) {
            if line.time < *last {
                return false;
            }
            if line.time == *last && *replayed < *count {
                *replayed += 1;
                return false;
            }
            self.replayed.remove(&line.instance);
        }
        if line.time == *last {
            *count += 1;
        } else {
            (*last, *count) = (line.time, 1);
        }
        true
    }

    /// The connection broke: lines from `since` on are going to come again.
    fn start_again(&mut self) {
        self.replayed = self.last.keys().map(|instance| (instance.clone(), 0)).collect();
    }

    /// From when on lines have to come again so that none is missed.
    fn since(&self) -> Option<Timestamp> {
        self.last.values().map(|(time, _)| *time).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(instance: &str, ms: i64, text: &str) -> LogLine {
        LogLine {
            time: Timestamp::from_millisecond(ms).unwrap(),
            service: "shop".into(),
            instance: instance.into(),
            machine: "a".into(),
            source: LogSource::Stdout,
            text: text.into(),
        }
    }

    #[test]
    fn after_a_break_lines_that_come_again_are_dropped_and_new_ones_are_not() {
        let mut seen = Seen::default();
        for given in [line("x", 1, "a"), line("x", 2, "b"), line("x", 2, "b"), line("y", 5, "c")] {
            assert!(seen.is_new(&given));
        }
        assert_eq!(seen.since(), Some(Timestamp::from_millisecond(2).unwrap()));
        seen.start_again();
        assert!(!seen.is_new(&line("x", 2, "b")));
        assert!(!seen.is_new(&line("x", 2, "b")));
        assert!(seen.is_new(&line("x", 2, "written in the same millisecond")));
        assert!(!seen.is_new(&line("y", 3, "z")));
        assert!(!seen.is_new(&line("y", 5, "c")));
        assert!(seen.is_new(&line("y", 6, "d")));
        assert!(seen.is_new(&line("new", 1, "e")));
    }

    #[test]
    fn without_a_break_no_line_is_dropped_not_even_one_that_is_out_of_order() {
        let mut seen = Seen::default();
        assert!(seen.is_new(&line("x", 5, "a")));
        assert!(seen.is_new(&line("x", 4, "b")));
        assert!(seen.is_new(&line("x", 4, "b")));
    }
}
