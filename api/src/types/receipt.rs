//! Receipts.

use std::collections::BTreeMap;

use jiff::Timestamp;
use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Phase, instant};

/// What a rollout amounted to, as measured. `hard_cut` empty and `failed` 0 is what "no request was lost" means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// The move that it is of.
    #[serde(rename = "move")]
    pub move_id: String,
    /// Service.
    pub service: String,
    /// When it was written.
    pub time: Timestamp,
    /// Whole duration.
    pub duration_ms: u64,
    /// Duration of each phase, in order.
    pub phases: Vec<PhaseDuration>,
    /// Requests sent to the copies of the service during the rollout.
    pub requests: u64,
    /// Answers 5xx, and requests without an answer; among them those that were held and had to be refused.
    pub failed: u64,
    /// Attempts that were made again elsewhere without the client noticing.
    pub retried: u64,
    /// Requests that were held at the edge.
    pub held: u64,
    /// How long requests were held; 0 if they were not.
    #[serde(default)]
    pub pause_ms: u64,
    /// Longest time to a response head during the rollout less the p50 of the same time, or the longest time that a
    /// request was held if that is more.
    pub longest_extra_wait_ms: u64,
    /// Body bytes sent to the copies.
    pub bytes_to_upstream: u64,
    /// Body bytes sent to clients.
    pub bytes_to_client: u64,
    /// Bytes of image brought to the target.
    pub transferred_bytes: u64,
    /// One entry for each copy that took part.
    pub instances: Vec<InstanceReceipt>,
    /// Ids of requests that were cut at a hard deadline.
    pub hard_cut: Vec<String>,
    /// The same by the name of their traffic class: `request`, `transfer`, `sse`, `grpc_stream`, `websocket`, `held`.
    #[serde(default)]
    pub hard_cut_by_class: BTreeMap<String, Vec<String>>,
    /// What copies of requests have shown before the new copies got traffic; they are in none of the counts above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorReport>,
    /// What could not be measured, said plainly.
    pub notes: Vec<String>,
}

/// What copies of requests have shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MirrorReport {
    /// `pass`, `fail` or `inconclusive`.
    pub verdict: String,
    /// Why, in words.
    pub message: String,
    /// Copies that were sent.
    pub sent: u64,
    /// Copies whose answer was compared with the client's.
    pub compared: u64,
    /// Copies that were not answered.
    pub failed: u64,
    /// Compared answers whose class of status code differed, by the client's and the copy's, such as `2xx>5xx`.
    pub differed: BTreeMap<String, u64>,
    /// Compared answers whose status codes were not equal.
    pub unequal: u64,
    /// Copies that were ended before anything could be said.
    pub unfinished: u64,
    /// Requests that were not copied because of a cap.
    pub skipped: u64,
    /// Requests that were not copied because they carry credentials.
    pub left_out: u64,
    /// 95th percentile of the time to the head of the clients' answers, in microseconds.
    #[serde(default)]
    pub client_p95_us: Option<u64>,
    /// The same of the copies.
    #[serde(default)]
    pub mirror_p95_us: Option<u64>,
}

impl From<&engine::MirrorReport> for MirrorReport {
    fn from(report: &engine::MirrorReport) -> Self {
        Self {
            verdict: report.verdict.clone(),
            message: report.message.clone(),
            sent: report.sent,
            compared: report.compared,
            failed: report.failed,
            differed: report.differed.clone(),
            unequal: report.unequal,
            unfinished: report.unfinished,
            skipped: report.skipped,
            left_out: report.left_out,
            client_p95_us: report.client_p95_us,
            mirror_p95_us: report.mirror_p95_us,
        }
    }
}

/// Duration of a phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseDuration {
    /// Phase.
    pub phase: Phase,
    /// Duration.
    pub duration_ms: u64,
}

/// One copy's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceReceipt {
    /// Instance id.
    pub instance: String,
    /// Machine.
    pub machine: String,
    /// It was new in this rollout.
    pub new: bool,
    /// It was drained to the last lease.
    pub drained: bool,
    /// Requests sent to it during the rollout.
    pub started: u64,
    /// Those that ended by themselves.
    pub completed: ClassCounts,
    /// Those that were closed politely at a soft deadline.
    pub soft_closed: ClassCounts,
}

/// Counts by traffic class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClassCounts {
    /// Requests.
    pub request: u64,
    /// Uploads and downloads.
    pub transfer: u64,
    /// Server-sent events.
    pub sse: u64,
    /// gRPC streams.
    pub grpc_stream: u64,
    /// WebSockets and other tunnels.
    pub websocket: u64,
    /// Held requests.
    pub held: u64,
}

impl Receipt {
    /// The receipt of a rollout.
    #[must_use]
    pub fn of(move_id: &engine::RolloutId, service: &str, receipt: &engine::Receipt) -> Self {
        Self {
            move_id: move_id.to_string(),
            service: service.to_owned(),
            time: instant(receipt.at),
            duration_ms: receipt.duration_ms,
            phases: receipt
                .phases
                .iter()
                .map(|time| PhaseDuration { phase: time.phase.into(), duration_ms: time.duration_ms })
                .collect(),
            requests: receipt.requests,
            failed: receipt.failed,
            retried: receipt.retried,
            held: receipt.held,
            pause_ms: receipt.pause_ms,
            longest_extra_wait_ms: receipt.longest_extra_wait_ms,
            bytes_to_upstream: receipt.bytes_to_upstream,
            bytes_to_client: receipt.bytes_to_client,
            transferred_bytes: receipt.transferred_bytes,
            instances: receipt.instances.iter().map(Into::into).collect(),
            hard_cut: receipt.hard_cut.clone(),
            hard_cut_by_class: receipt.hard_cut_by_class.clone(),
            mirror: receipt.mirror.as_ref().map(Into::into),
            notes: receipt.notes.clone(),
        }
    }
}

impl From<&engine::InstanceReceipt> for InstanceReceipt {
    fn from(receipt: &engine::InstanceReceipt) -> Self {
        Self {
            instance: receipt.instance.to_string(),
            machine: receipt.machine.clone(),
            new: receipt.new,
            drained: receipt.drained,
            started: receipt.started,
            completed: receipt.completed.into(),
            soft_closed: receipt.soft_closed.into(),
        }
    }
}

impl From<engine::ClassCounts> for ClassCounts {
    fn from(counts: engine::ClassCounts) -> Self {
        Self {
            request: counts.request,
            transfer: counts.transfer,
            sse: counts.sse,
            grpc_stream: counts.grpc_stream,
            websocket: counts.websocket,
            held: counts.held,
        }
    }
}
