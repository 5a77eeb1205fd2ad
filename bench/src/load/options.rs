//! What a run does, and which wishes contradict each other.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderValue, Uri};
use thiserror::Error;

use crate::origin::unix_ns;

/// The protocol that a run speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2: on clear text with prior knowledge (RFC 9113 §3.3), over TLS by ALPN.
    H2c,
}

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Every connection sends its next request as soon as it has its answer.
    Closed,
    /// At fixed times, whatever the answers do.
    Open {
        /// Requests per second of the whole run.
        per_second: u32,
    },
}

/// When a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// After this many milliseconds.
    DurationMs(u64),
    /// After this many requests.
    Count(u64),
    /// By [`super::LoadHandle::stop`] alone.
    Stopped,
}

/// What an answer's body must be, besides being complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Complete by the rules of its protocol.
    Whole,
    /// This many bytes.
    Length(u64),
    /// This many bytes of the origin's `/bytes/N`, each compared.
    Pattern(u64),
    /// A gRPC call: every request is one (POST, one empty message), and its answer ends with `grpc-status: 0`.
    Call,
}

/// How a run speaks TLS. The server's name is that of [`LoadOptions::host`].
#[derive(Debug, Clone)]
pub struct Tls {
    /// The certificate that is trusted, in DER.
    pub trusted: Vec<u8>,
    /// Sessions are resumed where the server lets them; else each handshake is a full one.
    pub resume: bool,
}

/// What a run does.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where to connect to.
    pub target: SocketAddr,
    /// `Host`, or `:authority` over HTTP/2.
    pub host: String,
    /// Path and query of every request.
    pub path: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Connections that carry requests.
    pub connections: usize,
    /// Requests at once on each HTTP/2 connection; HTTP/1.1 has one.
    pub streams_per_connection: usize,
    /// When requests are sent.
    pub pace: Pace,
    /// When the run ends.
    pub until: Until,
    /// How finely the open loop releases requests, in microseconds: later than due by this much at most, which is then
    /// part of the latency. Finer costs the client more.
    pub tick_us: u64,
    /// Percentage of requests that are POST with a body, spread evenly.
    pub post_percent: u8,
    /// Length of a POST's body, in bytes.
    pub post_body_bytes: usize,
    /// A new connection for every request.
    pub connection_per_request: bool,
    /// Connections that are held besides and carry nothing after their first request.
    pub idle_connections: usize,
    /// From sending a request to the last byte of its answer, in milliseconds.
    pub request_timeout_ms: u64,
    /// For a TCP and HTTP handshake, in milliseconds.
    pub connect_timeout_ms: u64,
    /// The run's name, the first part of its ids; visible ASCII.
    pub run: String,
    /// TLS 1.3 to the target; clear text without it.
    pub tls: Option<Tls>,
    /// What an answer's body must be.
    pub expect: Expect,
    /// How often counters are published, in milliseconds.
    pub sample_ms: u64,
}

impl LoadOptions {
    /// A closed loop of 16 HTTP/1.1 connections that GET `/` until stopped.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            host: target.to_string(),
            path: "/".to_owned(),
            protocol: Protocol::Http1,
            connections: 16,
            streams_per_connection: 8,
            pace: Pace::Closed,
            tick_us: 1000,
            until: Until::Stopped,
            post_percent: 0,
            post_body_bytes: 64,
            connection_per_request: false,
            idle_connections: 0,
            request_timeout_ms: 10_000,
            connect_timeout_ms: 5_000,
            run: new_run_name(),
            tls: None,
            expect: Expect::Whole,
            sample_ms: 1000,
        }
    }

    /// Requests that can be under way at once.
    pub(super) fn concurrency(&self) -> usize {
        match self.protocol {
            Protocol::Http1 => self.connections,
            Protocol::H2c => self.connections * self.streams_per_connection,
        }
    }

    pub(super) fn check(&self) -> Result<(), LoadError> {
        let wrong = |field, why: &str| Err(LoadError { field, why: why.to_owned() });
        if HeaderValue::from_str(&self.run).is_err() || self.run.contains(' ') || self.run.is_empty() {
            return wrong(
                "run",
                "must be visible ASCII without spaces: it becomes a header and a field of record lines",
            );
        }
        if self.path.parse::<Uri>().is_err() || !self.path.starts_with('/') {
            return wrong("path", "must start with `/` and be a valid path and query");
        }
        if HeaderValue::from_str(&self.host).is_err() || self.host.parse::<http::uri::Authority>().is_err() {
            return wrong("host", "must be a host name or address with an optional port");
        }
        if self.concurrency() == 0 {
            return wrong("connections", "at least one connection and one stream are needed");
        }
        if self.post_percent > 100 {
            return wrong("post_percent", "goes from 0 to 100");
        }
        if matches!(self.pace, Pace::Open { per_second: 0 }) {
            return wrong("pace", "an open loop needs at least 1 request per second");
        }
        if [self.tick_us, self.sample_ms, self.request_timeout_ms, self.connect_timeout_ms].contains(&0) {
            return wrong("tick_us, sample_ms, request_timeout_ms, connect_timeout_ms", "must be above 0");
        }
        if self.expect == Expect::Call && self.protocol == Protocol::Http1 {
            return wrong("expect", "gRPC calls need HTTP/2");
        }
        if self.connection_per_request && self.protocol == Protocol::H2c && self.streams_per_connection != 1 {
            return wrong("connection_per_request", "over HTTP/2 needs streams_per_connection = 1");
        }
        Ok(())
    }
}

/// Options that cannot be run.
#[derive(Debug, Error)]
#[error("load option `{field}`: {why}")]
pub struct LoadError {
    field: &'static str,
    why: String,
}

impl LoadError {
    pub(super) const fn new(field: &'static str, why: String) -> Self {
        Self { field, why }
    }
}

/// A name that no other run of this machine has.
fn new_run_name() -> String {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    format!("{:x}.{:x}.{}", unix_ns(), std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed))
}
