//! The demo's clients: the load generator that counts every failure.

use std::net::SocketAddr;
use std::time::Duration;

use peregrine_bench::load::{Load, LoadHandle, LoadOptions, Pace, Protocol, Sample, Until};

/// Between two readings of the clients' counters.
const SAMPLE_MS: u64 = 200;
/// Longest wait for the edge's first answer.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Steady traffic over HTTP/1.1 and HTTP/2.
pub(super) struct Traffic {
    loads: Vec<LoadHandle>,
}

impl Traffic {
    pub(super) fn start(edge: SocketAddr, per_second: u32) -> Result<Self, String> {
        let half = per_second / 2;
        let rates = [(Protocol::Http1, per_second - half), (Protocol::H2c, half)];
        let loads: Result<Vec<LoadHandle>, _> = rates
            .into_iter()
            .filter(|(_, rate)| *rate > 0)
            .map(|(protocol, per_second)| Load::start(options(edge, protocol, per_second)))
            .collect();
        Ok(Self { loads: loads.map_err(|error| error.to_string())? })
    }

    /// Requests that have ended.
    pub(super) fn sent(&self) -> u64 {
        self.live().map(|live| live.sent).sum()
    }

    /// Of these, the failed ones.
    pub(super) fn failed(&self) -> u64 {
        self.live().map(|live| live.failed).sum()
    }

    /// Longest request since the last reading, in microseconds.
    pub(super) fn longest_us(&self) -> u64 {
        self.loads.iter().map(|load| load.samples().borrow().longest_us).max().unwrap_or(0)
    }

    /// Requests per second in the last reading.
    pub(super) fn per_second(&self) -> f64 {
        let rate = |sample: &Sample| {
            #[expect(clippy::cast_precision_loss)]
            let (ok, ms) = (sample.ok as f64, sample.length_ms.max(1) as f64);
            ok * 1000.0 / ms
        };
        self.loads.iter().map(|load| rate(&load.samples().borrow())).sum()
    }

    /// What failed first, for the end of a demo that should not have failed.
    pub(super) fn first_failures(&self) -> String {
        format!("{} of {}", self.failed(), self.sent())
    }

    pub(super) async fn stop(self) {
        for load in self.loads {
            let summary = load.stop().await;
            for failure in summary.failures.iter().take(3) {
                tracing::error!(id = %failure.id, at_ms = failure.at_ms, "a request failed: {}", failure.detail);
            }
        }
    }

    fn live(&self) -> impl Iterator<Item = Sample> {
        self.loads.iter().map(LoadHandle::live)
    }
}

/// Waits until the edge answers a request with the shop's page.
pub(super) async fn first_answer(edge: SocketAddr) -> std::io::Result<()> {
    let options =
        LoadOptions { until: Until::Count(1), connections: 1, ..options(edge, Protocol::Http1, 1_000) };
    let run = Load::run(options);
    let summary = tokio::time::timeout(FIRST_ANSWER_TIMEOUT, run).await.map_err(std::io::Error::from)?;
    match summary {
        Ok(summary) if summary.ok == 1 => Ok(()),
        Ok(summary) => Err(std::io::Error::other(format!("{:?}", summary.failures))),
        Err(error) => Err(std::io::Error::other(error.to_string())),
    }
}

fn options(edge: SocketAddr, protocol: Protocol, per_second: u32) -> LoadOptions {
    LoadOptions {
        protocol,
        connections: if protocol == Protocol::Http1 { 8 } else { 2 },
        pace: Pace::Open { per_second },
        post_percent: 10,
        sample_ms: SAMPLE_MS,
        ..LoadOptions::new(edge)
    }
}
