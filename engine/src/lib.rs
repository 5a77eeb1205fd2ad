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

mod error;
mod handle;
pub mod model;
pub mod runtime;
pub mod state;
pub mod store;

pub use error::{EngineError, ErrorKind};
pub use handle::{
    Ask, EngineHandle, EngineProblem, IdempotencyKey, InstanceView, MachineCheck, MoveOverrides,
};
pub use state::State;
