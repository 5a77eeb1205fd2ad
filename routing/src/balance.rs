//! Choosing one upstream of a pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::hash::{GOLDEN, below, mix};
use crate::upstream::Upstream;

/// How an upstream is chosen inside a pool. The pool is chosen before, by exact share: while two pools have
/// weight, also the keys of a consistent hash are split over them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// In turn, by weight.
    RoundRobin,
    /// The less busy of two that are drawn by weight (power of two choices).
    #[default]
    LeastInFlight,
    /// The one of two with the lower product of latency estimate and load (peak-EWMA); by load alone
    /// until both have answered once.
    PeakEwma,
    /// The same upstream for the same key, and few keys move when the pool changes (weighted rendezvous hashing).
    ConsistentHash(HashKey),
}

/// What a request is hashed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// Value of a request header.
    Header(Arc<str>),
    /// Value of a cookie.
    Cookie(Arc<str>),
    /// Address of the client, as the edge believes it.
    ClientAddress,
}

/// A pool as the balancer sees it.
#[derive(Debug)]
pub(crate) struct Members {
    pub(crate) upstreams: Box<[Arc<Upstream>]>,
    /// Running sums of the weights; the weight belongs to the membership, so that an older table keeps its own.
    cumulative: Box<[u64]>,
    /// Step of the weighted round robin: coprime to the total, near its golden section.
    stride: u64,
}

/// What the choice depends on.
#[derive(Clone, Copy)]
pub(crate) struct Draw {
    pub(crate) now_ms: u64,
    pub(crate) random: u64,
    pub(crate) hash: Option<u64>,
    pub(crate) slow_start_ms: u32,
}

impl Members {
    /// Upstreams with their weights; a weight of 0 counts as 1.
    pub(crate) fn new(members: impl Iterator<Item = (Arc<Upstream>, u32)>) -> Self {
        let mut sum = 0;
        let (upstreams, cumulative): (Vec<_>, Vec<_>) = members
            .map(|(upstream, weight)| {
                sum += u64::from(weight.max(1));
                (upstream, sum)
            })
            .unzip();
        Self { upstreams: upstreams.into(), cumulative: cumulative.into(), stride: coprime_stride(sum) }
    }

    /// Chooses among the members that pass `fit`; `None` if none does. `turn` is counted only if it is asked for.
    pub(crate) fn choose(
        &self,
        balance: &Balance,
        draw: Draw,
        turn: &AtomicU64,
        fit: impl Fn(&Upstream) -> bool + Copy,
    ) -> Option<&Arc<Upstream>> {
        if self.upstreams.len() <= 1 {
            return self.upstreams.first().filter(|upstream| fit(upstream));
        }
        let index = match (balance, draw.hash) {
            (Balance::ConsistentHash(_), Some(hash)) => self.rendezvous(hash, fit),
            (Balance::RoundRobin, _) => self.in_turn(draw, turn.fetch_add(1, Relaxed), fit),
            (Balance::PeakEwma, _) => self.better_of_two(draw, fit, Self::is_quicker),
            (Balance::LeastInFlight | Balance::ConsistentHash(_), _) => {
                self.better_of_two(draw, fit, Self::is_less_busy)
            }
        };
        index.map(|index| &self.upstreams[index])
    }

    fn total(&self) -> u64 {
        self.cumulative.last().copied().unwrap_or(0)
    }

    fn at_weight(&self, point: u64) -> usize {
        self.cumulative.partition_point(|sum| *sum <= point)
    }

    fn below_member(&self, index: usize) -> u64 {
        index.checked_sub(1).map_or(0, |before| self.cumulative[before])
    }

    fn weight(&self, index: usize) -> u64 {
        self.cumulative[index] - self.below_member(index)
    }

    /// Weight in thousandths, less what the slow start takes.
    fn capacity(&self, index: usize, draw: Draw) -> u64 {
        self.weight(index)
            .saturating_mul(self.upstreams[index].ramp_permille(draw.now_ms, draw.slow_start_ms))
    }

    /// Exact over every `total` turns, and spread out instead of in runs.
    fn in_turn(&self, draw: Draw, turn: u64, fit: impl Fn(&Upstream) -> bool) -> Option<usize> {
        let total = self.total();
        let point = (u128::from(turn) * u128::from(self.stride) % u128::from(total)) as u64;
        self.if_fit(self.at_weight(point), draw, &fit).or_else(|| self.draw_any(draw, None, fit))
    }

    /// Two different members are drawn by weight; a tie goes to the first, so that idle pools keep the weights.
    fn better_of_two(
        &self,
        draw: Draw,
        fit: impl Fn(&Upstream) -> bool + Copy,
        is_better: impl Fn(&Self, usize, usize, Draw) -> bool,
    ) -> Option<usize> {
        let first = self.draw_by_weight(draw, None, fit)?;
        let again = Draw { random: mix(draw.random ^ GOLDEN), ..draw };
        let Some(second) = self.draw_by_weight(again, Some(first), fit) else { return Some(first) };
        Some(if is_better(self, second, first, draw) { second } else { first })
    }

    fn is_less_busy(&self, one: usize, other: usize, draw: Draw) -> bool {
        let load = |index: usize| u128::from(self.upstreams[index].in_flight_here());
        let capacity = |index: usize| u128::from(self.capacity(index, draw));
        load(one) * capacity(other) < load(other) * capacity(one)
    }

    fn is_quicker(&self, one: usize, other: usize, draw: Draw) -> bool {
        let estimate = |index: usize| self.upstreams[index].latency_estimate_us(draw.now_ms);
        let (mine, theirs) = (estimate(one), estimate(other));
        // Nothing is known of a member that never answered. Taken as "0 µs" it would draw every request
        // to itself, and one that only fails never answers.
        if mine <= 0.0 || theirs <= 0.0 {
            return self.is_less_busy(one, other, draw);
        }
        #[expect(clippy::cast_precision_loss)]
        let cost = |index: usize, estimate: f64| {
            let mean_capacity = self.total() as f64 * 1_000.0 / self.upstreams.len() as f64;
            let load = self.upstreams[index].in_flight_here() as f64;
            estimate.max(1.0) * (1.0 + load * mean_capacity / self.capacity(index, draw) as f64)
        };
        cost(one, mine) < cost(other, theirs)
    }

    /// One draw by weight without `skip`. If it falls on an unfit member, or on one that its slow start
    /// makes unlucky, the draw among all that are fit keeps the shares proportional.
    fn draw_by_weight(
        &self,
        draw: Draw,
        skip: Option<usize>,
        fit: impl Fn(&Upstream) -> bool + Copy,
    ) -> Option<usize> {
        let skipped = skip.map_or(0, |index| self.weight(index));
        let mut point = below(draw.random, self.total() - skipped);
        if skip.is_some_and(|index| point >= self.below_member(index)) {
            point += skipped;
        }
        self.if_fit(self.at_weight(point), draw, &fit).or_else(|| self.draw_any(draw, skip, fit))
    }

    fn if_fit(&self, index: usize, draw: Draw, fit: &impl Fn(&Upstream) -> bool) -> Option<usize> {
        let upstream = &self.upstreams[index];
        let ramp_permille = upstream.ramp_permille(draw.now_ms, draw.slow_start_ms);
        let lucky = ramp_permille >= 1_000 || below(mix(draw.random), 1_000) < ramp_permille;
        (lucky && fit(upstream)).then_some(index)
    }

    /// Reservoir sampling over the members that are fit, by capacity: one pass, so that a member that is
    /// retired meanwhile does no harm.
    fn draw_any(&self, draw: Draw, skip: Option<usize>, fit: impl Fn(&Upstream) -> bool) -> Option<usize> {
        let (mut sum, mut random, mut chosen) = (0_u64, draw.random, None);
        for (index, upstream) in self.upstreams.iter().enumerate() {
            if Some(index) == skip || !fit(upstream) {
                continue;
            }
            let capacity = self.capacity(index, draw);
            sum = sum.saturating_add(capacity);
            random = mix(random.wrapping_add(GOLDEN));
            if below(random, sum) < capacity {
                chosen = Some(index);
            }
        }
        chosen
    }

    /// Weighted rendezvous hashing: score = -weight / ln(u), u from the hash of key and member.
    fn rendezvous(&self, key: u64, fit: impl Fn(&Upstream) -> bool) -> Option<usize> {
        let mut best = None;
        for (index, upstream) in self.upstreams.iter().enumerate().filter(|(_, upstream)| fit(upstream)) {
            #[expect(clippy::cast_precision_loss)]
            let unit = ((mix(key ^ upstream.sticky_key()) >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
            #[expect(clippy::cast_precision_loss)]
            let score = -(self.weight(index) as f64) / unit.ln();
            if best.is_none_or(|(_, top)| score > top) {
                best = Some((index, score));
            }
        }
        best.map(|(index, _)| index)
    }
}

fn coprime_stride(total: u64) -> u64 {
    let near_golden = (total as u128 * 618 / 1_000) as u64;
    (near_golden.max(1)..=total.max(1)).find(|step| gcd(*step, total) == 1).unwrap_or(1)
}

const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
