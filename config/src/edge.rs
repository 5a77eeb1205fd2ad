//! `[edge]`: what the edge has to be told.

use std::net::SocketAddr;

use peregrine_proxy::{AccessLogConfig, AccessLogFormat, AccessLogTarget, Config, IpNet, MIN_HEADER_BYTES};

use crate::names;
use crate::raw::{Fields, Node, quoted};

const HOUR_MS: u64 = 3_600_000;
/// Where the edge listens unless told otherwise: on loopback, so that nothing is open that nobody opened, and
/// on a port that needs no root.
pub(crate) const DEFAULT_HTTP: &str = "127.0.0.1:8080";
/// Most listeners of one kind.
const MAX_LISTENERS: usize = 64;
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
    fields.set("http", &mut config.http, listeners);
    fields.set_integer("cores", &mut config.cores, 0..=MAX_CORES);
    fields.set("trusted_proxies", &mut config.trusted_proxies, networks);
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
    fields.set_integer(
        "http2_max_local_error_resets",
        &mut limits.http2_max_local_error_resets,
        1..=MAX_COUNT,
    );
}

fn listeners(node: &Node<'_>) -> Option<Vec<SocketAddr>> {
    let items = node.list("[\"0.0.0.0:80\"]")?;
    if items.is_empty() || items.len() > MAX_LISTENERS {
        let message = format_args!("{} has {} addresses", node.path, items.len());
        node.bad(message, format_args!("write 1 to {MAX_LISTENERS} of them: [\"0.0.0.0:80\"]"));
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

fn networks(node: &Node<'_>) -> Option<Vec<IpNet>> {
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
