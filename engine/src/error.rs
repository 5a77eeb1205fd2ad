//! What the engine answers when it does not do what it was asked.

use crate::model::{Finding, RolloutId};

/// What kind of refusal it is; the API and the command line turn it into a status and an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The ask itself is wrong.
    Invalid,
    /// It names something that is not there.
    NotFound,
    /// Something else is in the way.
    Conflict,
    /// A machine or engine does not answer.
    Unreachable,
    /// The plan has blockers.
    Blocked,
    /// It was tried and failed.
    Failed,
    /// The store or the engine itself is in trouble.
    Internal,
}

/// A refusal that says what, why and what to do next.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// Kind.
    pub kind: ErrorKind,
    /// Stable code, such as `move.in_progress`.
    pub code: &'static str,
    /// What and why.
    pub message: String,
    /// What to do next.
    pub hint: String,
    /// The rollout that is in the way.
    pub rollout: Option<RolloutId>,
    /// Everything that blocks, if it is a plan.
    pub findings: Vec<Finding>,
}

impl EngineError {
    /// A refusal.
    #[must_use]
    pub fn new(
        kind: ErrorKind,
        code: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { kind, code, message: message.into(), hint: hint.into(), rollout: None, findings: Vec::new() }
    }
}
