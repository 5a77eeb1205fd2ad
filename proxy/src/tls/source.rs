//! Where chains and private keys come from. The table names a certificate; whoever puts the rooms together knows
//! where it lies.

use futures_util::future::BoxFuture;
use peregrine_routing::{CertificateId, HostPattern};

/// A certificate with its chain and private key.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    /// DER of the end-entity certificate, then of those that have signed each other, without the root.
    pub chain: Vec<Vec<u8>>,
    /// DER of the private key: PKCS #8, SEC1 or PKCS #1.
    pub key: Vec<u8>,
    /// What may be stapled to it.
    pub staple: Option<Staple>,
}

/// What is stapled to a certificate (RFC 6066 §8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staple {
    /// DER of an OCSP response, which was checked.
    pub response: Vec<u8>,
    /// Not to be stapled from then on, Unix time in milliseconds.
    pub until_ms: u64,
}

impl std::fmt::Debug for Certificate {
    /// Never shows the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").field("chain", &self.chain.len()).finish_non_exhaustive()
    }
}

/// Why a certificate could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// There is none of that name.
    #[error("there is no such certificate")]
    Unknown,
    /// It is there and cannot be used, or could not be looked for. It is asked for again after a while.
    #[error("{0}")]
    Failed(String),
}

/// Hands out certificates. An edge asks for each one when it is needed for the first time, on its control thread,
/// and again after it was not needed for long.
pub trait CertificateSource: Send + Sync {
    /// Chain and key of a certificate, which the table names for `domain`. Asked again when the table names another staple.
    fn load<'a>(
        &'a self,
        id: CertificateId,
        domain: &'a HostPattern,
    ) -> BoxFuture<'a, Result<Certificate, SourceError>>;

    /// A handshake came for a name without a certificate: one that is in nobody's table, or whose domain waits for its
    /// first. Told once in a while for each name; must return at once, with a future that resolves as soon as it is known
    /// whether there is one: true when the table names it or is about to, false when none comes soon. Handshakes for the
    /// name wait for it meanwhile, if they may.
    fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        let _ = name;
        Box::pin(std::future::ready(false))
    }
}

/// Of an edge that was given none.
pub(crate) struct NoCertificates;

impl CertificateSource for NoCertificates {
    fn load<'a>(
        &'a self,
        _id: CertificateId,
        _domain: &'a HostPattern,
    ) -> BoxFuture<'a, Result<Certificate, SourceError>> {
        Box::pin(std::future::ready(Err(SourceError::Unknown)))
    }
}
