//! Backups: made while moves run, put back elsewhere, refused where something would be lost.

use std::path::Path;
use std::sync::Arc;

use futures_util::StreamExt as _;
use peregrine_engine::model::RolloutState;
use peregrine_engine::store::{SqliteStore, Store};
use peregrine_engine::{ErrorKind, State, backup};

use crate::support::life::Life;
use crate::support::runtime::World;
use crate::support::{Bench, machine, move_to, open_store, shop};

async fn shop_on_disk(dir: &Path) -> Bench {
    let store = open_store(dir).await;
    let bench = Bench::open(World::new(&["host-a", "host-b"]), store, Life::new()).await;
    for name in ["host-a", "host-b"] {
        bench.engine.add_machine(machine(name)).await.expect("a machine can be added");
    }
    bench.deploy(shop(), Some("host-a")).await;
    bench
}

/// The state as of a revision, from the log.
async fn state_at(store: &dyn Store, revision: u64) -> State {
    let mut state = State::default();
    let mut log = store.watch(0);
    while state.revision < revision {
        let committed = log.next().await.expect("the log is long enough").expect("it can be read");
        state.apply(&committed).expect("it was applied once");
    }
    state
}

async fn stored_state(dir: &Path) -> State {
    let store = open_store(dir).await;
    let (revision, entries) = store.range("").await.expect("it can be read");
    let mut state = State::default();
    let writes = entries.into_iter().map(|e| peregrine_engine::store::Write::Put(e.key, e.value)).collect();
    state.apply(&peregrine_engine::store::Committed { revision, writes }).expect("everything is readable");
    state
}

/// What a restoration changes on purpose, taken back.
fn before_the_reign(mut state: State, like: &State) -> State {
    for service in state.services.values_mut() {
        assert!(service.epoch > 1 << 32, "epochs go up");
        service.epoch %= 1 << 32;
    }
    for instance in state.instances.values_mut() {
        instance.epoch %= 1 << 32;
    }
    for rollout in state.rollouts.values_mut() {
        Arc::make_mut(rollout).epoch %= 1 << 32;
    }
    assert!(state.last_generation > 1 << 32, "generations go up");
    state.last_generation %= 1 << 32;
    assert_eq!(state.audit.number, like.audit.number + 1, "the restoration is in the audit");
    state.audit = like.audit.clone();
    state.revision = like.revision;
    state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_made_while_moves_run_is_of_one_revision_and_is_restored_elsewhere() {
    let (data, files, other) = (folder(), folder(), folder());
    let bench = shop_on_disk(data.path()).await;
    let mut summaries = Vec::new();
    for turn in 0..6 {
        let started = bench.start(move_to(if turn % 2 == 0 { "host-b" } else { "host-a" })).await;
        let (dir, file) = (data.path().to_owned(), files.path().join(format!("{turn}.backup")));
        let made = tokio::task::spawn_blocking(move || backup::backup(&dir, &file)).await.expect("no panic");
        summaries.push(made.expect("a backup"));
        assert_eq!(bench.end_of(&started).await.state, RolloutState::Succeeded);
    }
    for (turn, summary) in summaries.iter().enumerate() {
        let file = files.path().join(format!("{turn}.backup"));
        let to = other.path().join(format!("data-{turn}"));
        let restored = backup::restore(&file, &to, false).await.expect("it is restored");
        assert_eq!((restored.revision, &restored.sha256), (summary.revision, &summary.sha256));
        let expected = state_at(&*bench.store, summary.revision).await;
        let epoch = SqliteStore::open(&to).expect("the store opens").epoch();
        assert!(epoch > 1 << 32, "edges have heard no higher one than {epoch}");
        let found = stored_state(&to).await;
        assert_eq!(before_the_reign(found, &expected), expected, "backup {turn}");
    }
    // An engine takes it up: what was under way comes to its end.
    let to = other.path().join("data-5");
    let store = open_store(&to).await;
    let again = Bench::open(Arc::clone(&bench.world), store, Life::new()).await;
    bench.crash();
    let last = again.engine.state().rollouts.values().next_back().cloned().expect("there is one");
    assert!(again.end_of(&last).await.state.is_terminal());
    again.assert_tidy(1).await;
    assert_eq!(again.edge.get("/").await, Ok(200));
    let report = again.engine.verify_audit().await.expect("it can be read");
    assert_eq!(report.broken, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_on_a_restored_store_leads_under_an_epoch_that_no_edge_has_heard_of() {
    let (data, files, other) = (folder(), folder(), folder());
    let file = files.path().join("early.backup");
    drop(SqliteStore::open(data.path()).expect("the store opens"));
    backup::backup(data.path(), &file).expect("a backup");
    // Edges have heard of each of these, and listen to no lower one.
    let heard = (0..3).map(|_| SqliteStore::open(data.path()).expect("the store opens").epoch()).max();
    for force in [false, true] {
        backup::restore(&file, other.path(), force).await.expect("it is restored");
        let restored = SqliteStore::open(other.path()).expect("the store opens").epoch();
        assert!(Some(restored) > heard && restored > 1 << 32, "{restored} is not above {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restoration_is_refused_where_something_would_be_lost() {
    let (data, files, other) = (folder(), folder(), folder());
    let bench = shop_on_disk(data.path()).await;
    let file = files.path().join("peregrine.backup");
    backup::backup(data.path(), &file).expect("a backup");

    let refused = backup::backup(data.path(), &file).expect_err("it is there already");
    assert_eq!((refused.kind, refused.code), (ErrorKind::Conflict, "backup.exists"));
    let refused = backup::backup(other.path(), &files.path().join("x")).expect_err("there is no store");
    assert_eq!(refused.code, "backup.no_store");
    assert!(!files.path().join("x").exists());

    let refused = backup::restore(&file, data.path(), false).await.expect_err("the folder is not empty");
    assert_eq!(refused.code, "restore.not_empty");
    assert!(refused.message.contains("store.db"), "{}", refused.message);
    let refused = backup::restore(&file, data.path(), true).await.expect_err("an engine runs on it");
    assert_eq!(refused.code, "store.locked");
    assert_eq!(bench.edge.get("/").await, Ok(200));

    // With force, and nobody on it, the store that is there is put aside.
    let (world, store) = bench.shut_down().await;
    drop((world, store));
    let restored = backup::restore(&file, data.path(), true).await.expect("it is restored");
    let aside = restored.put_aside.expect("the old store is kept");
    assert!(aside.file_name().expect("a name").to_string_lossy().starts_with("store.db.before-restore-"));
    assert!(std::fs::metadata(&aside).expect("it is there").len() > 0);
    assert!(stored_state(data.path()).await.services.contains_key("shop"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_backup_is_refused_wherever_it_was_damaged_and_leaves_no_trace() {
    let (data, files, other) = (folder(), folder(), folder());
    let bench = shop_on_disk(data.path()).await;
    let file = files.path().join("peregrine.backup");
    backup::backup(data.path(), &file).expect("a backup");
    let (world, store) = bench.shut_down().await;
    drop((world, store));
    let expected = stored_state(data.path()).await;
    let whole = std::fs::read(&file).expect("it can be read");
    let to = other.path().join("data");
    let (mut refusals, damages) = (0, [0, 30, 100, whole.len() / 3, whole.len() / 2, whole.len() - 600]);
    for sums in [true, false] {
        if !sums {
            std::fs::remove_file(files.path().join("peregrine.backup.sha256")).expect("it was made");
        }
        for at in damages {
            let mut bytes = whole.clone();
            bytes[at..at + 500].iter_mut().for_each(|byte| *byte ^= 0xA5);
            std::fs::write(&file, bytes).expect("it can be written");
            match backup::restore(&file, &to, false).await {
                Err(refused) => {
                    let code = if sums { "restore.checksum" } else { "store.corrupt" };
                    assert_eq!(refused.code, code, "{at}: {refused:?}");
                    assert!(!to.exists(), "{at}");
                    refusals += 1;
                }
                // Without a checksum beside it: a page has room in which nothing is kept.
                Ok(_) => {
                    assert!(!sums, "500 bytes at {at} were changed and nobody noticed");
                    assert_eq!(before_the_reign(stored_state(&to).await, &expected), expected, "{at}");
                    std::fs::remove_dir_all(&to).expect("it can be removed");
                }
            }
        }
        std::fs::write(&file, &whole[..whole.len() / 2]).expect("it can be written");
        backup::restore(&file, &to, false).await.expect_err("half of it is missing");
    }
    assert!(refusals > damages.len() + 2, "{refusals}");
    std::fs::write(&file, &whole).expect("it can be written");
    backup::restore(&file, &to, false).await.expect("the whole one is taken");
    let missing = backup::restore(&files.path().join("none"), &to, false).await.expect_err("it is not there");
    assert_eq!((missing.kind, missing.code), (ErrorKind::NotFound, "file.missing"));
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}
