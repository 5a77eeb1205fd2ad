//! Receipts: what a rollout amounted to, as measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{InstanceId, Phase, UnixMs};

/// What a rollout amounted to. `hard_cut` empty and `failed` 0 is what "no request was lost" means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// When it was written.
    pub at: UnixMs,
    /// Whole duration.
    pub duration_ms: u64,
    /// Duration of each phase, in order.
    pub phases: Vec<PhaseTime>,
    /// Requests sent to the copies of this service during the rollout.
    pub requests: u64,
    /// Answers 5xx, and requests without an answer; among them those that were held and had to be refused.
    pub failed: u64,
    /// Attempts that were made again elsewhere without the client noticing.
    pub retried: u64,
    /// Requests that were held at the edge.
    pub held: u64,
    /// How long requests were held, in milliseconds; 0 if they were not.
    #[serde(default)]
    pub pause_ms: u64,
    /// Longest time to a response head during the rollout less the p50 of the same time, or the longest time that a
    /// request was held if that is more; in milliseconds.
    pub longest_extra_wait_ms: u64,
    /// Body bytes to the copies and to clients.
    pub bytes_to_upstream: u64,
    /// Body bytes to clients.
    pub bytes_to_client: u64,
    /// Bytes of image brought to the target.
    pub transferred_bytes: u64,
    /// One entry for each copy that took part.
    pub instances: Vec<InstanceReceipt>,
    /// Ids of requests that were cut at a hard deadline.
    pub hard_cut: Vec<String>,
    /// The same by the name of their traffic class.
    #[serde(default)]
    pub hard_cut_by_class: BTreeMap<String, Vec<String>>,
    /// What copies of requests have shown before the new copies got traffic. They are in none of the counts above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<super::MirrorReport>,
    /// What could not be measured, said plainly (for example after a crash of the engine).
    pub notes: Vec<String>,
}

/// Duration of a phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Phase.
    pub phase: Phase,
    /// Duration.
    pub duration_ms: u64,
}

/// One copy's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReceipt {
    /// Instance.
    pub instance: InstanceId,
    /// Machine.
    pub machine: String,
    /// It was new in this rollout.
    pub new: bool,
    /// It was drained to the last lease.
    pub drained: bool,
    /// Requests sent to it during the rollout.
    pub started: u64,
    /// Leases that ended by themselves.
    pub completed: ClassCounts,
    /// Closed politely at a soft deadline.
    pub soft_closed: ClassCounts,
}

/// Counts by traffic class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassCounts {
    /// Requests.
    pub request: u64,
    /// Uploads and downloads.
    pub transfer: u64,
    /// Server-sent events.
    pub sse: u64,
    /// gRPC streams.
    pub grpc_stream: u64,
    /// WebSockets and tunnels.
    pub websocket: u64,
    /// Held requests.
    pub held: u64,
}
