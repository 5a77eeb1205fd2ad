//! Whether the new copies answer more slowly than the old ones.

use peregrine_routing::LatencyBuckets;

use super::chance::{Evidence, count, lower_rank};
use super::errors::Finding;

/// The quantile that is compared.
const QUANTILE: f64 = 0.95;
/// Below this difference nobody feels a slower p95.
const MIN_DIFFERENCE_US: u64 = 5_000;
/// A block lasts at least so long: a stall of a busy machine is over in less, and then spoils one block only.
const BLOCK_MS: u64 = 200;
/// Answers of each side that make a block.
const BLOCK_SAMPLES: u64 = 20;
/// Equal copies are slow in at most this share of the blocks: by chance in less than a tenth of them, because
/// of the bound and the margin; the rest is for pauses that happen to hit one copy.
const EQUAL_SHARE: f64 = 0.25;
/// Shares of slow blocks that are bet on.
const SLOW_SHARES: [f64; 3] = [0.5, 0.7, 0.9];
/// The bet is won at this value: 1 % of the shifts of equal copies ever get there. Five slow blocks of five do.
const ENOUGH: f64 = 100.0;
/// From this value on the step is not passed until more is known…
const SUSPICIOUS: f64 = 1.5;
/// …nor before so many blocks in a row after a slow one were not slow.
const CLEARING_BLOCKS: u64 = 2;

/// The evidence of slowness over one shift.
#[derive(Clone, Debug, Default)]
pub(super) struct Latency {
    evidence: Evidence<3>,
    /// Where the block under way began.
    new_from: LatencyBuckets,
    old_from: LatencyBuckets,
    begun_at_ms: u64,
    blocks: u64,
    slow_blocks: u64,
    fast_blocks_in_a_row: u64,
    last_slow: Option<Block>,
}

/// What a block has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    /// Lower bound of the new copies' p95.
    new_us: u64,
    /// The old copies' p95.
    old_us: u64,
    limit_us: u64,
}

impl Latency {
    pub(super) fn begin(at_ms: u64, new: &LatencyBuckets, old: &LatencyBuckets) -> Self {
        Self { new_from: new.clone(), old_from: old.clone(), begun_at_ms: at_ms, ..Self::default() }
    }

    pub(super) fn restart(&mut self) {
        self.evidence.restart();
    }

    /// Takes in the block under way, if it is one. `increase`: the share by which the new p95 may be above the
    /// old one.
    pub(super) fn look(&mut self, at_ms: u64, new: &LatencyBuckets, old: &LatencyBuckets, increase: f64) {
        if at_ms.saturating_sub(self.begun_at_ms) < BLOCK_MS {
            return;
        }
        let (of_new, of_old) = (new.since(&self.new_from), old.since(&self.old_from));
        if of_new.count().min(of_old.count()) < BLOCK_SAMPLES {
            return;
        }
        if let Some(block) = Block::of(&of_new, &of_old, increase) {
            self.blocks += 1;
            if block.is_slow() {
                self.slow_blocks += 1;
                self.last_slow = Some(block);
                self.fast_blocks_in_a_row = 0;
            } else {
                self.fast_blocks_in_a_row += 1;
            }
            self.evidence.add(&SLOW_SHARES.map(|share| {
                if block.is_slow() {
                    (share / EQUAL_SHARE).ln()
                } else {
                    ((1.0 - share) / (1.0 - EQUAL_SHARE)).ln()
                }
            }));
        }
        (self.new_from, self.old_from, self.begun_at_ms) = (new.clone(), old.clone(), at_ms);
    }

    pub(super) fn finding(&self) -> Finding {
        let value = self.evidence.value();
        let is_suspect = value >= SUSPICIOUS || self.fast_blocks_in_a_row < CLEARING_BLOCKS;
        let Some(block) = self.last_slow.filter(|_| is_suspect) else { return Finding::Nothing };
        let told = format!(
            "p95 is at least {:.1} ms on the new copies and {:.1} ms on the old ones (allowed: {:.1} ms) \
             in {} of {} stretches of time",
            ms(block.new_us),
            ms(block.old_us),
            ms(block.limit_us),
            self.slow_blocks,
            self.blocks
        );
        if value >= ENOUGH { Finding::Worse(told) } else { Finding::Suspicion(told) }
    }
}

impl Block {
    fn of(new: &LatencyBuckets, old: &LatencyBuckets, increase: f64) -> Option<Self> {
        let samples = new.count();
        let new_us = new.quantile_us((count(lower_rank(samples, QUANTILE)) - 0.5) / count(samples))?;
        let old_us = old.quantile_us(QUANTILE)?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times of requests")]
        let relative = (count(old_us) * (1.0 + increase)) as u64;
        Some(Self { new_us, old_us, limit_us: relative.max(old_us + MIN_DIFFERENCE_US) })
    }

    const fn is_slow(self) -> bool {
        self.new_us > self.limit_us
    }
}

fn ms(us: u64) -> f64 {
    count(us) / 1_000.0
}
