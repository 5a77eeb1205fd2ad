//! The link: one authenticated, encrypted stream between an engine and each edge that runs in another process.
//!
//! ```text
//!   engine's process                                                    edge's process
//!   TableWriter ─► RemoteEdge ─► server ═══ tables, deadlines ═══► edge ─► TableWriter ─► TableReader ─► proxy
//!                  Upstream ◄──── server ◄══ acknowledgements, ═══ edge ◄─ Upstream (leases, outcomes, health)
//!                                            tallies
//! ```
//!
//! Two things cross, as they do inside of one process: tables go down, live counts come up. Nothing that comes down
//! is a command to anything but the edge's own table, and nothing that comes up is more than counts, and the question for
//! a certificate that the table names ([`Secrets`]).
//!
//! * An edge that is not heard of is waited for until its lease ends, and then told as lost, never as empty.
//! * An edge that has a table on its disk serves from it without an engine, for as long as it takes.
//! * Both sides prove who they are with certificates of the installation's own authority ([`authority`]); the first
//!   contact is proved by a token that names that authority and is good for one use.
//! * Whatever comes from the other side is bounded in size before it is read ([`wire`]).

pub mod authority;
mod edge;
mod files;
mod records;
mod registry;
mod saved;
mod secrets;
mod server;
mod tls;
mod token;
pub mod wire;

pub use edge::{Before, EdgeError, EdgeLink, Joined, LinkStatus, NotGiven, PlaceHandle, SecretsHandle, join};
pub use records::newest_epoch;
pub use registry::{Invite, RegistryError};
pub use saved::{Saved, SavedError, SavedTable};
pub use secrets::Secrets;
pub use server::{EdgeState, EdgeView, Link, LinkConfig, LinkError, LinkHandle, PATIENCE_LEASES};
pub use token::{JoinToken, TokenError};
pub use wire::{KeyedCertificate, Secret, Staple};

/// How long an edge that is not heard of is waited for, unless the operator says otherwise: longer than a network
/// takes to find another way, short enough that a move does not stand still for it.
pub const DEFAULT_LEASE_MS: u32 = 15_000;
/// So often is each side heard of within a lease.
pub const BEATS_PER_LEASE: u32 = 5;
