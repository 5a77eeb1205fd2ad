//! The answer to a certificate authority that validates a name by a handshake (TLS-ALPN-01, RFC 8737): a certificate of
//! the edge's own making that holds the digest of the challenge, and then nothing.

use std::io;
use std::sync::Arc;

use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::sign::CertifiedKey;

use super::hello::ACME_TLS;
use super::settings::Only;

/// What the validation of a name is answered with.
pub(crate) fn settings(
    name: &str,
    digest: [u8; 32],
    provider: &Arc<CryptoProvider>,
) -> io::Result<Arc<ServerConfig>> {
    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(io::Error::other)?;
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(&digest)];
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let certificate = params.self_signed(&key).map_err(io::Error::other)?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let key = any_supported_type(&key).map_err(io::Error::other)?;
    // Not checked by rustls, which does not know the extension that a validation is about.
    let certified = Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key));
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Only(certified)));
    config.alpn_protocols = vec![ACME_TLS.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
