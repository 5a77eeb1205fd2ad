//! What the engine says of a service: plain data, the only thing that goes down to an edge.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::balance::Balance;
use crate::class::PerClass;
use crate::domain::{ChallengeId, ChallengeSpec, DomainSpec};
use crate::drain::DrainTime;
use crate::hold::HoldSpec;
use crate::host::HostPattern;
use crate::mirror::MirrorSpec;
use crate::rules::Rules;
use crate::upstream::Generation;

/// One change of the table. A change is whole for its service or domain: it says all of the service's routes and
/// pools, and leaves every other service untouched.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "changes are rare, short-lived, and hardly ever removals")]
pub enum Change {
    /// Adds a service or replaces the one of the same name. Upstreams whose generation is kept keep
    /// their live state; those that are not named any more are retired.
    Put(ServiceSpec),
    /// Takes a service away with its routes; its upstreams are retired. Unknown names are ignored.
    Remove(Arc<str>),
    /// Adds a domain or replaces the one of the same name.
    PutDomain(DomainSpec),
    /// Takes a domain away. Unknown names are ignored.
    RemoveDomain(HostPattern),
    /// Answers a validation from now on.
    PutChallenge(ChallengeSpec),
    /// Answers it no longer. Unknown ones are ignored.
    RemoveChallenge(ChallengeId),
}

impl Change {
    /// The service that it is about, if it is about one.
    #[must_use]
    pub const fn service(&self) -> Option<&Arc<str>> {
        match self {
            Self::Put(spec) => Some(&spec.name),
            Self::Remove(name) => Some(name),
            Self::PutDomain(_) | Self::RemoveDomain(_) | Self::PutChallenge(_) | Self::RemoveChallenge(_) => {
                None
            }
        }
    }

    /// What it puts in a service's place, if it does.
    #[must_use]
    pub const fn put(&self) -> Option<&ServiceSpec> {
        match self {
            Self::Put(spec) => Some(spec),
            _ => None,
        }
    }
}

/// A service: where its requests come from and where they go.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceSpec {
    /// Unique name.
    pub name: Arc<str>,
    /// Hosts and path prefixes. Two services may not claim the same pair.
    pub routes: Vec<RouteSpec>,
    /// Weighted pools. Requests are split exactly by weight over the pools, then balanced inside one.
    pub pools: Vec<PoolSpec>,
    /// How an upstream is chosen inside a pool.
    pub balance: Balance,
    /// Time-outs, probes and the rest of what an edge has to know.
    pub policy: ServicePolicy,
}

/// One way in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSpec {
    /// Exact host, `*.` wildcard or `*`.
    pub host: HostPattern,
    /// Prefix of the path on segment borders; `/` is everything.
    pub path_prefix: Arc<str>,
}

/// A set of upstreams that share one weight: "the old copies", "the new copies".
#[derive(Clone, Debug, PartialEq)]
pub struct PoolSpec {
    /// Name for people and metrics.
    pub name: Arc<str>,
    /// Share of the service's requests, relative to the other pools; 0 takes none, unless it is standby.
    pub weight: u32,
    /// A pool of weight 0 that takes over when no weighted pool has a usable upstream. A pool that is
    /// still warming is not standby: it has not shown that it works.
    pub standby: bool,
    /// Its members.
    pub upstreams: Vec<UpstreamSpec>,
}

/// One upstream, in one stretch of service.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamSpec {
    /// Identity of this stretch of service; never used again once retired. The same generation is the same
    /// name, address and protocol; its weight and its ready connections may change.
    pub generation: Generation,
    /// Stable name of the copy (instance id, or its address): key of sticky cookies and hashing.
    pub name: Arc<str>,
    /// Where it listens.
    pub address: Address,
    /// What it speaks.
    pub protocol: UpstreamProtocol,
    /// Relative capacity inside its pool, at least 1.
    pub weight: u32,
    /// Connections that each core of an edge opens ahead of the first request, so that this one waits for no
    /// handshake; 0 is none. Asked for again with each publication that says so, never in between.
    pub ready_connections: u16,
}

/// Where an upstream listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// An address that needs no look-up.
    Socket(SocketAddr),
    /// A DNS name and a port; the edge resolves it, again and again.
    Name {
        /// Host name.
        host: Arc<str>,
        /// TCP port.
        port: u16,
    },
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(socket) => write!(f, "{socket}"),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// The protocol spoken to an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UpstreamProtocol {
    /// HTTP/1.1 on clear text.
    #[default]
    Http1,
    /// HTTP/2 with prior knowledge on clear text (RFC 9113 §3.3).
    H2c,
}

/// Versions of the PROXY protocol (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProxyProtocol {
    /// A line of text (§2.1).
    V1,
    /// Bytes (§2.2).
    V2,
}

/// What an edge has to know of a service besides routes and upstreams.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePolicy {
    /// Longest time for a TCP connection to an upstream.
    pub connect_timeout_ms: u32,
    /// Longest time from the end of the request to the head of the answer.
    pub response_head_timeout_ms: u32,
    /// Longest time without a byte in either body.
    pub body_idle_timeout_ms: u32,
    /// Longest time without a byte in an upgraded connection.
    pub tunnel_idle_timeout_ms: u32,
    /// Time over which an edge spreads the closing of WebSockets whose upstream leaves, so that their clients
    /// do not all come back at once; 0 is none.
    pub websocket_close_spread_ms: u32,
    /// How long each class of traffic may stay with an upstream that leaves. An edge whose engine is in the same process is
    /// told by it; one in a process of its own goes by this.
    pub drain: PerClass<DrainTime>,
    /// Largest request body; 0 is no limit.
    pub max_request_body_bytes: u64,
    /// Idle connections that one core keeps to one upstream.
    pub max_idle_connections_per_upstream: u32,
    /// How long an idle connection is kept.
    pub upstream_idle_timeout_ms: u32,
    /// Active probes; `None` trusts passive observation alone.
    pub health: Option<HealthCheck>,
    /// Passive ejection.
    pub passive: Passive,
    /// A newly healthy upstream gets its share over this time; 0 is at once.
    pub slow_start_ms: u32,
    /// Sticky sessions by cookie: a preference, never a pin.
    pub sticky: Option<Sticky>,
    /// Sends the client's `Host` on (true) or the upstream's own address (false).
    pub preserve_host: bool,
    /// Connections to HTTP/1.1 upstreams begin with a header that says for whom they are, and serve nobody else. One of
    /// [`UpstreamProtocol::H2c`] serves many clients and gets none: whoever writes the table does not ask for both.
    pub send_proxy_protocol: Option<ProxyProtocol>,
    /// Requests wait at the edge instead of going on.
    pub hold: Option<Box<HoldSpec>>,
    /// Copies of safe requests for upstreams that serve nobody yet.
    pub mirror: Option<Box<MirrorSpec>>,
    /// What requests have to pass; `None` lets all of them on.
    pub rules: Option<Box<Rules>>,
}

impl Default for ServicePolicy {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 3_000,         // two SYN retransmissions on a healthy network
            response_head_timeout_ms: 60_000,  // what nginx and HAProxy guides use; slow reports still pass
            body_idle_timeout_ms: 60_000,      // progress, not duration: a long download is fine
            tunnel_idle_timeout_ms: 3_600_000, // an hour: WebSocket libraries ping far more often
            websocket_close_spread_ms: 5_000,  // a thousand clients come back at 200 a second
            drain: PerClass::default(),
            max_request_body_bytes: 0, // streaming costs no memory, so no limit unless asked for
            max_idle_connections_per_upstream: 256,
            upstream_idle_timeout_ms: 4_000, // below the 5 s after which Node.js closes idle connections
            health: None,
            passive: Passive::default(),
            slow_start_ms: 0,
            sticky: None,
            preserve_host: true,
            send_proxy_protocol: None,
            hold: None,
            mirror: None,
            rules: None,
        }
    }
}

/// An active probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked.
    pub kind: HealthCheckKind,
    /// Time between two probes.
    pub interval_ms: u32,
    /// Longest time for one probe.
    pub timeout_ms: u32,
    /// Successes in a row that make an upstream healthy.
    pub healthy_threshold: u32,
    /// Failures in a row that make it unhealthy.
    pub unhealthy_threshold: u32,
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthCheckKind {
    /// `GET path` with this `Host`; any 2xx or 3xx is good.
    Http {
        /// Path and query.
        path: Arc<str>,
        /// `Host` header; the upstream's address if `None`.
        host: Option<Arc<str>>,
    },
    /// A TCP connection that opens.
    Tcp,
}

/// Passive ejection: what real requests tell of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passive {
    /// Failures in a row (connect, reset, time-out, 502/503/504) after which the upstream is ejected; 0 is never.
    pub consecutive_failures: u32,
    /// First ejection; each further one is longer by this much.
    pub base_ejection_ms: u32,
    /// Longest ejection.
    pub max_ejection_ms: u32,
}

impl Default for Passive {
    fn default() -> Self {
        Self { consecutive_failures: 5, base_ejection_ms: 5_000, max_ejection_ms: 60_000 }
    }
}

/// Sticky sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sticky {
    /// Name of the cookie.
    pub cookie: Arc<str>,
}
