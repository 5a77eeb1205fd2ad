//! How the next table is made: a batch of changes is checked as a whole, and only then applied.
//!
//! Checking touches nothing and applying cannot fail, so that "all or none" needs no way back. A batch is
//! one change: what counts is how it leaves each service, not the order of its parts. A route may pass
//! from one service to another in it, whichever of the two is named first.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::host::HostPattern;
use crate::keyed::Keyed;
use crate::path::{PathError, ROOT, canonical_prefix};
use crate::service::Service;
use crate::spec::{Change, PoolSpec, ServiceSpec, UpstreamSpec};
use crate::spent::Spent;
use crate::table::RoutingTable;
use crate::upstream::{Generation, Upstream};

/// Services that a table can hold.
const MAX_SERVICES: u32 = 1 << 24;

/// Why a change was refused. The table stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Another service has this host and path already.
    #[error("{host}{path} is taken by service {holder}")]
    RouteTaken {
        /// Host pattern.
        host: String,
        /// Path prefix.
        path: String,
        /// Who has it.
        holder: Arc<str>,
    },
    /// A path prefix is malformed.
    #[error("path prefix {path:?} of service {service} is malformed")]
    BadPath {
        /// Whose route.
        service: Arc<str>,
        /// The prefix.
        path: String,
        /// What is wrong.
        source: PathError,
    },
    /// A generation was retired and cannot serve again, or is named twice or by another service.
    #[error("upstream generation {0} was used before")]
    GenerationReused(Generation),
    /// A generation that is in service was given another name, address or protocol: that is another copy,
    /// and needs a generation of its own.
    #[error("upstream generation {0} is in service with another name, address or protocol")]
    GenerationChanged(Generation),
    /// A mirror names a pool that the service does not have, that takes clients' requests, or that may come to.
    #[error("service {service} mirrors to pool {pool}, which is not there or is not out of service")]
    BadMirror {
        /// Whose mirror.
        service: Arc<str>,
        /// The pool.
        pool: Arc<str>,
    },
    /// More services than a table can hold.
    #[error("the table holds no more than {MAX_SERVICES} services")]
    Full,
}

type Route = (HostPattern, Arc<str>);

/// How a batch leaves one service.
struct Touched<'a> {
    name: &'a Arc<str>,
    next: Option<&'a ServiceSpec>,
    /// Its place and its version in the table now.
    before: Option<(u32, Arc<Service>)>,
}

impl Touched<'_> {
    fn spec_before(&self) -> Option<&ServiceSpec> {
        self.before.as_ref().map(|(_, service)| service.spec())
    }
}

/// A checked batch.
struct Plan<'a> {
    touched: Vec<Touched<'a>>,
    removed: HashSet<Route>,
    /// With the index of the touched service that gets it.
    added: Vec<(Route, usize)>,
}

/// What the writer knows beyond the snapshot: names, slots, and the live upstreams.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    table: RoutingTable,
    slots: Keyed<Arc<str>, u32>,
    free: Vec<u32>,
    next_slot: u32,
    upstreams: Keyed<Generation, Arc<Upstream>>,
    spent: Spent,
}

impl Builder {
    pub(crate) const fn table(&self) -> &RoutingTable {
        &self.table
    }

    pub(crate) fn spec(&self, name: &str) -> Option<&ServiceSpec> {
        self.service(name).map(|service| service.spec())
    }

    pub(crate) fn service(&self, name: &str) -> Option<&Arc<Service>> {
        self.table.services.get(u64::from(*self.slots.get(name)?))
    }

    pub(crate) fn upstream(&self, generation: Generation) -> Option<&Arc<Upstream>> {
        self.upstreams.get(&generation)
    }

    pub(crate) fn forget(&mut self, generation: Generation) {
        if self.upstream(generation).is_some_and(|upstream| upstream.is_retired()) {
            self.upstreams.remove(&generation);
            self.spent.add(generation);
        }
    }

    /// Takes in an upstream that is retired already.
    pub(crate) fn adopt(&mut self, spec: &UpstreamSpec) -> Arc<Upstream> {
        if let Some(known) = self.upstream(spec.generation) {
            return Arc::clone(known);
        }
        let upstream = self.live(spec, None);
        upstream.retire();
        upstream
    }

    /// Applies changes, all or none; returns the upstreams that have lost their place.
    pub(crate) fn apply(&mut self, changes: &[Change]) -> Result<Vec<Arc<Upstream>>, TableError> {
        let plan = self.check(changes)?;
        let orphans = self.commit(plan);
        changes.iter().for_each(|change| self.table.domains.apply(change));
        Ok(orphans)
    }

    // --- check: nothing is changed, everything that can be wrong is found -------------------------

    fn check<'a>(&self, changes: &'a [Change]) -> Result<Plan<'a>, TableError> {
        let mut plan = Plan { touched: self.touched(changes), removed: HashSet::new(), added: Vec::new() };
        self.check_room(&plan.touched)?;
        self.check_generations(&plan.touched)?;
        plan.touched.iter().filter_map(|touched| touched.next).try_for_each(check_mirror)?;
        for (index, touched) in plan.touched.iter().enumerate() {
            let before = touched.spec_before();
            if before.map(|spec| &spec.routes) == touched.next.map(|spec| &spec.routes) {
                continue; // the usual case: weights or upstreams change, routes stay
            }
            let old: HashSet<Route> = before.map_or(Ok(HashSet::new()), canonical_routes)?;
            let new: HashSet<Route> = touched.next.map_or(Ok(HashSet::new()), canonical_routes)?;
            plan.added.extend(new.difference(&old).map(|route| (route.clone(), index)));
            plan.removed.extend(old.into_iter().filter(|route| !new.contains(route)));
        }
        self.check_routes(&plan)?;
        Ok(plan)
    }

    /// The last word of the batch on each service, in the order of the first.
    fn touched<'a>(&self, changes: &'a [Change]) -> Vec<Touched<'a>> {
        let mut index: HashMap<&str, usize> = HashMap::with_capacity(changes.len());
        let mut touched: Vec<Touched<'a>> = Vec::with_capacity(changes.len());
        for change in changes {
            let Some(name) = change.service() else { continue };
            let next = change.put();
            if let Some(at) = index.get(&**name) {
                touched[*at].next = next;
                continue;
            }
            index.insert(name, touched.len());
            let slot = self.slots.get(&**name).copied();
            let before = slot.and_then(|slot| {
                self.table.services.get(u64::from(slot)).map(|service| (slot, Arc::clone(service)))
            });
            touched.push(Touched { name, next, before });
        }
        touched
    }

    fn check_room(&self, touched: &[Touched<'_>]) -> Result<(), TableError> {
        let is_new =
            |touched: &&Touched<'_>| touched.next.is_some() && self.slots.get(touched.name).is_none();
        let needed = touched.iter().filter(is_new).count();
        let room = self.free.len() + (MAX_SERVICES - self.next_slot) as usize;
        if needed > room { Err(TableError::Full) } else { Ok(()) }
    }

    fn check_generations(&self, touched: &[Touched<'_>]) -> Result<(), TableError> {
        let mut named = HashSet::new();
        for (touched, next) in touched.iter().filter_map(|touched| Some((touched, touched.next?))) {
            let own = generations(touched.spec_before());
            for upstream in upstreams(next) {
                let generation = upstream.generation;
                if !named.insert(generation) || self.spent.contains(generation) {
                    return Err(TableError::GenerationReused(generation));
                }
                let Some(known) = self.upstream(generation) else { continue };
                if known.is_retired() || !own.contains(&generation) {
                    return Err(TableError::GenerationReused(generation));
                }
                if !known.is_same_copy(upstream) {
                    return Err(TableError::GenerationChanged(generation));
                }
            }
        }
        Ok(())
    }

    fn check_routes(&self, plan: &Plan<'_>) -> Result<(), TableError> {
        let mut claimed: HashMap<&Route, &Arc<str>> = HashMap::with_capacity(plan.added.len());
        for (route, index) in &plan.added {
            let slot = self.table.holder(&route.0, &route.1).filter(|_| !plan.removed.contains(route));
            let holder = slot.and_then(|slot| self.table.services.get(u64::from(slot))).map(|s| s.name());
            if let Some(holder) = holder.or_else(|| claimed.get(route).copied()) {
                return Err(TableError::RouteTaken {
                    host: route.0.to_string(),
                    path: route.1.to_string(),
                    holder: Arc::clone(holder),
                });
            }
            claimed.insert(route, plan.touched[*index].name);
        }
        Ok(())
    }

    // --- commit: cannot fail ----------------------------------------------------------------------

    fn commit(&mut self, plan: Plan<'_>) -> Vec<Arc<Upstream>> {
        let mut orphans = Vec::new();
        let mut slots = Vec::with_capacity(plan.touched.len());
        for touched in &plan.touched {
            orphans.extend(self.orphans(touched));
            slots.push(self.place(touched));
        }
        let removed = plan.removed.into_iter().map(|(host, prefix)| (host, prefix, None));
        let added = plan.added.into_iter().map(|((host, prefix), index)| (host, prefix, slots[index]));
        let mut edits: Vec<(HostPattern, Arc<str>, Option<u32>)> = removed.chain(added).collect();
        edits.sort_unstable();
        for of_host in edits.chunk_by(|a, b| a.0 == b.0) {
            self.table.edit(&of_host[0].0, of_host.iter().map(|(_, prefix, slot)| (prefix, *slot)));
        }
        self.table.version += 1;
        orphans
    }

    /// Upstreams that the service has now and will not have then.
    fn orphans(&self, touched: &Touched<'_>) -> Vec<Arc<Upstream>> {
        let kept = generations(touched.next);
        let before = touched.spec_before().into_iter().flat_map(upstreams).map(|u| u.generation);
        before.filter(|g| !kept.contains(g)).filter_map(|g| self.upstream(g).cloned()).collect()
    }

    fn place(&mut self, touched: &Touched<'_>) -> Option<u32> {
        let slot = touched.before.as_ref().map(|(slot, _)| *slot);
        self.table.ready.retain(|service| service.name() != touched.name);
        self.table.held.retain(|service| service.name() != touched.name);
        let mirror = touched.before.as_ref().and_then(|(_, service)| service.mirror());
        let Some(spec) = touched.next else {
            mirror.into_iter().for_each(|mirror| mirror.end());
            if let Some(slot) = slot {
                self.slots.remove(touched.name);
                *self.table.services.slot(u64::from(slot)) = None;
                self.free.push(slot);
            }
            return None;
        };
        let previous = touched.before.as_ref().map(|(_, service)| &**service);
        let service =
            Arc::new(Service::new(Arc::new(kept(spec)), previous, |upstream| self.live(upstream, previous)));
        // Before anybody sees the table: whoever holds the old one mirrors nothing any more.
        mirror
            .filter(|before| service.mirror().is_none_or(|now| !Arc::ptr_eq(before, now)))
            .into_iter()
            .for_each(|mirror| mirror.end());
        if service.ready_upstreams().next().is_some() {
            self.table.ready.push(Arc::clone(&service));
        }
        if service.hold().is_some() {
            self.table.held.push(Arc::clone(&service));
        }
        let slot = slot.unwrap_or_else(|| self.new_slot(&spec.name));
        *self.table.services.slot(u64::from(slot)) = Some(service);
        Some(slot)
    }

    fn live(&mut self, spec: &UpstreamSpec, previous: Option<&Service>) -> Arc<Upstream> {
        if let Some(known) = self.upstream(spec.generation) {
            return Arc::clone(known);
        }
        let fresh = Arc::new(Upstream::new(spec));
        previous.into_iter().flat_map(Service::upstreams).for_each(|(_, other)| fresh.inherit(other));
        self.upstreams.insert(&spec.generation, Arc::clone(&fresh));
        fresh
    }

    fn new_slot(&mut self, name: &Arc<str>) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.next_slot += 1;
            self.next_slot - 1
        });
        self.slots.insert(name, slot);
        slot
    }
}

fn check_mirror(spec: &ServiceSpec) -> Result<(), TableError> {
    let Some(mirror) = &spec.policy.mirror else { return Ok(()) };
    let is_out = |pool: &PoolSpec| pool.name == mirror.pool && pool.weight == 0 && !pool.standby;
    if spec.pools.iter().any(is_out) {
        return Ok(());
    }
    Err(TableError::BadMirror { service: Arc::clone(&spec.name), pool: Arc::clone(&mirror.pool) })
}

fn generations(spec: Option<&ServiceSpec>) -> HashSet<Generation> {
    spec.into_iter().flat_map(upstreams).map(|upstream| upstream.generation).collect()
}

/// A copy to keep. The root prefix, which nearly every route has, is one for all of them.
fn kept(spec: &ServiceSpec) -> ServiceSpec {
    let mut spec = spec.clone();
    for route in spec.routes.iter_mut().filter(|route| &*route.path_prefix == "/") {
        route.path_prefix = Arc::clone(&ROOT);
    }
    spec
}

fn upstreams(spec: &ServiceSpec) -> impl Iterator<Item = &UpstreamSpec> {
    spec.pools.iter().flat_map(|pool| &pool.upstreams)
}

fn canonical_routes(spec: &ServiceSpec) -> Result<HashSet<Route>, TableError> {
    let canonical = |path: &Arc<str>| {
        canonical_prefix(path).map_err(|source| TableError::BadPath {
            service: Arc::clone(&spec.name),
            path: path.to_string(),
            source,
        })
    };
    spec.routes.iter().map(|route| Ok((route.host.clone(), canonical(&route.path_prefix)?))).collect()
}
