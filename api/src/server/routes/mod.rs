//! The handlers, one file for each noun. Each is documented where it is written, and `router.rs` cannot take
//! one that is not.

pub(super) mod audit;
pub(super) mod domains;
pub(super) mod edges;
pub(super) mod events;
pub(super) mod instances;
pub(super) mod logs;
pub(super) mod machines;
pub(super) mod moves;
pub(super) mod services;
pub(super) mod system;

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use peregrine_engine::model::Rollout;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::context::Context;
use crate::types::Move;

/// Which part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Most items of the page, 1 to 500; 50 unless given.
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// No query parameters at all.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoQuery {}

/// How a change is to be carried out.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ChangeQuery {
    /// Tells what would be done and does nothing.
    #[serde(default)]
    dry_run: bool,
    /// Answers when the work has ended, or after so long. `Prefer: wait=SECONDS` says the same.
    #[allow(dead_code, reason = "read by `Wait`, named here so that it is known and documented")]
    wait_ms: Option<u64>,
}

/// How an action on a move is to be carried out.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitQuery {
    /// Answers when the work has ended, or after so long. `Prefer: wait=SECONDS` says the same.
    #[allow(dead_code, reason = "read by `Wait`, named here so that it is known and documented")]
    wait_ms: Option<u64>,
}

/// A rollout with its latest reading.
pub(super) fn told(context: &Context, rollout: &Rollout) -> Move {
    Move::of(rollout, context.engine.sample(&rollout.id).as_ref(), &context.engine.state())
}

/// 202 and where to look while the rollout goes on, 200 when it has ended.
pub(super) fn progress<T: Serialize>(rollout: &Rollout, body: T) -> Response {
    let status = if rollout.state.is_terminal() { StatusCode::OK } else { StatusCode::ACCEPTED };
    (status, location(&["moves", rollout.id.as_str()]), axum::Json(body)).into_response()
}

pub(super) fn location(segments: &[&str]) -> [(HeaderName, HeaderValue); 1] {
    let path = format!("/api/v1/{}", segments.join("/"));
    // Names and ids are DNS labels and the like; anything else could not have been created.
    [(header::LOCATION, HeaderValue::try_from(path).unwrap_or(HeaderValue::from_static("/api/v1/")))]
}
