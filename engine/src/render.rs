//! From state to routing: what the table says of a service. Pure; the table is derived, never saved.
//!
//! ```text
//!   no rollout:   serving ── weight 1
//!   rollout:      kept ── share before and after      old ── falling share, then standby
//!                 new ── rising share; weight 0 and not standby until the shift begins
//! ```

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use peregrine_routing as routing;
use routing::{
    Address, Generation, HealthCheck, HealthCheckKind, HoldSpec, HostPattern, PoolSpec, UpstreamSpec,
};

use crate::model::{
    BalanceSpec, CompressionSpec, FixedUpstream, ForwardAuthSpec, HashBy, HeaderEditsSpec, HealthKind,
    HealthSpec, Instance, InstanceState, Protocol, ProxyProtocol, RedirectSpec, Rollout, RulesSpec, Service,
    ServiceSpec, Workload,
};
use crate::state::State;
use crate::steps::drain_times;

/// Name of the pool of copies that a rollout has started.
pub(crate) const NEW_POOL: &str = "new";

/// A fixed upstream with the generation of its present stretch of service.
pub(crate) type FixedGeneration = (FixedUpstream, u64);

/// What the table is to say of a service; `None` if it is not to be in it.
pub(crate) fn render(
    state: &State,
    name: &str,
    fixed: &[FixedGeneration],
    ready: &HashMap<u64, u16>,
    hold: Option<HoldSpec>,
) -> Option<routing::ServiceSpec> {
    let service = state.services.get(name)?;
    let rollout = state.rollout_of(name);
    let leaving =
        rollout.is_some_and(|rollout| state.changes.get(&rollout.id).is_some_and(|c| c.after.is_none()));
    if service.spec.routes.is_empty() || (leaving && rollout.is_some_and(|r| r.weight_percent == 100)) {
        return None;
    }
    let name: Arc<str> = name.into();
    Some(routing::ServiceSpec {
        pools: pools(state, service, rollout, fixed, ready),
        routes: routes(&service.spec),
        balance: balance(&service.spec.traffic.balance),
        policy: policy(state, service, rollout, hold),
        name,
    })
}

fn routes(spec: &ServiceSpec) -> Vec<routing::RouteSpec> {
    let parsed = spec.routes.iter().filter_map(|route| {
        // Checked when the service was taken in; a record of an older version must not stop the others.
        let host = HostPattern::parse(&route.host).ok()?;
        Some(routing::RouteSpec { host, path_prefix: route.path.as_str().into() })
    });
    parsed.collect()
}

fn pools(
    state: &State,
    service: &Service,
    rollout: Option<&Rollout>,
    fixed: &[FixedGeneration],
    ready: &HashMap<u64, u16>,
) -> Vec<PoolSpec> {
    if matches!(service.spec.workload, Workload::Fixed { .. }) {
        return vec![fixed_pool(service, fixed)];
    }
    let protocol = protocol(service.spec.traffic.protocol);
    let present: Vec<&Instance> = state.instances_of(&service.spec.name).filter(|i| is_routed(i)).collect();
    let pool = |name: &str, weight: u32, standby: bool, members: Vec<&Instance>| PoolSpec {
        name: name.into(),
        weight,
        standby,
        upstreams: members.into_iter().filter_map(|i| upstream(i, protocol, ready)).collect(),
    };
    let Some(rollout) = rollout else {
        let (serving, standby) = at_rest(service, present);
        let mut pools = vec![pool("serving", 1, false, serving), pool("standby", 0, true, standby)];
        pools.retain(|pool| !pool.standby || !pool.upstreams.is_empty());
        return pools;
    };
    let plan = &rollout.plan;
    let is_new = |i: &Instance| plan.add.iter().any(|added| added.id == i.id);
    let (new, others): (Vec<&Instance>, Vec<&Instance>) = present.into_iter().partition(|i| is_new(i));
    let (old, kept): (Vec<&Instance>, Vec<&Instance>) =
        others.into_iter().partition(|i| plan.retire.contains(&i.id));
    let weights = Weights::of(rollout);
    // Falling back on the new copies before they have shown that they work would be no help.
    let pools = [
        pool("kept", weights.kept, false, kept),
        pool("old", weights.old, weights.old == 0, old),
        pool(NEW_POOL, weights.new, false, new),
    ];
    pools.into_iter().filter(|pool| !pool.upstreams.is_empty()).collect()
}

/// Who serves without a rollout, and who stands by. If there is one whose record cannot be read, nobody knows what share of the
/// traffic its copies had been given: they get none of it while a copy from before it serves.
fn at_rest<'a>(service: &Service, present: Vec<&'a Instance>) -> (Vec<&'a Instance>, Vec<&'a Instance>) {
    let is_new = |i: &&Instance| service.rollout.is_some() && i.epoch == service.epoch;
    let (serving, others): (Vec<&Instance>, Vec<&Instance>) =
        present.into_iter().partition(|i| i.state == InstanceState::Serving);
    let (new, old): (Vec<&Instance>, Vec<&Instance>) = serving.into_iter().partition(is_new);
    if !old.is_empty() {
        return (old, new);
    }
    let soaks = |i: &&Instance| service.rollout.is_some() && i.state == InstanceState::Soaking;
    (new, others.into_iter().filter(soaks).collect())
}

/// Exact shares at a percentage: the service's traffic is split as it was before (kept and old) for the one
/// part, and as it will be (kept and new) for the other.
struct Weights {
    kept: u32,
    old: u32,
    new: u32,
}

impl Weights {
    fn of(rollout: &Rollout) -> Self {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).min(1_000);
        let plan = &rollout.plan;
        let (kept, old, new) = (count(plan.keep.len()), count(plan.retire.len()), count(plan.add.len()));
        let percent = u32::from(rollout.weight_percent.min(100));
        let (before, after) = (kept + old, kept + new);
        if before == 0 {
            return Self { kept: 0, old: 0, new: percent };
        }
        if after == 0 {
            return Self { kept: 0, old: 100 - percent, new: 0 };
        }
        Self {
            kept: kept * ((100 - percent) * after + percent * before),
            old: (100 - percent) * old * after,
            new: percent * new * before,
        }
    }
}

fn is_routed(instance: &Instance) -> bool {
    let state =
        matches!(instance.state, InstanceState::Started | InstanceState::Serving | InstanceState::Soaking);
    state && instance.generation > 0 && instance.address.is_some()
}

/// A copy as edges know it.
pub(crate) fn copy(state: &State, instance: &Instance, generation: u64) -> Option<UpstreamSpec> {
    let service = state.services.get(&instance.service)?;
    let spec = upstream(instance, protocol(service.spec.traffic.protocol), &HashMap::new())?;
    Some(UpstreamSpec { generation: Generation(generation), ..spec })
}

fn upstream(
    instance: &Instance,
    protocol: routing::UpstreamProtocol,
    ready: &HashMap<u64, u16>,
) -> Option<UpstreamSpec> {
    Some(UpstreamSpec {
        generation: Generation(instance.generation),
        name: instance.id.as_str().into(),
        address: Address::Socket(instance.address?),
        protocol,
        weight: 1,
        ready_connections: ready.get(&instance.generation).copied().unwrap_or(0),
    })
}

fn fixed_pool(service: &Service, fixed: &[FixedGeneration]) -> PoolSpec {
    let member = |(upstream, generation): &FixedGeneration| {
        Some(UpstreamSpec {
            generation: Generation(*generation),
            name: upstream.address.as_str().into(),
            address: address(&upstream.address)?,
            protocol: protocol(service.spec.traffic.protocol),
            weight: upstream.weight.max(1),
            ready_connections: 0,
        })
    };
    PoolSpec {
        name: "serving".into(),
        weight: 1,
        standby: false,
        upstreams: fixed.iter().filter_map(member).collect(),
    }
}

/// Reads `10.0.0.5:8080`, `[::1]:80` or `backend.internal:8080`.
pub(crate) fn address(text: &str) -> Option<Address> {
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return (socket.port() != 0).then_some(Address::Socket(socket));
    }
    // What a host and a port are is the routing's to say; that the port is there is ours.
    let host = routing::canonical_host(text).ok()?;
    let port = text.rsplit_once(':')?.1.parse().ok()?;
    Some(Address::Name { host: host.as_ref().into(), port })
}

const fn protocol(protocol: Protocol) -> routing::UpstreamProtocol {
    match protocol {
        Protocol::Http1 => routing::UpstreamProtocol::Http1,
        Protocol::H2c => routing::UpstreamProtocol::H2c,
    }
}

const fn proxy_protocol(version: ProxyProtocol) -> routing::ProxyProtocol {
    match version {
        ProxyProtocol::V1 => routing::ProxyProtocol::V1,
        ProxyProtocol::V2 => routing::ProxyProtocol::V2,
    }
}

fn balance(balance: &BalanceSpec) -> routing::Balance {
    match balance {
        BalanceSpec::RoundRobin => routing::Balance::RoundRobin,
        BalanceSpec::LeastInFlight => routing::Balance::LeastInFlight,
        BalanceSpec::PeakEwma => routing::Balance::PeakEwma,
        BalanceSpec::ConsistentHash(by) => routing::Balance::ConsistentHash(match by {
            HashBy::Header(name) => routing::HashKey::Header(name.as_str().into()),
            HashBy::Cookie(name) => routing::HashKey::Cookie(name.as_str().into()),
            HashBy::ClientAddress => routing::HashKey::ClientAddress,
        }),
    }
}

fn policy(
    state: &State,
    service: &Service,
    rollout: Option<&Rollout>,
    hold: Option<HoldSpec>,
) -> routing::ServicePolicy {
    let traffic = &service.spec.traffic;
    // What leaves now leaves by the rollout that has it leave.
    let drain = rollout.map_or(&service.spec.move_settings.drain, |rollout| &rollout.plan.settings.drain);
    // While requests wait, nobody is given time to close a WebSocket at leisure.
    let close_spread_ms = if hold.is_some() { 0 } else { drain.websocket_spread_ms() };
    routing::ServicePolicy {
        connect_timeout_ms: traffic.connect_timeout_ms,
        response_head_timeout_ms: traffic.response_head_timeout_ms,
        body_idle_timeout_ms: traffic.body_idle_timeout_ms,
        tunnel_idle_timeout_ms: traffic.tunnel_idle_timeout_ms,
        websocket_close_spread_ms: close_spread_ms,
        hold: hold.map(Box::new),
        drain: drain_times(drain),
        max_request_body_bytes: traffic.max_request_body_bytes,
        slow_start_ms: traffic.slow_start_ms,
        preserve_host: traffic.preserve_host,
        send_proxy_protocol: traffic.send_proxy_protocol.map(proxy_protocol),
        sticky: traffic
            .sticky_cookie
            .as_ref()
            .map(|cookie| routing::Sticky { cookie: cookie.as_str().into() }),
        health: health(state, service, rollout),
        rules: rules(&traffic.rules).map(Box::new),
        ..routing::ServicePolicy::default()
    }
}

/// Rules, if there are any. Networks were checked when the service was put; a record whose networks cannot be read lets
/// nobody in rather than everybody.
fn rules(spec: &RulesSpec) -> Option<routing::Rules> {
    if *spec == RulesSpec::default() {
        return None;
    }
    let RulesSpec {
        allow,
        deny,
        max_in_flight,
        rate_limit,
        headers,
        redirects,
        rewrite,
        basic_auth,
        forward_auth,
        compression,
        error_pages: _,
    } = spec;
    let nets =
        |texts: &[String]| texts.iter().map(|text| text.parse()).collect::<Result<Vec<routing::IpNet>, _>>();
    let everybody = || ["0.0.0.0/0", "::/0"].iter().filter_map(|text| text.parse().ok()).collect();
    let (allow, deny) = match (nets(allow), nets(deny)) {
        (Ok(allow), Ok(deny)) => (allow, deny),
        _ => (Vec::new(), everybody()),
    };
    let rate = rate_limit.as_ref().map(|limit| routing::RateLimit {
        requests: limit.requests,
        per_ms: limit.per_ms,
        burst: limit.burst,
        by: match &limit.by {
            HashBy::ClientAddress => routing::RateKey::ClientAddress,
            HashBy::Header(name) => routing::RateKey::Header(name.to_ascii_lowercase().into()),
            HashBy::Cookie(name) => routing::RateKey::Cookie(name.as_str().into()),
        },
    });
    Some(routing::Rules {
        allow,
        deny,
        max_in_flight: *max_in_flight,
        rate,
        request_headers: edits(&headers.request),
        response_headers: edits(&headers.response),
        redirects: redirects.iter().map(RedirectSpec::rendered).collect(),
        rewrite: rewrite.as_ref().map(|rewrite| routing::Rewrite {
            strip_prefix: rewrite.strip_prefix.as_deref().map(Into::into),
            add_prefix: rewrite.add_prefix.as_deref().map(Into::into),
        }),
        basic_auth: basic_auth.as_ref().map(|auth| routing::BasicAuth {
            realm: auth.realm.as_str().into(),
            users: auth
                .users
                .iter()
                .map(|(name, hash)| (name.as_str().into(), hash.as_str().into()))
                .collect(),
            forward: auth.forward,
        }),
        forward_auth: forward_auth.as_ref().map(ForwardAuthSpec::rendered),
        compression: compression.as_ref().map(CompressionSpec::rendered),
        error_pages: spec.rendered_error_pages(),
    })
}

fn edits(spec: &HeaderEditsSpec) -> routing::HeaderEdits {
    let lower = |name: &String| name.to_ascii_lowercase().into();
    let pairs = |fields: &BTreeMap<String, String>| {
        fields.iter().map(|(name, value)| (lower(name), value.as_str().into())).collect()
    };
    routing::HeaderEdits {
        remove: spec.remove.iter().map(lower).collect(),
        set: pairs(&spec.set),
        add: pairs(&spec.add),
    }
}

/// The edge's probe. While two versions with different probes stand side by side, the probe of the one says
/// nothing about the other: then it is a connection, and the rollout probes each version in its own way.
fn health(state: &State, service: &Service, rollout: Option<&Rollout>) -> Option<HealthCheck> {
    let own = &service.spec.health;
    let of = |number: u32| state.version(&service.spec.name, number).map(|version| &version.health);
    let differ = rollout.is_some_and(|rollout| {
        let after = of(rollout.plan.to_version);
        let before = rollout.plan.from_version.and_then(of);
        before.is_some() && after != before
    });
    let first_deploy = rollout.filter(|r| r.plan.from_version.is_none()).map(|r| r.plan.to_version);
    let own = first_deploy.and_then(of).unwrap_or(own);
    let kind = match &own.kind {
        HealthKind::None => return None,
        HealthKind::Tcp => HealthCheckKind::Tcp,
        HealthKind::Http { .. } if differ => HealthCheckKind::Tcp,
        HealthKind::Http { path } => HealthCheckKind::Http {
            path: path.as_str().into(),
            host: probe_host(&service.spec).map(Into::into),
        },
    };
    Some(check(kind, own))
}

const fn check(kind: HealthCheckKind, spec: &HealthSpec) -> HealthCheck {
    HealthCheck {
        kind,
        interval_ms: spec.interval_ms,
        timeout_ms: spec.timeout_ms,
        healthy_threshold: spec.healthy,
        unhealthy_threshold: spec.unhealthy,
    }
}

/// The host that probes ask for: the first exact one. A wildcard names no host.
pub(crate) fn probe_host(spec: &ServiceSpec) -> Option<String> {
    spec.routes.iter().map(|route| &route.host).find(|host| !host.contains('*')).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_cannot_be_read_let_nobody_in() {
        let client = "192.0.2.1".parse().expect("address");
        let of = |allow: &[&str], deny: &[&str]| {
            let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
            rules(&RulesSpec { allow: texts(allow), deny: texts(deny), ..RulesSpec::default() })
        };
        assert_eq!(of(&[], &[]), None);
        assert!(of(&["192.0.2.0/24"], &[]).expect("rules").admits(client));
        assert!(!of(&[], &["192.0.2.0/24"]).expect("rules").admits(client));
        for (allow, deny) in [(&["192.0.2.0/24", "rubbish"][..], &[][..]), (&[][..], &["rubbish"][..])] {
            assert!(!of(allow, deny).expect("rules").admits(client));
        }
    }

    #[test]
    fn an_upstream_is_an_address_or_a_name_with_a_port() {
        for text in ["10.0.0.5:8080", "[::1]:80", "[fe80::1%2]:80"] {
            assert_eq!(address(text), Some(Address::Socket(text.parse().expect("a socket"))), "{text}");
        }
        for (text, host, port) in
            [("backend.internal:8080", "backend.internal", 8080), ("Back_End.:1", "back_end", 1)]
        {
            assert_eq!(address(text), Some(Address::Name { host: host.into(), port }), "{text}");
        }
    }

    #[test]
    fn an_upstream_without_a_port_of_digits_is_refused() {
        for text in [
            "a:+80",
            "a:-80",
            "a: 80",
            "a:0",
            "a:65536",
            "a:",
            "a",
            "10.0.0.5:+80",
            "10.0.0.5:0",
            "10.0.0.5",
            "[::1]:+80",
            "[::1]",
            "::1:80",
            "a:80:80",
            "a b:80",
            "user@a:80",
            "http://a:80",
            ":80",
            "",
        ] {
            assert_eq!(address(text), None, "{text:?}");
        }
    }
}
