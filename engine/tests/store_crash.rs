//! kill -9 at random moments: everything that was acknowledged is there, and no batch is there by half.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use futures_util::StreamExt;
use peregrine_engine::store::{Batch, SqliteStore, Store, StoreError, Write};

/// Set for the child: the data folder.
const CHILD: &str = "PEREGRINE_TEST_KILLED_STORE";
const ROUNDS: u64 = 20;
/// Writers at once in the child, so that batches share transactions.
const WRITERS: u64 = 4;
/// Keys of one batch.
const PARTS: u64 = 3;

#[test]
fn everything_acknowledged_survives_kill_9_and_nothing_is_there_by_half() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return commit_until_killed(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::new();
    for round in 0..ROUNDS {
        let new = killed_child(dir.path(), 1 + round * 7 % 40);
        assert!(!new.is_empty(), "round {round}: the child has acknowledged nothing");
        acknowledged.extend(new);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(check(dir.path(), &acknowledged));
    }
}

/// Lets a child commit, kills it after `lines` acknowledgements, and gives all that it has told: batch by revision.
fn killed_child(dir: &Path, lines: u64) -> BTreeMap<u64, String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("everything_acknowledged_survives_kill_9_and_nothing_is_there_by_half")
        .env(CHILD, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BTreeMap::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let Some((revision, batch)) = line.strip_prefix("ack ").and_then(|ack| ack.split_once(' ')) else {
            continue;
        };
        told.insert(revision.parse().unwrap(), batch.to_owned());
        if told.len() as u64 == lines {
            let refused = SqliteStore::open(dir).expect_err("the child has it open");
            assert!(matches!(refused, StoreError::Locked), "{refused:?}");
            child.kill().unwrap(); // SIGKILL; what is in the pipe is still read
        }
    }
    child.wait().unwrap();
    told
}

async fn check(dir: &Path, acknowledged: &BTreeMap<u64, String>) {
    let store = SqliteStore::open(dir).expect("the lock of a killed process is free at once");
    let (newest, entries) = store.range("").await.unwrap();
    let mut parts: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for entry in entries {
        let (batch, _part) = entry.key.split_once('#').unwrap();
        parts.entry(entry.revision).or_default().push(batch.to_owned());
    }
    for (revision, batch) in acknowledged {
        assert!(*revision <= newest);
        assert!(parts.contains_key(revision), "revision {revision} ({batch}) was acknowledged and is gone");
        assert_eq!(&parts[revision][0], batch);
    }
    for (revision, batches) in &parts {
        assert_eq!(batches.len() as u64, PARTS, "revision {revision} is there by half: {batches:?}");
    }
    assert_eq!(parts.len() as u64, newest, "a revision without a batch");
    let story: Vec<_> = store.watch(0).take(newest as usize).collect().await;
    for (number, committed) in (1..).zip(story) {
        assert_eq!(committed.unwrap().revision, number);
    }
}

fn commit_until_killed(dir: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = Arc::new(SqliteStore::open(dir).unwrap());
        let first = store.range("").await.unwrap().0;
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| tokio::spawn(commit_for_ever(Arc::clone(&store), first, writer)))
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

async fn commit_for_ever(store: Arc<SqliteStore>, first: u64, writer: u64) {
    for number in 0_u64.. {
        let name = format!("{first}-{writer}-{number}");
        let part = |part| Write::Put(format!("{name}#{part}"), vec![0; 700].into());
        let writes = (0..PARTS).map(part).collect();
        let revision = store.commit(Batch { preconditions: Vec::new(), writes }).await.unwrap();
        let mut out = std::io::stdout().lock();
        writeln!(out, "ack {revision} {name}").and_then(|()| out.flush()).unwrap();
    }
}
