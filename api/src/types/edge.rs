//! Edges in other processes.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How an edge stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EdgeState {
    /// It is connected.
    Connected,
    /// It is not connected, and is waited for until its lease ends.
    Waited,
    /// It was not heard of until its lease ended. It may serve the last table that it has.
    Lost,
    /// It ended in order, or has never been there.
    Away,
    /// A state of a later server.
    #[serde(other)]
    Unknown,
}

/// An edge that belongs to the installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Edge {
    /// Name.
    pub name: String,
    /// How it stands.
    pub state: EdgeState,
    /// Where it is connected from.
    pub address: Option<String>,
    /// Cores that serve.
    pub cores: u32,
    /// How long it is still waited for; `null` if it is not.
    pub lease_left_ms: Option<u64>,
    /// Version of the table that it uses.
    pub table_version: u64,
    /// Version of the newest table.
    pub newest_version: u64,
    /// The table that it uses is on its disk.
    pub saved: bool,
    /// Why it could not use the newest table.
    pub problem: Option<String>,
    /// When it was last heard of; `null` is never.
    pub seen_at: Option<Timestamp>,
    /// When it joined.
    pub joined_at: Timestamp,
}

/// Which edge is to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// Its name, a DNS label.
    pub name: String,
    /// How long the token is good; an hour unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

/// A token with which an edge joins, once. Shown once: the server keeps a digest of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Invite {
    /// The token. A secret.
    pub token: String,
    /// Name of the edge that will use it.
    pub name: String,
    /// When it ends.
    pub expires_at: Timestamp,
    /// Where the server listens for edges.
    pub listen: String,
}

impl std::fmt::Debug for Invite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Invite").field("name", &self.name).finish_non_exhaustive()
    }
}
