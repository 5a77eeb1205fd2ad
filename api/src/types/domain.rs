//! Domains and their certificates.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How a domain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DomainState {
    /// Nothing was tried yet.
    New,
    /// The name does not lead here yet.
    WaitingForDns,
    /// It waits for a budget, or for a pause that an authority has asked for.
    Waiting,
    /// An order is under way.
    Ordering,
    /// It has a certificate.
    Valid,
    /// Its certificate is over, and nothing renews it.
    Expired,
    /// The authority has revoked its certificate, and it has no other one yet.
    Revoked,
    /// The last try failed; it is tried again.
    Failed,
    /// A state of a later server.
    #[serde(other)]
    Unknown,
}

/// How a domain came here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DomainOrigin {
    /// Somebody added it.
    Added,
    /// A first handshake asked for it.
    OnDemand,
    /// An origin of a later server.
    #[serde(other)]
    Unknown,
}

/// A name that is served over TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Domain {
    /// Name, or `*.` and a name.
    pub name: String,
    /// How it stands.
    pub state: DomainState,
    /// The same in words, with what is waited for and what to do.
    pub message: String,
    /// How it came here.
    pub origin: DomainOrigin,
    /// Ordered and renewed by itself; an imported certificate is not.
    pub automatic: bool,
    /// What it is served with.
    pub certificate: Option<String>,
    /// End of that.
    pub not_after: Option<Timestamp>,
    /// Failures in a row.
    pub failures: u32,
    /// Requests on clear text are sent to https.
    pub redirect: bool,
    /// `Strict-Transport-Security`, if it is said.
    pub hsts: Option<Hsts>,
    /// Whether clients have to present a certificate, or are asked for one; `null` if they are not.
    pub client_auth: Option<ClientAuth>,
    /// When it was added.
    pub added_at: Timestamp,
}

/// What clients are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClientAuth {
    /// A handshake without a certificate fails.
    Required,
    /// Those without one are let in, too.
    Optional,
    /// A word of a later server.
    #[serde(other)]
    Unknown,
}

/// Certificates of clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClientAuthRequest {
    /// Authorities that they have to be signed by, PEM.
    pub authorities: String,
    /// A handshake without one fails; otherwise it is asked for only. Yes unless given.
    #[serde(default = "yes")]
    pub required: bool,
}

/// `Strict-Transport-Security` (RFC 6797).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Hsts {
    /// For so many seconds a browser speaks TLS only.
    pub max_age_seconds: u32,
    /// So it does with every name below.
    #[serde(default)]
    pub include_subdomains: bool,
    /// The name may go into browsers' lists.
    #[serde(default)]
    pub preload: bool,
}

/// A domain that is to be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DomainRequest {
    /// Name, or `*.` and a name.
    pub name: String,
    /// Send requests on clear text to https; yes unless given.
    #[serde(default = "yes")]
    pub redirect: bool,
    /// Say `Strict-Transport-Security`; no unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hsts: Option<Hsts>,
    /// Ask clients for certificates; no unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_auth: Option<ClientAuthRequest>,
}

const fn yes() -> bool {
    true
}

/// What a look at a domain from outside has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DomainCheck {
    /// Name.
    pub name: String,
    /// Nothing is in the way of a certificate.
    pub ok: bool,
    /// What is wrong with where the name leads, and which record to create; `null` if nothing is.
    pub dns: Option<String>,
    /// Whether each authority may issue (RFC 8659).
    pub caa: Vec<CaaCheck>,
    /// The domain, if it was added.
    pub domain: Option<Domain>,
}

/// Whether an authority may issue a certificate for a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CaaCheck {
    /// Authority, as it is called in the configuration.
    pub authority: String,
    /// Why not; `null` if it may.
    pub problem: Option<String>,
}

/// Where a certificate came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CertificateSource {
    /// An ACME authority.
    Acme,
    /// Somebody imported it.
    Import,
    /// A source of a later server.
    #[serde(other)]
    Unknown,
}

/// A certificate, without its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Certificate {
    /// SHA-256 of its DER.
    pub id: String,
    /// DNS names.
    pub names: Vec<String>,
    /// Who issued it.
    pub issuer: String,
    /// Where it came from.
    pub source: CertificateSource,
    /// Which authority of the configuration.
    pub authority: Option<String>,
    /// Not valid before.
    pub not_before: Timestamp,
    /// Not valid after.
    pub not_after: Timestamp,
    /// Domains that are served with it.
    pub domains: Vec<String>,
    /// The chain in PEM, its own certificate first.
    pub chain: String,
}

/// A certificate that is brought, with its private key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CertificateImport {
    /// Domain that is to be served with it; it is added if it is not there.
    pub domain: String,
    /// The chain in PEM, its own certificate first.
    pub chain: String,
    /// The private key in PEM, without a password. A secret.
    pub key: String,
}

impl std::fmt::Debug for CertificateImport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateImport").field("domain", &self.domain).finish_non_exhaustive()
    }
}

/// A certificate with its private key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CertificateExport {
    /// Domain that is served with it.
    pub domain: String,
    /// The chain in PEM.
    pub chain: String,
    /// The private key in PEM. A secret.
    pub key: String,
}

impl std::fmt::Debug for CertificateExport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateExport").field("domain", &self.domain).finish_non_exhaustive()
    }
}
