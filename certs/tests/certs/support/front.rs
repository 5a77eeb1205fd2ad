//! The edges of a test: one server for HTTP-01, one for TLS-ALPN-01, and what they were told.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use peregrine_certs::{Front, FrontError};
use peregrine_routing::{CertificateId, ChallengeAnswer, ChallengeId, ChallengeSpec, HostPattern, StapleId};
use rustls::server::{Acceptor, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::LazyConfigAcceptor;

#[derive(Default)]
struct Told {
    challenges: HashMap<ChallengeId, ChallengeSpec>,
    published: HashMap<String, CertificateId>,
    staples: HashMap<String, Option<StapleId>>,
    answered: usize,
    broken: Option<String>,
}

#[derive(Clone)]
pub(crate) struct TestFront {
    told: Arc<Mutex<Told>>,
    pub(crate) http: SocketAddr,
    pub(crate) tls: SocketAddr,
    _servers: Arc<Servers>,
}

struct Servers(Vec<JoinHandle<()>>);

impl Drop for Servers {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl TestFront {
    pub(crate) async fn start() -> Self {
        let told = Arc::<Mutex<Told>>::default();
        let http = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let tls = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let (http_addr, tls_addr) = (http.local_addr().unwrap(), tls.local_addr().unwrap());
        let (for_http, for_tls) = (Arc::clone(&told), Arc::clone(&told));
        let servers = vec![
            tokio::spawn(async move {
                while let Ok((stream, _)) = http.accept().await {
                    tokio::spawn(answer_http(stream, Arc::clone(&for_http)));
                }
            }),
            tokio::spawn(async move {
                while let Ok((stream, _)) = tls.accept().await {
                    tokio::spawn(answer_tls(stream, Arc::clone(&for_tls)));
                }
            }),
        ];
        Self { told, http: http_addr, tls: tls_addr, _servers: Arc::new(Servers(servers)) }
    }

    pub(crate) fn published(&self, name: &str) -> Option<CertificateId> {
        self.told.lock().unwrap().published.get(name).copied()
    }

    /// What is stapled.
    pub(crate) fn stapled(&self, name: &str) -> Option<StapleId> {
        self.told.lock().unwrap().staples.get(name).copied().flatten()
    }

    /// Challenges that are answered now.
    pub(crate) fn challenges(&self) -> usize {
        self.told.lock().unwrap().challenges.len()
    }

    /// Challenges that were ever answered.
    pub(crate) fn answered(&self) -> usize {
        self.told.lock().unwrap().answered
    }

    pub(crate) fn break_with(&self, cause: Option<&str>) {
        self.told.lock().unwrap().broken = cause.map(str::to_owned);
    }

    fn with(&self, change: impl FnOnce(&mut Told)) -> BoxFuture<'_, Result<(), FrontError>> {
        let mut told = self.told.lock().unwrap();
        let result = match told.broken.clone() {
            Some(cause) => Err(FrontError { cause }),
            None => {
                change(&mut told);
                Ok(())
            }
        };
        std::future::ready(result).boxed()
    }
}

impl Front for TestFront {
    fn answer(&self, challenge: ChallengeSpec) -> BoxFuture<'_, Result<(), FrontError>> {
        self.with(|told| {
            told.answered += 1;
            told.challenges.insert(challenge.id(), challenge);
        })
    }

    fn withdraw(&self, challenge: ChallengeId) -> BoxFuture<'_, Result<(), FrontError>> {
        self.with(|told| {
            told.challenges.remove(&challenge);
        })
    }

    fn publish(
        &self,
        name: HostPattern,
        certificate: CertificateId,
        staple: Option<StapleId>,
    ) -> BoxFuture<'_, Result<(), FrontError>> {
        self.with(|told| {
            told.staples.insert(name.to_string(), staple);
            told.published.insert(name.to_string(), certificate);
        })
    }
}

async fn answer_http(mut stream: TcpStream, told: Arc<Mutex<Told>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read_exact(&mut byte).await.is_err() {
            return;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    let token =
        head.split_whitespace().nth(1).and_then(|path| path.strip_prefix("/.well-known/acme-challenge/"));
    let answer = token.and_then(|token| {
        let told = told.lock().unwrap();
        match &told.challenges.get(&ChallengeId::Http01(token.into()))?.answer {
            ChallengeAnswer::Http01 { key_authorization, .. } => Some(key_authorization.to_string()),
            ChallengeAnswer::TlsAlpn01 { .. } => None,
        }
    });
    let (status, body) = answer.map_or(("404 Not Found", String::new()), |body| ("200 OK", body));
    let text =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    let _gone = stream.write_all(text.as_bytes()).await;
}

async fn answer_tls(stream: TcpStream, told: Arc<Mutex<Told>>) {
    let Ok(start) = LazyConfigAcceptor::new(Acceptor::default(), stream).await else { return };
    let hello = start.client_hello();
    let name = hello.server_name().unwrap_or_default().to_owned();
    let is_acme = hello.alpn().is_some_and(|mut all| all.any(|alpn| alpn == b"acme-tls/1"));
    let digest = match told.lock().unwrap().challenges.get(&ChallengeId::TlsAlpn01(name.as_str().into())) {
        Some(ChallengeSpec { answer: ChallengeAnswer::TlsAlpn01 { digest }, .. }) if is_acme => *digest,
        _ => return,
    };
    let mut params = rcgen::CertificateParams::new(vec![name]).unwrap();
    params.custom_extensions = vec![rcgen::CustomExtension::new_acme_identifier(&digest)];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    // A server has no need to understand its own certificate: `acmeIdentifier` is critical, and unknown to rustls.
    let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
    let certified = rustls::sign::CertifiedKey::new(vec![certificate.der().clone()], key);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    let _gone = start.into_stream(Arc::new(config)).await;
}
