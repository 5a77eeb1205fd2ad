//! DNS: whether a name leads here, who may issue for it, and records for DNS-01.

mod caa;
mod names;
mod rfc2136;

use futures_util::future::BoxFuture;
pub(crate) use names::{Names, Pointing};
pub use rfc2136::{Rfc2136, TsigKind};

/// Why a record could not be presented or removed. A retry is safe.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{cause}")]
pub struct DnsError {
    /// Why, and at which server.
    pub cause: String,
}

/// Somebody who can write TXT records of a zone. Both calls may be repeated.
pub trait DnsProvider: Send + Sync + 'static {
    /// Adds `value` to the TXT records of `record` (a name without a trailing dot), and leaves the others.
    ///
    /// # Errors
    /// [`DnsError`].
    fn present<'a>(&'a self, record: &'a str, value: &'a str) -> BoxFuture<'a, Result<(), DnsError>>;

    /// Takes it away again; it is no error if it is not there.
    ///
    /// # Errors
    /// [`DnsError`].
    fn remove<'a>(&'a self, record: &'a str, value: &'a str) -> BoxFuture<'a, Result<(), DnsError>>;
}
