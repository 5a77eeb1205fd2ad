//! What an edge has to be told. Every field has a default, and every default its reason.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Configuration of an [`crate::Edge`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Addresses that speak clear-text HTTP/1.1 and HTTP/2 (prior knowledge).
    pub http: Vec<SocketAddr>,
    /// Number of cores to use, each with its own runtime, listener and upstream pool; 0 is one per CPU.
    pub cores: usize,
    /// Peers whose `Forwarded`, `X-Forwarded-*` and `X-Real-IP` are believed and extended; those of
    /// anybody else are dropped. Empty: nobody, because a header is easier to forge than an address.
    pub trusted_proxies: Vec<IpNet>,
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
            cores: 0,
            trusted_proxies: Vec::new(),
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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_timeout_ms: 10_000,
            idle_timeout_ms: 75_000,
            max_header_bytes: 32 * 1024,
            max_headers: 100,
            max_connections: 65_536,
            http2_max_concurrent_streams: 128,
            http2_stream_window_bytes: 256 * 1024,
            http2_connection_window_bytes: 1024 * 1024,
            http2_max_pending_reset_streams: 20,
            http2_max_local_error_resets: 64,
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

    /// Whether a peer's forwarding headers are believed.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies.iter().any(|net| net.contains(peer))
    }
}

/// A network in CIDR notation, or a single address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpNet {
    address: IpAddr,
    prefix_bits: u8,
}

/// A text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a network: write an address, or an address/prefix like 10.0.0.0/8")]
pub struct IpNetError(String);

impl IpNet {
    /// The network of an address and a prefix length; `None` if the length is too large.
    #[must_use]
    pub fn new(address: IpAddr, prefix_bits: u8) -> Option<Self> {
        let width = if address.is_ipv4() { 32 } else { 128 };
        (prefix_bits <= width).then_some(Self { address, prefix_bits })
    }

    /// Whether an address is in the network.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(net), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_bits)).unwrap_or(0);
                (v4_bits(net) ^ v4_bits(address)) & mask == 0
            }
            (IpAddr::V6(net), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_bits)).unwrap_or(0);
                (v6_bits(net) ^ v6_bits(address)) & mask == 0
            }
            _ => false,
        }
    }
}

const fn v4_bits(address: Ipv4Addr) -> u32 {
    u32::from_be_bytes(address.octets())
}

const fn v6_bits(address: Ipv6Addr) -> u128 {
    u128::from_be_bytes(address.octets())
}

impl FromStr for IpNet {
    type Err = IpNetError;

    fn from_str(text: &str) -> Result<Self, IpNetError> {
        let wrong = || IpNetError(text.to_owned());
        let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let full = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = prefix.map_or(Ok(full), |prefix| prefix.parse().map_err(|_| wrong()))?;
        Self::new(address, prefix_bits).ok_or_else(wrong)
    }
}

impl std::fmt::Display for IpNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_holds_its_addresses_and_no_other() {
        for (net, inside, outside) in [
            ("10.0.0.0/8", "10.255.1.2", "11.0.0.1"),
            ("127.0.0.1", "127.0.0.1", "127.0.0.2"),
            ("0.0.0.0/0", "203.0.113.9", "::1"),
            ("2001:db8::/32", "2001:db8:1::1", "2001:db9::1"),
            ("::1", "::1", "::2"),
        ] {
            let net: IpNet = net.parse().expect("is a network");
            assert!(net.contains(inside.parse().expect("address")), "{net} {inside}");
            assert!(!net.contains(outside.parse().expect("address")), "{net} {outside}");
        }
        for text in ["10.0.0.0/33", "10.0.0", "::1/129", "x/8", "1.2.3.4/"] {
            assert!(text.parse::<IpNet>().is_err(), "{text}");
        }
    }

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
