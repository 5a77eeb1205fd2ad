//! The counts of a run. One short lock per request; every number a reader sees is from one moment.

use std::collections::BTreeMap;
use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::oracle::{AcknowledgedBits, AcknowledgedIds};

/// How many failures a summary tells in detail; the counts are always complete.
pub(super) const MAX_DETAILED_FAILURES: usize = 20;
/// The longest latency that is told apart, in microseconds.
const MAX_LATENCY_US: u64 = 600_000_000;
/// Digits to which latencies are told apart.
const LATENCY_DIGITS: u8 = 3;

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A complete answer with another status than 2xx.
    Non2xx,
    /// The connection or stream ended before the answer's head.
    Reset,
    /// The answer's body ended early.
    Truncated,
    /// No complete answer in time.
    Timeout,
    /// No connection.
    Connect,
    /// An answer that is not HTTP, or that is not the one to this request: wrong id, length or content.
    Malformed,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Non2xx => "non-2xx",
            Self::Reset => "reset",
            Self::Truncated => "truncated",
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Malformed => "malformed",
        })
    }
}

/// Failed requests by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Failures {
    /// See [`FailureKind::Non2xx`].
    pub non_2xx: u64,
    /// See [`FailureKind::Reset`].
    pub reset: u64,
    /// See [`FailureKind::Truncated`].
    pub truncated: u64,
    /// See [`FailureKind::Timeout`].
    pub timeout: u64,
    /// See [`FailureKind::Connect`].
    pub connect: u64,
    /// See [`FailureKind::Malformed`].
    pub malformed: u64,
}

impl Failures {
    /// All failed requests.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.non_2xx + self.reset + self.truncated + self.timeout + self.connect + self.malformed
    }

    const fn count(&mut self, kind: FailureKind) {
        match kind {
            FailureKind::Non2xx => self.non_2xx += 1,
            FailureKind::Reset => self.reset += 1,
            FailureKind::Truncated => self.truncated += 1,
            FailureKind::Timeout => self.timeout += 1,
            FailureKind::Connect => self.connect += 1,
            FailureKind::Malformed => self.malformed += 1,
        }
    }
}

/// One failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The request's id.
    pub id: String,
    /// When it ended, in milliseconds from the start of the run.
    pub at_ms: u64,
    /// How it failed.
    pub kind: FailureKind,
    /// What was seen.
    pub detail: String,
}

/// Latencies of all requests, failed ones included, in microseconds; rounded up to three digits, the maximum exact.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p99_9: u64,
    /// The longest.
    pub max: u64,
}

/// Counters of a stretch of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// The end of the stretch, in milliseconds from the start of the run.
    pub at_ms: u64,
    /// The stretch's length in milliseconds.
    pub length_ms: u64,
    /// Requests that ended: `ok` and `failed` together.
    pub sent: u64,
    /// Complete 2xx answers.
    pub ok: u64,
    /// Failed requests.
    pub failed: u64,
    /// Complete 2xx answers by the origin that gave them (`x-instance`).
    pub per_instance: BTreeMap<String, u64>,
    /// The longest request that ended in the stretch, in microseconds.
    pub longest_us: u64,
}

/// The result of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The run's name.
    pub run: String,
    /// From the start to the last answer, in milliseconds.
    pub duration_ms: u64,
    /// Requests sent: `ok` and `failed` together.
    pub sent: u64,
    /// Complete 2xx answers.
    pub ok: u64,
    /// Failed requests by kind.
    pub failed: Failures,
    /// Latencies.
    pub latency_us: Latency,
    /// Bytes of answer bodies.
    pub body_bytes: u64,
    /// Connections opened, idle ones included.
    pub connections_opened: u64,
    /// Connections that the peer ended although the client would have gone on; idle ones included.
    pub connections_closed_by_peer: u64,
    /// Idle connections that could not be opened or used once.
    pub idle_connections_failed: u64,
    /// Answers that announced the end of their connection (`Connection: close`).
    pub close_announced: u64,
    /// Connections over which a TLS session was resumed.
    pub tls_resumed: u64,
    /// Complete 2xx answers by the origin that gave them (`x-instance`).
    pub per_instance: BTreeMap<String, u64>,
    /// The first failures in detail, at most 20.
    pub failures: Vec<Failure>,
    /// The ids that got a complete 2xx answer.
    pub acknowledged: AcknowledgedIds,
}

impl Summary {
    /// Whether no request and no idle connection failed.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.failed.total() == 0 && self.idle_connections_failed == 0
    }

    /// Complete 2xx answers per second.
    #[must_use]
    pub fn requests_per_second(&self) -> f64 {
        self.ok as f64 * 1000.0 / self.duration_ms.max(1) as f64
    }
}

/// How one request ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Ok { instance: Option<http::HeaderValue> },
    Failed { kind: FailureKind, detail: String },
}

#[derive(Debug)]
pub(super) struct Tally {
    ok: u64,
    failed: Failures,
    latency: Histogram<u64>,
    pub(super) body_bytes: u64,
    pub(super) connections_opened: u64,
    pub(super) connections_closed_by_peer: u64,
    pub(super) close_announced: u64,
    pub(super) tls_resumed: u64,
    pub(super) idle_failed: u64,
    instances: Vec<Instance>,
    failures: Vec<Failure>,
    acknowledged: AcknowledgedBits,
    longest_us: u64,
    longest_of_stretch_us: u64,
}

/// Few origins answer a run, so a list that is looked through beats a map.
#[derive(Debug)]
struct Instance {
    name: http::HeaderValue,
    requests: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, MAX_LATENCY_US, LATENCY_DIGITS);
        Self {
            ok: 0,
            failed: Failures::default(),
            latency: latency.expect("the bounds are constants that fit"),
            body_bytes: 0,
            connections_opened: 0,
            connections_closed_by_peer: 0,
            close_announced: 0,
            tls_resumed: 0,
            idle_failed: 0,
            instances: Vec::new(),
            failures: Vec::new(),
            acknowledged: AcknowledgedBits::default(),
            longest_us: 0,
            longest_of_stretch_us: 0,
        }
    }

    pub(super) fn ended(&mut self, run: &str, number: u64, outcome: Outcome, took_us: u64, at_ms: u64) {
        self.latency.saturating_record(took_us.max(1));
        self.longest_us = self.longest_us.max(took_us);
        self.longest_of_stretch_us = self.longest_of_stretch_us.max(took_us);
        match outcome {
            Outcome::Ok { instance } => {
                self.ok += 1;
                self.acknowledged.insert(number);
                if let Some(name) = instance {
                    self.answered_by(name);
                }
            }
            Outcome::Failed { kind, detail } => {
                self.failed.count(kind);
                if self.failures.len() < MAX_DETAILED_FAILURES {
                    self.failures.push(Failure { id: format!("{run}-{number}"), at_ms, kind, detail });
                }
            }
        }
    }

    fn answered_by(&mut self, name: http::HeaderValue) {
        match self.instances.iter_mut().find(|instance| instance.name == name) {
            Some(instance) => instance.requests += 1,
            None => self.instances.push(Instance { name, requests: 1 }),
        }
    }

    fn per_instance(&self) -> BTreeMap<String, u64> {
        self.instances
            .iter()
            .map(|instance| {
                (String::from_utf8_lossy(instance.name.as_bytes()).into_owned(), instance.requests)
            })
            .collect()
    }

    /// The counters since the start.
    pub(super) fn total_sample(&self, at_ms: u64) -> Sample {
        Sample {
            at_ms,
            length_ms: at_ms,
            sent: self.ok + self.failed.total(),
            ok: self.ok,
            failed: self.failed.total(),
            per_instance: self.per_instance(),
            longest_us: self.longest_us,
        }
    }

    /// The counters since `before`, which was the total then; begins a new stretch.
    pub(super) fn next_sample(&mut self, before: &mut Sample, at_ms: u64) -> Sample {
        let total = self.total_sample(at_ms);
        let stretch = Sample {
            at_ms,
            length_ms: at_ms - before.at_ms,
            sent: total.sent - before.sent,
            ok: total.ok - before.ok,
            failed: total.failed - before.failed,
            per_instance: total
                .per_instance
                .iter()
                .map(|(name, requests)| {
                    (name.clone(), requests - before.per_instance.get(name).copied().unwrap_or(0))
                })
                .collect(),
            longest_us: std::mem::take(&mut self.longest_of_stretch_us),
        };
        *before = total;
        stretch
    }

    pub(super) fn summary(&mut self, run: &str, duration_ms: u64) -> Summary {
        let at = |quantile| self.latency.value_at_quantile(quantile).min(self.longest_us);
        let acknowledged = std::mem::take(&mut self.acknowledged).into_ids(run);
        Summary {
            run: run.to_owned(),
            duration_ms,
            sent: self.ok + self.failed.total(),
            ok: self.ok,
            failed: self.failed,
            latency_us: Latency {
                p50: at(0.50),
                p90: at(0.90),
                p99: at(0.99),
                p99_9: at(0.999),
                max: self.longest_us,
            },
            body_bytes: self.body_bytes,
            connections_opened: self.connections_opened,
            connections_closed_by_peer: self.connections_closed_by_peer,
            idle_connections_failed: self.idle_failed,
            close_announced: self.close_announced,
            tls_resumed: self.tls_resumed,
            per_instance: self.per_instance(),
            failures: std::mem::take(&mut self.failures),
            acknowledged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_holds_only_what_happened_since_the_one_before() {
        let mut tally = Tally::new();
        let mut before = Sample::default();
        let by = |name: &'static str| Outcome::Ok { instance: Some(http::HeaderValue::from_static(name)) };
        tally.ended("run", 0, by("a"), 900, 1);
        tally.ended("run", 1, by("b"), 100, 1);
        let first = tally.next_sample(&mut before, 1000);
        assert_eq!((first.ok, first.longest_us, first.length_ms), (2, 900, 1000));
        tally.ended("run", 2, by("b"), 50, 1);
        let failed = Outcome::Failed { kind: FailureKind::Reset, detail: "gone".to_owned() };
        tally.ended("run", 3, failed, 70, 1);
        let second = tally.next_sample(&mut before, 1500);
        assert_eq!((second.sent, second.ok, second.failed, second.longest_us), (2, 1, 1, 70));
        assert_eq!(second.per_instance, BTreeMap::from([("a".to_owned(), 0), ("b".to_owned(), 1)]));
        let summary = tally.summary("run", 1500);
        assert_eq!((summary.sent, summary.latency_us.max, summary.acknowledged.len()), (4, 900, 3));
        assert_eq!(summary.failures[0].id, "run-3");
    }
}
