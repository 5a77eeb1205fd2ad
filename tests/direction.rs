//! Which copy is healthy decides the direction, not the error that happened.

use serde_json::Value;

use crate::support::shop::Shop;
use crate::support::traffic::Traffic;

/// Long steps, so that there is time to break something in the middle.
const SLOW_STEPS: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "2s"
step_max = "4s"
warm = { probes = 2, interval = "50ms" }
"#;

/// Requests that may fail when a copy is killed: those that it was answering, and what was sent before its
/// death was seen. The edge repeats only what provably was not processed.
const CUT_BY_THE_KILL: u64 = 40;

#[test]
fn a_new_copy_that_breaks_at_half_the_traffic_turns_the_move_back() {
    broken_at(50);
}

#[test]
fn a_new_copy_that_breaks_at_all_of_the_traffic_turns_the_move_back() {
    broken_at(100);
}

#[test]
fn a_new_copy_that_is_killed_in_the_middle_turns_the_move_back_and_its_death_is_hardly_seen() {
    let shop = Shop::open(SLOW_STEPS);
    let traffic = Traffic::start(shop.server.edge(), 300);
    let id = shop.begin_move("host-b");
    shop.at_weight(&id, 50);
    shop.kill_instance(&shop.instance_of(&id, "to"));
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "rolled_back", "{ended:#}");
    assert_eq!(shop.places(), ["host-a"]);
    assert_few_failures(traffic);
}

#[test]
fn an_old_copy_that_is_killed_at_half_the_traffic_makes_the_move_go_forward() {
    old_killed_at(50);
}

#[test]
fn an_old_copy_that_is_killed_at_all_of_the_traffic_makes_the_move_go_forward() {
    old_killed_at(100);
}

fn broken_at(percent: u64) {
    let shop = Shop::open(SLOW_STEPS);
    let traffic = Traffic::start(shop.server.edge(), 300);
    let id = shop.begin_move("host-b");
    shop.at_weight(&id, percent);
    shop.fault(&shop.instance_of(&id, "to"), r#"{"error_percent": 100, "healthy": false}"#);
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "rolled_back", "{ended:#}");
    assert!(ended["problem"]["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{ended:#}");
    assert_eq!(shop.places(), ["host-a"]);
    let watched = shop.server.run(&["moves", "watch", &id]);
    assert_eq!(watched.code, 10, "{watched:?}");
    // The broken copy answered 500 for a moment; nothing else went wrong, and all is well again.
    for summary in traffic.stop() {
        assert_eq!(summary.failed.total(), summary.failed.non_2xx, "{:?}", summary.failures);
    }
    assert_served_by_one(&shop);
}

fn old_killed_at(percent: u64) {
    let shop = Shop::open(SLOW_STEPS);
    let traffic = Traffic::start(shop.server.edge(), 300);
    let id = shop.begin_move("host-b");
    shop.at_weight(&id, percent);
    shop.kill_instance(&shop.instance_of(&id, "from"));
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    assert_eq!(shop.places(), ["host-b"]);
    assert_few_failures(traffic);
    assert_served_by_one(&shop);
}

/// Traffic that begins after the end meets nothing but the copy that is left.
fn assert_served_by_one(shop: &Shop) {
    let after = Traffic::start(shop.server.edge(), 200);
    crate::support::wait_for("a hundred answers", || (after.answered() > 100).then_some(()));
    let left: Vec<Value> = shop.instances();
    assert_eq!(left.len(), 1, "{left:?}");
    for summary in after.stop() {
        assert_eq!(summary.failures, []);
        assert_eq!(summary.per_instance.len(), 1, "{:?}", summary.per_instance);
    }
}

fn assert_few_failures(traffic: Traffic) {
    let failed: u64 = traffic.stop().iter().map(|summary| summary.sent - summary.ok).sum();
    assert!(failed <= CUT_BY_THE_KILL, "{failed} requests failed");
}
