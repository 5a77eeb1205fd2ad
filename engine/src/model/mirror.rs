//! Mirroring while a new copy warms: what is asked for, and what it showed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A sample of safe requests goes to the new copies too, before they get any traffic. Its answers are thrown away
/// and compared with those that clients got.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MirrorSettings {
    /// How many of a thousand safe requests (GET and HEAD without a body) are copied.
    pub sample_permille: u16,
    /// Answers that have to be compared for a verdict; with less, after `max_ms`, it is "inconclusive".
    pub min_samples: u32,
    /// Longest time that is mirrored.
    pub max_ms: u32,
    /// Share of the copies that may be answered worse than the clients' requests were.
    pub differing_ratio: f64,
    /// Requests with `Authorization` or `Cookie` are copied too.
    pub with_credentials: bool,
    /// Most copies in a second, for each edge.
    pub max_requests_per_s: u32,
    /// Most copies at a time, for each edge.
    pub max_concurrent: u32,
    /// Longest time for one copy with its answer.
    pub timeout_ms: u32,
}

impl Default for MirrorSettings {
    fn default() -> Self {
        Self {
            sample_permille: 200, // a fifth: the new copy sees what is usual, and never more load than the old
            min_samples: 50,      // enough to see what fails one time in twenty
            max_ms: 15_000,       // at 17 requests/s the sample is whole by then; a move is to stay short
            differing_ratio: 0.01, // as the shift's own guard on errors
            with_credentials: false, // what a GET does in somebody's name happens once, unless somebody says so
            max_requests_per_s: 50,
            max_concurrent: 10,
            timeout_ms: 5_000,
        }
    }
}

/// What mirroring has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorReport {
    /// `pass`, `fail` or `inconclusive`.
    pub verdict: String,
    /// Why, in words.
    pub message: String,
    /// Copies that were sent.
    pub sent: u64,
    /// Copies whose answer was compared with the client's.
    pub compared: u64,
    /// Copies that the new copy has not answered.
    pub failed: u64,
    /// Compared answers whose class of status code differed, by both classes, such as `2xx>5xx`.
    pub differed: BTreeMap<String, u64>,
    /// Compared answers whose status codes were not equal.
    pub unequal: u64,
    /// Copies that were ended before anything could be said.
    pub unfinished: u64,
    /// Requests that were not copied because of a cap.
    pub skipped: u64,
    /// Requests that were not copied because they carry credentials.
    pub left_out: u64,
    /// 95th percentile of the time to the head of the clients' answers, in microseconds; `None` without any.
    pub client_p95_us: Option<u64>,
    /// The same of the copies.
    pub mirror_p95_us: Option<u64>,
}
