//! Connections by where they come from: a cap on those of one source network (one IPv4 address, one /64 of IPv6, or as
//! configured), over all cores.
//!
//! Nothing of this runs without such a cap. With one, a connection takes a lock of one shard when it is accepted and when
//! it ends, and a request none. A network is known for as long as it has connections: there are never more of them than
//! connections.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Networks that share a lock.
const SHARDS: usize = 64;

/// The connections of every source network.
#[derive(Debug)]
pub(crate) struct Sources {
    most: u32,
    v4_prefix_bits: u8,
    v6_prefix_bits: u8,
    shards: Box<[Mutex<HashMap<u128, u32>>]>,
}

/// A connection's place among those of its source; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct SourcePlace {
    sources: Arc<Sources>,
    network: u128,
}

impl Sources {
    pub(crate) fn new(most: u32, v4_prefix_bits: u8, v6_prefix_bits: u8) -> Arc<Self> {
        let shards = std::iter::repeat_with(Mutex::default).take(SHARDS).collect();
        Arc::new(Self { most, v4_prefix_bits, v6_prefix_bits, shards })
    }

    /// A place for one more connection; `None` when its source has all that it may have.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<SourcePlace> {
        let network = self.network(address);
        let mut shard = self.shard(network).lock().unwrap_or_else(PoisonError::into_inner);
        let count = shard.entry(network).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        drop(shard);
        Some(SourcePlace { sources: Arc::clone(self), network })
    }

    /// The network as a number; those of IPv4 lie in a range that no IPv6 client comes from (RFC 4291 §2.5.5.2).
    fn network(&self, address: IpAddr) -> u128 {
        let (bits, keep, width) = match address.to_canonical() {
            IpAddr::V4(v4) => (v4.to_ipv6_mapped().to_bits(), self.v4_prefix_bits, 32),
            IpAddr::V6(v6) => (v6.to_bits(), self.v6_prefix_bits, 128),
        };
        let off = u32::from(width - keep.min(width));
        bits.checked_shr(off).and_then(|bits| bits.checked_shl(off)).unwrap_or(0)
    }

    fn shard(&self, network: u128) -> &Mutex<HashMap<u128, u32>> {
        let folded = (network ^ (network >> 64)) as u64;
        // Fibonacci hashing, see `recent::slot`.
        &self.shards[(folded.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 58) as usize % SHARDS]
    }
}

impl Drop for SourcePlace {
    fn drop(&mut self) {
        let mut shard = self.sources.shard(self.network).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = shard.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                shard.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(sources: &Sources) -> usize {
        sources.shards.iter().map(|shard| shard.lock().expect("lock").len()).sum()
    }

    #[test]
    fn a_network_has_its_cap_and_no_other_feels_it() {
        let sources = Sources::new(2, 32, 64);
        let enter = |text: &str| sources.enter(text.parse().expect("address"));
        let (first, _second) =
            (enter("203.0.113.1").expect("one"), enter("::ffff:203.0.113.1").expect("two"));
        assert!(enter("203.0.113.1").is_none(), "mapped or not, it is one client");
        let _other = enter("203.0.113.2").expect("another address");
        let _six = [enter("2001:db8::1").expect("one"), enter("2001:db8::ffff:1").expect("two")];
        assert!(enter("2001:db8:0:0:1::1").is_none(), "one /64");
        let _seven = enter("2001:db8:0:1::1").expect("another /64");
        drop(first);
        assert!(enter("203.0.113.1").is_some());
    }

    #[test]
    fn networks_without_connections_are_forgotten() {
        let sources = Sources::new(1, 24, 0);
        let places: Vec<_> = (0..=255).filter_map(|n| sources.enter(IpAddr::from([10, 0, n, 7]))).collect();
        assert_eq!((places.len(), known(&sources)), (256, 256));
        assert!(sources.enter(IpAddr::from([10, 0, 9, 200])).is_none(), "one /24");
        let all_of_v6 = sources.enter("2001:db8::1".parse().expect("address")).expect("one");
        assert!(sources.enter("fe80::1".parse().expect("address")).is_none());
        drop((places, all_of_v6));
        assert_eq!(known(&sources), 0);
    }
}
