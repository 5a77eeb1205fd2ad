//! What comes from certificate authorities, for fuzz targets: an answer of theirs, a chain, and what a responder says. It is
//! compiled for fuzzing only, adds no rule of its own, and needs no socket and no runtime.

use bytes::Bytes;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderValue, LOCATION, RETRY_AFTER};

use crate::acme::judge;
use crate::ocsp::{self, Status, Subject};
use crate::pem::{self, Leaf, PemError};

/// What is said of an answer that the library does not get to see.
#[derive(Debug)]
pub struct Told {
    /// In words, for states, events and logs.
    pub text: String,
    /// When to come back, in milliseconds.
    pub after_ms: Option<u64>,
}

/// Judges an answer.
///
/// # Errors
/// It is not one that the library may read.
pub fn answer(
    status: u16,
    content_type: &[u8],
    retry_after: &[u8],
    location: &[u8],
    body: &[u8],
) -> Result<(), Told> {
    let mut answer = Response::new(());
    *answer.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    for (name, value) in [(CONTENT_TYPE, content_type), (RETRY_AFTER, retry_after), (LOCATION, location)] {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            answer.headers_mut().insert(name, value);
        }
    }
    let (seen, judged) = judge("ca.example", answer.into_parts().0, Bytes::copy_from_slice(body));
    judged.map(drop).map_err(|error| Told { text: error.to_string(), after_ms: seen.retry_after_ms })
}

/// Reads a chain, and what its first certificate says of itself.
///
/// # Errors
/// It is none.
pub fn chain(text: &str) -> Result<(usize, Leaf), PemError> {
    let chain = pem::read_chain(text)?;
    let leaf = pem::read_leaf(chain.first().ok_or(PemError::NoCertificate)?)?;
    Ok((chain.len(), leaf))
}

/// What a responder says of a certificate, checked. Times are Unix times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// It may be stapled.
    pub is_good: bool,
    /// Its beginning.
    pub this_update_ms: u64,
    /// Its end.
    pub next_update_ms: u64,
}

/// Checks what a responder has answered for a certificate of an issuer.
///
/// # Errors
/// Why it must not be used, in words.
pub fn responder_answer(
    certificate: &[u8],
    issuer: &[u8],
    answer: &[u8],
    now_ms: u64,
) -> Result<Said, String> {
    let checked = Subject::of(certificate, issuer).and_then(|subject| subject.check(answer, now_ms));
    let checked = checked.map_err(|error| error.to_string())?;
    Ok(Said {
        is_good: checked.status == Status::Good,
        this_update_ms: checked.this_update_ms,
        next_update_ms: checked.next_update_ms,
    })
}

/// The responder that a certificate names.
#[must_use]
pub fn responder(certificate: &[u8]) -> Option<String> {
    ocsp::responder(certificate)
}
