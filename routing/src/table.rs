//! The routing table: an immutable snapshot, and how the next one is made from it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::host::{HostPattern, MAX_HOST_BYTES};
use crate::path::{PathError, PathRoutes, canonical_prefix};
use crate::radix::Radix;
use crate::service::{Service, Shared};
use crate::spec::{Change, PoolSpec, ServiceSpec, UpstreamSpec};
use crate::upstream::{Generation, Upstream};

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
    /// A generation was retired and cannot serve again, or is used by another service.
    #[error("upstream generation {0} was used before")]
    GenerationReused(Generation),
    /// More services than a table can hold.
    #[error("the table holds no more than 16,777,216 services")]
    Full,
}

/// What a look-up found.
#[derive(Clone, Copy, Debug)]
pub struct Match<'a> {
    /// The service.
    pub service: &'a Arc<Service>,
    /// The path prefix that matched.
    pub path_prefix: &'a Arc<str>,
}

/// A snapshot of all routes. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct RoutingTable {
    version: u64,
    exact: Hosts,
    wildcard: Hosts,
    any: PathRoutes,
    services: Radix<Arc<Service>, 4>,
}

impl RoutingTable {
    /// Number of this snapshot; rises by one with each publication.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// Finds the service for a canonical host (see [`crate::canonical_host`]) and a path.
    ///
    /// An exact host comes before a wildcard, a longer wildcard before a shorter one, and `*` last; a
    /// host whose prefixes do not match lets the next one try. Among prefixes the longest wins.
    #[must_use]
    pub fn lookup(&self, host: &str, path: &str) -> Option<Match<'_>> {
        let exact = self.exact.get(host).and_then(|routes| routes.longest(path));
        let found = exact.or_else(|| self.below_wildcard(host, path)).or_else(|| self.any.longest(path));
        let (path_prefix, slot) = found?;
        Some(Match { service: self.services.get(u64::from(slot))?, path_prefix })
    }

    fn below_wildcard(&self, host: &str, path: &str) -> Option<(&Arc<str>, u32)> {
        if self.wildcard.len == 0 || host.len() > MAX_HOST_BYTES {
            return None;
        }
        let suffixes = host.match_indices('.').map(|(at, _)| &host[at + 1..]);
        suffixes.filter_map(|suffix| self.wildcard.get(suffix)).find_map(|routes| routes.longest(path))
    }

    /// Calls `visit` with every service. Takes as long as there are services: not for the request path.
    pub fn for_each_service<'a>(&'a self, visit: impl FnMut(&'a Arc<Service>)) {
        self.services.for_each(visit);
    }

    fn routes_of(&self, host: &HostPattern) -> Option<&PathRoutes> {
        match host {
            HostPattern::Exact(host) => self.exact.get(host),
            HostPattern::Wildcard(suffix) => self.wildcard.get(suffix),
            HostPattern::Any => Some(&self.any),
        }
    }

    fn change_routes(&mut self, host: &HostPattern, change: impl FnOnce(&mut PathRoutes)) {
        match host {
            HostPattern::Exact(host) => self.exact.change(host, change),
            HostPattern::Wildcard(suffix) => self.wildcard.change(suffix, change),
            HostPattern::Any => change(&mut self.any),
        }
    }
}

/// Hosts by keyed hash: 2^18 buckets that are made when they are needed.
#[derive(Clone, Debug, Default)]
struct Hosts {
    buckets: Radix<Box<[HostEntry]>, 3>,
    hasher: RandomState,
    len: usize,
}

#[derive(Clone, Debug)]
struct HostEntry {
    host: Arc<str>,
    routes: PathRoutes,
}

impl Hosts {
    fn get(&self, host: &str) -> Option<&PathRoutes> {
        let bucket = self.buckets.get(self.bucket(host))?;
        bucket.iter().find(|entry| &*entry.host == host).map(|entry| &entry.routes)
    }

    fn change(&mut self, host: &Arc<str>, change: impl FnOnce(&mut PathRoutes)) {
        let key = self.bucket(host);
        let slot = self.buckets.slot(key);
        let mut entries = slot.take().map_or_else(Vec::new, <[HostEntry]>::into_vec);
        let at = entries.iter().position(|entry| entry.host == *host).unwrap_or_else(|| {
            entries.push(HostEntry { host: Arc::clone(host), routes: PathRoutes::default() });
            self.len += 1;
            entries.len() - 1
        });
        change(&mut entries[at].routes);
        if entries[at].routes.is_empty() {
            entries.swap_remove(at);
            self.len -= 1;
        }
        *slot = (!entries.is_empty()).then(|| entries.into_boxed_slice());
    }

    fn bucket(&self, host: &str) -> u64 {
        self.hasher.hash_one(host) >> (64 - Radix::<Box<[HostEntry]>, 3>::BITS)
    }
}

/// What the writer knows beyond the snapshot: names, slots, and the live upstreams.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    table: RoutingTable,
    slots: HashMap<Arc<str>, u32>,
    specs: HashMap<Arc<str>, ServiceSpec>,
    free: Vec<u32>,
    next_slot: u32,
    upstreams: HashMap<Generation, Arc<Upstream>>,
}

const MAX_SERVICES: u32 = 1 << 24;

impl Builder {
    pub(crate) const fn table(&self) -> &RoutingTable {
        &self.table
    }

    pub(crate) fn spec(&self, name: &str) -> Option<&ServiceSpec> {
        self.specs.get(name)
    }

    pub(crate) fn upstream(&self, generation: Generation) -> Option<&Arc<Upstream>> {
        self.upstreams.get(&generation)
    }

    pub(crate) fn forget(&mut self, generation: Generation) {
        if self.upstreams.get(&generation).is_some_and(|upstream| upstream.is_retired()) {
            self.upstreams.remove(&generation);
        }
    }

    /// Applies changes, all or none; returns the upstreams that have lost their place.
    pub(crate) fn apply(&mut self, changes: &[Change]) -> Result<Vec<Arc<Upstream>>, TableError> {
        // The snapshot is persistent, so "none" is to go on with the one we had.
        let before = self.table.clone();
        let mut undo: Vec<(Arc<str>, Option<ServiceSpec>)> = Vec::new();
        let mut fresh: Vec<Generation> = Vec::new();
        for change in changes {
            let (name, next) = match change {
                Change::Put(spec) => (&spec.name, Some(spec)),
                Change::Remove(name) => (name, None),
            };
            undo.push((Arc::clone(name), self.specs.get(name).cloned()));
            if let Err(error) = self.replace(name, next, &mut fresh) {
                self.table = before;
                self.roll_back(undo, &fresh);
                return Err(error);
            }
        }
        self.table.version += 1;
        Ok(self.orphans(undo))
    }

    fn replace(
        &mut self,
        name: &Arc<str>,
        next: Option<&ServiceSpec>,
        fresh: &mut Vec<Generation>,
    ) -> Result<(), TableError> {
        let shared = self
            .slots
            .get(name)
            .and_then(|slot| self.table.services.get(u64::from(*slot)))
            .map(|s| Arc::clone(s.shared()));
        let old_routes = self.specs.get(name).map(canonical_routes).transpose()?.unwrap_or_default();
        let new_routes = next.map(canonical_routes).transpose()?.unwrap_or_default();
        for (host, prefix) in old_routes.iter().filter(|route| !new_routes.contains(route)) {
            self.table.change_routes(host, |routes| routes.remove(prefix));
        }
        let Some(spec) = next else {
            if let Some(slot) = self.slots.remove(name) {
                *self.table.services.slot(u64::from(slot)) = None;
                self.free.push(slot);
                self.specs.remove(name);
            }
            return Ok(());
        };
        let slot = self.slot_of(name)?;
        for (host, prefix) in new_routes.iter().filter(|route| !old_routes.contains(route)) {
            self.claim(host, prefix, slot)?;
        }
        let service = self.service(spec, shared.unwrap_or_default(), fresh)?;
        *self.table.services.slot(u64::from(slot)) = Some(Arc::new(service));
        self.specs.insert(Arc::clone(name), spec.clone());
        Ok(())
    }

    fn claim(&mut self, host: &HostPattern, prefix: &Arc<str>, slot: u32) -> Result<(), TableError> {
        let holder = self.table.routes_of(host).and_then(|routes| routes.get(prefix));
        if let Some(holder) = holder.filter(|holder| *holder != slot) {
            let holder = self
                .table
                .services
                .get(u64::from(holder))
                .map_or_else(|| "?".into(), |s| Arc::clone(s.name()));
            return Err(TableError::RouteTaken { host: host.to_string(), path: prefix.to_string(), holder });
        }
        self.table.change_routes(host, |routes| routes.insert(Arc::clone(prefix), slot));
        Ok(())
    }

    fn slot_of(&mut self, name: &Arc<str>) -> Result<u32, TableError> {
        if let Some(slot) = self.slots.get(name) {
            return Ok(*slot);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.next_slot == MAX_SERVICES => return Err(TableError::Full),
            None => {
                self.next_slot += 1;
                self.next_slot - 1
            }
        };
        self.slots.insert(Arc::clone(name), slot);
        Ok(slot)
    }

    fn service(
        &mut self,
        spec: &ServiceSpec,
        shared: Arc<Shared>,
        fresh: &mut Vec<Generation>,
    ) -> Result<Service, TableError> {
        let own: Vec<Generation> = self.specs.get(&spec.name).map(generations).unwrap_or_default();
        for upstream in spec.pools.iter().flat_map(|pool| &pool.upstreams) {
            self.admit(upstream, &own, fresh)?;
        }
        let known = &self.upstreams;
        let members = |pool: &PoolSpec| {
            pool.upstreams.iter().filter_map(|u| known.get(&u.generation).cloned()).collect()
        };
        Ok(Service::new(spec, shared, members))
    }

    fn admit(
        &mut self,
        spec: &UpstreamSpec,
        own: &[Generation],
        fresh: &mut Vec<Generation>,
    ) -> Result<(), TableError> {
        match self.upstreams.get(&spec.generation) {
            Some(known)
                if known.is_retired()
                    || !(own.contains(&spec.generation) || fresh.contains(&spec.generation)) =>
            {
                Err(TableError::GenerationReused(spec.generation))
            }
            Some(_) => Ok(()),
            None => {
                self.upstreams.insert(spec.generation, Arc::new(Upstream::new(spec.clone())));
                fresh.push(spec.generation);
                Ok(())
            }
        }
    }

    fn roll_back(&mut self, undo: Vec<(Arc<str>, Option<ServiceSpec>)>, fresh: &[Generation]) {
        for (name, spec) in undo.into_iter().rev() {
            match spec {
                Some(spec) => {
                    self.specs.insert(name, spec);
                }
                None => {
                    self.specs.remove(&name);
                }
            }
        }
        for generation in fresh {
            self.upstreams.remove(generation);
        }
        // Slots are found again from the snapshot, which is the truth.
        let mut slots = HashMap::new();
        self.free.clear();
        for slot in 0..self.next_slot {
            match self.table.services.get(u64::from(slot)) {
                Some(service) => {
                    slots.insert(Arc::clone(service.name()), slot);
                }
                None => self.free.push(slot),
            }
        }
        self.slots = slots;
    }

    fn orphans(&self, touched: Vec<(Arc<str>, Option<ServiceSpec>)>) -> Vec<Arc<Upstream>> {
        let mut orphans = Vec::new();
        for (name, old) in touched {
            let now: Vec<Generation> = self.specs.get(&name).map(generations).unwrap_or_default();
            let gone = old.iter().flat_map(generations).filter(|generation| !now.contains(generation));
            orphans.extend(
                gone.filter_map(|generation| self.upstreams.get(&generation))
                    .filter(|u| !u.is_retired())
                    .cloned(),
            );
        }
        orphans
    }
}

fn generations(spec: &ServiceSpec) -> Vec<Generation> {
    spec.pools.iter().flat_map(|pool| &pool.upstreams).map(|upstream| upstream.generation).collect()
}

fn canonical_routes(spec: &ServiceSpec) -> Result<Vec<(HostPattern, Arc<str>)>, TableError> {
    let canonical = |path: &Arc<str>| {
        canonical_prefix(path).map_err(|source| TableError::BadPath {
            service: Arc::clone(&spec.name),
            path: path.to_string(),
            source,
        })
    };
    spec.routes.iter().map(|route| Ok((route.host.clone(), canonical(&route.path_prefix)?))).collect()
}
