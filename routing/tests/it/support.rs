//! Short ways to say what a test is about.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use peregrine_routing::{
    Address, Balance, Change, Enter, Generation, HostPattern, NoUpstream, PoolSpec, RouteSpec, Service,
    ServicePolicy, ServiceSpec, TableReader, TableWriter, TrafficClass, Upstream, UpstreamProtocol,
    UpstreamSpec, table,
};

/// A time at which nothing has happened yet.
pub(crate) const NOW_MS: u64 = 1_000_000;

pub(crate) fn upstream(generation: u64) -> UpstreamSpec {
    UpstreamSpec {
        generation: Generation(generation),
        name: format!("copy-{generation}").into(),
        address: Address::Socket(SocketAddr::from((Ipv4Addr::LOCALHOST, 8_000))),
        protocol: UpstreamProtocol::Http1,
        weight: 1,
        ready_connections: 0,
    }
}

/// A pool with a weight and members of weight 1.
pub(crate) fn pool(name: &str, weight: u32, generations: &[u64]) -> PoolSpec {
    let upstreams = generations.iter().map(|generation| upstream(*generation)).collect();
    PoolSpec { name: name.into(), weight, standby: false, upstreams }
}

pub(crate) fn standby(name: &str, generations: &[u64]) -> PoolSpec {
    PoolSpec { standby: true, ..pool(name, 0, generations) }
}

pub(crate) fn route(text: &str) -> RouteSpec {
    let (host, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    RouteSpec {
        host: HostPattern::parse(host).expect("a host pattern"),
        path_prefix: if path.is_empty() { "/" } else { path }.into(),
    }
}

/// A service "web" on `web.test`.
pub(crate) fn service(pools: Vec<PoolSpec>) -> ServiceSpec {
    named("web", &["web.test"], pools)
}

pub(crate) fn named(name: &str, routes: &[&str], pools: Vec<PoolSpec>) -> ServiceSpec {
    ServiceSpec {
        name: name.into(),
        routes: routes.iter().map(|text| route(text)).collect(),
        pools,
        balance: Balance::default(),
        policy: ServicePolicy::default(),
    }
}

/// A table with one service.
pub(crate) struct World {
    pub(crate) writer: TableWriter,
    pub(crate) reader: TableReader,
    random: u64,
}

impl World {
    pub(crate) fn of(spec: ServiceSpec) -> Self {
        let (writer, reader) = table();
        let mut world = Self { writer, reader, random: 0 };
        world.put(spec);
        world
    }

    pub(crate) fn put(&mut self, spec: ServiceSpec) -> Vec<Arc<Upstream>> {
        self.writer.apply(&[Change::Put(spec)]).expect("is accepted").retired
    }

    pub(crate) fn web(&self) -> Arc<Service> {
        Arc::clone(self.reader.load().lookup("web.test", "/").expect("web is routed").service)
    }

    pub(crate) fn upstream(&self, generation: u64) -> &Arc<Upstream> {
        self.writer.upstream(Generation(generation)).expect("is known")
    }

    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        peregrine_routing::stable_hash(&self.random.to_le_bytes())
    }

    /// A question with nothing special about it.
    pub(crate) fn ask(&mut self) -> Enter<'static> {
        Enter {
            now_ms: NOW_MS,
            random: self.random(),
            hash: None,
            prefer: None,
            tried: &[],
            class: TrafficClass::Request,
        }
    }

    /// Enters and leaves again; the generation that was chosen.
    pub(crate) fn pick(&mut self) -> Result<u64, NoUpstream> {
        let ask = self.ask();
        self.pick_with(ask)
    }

    pub(crate) fn pick_with(&self, ask: Enter<'_>) -> Result<u64, NoUpstream> {
        self.web().enter(ask).map(|lease| lease.upstream().generation().0)
    }

    /// How often each of the generations `0..=up_to` is picked.
    pub(crate) fn picks(&mut self, times: usize, up_to: usize) -> Vec<usize> {
        let web = self.web();
        let mut counts = vec![0; up_to + 1];
        for _ in 0..times {
            let lease = web.enter(self.ask()).expect("an upstream");
            counts[lease.upstream().generation().0 as usize] += 1;
        }
        counts
    }
}
