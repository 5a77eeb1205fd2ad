//! Certificate authorities that speak ACME (RFC 8555): an account at each, and orders.

mod order;
mod transport;

use std::fmt;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use instant_acme::{Account, AccountCredentials, Error, ExternalAccountKey, NewAccount};
pub use order::ChallengeKind;
pub(crate) use order::{Authorized, Challenge, Running, Status};
use tokio::sync::Mutex;
pub(crate) use transport::client_tls;
#[cfg(fuzzing)]
pub(crate) use transport::judge;
use transport::{AnswerError, Transport, is_bad_nonce};
use zeroize::Zeroizing;

use crate::budget::BudgetLimit;
use crate::limits::Limits;
use crate::sealed::{SealError, SealKey};
use crate::vault::{Expected, Revision, Vault, VaultError, Write};

/// How often a request is signed anew because the authority refused its nonce (RFC 8555 §6.5). The library tries three times
/// for each of these: at 60 % refusals one request in 10⁸ fails.
const MAX_BAD_NONCES: u32 = 12;
/// From this refusal on there is a pause, which grows: the authority has a trouble of its own.
const PAUSE_FROM_NONCE: u32 = 4;
const NONCE_PAUSE_MS: u64 = 100;

/// A certificate authority.
#[derive(Clone)]
pub struct CaConfig {
    /// A name for it, which is written into records: it stays the same.
    pub id: String,
    /// Its ACME directory, `https://…`.
    pub directory_url: String,
    /// `mailto:` addresses that it may write to.
    pub contacts: Vec<String>,
    /// Somebody has read and agreed to its terms of service.
    pub terms_agreed: bool,
    /// Authorities to trust beside the system's when speaking with it, PEM.
    pub roots_pem: Option<Vec<u8>>,
    /// External account binding (RFC 8555 §7.3.4).
    pub external_account: Option<ExternalAccount>,
    /// Which kind of certificate, if it offers several.
    pub profile: Option<String>,
    /// What it is called in CAA records (RFC 8659 §4.2); none: CAA is left to it.
    pub caa_identities: Vec<String>,
    /// Orders in all.
    pub orders: BudgetLimit,
    /// Orders for one registered domain.
    pub orders_per_domain: BudgetLimit,
}

impl fmt::Debug for CaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaConfig")
            .field("id", &self.id)
            .field("directory_url", &self.directory_url)
            .finish_non_exhaustive()
    }
}

/// Key and its name that an authority gave out beside ACME.
#[derive(Clone)]
pub struct ExternalAccount {
    /// The key's name.
    pub key_id: String,
    /// The key itself, decoded.
    pub hmac_key: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for ExternalAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExternalAccount").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

/// What went wrong at an authority.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct AcmeError {
    pub(crate) kind: AcmeErrorKind,
    pub(crate) text: String,
    pub(crate) after_ms: Option<u64>,
}

/// Who is to blame, and so what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AcmeErrorKind {
    /// The authority: does not answer, answers nonsense, or says that it cannot now. The order is as it was.
    Ca,
    /// It has had too many requests (429).
    RateLimited,
    /// It does not know what was asked for: the order is gone.
    Gone,
    /// It does not know the account.
    NoAccount,
    /// It says no, and will again.
    Refused,
    /// It could not validate the name.
    Invalid,
    /// We cannot: a record or our own cryptography.
    Own,
}

impl AcmeError {
    pub(crate) fn own(text: impl fmt::Display) -> Self {
        Self { kind: AcmeErrorKind::Own, text: text.to_string(), after_ms: None }
    }
}

impl From<VaultError> for AcmeError {
    fn from(error: VaultError) -> Self {
        Self::own(error)
    }
}

impl From<Error> for AcmeError {
    fn from(error: Error) -> Self {
        let ca = |text: String| Self { kind: AcmeErrorKind::Ca, text, after_ms: None };
        match error {
            Error::Other(cause) => match cause.downcast::<AnswerError>() {
                Ok(answer) => Self::from_answer(&answer),
                Err(cause) => ca(cause.to_string()),
            },
            error if is_bad_nonce(&error) => ca("it refuses every nonce".into()),
            // What an order or a challenge says of itself; refused requests come as answers, above.
            Error::Api(problem) => {
                Self { kind: AcmeErrorKind::Invalid, text: transport::told(&problem), after_ms: None }
            }
            Error::Crypto | Error::KeyRejected => Self::own(error),
            error => ca(error.to_string()),
        }
    }
}

impl AcmeError {
    fn from_answer(answer: &AnswerError) -> Self {
        use AcmeErrorKind as Kind;
        let (kind, after_ms) = match answer {
            AnswerError::Unreachable { .. } | AnswerError::TimedOut { .. } => (Kind::Ca, None),
            AnswerError::NotAcme { status, retry_after_ms, .. } if status.as_u16() == 429 => {
                (Kind::RateLimited, *retry_after_ms)
            }
            AnswerError::NotAcme { retry_after_ms, .. } => (Kind::Ca, *retry_after_ms),
            AnswerError::Refused { status, problem, retry_after_ms, .. } => {
                let name = problem.r#type.as_deref().unwrap_or_default();
                let name = name.strip_prefix("urn:ietf:params:acme:error:").unwrap_or(name);
                let kind = match (status.as_u16(), name) {
                    (429, _) | (_, "rateLimited") => Kind::RateLimited,
                    (500.., _) | (_, "serverInternal") => Kind::Ca,
                    (_, "accountDoesNotExist") => Kind::NoAccount,
                    (404 | 410, _) => Kind::Gone,
                    _ => Kind::Refused,
                };
                (kind, *retry_after_ms)
            }
        };
        Self { kind, text: answer.to_string(), after_ms }
    }
}

/// Repeats a call of the library for as long as its nonces are refused: such a request was not processed.
macro_rules! signed {
    ($call:expr) => {{
        let mut refused = 0;
        loop {
            match $call {
                Err(error) if $crate::acme::is_refused_nonce(&error, &mut refused) => {
                    $crate::acme::pause_for_nonce(refused).await;
                }
                other => break other,
            }
        }
    }};
}
pub(crate) use signed;

pub(crate) fn is_refused_nonce(error: &Error, refused: &mut u32) -> bool {
    let again = is_bad_nonce(error) && *refused < MAX_BAD_NONCES;
    *refused += 1;
    again
}

pub(crate) async fn pause_for_nonce(refused: u32) {
    if refused >= PAUSE_FROM_NONCE {
        tokio::time::sleep(Duration::from_millis(NONCE_PAUSE_MS * u64::from(refused))).await;
    }
}

/// One authority with the account at it.
pub(crate) struct Authority {
    pub(crate) config: CaConfig,
    transport: Transport,
    /// One registers, the others wait for it.
    registering: Mutex<()>,
    pause: StdMutex<Pause>,
}

#[derive(Clone, Debug, Default)]
struct Pause {
    failures: u32,
    until_ms: u64,
    why: String,
}

impl Authority {
    pub(crate) fn new(config: CaConfig) -> Result<Self, String> {
        let transport = Transport::new(config.roots_pem.as_deref())?;
        Ok(Self { config, transport, registering: Mutex::new(()), pause: StdMutex::default() })
    }

    fn pause(&self) -> std::sync::MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when it is left alone, and why.
    pub(crate) fn paused(&self, now_ms: u64) -> Option<(u64, String)> {
        let pause = self.pause();
        (pause.until_ms > now_ms).then(|| (pause.until_ms, pause.why.clone()))
    }

    /// It has a trouble: it is left alone for a while, or for as long as it asked for.
    pub(crate) fn failed(&self, error: &AcmeError, now_ms: u64, bits: u64, limits: &Limits) {
        if error.kind != AcmeErrorKind::Ca {
            return;
        }
        let mut pause = self.pause();
        pause.failures = pause.failures.saturating_add(1);
        let delay_ms =
            crate::domain::back_off(limits.ca_pause_ms, limits.ca_pause_max_ms, pause.failures, bits);
        pause.until_ms = now_ms + delay_ms.max(error.after_ms.unwrap_or(0));
        pause.why.clone_from(&error.text);
    }

    /// It has answered.
    pub(crate) fn answered(&self) {
        *self.pause() = Pause::default();
    }

    /// The account of this installation at it, registered if there is none.
    pub(crate) async fn session(&self, vault: &dyn Vault, seal: &SealKey) -> Result<Session, AcmeError> {
        let record = format!("sealed/account/{}", self.config.id);
        let transport = self.transport.apart();
        if let Kept::Usable(kept) = self.kept(vault, seal, &record).await? {
            return Self::open(*kept, transport).await;
        }
        let _one = self.registering.lock().await;
        let expected = match self.kept(vault, seal, &record).await? {
            Kept::Usable(kept) => return Self::open(*kept, transport).await,
            Kept::Useless(revision) => Expected::Revision(revision),
            Kept::Absent => Expected::Absent,
        };
        let (account, kept) = self.register(&transport).await?;
        let text = Zeroizing::new(serde_json::to_vec(&kept).map_err(AcmeError::own)?);
        let sealed = seal.seal(&record, &text).map_err(AcmeError::own)?;
        match vault.commit(vec![Write::put(&record, sealed, expected)]).await {
            Ok(_) => Ok(Session { account, transport }),
            // Another manager was faster: its account is the installation's.
            Err(VaultError::Conflict { .. }) => match self.kept(vault, seal, &record).await? {
                Kept::Usable(kept) => Self::open(*kept, transport).await,
                _ => Err(AcmeError::own(format!("record {record} comes and goes"))),
            },
            Err(e) => Err(e.into()),
        }
    }

    async fn open(kept: AccountCredentials, transport: Transport) -> Result<Session, AcmeError> {
        let builder = Account::builder_with_http(Box::new(transport.clone()));
        let account = builder.from_credentials(kept).await?;
        Ok(Session { account, transport })
    }

    /// The account that was stored, if it is one at the configured directory and the key file opens it.
    async fn kept(&self, vault: &dyn Vault, seal: &SealKey, record: &str) -> Result<Kept, AcmeError> {
        let Some(found) = vault.get(record).await? else { return Ok(Kept::Absent) };
        let text = match seal.open(record, &found.bytes) {
            Ok(text) => text,
            Err(error @ (SealError::OtherKey { .. } | SealError::Forged { .. })) => {
                tracing::error!(%error, "the account at {} is lost, a new one is registered", self.config.id);
                return Ok(Kept::Useless(found.revision));
            }
            Err(error) => return Err(AcmeError::own(error)),
        };
        /// The part of the credentials that says where they are good.
        #[derive(serde::Deserialize)]
        struct At {
            directory: Option<String>,
        }
        let unreadable = |e| AcmeError::own(format!("record {record} cannot be read: {e}"));
        let At { directory } = serde_json::from_slice(&text).map_err(unreadable)?;
        if directory.is_some_and(|directory| directory != self.config.directory_url) {
            tracing::warn!(
                ca = self.config.id,
                directory = self.config.directory_url,
                "the account is at another directory, a new one is registered"
            );
            return Ok(Kept::Useless(found.revision));
        }
        serde_json::from_slice(&text).map(|kept| Kept::Usable(Box::new(kept))).map_err(unreadable)
    }

    async fn register(&self, transport: &Transport) -> Result<(Account, AccountCredentials), AcmeError> {
        if !self.config.terms_agreed {
            return Err(AcmeError {
                kind: AcmeErrorKind::Refused,
                text: format!("nobody has agreed to the terms of service of {}", self.config.id),
                after_ms: None,
            });
        }
        let contacts: Vec<&str> = self.config.contacts.iter().map(String::as_str).collect();
        let new =
            NewAccount { contact: &contacts, terms_of_service_agreed: true, only_return_existing: false };
        let external = self.config.external_account.as_ref();
        let external = external.map(|e| ExternalAccountKey::new(e.key_id.clone(), &e.hmac_key));
        let registered = signed!(
            Account::builder_with_http(Box::new(transport.clone()))
                .create(&new, self.config.directory_url.clone(), external.as_ref())
                .await
        );
        Ok(registered?)
    }

    /// The account is gone at the authority: the next session registers anew.
    pub(crate) async fn forget_account(&self, vault: &dyn Vault) -> Result<(), VaultError> {
        let record = format!("sealed/account/{}", self.config.id);
        vault.commit(vec![Write::delete(record, Expected::Anything)]).await.map(drop)
    }
}

/// What is stored of an account.
enum Kept {
    Usable(Box<AccountCredentials>),
    /// It is at another directory, or sealed with a key that is gone.
    Useless(Revision),
    Absent,
}

/// An account that can be used now.
pub(crate) struct Session {
    pub(crate) account: Account,
    transport: Transport,
}

/// Authorities in the order in which they are asked.
pub(crate) type Authorities = Vec<Arc<Authority>>;
