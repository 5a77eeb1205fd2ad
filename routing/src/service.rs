//! A service: pools with exact shares, and the way into one of their upstreams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::balance::{Balance, Draw, Members};
use crate::class::TrafficClass;
use crate::hash::below;
use crate::retry::RetryBudget;
use crate::spec::{PoolSpec, ServicePolicy, ServiceSpec};
use crate::upstream::{Generation, Lease, Upstream};

/// A service in one version of the table.
#[derive(Debug)]
pub struct Service {
    name: Arc<str>,
    balance: Balance,
    policy: ServicePolicy,
    pools: Box<[Pool]>,
    total_weight: u64,
    shared: Arc<Shared>,
}

/// What a service keeps over table versions.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    turn: AtomicU64,
    budget: RetryBudget,
}

#[derive(Debug)]
struct Pool {
    name: Arc<str>,
    weight: u64,
    standby: bool,
    members: Members,
}

/// What a choice may depend on.
#[derive(Clone, Copy, Debug)]
pub struct Enter<'a> {
    /// Milliseconds of the caller's monotonic clock, never 0.
    pub now_ms: u64,
    /// Fresh random bits.
    pub random: u64,
    /// Key of consistent hashing, see [`crate::stable_hash`].
    pub hash: Option<u64>,
    /// Value of the sticky cookie.
    pub prefer: Option<u64>,
    /// Generations that were tried for this request already.
    pub tried: &'a [Generation],
    /// What the lease is for.
    pub class: TrafficClass,
}

/// Why no upstream could be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoUpstream {
    /// The service has no upstream at all.
    #[error("the service has no upstream")]
    Empty,
    /// Every upstream that this table knows was retired or tried. If the table has changed since, look again.
    #[error("every upstream was retired or tried")]
    Exhausted,
}

impl Service {
    pub(crate) fn new(
        spec: &ServiceSpec,
        shared: Arc<Shared>,
        mut upstream: impl FnMut(&PoolSpec) -> Box<[Arc<Upstream>]>,
    ) -> Self {
        let pools: Box<[Pool]> = spec
            .pools
            .iter()
            .map(|pool| Pool {
                name: Arc::clone(&pool.name),
                weight: u64::from(pool.weight),
                standby: pool.standby,
                members: Members::new(upstream(pool)),
            })
            .collect();
        let total_weight = pools.iter().map(|pool| pool.weight).sum();
        Self {
            name: Arc::clone(&spec.name),
            balance: spec.balance.clone(),
            policy: spec.policy.clone(),
            pools,
            total_weight,
            shared,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Time-outs, probes and the rest.
    #[must_use]
    pub const fn policy(&self) -> &ServicePolicy {
        &self.policy
    }

    /// How an upstream is chosen inside a pool.
    #[must_use]
    pub const fn balance(&self) -> &Balance {
        &self.balance
    }

    /// The retry budget, shared by every version of the service.
    #[must_use]
    pub fn retry_budget(&self) -> &RetryBudget {
        &self.shared.budget
    }

    /// Every upstream with the name of its pool.
    pub fn upstreams(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Upstream>)> {
        self.pools
            .iter()
            .flat_map(|pool| pool.members.upstreams.iter().map(|upstream| (&pool.name, upstream)))
    }

    /// Chooses an upstream and enters it.
    ///
    /// First the sticky preference, if that copy takes a share and is usable. Then a pool by exact share,
    /// and inside it by [`Balance`]. If that pool has no usable upstream: any pool with a share, then a
    /// standby pool. If nothing is usable anywhere, the rules on health are dropped rather than the
    /// request (the panic rule), weighted pools first.
    ///
    /// # Errors
    /// [`NoUpstream`] when nothing could be entered.
    pub fn enter(&self, ask: Enter<'_>) -> Result<Lease, NoUpstream> {
        let turn = self.shared.turn.fetch_add(1, Relaxed);
        let untried =
            |upstream: &Upstream| !upstream.is_retired() && !ask.tried.contains(&upstream.generation());
        let usable = |upstream: &Upstream| upstream.is_usable(ask.now_ms) && untried(upstream);
        if let Some(lease) =
            ask.prefer.and_then(|key| self.preferred(key, usable)).and_then(|u| u.enter(ask.class).ok())
        {
            return Ok(lease);
        }
        let draw = Draw {
            now_ms: ask.now_ms,
            random: ask.random,
            turn,
            hash: ask.hash,
            slow_start_ms: self.policy.slow_start_ms,
        };
        // Each refusal means that an upstream was retired since this table was made, and it will not be
        // chosen again; so the loop ends.
        loop {
            let chosen = self.choose(draw, usable, false).or_else(|| self.choose(draw, untried, true));
            let Some(upstream) = chosen else { break };
            if let Ok(lease) = upstream.enter(ask.class) {
                return Ok(lease);
            }
        }
        Err(if self.pools.iter().all(|pool| pool.members.upstreams.is_empty()) {
            NoUpstream::Empty
        } else {
            NoUpstream::Exhausted
        })
    }

    fn preferred(&self, key: u64, usable: impl Fn(&Upstream) -> bool) -> Option<&Arc<Upstream>> {
        let weighted = self.pools.iter().filter(|pool| pool.weight > 0);
        weighted.flat_map(|pool| &pool.members.upstreams).find(|u| u.sticky_key() == key && usable(u))
    }

    fn choose(
        &self,
        draw: Draw,
        fit: impl Fn(&Upstream) -> bool + Copy,
        panic: bool,
    ) -> Option<&Arc<Upstream>> {
        let first = self.pool_of_turn(draw.turn);
        if let Some(upstream) = first.and_then(|pool| pool.members.choose(&self.balance, draw, fit)) {
            return Some(upstream);
        }
        let others = |standby: bool| {
            let pools = self
                .pools
                .iter()
                .filter(move |pool| if standby { pool.weight == 0 && pool.standby } else { pool.weight > 0 });
            pools.filter_map(|pool| pool.members.choose(&self.balance, draw, fit)).next()
        };
        others(false).or_else(|| others(true)).or_else(|| {
            // A copy that never showed that it works is better than no answer, but only just.
            let all = if panic { &self.pools[..] } else { &[] };
            all.iter().find_map(|pool| pool.members.choose(&self.balance, draw, fit))
        })
    }

    /// The pool whose turn it is. Multiples of the golden ratio fall evenly into every interval, so the
    /// shares are exact to a handful of requests, with no memory of what was sent where.
    fn pool_of_turn(&self, turn: u64) -> Option<&Pool> {
        if let [pool] = &self.pools[..] {
            return (pool.weight > 0).then_some(pool);
        }
        if self.total_weight == 0 {
            return None;
        }
        let even = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let mut point = below(even as u32, self.total_weight);
        self.pools.iter().find(|pool| {
            let here = point < pool.weight;
            point = point.saturating_sub(pool.weight);
            here
        })
    }
}
