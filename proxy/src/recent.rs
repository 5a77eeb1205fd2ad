//! Where the hosts of the last requests led, per core. Only of hosts all of whose paths lead to one service; the look-up
//! in the table is the truth, this saves making a host canonical for each request (RFC 9110 §4.2.3).

use std::cell::RefCell;
use std::rc::Rc;

use crate::core::ServiceEntry;

/// Hosts that are remembered. Two that meet in one slot take turns.
const SLOTS: usize = 256;
/// Longer hosts are rare, and an attacker's must not be kept.
const MAX_HOST_BYTES: usize = 64;

/// A host's service in one version of the table.
struct Known {
    table: u64,
    /// As it was sent.
    host: Box<[u8]>,
    entry: Rc<ServiceEntry>,
}

/// The routes that were taken last.
pub(crate) struct RecentRoutes(RefCell<Box<[Option<Known>]>>);

impl Default for RecentRoutes {
    fn default() -> Self {
        Self(RefCell::new(std::iter::repeat_with(|| None).take(SLOTS).collect()))
    }
}

impl RecentRoutes {
    /// The service of a host, if it was found in this version of the table.
    pub(crate) fn get(&self, table: u64, host: &[u8]) -> Option<Rc<ServiceEntry>> {
        let slots = self.0.borrow();
        let known = slots[slot(host)].as_ref()?;
        (known.table == table && *known.host == *host).then(|| Rc::clone(&known.entry))
    }

    /// Remembers that every path of a host leads to a service.
    pub(crate) fn put(&self, table: u64, host: &[u8], entry: &Rc<ServiceEntry>) {
        if host.len() <= MAX_HOST_BYTES {
            let known = Known { table, host: host.into(), entry: Rc::clone(entry) };
            self.0.borrow_mut()[slot(host)] = Some(known);
        }
    }

    /// Forgets everything, so that nothing keeps a service that the table has let go.
    pub(crate) fn clear(&self) {
        self.0.borrow_mut().fill_with(|| None);
    }
}

/// A place by length, first and last bytes: cheap, and hosts that are alike differ at one of their ends.
fn slot(host: &[u8]) -> usize {
    let word = |part: &[u8]| {
        let mut bytes = [0; 8];
        bytes[..part.len()].copy_from_slice(part);
        u64::from_le_bytes(bytes)
    };
    let end = host.len().min(8);
    let mixed = word(&host[..end]) ^ word(&host[host.len() - end..]).rotate_left(29) ^ host.len() as u64;
    // Fibonacci hashing (Knuth, The Art of Computer Programming 3, §6.4): the upper bits are the mixed ones.
    (mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_are_alike_have_places_of_their_own() {
        let mut places: Vec<usize> =
            (0..100).map(|shop| slot(format!("shop-{shop:03}.example.com").as_bytes())).collect();
        places.extend((0..100).map(|port| slot(format!("shop.example.com:{}", 8000 + port).as_bytes())));
        places.sort_unstable();
        places.dedup();
        assert!(places.len() > 70, "{} of 200 hosts", places.len());
        assert!(slot(b"") < SLOTS && slot(b"a") < SLOTS && slot(&[0xff; 300]) < SLOTS);
    }
}
