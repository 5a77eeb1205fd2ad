//! What is measured.

use crate::load::{Expect, LoadOptions, Pace, Protocol, Tls, Until};
use std::net::SocketAddr;

/// Requests at once in every scenario.
pub(super) const CONNECTIONS: usize = 64;
/// Connections over HTTP/2, which share the requests at once.
pub(super) const H2_CONNECTIONS: usize = 8;
/// How finely the open loop releases requests, in microseconds.
const TICK_US: u64 = 100;
/// The open loop has more connections than the closed one, so that a slow answer does not hold back the next requests.
const OPEN_LOOP_FACTOR: usize = 2;

/// The protocol between client and proxy; to the origin it is always HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wire {
    H1,
    H2,
}

/// What makes the load of a closed loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Client {
    /// wrk over HTTP/1.1, h2load over HTTP/2.
    Theirs,
    /// This crate's: a connection for each request, with a full handshake or a resumed one.
    Handshakes { resume: bool },
    /// This crate's: messages to and fro over WebSockets.
    Echo,
}

/// One way of using a proxy.
#[derive(Debug)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) path: &'static str,
    pub(super) reply_bytes: u64,
    pub(super) wire: Wire,
    pub(super) connection_per_request: bool,
    pub(super) idle_connections: usize,
    pub(super) switching: bool,
    pub(super) tls: bool,
    pub(super) client: Client,
    /// Requests at once on each connection over HTTP/2.
    pub(super) h2_streams: usize,
}

const PLAIN: Scenario = Scenario {
    name: "h1-100b",
    title: "HTTP/1.1 keep-alive, 100 B",
    path: "/100b",
    reply_bytes: 100,
    wire: Wire::H1,
    connection_per_request: false,
    idle_connections: 0,
    switching: false,
    tls: false,
    client: Client::Theirs,
    h2_streams: CONNECTIONS / H2_CONNECTIONS,
};

const TLS: Scenario =
    Scenario { name: "tls-h1-100b", title: "TLS 1.3, HTTP/1.1 keep-alive, 100 B", tls: true, ..PLAIN };

/// What is measured unless scenarios are named: clear text. With `--tls`, [`TLS_SCENARIOS`].
pub(super) const SCENARIOS: [Scenario; 7] = [
    PLAIN,
    Scenario {
        name: "h1-10k",
        title: "HTTP/1.1 keep-alive, 10 KiB",
        path: "/10k",
        reply_bytes: 10 << 10,
        ..PLAIN
    },
    Scenario {
        name: "h1-1m",
        title: "HTTP/1.1 keep-alive, 1 MiB",
        path: "/1m",
        reply_bytes: 1 << 20,
        ..PLAIN
    },
    Scenario { name: "h2-100b", title: "HTTP/2, 100 B, 8 connections × 8 streams", wire: Wire::H2, ..PLAIN },
    Scenario {
        name: "new-connection",
        title: "A new connection for every request, 100 B",
        connection_per_request: true,
        ..PLAIN
    },
    Scenario {
        name: "idle-1000",
        title: "100 B beside 1,000 idle connections",
        idle_connections: 1000,
        ..PLAIN
    },
    Scenario {
        name: "switching",
        title: "100 B while the upstream is switched every second",
        switching: true,
        ..PLAIN
    },
];

/// The same over TLS 1.3 with one certificate (ECDSA P-256), key exchange (X25519) and cipher (AES-128-GCM) for all.
pub(super) const TLS_SCENARIOS: [Scenario; 7] = [
    TLS,
    Scenario {
        name: "tls-h2-100b",
        title: "TLS 1.3, HTTP/2, 100 B, 8 connections × 32 streams",
        wire: Wire::H2,
        h2_streams: 32,
        ..TLS
    },
    Scenario {
        name: "tls-full",
        title: "Full TLS 1.3 handshakes, one request of 100 B each",
        connection_per_request: true,
        client: Client::Handshakes { resume: false },
        ..TLS
    },
    Scenario {
        name: "tls-resumed",
        title: "Resumed TLS 1.3 handshakes, one request of 100 B each",
        connection_per_request: true,
        client: Client::Handshakes { resume: true },
        ..TLS
    },
    Scenario {
        name: "tls-1m",
        title: "TLS 1.3, HTTP/1.1 keep-alive, 1 MiB",
        path: "/1m",
        reply_bytes: 1 << 20,
        ..TLS
    },
    Scenario {
        name: "tls-echo",
        title: "TLS 1.3, WebSocket echo of 100 B, 64 connections",
        client: Client::Echo,
        ..TLS
    },
    Scenario {
        name: "tls-idle-10000",
        title: "TLS 1.3, 100 B beside 10,000 idle connections",
        idle_connections: 10_000,
        ..TLS
    },
];

/// The name in the certificate of the contenders.
/// One that wrk and h2load, which choose the certificate by the address that they are given, can resolve.
pub(super) const TLS_HOST: &str = "localhost";

impl Scenario {
    /// What the closed loop of [`Client::Handshakes`] does.
    pub(super) fn handshakes(&self, target: SocketAddr, tls: Option<Tls>, duration_ms: u64) -> LoadOptions {
        LoadOptions {
            pace: Pace::Closed,
            until: Until::DurationMs(duration_ms),
            connections: CONNECTIONS,
            ..self.open_loop(target, tls, 1, 1)
        }
    }

    /// The open loop of this scenario.
    pub(super) fn open_loop(
        &self,
        target: SocketAddr,
        tls: Option<Tls>,
        per_second: u32,
        duration_ms: u64,
    ) -> LoadOptions {
        let (protocol, connections) = match self.wire {
            Wire::H1 => (Protocol::Http1, CONNECTIONS),
            Wire::H2 => (Protocol::H2c, H2_CONNECTIONS),
        };
        LoadOptions {
            host: self.host().to_owned(),
            path: self.path.to_owned(),
            tls: tls.map(|tls| Tls { resume: self.client == Client::Handshakes { resume: true }, ..tls }),
            protocol,
            connections: connections * if self.wire == Wire::H1 { OPEN_LOOP_FACTOR } else { 1 },
            streams_per_connection: OPEN_LOOP_FACTOR * self.h2_streams,
            pace: Pace::Open { per_second },
            tick_us: TICK_US,
            until: Until::DurationMs(duration_ms),
            connection_per_request: self.connection_per_request,
            expect: Expect::Length(self.reply_bytes),
            ..LoadOptions::new(target)
        }
    }

    /// Idle connections to `target`.
    pub(super) fn idle(&self, target: SocketAddr, tls: Option<Tls>) -> LoadOptions {
        LoadOptions {
            host: self.host().to_owned(),
            tls,
            path: self.path.to_owned(),
            idle_connections: self.idle_connections,
            ..LoadOptions::new(target)
        }
    }

    const fn host(&self) -> &'static str {
        if self.tls { TLS_HOST } else { "bench" }
    }
}
