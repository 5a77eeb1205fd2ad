//! What can go wrong with a request: one reason each, who is to blame, and whether a retry is safe.

use http::StatusCode;
use peregrine_routing::{Evidence, Failure};

/// Whose fault it is. Only an upstream's own faults count against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The client sent rubbish, left, or was too slow.
    Client,
    /// The upstream did not answer, or not properly.
    Upstream,
    /// The edge has no way to serve the request.
    Edge,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal, $blame:ident;)*) => {
        /// The machine-readable reason of an answer that the edge made itself: the same string in the
        /// answer (`x-peregrine-reason`), the access log and the metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The string that machines read.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Status code of the answer, or of the log line if no answer could be sent (499).
            #[must_use]
            pub const fn status_code(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// Whose fault it is.
            #[must_use]
            pub const fn blame(self) -> Blame {
                match self { $(Self::$name => Blame::$blame,)* }
            }
        }
    };
}

reasons! {
    /// The request line or a header field is malformed (RFC 9112 §3, §5).
    BadRequestHead = "bad_request_head", 400, Client;
    /// The request head is too large, or has too many fields.
    HeadTooLarge = "head_too_large", 431, Client;
    /// The request target is too long.
    UriTooLong = "uri_too_long", 414, Client;
    /// `Host` is missing, there twice, no host, or not the same as `:authority`.
    BadHost = "bad_host", 400, Client;
    /// The request target has no form that fits its method (RFC 9112 §3.2).
    BadTarget = "bad_target", 400, Client;
    /// The path has a form that origins read in different ways, and not all of them would end at the same service.
    AmbiguousPath = "ambiguous_path", 400, Client;
    /// `Content-Length` together with `Transfer-Encoding` (RFC 9112 §6.1: a smuggling attempt).
    ConflictingLength = "conflicting_length", 400, Client;
    /// `Transfer-Encoding` is something else than one `chunked`.
    BadTransferEncoding = "bad_transfer_encoding", 400, Client;
    /// `Upgrade` on a request that has a body.
    UpgradeWithBody = "upgrade_with_body", 400, Client;
    /// The body is not what its framing says: a bad chunk, or a length that does not fit.
    BadRequestBody = "bad_request_body", 400, Client;
    /// The body is larger than the service allows.
    BodyTooLarge = "body_too_large", 413, Client;
    /// An expectation other than `100-continue` (RFC 9110 §10.1.1).
    ExpectationFailed = "expectation_failed", 417, Client;
    /// A method that an edge does not forward (TRACE would show credentials that were added on the way).
    MethodNotAllowed = "method_not_allowed", 405, Client;
    /// CONNECT: the edge is no forward proxy.
    ConnectNotSupported = "connect_not_supported", 501, Client;
    /// The head of the request did not come in time.
    HeadTimeout = "head_timeout", 408, Client;
    /// The body of the request stood still for too long.
    BodyTimeout = "body_timeout", 408, Client;
    /// The client closed before the answer was complete. Nobody reads this status; it is for the log.
    ClientClosed = "client_closed", 499, Client;
    /// The client took nothing of the answer for too long.
    ClientStalled = "client_stalled", 499, Client;
    /// A tunnel was silent for too long. For the log: its answer was 101.
    TunnelIdle = "tunnel_idle", 504, Edge;
    /// The host is not served on a connection that was made for another (RFC 9110 §15.5.20).
    Misdirected = "misdirected", 421, Client;
    /// No service has this host and path.
    NoRoute = "no_route", 404, Edge;
    /// The service has no upstream that could be used.
    NoUpstream = "no_upstream", 503, Edge;
    /// The client's address is not among those that the service serves.
    AddressDenied = "address_denied", 403, Edge;
    /// The client asks more often than the service allows.
    RateLimited = "rate_limited", 429, Edge;
    /// The request bears no name and password that the service lets in.
    AuthRequired = "auth_required", 401, Edge;
    /// Whoever decides whether the request goes on cannot be asked.
    AuthUnavailable = "auth_unavailable", 503, Edge;
    /// The service has as many requests in flight as it may have.
    ServiceBusy = "service_busy", 503, Edge;
    /// What the service asks of requests changed while this one waited: it has to come again.
    RulesChanged = "rules_changed", 503, Edge;
    /// The service is held, and there is no room for another request that waits.
    HoldFull = "hold_full", 503, Edge;
    /// The request has waited for a held service for as long as one may.
    HoldTooOld = "hold_too_old", 503, Edge;
    /// The edge has more memory than it may have.
    Overloaded = "overloaded", 503, Edge;
    /// The edge is shutting down and the time for it is over.
    ShuttingDown = "shutting_down", 503, Edge;
    /// Something failed inside the edge.
    Internal = "internal", 500, Edge;
    /// The upstream's name could not be resolved.
    DnsFailed = "upstream_dns_failed", 502, Upstream;
    /// No connection to the upstream.
    ConnectFailed = "upstream_connect_failed", 502, Upstream;
    /// The connection to the upstream did not open in time.
    ConnectTimeout = "upstream_connect_timeout", 504, Upstream;
    /// The upstream closed the connection before it answered.
    UpstreamReset = "upstream_reset", 502, Upstream;
    /// The upstream said that it did not process the request, and no retry was possible.
    UpstreamRefused = "upstream_refused", 503, Upstream;
    /// What the upstream sent is not HTTP.
    UpstreamProtocol = "upstream_protocol", 502, Upstream;
    /// The upstream did not answer in time.
    UpstreamTimeout = "upstream_timeout", 504, Upstream;
    /// The upstream broke off in the middle of its answer.
    UpstreamBodyAborted = "upstream_body_aborted", 502, Upstream;
    /// The upstream's answer stood still for too long.
    UpstreamBodyTimeout = "upstream_body_timeout", 504, Upstream;
    /// The request was still running when the upstream's hard drain deadline passed.
    UpstreamCut = "upstream_cut", 503, Edge;
}

impl Reason {
    /// The status code of the answer.
    #[must_use]
    pub fn status(self) -> StatusCode {
        StatusCode::from_u16(self.status_code()).unwrap_or(StatusCode::BAD_GATEWAY)
    }

    /// How the failure counts against the upstream that it happened with, if it does.
    #[must_use]
    pub const fn failure(self) -> Option<Failure> {
        match self {
            Self::DnsFailed | Self::ConnectFailed | Self::ConnectTimeout => Some(Failure::Connect),
            Self::UpstreamReset | Self::UpstreamRefused => Some(Failure::Reset),
            Self::UpstreamProtocol => Some(Failure::Protocol),
            Self::UpstreamTimeout => Some(Failure::Timeout),
            _ => None,
        }
    }
}

/// A request that failed, with what is known of it.
#[derive(Debug, thiserror::Error)]
#[error("{}", reason.as_str())]
pub struct ProxyError {
    /// Why.
    pub reason: Reason,
    /// What is known of how far the request got; `None` if it never had an upstream.
    pub evidence: Option<Evidence>,
    /// What was seen.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ProxyError {
    /// An error before any upstream was involved.
    #[must_use]
    pub const fn new(reason: Reason) -> Self {
        Self { reason, evidence: None, source: None }
    }

    /// An error with an upstream.
    #[must_use]
    pub const fn with(reason: Reason, evidence: Evidence) -> Self {
        Self { reason, evidence: Some(evidence), source: None }
    }

    /// Adds what was seen.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl From<Reason> for ProxyError {
    fn from(reason: Reason) -> Self {
        Self::new(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_name_of_its_own_and_a_status_that_is_an_error() {
        let names: std::collections::HashSet<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        assert!(Reason::ALL.iter().all(|reason| reason.status_code() >= 400));
    }

    #[test]
    fn what_a_client_did_never_counts_against_an_upstream() {
        for reason in Reason::ALL {
            assert!(reason.blame() != Blame::Client || reason.failure().is_none(), "{reason:?}");
        }
    }
}
