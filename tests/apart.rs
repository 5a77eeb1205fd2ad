//! Edge and engine in processes of their own: what the one does while the other is busy, away, dead or cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::Command;

use serde_json::Value;

use crate::support::apart::{
    Apart, Edge, LEASE_MS, Standby, Way, answers, engine_configuration, files_below, invite, open_files,
    seen, wait_for_state,
};
use crate::support::server::{Peregrine, free_address, http, http_get, said, signal};
use crate::support::shop::{Shop, id_of};
use crate::support::traffic::{Traffic, assert_nothing_lost};
use crate::support::wait_for;

/// A move is all machinery and hardly any waiting.
const QUICK: &str = r#"
[service.shop.move]
steps = [10, 50, 100]
step_hold = "30ms"
step_max = "120ms"
warm = { probes = 2, interval = "20ms" }
abort_on = { p95_increase = false }
"#;

/// Every phase takes long enough to be met.
const SLOW: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "500ms"
step_max = "1s"
soak = "500ms"
warm = { probes = 3, interval = "50ms" }
abort_on = { p95_increase = false }
"#;

/// A shift that lasts until somebody else leads.
const SLOW_SHIFT: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "3s"
step_max = "4s"
warm = { probes = 2, interval = "20ms" }
abort_on = { p95_increase = false }
"#;

/// Moves under load with the edge apart.
const MOVES: usize = 20;

#[test]
fn moves_under_load_with_the_edge_apart_lose_nothing_and_the_receipt_is_true() {
    let apart = Apart::open(QUICK);
    let traffic = Traffic::start(apart.edge.http(), 600);
    let mut requests = 0;
    for number in 0..MOVES {
        let to = if number % 2 == 0 { "host-b" } else { "host-a" };
        let ended = apart.shop.move_to(to);
        let moved = ended.get("move").unwrap_or(&ended);
        assert_eq!(moved["state"], "succeeded", "move {number}: {ended:#}");
        let receipt = apart.shop.server.ok(&["moves", "receipt", moved["id"].as_str().expect("id")]);
        assert_eq!(receipt["failed"], 0, "{receipt:#}");
        assert_eq!(receipt["hard_cut"], serde_json::json!([]));
        for instance in receipt["instances"].as_array().expect("instances") {
            assert!(instance["new"] == true || instance["drained"] == true, "{receipt:#}");
        }
        requests += receipt["requests"].as_u64().expect("requests");
    }
    let summaries = traffic.stop();
    assert_nothing_lost(&summaries, &apart.shop.records());
    let sent: u64 = summaries.iter().map(|summary| summary.sent).sum();
    assert!(requests > sent / 10 && requests <= sent, "receipts have {requests} of {sent} requests");
    assert_eq!(apart.shop.places(), ["host-a"]);
}

#[test]
fn the_receipt_of_a_move_equals_what_the_origins_counted_with_the_edge_apart() {
    let apart = Apart::open("");
    let before = apart.shop.records().len();
    let traffic = Traffic::start(apart.edge.http(), 400);
    let ended = apart.shop.move_to("host-b");
    let summaries = traffic.stop();
    let records = apart.shop.records();
    assert_nothing_lost(&summaries, &records);
    let moved = ended.get("move").unwrap_or(&ended);
    let receipt = apart.shop.server.ok(&["moves", "receipt", moved["id"].as_str().expect("id")]);
    let (begin, end) = (unix_ns(moved, "started_at"), unix_ns(&receipt, "time"));
    let inside = records[before..].iter().filter(|r| (begin..=end).contains(&r.unix_ns)).count() as u64;
    let counted = receipt["requests"].as_u64().expect("requests");
    // The edge reports every 25 ms: what is on its way at the beginning and at the end is the difference.
    let slack = 400 / 8;
    assert!(counted.abs_diff(inside) <= slack, "receipt {counted}, oracle {inside}");
}

#[test]
fn an_engine_that_is_killed_in_each_phase_of_a_move_is_not_noticed_by_any_client() {
    let mut apart = Apart::open(SLOW);
    let traffic = Traffic::start(apart.edge.http(), 200);
    let mut at_a = true;
    for phase in ["plan", "start", "warm", "shift", "drain", "soak", "release"] {
        let to = if at_a { "host-b" } else { "host-a" };
        let id = kill_in_phase(&mut apart.shop, to, phase);
        let before = traffic.answered();
        wait_for("traffic without an engine", || (traffic.answered() > before + 40).then_some(()));
        apart.shop.server.start_again();
        let ended = apart.shop.ended(&id);
        let state = ended["state"].as_str().expect("state");
        assert!(matches!(state, "succeeded" | "rolled_back" | "failed"), "killed in {phase}: {ended:#}");
        at_a = if state == "succeeded" { !at_a } else { at_a };
        assert_eq!(apart.shop.places(), [if at_a { "host-a" } else { "host-b" }], "killed in {phase}");
        wait_for("one process and no other", || (apart.shop.server.pids_of("").len() == 1).then_some(()));
    }
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn an_engine_that_is_killed_after_each_event_of_a_move_is_not_noticed_by_any_client() {
    let mut apart =
        Apart::open(&QUICK.replace("[service.shop.move]", "[service.shop.move]\nsoak = \"100ms\""));
    let traffic = Traffic::start(apart.edge.http(), 100);
    let (mut at_a, mut faults) = (true, 0);
    while let Some(id) =
        kill_after_events(&mut apart.shop, if at_a { "host-b" } else { "host-a" }, faults + 1)
    {
        faults += 1;
        apart.shop.server.start_again();
        let ended = apart.shop.ended(&id);
        let state = ended["state"].as_str().expect("state");
        assert!(matches!(state, "succeeded" | "rolled_back" | "failed"), "killed after {faults}: {ended:#}");
        at_a = if state == "succeeded" { !at_a } else { at_a };
        assert_eq!(apart.shop.places(), [if at_a { "host-a" } else { "host-b" }], "killed after {faults}");
        wait_for("one process and no other", || (apart.shop.server.pids_of("").len() == 1).then_some(()));
        wait_for_state(&apart.shop.server, "edge-1", "connected");
    }
    assert!(faults >= 12, "a move has more than {faults} events");
    eprintln!("killed after each of {faults} events: {faults} survived, 0 lost");
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn an_edge_starts_and_serves_without_an_engine_and_the_engines_return_changes_nothing() {
    let mut apart = Apart::open(QUICK);
    // The deploy has ended; what the table says of the service from then on comes a moment later.
    let table = wait_for("the table of after the deploy on the edge's disk", || {
        let table = std::fs::read(apart.edge.data().join("table")).expect("a table");
        let now = seen(&apart.shop.server, "edge-1");
        let is_newest = now["saved"] == true && now["table_version"] == now["newest_version"];
        let is_at_rest = table.windows(7).any(|bytes| bytes == b"serving");
        (is_newest && is_at_rest).then_some(table)
    });
    apart.shop.server.kill();
    assert_eq!(apart.edge.stop(), Some(0));
    apart.edge.start();
    wait_for("the edge to serve from its disk", || answers(apart.edge.http()).then_some(()));
    let traffic = Traffic::start(apart.edge.http(), 200);
    apart.shop.server.start_again();
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    wait_for("a hundred answers", || (traffic.answered() > 100).then_some(()));
    // The same generations, weights and routes: nothing was applied, so nothing was saved.
    assert!(seen(&apart.shop.server, "edge-1")["problem"].is_null());
    assert_eq!(std::fs::read(apart.edge.data().join("table")).expect("a table"), table);
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn a_drain_that_an_edge_has_begun_ends_at_its_deadlines_also_when_the_engine_dies() {
    let drain = "\n[service.shop.move.drain]\nrequest = \"2s\"\nsse = \"1s\"\n";
    let mut apart = Apart::open(&format!("{QUICK}{drain}"));
    let ask = |path: &'static str| {
        let edge = apart.edge.http();
        std::thread::spawn(move || http_get(edge, path).expect("an answer"))
    };
    // One ends politely, the other one does not end by itself for as long as this test lasts.
    let (events, slow) = (ask("/sse?ms=20&count=0"), ask("/slow?ms=600000"));
    let old = apart.shop.instances()[0]["id"].as_str().expect("an id").to_owned();
    wait_for("both to be inside", || {
        let known = apart.shop.instances();
        let old = known.iter().find(|instance| instance["id"] == *old)?;
        (old["in_flight"] == 2).then_some(())
    });
    let id = in_phase(&apart.shop, "host-b", "drain");
    wait_for("the retirement to be acknowledged", || {
        let edge = seen(&apart.shop.server, "edge-1");
        let draining = apart.shop.the_move(&id)["waiting_for"].as_str()?.contains("requests to finish");
        (draining && edge["table_version"] == edge["newest_version"]).then_some(())
    });
    assert!(!events.is_finished() && !slow.is_finished());
    apart.shop.server.kill();
    let events = events.join().expect("it ended");
    assert!(events.ends_with("\n\n\r\n0\r\n\r\n"), "after an event, with a clean end: {events:?}");
    let slow = slow.join().expect("it ended");
    assert!(slow.starts_with("HTTP/1.1 503") && slow.contains("upstream_cut"), "{slow}");
    apart.shop.server.start_again();
    assert_eq!(apart.shop.ended(&id)["state"], "succeeded");
    let cut = apart.shop.server.ok(&["moves", "receipt", &id])["hard_cut_by_class"].clone();
    assert_eq!(cut["request"].as_array().map(Vec::len), Some(1), "{cut:#}");
}

#[test]
fn an_edge_whose_last_table_is_torn_serves_the_one_before_it() {
    let mut apart = Apart::open(QUICK);
    // Two more tables, so that the one before knows the shop too.
    apart.shop.deploy(&[], "[service.shop.move]\nsteps = [100]\n");
    wait_for("a table before the last", || apart.edge.data().join("table.before").exists().then_some(()));
    apart.shop.server.kill();
    apart.edge.kill();
    let table = apart.edge.data().join("table");
    let whole = std::fs::read(&table).expect("a table");
    std::fs::write(&table, &whole[..whole.len() / 2]).expect("it is torn");
    apart.edge.start();
    wait_for("the edge to serve", || answers(apart.edge.http()).then_some(()));
    assert!(apart.edge.log_text().contains("the one before it is"), "it is told");
}

#[test]
fn a_copy_that_dies_while_no_engine_runs_is_replaced_by_the_other_one() {
    let mut apart = Apart::open(&format!("replicas = 2\n{QUICK}"));
    wait_for("both copies", || (apart.shop.instances().len() == 2).then_some(()));
    let victim = apart.shop.instances()[0]["id"].as_str().expect("id").to_owned();
    apart.shop.server.kill();
    apart.shop.kill_instance(&victim);
    wait_for("answers from the other copy", || {
        let rounds = 50;
        ((0..rounds).filter(|_| answers(apart.edge.http())).count() == rounds).then_some(())
    });
    apart.shop.server.start_again();
}

#[test]
fn an_edge_that_joins_in_the_middle_of_a_shift_takes_the_weights_of_that_moment() {
    let apart = Apart::open(
        "[service.shop.move]\nsteps = [50, 100]\nstep_hold = \"4s\"\nstep_max = \"6s\"\nabort_on = { p95_increase = false }\n",
    );
    let id = apart.shop.begin_move("host-b");
    apart.shop.at_weight(&id, 50);
    let second = Edge::join(&apart.shop.server, apart.link, "edge-2");
    wait_for("the second edge to serve", || answers(second.http()).then_some(()));
    let at_half = Traffic::start(second.http(), 200);
    wait_for("a hundred answers", || (at_half.answered() > 100).then_some(()));
    let mut served: BTreeMap<String, u64> = BTreeMap::new();
    for (instance, count) in at_half.stop().into_iter().flat_map(|summary| summary.per_instance) {
        *served.entry(instance).or_default() += count;
    }
    let even =
        served.values().max().zip(served.values().min()).is_some_and(|(most, least)| most - least <= 8);
    assert!(served.len() == 2 && even, "half and half: {served:?}");
    let traffic = Traffic::start(second.http(), 200);
    assert_eq!(apart.shop.ended(&id)["state"], "succeeded");
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn an_edge_that_is_gone_is_waited_for_until_its_lease_ends_and_the_receipt_says_so() {
    let mut apart = Apart::open(QUICK);
    let second = Edge::join(&apart.shop.server, apart.link, "edge-2");
    // As a partition or a frozen machine would: the connection stays, and nobody answers.
    signal(apart.edge.pid(), "STOP");
    let begun = std::time::Instant::now();
    let ended = apart.shop.move_to("host-b");
    let took_ms = begun.elapsed().as_millis();
    signal(apart.edge.pid(), "CONT");
    let moved = ended.get("move").unwrap_or(&ended);
    assert_eq!(moved["state"], "succeeded", "{ended:#}");
    assert!(
        took_ms >= u128::from(LEASE_MS) * 8 / 10,
        "the move took {took_ms} ms, the lease is {LEASE_MS} ms"
    );
    let receipt = apart.shop.server.ok(&["moves", "receipt", moved["id"].as_str().expect("id")]);
    let notes = receipt["notes"].to_string();
    assert!(notes.contains("edge-1") && notes.contains("lease ended"), "{notes}");
    // It comes back by itself, and takes the table of now.
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    wait_for("the edge to serve the new copy", || answers(apart.edge.http()).then_some(()));
    drop(second);
    assert_eq!(apart.edge.stop(), Some(0));
    wait_for_state(&apart.shop.server, "edge-1", "away");
}

#[test]
fn a_cut_between_edge_and_engine_in_each_phase_of_a_move_heals_and_nothing_is_lost() {
    let mut apart = Apart::open(SLOW);
    let way = Way::to(apart.link);
    assert_eq!(apart.edge.stop(), Some(0));
    apart.edge.start_with(&[way.addr()]);
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    wait_for("the edge to serve", || answers(apart.edge.http()).then_some(()));
    let traffic = Traffic::start(apart.edge.http(), 200);
    let mut at_a = true;
    for phase in ["start", "warm", "shift", "drain", "soak", "release"] {
        let to = if at_a { "host-b" } else { "host-a" };
        let id = in_phase(&apart.shop, to, phase);
        way.cut();
        // A good part of the lease, in which the edge serves and the engine waits for it.
        let before = traffic.answered();
        wait_for("traffic through the cut-off edge", || (traffic.answered() > before + 300).then_some(()));
        way.heal();
        let ended = apart.shop.ended(&id);
        assert_eq!(ended["state"], "succeeded", "cut in {phase}: {ended:#}");
        at_a = !at_a;
        let notes = apart.shop.server.ok(&["moves", "receipt", &id])["notes"].to_string();
        assert!(!notes.contains("edge-1"), "nothing was given up: {notes}");
    }
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn a_cut_that_outlasts_the_lease_while_a_move_ends_is_told_and_over_when_it_heals() {
    let mut apart = Apart::open(QUICK);
    let way = Way::to(apart.link);
    assert_eq!(apart.edge.stop(), Some(0));
    apart.edge.start_with(&[way.addr()]);
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    way.cut();
    let ended = apart.shop.move_to("host-b");
    let moved = ended.get("move").unwrap_or(&ended);
    assert_eq!(moved["state"], "succeeded", "{ended:#}");
    let notes =
        apart.shop.server.ok(&["moves", "receipt", moved["id"].as_str().expect("id")])["notes"].to_string();
    assert!(notes.contains("edge-1"), "{notes}");
    way.heal();
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    wait_for("the edge to serve the new copy", || answers(apart.edge.http()).then_some(()));
    let traffic = Traffic::start(apart.edge.http(), 200);
    assert_eq!(apart.shop.move_to("host-a")["move"]["state"], "succeeded");
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn an_edge_tells_probes_that_it_is_ready_also_without_an_engine_and_since_when_that_is_away() {
    let mut apart = Apart::open(QUICK);
    let admin = free_address();
    assert_eq!(apart.edge.stop(), Some(0));
    apart.edge.start_with_admin(admin);
    let asked = |path: &str| http_get(admin, path);
    let ready = || -> Option<Value> {
        let answer = asked("/readyz").filter(|answer| answer.starts_with("HTTP/1.1 200"))?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    };
    let connected = wait_for("the edge to be ready and connected", || {
        ready().filter(|ready| ready["engine"]["connected"] == true && ready["table_version"].is_u64())
    });
    assert_eq!(connected["table_version"], seen(&apart.shop.server, "edge-1")["newest_version"]);
    assert!(connected["epoch"].as_u64() > Some(0) && connected["saved"] == true, "{connected:#}");
    assert!(answers(apart.edge.http()));
    let metrics = asked("/metrics").expect("an answer");
    for line in ["peregrine_link_connected 1", "peregrine_edge_ready 1", "peregrine_edge_requests_total{"] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    apart.shop.server.kill();
    let away = wait_for("the engine to be missed", || ready().filter(|r| r["engine"]["connected"] == false));
    assert!(away["engine"]["heard_ms_ago"].as_u64() >= away["engine"]["since_ms"].as_u64(), "{away:#}");
    assert!(asked("/metrics").expect("an answer").contains("peregrine_link_connected 0"));
    assert!(asked("/livez").expect("an answer").starts_with("HTTP/1.1 200"));
    assert!(answers(apart.edge.http()), "ready is the truth");
}

#[test]
fn an_edge_without_a_table_lives_and_is_not_ready() {
    let link = free_address();
    let mut server = Peregrine::start_engine(&engine_configuration(link));
    let mut edge = Edge::fresh("edge-1");
    assert!(edge.try_join(&invite(&server, "edge-1"), link).status.success());
    server.kill();
    let admin = free_address();
    edge.start_with_admin(admin);
    wait_for("life", || http_get(admin, "/livez").filter(|answer| answer.starts_with("HTTP/1.1 200")));
    let answer = http_get(admin, "/readyz").expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains(r#""has_table":false"#), "{answer}");
    server.start_again();
    wait_for("readiness", || http_get(admin, "/readyz").filter(|answer| answer.starts_with("HTTP/1.1 200")));
}

#[test]
fn an_engine_that_stands_by_tells_probes_that_it_lives_and_is_not_ready_until_it_leads() {
    let mut apart = Apart::open(QUICK);
    let mut second = Standby::start(&apart);
    let answer = wait_for("an answer", || http_get(second.api(), "/readyz"));
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("stands by"), "{answer}");
    assert!(http_get(second.api(), "/livez").expect("an answer").starts_with("HTTP/1.1 200"));
    apart.shop.server.kill();
    second.wait_until_it_leads();
}

#[test]
fn a_join_token_is_good_for_one_use_and_an_edge_that_was_removed_is_shut_out() {
    let link = free_address();
    let server = Peregrine::start_engine(&engine_configuration(link));
    let token = invite(&server, "edge-1");
    let mut first = Edge::fresh("edge-1");
    assert!(first.try_join(&token, link).status.success());
    let second = Edge::fresh("edge-1");
    let refused = said(&second.try_join(&token, link), &["edge", "join"]);
    assert_eq!(refused.code, 3, "{refused:?}");
    assert_eq!(refused.error()["code"], "edge.join_refused");
    assert!(!second.data().join("identity.json").exists());
    assert!(!files_below(&server.data()).iter().any(|file| {
        std::fs::read(file).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(&token))
    }));
    first.start();
    wait_for_state(&server, "edge-1", "connected");
    server.ok(&["edges", "remove", "edge-1", "--yes"]);
    wait_for("the refusal", || first.log_text().contains("not in the registry").then_some(()));
    assert_eq!(server.ok(&["edges", "list"]), serde_json::json!([]));
}

#[test]
fn a_token_of_another_installation_does_not_reach_the_engine() {
    let (link, other) = (free_address(), free_address());
    let server = Peregrine::start_engine(&engine_configuration(link));
    let stranger = Peregrine::start_engine(&engine_configuration(other));
    let edge = Edge::fresh("edge-1");
    // The token names the authority: a false engine is found out before it is told the secret.
    let refused = said(&edge.try_join(&invite(&stranger, "edge-1"), link), &["edge", "join"]);
    assert_eq!(refused.error()["code"], "engine.unreachable", "{refused:?}");
    assert_eq!(server.ok(&["edges", "list"]), serde_json::json!([]));
}

#[test]
fn the_process_of_an_edge_holds_no_credential_but_its_own_and_no_way_to_an_engine_of_containers() {
    let apart = Apart::open(QUICK);
    let traffic = Traffic::start(apart.edge.http(), 100);
    wait_for("a hundred answers", || (traffic.answered() > 100).then_some(()));
    let engines_folder = apart.shop.server.data().display().to_string();
    let own = apart.edge.data().display().to_string();
    for file in open_files(apart.edge.pid()) {
        let fine = file.starts_with(&own)
            || file.starts_with("socket:")
            || file.starts_with("anon_inode:")
            || file.starts_with("pipe:")
            || file.starts_with("/dev/null")
            || file.ends_with("edge.log")
            || file.starts_with("/etc/")
            || file.starts_with("/dev/urandom");
        assert!(fine && !file.starts_with(&engines_folder), "the edge has {file} open");
    }
    let unix =
        Command::new("ss").args(["-xpH"]).output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    if let Ok(unix) = unix {
        let mine = format!("pid={},", apart.edge.pid());
        let own = apart.edge.data().join("edge.sock").display().to_string();
        let is_other = |line: &&str| line.contains(&mine) && line.contains(".sock") && !line.contains(&own);
        let named = unix.lines().filter(is_other);
        assert_eq!(named.collect::<Vec<_>>(), Vec::<&str>::new());
    }
    let held: BTreeSet<_> = files_below(&apart.edge.data())
        .iter()
        .map(|file| file.file_name().expect("a name").to_string_lossy().into_owned())
        .collect();
    // Of what it serves with it has the keys of tickets, sealed, and its own key to them; certificates there are none here.
    let own = ["certificates.key", "edge.lock", "edge.sock", "epoch", "identity.json"];
    let known = own.iter().chain(&["table", "table.before", "tickets"]).map(ToString::to_string).collect();
    assert!(held.is_subset(&known), "{held:?}");
    let environment = std::fs::read(format!("/proc/{}/environ", apart.edge.pid())).expect("ours");
    assert!(!String::from_utf8_lossy(&environment).contains("PEREGRINE_TOKEN"));
    traffic.stop();
}

#[test]
fn a_server_with_an_edge_of_its_own_serves_through_a_further_one_too() {
    let link = free_address();
    let server = Peregrine::start(&engine_configuration(link));
    let second = Edge::join(&server, link, "edge-2");
    let shop = Shop::closed(server);
    shop.deploy(&[], QUICK);
    wait_for("both to serve", || (answers(shop.server.edge()) && answers(second.http())).then_some(()));
    let both = [Traffic::start(shop.server.edge(), 200), Traffic::start(second.http(), 200)];
    for to in ["host-b", "host-a"] {
        let ended = shop.move_to(to);
        assert_eq!(ended.get("move").unwrap_or(&ended)["state"], "succeeded", "{ended:#}");
    }
    let summaries: Vec<_> = both.into_iter().flat_map(Traffic::stop).collect();
    assert_nothing_lost(&summaries, &shop.records());
}

#[test]
fn an_engine_that_stood_still_in_the_middle_of_a_shift_and_was_replaced_writes_nothing_when_it_goes_on() {
    let mut apart = Apart::open(SLOW_SHIFT);
    let mut second = Standby::start(&apart);
    // The edge knows both; it looks for the other one when the first is silent.
    assert_eq!(apart.edge.stop(), Some(0));
    apart.edge.start_with(&[apart.link, second.link]);
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    let traffic = Traffic::start(apart.edge.http(), 200);
    let id = apart.shop.begin_move("host-b");
    apart.shop.at_weight(&id, 50);
    let first = apart.shop.server.pid();
    signal(first, "STOP");
    second.wait_until_it_leads();
    let ended = second.ended(&id);
    let state = ended["state"].as_str().expect("state");
    assert!(matches!(state, "succeeded" | "rolled_back"), "{ended:#}");
    signal(first, "CONT");
    // It finds out by itself, tells so and ends; what it tried to write is in the audit of the one that leads.
    assert_ne!(apart.shop.server.wait(), Some(0));
    assert!(apart.shop.server.log_text().contains("another engine leads"), "it tells why it ends");
    wait_for("the event", || second.events().contains("engine.fenced").then_some(()));
    assert_eq!(second.ended(&id)["state"], state, "nothing that it did has changed the end");
    wait_for("the refusal in the audit", || {
        let audit = second.audit();
        let refused = audit["items"].as_array()?.iter().find(|entry| entry["act"] == "refused")?.to_string();
        refused.contains("engine that was replaced").then_some(())
    });
    let before = traffic.answered();
    wait_for("traffic", || (traffic.answered() > before + 40).then_some(()));
    assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

/// A copy that is stopped with somebody inside is gone before they have their answer.
const IMPATIENT: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "20ms"
step_max = "40ms"
stop_grace = "100ms"
warm = { probes = 1, interval = "20ms" }
abort_on = { p95_increase = false }
"#;

/// A request that is inside of the shop for so long, when it has got there.
fn inside(apart: &Apart, wait_ms: u64) -> std::thread::JoinHandle<Option<String>> {
    let edge = apart.edge.http();
    let ask = format!(
        "GET /slow?ms={wait_ms} HTTP/1.1\r\nhost: {edge}\r\nx-req-id: inside-1\r\nconnection: close\r\n\r\n"
    );
    let asking = std::thread::spawn(move || http(edge, &ask));
    wait_for("the request to be inside", || {
        apart.shop.records().iter().any(|record| *record.id == *"inside-1").then_some(())
    });
    asking
}

#[track_caller]
fn assert_answered(asking: std::thread::JoinHandle<Option<String>>) {
    let answer = asking.join().expect("no panic").expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn whoever_is_inside_of_a_drain_when_the_engine_dies_is_waited_for_when_it_is_back() {
    let mut apart = Apart::open(IMPATIENT);
    let asking = inside(&apart, 5_000);
    let id = kill_in_phase(&mut apart.shop, "host-b", "drain");
    apart.shop.server.start_again();
    assert_eq!(apart.shop.ended(&id)["state"], "succeeded");
    assert!(asking.is_finished(), "the copy was stopped with a request inside");
    assert_answered(asking);
}

#[test]
fn whoever_is_inside_of_a_drain_that_was_given_up_is_waited_for_although_the_engine_has_died_since() {
    let mut apart = Apart::open(IMPATIENT);
    let asking = inside(&apart, 8_000);
    let id = in_phase(&apart.shop, "host-b", "drain");
    apart.shop.server.ok(&["moves", "abort", &id]);
    // The old copy serves again, in a stretch of service that knows nothing of the former one.
    assert_eq!(apart.shop.ended(&id)["state"], "aborted");
    apart.shop.server.kill();
    apart.shop.server.start_again();
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    assert!(!asking.is_finished(), "it is inside all along");
    let ended = apart.shop.move_to("host-b");
    assert_eq!(ended.get("move").unwrap_or(&ended)["state"], "succeeded", "{ended:#}");
    assert!(asking.is_finished(), "the copy was stopped with a request inside");
    assert_answered(asking);
    let receipt = apart.shop.server.ok(&["moves", "receipt", &id]);
    assert_eq!(
        (&receipt["failed"], &receipt["hard_cut"]),
        (&0.into(), &serde_json::json!([])),
        "{receipt:#}"
    );
}

fn unix_ns(of: &Value, field: &str) -> u64 {
    let text = of[field].as_str().unwrap_or_else(|| panic!("{field} in {of:#}"));
    let time: jiff::Timestamp = text.parse().expect("RFC 3339");
    u64::try_from(time.as_nanosecond()).expect("after 1970")
}

/// Starts a move and kills the engine when it has told so many of its events; `None` if it has not that many, and then
/// the engine runs on.
fn kill_after_events(shop: &mut Shop, to: &str, count: usize) -> Option<String> {
    let mut listener = shop.server.listen();
    let lines = BufReader::new(listener.stdout.take().expect("stdout")).lines();
    let id = id_of(&shop.server.ok(&["move", "shop", "--to", to, "--detach"]));
    let (mut told, mut done) = (0, false);
    for line in lines {
        let event: Value = serde_json::from_str(&line.expect("the stream goes on")).expect("an event");
        let event = &event["event"];
        let stored = event["move"] == id.as_str() && event["type"] != "move.sample";
        told += usize::from(stored);
        done = stored && event["type"] == "move.done";
        if told == count || done {
            break;
        }
    }
    if !done {
        shop.server.kill();
    }
    let _killed = listener.kill();
    let _gone = listener.wait();
    (!done).then_some(id)
}

/// Starts a move, waits until the stream of events tells of the phase, and kills the engine at once.
fn kill_in_phase(shop: &mut Shop, to: &str, phase: &str) -> String {
    let id = in_phase(shop, to, phase);
    shop.server.kill();
    id
}

/// Starts a move, and waits until the stream of events tells of the phase.
pub(crate) fn in_phase(shop: &Shop, to: &str, phase: &str) -> String {
    let mut listener = shop.server.listen();
    let lines = BufReader::new(listener.stdout.take().expect("stdout")).lines();
    let id = id_of(&shop.server.ok(&["move", "shop", "--to", to, "--detach"]));
    let mut met = false;
    for line in lines {
        let event: Value = serde_json::from_str(&line.expect("the stream goes on")).expect("an event");
        let event = &event["event"];
        let this = event["move"] == id.as_str();
        met = this && event["type"] == "move.phase" && event["data"]["phase"] == phase;
        if met || (this && event["type"] == "move.done") {
            break;
        }
    }
    let _killed = listener.kill();
    let _gone = listener.wait();
    assert!(met, "the move ended before {phase}");
    id
}
