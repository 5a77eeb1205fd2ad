//! What became of the requests that an upstream was given: counters that never take a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How a request to an upstream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A response head came with this status after so many microseconds.
    Response {
        /// Status code, 100–599.
        status: u16,
        /// From the start of sending to the head.
        latency_us: u64,
    },
    /// No response head came, or it broke off behind it, and the upstream is to blame.
    Failed(Failure),
    /// The client left or sent rubbish: says nothing about the upstream.
    ClientGone,
}

/// Why an upstream gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection.
    Connect,
    /// The connection broke before the end of the response.
    Reset,
    /// The response head did not come in time.
    Timeout,
    /// What came was not HTTP.
    Protocol,
}

/// Sub-buckets per power of two: a bucket is at most 1/8 wide.
const SUB_BITS: u32 = 3;
const SUB: usize = 1 << SUB_BITS;
/// Latencies from 0 to 2^27 µs (134 s); longer ones fall into the last bucket.
const OCTAVES: usize = 25;
const BUCKETS: usize = OCTAVES * SUB;

/// A latency histogram with relative error of 1/16, or a difference of two of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyBuckets {
    counts: Vec<u64>,
}

impl Default for LatencyBuckets {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS] }
    }
}

impl LatencyBuckets {
    /// Number of recorded latencies.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The latency in microseconds below which a share `q` (0 to 1) lies, or `None` without samples.
    #[must_use]
    pub fn quantile_us(&self, q: f64) -> Option<u64> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rank = ((total as f64) * q.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Some(bucket_middle_us(bucket));
            }
        }
        None
    }

    /// The buckets that are not empty, with their numbers: most are, so this is the form to send it in.
    pub fn filled(&self) -> impl Iterator<Item = (u16, u64)> {
        #[expect(clippy::cast_possible_truncation, reason = "there are a few hundred buckets")]
        let numbered = self.counts.iter().enumerate().map(|(bucket, count)| (bucket as u16, *count));
        numbered.filter(|(_, count)| *count > 0)
    }

    /// What [`LatencyBuckets::filled`] has said; a bucket that does not exist is left out.
    #[must_use]
    pub fn from_filled(filled: impl IntoIterator<Item = (u16, u64)>) -> Self {
        let mut buckets = Self::default();
        for (bucket, count) in filled {
            if let Some(here) = buckets.counts.get_mut(usize::from(bucket)) {
                *here = count;
            }
        }
        buckets
    }

    /// What was recorded since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let counts = self.counts.iter().zip(&earlier.counts).map(|(a, b)| a.saturating_sub(*b)).collect();
        Self { counts }
    }

    /// Adds another histogram to this one.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }
}

fn bucket_of(latency_us: u64) -> usize {
    if latency_us < SUB as u64 {
        return latency_us as usize;
    }
    let octave = latency_us.ilog2();
    let sub = (latency_us >> (octave - SUB_BITS)) as usize & (SUB - 1);
    ((octave - SUB_BITS + 1) as usize * SUB + sub).min(BUCKETS - 1)
}

fn bucket_middle_us(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let octave = (bucket / SUB) as u32 - 1 + SUB_BITS;
    let width = 1_u64 << (octave - SUB_BITS);
    (1_u64 << octave) + (bucket % SUB) as u64 * width + width / 2
}

/// A reading of an upstream's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutcomeCounts {
    /// Answers by status class: 1xx, 2xx, 3xx, 4xx, 5xx.
    pub responses: [u64; 5],
    /// Requests without an answer, the upstream to blame.
    pub failed: u64,
    /// Requests whose client left first.
    pub client_gone: u64,
    /// Time to the response head.
    pub latency: LatencyBuckets,
}

impl OutcomeCounts {
    /// Every request that tells something about the upstream.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.responses.iter().sum::<u64>() + self.failed
    }

    /// Answers 5xx, and requests without an answer or with one that broke off.
    #[must_use]
    pub const fn errors(&self) -> u64 {
        self.responses[4] + self.failed
    }

    /// What happened since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut responses = self.responses;
        for (mine, theirs) in responses.iter_mut().zip(earlier.responses) {
            *mine = mine.saturating_sub(theirs);
        }
        Self {
            responses,
            failed: self.failed.saturating_sub(earlier.failed),
            client_gone: self.client_gone.saturating_sub(earlier.client_gone),
            latency: self.latency.since(&earlier.latency),
        }
    }

    /// Adds another reading to this one.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.responses.iter_mut().zip(other.responses) {
            *mine += theirs;
        }
        self.failed += other.failed;
        self.client_gone += other.client_gone;
        self.latency.add(&other.latency);
    }
}

/// The live counters behind [`LatencyBuckets`]. Made with the first answer: of a million services most are quiet, and
/// this is most of an upstream.
#[derive(Debug, Default)]
pub(crate) struct LiveLatency(OnceLock<Box<[AtomicU64]>>);

impl LiveLatency {
    pub(crate) fn record(&self, latency_us: u64) {
        let counts = self.0.get_or_init(|| (0..BUCKETS).map(|_| AtomicU64::new(0)).collect());
        counts[bucket_of(latency_us)].fetch_add(1, Relaxed);
    }

    pub(crate) fn read(&self) -> LatencyBuckets {
        self.0.get().map_or_else(LatencyBuckets::default, |live| LatencyBuckets {
            counts: live.iter().map(|count| count.load(Relaxed)).collect(),
        })
    }
}

/// The live counters behind [`OutcomeCounts`].
#[derive(Debug, Default)]
pub(crate) struct OutcomeCounters {
    responses: [AtomicU64; 5],
    failed: AtomicU64,
    client_gone: AtomicU64,
    latency: LiveLatency,
}

impl OutcomeCounters {
    pub(crate) fn record(&self, outcome: Outcome) {
        match outcome {
            Outcome::Response { status, latency_us } => {
                let class = (usize::from(status / 100)).clamp(1, 5) - 1;
                self.responses[class].fetch_add(1, Relaxed);
                self.latency.record(latency_us);
            }
            Outcome::Failed(_) => {
                self.failed.fetch_add(1, Relaxed);
            }
            Outcome::ClientGone => {
                self.client_gone.fetch_add(1, Relaxed);
            }
        }
    }

    pub(crate) fn read(&self) -> OutcomeCounts {
        OutcomeCounts {
            responses: std::array::from_fn(|i| self.responses[i].load(Relaxed)),
            failed: self.failed.load(Relaxed),
            client_gone: self.client_gone.load(Relaxed),
            latency: self.latency.read(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_falls_into_a_bucket_whose_middle_is_within_an_eighth() {
        for us in (0..200_000_u64).chain([1 << 20, (1 << 26) + 12_345]) {
            let middle = bucket_middle_us(bucket_of(us));
            assert!(middle.abs_diff(us) * 8 <= us.max(8), "{us} µs is shown as {middle} µs");
        }
    }

    #[test]
    fn a_quantile_is_found_where_the_samples_are() {
        let live = OutcomeCounters::default();
        for i in 1..=1000 {
            live.record(Outcome::Response { status: 200, latency_us: i * 100 });
        }
        let read = live.read();
        let p95 = read.latency.quantile_us(0.95).expect("there are samples");
        assert!(p95.abs_diff(95_000) < 95_000 / 8, "p95 is {p95}");
        assert_eq!(read.latency.since(&read.latency).quantile_us(0.5), None);
    }
}
