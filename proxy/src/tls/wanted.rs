//! Names that somebody wanted and that have no certificate, so that each is told once in a while and not at every hello; with
//! what the source says of them, which all who want the same name wait for, and which is remembered as long.
//!
//! Strangers say what these names are. So they have a lock of their own, which no handshake that succeeds takes; they are
//! bounded, for all and for each network, so that one that makes names up takes nobody else's room; and what is over is
//! looked for at intervals, not at each name that finds no room.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use super::places::Network;

/// Whether a certificate comes.
pub(crate) type Answer = Shared<BoxFuture<'static, bool>>;

/// Names that are remembered.
const MAX_NAMES: usize = 4_096;
/// Names of one network that are remembered.
const MAX_NETWORK_NAMES: u32 = 256;
/// How long a name is not told again.
const AGAIN_MS: u64 = 60_000;
/// Least time between two looks for what is over.
const CLEAR_INTERVAL_MS: u64 = 1_000;

/// A name that was told.
struct Told {
    until_ms: u64,
    network: Network,
    answer: Answer,
}

#[derive(Default)]
struct Inner {
    names: HashMap<Box<str>, Told>,
    networks: HashMap<Network, u32>,
    cleared_ms: u64,
}

/// The names of an edge.
#[derive(Default)]
pub(crate) struct Wanted(Mutex<Inner>);

impl Wanted {
    /// What is said of a name that somebody of a network wants. It is told with `tell`, and then not again for a while;
    /// `None` if there is no room for it.
    pub(crate) fn ask(
        &self,
        name: &str,
        network: Network,
        now_ms: u64,
        tell: impl FnOnce() -> BoxFuture<'static, bool>,
    ) -> Option<Answer> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match inner.names.get(name) {
            Some(told) if told.until_ms > now_ms => return Some(told.answer.clone()),
            Some(_) => inner.forget(name),
            None => {}
        }
        if !inner.has_room(network) {
            inner.clear(now_ms);
            if !inner.has_room(network) {
                return None;
            }
        }
        // Under the lock, so that it is told once; it returns at once.
        let answer = tell().shared();
        let told = Told { until_ms: now_ms + AGAIN_MS, network, answer: answer.clone() };
        inner.names.insert(name.into(), told);
        *inner.networks.entry(network).or_default() += 1;
        Some(answer)
    }
}

impl Inner {
    fn has_room(&self, network: Network) -> bool {
        let own = self.networks.get(&network).copied().unwrap_or(0);
        self.names.len() < MAX_NAMES && own < MAX_NETWORK_NAMES
    }

    fn forget(&mut self, name: &str) {
        let Some(told) = self.names.remove(name) else { return };
        if let Some(count) = self.networks.get_mut(&told.network) {
            *count -= 1;
            if *count == 0 {
                self.networks.remove(&told.network);
            }
        }
    }

    fn clear(&mut self, now_ms: u64) {
        if now_ms < self.cleared_ms + CLEAR_INTERVAL_MS {
            return;
        }
        self.cleared_ms = now_ms;
        self.names.retain(|_, told| told.until_ms > now_ms);
        self.networks.clear();
        for told in self.names.values() {
            *self.networks.entry(told.network).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(number: u8) -> Network {
        Network::of([10, 0, number, 1].into())
    }

    impl Wanted {
        /// Whether it was told.
        fn is_new(&self, name: &str, network: Network, now_ms: u64) -> bool {
            let mut told = false;
            let no = || {
                told = true;
                std::future::ready(false).boxed()
            };
            drop(self.ask(name, network, now_ms, no));
            told
        }
    }

    #[test]
    fn what_is_said_of_a_name_is_remembered_as_long_as_it_is_not_told_again() {
        let wanted = Wanted::default();
        let ask = |now_ms, says| {
            let answer = wanted.ask("a.test", network(1), now_ms, || std::future::ready(says).boxed());
            answer.and_then(|answer| answer.now_or_never())
        };
        assert_eq!(ask(1_000, false), Some(false));
        assert_eq!(ask(1_000 + AGAIN_MS - 1, true), Some(false), "nobody was asked");
        assert_eq!(ask(1_000 + AGAIN_MS, true), Some(true));
    }

    #[test]
    fn a_name_is_told_once_in_a_while_whoever_wants_it() {
        let wanted = Wanted::default();
        assert!(wanted.is_new("a.test", network(1), 1_000));
        assert!(!wanted.is_new("a.test", network(2), 1_000 + AGAIN_MS - 1));
        assert!(wanted.is_new("b.test", network(1), 1_000));
        assert!(wanted.is_new("a.test", network(2), 1_000 + AGAIN_MS));
    }

    #[test]
    fn a_network_that_makes_names_up_takes_nobody_elses_room_and_has_its_own_again_later() {
        let wanted = Wanted::default();
        let flood = |number: u8, now_ms: u64| {
            (0..10_000)
                .filter(|name| wanted.is_new(&format!("{number}-{name}-{now_ms}"), network(number), now_ms))
                .count()
        };
        assert_eq!(flood(1, 5_000), MAX_NETWORK_NAMES as usize);
        assert!(wanted.is_new("honest.test", network(2), 5_000));
        assert_eq!(flood(1, 5_000 + AGAIN_MS), MAX_NETWORK_NAMES as usize, "the room of those that are over");
        let all: usize = (3..60).map(|number| flood(number, 6_000 + AGAIN_MS)).sum();
        assert_eq!(all, MAX_NAMES - MAX_NETWORK_NAMES as usize, "for all of them together");
    }

    #[test]
    fn what_is_over_is_looked_for_at_intervals() {
        let wanted = Wanted::default();
        let mut names = (0..).map(|number: u32| number.to_string());
        let mut is_new = |now_ms| wanted.is_new(&names.next().expect("one more"), network(1), now_ms);
        assert!(is_new(1_000));
        for _ in 1..MAX_NETWORK_NAMES {
            assert!(is_new(1_500));
        }
        // The first one is over by now, and nothing else; then everything is, and nobody looks.
        assert!(is_new(1_000 + AGAIN_MS) && !is_new(1_000 + AGAIN_MS));
        assert!(!is_new(1_500 + AGAIN_MS));
        assert!(is_new(1_000 + AGAIN_MS + CLEAR_INTERVAL_MS));
    }
}
