//! The routing table: an immutable snapshot of all routes.

use std::sync::Arc;

use crate::domain::Domains;
use crate::host::{HostPattern, MAX_HOST_BYTES};
use crate::host_key::HostKey;
use crate::keyed::Keyed;
use crate::path::PathRoutes;
use crate::radix::Radix;
use crate::service::Service;

/// What a look-up found.
#[derive(Clone, Copy, Debug)]
pub struct Match<'a> {
    /// The service.
    pub service: &'a Arc<Service>,
    /// The path prefix that matched.
    pub path_prefix: &'a Arc<str>,
    /// Every path of this host leads to this service, so that what was found here may be remembered for
    /// the host as long as the table is the same.
    pub any_path: bool,
}

/// A snapshot of all routes. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct RoutingTable {
    pub(crate) version: u64,
    exact: Keyed<HostKey, PathRoutes>,
    wildcard: Wildcards,
    any: Arc<PathRoutes>,
    pub(crate) services: Radix<Arc<Service>, 4>,
    /// Services with upstreams that connections are to be opened to ahead: few, and only for a short time.
    pub(crate) ready: Vec<Arc<Service>>,
    /// Services that are held, or that requests wait for from a hold: few, and only for a short time.
    pub(crate) held: Vec<Arc<Service>>,
    pub(crate) domains: Domains,
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
        // Both hashes before the first bucket, see `Keyed::get_hashed`.
        let hash = self.exact.hash(host.as_bytes());
        let mut below = self.wildcard.suffixes_of(host);
        let nearest = below.next();
        let exact = self.exact.get_hashed(hash, host.as_bytes());
        let below = nearest.into_iter().chain(below);
        let below = below.filter_map(|(hash, suffix)| self.wildcard.suffixes.get_hashed(hash, suffix));
        let candidates = exact.into_iter().chain(below).chain([&*self.any]);
        let mut first = true;
        for routes in candidates {
            if let Some((path_prefix, slot)) = routes.longest(path) {
                let any_path = first && routes.is_root();
                return Some(Match { service: self.services.get(u64::from(slot))?, path_prefix, any_path });
            }
            first = false;
        }
        None
    }

    /// Calls `visit` with every service. Takes as long as there are services: not for the request path.
    pub fn for_each_service<'a>(&'a self, visit: impl FnMut(&'a Arc<Service>)) {
        self.services.for_each(visit);
    }

    /// Services that name upstreams which connections are to be opened to ahead of any request, see
    /// [`Service::ready_upstreams`].
    pub fn ready_services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.ready.iter()
    }

    /// Services whose requests have to ask a queue, see [`Service::hold`].
    pub fn held_services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.held.iter()
    }

    /// Whether a route of a service names exactly this canonical host: a pattern names nobody.
    #[must_use]
    pub fn names_host(&self, host: &str) -> bool {
        self.exact.get(host.as_bytes()).is_some()
    }

    /// What is served over TLS, and which validations are answered.
    #[must_use]
    pub const fn domains(&self) -> &Domains {
        &self.domains
    }

    /// Slot of the service that has exactly this pair.
    pub(crate) fn holder(&self, host: &HostPattern, prefix: &str) -> Option<u32> {
        let routes = match host {
            HostPattern::Exact(host) => self.exact.get(host.as_bytes()),
            HostPattern::Wildcard(suffix) => self.wildcard.suffixes.get(suffix.as_bytes()),
            HostPattern::Any => Some(&*self.any),
        };
        routes?.get(prefix)
    }

    /// Applies edits of one host, see [`PathRoutes::edit`].
    pub(crate) fn edit<'a>(
        &mut self,
        host: &HostPattern,
        edits: impl Iterator<Item = (&'a Arc<str>, Option<u32>)> + Clone,
    ) {
        let edited = |before: Option<PathRoutes>| {
            let mut routes = before.unwrap_or_default();
            routes.edit(edits);
            (!routes.is_empty()).then_some(routes)
        };
        match host {
            HostPattern::Exact(host) => self.exact.update(&host.into(), edited),
            HostPattern::Wildcard(suffix) => self.wildcard.update(suffix, edited),
            HostPattern::Any => self.any = Arc::new(edited(Some((*self.any).clone())).unwrap_or_default()),
        }
    }
}

/// More labels than a host of [`MAX_HOST_BYTES`] can have.
const MAX_LABELS: usize = MAX_HOST_BYTES / 2 + 2;

/// Wildcards by what follows their `*.`.
#[derive(Clone, Debug)]
struct Wildcards {
    suffixes: Keyed<HostKey, PathRoutes>,
    /// How many suffixes there are of so many labels. A host is looked up only at lengths that occur, so
    /// that a client who makes up a host of 127 labels does not buy 127 look-ups.
    by_labels: [u32; MAX_LABELS],
}

impl Default for Wildcards {
    fn default() -> Self {
        Self { suffixes: Keyed::default(), by_labels: [0; MAX_LABELS] }
    }
}

impl Wildcards {
    /// Every suffix of the host that a wildcard may have, the longest first, with its hash.
    fn suffixes_of<'h>(&self, host: &'h str) -> impl Iterator<Item = (u64, &'h [u8])> + use<'_, 'h> {
        let host = if self.suffixes.is_empty() || host.len() > MAX_HOST_BYTES { "" } else { host };
        // "a.b.c" has the suffixes "b.c" of two labels and "c" of one, the longest first.
        let dots = host.bytes().filter(|byte| *byte == b'.').count();
        let suffixes = host.match_indices('.').zip((1..=dots).rev());
        let known =
            suffixes.filter(|(_, labels)| self.by_labels.get(*labels).is_some_and(|count| *count > 0));
        known.map(|((at, _), _)| {
            let suffix = &host.as_bytes()[at + 1..];
            (self.suffixes.hash(suffix), suffix)
        })
    }

    fn update(&mut self, suffix: &Arc<str>, next: impl FnOnce(Option<PathRoutes>) -> Option<PathRoutes>) {
        // A suffix that is no canonical host may have more labels; no host that is looked up is below it.
        let labels = suffix.bytes().filter(|byte| *byte == b'.').count() + 1;
        let count = &mut self.by_labels[labels.min(MAX_LABELS - 1)];
        self.suffixes.update(&suffix.into(), |before| {
            let had = u32::from(before.is_some());
            let after = next(before);
            *count = *count + u32::from(after.is_some()) - had;
            after
        });
    }
}
