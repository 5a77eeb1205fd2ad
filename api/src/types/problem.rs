//! Errors as they go over the wire: RFC 9457 problem details.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Finding;

/// Why something was not done, what it means and what to do next (RFC 9457, `application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// URI of the kind of problem (RFC 9457 §3.1.1): `urn:peregrine:problem:` and the code.
    #[serde(rename = "type")]
    pub type_uri: String,
    /// The code in words; the same for every occurrence.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened this time, and why.
    pub detail: String,
    /// Path of the request.
    pub instance: String,
    /// Stable code, such as `move.in_progress`. The list is in `docs/api.md`.
    pub code: String,
    /// What kind of refusal it is; the command line makes its exit code of it.
    pub kind: ProblemKind,
    /// What to do next.
    pub hint: String,
    /// Id of the request, also in the `x-request-id` header and in the server's log.
    pub request_id: String,
    /// Whether the same request may succeed later without any change.
    pub retryable: bool,
    /// What is wrong with which part of the request.
    #[serde(default)]
    pub errors: Vec<FieldError>,
    /// Id of the move that is in the way.
    #[serde(rename = "move", default)]
    pub move_id: Option<String>,
    /// Everything that blocks the plan.
    #[serde(default)]
    pub blockers: Vec<Finding>,
}

/// What is wrong with one part of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// JSON Pointer (RFC 6901) into the body, or the name of a query parameter or header.
    pub pointer: String,
    /// What is wrong with it.
    pub message: String,
}

impl FieldError {
    /// An error at a pointer.
    #[must_use]
    pub fn new(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into() }
    }
}

/// What kind of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The request itself is wrong.
    Invalid,
    /// The token is missing or wrong, or the request comes from where it may not come from.
    Auth,
    /// It names something that is not there.
    NotFound,
    /// Something else is in the way.
    Conflict,
    /// A machine or its engine does not answer.
    Unreachable,
    /// The plan has blockers; nothing was started.
    Blocked,
    /// It was tried and failed.
    Failed,
    /// The server itself is in trouble.
    #[serde(other)]
    Internal,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}
