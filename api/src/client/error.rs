//! What can go wrong between a client and the server.

use crate::types::Problem;

/// Why a call has no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The base URL or the token cannot be used; nothing was sent.
    #[error("{detail}")]
    Settings {
        /// What is wrong with it.
        detail: String,
    },
    /// The server does not answer. Whether the request was carried out is not known if `sent`.
    #[error("{url} cannot be reached: {detail}")]
    Unreachable {
        /// Where.
        url: String,
        /// What was tried and what came of it.
        detail: String,
        /// The request may have reached the server: repeat it with the same `Idempotency-Key` only.
        sent: bool,
    },
    /// The server answered with a problem.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// Something answered, and it is not a server of this API, or one of another version.
    #[error("{url} gave an answer that is not understood: {detail}")]
    NotUnderstood {
        /// Where.
        url: String,
        /// What came.
        detail: String,
    },
}

impl ClientError {
    /// The problem, if the server named one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            _ => None,
        }
    }
}
