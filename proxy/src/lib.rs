//! The edge: listeners, request path, upstream pools, probes, access log.
//!
//! ```text
//!   listen ► detect ► serve ► route ► forward ► respond
//!   accept,  h1/h2    hyper   host,   hop-by-hop  the body carries the lease
//!   limits            task    table   headers,    to its last frame; one place
//!                             once    pool, retry turns errors into answers
//! ```
//!
//! One thread with one runtime per core: a connection, its requests and its upstream connections stay on
//! one core, and nothing on the request path takes a lock (a held service has one for its queue, one with passwords
//! one for what is known of them). The edge reads the routing table and cannot
//! write it. It knows nothing of containers, moves, stores or the API.
//!
//! Invariants:
//! * Every request that enters an upstream holds a lease until its last frame; a retired upstream gets
//!   no new request, and a core acknowledges a table only when it holds no idle connection to what that
//!   table has retired.
//! * What a client does wrong never counts against an upstream.
//! * A request is sent again only when it provably was not processed.
//! * An answer that broke off never ends like a complete one.

mod access_log;
mod address;
mod body;
mod choose;
mod clock;
mod config;
mod conn;
mod core;
mod crew;
mod detect;
mod early;
mod edge;
mod error;
mod forward;
mod forwarded;
mod framing;
#[cfg(fuzzing)]
pub mod fuzzing;
mod glitches;
mod grpc;
mod headers;
mod hold;
mod http1;
mod ids;
mod inflight;
mod listen;
mod metrics;
mod mirror;
mod outgoing;
mod overload;
mod pool;
mod probe;
mod proxy_protocol;
mod rates;
mod recent;
mod resolve;
mod respond;
mod route;
mod rules;
mod serve;
mod sockets;
mod sources;
mod splice;
mod tls;
mod upgrade;
mod wire;

pub use access_log::LogError;
pub use clock::{now_ms, now_us};
pub use config::{
    AccessLogConfig, AccessLogFormat, AccessLogTarget, Config, ConfigError, IpNet, IpNetError, Limits,
    MIN_HEADER_BYTES,
};
pub use edge::{BindError, Edge, Ending, RunError};
pub use error::{Blame, ProxyError, Reason};
pub use listen::{Orphans, Speaks};
pub use metrics::describe;
pub use sockets::{Group, Sockets};
pub use tls::{
    Certificate, CertificateSource, MAX_TICKET_KEYS, NoRandom, SourceError, Staple, TICKET_KEY_LIFE_MS,
    TicketKeys, TicketKeysError, Tickets, certificate_id, staple_id,
};
