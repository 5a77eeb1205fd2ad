//! The edge's own way of a request's head, for fuzz targets: from what the parser hands over to what an upstream
//! would get. It is compiled for fuzzing only, adds no rule of its own, and needs no socket and no runtime.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use http::header::HOST;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Version, request};

use crate::config::{Config, IpNet};
use crate::conn::ConnState;
use crate::error::Reason;
use crate::headers::{self, Added, Seen, TRACEPARENT, X_REQUEST_ID};
use crate::ids::{IdMaker, Ids, Random};
use crate::inflight::HostText;
use crate::route;

/// What is added to `Via`, whatever the version.
pub const VIA: HeaderValue = HeaderValue::from_static("1.1 peregrine");

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
    /// Its fields, as every attempt begins with them.
    pub headers: HeaderMap,
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
        let conn = ConnState::new(peer, config.trusts(peer.ip()), 1);
        Self { config, conn, ids: IdMaker::new(), random: Random::new() }
    }

    /// Brings a request through: the checks, the host, the client's address, then the fields.
    ///
    /// # Errors
    /// The [`Reason`] that the client would be told.
    pub fn forward(&self, request: Request<()>, has_body: bool) -> Result<Forwarded, Reason> {
        let (mut parts, ()) = request.into_parts();
        let seen = Seen::scan(&parts.headers);
        let target = route::target(&parts.method, &parts.uri, parts.version, &parts.headers)?;
        let ids = self.ids(&parts, seen);
        let client = headers::client_address(&parts.headers, seen, &self.conn, &self.config);
        headers::check(&parts.headers, seen, parts.version == Version::HTTP_11, has_body)?;
        let host = route::canonical(&target.host)?.into_owned();
        self.rewrite(&mut parts, seen, &target, &ids);
        Ok(Forwarded { headers: parts.headers, host, client })
    }

    fn ids(&self, parts: &request::Parts, seen: Seen) -> Ids {
        let field = |bit, name: &HeaderName| parts.headers.get(name).filter(|_| seen.has(bit));
        let request_id = field(Seen::REQUEST_ID, &X_REQUEST_ID);
        self.ids.ids(&self.random, request_id, field(Seen::TRACEPARENT, &TRACEPARENT))
    }

    /// In the order of `Inbound::rewrite_headers`, which cannot be called without a body: first off, then on.
    fn rewrite(&self, parts: &mut request::Parts, seen: Seen, target: &route::Target, ids: &Ids) {
        let headers = &mut parts.headers;
        if seen.has(Seen::COOKIE) && parts.version == Version::HTTP_2 {
            headers::join_cookies(headers);
        }
        let host = match &target.host {
            HostText::None => None,
            HostText::Field(value) => Some(value.clone()),
            HostText::Authority(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        };
        headers::strip_hop_by_hop(headers, seen);
        if let Some(host) = &host
            && (matches!(target.host, HostText::Authority(_)) || seen.has(Seen::CONNECTION))
        {
            headers.insert(HOST, host.clone());
        }
        headers::add(headers, seen, &self.conn, &Added { ids, via: &VIA, host: host.as_ref() });
    }
}
