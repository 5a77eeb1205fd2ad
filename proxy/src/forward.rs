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
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, SET_COOKIE, STRICT_TRANSPORT_SECURITY,
    UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, request};
use http_body::Body;
use hyper::body::Incoming;
use peregrine_routing::{
    Evidence, Outcome, ProxyProtocol, RetryClass, RoutingTable, ServicePolicy, TrafficClass, Upstream,
    UpstreamProtocol,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::body::{Broken, Events, ReplyBody, Source, UpstreamBody, first_frame};
use crate::choose::Choice;
use crate::clock::now_us;
use crate::conn::ConnState;
use crate::core::{Core, ServiceEntry};
use crate::error::{Blame, ProxyError, Reason};
use crate::forwarded;
use crate::grpc::{self, Messages};
use crate::headers::{self, Seen};
use crate::hold;
use crate::http1::{self, Head, Http1Conn, Http1Error};
use crate::inflight::{Flight, FlightGuard, HostText, Start, Waits};
use crate::mirror;
use crate::outgoing::{Inbound, Outgoing};
use crate::pool::UpstreamPool;
use crate::proxy_protocol;
use crate::resolve::DialError;
use crate::respond::{self, Form};
use crate::route;
use crate::rules::{self, Asked, Compressing, Verdict};
use crate::tls;
use crate::upgrade::Tunnel;

/// Attempts for one request, the first one included.
const MAX_ATTEMPTS: u8 = 3;
/// Largest interim response that is passed on; a longer one is only read over.
const MAX_INTERIM_BYTES: usize = 8 * 1024;
/// How long the upstream has for `100 Continue` before the body is sent anyway (RFC 9110 §10.1.1).
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

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
    framing: Result<(), Reason>,
) -> Result<Response<ReplyBody>, Broken> {
    let (mut parts, mut incoming) = request.into_parts();
    if parts.version == Version::HTTP_2 {
        headers::trim(&mut parts.headers);
    }
    let seen = Seen::scan(&parts.headers);
    let has_body = !incoming.is_end_stream();
    let target = allowed(&parts.method)
        .and_then(|()| route::target(&parts.method, &parts.uri, parts.version, &parts.headers));
    let guard = begin(&core, &conn, &parts, seen, target.as_ref());
    let checked = target.and_then(|target| {
        if core.guards.overload.as_ref().is_some_and(|overload| overload.sheds(core.flights.len())) {
            return Err(Reason::Overloaded);
        }
        framing?;
        let http11 = parts.version == Version::HTTP_11;
        let wishes = headers::check(&parts.headers, seen, http11, has_body)?;
        // One version of the table, so that whoever is admitted gets to where he was admitted to.
        let mut reader = core.reader.borrow_mut();
        let table = reader.load();
        match tls::admit(&conn, table, &target)? {
            tls::Verdict::Admitted => Ok((Ok(service_of(&core, table, &target)?), target, wishes)),
            other => Ok((Err(other), target, wishes)),
        }
    });
    let (entry, target, wishes) = match checked {
        Ok((Ok(entry), target, wishes)) => (entry, target, wishes),
        Ok((Err(verdict), target, _)) => return Ok(answer_here(verdict, &core, &target, guard)),
        Err(reason) => return Ok(refuse(reason, &parts.headers, guard)),
    };
    if wishes.trailers && parts.version == Version::HTTP_2 {
        guard.0.grpc.set(grpc::is_grpc(parts.headers.get(CONTENT_TYPE)));
    }
    entry.service.retry_budget().earn();
    *guard.0.service.borrow_mut() = Some(Rc::clone(&entry));
    if let Err(reason) = rules::check(&core, &entry, &guard.0, &parts.headers) {
        return Ok(refuse(reason, &parts.headers, guard));
    }
    let (mut decided, mut signed_in, mut rewritten) = (Vec::new(), None, None);
    if let Some(rules) = &entry.rules {
        signed_in = Some(mirror::has_credentials(&parts.headers));
        if let Some((status, location)) = rules.redirect(&target) {
            guard.0.conn.linger.set(true);
            return Ok(respond::redirect(status, location, guard));
        }
        if rules.asks_who() {
            match Box::pin(rules.ask_who(&core, &guard.0, &mut parts.headers, &target)).await {
                Ok(Verdict::GoOn(fields)) => decided = fields,
                Ok(Verdict::Answer(answer)) => {
                    guard.0.conn.linger.set(true);
                    return Ok(respond::passed_on(*answer, guard));
                }
                Err(reason) => return Ok(refuse(reason, &parts.headers, guard)),
            }
            // Others may have come in meanwhile.
            if let Err(reason) = rules::has_room(&entry) {
                return Ok(refuse(reason, &parts.headers, guard));
            }
        }
        rewritten = match rules.rewrite(&target.path) {
            Ok(rewritten) => rewritten,
            Err(reason) => return Ok(refuse(reason, &parts.headers, guard)),
        };
    }
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
    let inbound =
        Inbound { parts, incoming, first, target, wishes, seen, has_body, decided, signed_in, rewritten };
    let outgoing = inbound.into_outgoing(&core, &guard.0, &entry);
    Ok(send(&core, &entry, guard, outgoing, choice).await)
}

fn refuse(reason: Reason, headers: &HeaderMap, guard: FlightGuard) -> Response<ReplyBody> {
    guard.0.conn.linger.set(true);
    respond::answer(reason, Form::of(headers), guard)
}

/// The answer to a request that needs no service.
fn answer_here(
    verdict: tls::Verdict,
    core: &Core,
    target: &route::Target,
    guard: FlightGuard,
) -> Response<ReplyBody> {
    // It may have a body, which nobody reads.
    guard.0.conn.linger.set(true);
    match verdict {
        tls::Verdict::Challenge(text) => respond::challenge(&text, guard),
        tls::Verdict::Redirect | tls::Verdict::Admitted => {
            respond::to_https(&target.host, core.config.https_port, &target.path, guard)
        }
    }
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
    let client = forwarded::client_address(&parts.headers, seen, conn, &core.config);
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

/// The service of a request. What one of the last requests found is found again without a look-up.
fn service_of(core: &Core, table: &RoutingTable, target: &route::Target) -> Result<Rc<ServiceEntry>, Reason> {
    let host = target.host.as_bytes();
    if let Some(entry) = core.recent.get(table.version(), host) {
        return Ok(entry);
    }
    let (entry, any_path) = look_up(core, table, target)?;
    if any_path {
        core.recent.put(table.version(), host, &entry);
    } else if let Some(other) = &target.other_reading {
        refuse_ways_past(table, target, &entry, other)?;
    }
    Ok(entry)
}

/// Refuses a path that leads to another service when it is read as some origins do: what guards that service would
/// not have been asked.
fn refuse_ways_past(
    table: &RoutingTable,
    target: &route::Target,
    entry: &ServiceEntry,
    other: &str,
) -> Result<(), Reason> {
    let host = route::canonical(&target.host)?;
    let found = table.lookup(&host, other);
    let is_same = found.is_some_and(|found| Arc::ptr_eq(found.service, &entry.service));
    if is_same { Ok(()) } else { Err(Reason::AmbiguousPath) }
}

pub(crate) fn find_service(core: &Core, target: &route::Target) -> Result<Rc<ServiceEntry>, Reason> {
    let mut reader = core.reader.borrow_mut();
    look_up(core, reader.load(), target).map(|(entry, _)| entry)
}

fn look_up(
    core: &Core,
    table: &RoutingTable,
    target: &route::Target,
) -> Result<(Rc<ServiceEntry>, bool), Reason> {
    let host = route::canonical(&target.host)?;
    // "OPTIONS *" is about the server as a whole: it goes where "/" goes.
    let path = target.path.path();
    let path = if path == "*" { "/" } else { path };
    let found = table.lookup(&host, path).ok_or(Reason::NoRoute)?;
    Ok((core.entry(found.service), found.any_path))
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
        if entry.service.hold().is_some_and(|queue| queue.is_closed())
            && let Err(reason) =
                Box::pin(hold::pass(core, &mut entry, &flight, &out.parts, out.body.as_ref())).await
        {
            return respond::answer(reason, out.form(), guard);
        }
        match choice.enter(core, &mut entry, &flight) {
            Ok(Some(lease)) => flight.take_lease(lease),
            Ok(None) => continue,
            Err(reason) => {
                hold::note_unserved(&entry, reason);
                return respond::answer(reason, out.form(), guard);
            }
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
    // A look at the clock costs something; between the head and the first attempt there are microseconds, unless it had to wait.
    let at_once = flight.attempts.get() == 1 && flight.held_us.get() == 0 && !flight.asked.get();
    let sent_us = if at_once { flight.started_us } else { now_us() };
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
        let is_introduced = proxy_protocol::wanted(policy, upstream).is_some();
        let mut conn = match pool.checkout(out.replayable).filter(|_| !out.fresh && !is_introduced) {
            Some(conn) => conn,
            None => {
                let socket = Box::pin(connect(core, upstream, policy, flight)).await?;
                let mut conn = Http1Conn::new(socket, core.spares.clone());
                conn.is_introduced = is_introduced;
                conn
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

/// Connects to an upstream, and says for whom where that is wanted: before anything else, TLS included.
pub(crate) async fn connect(
    core: &Rc<Core>,
    upstream: &Upstream,
    policy: &ServicePolicy,
    flight: &Flight,
) -> Result<TcpStream, ProxyError> {
    flight.wait(Waits::Connect, policy.connect_timeout_ms);
    let not_sent = |reason| ProxyError::with(reason, Evidence::NotSent);
    let dialled = unless_stopped(flight, core.resolver.dial(upstream.address(), core.random.next())).await;
    let mut socket = dialled.map_err(not_sent)?.map_err(|error| match error {
        DialError::Name(error) => not_sent(Reason::DnsFailed).because(error),
        DialError::Connect(error) => not_sent(Reason::ConnectFailed).because(error),
    })?;
    let failed = |error: io::Error| not_sent(Reason::ConnectFailed).because(error);
    socket.set_nodelay(true).map_err(failed)?;
    if let Some(version) = proxy_protocol::wanted(policy, upstream) {
        let header = introduction(version, flight);
        unless_stopped(flight, socket.write_all(&header)).await.map_err(not_sent)?.map_err(failed)?;
    }
    Ok(socket)
}

/// Says that a connection is for the client of this request, as the edge believes it. His port is known if he is the peer. A
/// client whose address cannot be read is `0.0.0.0`, nobody's: without an address an origin would take him for the edge.
pub(crate) fn introduction(version: ProxyProtocol, flight: &Flight) -> Vec<u8> {
    let conn = &flight.conn;
    let port = if flight.client == conn.peer_ip() { conn.peer.port() } else { 0 };
    proxy_protocol::header(version, (flight.client, port).into(), conn.local)
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
    let open = if out.fresh && is_last { None } else { pool.join_http2(out.replayable) };
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
            headers::trim(&mut parts.headers);
            headers::clean_response(&mut parts.headers);
            let source = if has_content(&flight.method, parts.status) {
                Source::Http2(incoming, ticket)
            } else {
                // An upstream that sends some all the same is told to stop (the stream is reset): it would be another's answer to
                // clients of HTTP/1.1, and an error to those of HTTP/2.
                Source::Nothing
            };
            if parts.status == StatusCode::NO_CONTENT {
                parts.headers.remove(CONTENT_LENGTH); // RFC 9110 §8.6
            }
            let head = Head { status: parts.status, headers: parts.headers };
            Ok(Answer { head, source })
        }
        Ok(Err(mut error)) => {
            let returned = error.take_message().is_some();
            let error = error.into_error();
            let only_stream = h2_cause(&error).is_some_and(h2::Error::is_reset);
            pool.leave_http2(&ticket, only_stream);
            Err(match returned {
                // The connection was leaving already: no fault of the upstream, and it has seen nothing of the request.
                true if reused => {
                    pool.note_missed_http2(&ticket);
                    ProxyError::with(Reason::UpstreamRefused, Evidence::LeftBehind).because(error)
                }
                true => not_sent(error),
                false => classify_http2(out, error),
            })
        }
        Err(reason) => Err(reason.into()),
    }
}

/// Whether an answer may have content (RFC 9110 §6.4.1).
fn has_content(method: &Method, status: StatusCode) -> bool {
    method != Method::HEAD && ![StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status)
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
    // By what the origin says of it, whatever the client is told.
    let (class, late_class) = class_of(&headers);
    let is_call = flight.grpc.get() && grpc::is_grpc(headers.get(CONTENT_TYPE));
    let encoded = headers.contains_key(CONTENT_ENCODING);
    if let Some(rules) = &entry.rules {
        rules.response.apply(&mut headers);
    }
    set_sticky_cookie(entry, flight, preferred, &mut headers);
    if let Some(hsts) = tls::hsts(&flight.core, &flight.conn, &flight.host.borrow()) {
        headers.insert(STRICT_TRANSPORT_SECURITY, hsts);
    }
    // Where the events and messages of a stream end has to be seen.
    let compressing = if class == Some(TrafficClass::Sse) || is_call {
        None
    } else {
        compress(entry, flight, out, status, &source, &mut headers)
    };
    let unread = out.body.as_ref().is_some_and(|body| body.is_abandoned());
    if !flight.conn.http2.get() && (unread || flight.core.draining.get()) {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        flight.conn.linger.set(unread);
    }
    flight.status.set(status.as_u16());
    let policy = entry.service.policy();
    if let Some(class) = class {
        flight.reclassify(class);
        if class == TrafficClass::Sse && encoded {
            *flight.events.borrow_mut() = Some(Box::new(Events::encoded()));
        }
    }
    let long = class.is_some() || late_class == TrafficClass::GrpcStream;
    let body = UpstreamBody {
        source,
        // A stream of events may be silent for as long as a tunnel.
        body_idle_ms: if long { policy.tunnel_idle_timeout_ms } else { policy.body_idle_timeout_ms },
        late_class,
        late_from_ms: if class.is_some() { 0 } else { flight.long_from_ms() },
        messages: is_call.then(Messages::default),
        compressing,
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

/// Changes the head of an answer that is compressed on its way.
fn compress(
    entry: &ServiceEntry,
    flight: &Flight,
    out: &Outgoing,
    status: StatusCode,
    source: &Source,
    headers: &mut HeaderMap,
) -> Option<Box<Compressing>> {
    let length = if source.is_end() { Some(0) } else { source.size_hint().exact() };
    let running = &flight.core.compressing;
    let asked = Asked { method: &flight.method, status, length, coding: out.coding, running };
    entry.rules.as_ref()?.compress(&asked, headers)
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
    let idle_ms = entry.service.policy().tunnel_idle_timeout_ms;
    flight.wait(Waits::Tunnel, idle_ms);
    *conn.tunnel.borrow_mut() = Some(Tunnel { socket, early, guard, idle_ms, websocket });
    Ok(respond::response(StatusCode::SWITCHING_PROTOCOLS, headers, ReplyBody::Page(None, None)))
}
