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
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, SET_COOKIE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, request,
};
use http_body::Body;
use hyper::body::Incoming;
use peregrine_routing::{
    Evidence, Outcome, RetryClass, ServicePolicy, TrafficClass, Upstream, UpstreamProtocol,
};
use tokio::net::TcpStream;

use crate::body::{
    Broken, ContinueGate, Events, ForwardBody, ReplyBody, RequestBody, RequestBodyLimits, Source,
    UpstreamBody, first_frame,
};
use crate::choose::Choice;
use crate::clock::now_us;
use crate::conn::ConnState;
use crate::core::{Core, ServiceEntry};
use crate::error::{Blame, ProxyError, Reason};
use crate::framing::Framing;
use crate::grpc::{self, Messages};
use crate::headers::{self, Added, Asked, Owed, Seen, Wishes};
use crate::http1::{self, Head, Http1Conn, Http1Error};
use crate::inflight::{Flight, FlightGuard, HostText, LONG_AFTER_MS, Start, Waits};
use crate::mirror;
use crate::pool::UpstreamPool;
use crate::resolve::DialError;
use crate::respond::{self, Form};
use crate::route;
use crate::upgrade::Tunnel;

/// Attempts for one request, the first one included.
const MAX_ATTEMPTS: u8 = 3;
/// Says that a request of any method may be executed twice without harm: the origin sees to it.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Largest interim response that is passed on; a longer one is only read over.
const MAX_INTERIM_BYTES: usize = 8 * 1024;
/// How long the upstream has for `100 Continue` before the body is sent anyway (RFC 9110 §10.1.1).
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// A request on its way, in the form that an attempt needs.
pub(crate) struct Outgoing {
    parts: request::Parts,
    body: Option<Rc<RequestBody>>,
    /// How the body is delimited on HTTP/1.1; `None` is no body.
    framing: Option<Framing>,
    path: PathAndQuery,
    wishes: Wishes,
    upgrade: Option<HeaderValue>,
    /// The client's host as a field; `None` in HTTP/1.0.
    host: Option<HeaderValue>,
    /// What the edge has still to add.
    owed: Owed,
    /// It may be executed twice without harm (retry class C).
    replayable: bool,
    /// A connection that was idle has failed it: it gets a new one.
    fresh: bool,
    gate: Option<Arc<ContinueGate>>,
}

/// The head of an answer, without what is meant for the upstream's connection only.
struct Answer {
    head: Head,
    source: Source,
}

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
        Ok((service_of(&core, &target)?, target, wishes))
    });
    let (entry, target, wishes) = match checked {
        Ok(found) => found,
        Err(reason) => return Ok(refuse(reason, &parts.headers, guard)),
    };
    if wishes.trailers && parts.version == Version::HTTP_2 {
        guard.0.grpc.set(grpc::is_grpc(parts.headers.get(CONTENT_TYPE)));
    }
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
    let choice = Choice::of(&entry.service, &parts.headers, &guard.0, wishes);
    let inbound = Inbound { parts, incoming, first, target, wishes, seen, has_body };
    let outgoing = inbound.into_outgoing(&core, &guard.0, &entry);
    Ok(send(&core, &entry, guard, outgoing, choice).await)
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
    let field = |bit: u32, name: &HeaderName| {
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

/// The service of a request. What one of the last requests found is found again without a look-up.
fn service_of(core: &Core, target: &route::Target) -> Result<Rc<ServiceEntry>, Reason> {
    let table = core.reader.borrow_mut().load().version();
    let host = target.host.as_bytes();
    if let Some(entry) = core.recent.get(table, host) {
        return Ok(entry);
    }
    let (entry, any_path) = look_up(core, target)?;
    if any_path {
        core.recent.put(table, host, &entry);
    }
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
        let replayable = is_idempotent(&parts.method) || parts.headers.contains_key(IDEMPOTENCY_KEY);
        let framing =
            has_body.then(|| incoming.size_hint().exact().map_or(Framing::Chunked, Framing::Length));
        let gate = wishes.expects_continue.then(Arc::<ContinueGate>::default);
        let body = has_body.then(|| {
            let limits = RequestBodyLimits {
                first,
                max_bytes: policy.max_request_body_bytes,
                body_idle_ms: policy.body_idle_timeout_ms,
                head_timeout_ms: policy.response_head_timeout_ms,
                // For retry class C, and for HTTP/2 upstreams, which can refuse what was sent in part.
                keep: replayable
                    || entry.service.upstreams().any(|(_, u)| u.protocol() == UpstreamProtocol::H2c),
                gate: gate.clone(),
                late_from_ms: flight.started_us / 1_000 + LONG_AFTER_MS,
            };
            RequestBody::new(incoming, Rc::clone(flight), limits)
        });
        Outgoing {
            parts,
            body,
            framing,
            path: target.path,
            wishes,
            upgrade,
            host,
            owed,
            replayable,
            fresh: false,
            gate,
        }
    }

    fn rewrite_headers(&mut self, core: &Core, flight: &Flight, host: Option<&HeaderValue>) -> Owed {
        let Self { parts, seen, .. } = self;
        let (headers, seen) = (&mut parts.headers, *seen);
        if seen.has(Seen::COOKIE) && parts.version == Version::HTTP_2 {
            headers::join_cookies(headers);
        }
        // First off, then on: a field that the client nominates must not be one that the edge adds.
        let asked = headers::strip_hop_by_hop(headers, seen);
        flight.conn.is_last.set(asked == Asked::Close && parts.version == Version::HTTP_11);
        if let Some(host) = host
            && (matches!(self.target.host, HostText::Authority(_)) || asked == Asked::Other)
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

    /// The form that the client wants an error in.
    fn form(&self) -> Form {
        Form::of(&self.parts.headers)
    }

    /// Whether it can be sent (again).
    fn is_whole(&self) -> bool {
        self.body().is_some()
    }

    /// Without a body, and no upgrade.
    pub(crate) const fn is_plain(&self) -> bool {
        self.body.is_none() && self.upgrade.is_none()
    }

    pub(crate) const fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// Writes the head for an HTTP/1.1 upstream.
    pub(crate) fn write_head(
        &self,
        out: &mut Vec<u8>,
        core: &Core,
        flight: &Flight,
        upstream: &Upstream,
        policy: &ServicePolicy,
    ) {
        http1::write_request_line(out, &self.parts.method, &self.path);
        let own_host = !(policy.preserve_host && self.host.is_some());
        if own_host {
            out.extend_from_slice(format!("host: {}\r\n", upstream.address()).as_bytes());
        }
        for (name, value) in &self.parts.headers {
            if !(own_host && *name == HOST) {
                http1::write_field(out, name, value);
            }
        }
        headers::write_owed(out, self.owed, &flight.conn, &self.added(core, flight));
        if self.wishes.trailers {
            // In the form that RFC 9110 §10.1.4 wants.
            out.extend_from_slice(b"te: trailers\r\nconnection: te\r\n");
        }
        if let Some(protocol) = &self.upgrade {
            out.extend_from_slice(b"connection: upgrade\r\n");
            http1::write_field(out, &UPGRADE, protocol);
        }
        out.extend_from_slice(b"\r\n");
    }

    /// A copy, because a stream that is refused does not give the request back.
    pub(crate) fn for_http2(
        &self,
        core: &Core,
        flight: &Flight,
        upstream: &Upstream,
        policy: &ServicePolicy,
    ) -> Option<Request<ForwardBody>> {
        let body = self.body()?;
        let sent = &self.parts;
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
            headers::ask_for_trailers(&mut headers);
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
) -> Response<ReplyBody> {
    let mut entry = Rc::clone(entry);
    let flight = Rc::clone(&guard.0);
    let sampled = mirror::sample(core, &entry, &flight, &out);
    loop {
        match choice.enter(core, &mut entry, &flight) {
            Ok(lease) => flight.take_lease(lease),
            Err(reason) => return respond::answer(reason, out.form(), guard),
        }
        flight.attempts.set(flight.attempts.get() + 1);
        let error = match attempt(core, &entry, &flight, &mut out).await {
            Ok(found) => {
                if let Some(sampled) = sampled {
                    sampled.launch(core, &entry, &found.head, flight.head_us.get());
                }
                return match answer(&entry, guard, &out, choice.prefer, found) {
                    Ok(response) => response,
                    Err((error, guard)) => give_up(&error, &out, guard),
                };
            }
            Err(error) => error,
        };
        if !may_retry(core, &entry, &flight, &out, &error) {
            return give_up(&error, &out, guard);
        }
        if error.reason != Reason::UpstreamRefused {
            flight.strike();
        }
        // An upstream that leaves all of its connections at once is not met on one after the other.
        let left_twice = error.evidence == Some(Evidence::LeftBehind) && flight.attempts.get() > 1;
        out.fresh |= left_twice || error.evidence == Some(Evidence::Ambiguous);
        choice.tried.extend(flight.generation());
        flight.release_lease();
    }
}

fn may_retry(core: &Core, entry: &ServiceEntry, flight: &Flight, out: &Outgoing, error: &ProxyError) -> bool {
    let class = error.evidence.map(Evidence::class);
    let safe = match class {
        Some(RetryClass::A | RetryClass::B) => true,
        Some(RetryClass::C) => out.replayable,
        Some(RetryClass::D) | None => false,
    };
    if !safe || !out.is_whole() || flight.attempts.get() >= MAX_ATTEMPTS || flight.is_cut() {
        return false;
    }
    let free = error.evidence == Some(Evidence::LeftBehind);
    let paid = free || entry.service.retry_budget().spend(core.coarse_now_ms());
    if let (true, Some(class)) = (paid, class) {
        core.metrics.retry(class);
        flight.upstream.borrow().iter().for_each(|upstream| upstream.note_retried());
    }
    paid
}

fn give_up(error: &ProxyError, out: &Outgoing, guard: FlightGuard) -> Response<ReplyBody> {
    let flight = Rc::clone(&guard.0);
    if let Some(failure) = error.reason.failure() {
        flight.record(Outcome::Failed(failure));
    } else if error.reason.blame() == Blame::Client {
        flight.record(Outcome::ClientGone);
        flight.conn.linger.set(true);
    }
    if error.reason == Reason::UpstreamCut && !flight.is_grpc_stream() {
        flight.cut_lease();
    } else if error.reason == Reason::UpstreamCut {
        flight.soft_close_lease();
    }
    if error.reason.blame() == Blame::Upstream {
        let upstream = flight.upstream.borrow().as_ref().map(|upstream| upstream.generation().0);
        tracing::debug!(reason = error.reason.as_str(), upstream, source = ?error.source, "request failed");
    }
    flight.release_lease();
    let mut response = respond::answer(error.reason, out.form(), guard);
    if !flight.conn.http2.get() && out.body.as_ref().is_some_and(|body| body.is_far_from_its_end()) {
        // Nobody wants the rest: the client is told, and has its answer before the connection goes.
        flight.conn.linger.set(true);
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn attempt(
    core: &Rc<Core>,
    entry: &ServiceEntry,
    flight: &Rc<Flight>,
    out: &mut Outgoing,
) -> Result<Answer, ProxyError> {
    let upstream = flight.upstream.borrow().clone().ok_or(Reason::NoUpstream)?;
    let policy = entry.service.policy();
    let pool = core.pools.of(&upstream, policy);
    // A look at the clock costs something; between the head and the first attempt there are microseconds.
    let sent_us = if flight.attempts.get() == 1 { flight.started_us } else { now_us() };
    let answer = match upstream.protocol() {
        UpstreamProtocol::Http1 => attempt_http1(core, &upstream, policy, flight, out, pool).await?,
        UpstreamProtocol::H2c => Box::pin(attempt_http2(core, &upstream, policy, flight, out, pool)).await?,
    };
    let latency_us = now_us() - sent_us;
    flight.head_us.set(latency_us);
    flight.record(Outcome::Response { status: answer.head.status.as_u16(), latency_us });
    Ok(answer)
}

async fn attempt_http1(
    core: &Rc<Core>,
    upstream: &Arc<Upstream>,
    policy: &ServicePolicy,
    flight: &Rc<Flight>,
    out: &mut Outgoing,
    pool: Rc<UpstreamPool>,
) -> Result<Answer, ProxyError> {
    loop {
        let mut conn = match pool.checkout(out.replayable).filter(|_| !out.fresh) {
            Some(conn) => conn,
            None => {
                let socket = Box::pin(connect(core, upstream, policy, flight)).await?;
                Http1Conn::new(socket, core.spares.clone())
            }
        };
        if conn.reused
            && let Some(body) = &out.body
        {
            // The upstream may have closed the connection a moment ago.
            body.keep();
        }
        let body = out.body().ok_or(Reason::Internal)?;
        if out.body.is_some() {
            flight.wait(Waits::UpstreamReads, policy.body_idle_timeout_ms);
            open_gate_in_time(out);
        } else {
            flight.wait(Waits::Head, policy.response_head_timeout_ms);
        }
        core.metrics.upstream_connection(conn.reused);
        conn.begin(body, out.framing, |head| out.write_head(head, core, flight, upstream, policy));
        match exchange(core, flight, &mut conn, out).await {
            Ok(Ok(head)) => return Ok(Answer { head, source: source(out, conn, pool) }),
            Ok(Err(Http1Error::Body(reason))) => return Err(reason.into()),
            // The pool's connection had been closed by the upstream: no fault of anybody, take the next.
            Ok(Err(_)) if conn.reused && !conn.wrote() && out.is_whole() => {}
            Ok(Err(_)) if conn.reused && conn.has_missed() && out.is_whole() => {
                pool.note_missed(&conn);
                upstream.note_retried();
                out.fresh = true;
            }
            Ok(Err(error)) => return Err(classify(&conn, error)),
            // Time or a cut has ended it: asking again would only take more of what is scarce.
            Err(reason) => return Err(reason.into()),
        }
    }
}

/// Sends a request and waits for the head of its answer.
async fn exchange(
    core: &Core,
    flight: &Flight,
    conn: &mut Http1Conn,
    out: &mut Outgoing,
) -> Result<Result<Head, Http1Error>, Reason> {
    // Whoever speaks HTTP/1.0 or HTTP/2 gets no interim responses.
    let client = (flight.version == Version::HTTP_11).then_some(&flight.conn);
    std::future::poll_fn(|cx| {
        let Outgoing { parts, gate, .. } = &mut *out;
        let request = (&parts.method, &mut parts.headers);
        let polled = conn.poll_head(cx, request, core.head_limits, |status, head| {
            if status == StatusCode::CONTINUE {
                gate.iter().for_each(|gate| gate.open());
            } else if let Some(client) = client.filter(|_| head.len() <= MAX_INTERIM_BYTES) {
                http1::clean_interim(head, &mut client.interim.borrow_mut());
                client.wake();
            }
        });
        if conn.wrote() {
            flight.mark_sent();
        }
        match polled {
            Poll::Ready(answer) => Poll::Ready(Ok(answer)),
            Poll::Pending => stopped(flight, cx).map(Err),
        }
    })
    .await
}

fn classify(conn: &Http1Conn, error: Http1Error) -> ProxyError {
    if !conn.wrote() {
        return ProxyError::with(Reason::ConnectFailed, Evidence::NotSent).because(error);
    }
    if matches!(error, Http1Error::Malformed(_)) {
        return ProxyError::new(Reason::UpstreamProtocol).because(error);
    }
    if conn.has_missed() {
        return ProxyError::with(Reason::UpstreamReset, Evidence::NotProcessed).because(error);
    }
    // With a byte of an answer it is sure that the upstream has had the request.
    if conn.answered() {
        return ProxyError::new(Reason::UpstreamReset).because(error);
    }
    ProxyError::with(Reason::UpstreamReset, Evidence::Ambiguous).because(error)
}

fn source(out: &Outgoing, mut conn: Box<Http1Conn>, pool: Rc<UpstreamPool>) -> Source {
    if let Some(body) = out.body.as_ref().filter(|_| !conn.is_sent()) {
        if body.abandon_if_untouched() {
            conn.give_up_request();
        } else {
            conn.detach_request();
        }
    }
    Source::Http1(conn, pool)
}

fn open_gate_in_time(out: &Outgoing) {
    if let Some(gate) = out.gate.clone() {
        tokio::task::spawn_local(async move {
            tokio::time::sleep(CONTINUE_WAIT).await;
            gate.open();
        });
    }
}

/// Ready when the request has to stop waiting for a reason other than bytes.
fn stopped(flight: &Flight, cx: &Context<'_>) -> Poll<Reason> {
    if flight.is_cut() || (flight.is_closing() && flight.grpc.get()) {
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

fn classify_http2(out: &Outgoing, error: hyper::Error) -> ProxyError {
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
            let evidence = if above_last { Evidence::LeftBehind } else { Evidence::NotProcessed };
            return ProxyError::with(Reason::UpstreamRefused, evidence).because(error);
        }
    }
    if error.is_parse() {
        return ProxyError::new(Reason::UpstreamProtocol).because(error);
    }
    ProxyError::with(Reason::UpstreamReset, Evidence::Ambiguous).because(error)
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

async fn connect(
    core: &Rc<Core>,
    upstream: &Upstream,
    policy: &ServicePolicy,
    flight: &Flight,
) -> Result<TcpStream, ProxyError> {
    flight.wait(Waits::Connect, policy.connect_timeout_ms);
    let not_sent = |reason| ProxyError::with(reason, Evidence::NotSent);
    let dialled = unless_stopped(flight, core.resolver.dial(upstream.address(), core.random.next())).await;
    let socket = dialled.map_err(not_sent)?.map_err(|error| match error {
        DialError::Name(error) => not_sent(Reason::DnsFailed).because(error),
        DialError::Connect(error) => not_sent(Reason::ConnectFailed).because(error),
    })?;
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
) -> Result<Answer, ProxyError> {
    let not_sent =
        |error: hyper::Error| ProxyError::with(Reason::ConnectFailed, Evidence::NotSent).because(error);
    // Not before the last attempt: as many connections as requests would be a storm.
    let is_last = flight.attempts.get() == MAX_ATTEMPTS;
    let open = if out.fresh && is_last { None } else { pool.join_http2() };
    let (mut ticket, reused) = match open {
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
        Ok(Ok(response)) => {
            let (mut parts, incoming) = response.into_parts();
            headers::clean_response(&mut parts.headers);
            let head = Head { status: parts.status, headers: parts.headers };
            Ok(Answer { head, source: Source::Http2(incoming, ticket) })
        }
        Ok(Err(mut error)) => {
            let returned = error.take_message().is_some();
            let error = error.into_error();
            let only_stream = h2_cause(&error).is_some_and(h2::Error::is_reset);
            pool.leave_http2(&ticket, only_stream);
            Err(match returned {
                // The connection was leaving already: no fault of the upstream, and it has seen nothing of the request.
                true if reused => {
                    ProxyError::with(Reason::UpstreamRefused, Evidence::LeftBehind).because(error)
                }
                true => not_sent(error),
                false => classify_http2(out, error),
            })
        }
        Err(reason) => Err(reason.into()),
    }
}

// --- the answer ----------------------------------------------------------------------------------------

/// Makes the client's answer of the upstream's head.
fn answer(
    entry: &ServiceEntry,
    guard: FlightGuard,
    out: &Outgoing,
    preferred: Option<u64>,
    Answer { head: Head { status, mut headers }, source }: Answer,
) -> Result<Response<ReplyBody>, (ProxyError, FlightGuard)> {
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return switch(entry, guard, out, headers, source);
    }
    let flight = &guard.0;
    flight.conn.before_head.set(false);
    set_sticky_cookie(entry, flight, preferred, &mut headers);
    let unread = out.body.as_ref().is_some_and(|body| body.is_abandoned());
    if !flight.conn.http2.get() && (unread || flight.core.draining.get()) {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        flight.conn.linger.set(unread);
    }
    flight.status.set(status.as_u16());
    let policy = entry.service.policy();
    let (class, late_class) = class_of(&headers);
    let is_call = flight.grpc.get() && grpc::is_grpc(headers.get(CONTENT_TYPE));
    if let Some(class) = class {
        flight.reclassify(class);
        if class == TrafficClass::Sse && headers.contains_key(CONTENT_ENCODING) {
            *flight.events.borrow_mut() = Some(Box::new(Events::encoded()));
        }
    }
    let long = class.is_some() || late_class == TrafficClass::GrpcStream;
    let body = UpstreamBody {
        source,
        // A stream of events may be silent for as long as a tunnel.
        body_idle_ms: if long { policy.tunnel_idle_timeout_ms } else { policy.body_idle_timeout_ms },
        late_class,
        late_from_ms: if class.is_some() { 0 } else { flight.started_us / 1_000 + LONG_AFTER_MS },
        messages: is_call.then(Messages::default),
    };
    let body = if body.source.is_end() {
        flight.complete.set(true);
        body.source.done();
        ReplyBody::Empty(guard)
    } else {
        flight.wait(Waits::Client, body.body_idle_ms);
        *flight.body.borrow_mut() = Some(body);
        ReplyBody::Stream(guard)
    };
    Ok(respond::response(status, headers, body))
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
    mut headers: HeaderMap,
    source: Source,
) -> Result<Response<ReplyBody>, (ProxyError, FlightGuard)> {
    let unasked = |guard| Err((ProxyError::with(Reason::UpstreamProtocol, Evidence::Ambiguous), guard));
    let (Some(asked), Source::Http1(upstream, _)) = (&out.upgrade, source) else {
        return unasked(guard);
    };
    let Some((socket, early)) = upstream.into_socket() else { return unasked(guard) };
    headers.entry(UPGRADE).or_insert_with(|| asked.clone());
    let agreed =
        headers.get_all(UPGRADE).iter().all(|agreed| agreed.as_bytes().eq_ignore_ascii_case(b"websocket"));
    let websocket = agreed && asked.as_bytes().eq_ignore_ascii_case(b"websocket");
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    let flight = &guard.0;
    flight.status.set(101);
    let conn = Rc::clone(&flight.conn);
    let policy = entry.service.policy();
    let (idle_ms, close_spread_ms) = (policy.tunnel_idle_timeout_ms, policy.websocket_close_spread_ms);
    flight.wait(Waits::Tunnel, idle_ms);
    *conn.tunnel.borrow_mut() = Some(Tunnel { socket, early, guard, idle_ms, websocket, close_spread_ms });
    Ok(respond::response(StatusCode::SWITCHING_PROTOCOLS, headers, ReplyBody::Page(None, None)))
}
