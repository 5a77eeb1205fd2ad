//! Edge and hosts in network namespaces of their own; each way between them and the engine is cut in each phase of a move.

use std::time::{Duration, Instant};

use peregrine_bench::oracle::check_exactly_once;

use crate::apart::in_phase;
use crate::support::apart::{Edge, LEASE_MS, answers, wait_for_state};
use crate::support::docker::{self, Engines};
use crate::support::server::{Peregrine, free_address};
use crate::support::shop::Shop;
use crate::support::traffic::Traffic;
use crate::support::wait_for;
use crate::support::wires::{Cut, Wires};

/// Every phase is met, and none waits for long.
const SETTINGS: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "200ms"
step_max = "400ms"
soak = "200ms"
stop_grace = "1s"
warm = { probes = 3, interval = "50ms" }
abort_on = { p95_increase = false }
"#;

const HOSTS: [&str; 2] = ["host-a", "host-b"];
const REQUESTS_PER_SECOND: u32 = 200;
/// A cut within the lease: packets are lost for so long, then they pass again. `PEREGRINE_CUT_MS` gives another time.
const CUT_FOR_MS: u64 = 800;

/// A line of the table.
struct Outcome {
    phase: &'static str,
    cut: Cut,
    state: String,
    took: Duration,
    dropped: u64,
    failed: u64,
}

/// In the order in which it is taken away.
struct Installation {
    edge: Edge,
    shop: Shop,
    wires: Wires,
    engines: Engines,
    cut_for: Duration,
}

#[test]
fn a_cut_of_any_way_in_any_phase_of_a_move_heals_the_move_ends_well_and_only_what_was_cut_off_is_lost() {
    if !docker::is_there() {
        return;
    }
    let here = Installation::open();
    let traffic = Traffic::start(here.edge.http(), REQUESTS_PER_SECOND);
    let mut outcomes = Vec::new();
    for phase in ["start", "warm", "shift", "drain", "soak", "release"] {
        // Before the new copy is there, the edge has nothing to ask its host.
        let ways = if phase == "start" { 2 } else { 3 };
        for way in 0..ways {
            outcomes.push(here.cut_in(phase, way, &traffic));
        }
    }
    print(&outcomes, here.cut_for);
    let summaries = traffic.stop();
    let records = here.shop.records();
    for summary in &summaries {
        let verdict = check_exactly_once(&summary.acknowledged, &records);
        assert!(verdict.is_exactly_once(), "{verdict:#?}");
        assert_eq!(summary.connections_closed_by_peer, 0, "no client connection may be closed");
    }
    for outcome in &outcomes {
        let Outcome { phase, cut, state, dropped, failed, .. } = outcome;
        assert!(*dropped > 0, "{cut:?} in {phase} has cut nothing off");
        assert!(
            matches!(state.as_str(), "succeeded" | "rolled_back" | "failed"),
            "{cut:?} in {phase}: {state}"
        );
        // Beyond the lease a move goes on without the edge, which then has copies in its table that are not there any more.
        let within = match cut {
            Cut::EngineEdge => here.cut_for < Duration::from_millis(LEASE_MS),
            Cut::EngineHost(_) => true,
            Cut::EdgeHost(_) => false,
        };
        if within {
            assert_eq!(*failed, 0, "{cut:?} in {phase}: clients reach the edge, and the edge every copy");
        }
    }
}

impl Installation {
    fn open() -> Self {
        let engines = Engines::start_on_the_network();
        let mut wires = Wires::between(&engines, free_address().port());
        let configuration = format!(
            "{}\n[link]\nlisten = \"{}\"\nlease = \"{LEASE_MS}ms\"\n",
            engines.configuration_on_the_network(),
            wires.engine()
        );
        let server = Peregrine::start_engine(&configuration);
        let edge = Edge::join_within(&server, "edge-1", &wires);
        let shop = Shop::closed(server);
        wires.keep_open(shop.collector_port());
        shop.deploy_image(&engines, "", &[], SETTINGS);
        wait_for("the edge to serve", || answers(edge.http()).then_some(()));
        let cut_for_ms = std::env::var("PEREGRINE_CUT_MS").ok();
        let cut_for_ms = cut_for_ms.map_or(CUT_FOR_MS, |text| text.parse().expect("milliseconds"));
        Self { edge, shop, wires, engines, cut_for: Duration::from_millis(cut_for_ms) }
    }

    /// Cuts one way as soon as a move is in that phase, heals it, and sees the move to its end.
    fn cut_in(&self, phase: &'static str, way: usize, traffic: &Traffic) -> Outcome {
        let from = HOSTS.iter().position(|host| self.shop.places() == [*host]).expect("one place");
        let to = 1 - from;
        // The engine loses the host that the phase is about: the new copy's until it has the traffic, then the old one's.
        // The edge loses the new copy's, which gets more and more of the traffic and at last all.
        let host = if matches!(phase, "start" | "warm" | "shift") { to } else { from };
        let cut = [Cut::EngineEdge, Cut::EngineHost(host), Cut::EdgeHost(to)][way];
        let failed = traffic.failed();
        let id = in_phase(&self.shop, HOSTS[to], phase);
        let begun = Instant::now();
        self.wires.cut(cut);
        std::thread::park_timeout(self.cut_for);
        let dropped = self.wires.heal(cut);
        let state = self.shop.ended(&id)["state"].as_str().expect("state").to_owned();
        let took = begun.elapsed();
        self.wait_for_rest(traffic, phase, cut);
        Outcome { phase, cut, state, took, dropped, failed: traffic.failed() - failed }
    }

    /// One copy in one place, nothing else on any host, the edge connected, and traffic flows.
    fn wait_for_rest(&self, traffic: &Traffic, phase: &str, cut: Cut) {
        let what = |what: &str| format!("{what} after {cut:?} in {phase}");
        wait_for(&what("one copy"), || (self.shop.places().len() == 1).then_some(()));
        wait_for(&what("one container"), || (self.engines.containers() == 1).then_some(()));
        wait_for_state(&self.shop.server, "edge-1", "connected");
        let answered = traffic.answered();
        wait_for(&what("answers"), || (traffic.answered() > answered + 20).then_some(()));
    }
}

/// The table of docs/reliability.md.
fn print(outcomes: &[Outcome], cut_for: Duration) {
    let cut_for_ms = cut_for.as_millis();
    println!(
        "| phase | cut for {cut_for_ms} ms | end | ms to the end | packets dropped | requests that failed |"
    );
    println!("|---|---|---|---:|---:|---:|");
    for Outcome { phase, cut, state, took, dropped, failed } in outcomes {
        let cut = match cut {
            Cut::EngineEdge => "engine–edge",
            Cut::EngineHost(_) => "engine–host",
            Cut::EdgeHost(_) => "edge–host",
        };
        println!("| {phase} | {cut} | {state} | {} | {dropped} | {failed} |", took.as_millis());
    }
}
