//! The routing table at full size: look-ups, changes, loading and memory.
//!
//! It measures `peregrine-routing` in this process, without sockets. Look-ups are in random order over the
//! whole table, so that caches are cold, and each waits for the one before, so that the processor cannot
//! hide one behind another. Memory is the growth of the resident set, so run one shape in one process.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_routing::{
    Address, Balance, Change, Generation, HostPattern, PoolSpec, RouteSpec, RoutingTable, ServicePolicy,
    ServiceSpec, TableError, TableReader, TableWriter, UpstreamProtocol, UpstreamSpec, table,
};
use serde::Serialize;

/// The allocator that an edge should use too: where the entries of a table come to lie decides half of the
/// time of a cold look-up. It serves the other subcommands as well.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Every so many-th host is a wildcard.
const WILDCARD_EVERY: usize = 10;
/// Look-ups of each kind.
const LOOKUPS: usize = 500_000;
/// Changes that are timed one by one.
const CHANGES: usize = 1_000;
/// Services put at once while loading.
const BATCH_SERVICES: usize = 100_000;
/// They are timed in so many rounds, of which the median counts.
const ROUNDS: usize = 20;

/// What is put into the table.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Shape {
    /// Host patterns, one in ten a wildcard.
    pub(crate) hosts: usize,
    /// How many of them share one service with one upstream.
    pub(crate) hosts_per_service: usize,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// What was in the table.
    pub(crate) shape: Shape,
    /// Services, each with one upstream.
    pub(crate) services: usize,
    /// Time to load everything in batches, in milliseconds.
    pub(crate) load_ms: f64,
    /// Growth of the resident set, in bytes for each host.
    pub(crate) memory_bytes_per_host: f64,
    /// Look-ups on the full table.
    pub(crate) lookup: Lookups,
    /// One change on the full table.
    pub(crate) change: Changes,
}

/// Times of one look-up in nanoseconds: the mean of the median round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Lookups {
    /// A host that is in the table as it is.
    pub(crate) exact_ns: f64,
    /// A host below a wildcard.
    pub(crate) wildcard_ns: f64,
    /// A host that is not in the table.
    pub(crate) miss_ns: f64,
}

/// Times of one applied and published change, in microseconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Changes {
    /// How many were timed: new services, removals and new upstreams, by turns.
    pub(crate) count: usize,
    /// Mean.
    pub(crate) mean_us: f64,
    /// 99 of 100 take at most this.
    pub(crate) p99_us: f64,
    /// The slowest.
    pub(crate) max_us: f64,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shape, services, load_ms, memory_bytes_per_host, lookup, change } = self;
        writeln!(f, "{} hosts in {services} services", shape.hosts)?;
        writeln!(f, "  load              {load_ms:>10.0} ms")?;
        writeln!(f, "  memory            {memory_bytes_per_host:>10.0} bytes per host")?;
        writeln!(f, "  look-up, exact    {:>10.0} ns", lookup.exact_ns)?;
        writeln!(f, "  look-up, wildcard {:>10.0} ns", lookup.wildcard_ns)?;
        writeln!(f, "  look-up, miss     {:>10.0} ns", lookup.miss_ns)?;
        writeln!(f, "  one change, mean  {:>10.1} µs of {}", change.mean_us, change.count)?;
        writeln!(f, "  one change, p99   {:>10.1} µs", change.p99_us)?;
        write!(f, "  one change, max   {:>10.1} µs", change.max_us)
    }
}

/// What kept the measurement from being one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The resident set could not be read.
    #[error("cannot read /proc/self/status: {0}")]
    Memory(#[source] std::io::Error),
    /// The table refused what it was given.
    #[error("the table refused a change")]
    Table(#[from] TableError),
    /// A look-up gave a wrong answer, which makes its time worthless.
    #[error("{found} of {expected} look-ups found a service, {kind}")]
    Wrong {
        /// Kind of the look-up.
        kind: &'static str,
        /// Answers.
        found: usize,
        /// What they should be.
        expected: usize,
    },
    /// The shape makes no table.
    #[error("at least {WILDCARD_EVERY} hosts and one host per service are needed")]
    TooSmall,
}

/// Fills a table of this shape and measures it. Takes a few seconds for a million hosts.
///
/// # Errors
/// [`Error`] when something kept the figures from meaning anything.
pub(crate) fn run(shape: Shape) -> Result<Report, Error> {
    if shape.hosts < WILDCARD_EVERY || shape.hosts_per_service == 0 {
        return Err(Error::TooSmall);
    }
    let services = shape.hosts.div_ceil(shape.hosts_per_service);
    let before_bytes = resident_bytes()?;
    let begun = Instant::now();
    let (mut writer, reader) = table();
    load(&mut writer, shape, services)?;
    let load_ms = begun.elapsed().as_secs_f64() * 1e3;
    let memory_bytes = resident_bytes()?.saturating_sub(before_bytes);
    Ok(Report {
        shape,
        services,
        load_ms,
        memory_bytes_per_host: memory_bytes as f64 / shape.hosts as f64,
        lookup: time_lookups(&reader.load(), shape.hosts)?,
        change: time_changes(&mut writer, &reader, shape, services)?,
    })
}

fn load(writer: &mut TableWriter, shape: Shape, services: usize) -> Result<(), Error> {
    let mut next = 0;
    while next < services {
        let batch = next..services.min(next + BATCH_SERVICES);
        next = batch.end;
        let changes: Vec<Change> = batch.map(|i| Change::Put(service(i, i as u64, shape))).collect();
        writer.apply(&changes)?;
    }
    Ok(())
}

fn service(index: usize, generation: u64, shape: Shape) -> ServiceSpec {
    let first = index * shape.hosts_per_service;
    let hosts = first..shape.hosts.min(first + shape.hosts_per_service);
    spec(format!("service-{index}"), generation, hosts.map(pattern).collect())
}

fn spec(name: String, generation: u64, hosts: Vec<HostPattern>) -> ServiceSpec {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
    let upstream = UpstreamSpec {
        generation: Generation(generation),
        name: format!("{name}-{generation}").into(),
        address: Address::Socket(address),
        protocol: UpstreamProtocol::Http1,
        weight: 1,
        ready_connections: 0,
    };
    ServiceSpec {
        name: name.into(),
        routes: hosts.into_iter().map(|host| RouteSpec { host, path_prefix: "/".into() }).collect(),
        pools: vec![PoolSpec { name: "main".into(), weight: 1, standby: false, upstreams: vec![upstream] }],
        balance: Balance::LeastInFlight,
        policy: ServicePolicy::default(),
    }
}

/// Names that share no prefix and have about the length of customers' domains.
fn name(index: usize) -> String {
    format!("{:016x}.example", mix(index as u64))
}

fn pattern(index: usize) -> HostPattern {
    let name = name(index).into();
    if is_wildcard(index) { HostPattern::Wildcard(name) } else { HostPattern::Exact(name) }
}

const fn is_wildcard(index: usize) -> bool {
    index.is_multiple_of(WILDCARD_EVERY)
}

fn time_lookups(table: &RoutingTable, hosts: usize) -> Result<Lookups, Error> {
    let mut random = 1_u64;
    let mut any = move || {
        random = mix(random.wrapping_add(0x9e37_79b9_7f4a_7c15));
        (random % hosts as u64) as usize
    };
    let mut exact = || Some(any()).filter(|index| !is_wildcard(*index)).map(name);
    let exact: Vec<String> = std::iter::repeat_with(&mut exact).flatten().take(LOOKUPS).collect();
    let wildcard: Vec<String> = std::iter::repeat_with(&mut any)
        .map(|index| format!("www.{}", name(index / WILDCARD_EVERY * WILDCARD_EVERY)))
        .take(LOOKUPS)
        .collect();
    let miss: Vec<String> = (0..LOOKUPS).map(|i| name(hosts + i)).collect();
    Ok(Lookups {
        exact_ns: time_each(table, &exact, "exact", true)?,
        wildcard_ns: time_each(table, &wildcard, "wildcard", true)?,
        miss_ns: time_each(table, &miss, "miss", false)?,
    })
}

fn time_each(table: &RoutingTable, hosts: &[String], kind: &'static str, hit: bool) -> Result<f64, Error> {
    let mut times = Vec::with_capacity(ROUNDS);
    for round in hosts.chunks_exact(LOOKUPS / ROUNDS) {
        let begun = Instant::now();
        let found = lookup_all(table, round);
        times.push(begun.elapsed());
        let expected = if hit { round.len() } else { 0 };
        if found != expected {
            return Err(Error::Wrong { kind, found, expected });
        }
    }
    times.sort_unstable();
    Ok(times[ROUNDS / 2].as_secs_f64() * 1e9 / (LOOKUPS / ROUNDS) as f64)
}

/// What was found decides the path of the next look-up, so that it cannot begin before.
fn lookup_all(table: &RoutingTable, hosts: &[String]) -> usize {
    let paths = ["/", "/basket"];
    let (mut found, mut path) = (0, 0);
    for host in hosts {
        let service = table.lookup(host, paths[path]).map(|found| found.service);
        found += usize::from(service.is_some());
        path = service.map_or(0, |service| (Arc::as_ptr(service).addr() >> 6) & 1);
    }
    black_box(found)
}

fn time_changes(
    writer: &mut TableWriter,
    reader: &TableReader,
    shape: Shape,
    services: usize,
) -> Result<Changes, Error> {
    let mut times = Vec::with_capacity(CHANGES);
    let mut generation = services as u64;
    for turn in 0..CHANGES {
        generation += 1;
        let host = format!("new-{turn}.shop.example");
        let exact = |host: &str| vec![HostPattern::Exact(host.into())];
        let change = match turn % 4 {
            0 | 1 => Change::Put(spec(format!("new-{turn}"), generation, exact(&host))),
            2 => Change::Remove(Arc::from(format!("new-{}", turn - 1))),
            // The switch of a move: another copy for one of the services that were loaded.
            _ => Change::Put(service(mix(turn as u64) as usize % services, generation, shape)),
        };
        let begun = Instant::now();
        writer.apply(&[change])?;
        times.push(begun.elapsed());
        let is_visible = reader.load().lookup(&host, "/").is_some();
        if is_visible != (turn % 4 < 2) {
            let found = usize::from(is_visible);
            return Err(Error::Wrong { kind: "after a change", found, expected: 1 - found });
        }
    }
    times.sort_unstable();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    Ok(Changes {
        count: times.len(),
        mean_us: us(times.iter().sum()) / times.len() as f64,
        p99_us: us(times[times.len() * 99 / 100]),
        max_us: us(times[times.len() - 1]),
    })
}

fn resident_bytes() -> Result<usize, Error> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(Error::Memory)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<usize>().ok());
    let missing = || Error::Memory(std::io::Error::other("it has no VmRSS in kB"));
    Ok(kib.ok_or_else(missing)? * 1024)
}

/// SplitMix64's finalizer: a bijection, so that no two hosts are the same.
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_table_is_measured_and_every_look_up_is_right() {
        for hosts_per_service in [1, 7] {
            let report = run(Shape { hosts: 1_000, hosts_per_service }).expect("a report");
            assert_eq!(report.services, 1_000_usize.div_ceil(hosts_per_service));
            assert!(report.lookup.exact_ns > 0.0 && report.change.max_us >= report.change.mean_us);
        }
        assert!(matches!(run(Shape { hosts: 3, hosts_per_service: 1 }), Err(Error::TooSmall)));
    }
}
