//! Copies of requests before a new copy gets traffic: what is broken on its real paths alone is met by no client.

use std::net::SocketAddr;

use peregrine_bench::origin::Record;
use serde_json::{Value, json};

use crate::moves::moved;
use crate::support::apart::Apart;
use crate::support::shop::Shop;
use crate::support::traffic::{Traffic, assert_nothing_lost};

/// A move is all machinery and hardly any waiting, but for what is mirrored.
const MIRRORED: &str = r#"
[service.shop.move]
steps = [10, 50, 100]
step_hold = "30ms"
step_max = "120ms"
abort_on = { p95_increase = false }

[service.shop.move.warm]
probes = 2
interval = "20ms"
mirror = { sample = "100%", min_samples = 40, max = "60s", max_requests_per_s = 1000 }
"#;

#[test]
fn a_version_that_is_broken_on_its_real_paths_alone_fails_before_any_client_meets_it() {
    broken_at(&Shop::open(MIRRORED), None);
}

#[test]
fn the_same_with_the_edge_in_a_process_of_its_own() {
    let apart = Apart::open(MIRRORED);
    broken_at(&apart.shop, Some(apart.edge.http()));
}

/// Deploys a version that answers its health path and nothing else.
fn broken_at(shop: &Shop, edge: Option<SocketAddr>) {
    let old = shop.instances()[0]["id"].as_str().expect("an id").to_owned();
    let traffic = Traffic::start(edge.unwrap_or_else(|| shop.server.edge()), 300);
    let manifest = shop.manifest(&[("ORIGIN_ERROR_PERCENT", "100")], MIRRORED);
    let said = shop.server.run(&["deploy", "-f", &manifest]);
    assert_eq!(said.code, 9, "{said:?}");
    let id = newest_move(shop);
    let receipt = shop.server.ok(&["moves", "receipt", &id]);
    let mirror = &receipt["mirror"];
    assert_eq!(mirror["verdict"], "fail", "{receipt:#}");
    assert!(mirror["differed"]["2xx>5xx"].as_u64().is_some_and(|count| count >= 5), "{receipt:#}");
    let ended = shop.the_move(&id);
    assert_eq!(
        (&ended["state"], &ended["problem"]["code"]),
        (&json!("failed"), &json!("warm.mirror_differs"))
    );
    assert_eq!((shop.places(), receipt["failed"].clone()), (vec!["host-a".to_owned()], json!(0)));

    let summaries = traffic.stop();
    let (of_old, copies): (Vec<_>, Vec<_>) =
        shop.collected().into_iter().partition(|collected| *collected.instance == *old);
    let of_old: Vec<Record> = of_old.into_iter().map(|collected| collected.record).collect();
    // Every client was answered by the old copy, and each request was executed there once.
    assert_nothing_lost(&summaries, &of_old);
    let copies: Vec<Record> = copies.into_iter().map(|collected| collected.record).collect();
    assert_are_what_was_told(copies.len(), mirror, edge.is_some());
    let served = |copy: &Record| of_old.iter().any(|record| record.id == copy.id && record.status == 200);
    for copy in &copies {
        assert!(copy.method == "GET" && copy.status == 500 && served(copy), "{copy:?}");
    }
}

#[test]
fn a_move_that_mirrors_says_in_its_receipt_what_was_compared_and_loses_nothing() {
    let shop = Shop::open("[service.shop.move]\nsteps = [50, 100]\nabort_on = { p95_increase = false }\n");
    let old = shop.instances()[0]["id"].as_str().expect("an id").to_owned();
    let traffic = Traffic::start(shop.server.edge(), 300);
    let ended = shop.server.ok(&["move", "shop", "--to", "host-b", "--mirror", "100%"]);
    let summaries = traffic.stop();
    let ended = moved(&ended);
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let receipt = shop.server.ok(&["moves", "receipt", ended["id"].as_str().expect("an id")]);
    let mirror = &receipt["mirror"];
    assert_eq!((&mirror["verdict"], &mirror["unequal"]), (&json!("pass"), &json!(0)), "{mirror:#}");
    assert!(mirror["compared"].as_u64().is_some_and(|compared| compared >= 50), "{mirror:#}");
    // What came to the new copy before its shift began are copies: they were told off before it.
    let shift_ns = started_ns(ended, "shift");
    let collected = shop.collected();
    let (copies, real): (Vec<_>, Vec<_>) = collected
        .into_iter()
        .partition(|collected| *collected.instance != *old && collected.record.unix_ns < shift_ns);
    assert_are_what_was_told(copies.len(), mirror, false);
    let real: Vec<Record> = real.into_iter().map(|collected| collected.record).collect();
    assert_nothing_lost(&summaries, &real);
}

/// A copy that was under way at the end may have been dropped before it came to its target; and an edge apart tells what
/// it has counted a moment later.
#[track_caller]
fn assert_are_what_was_told(arrived: usize, mirror: &Value, apart: bool) {
    let told = |what: &str| mirror[what].as_u64().expect("a count");
    let most = if apart { u64::MAX } else { told("sent") };
    assert!((told("compared")..=most).contains(&(arrived as u64)), "{arrived} arrived: {mirror:#}");
}

fn newest_move(shop: &Shop) -> String {
    let moves = shop.server.ok(&["moves", "list"]);
    let moves = moves.as_array().or_else(|| moves["items"].as_array()).expect("a list").clone();
    let started = |one: &&Value| one["started_at"].as_str().map(str::to_owned);
    moves.iter().max_by_key(started).expect("a move")["id"].as_str().expect("an id").to_owned()
}

fn started_ns(moved: &Value, phase: &str) -> u64 {
    let phases = moved["phases"].as_array().expect("phases");
    let found = phases.iter().find(|part| part["phase"] == phase).expect("the phase");
    let time: jiff::Timestamp = found["started_at"].as_str().expect("a time").parse().expect("RFC 3339");
    u64::try_from(time.as_nanosecond()).expect("after 1970")
}
