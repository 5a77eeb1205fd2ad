//! kill -9 of the server in each phase of a move: it is taken up again, ends, and leaves one copy. With plain processes
//! and with Docker; the latter also shows what a container is given and that the log does not tell its secrets.

use std::io::{BufRead, BufReader};

use serde_json::Value;

use crate::support::docker::{self, Engines};
use crate::support::server::{Peregrine, http_get};
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

/// A value of the environment, which nothing may print.
const SECRET: &str = "hunter2-never-to-be-seen";

#[test]
fn a_server_that_is_killed_in_any_phase_takes_the_move_up_again_and_one_copy_serves() {
    let mut shop = Shop::open(SETTINGS);
    let mut at_a = true;
    for phase in ["plan", "start", "warm", "shift", "drain", "soak", "release"] {
        at_a = killed_and_taken_up_again(&mut shop, at_a, phase);
        wait_for("one process and no other", || (shop.server.pids_of("").len() == 1).then_some(()));
    }
}

#[test]
fn a_server_that_is_killed_while_a_container_moves_takes_the_move_up_again_and_leaves_no_orphan() {
    if !docker::is_there() {
        return;
    }
    let engines = Engines::start();
    let levels = "debug,bollard=trace,bollard::docker=trace";
    let mut shop = Shop::closed(Peregrine::start_logging(&engines.configuration(), levels));
    let capabilities = "capabilities = [\"SETUID\", \"SETGID\"]";
    shop.deploy_image(&engines, capabilities, &[("TOKEN", SECRET)], SETTINGS);
    let mut at_a = true;
    for phase in ["prepare", "start", "shift", "release"] {
        at_a = killed_and_taken_up_again(&mut shop, at_a, phase);
        wait_for("one container and no other", || (engines.containers() == 1).then_some(()));
    }
    let shown = shop.server.ok(&["services", "show", "shop"]);
    let named = serde_json::json!(["SETGID", "SETUID"]);
    assert_eq!(shown["service"]["spec"]["workload"]["capabilities"], named, "{shown:#}");
    let given = engines.inspect("{{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}}");
    let forms = ["[ALL] [SETGID SETUID]", "[ALL] [CAP_SETGID CAP_SETUID]"]; // engines differ in the prefix
    assert!(forms.contains(&given[0].as_str()), "{given:?}");
    assert!(engines.inspect("{{.Config.Env}}")[0].contains(SECRET), "the container has its environment");
    let log = shop.server.log_text();
    assert!(log.contains("DEBUG") && !log.contains(SECRET), "the log tells a value of an environment");
    shop.server.ok(&["services", "remove", "shop", "--yes"]);
    wait_for("the last container to go", || (engines.containers() == 0).then_some(()));
}

/// Moves the shop to the other host, kills the server in this phase and starts it again; whether the shop is on host-a.
fn killed_and_taken_up_again(shop: &mut Shop, at_a: bool, phase: &str) -> bool {
    let id = kill_in_phase(shop, if at_a { "host-b" } else { "host-a" }, phase);
    shop.server.start_again();
    let ended = shop.ended(&id);
    let state = ended["state"].as_str().expect("state");
    assert!(matches!(state, "succeeded" | "rolled_back" | "failed"), "killed in {phase}: {ended:#}");
    let at_a = if state == "succeeded" { !at_a } else { at_a };
    assert_eq!(shop.places(), [if at_a { "host-a" } else { "host-b" }], "killed in {phase}");
    let answer = http_get(shop.server.edge(), "/").expect("the edge answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "killed in {phase}: {answer}");
    at_a
}

/// Starts a move, waits until the stream of events tells of the phase, and kills the server at once.
fn kill_in_phase(shop: &mut Shop, to: &str, phase: &str) -> String {
    let mut listener = shop.server.listen();
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
