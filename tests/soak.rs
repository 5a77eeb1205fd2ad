//! Random moves, kills and faults for a while: what should end ends, and nothing grows that should not. Once with everything
//! in one process, and once with an engine and two edges apart, of which all but one edge are killed, too.
//!
//! `make soak` runs both for half an hour each; among the other tests they are short. The seed is printed and can be given.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::support::apart::{Apart, Edge, answers, wait_for_state};
use crate::support::server::{free_address, http_get, signal};
use crate::support::shop::Shop;
use crate::support::traffic::Traffic;
use crate::support::wait_for;

const DEFAULT_SECONDS: u64 = 25;
/// Requests that may fail when a copy that has traffic is killed.
const CUT_BY_A_KILL: u64 = 40;
/// Descriptors that come and go: pooled connections, files that are being written.
const LOOSE_DESCRIPTORS: u64 = 64;
/// Threads of tokio's blocking pool come and go.
const LOOSE_THREADS: u64 = 16;
/// Tasks come and go with connections: those of clients, of which there are some twenty, and those to upstreams.
const LOOSE_TASKS: u64 = 64;
/// The allocator gives back late.
const LOOSE_MEMORY_KIB: u64 = 24 * 1024;
/// What an act leaves in the store: its rollout, journal, receipt and events are history that is kept.
const STORE_BYTES_PER_ACT: u64 = 128 * 1024;
/// SQLite's log is as long as it was once.
const LOOSE_STORE_BYTES: u64 = 8 * 1024 * 1024;

/// A long run tells how it stands.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// Every move is to succeed, also beside a build that keeps a fresh process from the processor for a moment; that the guard on p95
/// stops what is slow is for other tests to show.
const QUICK: &str = r#"
[service.shop.move]
steps = [10, 50, 100]
step_hold = "100ms"
step_max = "400ms"
warm = { probes = 2, interval = "20ms" }
abort_on = { p95_increase = false }
"#;

/// Enough for a test: Marsaglia's xorshift.
struct Random(u64);

impl Random {
    const fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What may grow: the store, and the process that lives from the beginning to the end. That is the server, or an edge.
#[derive(Clone, Copy, Debug)]
struct Size {
    memory_kib: u64,
    descriptors: u64,
    threads: u64,
    tasks: u64,
    store_bytes: u64,
}

impl Size {
    fn of(soak: &Soak) -> Self {
        let pid = soak.edges.as_ref().map_or_else(|| soak.shop.server.pid(), |edges| edges.kept.pid());
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of it");
            value.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number")
        };
        let data = std::fs::read_dir(soak.shop.server.data()).expect("the data folder").flatten();
        let files = data.filter_map(|entry| entry.metadata().ok()).filter(std::fs::Metadata::is_file);
        let metrics = match &soak.edges {
            Some(edges) => http_get(edges.kept_admin, "/metrics").expect("it lives"),
            None => soak.shop.server.metrics(),
        };
        let tasks = |name: &str| {
            let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse::<u64>().expect("a number")
        };
        Self {
            memory_kib: line("VmRSS:"),
            threads: line("Threads:"),
            tasks: tasks("peregrine_tasks") + tasks("peregrine_edge_tasks"),
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count() as u64,
            store_bytes: files.map(|file| file.len()).sum(),
        }
    }

    /// Whether what has come of `before` after so many acts is no growth.
    fn assert_no_growth_since(self, before: Self, acts: u64) {
        let allowed = Self {
            memory_kib: before.memory_kib + LOOSE_MEMORY_KIB,
            descriptors: before.descriptors + LOOSE_DESCRIPTORS,
            threads: before.threads + LOOSE_THREADS,
            tasks: before.tasks + LOOSE_TASKS,
            store_bytes: before.store_bytes + LOOSE_STORE_BYTES + acts * STORE_BYTES_PER_ACT,
        };
        let is_within = self.memory_kib <= allowed.memory_kib
            && self.descriptors <= allowed.descriptors
            && self.threads <= allowed.threads
            && self.tasks <= allowed.tasks
            && self.store_bytes <= allowed.store_bytes;
        assert!(is_within, "{before:?}\n{self:?} after {acts} acts; allowed are {allowed:?}");
    }
}

#[test]
fn random_moves_kills_and_faults_all_end_and_nothing_grows() {
    run(Shop::open(QUICK), None);
}

#[test]
fn random_moves_kills_and_faults_with_edges_apart_all_end_and_nothing_grows() {
    let Apart { shop, edge: mut kept, link } = Apart::open(QUICK);
    let kept_admin = free_address();
    assert_eq!(kept.stop(), Some(0));
    kept.start_with_admin(kept_admin);
    wait_for_state(&shop.server, &kept.name, "connected");
    let killed = Edge::join(&shop.server, link, "edge-2");
    run(shop, Some(Edges { kept, kept_admin, killed }));
}

fn run(shop: Shop, edges: Option<Edges>) {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
    };
    let seconds = number("PEREGRINE_SOAK_SECONDS", DEFAULT_SECONDS);
    let seed = number("PEREGRINE_SOAK_SEED", u64::from(std::process::id()) + 1);
    println!("soak of {seconds} s, seed {seed} (PEREGRINE_SOAK_SECONDS, PEREGRINE_SOAK_SEED)");
    let at = edges.as_ref().map_or_else(|| shop.server.edge(), |edges| edges.kept.http());
    wait_for("the shop", || answers(at).then_some(()));
    let traffic = Traffic::start(at, 300);
    let mut soak = Soak { shop, edges, traffic: &traffic, random: Random(seed), acts: BTreeMap::new() };
    let begun = Instant::now();
    let (warm_up, end) = (Duration::from_secs(seconds / 3), Duration::from_secs(seconds));
    soak.act_until(begun, warm_up);
    let (before, acts_before) = (Size::of(&soak), soak.count());
    soak.act_until(begun, end);
    let (after, acts) = (Size::of(&soak), soak.count() - acts_before);
    soak.print();
    let Soak { shop, edges, .. } = soak;
    let sent: u64 = traffic.stop().iter().map(|summary| summary.sent).sum();
    println!("{sent} requests");
    println!("{before:?}\n{after:?} after {acts} more acts");
    after.assert_no_growth_since(before, acts);
    let processes = shop.server.pids_of("").len();
    assert_eq!(processes, 1, "one copy is left, and no process that nobody knows");
    drop(edges);
}

/// Edges of an engine.
struct Edges {
    /// The one that has the traffic, and lives from the beginning to the end.
    kept: Edge,
    kept_admin: SocketAddr,
    killed: Edge,
}

struct Soak<'a> {
    shop: Shop,
    edges: Option<Edges>,
    traffic: &'a Traffic,
    random: Random,
    acts: BTreeMap<&'static str, Tried>,
}

/// What came of one kind of act. One that does not end well ends the test.
#[derive(Clone, Copy, Debug, Default)]
struct Tried {
    times: u64,
    failed_requests: u64,
}

impl Soak<'_> {
    fn count(&self) -> u64 {
        self.acts.values().map(|tried| tried.times).sum()
    }

    fn act_until(&mut self, begun: Instant, end: Duration) {
        let mut told = Instant::now();
        while begun.elapsed() < end {
            self.act();
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                println!("{} s: {:?} after {} acts", begun.elapsed().as_secs(), Size::of(self), self.count());
            }
        }
    }

    /// The table of docs/reliability.md.
    fn print(&self) {
        println!("| act | tried | ended well | requests lost with a copy |\n|---|---:|---:|---:|");
        for (name, Tried { times, failed_requests }) in &self.acts {
            println!("| {name} | {times} | {times} | {failed_requests} |");
        }
    }

    fn act(&mut self) {
        let failed_before = self.traffic.failed();
        let kinds = if self.edges.is_some() { 11 } else { 7 };
        let (name, may_fail) = match self.random.below(kinds) {
            0 | 1 => self.a_move(),
            2 => self.an_abort(),
            3 => self.a_kill("to"),
            4 => self.a_kill("from"),
            5 => self.a_deploy(),
            6 => self.rubbish(),
            7 => self.a_kill_of_the_engine(),
            8 => self.a_stop_of_the_engine(),
            9 => self.a_kill_of_an_edge(),
            _ => self.an_upgrade_of_an_edge(),
        };
        wait_for("one copy", || (self.shop.places().len() == 1).then_some(()));
        // Traffic flows, whatever was done.
        let answered = self.traffic.answered();
        wait_for("answers", || (self.traffic.answered() > answered + 20).then_some(()));
        let failed = self.traffic.failed() - failed_before;
        assert!(failed <= may_fail, "{name}: {failed} requests failed");
        let tried = self.acts.entry(name).or_default();
        tried.times += 1;
        tried.failed_requests += failed;
    }

    fn other_host(&self) -> &'static str {
        if self.shop.places() == ["host-a"] { "host-b" } else { "host-a" }
    }

    fn a_move(&self) -> (&'static str, u64) {
        let ended = self.shop.move_to(self.other_host());
        assert_eq!(ended["move"]["state"], "succeeded", "{ended:#}");
        ("moves", 0)
    }

    /// A move that is under way for a random time.
    fn begun(&mut self) -> String {
        let id = self.shop.begin_move(self.other_host());
        let moment = Duration::from_millis(self.random.below(1_200));
        let begun = Instant::now();
        // The moment is what is random here.
        while begun.elapsed() < moment {
            std::thread::park_timeout(moment - begun.elapsed().min(moment));
        }
        id
    }

    fn an_abort(&mut self) -> (&'static str, u64) {
        let id = self.begun();
        // It may be over already, which is said and is no harm.
        drop(self.shop.server.run(&["moves", "abort", &id]));
        let state = self.shop.ended(&id)["state"].clone();
        assert!(["aborted", "succeeded", "rolled_back"].iter().any(|end| state == *end), "{state}");
        ("aborts", 0)
    }

    fn a_kill(&mut self, side: &str) -> (&'static str, u64) {
        let id = self.begun();
        let instance = self.shop.the_move(&id)[side][0]["instance"].as_str().map(str::to_owned);
        for pid in instance.map(|instance| self.shop.server.pids_of(&instance)).unwrap_or_default() {
            signal(pid, "KILL");
        }
        let ended = self.shop.ended(&id);
        let state = ended["state"].as_str().unwrap_or_default();
        assert!(["succeeded", "rolled_back", "failed"].contains(&state), "{ended:#}");
        // Where the killed copy was the only one, nobody is there to answer until it is started again. A new copy
        // that dies before the old one has left is hardly missed.
        match side {
            "to" if state != "succeeded" => ("kills of the new copy", CUT_BY_A_KILL),
            "to" => ("kills of the new copy", u64::MAX),
            _ => ("kills of the old copy", u64::MAX),
        }
    }

    fn a_deploy(&mut self) -> (&'static str, u64) {
        let number = self.random.below(1_000_000).to_string();
        let place = self.shop.places().first().cloned().expect("a place");
        let manifest = self.shop.manifest(&[("SOAK", &number)], QUICK);
        self.shop.server.ok(&["deploy", "-f", &manifest, "--machine", &place]);
        ("deploys", 0)
    }

    fn rubbish(&mut self) -> (&'static str, u64) {
        for _ in 0..20 {
            let mut bytes = vec![0; 1 + usize::try_from(self.random.below(3_000)).expect("small")];
            bytes.iter_mut().for_each(|byte| *byte = u8::try_from(self.random.below(256)).expect("a byte"));
            let mut client = std::net::TcpStream::connect(self.edge()).expect("connects");
            // The edge may close in the middle of it.
            drop(client.write_all(&bytes));
        }
        ("rubbish", 0)
    }

    // --- what is there only with edges apart ---

    /// Where clients are.
    fn edge(&self) -> SocketAddr {
        self.edges.as_ref().map_or_else(|| self.shop.server.edge(), |edges| edges.kept.http())
    }

    fn edges(&mut self) -> &mut Edges {
        self.edges.as_mut().expect("edges apart")
    }

    /// What was begun before a fault comes to a good end after it.
    fn assert_well_ended(&self, id: &str) {
        let ended = self.shop.ended(id);
        let state = ended["state"].as_str().unwrap_or_default();
        assert!(["succeeded", "rolled_back"].contains(&state), "{ended:#}");
    }

    fn a_kill_of_the_engine(&mut self) -> (&'static str, u64) {
        let id = self.begun();
        self.shop.server.kill();
        self.shop.server.start_again();
        self.assert_well_ended(&id);
        ("kills of the engine", 0)
    }

    /// For longer than a step takes, and shorter than a lease.
    fn a_stop_of_the_engine(&mut self) -> (&'static str, u64) {
        let id = self.begun();
        let pid = self.shop.server.pid();
        signal(pid, "STOP");
        let answered = self.traffic.answered();
        wait_for("traffic without an engine", || (self.traffic.answered() > answered + 200).then_some(()));
        signal(pid, "CONT");
        self.assert_well_ended(&id);
        ("stops of the engine", 0)
    }

    fn a_kill_of_an_edge(&mut self) -> (&'static str, u64) {
        let id = self.begun();
        let edges = self.edges();
        edges.killed.kill();
        edges.killed.start();
        // Its lease may have to end first, or it is back and acknowledges.
        self.assert_well_ended(&id);
        self.the_other_edge_serves();
        ("kills of an edge without clients", 0)
    }

    fn an_upgrade_of_an_edge(&mut self) -> (&'static str, u64) {
        let id = self.begun();
        let edges = self.edges();
        let before = edges.killed.upgrade();
        edges.killed.wait_gone(before);
        self.assert_well_ended(&id);
        self.the_other_edge_serves();
        ("upgrades of an edge", 0)
    }

    fn the_other_edge_serves(&mut self) {
        let at = self.edges().killed.http();
        wait_for("the other edge to serve", || answers(at).then_some(()));
    }
}
