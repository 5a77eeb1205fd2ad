//! A host as the key of a table entry. All but the longest lie in the entry itself: comparing one in a table
//! of a million would otherwise wait for memory once more.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// Longest host that is stored in place; it makes the key 32 bytes large.
const MAX_INLINE_BYTES: usize = 30;

#[derive(Clone, Debug)]
pub(crate) enum HostKey {
    Inline { len: u8, bytes: [u8; MAX_INLINE_BYTES] },
    Shared(Arc<str>),
}

impl HostKey {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Self::Shared(host) => host.as_bytes(),
        }
    }
}

impl From<&Arc<str>> for HostKey {
    fn from(host: &Arc<str>) -> Self {
        if host.len() > MAX_INLINE_BYTES {
            return Self::Shared(Arc::clone(host));
        }
        let mut bytes = [0; MAX_INLINE_BYTES];
        bytes[..host.len()].copy_from_slice(host.as_bytes());
        Self::Inline { len: host.len() as u8, bytes }
    }
}

// Equality and hash are those of the bytes, as `Borrow` demands.
impl Borrow<[u8]> for HostKey {
    fn borrow(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl PartialEq for HostKey {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for HostKey {}

impl Hash for HostKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyed::Keyed;

    #[test]
    fn hosts_of_every_length_are_found_by_their_bytes() {
        assert_eq!(size_of::<HostKey>(), 32);
        let hosts: Vec<Arc<str>> = (0..64).map(|len| "h".repeat(len).into()).collect();
        let mut map = Keyed::default();
        for host in &hosts {
            map.insert(&HostKey::from(host), host.len());
        }
        for host in &hosts {
            assert_eq!(map.get(host.as_bytes()), Some(&host.len()));
        }
        assert_eq!(map.get("g".as_bytes()), None);
    }
}
