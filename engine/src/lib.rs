//! The engine: what is wanted, what is there, and the one machine that changes the one into the other.
//!
//! ```text
//!   ask ─► plan (pure) ─► store.commit ─► State::apply ─► render ─► TableWriter::apply ─► edges acknowledge
//!                             │  intent before the deed, settlement after it
//!                             ▼
//!                       executor ─► Runtime (Docker, processes)          supervisor: deadlines, abort, health
//! ```
//!
//! The engine is the only writer of the routing table. It knows nothing of HTTP requests, TLS, the API
//! or the command line.

mod alarms;
mod asks;
pub mod audit;
pub mod backup;
mod check;
mod core;
mod domains;
mod draft;
mod engine;
mod error;
mod events;
mod handle;
pub mod journal;
mod keys;
mod latest;
pub mod model;
pub mod order;
mod outside;
pub mod plan;
mod probe;
mod reconcile;
mod recovery;
mod render;
mod rollout;
pub mod runtime;
pub mod state;
mod steps;
pub mod store;
mod table;
pub mod vault;

pub use check::MAX_REPLICAS;
pub use core::{Connect, EdgeClock};
pub use domains::DomainChange;
pub use draft::MAX_STORED_EVENTS;
pub use engine::{Engine, EngineConfig};
pub use error::{EngineError, ErrorKind};
pub use handle::{
    Ask, ConfigApplied, EngineHandle, EngineProblem, IdempotencyKey, InstanceView, MachineCheck,
    MoveOverrides,
};
pub use outside::{Connection, Dial, Dialled, Ids, Outside, WallClock};
pub use state::State;
