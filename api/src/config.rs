//! What the API needs to be told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use crate::types::ReadinessCheck;

/// Port of the API unless told otherwise.
pub const DEFAULT_PORT: u16 = 7070;

/// What the API needs to be told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Folder that holds the token file.
    pub data_dir: PathBuf,
    /// Listens on an address that is not loopback although tokens then cross the network in clear text.
    pub allow_clear_text_on_public_address: bool,
    /// Host names under which the API may be asked besides `localhost` and IP addresses. On an address that
    /// is not loopback an empty list allows every name.
    pub allowed_hosts: Vec<String>,
    /// `/metrics` needs no token.
    pub metrics_without_token: bool,
    /// Limits.
    pub limits: Limits,
    /// The metrics in Prometheus' text form; without it `/metrics` is empty.
    pub metrics: MetricsText,
    /// What `/readyz` checks besides the API itself.
    pub readiness: ReadinessChecks,
}

impl Config {
    /// The defaults around a data folder: `127.0.0.1`, [`DEFAULT_PORT`].
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DEFAULT_PORT),
            data_dir: data_dir.into(),
            allow_clear_text_on_public_address: false,
            allowed_hosts: Vec::new(),
            metrics_without_token: false,
            limits: Limits::default(),
            metrics: MetricsText::default(),
            readiness: ReadinessChecks::default(),
        }
    }
}

/// Limits of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open connections; further ones wait in the kernel's queue.
    pub max_connections: usize,
    /// Body of a request.
    pub max_body_bytes: usize,
    /// Head of a request, and the buffer of a connection.
    pub max_head_bytes: usize,
    /// Longest time for the head of a request.
    pub head_timeout_ms: u64,
    /// Longest time for the body of a request.
    pub body_timeout_ms: u64,
    /// Longest time to the head of the answer, besides what the request itself asks to wait.
    pub request_timeout_ms: u64,
    /// Longest time that a request may ask to wait.
    pub max_wait_ms: u64,
    /// Time between two signs of life on a stream that has nothing to tell.
    pub heartbeat_ms: u64,
    /// Longest time for open requests to end at the shutdown.
    pub shutdown_timeout_ms: u64,
    /// Answers kept for `Idempotency-Key`; beyond it the oldest goes.
    pub max_idempotency_keys: usize,
    /// How long such an answer is kept.
    pub idempotency_ttl_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 1_024,
            max_body_bytes: 1 << 20, // a manifest of a thousand services is 300 KiB
            max_head_bytes: 32 << 10,
            head_timeout_ms: 10_000,
            body_timeout_ms: 10_000,
            request_timeout_ms: 30_000, // a check of a machine that does not answer takes the engine 10 s
            max_wait_ms: 300_000,
            heartbeat_ms: 10_000, // below the idle time-outs of the usual proxies (30 to 60 s)
            shutdown_timeout_ms: 5_000,
            max_idempotency_keys: 10_000,
            idempotency_ttl_ms: 24 * 60 * 60 * 1_000,
        }
    }
}

/// Where the text of `/metrics` comes from.
#[derive(Clone)]
pub struct MetricsText(Arc<dyn Fn() -> String + Send + Sync>);

impl MetricsText {
    /// From a function; it is called for each request.
    #[must_use]
    pub fn from_fn(text: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self(Arc::new(text))
    }

    pub(crate) fn read(&self) -> String {
        (self.0)()
    }
}

impl Default for MetricsText {
    fn default() -> Self {
        Self::from_fn(String::new)
    }
}

impl std::fmt::Debug for MetricsText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MetricsText")
    }
}

/// What `/readyz` asks.
#[derive(Clone)]
pub struct ReadinessChecks(Arc<dyn Fn() -> Vec<ReadinessCheck> + Send + Sync>);

impl ReadinessChecks {
    /// From a function; it is called for each request and must not block.
    #[must_use]
    pub fn from_fn(checks: impl Fn() -> Vec<ReadinessCheck> + Send + Sync + 'static) -> Self {
        Self(Arc::new(checks))
    }

    pub(crate) fn read(&self) -> Vec<ReadinessCheck> {
        (self.0)()
    }
}

impl Default for ReadinessChecks {
    fn default() -> Self {
        Self::from_fn(Vec::new)
    }
}

impl std::fmt::Debug for ReadinessChecks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReadinessChecks")
    }
}
