//! A request as it goes on: what came from the client, checked, becomes what an upstream is sent, in the form of the
//! upstream's protocol and for as many attempts as it takes.

use std::rc::Rc;
use std::sync::Arc;

use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, request};
use http_body::Body;
use hyper::body::Incoming;
use peregrine_routing::{Coding, ServicePolicy, Upstream, UpstreamProtocol};

use crate::body::{ContinueGate, ForwardBody, RequestBody, RequestBodyLimits};
use crate::core::{Core, ServiceEntry};
use crate::framing::Framing;
use crate::headers::{self, Added, Asked, Owed, Seen, Wishes};
use crate::http1;
use crate::inflight::{Flight, HostText};
use crate::respond::Form;
use crate::route;

/// Says that a request of any method may be executed twice without harm: the origin sees to it.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// A request on its way, in the form that an attempt needs.
pub(crate) struct Outgoing {
    pub(crate) parts: request::Parts,
    pub(crate) body: Option<Rc<RequestBody>>,
    /// How the body is delimited on HTTP/1.1; `None` is no body.
    pub(crate) framing: Option<Framing>,
    pub(crate) path: PathAndQuery,
    pub(crate) wishes: Wishes,
    pub(crate) upgrade: Option<HeaderValue>,
    /// The client's host as a field; `None` in HTTP/1.0.
    pub(crate) host: Option<HeaderValue>,
    /// What the edge has still to add.
    pub(crate) owed: Owed,
    /// It may be executed twice without harm (retry class C).
    pub(crate) replayable: bool,
    /// A connection that was idle has failed it: it gets a new one.
    pub(crate) fresh: bool,
    pub(crate) gate: Option<Arc<ContinueGate>>,
    /// Whether the client sent credentials; `None`: its fields say.
    pub(crate) signed_in: Option<bool>,
    /// What the answer may be compressed with.
    pub(crate) coding: Option<Coding>,
}

/// A request that was received and may go on.
pub(crate) struct Inbound {
    pub(crate) parts: request::Parts,
    pub(crate) incoming: Incoming,
    pub(crate) first: Option<http_body::Frame<bytes::Bytes>>,
    pub(crate) target: route::Target,
    pub(crate) wishes: Wishes,
    pub(crate) seen: Seen,
    pub(crate) has_body: bool,
    /// Fields that whoever was asked about the request gives it.
    pub(crate) decided: Vec<(HeaderName, HeaderValue)>,
    /// Whether the client sent credentials; `None` where no rule can have changed them.
    pub(crate) signed_in: Option<bool>,
    /// The path that goes on, if it is another one than decided on the route.
    pub(crate) rewritten: Option<PathAndQuery>,
}

impl Inbound {
    pub(crate) fn into_outgoing(
        mut self,
        core: &Core,
        flight: &Rc<Flight>,
        entry: &ServiceEntry,
    ) -> Outgoing {
        let upgrade = if self.wishes.upgrade { self.parts.headers.get(UPGRADE).cloned() } else { None };
        let host = self.target.host.value();
        let owed = self.rewrite_headers(core, flight, host.as_ref());
        let mut coding = None;
        if let Some(rules) = &entry.rules {
            coding = rules.coding(&self.parts.headers);
            rules.change(&mut self.parts.headers, std::mem::take(&mut self.decided));
        }
        let Self { mut parts, incoming, first, mut target, wishes, has_body, signed_in, rewritten, .. } =
            self;
        if let Some(rewritten) = rewritten {
            target.path = rewritten;
        }
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
                late_from_ms: flight.long_from_ms(),
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
            signed_in,
            coding,
        }
    }

    pub(crate) fn rewrite_headers(
        &mut self,
        core: &Core,
        flight: &Flight,
        host: Option<&HeaderValue>,
    ) -> Owed {
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
        if let Some(client) = flight.conn.session.get().and_then(|session| session.client.as_ref()) {
            client.insert(headers);
        }
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
    pub(crate) fn body(&self) -> Option<ForwardBody> {
        self.body.as_ref().map_or(Some(ForwardBody::Empty), RequestBody::attempt)
    }

    pub(crate) fn added<'a>(&'a self, core: &'a Core, flight: &'a Flight) -> Added<'a> {
        Added { ids: &flight.ids, via: core.via.of(flight.version), host: self.host.as_ref() }
    }

    /// The form that the client wants an error in.
    pub(crate) fn form(&self) -> Form {
        Form::of(&self.parts.headers)
    }

    /// Whether it can be sent (again).
    pub(crate) fn is_whole(&self) -> bool {
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
        // A connection that is for one client is not kept, and the upstream need not wait for more on it.
        let closes = policy.send_proxy_protocol.is_some();
        if self.wishes.trailers {
            // In the form that RFC 9110 §10.1.4 wants.
            out.extend_from_slice(b"te: trailers\r\nconnection: te\r\n");
        }
        if let Some(protocol) = &self.upgrade {
            out.extend_from_slice(b"connection: upgrade\r\n");
            http1::write_field(out, &UPGRADE, protocol);
        } else if closes {
            out.extend_from_slice(b"connection: close\r\n");
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
