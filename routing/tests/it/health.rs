//! Who is passed over, and what happens when nobody good is left.

use peregrine_routing::{Enter, Health, NoUpstream, Outcome, Passive, RetryBudget};

use super::support::{NOW_MS, World, pool, service, standby};

fn eject(world: &World, generation: u64, now_ms: u64) {
    let passive = Passive::default();
    let failed = Outcome::Failed(peregrine_routing::Failure::Connect);
    (0..passive.consecutive_failures)
        .for_each(|_| world.upstream(generation).record(failed, &passive, now_ms));
    assert!(!world.upstream(generation).is_usable(now_ms));
}

#[test]
fn unhealthy_and_ejected_upstreams_are_passed_over() {
    let mut world = World::of(service(vec![pool("main", 1, &[0, 1, 2])]));
    world.upstream(0).set_health(Health::Unhealthy, NOW_MS);
    eject(&world, 1, NOW_MS);
    assert_eq!(world.picks(1_000, 2), [0, 0, 1_000]);
    // An ejection ends by itself.
    let later = Enter { now_ms: NOW_MS + 5_000, ..world.ask() };
    let web = world.web();
    let picked = (0..1_000).filter(|_| {
        let ask = Enter { random: world.random(), ..later };
        web.enter(ask).expect("an upstream").upstream().generation().0 == 1
    });
    assert!(picked.count() > 400);
}

#[test]
fn the_last_one_is_never_ejected_and_when_all_are_bad_all_are_used() {
    let mut world = World::of(service(vec![pool("main", 1, &[0])]));
    eject(&world, 0, NOW_MS);
    assert_eq!(world.pick(), Ok(0));
    let mut world = World::of(service(vec![pool("old", 50, &[0]), pool("new", 50, &[1])]));
    eject(&world, 0, NOW_MS);
    world.upstream(1).set_health(Health::Unhealthy, NOW_MS);
    let counts = world.picks(1_000, 1);
    assert!(counts.iter().all(|count| (490..=510).contains(count)), "by their shares: {counts:?}");
}

#[test]
fn a_request_that_has_tried_every_good_one_tries_a_bad_one() {
    let mut world = World::of(service(vec![pool("main", 1, &[0, 1])]));
    world.upstream(1).set_health(Health::Unhealthy, NOW_MS);
    let tried = [peregrine_routing::Generation(0)];
    let ask = Enter { tried: &tried, ..world.ask() };
    assert_eq!(world.pick_with(ask), Ok(1));
}

#[test]
fn another_weighted_pool_takes_over_from_one_without_a_usable_member() {
    let mut world =
        World::of(service(vec![pool("old", 99, &[0]), pool("new", 1, &[1]), standby("back", &[2])]));
    world.upstream(0).set_health(Health::Unhealthy, NOW_MS);
    assert_eq!(world.picks(1_000, 2), [0, 1_000, 0]);
}

#[test]
fn standby_takes_over_only_when_no_weighted_pool_can_and_gives_back() {
    let mut world = World::of(service(vec![pool("new", 100, &[0, 1]), standby("old", &[2])]));
    world.upstream(0).set_health(Health::Unhealthy, NOW_MS);
    assert_eq!(world.picks(1_000, 2), [0, 1_000, 0]);
    world.upstream(1).set_health(Health::Unhealthy, NOW_MS);
    assert_eq!(world.picks(1_000, 2), [0, 0, 1_000]);
    world.upstream(0).set_health(Health::Healthy, NOW_MS);
    assert_eq!(world.picks(1_000, 2), [1_000, 0, 0]);
    // When standby is no better, the panic rule is for the weighted ones.
    world.upstream(0).set_health(Health::Unhealthy, NOW_MS);
    world.upstream(2).set_health(Health::Unhealthy, NOW_MS);
    assert_eq!(world.picks(1_000, 2)[2], 0);
}

#[test]
fn a_warming_pool_gets_nothing_even_when_everything_else_has_failed() {
    let mut world = World::of(service(vec![pool("old", 100, &[0]), pool("new", 0, &[1])]));
    world.upstream(0).set_health(Health::Unhealthy, NOW_MS);
    world.upstream(1).set_health(Health::Healthy, NOW_MS);
    assert_eq!(world.picks(1_000, 1), [1_000, 0]);
    // Not for a retry, nor after the old copy was retired: what writes must not write twice.
    let tried = [peregrine_routing::Generation(0)];
    let ask = Enter { tried: &tried, ..world.ask() };
    assert_eq!(world.pick_with(ask), Err(NoUpstream::Exhausted));
    world.upstream(0).retire();
    assert_eq!(world.pick(), Err(NoUpstream::Exhausted));
}

#[test]
fn the_retry_budget_outlives_a_publication() {
    let mut world = World::of(service(vec![pool("main", 1, &[0])]));
    while world.web().retry_budget().spend(NOW_MS) {}
    world.put(service(vec![pool("main", 1, &[0, 1])]));
    assert!(!world.web().retry_budget().spend(NOW_MS), "a move is no way to retry without end");
    for _ in 0..5 {
        world.web().retry_budget().earn();
    }
    assert!(world.web().retry_budget().spend(NOW_MS), "five requests pay for one retry");
    assert!(!world.web().retry_budget().spend(NOW_MS));
}

#[test]
fn the_retry_budget_gives_ten_a_second_and_saves_no_more_than_a_hundred() {
    let budget = RetryBudget::default();
    let spend_all = |now_ms| (0..1_000).filter(|_| budget.spend(now_ms)).count();
    spend_all(NOW_MS);
    assert_eq!(spend_all(NOW_MS + 1_000), 10);
    assert_eq!(spend_all(NOW_MS + 1_500), 5);
    assert_eq!(spend_all(NOW_MS + 3_600_000), 100);
}
