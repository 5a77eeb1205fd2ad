//! Deploy, rollback, scale and abort, by the command line and by the API.

use serde_json::{Value, json};

use crate::support::server::{Peregrine, http, http_get};
use crate::support::shop::{Shop, id_of};
use crate::support::wait_for;

const QUICK: &str = r#"
[service.shop.move]
steps = [100]
step_hold = "50ms"
step_max = "100ms"
warm = { probes = 1, interval = "20ms" }
"#;

#[test]
fn a_deploy_brings_a_new_version_and_a_rollback_the_old_one() {
    let shop = Shop::open(QUICK);
    shop.deploy(&[("ORIGIN_VERSION", "two")], QUICK);
    assert_eq!(version(&shop), "two");
    let back = shop.server.ok(&["rollback", "shop"]);
    assert_eq!(back["move"]["state"], "succeeded", "{back:#}");
    assert_eq!(back["move"]["kind"], "rollback");
    assert_eq!(version(&shop), "");
    let again = shop.server.ok(&["rollback", "shop", "--to-version", "2"]);
    assert_eq!(again["move"]["to_version"], 2);
    assert_eq!(version(&shop), "two");
}

#[test]
fn a_deploy_of_the_same_manifest_changes_nothing() {
    let shop = Shop::open(QUICK);
    let before = shop.instances();
    shop.deploy(&[], QUICK);
    let ids = |list: &[Value]| list.iter().map(|item| item["id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(&shop.instances()), ids(&before));
}

#[test]
fn a_service_is_scaled_up_and_down_by_the_command_line_and_by_the_api() {
    let shop = Shop::open(QUICK);
    shop.server.ok(&["scale", "shop", "3"]);
    assert_eq!(shop.places().len(), 3);
    let (status, answer) =
        api(&shop.server, "POST", "/api/v1/services/shop/scale", Some(&json!({"replicas": 1})));
    assert_eq!(status, 202, "{answer:#}");
    wait_for("one copy", || (shop.instances().len() == 1).then_some(()));
    assert!(http_get(shop.server.edge(), "/").expect("an answer").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_plan_changes_nothing_and_says_what_would_be_done() {
    let shop = Shop::open(QUICK);
    let plan = shop.server.ok(&["move", "shop", "--to", "host-b", "--plan"]);
    assert!(plan["steps"].as_array().is_some_and(|steps| steps.len() > 3), "{plan:#}");
    assert_eq!(plan["blockers"], json!([]));
    assert_eq!(shop.places(), ["host-a"]);
    let blocked = shop.server.run(&["move", "shop", "--to", "host-a"]);
    assert_eq!(blocked.code, 8, "already there: {blocked:?}");
}

#[test]
fn an_abort_takes_effect_within_two_seconds_in_each_phase() {
    // Slow to start, slow to shift, long to soak: every phase is long enough to be aborted in.
    let settings = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "20s"
step_max = "30s"
soak = "60s"
warm = { probes = 2, interval = "50ms" }
"#;
    let shop = Shop::open(settings);
    for (phase, by_api) in [("warm", false), ("shift", true), ("soak", false)] {
        let id = match phase {
            "warm" => {
                let manifest = shop.manifest(&[("ORIGIN_STARTUP_MS", "30000")], settings);
                let started = shop.server.ok(&["deploy", "-f", &manifest, "--detach"]);
                id_of(started.get(0).unwrap_or(&started))
            }
            _ => shop.begin_move("host-b"),
        };
        if phase == "soak" {
            promote_to_soak(&shop, &id);
        }
        wait_for(phase, || (shop.the_move(&id)["phase"] == phase).then_some(()));
        let begin = std::time::Instant::now();
        if by_api {
            let (status, answer) = api(&shop.server, "POST", &format!("/api/v1/moves/{id}/abort"), None);
            assert!((200..300).contains(&status), "{answer:#}");
        } else {
            let aborted = shop.server.run(&["moves", "abort", &id]);
            assert_eq!(aborted.code, 0, "{aborted:?}");
        }
        let ended = shop.ended(&id);
        let took = begin.elapsed();
        assert_eq!(ended["state"], "aborted", "in {phase}: {ended:#}");
        assert!(took.as_secs_f64() < 2.0 + SLACK_S, "in {phase} the abort took {took:?}");
        assert_eq!(shop.places(), ["host-a"], "in {phase}");
        assert!(
            http_get(shop.server.edge(), "/").expect("an answer").starts_with("HTTP/1.1 200"),
            "in {phase}"
        );
        let watched = shop.server.run(&["moves", "watch", &id]);
        assert_eq!(watched.code, 10, "{watched:?}");
    }
}

/// Taking the new copy down comes after the effect, and is part of the end.
const SLACK_S: f64 = 3.0;

/// Skips what is left of a shift in the steps 50 and 100. Each is skipped once: asked again, a soak that has begun
/// meanwhile would be skipped, too.
#[track_caller]
pub(crate) fn promote_to_soak(shop: &Shop, id: &str) {
    for percent in [50, 100] {
        shop.at_weight(id, percent);
        shop.server.ok(&["moves", "promote", id]);
    }
    wait_for("the soak", || (shop.the_move(id)["phase"] == "soak").then_some(()));
}

#[test]
fn a_paused_move_stays_where_it_is_and_goes_on_when_it_is_told() {
    let settings = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "1s"
step_max = "1s"
warm = { probes = 1, interval = "20ms" }
"#;
    let shop = Shop::open(settings);
    let id = shop.begin_move("host-b");
    shop.at_weight(&id, 50);
    shop.server.ok(&["moves", "pause", &id]);
    wait_for("the pause", || (shop.the_move(&id)["state"] == "paused").then_some(()));
    assert_eq!(shop.the_move(&id)["weight_percent"], 50);
    shop.server.ok(&["moves", "resume", &id]);
    assert_eq!(shop.ended(&id)["state"], "succeeded");
}

#[test]
fn a_repeated_request_with_the_same_key_starts_one_move() {
    let shop = Shop::open(QUICK);
    let body = json!({"service": "shop", "to": "host-b"});
    let first = api_with(&shop.server, "POST", "/api/v1/moves", Some(&body), "idempotency-key: once\r\n");
    let second = api_with(&shop.server, "POST", "/api/v1/moves", Some(&body), "idempotency-key: once\r\n");
    assert_eq!(first.0, 202, "{first:?}");
    assert_eq!(first.1["id"], second.1["id"], "{second:?}");
    shop.ended(first.1["id"].as_str().expect("id"));
    let moves = shop.server.ok(&["moves", "list", "--service", "shop"]);
    let moves = moves.get("items").unwrap_or(&moves).as_array().expect("a list").clone();
    assert_eq!(moves.iter().filter(|m| m["kind"] == "move").count(), 1);
}

#[test]
fn what_a_move_could_not_remove_is_listed_and_cleaned_up_once_it_can_be() {
    let settings = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "30s"
step_max = "40s"
warm = { probes = 1, interval = "20ms" }
"#;
    let shop = Shop::open(settings);
    let id = shop.begin_move("host-b");
    shop.at_weight(&id, 50);
    let refused = shop.server.run(&["moves", "cleanup", &id]);
    assert_eq!((refused.code, &refused.error()["code"]), (5, &"move.running".into()), "{refused:?}");

    // The folder of a copy is renamed before it goes. A file where it would go is in the way of that.
    let old = shop.instance_of(&id, "from");
    let in_the_way = shop.server.data().join("processes/host-a").join(format!(".removed-{old}"));
    std::fs::write(&in_the_way, "").expect("a file");
    shop.server.ok(&["moves", "promote", &id]);
    wait_for("the last step", || {
        let now = shop.the_move(&id);
        if now["phase"] == "shift" {
            shop.server.ok(&["moves", "promote", &id]);
        }
        (now["phase"] != "shift").then_some(())
    });
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "needs_operator", "{ended:#}");
    assert!(ended["leftovers"][0].as_str().is_some_and(|left| left.contains(&old)), "{ended:#}");
    assert_eq!(ended["_actions"], json!(["cleanup"]));

    let watched = shop.server.run(&["moves", "watch", &id]);
    assert_eq!(watched.code, 9, "{watched:?}");
    assert!(watched.error().to_string().contains(&format!("peregrine moves cleanup {id}")), "{watched:?}");
    let still = shop.server.run(&["moves", "cleanup", &id]);
    assert_eq!((still.code, &still.error()["code"]), (9, &"cleanup.incomplete".into()), "{still:?}");
    assert_eq!(still.error()["retryable"], true);
    let why: &Value = &still.error()["blockers"][0];
    assert!(why["message"].as_str().is_some_and(|message| message.contains(&old)), "{still:?}");

    std::fs::remove_file(&in_the_way).expect("the file goes");
    for _ in 0..2 {
        let cleaned = shop.server.ok(&["moves", "cleanup", &id]);
        assert_eq!(cleaned["leftovers"], json!([]), "{cleaned:#}");
    }
    assert_eq!(shop.places(), ["host-b"]);
}

fn version(shop: &Shop) -> String {
    let answer = http_get(shop.server.edge(), "/").expect("an answer").to_lowercase();
    let header = answer.lines().find_map(|line| line.strip_prefix("x-version: "));
    header.unwrap_or_default().trim().to_owned()
}

/// Asks the API as curl would: status and JSON.
pub(crate) fn api(server: &Peregrine, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
    api_with(server, method, path, body, "")
}

fn api_with(
    server: &Peregrine,
    method: &str,
    path: &str,
    body: Option<&Value>,
    headers: &str,
) -> (u16, Value) {
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        server.api(),
        server.token(),
        body.len()
    );
    let answer = http(server.api(), &request).expect("the API answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}
