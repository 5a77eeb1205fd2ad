//! An authority in all kinds of trouble.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use peregrine_certs::{BudgetLimit, MemoryVault};

use crate::support::badca::{BREAKS, BadCa, Break, RESOURCES, Resource};
use crate::support::pebble::{Pebble, PebbleOptions, ca, find};
use crate::support::{Running, World, config};

const HOUR_MS: i64 = 3_600_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_of_twenty_names_get_certificates_although_60_percent_of_nonces_are_refused() {
    let options = PebbleOptions { refused_nonces_percent: 60, ..PebbleOptions::default() };
    let Some(world) = World::start(options).await else { return };
    let running = world.manager(world.config(), Arc::new(MemoryVault::new())).await;
    let names: Vec<String> = (0..20).map(|n| format!("shop{n}.example.com")).collect();
    for name in &names {
        world.dns.a(name, "127.0.0.1");
        running.manager.add(name).await.unwrap();
    }
    for name in &names {
        let view = running.until_valid(name).await;
        assert_eq!(view.failures, 0, "{name}");
    }
    assert_eq!((world.pebble.orders(), world.pebble.issued()), (20, 20));
}

/// One authority, every resource, everything that can come instead of an answer: a certificate comes of it, and a second order
/// only where the first one's address was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_an_authority_answers_instead_the_order_goes_on_and_none_is_made_twice() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let world = &world;
    let mut cases = Vec::new();
    for resource in RESOURCES {
        for how in BREAKS {
            cases.push(async move {
                let name = format!("{resource:?}-{how:?}.example.com").to_ascii_lowercase();
                world.dns.a(&name, "127.0.0.1");
                let bad = BadCa::before(&world.pebble).await;
                let authority = ca("bad", bad.directory(), &bad.root_pem);
                let running =
                    world.manager(config(&world.dns, vec![authority]), Arc::new(MemoryVault::new())).await;
                bad.break_next(resource, how, 1);
                running.manager.add(&name).await.unwrap();
                running.until_valid(&name).await;
                assert!(bad.is_done(), "{name}: nothing was broken");
                let lost = resource == Resource::NewOrder && how == Break::AnswerLost;
                assert_eq!(bad.fulfilled(Resource::NewOrder), if lost { 2 } else { 1 }, "{name}: orders");
                assert_eq!(bad.fulfilled(Resource::Finalize), 1, "{name}: certificates that were asked for");
            });
        }
    }
    let count = cases.len();
    futures_util::future::join_all(cases).await;
    assert_eq!(world.pebble.issued(), count);
}

#[tokio::test]
async fn an_order_that_stays_in_processing_is_waited_for_and_is_told() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let name = "slow.example.com";
    world.dns.a(name, "127.0.0.1");
    let bad = BadCa::before(&world.pebble).await;
    let mut config = config(&world.dns, vec![ca("bad", bad.directory(), &bad.root_pem)]);
    // One attempt is shorter than the authority's time: the order goes on in later ones.
    config.limits.poll_patience_ms = 100;
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    bad.break_next(Resource::Finalize, Break::Processing, 1);
    bad.break_next(Resource::Order, Break::Processing, 4);
    running.manager.add(name).await.unwrap();
    let view = running.until(name, |view| view.state.to_string().contains("still issuing")).await;
    assert_eq!(view.state.to_string(), "ordering (bad is still issuing)");
    running.until_valid(name).await;
    assert_eq!(bad.fulfilled(Resource::NewOrder), 1);
    assert_eq!(bad.fulfilled(Resource::Finalize), 1);
}

#[tokio::test]
async fn retry_after_of_429_is_kept_to_and_told() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let name = "busy.example.com";
    world.dns.a(name, "127.0.0.1");
    let bad = BadCa::before(&world.pebble).await;
    let config = config(&world.dns, vec![ca("bad", bad.directory(), &bad.root_pem)]);
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    bad.break_next(Resource::NewOrder, Break::RateLimited, 1);
    let begun = Instant::now();
    running.manager.add(name).await.unwrap();
    let view = running.until(name, |view| view.failures > 0).await;
    let words = view.state.to_string();
    assert!(
        words.starts_with("failed: bad: 127.0.0.1:") && words.contains("429 rateLimited): not now"),
        "{words}"
    );
    running.until_valid(name).await;
    assert!(begun.elapsed().as_millis() >= 1_000, "Retry-After was 1 s, it took {:?}", begun.elapsed());
}

#[tokio::test]
async fn when_the_first_authority_is_dead_or_dies_half_way_the_second_one_is_asked() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let Some(program) = find("pebble") else { return };
    let mut first = Pebble::start(
        &program,
        world.dns.address,
        world.front.http,
        world.front.tls,
        &PebbleOptions::default(),
    );
    let before_first = BadCa::before(&first).await;
    let one = ca("first", before_first.directory(), &before_first.root_pem);
    let config = config(&world.dns, vec![one, world.ca()]);
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    world.dns.a("half.example.com", "127.0.0.1");
    // It makes the order, and then gives nothing but errors until it is dead.
    before_first.break_next(Resource::Authorization, Break::ServerInternal, 1_000);
    running.manager.add("half.example.com").await.unwrap();
    running.until("half.example.com", |view| view.state.to_string().starts_with("ordering (")).await;
    first.kill();
    running.until_valid("half.example.com").await;
    assert_eq!((before_first.fulfilled(Resource::NewOrder), world.pebble.orders()), (1, 1));
    world.dns.a("dead.example.com", "127.0.0.1");
    running.manager.add("dead.example.com").await.unwrap();
    running.until_valid("dead.example.com").await;
    assert_eq!(world.pebble.issued(), 2);
    let records = running.manager.certificates().await.unwrap();
    assert!(records.iter().all(|record| record.ca.as_deref() == Some("pebble")));
}

#[tokio::test]
async fn a_validation_that_fails_is_told_in_the_authoritys_words_and_tried_again() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let name = "unreachable.example.com";
    // The name leads here as far as we are told, and somewhere else when the authority looks.
    world.dns.a(name, "127.0.0.9");
    let mut config = world.config();
    config.dns.expected_addresses.clear();
    let running: Running = world.manager(config, Arc::new(MemoryVault::new())).await;
    running.manager.add(name).await.unwrap();
    let view = running.until(name, |view| view.failures > 0).await;
    let words = view.state.to_string();
    assert!(words.starts_with("failed: pebble could not validate the name: http-01: "), "{words}");
    assert!(words.contains(", next try 20"), "{words}");
    world.dns.a(name, "127.0.0.1");
    running.until_valid(name).await;
    assert_eq!(world.front.challenges(), 0, "challenges are taken back after a failure, too");
}

#[tokio::test]
async fn a_retry_after_longer_than_any_clock_is_a_week() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let name = "ages.example.com";
    world.dns.a(name, "127.0.0.1");
    let bad = BadCa::before(&world.pebble).await;
    let config = config(&world.dns, vec![ca("bad", bad.directory(), &bad.root_pem)]);
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    bad.break_next(Resource::Finalize, Break::ProcessingForAges, 1);
    bad.break_next(Resource::Order, Break::ProcessingForAges, 1);
    running.manager.add(name).await.unwrap();
    running.until(name, |view| view.state.to_string().contains("still issuing")).await;
    // Nobody who asks for it makes it faster than the authority wants.
    running.manager.renew(name).await.unwrap();
    world.ahead_ms.store(6 * 24 * HOUR_MS, Ordering::Relaxed);
    running.manager.refresh().await.unwrap();
    world.dns.a("other.example.com", "127.0.0.1");
    running.manager.add("other.example.com").await.unwrap();
    running.until_valid("other.example.com").await;
    assert!(running.manager.get(name).unwrap().certificate.is_none());
    world.ahead_ms.store(8 * 24 * HOUR_MS, Ordering::Relaxed);
    running.manager.refresh().await.unwrap();
    running.until_valid(name).await;
    assert_eq!(bad.fulfilled(Resource::NewOrder), 2, "one for each name");
}

#[tokio::test]
async fn an_order_that_does_not_end_within_a_day_is_lost_and_another_one_is_made() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let name = "never.example.com";
    world.dns.a(name, "127.0.0.1");
    let bad = BadCa::before(&world.pebble).await;
    let mut config = config(&world.dns, vec![ca("bad", bad.directory(), &bad.root_pem)]);
    config.limits.poll_patience_ms = 100;
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    bad.break_next(Resource::Finalize, Break::Processing, 1);
    bad.break_next(Resource::Order, Break::Processing, usize::MAX);
    running.manager.add(name).await.unwrap();
    running.until(name, |view| view.state.to_string().contains("still issuing")).await;
    world.ahead_ms.store(25 * HOUR_MS, Ordering::Relaxed);
    running.manager.refresh().await.unwrap();
    let view = running.until(name, |view| view.failures > 0).await;
    let wanted = "failed: the order has not ended in 24 h: bad is still issuing, next try";
    assert!(view.state.to_string().starts_with(wanted), "{}", view.state);
    bad.mend();
    running.until_valid(name).await;
    assert_eq!(bad.fulfilled(Resource::NewOrder), 2);
}

#[tokio::test]
async fn an_authority_that_is_away_costs_no_orders_of_the_budget() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let name = "away.example.com";
    world.dns.a(name, "127.0.0.1");
    let bad = BadCa::before(&world.pebble).await;
    let mut authority = ca("bad", bad.directory(), &bad.root_pem);
    // One for a new name, and one that is kept for renewals.
    authority.orders = BudgetLimit { orders: 2, window_ms: 24 * 3_600_000 };
    let running = world.manager(config(&world.dns, vec![authority]), Arc::new(MemoryVault::new())).await;
    bad.break_next(Resource::Directory, Break::BadGateway, 4);
    // And what it refuses to make was not made.
    bad.break_next(Resource::NewOrder, Break::RateLimited, 2);
    running.manager.add(name).await.unwrap();
    running.until_valid(name).await;
    assert!(bad.is_done());
}
