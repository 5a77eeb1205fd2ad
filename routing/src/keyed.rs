//! A persistent map by key: 2^18 buckets of a keyed hash, made when they are needed.
//!
//! It never grows as a whole, so that no single change has to pay for a million others; a clone shares
//! everything with its original but the path to what was changed since.

use std::borrow::Borrow;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

use crate::radix::Radix;

#[derive(Clone, Debug)]
pub(crate) struct Keyed<K, V> {
    buckets: Radix<Bucket<K, V>, 3>,
    hasher: RandomState,
    len: usize,
}

#[derive(Clone, Debug)]
struct Bucket<K, V> {
    /// One bit for each entry, out of its tag: most keys that are not here are turned away without a look
    /// at the entries, which are a cache miss further.
    filter: u64,
    /// Shared by the copies of the leaf that holds it, until it is changed itself.
    entries: Arc<[Entry<K, V>]>,
}

#[derive(Clone, Debug)]
struct Entry<K, V> {
    /// Low half of the hash: spares the reader the cache miss of comparing another key.
    tag: u32,
    key: K,
    value: V,
}

impl<K, V> Default for Keyed<K, V> {
    fn default() -> Self {
        Self { buckets: Radix::default(), hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Keyed<K, V> {
    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.get_hashed(self.hash(key), key)
    }

    /// What [`Self::get_hashed`] is asked with.
    pub(crate) fn hash<Q: Hash + ?Sized>(&self, key: &Q) -> u64 {
        self.hasher.hash_one(key)
    }

    /// [`Self::get`] with a hash that is there already. Who looks in two maps makes both hashes first: then the processor waits
    /// for both buckets at once.
    pub(crate) fn get_hashed<Q>(&self, hash: u64, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Eq + ?Sized,
    {
        let bucket = self.buckets.get(Self::bucket(hash)).filter(|bucket| bucket.filter & bit(hash) != 0)?;
        let here = |entry: &&Entry<K, V>| entry.tag == hash as u32 && entry.key.borrow() == key;
        bucket.entries.iter().find(here).map(|entry| &entry.value)
    }

    /// Replaces the value of `key` by what `next` makes of it; `None` is no value.
    pub(crate) fn update(&mut self, key: &K, next: impl FnOnce(Option<V>) -> Option<V>) {
        let hash = self.hasher.hash_one(key);
        let slot = self.buckets.slot(Self::bucket(hash));
        let entries = slot.as_ref().map_or(&[][..], |bucket| &bucket.entries);
        let at = entries.iter().position(|entry| entry.tag == hash as u32 && entry.key == *key);
        let value = next(at.map(|at| entries[at].value.clone()));
        self.len = self.len + usize::from(value.is_some()) - usize::from(at.is_some());
        let entry = value.map(|value| Entry { tag: hash as u32, key: key.clone(), value });
        let (before, after) = entries.split_at(at.unwrap_or(entries.len()));
        let others = before.iter().chain(after.get(1..).unwrap_or(&[]));
        // Of a length that is known beforehand, so that it is allocated once.
        let entries: Arc<[Entry<K, V>]> = others.cloned().chain(entry).collect();
        let filter = entries.iter().fold(0, |filter, entry| filter | bit(u64::from(entry.tag)));
        *slot = (!entries.is_empty()).then_some(Bucket { filter, entries });
    }

    pub(crate) fn insert(&mut self, key: &K, value: V) {
        self.update(key, |_| Some(value));
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let mut gone = None;
        self.update(key, |before| {
            gone = before;
            None
        });
        gone
    }

    pub(crate) fn for_each<'a>(&'a self, mut visit: impl FnMut(&'a V)) {
        self.buckets.for_each(|bucket| bucket.entries.iter().for_each(|entry| visit(&entry.value)));
    }

    fn bucket(hash: u64) -> u64 {
        hash >> (64 - Radix::<Bucket<K, V>, 3>::BITS)
    }
}

/// The bit of a hash in the filter of its bucket; of the half that is the tag.
const fn bit(hash: u64) -> u64 {
    1 << (hash & 63)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::hash::Hasher;

    use proptest::prelude::*;

    use super::*;

    /// A key whose hash is that of every other: all of them share one bucket and one tag.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Colliding(u8);

    impl Hash for Colliding {
        fn hash<H: Hasher>(&self, state: &mut H) {
            state.write_u8(0);
        }
    }

    const KEYS: u8 = 6;

    type Steps = Vec<(u8, Option<u8>)>;

    /// Every step against a plain map; and a copy that was kept on the way stays as it was.
    fn assert_is_map<K: Clone + Eq + Hash>(
        steps: &Steps,
        keep_at: usize,
        key: impl Fn(u8) -> K,
    ) -> Result<(), TestCaseError> {
        let (mut map, mut model) = (Keyed::<K, u8>::default(), HashMap::new());
        let mut kept = (map.clone(), model.clone());
        for (i, (number, value)) in steps.iter().enumerate() {
            if i == keep_at {
                kept = (map.clone(), model.clone());
            }
            match value {
                Some(value) => {
                    map.insert(&key(*number), *value);
                    model.insert(*number, *value);
                }
                None => prop_assert_eq!(map.remove(&key(*number)), model.remove(number)),
            }
            for (map, model) in [(&map, &model), (&kept.0, &kept.1)] {
                prop_assert_eq!(map.is_empty(), model.is_empty());
                for number in 0..KEYS {
                    prop_assert_eq!(map.get(&key(number)), model.get(&number));
                }
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn it_is_a_map_whose_older_copies_stay_as_they_were(
            steps in prop::collection::vec((0..KEYS, prop::option::weighted(0.6, 0_u8..9)), 1..60),
            keep_at in 0_usize..60,
        ) {
            assert_is_map(&steps, keep_at, |number| number)?;
            assert_is_map(&steps, keep_at, Colliding)?;
        }
    }
}
