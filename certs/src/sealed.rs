//! Secrets at rest. Private keys of accounts and certificates reach a vault only as AES-256-GCM cipher text under the key
//! file of the installation. The record's key is bound to it, so that a sealed record cannot be put in another's place.
//!
//! The file holds one key a line. The first one seals, all of them open: who adds a new first line rotates.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::digest::{SHA256, digest};
use zeroize::Zeroizing;

/// A sealed record begins with this, then the key's id, then the nonce.
const MAGIC: &[u8; 4] = b"PGS1";
const ID_BYTES: usize = 8;
const KEY_BYTES: usize = 32;
const HEAD_BYTES: usize = MAGIC.len() + ID_BYTES;
const LINE_START: &str = "peregrine-key-1 ";

/// Why something cannot be sealed or opened. None holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The key file cannot be read or made.
    #[error("key file {path}: {cause}")]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Others may read the key file.
    #[error("key file {path} can be read by others (mode {mode:04o}): run chmod 600 {path}")]
    Open {
        /// Where.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key file is not one.
    #[error("key file {path}, line {line}: not a key (expected \"peregrine-key-1\" and 64 hex digits)")]
    NotAKey {
        /// Where.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// What lies there was sealed under a key that is not in the file.
    #[error("record {record} was sealed with key {id}, which is not in the key file: restore that file")]
    OtherKey {
        /// Which record.
        record: String,
        /// Which key.
        id: String,
    },
    /// What lies there was changed, or is another record's.
    #[error("record {record} cannot be opened: it was changed, or belongs elsewhere")]
    Forged {
        /// Which record.
        record: String,
    },
    /// The system gives no random bytes, or the cipher refused.
    #[error("cannot seal: the system's cryptography failed")]
    Crypto,
}

/// The key file of an installation.
pub struct SealKey {
    keys: Vec<OneKey>,
}

struct OneKey {
    id: [u8; ID_BYTES],
    cipher: LessSafeKey,
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey")?;
        f.debug_list().entries(self.keys.iter().map(|key| hex(&key.id))).finish()
    }
}

impl SealKey {
    /// Reads the key file, or makes one with a new key (0600) if there is none.
    ///
    /// # Errors
    /// [`SealError`]: when others can read it, or it is no key file.
    pub fn open_or_create(path: &Path) -> Result<Self, SealError> {
        let file_error = |cause| SealError::File { path: path.to_owned(), cause };
        if let Err(e) = fs::metadata(path) {
            if e.kind() != io::ErrorKind::NotFound {
                return Err(file_error(e));
            }
            create(path)?;
        }
        let mode = fs::metadata(path).map_err(file_error)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(SealError::Open { path: path.to_owned(), mode });
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(file_error)?);
        let mut keys = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = line.strip_prefix(LINE_START).and_then(|digits| unhex(digits.trim()));
            let key = key.ok_or_else(|| SealError::NotAKey { path: path.to_owned(), line: number + 1 })?;
            keys.push(OneKey::new(&key)?);
        }
        if keys.is_empty() {
            return Err(SealError::NotAKey { path: path.to_owned(), line: 1 });
        }
        Ok(Self { keys })
    }

    /// A key that nobody has, for tests and for what shall not outlive the process.
    ///
    /// # Errors
    /// [`SealError::Crypto`].
    pub fn ephemeral() -> Result<Self, SealError> {
        Ok(Self { keys: vec![OneKey::new(&*random_key()?)?] })
    }

    /// Seals `secret` as the content of the record `record`.
    ///
    /// # Errors
    /// [`SealError::Crypto`].
    pub fn seal(&self, record: &str, secret: &[u8]) -> Result<Vec<u8>, SealError> {
        let key = &self.keys[0];
        let mut nonce = [0; NONCE_LEN];
        aws_lc_rs::rand::fill(&mut nonce).map_err(|_| SealError::Crypto)?;
        let mut text = Vec::with_capacity(secret.len() + AES_256_GCM.tag_len());
        text.extend_from_slice(secret);
        let aad = Aad::from(bound(&key.id, record));
        let sealed = key.cipher.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut text);
        sealed.map_err(|_| SealError::Crypto)?;
        let mut out = Vec::with_capacity(HEAD_BYTES + NONCE_LEN + text.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&key.id);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&text);
        Ok(out)
    }

    /// Opens what [`SealKey::seal`] made of this record. The result is wiped when it is dropped.
    ///
    /// # Errors
    /// [`SealError::OtherKey`], [`SealError::Forged`].
    pub fn open(&self, record: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let forged = || SealError::Forged { record: record.to_owned() };
        let (head, rest) = sealed.split_at_checked(HEAD_BYTES).ok_or_else(forged)?;
        let (magic, id) = head.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(forged());
        }
        let key = self.keys.iter().find(|key| key.id == id);
        let key = key.ok_or_else(|| SealError::OtherKey { record: record.to_owned(), id: hex(id) })?;
        let (nonce, text) = rest.split_at_checked(NONCE_LEN).ok_or_else(forged)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| forged())?;
        let mut text = Zeroizing::new(text.to_vec());
        let aad = Aad::from(bound(&key.id, record));
        let length = key.cipher.open_in_place(nonce, aad, &mut text).map_err(|_| forged())?.len();
        text.truncate(length);
        Ok(text)
    }

    /// Whether `sealed` is under the key that seals now; otherwise it is due to be sealed again.
    #[must_use]
    pub fn is_current(&self, sealed: &[u8]) -> bool {
        sealed.get(MAGIC.len()..HEAD_BYTES).is_some_and(|id| id == self.keys[0].id)
    }
}

impl OneKey {
    fn new(key: &[u8; KEY_BYTES]) -> Result<Self, SealError> {
        let mut named = Zeroizing::new(b"peregrine key id".to_vec());
        named.extend_from_slice(key);
        let mut id = [0; ID_BYTES];
        id.copy_from_slice(&digest(&SHA256, &named).as_ref()[..ID_BYTES]);
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| SealError::Crypto)?;
        Ok(Self { id, cipher: LessSafeKey::new(key) })
    }
}

fn bound(id: &[u8; ID_BYTES], record: &str) -> Vec<u8> {
    [MAGIC.as_slice(), id, record.as_bytes()].concat()
}

fn random_key() -> Result<Zeroizing<[u8; KEY_BYTES]>, SealError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    aws_lc_rs::rand::fill(&mut *key).map_err(|_| SealError::Crypto)?;
    Ok(key)
}

/// Made beside its place and linked there: who finds it finds it whole, and of two who make it one wins.
fn create(path: &Path) -> Result<(), SealError> {
    let key = random_key()?;
    let text = Zeroizing::new(format!("{LINE_START}{}\n", *Zeroizing::new(hex(&*key))));
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!("~{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let make = || {
        // Of one who died in the middle and had the same number, as in containers.
        match fs::remove_file(&beside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        let linked = match fs::hard_link(&beside, path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        };
        fs::remove_file(&beside)?;
        linked?;
        match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    make().map_err(|cause| SealError::File { path: path.to_owned(), cause })
}

/// The bytes of a secret that is written in base64: the usual alphabet or that of URLs, with its padding or without. Spaces
/// around it do not count.
#[must_use]
pub fn secret_of_base64(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let text = text.trim().trim_end_matches('=');
    let usual: Zeroizing<String> = Zeroizing::new(
        text.chars()
            .map(|digit| match digit {
                '-' => '+',
                '_' => '/',
                other => other,
            })
            .collect(),
    );
    let bytes = data_encoding::BASE64_NOPAD.decode(usual.as_bytes()).ok()?;
    (!bytes.is_empty()).then(|| Zeroizing::new(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    if digits.len() != KEY_BYTES * 2 || !digits.is_ascii() {
        return None;
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    for (at, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).ok()?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_sealed_opens_in_its_own_place_only_and_shows_nothing() {
        let key = SealKey::ephemeral().unwrap();
        let sealed = key.seal("sealed/a", b"a private key").unwrap();
        assert!(!sealed.windows(7).any(|part| part == b"private"));
        assert_eq!(&**key.open("sealed/a", &sealed).unwrap(), b"a private key");
        assert!(matches!(key.open("sealed/b", &sealed), Err(SealError::Forged { .. })));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(key.open("sealed/a", &changed).is_err(), "byte {at} was changed");
            assert!(key.open("sealed/a", &sealed[..at]).is_err(), "cut at {at}");
        }
        assert_ne!(sealed, key.seal("sealed/a", b"a private key").unwrap(), "a nonce is used once");
    }

    #[test]
    fn a_key_file_is_made_once_with_mode_0600_and_refused_when_others_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let first = SealKey::open_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let sealed = first.seal("r", b"secret").unwrap();
        let again = SealKey::open_or_create(&path).unwrap();
        assert_eq!(&**again.open("r", &sealed).unwrap(), b"secret");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = SealKey::open_or_create(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "peregrine-key-1 abc\n").unwrap();
        assert!(matches!(SealKey::open_or_create(&path), Err(SealError::NotAKey { line: 1, .. })));
    }

    #[test]
    fn a_new_first_line_seals_and_the_old_one_still_opens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let old = SealKey::open_or_create(&path).unwrap();
        let sealed = old.seal("r", b"secret").unwrap();
        let other = folder.path().join("other");
        SealKey::open_or_create(&other).unwrap();
        let both = fs::read_to_string(&other).unwrap() + &fs::read_to_string(&path).unwrap();
        fs::write(&path, both).unwrap();
        let rotated = SealKey::open_or_create(&path).unwrap();
        assert_eq!(&**rotated.open("r", &sealed).unwrap(), b"secret");
        assert!(!rotated.is_current(&sealed));
        assert!(rotated.is_current(&rotated.seal("r", b"secret").unwrap()));
        let error = SealKey::open_or_create(&other).unwrap().open("r", &sealed).unwrap_err();
        assert!(matches!(error, SealError::OtherKey { .. }), "{error}");
    }

    #[test]
    fn a_secret_in_base64_is_read_in_either_alphabet() {
        let secret = |text: &str| secret_of_base64(text).map(|secret| secret.to_vec());
        assert_eq!(secret(" +/8=\n"), Some(vec![0xfb, 0xff]));
        assert_eq!(secret("-_8"), Some(vec![0xfb, 0xff]));
        for wrong in ["", "=", "+/!", "a"] {
            assert_eq!(secret(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn debug_shows_ids_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let key = SealKey::open_or_create(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let digits = text.trim().strip_prefix(LINE_START).unwrap();
        assert!(!format!("{key:?}").contains(&digits[..16]));
    }
}
