//! Traffic against the edge while something happens, and the verdict on it.

use std::net::SocketAddr;

use peregrine_bench::load::{Load, LoadHandle, LoadOptions, Pace, Protocol, Summary, Until};
use peregrine_bench::oracle::check_exactly_once;
use peregrine_bench::origin::Record;
use tokio::runtime::Runtime;

/// Share of what was due that has to be sent, in percent. A generator that stood still for a moment makes up for it, so
/// on a machine that is busy no more is missing than what was due in the last moment before the end.
const SENT_PERCENT: u64 = 95;

/// Steady HTTP/1.1 keep-alive and HTTP/2 traffic, a tenth of it POST, until it is stopped.
pub(crate) struct Traffic {
    runtime: Runtime,
    loads: Vec<LoadHandle>,
}

impl Traffic {
    /// Starts with so many requests per second in all.
    pub(crate) fn start(edge: SocketAddr, per_second: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let loads = {
            let _inside = runtime.enter();
            [Protocol::Http1, Protocol::H2c].map(|protocol| start(edge, protocol, half(per_second))).into()
        };
        Self { runtime, loads }
    }

    /// Complete answers so far.
    pub(crate) fn answered(&self) -> u64 {
        self.loads.iter().map(|load| load.live().ok).sum()
    }

    /// Requests so far that had no complete answer.
    pub(crate) fn failed(&self) -> u64 {
        self.loads.iter().map(|load| load.live().failed).sum()
    }

    /// Ends it politely, and tells what came of it.
    pub(crate) fn stop(self) -> Vec<Summary> {
        let Self { runtime, loads } = self;
        loads.into_iter().map(|load| runtime.block_on(load.stop())).collect()
    }
}

/// Requests per second of each of the two protocols.
const fn half(per_second: u32) -> u32 {
    per_second / 2
}

fn start(edge: SocketAddr, protocol: Protocol, per_second: u32) -> LoadHandle {
    let options = LoadOptions {
        host: "shop.test".to_owned(),
        path: "/bytes/100".to_owned(),
        protocol,
        connections: if protocol == Protocol::Http1 { 16 } else { 2 },
        pace: Pace::Open { per_second },
        until: Until::Stopped,
        post_percent: 10,
        ..LoadOptions::new(edge)
    };
    Load::start(options).expect("options are fine")
}

/// No failure, no closed connection, no truncation, and every id executed exactly once.
#[track_caller]
pub(crate) fn assert_nothing_lost(summaries: &[Summary], records: &[Record]) {
    for summary in summaries {
        assert_eq!(summary.failures, [], "failed: {:?} of {}", summary.failed, summary.sent);
        assert_eq!(summary.ok, summary.sent);
        assert_eq!(summary.connections_closed_by_peer, 0, "no client connection may be closed");
        assert_eq!(summary.close_announced, 0, "no client connection may be told to close");
        let verdict = check_exactly_once(&summary.acknowledged, records);
        assert!(verdict.is_exactly_once() && verdict.executed_unacknowledged == 0, "{verdict:#?}");
    }
}

/// What was asked for was really sent: that nothing was lost says little of a generator that fell behind.
#[track_caller]
pub(crate) fn assert_rate_was_sent(summaries: &[Summary], per_second: u32) {
    for summary in summaries {
        let due = u64::from(half(per_second)) * summary.duration_ms / 1_000;
        assert!(
            summary.sent * 100 >= due * SENT_PERCENT,
            "{} requests were sent of {due} that were due in {} ms",
            summary.sent,
            summary.duration_ms
        );
    }
}
