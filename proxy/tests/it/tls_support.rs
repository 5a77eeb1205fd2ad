//! Certificates and clients for the tests of TLS.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use peregrine_proxy::{Certificate, CertificateSource, Config, SourceError, Staple};
use peregrine_routing::{CertificateId, Change, DomainPolicy, DomainSpec, HostPattern, ServiceSpec};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, StreamOwned};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::support::{Client, PATIENCE, TestEdge};

/// An authority, and the store that its certificates lie in.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    issued: Mutex<HashMap<CertificateId, Certificate>>,
    pub(crate) loads: AtomicUsize,
    pub(crate) wanted: Mutex<Vec<String>>,
    /// What is said of names that are wanted: nothing yet, or whether a certificate comes.
    says: watch::Sender<Option<bool>>,
}

impl Authority {
    pub(crate) fn new() -> Arc<Self> {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "Test authority");
        let key = KeyPair::generate().expect("key");
        Arc::new(Self {
            issuer: CertifiedIssuer::self_signed(params, key).expect("certificate"),
            issued: Mutex::default(),
            loads: AtomicUsize::new(0),
            wanted: Mutex::default(),
            says: watch::Sender::new(Some(false)),
        })
    }

    pub(crate) fn der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    /// A certificate for these names, and where it lies.
    pub(crate) fn issue(&self, names: &[&str]) -> CertificateId {
        let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let params = CertificateParams::new(names).expect("names");
        let key = KeyPair::generate().expect("key");
        let made = params.signed_by(&key, &self.issuer).expect("is signed");
        let id = CertificateId(Sha256::digest(made.der()).into());
        let certificate =
            Certificate { chain: vec![made.der().to_vec()], key: key.serialize_der(), staple: None };
        self.issued.lock().expect("lock").insert(id, certificate);
        id
    }

    /// A client's certificate for a person.
    pub(crate) fn issue_client(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, "Example, Inc.");
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("key");
        let made = params.signed_by(&key, &self.issuer).expect("is signed");
        (vec![made.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }

    /// From now on this is stapled to a certificate.
    pub(crate) fn staple(&self, id: CertificateId, staple: Option<Staple>) {
        self.issued.lock().expect("lock").get_mut(&id).expect("was issued").staple = staple;
    }

    pub(crate) fn forget(&self, id: CertificateId) -> Option<Certificate> {
        self.issued.lock().expect("lock").remove(&id)
    }

    /// From now on nobody knows yet whether what is wanted comes, until that is said here.
    pub(crate) fn is_coming(&self) -> watch::Sender<Option<bool>> {
        self.says.send_replace(None);
        self.says.clone()
    }

    pub(crate) fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }
}

impl CertificateSource for Authority {
    fn load<'a>(
        &'a self,
        id: CertificateId,
        _domain: &'a HostPattern,
    ) -> BoxFuture<'a, Result<Certificate, SourceError>> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        let found = self.issued.lock().expect("lock").get(&id).cloned();
        Box::pin(std::future::ready(found.ok_or(SourceError::Unknown)))
    }

    fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        self.wanted.lock().expect("lock").push(name.to_owned());
        let mut says = self.says.subscribe();
        Box::pin(async move { says.wait_for(Option::is_some).await.is_ok_and(|said| *said == Some(true)) })
    }
}

/// A domain with a certificate of its own.
pub(crate) fn domain(ca: &Authority, name: &str) -> Change {
    domain_with(ca, name, DomainPolicy::default())
}

pub(crate) fn domain_with(ca: &Authority, name: &str, policy: DomainPolicy) -> Change {
    let certified = if name == "*" { "fallback.test" } else { name };
    put(name, Some(ca.issue(&[certified])), policy)
}

pub(crate) fn put(name: &str, certificate: Option<CertificateId>, policy: DomainPolicy) -> Change {
    let name = HostPattern::parse(name).expect("pattern");
    Change::PutDomain(DomainSpec { name, certificate, staple: None, policy })
}

/// An edge that speaks TLS too.
pub(crate) fn edge(
    mut config: Config,
    services: Vec<ServiceSpec>,
    ca: &Arc<Authority>,
    changes: &[Change],
) -> TestEdge {
    config.https = vec!["127.0.0.1:0".parse().expect("address")];
    let source: Arc<dyn CertificateSource> = Arc::clone(ca) as _;
    TestEdge::start_full(config, services, changes, move |edge| edge.with_certificates(source))
}

/// A client that trusts the authority.
pub(crate) fn client(ca: &Authority, alpn: &[&[u8]]) -> ClientConfig {
    let mut config = builder(ca).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}

pub(crate) fn builder(
    ca: &Authority,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der()).expect("authority");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
}

/// A client that speaks one version only.
pub(crate) fn client_of(ca: &Authority, version: &'static rustls::SupportedProtocolVersion) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der()).expect("authority");
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // Both offered, both sent: what the edge likes best is seen.
    use rustls::crypto::aws_lc_rs::kx_group::{X25519, X25519MLKEM768};
    provider.kx_groups = vec![X25519MLKEM768, X25519];
    ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[version])
        .expect("version")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// A client that believes everybody.
pub(crate) fn blind_client() -> ClientConfig {
    blind().0
}

/// What is stapled to the certificate that is presented there.
pub(crate) fn stapled(addr: SocketAddr, name: &str) -> Vec<u8> {
    let (config, blind) = blind();
    drop(connect(addr, name, config));
    std::mem::take(&mut *blind.staple.lock().expect("lock"))
}

fn blind() -> (ClientConfig, Arc<Blind>) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let blind = Arc::new(Blind { provider: Arc::clone(&provider), staple: Mutex::default() });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&blind) as _)
        .with_no_client_auth();
    (config, blind)
}

#[derive(Debug)]
struct Blind {
    provider: Arc<rustls::crypto::CryptoProvider>,
    staple: Mutex<Vec<u8>>,
}

impl ServerCertVerifier for Blind {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.staple.lock().expect("lock") = ocsp.to_vec();
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

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What a service that speaks TLS itself is made with.
pub(crate) fn server(certificate: Certificate) -> Arc<rustls::ServerConfig> {
    let chain = certificate.chain.into_iter().map(CertificateDer::from).collect();
    let key = PrivatePkcs8KeyDer::from(certificate.key).into();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("is a pair");
    Arc::new(config)
}

/// The certificate that a client was shown.
pub(crate) fn presented(client: &Client<Tls>) -> CertificateDer<'static> {
    client.socket.conn.peer_certificates().expect("was shown one")[0].clone().into_owned()
}

/// Asks for these addresses at once on one HTTP/2 connection that is made for a name; gives the statuses.
pub(crate) fn h2_get(addr: SocketAddr, name: &str, config: ClientConfig, uris: &[&str]) -> Vec<u16> {
    let name = ServerName::try_from(name.to_owned()).expect("name");
    crate::support::block_on(async {
        let socket = tokio::net::TcpStream::connect(addr).await.expect("connects");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, socket).await.expect("shakes hands");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (client, connection) = h2::client::handshake(stream).await.expect("handshake");
        let driver = tokio::spawn(connection);
        let mut client = client.ready().await.expect("is ready");
        let mut answers = Vec::new();
        for uri in uris {
            client = client.ready().await.expect("is ready");
            let request = http::Request::get(*uri).body(()).expect("request");
            answers.push(client.send_request(request, true).expect("is sent").0);
        }
        let mut statuses = Vec::new();
        for answer in answers {
            statuses.push(answer.await.expect("is answered").status().as_u16());
        }
        drop(client);
        driver.abort();
        statuses
    })
}

pub(crate) type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Connects and shakes hands.
pub(crate) fn try_connect(
    addr: SocketAddr,
    name: &str,
    config: &Arc<ClientConfig>,
) -> std::io::Result<Client<Tls>> {
    let socket = TcpStream::connect(addr).expect("connects");
    socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
    socket.set_nodelay(true).expect("nodelay");
    let name = ServerName::try_from(name.to_owned()).expect("name");
    let session = ClientConnection::new(Arc::clone(config), name).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(session, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(Client::over(stream))
}

pub(crate) fn connect(addr: SocketAddr, name: &str, config: ClientConfig) -> Client<Tls> {
    try_connect(addr, name, &Arc::new(config)).expect("shakes hands")
}

/// What a handshake fails with.
pub(crate) fn alert(addr: SocketAddr, name: &str, config: ClientConfig) -> Option<rustls::AlertDescription> {
    let error = try_connect(addr, name, &Arc::new(config)).err()?;
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}
