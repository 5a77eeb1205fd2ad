//! Which copy is healthy decides the direction, not the error that happened.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::thread::JoinHandle;

use jiff::{SignedDuration, Timestamp};
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
/// Answers 500 before the traffic is off a copy that does badly: a second of all requests. The engine looks twice a
/// second, and cores keep away from the copy sooner; without a turn the steps alone would let four times as many pass.
const ANSWERED_BADLY: u64 = 300;
/// Longest time until nothing is sent to a copy that is dead: two of the engine's looks.
const SEEN_DEAD: SignedDuration = SignedDuration::from_secs(1);
/// Longest time until nothing is sent to a copy that does badly, on a loaded machine.
const SEEN_UNWELL: SignedDuration = SignedDuration::from_secs(2);

/// [`SLOW_STEPS`], and then so long a soak that there are readings behind the kill.
fn slow_steps_and_a_soak() -> String {
    format!("{SLOW_STEPS}soak = \"5s\"\n")
}

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
    let readings = Readings::listen(&shop);
    shop.kill_instance(&shop.instance_of(&id, "to"));
    let killed_at = Timestamp::now();
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "rolled_back", "{ended:#}");
    // It may be over before there is a reading: then what failed says it all.
    readings.end().assert_nothing_on("to", killed_at);
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
    let broken = shop.instance_of(&id, "to");
    shop.fault(&broken, r#"{"error_percent": 100, "healthy": false}"#);
    let broken_at = Timestamp::now();
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "rolled_back", "{ended:#}");
    assert!(ended["problem"]["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{ended:#}");
    assert_eq!(shop.places(), ["host-a"]);
    let watched = shop.server.run(&["moves", "watch", &id]);
    assert_eq!(watched.code, 10, "{watched:?}");
    // The broken copy answered 500 for a moment; nothing else went wrong, and all is well again.
    let mut failed = 0;
    for summary in traffic.stop() {
        assert_eq!(summary.failed.total(), summary.failed.non_2xx, "{:?}", summary.failures);
        failed += summary.failed.total();
    }
    assert!(failed <= ANSWERED_BADLY, "{failed} requests were answered by a broken copy");
    // It lived on, so its own log says when it was asked for the last time.
    let collected = shop.collected();
    let asked = collected.iter().filter(|one| *one.instance == *broken).map(|one| one.record.unix_ns);
    let last = Timestamp::from_nanosecond(asked.max().expect("it served before").into()).expect("a time");
    let late = last.duration_since(broken_at);
    assert!(late <= SEEN_UNWELL, "the broken copy was still asked {late:#} after it broke");
    assert_served_by_one(&shop);
}

fn old_killed_at(percent: u64) {
    let shop = Shop::open(&slow_steps_and_a_soak());
    let traffic = Traffic::start(shop.server.edge(), 300);
    let id = shop.begin_move("host-b");
    shop.at_weight(&id, percent);
    let readings = Readings::listen(&shop);
    shop.kill_instance(&shop.instance_of(&id, "from"));
    let killed_at = Timestamp::now();
    let ended = shop.ended(&id);
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let judged = readings.end().assert_nothing_on("from", killed_at);
    assert!(judged > 0, "the soak is long enough for a reading");
    assert_eq!(shop.places(), ["host-b"]);
    assert_few_failures(traffic);
    assert_served_by_one(&shop);
}

/// The stream of events, for the live readings in it.
struct Readings {
    listener: Child,
    reader: Option<JoinHandle<Vec<Value>>>,
}

/// Live readings of a move, in order.
struct Samples(Vec<Value>);

impl Readings {
    fn listen(shop: &Shop) -> Self {
        let mut listener = shop.server.listen();
        let lines = BufReader::new(listener.stdout.take().expect("stdout")).lines().map_while(Result::ok);
        let reader = std::thread::spawn(move || {
            // The last line may be cut off by the end of the listener.
            lines.filter_map(|line| serde_json::from_str(&line).ok()).collect()
        });
        Self { listener, reader: Some(reader) }
    }

    fn end(mut self) -> Samples {
        self.stop();
        let told = self.reader.take().expect("it reads").join().expect("it reads to the end");
        let samples = told.iter().map(|line| &line["event"]).filter(|event| event["type"] == "move.sample");
        Samples(samples.map(|event| event["data"].clone()).collect())
    }

    fn stop(&mut self) {
        let _killed = self.listener.kill();
        let _gone = self.listener.wait();
    }
}

impl Drop for Readings {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Samples {
    /// No reading shows traffic on the dead side once its death had to be seen. A reading is of the time since the one
    /// before, which therefore has to lie behind that moment. The number of readings that were looked at.
    #[track_caller]
    fn assert_nothing_on(&self, side: &str, killed_at: Timestamp) -> usize {
        let behind = |sample: &Value| {
            let at: Timestamp = sample["time"].as_str().expect("a time").parse().expect("RFC 3339");
            at.duration_since(killed_at) >= SEEN_DEAD
        };
        let judged = self.0.windows(2).filter(|pair| behind(&pair[0])).map(|pair| &pair[1]);
        let mut count = 0;
        for sample in judged {
            let dead = &sample[side];
            assert_eq!(dead["requests_per_s"].as_f64(), Some(0.0), "traffic on a dead copy: {sample:#}");
            assert_eq!(dead["in_flight"], 0, "somebody is inside of a dead copy: {sample:#}");
            count += 1;
        }
        count
    }
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
