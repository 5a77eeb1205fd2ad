//! What the engine answers to: one file per noun, behind [`crate::EngineHandle`].

pub(crate) mod audit;
pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod machines;
mod observe;
pub(crate) mod rollouts;
pub(crate) mod services;
pub(crate) mod views;

use crate::error::{EngineError, ErrorKind};

/// Carries work to its end even if the asker goes away in the middle (a client that hangs up): what was
/// accepted must also be begun.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(EngineError::new(
            ErrorKind::Internal,
            "engine.defect",
            format!("the engine met a defect: {error}"),
            "Look at the state before you ask again; please report it with the log.",
        ))
    })
}
