//! Which edges belong to the installation, and who may become one: small files in the engine's data folder.
//!
//! ```text
//!   edges/EPOCH/NAME.json  fingerprint of its certificate, its last incarnation, whether it is waited for at a start
//!   invites/DIGEST.json    a token that has not been used; named by the digest of its secret
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::authority::{Authority, AuthorityError, PUBLIC_KEY_BYTES, fingerprint};
use crate::files;
use crate::records::Records;
use crate::token::{JoinToken, digest, hex};

pub(crate) const MAX_FILE_BYTES: u64 = 64 << 10;
/// Longest name: it becomes a label of a host name (RFC 1035 §2.3.4).
const MAX_NAME_BYTES: usize = 63;

/// Why the registry did not do it.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No name for an edge.
    #[error(
        "{0:?} is no name for an edge: use 1 to {MAX_NAME_BYTES} of a-z, 0-9 and hyphens, and begin and end without a hyphen"
    )]
    BadName(String),
    /// No such edge.
    #[error("there is no edge {0}")]
    Unknown(String),
    /// The token was used, has expired or never was.
    #[error(
        "the token was used before, has expired, or is of another installation: make another with `peregrine edges invite`"
    )]
    BadToken,
    /// What was sent is no public key.
    #[error("that is no public key")]
    BadKey,
    /// An engine of a higher epoch has taken the edges up.
    #[error(
        "this engine is of epoch {ours}, and one of epoch {theirs} has the edges: ask that one; if there is none, bring back the store that belongs to this folder of the link, or put the folder aside and have every edge join anew"
    )]
    Replaced {
        /// Of this engine.
        ours: u64,
        /// Of that one.
        theirs: u64,
    },
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// A token that was made, with what can be told of it.
#[derive(Clone, Debug)]
pub struct Invite {
    /// The token. A secret, shown once.
    pub token: JoinToken,
    /// Name of the edge that will use it.
    pub edge: String,
    /// When it ends, in Unix milliseconds.
    pub expires_at: u64,
}

/// What is kept of an invite.
#[derive(Serialize, Deserialize)]
struct InviteRecord {
    edge: String,
    expires_at: u64,
}

/// What is kept of an edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EdgeRecord {
    /// SHA-256 of its certificate.
    pub(crate) fingerprint: String,
    /// When it joined, in Unix milliseconds.
    pub(crate) joined_at: u64,
    /// Its last process.
    pub(crate) incarnation: Option<u64>,
    /// Processes before it that still end what they have, and their cores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) beside: Vec<(u64, u32)>,
    pub(crate) cores: u32,
    /// When it was last heard of, to the minute or better, in Unix milliseconds; 0 is never.
    pub(crate) seen_at: u64,
    /// It ended in order or was given up: nobody waits for it.
    pub(crate) away: bool,
}

/// An edge that was let in.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) name: String,
    pub(crate) certificate: Vec<u8>,
    pub(crate) record: EdgeRecord,
}

/// The registry in its folder, as the engine of an epoch has it.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    folder: PathBuf,
    records: Records,
}

impl Registry {
    /// Takes the registry up; an engine of a lower epoch changes nothing in it from here on.
    pub(crate) fn open(folder: &Path, epoch: u64) -> Result<Self, RegistryError> {
        let invites = folder.join("invites");
        files::private_folder(&invites).map_err(|source| RegistryError::Io { path: invites, source })?;
        let records = Records::open(folder.join(crate::records::FOLDER), epoch)?;
        Ok(Self { folder: folder.to_owned(), records })
    }

    /// Every edge, by name. A file that cannot be read is told and left out: it shuts out its edge and no other.
    pub(crate) fn edges(&self) -> Result<Vec<(String, EdgeRecord)>, RegistryError> {
        self.records.all()
    }

    pub(crate) fn put(&self, name: &str, record: &EdgeRecord) -> Result<(), RegistryError> {
        self.records.put(name, record)
    }

    pub(crate) fn remove(&self, name: &str) -> Result<(), RegistryError> {
        check_name(name)?;
        self.records.remove(name)
    }

    /// Makes a token for an edge of this name. It is durable when this returns; the token itself is not kept.
    pub(crate) fn invite(
        &self,
        authority: &Authority,
        name: &str,
        lifetime_ms: u64,
    ) -> Result<Invite, RegistryError> {
        check_name(name)?;
        self.records.is_ours()?;
        self.forget_expired();
        let token = JoinToken::fresh(authority.fingerprint()).map_err(|error| RegistryError::Io {
            path: self.folder.clone(),
            source: io::Error::other(error.to_string()),
        })?;
        let expires_at = now().saturating_add(lifetime_ms);
        let record = InviteRecord { edge: name.to_owned(), expires_at };
        write_json(&self.invite_path(&token.secret), &record)?;
        Ok(Invite { token, edge: name.to_owned(), expires_at })
    }

    /// Uses a token up and gives its edge a certificate. The token is gone before the certificate is made: after a
    /// crash in between it is lost, and never good twice.
    pub(crate) fn admit(
        &self,
        authority: &Authority,
        secret: &[u8],
        public_key: Vec<u8>,
    ) -> Result<Admitted, RegistryError> {
        if public_key.len() != PUBLIC_KEY_BYTES || public_key[0] != 4 {
            return Err(RegistryError::BadKey);
        }
        // Before the token is used up: it is good at the engine that leads.
        self.records.is_ours()?;
        let path = self.invite_path(secret);
        let invite: Option<InviteRecord> = read_json(&path)?;
        let invite = invite.ok_or(RegistryError::BadToken)?;
        match std::fs::remove_file(&path).and_then(|()| files::flush_folder(&path)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(RegistryError::BadToken),
            Err(source) => return Err(RegistryError::Io { path, source }),
        }
        if invite.expires_at <= now() {
            return Err(RegistryError::BadToken);
        }
        let certificate = authority.edge(&invite.edge, public_key)?;
        let record = EdgeRecord {
            fingerprint: hex(&fingerprint(&certificate)),
            joined_at: now(),
            incarnation: None,
            beside: Vec::new(),
            cores: 0,
            seen_at: 0,
            away: true,
        };
        self.put(&invite.edge, &record)?;
        Ok(Admitted { name: invite.edge, certificate: certificate.to_vec(), record })
    }

    fn forget_expired(&self) {
        let Ok(entries) = std::fs::read_dir(self.folder.join("invites")) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let expired = read_json::<InviteRecord>(&path)
                .is_ok_and(|record| record.is_some_and(|record| record.expires_at <= now()));
            if expired && let Err(error) = std::fs::remove_file(&path) {
                tracing::debug!(%error, "an expired invite stays; it is refused all the same");
            }
        }
    }

    fn invite_path(&self, secret: &[u8]) -> PathBuf {
        self.folder.join("invites").join(format!("{}.json", digest(secret)))
    }
}

fn check_name(name: &str) -> Result<(), RegistryError> {
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good = !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name.bytes().all(fine)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good { Ok(()) } else { Err(RegistryError::BadName(name.to_owned())) }
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, RegistryError> {
    let failed = |source| RegistryError::Io { path: path.to_owned(), source };
    let Some(bytes) = files::read_bounded(path, MAX_FILE_BYTES).map_err(failed)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into()))
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), RegistryError> {
    let failed = |source| RegistryError::Io { path: path.to_owned(), source };
    let bytes = serde_json::to_vec_pretty(value).map_err(|error| failed(error.into()))?;
    files::write_whole(path, &bytes).map_err(failed)
}

/// Wall time in Unix milliseconds, for people and for the end of a token.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::fresh_key;

    fn registry() -> (tempfile::TempDir, Authority, Registry) {
        let folder = tempfile::tempdir().expect("a folder");
        let authority = Authority::open(folder.path()).expect("an authority");
        let registry = Registry::open(folder.path(), 1).expect("a registry");
        (folder, authority, registry)
    }

    #[test]
    fn a_token_is_good_for_one_use_and_for_its_name() {
        let (folder, authority, registry) = registry();
        let invite = registry.invite(&authority, "edge-1", 60_000).expect("a token");
        let key = || fresh_key().expect("a key").1;
        let admitted = registry.admit(&authority, &invite.token.secret, key()).expect("it is let in");
        assert_eq!(admitted.name, "edge-1");
        let again = registry.admit(&authority, &invite.token.secret, key());
        assert!(matches!(again, Err(RegistryError::BadToken)), "{again:?}");
        assert_eq!(registry.edges().expect("edges").len(), 1);
        let kept = std::fs::read_dir(folder.path().join("invites")).expect("a folder").count();
        assert_eq!(kept, 0);
    }

    #[test]
    fn a_token_is_kept_as_a_digest_alone() {
        let (folder, authority, registry) = registry();
        let invite = registry.invite(&authority, "edge-1", 60_000).expect("a token");
        let entry = std::fs::read_dir(folder.path().join("invites")).expect("a folder").next();
        let path = entry.expect("one file").expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("text") + &path.display().to_string();
        assert!(!text.contains(&hex(&invite.token.secret)), "{text}");
    }

    #[test]
    fn a_token_that_has_expired_is_refused_and_so_is_a_wrong_key() {
        let (_folder, authority, registry) = registry();
        let key = fresh_key().expect("a key").1;
        let expired = registry.invite(&authority, "edge-1", 0).expect("a token");
        let refused = registry.admit(&authority, &expired.token.secret, key.clone());
        assert!(matches!(refused, Err(RegistryError::BadToken)), "{refused:?}");
        let fresh = registry.invite(&authority, "edge-1", 60_000).expect("a token");
        let refused = registry.admit(&authority, &fresh.token.secret, vec![1, 2]);
        assert!(matches!(refused, Err(RegistryError::BadKey)), "{refused:?}");
        assert!(registry.admit(&authority, &fresh.token.secret, key).is_ok(), "the token was not used up");
    }

    #[test]
    fn a_name_that_is_no_label_is_refused() {
        let (_folder, authority, registry) = registry();
        for name in ["", "-a", "a-", "A", "a.b", "../x", "a b", &"a".repeat(64)] {
            let refused = registry.invite(&authority, name, 1);
            assert!(matches!(refused, Err(RegistryError::BadName(_))), "{name}");
            assert!(registry.remove(name).is_err());
        }
    }
}
