//! What is measured.

use crate::load::{Expect, LoadOptions, Pace, Protocol, Until};
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
};

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

impl Scenario {
    /// The open loop of this scenario.
    pub(super) fn open_loop(&self, target: SocketAddr, per_second: u32, duration_ms: u64) -> LoadOptions {
        let (protocol, connections) = match self.wire {
            Wire::H1 => (Protocol::Http1, CONNECTIONS),
            Wire::H2 => (Protocol::H2c, H2_CONNECTIONS),
        };
        LoadOptions {
            host: "bench".to_owned(),
            path: self.path.to_owned(),
            protocol,
            connections: connections * if self.wire == Wire::H1 { OPEN_LOOP_FACTOR } else { 1 },
            streams_per_connection: OPEN_LOOP_FACTOR * CONNECTIONS / H2_CONNECTIONS,
            pace: Pace::Open { per_second },
            tick_us: TICK_US,
            until: Until::DurationMs(duration_ms),
            connection_per_request: self.connection_per_request,
            expect: Expect::Length(self.reply_bytes),
            ..LoadOptions::new(target)
        }
    }

    /// Idle connections to `target`.
    pub(super) fn idle(&self, target: SocketAddr) -> LoadOptions {
        LoadOptions {
            host: "bench".to_owned(),
            path: self.path.to_owned(),
            idle_connections: self.idle_connections,
            ..LoadOptions::new(target)
        }
    }
}
