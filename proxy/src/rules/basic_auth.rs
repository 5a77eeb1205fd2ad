//! Passwords (RFC 7617). A password that is asked for the first time is verified on a thread of its own, because that takes
//! long on purpose; then its keyed hash is remembered for a while.
//!
//! What a stranger can have an edge spend is bounded: few passwords are verified at a time, and more than so many that wait
//! are sent away. Known ones are served meanwhile. It takes as long for a name that is not known as for one that is.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::{constant_time, hmac, rand};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use peregrine_routing::{BasicAuth, PasswordHash};
use tokio::sync::{Semaphore, watch};
use zeroize::Zeroizing;

use crate::clock::now_ms;
use crate::error::Reason;

/// Passwords that are verified at a time, by all cores together; one where there are two cores or fewer.
const MAX_VERIFIED_AT_A_TIME: usize = 2;
/// Passwords that wait for that or are being verified. The same password of the same account is one, however often it comes.
const MAX_WAITING: usize = 64;
/// Those of one client (of IPv6 its /64), so that nobody who guesses keeps everybody else out.
const MAX_WAITING_OF_A_CLIENT: usize = 4;
/// Passwords that are remembered, 40 bytes each.
const MAX_KNOWN: usize = 4_096;
/// For how long after they were last used.
const KNOWN_FOR_MS: u64 = 300_000;
/// Longest name and password together.
const MAX_CREDENTIALS_BYTES: usize = 1_024;

/// The keyed hash of a password with what it belongs to.
type Tag = [u8; 32];

/// What all cores know of passwords.
#[derive(Debug)]
pub(crate) struct Passwords {
    /// Only this process knows it. Without one nobody is let in.
    key: Option<hmac::Key>,
    /// Until when each is known.
    known_ms: Mutex<HashMap<Tag, u64>>,
    turns: Arc<Semaphore>,
    verifying: Mutex<HashMap<Tag, Verifying>>,
}

impl Default for Passwords {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let turns = if cores > 2 { MAX_VERIFIED_AT_A_TIME } else { 1 };
        Self {
            key: hmac::Key::generate(hmac::HMAC_SHA256, &rand::SystemRandom::new()).ok(),
            known_ms: Mutex::default(),
            turns: Arc::new(Semaphore::new(turns)),
            verifying: Mutex::default(),
        }
    }
}

/// Accounts of a service, ready to be asked.
pub(crate) struct Accounts {
    users: Vec<Account>,
    pub(crate) challenge: HeaderValue,
    pub(super) forward: bool,
}

struct Account {
    name: Arc<str>,
    /// As it is stored; part of what is remembered, so that another hash makes a password unknown again.
    text: Arc<str>,
    /// How much work it is to verify it: roughly KiB of memory that are gone through.
    cost: u64,
}

fn cost(text: &str) -> u64 {
    /// A round of bcrypt goes some ten times through its 4 KiB.
    const KIB_PER_ROUND: u64 = 40;
    match PasswordHash::parse(text) {
        Ok(PasswordHash::Argon2id { memory_kib, passes, .. }) => u64::from(memory_kib) * u64::from(passes),
        // `$2b$COST$…`
        Ok(PasswordHash::Bcrypt(text)) => {
            let log2 = text.split('$').nth(2).and_then(|cost| cost.parse::<u32>().ok()).unwrap_or(0);
            KIB_PER_ROUND << log2.min(31)
        }
        Err(_) => 0,
    }
}

/// What a client says of itself.
struct Credentials {
    text: Zeroizing<Vec<u8>>,
    colon: usize,
}

impl Accounts {
    pub(super) fn of(auth: &BasicAuth) -> Self {
        let realm: String = auth.realm.chars().filter(|c| !matches!(c, '"' | '\\')).collect();
        let challenge = HeaderValue::from_str(&format!("Basic realm=\"{realm}\", charset=\"UTF-8\""));
        let account = |(name, text): &(Arc<str>, Arc<str>)| Account {
            name: Arc::clone(name),
            text: Arc::clone(text),
            cost: cost(text),
        };
        Self {
            users: auth.users.iter().map(account).collect(),
            challenge: challenge.unwrap_or(HeaderValue::from_static("Basic realm=\"\"")),
            forward: auth.forward,
        }
    }

    /// Lets a request on that bears the name and password of an account.
    ///
    /// # Errors
    /// [`Reason::AuthRequired`], or [`Reason::AuthUnavailable`] if too many wait already.
    pub(super) async fn check(
        &self,
        passwords: &Arc<Passwords>,
        client: IpAddr,
        headers: &HeaderMap,
    ) -> Result<(), Reason> {
        let credentials = Credentials::of(headers).ok_or(Reason::AuthRequired)?;
        let account = self.users.iter().find(|account| account.name.as_bytes() == credentials.name());
        // A name that is not known costs as much as the dearest of those that are.
        let stored =
            account.or(self.users.iter().max_by_key(|user| user.cost)).ok_or(Reason::AuthRequired)?;
        let tag = passwords.tag(stored, &credentials).ok_or(Reason::AuthUnavailable)?;
        if account.is_some() && passwords.knows(tag) {
            return Ok(());
        }
        let is_right = passwords.verify(stored, account.is_some(), client, credentials, tag).await?;
        if account.is_some() && is_right { Ok(()) } else { Err(Reason::AuthRequired) }
    }
}

impl Credentials {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (value, None) = (values.next()?.as_bytes(), values.next()) else { return None };
        let (scheme, encoded) = value.split_at_checked(6)?;
        if !scheme.eq_ignore_ascii_case(b"basic ") || encoded.len() > MAX_CREDENTIALS_BYTES * 4 / 3 {
            return None;
        }
        let text = Zeroizing::new(STANDARD.decode(encoded.trim_ascii()).ok()?);
        let colon = text.iter().position(|b| *b == b':')?;
        Some(Self { text, colon })
    }

    fn name(&self) -> &[u8] {
        &self.text[..self.colon]
    }

    fn password(&self) -> &[u8] {
        &self.text[self.colon + 1..]
    }
}

impl Passwords {
    fn tag(&self, stored: &Account, credentials: &Credentials) -> Option<Tag> {
        let mut context = hmac::Context::with_key(self.key.as_ref()?);
        // A hash has a salt of its own: no two accounts have the same. Its length keeps the two apart.
        context.update(&(stored.text.len() as u64).to_le_bytes());
        context.update(stored.text.as_bytes());
        context.update(&credentials.text);
        context.sign().as_ref().try_into().ok()
    }

    fn knows(&self, tag: Tag) -> bool {
        let now_ms = now_ms();
        let mut known = self.known_ms.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(until_ms) = known.get_mut(&tag).filter(|until_ms| now_ms < **until_ms) else { return false };
        // Who is there stays known: otherwise whoever guesses could have him wait in the midst of his work.
        *until_ms = now_ms + KNOWN_FOR_MS;
        true
    }

    fn learn(&self, tag: Tag) {
        let now_ms = now_ms();
        let mut known = self.known_ms.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.retain(|_, until_ms| *until_ms > now_ms);
        }
        // Those for which there is no room are verified each time.
        if known.len() < MAX_KNOWN {
            known.insert(tag, now_ms + KNOWN_FOR_MS);
        }
    }

    /// Whether a password is right, which is remembered if the account is the one that was named. Those who ask for the same
    /// at the same time have one answer.
    async fn verify(
        self: &Arc<Self>,
        stored: &Account,
        is_named: bool,
        client: IpAddr,
        credentials: Credentials,
        tag: Tag,
    ) -> Result<bool, Reason> {
        let begun = self.begin(client, tag)?;
        let mut is_right = match begun {
            Begun::Joined(is_right) => is_right,
            Begun::First(turn, is_right) => {
                // It comes to its end, also if nobody waits for it any more.
                tokio::task::spawn_local(turn.take(Arc::clone(&stored.text), is_named, credentials));
                is_right
            }
        };
        let is_right = is_right.wait_for(Option::is_some).await.map_err(|_| Reason::AuthUnavailable)?;
        Ok(*is_right == Some(true))
    }

    fn begin(self: &Arc<Self>, client: IpAddr, tag: Tag) -> Result<Begun, Reason> {
        let client = network_of(client);
        let mut verifying = self.verifying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(one) = verifying.get(&tag) {
            return Ok(Begun::Joined(one.is_right.clone()));
        }
        let own = verifying.values().filter(|one| one.client == client).count();
        if verifying.len() >= MAX_WAITING || own >= MAX_WAITING_OF_A_CLIENT {
            return Err(Reason::AuthUnavailable);
        }
        let (say, is_right) = watch::channel(None);
        verifying.insert(tag, Verifying { client, is_right: is_right.clone() });
        Ok(Begun::First(Turn { passwords: Arc::clone(self), tag, say }, is_right))
    }
}

enum Begun {
    First(Turn, watch::Receiver<Option<bool>>),
    Joined(watch::Receiver<Option<bool>>),
}

/// A password that waits for its turn or is being verified.
#[derive(Debug)]
struct Verifying {
    client: IpAddr,
    is_right: watch::Receiver<Option<bool>>,
}

/// The one who verifies a password.
struct Turn {
    passwords: Arc<Passwords>,
    tag: Tag,
    say: watch::Sender<Option<bool>>,
}

impl Turn {
    async fn take(self, stored: Arc<str>, is_named: bool, credentials: Credentials) {
        let Ok(turn) = Arc::clone(&self.passwords.turns).acquire_owned().await else { return };
        let verified = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            verify(&stored, credentials.password())
        });
        if let Ok(is_right) = verified.await {
            if is_right && is_named {
                self.passwords.learn(self.tag);
            }
            self.say.send_replace(Some(is_right));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.passwords.verifying.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.tag);
    }
}

/// One customer has a /64 at the least (RFC 6177 §2).
fn network_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 => v4,
    }
}

/// Takes long, on purpose.
fn verify(stored: &str, password: &[u8]) -> bool {
    match PasswordHash::parse(stored) {
        Ok(PasswordHash::Argon2id { memory_kib, passes, lanes, salt, hash }) => {
            let decoded = (STANDARD_NO_PAD.decode(salt), STANDARD_NO_PAD.decode(hash));
            let (Ok(salt), Ok(expected)) = decoded else { return false };
            let Ok(params) = Params::new(memory_kib, passes, lanes, Some(expected.len())) else {
                return false;
            };
            let mut found = Zeroizing::new(vec![0; expected.len()]);
            let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
            argon.hash_password_into(password, &salt, &mut found).is_ok()
                && constant_time::verify_slices_are_equal(&found, &expected).is_ok()
        }
        Ok(PasswordHash::Bcrypt(text)) => bcrypt::verify(password, text).unwrap_or(false),
        Err(_) => false,
    }
}
