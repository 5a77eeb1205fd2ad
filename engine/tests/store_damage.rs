//! Damage, a stranger's file, a later version's file, a failing disk: each is told clearly, and nothing
//! is made worse.

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use futures_util::StreamExt;
use peregrine_engine::store::{Batch, SqliteStore, Store, StoreError, Write};

async fn filled(dir: &Path) {
    let store = SqliteStore::open(dir).unwrap();
    for number in 0..50 {
        let value = Bytes::from(format!("the value of number {number}, ").repeat(40));
        let writes = vec![Write::Put(format!("key/{number:02}"), value)];
        store.commit(Batch { preconditions: Vec::new(), writes }).await.unwrap();
    }
}

/// Opens the file behind the store's back.
fn tamper(dir: &Path, sql: &str) {
    rusqlite::Connection::open(dir.join("store.db")).unwrap().execute_batch(sql).unwrap();
}

fn corrupt_text(error: &StoreError) -> String {
    assert!(matches!(error, StoreError::Corrupt(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with("the store is damaged: "), "{text}");
    assert!(
        text.ends_with("stop peregrine, keep a copy of the data folder, and restore a backup of it"),
        "it does not say what to do: {text}"
    );
    text
}

#[tokio::test]
async fn a_file_that_is_no_database_is_told_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let garbage = vec![b'x'; 100_000];
    std::fs::write(dir.path().join("store.db"), &garbage).unwrap();
    let text = corrupt_text(&SqliteStore::open(dir.path()).unwrap_err());
    assert!(text.contains("not a database"), "{text}");
    assert_eq!(std::fs::read(dir.path().join("store.db")).unwrap(), garbage);
}

#[tokio::test]
async fn a_database_of_another_program_is_told_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    tamper(dir.path(), "CREATE TABLE songs (title TEXT);");
    let text = corrupt_text(&SqliteStore::open(dir.path()).unwrap_err());
    assert!(text.contains("store.db is a database of another program"), "{text}");
}

#[tokio::test]
async fn a_store_of_a_later_version_is_told_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    tamper(dir.path(), "PRAGMA user_version = 7;");
    let error = SqliteStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 7, .. }), "{error:?}");
    assert!(error.to_string().contains("start that version"), "{error}");
}

#[tokio::test]
async fn pages_that_are_overwritten_are_found_at_the_latest_when_they_are_read() {
    let mut found_at_open = 0;
    for at in [0, 100, 4_096, 8_192, 12_288, 20_480, 40_960, 61_440] {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path()).await;
        let path = dir.path().join("store.db");
        let mut bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() > at + 1_000, "the file has {} bytes", bytes.len());
        bytes[at..at + 1_000].fill(0xA5);
        std::fs::write(&path, bytes).unwrap();
        match SqliteStore::open(dir.path()) {
            Err(error) => {
                corrupt_text(&error);
                found_at_open += 1;
            }
            Ok(store) => {
                let range = store.range("").await.map(drop);
                let watch = store.watch(0).take(50).map(|c| c.map(drop)).collect::<Vec<_>>().await;
                let errors: Vec<_> = watch.into_iter().chain([range]).filter_map(Result::err).collect();
                assert!(!errors.is_empty(), "1,000 bytes at {at} were overwritten and nobody noticed");
                errors.iter().for_each(|error| drop(corrupt_text(error)));
            }
        }
    }
    assert!(found_at_open > 0);
}

#[tokio::test]
async fn a_value_that_was_changed_behind_the_back_is_told_with_its_key() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    tamper(dir.path(), "UPDATE entry SET value = CAST('forged' AS BLOB) WHERE key = 'key/07';");
    let store = SqliteStore::open(dir.path()).unwrap();
    let text = corrupt_text(&store.range("key/0").await.unwrap_err());
    assert!(text.contains("the value of key/07 has a wrong checksum"), "{text}");
    store.range("key/1").await.expect("what is sound is still given");
}

#[tokio::test]
async fn a_commit_that_is_missing_or_swapped_in_the_log_is_told() {
    for (sql, words) in [
        ("DELETE FROM log WHERE revision = 7;", "commit 7 is missing from the log"),
        (
            "UPDATE log SET record = (SELECT record FROM log WHERE revision = 8) WHERE revision = 7;",
            "commit 7 cannot be read: its checksum is wrong",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path()).await;
        tamper(dir.path(), sql);
        let store = SqliteStore::open(dir.path()).unwrap();
        let last = store.watch(0).take(50).collect::<Vec<_>>().await.pop().unwrap();
        let text = corrupt_text(&last.unwrap_err());
        assert!(text.contains(words), "{text}");
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_told_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let error = SqliteStore::open(&dir.path().join("file/data")).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("cannot create the data folder "), "{source}");
    assert!(source.contains("file/data"), "{source}");
}

/// Set for the child of the next test: the data folder.
const CHILD: &str = "PEREGRINE_TEST_FAILING_DISK";

/// A limit on the size of files makes `write` fail in the midst of a transaction, as a failing disk does.
#[test]
fn after_a_failed_write_nothing_more_is_acknowledged_and_nothing_acknowledged_is_lost() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return commit_until_the_disk_fails(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let test = std::env::current_exe().unwrap();
    // 2,048 blocks of 512 bytes (dash) or 1,024 (bash): a megabyte or two. The signal would kill.
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$0\" --exact --nocapture \"$1\""])
        .arg(test)
        .arg("after_a_failed_write_nothing_more_is_acknowledged_and_nothing_acknowledged_is_lost")
        .env(CHILD, dir.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
    let acknowledged: u64 = told
        .lines()
        .find_map(|line| line.split_once("acknowledged=").map(|(_, n)| n.trim().parse().unwrap()))
        .unwrap_or_else(|| panic!("the child has told nothing: {told}"));
    assert!(acknowledged > 0);

    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = SqliteStore::open(dir.path()).unwrap();
        let (revision, entries) = store.range("").await.unwrap();
        assert_eq!(entries.len() as u64, revision);
        assert!(revision >= acknowledged, "{acknowledged} were acknowledged, {revision} are there");
    });
}

fn commit_until_the_disk_fails(dir: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = SqliteStore::open(dir).unwrap();
        let commit = |number: u64, bytes: usize| {
            let writes = vec![Write::Put(format!("k{number:06}"), vec![1; bytes].into())];
            store.commit(Batch { preconditions: Vec::new(), writes })
        };
        let mut acknowledged = 0;
        let failure = loop {
            match commit(acknowledged, 20_000).await {
                Ok(_) => acknowledged += 1,
                Err(error) => break error,
            }
            assert!(acknowledged < 1_000, "20 MB do not fit into 2 MB");
        };
        assert!(matches!(failure, StoreError::Io(_)), "{failure:?}");
        let refused = commit(acknowledged, 1).await.expect_err("nobody knows what is on the disk");
        let source = std::error::Error::source(&refused).unwrap().to_string();
        assert!(source.contains("check the disk, then restart"), "{source}");
        println!("\nacknowledged={acknowledged}");
    });
}
