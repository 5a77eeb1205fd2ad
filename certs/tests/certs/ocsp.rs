//! Staples from a responder that is not ours: fetched, told to the edges, renewed, and what follows when it says that a certificate is
//! revoked.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peregrine_certs::{Bundle, DomainState, EventKind, MemoryVault};

use crate::support::ocsp::Responder;
use crate::support::pebble::PebbleOptions;
use crate::support::{World, eventually};

const NAME: &str = "shop.example.com";
const OTHER: &str = "other.example.com";
const DAY_MS: i64 = 24 * 3_600_000;

fn serial_of(bundle: &Bundle) -> String {
    let (_, leaf) = x509_parser::parse_x509_certificate(&bundle.chain[0]).unwrap();
    let digits: String = leaf.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect();
    digits.strip_prefix("00").unwrap_or(&digits).to_owned()
}

// The manager has a thread of its own: the list of the responder is changed while ours waits, and it answers one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_staple_is_fetched_told_and_fetched_again_and_a_revoked_certificate_is_replaced_at_once() {
    let mut responder = Responder::new();
    let options = PebbleOptions { responder: responder.url(), ..PebbleOptions::default() };
    let Some(world) = World::start(options).await else { return };
    for name in [NAME, OTHER] {
        world.dns.a(name, "127.0.0.1");
    }
    let mut config = world.config();
    (config.limits.staple_retry_ms, config.limits.staple_retry_max_ms) = (100, 500);
    let running = world.manager(config, Arc::new(MemoryVault::new())).await;
    let manager = &running.manager;
    let mut events = manager.events();
    manager.add(NAME).await.unwrap();
    let first = running.until_valid(NAME).await.certificate.unwrap();
    // Nobody answers yet, which keeps nobody from the certificate.
    let bundle = manager.load(first).await.unwrap();
    assert_eq!(manager.staple(&bundle).await.unwrap(), None);
    let serial = serial_of(&bundle);
    responder.knows(&[(&serial, true)]);
    let (authority, key) = world.pebble.issuer().await;
    responder.start(&authority, &key, 7);
    eventually("a staple at the edges", || world.front.stapled(NAME).is_some()).await;
    let (staple, until_ms) = manager.staple(&bundle).await.unwrap().expect("it lies beside the certificate");
    let (now_ms, day_ms) = ((peregrine_certs::Outside::system().now_ms)(), DAY_MS.unsigned_abs());
    assert!(until_ms > now_ms + 6 * day_ms && until_ms < now_ms + 8 * day_ms, "{until_ms}");
    let told = world.front.stapled(NAME).unwrap();
    assert_eq!(told.0[..], *aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &staple).as_ref());
    assert_eq!(manager.get(NAME).unwrap().staple, Some(told));

    // Half of its time is over: there is another one. What is made within one second is the same.
    let begun = Instant::now();
    eventually("the next second", || begun.elapsed() > Duration::from_millis(1_100)).await;
    world.ahead_ms.store(7 * DAY_MS / 2, Ordering::Relaxed);
    manager.refresh().await.unwrap();
    eventually("another staple", || world.front.stapled(NAME).is_some_and(|now| now != told)).await;

    // It is revoked: seen at the next look, and what was stapled is stapled no more.
    responder.knows(&[(&serial, false)]);
    world.ahead_ms.fetch_add(7 * DAY_MS / 2 - DAY_MS / 2, Ordering::Relaxed);
    manager.refresh().await.unwrap();
    let view = running.until(NAME, |view| view.certificate != Some(first)).await;
    assert!(matches!(view.state, DomainState::Valid { .. }), "{}", view.state);
    assert_eq!(world.pebble.issued(), 2);
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let EventKind::State(state @ DomainState::Revoked { .. }) = event.what {
            told.push(state.to_string());
        }
    }
    assert_eq!(told[..1], ["revoked by its authority 2026-01-02T03:04:05Z, a new one is ordered"]);
    // The responder does not know the new one, and says so; another name is worked on all the same.
    manager.add(OTHER).await.unwrap();
    let other = running.until_valid(OTHER).await.certificate.unwrap();
    let other = manager.load(other).await.unwrap();
    responder.knows(&[(&serial_of(&other), true)]);
    eventually("a staple of the other", || world.front.stapled(OTHER).is_some()).await;
    assert_eq!(world.front.stapled(NAME), None);
}
