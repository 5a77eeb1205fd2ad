//! `[edge]`: what the edge has to be told.

use std::net::SocketAddr;

use peregrine_proxy::{AccessLogConfig, AccessLogFormat, AccessLogTarget, Config, IpNet, MIN_HEADER_BYTES};

use crate::names;
use crate::raw::{Fields, Node, quoted};
use crate::service::unlimited;

const HOUR_MS: u64 = 3_600_000;
const MINUTE_MS: u64 = 60_000;
/// Where the edge listens unless told otherwise: on loopback, so that nothing is open that nobody opened, and
/// on a port that needs no root.
pub(crate) const DEFAULT_HTTP: &str = "127.0.0.1:8080";
/// Most listeners of one kind.
const MAX_LISTENERS: usize = 64;
/// What an edge needs before its first request, and some connections.
const MIN_MEMORY_BYTES: u64 = 64 << 20;
/// More cores than any machine has.
const MAX_CORES: i64 = 1_024;

pub(crate) fn default_edge() -> Config {
    let http = vec![DEFAULT_HTTP.parse().expect("the default is an address")];
    Config { http, ..Config::default() }
}

/// The edge, and where it answers probes if it has a process of its own.
pub(crate) fn edge(node: &Node<'_>) -> (Config, Option<SocketAddr>) {
    let mut config = default_edge();
    let Some(mut fields) = node.fields() else { return (config, None) };
    let mut admin = None;
    fields.set("admin", &mut admin, |node| names::listen_address(node, "127.0.0.1:9090").map(Some));
    fields.set("http", &mut config.http, |node| listeners(node, 1));
    fields.set("https", &mut config.https, |node| {
        let addresses = listeners(node, 0)?;
        let taken = addresses.iter().find(|address| address.port() != 0 && config.http.contains(address));
        if let Some(address) = taken {
            let message = format_args!("{address} is in edge.http and in edge.https");
            node.wrong("config.duplicate", message, "take one out: an address speaks clear text or TLS");
        }
        taken.is_none().then_some(addresses)
    });
    fields.set_integer("https_port", &mut config.https_port, 1..=65_535);
    fields.set_integer("cores", &mut config.cores, 0..=MAX_CORES);
    fields.set("trusted_proxies", &mut config.trusted_proxies, networks);
    fields.set("proxy_protocol_from", &mut config.proxy_protocol_from, networks);
    fields.set("access_log", &mut config.access_log, |node| access_log(node).map(Some));
    fields.set_duration("drain_timeout", &mut config.drain_timeout_ms, 0..=HOUR_MS);
    fields.set("via_name", &mut config.via_name, |node| {
        let text = node.text("peregrine")?;
        let sound = !text.is_empty()
            && text.len() <= 63
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        if !sound {
            node.bad(
                format_args!("{} is no name for Via", quoted(text)),
                "use letters, digits, - and . only",
            );
        }
        sound.then(|| text.into())
    });
    if let Some(mut limits) = fields.take("limits").and_then(|node| node.fields()) {
        set_limits(&mut limits, &mut config);
    }
    (config, admin)
}

fn set_limits(fields: &mut Fields<'_>, config: &mut Config) {
    const MAX_COUNT: i64 = 1_000_000;
    let limits = &mut config.limits;
    fields.set_duration("head_timeout", &mut limits.head_timeout_ms, 1..=HOUR_MS);
    fields.set_duration("idle_timeout", &mut limits.idle_timeout_ms, 1..=HOUR_MS);
    fields.set_size("max_header", &mut limits.max_header_bytes, u64::from(MIN_HEADER_BYTES)..=16 << 20);
    fields.set_integer("max_headers", &mut limits.max_headers, 16..=10_000);
    fields.set_integer("max_connections", &mut limits.max_connections, 1..=100_000_000);
    fields.set_integer("max_connections_per_source", &mut limits.max_connections_per_source, 0..=100_000_000);
    fields.set_integer("source_v4_prefix", &mut limits.source_v4_prefix_bits, 0..=32);
    fields.set_integer("source_v6_prefix", &mut limits.source_v6_prefix_bits, 0..=128);
    fields.set("max_memory", &mut limits.max_memory_bytes, |node| {
        unlimited(node).or_else(|| node.size_bytes(MIN_MEMORY_BYTES..=1 << 50))
    });
    fields.set_size("min_request_body_per_second", &mut limits.min_request_body_bytes_per_s, 0..=1 << 30);
    fields.set_integer(
        "http2_max_concurrent_streams",
        &mut limits.http2_max_concurrent_streams,
        1..=MAX_COUNT,
    );
    fields.set_size("http2_stream_window", &mut limits.http2_stream_window_bytes, 65_535..=(1 << 31) - 1);
    fields.set_size(
        "http2_connection_window",
        &mut limits.http2_connection_window_bytes,
        65_535..=(1 << 31) - 1,
    );
    fields.set_integer(
        "http2_max_pending_reset_streams",
        &mut limits.http2_max_pending_reset_streams,
        1..=MAX_COUNT,
    );
    fields.set_integer("http2_max_glitches", &mut limits.http2_max_glitches, 100..=MAX_COUNT);
    fields.set_duration("handshake_timeout", &mut limits.handshake_timeout_ms, 1..=HOUR_MS);
    fields.set_integer("max_handshakes_per_core", &mut limits.max_handshakes_per_core, 1..=MAX_COUNT);
    fields.set_integer("max_handshakes_per_network", &mut limits.max_handshakes_per_network, 1..=MAX_COUNT);
    fields.set_duration("certificate_wait", &mut limits.certificate_wait_ms, 0..=MINUTE_MS);
    fields.set_integer("max_certificate_waits", &mut limits.max_certificate_waits, 0..=MAX_COUNT);
    fields.set_integer(
        "max_certificate_waits_per_core",
        &mut limits.max_certificate_waits_per_core,
        0..=MAX_COUNT,
    );
    fields.set_integer(
        "max_certificate_waits_per_network",
        &mut limits.max_certificate_waits_per_network,
        0..=MAX_COUNT,
    );
    fields.set_integer("max_certificates", &mut limits.max_certificates, 2..=100 * MAX_COUNT);
    fields.set_integer(
        "http2_max_local_error_resets",
        &mut limits.http2_max_local_error_resets,
        1..=MAX_COUNT,
    );
}

fn listeners(node: &Node<'_>, least: usize) -> Option<Vec<SocketAddr>> {
    let items = node.list("[\"0.0.0.0:80\"]")?;
    if items.len() < least || items.len() > MAX_LISTENERS {
        let message = format_args!("{} has {} addresses", node.path, items.len());
        node.bad(message, format_args!("write {least} to {MAX_LISTENERS} of them: [\"0.0.0.0:80\"]"));
        return None;
    }
    let mut addresses = Vec::with_capacity(items.len());
    for item in &items {
        let Some(address) = names::listen_address(item, "0.0.0.0:80") else { continue };
        if address.port() != 0 && addresses.contains(&address) {
            item.wrong(
                "config.duplicate",
                format_args!("{address} is in {} twice", node.path),
                "take one out",
            );
        }
        addresses.push(address);
    }
    (addresses.len() == items.len()).then_some(addresses)
}

pub(crate) fn networks(node: &Node<'_>) -> Option<Vec<IpNet>> {
    let items = node.texts("10.0.0.0/8")?;
    let network = |(text, item): (&str, Node<'_>)| {
        let network = text.parse().ok();
        if network.is_none() {
            let message = format_args!("{} is no network", quoted(text));
            item.bad(message, "write an address, or an address and the length of its prefix: \"10.0.0.0/8\"");
        }
        network
    };
    Some(items.into_iter().filter_map(network).collect())
}

fn access_log(node: &Node<'_>) -> Option<AccessLogConfig> {
    let mut fields = node.fields()?;
    let mut format = AccessLogFormat::default();
    fields.set("format", &mut format, |node| {
        node.word(&[("json", AccessLogFormat::Json), ("combined", AccessLogFormat::Combined)])
    });
    let Some(target) = fields.take("to") else {
        let message = format_args!("{} does not say where to", fields.title());
        fields.missing(message, "add to = \"stdout\", or to = \"/var/log/peregrine/access.log\"");
        return None;
    };
    let target = match target.text("stdout")? {
        "stdout" => AccessLogTarget::Stdout,
        _ => AccessLogTarget::File(target.file_path("/var/log/peregrine/access.log")?),
    };
    Some(AccessLogConfig { target, format })
}
