//! Domains and certificates, as the API asks for them. Whoever keeps them implements this.

use futures_util::future::BoxFuture;

use crate::types::{Certificate, CertificateExport, CertificateImport, Domain, DomainCheck, DomainRequest};

/// Domains and their certificates.
pub trait Domains: Send + Sync {
    /// Every domain, by name.
    fn list(&self) -> Vec<Domain>;

    /// One of them.
    fn get(&self, name: &str) -> Option<Domain>;

    /// Adds one, or changes how it is served.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn add(&self, request: DomainRequest) -> BoxFuture<'_, Result<Domain, DomainsError>>;

    /// Looks where a name leads, and which authorities may issue.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn check<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<DomainCheck, DomainsError>>;

    /// Serves it no longer. Its certificate goes too.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), DomainsError>>;

    /// Every certificate.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn certificates(&self) -> BoxFuture<'_, Result<Vec<Certificate>, DomainsError>>;

    /// Orders a new certificate for a domain now.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn renew<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Domain, DomainsError>>;

    /// Serves a domain with a certificate that was brought.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn import(&self, import: CertificateImport) -> BoxFuture<'_, Result<Domain, DomainsError>>;

    /// The certificate of a domain with its private key.
    ///
    /// # Errors
    /// [`DomainsError`].
    fn export<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<CertificateExport, DomainsError>>;
}

/// Why nothing was done for a domain or a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainsError {
    /// The name is none that can have a certificate.
    #[error("{0}")]
    BadName(String),
    /// There is no such domain.
    #[error("{0}")]
    Unknown(String),
    /// It has no certificate yet.
    #[error("{0}")]
    NoCertificate(String),
    /// What was brought is no certificate with its key.
    #[error("{0}")]
    BadCertificate(String),
    /// The configuration file decides on it.
    #[error("{0}")]
    Configured(String),
    /// No authority is configured, so that nothing can be ordered.
    #[error("{0}")]
    NoAuthority(String),
    /// It can be tried again.
    #[error("{0}")]
    Busy(String),
    /// It could not be read or written.
    #[error("{0}")]
    Failed(String),
}
