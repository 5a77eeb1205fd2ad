//! What the engine answers when it does not do what it was asked.

use crate::model::{Finding, RolloutId};
use crate::runtime::RuntimeError;
use crate::store::StoreError;

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

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> Self {
        let (kind, code, hint) = match &error {
            StoreError::Conflict(_) => {
                (ErrorKind::Conflict, "store.conflict", "Somebody was faster. Look again, then repeat.")
            }
            StoreError::TooLarge(_) => (ErrorKind::Invalid, "store.too_large", "Make it smaller."),
            StoreError::Full(_) => (
                ErrorKind::Internal,
                "store.full",
                "Make room on the disk of the data folder; traffic goes on meanwhile.",
            ),
            StoreError::Corrupt(_) => {
                (ErrorKind::Internal, "store.corrupt", "Restore the data folder from a backup.")
            }
            StoreError::Io(_) => (
                ErrorKind::Internal,
                "store.io",
                "Check the disk of the data folder; traffic goes on meanwhile.",
            ),
            StoreError::Newer { .. } => {
                (ErrorKind::Internal, "store.newer", "Start the newer version of Peregrine again.")
            }
            StoreError::Compacted { .. } => {
                (ErrorKind::Internal, "store.compacted", "Read from the beginning again.")
            }
            StoreError::Fenced { .. } => {
                (ErrorKind::Conflict, "store.fenced", "Ask the engine that leads; this one ends.")
            }
            StoreError::Locked => {
                (ErrorKind::Conflict, "store.locked", "Stop the other process, or use another data folder.")
            }
        };
        let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        Self::new(kind, code, format!("{error}{cause}"), hint)
    }
}

/// Code of what a machine refused because it has seen a higher epoch.
pub(crate) const FENCED_CODE: &str = "runtime.fenced";
/// Code of an instance that reached its limit on memory.
pub(crate) const OUT_OF_MEMORY_CODE: &str = "instance.out_of_memory";
/// What to do about it.
pub(crate) const OUT_OF_MEMORY_HINT: &str =
    "Raise its limit (resources.memory in the manifest), or see why it takes so much.";

impl From<&RuntimeError> for Finding {
    fn from(error: &RuntimeError) -> Self {
        let (code, hint) = match error {
            RuntimeError::Unreachable { .. } => (
                "machine.unreachable",
                "Check that the machine is up and its engine runs: peregrine machines check.",
            ),
            RuntimeError::NoImage { .. } => {
                ("image.missing", "Check the name of the image and that the machine may pull it.")
            }
            RuntimeError::Refused { .. } => {
                ("runtime.refused", "Change what the engine objects to in the manifest, then deploy again.")
            }
            RuntimeError::Exited { out_of_memory: true, .. } => (OUT_OF_MEMORY_CODE, OUT_OF_MEMORY_HINT),
            RuntimeError::Exited { .. } => {
                ("instance.exited", "Read its last output; check command, environment and port.")
            }
            RuntimeError::Fenced { .. } => {
                (FENCED_CODE, "Another control plane of this installation is newer. Run only one.")
            }
            RuntimeError::Unsupported(_) => ("runtime.unsupported", "Choose another machine."),
            RuntimeError::Other { .. } => ("runtime.failed", "See the machine's own log."),
        };
        Self { code: code.to_owned(), message: error.to_string(), hint: hint.to_owned() }
    }
}

impl From<RuntimeError> for EngineError {
    fn from(error: RuntimeError) -> Self {
        let kind = match error {
            RuntimeError::Unreachable { .. } => ErrorKind::Unreachable,
            RuntimeError::NoImage { .. } => ErrorKind::NotFound,
            _ => ErrorKind::Failed,
        };
        let code = match error {
            RuntimeError::Unreachable { .. } => "machine.unreachable",
            RuntimeError::NoImage { .. } => "image.missing",
            _ => "runtime.failed",
        };
        let finding = Finding::from(&error);
        Self::new(kind, code, finding.message, finding.hint)
    }
}
