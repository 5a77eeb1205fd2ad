//! What every store promises, shown on SQLite.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use peregrine_engine::store::{
    Batch, Committed, MAX_BATCH_BYTES, MAX_BATCH_WRITES, MAX_KEY_BYTES, MAX_VALUE_BYTES, Precondition,
    Revision, SqliteStore, Store, StoreError, Write,
};

fn store() -> (tempfile::TempDir, SqliteStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    (dir, store)
}

fn put(key: &str, value: &str) -> Write {
    Write::Put(key.to_owned(), Bytes::copy_from_slice(value.as_bytes()))
}

fn delete(key: &str) -> Write {
    Write::Delete(key.to_owned())
}

fn batch(writes: Vec<Write>) -> Batch {
    Batch { preconditions: Vec::new(), writes }
}

async fn keys(store: &SqliteStore, prefix: &str) -> Vec<(String, String, Revision)> {
    let text = |value: &Bytes| String::from_utf8(value.to_vec()).unwrap();
    let entries = store.range(prefix).await.unwrap().1;
    entries.into_iter().map(|e| (e.key, text(&e.value), e.revision)).collect()
}

#[tokio::test]
async fn each_precondition_holds_or_refuses() {
    let (_dir, store) = store();
    store.commit(batch(vec![put("other", "x"), put("there", "1")])).await.unwrap();
    let changed = store.commit(batch(vec![put("there", "2")])).await.unwrap();
    let key = || "there".to_owned();
    let none = || "none".to_owned();
    let holds = [
        Precondition::Absent(none()),
        Precondition::Present(key()),
        Precondition::Unchanged(key(), changed),
        Precondition::Equals(key(), Bytes::from_static(b"2")),
    ];
    for precondition in holds {
        let ask = Batch { preconditions: vec![precondition.clone()], writes: vec![put("seen", "yes")] };
        store.commit(ask).await.unwrap_or_else(|e| panic!("{precondition:?}: {e}"));
    }
    let refused = [
        (Precondition::Absent(key()), "the store has moved on: there is there, since revision 2"),
        (Precondition::Present(none()), "the store has moved on: none is not there"),
        (Precondition::Unchanged(key(), 1), "the store has moved on: there was changed at revision 2, not 1"),
        (
            Precondition::Unchanged(none(), 1),
            "the store has moved on: none is not there, it was expected as of revision 1",
        ),
        (
            Precondition::Equals(key(), Bytes::from_static(b"1")),
            "the store has moved on: there has another value",
        ),
        (Precondition::Equals(none(), Bytes::new()), "the store has moved on: none is not there"),
    ];
    for (precondition, words) in refused {
        // One that holds beside it does not help.
        let preconditions = vec![Precondition::Present("other".to_owned()), precondition.clone()];
        let error = store.commit(Batch { preconditions, writes: vec![put("bad", "x")] }).await.unwrap_err();
        assert!(matches!(error, StoreError::Conflict(_)), "{precondition:?}: {error:?}");
        assert_eq!(error.to_string(), words);
    }
    assert_eq!(keys(&store, "bad").await, []);
    assert_eq!(store.range("").await.unwrap().0, 6, "a refused batch takes no revision");
}

#[tokio::test]
async fn preconditions_look_at_the_store_before_the_batch() {
    let (_dir, store) = store();
    let ask = Batch {
        preconditions: vec![Precondition::Absent("k".to_owned())],
        writes: vec![put("k", "1"), delete("k"), put("k", "2")],
    };
    store.commit(ask.clone()).await.unwrap();
    assert_eq!(keys(&store, "").await, [("k".to_owned(), "2".to_owned(), 1)]);
    store.commit(ask).await.unwrap_err();
}

#[tokio::test]
async fn of_many_that_claim_the_same_key_at_once_exactly_one_wins() {
    let (_dir, store) = store();
    let store = Arc::new(store);
    let claims: Vec<_> = (0..100)
        .map(|who| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let preconditions = vec![Precondition::Absent("claim".to_owned())];
                let writes = vec![put("claim", &who.to_string()), put(&format!("won/{who}"), "")];
                store.commit(Batch { preconditions, writes }).await.map(|_| who)
            })
        })
        .collect();
    let mut winners = Vec::new();
    for claim in claims {
        match claim.await.unwrap() {
            Ok(who) => winners.push(who),
            Err(error) => assert!(matches!(error, StoreError::Conflict(_)), "{error:?}"),
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(keys(&store, "won/").await.len(), 1);
    assert_eq!(keys(&store, "claim").await[0].1, winners[0].to_string());
}

#[tokio::test]
async fn a_range_has_exactly_the_prefix_in_order_of_bytes() {
    let (_dir, store) = store();
    let all = ["a", "a/", "a/1", "a/10", "a/2", "a/é", "a0", "b", "A/1", "a/\u{10ffff}"];
    store.commit(batch(all.iter().map(|k| put(k, "")).collect())).await.unwrap();
    for prefix in ["", "a", "a/", "a/1", "a/é", "a/\u{10ffff}", "zz", "A"] {
        let mut expected: Vec<_> =
            all.iter().filter(|k| k.starts_with(prefix)).map(|k| (*k).to_owned()).collect();
        expected.sort();
        let found: Vec<_> = keys(&store, prefix).await.into_iter().map(|(key, ..)| key).collect();
        assert_eq!(found, expected, "prefix {prefix:?}");
    }
}

#[tokio::test]
async fn a_range_is_of_one_revision_while_others_write() {
    let (_dir, store) = store();
    let store = Arc::new(store);
    store.commit(batch(vec![put("left", "0"), put("right", "0")])).await.unwrap();
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        for number in 1..=80 {
            let text = number.to_string();
            writer.commit(batch(vec![put("left", &text), put("right", &text)])).await.unwrap();
        }
    });
    while !writing.is_finished() {
        let (revision, entries) = store.range("").await.unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].value, entries[1].value, "half a batch was read");
        assert_eq!(entries[0].value, (revision - 1).to_string(), "the revision is not of these values");
        assert_eq!(entries[0].revision, revision);
        tokio::task::yield_now().await;
    }
    writing.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_from_every_revision_see_every_commit_in_order_while_many_commit() {
    const WRITERS: u64 = 4;
    const EACH: u64 = 60;
    const TOTAL: u64 = WRITERS * EACH;
    let (_dir, store) = store();
    let store = Arc::new(store);
    let watch_to_the_end = |store: &SqliteStore, after: Revision| {
        let rest = store.watch(after).take((TOTAL - after) as usize).map(Result::unwrap);
        (after, tokio::spawn(rest.collect::<Vec<Committed>>()))
    };
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut watches = Vec::new();
                for number in 0..EACH {
                    let writes = vec![put(&format!("{writer}/{number}"), "v")];
                    let revision = store.commit(batch(writes)).await.unwrap();
                    watches.push(watch_to_the_end(&store, revision)); // in the midst of the others' commits
                }
                watches
            })
        })
        .collect();
    let mut watches = vec![watch_to_the_end(&store, 0)];
    for writer in writers {
        watches.extend(writer.await.unwrap());
    }
    assert_eq!(watches.len() as u64, TOTAL + 1, "one from every revision");
    let mut whole = Vec::new();
    for (after, watch) in watches {
        let seen = watch.await.unwrap();
        assert_eq!(
            seen.iter().map(|c| c.revision).collect::<Vec<_>>(),
            (after + 1..=TOTAL).collect::<Vec<_>>()
        );
        if after == 0 {
            whole = seen;
        } else {
            assert_eq!(seen, whole[after as usize..], "a watch from {after} tells another story");
        }
    }
}

#[tokio::test]
async fn replaying_every_commit_gives_the_same_as_a_range() {
    let (_dir, store) = store();
    let script = [
        vec![put("a", "1"), put("b", "1")],
        vec![delete("a"), put("c", "1")],
        vec![],
        vec![put("a", "2"), put("a", "3"), delete("none")],
        vec![delete("b"), put("b", "4")],
    ];
    let count = script.len();
    for writes in script {
        store.commit(batch(writes)).await.unwrap();
    }
    let mut replayed = std::collections::BTreeMap::new();
    let story: Vec<_> = store.watch(0).take(count).map(Result::unwrap).collect().await;
    for committed in story {
        for write in committed.writes {
            match write {
                Write::Put(key, value) => replayed.insert(key, (value, committed.revision)),
                Write::Delete(key) => replayed.remove(&key),
            };
        }
    }
    let (revision, entries) = store.range("").await.unwrap();
    assert_eq!(revision, count as u64);
    let ranged = entries.into_iter().map(|e| (e.key, (e.value, e.revision))).collect();
    assert_eq!(replayed, ranged);
}

#[tokio::test]
async fn a_watch_from_a_revision_that_is_not_there_yet_is_refused() {
    let (_dir, store) = store();
    store.commit(batch(vec![put("k", "1")])).await.unwrap();
    let told = store.watch(2).next().await.unwrap().unwrap_err();
    assert_eq!(
        told.to_string(),
        "commits after revision 2 are not in the log, which begins after 0 and ends at 1"
    );
}

#[tokio::test]
async fn a_lease_has_one_holder_and_its_token_rises_when_it_changes_hands() {
    let (dir, store) = store();
    let first = store.lease("leader", "a", 1_000, 500).await.unwrap();
    assert_eq!((first.granted, first.token, first.expires_at, &*first.holder), (true, 1, 1_500, "a"));
    let refused = store.lease("leader", "b", 1_499, 500).await.unwrap();
    assert_eq!(
        (refused.granted, refused.token, refused.expires_at, &*refused.holder),
        (false, 1, 1_500, "a")
    );
    let renewed = store.lease("leader", "a", 1_400, 500).await.unwrap();
    assert_eq!((renewed.granted, renewed.token, renewed.expires_at), (true, 1, 1_900));
    assert!(!store.lease("leader", "b", 1_600, 500).await.unwrap().granted, "it was renewed");
    assert!(store.lease("other", "b", 1_600, 500).await.unwrap().granted, "another lease is another lease");
    drop(store);
    let store = SqliteStore::open(dir.path()).unwrap();
    assert!(!store.lease("leader", "b", 1_600, 500).await.unwrap().granted, "a lease survives a restart");
    let taken = store.lease("leader", "b", 1_900, 500).await.unwrap();
    assert_eq!((taken.granted, taken.token, &*taken.holder), (true, 2, "b"));
    let late = store.lease("leader", "a", 2_000, 500).await.unwrap();
    assert_eq!((late.granted, late.token), (false, 2), "the old holder learns that it was replaced");
    assert_eq!(store.range("").await.unwrap(), (0, Vec::new()), "a lease is no commit");
}

#[tokio::test]
async fn each_limit_takes_what_is_at_it_and_refuses_what_is_beyond() {
    let (_dir, store) = store();
    let big = |bytes: usize| Write::Put("k".to_owned(), vec![1; bytes].into());
    let many = |count: usize| batch((0..count).map(|n| put(&format!("{n}"), "")).collect());
    store.commit(batch(vec![put(&"k".repeat(MAX_KEY_BYTES), "")])).await.unwrap();
    store.commit(batch(vec![big(MAX_VALUE_BYTES)])).await.unwrap();
    store.commit(many(MAX_BATCH_WRITES)).await.unwrap();
    let whole = MAX_BATCH_BYTES - 4 * MAX_VALUE_BYTES + MAX_VALUE_BYTES - 4;
    store
        .commit(batch(vec![big(MAX_VALUE_BYTES), big(MAX_VALUE_BYTES), big(MAX_VALUE_BYTES), big(whole)]))
        .await
        .unwrap();

    let refused = [
        (
            batch(vec![put(&"k".repeat(MAX_KEY_BYTES + 1), "")]),
            "the key kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk… has 513 bytes, the limit is 512",
        ),
        (batch(vec![big(MAX_VALUE_BYTES + 1)]), "the value of k has 4194305 bytes, the limit is 4194304"),
        (
            many(MAX_BATCH_WRITES + 1),
            "a batch has 1025 writes, the limit is 1024: commit them in several batches",
        ),
        (
            batch(vec![big(MAX_VALUE_BYTES), big(MAX_VALUE_BYTES), big(MAX_VALUE_BYTES), big(whole + 1)]),
            "a batch has 16777217 bytes, the limit is 16777216: commit it in several batches",
        ),
        (
            Batch {
                preconditions: vec![Precondition::Absent("x".to_owned()); MAX_BATCH_WRITES + 1],
                writes: Vec::new(),
            },
            "a batch has 1025 preconditions, the limit is 1024: commit them in several batches",
        ),
    ];
    let before = store.range("").await.unwrap().0;
    for (ask, words) in refused {
        let error = store.commit(ask).await.unwrap_err();
        assert!(matches!(error, StoreError::TooLarge(_)));
        assert_eq!(error.to_string(), words);
    }
    let error = store.lease(&"n".repeat(MAX_KEY_BYTES + 1), "a", 0, 1).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge(_)));
    assert_eq!(store.range("").await.unwrap().0, before);
}

#[tokio::test]
async fn what_was_committed_is_there_when_it_is_opened_again() {
    let (dir, store) = store();
    store.commit(batch(vec![put("k", "1")])).await.unwrap();
    drop(store);
    let store = SqliteStore::open(dir.path()).unwrap();
    assert_eq!(keys(&store, "").await, [("k".to_owned(), "1".to_owned(), 1)]);
    assert_eq!(store.commit(batch(vec![put("k", "2")])).await.unwrap(), 2);
}

#[tokio::test]
async fn a_second_open_is_refused_until_the_first_is_closed() {
    let (dir, store) = store();
    let refused = SqliteStore::open(dir.path()).unwrap_err();
    assert!(matches!(refused, StoreError::Locked), "{refused:?}");
    store.commit(batch(vec![put("k", "1")])).await.expect("the first one is not disturbed");
    drop(store);
    SqliteStore::open(dir.path()).unwrap();
}

#[tokio::test]
async fn the_folder_and_its_files_are_for_the_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("new/data");
    let store = SqliteStore::open(&data).unwrap();
    store.commit(batch(vec![put("secret", "s")])).await.unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&data), 0o700);
    let mut names = Vec::new();
    for file in data.read_dir().unwrap() {
        let path = file.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    assert_eq!(names, ["store.db", "store.db-shm", "store.db-wal", "store.lock"]);
}

#[tokio::test]
async fn a_closed_store_is_one_file_that_can_be_copied() {
    let (dir, store) = store();
    store.commit(batch(vec![put("k", "1")])).await.unwrap();
    drop(store);
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.path().join("store.db"), copy.path().join("store.db")).unwrap();
    let store = SqliteStore::open(copy.path()).unwrap();
    assert_eq!(keys(&store, "").await, [("k".to_owned(), "1".to_owned(), 1)]);
}
