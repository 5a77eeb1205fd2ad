//! What becomes of handshakes, counted as `crate::metrics` does: plain cells, summed up ten times a second.

use std::cell::Cell;

use metrics::{counter, gauge};
use rustls::ProtocolVersion;

use crate::metrics::{Count, Level};

/// What became of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Result {
    /// There is a session.
    Done { version: Option<ProtocolVersion>, resumed: bool },
    /// The client left, or its connection broke.
    Left,
    /// No agreement, no hello, or no proof.
    Failed,
    /// Nobody's name.
    UnknownName,
    /// A name whose certificate is not there.
    NoCertificate,
    /// It took too long.
    Cut,
    /// The answer to a certificate authority.
    Validated,
    /// The service speaks TLS itself.
    PassedThrough,
}

/// Labels: version and result.
const RESULTS: [(&str, &str); 11] = [
    ("1.3", "full"),
    ("1.3", "resumed"),
    ("1.2", "full"),
    ("1.2", "resumed"),
    ("none", "left"),
    ("none", "failed"),
    ("none", "unknown_name"),
    ("none", "no_certificate"),
    ("none", "cut"),
    ("none", "validated"),
    ("none", "passed_through"),
];

impl Result {
    fn place(self) -> usize {
        match self {
            Self::Done { version, resumed } => {
                let old = version != Some(ProtocolVersion::TLSv1_3);
                usize::from(old) * 2 + usize::from(resumed)
            }
            Self::Left => 4,
            Self::Failed => 5,
            Self::UnknownName => 6,
            Self::NoCertificate => 7,
            Self::Cut => 8,
            Self::Validated => 9,
            Self::PassedThrough => 10,
        }
    }
}

/// Says what each metric means.
pub(crate) fn describe() {
    use metrics::{describe_counter, describe_gauge};
    describe_counter!("peregrine_edge_tls_handshakes_total", "TLS handshakes by version and result");
    describe_counter!(
        "peregrine_edge_tls_handshakes_delayed_total",
        "TLS handshakes that had to wait because their core or their network had enough of them"
    );
    describe_gauge!("peregrine_edge_tls_handshakes_in_progress", "TLS handshakes that are not over yet");
    describe_gauge!(
        "peregrine_edge_tls_handshakes_awaiting_certificate",
        "TLS handshakes that wait for a certificate that is being ordered"
    );
}

/// One core's counts.
pub(crate) struct TlsMetrics {
    results: [Count; RESULTS.len()],
    delayed: Count,
    open: Cell<usize>,
    in_progress: Level,
    awaiting: Level,
}

impl TlsMetrics {
    pub(crate) fn new() -> Self {
        let count = |(version, result): (&'static str, &'static str)| {
            Count::new(
                counter!("peregrine_edge_tls_handshakes_total", "version" => version, "result" => result),
            )
        };
        Self {
            results: RESULTS.map(count),
            delayed: Count::new(counter!("peregrine_edge_tls_handshakes_delayed_total")),
            open: Cell::new(0),
            in_progress: Level::new(gauge!("peregrine_edge_tls_handshakes_in_progress")),
            awaiting: Level::new(gauge!("peregrine_edge_tls_handshakes_awaiting_certificate")),
        }
    }

    pub(crate) fn begun(&self) {
        self.open.set(self.open.get() + 1);
    }

    pub(crate) fn ended(&self) {
        self.open.set(self.open.get() - 1);
    }

    pub(crate) fn tell(&self, result: Result) {
        self.results[result.place()].add(1);
    }

    /// It had to wait for a place.
    pub(crate) fn delayed(&self) {
        self.delayed.add(1);
    }

    pub(crate) fn flush(&self, awaiting: u32) {
        self.delayed.flush();
        self.results.iter().for_each(Count::flush);
        self.in_progress.tell(self.open.get());
        self.awaiting.tell(awaiting as usize);
    }
}
