//! Choosing one upstream of a pool.

use std::sync::Arc;

use crate::hash::{below, mix};
use crate::upstream::Upstream;

/// How an upstream is chosen inside a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// In turn, by weight.
    RoundRobin,
    /// The less busy of two that are drawn by weight (power of two choices).
    #[default]
    LeastInFlight,
    /// The one of two with the lower product of latency estimate and load (peak-EWMA).
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
    /// Running sums of the weights.
    cumulative: Box<[u64]>,
    /// Step of the weighted round robin: coprime to the total, near its golden section.
    stride: u64,
}

/// What the choice depends on.
#[derive(Clone, Copy)]
pub(crate) struct Draw {
    pub(crate) now_ms: u64,
    pub(crate) random: u64,
    pub(crate) turn: u64,
    pub(crate) hash: Option<u64>,
    pub(crate) slow_start_ms: u32,
}

impl Members {
    pub(crate) fn new(upstreams: Box<[Arc<Upstream>]>) -> Self {
        let mut sum = 0;
        let cumulative: Box<[u64]> = upstreams
            .iter()
            .map(|upstream| {
                sum += u64::from(upstream.weight());
                sum
            })
            .collect();
        Self { upstreams, cumulative, stride: coprime_stride(sum) }
    }

    /// Chooses among the members that pass `fit`; `None` if none does.
    pub(crate) fn choose(
        &self,
        balance: &Balance,
        draw: Draw,
        fit: impl Fn(&Upstream) -> bool,
    ) -> Option<&Arc<Upstream>> {
        if self.upstreams.len() == 1 {
            return self.upstreams.first().filter(|upstream| fit(upstream));
        }
        match (balance, draw.hash) {
            (Balance::ConsistentHash(_), Some(hash)) => self.rendezvous(hash, fit),
            (Balance::RoundRobin, _) => self.in_turn(draw.turn, fit),
            (Balance::PeakEwma, _) => self.better_of_two(draw, fit, |upstream| {
                let estimate = upstream.latency_estimate_us(draw.now_ms).max(1.0);
                estimate * in_flight_after(upstream)
            }),
            (Balance::LeastInFlight | Balance::ConsistentHash(_), _) => {
                self.better_of_two(draw, fit, in_flight_after)
            }
        }
    }

    fn total(&self) -> u64 {
        self.cumulative.last().copied().unwrap_or(0)
    }

    fn at_weight(&self, point: u64) -> usize {
        self.cumulative.partition_point(|sum| *sum <= point)
    }

    /// Exact over every `total` turns, and spread out instead of in runs.
    fn in_turn(&self, turn: u64, fit: impl Fn(&Upstream) -> bool) -> Option<&Arc<Upstream>> {
        let total = self.total();
        let point = (turn % total.max(1)).wrapping_mul(self.stride) % total.max(1);
        self.first_fit_from(self.at_weight(point), fit)
    }

    fn better_of_two(
        &self,
        draw: Draw,
        fit: impl Fn(&Upstream) -> bool,
        load: impl Fn(&Upstream) -> f64,
    ) -> Option<&Arc<Upstream>> {
        let first = self.draw_fit(draw, draw.random, &fit)?;
        let second = self.draw_fit(draw, mix(draw.random), &fit)?;
        if Arc::ptr_eq(first, second) {
            return Some(first);
        }
        let cost = |upstream: &Upstream| {
            #[expect(clippy::cast_precision_loss)]
            let capacity = (u64::from(upstream.weight())
                * upstream.ramp_permille(draw.now_ms, draw.slow_start_ms)) as f64;
            load(upstream) / capacity
        };
        // A tie goes to the first, so that idle pools keep the weights.
        Some(if cost(second) < cost(first) { second } else { first })
    }

    /// One draw by weight, once more if it fell on a member in its slow start or on one that is unfit.
    fn draw_fit(&self, draw: Draw, random: u64, fit: &impl Fn(&Upstream) -> bool) -> Option<&Arc<Upstream>> {
        let mut random = random;
        let mut index = 0;
        for _ in 0..3 {
            index = self.at_weight(below(random as u32, self.total()));
            let upstream = &self.upstreams[index];
            let lucky = (random >> 32) % 1_000 < upstream.ramp_permille(draw.now_ms, draw.slow_start_ms);
            if lucky && fit(upstream) {
                return Some(upstream);
            }
            random = mix(random ^ 0x9e37_79b9_7f4a_7c15);
        }
        self.first_fit_from(index, fit)
    }

    fn first_fit_from(&self, start: usize, fit: impl Fn(&Upstream) -> bool) -> Option<&Arc<Upstream>> {
        let (before, after) = self.upstreams.split_at(start.min(self.upstreams.len()));
        after.iter().chain(before).find(|upstream| fit(upstream))
    }

    /// Weighted rendezvous hashing: score = -weight / ln(u), u from the hash of key and member.
    fn rendezvous(&self, key: u64, fit: impl Fn(&Upstream) -> bool) -> Option<&Arc<Upstream>> {
        let score = |upstream: &Upstream| {
            #[expect(clippy::cast_precision_loss)]
            let unit = ((mix(key ^ upstream.sticky_key()) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
            -f64::from(upstream.weight()) / unit.ln()
        };
        let fitting = self.upstreams.iter().filter(|upstream| fit(upstream));
        fitting.max_by(|a, b| score(a).total_cmp(&score(b)))
    }
}

fn in_flight_after(upstream: &Upstream) -> f64 {
    #[expect(clippy::cast_precision_loss)]
    let leases = upstream.in_flight() as f64;
    leases + 1.0
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
