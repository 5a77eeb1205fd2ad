//! What rustls is told for a certificate and a policy. Made once for both, not for each handshake.

use std::sync::Arc;

use peregrine_routing::{ClientAuth, DomainPolicy, DomainSpec, TlsVersion};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion, version};

use super::tickets::Tickets;
use crate::clock::now_ms;

/// ALPN of HTTP/2 and HTTP/1.1 (RFC 7301 §6, RFC 9113 §3.2).
pub(crate) const H2: &[u8] = b"h2";
const HTTP11: &[u8] = b"http/1.1";

/// What of a policy counts in a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SettingsKey {
    min_version: TlsVersion,
    client_auth: Option<Arc<ClientAuth>>,
    /// Something is to be stapled.
    pub(crate) is_stapled: bool,
}

impl SettingsKey {
    pub(crate) fn of(domain: &DomainSpec) -> Self {
        let DomainPolicy { min_version, client_auth, .. } = &domain.policy;
        Self {
            min_version: *min_version,
            client_auth: client_auth.clone(),
            is_stapled: domain.staple.is_some(),
        }
    }
}

/// What is the same for all of an edge.
pub(crate) struct Settings {
    provider: Arc<CryptoProvider>,
    tickets: Tickets,
}

/// aws-lc, with the post-quantum group before all others: what is recorded today may be read by tomorrow's machines.
pub(crate) fn provider() -> CryptoProvider {
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};
    CryptoProvider {
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1],
        ..aws_lc_rs::default_provider()
    }
}

impl Settings {
    pub(crate) fn new(tickets: Tickets) -> Self {
        Self { provider: Arc::new(provider()), tickets }
    }

    pub(crate) const fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    pub(crate) fn make(
        &self,
        resolver: Arc<dyn ResolvesServerCert>,
        key: &SettingsKey,
    ) -> Result<Arc<ServerConfig>, rustls::Error> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(versions(key.min_version))?;
        let builder = match &key.client_auth {
            None => builder.with_no_client_auth(),
            Some(auth) => builder.with_client_cert_verifier(self.verifier(auth)?),
        };
        let mut config = builder.with_cert_resolver(resolver);
        config.alpn_protocols = vec![H2.to_vec(), HTTP11.to_vec()];
        // Sessions are in their tickets: nothing is kept here for them.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        if key.client_auth.is_some() {
            // A session that is resumed brings its client's certificate with it, and nobody would ask whether that is valid
            // still: such a client proves who it is each time.
            config.send_tls13_tickets = 0;
        } else {
            config.ticketer = self.tickets.producer();
        }
        Ok(Arc::new(config))
    }

    fn verifier(
        &self,
        auth: &ClientAuth,
    ) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, rustls::Error> {
        let mut roots = RootCertStore::empty();
        for authority in &auth.authorities {
            roots.add(CertificateDer::from(authority.to_vec()))?;
        }
        let builder =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider));
        let builder = if auth.required { builder } else { builder.allow_unauthenticated() };
        builder.build().map_err(|error| rustls::Error::General(error.to_string()))
    }
}

static FROM_TLS12: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
static FROM_TLS13: [&SupportedProtocolVersion; 1] = [&version::TLS13];

fn versions(least: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    match least {
        TlsVersion::Tls12 => &FROM_TLS12,
        TlsVersion::Tls13 => &FROM_TLS13,
    }
}

/// The one certificate that was chosen by the name.
#[derive(Debug)]
pub(crate) struct Only(pub(crate) Arc<CertifiedKey>);

/// The one certificate that was chosen by the name, with what is stapled to it as long as that holds.
#[derive(Debug)]
pub(crate) struct Stapled {
    pub(crate) bare: Arc<CertifiedKey>,
    pub(crate) stapled: Arc<CertifiedKey>,
    pub(crate) until_ms: u64,
}

impl ResolvesServerCert for Stapled {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let is_over = now_ms() >= self.until_ms;
        Some(Arc::clone(if is_over { &self.bare } else { &self.stapled }))
    }
}

impl ResolvesServerCert for Only {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}
