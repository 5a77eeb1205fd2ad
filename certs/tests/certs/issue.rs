//! A name gets its certificate from a real authority.

use std::sync::Arc;

use peregrine_certs::{ChallengeKind, MemoryVault};

use crate::support::World;
use crate::support::pebble::PebbleOptions;

const NAME: &str = "shop.example.com";

async fn certificate_by(kind: ChallengeKind) {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    world.dns.a(NAME, "127.0.0.1");
    let mut config = world.config();
    config.challenges = vec![kind];
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    running.manager.add(NAME).await.unwrap();
    let view = running.until(NAME, |view| view.certificate.is_some()).await;
    assert!(view.state.to_string().starts_with("valid until 20"), "{}", view.state);
    let id = view.certificate.unwrap();
    let bundle = running.manager.load(id).await.unwrap();
    assert_eq!(bundle.leaf.names, [NAME]);
    crate::support::eventually("publishing", || world.front.published(NAME) == Some(id)).await;
    assert_eq!((world.front.answered(), world.front.challenges()), (1, 0), "answered once, and taken back");
    assert_eq!((world.pebble.orders(), world.pebble.issued()), (1, 1), "{}", world.pebble.log());
}

#[tokio::test]
async fn a_domain_that_is_added_gets_a_certificate_by_http_01() {
    certificate_by(ChallengeKind::Http01).await;
}

#[tokio::test]
async fn a_domain_that_is_added_gets_a_certificate_by_tls_alpn_01() {
    certificate_by(ChallengeKind::TlsAlpn01).await;
}
