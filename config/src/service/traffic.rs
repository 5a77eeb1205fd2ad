//! What the edge has to know of a service, and when a copy is healthy.

use peregrine_engine::model::{
    BalanceSpec, HashBy, HealthKind, HealthSpec, Protocol, ProxyProtocol, TrafficPolicy,
};

use super::rules::rules;
use super::workload::unlimited;
use crate::names;
use crate::raw::{Fields, Node};

const SECOND_MS: u64 = 1_000;
const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

pub(super) fn traffic(fields: &mut Fields<'_>) -> TrafficPolicy {
    const MAX_BODY_BYTES: u64 = 1 << 50;
    let mut policy = TrafficPolicy::default();
    fields.set("protocol", &mut policy.protocol, |node| {
        node.word(&[("http1", Protocol::Http1), ("h2c", Protocol::H2c)])
    });
    fields.set("balance", &mut policy.balance, balance);
    fields.set("sticky_cookie", &mut policy.sticky_cookie, |node| names::token(node, "shop_copy").map(Some));
    fields.set("preserve_host", &mut policy.preserve_host, Node::boolean);
    if let Some(node) = fields.take("send_proxy_protocol") {
        policy.send_proxy_protocol = node.word(&[("v1", ProxyProtocol::V1), ("v2", ProxyProtocol::V2)]);
        if policy.protocol == Protocol::H2c {
            let message = format_args!(
                "{} says for whom a connection is, and one of h2c serves many clients",
                node.path
            );
            node.wrong_key("config.conflict", message, "take it out, or write protocol = \"http1\"");
        }
    }
    fields.set("max_request_body", &mut policy.max_request_body_bytes, |node| {
        unlimited(node).or_else(|| node.size_bytes(1..=MAX_BODY_BYTES))
    });
    fields.set_duration("slow_start", &mut policy.slow_start_ms, 0..=HOUR_MS);
    fields.set("rules", &mut policy.rules, rules);
    if let Some(mut timeouts) = fields.take("timeouts").and_then(|node| node.fields()) {
        timeouts.set_duration("connect", &mut policy.connect_timeout_ms, 1..=HOUR_MS);
        timeouts.set_duration("response_head", &mut policy.response_head_timeout_ms, 1..=DAY_MS);
        timeouts.set_duration("body_idle", &mut policy.body_idle_timeout_ms, 1..=DAY_MS);
        timeouts.set_duration("tunnel_idle", &mut policy.tunnel_idle_timeout_ms, 1..=DAY_MS);
    }
    policy
}

fn balance(node: &Node<'_>) -> Option<BalanceSpec> {
    #[derive(Clone, Copy)]
    enum Word {
        RoundRobin,
        LeastInFlight,
        PeakEwma,
        HashClientAddress,
    }
    if node.is_table() {
        return hash_by(node).map(BalanceSpec::ConsistentHash);
    }
    let word = node.word(&[
        ("least_in_flight", Word::LeastInFlight),
        ("round_robin", Word::RoundRobin),
        ("peak_ewma", Word::PeakEwma),
        ("hash_client_address", Word::HashClientAddress),
    ])?;
    Some(match word {
        Word::RoundRobin => BalanceSpec::RoundRobin,
        Word::LeastInFlight => BalanceSpec::LeastInFlight,
        Word::PeakEwma => BalanceSpec::PeakEwma,
        Word::HashClientAddress => BalanceSpec::ConsistentHash(HashBy::ClientAddress),
    })
}

fn hash_by(node: &Node<'_>) -> Option<HashBy> {
    let mut fields = node.fields()?;
    let (header, cookie) = (fields.take("hash_header"), fields.take("hash_cookie"));
    match (header, cookie) {
        (Some(header), None) => names::token(&header, "x-tenant").map(HashBy::Header),
        (None, Some(cookie)) => names::token(&cookie, "session").map(HashBy::Cookie),
        (None, None) => {
            let message = format_args!("{} does not say what to hash", node.path);
            fields.missing(message, "write { hash_header = \"x-tenant\" } or { hash_cookie = \"session\" }");
            None
        }
        (Some(_), Some(cookie)) => {
            cookie.wrong_key(
                "config.conflict",
                "a request is hashed by a header or by a cookie",
                "take one out",
            );
            None
        }
    }
}

/// `[service.NAME.health]`, and where it says that there are no probes.
pub(super) fn health<'d>(fields: &mut Fields<'d>) -> (HealthSpec, Option<Node<'d>>) {
    #[derive(Clone, Copy, PartialEq)]
    enum Probe {
        Http,
        Tcp,
        None,
    }
    const MIN_INTERVAL_MS: u64 = SECOND_MS / 10; // more often is load, not knowledge
    const MAX_COUNT: i64 = 100;
    let mut health = HealthSpec::default();
    let Some(mut fields) = fields.take("health").and_then(|node| node.fields()) else {
        return (health, None);
    };
    let path_node = fields.take("path");
    let probe_node = fields.take("probe");
    let path = path_node.as_ref().map(|node| names::request_path(node, "/healthz"));
    let probe = probe_node
        .as_ref()
        .and_then(|node| node.word(&[("http", Probe::Http), ("tcp", Probe::Tcp), ("none", Probe::None)]));
    match (path, probe) {
        (Some(Some(path)), None | Some(Probe::Http)) => health.kind = HealthKind::Http { path },
        (None, Some(Probe::Http)) => {
            let message = format_args!("{} asks for an HTTP probe but has no path", fields.title());
            fields.missing(message, "add path = \"/healthz\": what answers 2xx or 3xx when the copy is well");
        }
        (Some(_), Some(_)) if probe != Some(Probe::Http) => {
            if let Some(node) = &path_node {
                let message =
                    format_args!("{} has no meaning here: only an HTTP probe asks for a path", node.path);
                node.wrong_key("config.conflict", message, "take out either path or probe");
            }
        }
        (None, Some(Probe::None)) => health.kind = HealthKind::None,
        _ => {} // TCP, which is the default, or a path that is wrong
    }
    fields.set_duration("interval", &mut health.interval_ms, MIN_INTERVAL_MS..=HOUR_MS);
    fields.set_duration("timeout", &mut health.timeout_ms, 1..=HOUR_MS);
    fields.set_integer("healthy", &mut health.healthy, 1..=MAX_COUNT);
    fields.set_integer("unhealthy", &mut health.unhealthy, 1..=MAX_COUNT);
    (health, probe_node.filter(|_| probe == Some(Probe::None)))
}

/// What Peregrine runs it has to probe: a rollout waits for it.
pub(super) fn refuse_no_probes(node: &Node<'_>) {
    let message = format_args!(
        "{} can be \"none\" for fixed upstreams only: a rollout waits for a good probe",
        node.path
    );
    node.wrong("config.conflict", message, "write probe = \"tcp\", or path = \"/healthz\"");
}
