//! Moves under load: nothing is lost, nobody is pinned, and the receipt equals the oracle's counts.

use serde_json::Value;

use crate::support::shop::Shop;
use crate::support::traffic::{Traffic, assert_nothing_lost};

/// Moves with the process runtime; the issue asks for 200.
const PROCESS_MOVES: usize = 200;
/// Longest time from the begin of the drain to the acknowledgement by every core, on a loaded machine.
const ACKNOWLEDGEMENT_NS: u64 = 500_000_000;
/// Settings under which a move is all machinery and hardly any waiting. Every guard is on.
const QUICK: &str = r#"
[service.shop.move]
steps = [10, 50, 100]
step_hold = "30ms"
step_max = "120ms"
warm = { probes = 2, interval = "20ms" }
"#;

#[test]
fn two_hundred_moves_under_load_lose_nothing_with_plain_processes() {
    let shop = Shop::open(QUICK);
    let traffic = Traffic::start(shop.server.edge(), 1_000);
    for number in 0..PROCESS_MOVES {
        let to = if number % 2 == 0 { "host-b" } else { "host-a" };
        let ended = shop.move_to(to);
        assert_eq!(moved(&ended)["state"], "succeeded", "move {number}: {ended:#}");
    }
    let summaries = traffic.stop();
    assert_nothing_lost(&summaries, &shop.records());
    assert_eq!(shop.places(), ["host-a"]);
}

#[test]
fn after_the_switch_the_old_copy_gets_nothing_new_and_no_client_connection_is_closed() {
    let shop = Shop::open("");
    let traffic = Traffic::start(shop.server.edge(), 400);
    let ended = shop.move_to("host-b");
    let drained_at_ns = phase_start_ns(moved(&ended), "drain");
    let after = Traffic::start(shop.server.edge(), 400);
    let late = after.stop();
    let mut summaries = traffic.stop();
    summaries.extend(late);
    assert_nothing_lost(&summaries, &shop.records());
    let old = moved(&ended)["from"][0]["instance"].as_str().expect("the old copy's id").to_owned();
    let collected = shop.collected();
    let arrivals = collected.iter().filter(|c| *c.instance == *old).map(|c| c.record.unix_ns);
    let last = arrivals.max().expect("the old copy served before");
    // "drain" begins before the table is published: what was on its way then may still arrive.
    let acknowledged_ns = drained_at_ns + ACKNOWLEDGEMENT_NS;
    assert!(
        last <= acknowledged_ns,
        "the old copy got a request {} ns after the switch",
        last - acknowledged_ns
    );
    assert!(collected.iter().any(|c| *c.instance != *old && c.record.unix_ns > last), "the new copy goes on");
}

#[test]
fn the_receipt_equals_what_the_origins_counted() {
    let shop = Shop::open("");
    let before = shop.records().len();
    let traffic = Traffic::start(shop.server.edge(), 500);
    let ended = shop.move_to("host-b");
    let summaries = traffic.stop();
    let records = shop.records();
    assert_nothing_lost(&summaries, &records);
    let id = moved(&ended)["id"].as_str().expect("id");
    let receipt = shop.server.ok(&["moves", "receipt", id]);
    let (begin, end) = (span_ns(moved(&ended), "started_at"), receipt_ns(&receipt));
    let inside = records[before..].iter().filter(|r| (begin..=end).contains(&r.unix_ns)).count() as u64;
    let counted = receipt["requests"].as_u64().expect("requests");
    // The clocks of begin and end are read some milliseconds beside the counters.
    let slack = 500 / 20;
    assert!(counted.abs_diff(inside) <= slack, "receipt {counted}, oracle {inside}");
    assert_eq!(receipt["failed"], 0);
    assert_eq!(receipt["hard_cut"], serde_json::json!([]));
    let old = &receipt["instances"]
        .as_array()
        .expect("instances")
        .iter()
        .find(|i| i["new"] == false)
        .expect("old copy")["drained"];
    assert_eq!(*old, true);
}

/// The move in what a command printed.
pub(crate) fn moved(printed: &Value) -> &Value {
    printed.get("move").unwrap_or(printed)
}

fn span_ns(moved: &Value, field: &str) -> u64 {
    let text = moved[field].as_str().unwrap_or_else(|| panic!("{field} in {moved:#}"));
    let time: jiff::Timestamp = text.parse().expect("RFC 3339");
    u64::try_from(time.as_nanosecond()).expect("after 1970")
}

fn receipt_ns(receipt: &Value) -> u64 {
    span_ns(receipt, "time")
}

fn phase_start_ns(moved: &Value, phase: &str) -> u64 {
    let phases = moved["phases"].as_array().expect("phases");
    let found = phases.iter().find(|p| p["phase"] == phase).unwrap_or_else(|| panic!("{phase} in {moved:#}"));
    span_ns(found, "started_at")
}
