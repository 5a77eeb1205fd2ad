//! A request's way through the edge: check, route, choose an upstream, send, bring the answer back.
//!
//! ```text
//!   head ► checks ► host ► table (loaded once) ► enter() a lease ► pool ► send ► answer's head ► body
//!                                     ▲                              │
//!                                     └── not sent, or refused ──────┘ retry classes A and B
//! ```
//!
//! Nothing of the table is held over an `await` except the service's own entry. The client's connection
//! is never closed because of what an upstream did before its answer's head.

use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, SET_COOKIE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, request};
use http_body::Body;
use hyper::body::Incoming;
use peregrine_routing::{
    Address, Evidence, Outcome, RetryClass, ServicePolicy, TrafficClass, Upstream, UpstreamProtocol,
};
use tokio::net::TcpStream;

use crate::body::{
    Broken, ContinueGate, ForwardBody, ReplyBody, RequestBody, RequestBodyLimits, Source, UpstreamBody,
    first_frame,
};
use crate::choose::Choice;
use crate::clock::now_us;
use crate::conn::{ConnState, Remembered};
use crate::core::{Core, ServiceEntry};
use crate::error::{Blame, ProxyError, Reason};
use crate::headers::{self, Added, Owed, Seen, Wishes};
use crate::inflight::{Flight, FlightGuard, HostText, Start, Waits};
use crate::pool::{Http1Conn, UpstreamPool};
use crate::respond::{self, Form};
use crate::route;
use crate::upgrade::Tunnel;

/// Attempts for one request, the first one included.
const MAX_ATTEMPTS: u8 = 3;
/// After this time a body is a transfer, which a drain gives more time than a request.
const TRANSFER_AFTER_MS: u64 = 10_000;
/// How long the upstream has for `100 Continue` before the body is sent anyway (RFC 9110 §10.1.1).
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// A request on its way, in the form that an attempt needs.
struct Outgoing {
    /// Gone when an attempt has sent it and could not get it back.
    parts: Option<request::Parts>,
    body: Option<Rc<RequestBody>>,
    path: PathAndQuery,
    wishes: Wishes,
    upgrade: Option<HeaderValue>,
    /// The client's host as a field; `None` in HTTP/1.0.
    host: Option<HeaderValue>,
    /// What the edge has still to add.
    owed: Owed,
    idempotent: bool,
    gate: Option<Arc<ContinueGate>>,
}

type Head = (Response<Incoming>, Source);

/// Serves one request. The only error is [`Broken`]: an answer that cannot be given at all.
pub(crate) async fn handle(
    core: Rc<Core>,
    conn: Rc<ConnState>,
    request: Request<Incoming>,
    conflict: bool,
) -> Result<Response<ReplyBody>, Broken> {
    let (parts, mut incoming) = request.into_parts();
    let seen = Seen::scan(&parts.headers);
    let has_body = !incoming.is_end_stream();
    let target = allowed(&parts.method)
        .and_then(|()| route::target(&parts.method, &parts.uri, parts.version, &parts.headers));
    let guard = begin(&core, &conn, &parts, seen, target.as_ref());
    let checked = target.and_then(|target| {
        let wishes = check(&parts, seen, has_body, conflict)?;
        Ok((service_of(&core, &conn, &target)?, target, wishes))
    });
    let (entry, target, wishes) = match checked {
        Ok(found) => found,
        Err(reason) => return Ok(refuse(reason, &parts.headers, guard)),
    };
    entry.service.retry_budget().earn();
    *guard.0.service.borrow_mut() = Some(Rc::clone(&entry));
    let too_large = entry.service.policy().max_request_body_bytes;
    if too_large > 0 && incoming.size_hint().lower() > too_large {
        return Ok(refuse(Reason::BodyTooLarge, &parts.headers, guard));
    }
    let chunked = has_body && seen.has(Seen::TRANSFER_ENCODING) && !wishes.expects_continue;
    let first = match if chunked { first_frame(&mut incoming) } else { Ok(None) } {
        Ok(first) => first,
        Err(reason) => return Ok(refuse(reason, &parts.headers, guard)),
    };
    let form = if seen.has(Seen::ACCEPT) { Form::of(&parts.headers) } else { Form::Problem };
    let choice = Choice::of(&entry.service, &parts.headers, &guard.0, wishes);
    let inbound = Inbound { parts, incoming, first, target, wishes, seen, has_body };
    let outgoing = inbound.into_outgoing(&core, &guard.0, &entry);
    Ok(send(&core, &entry, guard, outgoing, choice, form).await)
}

fn refuse(reason: Reason, headers: &HeaderMap, guard: FlightGuard) -> Response<ReplyBody> {
    guard.0.conn.linger.set(true);
    respond::answer(reason, Form::of(headers), guard)
}

fn begin(
    core: &Rc<Core>,
    conn: &Rc<ConnState>,
    parts: &request::Parts,
    seen: Seen,
    target: Result<&route::Target, &Reason>,
) -> FlightGuard {
    let field = |bit: u32, name: &http::HeaderName| {
        if seen.has(bit) { parts.headers.get(name) } else { None }
    };
    let request_id = field(Seen::REQUEST_ID, &headers::X_REQUEST_ID);
    let traceparent = field(Seen::TRACEPARENT, &headers::TRACEPARENT);
    let ids = core.ids.ids(&core.random, request_id, traceparent);
    let wants_agent = core.log.as_ref().is_some_and(|log| log.wants_agent);
    let agent = wants_agent.then(|| {
        let referer = parts.headers.get(http::header::REFERER).cloned();
        Box::new((referer, parts.headers.get(http::header::USER_AGENT).cloned()))
    });
    let (host, path) = match target {
        Ok(target) => (target.host.clone(), Some(target.path.clone())),
        Err(_) => (HostText::None, parts.uri.path_and_query().cloned()),
    };
    let client = headers::client_address(&parts.headers, seen, conn, &core.config);
    let (method, version) = (parts.method.clone(), parts.version);
    Flight::begin(core, conn, Start { ids, method, version, client, host, path, agent })
}

fn allowed(method: &Method) -> Result<(), Reason> {
    match *method {
        Method::CONNECT => Err(Reason::ConnectNotSupported),
        Method::TRACE => Err(Reason::MethodNotAllowed),
        _ => Ok(()),
    }
}

fn check(parts: &request::Parts, seen: Seen, has_body: bool, conflict: bool) -> Result<Wishes, Reason> {
    if conflict {
        return Err(Reason::ConflictingLength);
    }
    headers::check(&parts.headers, seen, parts.version == Version::HTTP_11, has_body)
}

/// The service of a request. What a connection's last request found is found again without a look-up.
fn service_of(core: &Core, conn: &ConnState, target: &route::Target) -> Result<Rc<ServiceEntry>, Reason> {
    let table = core.reader.borrow_mut().load().version();
    let host = target.host.as_bytes();
    if let Some(last) = &*conn.route.borrow()
        && last.table == table
        && *last.host == *host
        && let Some(entry) = last.entry.upgrade()
    {
        return Ok(entry);
    }
    let (entry, any_path) = look_up(core, target)?;
    let remembered = any_path.then(|| Remembered { table, host: host.into(), entry: Rc::downgrade(&entry) });
    *conn.route.borrow_mut() = remembered;
    Ok(entry)
}

pub(crate) fn find_service(core: &Core, target: &route::Target) -> Result<Rc<ServiceEntry>, Reason> {
    look_up(core, target).map(|(entry, _)| entry)
}

fn look_up(core: &Core, target: &route::Target) -> Result<(Rc<ServiceEntry>, bool), Reason> {
    let host = route::canonical(&target.host)?;
    // "OPTIONS *" is about the server as a whole: it goes where "/" goes.
    let path = target.path.path();
    let path = if path == "*" { "/" } else { path };
    let mut reader = core.reader.borrow_mut();
    let found = reader.load().lookup(&host, path).ok_or(Reason::NoRoute)?;
    Ok((core.entry(found.service), found.any_path))
}

// --- the request as it goes on -----------------------------------------------------------------------

/// A request that was received and may go on.
struct Inbound {
    parts: request::Parts,
    incoming: Incoming,
    first: Option<http_body::Frame<bytes::Bytes>>,
    target: route::Target,
    wishes: Wishes,
    seen: Seen,
    has_body: bool,
}

impl Inbound {
    fn into_outgoing(mut self, core: &Core, flight: &Rc<Flight>, entry: &ServiceEntry) -> Outgoing {
        let upgrade = if self.wishes.upgrade { self.parts.headers.get(UPGRADE).cloned() } else { None };
        let host = self.target.host.value();
        let owed = self.rewrite_headers(core, flight, host.as_ref());
        let Self { mut parts, incoming, first, target, wishes, has_body, .. } = self;
        if !parts.extensions.is_empty() {
            parts.extensions = http::Extensions::new();
        }
        parts.version = Version::HTTP_11;
        if parts.uri.scheme().is_some() || parts.uri.authority().is_some() {
            parts.uri = Uri::from(target.path.clone());
        }
        let policy = entry.service.policy();
        let gate = wishes.expects_continue.then(Arc::<ContinueGate>::default);
        let body = has_body.then(|| {
            let limits = RequestBodyLimits {
                first,
                max_bytes: policy.max_request_body_bytes,
                body_idle_ms: policy.body_idle_timeout_ms,
                head_timeout_ms: policy.response_head_timeout_ms,
                // Only HTTP/2 upstreams can refuse a request after some of it was sent.
                keep: entry.service.upstreams().any(|(_, u)| u.protocol() == UpstreamProtocol::H2c),
                gate: gate.clone(),
                late_from_ms: flight.started_us / 1_000 + TRANSFER_AFTER_MS,
            };
            RequestBody::new(incoming, Rc::clone(flight), limits)
        });
        let idempotent = is_idempotent(&parts.method);
        Outgoing { parts: Some(parts), body, path: target.path, wishes, upgrade, host, owed, idempotent, gate }
    }

    fn rewrite_headers(&mut self, core: &Core, flight: &Flight, host: Option<&HeaderValue>) -> Owed {
        let Self { parts, seen, .. } = self;
        let (headers, seen) = (&mut parts.headers, *seen);
        if seen.has(Seen::COOKIE) && parts.version == Version::HTTP_2 {
            headers::join_cookies(headers);
        }
        // First off, then on: a field that the client nominates must not be one that the edge adds.
        headers::strip_hop_by_hop(headers, seen);
        if let Some(host) = host
            && (matches!(self.target.host, HostText::Authority(_)) || seen.has(Seen::CONNECTION))
        {
            headers.insert(HOST, host.clone());
        }
        let added = Added { ids: &flight.ids, via: core.via.of(parts.version), host };
        let owed = headers::settle(headers, seen, &flight.conn, &added);
        let sends = matches!(parts.method, Method::POST | Method::PUT | Method::PATCH);
        if self.has_body && self.incoming.size_hint().exact().is_none() {
            // Said aloud, because hyper takes a GET without a length for one without a body.
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        } else if !self.has_body && sends && !seen.has(Seen::CONTENT_LENGTH) {
            headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        owed
    }
}

/// RFC 9110 §9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS | Method::TRACE
    )
}

impl Outgoing {
    fn body(&self) -> Option<ForwardBody> {
        self.body.as_ref().map_or(Some(ForwardBody::Empty), RequestBody::attempt)
    }

    fn added<'a>(&'a self, core: &'a Core, flight: &'a Flight) -> Added<'a> {
        Added { ids: &flight.ids, via: core.via.of(flight.version), host: self.host.as_ref() }
    }

    /// Whether it can be sent (again).
    fn is_whole(&self) -> bool {
        self.parts.is_some() && self.body().is_some()
    }

    fn for_http1(&mut self, upstream: &Upstream, policy: &ServicePolicy) -> Option<Request<ForwardBody>> {
        let body = self.body()?;
        let mut parts = self.parts.take()?;
        if !(policy.preserve_host && self.host.is_some())
            && let Ok(host) = HeaderValue::from_str(&upstream.address().to_string())
        {
            parts.headers.insert(HOST, host);
        }
        if self.wishes.trailers {
            headers::ask_for_trailers(&mut parts.headers, true);
        }
        if let Some(protocol) = &self.upgrade {
            parts.headers.insert(UPGRADE, protocol.clone());
            parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
        Some(Request::from_parts(parts, body))
    }

    /// A copy, because a stream that is refused does not give the request back.
    fn for_http2(
        &self,
        core: &Core,
        flight: &Flight,
        upstream: &Upstream,
        policy: &ServicePolicy,
    ) -> Option<Request<ForwardBody>> {
        let body = self.body()?;
        let sent = self.parts.as_ref()?;
        let authority = sent
            .headers
            .get(HOST)
            .filter(|_| policy.preserve_host)
            .and_then(|host| Authority::try_from(host.as_bytes()).ok())
            .or_else(|| Authority::try_from(upstream.address().to_string()).ok())?;
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(authority);
        uri.path_and_query = Some(self.path.clone());
        let mut request = Request::new(body);
        *request.method_mut() = sent.method.clone();
        *request.uri_mut() = Uri::from_parts(uri).ok()?;
        *request.version_mut() = Version::HTTP_2;
        let mut headers = sent.headers.clone();
        for name in [HOST, TRANSFER_ENCODING, EXPECT] {
            headers.remove(name);
        }
        headers::insert_owed(&mut headers, self.owed, &flight.conn, &self.added(core, flight));
        if self.wishes.trailers {
            headers::ask_for_trailers(&mut headers, false);
        }
        *request.headers_mut() = headers;
        if let Some(gate) = &self.gate {
            // hyper's HTTP/2 client has no interim responses: the edge answers for the upstream.
            gate.open();
        }
        Some(request)
    }
}

// --- sending -------------------------------------------------------------------------------------------

async fn send(
    core: &Rc<Core>,
    entry: &Rc<ServiceEntry>,
    guard: FlightGuard,
    mut out: Outgoing,
    mut choice: Choice,
    form: Form,
) -> Response<ReplyBody> {
    let mut entry = Rc::clone(entry);
    let flight = Rc::clone(&guard.0);
    loop {
        match choice.enter(core, &mut entry, &flight) {
            Ok(lease) => flight.take_lease(lease),
            Err(reason) => return respond::answer(reason, form, guard),
        }
        flight.attempts.set(flight.attempts.get() + 1);
        let error = match attempt(core, &entry, &flight, &mut out).await {
            Ok(head) => match answer(&entry, guard, &out, choice.prefer, head) {
                Ok(response) => return response,
                Err((error, guard)) => return give_up(&error, form, guard),
            },
            Err(error) => error,
        };
        if !may_retry(core, &entry, &flight, &out, &error) {
            return give_up(&error, form, guard);
        }
        if error.reason != Reason::UpstreamRefused {
            flight.strike();
        }
        choice.tried.extend(flight.generation());
        flight.release_lease();
    }
}

fn may_retry(core: &Core, entry: &ServiceEntry, flight: &Flight, out: &Outgoing, error: &ProxyError) -> bool {
    let class = error.evidence.map(Evidence::class);
    let safe = matches!(class, Some(RetryClass::A | RetryClass::B));
    if !safe || !out.is_whole() || flight.attempts.get() >= MAX_ATTEMPTS || flight.is_cut() {
        return false;
    }
    let paid = entry.service.retry_budget().spend(core.coarse_now_ms());
    if let (true, Some(class)) = (paid, class) {
        core.metrics.retry(class);
    }
    paid
}

fn give_up(error: &ProxyError, form: Form, guard: FlightGuard) -> Response<ReplyBody> {
    let flight = &guard.0;
    if let Some(failure) = error.reason.failure() {
        flight.record(Outcome::Failed(failure));
    } else if error.reason.blame() == Blame::Client {
        flight.record(Outcome::ClientGone);
        flight.conn.linger.set(true);
    }
    if error.reason == Reason::UpstreamCut {
        flight.cut_lease();
    }
    if error.reason.blame() == Blame::Upstream {
        let upstream = flight.upstream.borrow().as_ref().map(|upstream| upstream.generation().0);
        tracing::debug!(reason = error.reason.as_str(), upstream, source = ?error.source, "request failed");
    }
    flight.release_lease();
    respond::answer(error.reason, form, guard)
}

async fn attempt(
    core: &Rc<Core>,
    entry: &ServiceEntry,
    flight: &Rc<Flight>,
    out: &mut Outgoing,
) -> Result<Head, ProxyError> {
    let upstream = flight.upstream.borrow().clone().ok_or(Reason::NoUpstream)?;
    let policy = entry.service.policy();
    let pool = core.pools.of(&upstream, policy);
    let sent_us = now_us();
    let head = match upstream.protocol() {
        UpstreamProtocol::Http1 => attempt_http1(core, &upstream, policy, flight, out, pool).await?,
        UpstreamProtocol::H2c => Box::pin(attempt_http2(core, &upstream, policy, flight, out, pool)).await?,
    };
    let latency_us = now_us() - sent_us;
    flight.head_us.set(latency_us);
    flight.record(Outcome::Response { status: head.0.status().as_u16(), latency_us });
    Ok(head)
}

async fn attempt_http1(
    core: &Rc<Core>,
    upstream: &Arc<Upstream>,
    policy: &ServicePolicy,
    flight: &Rc<Flight>,
    out: &mut Outgoing,
    pool: Rc<UpstreamPool>,
) -> Result<Head, ProxyError> {
    loop {
        let mut conn = match pool.checkout(out.idempotent) {
            Some(conn) => conn,
            None => Box::pin(open_http1(core, upstream, policy, flight)).await?,
        };
        let request = out.for_http1(upstream, policy).ok_or(Reason::Internal)?;
        if out.body.is_some() {
            flight.wait(Waits::UpstreamReads, policy.body_idle_timeout_ms);
            open_gate_in_time(out);
        } else {
            flight.wait(Waits::Head, policy.response_head_timeout_ms);
        }
        core.metrics.upstream_connection(conn.reused);
        let client = (flight.version == Version::HTTP_11).then(|| Rc::clone(&flight.conn));
        conn.link.expect(client, out.gate.clone());
        let mut lines = conn.link.lines.borrow_mut();
        // A request that was given back unsent has left its own here.
        lines.clear();
        headers::write_owed(&mut lines, out.owed, &flight.conn, &out.added(core, flight));
        drop(lines);
        match exchange(flight, &mut conn, request).await {
            Exchanged::Head(response) => return Ok((response, source(out, conn, pool))),
            // The pool's connection had been closed by the upstream: no fault of anybody, take the next.
            Exchanged::Returned(request, _) if conn.reused => out.take_back(request),
            Exchanged::Returned(request, error) => {
                out.take_back(request);
                return Err(ProxyError::with(Reason::ConnectFailed, Evidence::NotSent).because(error));
            }
            Exchanged::Failed(error) => return Err(classify(out, error)),
            Exchanged::Stopped(reason) => return Err(ProxyError::with(reason, Evidence::Ambiguous)),
        }
    }
}

impl Outgoing {
    fn take_back(&mut self, request: Request<ForwardBody>) {
        self.parts = Some(request.into_parts().0);
    }
}

fn source(out: &Outgoing, conn: Box<Http1Conn>, pool: Rc<UpstreamPool>) -> Source {
    match &out.body {
        Some(body) if !body.is_over() => {
            if body.abandon_if_untouched() {
                return Source::Http1(Some(conn), pool);
            }
            pool.detach(conn);
            Source::Detached
        }
        _ => Source::Http1(Some(conn), pool),
    }
}

fn open_gate_in_time(out: &Outgoing) {
    if let Some(gate) = out.gate.clone() {
        tokio::task::spawn_local(async move {
            tokio::time::sleep(CONTINUE_WAIT).await;
            gate.open();
        });
    }
}

enum Exchanged {
    Head(Response<Incoming>),
    /// Not a byte was written; here it is again.
    Returned(Request<ForwardBody>, hyper::Error),
    Failed(hyper::Error),
    Stopped(Reason),
}

/// Sends a request and waits for the head of its answer, driving the connection meanwhile.
async fn exchange(flight: &Flight, conn: &mut Http1Conn, request: Request<ForwardBody>) -> Exchanged {
    let mut answer = pin!(conn.sender.try_send_request(request));
    std::future::poll_fn(move |cx| {
        // What the connection finds comes out of `answer`, inside this call: nobody needs to be woken.
        let mut quiet = Context::from_waker(Waker::noop());
        let ended = conn.poll(cx).is_ready();
        let mut polled = answer.as_mut().poll(&mut quiet);
        if ended && polled.is_pending() {
            // The upstream closed before it was asked: the request lies unsent in the connection's queue.
            conn.discard();
            polled = answer.as_mut().poll(&mut quiet);
        }
        match polled {
            Poll::Ready(Ok(response)) => {
                flight.mark_sent();
                Poll::Ready(Exchanged::Head(response))
            }
            Poll::Ready(Err(mut error)) => match error.take_message() {
                Some(request) => Poll::Ready(Exchanged::Returned(request, error.into_error())),
                None => {
                    flight.mark_sent();
                    Poll::Ready(Exchanged::Failed(error.into_error()))
                }
            },
            Poll::Pending => {
                flight.mark_sent();
                stopped(flight, cx).map(Exchanged::Stopped)
            }
        }
    })
    .await
}

/// Ready when the request has to stop waiting for a reason other than bytes.
fn stopped(flight: &Flight, cx: &Context<'_>) -> Poll<Reason> {
    if flight.is_cut() {
        return Poll::Ready(Reason::UpstreamCut);
    }
    if flight.is_expired() {
        return Poll::Ready(flight.timeout_reason());
    }
    flight.note_waker(cx);
    Poll::Pending
}

/// Runs a future until it is ready or the request has to stop.
async fn unless_stopped<T>(flight: &Flight, future: impl Future<Output = T>) -> Result<T, Reason> {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Ok(value)),
        Poll::Pending => stopped(flight, cx).map(Err),
    })
    .await
}

fn classify(out: &Outgoing, error: hyper::Error) -> ProxyError {
    if let Some(fault) = out.body.as_ref().and_then(|body| body.fault()) {
        return ProxyError::new(fault).because(error);
    }
    if let Some(h2) = h2_cause(&error)
        && h2.is_remote()
    {
        let refused = h2.is_reset() && h2.reason() == Some(h2::Reason::REFUSED_STREAM);
        // With NO_ERROR, h2 gives this error to exactly the streams above the last one that was named.
        let above_last = h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR);
        if refused || above_last {
            return ProxyError::with(Reason::UpstreamRefused, Evidence::NotProcessed).because(error);
        }
    }
    let reason = if error.is_parse() { Reason::UpstreamProtocol } else { Reason::UpstreamReset };
    ProxyError::with(reason, Evidence::Ambiguous).because(error)
}

fn h2_cause(error: &hyper::Error) -> Option<&h2::Error> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            return Some(h2);
        }
        source = cause.source();
    }
    None
}

async fn open_http1(
    core: &Rc<Core>,
    upstream: &Upstream,
    policy: &ServicePolicy,
    flight: &Flight,
) -> Result<Box<Http1Conn>, ProxyError> {
    let socket = connect(core, upstream, policy, flight).await?;
    let opened = UpstreamPool::open_http1(&core.http1, socket).await;
    opened.map_err(|error| ProxyError::with(Reason::ConnectFailed, Evidence::NotSent).because(error))
}

async fn connect(
    core: &Rc<Core>,
    upstream: &Upstream,
    policy: &ServicePolicy,
    flight: &Flight,
) -> Result<TcpStream, ProxyError> {
    flight.wait(Waits::Connect, policy.connect_timeout_ms);
    let not_sent = |reason| ProxyError::with(reason, Evidence::NotSent);
    let address = match upstream.address() {
        Address::Socket(address) => *address,
        Address::Name { host, port } => {
            let resolved = unless_stopped(flight, core.resolver.resolve(host, core.random.next())).await;
            let ip = resolved.map_err(not_sent)?;
            (ip.map_err(|error| not_sent(Reason::DnsFailed).because(error))?, *port).into()
        }
    };
    let socket = unless_stopped(flight, TcpStream::connect(address)).await.map_err(not_sent)?;
    let socket = socket.map_err(|error| not_sent(Reason::ConnectFailed).because(error))?;
    socket.set_nodelay(true).map_err(|error| not_sent(Reason::ConnectFailed).because(error))?;
    Ok(socket)
}

async fn attempt_http2(
    core: &Rc<Core>,
    upstream: &Arc<Upstream>,
    policy: &ServicePolicy,
    flight: &Rc<Flight>,
    out: &Outgoing,
    pool: Rc<UpstreamPool>,
) -> Result<Head, ProxyError> {
    let not_sent =
        |error: hyper::Error| ProxyError::with(Reason::ConnectFailed, Evidence::NotSent).because(error);
    let (mut ticket, reused) = match pool.join_http2() {
        Some(ticket) => (ticket, true),
        None => {
            let socket = connect(core, upstream, policy, flight).await?;
            (pool.open_http2(&core.http2, socket).await.map_err(not_sent)?, false)
        }
    };
    let request = out.for_http2(core, flight, upstream, policy).ok_or(Reason::Internal)?;
    let (waits, timeout_ms) = if out.body.is_some() {
        (Waits::UpstreamReads, policy.body_idle_timeout_ms)
    } else {
        (Waits::Head, policy.response_head_timeout_ms)
    };
    flight.wait(waits, timeout_ms);
    core.metrics.upstream_connection(reused);
    flight.mark_sent();
    match unless_stopped(flight, ticket.sender.try_send_request(request)).await {
        Ok(Ok(response)) => Ok((response, Source::Http2(ticket))),
        Ok(Err(mut error)) => {
            let returned = error.take_message().is_some();
            let error = error.into_error();
            let only_stream = h2_cause(&error).is_some_and(h2::Error::is_reset);
            pool.leave_http2(&ticket, only_stream);
            Err(if returned { not_sent(error) } else { classify(out, error) })
        }
        Err(reason) => Err(ProxyError::with(reason, Evidence::Ambiguous)),
    }
}

// --- the answer ----------------------------------------------------------------------------------------

/// Makes the client's answer of the upstream's head.
fn answer(
    entry: &ServiceEntry,
    guard: FlightGuard,
    out: &Outgoing,
    preferred: Option<u64>,
    (response, source): Head,
) -> Result<Response<ReplyBody>, (ProxyError, FlightGuard)> {
    let (mut parts, incoming) = response.into_parts();
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        return switch(entry, guard, out, parts, source);
    }
    let flight = &guard.0;
    flight.conn.before_head.set(false);
    headers::clean_response(&mut parts.headers);
    set_sticky_cookie(entry, flight, preferred, &mut parts.headers);
    parts.version = Version::HTTP_11;
    let unread = out.body.as_ref().is_some_and(|body| body.is_abandoned());
    if !flight.conn.http2.get() && (unread || flight.core.draining.get()) {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        flight.conn.linger.set(unread);
    }
    flight.status.set(parts.status.as_u16());
    let policy = entry.service.policy();
    let (class, late_class) = class_of(&parts.headers);
    if let Some(class) = class {
        flight.reclassify(class);
    }
    let long = class.is_some() || late_class == TrafficClass::GrpcStream;
    let body = UpstreamBody {
        incoming,
        source,
        // A stream of events may be silent for as long as a tunnel.
        body_idle_ms: if long { policy.tunnel_idle_timeout_ms } else { policy.body_idle_timeout_ms },
        late_class,
        late_from_ms: if class.is_some() { 0 } else { flight.started_us / 1_000 + TRANSFER_AFTER_MS },
    };
    let body = if body.incoming.is_end_stream() {
        flight.complete.set(true);
        body.done();
        ReplyBody::Empty(guard)
    } else {
        flight.wait(Waits::Client, body.body_idle_ms);
        *flight.body.borrow_mut() = Some(body);
        ReplyBody::Stream(guard)
    };
    Ok(Response::from_parts(parts, body))
}

/// The class of an answer at once, and the class that it gets if it goes on for long.
fn class_of(headers: &HeaderMap) -> (Option<TrafficClass>, TrafficClass) {
    let content_type = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let is =
        |kind: &[u8]| content_type.get(..kind.len()).is_some_and(|start| start.eq_ignore_ascii_case(kind));
    if is(b"text/event-stream") {
        (Some(TrafficClass::Sse), TrafficClass::Sse)
    } else if is(b"application/grpc") {
        (None, TrafficClass::GrpcStream)
    } else {
        (None, TrafficClass::Transfer)
    }
}

fn set_sticky_cookie(entry: &ServiceEntry, flight: &Flight, preferred: Option<u64>, headers: &mut HeaderMap) {
    let Some(sticky) = &entry.service.policy().sticky else { return };
    let key = flight.upstream.borrow().as_ref().map(|upstream| upstream.sticky_key());
    if let Some(key) = key.filter(|key| preferred != Some(*key)) {
        let cookie = format!("{}={key:016x}; Path=/; HttpOnly; SameSite=Lax", sticky.cookie);
        if let Ok(cookie) = HeaderValue::from_str(&cookie) {
            headers.append(SET_COOKIE, cookie);
        }
    }
}

/// The upstream has agreed to another protocol: both sockets become a tunnel.
fn switch(
    entry: &ServiceEntry,
    guard: FlightGuard,
    out: &Outgoing,
    mut parts: http::response::Parts,
    source: Source,
) -> Result<Response<ReplyBody>, (ProxyError, FlightGuard)> {
    let unasked = |guard| Err((ProxyError::with(Reason::UpstreamProtocol, Evidence::Ambiguous), guard));
    let (Some(asked), Source::Http1(Some(mut upstream), _)) = (&out.upgrade, source) else {
        return unasked(guard);
    };
    // The connection has said all that it had to say as HTTP; a last look lets it see that.
    if upstream.poll(&mut Context::from_waker(Waker::noop())).is_pending() {
        return unasked(guard);
    }
    let Some((socket, early)) = upstream.into_socket() else { return unasked(guard) };
    let protocol = parts.headers.get(UPGRADE).unwrap_or(asked).clone();
    headers::clean_response(&mut parts.headers);
    parts.headers.insert(UPGRADE, protocol);
    parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    let flight = &guard.0;
    flight.status.set(101);
    let conn = Rc::clone(&flight.conn);
    let idle_ms = entry.service.policy().tunnel_idle_timeout_ms;
    flight.wait(Waits::Tunnel, idle_ms);
    *conn.tunnel.borrow_mut() = Some(Tunnel { socket, early, guard, idle_ms });
    parts.version = Version::HTTP_11;
    Ok(Response::from_parts(parts, ReplyBody::Page(None, None)))
}
