//! Records of other rooms in the engine's store.

use peregrine_engine::vault::{VaultExpected, VaultWrite};

use crate::support::life::Life;
use crate::support::runtime::World;
use crate::support::{Bench, open_store};

fn put(key: &str, bytes: &'static str, expected: VaultExpected) -> VaultWrite {
    VaultWrite { key: key.into(), bytes: Some(bytes.into()), expected }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_who_have_read_the_same_record_one_writes_and_the_other_is_told() {
    let bench = Bench::with_shop().await;
    let vault = bench.engine.vault();
    let first = vault.commit(vec![put("orders/a", "1", VaultExpected::Absent)]).await.expect("it is new");
    let again =
        vault.commit(vec![put("orders/a", "2", VaultExpected::Absent)]).await.expect_err("it is there");
    assert_eq!(again.code, "store.conflict");
    let second =
        vault.commit(vec![put("orders/a", "2", VaultExpected::Revision(first))]).await.expect("as read");
    assert!(second > first);
    let late = vec![
        put("orders/b", "x", VaultExpected::Absent),
        put("orders/a", "3", VaultExpected::Revision(first)),
    ];
    assert_eq!(vault.commit(late).await.expect_err("it has changed").code, "store.conflict");
    assert_eq!(vault.get("orders/b").await.expect("read"), None, "all or none");
    let record = vault.get("orders/a").await.expect("read").expect("there");
    assert_eq!((&record.bytes[..], record.revision), (&b"2"[..], second));
    let gone = VaultWrite { key: "orders/a".into(), bytes: None, expected: VaultExpected::Revision(second) };
    vault.commit(vec![gone]).await.expect("deleted");
    assert_eq!(vault.get("orders/a").await.expect("read"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_are_there_after_a_restart_and_are_nobodys_problem() {
    let dir = tempfile::tempdir().expect("a folder");
    let bench = Bench::open(World::new(&["host-a"]), open_store(dir.path()).await, Life::new()).await;
    // More than are read at once, and neighbours whose keys begin alike.
    for first in (0..2_400).step_by(800) {
        let writes = (first..first + 800).map(|n| VaultWrite {
            key: format!("certificates/{n:05}"),
            bytes: Some(format!("{n}").into()),
            expected: VaultExpected::Absent,
        });
        bench.engine.vault().commit(writes.collect()).await.expect("written");
    }
    bench
        .engine
        .vault()
        .commit(vec![put("certificatesx", "", VaultExpected::Anything)])
        .await
        .expect("written");
    let (world, store) = bench.shut_down().await;
    drop(store);
    let again = Bench::open(world, open_store(dir.path()).await, Life::new()).await;
    let records = again.engine.vault().list("certificates/").await.expect("read");
    let keys: Vec<&str> = records.iter().map(|record| record.key.as_str()).collect();
    let expected: Vec<String> = (0..2_400).map(|n| format!("certificates/{n:05}")).collect();
    assert_eq!(keys, expected);
    assert_eq!(
        again.engine.state().aside.len(),
        0,
        "the engine does not take them for damaged records of its own"
    );
    assert_eq!(again.engine.vault().get("certificates").await.expect("read"), None, "a prefix is no record");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_is_damaged_is_left_out_and_hides_no_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let bench = Bench::open(World::new(&["host-a"]), open_store(dir.path()).await, Life::new()).await;
    let all = ["a", "b", "c"].map(|key| put(key, "kept", VaultExpected::Absent));
    bench.engine.vault().commit(all.into()).await.expect("written");
    let (world, store) = bench.shut_down().await;
    drop(store);
    drop(open_store(dir.path()).await);
    let file = rusqlite::Connection::open(dir.path().join("store.db")).expect("it is there");
    let forged = "UPDATE entry SET value = CAST('{' AS BLOB) WHERE key = 'vault/b'";
    assert_eq!(file.execute(forged, ()).expect("it is changed"), 1);
    drop(file);
    let again = Bench::open(world, open_store(dir.path()).await, Life::new()).await;
    let found = again.engine.vault().list("").await.expect("read");
    assert_eq!(found.iter().map(|record| record.key.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    let damaged = again.engine.vault().get("b").await.expect_err("whoever asks for it is told");
    assert_eq!(damaged.code, "store.corrupt");
    let alarms = || again.engine.alarms().into_iter().map(|alarm| alarm.code).collect::<Vec<_>>();
    assert_eq!(alarms(), ["store.record_aside"], "somebody has to see to it");
    again.engine.vault().commit(vec![put("b", "new", VaultExpected::Anything)]).await.expect("written");
    assert_eq!(alarms(), [""; 0], "and has done so");
}
