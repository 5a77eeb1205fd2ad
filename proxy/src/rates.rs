//! What keys have used up of their rate limits, for all cores: a client's connections may be on several.
//!
//! Only requests of services with a limit come here, and take the lock of one shard. Clients choose what they are counted by,
//! so keys are hashed with a secret of this process: nobody can choose one that is another's, or that is in the shard of
//! one's choice. They are bounded, for all and for each service. When there is no room, those with nothing used up are
//! forgotten, and if that makes none, the new keys of a service share one: a flood at one service leaves the others alone.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use peregrine_routing::RateLimit;

/// Keys that share a lock.
const SHARDS: usize = 64;
/// Keys of one shard. In all a quarter of a million, of some 24 bytes each.
const MAX_KEYS: usize = 4_096;
/// Keys of one service in one shard.
const MAX_SERVICE_KEYS: u32 = 1_024;
/// Least time between two clearings of a shard, which look at all of its keys.
const CLEAR_INTERVAL_US: u64 = 1_000_000;

/// What a request is counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    service: u64,
    /// `None` is shared by those for which there is no room.
    own: Option<u64>,
}

/// What sets a client of a service apart from another one.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) enum Own<'r> {
    /// Of a network.
    Address(&'r [u8]),
    /// Of a field that it sends.
    Value(&'r [u8]),
}

#[derive(Debug, Default)]
struct Shard {
    states_us: HashMap<Key, u64>,
    /// Keys of their own, by service.
    services: HashMap<u64, u32>,
    cleared_us: u64,
}

/// All keys.
#[derive(Debug)]
pub(crate) struct Rates {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
}

impl Default for Rates {
    fn default() -> Self {
        let shards = std::iter::repeat_with(Mutex::default).take(SHARDS).collect();
        Self { shards, hasher: RandomState::new() }
    }
}

impl Rates {
    /// The key of a client of a service.
    pub(crate) fn key(&self, service: &str, own: Own<'_>) -> Key {
        Key { service: self.hasher.hash_one(service), own: Some(self.hasher.hash_one(own)) }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// Microseconds until the next one fits.
    pub(crate) fn take(&self, limit: &RateLimit, key: Key, now_us: u64) -> Result<(), u64> {
        let at = (key.service ^ key.own.unwrap_or(0)) as usize % SHARDS;
        let mut shard = self.shards[at].lock().unwrap_or_else(PoisonError::into_inner);
        let key = shard.room_for(key, now_us);
        let state_us = shard.states_us.get(&key).copied().unwrap_or(0);
        let next_us = limit.take(state_us, now_us)?;
        if shard.states_us.insert(key, next_us).is_none() && key.own.is_some() {
            *shard.services.entry(key.service).or_default() += 1;
        }
        Ok(())
    }
}

impl Shard {
    fn room_for(&mut self, key: Key, now_us: u64) -> Key {
        if self.states_us.contains_key(&key) || self.has_room(key.service) {
            return key;
        }
        if now_us >= self.cleared_us + CLEAR_INTERVAL_US {
            self.cleared_us = now_us;
            self.clear(now_us);
        }
        if self.has_room(key.service) { key } else { Key { own: None, ..key } }
    }

    fn has_room(&self, service: u64) -> bool {
        let own = self.services.get(&service).copied().unwrap_or(0);
        self.states_us.len() < MAX_KEYS && own < MAX_SERVICE_KEYS
    }

    fn clear(&mut self, now_us: u64) {
        self.states_us.retain(|_, state_us| *state_us > now_us);
        self.services.clear();
        for key in self.states_us.keys().filter(|key| key.own.is_some()) {
            *self.services.entry(key.service).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use peregrine_routing::{RateKey, stable_hash};

    use super::*;

    const LIMIT: RateLimit = RateLimit { requests: 1, per_ms: 60_000, burst: 2, by: RateKey::ClientAddress };

    /// A key in the first shard.
    const fn key(service: u64, own: u64) -> Key {
        Key { service: service << 6, own: Some(own << 6) }
    }

    #[test]
    fn keys_are_counted_each_for_itself() {
        let rates = Rates::default();
        for key in [key(1, 7), key(2, 7), key(1, 8), Key { service: 1, own: None }] {
            assert_eq!([1, 2, 3].map(|now_us| rates.take(&LIMIT, key, now_us).is_ok()), [true, true, false]);
        }
    }

    #[test]
    fn what_a_client_sends_does_not_tell_which_key_it_is() {
        let (rates, others) = (Rates::default(), Rates::default());
        let value = Own::Value(b"\x7f\0\0\x01");
        assert_eq!(rates.key("web", value), rates.key("web", value));
        assert_ne!(rates.key("web", value), others.key("web", value), "each process has a secret of its own");
        assert_ne!(rates.key("web", value).own, Some(stable_hash(b"\x7f\0\0\x01")));
        assert_ne!(rates.key("web", value), rates.key("shop", value));
        assert_ne!(
            rates.key("web", value),
            rates.key("web", Own::Address(b"\x7f\0\0\x01")),
            "nor an address"
        );
    }

    #[test]
    fn a_flood_of_keys_is_bounded_and_those_without_room_share_one_with_their_service_alone() {
        let rates = Rates::default();
        let now_us = 10_000_000;
        let flood = |service: u64| {
            (1..=20_000).filter(|own| rates.take(&LIMIT, key(service, *own), now_us).is_ok()).count()
        };
        assert_eq!(flood(1), MAX_SERVICE_KEYS as usize + 2, "all are in one shard");
        assert_eq!(flood(2), MAX_SERVICE_KEYS as usize + 2, "another service has as much room as before");
        for service in 3..=9 {
            assert!(flood(service) >= 2, "and none is without");
        }
        assert!(rates.shards[0].lock().expect("lock").states_us.len() <= MAX_KEYS + 9);
        // When their time is over, they make room.
        assert!(rates.take(&LIMIT, key(1, 30_000), now_us + 200_000_000).is_ok());
        assert_eq!(rates.shards[0].lock().expect("lock").states_us.len(), 1);
    }
}
