//! DNS before and during an order.

use std::sync::Arc;

use peregrine_certs::{ChallengeKind, MemoryVault, Rfc2136, TsigKind};

use crate::support::knot::{KEY, Knot};
use crate::support::pebble::{Pebble, PebbleOptions, ca, find};
use crate::support::{DEADLINE, Running, World, config};

const NAME: &str = "shop.example.com";

#[tokio::test]
async fn nothing_is_ordered_until_the_name_leads_here_and_the_record_to_create_is_told() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let running = world.manager(world.config(), Arc::new(MemoryVault::new())).await;
    running.manager.add(NAME).await.unwrap();
    let view = running.until(NAME, |view| view.failures > 0).await;
    assert_eq!(
        view.state.to_string(),
        "waiting for DNS (A shop.example.com → expected 127.0.0.1, found nothing)"
    );
    world.dns.a(NAME, "192.0.2.1");
    let told = |view: &peregrine_certs::DomainView| view.state.to_string();
    let wanted = "waiting for DNS (A shop.example.com → expected 127.0.0.1, found 192.0.2.1)";
    running.until(NAME, |view| told(view) == wanted).await;
    assert_eq!(world.pebble.orders(), 0);
    let check = running.manager.check(NAME).await.unwrap();
    assert_eq!(check.dns.unwrap_err(), "A shop.example.com → expected 127.0.0.1, found 192.0.2.1");
    world.dns.cname(NAME, "edge.example.net");
    world.dns.a("edge.example.net", "127.0.0.1");
    running.until_valid(NAME).await;
    assert_eq!(world.pebble.orders(), 1);
}

#[tokio::test]
async fn caa_that_forbids_is_explained_and_nothing_is_ordered() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    world.dns.caa("example.com", "other.test");
    let mut config = world.config();
    config.authorities[0].caa_identities = vec!["pebble.test".to_owned()];
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    running.manager.add(NAME).await.unwrap();
    let view = running.until(NAME, |view| view.failures > 0).await;
    let words = view.state.to_string();
    let why = "failed: CAA example.com allows other.test only: add example.com CAA 0 issue \"pebble.test\", next try";
    assert!(words.starts_with(why), "{words}");
    let check = running.manager.check(NAME).await.unwrap();
    assert!(check.caa[0].1.is_err() && check.dns.is_ok(), "{check:?}");
    assert_eq!(world.pebble.orders(), 0);
    world.dns.caa("example.com", "pebble.test");
    running.until_valid(NAME).await;
}

#[tokio::test]
async fn a_wildcard_without_a_dns_provider_says_what_it_needs() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let running = world.manager(world.config(), Arc::new(MemoryVault::new())).await;
    running.manager.add("*.example.com").await.unwrap();
    let view = running.until("*.example.com", |view| view.failures > 0).await;
    assert!(view.state.to_string().contains("configure a DNS provider"), "{}", view.state);
    assert_eq!(world.pebble.orders(), 0);
}

/// A manager whose DNS is knot, with this key.
async fn with_knot(key: &[u8]) -> Option<(World, Knot, Pebble, Running)> {
    let (knotd, program) = (find("knotd")?, find("pebble")?);
    let knot = Knot::start(&knotd);
    let world = World::start(PebbleOptions::default()).await?;
    let pebble =
        Pebble::start(&program, knot.address, world.front.http, world.front.tls, &PebbleOptions::default());
    let mut config = config(&world.dns, vec![ca("knots", pebble.directory(), &pebble.root_pem)]);
    config.dns.resolvers = vec![knot.address];
    config.challenges = vec![ChallengeKind::Dns01];
    let provider =
        Rfc2136::new(knot.address, "example.com", "acme", TsigKind::HmacSha256, key.to_vec()).unwrap();
    assert!(!format!("{provider:?}").contains("shared"), "a key is not shown");
    config.dns.providers = vec![("example.com".to_owned(), Arc::new(provider))];
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    Some((world, knot, pebble, running))
}

#[tokio::test]
async fn a_name_and_its_wildcard_get_certificates_by_dns_01_with_signed_updates() {
    let Some((_world, knot, pebble, running)) = with_knot(KEY).await else { return };
    for name in ["example.com", "*.example.com"] {
        running.manager.add(name).await.unwrap();
    }
    for name in ["example.com", "*.example.com"] {
        let id = running.until_valid(name).await.certificate.unwrap();
        let bundle = running.manager.load(id).await.unwrap();
        assert_eq!(bundle.leaf.names, [name]);
    }
    assert_eq!((pebble.orders(), pebble.issued()), (2, 2));
    // Both records were of one name; each took away its own only, and nothing is left.
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while knot.texts("_acme-challenge.example.com").await > 0 {
        assert!(tokio::time::Instant::now() < deadline, "records are left: {}", knot.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_dns_server_that_refuses_the_key_is_told_with_what_to_check() {
    let Some((_world, _knot, pebble, running)) = with_knot(b"another key of thirty-two bytes!").await else {
        return;
    };
    running.manager.add(NAME).await.unwrap();
    let view = running.until(NAME, |view| view.state.to_string().contains("NOTAUTH")).await;
    let words = view.state.to_string();
    assert!(
        words.starts_with("ordering (TXT _acme-challenge.shop.example.com: DNS server 127.0.0.1:"),
        "{words}"
    );
    assert!(words.contains("check the name, the algorithm and the secret of key acme"), "{words}");
    assert_eq!(pebble.orders(), 1, "the order waits");
}
