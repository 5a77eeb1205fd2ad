//! What is secret on its way: private keys of certificates, and the keys of session tickets. Never shown.

use serde::{Deserialize, Serialize};

use super::{FrameError, frame};

/// A certificate with its chain and its key has at most so many bytes; real ones have a tenth of it.
pub const MAX_CERTIFICATE_BYTES: usize = 256 << 10;

/// Bytes that are not shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Of these bytes.
    #[must_use]
    pub const fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// A certificate with its chain and its private key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyedCertificate {
    /// DER of the certificate, then of those that have signed each other.
    pub chain: Vec<Vec<u8>>,
    /// DER of the private key.
    pub key: Secret,
    /// What is stapled to it.
    pub staple: Option<Staple>,
}

/// What is stapled to a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staple {
    /// DER of an OCSP response.
    pub response: Vec<u8>,
    /// Not to be stapled from then on, Unix time in milliseconds.
    pub until_ms: u64,
}

/// As it was stored before anything was stapled.
#[derive(Serialize, Deserialize)]
struct WithoutStaple {
    chain: Vec<Vec<u8>>,
    key: Secret,
}

impl KeyedCertificate {
    /// As bytes, which are as secret as the key: whoever stores them encrypts them.
    ///
    /// # Errors
    /// [`FrameError`]: it is longer than [`MAX_CERTIFICATE_BYTES`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, FrameError> {
        let bytes = frame(self)?;
        if bytes.len() > MAX_CERTIFICATE_BYTES {
            let bytes = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            return Err(FrameError::TooLong { bytes, limit_bytes: MAX_CERTIFICATE_BYTES as u32 });
        }
        Ok(bytes)
    }

    /// From what [`Self::to_bytes`] gave, also before anything was stapled.
    ///
    /// # Errors
    /// [`FrameError`]: these bytes are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FrameError> {
        let (length, content) = bytes.split_at_checked(4).unwrap_or_default();
        if length != u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes() {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        // What was stored before ends where it would have to be said whether there is a staple.
        postcard::from_bytes(content).or_else(|error| {
            let (before, rest) = postcard::take_from_bytes::<WithoutStaple>(content)?;
            let WithoutStaple { chain, key } = before;
            if rest.is_empty() { Ok(Self { chain, key, staple: None }) } else { Err(error.into()) }
        })
    }
}

/// What an engine answers to the question for a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Given {
    /// Here it is.
    Certificate(KeyedCertificate),
    /// There is none of that name, or the table does not name it for that domain.
    Nothing,
    /// Not now, and why.
    NotNow(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_before_anything_was_stapled_is_read() {
        let before = WithoutStaple { chain: vec![vec![1; 900]], key: Secret::new(vec![171; 40]) };
        let bytes = frame(&before).expect("it is short");
        let read = KeyedCertificate::from_bytes(&bytes).expect("it is read");
        assert_eq!((read.chain, read.key, read.staple), (before.chain, before.key, None));
    }

    #[test]
    fn a_certificate_survives_as_bytes_is_bounded_and_does_not_show_its_key() {
        let certificate = KeyedCertificate {
            chain: vec![vec![1; 900], vec![2]],
            key: Secret::new(vec![171; 40]),
            staple: Some(Staple { response: vec![3; 7], until_ms: 5 }),
        };
        let bytes = certificate.to_bytes().expect("it is short");
        assert_eq!(KeyedCertificate::from_bytes(&bytes).expect("the same"), certificate);
        for cut in 0..bytes.len() {
            assert!(KeyedCertificate::from_bytes(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(!format!("{certificate:?}").contains("171"));
        let long = KeyedCertificate { chain: vec![vec![1; MAX_CERTIFICATE_BYTES]], ..certificate };
        assert!(matches!(long.to_bytes(), Err(FrameError::TooLong { .. })));
    }
}
