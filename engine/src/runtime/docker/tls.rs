//! Mutual TLS to an engine: its certificate must come from the given authority and name the host, and ours is
//! shown to it. No other authority counts, so nobody else's certificate for that name helps.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::model::TlsFiles;

/// Wraps a connection. The files are read anew, so that renewed certificates count from the next call on.
///
/// # Errors
///
/// A file cannot be read, or the handshake failed.
pub(super) async fn connect(
    stream: TcpStream,
    host: &str,
    files: &TlsFiles,
) -> io::Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(Arc::new(config(files)?));
    let name = ServerName::try_from(host.trim_start_matches('[').trim_end_matches(']').to_owned())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{host:?} is no host name")))?;
    connector
        .connect(name, stream)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("TLS with {host}: {error}")))
}

fn config(files: &TlsFiles) -> io::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|error| bad(&files.ca, &error))?;
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| bad(&files.key, &error))?;
    // Named here instead of taken from the process, so that nobody else's choice changes it.
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates(&files.cert)?, key)
        .map_err(|error| bad(&files.cert, &error))
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|error| bad(path, &error))?;
    if certificates.is_empty() {
        return Err(bad(path, &"no certificate in it"));
    }
    Ok(certificates)
}

fn bad(path: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", path.display()))
}
