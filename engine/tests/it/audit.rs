//! The audit: what was asked for and how it ended, sealed so that a changed byte is named.

use std::path::Path;
use std::sync::Arc;

use peregrine_engine::EngineHandle;
use peregrine_engine::audit::{self, AuditAct, AuditEntry};
use peregrine_engine::model::{Control, RolloutState};
use peregrine_engine::store::{Batch, Write};

use crate::support::life::Life;
use crate::support::runtime::World;
use crate::support::{Bench, machine, move_to, open_store, shop, slow_move_to};

fn kinds(entries: &[AuditEntry]) -> Vec<&'static str> {
    let kind = |entry: &AuditEntry| match entry.act {
        AuditAct::Asked { .. } => "asked",
        AuditAct::Steered { .. } => "steered",
        AuditAct::Ended { .. } => "ended",
        AuditAct::CleanedUp { .. } => "cleaned_up",
        AuditAct::Refused { .. } => "refused",
        AuditAct::SettingsChanged {} => "settings_changed",
        AuditAct::MachineAdded { .. } => "machine_added",
        AuditAct::MachineRemoved { .. } => "machine_removed",
        AuditAct::StoreRestored { .. } => "store_restored",
        AuditAct::Unknown => "unknown",
    };
    entries.iter().map(kind).collect()
}

async fn broken(engine: &EngineHandle) -> Vec<u64> {
    let report = engine.verify_audit().await.expect("it can be read");
    report.broken.into_iter().map(|broken| broken.entry).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_ask_and_every_end_is_an_entry_and_each_receipt_is_sealed_over_the_one_before() {
    let bench = Bench::with_shop().await;
    let started = bench.start(slow_move_to("host-b", 60_000)).await;
    bench.engine.pause(&started.id).await.expect("it is heard");
    bench.engine.resume(&started.id).await.expect("it is heard");
    bench.engine.abort(&started.id).await.expect("it is heard");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Aborted);
    bench.done(move_to("host-b")).await;
    let entries = bench.engine.audit().await.expect("it can be read");
    let expected = [
        "machine_added",
        "machine_added",
        "asked",
        "ended",
        "asked",
        "steered",
        "steered",
        "steered",
        "ended",
        "asked",
        "ended",
    ];
    assert_eq!(kinds(&entries), expected);
    for (before, entry) in entries.iter().zip(&entries[1..]) {
        assert_eq!((entry.number, &entry.previous), (before.number + 1, &before.hash));
    }
    assert!(matches!(&entries[4].act, AuditAct::Asked { reason, .. } if reason == "test"));
    assert_eq!(entries[7].act, AuditAct::Steered { control: Control::Abort });
    let AuditAct::Ended { state, receipt, .. } = &entries[10].act else { panic!("{:?}", entries[10]) };
    assert_eq!(*state, RolloutState::Succeeded);
    let told = bench.engine.receipt(entries[10].rollout.as_ref().expect("of a move")).await.expect("there");
    assert_eq!(receipt.as_deref(), Some(&told));
    let report = bench.engine.verify_audit().await.expect("it can be read");
    assert_eq!((report.entries, report.first, report.last, report.broken), (11, 1, 11, Vec::new()));
    assert_eq!(report.hash, entries[10].hash);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_of_any_entry_that_is_changed_in_the_store_is_named_now_and_after_a_restart() {
    let bench = Bench::with_shop().await;
    bench.done(move_to("host-b")).await;
    assert_eq!(broken(&bench.engine).await, [] as [u64; 0]);
    let (_, entries) = bench.store.range("audit/").await.expect("it can be read");
    let count = entries.len() as u64;
    for entry in entries {
        let number: u64 = entry.key.trim_start_matches("audit/").parse().expect("a number");
        // A checksum that fits, as somebody would make it who knows the store: only the chain can tell.
        let mut changed = entry.value.to_vec();
        let at = changed.len() / 2;
        changed[at] ^= 0x01;
        let put = |value: Vec<u8>| Batch {
            preconditions: Vec::new(),
            writes: vec![Write::Put(entry.key.clone(), value.into())],
        };
        bench.store.commit(put(changed)).await.expect("the store takes it");
        assert_eq!(broken(&bench.engine).await, [number]);
        let again = bench.reopened().await;
        assert_eq!(broken(&again.engine).await, [number], "after a restart");
        // What is written from now on does not heal it.
        again.engine.add_machine(machine(&format!("host-{number}"))).await.expect("it can be added");
        assert_eq!(broken(&again.engine).await, [number], "with more entries after it");
        again.crash();
        bench.store.commit(put(entry.value.to_vec())).await.expect("the store takes it");
    }
    let last = bench.reopened().await;
    let report = last.engine.verify_audit().await.expect("it can be read");
    assert_eq!((report.last, report.broken), (2 * count, Vec::new()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_that_was_changed_where_people_read_it_is_named() {
    let bench = Bench::with_shop().await;
    let mut rollout = bench.done(move_to("host-b")).await;
    rollout.receipt.as_mut().expect("a receipt").failed += 1;
    let value = serde_json::to_vec(&rollout).expect("it can be written").into();
    let writes = vec![Write::Put(format!("rollouts/{}", rollout.id), value)];
    bench.store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("the store takes it");
    let report = bench.engine.verify_audit().await.expect("it can be read");
    assert_eq!(report.broken.len(), 1);
    assert!(report.broken[0].what.contains(rollout.id.as_str()), "{report:?}");
    assert_eq!(report.broken[0].entry, report.last);
}

async fn on_disk(dir: &Path) -> Bench {
    let store = open_store(dir).await;
    Bench::open(World::new(&["host-a", "host-b"]), store, Life::new()).await
}

/// Changes the last byte of a value in the file, and nothing that guards it.
fn spoil(dir: &Path, key: &str) {
    let file = rusqlite::Connection::open(dir.join("store.db")).expect("the file opens");
    let sql =
        "UPDATE entry SET value = CAST(substr(value, 1, length(value) - 1) || 'x' AS BLOB) WHERE key = ?1";
    assert_eq!(file.execute(sql, [key]).expect("it can be changed"), 1, "{key}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_that_is_changed_in_the_file_is_named_and_stops_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let bench = on_disk(dir.path()).await;
    for name in ["host-a", "host-b"] {
        bench.engine.add_machine(machine(name)).await.expect("a machine can be added");
    }
    bench.deploy(shop(), Some("host-a")).await;
    bench.assert_tidy(1).await;
    spoil(dir.path(), "audit/00000000000000000003");
    assert_eq!(broken(&bench.engine).await, [3]);
    // Between two lives as well: the record of a machine goes the same way.
    let (world, store) = bench.shut_down().await;
    drop((world, store));
    spoil(dir.path(), "machines/host-b");
    let again = on_disk(dir.path()).await;
    assert_eq!(broken(&again.engine).await, [3]);
    let state = again.engine.state();
    let aside: Vec<_> = state.aside.keys().map(String::as_str).collect();
    assert_eq!(aside, ["audit/00000000000000000003", "machines/host-b"]);
    crate::support::until("the shop to be up again", || {
        state.instances.values().any(|i| again.world.runs(&i.machine, &i.id)).then_some(())
    })
    .await;
    again.engine.add_machine(machine("host-c")).await.expect("the engine goes on");
    assert_eq!(broken(&again.engine).await, [3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_record_cannot_be_read_is_no_orphan() {
    let dir = tempfile::tempdir().expect("a folder");
    let bench = on_disk(dir.path()).await;
    bench.engine.add_machine(machine("host-a")).await.expect("a machine can be added");
    bench.deploy(shop(), Some("host-a")).await;
    let id = bench.serving()[0].id.clone();
    let (world, store) = bench.shut_down().await;
    drop(store);
    spoil(dir.path(), &format!("instances/{id}"));
    let store = open_store(dir.path()).await;
    let again = Bench::open(Arc::clone(&world), store, Life::new()).await;
    let stranger = world.plant("host-a", &again.engine.install()).await;
    crate::support::until("an orphan to be swept", || (!world.runs("host-a", &stranger)).then_some(())).await;
    assert!(world.runs("host-a", &id), "the copy whose record is damaged still runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_machine_refuses_for_a_higher_epoch_is_told_in_the_audit_and_changes_nothing() {
    let bench = Bench::with_shop().await;
    let before = bench.world.inventory();
    // Somebody else has led since: the machine has seen a later epoch of this service.
    bench.world.faults("host-b", |faults| faults.epoch_seen = 99);
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    assert_eq!(ended.problem.expect("a reason").code, "runtime.fenced");
    assert_eq!(bench.world.inventory(), before);
    bench.assert_tidy(1).await;
    let entries = bench.engine.audit().await.expect("it can be read");
    let refused = entries.iter().find_map(|entry| match &entry.act {
        AuditAct::Refused { what } if entry.rollout.as_ref() == Some(&ended.id) => Some(what),
        _ => None,
    });
    assert!(refused.expect("it is told").contains("99"), "{refused:?}");
    assert!(audit::open(&bench.store.range("audit/").await.expect("read").1[0].value).is_ok());
}
