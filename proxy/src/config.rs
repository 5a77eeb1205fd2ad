//! What an edge has to be told. Every field has a default, and every default its reason.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

pub use peregrine_routing::{IpNet, IpNetError};

/// Configuration of an [`crate::Edge`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Addresses that speak clear-text HTTP/1.1 and HTTP/2 (prior knowledge).
    pub http: Vec<SocketAddr>,
    /// Addresses that speak TLS 1.2 and 1.3 with HTTP/1.1 and HTTP/2 in it, as ALPN says (RFC 7301). What is
    /// presented to whom is in the table.
    pub https: Vec<SocketAddr>,
    /// Port at which clients reach `https`, for redirects from clear text. 443, also where the edge listens on another
    /// one that is mapped to it.
    pub https_port: u16,
    /// Number of cores to use, each with its own runtime, listener and upstream pool; 0 is one per CPU.
    pub cores: usize,
    /// Peers whose `Forwarded`, `X-Forwarded-*` and `X-Real-IP` are believed and extended; those of
    /// anybody else are dropped. Empty: nobody, because a header is easier to forge than an address.
    pub trusted_proxies: Vec<IpNet>,
    /// Peers whose connections begin with a header of the PROXY protocol (version 1 or 2) that says whom they are for;
    /// without one they are refused, and such a header of anybody else is a malformed request. Empty: nobody.
    pub proxy_protocol_from: Vec<IpNet>,
    /// Where and how requests are logged; `None` logs nothing, since a log is private data.
    pub access_log: Option<AccessLogConfig>,
    /// Sizes and times that a client cannot exceed.
    pub limits: Limits,
    /// Longest time that a shutdown waits for requests in flight. 30 s: what systemd, Docker and
    /// Kubernetes users set as grace period most often.
    pub drain_timeout_ms: u64,
    /// Pseudonym in `Via` (RFC 9110 §7.6.3): a token that does not give the machine's name away.
    pub via_name: Arc<str>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: Vec::new(),
            https: Vec::new(),
            https_port: 443,
            cores: 0,
            trusted_proxies: Vec::new(),
            proxy_protocol_from: Vec::new(),
            access_log: None,
            limits: Limits::default(),
            drain_timeout_ms: 30_000,
            via_name: "peregrine".into(),
        }
    }
}

/// The access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLogConfig {
    /// Where the lines go.
    pub target: AccessLogTarget,
    /// What a line looks like.
    pub format: AccessLogFormat,
}

/// Where access log lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// Standard output.
    Stdout,
    /// A file, made if it is missing and appended to.
    File(PathBuf),
}

/// What an access log line looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessLogFormat {
    /// One JSON object a line, with everything that the edge knows.
    #[default]
    Json,
    /// Combined log format, which every analyser reads.
    Combined,
}

/// Sizes and times that a client cannot exceed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time for a request head to be complete. 10 s: slow phones pass, slowloris does not.
    pub head_timeout_ms: u32,
    /// Time that a connection may stay without a request. 75 s: longer than the 60 s after which load
    /// balancers in front of an edge close, so that they close first.
    pub idle_timeout_ms: u32,
    /// Largest request head in bytes, all of it, and largest HTTP/2 header list. 32 KiB: four times the
    /// 8 KiB that most origins allow, so that the edge is not the one who is strict.
    pub max_header_bytes: u32,
    /// Most header fields in a request or response. 100: hyper's and Apache's own limit.
    pub max_headers: u32,
    /// Connections at a time over all cores; further ones wait in the accept queue. 65,536: below the
    /// file descriptors that service managers give (524,288) with room for upstream connections.
    pub max_connections: u32,
    /// Connections at a time from one source network over all cores; further ones are closed. 0 is as many as there may
    /// be in all: a company or a mobile network may stand behind one address. `trusted_proxies` have no such limit.
    pub max_connections_per_source: u32,
    /// Length of the prefix of IPv4 addresses that count as one source. 32: each for itself.
    pub source_v4_prefix_bits: u8,
    /// Length of the prefix of IPv6 addresses that count as one source. 64: what one customer has at the least.
    pub source_v6_prefix_bits: u8,
    /// Resident memory of the process in bytes above which new requests get 503. 0 is no limit: how much there is
    /// to have, only the operator knows.
    pub max_memory_bytes: u64,
    /// Least bytes per second of a request body, over ten seconds, while the edge waits for it. 0 is no least: then
    /// only a body that stands still is ended. 16: no network is slower, and one who sends a byte now and then is cut.
    pub min_request_body_bytes_per_s: u32,
    /// Streams at a time on one HTTP/2 connection. 128: RFC 9113 §6.5.2 says no less than 100.
    pub http2_max_concurrent_streams: u32,
    /// HTTP/2 receive window of a stream in bytes. 256 KiB: 100 Mbit/s at 20 ms.
    pub http2_stream_window_bytes: u32,
    /// HTTP/2 receive window of a connection in bytes. 1 MiB: four streams at full speed.
    pub http2_connection_window_bytes: u32,
    /// HTTP/2 streams that may be reset before they were accepted; more end the connection (the "rapid
    /// reset" attack, CVE-2023-44487). 20: h2's own advice.
    pub http2_max_pending_reset_streams: u32,
    /// HTTP/2 stream errors that a peer may cause before the connection ends (the "made you reset"
    /// attack). 64: honest clients cause none.
    pub http2_max_local_error_resets: u32,
    /// What an HTTP/2 client may send that is of no use, in points: a PING has 2, SETTINGS 10, an empty CONTINUATION 10,
    /// most others 1. Requests, time and what the client is sent give points back; without any left the connection
    /// ends. 1000: good clients use some dozens.
    pub http2_max_glitches: u32,
    /// Time for a TLS handshake, from the accepted connection to its end, whatever trickles in meanwhile. 10 s:
    /// three round trips of the slowest phone pass.
    pub handshake_timeout_ms: u32,
    /// TLS handshakes at a time on one core, from the whole hello to the end; further ones wait. 512: at 2,000
    /// handshakes a second of one core, a quarter of a second of work.
    pub max_handshakes_per_core: u32,
    /// Of these from one network (/24 of IPv4, /48 of IPv6): one of many must not keep the others out. 128: a quarter.
    pub max_handshakes_per_network: u32,
    /// Longest time that a handshake waits for a certificate that is being ordered, from its whole hello on; then it has the
    /// time of any other. 20 s: an authority takes 3 to 15, and browsers wait for longer. 0: it is refused at once.
    pub certificate_wait_ms: u32,
    /// Handshakes over all cores that wait so; further ones are refused. 256: each holds its hello, 32 MiB at the most.
    pub max_certificate_waits: u32,
    /// Of these on one core. 64: they cost a core nothing but a look at each new table.
    pub max_certificate_waits_per_core: u32,
    /// Of these from one network (/24 of IPv4, /48 of IPv6). 32: one that makes names up leaves room for others.
    pub max_certificate_waits_per_network: u32,
    /// Certificates with their keys that an edge keeps in memory, those used last. 10,000: some 100 MB with what is made
    /// of them.
    pub max_certificates: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_timeout_ms: 10_000,
            idle_timeout_ms: 75_000,
            max_header_bytes: 32 * 1024,
            max_headers: 100,
            max_connections: 65_536,
            max_connections_per_source: 0,
            source_v4_prefix_bits: 32,
            source_v6_prefix_bits: 64,
            max_memory_bytes: 0,
            min_request_body_bytes_per_s: 16,
            http2_max_concurrent_streams: 128,
            http2_stream_window_bytes: 256 * 1024,
            http2_connection_window_bytes: 1024 * 1024,
            http2_max_pending_reset_streams: 20,
            http2_max_local_error_resets: 64,
            http2_max_glitches: 1_000,
            handshake_timeout_ms: 10_000,
            max_handshakes_per_core: 512,
            max_handshakes_per_network: 128,
            certificate_wait_ms: 20_000,
            max_certificate_waits: 256,
            max_certificate_waits_per_core: 64,
            max_certificate_waits_per_network: 32,
            max_certificates: 10_000,
        }
    }
}

/// Smallest head that hyper's read buffer can be limited to.
pub const MIN_HEADER_BYTES: u32 = 8 * 1024;

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No address to listen on.
    #[error("no address to listen on: set at least one in `http`")]
    NoAddress,
    /// The pseudonym is not a token (RFC 9110 §5.6.2).
    #[error("via_name {0:?} is not a token: use letters, digits, - and . only")]
    ViaName(String),
    /// A limit has a value that would refuse everybody.
    #[error("{field} is {value}, but must be at least {least}")]
    TooSmall {
        /// Name of the field.
        field: &'static str,
        /// What it was set to.
        value: u64,
        /// What it has to be at least.
        least: u64,
    },
}

impl Config {
    /// Checks every value.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self) -> Result<(), ConfigError> {
        let token = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
        if self.via_name.is_empty() || !self.via_name.bytes().all(token) {
            return Err(ConfigError::ViaName(self.via_name.to_string()));
        }
        let limits = &self.limits;
        let least = [
            ("head_timeout_ms", u64::from(limits.head_timeout_ms), 1),
            ("idle_timeout_ms", u64::from(limits.idle_timeout_ms), 1),
            ("max_header_bytes", u64::from(limits.max_header_bytes), u64::from(MIN_HEADER_BYTES)),
            ("max_headers", u64::from(limits.max_headers), 16),
            ("max_connections", u64::from(limits.max_connections), 1),
            ("http2_max_concurrent_streams", u64::from(limits.http2_max_concurrent_streams), 1),
            ("http2_stream_window_bytes", u64::from(limits.http2_stream_window_bytes), 65_535),
            ("http2_connection_window_bytes", u64::from(limits.http2_connection_window_bytes), 65_535),
            ("http2_max_glitches", u64::from(limits.http2_max_glitches), 100),
            ("handshake_timeout_ms", u64::from(limits.handshake_timeout_ms), 1),
            ("max_handshakes_per_core", u64::from(limits.max_handshakes_per_core), 1),
            ("max_handshakes_per_network", u64::from(limits.max_handshakes_per_network), 1),
            ("max_certificates", u64::from(limits.max_certificates), 2),
        ];
        match least.into_iter().find(|(_, value, least)| value < least) {
            Some((field, value, least)) => Err(ConfigError::TooSmall { field, value, least }),
            None => Ok(()),
        }
    }

    /// Cores that this configuration means on this machine.
    #[must_use]
    pub fn core_count(&self) -> usize {
        if self.cores > 0 { self.cores } else { std::thread::available_parallelism().map_or(1, Into::into) }
    }

    /// Whether a peer's connections begin with a header of the PROXY protocol.
    #[must_use]
    pub fn speaks_proxy_protocol(&self, peer: IpAddr) -> bool {
        // Asked for each connection, and nearly always nobody does.
        !self.proxy_protocol_from.is_empty() && {
            let peer = peer.to_canonical();
            self.proxy_protocol_from.iter().any(|net| net.contains(peer))
        }
    }

    /// Whether a peer's forwarding headers are believed.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_peer_on_a_dual_stack_socket_is_trusted_by_its_ipv4_network() {
        let config =
            Config { trusted_proxies: vec!["10.0.0.0/8".parse().expect("network")], ..Config::default() };
        assert!(config.trusts("::ffff:10.1.2.3".parse().expect("address")));
        assert!(!config.trusts("::ffff:11.1.2.3".parse().expect("address")));
    }

    #[test]
    fn a_limit_that_would_refuse_everybody_is_an_error_that_names_it() {
        let mut config = Config::default();
        assert_eq!(config.check(), Ok(()));
        config.limits.max_header_bytes = 100;
        let text = config.check().expect_err("is too small").to_string();
        assert!(text.contains("max_header_bytes") && text.contains("8192"), "{text}");
        let config = Config { via_name: "a b".into(), ..Config::default() };
        assert!(matches!(config.check(), Err(ConfigError::ViaName(_))));
    }
}
