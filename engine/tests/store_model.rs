//! The store against the simplest thing that does the same: a map.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::StreamExt;
use peregrine_engine::store::{Batch, Committed, Entry, Precondition, SqliteStore, Store, StoreError, Write};
use proptest::prelude::*;

#[derive(Debug, Default)]
struct Model {
    entries: BTreeMap<String, (Bytes, u64)>,
    log: Vec<Committed>,
}

impl Model {
    fn commit(&mut self, batch: &Batch) -> Option<u64> {
        let holds = |precondition: &Precondition| match precondition {
            Precondition::Absent(key) => !self.entries.contains_key(key),
            Precondition::Present(key) => self.entries.contains_key(key),
            Precondition::Unchanged(key, at) => self.entries.get(key).is_some_and(|(_, r)| r == at),
            Precondition::Equals(key, value) => self.entries.get(key).is_some_and(|(v, _)| v == value),
        };
        if !batch.preconditions.iter().all(holds) {
            return None;
        }
        let revision = self.log.len() as u64 + 1;
        for write in &batch.writes {
            match write {
                Write::Put(key, value) => self.entries.insert(key.clone(), (value.clone(), revision)),
                Write::Delete(key) => self.entries.remove(key),
            };
        }
        self.log.push(Committed { revision, writes: batch.writes.clone() });
        Some(revision)
    }

    fn range(&self, prefix: &str) -> Vec<Entry> {
        let entry = |(key, (value, revision)): (&String, &(Bytes, u64))| Entry {
            key: key.clone(),
            value: value.clone(),
            revision: *revision,
        };
        self.entries.iter().filter(|(key, _)| key.starts_with(prefix)).map(entry).collect()
    }
}

fn any_key() -> impl Strategy<Value = String> {
    "[ab]/[0-2]"
}

fn any_value() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(0_u8..3, 0..2).prop_map(Bytes::from)
}

fn any_batch() -> impl Strategy<Value = Batch> {
    let precondition = prop_oneof![
        any_key().prop_map(Precondition::Absent),
        any_key().prop_map(Precondition::Present),
        (any_key(), 0_u64..20).prop_map(|(k, r)| Precondition::Unchanged(k, r)),
        (any_key(), any_value()).prop_map(|(k, v)| Precondition::Equals(k, v)),
    ];
    let write = prop_oneof![
        3 => (any_key(), any_value()).prop_map(|(k, v)| Write::Put(k, v)),
        1 => any_key().prop_map(Write::Delete),
    ];
    (proptest::collection::vec(precondition, 0..2), proptest::collection::vec(write, 0..5))
        .prop_map(|(preconditions, writes)| Batch { preconditions, writes })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_store_does_what_a_map_does(
        batches in proptest::collection::vec((any_batch(), prop::bool::weighted(0.1)), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut store = SqliteStore::open(dir.path()).unwrap();
            let mut model = Model::default();
            for (batch, restart) in batches {
                if restart {
                    drop(store);
                    store = SqliteStore::open(dir.path()).unwrap();
                }
                match (store.commit(batch.clone()).await, model.commit(&batch)) {
                    (Ok(revision), Some(expected)) => prop_assert_eq!(revision, expected),
                    (Err(StoreError::Conflict(_)), None) => {}
                    (got, expected) => prop_assert!(false, "{:?}, the model says {:?}", got, expected),
                }
                for prefix in ["", "a/", "b/1"] {
                    let (revision, entries) = store.range(prefix).await.unwrap();
                    prop_assert_eq!(revision, model.log.len() as u64);
                    prop_assert_eq!(entries, model.range(prefix));
                }
            }
            for after in 0..model.log.len() {
                let rest = &model.log[after..];
                let seen: Vec<_> = store.watch(after as u64).take(rest.len()).map(Result::unwrap).collect().await;
                prop_assert_eq!(&seen[..], rest);
            }
            Ok(())
        })?;
    }
}
