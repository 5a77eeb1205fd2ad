//! The table as it travels and as it lies on an edge's disk. `routing` knows no format, so each of its types has its
//! twin here; a field that is added there does not compile until it is added here.

use std::net::SocketAddr;

use peregrine_routing as routing;
use routing::{
    Address, Balance, Change, DrainTime, HealthCheckKind, HostPattern, PerClass, TrafficClass,
    UpstreamProtocol,
};
use serde::{Deserialize, Serialize};

use super::domain::{self, WireChallenge, WireChallengeId, WireDomain};
use super::hold::WireHold;
use super::mirror::WireMirror;
use super::rules::WireRules;

/// One [`Change`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WireChange {
    /// A service as it is to be.
    Put(Box<WireService>),
    /// A service goes away.
    Remove(String),
    /// A domain as it is to be.
    PutDomain(Box<WireDomain>),
    /// A domain goes away.
    RemoveDomain(String),
    /// A validation to answer.
    PutChallenge(WireChallenge),
    /// A validation is over.
    RemoveChallenge(WireChallengeId),
}

/// A [`routing::ServiceSpec`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireService {
    name: String,
    routes: Vec<(String, String)>,
    pools: Vec<Pool>,
    balance: WireBalance,
    policy: Policy,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Pool {
    name: String,
    weight: u32,
    standby: bool,
    upstreams: Vec<Upstream>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Upstream {
    generation: u64,
    name: String,
    address: WireAddress,
    http2: bool,
    weight: u32,
    ready_connections: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum WireAddress {
    Socket(SocketAddr),
    Name(String, u16),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum WireBalance {
    RoundRobin,
    LeastInFlight,
    PeakEwma,
    HashHeader(String),
    HashCookie(String),
    HashClient,
}

/// A [`routing::ServiceSpec`] as it is kept on the disk: without what is for now only, a hold and a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptService {
    name: String,
    routes: Vec<(String, String)>,
    pools: Vec<Pool>,
    balance: WireBalance,
    policy: KeptPolicy,
    /// Written behind the services, see `saved`.
    #[serde(skip)]
    pub(crate) rules: Option<WireRules>,
    /// So is this.
    #[serde(skip)]
    pub(crate) send_proxy_protocol: Option<WireProxyProtocol>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptPolicy {
    lasting: Lasting,
    /// Nothing is written here. What was is read, and not used.
    mirror: Option<WireMirror>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Policy {
    lasting: Lasting,
    hold: Option<WireHold>,
    mirror: Option<WireMirror>,
    rules: Option<WireRules>,
    send_proxy_protocol: Option<WireProxyProtocol>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WireProxyProtocol {
    V1,
    V2,
}

/// What of a policy is also kept on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Lasting {
    connect_timeout_ms: u32,
    response_head_timeout_ms: u32,
    body_idle_timeout_ms: u32,
    tunnel_idle_timeout_ms: u32,
    websocket_close_spread_ms: u32,
    /// Close and cut of each class, in the order of the classes.
    drain: [(u64, u64); TrafficClass::COUNT],
    max_request_body_bytes: u64,
    max_idle_connections_per_upstream: u32,
    upstream_idle_timeout_ms: u32,
    health: Option<Health>,
    passive: (u32, u32, u32),
    slow_start_ms: u32,
    sticky_cookie: Option<String>,
    preserve_host: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Health {
    /// Path and host; `None` is a connection that opens.
    http: Option<(String, Option<String>)>,
    interval_ms: u32,
    timeout_ms: u32,
    healthy_threshold: u32,
    unhealthy_threshold: u32,
}

/// What came is no table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{of}: {host:?} is no host: {why}")]
pub struct BadHost {
    /// "service NAME" or "domain".
    of: String,
    host: String,
    why: routing::HostError,
}

impl BadHost {
    pub(super) fn of_domain(host: String, why: routing::HostError) -> Self {
        Self { of: "domain".into(), host, why }
    }
}

impl WireChange {
    /// As it is sent, where the clock shows `now_ms`: no moment of that clock is in it any more.
    #[must_use]
    pub fn departs(mut self, now_ms: u64) -> Self {
        self.hold_mut().into_iter().for_each(|hold| hold.departs(now_ms));
        self
    }

    /// As it is meant where the clock shows `now_ms`.
    #[must_use]
    pub fn arrives(mut self, now_ms: u64) -> Self {
        self.hold_mut().into_iter().for_each(|hold| hold.arrives(now_ms));
        self
    }

    fn hold_mut(&mut self) -> Option<&mut WireHold> {
        match self {
            Self::Put(service) => service.policy.hold.as_mut(),
            _ => None,
        }
    }
}

impl From<&Change> for WireChange {
    fn from(change: &Change) -> Self {
        match change {
            Change::Put(spec) => Self::Put(Box::new(spec.into())),
            Change::Remove(name) => Self::Remove(name.to_string()),
            Change::PutDomain(spec) => Self::PutDomain(Box::new(spec.into())),
            Change::RemoveDomain(name) => Self::RemoveDomain(name.to_string()),
            Change::PutChallenge(spec) => Self::PutChallenge(spec.into()),
            Change::RemoveChallenge(id) => Self::RemoveChallenge(id.into()),
        }
    }
}

impl TryFrom<WireChange> for Change {
    type Error = BadHost;

    fn try_from(change: WireChange) -> Result<Self, BadHost> {
        Ok(match change {
            WireChange::Put(service) => Self::Put((*service).try_into()?),
            WireChange::Remove(name) => Self::Remove(name.into()),
            WireChange::PutDomain(domain) => Self::PutDomain((*domain).try_into()?),
            WireChange::RemoveDomain(name) => Self::RemoveDomain(domain::pattern(name)?),
            WireChange::PutChallenge(challenge) => Self::PutChallenge(challenge.into()),
            WireChange::RemoveChallenge(id) => Self::RemoveChallenge(id.into()),
        })
    }
}

impl From<&routing::ServiceSpec> for WireService {
    fn from(spec: &routing::ServiceSpec) -> Self {
        let routing::ServiceSpec { name, routes, pools, balance, policy } = spec;
        Self {
            name: name.to_string(),
            routes: routes.iter().map(|r| (r.host.to_string(), r.path_prefix.to_string())).collect(),
            pools: pools.iter().map(Pool::from).collect(),
            balance: balance.into(),
            policy: policy.into(),
        }
    }
}

impl TryFrom<WireService> for routing::ServiceSpec {
    type Error = BadHost;

    fn try_from(service: WireService) -> Result<Self, BadHost> {
        let WireService { name, routes, pools, balance, policy } = service;
        let route = |(host, path): (String, String)| match HostPattern::parse(&host) {
            Ok(host) => Ok(routing::RouteSpec { host, path_prefix: path.into() }),
            Err(why) => Err(BadHost { of: format!("service {name}"), host, why }),
        };
        Ok(Self {
            routes: routes.into_iter().map(route).collect::<Result<_, _>>()?,
            pools: pools.into_iter().map(Into::into).collect(),
            balance: balance.into(),
            policy: policy.into(),
            name: name.into(),
        })
    }
}

impl From<&routing::ServiceSpec> for KeptService {
    fn from(spec: &routing::ServiceSpec) -> Self {
        let WireService { name, routes, pools, balance, policy } = spec.into();
        let Policy { lasting, hold: _, mirror: _, rules, send_proxy_protocol } = policy;
        let policy = KeptPolicy { lasting, mirror: None };
        Self { name, routes, pools, balance, policy, rules, send_proxy_protocol }
    }
}

impl TryFrom<KeptService> for routing::ServiceSpec {
    type Error = BadHost;

    fn try_from(service: KeptService) -> Result<Self, BadHost> {
        let KeptService { name, routes, pools, balance, policy, rules, send_proxy_protocol } = service;
        let policy = Policy { lasting: policy.lasting, hold: None, mirror: None, rules, send_proxy_protocol };
        WireService { name, routes, pools, balance, policy }.try_into()
    }
}

impl From<&routing::PoolSpec> for Pool {
    fn from(spec: &routing::PoolSpec) -> Self {
        let routing::PoolSpec { name, weight, standby, upstreams } = spec;
        Self {
            name: name.to_string(),
            weight: *weight,
            standby: *standby,
            upstreams: upstreams.iter().map(Upstream::from).collect(),
        }
    }
}

impl From<Pool> for routing::PoolSpec {
    fn from(pool: Pool) -> Self {
        let Pool { name, weight, standby, upstreams } = pool;
        Self {
            name: name.into(),
            weight,
            standby,
            upstreams: upstreams.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<&routing::UpstreamSpec> for Upstream {
    fn from(spec: &routing::UpstreamSpec) -> Self {
        let routing::UpstreamSpec { generation, name, address, protocol, weight, ready_connections } = spec;
        Self {
            generation: generation.0,
            name: name.to_string(),
            address: match address {
                Address::Socket(socket) => WireAddress::Socket(*socket),
                Address::Name { host, port } => WireAddress::Name(host.to_string(), *port),
            },
            http2: match protocol {
                UpstreamProtocol::Http1 => false,
                UpstreamProtocol::H2c => true,
            },
            weight: *weight,
            ready_connections: *ready_connections,
        }
    }
}

impl From<Upstream> for routing::UpstreamSpec {
    fn from(upstream: Upstream) -> Self {
        let Upstream { generation, name, address, http2, weight, ready_connections } = upstream;
        Self {
            generation: routing::Generation(generation),
            name: name.into(),
            address: match address {
                WireAddress::Socket(socket) => Address::Socket(socket),
                WireAddress::Name(host, port) => Address::Name { host: host.into(), port },
            },
            protocol: if http2 { UpstreamProtocol::H2c } else { UpstreamProtocol::Http1 },
            weight,
            ready_connections,
        }
    }
}

impl From<&Balance> for WireBalance {
    fn from(balance: &Balance) -> Self {
        match balance {
            Balance::RoundRobin => Self::RoundRobin,
            Balance::LeastInFlight => Self::LeastInFlight,
            Balance::PeakEwma => Self::PeakEwma,
            Balance::ConsistentHash(routing::HashKey::Header(name)) => Self::HashHeader(name.to_string()),
            Balance::ConsistentHash(routing::HashKey::Cookie(name)) => Self::HashCookie(name.to_string()),
            Balance::ConsistentHash(routing::HashKey::ClientAddress) => Self::HashClient,
        }
    }
}

impl From<WireBalance> for Balance {
    fn from(balance: WireBalance) -> Self {
        use routing::HashKey;
        match balance {
            WireBalance::RoundRobin => Self::RoundRobin,
            WireBalance::LeastInFlight => Self::LeastInFlight,
            WireBalance::PeakEwma => Self::PeakEwma,
            WireBalance::HashHeader(name) => Self::ConsistentHash(HashKey::Header(name.into())),
            WireBalance::HashCookie(name) => Self::ConsistentHash(HashKey::Cookie(name.into())),
            WireBalance::HashClient => Self::ConsistentHash(HashKey::ClientAddress),
        }
    }
}

impl From<&routing::ServicePolicy> for Policy {
    fn from(policy: &routing::ServicePolicy) -> Self {
        let routing::ServicePolicy {
            connect_timeout_ms,
            response_head_timeout_ms,
            body_idle_timeout_ms,
            tunnel_idle_timeout_ms,
            websocket_close_spread_ms,
            drain,
            max_request_body_bytes,
            max_idle_connections_per_upstream,
            upstream_idle_timeout_ms,
            health,
            passive,
            slow_start_ms,
            sticky,
            preserve_host,
            send_proxy_protocol,
            hold,
            mirror,
            rules,
        } = policy;
        let lasting = Lasting {
            connect_timeout_ms: *connect_timeout_ms,
            response_head_timeout_ms: *response_head_timeout_ms,
            body_idle_timeout_ms: *body_idle_timeout_ms,
            tunnel_idle_timeout_ms: *tunnel_idle_timeout_ms,
            websocket_close_spread_ms: *websocket_close_spread_ms,
            drain: drain.0.map(|time| (time.close_ms, time.cut_ms)),
            max_request_body_bytes: *max_request_body_bytes,
            max_idle_connections_per_upstream: *max_idle_connections_per_upstream,
            upstream_idle_timeout_ms: *upstream_idle_timeout_ms,
            health: health.as_ref().map(Health::from),
            passive: (passive.consecutive_failures, passive.base_ejection_ms, passive.max_ejection_ms),
            slow_start_ms: *slow_start_ms,
            sticky_cookie: sticky.as_ref().map(|sticky| sticky.cookie.to_string()),
            preserve_host: *preserve_host,
        };
        let (hold, mirror) = (hold.as_deref().map(WireHold::from), mirror.as_deref().map(WireMirror::from));
        Self {
            lasting,
            hold,
            mirror,
            rules: rules.as_deref().map(WireRules::from),
            send_proxy_protocol: send_proxy_protocol.map(WireProxyProtocol::from),
        }
    }
}

impl From<Policy> for routing::ServicePolicy {
    fn from(policy: Policy) -> Self {
        let Policy { lasting, hold, mirror, rules, send_proxy_protocol } = policy;
        let (consecutive_failures, base_ejection_ms, max_ejection_ms) = lasting.passive;
        Self {
            connect_timeout_ms: lasting.connect_timeout_ms,
            response_head_timeout_ms: lasting.response_head_timeout_ms,
            body_idle_timeout_ms: lasting.body_idle_timeout_ms,
            tunnel_idle_timeout_ms: lasting.tunnel_idle_timeout_ms,
            websocket_close_spread_ms: lasting.websocket_close_spread_ms,
            drain: PerClass(lasting.drain.map(|(close_ms, cut_ms)| DrainTime { close_ms, cut_ms })),
            max_request_body_bytes: lasting.max_request_body_bytes,
            max_idle_connections_per_upstream: lasting.max_idle_connections_per_upstream,
            upstream_idle_timeout_ms: lasting.upstream_idle_timeout_ms,
            health: lasting.health.map(Into::into),
            passive: routing::Passive { consecutive_failures, base_ejection_ms, max_ejection_ms },
            slow_start_ms: lasting.slow_start_ms,
            sticky: lasting.sticky_cookie.map(|cookie| routing::Sticky { cookie: cookie.into() }),
            preserve_host: lasting.preserve_host,
            send_proxy_protocol: send_proxy_protocol.map(Into::into),
            hold: hold.map(|hold| Box::new(hold.into())),
            mirror: mirror.map(|mirror| Box::new(mirror.into())),
            rules: rules.map(|rules| Box::new(rules.into())),
        }
    }
}

impl From<routing::ProxyProtocol> for WireProxyProtocol {
    fn from(version: routing::ProxyProtocol) -> Self {
        match version {
            routing::ProxyProtocol::V1 => Self::V1,
            routing::ProxyProtocol::V2 => Self::V2,
        }
    }
}

impl From<WireProxyProtocol> for routing::ProxyProtocol {
    fn from(version: WireProxyProtocol) -> Self {
        match version {
            WireProxyProtocol::V1 => Self::V1,
            WireProxyProtocol::V2 => Self::V2,
        }
    }
}

impl From<&routing::HealthCheck> for Health {
    fn from(check: &routing::HealthCheck) -> Self {
        let routing::HealthCheck { kind, interval_ms, timeout_ms, healthy_threshold, unhealthy_threshold } =
            check;
        Self {
            http: match kind {
                HealthCheckKind::Http { path, host } => {
                    Some((path.to_string(), host.as_ref().map(ToString::to_string)))
                }
                HealthCheckKind::Tcp => None,
            },
            interval_ms: *interval_ms,
            timeout_ms: *timeout_ms,
            healthy_threshold: *healthy_threshold,
            unhealthy_threshold: *unhealthy_threshold,
        }
    }
}

impl From<Health> for routing::HealthCheck {
    fn from(health: Health) -> Self {
        Self {
            kind: health.http.map_or(HealthCheckKind::Tcp, |(path, host)| HealthCheckKind::Http {
                path: path.into(),
                host: host.map(Into::into),
            }),
            interval_ms: health.interval_ms,
            timeout_ms: health.timeout_ms,
            healthy_threshold: health.healthy_threshold,
            unhealthy_threshold: health.unhealthy_threshold,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use routing::{Generation, HashKey, PoolSpec, RouteSpec, ServicePolicy, ServiceSpec, UpstreamSpec};

    use super::*;

    pub(crate) fn upstream(generation: u64, address: Address) -> UpstreamSpec {
        UpstreamSpec {
            generation: Generation(generation),
            name: format!("copy-{generation}").into(),
            address,
            protocol: UpstreamProtocol::Http1,
            weight: 3,
            ready_connections: 2,
        }
    }

    pub(crate) fn service(name: &str, balance: Balance, policy: ServicePolicy) -> ServiceSpec {
        let socket = Address::Socket(([127, 0, 0, 1], 80).into());
        let named = Address::Name { host: "shop.internal".into(), port: 8080 };
        let old = vec![upstream(1, socket)];
        let new = vec![UpstreamSpec { protocol: UpstreamProtocol::H2c, ..upstream(2, named) }];
        let route = |host: &str, path: &str| RouteSpec {
            host: HostPattern::parse(host).expect("a host"),
            path_prefix: path.into(),
        };
        ServiceSpec {
            name: name.into(),
            routes: vec![route("shop.test", "/"), route("*.shop.test", "/a"), route("*", "/")],
            pools: vec![
                PoolSpec { name: "old".into(), weight: 90, standby: true, upstreams: old },
                PoolSpec { name: "new".into(), weight: 10, standby: false, upstreams: new },
            ],
            balance,
            policy,
        }
    }

    #[test]
    fn every_form_of_a_service_arrives_as_it_was_sent() {
        let balances = [
            Balance::RoundRobin,
            Balance::LeastInFlight,
            Balance::PeakEwma,
            Balance::ConsistentHash(HashKey::Header("x".into())),
            Balance::ConsistentHash(HashKey::Cookie("y".into())),
            Balance::ConsistentHash(HashKey::ClientAddress),
        ];
        let check = |kind| routing::HealthCheck {
            kind,
            interval_ms: 1,
            timeout_ms: 2,
            healthy_threshold: 3,
            unhealthy_threshold: 4,
        };
        let http = |host: Option<&str>| HealthCheckKind::Http {
            path: "/healthz".into(),
            host: host.map(Into::into),
        };
        let checks =
            [None, Some(check(HealthCheckKind::Tcp)), Some(check(http(None))), Some(check(http(Some("h"))))];
        let versions = [None, Some(routing::ProxyProtocol::V1), Some(routing::ProxyProtocol::V2)];
        let mut version = versions.into_iter().cycle();
        for (balance, health) in balances.into_iter().flat_map(|b| checks.clone().map(|c| (b.clone(), c))) {
            let policy = ServicePolicy {
                health,
                send_proxy_protocol: version.next().flatten(),
                sticky: Some(routing::Sticky { cookie: "c".into() }),
                preserve_host: false,
                mirror: Some(Box::new(super::super::mirror::tests::spec())),
                rules: Some(Box::new(super::super::rules::tests::rules(routing::RateKey::ClientAddress))),
                slow_start_ms: 9,
                max_request_body_bytes: 1 << 40,
                ..ServicePolicy::default()
            };
            for change in [Change::Put(service("shop", balance, policy)), Change::Remove("shop".into())] {
                let bytes = postcard::to_stdvec(&WireChange::from(&change)).expect("bytes");
                let back: WireChange = postcard::from_bytes(&bytes).expect("a change");
                assert_eq!(Change::try_from(back), Ok(change));
            }
        }
    }

    #[test]
    fn a_hold_arrives_with_the_time_that_it_still_lasts() {
        let hold = routing::HoldSpec {
            id: 7,
            until_ms: 10_500,
            max_requests: 1,
            max_bytes: 2,
            max_age_ms: 3,
            release_per_s: 4,
        };
        let policy = ServicePolicy { hold: Some(Box::new(hold.clone())), ..ServicePolicy::default() };
        let change = Change::Put(service("shop", Balance::RoundRobin, policy));
        let arrived = |sent_ms: u64| {
            let change = Change::try_from(WireChange::from(&change).departs(sent_ms).arrives(77_000));
            let Ok(Change::Put(service)) = change else { panic!("a service") };
            *service.policy.hold.expect("a hold")
        };
        assert_eq!(arrived(10_000), routing::HoldSpec { until_ms: 77_500, ..hold });
        assert_eq!(arrived(20_000).until_ms, 77_000, "it is over");
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            if let Ok(change) = postcard::from_bytes::<WireChange>(&bytes) {
                drop(Change::try_from(change));
            }
        }
    }
}
