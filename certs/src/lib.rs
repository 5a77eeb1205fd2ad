//! Certificates by themselves: a domain that is added gets a certificate from an ACME authority, which is renewed for ever.
//!
//! ```text
//! add ─► DNS and CAA are checked ─► claim (one order per name) ─► order ─► challenges at every edge
//!     ─► finalize ─► stored, sealed ─► published ─► renewed at two thirds of its life, or when the authority says
//! ```
//!
//! The room knows neither engine nor edge. It is handed a [`Vault`] (durable records with revisions) and a [`Front`] (who answers
//! challenges and presents certificates); time and random bits come from [`Outside`]. What a domain waits for, and what follows
//! from what happened, is decided by a pure state machine (`domain.rs`).
//!
//! It never orders twice what can still be fetched, never orders for a name that does not lead here, and never writes or logs a
//! private key in clear text.

mod acme;
mod ask;
mod budget;
mod config;
mod dns;
mod domain;
mod front;
#[cfg(fuzzing)]
pub mod fuzzing;
mod limits;
mod manager;
mod ocsp;
mod pem;
mod sealed;
mod vault;

pub use acme::{CaConfig, ChallengeKind, ExternalAccount};
pub use ask::AskConfig;
pub use budget::BudgetLimit;
pub use config::{Config, DnsConfig, OnDemand, Outside, Owned};
pub use dns::{DnsError, DnsProvider, Rfc2136, TsigKind};
pub use domain::{DomainState, Origin, Source};
pub use front::{Front, FrontError};
pub use limits::Limits;
pub use manager::{
    CertificateRecord, Check, Counts, DomainView, Event, EventKind, LoadError, Manager, ManagerError,
    load_certificate,
};
pub use pem::{Bundle, Leaf, PemError, chain_pem, key_pem};
pub use sealed::{SealError, SealKey, secret_of_base64};
pub use vault::{Expected, FolderVault, MemoryVault, Record, Revision, Vault, VaultError, Write};
