//! The HTTP API: what goes over the wire, who answers it, and the client that asks.
//!
//! ```text
//!   command line, console ─► client ─► HTTP ─► server ─► EngineHandle
//!                               └───── types ─────┘
//! ```
//!
//! The room knows the engine by its [`EngineHandle`](peregrine_engine::EngineHandle) alone: nothing of
//! Docker, of the routing table or of how a step works. It decides nothing about services; it checks who
//! asks, turns words into asks, and turns answers and refusals into words.

pub mod client;
pub mod codes;
mod config;
mod domains;
pub mod probes;
pub mod request;
mod server;
mod token;
pub mod types;

pub use config::{Config, DEFAULT_LISTEN, Edges, EdgesError, Limits, MetricsText, ReadinessChecks};
pub use domains::{Domains, DomainsError};
pub use server::{Api, BindError, openapi_json};
pub use token::{TOKEN_FILE, TOKEN_PREFIX, TokenError, read_token, token_file};
