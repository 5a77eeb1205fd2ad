//! A client of TLS that takes every certificate, and says which one it was, and whether a session was resumed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use rustls::client::WantsClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, ConfigBuilder, DigitallySignedStruct, HandshakeKind, SignatureScheme,
    StreamOwned,
};
use sha2::{Digest, Sha256};

use super::STATE_TIMEOUT;

/// Takes every certificate: who signed it is not the question. Remembers what was stapled to the last one.
#[derive(Debug, Default)]
struct TakesAll {
    staple: Mutex<Vec<u8>>,
}

impl ServerCertVerifier for TakesAll {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.staple.lock().expect("a lock") = ocsp.to_vec();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// One client: it keeps the sessions that it was given.
pub(crate) struct TlsClient(Arc<ClientConfig>, Arc<TakesAll>);

/// What a client was answered.
pub(crate) struct TlsAnswer {
    pub(crate) text: String,
    /// SHA-256 of the certificate, in hexadecimal digits.
    pub(crate) certificate: String,
    pub(crate) resumed: bool,
    /// The OCSP response that was stapled to it; empty if there was none.
    pub(crate) staple: Vec<u8>,
}

impl TlsClient {
    pub(crate) fn new() -> Self {
        Self::made(|config| config.with_no_client_auth())
    }

    /// One that has a certificate of its own.
    pub(crate) fn with_certificate(
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Self {
        Self::made(|config| config.with_client_auth_cert(vec![certificate], key).expect("a key"))
    }

    fn made(finish: impl FnOnce(ConfigBuilder<ClientConfig, WantsClientCert>) -> ClientConfig) -> Self {
        let verifier = Arc::<TakesAll>::default();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as _);
        Self(Arc::new(finish(config)), verifier)
    }

    /// One request over a connection of its own; `None` if there is no answer.
    pub(crate) fn get(&self, address: SocketAddr, name: &str) -> Option<TlsAnswer> {
        let socket = TcpStream::connect(address).ok()?;
        // A first handshake may wait for its certificate.
        socket.set_read_timeout(Some(STATE_TIMEOUT)).expect("a time-out");
        let server = ServerName::try_from(name.to_owned()).expect("a name");
        let session = ClientConnection::new(Arc::clone(&self.0), server).ok()?;
        let mut stream = StreamOwned::new(session, socket);
        let request = format!("GET / HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        let presented = stream.conn.peer_certificates()?.first()?;
        Some(TlsAnswer {
            text: String::from_utf8_lossy(&answer).into_owned(),
            certificate: Sha256::digest(presented).iter().map(|byte| format!("{byte:02x}")).collect(),
            resumed: stream.conn.handshake_kind() == Some(HandshakeKind::Resumed),
            staple: std::mem::take(&mut *self.1.staple.lock().expect("a lock")),
        })
    }
}

/// The answer over TLS, and the certificate that was presented, from somebody who was never there before.
pub(crate) fn over_tls(address: SocketAddr, name: &str) -> Option<(String, String)> {
    TlsClient::new().get(address, name).map(|answer| (answer.text, answer.certificate))
}
