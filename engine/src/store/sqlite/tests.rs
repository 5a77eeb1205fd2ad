//! What needs the insides: a full disk, a short history, the settings of the connection.

use futures_util::StreamExt;

use super::*;
use crate::store::{MAX_HISTORY_BYTES, MIN_HISTORY_COMMITS, Write};

fn put(key: &str, value: impl Into<bytes::Bytes>) -> Batch {
    Batch { preconditions: Vec::new(), writes: vec![Write::Put(key.to_owned(), value.into())] }
}

fn open_short(dir: &Path, history: History) -> SqliteStore {
    SqliteStore::open_with(dir, history, |_| Ok(())).unwrap()
}

async fn revisions_after(store: &SqliteStore, after: Revision, count: usize) -> Vec<Revision> {
    store.watch(after).take(count).map(|committed| committed.unwrap().revision).collect().await
}

#[test]
fn what_is_acknowledged_is_flushed_to_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    SqliteStore::open_with(dir.path(), History::default(), |connection| {
        let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        assert_eq!(pragma("synchronous")?, 2, "2 is FULL: the log is flushed at every commit");
        assert_eq!(pragma("foreign_keys")?, 1);
        let mode: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
        assert_eq!(mode, "wal");
        Ok(())
    })
    .unwrap();
}

#[tokio::test]
async fn a_full_disk_says_so_loses_nothing_and_is_over_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open_with(dir.path(), History::default(), |connection| {
        connection.pragma_update(None, "max_page_count", 40)
    })
    .unwrap();
    let mut acknowledged = 0;
    let full = loop {
        match store.commit(put(&format!("k{acknowledged:03}"), vec![7; 8_000])).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged < 100, "40 pages hold a few of these at most");
    };
    assert!(matches!(full, StoreError::Full(_)), "{full:?}");
    assert_eq!(full.to_string(), "the disk with the data folder is full");
    assert!(acknowledged > 0);
    let (revision, entries) = store.range("").await.unwrap();
    assert_eq!((revision, entries.len()), (acknowledged, usize::try_from(acknowledged).unwrap()));
    // A small one in the same group as one without room still gets through.
    let (large, small) =
        tokio::join!(store.commit(put("large", vec![7; 100_000])), store.commit(put("small", vec![7; 10])));
    assert!(matches!(large, Err(StoreError::Full(_))), "{large:?}");
    assert_eq!(small.unwrap(), acknowledged + 1);
    drop(store);

    let roomy = SqliteStore::open(dir.path()).unwrap();
    assert_eq!(roomy.commit(put("large", vec![7; 100_000])).await.unwrap(), acknowledged + 2);
}

#[tokio::test]
async fn history_is_cut_by_count_and_a_watch_from_before_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let store =
        open_short(dir.path(), History { min_commits: 10, max_bytes: MAX_HISTORY_BYTES, stride_commits: 5 });
    for number in 1..=14 {
        assert_eq!(store.commit(put("k", vec![1])).await.unwrap(), number);
    }
    assert_eq!(revisions_after(&store, 0, 14).await.len(), 14, "a stride is not full yet");
    store.commit(put("k", vec![1])).await.unwrap();
    assert_eq!(revisions_after(&store, 5, 10).await, (6..=15).collect::<Vec<_>>());
    for after in 0..5 {
        let told = store.watch(after).next().await.unwrap().unwrap_err();
        assert!(
            matches!(told, StoreError::Compacted { oldest: 5, newest: 15, after: a } if a == after),
            "{told:?}"
        );
    }
    drop(store);
    let again = SqliteStore::open(dir.path()).unwrap();
    assert!(matches!(again.watch(4).next().await, Some(Err(StoreError::Compacted { .. }))));
    assert_eq!(again.commit(put("k", vec![1])).await.unwrap(), 16, "revisions go on after a cut");
}

#[tokio::test]
async fn history_is_cut_by_bytes_and_the_newest_commit_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store =
        open_short(dir.path(), History { min_commits: 1_000, max_bytes: 100_000, stride_commits: 100 });
    for _ in 0..40 {
        store.commit(put("k", vec![1; 10_000])).await.unwrap();
        let (oldest, newest) = store_span(&store).await;
        assert!((newest - oldest) * 10_000 <= 100_000, "{oldest}..{newest}");
        assert!(oldest < newest);
    }
    store.commit(put("k", vec![1; 300_000])).await.unwrap();
    assert_eq!(store_span(&store).await, (40, 41), "one that is heavier than all history stays alone");
    assert_eq!(store.range("").await.unwrap().0, 41);
}

/// Where the log begins and ends, as a watch is told.
async fn store_span(store: &SqliteStore) -> (Revision, Revision) {
    match store.watch(Revision::MAX / 2).next().await {
        Some(Err(StoreError::Compacted { oldest, newest, .. })) => (oldest, newest),
        other => panic!("a watch from a revision that is not there yet is refused, this was {other:?}"),
    }
}

#[tokio::test]
async fn a_watch_that_falls_behind_the_live_commits_misses_none() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    let mut watch = store.watch(0);
    store.commit(put("first", vec![])).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, 1);
    let many = 3 * MAX_LIVE_COMMITS as u64;
    for _ in 0..many {
        store.commit(put("k", vec![])).await.unwrap();
    }
    let seen: Vec<_> = watch.take(many as usize).map(|c| c.unwrap().revision).collect().await;
    assert_eq!(seen, (2..=many + 1).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_watch_ends_with_an_error_when_the_store_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    let mut watch = store.watch(0);
    store.commit(put("k", vec![])).await.unwrap();
    assert!(watch.next().await.unwrap().is_ok());
    drop(store);
    assert_eq!(watch.next().await.unwrap().unwrap_err().to_string(), "the store cannot be read or written");
    assert!(watch.next().await.is_none());
    SqliteStore::open(dir.path()).expect("a watch holds no part of a closed store");
}

#[test]
fn the_limits_of_history_are_those_of_the_contract() {
    let history = History::default();
    assert_eq!((history.min_commits, history.max_bytes), (MIN_HISTORY_COMMITS, MAX_HISTORY_BYTES));
}

#[tokio::test]
async fn a_process_that_was_replaced_while_it_stood_still_writes_nothing_and_leaves_a_note() {
    let dir = tempfile::tempdir().unwrap();
    let first = SqliteStore::open(dir.path()).unwrap();
    first.commit(put("a", "1")).await.unwrap();
    assert_eq!(first.renew().await.unwrap(), []);
    // It has the folder's lock and does not renew: as a process that is stopped.
    let patience = Duration::from_millis(200);
    let folder = dir.path().to_owned();
    let standby = tokio::task::spawn_blocking(move || SqliteStore::stand_by(&folder, patience, || false));
    let second = standby.await.unwrap().unwrap().expect("it takes over");
    assert!(second.epoch() > first.epoch());
    second.commit(put("b", "2")).await.unwrap();
    let late = first.commit(put("a", "3")).await;
    assert!(matches!(late, Err(StoreError::Fenced { ours, theirs }) if ours < theirs), "{late:?}");
    assert!(matches!(first.renew().await, Err(StoreError::Fenced { .. })));
    let (_, entries) = second.range("").await.unwrap();
    let values: Vec<_> = entries.iter().map(|entry| &entry.value[..]).collect();
    assert_eq!(values, [&b"1"[..], &b"2"[..]]);
    let notes = second.renew().await.unwrap();
    assert_eq!(notes, [RefusedWrites { epoch: first.epoch(), batches: 1 }]);
    // Killed before it has told anybody: the note is there for whoever leads next.
    assert_eq!(second.renew().await.unwrap(), notes);
    assert!(first.commit(put("a", "4")).await.is_err());
    second.forget_refused(notes[0]).await.unwrap();
    let since = second.renew().await.unwrap();
    assert_eq!(since, [RefusedWrites { epoch: first.epoch(), batches: 1 }], "what came since is still noted");
    second.forget_refused(since[0]).await.unwrap();
    assert_eq!(second.renew().await.unwrap(), []);
    assert!(matches!(SqliteStore::open(dir.path()), Err(StoreError::Locked)));
    drop(first);
    second.renew().await.unwrap();
    assert!(matches!(SqliteStore::open(dir.path()), Err(StoreError::Locked)), "the second has the lock now");
}

#[tokio::test]
async fn who_stands_by_waits_as_long_as_the_one_that_leads_shows_that_it_lives() {
    let dir = tempfile::tempdir().unwrap();
    let first = SqliteStore::open(dir.path()).unwrap();
    let epoch = first.epoch();
    let patience = Duration::from_millis(400);
    let folder = dir.path().to_owned();
    let standby = tokio::task::spawn_blocking(move || SqliteStore::stand_by(&folder, patience, || false));
    let until = Instant::now() + patience * 4;
    while Instant::now() < until {
        first.renew().await.unwrap();
        assert!(!standby.is_finished(), "it took over from a process that lives");
        tokio::time::sleep(patience / 16).await;
    }
    drop(first);
    let second = standby.await.unwrap().unwrap().expect("it takes over");
    assert!(second.epoch() > epoch);
    second.commit(put("a", "1")).await.unwrap();
}

#[tokio::test]
async fn a_part_of_a_family_is_read_without_the_rest_and_what_is_damaged_counts() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    for number in 0..10 {
        store.commit(put(&format!("b/{number}"), "x")).await.unwrap();
    }
    for other in ["a/1", "c/1"] {
        store.commit(put(other, "x")).await.unwrap();
    }
    let keys = |survey: &Survey| survey.entries.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>();
    let part = store.survey_from("b/", "b/4", 3).await.unwrap();
    assert_eq!(keys(&part), ["b/4", "b/5", "b/6"]);
    assert_eq!(
        keys(&store.survey_from("b/", "", 2).await.unwrap()),
        ["b/0", "b/1"],
        "nothing before the family"
    );
    let end = store.survey_from("b/", "b/9", 5).await.unwrap();
    assert_eq!((keys(&end), end.last_key()), (vec!["b/9".to_owned()], Some("b/9")), "nothing after it");
    assert!(store.survey_from("b/", "b/91", 5).await.unwrap().is_empty());
    let without = store.survey_without("b/").await.unwrap();
    assert_eq!((keys(&without), without.revision), (vec!["a/1".to_owned(), "c/1".to_owned()], part.revision));
    assert_eq!(store.survey_without("d/").await.unwrap().entries.len(), 12, "a family that is not there");
    drop(store);
    let file = rusqlite::Connection::open(dir.path().join(FILE)).unwrap();
    file.execute("UPDATE entry SET value = CAST('y' AS BLOB) WHERE key = 'b/5'", ()).unwrap();
    drop(file);
    let store = SqliteStore::open(dir.path()).unwrap();
    let part = store.survey_from("b/", "b/4", 2).await.unwrap();
    assert_eq!(keys(&part), ["b/4"]);
    assert_eq!(part.last_key(), Some("b/5"), "whoever reads on does not read it for ever");
    assert!(store.survey_without("b/").await.unwrap().unsound.is_empty(), "who reads the family finds it");
}

#[tokio::test]
async fn a_large_store_is_served_from_at_once_and_what_is_damaged_in_it_is_found_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    for number in 0..1_000 {
        store.commit(put(&format!("a/{number:04}"), "v".repeat(3_000))).await.unwrap();
    }
    drop(store);
    let path = dir.path().join(FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    assert!(bytes.len() > 5 << 20, "{} bytes are not large", bytes.len());
    let store = SqliteStore::open(dir.path()).unwrap();
    assert_eq!(store.range("a/").await.unwrap().1.len(), 1_000);
    drop(store); // whatever the check has come to: it is interrupted
    // The page of an entry: in the log, there is something between key and value.
    let entry = bytes.windows(9).position(|text| text == b"a/0500vvv").unwrap() / 4_096 * 4_096;
    bytes[entry..entry + 100].fill(0xA5);
    std::fs::write(&path, bytes).unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    let begun = Instant::now();
    let found = loop {
        match store.damage() {
            Some(found) => break found,
            None if begun.elapsed() > Duration::from_secs(30) => panic!("nobody has found it"),
            None => tokio::task::yield_now().await,
        }
    };
    assert!(found.contains(FILE), "{found}");
}
