//! The bearer token: made by the first start, read by later ones and by the command line.
//!
//! It is never logged, and compared in a time that does not depend on it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Name of the token file in the data folder.
pub const TOKEN_FILE: &str = "api-token";
/// Begin of every token, so that scanners for secrets can find one that got out.
pub const TOKEN_PREFIX: &str = "pgn_";
/// Random bytes in a token; it has twice as many hexadecimal digits.
const TOKEN_RANDOM_BYTES: usize = 32;
/// Rights of others that a token file must not have.
const RIGHTS_OF_OTHERS: u32 = 0o077;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read or written.
    #[error("the token file {} cannot be {verb}: {source}", path.display())]
    File {
        /// File.
        path: PathBuf,
        /// `read` or `written`.
        verb: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read it.
    #[error("the token file {} may be read by others (mode {mode:04o}): run chmod 600 {}", path.display(), path.display())]
    Open {
        /// File.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It does not hold a token.
    #[error("the token file {} holds no token: remove it, and the next start makes a new one", path.display())]
    Malformed {
        /// File.
        path: PathBuf,
    },
    /// The system gives no randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(getrandom::Error),
}

/// The token file of a data folder.
#[must_use]
pub fn token_file(data_dir: &Path) -> PathBuf {
    data_dir.join(TOKEN_FILE)
}

/// Reads the token of a data folder.
///
/// # Errors
/// [`TokenError`]; one whose source is `NotFound` means that no server has been started there yet.
pub fn read_token(data_dir: &Path) -> Result<String, TokenError> {
    let path = token_file(data_dir);
    let failed = |source| TokenError::File { path: path.clone(), verb: "read", source };
    let mode = fs::metadata(&path).map_err(failed)?.permissions().mode() & 0o7777;
    if mode & RIGHTS_OF_OTHERS != 0 {
        return Err(TokenError::Open { path, mode });
    }
    let text = fs::read_to_string(&path).map_err(failed)?;
    let token = text.trim();
    let digits = token.strip_prefix(TOKEN_PREFIX).unwrap_or_default();
    let good = digits.len() == 2 * TOKEN_RANDOM_BYTES && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if good { Ok(token.to_owned()) } else { Err(TokenError::Malformed { path }) }
}

/// Reads the token, or makes one if there is none. Two starts at the same time get the same one.
pub(crate) fn read_or_make_token(data_dir: &Path) -> Result<String, TokenError> {
    match read_token(data_dir) {
        Err(TokenError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let path = token_file(data_dir);
    let failed = |source| TokenError::File { path: path.clone(), verb: "written", source };
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    write_private(&fresh, &new_token()?).map_err(failed)?;
    // A hard link appears whole or not at all, and not over another start's token.
    let linked = fs::hard_link(&fresh, &path);
    fs::remove_file(&fresh).map_err(failed)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
        _ => read_token(data_dir),
    }
}

fn write_private(path: &Path, token: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{token}")?;
    file.sync_all()
}

fn new_token() -> Result<String, TokenError> {
    let mut random = [0; TOKEN_RANDOM_BYTES];
    getrandom::fill(&mut random).map_err(TokenError::Random)?;
    Ok(TOKEN_PREFIX.chars().chain(random.iter().flat_map(|byte| hex_digits(*byte))).collect())
}

fn hex_digits(byte: u8) -> [char; 2] {
    [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0'))
}

/// What is kept of the token for comparing.
#[derive(Clone)]
pub(crate) struct TokenDigest([u8; 32]);

impl TokenDigest {
    pub(crate) fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Whether it is the token. Digests are compared in full, so the time tells nothing of the token.
    pub(crate) fn is(&self, token: &str) -> bool {
        let other = Self::of(token);
        let difference = self.0.iter().zip(&other.0).fold(0, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_start_writes_a_private_token_and_the_next_one_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = read_or_make_token(folder.path()).unwrap();
        assert!(first.starts_with("pgn_") && first.len() == 4 + 64, "{first}");
        let mode = fs::metadata(token_file(folder.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(read_or_make_token(folder.path()).unwrap(), first);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
    }

    #[test]
    fn two_installations_have_different_tokens() {
        assert_ne!(new_token().unwrap(), new_token().unwrap());
    }

    #[test]
    fn a_token_file_that_others_may_read_is_refused_with_the_command_that_helps() {
        let folder = tempfile::tempdir().unwrap();
        read_or_make_token(folder.path()).unwrap();
        let path = token_file(folder.path());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = read_or_make_token(folder.path()).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_token_file_without_a_token_is_refused_and_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        write_private(&token_file(folder.path()), "pgn_short").unwrap();
        assert!(matches!(read_or_make_token(folder.path()), Err(TokenError::Malformed { .. })));
        assert_eq!(fs::read_to_string(token_file(folder.path())).unwrap(), "pgn_short\n");
    }

    #[test]
    fn only_the_token_itself_is_the_token() {
        let digest = TokenDigest::of("pgn_abc");
        assert!(digest.is("pgn_abc"));
        for other in ["", "pgn_ab", "pgn_abcd", "pgn_abC"] {
            assert!(!digest.is(other), "{other}");
        }
    }
}
