//! Shares are exact: between pools to a handful of requests, inside a pool by weight.

use peregrine_routing::{Balance, HashKey, ServiceSpec, stable_hash};

use super::support::{World, pool, service};

const PICKS: usize = 100_000;

fn assert_within(count: usize, expected: f64, tolerance: f64, what: &str) {
    assert!((count as f64 - expected).abs() <= tolerance, "{what}: {count} picks, {expected} expected");
}

#[test]
fn pools_get_their_shares_within_one_percent_of_the_share_itself() {
    for weights in
        [[1, 99], [10, 90], [50, 50], [1, 1], [3, 7], [u32::MAX, u32::MAX], [1_000_000, 99_000_000]]
    {
        let pools = vec![pool("old", weights[0], &[0]), pool("new", weights[1], &[1])];
        let counts = World::of(service(pools)).picks(PICKS, 1);
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        for (count, weight) in counts.into_iter().zip(weights) {
            let expected = PICKS as f64 * f64::from(weight) / total;
            assert_within(count, expected, expected * 0.01, &format!("{weight} of {weights:?}"));
        }
    }
}

#[test]
fn a_pool_of_one_percent_gets_it_in_every_stretch_of_a_thousand() {
    let mut world = World::of(service(vec![pool("old", 99, &[0]), pool("new", 1, &[1])]));
    for stretch in 0..100 {
        let count = world.picks(1_000, 1)[1];
        assert!((8..=12).contains(&count), "{count} of 1,000 in stretch {stretch}");
    }
}

#[test]
fn shares_stay_exact_while_the_table_is_published_again_and_again() {
    let spec = || service(vec![pool("old", 90, &[0]), pool("new", 10, &[1, 2])]);
    let mut world = World::of(ServiceSpec { balance: Balance::RoundRobin, ..spec() });
    let mut counts = [0; 3];
    for _ in 0..PICKS / 10 {
        world.put(ServiceSpec { balance: Balance::RoundRobin, ..spec() });
        world.picks(10, 2).iter().zip(&mut counts).for_each(|(now, sum)| *sum += now);
    }
    assert_within(counts[0], 90_000.0, 900.0, "old");
    assert_within(counts[1], 5_000.0, 50.0, "one of the new");
    assert_within(counts[2], 5_000.0, 50.0, "other of the new");
}

#[test]
fn three_pools_and_one_of_weight_zero_get_what_they_should() {
    let pools = vec![pool("a", 1, &[0]), pool("off", 0, &[1]), pool("b", 2, &[2]), pool("c", 7, &[3])];
    let counts = World::of(service(pools)).picks(PICKS, 3);
    for (count, expected) in counts.into_iter().zip([10_000.0, 0.0, 20_000.0, 70_000.0]) {
        assert_within(count, expected, expected * 0.01, "pool");
    }
}

fn weighted(balance: Balance, pools: Vec<(u32, &[u32])>) -> ServiceSpec {
    let mut generation = 0;
    let pools = pools.into_iter().enumerate().map(|(i, (weight, members))| {
        let mut pool = pool(&format!("pool-{i}"), weight, &[]);
        for weight in members {
            pool.upstreams.push(super::support::upstream(generation));
            pool.upstreams.last_mut().expect("was pushed").weight = *weight;
            generation += 1;
        }
        pool
    });
    let pools = pools.collect();
    ServiceSpec { balance, ..service(pools) }
}

#[test]
fn members_of_an_idle_pool_get_their_weights_in_every_mode() {
    for balance in [
        Balance::RoundRobin,
        Balance::LeastInFlight,
        Balance::PeakEwma,
        Balance::ConsistentHash(HashKey::ClientAddress),
    ] {
        for weights in [&[1, 1, 1][..], &[3, 1], &[1, 2, 7], &[100, 300, 600], &[u32::MAX, u32::MAX]] {
            let mut world = World::of(weighted(balance.clone(), vec![(1, weights)]));
            let web = world.web();
            let mut counts = vec![0; weights.len()];
            for key in 0..PICKS as u64 {
                let hash = Some(stable_hash(&key.to_le_bytes()));
                let ask = peregrine_routing::Enter { hash, ..world.ask() };
                counts[web.enter(ask).expect("an upstream").upstream().generation().0 as usize] += 1;
            }
            let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            for (count, weight) in counts.into_iter().zip(weights) {
                let expected = PICKS as f64 * f64::from(*weight) / total;
                assert_within(count, expected, PICKS as f64 * 0.01, &format!("{balance:?} {weights:?}"));
            }
        }
    }
}

#[test]
fn round_robin_is_exact_inside_each_of_two_pools() {
    let spec = weighted(Balance::RoundRobin, vec![(99, &[1, 1, 1]), (1, &[1, 3])]);
    let counts = World::of(spec).picks(PICKS, 4);
    for (count, expected) in counts.into_iter().zip([33_000.0, 33_000.0, 33_000.0, 250.0, 750.0]) {
        assert_within(count, expected, f64::max(expected * 0.01, 2.5), "member");
    }
}

#[test]
fn round_robin_of_equal_members_goes_strictly_in_turn() {
    let mut world = World::of(weighted(Balance::RoundRobin, vec![(1, &[1, 1, 1])]));
    let mut seen: Vec<u64> = (0..6).map(|_| world.pick().expect("an upstream")).collect();
    assert_eq!(seen[..3], seen[3..]);
    seen.truncate(3);
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2]);
}

#[test]
fn a_changed_weight_of_a_kept_generation_counts_and_an_older_table_keeps_its_own() {
    let mut world = World::of(weighted(Balance::RoundRobin, vec![(1, &[1, 1])]));
    let older = world.web();
    world.put(weighted(Balance::RoundRobin, vec![(1, &[1, 3])]));
    assert_eq!(world.picks(4_000, 1), [1_000, 3_000]);
    let mut counts = [0; 2];
    for _ in 0..4_000 {
        let lease = older.enter(world.ask()).expect("an upstream");
        counts[lease.upstream().generation().0 as usize] += 1;
    }
    assert_eq!(counts, [2_000, 2_000]);
}

#[test]
fn the_share_of_an_unusable_member_goes_to_the_others_by_weight() {
    for balance in [Balance::RoundRobin, Balance::LeastInFlight] {
        let mut world = World::of(weighted(balance.clone(), vec![(1, &[1, 1, 2, 4])]));
        world.upstream(3).set_health(peregrine_routing::Health::Unhealthy, super::support::NOW_MS);
        let counts = world.picks(PICKS, 3);
        for (count, expected) in counts.into_iter().zip([25_000.0, 25_000.0, 50_000.0, 0.0]) {
            assert_within(count, expected, f64::min(expected, 1_000.0), &format!("{balance:?}"));
        }
    }
}

#[test]
fn a_pool_without_members_harms_nobody() {
    for balance in [Balance::RoundRobin, Balance::LeastInFlight, Balance::PeakEwma] {
        let spec = weighted(balance.clone(), vec![(50, &[]), (50, &[1])]);
        assert_eq!(World::of(spec).picks(100, 0), [100]);
        let mut empty = World::of(weighted(balance, vec![(1, &[])]));
        assert_eq!(empty.pick(), Err(peregrine_routing::NoUpstream::Empty));
    }
}
