//! A manager that dies at any commit, and one that goes on after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use peregrine_certs::{MemoryVault, Record, Revision, SealKey, Vault, VaultError, Write};

use crate::support::pebble::PebbleOptions;
use crate::support::{DEADLINE, World};

/// From its n-th commit on it fails, as for a process that is no more.
struct DyingVault {
    inner: Arc<MemoryVault>,
    left: AtomicUsize,
}

impl Vault for DyingVault {
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Record>, VaultError>> {
        self.inner.list(prefix)
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, VaultError>> {
        self.inner.get(key)
    }

    fn commit(&self, writes: Vec<Write>) -> BoxFuture<'_, Result<Revision, VaultError>> {
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match left {
            Ok(_) => self.inner.commit(writes),
            Err(_) => std::future::ready(Err(VaultError::Unavailable { cause: "killed".into() })).boxed(),
        }
    }
}

fn key_file() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    (folder, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_is_killed_at_any_commit_orders_nothing_twice() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let (_folder, key) = key_file();
    let mut survived = false;
    for commits in 1..30 {
        let name = format!("killed{commits}.example.com");
        world.dns.a(&name, "127.0.0.1");
        let inner = Arc::new(MemoryVault::new());
        let (orders, issued) = (world.pebble.orders(), world.pebble.issued());
        let dying = Arc::new(DyingVault { inner: Arc::clone(&inner), left: AtomicUsize::new(commits) });
        let seal = || SealKey::open_or_create(&key).unwrap();
        let first = world.manager_with(world.config(), Arc::clone(&dying) as _, seal()).await;
        first.manager.add(&name).await.unwrap();
        // It does what it does until its vault is dead, or it is through.
        let valid = || {
            let view = first.manager.get(&name);
            view.is_some_and(|view| view.certificate.is_some()) && world.front.published(&name).is_some()
        };
        crate::support::eventually("the death of the vault", || {
            dying.left.load(Ordering::SeqCst) == 0 || valid()
        })
        .await;
        survived = dying.left.load(Ordering::SeqCst) > 0;
        first.kill().await;
        let second = world.manager_with(world.config(), inner, seal()).await;
        second.until_valid(&name).await;
        crate::support::eventually("publishing", || world.front.published(&name).is_some()).await;
        let made = world.pebble.orders() - orders;
        assert_eq!(world.pebble.issued() - issued, 1, "{name}: certificates");
        // The commit after the order's creation is the one that keeps its address: without it there is nothing to go on with.
        let address_lost = commits == 3;
        assert!(made == 1 || address_lost && made == 2, "{name}: {made} orders");
        if survived {
            break;
        }
    }
    assert!(survived, "an order has fewer commits than that");
    assert_eq!(world.front.challenges(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_managers_on_one_vault_make_one_order_per_name() {
    let Some(world) = World::start(PebbleOptions::default()).await else { return };
    let (_folder, key) = key_file();
    let vault = Arc::new(MemoryVault::new());
    let seal = || SealKey::open_or_create(&key).unwrap();
    let mut other = world.config();
    other.holder = "two".to_owned();
    let one = world.manager_with(world.config(), Arc::clone(&vault) as _, seal()).await;
    let two = world.manager_with(other, vault, seal()).await;
    let names: Vec<String> = (0..10).map(|n| format!("both{n}.example.com")).collect();
    for name in &names {
        world.dns.a(name, "127.0.0.1");
        let (a, b) = tokio::join!(one.manager.add(name), two.manager.add(name));
        a.unwrap();
        b.unwrap();
    }
    for name in &names {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        // What the other one has done is seen by who looks.
        while [&one, &two]
            .iter()
            .any(|own| own.manager.get(name).is_none_or(|view| view.certificate.is_none()))
        {
            assert!(tokio::time::Instant::now() < deadline, "{name}: {:?}", one.manager.get(name));
            one.manager.refresh().await.unwrap();
            two.manager.refresh().await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
    assert_eq!((world.pebble.orders(), world.pebble.issued()), (10, 10));
}
