//! What each way of balancing is for.

use std::collections::HashMap;

use peregrine_routing::{
    Balance, Enter, HashKey, Health, Lease, NoUpstream, Outcome, Passive, ServicePolicy, ServiceSpec,
    stable_hash,
};

use super::support::{NOW_MS, World, pool, service};

fn one_pool(balance: Balance, generations: &[u64]) -> World {
    World::of(ServiceSpec { balance, ..service(vec![pool("main", 1, generations)]) })
}

#[test]
fn least_in_flight_of_two_always_takes_the_idle_one() {
    let mut world = one_pool(Balance::LeastInFlight, &[0, 1]);
    let _busy = world.upstream(0).enter(peregrine_routing::TrafficClass::Request).expect("is open");
    assert_eq!(world.picks(10_000, 1), [0, 10_000]);
}

#[test]
fn least_in_flight_of_many_never_takes_the_busiest_while_it_draws_two() {
    let mut world = one_pool(Balance::LeastInFlight, &[0, 1, 2, 3, 4]);
    let _busy = world.upstream(3).enter(peregrine_routing::TrafficClass::WebSocket).expect("is open");
    assert_eq!(world.picks(10_000, 4)[3], 0);
}

#[test]
fn least_in_flight_fills_unequal_members_in_proportion() {
    let mut spec = service(vec![pool("main", 1, &[0, 1])]);
    spec.pools[0].upstreams[1].weight = 3;
    let mut world = World::of(spec);
    let web = world.web();
    let leases: Vec<Lease> = (0..400).map(|_| web.enter(world.ask()).expect("an upstream")).collect();
    let first = world.upstream(0).in_flight();
    assert!((98..=102).contains(&first), "{first} of {} are on the small one", leases.len());
}

#[test]
fn peak_ewma_avoids_the_slow_one_and_comes_back_when_it_is_quick_again() {
    let mut world = one_pool(Balance::PeakEwma, &[0, 1]);
    let answer = |world: &World, generation, latency_us, now_ms| {
        let outcome = Outcome::Response { status: 200, latency_us };
        world.upstream(generation).record(outcome, &Passive::default(), now_ms);
    };
    answer(&world, 0, 200_000, NOW_MS);
    answer(&world, 1, 2_000, NOW_MS);
    assert_eq!(world.picks(10_000, 1), [0, 10_000]);
    // Its estimate fades, so that it is tried again; the one that serves keeps being measured.
    let later_ms = NOW_MS + 60_000;
    answer(&world, 1, 2_000, later_ms);
    let ask = Enter { now_ms: later_ms, ..world.ask() };
    assert_eq!(world.pick_with(ask), Ok(0));
}

#[test]
fn peak_ewma_draws_nothing_special_to_a_member_that_has_never_answered() {
    let mut world = one_pool(Balance::PeakEwma, &[0, 1]);
    world.upstream(0).record(
        Outcome::Response { status: 200, latency_us: 5_000 },
        &Passive::default(),
        NOW_MS,
    );
    let share = world.picks(10_000, 1)[1];
    assert!((4_500..=5_500).contains(&share), "{share} of 10,000 go to the unknown one");
    let _busy = world.upstream(1).enter(peregrine_routing::TrafficClass::Request).expect("is open");
    assert_eq!(world.picks(10_000, 1), [10_000, 0]);
}

fn homes(world: &mut World, keys: u64) -> HashMap<u64, u64> {
    let keys = 0..keys;
    keys.map(|key| {
        let ask = Enter { hash: Some(stable_hash(&key.to_le_bytes())), ..world.ask() };
        (key, world.pick_with(ask).expect("an upstream"))
    })
    .collect()
}

#[test]
fn a_consistent_hash_moves_only_the_keys_of_the_member_that_leaves() {
    const KEYS: u64 = 20_000;
    let hashed = |generations: &[u64]| {
        let balance = Balance::ConsistentHash(HashKey::Header("x-user".into()));
        ServiceSpec { balance, ..service(vec![pool("main", 1, generations)]) }
    };
    let members: Vec<u64> = (0..10).collect();
    let mut world = World::of(hashed(&members));
    let before = homes(&mut world, KEYS);
    assert_eq!(before, homes(&mut world, KEYS), "the same key, the same home");
    world.put(hashed(&members[..9]));
    let after = homes(&mut world, KEYS);
    let moved = before.iter().filter(|(key, home)| after[*key] != **home).count();
    assert!(before.iter().all(|(key, home)| *home == 9 || after[key] == *home));
    let most = (KEYS as f64 * 1.3 / members.len() as f64) as usize;
    assert!(moved > 0 && moved <= most, "{moved} of {KEYS} keys moved, {most} may");
}

#[test]
fn a_key_whose_home_is_unhealthy_goes_elsewhere_and_comes_home() {
    let balance = Balance::ConsistentHash(HashKey::Cookie("user".into()));
    let mut world = one_pool(balance, &[0, 1, 2]);
    let before = homes(&mut world, 3_000);
    world.upstream(1).set_health(Health::Unhealthy, NOW_MS);
    let during = homes(&mut world, 3_000);
    assert!(during.iter().all(|(key, home)| *home != 1 && (before[key] == 1 || before[key] == *home)));
    world.upstream(1).set_health(Health::Healthy, NOW_MS);
    assert_eq!(homes(&mut world, 3_000), before);
}

#[test]
fn a_request_without_the_key_is_balanced_all_the_same() {
    let mut world = one_pool(Balance::ConsistentHash(HashKey::Header("x-user".into())), &[0, 1]);
    let counts = world.picks(10_000, 1);
    assert!(counts.iter().all(|count| (4_700..=5_300).contains(count)), "{counts:?}");
}

#[test]
fn slow_start_ramps_a_member_up_in_every_mode_that_can() {
    for balance in [Balance::RoundRobin, Balance::LeastInFlight, Balance::PeakEwma] {
        let policy = ServicePolicy { slow_start_ms: 10_000, ..ServicePolicy::default() };
        let spec =
            ServiceSpec { balance: balance.clone(), policy, ..service(vec![pool("main", 1, &[0, 1])]) };
        let mut world = World::of(spec);
        world.upstream(1).set_health(Health::Healthy, NOW_MS);
        let mut shares = Vec::new();
        for after_ms in [0, 2_500, 5_000, 10_000] {
            let web = world.web();
            let picked = (0..20_000).filter(|_| {
                let ask = Enter { now_ms: NOW_MS + after_ms, ..world.ask() };
                web.enter(ask).expect("an upstream").upstream().generation().0 == 1
            });
            shares.push(picked.count() as f64 / 20_000.0);
        }
        // The share of a weight w beside a weight of 1 is w / (1 + w).
        for (share, weight) in shares.iter().zip([0.1, 0.25, 0.5, 1.0]) {
            let expected = weight / (1.0 + weight);
            assert!((share - expected).abs() < 0.012, "{balance:?}: {shares:?}, {expected} expected");
        }
    }
}

#[test]
fn what_was_tried_is_not_tried_again_and_the_end_is_told() {
    let mut world = one_pool(Balance::LeastInFlight, &[0, 1, 2]);
    let mut tried = Vec::new();
    for _ in 0..3 {
        let lease = world.web().enter(Enter { tried: &tried, ..world.ask() }).expect("one is left");
        assert!(!tried.contains(&lease.upstream().generation()));
        tried.push(lease.upstream().generation());
    }
    let end = world.web().enter(Enter { tried: &tried, ..world.ask() }).map(drop);
    assert_eq!(end, Err(NoUpstream::Exhausted));
}
