//! What the API needs to be told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use crate::domains::Domains;
use crate::types::{Edge, Invite, ReadinessCheck};

/// Where the API listens unless told otherwise.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7070);

/// Gives the metrics in Prometheus' text form; called for each request of `/metrics`.
pub type MetricsText = Arc<dyn Fn() -> String + Send + Sync>;

/// Gives what `/readyz` checks besides the API itself; called for each request, must not block.
pub type ReadinessChecks = Arc<dyn Fn() -> Vec<ReadinessCheck> + Send + Sync>;

/// Edges in other processes, as the API asks for them.
pub trait Edges: Send + Sync {
    /// Every edge, by name.
    fn list(&self) -> Vec<Edge>;
    /// Makes a token for an edge of this name.
    ///
    /// # Errors
    /// [`EdgesError`].
    fn invite(&self, name: &str, ttl_ms: u64) -> Result<Invite, EdgesError>;
    /// Shuts an edge out.
    ///
    /// # Errors
    /// [`EdgesError`].
    fn remove(&self, name: &str) -> Result<(), EdgesError>;
}

/// Why nothing was done for an edge.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EdgesError {
    /// The name is none for an edge.
    #[error("{0}")]
    BadName(String),
    /// There is no such edge.
    #[error("{0}")]
    Unknown(String),
    /// It could not be written down.
    #[error("{0}")]
    Failed(String),
}

/// What the API needs to be told.
#[derive(Clone)]
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
    /// The metrics; without it `/metrics` is empty.
    pub metrics: Option<MetricsText>,
    /// What `/readyz` checks; without it the API itself is all.
    pub readiness: Option<ReadinessChecks>,
    /// Edges in other processes; without it there are none.
    pub edges: Option<Arc<dyn Edges>>,
    /// Domains and their certificates; without it there are none.
    pub domains: Option<Arc<dyn Domains>>,
}

impl Config {
    /// The defaults around an address and a data folder.
    #[must_use]
    pub fn new(listen: SocketAddr, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            listen,
            data_dir: data_dir.into(),
            allow_clear_text_on_public_address: false,
            allowed_hosts: Vec::new(),
            metrics_without_token: false,
            limits: Limits::default(),
            metrics: None,
            readiness: None,
            edges: None,
            domains: None,
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("data_dir", &self.data_dir)
            .field("allow_clear_text_on_public_address", &self.allow_clear_text_on_public_address)
            .field("allowed_hosts", &self.allowed_hosts)
            .field("metrics_without_token", &self.metrics_without_token)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
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
