//! Another server decides whether a request goes on. It is asked with GET, on plain HTTP/1.1, and shown the fields of the
//! request, but for those that are about its body, its connection or a part of an answer.
//!
//! 2xx lets the request go on, with fields of that answer; any other answer is the client's. Whatever keeps the server from
//! answering keeps the request from going on; so does a path in which the two might read different things.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use peregrine_routing::{Address, ForwardAuth, is_guarded_field};

use crate::body::ForwardBody;
use crate::core::Core;
use crate::error::Reason;
use crate::headers::{self, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_REQUEST_ID};
use crate::inflight::Flight;
use crate::route::{self, Target};
use crate::rules::edits::take_off;

const X_FORWARDED_METHOD: HeaderName = HeaderName::from_static("x-forwarded-method");
const X_FORWARDED_URI: HeaderName = HeaderName::from_static("x-forwarded-uri");

/// Largest body of an answer.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Largest head of an answer.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Questions of one core that are under way; more requests are not let on.
const MAX_ASKING: u32 = 512;
/// Idle connections that one core keeps to one such server.
const MAX_IDLE: usize = 16;
/// How long they are kept: below the 5 s after which Node.js closes them.
const IDLE_TIMEOUT_MS: u64 = 4_000;

/// Who is asked, made ready.
pub(crate) struct Authority {
    name: Arc<str>,
    host: HeaderValue,
    address: Address,
    uri: Uri,
    pub(super) copied: Vec<HeaderName>,
    timeout: Duration,
}

/// What was decided.
pub(crate) enum Verdict {
    /// It goes on, with these fields.
    GoOn(Vec<(HeaderName, HeaderValue)>),
    /// The client gets this answer.
    Answer(Box<Response<Bytes>>),
}

/// Why nothing was decided.
#[derive(Debug, thiserror::Error)]
enum Unasked {
    #[error("no answer in time")]
    Timeout,
    #[error(transparent)]
    Dial(#[from] crate::resolve::DialError),
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error("a body of more than {MAX_BODY_BYTES} bytes")]
    TooLarge,
    #[error("the status {0}")]
    Status(StatusCode),
}

impl Authority {
    /// `None` for an address that is none: then nobody can be asked.
    pub(super) fn of(auth: &ForwardAuth) -> Option<Self> {
        let (host, port) = auth.authority.rsplit_once(':')?;
        let address = match auth.authority.parse() {
            Ok(socket) => Address::Socket(socket),
            Err(_) => Address::Name { host: host.into(), port: port.parse().ok()? },
        };
        let name = |text: &Arc<str>| HeaderName::from_bytes(text.as_bytes()).ok();
        Some(Self {
            name: Arc::clone(&auth.authority),
            host: HeaderValue::from_str(&auth.authority).ok()?,
            address,
            uri: auth.path.parse().ok()?,
            copied: auth
                .copy_headers
                .iter()
                .filter(|text| !is_guarded_field(text))
                .filter_map(name)
                .collect(),
            timeout: Duration::from_millis(auth.timeout_ms.max(1).into()),
        })
    }

    /// Asks about a request.
    ///
    /// # Errors
    /// [`Reason::AuthUnavailable`].
    pub(super) async fn ask(
        &self,
        core: &Rc<Core>,
        flight: &Flight,
        headers: &HeaderMap,
        target: &Target,
    ) -> Result<Verdict, Reason> {
        let _asking = core.authorities.begin().ok_or(Reason::AuthUnavailable)?;
        let asked = tokio::time::timeout(self.timeout, self.exchange(core, flight, headers, target));
        asked.await.unwrap_or(Err(Unasked::Timeout)).map_err(|why| {
            tracing::debug!(authority = %self.name, %why, "nobody has decided on a request");
            Reason::AuthUnavailable
        })
    }

    async fn exchange(
        &self,
        core: &Rc<Core>,
        flight: &Flight,
        headers: &HeaderMap,
        target: &Target,
    ) -> Result<Verdict, Unasked> {
        let request = || self.request(flight, headers, target);
        let (mut sender, answer) = match core.authorities.take(&self.name, core.coarse_now_ms()) {
            Some(mut sender) => match sender.send_request(request()).await {
                Ok(answer) => (sender, answer),
                // It was closed meanwhile. To ask twice changes nothing.
                Err(_) => self.ask_anew(core, request()).await?,
            },
            None => self.ask_anew(core, request()).await?,
        };
        let (mut parts, body) = answer.into_parts();
        headers::clean_response(&mut parts.headers);
        if parts.status.is_informational() {
            return Err(Unasked::Status(parts.status));
        }
        let body = collect(body).await?;
        if body.is_some() && sender.ready().await.is_ok() {
            core.authorities.keep(&self.name, sender, core.coarse_now_ms());
        }
        if parts.status.is_success() {
            let fields = |name: &HeaderName| {
                parts
                    .headers
                    .get_all(name)
                    .iter()
                    .map(|value| (name.clone(), value.clone()))
                    .collect::<Vec<_>>()
            };
            return Ok(Verdict::GoOn(self.copied.iter().flat_map(fields).collect()));
        }
        // Made anew from what is there.
        parts.headers.remove(CONTENT_LENGTH);
        let body = body.ok_or(Unasked::TooLarge)?;
        Ok(Verdict::Answer(Box::new(Response::from_parts(parts, body))))
    }

    async fn ask_anew(
        &self,
        core: &Rc<Core>,
        request: Request<ForwardBody>,
    ) -> Result<(SendRequest<ForwardBody>, Response<Incoming>), Unasked> {
        let socket = core.resolver.dial(&self.address, core.random.next()).await?;
        // A question is one write; what fails here only makes it slower.
        drop(socket.set_nodelay(true));
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD_BYTES);
        let (mut sender, conn) = builder.handshake(TokioIo::new(socket)).await?;
        tokio::task::spawn_local(async move {
            if let Err(error) = conn.await {
                tracing::debug!(%error, "a connection to a server that decides on requests has ended");
            }
        });
        let answer = sender.send_request(request).await?;
        Ok((sender, answer))
    }

    /// Whether the server is shown a field of the request.
    fn is_shown(&self, name: &HeaderName, headers: &HeaderMap) -> bool {
        let text = name.as_str();
        if *name == COOKIE || *name == AUTHORIZATION {
            return true;
        }
        let about_a_body = text.starts_with("content-") || *name == RANGE || *name == ACCEPT_ENCODING;
        // A spelling with `_` is somebody's attempt to be read as another field.
        let never = is_guarded_field(text) || text.starts_with("if-") || text.contains('_') || about_a_body;
        !never && !self.copied.contains(name) && !headers::has_token(headers, &CONNECTION, text)
    }

    fn request(&self, flight: &Flight, headers: &HeaderMap, target: &Target) -> Request<ForwardBody> {
        let mut request = Request::new(ForwardBody::Empty);
        *request.method_mut() = Method::GET;
        *request.uri_mut() = self.uri.clone();
        let asked = request.headers_mut();
        asked.insert(HOST, self.host.clone());
        for (name, value) in headers {
            if self.is_shown(name, headers) {
                asked.append(name, value.clone());
            }
        }
        headers::join_cookies(asked);
        let text = |text: &str| HeaderValue::from_str(text).ok();
        let said = [
            (X_FORWARDED_METHOD, text(flight.method.as_str())),
            (X_FORWARDED_PROTO, Some(headers::believed_scheme(headers, &flight.conn))),
            (X_FORWARDED_HOST, host_of(target)),
            (X_FORWARDED_URI, text(target.path.as_str())),
            (X_FORWARDED_FOR, text(&flight.client.to_string())),
            (X_REQUEST_ID, Some(flight.ids.request.clone())),
        ];
        for (name, value) in said {
            if let Some(value) = value {
                asked.insert(name, value);
            }
        }
        request
    }
}

/// The host as it decided on the route, with its port.
fn host_of(target: &Target) -> Option<HeaderValue> {
    let sent = std::str::from_utf8(target.host.as_bytes()).ok()?;
    let port =
        sent.rsplit_once(':').map(|(_, port)| port).filter(|port| port.bytes().all(|b| b.is_ascii_digit()));
    let host = route::canonical(&target.host).ok()?;
    HeaderValue::try_from(port.map_or_else(|| host.to_string(), |port| format!("{host}:{port}"))).ok()
}

/// A body that is not too large; of one that is, nothing.
async fn collect(mut body: Incoming) -> Result<Option<Bytes>, Unasked> {
    let mut whole = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        if let Ok(data) = frame?.into_data() {
            if whole.len() + data.len() > MAX_BODY_BYTES {
                return Ok(None);
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok(Some(whole.freeze()))
}

/// Takes the client's own fields of these names off, and puts on what was decided.
pub(super) fn copy(names: &[HeaderName], fields: Vec<(HeaderName, HeaderValue)>, headers: &mut HeaderMap) {
    take_off(names, headers);
    for (name, value) in fields {
        headers.append(name, value);
    }
}

/// What one core has to do with servers that decide on requests.
#[derive(Default)]
pub(crate) struct Authorities {
    idle: RefCell<HashMap<Arc<str>, Vec<Idle>>>,
    asking: Cell<u32>,
}

/// A question that is under way, until it is dropped.
struct Asking<'a>(&'a Cell<u32>);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

struct Idle {
    sender: SendRequest<ForwardBody>,
    since_ms: u64,
}

impl Authorities {
    fn begin(&self) -> Option<Asking<'_>> {
        let before = self.asking.get();
        (before < MAX_ASKING).then(|| {
            self.asking.set(before + 1);
            Asking(&self.asking)
        })
    }

    fn take(&self, name: &str, now_ms: u64) -> Option<SendRequest<ForwardBody>> {
        let mut all = self.idle.borrow_mut();
        let idle = all.get_mut(name)?;
        while let Some(last) = idle.pop() {
            if last.sender.is_ready() && now_ms < last.since_ms + IDLE_TIMEOUT_MS {
                return Some(last.sender);
            }
        }
        None
    }

    fn keep(&self, name: &Arc<str>, sender: SendRequest<ForwardBody>, since_ms: u64) {
        let mut all = self.idle.borrow_mut();
        let idle = all.entry(Arc::clone(name)).or_default();
        if idle.len() < MAX_IDLE {
            idle.push(Idle { sender, since_ms });
        }
    }

    /// Closes what has been idle for long.
    pub(crate) fn sweep(&self, now_ms: u64) {
        self.idle.borrow_mut().retain(|_, idle| {
            idle.retain(|one| now_ms < one.since_ms + IDLE_TIMEOUT_MS);
            !idle.is_empty()
        });
    }
}
