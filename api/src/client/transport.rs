//! One request and its answer: connect, head and body each have their time-out, so that no call can hang.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ClientError;
use crate::types::Problem;

/// Longest time to open a connection.
pub const CONNECT_TIMEOUT_MS: u64 = 3_000;
/// Longest time from the request to the head of the answer; above the server's own limit, so that its reason is heard.
pub const HEAD_TIMEOUT_MS: u64 = 35_000;
/// Longest time for the body of an answer that is no stream.
pub const BODY_TIMEOUT_MS: u64 = 30_000;
/// Largest body of an answer that is no stream.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// An idle connection is not used again after this time; below the server's own limit.
const POOL_IDLE_MS: u64 = 20_000;
/// How much of an answer that is not understood is shown.
const SHOWN_BYTES: usize = 200;

/// RFC 3986 §2.3: everything but the unreserved characters is escaped.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Where and how to call.
#[derive(Clone)]
pub(super) struct Transport {
    base: String,
    authorization: Option<HeaderValue>,
    head_timeout: Duration,
    pool: Pool<HttpConnector, Full<Bytes>>,
}

/// A call before it is made.
pub(super) struct Call {
    method: Method,
    path: String,
    query: String,
    body: Option<Bytes>,
    accept: &'static str,
    headers: Vec<(&'static str, String)>,
    extra_wait: Duration,
    /// The server knows it again: it may be made once more when the connection broke before the answer.
    is_repeatable: bool,
}

impl Call {
    /// A call of `segments` below the base, each escaped.
    pub(super) fn new(method: Method, segments: &[&str]) -> Self {
        let path =
            segments.iter().map(|segment| format!("/{}", utf8_percent_encode(segment, ESCAPED))).collect();
        Self {
            method,
            path,
            query: String::new(),
            body: None,
            accept: "application/json",
            headers: Vec::new(),
            extra_wait: Duration::ZERO,
            is_repeatable: false,
        }
    }

    pub(super) fn query(mut self, name: &str, value: Option<impl ToString>) -> Self {
        if let Some(value) = value {
            self.query.push(if self.query.is_empty() { '?' } else { '&' });
            let value = value.to_string();
            self.query.push_str(&format!("{name}={}", utf8_percent_encode(&value, ESCAPED)));
        }
        self
    }

    pub(super) fn json(mut self, body: &impl Serialize) -> Self {
        // Wire types have string keys and no failing conversions, so they always become JSON.
        self.body = Some(serde_json::to_vec(body).unwrap_or_default().into());
        self
    }

    pub(super) fn accept(mut self, media_type: &'static str) -> Self {
        self.accept = media_type;
        self
    }

    pub(super) fn header(mut self, name: &'static str, value: Option<String>) -> Self {
        self.headers.extend(value.map(|value| (name, value)));
        self
    }

    /// Gives the call a key by which the server knows it again.
    pub(super) fn idempotency_key(mut self, key: Option<String>) -> Self {
        self.is_repeatable = key.is_some();
        self.header("idempotency-key", key)
    }

    /// The server is asked to wait for so long before it answers.
    pub(super) fn wait_ms(mut self, wait_ms: Option<u64>) -> Self {
        self.extra_wait = Duration::from_millis(wait_ms.unwrap_or_default());
        self.query("wait_ms", wait_ms)
    }
}

impl Transport {
    pub(super) fn new(base: &str, token: Option<&str>, head_timeout_ms: u64) -> Result<Self, ClientError> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(Duration::from_millis(CONNECT_TIMEOUT_MS)));
        connector.set_nodelay(true);
        let pool = Pool::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_millis(POOL_IDLE_MS))
            .build(connector);
        Ok(Self {
            base: checked_base(base)?,
            authorization: token.map(bearer).transpose()?,
            head_timeout: Duration::from_millis(head_timeout_ms),
            pool,
        })
    }

    /// The base URL.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Makes a call whose answer is JSON.
    pub(super) async fn json<T: DeserializeOwned>(&self, call: Call) -> Result<T, ClientError> {
        let (url, _, body) = self.whole(call).await?;
        understood(&url, &body)
    }

    /// Makes a call whose answer is JSON or nothing (204); says which.
    pub(super) async fn status(&self, call: Call) -> Result<StatusCode, ClientError> {
        Ok(self.whole(call).await?.1)
    }

    /// Makes a call whose answer is text.
    pub(super) async fn text(&self, call: Call) -> Result<String, ClientError> {
        let (url, _, body) = self.whole(call).await?;
        String::from_utf8(body.into()).map_err(|_| not_understood(&url, "it is not text"))
    }

    async fn whole(&self, call: Call) -> Result<(String, StatusCode, Bytes), ClientError> {
        let (url, answer) = self.open(call).await?;
        let status = answer.status();
        let body = self.collect(&url, answer).await?;
        Ok((url, status, body))
    }

    /// Makes a call and returns once the head of a good answer is there.
    pub(super) async fn open(&self, call: Call) -> Result<(String, Response<Incoming>), ClientError> {
        let url = format!("{}{}{}", self.base, call.path, call.query);
        let answer = self.answer(&url, &call).await?;
        if answer.status().is_success() {
            return Ok((url, answer));
        }
        let status = answer.status();
        let body = self.collect(&url, answer).await?;
        Err(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => ClientError::Problem(Box::new(problem)),
            Err(_) => not_understood(&url, &format!("status {status}: {}", shown(&body))),
        })
    }

    async fn answer(&self, url: &str, call: &Call) -> Result<Response<Incoming>, ClientError> {
        let limit = self.head_timeout + call.extra_wait;
        let unreachable = |detail, sent| ClientError::Unreachable { url: url.to_owned(), detail, sent };
        let mut attempts = if call.is_repeatable { 2 } else { 1 };
        let mut sent = false;
        loop {
            let request = self.request(url, call)?;
            attempts -= 1;
            match tokio::time::timeout(limit, self.pool.request(request)).await {
                Err(_) => {
                    return Err(unreachable(format!("no answer within {} ms", limit.as_millis()), true));
                }
                Ok(Err(error)) => {
                    let broke = !error.is_connect();
                    sent |= broke;
                    if !broke || attempts == 0 {
                        return Err(unreachable(causes(&error), sent));
                    }
                }
                Ok(Ok(answer)) => return Ok(answer),
            }
        }
    }

    fn request(&self, url: &str, call: &Call) -> Result<Request<Full<Bytes>>, ClientError> {
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(url)
            .header(ACCEPT, call.accept)
            .header(USER_AGENT, concat!("peregrine/", env!("CARGO_PKG_VERSION")));
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        for (name, value) in &call.headers {
            request = request.header(*name, value);
        }
        if call.body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request
            .body(Full::new(call.body.clone().unwrap_or_default()))
            .map_err(|error| ClientError::Settings { detail: format!("{url} cannot be asked for: {error}") })
    }

    async fn collect(&self, url: &str, answer: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect();
        let broken = |detail| ClientError::Unreachable { url: url.to_owned(), detail, sent: true };
        match tokio::time::timeout(Duration::from_millis(BODY_TIMEOUT_MS), body).await {
            Err(_) => Err(broken(format!("the answer did not end within {BODY_TIMEOUT_MS} ms"))),
            Ok(Err(error)) => Err(broken(format!("the answer broke off: {error}"))),
            Ok(Ok(body)) => Ok(body.to_bytes()),
        }
    }
}

pub(super) fn understood<T: DeserializeOwned>(url: &str, body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| not_understood(url, &format!("{error}: {}", shown(body))))
}

pub(super) fn not_understood(url: &str, detail: &str) -> ClientError {
    ClientError::NotUnderstood { url: url.to_owned(), detail: detail.to_owned() }
}

fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(SHOWN_BYTES)]).into_owned();
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// An error with everything that caused it, the outermost first, each said once.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

fn checked_base(base: &str) -> Result<String, ClientError> {
    let wrong = |why: &str| ClientError::Settings {
        detail: format!(
            "{base:?} is not the address of a server ({why}): write it like http://127.0.0.1:7070"
        ),
    };
    let trimmed = base.trim_end_matches('/');
    let uri: Uri = trimmed.parse().map_err(|_| wrong("it is not a URL"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => {
            return Err(wrong("this version speaks http only; reach a far server through an SSH tunnel"));
        }
        _ => return Err(wrong("it has no scheme")),
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(wrong("it has no host"));
    }
    if uri.query().is_some() {
        return Err(wrong("it has a query"));
    }
    Ok(trimmed.to_owned())
}

fn bearer(token: &str) -> Result<HeaderValue, ClientError> {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim())).map_err(|_| {
        ClientError::Settings { detail: "the token has characters that no token has".to_owned() }
    })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_segment_is_escaped_so_that_it_cannot_leave_its_place() {
        let call = Call::new(Method::GET, &["api", "v1", "services", "../x?y#z é"]);
        assert_eq!(call.path, "/api/v1/services/..%2Fx%3Fy%23z%20%C3%A9");
    }

    #[test]
    fn a_query_holds_only_what_is_given() {
        let call = Call::new(Method::GET, &["x"])
            .query("a", Some("1&2"))
            .query("b", None::<u32>)
            .query("c", Some(3));
        assert_eq!(call.query, "?a=1%262&c=3");
    }

    #[test]
    fn an_address_that_cannot_be_used_says_why_and_shows_a_good_one() {
        for (base, why) in [
            ("127.0.0.1:7070", ""),
            ("https://far.example", "SSH tunnel"),
            ("http://", ""),
            ("http://a/?b", "query"),
            ("not a url", "not a URL"),
        ] {
            let Err(ClientError::Settings { detail }) = Transport::new(base, None, 1).map(|_| ()) else {
                panic!("{base} is taken");
            };
            assert!(detail.contains(why) && detail.contains("http://127.0.0.1:7070"), "{detail}");
        }
        assert!(Transport::new("http://127.0.0.1:7070/", None, 1).is_ok());
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unreachable_and_nothing_was_sent() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let transport = Transport::new(&format!("http://{free}"), None, 1_000).unwrap();
        let error = transport.text(Call::new(Method::GET, &["livez"])).await.unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { sent: false, .. }), "{error:?}");
    }

    /// A server that reads each request and closes; the heads that it has read.
    async fn hanging_up() -> (String, tokio::task::JoinHandle<Vec<String>>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heads = tokio::spawn(async move {
            let mut heads = Vec::new();
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                let mut head = vec![0; 4_096];
                let length = connection.read(&mut head).await.unwrap();
                let head = String::from_utf8_lossy(&head[..length]).into_owned();
                let is_last = head.starts_with("GET /end");
                if is_last {
                    drop(connection.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await);
                    return heads;
                }
                heads.push(head);
            }
        });
        (url, heads)
    }

    #[tokio::test]
    async fn only_a_call_with_a_key_is_made_once_more_and_with_the_same_key() {
        let (url, heads) = hanging_up().await;
        let transport = Transport::new(&url, None, 10_000).unwrap();
        for key in [None, Some("k-1".to_owned())] {
            let call = Call::new(Method::POST, &["x"]).idempotency_key(key);
            let error = transport.text(call).await.unwrap_err();
            assert!(matches!(error, ClientError::Unreachable { sent: true, .. }), "{error:?}");
        }
        transport.status(Call::new(Method::GET, &["end"])).await.unwrap();
        let heads = heads.await.unwrap();
        let keys: Vec<_> = heads.iter().map(|head| head.contains("idempotency-key: k-1\r\n")).collect();
        assert_eq!(keys, [false, true, true], "{heads:#?}");
    }

    #[tokio::test]
    async fn a_server_that_never_answers_is_given_up_after_the_head_time_out() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let transport = Transport::new(&url, None, 50).unwrap();
        let error = transport.text(Call::new(Method::GET, &["livez"])).await.unwrap_err();
        assert!(
            matches!(&error, ClientError::Unreachable { sent: true, detail, .. } if detail.contains("50 ms")),
            "{error:?}"
        );
    }
}
