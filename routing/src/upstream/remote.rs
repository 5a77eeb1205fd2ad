//! What edges in other processes say of an upstream. Their requests never pass its gate here, so whoever asks
//! whether it is empty, or what it did, has to count them in.
//!
//! ```text
//!   expected (the table went to that edge) ─► inside ─► empty      the edge says that it has let go of it
//!                                               ▲  └──► lost       the edge was given up
//!                                               └────────┘         it is back
//! ```
//!
//! Counts of edges that are gone for good become one sum: an upstream may live for long, and many edges with it.
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
    /// Attempts that failed and were made again.
    pub retried: u64,
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
    /// Number of this loss among those of the upstream, rising: who has looked before knows those up to then.
    pub number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Requests of that edge are or may be inside.
    Inside,
    /// That edge has let go of it for good.
    Empty,
    /// That edge was given up, as the loss of this number.
    Lost(u64),
}

#[derive(Debug)]
struct Part {
    edge: Arc<str>,
    standing: Standing,
    /// What the edge had counted before we knew it; told off.
    base: Option<Box<Tally>>,
    now: Option<Box<Tally>>,
}

/// Losses that are kept apart, the newest: an edge that was cut off and comes back is counted on. One of before counts
/// anew, and stays told as lost.
const MAX_LOST_APART: usize = 16;

#[derive(Debug, Default)]
struct Parts {
    of: BTreeMap<EdgeId, Part>,
    /// What those amount to that are gone for good.
    gone: Option<Box<Sum>>,
    losses: u64,
}

impl Parts {
    /// Puts the oldest losses with those that are gone for good.
    fn fold_losses(&mut self) {
        loop {
            let lost = self.of.iter().filter_map(|(id, part)| match part.standing {
                Standing::Lost(number) => Some((number, *id)),
                Standing::Inside | Standing::Empty => None,
            });
            let (count, oldest) = lost.fold((0, None), |(count, oldest), one| {
                (count + 1, Some(oldest.map_or(one, |o| one.min(o))))
            });
            let Some((_, id)) = oldest.filter(|_| count > MAX_LOST_APART) else { return };
            self.fold(id);
        }
    }

    fn fold(&mut self, id: EdgeId) {
        let Some(part) = self.of.remove(&id) else { return };
        let gone = self.gone.get_or_insert_default();
        gone.add(&part);
        gone.merge_losses();
    }
}

/// The parts of all other edges.
#[derive(Debug, Default)]
pub(super) struct Remote(OnceLock<Box<Mutex<Parts>>>);

impl Remote {
    fn parts(&self) -> Option<MutexGuard<'_, Parts>> {
        self.0.get().map(|parts| parts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on that edge may be inside. One that was given up and has come back is expected again; false if it has
    /// let go for good.
    pub(super) fn expect(&self, id: EdgeId, edge: &Arc<str>) -> bool {
        let parts = self.0.get_or_init(Box::default);
        let mut parts = parts.lock().unwrap_or_else(PoisonError::into_inner);
        let part = parts.of.entry(id).or_insert_with(|| Part {
            edge: Arc::clone(edge),
            standing: Standing::Inside,
            base: None,
            now: None,
        });
        if matches!(part.standing, Standing::Lost(_)) {
            part.standing = Standing::Inside;
        }
        part.standing == Standing::Inside
    }

    /// Expects an edge again that was lost; false if it was not.
    pub(super) fn take_back(&self, id: EdgeId) -> bool {
        let Some(mut parts) = self.parts() else { return false };
        let part = parts.of.get_mut(&id).filter(|part| matches!(part.standing, Standing::Lost(_)));
        part.map(|part| part.standing = Standing::Inside).is_some()
    }

    /// Takes that edge's word; false if it was not expected or has let go before. `from_before` says that the edge
    /// knew the upstream before it joined us: its first word is what everything later is measured from.
    pub(super) fn report(&self, id: EdgeId, tally: Tally, from_before: bool) -> bool {
        let Some(mut parts) = self.parts() else { return false };
        let Some(part) = parts.of.get_mut(&id).filter(|part| part.standing != Standing::Empty) else {
            return false;
        };
        if from_before && part.now.is_none() {
            part.base = Some(Box::new(tally.clone()));
        }
        part.now = Some(Box::new(tally));
        true
    }

    pub(super) fn let_go(&self, id: EdgeId) {
        self.settle(id, |_| Standing::Empty);
    }

    /// That edge has ended in order.
    pub(super) fn leave(&self, id: EdgeId) {
        self.let_go(id);
        if let Some(mut parts) = self.parts() {
            parts.fold(id);
        }
    }

    pub(super) fn lose(&self, id: EdgeId) {
        self.settle(id, |parts| {
            parts.losses += 1;
            Standing::Lost(parts.losses)
        });
        if let Some(mut parts) = self.parts() {
            parts.fold_losses();
        }
    }

    fn settle(&self, id: EdgeId, standing: impl FnOnce(&mut Parts) -> Standing) {
        let Some(mut parts) = self.parts() else { return };
        let is_inside =
            |parts: &Parts| parts.of.get(&id).is_some_and(|part| part.standing == Standing::Inside);
        if is_inside(&parts) {
            let standing = standing(&mut parts);
            parts.of.entry(id).and_modify(|part| part.standing = standing);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts().is_none_or(|parts| parts.of.values().all(|part| part.standing != Standing::Inside))
    }

    /// The sum over all edges; `None` if no other edge has ever been told of the upstream.
    pub(super) fn sum(&self) -> Option<Sum> {
        let parts = self.parts()?;
        let mut sum = parts.gone.as_deref().cloned().unwrap_or_default();
        for part in parts.of.values() {
            sum.add(part);
        }
        Some(sum)
    }
}

/// What all other edges amount to.
#[derive(Clone, Debug, Default)]
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
        sum.retried += now.retried.saturating_sub(base.retried);
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
            Standing::Lost(number) => {
                let (edge, in_flight) = (Arc::clone(&part.edge), now.in_flight.total());
                self.lost.push(LostEdge { edge, in_flight, number });
            }
        }
    }

    /// The losses of one edge become one, with the number of the newest: it is told once too often rather than not.
    fn merge_losses(&mut self) {
        let mut merged: Vec<LostEdge> = Vec::new();
        for lost in std::mem::take(&mut self.lost) {
            match merged.iter_mut().find(|known| known.edge == lost.edge) {
                Some(known) => {
                    known.in_flight += lost.in_flight;
                    known.number = known.number.max(lost.number);
                }
                None => merged.push(lost),
            }
        }
        self.lost = merged;
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
