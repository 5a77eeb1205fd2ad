//! HTTP to a certificate authority. Whatever answers there, the caller gets either an answer that can be one of ACME
//! (RFC 8555), or an error that says what came instead and when to come back. Time and size of an answer are bounded.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER, USER_AGENT};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient, Problem};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// An answer has to be there within this time, connecting included.
const ANSWER_TIMEOUT_MS: u64 = 30_000;
/// A longer answer is none. Chains have some kilobytes.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Connections that nobody has used for this long are closed.
const IDLE_TIMEOUT_MS: u64 = 20_000;
/// What is shown of an answer that is not ACME.
const EXCERPT_CHARS: usize = 80;
/// Of a problem, so much is shown: it ends up in states, events and logs.
const MAX_TOLD_CHARS: usize = 500;
/// `Retry-After` is believed up to here: seven days.
const MAX_RETRY_AFTER_MS: u64 = 7 * 24 * 3_600_000;

const BAD_NONCE: &str = "urn:ietf:params:acme:error:badNonce";
const AGENT: &str = concat!("peregrine/", env!("CARGO_PKG_VERSION"), " instant-acme");

/// Why a request to a certificate authority has no usable answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("{host} cannot be reached: {cause}")]
    Unreachable { host: String, cause: String },
    #[error("{host} did not answer within {} s", ANSWER_TIMEOUT_MS / 1000)]
    TimedOut { host: String },
    #[error("{host} answered {status} with something that is not ACME: \"{excerpt}\"")]
    NotAcme { host: String, status: StatusCode, excerpt: String, retry_after_ms: Option<u64> },
    #[error("{}", refusal(host, *status, problem))]
    Refused { host: String, status: StatusCode, problem: Problem, retry_after_ms: Option<u64> },
}

fn refusal(host: &str, status: StatusCode, problem: &Problem) -> String {
    let kind = problem.r#type.as_deref().unwrap_or("no type");
    let kind = kind.strip_prefix("urn:ietf:params:acme:error:").unwrap_or(kind);
    let mut text = format!("{host} refused ({} {kind})", status.as_u16());
    if let Some(detail) = &problem.detail {
        text.push_str(": ");
        text.push_str(detail);
    }
    for sub in &problem.subproblems {
        text.push_str(&format!("; {sub}"));
    }
    plain(&text, MAX_TOLD_CHARS)
}

/// An authority's words in one line: no control characters, and not more than `max_chars`.
fn plain(text: &str, max_chars: usize) -> String {
    let words = text.split_whitespace().flat_map(|word| [" ", word]).flat_map(str::chars).skip(1);
    words.filter(|c| !c.is_control()).take(max_chars).collect()
}

/// A problem document in one line.
pub(super) fn told(problem: &Problem) -> String {
    let kind = problem.r#type.as_deref().unwrap_or("no type");
    let kind = kind.strip_prefix("urn:ietf:params:acme:error:").unwrap_or(kind);
    let detail = problem.detail.as_deref().unwrap_or("no detail");
    let mut text = format!("{detail} ({kind})");
    for sub in &problem.subproblems {
        text.push_str(&format!("; {sub}"));
    }
    plain(&text, MAX_TOLD_CHARS)
}

type Pool = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Connections to one authority. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Transport {
    pool: Pool,
    seen: Arc<Mutex<Seen>>,
}

/// What the library does not tell of the last answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) location: Option<String>,
    pub(crate) retry_after_ms: Option<u64>,
}

impl Transport {
    /// Trusts the system's authorities, and those in `roots_pem` if there are any.
    pub(crate) fn new(roots_pem: Option<&[u8]>) -> Result<Self, String> {
        let tls = client_tls(roots_pem)?;
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_only()
            .enable_http1()
            .build();
        let pool = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_millis(IDLE_TIMEOUT_MS))
            .build(connector);
        Ok(Self { pool, seen: Arc::default() })
    }

    /// The same connections, with a view of its own on what was seen.
    pub(crate) fn apart(&self) -> Self {
        Self { pool: self.pool.clone(), seen: Arc::default() }
    }

    /// What the last answer said.
    pub(crate) fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn ask(&self, request: Request<BodyWrapper<Bytes>>) -> Result<BytesResponse, AnswerError> {
        let host = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let timed_out = || AnswerError::TimedOut { host: host.clone() };
        let limit = Duration::from_millis(ANSWER_TIMEOUT_MS);
        let work = async {
            let unreachable = |cause: String| AnswerError::Unreachable { host: host.clone(), cause };
            let (mut head, body) = request.into_parts();
            head.headers.insert(USER_AGENT, http::HeaderValue::from_static(AGENT));
            let body = body.collect().await.map_or_else(|never| match never {}, |body| body.to_bytes());
            let sent = self.pool.request(Request::from_parts(head, Full::new(body)));
            let (head, body) = sent.await.map_err(|e| unreachable(causes(&e)))?.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|e| unreachable(format!("its answer broke off: {e}")))?.to_bytes();
            let (seen, judged) = judge(&host, head, body);
            *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
            judged
        };
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out()))
    }
}

/// What an answer says, and whether it is one that the library may read.
pub(crate) fn judge(
    host: &str,
    mut head: http::response::Parts,
    body: Bytes,
) -> (Seen, Result<BytesResponse, AnswerError>) {
    let retry_after_ms = retry_after_ms(&head.headers, SystemTime::now());
    // The library adds what it reads to its clock, and panics where that overflows.
    head.headers.remove(RETRY_AFTER);
    if let Some(ms) = retry_after_ms {
        head.headers.insert(RETRY_AFTER, http::HeaderValue::from(ms.div_ceil(1000)));
    }
    let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
    let seen = Seen { location: text(LOCATION).map(str::to_owned), retry_after_ms };
    let html = text(CONTENT_TYPE).is_some_and(|kind| kind.starts_with("text/html"));
    let status = head.status;
    let is_json = || serde_json::from_slice::<serde_json::Value>(&body).is_ok();
    let not_acme = || {
        let excerpt = excerpt(&body);
        Err(AnswerError::NotAcme { host: host.to_owned(), status, excerpt, retry_after_ms })
    };
    let as_it_is = |body| Ok(Response::from_parts(head, Full::new(body)).into());
    let judged = if status.is_success() || status.is_redirection() {
        let is_foreign = html || status.is_redirection() && !body.is_empty() && !is_json();
        if is_foreign { not_acme() } else { as_it_is(body) }
    } else {
        match serde_json::from_slice::<Problem>(&body) {
            Err(_) => not_acme(),
            // The library signs anew with the nonce of this answer.
            Ok(problem)
                if status == StatusCode::BAD_REQUEST && problem.r#type.as_deref() == Some(BAD_NONCE) =>
            {
                as_it_is(body)
            }
            Ok(problem) => {
                Err(AnswerError::Refused { host: host.to_owned(), status, problem, retry_after_ms })
            }
        }
    };
    (seen, judged)
}

/// Trusts the system's authorities, and those in `roots_pem` if there are any.
pub(crate) fn client_tls(roots_pem: Option<&[u8]>) -> Result<rustls::ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for root in CertificateDer::pem_slice_iter(roots_pem.unwrap_or_default()) {
        let root = root.map_err(|e| format!("not a PEM certificate: {e}"))?;
        roots.add(root).map_err(|e| format!("not an authority's certificate: {e}"))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions =
        rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(versions.map_err(|e| e.to_string())?.with_root_certificates(roots).with_no_client_auth())
}

impl HttpClient for Transport {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let this = self.clone();
        Box::pin(async move { this.ask(request).await.map_err(|e| Error::Other(Box::new(e))) })
    }
}

/// Whether the authority refused the nonce, which says nothing of the request.
pub(crate) fn is_bad_nonce(error: &Error) -> bool {
    matches!(error, Error::Api(problem) if problem.r#type.as_deref() == Some(BAD_NONCE))
}

/// `Retry-After` (RFC 9110 §10.2.3) in milliseconds from `now`.
fn retry_after_ms(headers: &HeaderMap, now: SystemTime) -> Option<u64> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let ms = match value.parse::<u64>() {
        Ok(seconds) => seconds.saturating_mul(1000),
        Err(_) => {
            let date = jiff::fmt::rfc2822::parse(value).ok()?.timestamp();
            let date = SystemTime::from(date);
            u64::try_from(date.duration_since(now).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
        }
    };
    Some(ms.min(MAX_RETRY_AFTER_MS))
}

fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(EXCERPT_CHARS * 4)]);
    plain(&text, EXCERPT_CHARS)
}

/// An error with what caused it: hyper's own words end before the interesting part.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_or_as_a_date_and_is_bounded() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        for (value, expected) in [
            ("120", Some(120_000)),
            ("Tue, 14 Nov 2023 22:14:20 GMT", Some(60_000)),
            ("Tue, 14 Nov 2000 22:14:20 GMT", Some(0)),
            ("99999999999999", Some(MAX_RETRY_AFTER_MS)),
            ("soon", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            assert_eq!(retry_after_ms(&headers, now), expected, "{value}");
        }
    }

    #[test]
    fn of_an_answer_that_is_not_acme_a_short_plain_excerpt_is_shown() {
        let page = b"<html>\r\n\x1b[31m <title>Bad  Gateway</title>".repeat(10);
        let shown = excerpt(&page);
        assert!(shown.starts_with("<html>") && shown.chars().count() <= EXCERPT_CHARS, "{shown}");
        assert!(!shown.chars().any(char::is_control));
    }

    #[test]
    fn an_authoritys_words_are_one_line_that_fits_into_a_state() {
        let body = format!("{{\"type\":\"t\",\"detail\":\"no\\r\\n\\u001b[31m{}\"}}", "x".repeat(10_000));
        let mut answer = Response::new(());
        *answer.status_mut() = StatusCode::FORBIDDEN;
        let (_, judged) = judge("ca.example", answer.into_parts().0, body.into());
        let told = judged.map(drop).unwrap_err().to_string();
        assert!(told.starts_with("ca.example refused (403 t): no [31mxxx"), "{told}");
        assert!(told.len() == MAX_TOLD_CHARS && !told.chars().any(char::is_control), "{told}");
    }
}
