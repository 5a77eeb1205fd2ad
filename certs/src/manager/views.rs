//! What the manager tells of its domains, and why it does not do what it is asked.

use peregrine_routing::{CertificateId, StapleId};

use super::records::LoadError;
use crate::domain::{Domain, DomainState, Origin};
use crate::pem::PemError;
use crate::vault::VaultError;

/// What happened to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which one.
    pub domain: String,
    /// Its state now, or that it is gone.
    pub what: EventKind,
}

/// See [`Event`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It has another state now.
    State(DomainState),
    /// It was removed.
    Removed,
}

/// A domain as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainView {
    /// Its name or pattern.
    pub name: String,
    /// How it came here.
    pub origin: Origin,
    /// When, Unix time in milliseconds.
    pub added_ms: u64,
    /// Ordered and renewed by itself.
    pub automatic: bool,
    /// Its state.
    pub state: DomainState,
    /// What it is served with.
    pub certificate: Option<CertificateId>,
    /// What is stapled to it.
    pub staple: Option<StapleId>,
    /// The end of the certificate, Unix time in milliseconds.
    pub not_after_ms: Option<u64>,
    /// Failures in a row.
    pub failures: u32,
}

/// What a check of a domain found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The domain; `None` if it was not added.
    pub domain: Option<DomainView>,
    /// Whether the name leads here; otherwise what was found and which record to create.
    pub dns: Result<(), String>,
    /// Whether each authority may issue by CAA; otherwise why not.
    pub caa: Vec<(String, Result<(), String>)>,
}

/// Why the manager did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The name is none that can have a certificate.
    #[error("{name} cannot have a certificate: {cause}")]
    BadName {
        /// What was asked for.
        name: String,
        /// Why.
        cause: String,
    },
    /// It was not added.
    #[error("there is no domain {0}: add it first")]
    NoDomain(String),
    /// Nobody owns this name, or whoever was asked said no.
    #[error("{0} may not have a certificate on demand")]
    NotAllowed(String),
    /// Too many are waiting already; try again later.
    #[error("too many names wait for their first certificate")]
    Busy,
    /// There is no certificate yet; it is being worked on.
    #[error("{name} has no certificate yet: {state}")]
    NotYet {
        /// Which one.
        name: String,
        /// Its state.
        state: String,
    },
    /// What was brought cannot be used.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// A certificate cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The vault.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
}

pub(super) fn view(domain: &Domain, now_ms: u64) -> DomainView {
    DomainView {
        name: domain.name.clone(),
        origin: domain.origin,
        added_ms: domain.added_ms,
        automatic: domain.automatic,
        state: domain.state(now_ms),
        certificate: domain.held.as_ref().map(|held| held.id),
        staple: domain.held.as_ref().and_then(|held| held.ocsp.staple),
        not_after_ms: domain.held.as_ref().map(|held| held.not_after_ms),
        failures: domain.failures,
    }
}
