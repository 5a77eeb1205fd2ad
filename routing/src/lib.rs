//! Routing: which upstream gets a request, and who is still inside it.
//!
//! ```text
//!   engine ── Change ──► TableWriter ── publish ──► TableReader ──► lookup(host, path) ──► Service
//!                            ▲                                                              │ enter()
//!                            └── acknowledged(version), receipts, counts ◄── Lease ◄── Upstream
//! ```
//!
//! The room is pure: no sockets, runtimes, clocks, files or formats. Time comes in as `now_ms`
//! (milliseconds of any monotonic clock of the caller), randomness as a number. There is one
//! [`TableWriter`] (it is not `Clone`) and any number of [`TableReader`]s; a reader loads an immutable
//! snapshot without a lock. Live state (health, leases, outcomes) sits in [`Upstream`], which is shared
//! by every snapshot that names the same generation, so that it survives table changes.
//!
//! Invariants:
//! * After [`Upstream::retire`] returns, no [`Upstream::enter`] succeeds, whatever table its caller holds.
//! * A generation is never used twice: a copy that comes back into service gets a new one.
//! * A [`DrainReceipt`] says `empty` only when every lease has been dropped.

mod balance;
mod builder;
mod canonical_path;
mod channel;
mod class;
mod domain;
mod drain;
mod hash;
mod hold;
mod host;
mod host_key;
mod keyed;
mod mirror;
mod net;
mod outcome;
mod path;
mod radix;
mod remote;
mod retry;
mod rules;
mod service;
mod spec;
mod spent;
mod table;
mod upstream;

pub use balance::{Balance, HashKey};
pub use builder::TableError;
pub use canonical_path::{CanonicalPath, canonical_path};
pub use channel::{Acknowledger, Applied, CachedReader, TableReader, TableWriter, table};
pub use class::{PerClass, TrafficClass};
pub use domain::{
    CertificateId, ChallengeAnswer, ChallengeId, ChallengeSpec, ClientAuth, DomainPolicy, DomainSpec,
    Domains, Hsts, NotAnId, StapleId, TlsMode, TlsVersion,
};
pub use drain::{DrainTime, Due};
pub use hash::stable_hash;
pub use hold::{HoldCounts, HoldQueue, HoldSpec, HoldVerdict, Joined, Ticket};
pub use host::{HostError, HostPattern, MAX_HOST_BYTES, MAX_LABEL_BYTES, canonical_host};
pub use mirror::{MIRROR_CLASSES, Mirror, MirrorCounts, MirrorOutcome, MirrorSlot, MirrorSpec};
pub use net::{IpNet, IpNetError};
pub use outcome::{Failure, LatencyBuckets, Outcome, OutcomeCounts};
pub use path::{PathError, canonical_prefix};
pub use remote::{Publication, RemoteEdge};
pub use retry::{Evidence, RetryBudget, RetryClass};
pub use rules::{
    BasicAuth, Coding, Compression, ErrorPage, ForwardAuth, HeaderEdits, PasswordHash, PasswordHashError,
    RateKey, RateLimit, Redirect, Rewrite, Rules, is_guarded_field,
};
pub use service::{Enter, NoUpstream, Service};
pub use spec::{
    Address, Change, HealthCheck, HealthCheckKind, Passive, PoolSpec, ProxyProtocol, RouteSpec,
    ServicePolicy, ServiceSpec, Sticky, UpstreamProtocol, UpstreamSpec,
};
pub use table::{Match, RoutingTable};
pub use upstream::{DrainReceipt, Draining, EdgeId, Generation, Health, Lease, LostEdge, Tally, Upstream};
