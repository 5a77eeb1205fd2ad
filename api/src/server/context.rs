//! What every handler has at hand.

use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use peregrine_engine::EngineHandle;
use peregrine_engine::model::{Rollout, RolloutId};
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::idempotency::Answers;
use crate::codes;
use crate::config::Config;
use crate::token::TokenDigest;

/// What every handler has at hand. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Context(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) engine: EngineHandle,
    pub(crate) config: Config,
    pub(crate) token: TokenDigest,
    pub(crate) answers: Answers,
    pub(crate) openapi: String,
    /// Cancelled at the shutdown: streams end.
    pub(crate) closing: CancellationToken,
}

impl Deref for Context {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Context {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    pub(crate) fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.config.limits.heartbeat_ms)
    }

    /// Waits for the end of a rollout, at most so long; then tells how it stands.
    pub(crate) async fn ended_within(&self, rollout: Rollout, wait: Duration) -> Rollout {
        if wait.is_zero() || rollout.state.is_terminal() {
            return rollout;
        }
        match tokio::time::timeout(wait, self.engine.ended(&rollout.id)).await {
            Ok(Ok(ended)) => ended,
            _ => self.rollout(&rollout.id).unwrap_or(rollout),
        }
    }

    pub(crate) fn rollout(&self, id: &RolloutId) -> Result<Rollout, ApiError> {
        let state = self.engine.state();
        state.rollouts.get(id).map(|rollout| Rollout::clone(rollout)).ok_or_else(|| no_move(id.as_str()))
    }
}

pub(crate) fn no_move(id: &str) -> ApiError {
    ApiError::new(&codes::NO_MOVE, format!("there is no move {id}"))
}

pub(crate) fn no_service(name: &str) -> ApiError {
    ApiError::new(&codes::NO_SERVICE, format!("there is no service {name}"))
}

/// Carries a change through even when the one who asked for it goes away: a deed that is half done because a
/// client hung up would be worse than one that nobody waited for.
pub(crate) async fn carried_through<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::spawn(work)
        .map(|done| {
            done.map_err(|error| ApiError::new(&codes::INTERNAL, format!("the work ended early: {error}")))
        })
        .await
}
