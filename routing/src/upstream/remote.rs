//! What edges in other processes say of an upstream. Their requests never pass its gate here, so whoever asks
//! whether it is empty, or what it did, has to count them in.
//!
//! ```text
//!   expected (the table went to that edge) ─► inside ─► empty      the edge says that it has let go of it
//!                                                  └──► lost       the edge was not heard of until its lease ended
//! ```
//!
//! Nothing here is on the request path. An upstream that no other edge knows pays one pointer for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Health;
use crate::class::{PerClass, TrafficClass};
use crate::mirror::MirrorCounts;
use crate::outcome::OutcomeCounts;

/// One life of one edge process. Chosen at random when it starts: counts begin anew with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EdgeId(pub u64);

/// What one edge says of one upstream. Counts are since that edge first knew it, so that the newest word of an edge
/// replaces every earlier one, and a word that is lost or said twice does no harm.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests sent.
    pub started: u64,
    /// Leases that ended by themselves.
    pub completed: PerClass<u64>,
    /// Leases whose traffic was closed politely.
    pub soft_closed: PerClass<u64>,
    /// Leases out.
    pub in_flight: PerClass<u64>,
    /// Body bytes sent to the upstream.
    pub bytes_to_upstream: u64,
    /// Body bytes sent to clients.
    pub bytes_to_client: u64,
    /// Requests that were cut: class and id.
    pub hard_cut: Vec<(TrafficClass, String)>,
    /// What became of the requests.
    pub outcomes: OutcomeCounts,
    /// Connections that are open ahead and not used yet.
    pub ready_connections: u64,
    /// What that edge's probes say.
    pub health: Health,
    /// Until when that edge has ejected it, in milliseconds of the reader's clock.
    pub ejected_until_ms: u64,
    /// Time of the last good probe in microseconds; 0 before the first.
    pub probe_latency_us: u64,
    /// What was mirrored to it; `None` is nothing ever.
    pub mirrored: Option<Box<MirrorCounts>>,
}

/// Leases of an edge that was lost: what became of them is not known, and they are in no other count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostEdge {
    /// Name of the edge.
    pub edge: Arc<str>,
    /// Leases that were out when it was last heard of.
    pub in_flight: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Requests of that edge are or may be inside.
    Inside,
    /// That edge has let go of it for good.
    Empty,
    /// That edge was not heard of until its lease ended.
    Lost,
}

#[derive(Debug)]
struct Part {
    edge: Arc<str>,
    standing: Standing,
    /// What the edge had counted before we knew it; told off.
    base: Option<Box<Tally>>,
    now: Option<Box<Tally>>,
}

/// The parts of all other edges.
#[derive(Debug, Default)]
pub(super) struct Remote(OnceLock<Box<Mutex<BTreeMap<EdgeId, Part>>>>);

impl Remote {
    fn parts(&self) -> Option<MutexGuard<'_, BTreeMap<EdgeId, Part>>> {
        self.0.get().map(|parts| parts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on that edge may be inside. One that was given up and has come back is expected again.
    pub(super) fn expect(&self, id: EdgeId, edge: &Arc<str>) {
        let parts = self.0.get_or_init(Box::default);
        let mut parts = parts.lock().unwrap_or_else(PoisonError::into_inner);
        let part = parts.entry(id).or_insert_with(|| Part {
            edge: Arc::clone(edge),
            standing: Standing::Inside,
            base: None,
            now: None,
        });
        if part.standing == Standing::Lost {
            part.standing = Standing::Inside;
        }
    }

    /// Takes that edge's word; false if it was not expected or has let go before. `from_before` says that the edge
    /// knew the upstream before it joined us: its first word is what everything later is measured from.
    pub(super) fn report(&self, id: EdgeId, tally: Tally, from_before: bool) -> bool {
        let Some(mut parts) = self.parts() else { return false };
        let Some(part) = parts.get_mut(&id).filter(|part| part.standing != Standing::Empty) else {
            return false;
        };
        if from_before && part.now.is_none() {
            part.base = Some(Box::new(tally.clone()));
        }
        part.now = Some(Box::new(tally));
        true
    }

    pub(super) fn let_go(&self, id: EdgeId) {
        self.settle(id, Standing::Empty);
    }

    pub(super) fn lose(&self, id: EdgeId) {
        self.settle(id, Standing::Lost);
    }

    fn settle(&self, id: EdgeId, standing: Standing) {
        let Some(mut parts) = self.parts() else { return };
        if let Some(part) = parts.get_mut(&id).filter(|part| part.standing == Standing::Inside) {
            part.standing = standing;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts().is_none_or(|parts| parts.values().all(|part| part.standing != Standing::Inside))
    }

    /// The sum over all edges; `None` if no other edge has ever been told of the upstream.
    pub(super) fn sum(&self) -> Option<Sum> {
        let parts = self.parts()?;
        let mut sum = Sum::default();
        for part in parts.values() {
            sum.add(part);
        }
        Some(sum)
    }
}

/// What all other edges amount to.
#[derive(Debug, Default)]
pub(super) struct Sum {
    pub(super) tally: Tally,
    pub(super) lost: Vec<LostEdge>,
}

impl Sum {
    fn add(&mut self, part: &Part) {
        let nothing = Tally::default();
        let (now, base) = (part.now.as_deref().unwrap_or(&nothing), part.base.as_deref().unwrap_or(&nothing));
        let sum = &mut self.tally;
        sum.started += now.started.saturating_sub(base.started);
        sum.bytes_to_upstream += now.bytes_to_upstream.saturating_sub(base.bytes_to_upstream);
        sum.bytes_to_client += now.bytes_to_client.saturating_sub(base.bytes_to_client);
        for class in TrafficClass::ALL {
            sum.completed[class] += now.completed[class].saturating_sub(base.completed[class]);
            sum.soft_closed[class] += now.soft_closed[class].saturating_sub(base.soft_closed[class]);
        }
        // All of them: what is cut is cut once, in the one drain of this stretch of service, which may have begun before us.
        sum.hard_cut.extend(now.hard_cut.iter().cloned());
        sum.outcomes.add(&now.outcomes.since(&base.outcomes));
        if let Some(mirrored) = &now.mirrored {
            let before = base.mirrored.as_deref();
            let since = before.map_or_else(|| mirrored.clone(), |before| Box::new(mirrored.since(before)));
            sum.mirrored.get_or_insert_default().add(&since);
        }
        match part.standing {
            Standing::Inside => {
                sum.in_flight.add(&now.in_flight);
                sum.ready_connections += now.ready_connections;
                sum.health = worse(sum.health, now.health);
                sum.ejected_until_ms = sum.ejected_until_ms.max(now.ejected_until_ms);
                sum.probe_latency_us = sum.probe_latency_us.max(now.probe_latency_us);
            }
            Standing::Empty => {}
            Standing::Lost => {
                let lost = LostEdge { edge: Arc::clone(&part.edge), in_flight: now.in_flight.total() };
                self.lost.push(lost);
            }
        }
    }
}

/// Of two views on one upstream: the one that calls for a closer look.
pub(super) const fn worse(one: Health, other: Health) -> Health {
    match (one, other) {
        (Health::Unhealthy, _) | (_, Health::Unhealthy) => Health::Unhealthy,
        (Health::Healthy, _) | (_, Health::Healthy) => Health::Healthy,
        (Health::Unknown, Health::Unknown) => Health::Unknown,
    }
}
