//! An authority that misbehaves: it stands in front of pebble and breaks what a test tells it to break.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::pebble::Pebble;

/// Resources of an authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    Directory,
    Nonce,
    NewAccount,
    NewOrder,
    Order,
    Authorization,
    Challenge,
    Finalize,
    Certificate,
    Other,
}

pub(crate) const RESOURCES: [Resource; 9] = [
    Resource::Directory,
    Resource::Nonce,
    Resource::NewAccount,
    Resource::NewOrder,
    Resource::Order,
    Resource::Authorization,
    Resource::Challenge,
    Resource::Finalize,
    Resource::Certificate,
];

impl Resource {
    fn of(path: &str) -> Self {
        let first = path.split('/').nth(1).unwrap_or_default();
        match first {
            "dir" => Self::Directory,
            "nonce-plz" => Self::Nonce,
            "sign-me-up" => Self::NewAccount,
            "order-plz" => Self::NewOrder,
            "my-order" => Self::Order,
            "authZ" => Self::Authorization,
            "chalZ" => Self::Challenge,
            "finalize-order" => Self::Finalize,
            "certZ" => Self::Certificate,
            _ => Self::Other,
        }
    }
}

/// How a request is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// A page with status 200.
    Html,
    /// A page of a proxy that finds nobody.
    BadGateway,
    /// 500 with a problem document.
    ServerInternal,
    /// 429 with a problem document and `Retry-After: 1`.
    RateLimited,
    /// The request is executed, and its answer is lost.
    AnswerLost,
    /// The order is told to be in `processing`, although it is not.
    Processing,
    /// The same, with a `Retry-After` that is longer than any clock.
    ProcessingForAges,
}

pub(crate) const BREAKS: [Break; 5] =
    [Break::Html, Break::BadGateway, Break::ServerInternal, Break::RateLimited, Break::AnswerLost];

#[derive(Default)]
struct Script {
    rules: Vec<(Resource, Break, usize)>,
    /// What arrived, with what was answered.
    seen: Vec<(Resource, StatusCode)>,
    window: Option<(String, String)>,
    new_orders: Vec<serde_json::Value>,
}

pub(crate) struct BadCa {
    pub(crate) address: SocketAddr,
    pub(crate) root_pem: String,
    script: Arc<Mutex<Script>>,
    server: JoinHandle<()>,
}

impl Drop for BadCa {
    fn drop(&mut self) {
        self.server.abort();
    }
}

type Upstream =
    Client<hyper_rustls::HttpsConnector<hyper_util::client::legacy::connect::HttpConnector>, Full<Bytes>>;

impl BadCa {
    pub(crate) async fn before(pebble: &Pebble) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().unwrap();
        let own = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let mut roots = rustls::RootCertStore::empty();
        let root = <rustls_pki_types::CertificateDer<'_> as rustls_pki_types::pem::PemObject>::from_pem_slice(
            pebble.root_pem.as_bytes(),
        );
        roots.add(root.unwrap()).unwrap();
        let client_tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(client_tls)
            .https_only()
            .enable_http1()
            .build();
        let upstream: Upstream = Client::builder(TokioExecutor::new()).build(connector);
        let script = Arc::<Mutex<Script>>::default();
        let server = tokio::spawn(serve(listener, acceptor, upstream, pebble.address, Arc::clone(&script)));
        Self { address, root_pem: own.cert.pem(), script, server }
    }

    pub(crate) fn directory(&self) -> String {
        format!("https://{}/dir", self.address)
    }

    /// The next `times` requests of this kind are broken.
    pub(crate) fn break_next(&self, resource: Resource, how: Break, times: usize) {
        self.script.lock().unwrap().rules.push((resource, how, times));
    }

    /// Whether there is nothing left to break.
    /// From now on nothing is broken.
    pub(crate) fn mend(&self) {
        self.script.lock().unwrap().rules.clear();
    }

    pub(crate) fn is_done(&self) -> bool {
        self.script.lock().unwrap().rules.iter().all(|(_, _, times)| *times == 0)
    }

    /// Speaks RFC 9773, with this window.
    pub(crate) fn set_window(&self, start: &str, end: &str) {
        self.script.lock().unwrap().window = Some((start.to_owned(), end.to_owned()));
    }

    /// Requests of a kind that the authority said yes to.
    pub(crate) fn fulfilled(&self, resource: Resource) -> usize {
        let script = self.script.lock().unwrap();
        script.seen.iter().filter(|(seen, status)| *seen == resource && status.is_success()).count()
    }

    pub(crate) fn new_orders(&self) -> Vec<serde_json::Value> {
        self.script.lock().unwrap().new_orders.clone()
    }
}

async fn serve(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    upstream: Upstream,
    pebble: SocketAddr,
    script: Arc<Mutex<Script>>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, upstream, script) = (acceptor.clone(), upstream.clone(), Arc::clone(&script));
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service =
                service_fn(move |request| answer(request, upstream.clone(), pebble, Arc::clone(&script)));
            let http = hyper::server::conn::http1::Builder::new();
            let _broken = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cut")]
struct Cut;

async fn answer(
    request: Request<hyper::body::Incoming>,
    upstream: Upstream,
    pebble: SocketAddr,
    script: Arc<Mutex<Script>>,
) -> Result<Response<Full<Bytes>>, Cut> {
    let resource = Resource::of(request.uri().path());
    let how = {
        let mut script = script.lock().unwrap();
        // An order is in `processing` only after somebody has asked for the certificate.
        let asked = script.seen.iter().any(|(seen, _)| *seen == Resource::Finalize);
        let rule = script.rules.iter_mut().find(|(which, how, times)| {
            let is_processing = matches!(how, Break::Processing | Break::ProcessingForAges);
            let in_place = !is_processing || resource == Resource::Finalize || asked;
            *which == resource && *times > 0 && in_place
        });
        rule.map(|(_, how, times)| {
            *times -= 1;
            *how
        })
    };
    let broken = match how {
        Some(Break::Html) => Some(page(StatusCode::OK)),
        Some(Break::BadGateway) => Some(page(StatusCode::BAD_GATEWAY)),
        Some(Break::ServerInternal) => Some(problem(StatusCode::INTERNAL_SERVER_ERROR, "serverInternal")),
        Some(Break::RateLimited) => Some(problem(StatusCode::TOO_MANY_REQUESTS, "rateLimited")),
        _ => None,
    };
    if let Some(broken) = broken {
        return Ok(broken);
    }
    if let Some(window) = window_of(&request, &script) {
        return Ok(window);
    }
    let (mut head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    note_order(resource, &body, &script);
    let path = head.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    head.uri = format!("https://{pebble}{path}").parse().map_err(|_| Cut)?;
    let answer = upstream.request(Request::from_parts(head, Full::new(body))).await.map_err(|_| Cut)?;
    let (mut head, body) = answer.into_parts();
    let mut body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    script.lock().unwrap().seen.push((resource, head.status));
    match how {
        Some(Break::AnswerLost) => return Err(Cut),
        Some(Break::Processing | Break::ProcessingForAges) if head.status.is_success() => {
            let text = String::from_utf8_lossy(&body);
            let mut order: serde_json::Value = serde_json::from_str(&text).map_err(|_| Cut)?;
            order["status"] = "processing".into();
            body = order.to_string().into();
            let after = if how == Some(Break::Processing) { 1 } else { u64::MAX };
            head.headers.insert("retry-after", after.into());
        }
        _ => {}
    }
    if resource == Resource::Directory && script.lock().unwrap().window.is_some() {
        let mut directory: serde_json::Value = serde_json::from_slice(&body).map_err(|_| Cut)?;
        let base = directory["newOrder"].as_str().unwrap_or_default().replace("/order-plz", "/ari");
        directory["renewalInfo"] = base.into();
        body = directory.to_string().into();
    }
    head.headers.remove("content-length");
    head.headers.remove("transfer-encoding");
    Ok(Response::from_parts(head, Full::new(body)))
}

fn window_of(
    request: &Request<hyper::body::Incoming>,
    script: &Mutex<Script>,
) -> Option<Response<Full<Bytes>>> {
    let (start, end) = script.lock().unwrap().window.clone()?;
    if request.method() != Method::GET || !request.uri().path().starts_with("/ari/") {
        return None;
    }
    let body = serde_json::json!({ "suggestedWindow": { "start": start, "end": end } });
    let answer =
        Response::builder().header("content-type", "application/json").header("retry-after", "21600");
    answer.body(Full::new(body.to_string().into())).ok()
}

/// What an order asks for stands in its payload, in base64url.
fn note_order(resource: Resource, body: &[u8], script: &Mutex<Script>) {
    if resource != Resource::NewOrder {
        return;
    }
    let jws: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let payload = jws["payload"].as_str().unwrap_or_default();
    let payload = data_encoding::BASE64URL_NOPAD.decode(payload.as_bytes()).unwrap_or_default();
    script.lock().unwrap().new_orders.push(serde_json::from_slice(&payload).unwrap_or_default());
}

fn page(status: StatusCode) -> Response<Full<Bytes>> {
    let answer = Response::builder().status(status).header("content-type", "text/html");
    answer.body(Full::new("<html><body><h1>Just a moment</h1></body></html>".into())).unwrap()
}

fn problem(status: StatusCode, kind: &str) -> Response<Full<Bytes>> {
    let body = serde_json::json!({
        "type": format!("urn:ietf:params:acme:error:{kind}"),
        "detail": "not now",
        "status": status.as_u16(),
    });
    let answer = Response::builder().status(status).header("content-type", "application/problem+json");
    answer.header("retry-after", "1").body(Full::new(body.to_string().into())).unwrap()
}
