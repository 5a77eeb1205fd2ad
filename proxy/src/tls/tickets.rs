//! Session tickets (RFC 8446 §4.6.1, RFC 5077): a session's state goes to the client, sealed with a key that every edge
//! of an installation may share, so that a session is resumed wherever its client comes back to, and after a restart.
//!
//! The newest key seals, the ones before it open. Where clients are asked who they are, no ticket is made and none opened.

use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use rustls::server::ProducesTickets;

/// Keys that open tickets; the first of them makes them.
pub const MAX_TICKET_KEYS: usize = 3;
/// How long a key makes tickets: what it can open when it is stolen is bounded by it.
pub const TICKET_KEY_LIFE_MS: u64 = 8 * 3_600_000;

/// Bytes of a key: its name, its secret and when it was made.
const KEY_BYTES: usize = NAME_BYTES + SECRET_BYTES + 8;
const NAME_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
/// A ticket holds a client's chain at most; nobody sends a longer one.
const MAX_TICKET_BYTES: usize = 16 * 1024;

/// A key of tickets.
#[derive(Clone, PartialEq, Eq)]
struct TicketKey {
    name: [u8; NAME_BYTES],
    secret: [u8; SECRET_BYTES],
    made_at_ms: u64,
}

/// The keys of tickets, newest first. Whoever hands the same ones to several edges lets sessions be resumed at any of them.
#[derive(Clone, PartialEq, Eq)]
pub struct TicketKeys(Vec<TicketKey>);

/// Bytes that are no keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("these are no ticket keys: 1 to {MAX_TICKET_KEYS} keys of {KEY_BYTES} bytes each are expected")]
pub struct TicketKeysError;

/// The system has no random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no random bytes for a ticket key")]
pub struct NoRandom;

impl std::fmt::Debug for TicketKeys {
    /// Never shows a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TicketKeys").field("keys", &self.0.len()).finish_non_exhaustive()
    }
}

impl TicketKeys {
    /// One new key.
    ///
    /// # Errors
    /// [`NoRandom`].
    pub fn generate(now_ms: u64) -> Result<Self, NoRandom> {
        Ok(Self(vec![TicketKey::generate(now_ms)?]))
    }

    /// These keys with a new one before them, and no more than [`MAX_TICKET_KEYS`].
    ///
    /// # Errors
    /// [`NoRandom`].
    pub fn rotated(&self, now_ms: u64) -> Result<Self, NoRandom> {
        let mut keys = vec![TicketKey::generate(now_ms)?];
        keys.extend(self.0.iter().take(MAX_TICKET_KEYS - 1).cloned());
        Ok(Self(keys))
    }

    /// When the newest of them was made, in ms of the caller's clock.
    #[must_use]
    pub fn made_at_ms(&self) -> u64 {
        self.0.first().map_or(0, |key| key.made_at_ms)
    }

    /// As bytes, which are as secret as the keys: whoever stores them encrypts them.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.0.len() * KEY_BYTES);
        for key in &self.0 {
            out.extend_from_slice(&key.name);
            out.extend_from_slice(&key.secret);
            out.extend_from_slice(&key.made_at_ms.to_be_bytes());
        }
        out
    }

    /// From what [`Self::to_bytes`] gave.
    ///
    /// # Errors
    /// [`TicketKeysError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TicketKeysError> {
        let (keys, rest) = bytes.as_chunks::<KEY_BYTES>();
        if !rest.is_empty() || keys.is_empty() || keys.len() > MAX_TICKET_KEYS {
            return Err(TicketKeysError);
        }
        Ok(Self(keys.iter().map(TicketKey::from_bytes).collect()))
    }
}

impl TicketKey {
    fn generate(now_ms: u64) -> Result<Self, NoRandom> {
        let (mut name, mut secret) = ([0; NAME_BYTES], [0; SECRET_BYTES]);
        rand::fill(&mut name).and_then(|()| rand::fill(&mut secret)).map_err(|_| NoRandom)?;
        Ok(Self { name, secret, made_at_ms: now_ms })
    }

    fn from_bytes(bytes: &[u8; KEY_BYTES]) -> Self {
        let mut key = Self { name: [0; NAME_BYTES], secret: [0; SECRET_BYTES], made_at_ms: 0 };
        let (name, rest) = bytes.split_at(NAME_BYTES);
        let (secret, made) = rest.split_at(SECRET_BYTES);
        key.name.copy_from_slice(name);
        key.secret.copy_from_slice(secret);
        key.made_at_ms = made.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        key
    }
}

/// A key that is ready for use.
struct Ready {
    name: [u8; NAME_BYTES],
    aead: LessSafeKey,
}

/// The ticket keys of running edges; can be replaced at any time. Clones are the same ones.
#[derive(Clone)]
pub struct Tickets(Arc<ArcSwap<Vec<Ready>>>);

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tickets").field("keys", &self.0.load().len()).finish_non_exhaustive()
    }
}

impl Tickets {
    /// Tickets that are made with these keys.
    #[must_use]
    pub fn new(keys: &TicketKeys) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(ready(keys))))
    }

    /// From now on these keys count; tickets of others are worth nothing any more, and their clients make a whole handshake.
    pub fn replace(&self, keys: &TicketKeys) {
        self.0.store(Arc::new(ready(keys)));
    }

    /// What rustls makes tickets with, for clients who are not asked who they are.
    pub(crate) fn producer(&self) -> Arc<dyn ProducesTickets> {
        Arc::new(Producer(self.clone()))
    }
}

fn ready(keys: &TicketKeys) -> Vec<Ready> {
    let one = |key: &TicketKey| {
        // Fails for a wrong length only, which the type rules out.
        let aead = UnboundKey::new(&AES_256_GCM_SIV, &key.secret).ok().map(LessSafeKey::new)?;
        Some(Ready { name: key.name, aead })
    };
    keys.0.iter().filter_map(one).collect()
}

struct Producer(Tickets);

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Producer")
    }
}

impl ProducesTickets for Producer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        // A ticket opens for as long as its key is among those that are kept.
        const { ((MAX_TICKET_KEYS as u64 - 1) * TICKET_KEY_LIFE_MS / 1_000) as u32 }
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let keys = self.0.0.load();
        let key = keys.first()?;
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).ok()?;
        let mut out = Vec::with_capacity(NAME_BYTES + NONCE_LEN + plain.len() + TAG_BYTES);
        out.extend_from_slice(&key.name);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(plain);
        let sealed = &mut out[NAME_BYTES + NONCE_LEN..];
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = key.aead.seal_in_place_separate_tag(nonce, Aad::empty(), sealed).ok()?;
        out.extend_from_slice(tag.as_ref());
        Some(out)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > MAX_TICKET_BYTES {
            return None;
        }
        let (name, rest) = ticket.split_at_checked(NAME_BYTES)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN)?;
        let keys = self.0.0.load();
        let key = keys.iter().find(|key| key.name == name)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut opened = sealed.to_vec();
        let length = key.aead.open_in_place(nonce, Aad::empty(), &mut opened).ok()?.len();
        opened.truncate(length);
        Some(opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_opens_until_its_key_is_the_fourth() {
        let mut keys = TicketKeys::generate(1).unwrap();
        let tickets = Tickets::new(&keys);
        let producer = tickets.producer();
        let ticket = producer.encrypt(b"state").unwrap();
        for turn in 0..MAX_TICKET_KEYS {
            assert_eq!(producer.decrypt(&ticket).as_deref(), Some(&b"state"[..]), "after {turn} turns");
            keys = keys.rotated(2).unwrap();
            tickets.replace(&keys);
        }
        assert_eq!(producer.decrypt(&ticket), None, "its key is no longer kept");
        assert_eq!(keys.0.len(), MAX_TICKET_KEYS);
    }

    #[test]
    fn a_ticket_that_was_changed_cut_or_made_up_does_not_open() {
        let tickets = Tickets::new(&TicketKeys::generate(1).unwrap());
        let producer = tickets.producer();
        let ticket = producer.encrypt(b"some state").unwrap();
        for at in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[at] ^= 1;
            assert_eq!(producer.decrypt(&changed), None, "changed at {at}");
            assert_eq!(producer.decrypt(&ticket[..at]), None, "cut at {at}");
        }
        assert_eq!(producer.decrypt(&vec![7; MAX_TICKET_BYTES + 1]), None);
    }

    #[test]
    fn keys_survive_as_bytes_and_do_not_show_themselves() {
        let keys = TicketKeys::generate(7).unwrap().rotated(9).unwrap();
        let bytes = keys.to_bytes();
        assert!(TicketKeys::from_bytes(&bytes) == Ok(keys.clone()) && keys.made_at_ms() == 9);
        for wrong in [&bytes[1..], &[], &bytes.repeat(2)] {
            assert_eq!(TicketKeys::from_bytes(wrong), Err(TicketKeysError));
        }
        assert_eq!(format!("{keys:?}"), "TicketKeys { keys: 2, .. }");
    }
}
