//! A mirror: copies of some safe requests go to upstreams that serve nobody yet, and their answers are thrown away.
//!
//! ```text
//!   request ─► Service::enter ─► upstream ─► the client's answer ─┐
//!        └─ Mirror::samples ─► Mirror::admit ─► target ─► answer ─┴► MirrorOutcome ─► counts of the target
//! ```
//!
//! A mirrored request takes no lease: it is nobody's, so no drain waits for it, no receipt names it, and it says
//! nothing about health. What it says is counted beside all that, at its target. A mirror is over for good as soon as
//! the table says something else of it: from then on nothing is admitted, whatever table its caller holds.

use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::{Arc, OnceLock};

use crate::hash::below;
use crate::outcome::{LatencyBuckets, LiveLatency};
use crate::upstream::Upstream;

/// A stretch of so many microseconds may be used up at once by mirrored requests that come together.
const BURST_US: u64 = 100_000;

/// Which requests of a service are mirrored, and how many at most. The limits are those of one edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSpec {
    /// Name of the pool of the same service whose upstreams get the copies, in turn. Its weight is 0 and it is no
    /// standby: clients' requests do not go there.
    pub pool: Arc<str>,
    /// How many of a thousand safe requests are mirrored.
    pub sample_permille: u16,
    /// Most mirrored requests in a second; at least 1.
    pub max_requests_per_s: u32,
    /// Most mirrored requests at a time.
    pub max_concurrent: u32,
    /// Longest time for one of them, with its answer.
    pub timeout_ms: u32,
    /// So much of an answer's body is read; the rest is not waited for.
    pub max_body_bytes: u64,
    /// Requests with `Authorization` or `Cookie` are mirrored too.
    pub with_credentials: bool,
    /// An edge mirrors for no longer than this, whoever forgets to end it; 0 is not at all.
    pub lasts_ms: u32,
}

/// A mirror that is in the table, shared by all versions of its service that say the same of it.
#[derive(Debug)]
pub struct Mirror {
    spec: MirrorSpec,
    targets: Box<[Arc<Upstream>]>,
    turn: AtomicU64,
    /// When the next request is due at an even pace, in microseconds of the caller's clock.
    due_us: AtomicU64,
    under_way: AtomicU32,
    /// When the first request was looked at; 0 is not yet.
    began_ms: AtomicU64,
    over: AtomicBool,
}

/// A mirrored request that may be sent. Counts as under way until it is dropped.
#[derive(Debug)]
#[must_use = "it is under way until it is dropped"]
pub struct MirrorSlot(Arc<Mirror>);

/// How a client's request that was sampled, or its copy, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorOutcome {
    /// Both were answered: status code and microseconds from sending to the head.
    Compared {
        /// The answer that the client got.
        client: (u16, u64),
        /// The answer that was thrown away.
        mirror: (u16, u64),
    },
    /// The copy got no whole answer, the target to blame.
    Failed {
        /// Status code of the answer that the client got.
        client_status: u16,
    },
    /// The copy was ended before anything could be said.
    Unfinished,
    /// It was not copied: so many are under way, or were in the last second.
    Skipped,
    /// It was not copied, because it carries credentials.
    LeftOut,
}

/// Status classes 1xx to 5xx, and no answer.
pub const MIRROR_CLASSES: usize = 6;

/// A reading of what was mirrored to an upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorCounts {
    /// Copies of requests that were begun to be sent.
    pub sent: u64,
    /// How often which class of answer to the client (1xx to 5xx) came with which class here (1xx to 5xx, none).
    pub pairs: [[u64; MIRROR_CLASSES]; 5],
    /// Pairs of answers of which the status codes were not equal.
    pub unequal: u64,
    /// Copies that were ended before anything could be said.
    pub unfinished: u64,
    /// Requests that were not copied because of a cap.
    pub skipped: u64,
    /// Requests that were not copied because they carry credentials.
    pub left_out: u64,
    /// Time to the head of the clients' answers, of the pairs.
    pub client_latency: LatencyBuckets,
    /// Time to the head of the answers here, of the pairs.
    pub mirror_latency: LatencyBuckets,
}

impl MirrorCounts {
    /// Pairs of which both had an answer.
    #[must_use]
    pub fn compared(&self) -> u64 {
        self.pairs.iter().flat_map(|row| &row[..MIRROR_CLASSES - 1]).sum()
    }

    /// Copies without an answer, the upstream to blame.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.pairs.iter().map(|row| row[MIRROR_CLASSES - 1]).sum()
    }

    /// Everything that can be judged.
    #[must_use]
    pub fn judged(&self) -> u64 {
        self.compared() + self.failed()
    }

    /// Pairs that a predicate on their classes (1 to 5; 6 is no answer) holds for: the client's and the copy's.
    #[must_use]
    pub fn pairs_where(&self, holds: impl Fn(usize, usize) -> bool) -> u64 {
        let all = self.pairs.iter().enumerate().flat_map(|(client, row)| {
            row.iter().enumerate().map(move |(mirror, count)| (client + 1, mirror + 1, count))
        });
        all.filter(|(client, mirror, _)| holds(*client, *mirror)).map(|(_, _, count)| count).sum()
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut since = self.clone();
        for (mine, theirs) in since.pairs.iter_mut().flatten().zip(earlier.pairs.iter().flatten()) {
            *mine = mine.saturating_sub(*theirs);
        }
        since.sent = self.sent.saturating_sub(earlier.sent);
        since.unequal = self.unequal.saturating_sub(earlier.unequal);
        since.unfinished = self.unfinished.saturating_sub(earlier.unfinished);
        since.skipped = self.skipped.saturating_sub(earlier.skipped);
        since.left_out = self.left_out.saturating_sub(earlier.left_out);
        since.client_latency = self.client_latency.since(&earlier.client_latency);
        since.mirror_latency = self.mirror_latency.since(&earlier.mirror_latency);
        since
    }

    /// Adds another reading to this one.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.pairs.iter_mut().flatten().zip(other.pairs.iter().flatten()) {
            *mine += theirs;
        }
        self.sent += other.sent;
        self.unequal += other.unequal;
        self.unfinished += other.unfinished;
        self.skipped += other.skipped;
        self.left_out += other.left_out;
        self.client_latency.add(&other.client_latency);
        self.mirror_latency.add(&other.mirror_latency);
    }
}

impl Mirror {
    /// What the table says of it now: `previous`, if that is the same.
    pub(crate) fn new(
        spec: &MirrorSpec,
        targets: &[Arc<Upstream>],
        previous: Option<&Arc<Self>>,
    ) -> Arc<Self> {
        let same = previous.filter(|before| {
            before.spec == *spec
                && before.targets.len() == targets.len()
                && before.targets.iter().zip(targets).all(|(one, other)| Arc::ptr_eq(one, other))
        });
        same.cloned().unwrap_or_else(|| {
            Arc::new(Self {
                spec: spec.clone(),
                targets: targets.into(),
                turn: AtomicU64::new(0),
                due_us: AtomicU64::new(0),
                under_way: AtomicU32::new(0),
                began_ms: AtomicU64::new(0),
                over: AtomicBool::new(false),
            })
        })
    }

    /// Ends it for good.
    pub(crate) fn end(&self) {
        self.over.store(true, Release);
    }

    /// What the writer has said of it.
    #[must_use]
    pub const fn spec(&self) -> &MirrorSpec {
        &self.spec
    }

    /// Where copies go.
    #[must_use]
    pub const fn targets(&self) -> &[Arc<Upstream>] {
        &self.targets
    }

    /// Whether it is still in the table and its time is not over. The first look begins its time.
    pub fn is_on(&self, now_ms: u64) -> bool {
        if self.over.load(Acquire) {
            return false;
        }
        let now_ms = now_ms.max(1);
        let began_ms = match self.began_ms.compare_exchange(0, now_ms, AcqRel, Acquire) {
            Ok(_) => now_ms,
            Err(began_ms) => began_ms,
        };
        now_ms.saturating_sub(began_ms) < u64::from(self.spec.lasts_ms)
    }

    /// Whether a request is in the sample, given fresh random bits.
    #[must_use]
    pub fn samples(&self, random: u64) -> bool {
        below(random, 1_000) < u64::from(self.spec.sample_permille)
    }

    /// Whether the pace allows another copy now; one that is asked for is paid for.
    #[must_use]
    pub fn is_due(&self, now_us: u64) -> bool {
        let interval_us = 1_000_000 / u64::from(self.spec.max_requests_per_s.max(1));
        let allowed = self.due_us.fetch_update(AcqRel, Acquire, |due_us| {
            let due_us = due_us.max(now_us);
            (due_us <= now_us + BURST_US.saturating_sub(interval_us)).then_some(due_us + interval_us)
        });
        allowed.is_ok()
    }

    /// Where the next copy goes: the targets take turns.
    #[must_use]
    pub fn next_target(&self) -> Option<&Arc<Upstream>> {
        let turn = self.turn.fetch_add(1, Relaxed) % (self.targets.len() as u64).max(1);
        usize::try_from(turn).ok().and_then(|turn| self.targets.get(turn))
    }

    /// A place for a copy, if there is one.
    pub fn admit(self: &Arc<Self>) -> Option<MirrorSlot> {
        let room = |under_way| (under_way < self.spec.max_concurrent).then_some(under_way + 1);
        let admitted = self.under_way.fetch_update(AcqRel, Acquire, room).is_ok();
        admitted.then(|| MirrorSlot(Arc::clone(self)))
    }

    /// Counts a request that was not copied.
    pub fn note(&self, outcome: MirrorOutcome) {
        self.targets.iter().take(1).for_each(|target| target.record_mirrored(outcome));
    }
}

impl Drop for MirrorSlot {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, AcqRel);
    }
}

/// The live counters behind [`MirrorCounts`]. Hardly any upstream ever has them: then they are one pointer.
#[derive(Debug, Default)]
pub(crate) struct MirrorCounters(OnceLock<Box<Counters>>);

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    pairs: [[AtomicU64; MIRROR_CLASSES]; 5],
    unequal: AtomicU64,
    unfinished: AtomicU64,
    skipped: AtomicU64,
    left_out: AtomicU64,
    client_latency: LiveLatency,
    mirror_latency: LiveLatency,
}

impl MirrorCounters {
    pub(crate) fn note_sent(&self) {
        self.0.get_or_init(Box::default).sent.fetch_add(1, Relaxed);
    }

    pub(crate) fn record(&self, outcome: MirrorOutcome) {
        let counters = self.0.get_or_init(Box::default);
        let class = |status: u16| usize::from(status / 100).clamp(1, 5) - 1;
        let counter = match outcome {
            MirrorOutcome::Compared { client, mirror } => {
                counters.client_latency.record(client.1);
                counters.mirror_latency.record(mirror.1);
                if client.0 != mirror.0 {
                    counters.unequal.fetch_add(1, Relaxed);
                }
                &counters.pairs[class(client.0)][class(mirror.0)]
            }
            MirrorOutcome::Failed { client_status } => {
                &counters.pairs[class(client_status)][MIRROR_CLASSES - 1]
            }
            MirrorOutcome::Unfinished => &counters.unfinished,
            MirrorOutcome::Skipped => &counters.skipped,
            MirrorOutcome::LeftOut => &counters.left_out,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// `None` if nothing was ever mirrored here.
    pub(crate) fn read(&self) -> Option<Box<MirrorCounts>> {
        let counters = self.0.get()?;
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        Some(Box::new(MirrorCounts {
            sent: read(&counters.sent),
            pairs: std::array::from_fn(|row| std::array::from_fn(|at| read(&counters.pairs[row][at]))),
            unequal: read(&counters.unequal),
            unfinished: read(&counters.unfinished),
            skipped: read(&counters.skipped),
            left_out: read(&counters.left_out),
            client_latency: counters.client_latency.read(),
            mirror_latency: counters.mirror_latency.read(),
        }))
    }
}
