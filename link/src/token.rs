//! Join tokens: a secret that is good for one use, and the fingerprint of the authority that made it, so that the
//! first contact is proved to both sides. The engine keeps a digest of it, never the token.

use sha2::{Digest, Sha256};

/// What every token begins with, so that people and secret scanners know one.
const PREFIX: &str = "peregrine_join_";
const PART_BYTES: usize = 32;

/// A token that lets one edge join.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the authority's certificate.
    pub(crate) authority: [u8; PART_BYTES],
    /// 256 random bits.
    pub(crate) secret: [u8; PART_BYTES],
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinToken").finish_non_exhaustive()
    }
}

/// Why a text is no token. It never repeats the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "that is no join token: one begins with {PREFIX} and has 128 hexadecimal digits; it may have been cut when it was copied"
)]
pub struct TokenError;

impl JoinToken {
    /// A fresh token of an authority.
    ///
    /// # Errors
    /// The system has no randomness.
    pub(crate) fn fresh(authority: [u8; PART_BYTES]) -> Result<Self, getrandom::Error> {
        let mut secret = [0; PART_BYTES];
        getrandom::fill(&mut secret)?;
        Ok(Self { authority, secret })
    }

    /// Reads a token.
    ///
    /// # Errors
    /// [`TokenError`] when it is none.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TokenError)?;
        let bytes = unhex(digits).filter(|bytes| bytes.len() == 2 * PART_BYTES).ok_or(TokenError)?;
        let (mut authority, mut secret) = ([0; PART_BYTES], [0; PART_BYTES]);
        authority.copy_from_slice(&bytes[..PART_BYTES]);
        secret.copy_from_slice(&bytes[PART_BYTES..]);
        Ok(Self { authority, secret })
    }

    /// The token as it is handed over. A secret.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{PREFIX}{}{}", hex(&self.authority), hex(&self.secret))
    }
}

/// What is kept of a secret: 256 random bits need no slow hash.
pub(crate) fn digest(secret: &[u8]) -> String {
    hex(&Sha256::digest(secret))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_written_and_never_shown() {
        let token = JoinToken::fresh([7; 32]).expect("randomness");
        assert_eq!(JoinToken::parse(&format!(" {}\n", token.text())), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(&hex(&token.secret)));
        assert_ne!(token, JoinToken::fresh([7; 32]).expect("randomness"), "no two are alike");
    }

    #[test]
    fn what_is_no_token_is_refused_without_being_repeated() {
        let whole = JoinToken::fresh([7; 32]).expect("randomness").text();
        for length in 0..whole.len() {
            assert_eq!(JoinToken::parse(&whole[..length]), Err(TokenError), "{length} characters");
        }
        for text in ["peregrine_join_é", &format!("{whole}00"), &whole.replace("join", "gone")] {
            assert_eq!(JoinToken::parse(text), Err(TokenError));
        }
    }
}
