//! What the edge reads from strangers, for fuzz targets: a request's head, from what the parser hands over to what an
//! upstream would get; the framing of HTTP/1.1; headers of the PROXY protocol; frames of WebSockets. It is compiled for fuzzing only, adds no rule of its own, and needs no socket and no runtime.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use http::header::HOST;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Version, request};

use crate::config::{Config, IpNet};
use crate::conn::ConnState;
use crate::error::Reason;
use crate::forwarded;
use crate::framing::{Follower, Framing};
use crate::headers::{self, Added, Seen, TRACEPARENT, X_REQUEST_ID};
use crate::ids::{IdMaker, Ids, Random};
use crate::inflight::HostText;
use crate::proxy_protocol::{self, Header, Parsed};
use crate::route;
use crate::upgrade::frames::Frames;

/// What the first bytes of a connection are by the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Introduction {
    /// A header of this length, for this client.
    Whole(usize, Option<SocketAddr>),
    /// The beginning of one, with at least so many bytes to come.
    Needs(usize),
    /// Something else.
    No,
}

/// Reads a header of the PROXY protocol.
#[must_use]
pub fn introduction(bytes: &[u8]) -> Introduction {
    match proxy_protocol::parse(bytes) {
        Ok(Parsed::Whole(Header { length, source, destination: _ })) => Introduction::Whole(length, source),
        Ok(Parsed::Needs(more)) => Introduction::Needs(more),
        Err(_) => Introduction::No,
    }
}

/// The framing of a client's HTTP/1.1 bytes.
pub struct Front(Follower);

impl Default for Front {
    fn default() -> Self {
        Self(Follower::new())
    }
}

impl Front {
    /// Takes bytes; false if they break the framing of a body.
    pub fn read(&mut self, bytes: &[u8]) -> bool {
        self.0.read(bytes).is_ok()
    }

    /// The parser has accepted a head, of a body by `length` or, without one, by chunks.
    ///
    /// # Errors
    /// The [`Reason`] that the client would be told.
    pub fn head(&mut self, length: Option<u64>) -> Result<(), Reason> {
        self.0.head(length.map_or(Framing::Chunked, Framing::Length))
    }

    /// Whether the last request has come to its end.
    #[must_use]
    pub fn is_at_head(&self) -> bool {
        self.0.is_at_head()
    }
}

/// One direction of a WebSocket.
#[derive(Default)]
pub struct WebSocket(Frames);

impl WebSocket {
    /// Follows bytes on their way.
    pub fn pass(&mut self, bytes: &[u8]) {
        self.0.pass(bytes);
    }

    /// Whether what has passed are whole frames, and whether a `Close` was among them.
    #[must_use]
    pub fn is_between_and_closed(&self) -> (bool, bool) {
        (self.0.is_between(), self.0.is_closed())
    }
}

/// A client's connection. What a request leaves behind in it is there for the next one.
pub struct Client {
    config: Config,
    conn: Rc<ConnState>,
    ids: IdMaker,
    random: Random,
}

/// A request that the edge would forward.
#[derive(Debug)]
pub struct Forwarded {
    /// Its fields, as an HTTP/2 upstream would get them.
    pub headers: HeaderMap,
    /// Those of them that go to an HTTP/1.1 upstream by way of a map …
    pub settled: HeaderMap,
    /// … and the lines that the edge writes itself.
    pub lines: Vec<u8>,
    /// The host that its route is looked up by; empty without one.
    pub host: String,
    /// The client that logs would name.
    pub client: IpAddr,
}

impl Client {
    /// A connection from `peer` to an edge that trusts `trusted_proxies`.
    #[must_use]
    pub fn new(peer: SocketAddr, trusted_proxies: Vec<IpNet>) -> Self {
        let config = Config { trusted_proxies, ..Config::default() };
        let conn = ConnState::new(peer, peer, config.trusts(peer.ip()), 1);
        Self { config, conn, ids: IdMaker::new(), random: Random::new() }
    }

    /// Brings a request through: the checks, the host, the client's address, then the fields.
    ///
    /// # Errors
    /// The [`Reason`] that the client would be told.
    pub fn forward(&self, request: Request<()>, has_body: bool) -> Result<Forwarded, Reason> {
        let (parts, ()) = request.into_parts();
        let seen = Seen::scan(&parts.headers);
        let target = route::target(&parts.method, &parts.uri, parts.version, &parts.headers)?;
        let ids = self.ids(&parts, seen);
        let client = forwarded::client_address(&parts.headers, seen, &self.conn, &self.config);
        headers::check(&parts.headers, seen, parts.version == Version::HTTP_11, has_body)?;
        let host = route::canonical(&target.host)?.into_owned();
        let Rewritten { headers, settled, lines } = self.rewrite(parts, seen, &target, &ids);
        Ok(Forwarded { headers, settled, lines, host, client })
    }

    fn ids(&self, parts: &request::Parts, seen: Seen) -> Ids {
        let field = |bit, name: &HeaderName| parts.headers.get(name).filter(|_| seen.has(bit));
        let request_id = field(Seen::REQUEST_ID, &X_REQUEST_ID);
        self.ids.ids(&self.random, request_id, field(Seen::TRACEPARENT, &TRACEPARENT))
    }

    /// In the order of `Inbound::rewrite_headers`, which cannot be called without a body: first off, then on.
    fn rewrite(&self, parts: request::Parts, seen: Seen, target: &route::Target, ids: &Ids) -> Rewritten {
        let mut settled = parts.headers;
        if seen.has(Seen::COOKIE) && parts.version == Version::HTTP_2 {
            headers::join_cookies(&mut settled);
        }
        let host = match &target.host {
            HostText::None => None,
            HostText::Field(value) => Some(value.clone()),
            HostText::Authority(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        };
        headers::strip_hop_by_hop(&mut settled, seen);
        if let Some(host) = &host
            && (matches!(target.host, HostText::Authority(_)) || seen.has(Seen::CONNECTION))
        {
            settled.insert(HOST, host.clone());
        }
        let via = HeaderValue::from_static(match parts.version {
            Version::HTTP_10 => "1.0 edge",
            Version::HTTP_2 => "2.0 edge",
            _ => "1.1 edge",
        });
        let added = Added { ids, via: &via, host: host.as_ref() };
        let mut headers = settled.clone();
        headers::add(&mut headers, seen, &self.conn, &added);
        let owed = headers::settle(&mut settled, seen, &self.conn, &added);
        let mut lines = Vec::new();
        headers::write_owed(&mut lines, owed, &self.conn, &added);
        Rewritten { headers, settled, lines }
    }
}

struct Rewritten {
    headers: HeaderMap,
    settled: HeaderMap,
    lines: Vec<u8>,
}
