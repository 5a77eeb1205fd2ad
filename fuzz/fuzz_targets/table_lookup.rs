//! A script of changes and look-ups, by a table and by a model that searches a list from end to end.
//!
//! One word each, a line each: `put NAME PATTERN…`, `remove NAME`, `commit` (what was put and removed
//! since becomes one change), `look HOST PATH`. Everything else is passed over.

#![no_main]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use peregrine_routing::{
    Address, Balance, CanonicalPath, Change, Generation, HostPattern, PoolSpec, RouteSpec, ServicePolicy,
    ServiceSpec, TableReader, TableWriter, UpstreamProtocol, UpstreamSpec, canonical_host, canonical_path,
    table,
};

/// Longer scripts only take longer.
const MAX_LINES: usize = 200;

fuzz_target!(|data: &[u8]| {
    let script = String::from_utf8_lossy(data);
    let (writer, reader) = table();
    let mut run = Run { writer, reader, model: Model::default(), batch: Vec::new(), next_generation: 0 };
    for line in script.lines().take(MAX_LINES) {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        match (words.next(), words.next()) {
            (Some("put"), Some(name)) => run.put(name, words),
            (Some("remove"), Some(name)) => run.batch.push(Change::Remove(name.into())),
            (Some("commit"), None) => run.commit(),
            (Some("look"), Some(host)) => run.look(host, words.next().unwrap_or("/")),
            _ => {}
        }
    }
});

struct Run {
    writer: TableWriter,
    reader: TableReader,
    model: Model,
    batch: Vec<Change>,
    next_generation: u64,
}

impl Run {
    fn put<'a>(&mut self, name: &str, routes: impl Iterator<Item = &'a str>) {
        let routes = routes.filter_map(|text| {
            let (host, path) = text.split_at(text.find('/').unwrap_or(text.len()));
            let host = HostPattern::parse(host).ok()?;
            assert_eq!(
                HostPattern::parse(&host.to_string()).as_ref(),
                Ok(&host),
                "patterns are shown as they are read"
            );
            Some(RouteSpec { host, path_prefix: path.into() })
        });
        let upstream = UpstreamSpec {
            generation: Generation(self.next_generation),
            name: name.into(),
            address: Address::Socket(SocketAddr::from((Ipv4Addr::LOCALHOST, 1))),
            protocol: UpstreamProtocol::Http1,
            weight: 1,
            ready_connections: 0,
        };
        self.next_generation += 1;
        let pool = PoolSpec { name: "main".into(), weight: 1, standby: false, upstreams: vec![upstream] };
        self.batch.push(Change::Put(ServiceSpec {
            name: name.into(),
            routes: routes.collect(),
            pools: vec![pool],
            balance: Balance::default(),
            policy: ServicePolicy::default(),
        }));
    }

    fn commit(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        let version = self.writer.version();
        let (applied, expected) = (self.writer.apply(&batch), self.model.after(&batch));
        match expected {
            Some(after) => {
                let applied = applied.expect("the model accepts it");
                assert_eq!(applied.version, version + 1);
                let mut retired: Vec<u64> = applied.retired.iter().map(|u| u.generation().0).collect();
                retired.sort_unstable();
                assert_eq!(retired, self.model.gone(&after));
                assert!(applied.retired.iter().all(|upstream| upstream.is_empty()));
                self.model = after;
            }
            None => {
                applied.expect_err("the model refuses it");
                assert_eq!(self.writer.version(), version);
            }
        }
    }

    fn look(&self, host: &str, path: &str) {
        let Ok(host) = canonical_host(host) else { return };
        assert_eq!(canonical_host(&host).as_deref(), Ok(&*host), "the canonical form is its own");
        let table = self.reader.load();
        let found = table.lookup(&host, path).map(|found| (&**found.service.name(), &**found.path_prefix));
        assert_eq!(found, self.model.lookup(&host, path), "{host} {path}");
    }
}

#[derive(Clone, Default)]
struct Model {
    /// By name: generation, and pairs of pattern and prefix without a trailing slash.
    services: BTreeMap<String, (u64, Vec<(String, String)>)>,
}

impl Model {
    /// The model after a batch, or `None` if it has to be refused.
    fn after(&self, batch: &[Change]) -> Option<Self> {
        let mut after = self.clone();
        let mut last: BTreeMap<&str, Option<&ServiceSpec>> = BTreeMap::new();
        for change in batch {
            match change {
                Change::Put(spec) => last.insert(&spec.name, Some(spec)),
                Change::Remove(name) => last.insert(name, None),
                _ => None,
            };
        }
        for (name, spec) in last {
            after.services.remove(name);
            if let Some(spec) = spec {
                let prefixes = spec.routes.iter().map(|route| prefix(&route.path_prefix));
                let hosts = spec.routes.iter().map(|route| route.host.to_string());
                let routes = hosts.zip(prefixes).map(|(host, prefix)| Some((host, prefix?)));
                let generation = spec.pools[0].upstreams[0].generation.0;
                after.services.insert(name.to_owned(), (generation, routes.collect::<Option<_>>()?));
            }
        }
        after.has_no_conflict().then_some(after)
    }

    fn has_no_conflict(&self) -> bool {
        let all = self.all();
        let clash = |(name, route): &(&str, &(String, String))| {
            all.iter().any(|(other, theirs)| other != name && theirs == route)
        };
        !all.iter().any(clash)
    }

    fn all(&self) -> Vec<(&str, &(String, String))> {
        self.services
            .iter()
            .flat_map(|(name, (_, routes))| routes.iter().map(move |route| (name.as_str(), route)))
            .collect()
    }

    /// Generations that serve here and not in `after`, in order.
    fn gone(&self, after: &Self) -> Vec<u64> {
        let kept = |generation: &u64| after.services.values().any(|(theirs, _)| theirs == generation);
        let mut gone: Vec<u64> = self.services.values().map(|(mine, _)| *mine).filter(|g| !kept(g)).collect();
        gone.sort_unstable();
        gone
    }

    fn lookup(&self, host: &str, path: &str) -> Option<(&str, &str)> {
        let fitting = self.all().into_iter().filter(|(_, (pattern, prefix))| {
            fits_host(pattern, host)
                && (prefix.is_empty() || path == prefix || path.starts_with(&format!("{prefix}/")))
        });
        let rank = |pattern: &str| if pattern == host { usize::MAX } else { pattern.len() };
        let best = fitting.max_by_key(|(_, (pattern, prefix))| (rank(pattern), prefix.len()));
        best.map(|(name, (_, prefix))| (name, if prefix.is_empty() { "/" } else { prefix.as_str() }))
    }
}

fn fits_host(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => host == pattern,
    }
}

/// A prefix in the form that it is matched in, without a slash at its end.
fn prefix(path: &str) -> Option<String> {
    let CanonicalPath { path, other_reading } = canonical_path(path).ok()?;
    let segments =
        |path: &str| path.split('/').filter(|s| !s.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let parts = segments(&path);
    (other_reading.is_none_or(|other| segments(&other) == parts))
        .then(|| parts.iter().map(|s| format!("/{s}")).collect())
}
