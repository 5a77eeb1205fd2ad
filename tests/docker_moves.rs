//! The main promise on real engines: containers change hosts under load, and no request is lost.

use std::time::{Duration, Instant};

use crate::bad_input::{teaches, untouched};
use crate::moves::moved;
use crate::support::docker::{self, Engines};
use crate::support::server::Peregrine;
use crate::support::shop::Shop;
use crate::support::traffic::{Traffic, assert_nothing_lost, assert_rate_was_sent};

/// Requests per second over HTTP/1.1 and HTTP/2 together.
const REQUESTS_PER_SECOND: u32 = 2_000;
/// Traffic goes on for at least so long.
const LOAD_SECONDS: u64 = 60;
/// Moves while it does.
const MOVES: usize = 20;

#[test]
fn twenty_moves_between_two_docker_engines_at_2000_requests_per_second_lose_nothing() {
    if !docker::is_there() {
        return;
    }
    let engines = Engines::start();
    let server = Peregrine::start(&engines.configuration());
    let shop = Shop::closed(server);
    shop.deploy_image(&engines, "", &[], "");
    let begin = Instant::now();
    let traffic = Traffic::start(shop.server.edge(), REQUESTS_PER_SECOND);
    let mut transferred = Vec::new();
    for number in 0..MOVES {
        let ended = shop.move_to(if number % 2 == 0 { "host-b" } else { "host-a" });
        let moved = moved(&ended);
        assert_eq!(moved["state"], "succeeded", "move {number}: {moved:#}");
        transferred.push(moved["transferred_bytes"].as_u64().expect("bytes"));
    }
    let rest = Duration::from_secs(LOAD_SECONDS).saturating_sub(begin.elapsed());
    std::thread::park_timeout(rest);
    let summaries = traffic.stop();
    assert_eq!(shop.places(), ["host-a"]);
    assert_eq!(engines.containers(), 1, "one copy, and nothing orphaned");
    // The image is brought to host-b once, by a stream from host-a, and is there from then on.
    assert!(transferred[0] > 0 && transferred[1..].iter().all(|bytes| *bytes == 0), "{transferred:?}");
    shop.server.ok(&["services", "remove", "shop", "--yes"]);
    crate::support::wait_for("the last container to go", || (engines.containers() == 0).then_some(()));
    shop.runtime().block_on(shop.all_delivered());
    assert_nothing_lost(&summaries, &shop.records());
    assert_rate_was_sent(&summaries, REQUESTS_PER_SECOND);
}

#[test]
fn an_image_that_is_nowhere_is_told_with_what_to_do_and_the_version_that_runs_serves_on() {
    if !docker::is_there() {
        return;
    }
    let engines = Engines::start();
    let server = Peregrine::start(&engines.configuration());
    let shop = Shop::closed(server);
    shop.deploy_image(&engines, "", &[], "");
    let before = shop.instances()[0]["id"].clone();
    let manifest = shop.server.file(
        "missing.toml",
        "[service.shop]\nhosts = [\"*\"]\nimage = \"localhost:1/nothing:1\"\nport = 80\n",
    );
    let text = teaches(&shop.server.run(&["deploy", "-f", &manifest]), 9);
    assert!(text.contains("localhost:1/nothing:1"), "{text}");
    // The record of the copy that never was goes a moment after the end.
    crate::support::wait_for("the record to go", || (shop.places().len() == 1).then_some(()));
    untouched(&shop, "host-a");
    assert_eq!(shop.instances()[0]["id"], before, "the copy is the one that ran before");
    assert_eq!(engines.containers(), 1, "nothing is left of the attempt");
}
