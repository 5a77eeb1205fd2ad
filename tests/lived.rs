//! Clients that stay: WebSockets, event streams, calls, slow downloads and slow uploads while their service moves, and
//! while everything else changes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peregrine_api::client::{Client, ClientConfig, PutService};
use peregrine_bench::collector::Collected;
use peregrine_bench::origin::{Origin, OriginOptions};
use serde_json::{Value, json};

use crate::support::server::{Peregrine, http};
use crate::support::shop::{Shop, TWO_HOSTS, id_of};
use crate::support::stayers::{Counts, Kind, Shared, Stayers};
use crate::support::{origin_program, wait_for};

const COUNTS: Counts = Counts { websockets: 100, events: 50, calls: 10, transfers: 20 };
/// While all of them are there.
const MOVES: u64 = 4;
/// Of other services.
const UNRELATED_CHANGES: usize = 200;
/// What has gone on for so long is no request any more, but a transfer or a stream.
const LONG_AFTER: Duration = Duration::from_millis(10_000);

/// Short deadlines for whoever can come back; transfers have the ten minutes that they have by themselves.
const SETTINGS: &str = r#"
move.steps = [50, 100]
move.step_hold = "30ms"
move.step_max = "100ms"
move.warm = { probes = 2, interval = "20ms" }
move.abort_on = { p95_increase = false }
move.drain = { websocket = "600ms", sse = "300ms", grpc_stream = "300ms" }
"#;

fn deploy_calls(shop: &Shop) {
    let manifest = format!(
        r#"
[service.calls]
hosts = ["calls.test"]
protocol = "h2c"
command = ["{}", "origin", "--listen", "{{host}}:{{port}}"]
health = {{ path = "/healthz", interval = "200ms" }}
env = {{ ORIGIN_RECORD = "tcp://127.0.0.1:{}" }}
{SETTINGS}
"#,
        origin_program().display(),
        shop.collector_port()
    );
    let manifest = shop.server.file("calls.toml", &manifest);
    shop.server.ok(&["deploy", "-f", &manifest, "--machine", "host-a"]);
}

#[test]
fn who_stays_loses_nothing_over_moves_of_its_service_and_notices_no_change_of_another() {
    let shop = Shop::closed(Peregrine::start(TWO_HOSTS));
    shop.deploy(&[], SETTINGS);
    deploy_calls(&shop);
    let begun = Instant::now();
    let stayers = Stayers::come(shop.server.edge(), COUNTS);
    unrelated_changes(&shop, &stayers);
    // From here on it is a matter of time, and of nothing else, what class they are of.
    let long = LONG_AFTER + Duration::from_millis(500);
    wait_for("them to have been there for long", || (begun.elapsed() >= long).then_some(()));
    let calls = id_of(&shop.server.ok(&["move", "calls", "--to", "host-b", "--detach"]));
    let mut copies: Vec<String> = (0..MOVES).map(|number| move_under_all(&shop, &stayers, number)).collect();
    copies.push(shop.instances()[0]["id"].as_str().expect("an id").to_owned());
    let calls = shop.ended(&calls);
    assert_eq!(calls["state"], "succeeded", "{calls:#}");
    let called = assert_old_copy(&shop, &calls, &[("soft_closed", "grpc_stream", COUNTS.calls)]);
    stayers.shared.calls.wait_opened(2 * COUNTS.calls);
    stayers.assert_well();
    let seen = stayers.leave();
    closes_reached_the_origins(&shop);
    assert_executed(&shop, &copies, &called);
    assert_ends(&seen);
}

/// What the clients have seen, as a table for people.
fn assert_ends(seen: &Shared) {
    println!("| over {MOVES} moves, with all of them open | tried | survived | lost |\n|---|---:|---:|---:|");
    for (what, kind, count) in [
        ("WebSockets: 1012 behind a whole frame, both ways", &seen.websockets, MOVES * COUNTS.websockets),
        ("event streams: ended behind a whole event", &seen.events, MOVES * COUNTS.events),
        ("gRPC streams: `UNAVAILABLE` (one move)", &seen.calls, COUNTS.calls),
        (
            "slow downloads and uploads: whole, byte for byte",
            &seen.transfers,
            (MOVES + 1) * 2 * COUNTS.transfers,
        ),
    ] {
        assert_eq!(kind.ended(), count, "{what}");
        println!("| {what} | {count} | {count} | 0 |");
    }
    println!("| changes of other services: nothing ended | {UNRELATED_CHANGES} | {UNRELATED_CHANGES} | 0 |");
}

/// One move of the shop, with everybody inside from before its beginning to the drain. The copy that left.
fn move_under_all(shop: &Shop, stayers: &Stayers, number: u64) -> String {
    let shared = &stayers.shared;
    // Whose head is on its way only may come to the new copy as well.
    wait_for("every upload to be inside", || {
        let inside = shop.records().iter().filter(|record| is_upload(&record.id, number)).count() as u64;
        (inside == COUNTS.transfers).then_some(())
    });
    let id = shop.begin_move(if number.is_multiple_of(2) { "host-b" } else { "host-a" });
    wait_for("the drain", || (shop.the_move(&id)["phase"] == "drain").then_some(()));
    stayers.assert_well();
    assert_eq!(shared.transfers.ended(), number * 2 * COUNTS.transfers, "none has come to its end by itself");
    shared.finish_transfers(number);
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "succeeded", "move {number}: {ended:#}");
    let transfers = ("completed", if number == 0 { "transfer" } else { "either" }, 2 * COUNTS.transfers);
    let streams =
        [("soft_closed", "websocket", COUNTS.websockets), ("soft_closed", "sse", COUNTS.events), transfers];
    let left = assert_old_copy(shop, &ended, &streams);
    // They come back, to the new copy: each looks at that itself.
    shared.websockets.wait_opened((number + 2) * COUNTS.websockets);
    shared.events.wait_opened((number + 2) * COUNTS.events);
    shared.transfers.wait_opened((number + 2) * 2 * COUNTS.transfers);
    stayers.assert_well();
    for (what, kind, count) in [
        ("WebSockets", &shared.websockets, COUNTS.websockets),
        ("event streams", &shared.events, COUNTS.events),
        ("transfers", &shared.transfers, 2 * COUNTS.transfers),
    ] {
        assert_eq!(kind.ended(), (number + 1) * count, "{what}: as the receipt has them");
    }
    left
}

fn is_upload(id: &str, round: u64) -> bool {
    id.starts_with("up-") && id.ends_with(&format!("-{round}"))
}

/// The old copy's part of the receipt: these counts by class, nothing else, and nothing cut. Its id.
fn assert_old_copy(shop: &Shop, moved: &Value, expected: &[(&str, &str, u64)]) -> String {
    let receipt = shop.server.ok(&["moves", "receipt", moved["id"].as_str().expect("id")]);
    assert_eq!((&receipt["failed"], &receipt["hard_cut"]), (&json!(0), &json!([])), "{receipt:#}");
    let instances = receipt["instances"].as_array().expect("instances");
    let old = instances.iter().find(|instance| instance["new"] == false).expect("the old copy");
    assert_eq!(old["drained"], true, "{receipt:#}");
    let mut total = 0;
    for (end, class, count) in expected {
        let of = |class: &str| old[*end][class].as_u64().expect("a count");
        let counted = if *class == "either" { of("request") + of("transfer") } else { of(class) };
        assert_eq!(counted, *count, "{end} {class}: {old:#}");
        total += counted;
    }
    let all: u64 = ["completed", "soft_closed"]
        .iter()
        .flat_map(|end| old[*end].as_object().expect("classes").values())
        .map(|count| count.as_u64().expect("a count"))
        .sum();
    assert_eq!(all, total, "nobody else: {old:#}");
    old["instance"].as_str().expect("an id").to_owned()
}

/// The origins' own account: who was inside of which copy, and each once.
fn assert_executed(shop: &Shop, copies: &[String], called: &str) {
    let mut executed: HashMap<(Arc<str>, String, usize), u64> = HashMap::new();
    let mut ids = HashSet::new();
    for Collected { instance, record } in shop.collected() {
        if record.method.as_str() == "CLOSE" {
            continue;
        }
        assert!(ids.insert(record.id.clone()), "{} was executed twice", record.id);
        let parts: Vec<&str> = record.id.split('-').collect();
        let [kind, _, round] = parts[..] else { panic!("whose is {}?", record.id) };
        *executed.entry((instance, kind.to_owned(), round.parse().expect("a round"))).or_default() += 1;
    }
    for (round, copy) in copies.iter().enumerate() {
        for (kind, count) in [
            ("ws", COUNTS.websockets),
            ("sse", COUNTS.events),
            ("down", COUNTS.transfers),
            ("up", COUNTS.transfers),
        ] {
            let here = executed.remove(&(copy.as_str().into(), kind.to_owned(), round));
            assert_eq!(here, Some(count), "{kind} of round {round} at {copy}");
        }
    }
    assert_eq!(executed.remove(&(called.into(), "call".to_owned(), 0)), Some(COUNTS.calls));
    assert_eq!(executed.values().sum::<u64>(), COUNTS.calls, "the calls after their move: {executed:?}");
}

/// The edge closes in both directions: every origin has read whole frames to the last, and that was a close.
fn closes_reached_the_origins(shop: &Shop) {
    let ends = |code: u16| {
        let closes = shop.records().into_iter().filter(|record| record.method.as_str() == "CLOSE");
        closes.filter(|record| record.status == code).count() as u64
    };
    wait_for("the last close", || (ends(1000) == COUNTS.websockets).then_some(()));
    assert_eq!(ends(1012), MOVES * COUNTS.websockets, "closed by the edge");
    let all = shop.records().iter().filter(|record| record.method.as_str() == "CLOSE").count() as u64;
    assert_eq!(all, (MOVES + 1) * COUNTS.websockets, "and none in another way");
}

/// Changes of upstreams, weights, hosts and paths of other services, by the API and by the configuration.
fn unrelated_changes(shop: &Shop, stayers: &Stayers) {
    let shared = &stayers.shared;
    let kinds = [&shared.websockets, &shared.events, &shared.calls, &shared.transfers];
    assert_eq!(kinds.map(Kind::ended), [0; 4]);
    let before = kinds.map(Kind::progress);
    let origins = shop.runtime().block_on(async {
        let mut origins = Vec::new();
        for name in ["one", "other"] {
            origins.push(Origin::bind(OriginOptions::named(name)).await.expect("an origin"));
        }
        let addresses: Vec<String> = origins.iter().map(|origin| origin.addr().to_string()).collect();
        let config = ClientConfig::new(format!("http://{}", shop.server.api()), Some(shop.server.token()));
        let api = Client::new(&config).expect("a client");
        for number in 0..UNRELATED_CHANGES {
            change(shop, &api, &addresses, number).await;
        }
        origins
    });
    let last = format!("conf{}.test", UNRELATED_CHANGES - CHANGES_BY_KIND);
    wait_for("the last configuration to hold", || {
        let ask = format!("GET / HTTP/1.1\r\nhost: {last}\r\nconnection: close\r\n\r\n");
        // Of one of our origins, and not of the shop, which takes every host.
        http(shop.server.edge(), &ask)
            .filter(|answer| answer.contains("<b>one</b>") || answer.contains("<b>other</b>"))
    });
    drop(origins);
    stayers.assert_well();
    assert_eq!(kinds.map(Kind::ended), [0; 4], "a change of one service ends nothing of another");
    for (kind, before) in kinds.into_iter().zip(before) {
        wait_for("everything to go on", || (kind.progress() > before + 100).then_some(()));
    }
}

/// Each change is one of so many kinds.
const CHANGES_BY_KIND: usize = 5;

async fn change(shop: &Shop, api: &Client, addresses: &[String], number: usize) {
    let round = number / CHANGES_BY_KIND;
    let name = format!("other-{}", round % 7);
    let (mut hosts, mut weights) = (vec![format!("{name}.test")], [1, 1]);
    let mut upstreams = addresses.to_vec();
    match number % CHANGES_BY_KIND {
        0 if number > 0 => {
            let settings = format!(
                "{TWO_HOSTS}\n[service.conf]\nhosts = [\"conf{number}.test\"]\nupstreams = [\"{}\"]\n",
                addresses[round % 2]
            );
            shop.server.configure(&settings);
            shop.server.reload();
            return;
        }
        1 => drop(upstreams.remove(round % 2)),
        2 => weights = [1 + u32::try_from(round).expect("small"), 1],
        3 => hosts.push(format!("more-{round}.test")),
        _ => {
            drop(api.remove_service(&name, Some(5_000)).await); // it may not be there yet
        }
    }
    let upstreams: Vec<Value> = upstreams
        .iter()
        .zip(weights)
        .map(|(address, weight)| json!({"address": address, "weight": weight}))
        .collect();
    let routes: Vec<Value> = hosts.iter().map(|host| json!({"host": host, "path": "/"})).collect();
    let spec = json!({
        "name": name,
        "routes": routes,
        "workload": {"kind": "fixed", "upstreams": upstreams},
        "health": {"probe": "none"},
        "traffic": {"protocol": "http1"},
    });
    let spec = serde_json::from_value(spec).expect("a service");
    api.put_service(&spec, &PutService::default()).await.expect("the service is changed");
}
