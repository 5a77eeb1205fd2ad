//! A service: pools with exact shares, and the way into one of their upstreams.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use crate::balance::{Balance, Draw, Members};
use crate::class::TrafficClass;
use crate::hash::{GOLDEN, below};
use crate::hold::{HoldCounts, HoldQueue};
use crate::mirror::Mirror;
use crate::retry::RetryBudget;
use crate::spec::{ServicePolicy, ServiceSpec, UpstreamSpec};
use crate::upstream::{Generation, Lease, Upstream};

/// A service in one version of the table.
#[derive(Debug)]
pub struct Service {
    spec: Arc<ServiceSpec>,
    pools: Box<[Pool]>,
    total_weight: u64,
    /// The queue that requests have to ask; `None` if the service is not held and nobody waits from before.
    hold: Option<Arc<HoldQueue>>,
    mirror: Option<Arc<Mirror>>,
    shared: Arc<Shared>,
}

/// What a service keeps over table versions.
#[derive(Debug, Default)]
struct Shared {
    turn: AtomicU64,
    budget: RetryBudget,
    /// Made with the first hold: of a million services most are never held.
    hold: OnceLock<Arc<HoldQueue>>,
}

#[derive(Debug)]
struct Pool {
    name: Arc<str>,
    weight: u64,
    standby: bool,
    members: Members,
    /// Turn of the round robin inside the pool. It goes on in the pool of this name in the next version.
    turn: Arc<AtomicU64>,
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
    /// Every upstream that may take traffic was retired or tried, as far as this table knows. If the table
    /// has changed since, look again.
    #[error("every upstream that takes traffic was retired or tried")]
    Exhausted,
}

impl Service {
    /// A new version of `previous`. `live` gives the live upstream of a spec.
    pub(crate) fn new(
        spec: Arc<ServiceSpec>,
        previous: Option<&Self>,
        mut live: impl FnMut(&UpstreamSpec) -> Arc<Upstream>,
    ) -> Self {
        let pools: Box<[Pool]> = spec
            .pools
            .iter()
            .map(|pool| Pool {
                name: Arc::clone(&pool.name),
                weight: u64::from(pool.weight),
                standby: pool.standby,
                members: Members::new(
                    pool.upstreams.iter().map(|upstream| (live(upstream), upstream.weight)),
                ),
                turn: previous.and_then(|before| before.turn_of(&pool.name)).unwrap_or_default(),
            })
            .collect();
        let total_weight = pools.iter().map(|pool| pool.weight).sum();
        let shared = previous.map_or_else(Arc::default, |before| Arc::clone(&before.shared));
        let mirror = spec.policy.mirror.as_ref().and_then(|mirror| {
            let pool = pools.iter().find(|pool| pool.name == mirror.pool)?;
            Some(Mirror::new(mirror, &pool.members.upstreams, previous.and_then(Self::mirror)))
        });
        let hold = match &spec.policy.hold {
            Some(_) => Some(Arc::clone(shared.hold.get_or_init(Arc::default))),
            None => shared.hold.get().filter(|queue| !queue.is_idle()).map(Arc::clone),
        };
        Self { spec, pools, total_weight, hold, mirror, shared }
    }

    /// The queue that a request of this service has to ask before it goes on, if there is one.
    #[must_use]
    pub const fn hold(&self) -> Option<&Arc<HoldQueue>> {
        self.hold.as_ref()
    }

    /// What became of the requests that were held, since the service was first known; over all edges.
    #[must_use]
    pub fn hold_counts(&self) -> HoldCounts {
        self.shared.hold.get().map(|queue| queue.counts()).unwrap_or_default()
    }

    /// The queue of all versions of the service, if it was ever held.
    pub(crate) fn hold_queue(&self) -> Option<&Arc<HoldQueue>> {
        self.shared.hold.get()
    }

    fn turn_of(&self, pool: &str) -> Option<Arc<AtomicU64>> {
        self.pools.iter().find(|mine| &*mine.name == pool).map(|mine| Arc::clone(&mine.turn))
    }

    /// What the writer has said of it.
    #[must_use]
    pub fn spec(&self) -> &ServiceSpec {
        &self.spec
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.spec.name
    }

    /// Time-outs, probes and the rest.
    #[must_use]
    pub fn policy(&self) -> &ServicePolicy {
        &self.spec.policy
    }

    /// How an upstream is chosen inside a pool.
    #[must_use]
    pub fn balance(&self) -> &Balance {
        &self.spec.balance
    }

    /// Where copies of its safe requests go, if anywhere.
    #[must_use]
    pub const fn mirror(&self) -> Option<&Arc<Mirror>> {
        self.mirror.as_ref()
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

    /// Upstreams that connections are to be opened to ahead of any request, with how many by each core.
    pub fn ready_upstreams(&self) -> impl Iterator<Item = (&Arc<Upstream>, u16)> {
        let specs = self.spec.pools.iter().flat_map(|pool| &pool.upstreams);
        let live = self.pools.iter().flat_map(|pool| &pool.members.upstreams);
        live.zip(specs.map(|spec| spec.ready_connections)).filter(|(_, count)| *count > 0)
    }

    /// Chooses an upstream and enters it.
    ///
    /// First the sticky preference, if that copy takes a share and is usable. Then a pool by exact share,
    /// and inside it by [`Balance`]. If that pool has no usable upstream: any pool with a share, then a
    /// standby pool. If nothing is usable anywhere, the rules on health are dropped rather than the
    /// request (the panic rule), in the same order. A pool without a share that is not standby is never
    /// entered, whatever happens: its copies have not shown that they work, or must not work yet.
    ///
    /// # Errors
    /// [`NoUpstream`] when nothing could be entered.
    pub fn enter(&self, ask: Enter<'_>) -> Result<Lease, NoUpstream> {
        let untried =
            |upstream: &Upstream| !upstream.is_retired() && !ask.tried.contains(&upstream.generation());
        let usable = |upstream: &Upstream| upstream.is_usable(ask.now_ms) && untried(upstream);
        let preferred = ask.prefer.and_then(|key| self.preferred(key, usable));
        if let Some(lease) = preferred.and_then(|upstream| upstream.enter(ask.class).ok()) {
            return Ok(lease);
        }
        let draw = Draw {
            now_ms: ask.now_ms,
            random: ask.random,
            hash: ask.hash,
            slow_start_ms: self.spec.policy.slow_start_ms,
        };
        let first = self.pool_in_turn();
        // Each refusal means that an upstream was retired since this table was made, and it will not be
        // chosen again; so the loop ends.
        loop {
            let chosen = self.choose(first, draw, usable).or_else(|| self.choose(first, draw, untried));
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

    fn choose<'a>(
        &'a self,
        first: Option<&'a Pool>,
        draw: Draw,
        fit: impl Fn(&Upstream) -> bool + Copy,
    ) -> Option<&'a Arc<Upstream>> {
        let weighted = first.into_iter().chain(self.pools.iter().filter(|pool| pool.weight > 0));
        let standby = self.pools.iter().filter(|pool| pool.weight == 0 && pool.standby);
        weighted
            .chain(standby)
            .find_map(|pool| pool.members.choose(&self.spec.balance, draw, &pool.turn, fit))
    }

    /// The pool whose turn it is. Multiples of the golden ratio fall evenly into every interval, so the
    /// shares are exact to a handful of requests, with no memory of what was sent where.
    fn pool_in_turn(&self) -> Option<&Pool> {
        // One pool needs no turn, and saves the cores a shared counter.
        if let [pool] = &self.pools[..] {
            return (pool.weight > 0).then_some(pool);
        }
        let turn = self.shared.turn.fetch_add(1, Relaxed);
        let mut point = below(turn.wrapping_mul(GOLDEN), self.total_weight);
        self.pools.iter().find(|pool| {
            let here = point < pool.weight;
            point = point.saturating_sub(pool.weight);
            here
        })
    }
}
