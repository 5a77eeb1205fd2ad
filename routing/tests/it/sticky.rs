//! Stickiness is a preference and never a pin.

use peregrine_routing::{Enter, Health, Upstream};

use super::support::{NOW_MS, World, pool, service, standby};

fn picks_with(world: &mut World, prefer: u64) -> Vec<u64> {
    let ask = |world: &mut World| Enter { prefer: Some(prefer), ..world.ask() };
    (0..200)
        .map(|_| {
            let ask = ask(world);
            world.pick_with(ask).expect("an upstream")
        })
        .collect()
}

fn key(upstream: &Upstream) -> u64 {
    upstream.sticky_key()
}

#[test]
fn a_preferred_upstream_is_taken_whatever_the_turn_and_the_load() {
    let mut world = World::of(service(vec![pool("a", 99, &[0, 1]), pool("b", 1, &[2])]));
    let _busy = world.upstream(2).enter(peregrine_routing::TrafficClass::Request).expect("is open");
    let prefer = key(world.upstream(2));
    assert!(picks_with(&mut world, prefer).iter().all(|generation| *generation == 2));
}

#[test]
fn a_preference_that_nobody_has_is_ignored() {
    let mut world = World::of(service(vec![pool("main", 1, &[0, 1])]));
    let picked = picks_with(&mut world, 4711);
    assert!(picked.contains(&0) && picked.contains(&1));
}

#[test]
fn a_retired_generation_is_not_preferred_by_any_table() {
    let mut world = World::of(service(vec![pool("main", 1, &[0, 1])]));
    let (prefer, older) = (key(world.upstream(0)), world.web());
    world.put(service(vec![pool("main", 1, &[1])]));
    assert!(picks_with(&mut world, prefer).iter().all(|generation| *generation == 1));
    let lease = older.enter(Enter { prefer: Some(prefer), ..world.ask() }).expect("an upstream");
    assert_eq!(lease.upstream().generation().0, 1, "by the older table too");
}

#[test]
fn an_unusable_upstream_or_one_that_was_tried_is_not_preferred() {
    let mut world = World::of(service(vec![pool("main", 1, &[0, 1])]));
    let prefer = key(world.upstream(0));
    let tried = [peregrine_routing::Generation(0)];
    let ask = Enter { prefer: Some(prefer), tried: &tried, ..world.ask() };
    assert_eq!(world.pick_with(ask), Ok(1));
    world.upstream(0).set_health(Health::Unhealthy, NOW_MS);
    assert!(picks_with(&mut world, prefer).iter().all(|generation| *generation == 1));
}

#[test]
fn an_upstream_in_a_pool_without_a_share_is_not_preferred() {
    let mut world =
        World::of(service(vec![pool("new", 100, &[0]), standby("old", &[1]), pool("warm", 0, &[2])]));
    for other in [1, 2] {
        let prefer = key(world.upstream(other));
        assert!(picks_with(&mut world, prefer).iter().all(|generation| *generation == 0));
    }
}

#[test]
fn a_copy_that_comes_back_under_a_new_generation_is_found_by_its_old_cookie() {
    let mut world = World::of(service(vec![pool("main", 1, &[0, 1])]));
    let prefer = key(world.upstream(0));
    world.put(service(vec![pool("main", 1, &[1])]));
    let mut spec = service(vec![pool("main", 1, &[1, 2])]);
    spec.pools[0].upstreams[1].name = "copy-0".into();
    world.put(spec);
    assert!(picks_with(&mut world, prefer).iter().all(|generation| *generation == 2));
}
