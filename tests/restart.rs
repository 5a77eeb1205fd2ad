//! kill -9 of the server in each phase of a move: it is taken up again, ends, and leaves one copy.

use std::io::{BufRead, BufReader};

use serde_json::Value;

use crate::support::server::http_get;
use crate::support::shop::Shop;
use crate::support::wait_for;

/// Every phase takes long enough to be met.
const SETTINGS: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "500ms"
step_max = "1s"
soak = "1s"
warm = { probes = 3, interval = "50ms" }
"#;

#[test]
fn a_server_that_is_killed_in_any_phase_takes_the_move_up_again_and_one_copy_serves() {
    let mut shop = Shop::open(SETTINGS);
    let mut at_a = true;
    for phase in ["plan", "start", "warm", "shift", "drain", "soak", "release"] {
        let to = if at_a { "host-b" } else { "host-a" };
        let id = kill_in_phase(&mut shop, to, phase);
        shop.server.start_again();
        let ended = shop.ended(&id);
        let state = ended["state"].as_str().expect("state");
        assert!(matches!(state, "succeeded" | "rolled_back" | "failed"), "killed in {phase}: {ended:#}");
        at_a = if state == "succeeded" { !at_a } else { at_a };
        assert_one_copy(&shop, phase, if at_a { "host-a" } else { "host-b" });
    }
}

/// Starts a move, waits until the stream of events tells of the phase, and kills the server at once.
fn kill_in_phase(shop: &mut Shop, to: &str, phase: &str) -> String {
    let mut listener = shop.server.spawn(&["events", "-f"]);
    let lines = BufReader::new(listener.stdout.take().expect("stdout")).lines();
    let id = shop.begin_move(to);
    for line in lines {
        let line = line.expect("the stream goes on");
        let event: Value = serde_json::from_str(&line).unwrap_or_else(|why| panic!("{why}: {line}"));
        let event = &event["event"];
        let this = event["move"] == id.as_str();
        if this && event["type"] == "move.phase" && event["data"]["phase"] == phase {
            break;
        }
        assert!(!(this && event["type"] == "move.done"), "the move ended before {phase}");
    }
    shop.server.kill();
    let _killed = listener.kill();
    let _gone = listener.wait();
    id
}

fn assert_one_copy(shop: &Shop, phase: &str, place: &str) {
    assert_eq!(shop.places(), [place], "killed in {phase}");
    wait_for("one process and no other", || (shop.server.pids_of("").len() == 1).then_some(()));
    let answer = http_get(shop.server.edge(), "/").expect("the edge answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "killed in {phase}: {answer}");
}
