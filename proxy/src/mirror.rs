//! Copies of safe requests for upstreams that serve nobody yet: they warm them up, and show how they answer.
//!
//! ```text
//!   request ─► sample (before it is sent) ─► the client's own attempt ─► its head ─► launch ─┐
//!                                                                        ▼                   ▼ a task of its own
//!                                                                      client        pool of its own ─► target
//!                                                                                    read, compared, thrown away
//! ```
//!
//! A copy is made of the head as it goes to the upstream, and sent when the client's own answer has begun: so it
//! delays nothing, and there is an answer to compare with. It holds no lease, no place in a pool that clients use, and
//! nothing of the client's connection. It is never retried, except from a stale connection; it never counts for or
//! against the health of anything. When the table ends the mirror, its copies are dropped before the core acknowledges.
//!
//! What is copied: GET and HEAD (RFC 9110 §9.2.1) without a body. What is not: upgrades, gRPC, ranges and conditional
//! requests (their answers depend on what the client has), requests with credentials unless the table says so, copies
//! of another edge, and requests whose answer is a stream of events.

use std::cell::{RefCell, RefMut};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{
    AUTHORIZATION, CONTENT_TYPE, COOKIE, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    IF_UNMODIFIED_SINCE, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request};
use http_body::Body as _;
use hyper::body::Incoming;
use metrics::{counter, histogram};
use peregrine_routing::{Mirror, MirrorOutcome, MirrorSlot, ServicePolicy, Upstream, UpstreamProtocol};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::body::ForwardBody;
use crate::clock::now_us;
use crate::core::{Core, ServiceEntry};
use crate::forward;
use crate::headers::PEREGRINE_MIRROR;
use crate::http1::{Head, Http1Conn};
use crate::inflight::Flight;
use crate::outgoing::Outgoing;
use crate::pool::UpstreamPool;
use crate::proxy_protocol;

/// Fields whose requests are not copied: the right answer depends on what the client has already.
const DEPENDS_ON_CLIENT: [HeaderName; 6] =
    [RANGE, IF_RANGE, IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE];
/// Room for the head of a usual request.
const HEAD_BYTES: usize = 1_024;
/// What marks a copy.
const MARK: &[u8] = b"peregrine-mirror: 1\r\n\r\n";

/// A request that was sampled, as it will be sent to the target.
pub(crate) struct Sampled {
    mirror: Arc<Mirror>,
    target: Arc<Upstream>,
    method: Method,
    request: Copied,
}

/// A request in the target's protocol.
enum Copied {
    /// The bytes of its head, and those that its connection begins with: with these it has one of its own.
    Http1 {
        head: Vec<u8>,
        introduction: Option<Vec<u8>>,
    },
    Http2(Box<Request<ForwardBody>>),
}

/// Takes a request into the sample, before it is sent to where it belongs. One branch where nothing is mirrored.
#[inline]
pub(crate) fn sample(
    core: &Core,
    entry: &ServiceEntry,
    flight: &Flight,
    out: &Outgoing,
) -> Option<Box<Sampled>> {
    let mirror = entry.service.mirror()?;
    sample_for(mirror, core, entry.service.policy(), flight, out)
}

/// Whether a request is somebody's.
pub(crate) fn has_credentials(headers: &HeaderMap) -> bool {
    headers.contains_key(AUTHORIZATION) || headers.contains_key(COOKIE)
}

#[cold]
fn sample_for(
    mirror: &Arc<Mirror>,
    core: &Core,
    policy: &ServicePolicy,
    flight: &Flight,
    out: &Outgoing,
) -> Option<Box<Sampled>> {
    let method = [Method::GET, Method::HEAD].into_iter().find(|safe| *safe == flight.method)?;
    let headers = out.headers();
    let depends = DEPENDS_ON_CLIENT.iter().chain([&PEREGRINE_MIRROR]).any(|name| headers.contains_key(name));
    if depends || !out.is_plain() || flight.grpc.get() || !mirror.is_on(core.coarse_now_ms()) {
        return None;
    }
    if !mirror.samples(core.random.next()) {
        return None;
    }
    let signed_in = out.signed_in.unwrap_or_else(|| has_credentials(headers));
    if !mirror.spec().with_credentials && signed_in {
        mirror.note(MirrorOutcome::LeftOut);
        return None;
    }
    if !mirror.is_due(flight.started_us) {
        mirror.note(MirrorOutcome::Skipped);
        return None;
    }
    let target = Arc::clone(mirror.next_target()?);
    let request = match target.protocol() {
        UpstreamProtocol::Http1 => {
            let mut head = Vec::with_capacity(HEAD_BYTES);
            out.write_head(&mut head, core, flight, &target, policy);
            head.truncate(head.len() - b"\r\n".len());
            head.extend_from_slice(MARK);
            let version = proxy_protocol::wanted(policy, &target);
            let introduction = version.map(|version| forward::introduction(version, flight));
            Copied::Http1 { head, introduction }
        }
        UpstreamProtocol::H2c => {
            let mut request = out.for_http2(core, flight, &target, policy)?;
            request.headers_mut().insert(PEREGRINE_MIRROR, HeaderValue::from_static("1"));
            Copied::Http2(Box::new(request))
        }
    };
    Some(Box::new(Sampled { mirror: Arc::clone(mirror), target, method, request }))
}

impl Sampled {
    /// Sends the copy in a task of its own: the client's answer has begun with this head, after so long.
    #[expect(
        clippy::boxed_local,
        reason = "a request that is mirrored carries a pointer, and any other one nothing"
    )]
    pub(crate) fn launch(self: Box<Self>, core: &Rc<Core>, entry: &ServiceEntry, head: &Head, head_us: u64) {
        let Self { mirror, target, method, request } = *self;
        let content_type = head.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        let is_stream = content_type.starts_with(b"text/event-stream");
        // Between the request and its answer the mirror may have ended.
        if is_stream || core.draining.get() || !mirror.is_on(core.coarse_now_ms()) {
            return;
        }
        let Some(slot) = mirror.admit() else {
            mirror.note(MirrorOutcome::Skipped);
            return;
        };
        let mut on = core.mirrors.on(&mirror);
        let pool = on.pool(core, &target, entry.service.policy());
        let verdict = Verdict {
            service: core.metrics.label(entry.service.name()),
            client: (head.status.as_u16(), head_us),
            mirror: None,
            sent: false,
            failed: false,
            target: Arc::clone(&target),
            _slot: slot,
        };
        let limit_ms = mirror.spec().timeout_ms;
        let copy = Copy { core: Rc::clone(core), pool, target, method, verdict };
        let max_body_bytes = mirror.spec().max_body_bytes;
        on.tasks.spawn_local(copy.send(request, limit_ms, max_body_bytes));
    }
}

/// A copy on its way.
struct Copy {
    core: Rc<Core>,
    pool: Rc<UpstreamPool>,
    target: Arc<Upstream>,
    method: Method,
    verdict: Verdict,
}

/// The target is to blame: there is no whole answer.
struct NoAnswer;

impl Copy {
    async fn send(mut self, request: Copied, limit_ms: u32, max_body_bytes: u64) {
        let limit = Duration::from_millis(u64::from(limit_ms));
        let exchange = async {
            match request {
                Copied::Http1 { head, introduction } => {
                    self.ask_http1(&head, introduction.as_deref(), max_body_bytes).await
                }
                Copied::Http2(request) => self.ask_http2(*request, max_body_bytes).await,
            }
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(Ok(())) => {}
            Ok(Err(NoAnswer)) => self.verdict.failed = true,
            // Where the client has waited for nearly as long, the limit says nothing of the target.
            Err(_) => {
                let client_was_quick = self.verdict.client.1 < u64::from(limit_ms) * 1_000 / 2;
                self.verdict.failed = self.verdict.mirror.is_none() && client_was_quick;
            }
        }
    }

    async fn ask_http1(
        &mut self,
        head: &[u8],
        introduction: Option<&[u8]>,
        max_body_bytes: u64,
    ) -> Result<(), NoAnswer> {
        let (mut conn, begun_us, answer) = loop {
            let mut conn = match self.pool.checkout(true).filter(|_| introduction.is_none()) {
                Some(conn) => conn,
                None => {
                    let mut socket = self.dial().await?;
                    socket.write_all(introduction.unwrap_or_default()).await.map_err(|_| NoAnswer)?;
                    Http1Conn::new(socket, self.core.spares.clone())
                }
            };
            conn.is_introduced = introduction.is_some();
            let begun_us = self.begin();
            conn.begin(ForwardBody::Empty, None, |out| out.extend_from_slice(head));
            let (mut headers, limits) = (HeaderMap::new(), self.core.head_limits);
            let answered =
                poll_fn(|cx| conn.poll_head(cx, (&self.method, &mut headers), limits, |_, _| {})).await;
            match answered {
                Ok(answer) => break (conn, begun_us, answer),
                // The target has closed the idle connection, before or just now: no fault of anybody, take the next. It may have
                // the request already; only safe ones are copied, and a new connection has the last word.
                Err(_) if conn.reused => {}
                Err(_) => return Err(NoAnswer),
            }
        };
        self.verdict.mirror = Some((answer.status.as_u16(), now_us().saturating_sub(begun_us)));
        let mut read_bytes = 0;
        while !conn.is_end() {
            match poll_fn(|cx| conn.poll_frame(cx)).await {
                Some(Ok(frame)) => read_bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
                Some(Err(_)) => return Err(NoAnswer),
                None => break,
            }
            if read_bytes > max_body_bytes {
                return Ok(()); // the connection ends with it
            }
        }
        self.pool.give_back(conn);
        Ok(())
    }

    async fn ask_http2(
        &mut self,
        request: Request<ForwardBody>,
        max_body_bytes: u64,
    ) -> Result<(), NoAnswer> {
        let mut request = request;
        let (answer, ticket) = loop {
            let (mut ticket, reused) = match self.pool.join_http2(true) {
                Some(ticket) => (ticket, true),
                None => {
                    let socket = self.dial().await?;
                    (self.pool.open_http2(&self.core.http2, socket).await.map_err(|_| NoAnswer)?, false)
                }
            };
            let begun_us = self.begin();
            match ticket.sender.try_send_request(request).await {
                Ok(answer) => {
                    let head_us = now_us().saturating_sub(begun_us);
                    self.verdict.mirror = Some((answer.status().as_u16(), head_us));
                    break (answer, ticket);
                }
                Err(mut error) => {
                    self.pool.leave_http2(&ticket, false);
                    request = error.take_message().filter(|_| reused).ok_or(NoAnswer)?;
                }
            }
        };
        let (mut body, mut read_bytes): (Incoming, u64) = (answer.into_body(), 0);
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let frame = frame.map_err(|_| NoAnswer)?;
            read_bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
            if read_bytes > max_body_bytes {
                break; // the stream is reset with its body
            }
        }
        drop((body, ticket));
        Ok(())
    }

    /// Counts a copy whose bytes go out now.
    fn begin(&mut self) -> u64 {
        if !std::mem::replace(&mut self.verdict.sent, true) {
            self.target.note_mirrored();
        }
        now_us()
    }

    async fn dial(&self) -> Result<TcpStream, NoAnswer> {
        let dialling = self.core.resolver.dial(self.target.address(), self.core.random.next());
        let socket = dialling.await.map_err(|_| NoAnswer)?;
        socket.set_nodelay(true).map_err(|_| NoAnswer)?;
        Ok(socket)
    }
}

/// What a copy shows. Told when it is dropped, however the copy ends.
struct Verdict {
    service: Arc<str>,
    target: Arc<Upstream>,
    /// Status code and time to the head, in microseconds.
    client: (u16, u64),
    mirror: Option<(u16, u64)>,
    sent: bool,
    failed: bool,
    /// Free again when all is told.
    _slot: MirrorSlot,
}

impl Drop for Verdict {
    fn drop(&mut self) {
        let outcome = match self.mirror {
            _ if self.failed => MirrorOutcome::Failed { client_status: self.client.0 },
            Some(mirror) => MirrorOutcome::Compared { client: self.client, mirror },
            None => MirrorOutcome::Unfinished,
        };
        self.target.record_mirrored(outcome);
        let mirror = match outcome {
            MirrorOutcome::Compared { mirror, .. } => class_name(mirror.0),
            MirrorOutcome::Failed { .. } => "none",
            _ => "unfinished",
        };
        let labels = [
            ("service", self.service.to_string()),
            ("client", class_name(self.client.0).to_owned()),
            ("mirror", mirror.to_owned()),
        ];
        counter!("peregrine_edge_mirrored_total", &labels).increment(1);
        if let MirrorOutcome::Compared { client, mirror } = outcome {
            for (side, (_, latency_us)) in [("client", client), ("mirror", mirror)] {
                let labels = [("service", self.service.to_string()), ("side", side.to_owned())];
                let seconds = Duration::from_micros(latency_us).as_secs_f64();
                histogram!("peregrine_edge_mirror_head_seconds", &labels).record(seconds);
            }
        }
    }
}

const fn class_name(status: u16) -> &'static str {
    match status / 100 {
        0 | 1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    }
}

// --- what a core mirrors ---------------------------------------------------------------------------------

/// A core's copies under way, and their connections.
#[derive(Default)]
pub(crate) struct Mirrors(RefCell<Vec<On>>);

/// A mirror that this core has sent copies for. Its tasks are dropped with it.
struct On {
    mirror: Arc<Mirror>,
    /// One for each target that was used. Clients' requests never look here.
    pools: Vec<(Arc<Upstream>, Rc<UpstreamPool>)>,
    tasks: JoinSet<()>,
}

impl Mirrors {
    fn on(&self, mirror: &Arc<Mirror>) -> RefMut<'_, On> {
        RefMut::map(self.0.borrow_mut(), |all| {
            let at = all.iter().position(|one| Arc::ptr_eq(&one.mirror, mirror)).unwrap_or_else(|| {
                all.push(On { mirror: Arc::clone(mirror), pools: Vec::new(), tasks: JoinSet::new() });
                all.len() - 1
            });
            &mut all[at]
        })
    }

    /// Drops the copies of mirrors that are over, with their connections. From then on not a byte of them is sent.
    pub(crate) fn end_those_that_are_over(&self, now_ms: u64) {
        let over: Vec<On> = self.0.borrow_mut().extract_if(.., |one| !one.mirror.is_on(now_ms)).collect();
        for one in &over {
            one.pools.iter().for_each(|(_, pool)| pool.retire());
        }
    }

    /// Forgets tasks that have ended, and closes idle connections whose time is over.
    pub(crate) fn sweep(&self) {
        for one in self.0.borrow_mut().iter_mut() {
            while one.tasks.try_join_next().is_some() {}
            one.pools.iter().for_each(|(_, pool)| pool.sweep());
        }
    }
}

impl On {
    fn pool(&mut self, core: &Core, target: &Arc<Upstream>, policy: &ServicePolicy) -> Rc<UpstreamPool> {
        if let Some((_, pool)) = self.pools.iter().find(|(known, _)| Arc::ptr_eq(known, target)) {
            return Rc::clone(pool);
        }
        let pool = UpstreamPool::new(target, policy, false, core.clock());
        self.pools.push((Arc::clone(target), Rc::clone(&pool)));
        pool
    }
}
