//! The server itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// `peregrine`.
    pub name: String,
    /// Version of the server.
    pub version: String,
    /// Version of the API, `v1`.
    pub api: String,
    /// Id of this installation; containers and processes bear it as a label.
    pub install: String,
}

/// Whether the server is ready for work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Readiness {
    /// Every check is good.
    pub ready: bool,
    /// The checks.
    pub checks: Vec<ReadinessCheck>,
}

/// One thing that has to be right before the server is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReadinessCheck {
    /// What is checked, such as `engine` or `edge`.
    pub name: String,
    /// It is right.
    pub ok: bool,
    /// What is wrong, or how it stands.
    pub detail: String,
}
