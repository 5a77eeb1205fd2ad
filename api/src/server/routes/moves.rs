//! Moves: every rollout under one name.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use peregrine_engine::model::{Rollout, RolloutId};
use peregrine_engine::{Ask, EngineError};
use serde::Deserialize;
use utoipa::IntoParams;

use super::services::reason;
use super::{ChangeQuery, NoQuery, WaitQuery, progress, told};
use crate::codes;
use crate::server::context::{Context, carried_through};
use crate::server::error::ApiError;
use crate::server::extract::{Json, Key, Name, NoBody, Query, Wait};
use crate::server::page::page;
use crate::types::{DryRun, Move, MoveRequest, MoveState, Page, Plan, Receipt};

/// Which moves.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct MovesQuery {
    /// Of this service.
    service: Option<String>,
    /// In this state.
    state: Option<MoveState>,
    /// Most items of the page, 1 to 500; 50 unless given.
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// What a move would do
///
/// The plan says what blocks it, if anything does. Nothing is started.
#[utoipa::path(post, path = "/api/v1/moves/plan", tag = "moves", request_body = MoveRequest,
    responses((status = 200, description = "The plan", body = Plan)))]
pub(in crate::server) async fn plan_move(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
    Json(request): Json<MoveRequest>,
) -> Result<axum::Json<Plan>, ApiError> {
    let plan = context.engine.plan(ask(&request)).await?;
    Ok(axum::Json(Plan::from(&plan)))
}

/// Bring a service to a machine
#[utoipa::path(post, path = "/api/v1/moves", tag = "moves", request_body = MoveRequest, params(ChangeQuery),
    responses((status = 202, description = "Accepted; Location says where to look", body = Move),
        (status = 200, description = "It has ended within the time to wait; with `dry_run` what would be done", body = Move)))]
pub(in crate::server) async fn create_move(
    State(context): State<Context>,
    Query(query): Query<ChangeQuery>,
    Wait(wait): Wait,
    Key(key): Key,
    Json(request): Json<MoveRequest>,
) -> Result<Response, ApiError> {
    let ask = ask(&request);
    if query.dry_run {
        let plan = context.engine.plan(ask).await?;
        return Ok(axum::Json(DryRun::from(Plan::from(&plan))).into_response());
    }
    let engine = context.engine.clone();
    let reason = reason(request.reason);
    let work = async move { engine.start(ask, reason, request.plan_hash, key).await };
    let rollout = carried_through(work).await??.ok_or_else(|| {
        ApiError::new(&codes::NOTHING_TO_DO, format!("{} is on {} already", request.service, request.to))
    })?;
    let rollout = context.ended_within(rollout, wait).await;
    Ok(progress(&rollout, told(&context, &rollout)))
}

fn ask(request: &MoveRequest) -> Ask {
    Ask::Move {
        service: request.service.clone(),
        to: request.to.clone(),
        from: request.from.clone(),
        overrides: (&request.settings).into(),
    }
}

/// Moves, newest first
#[utoipa::path(get, path = "/api/v1/moves", tag = "moves", params(MovesQuery),
    responses((status = 200, description = "Moves", body = Page<Move>)))]
pub(in crate::server) async fn list_moves(
    State(context): State<Context>,
    Query(query): Query<MovesQuery>,
) -> Result<axum::Json<Page<Move>>, ApiError> {
    let state = context.engine.state();
    let wanted = |rollout: &&Rollout| {
        query.service.as_ref().is_none_or(|service| rollout.plan.service == *service)
            && query.state.is_none_or(|state| MoveState::from(rollout.state) == state)
    };
    let moves = page(
        state.rollouts.values().rev().map(AsRef::as_ref).filter(wanted),
        |rollout| rollout.id.to_string(),
        true,
        query.limit,
        query.cursor.as_deref(),
        |rollout| Move::of(rollout, context.engine.sample(&rollout.id).as_ref(), &state),
    )?;
    Ok(axum::Json(moves))
}

/// One move
#[utoipa::path(get, path = "/api/v1/moves/{id}", tag = "moves",
    params(("id" = String, Path, description = "Id of the move")),
    responses((status = 200, description = "The move", body = Move)))]
pub(in crate::server) async fn get_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<Move>, ApiError> {
    let rollout = context.rollout(&RolloutId(id))?;
    Ok(axum::Json(told(&context, &rollout)))
}

/// Hold a move at its present weights
#[utoipa::path(post, path = "/api/v1/moves/{id}/pause", tag = "moves",
    params(("id" = String, Path, description = "Id of the move")),
    responses((status = 200, description = "It is held", body = Move)))]
pub(in crate::server) async fn pause_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<axum::Json<Move>, ApiError> {
    control(&context, id, |engine, id| async move { engine.pause(&id).await }).await
}

/// Let a move go on
#[utoipa::path(post, path = "/api/v1/moves/{id}/resume", tag = "moves",
    params(("id" = String, Path, description = "Id of the move")),
    responses((status = 200, description = "It goes on", body = Move)))]
pub(in crate::server) async fn resume_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<axum::Json<Move>, ApiError> {
    control(&context, id, |engine, id| async move { engine.resume(&id).await }).await
}

/// Skip what is left of the present waiting
#[utoipa::path(post, path = "/api/v1/moves/{id}/promote", tag = "moves",
    params(("id" = String, Path, description = "Id of the move")),
    responses((status = 200, description = "It goes on at once", body = Move)))]
pub(in crate::server) async fn promote_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<axum::Json<Move>, ApiError> {
    control(&context, id, |engine, id| async move { engine.promote(&id).await }).await
}

/// Go back to the old copies
///
/// Answers once the ask is durable; the way back goes on. Refused (409, `move.past_return`) once the old copies are
/// being removed, and of a single-writer service once the new copy takes over: a rollback takes it back then.
#[utoipa::path(post, path = "/api/v1/moves/{id}/abort", tag = "moves",
    params(("id" = String, Path, description = "Id of the move"), WaitQuery),
    responses((status = 202, description = "It goes back", body = Move),
        (status = 200, description = "It is back within the time to wait", body = Move)))]
pub(in crate::server) async fn abort_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(_): Query<WaitQuery>,
    Wait(wait): Wait,
    NoBody: NoBody,
) -> Result<Response, ApiError> {
    let engine = context.engine.clone();
    let id = known(&context, id)?;
    let rollout = carried_through(async move { engine.abort(&id).await }).await??;
    let rollout = context.ended_within(rollout, wait).await;
    Ok(progress(&rollout, told(&context, &rollout)))
}

/// Go back after the end
///
/// A move under way is aborted. One that has ended gets a move back, which is the answer.
#[utoipa::path(post, path = "/api/v1/moves/{id}/rollback", tag = "moves",
    params(("id" = String, Path, description = "Id of the move"), WaitQuery),
    responses((status = 202, description = "The move that goes back; Location says where to look", body = Move),
        (status = 200, description = "It is back within the time to wait", body = Move)))]
pub(in crate::server) async fn rollback_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(_): Query<WaitQuery>,
    Wait(wait): Wait,
    Key(key): Key,
    NoBody: NoBody,
) -> Result<Response, ApiError> {
    let engine = context.engine.clone();
    let id = known(&context, id)?;
    let rollout = carried_through(async move { engine.rollback_rollout(&id, key).await }).await??;
    let rollout = context.ended_within(rollout, wait).await;
    Ok(progress(&rollout, told(&context, &rollout)))
}

/// Try again to remove what a move left behind
///
/// For a move that has ended as `needs_operator`. Done when nothing is left, also when nothing was; safe to repeat.
/// What is still left is in the `blockers` of the problem, and in `leftovers` of the move.
#[utoipa::path(post, path = "/api/v1/moves/{id}/cleanup", tag = "moves",
    params(("id" = String, Path, description = "Id of the move")),
    responses((status = 200, description = "Nothing is left", body = Move)))]
pub(in crate::server) async fn clean_up_move(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<axum::Json<Move>, ApiError> {
    control(&context, id, |engine, id| async move { engine.cleanup(&id).await }).await
}

/// What a move amounted to
#[utoipa::path(get, path = "/api/v1/moves/{id}/receipt", tag = "moves",
    params(("id" = String, Path, description = "Id of the move")),
    responses((status = 200, description = "The receipt", body = Receipt)))]
pub(in crate::server) async fn get_receipt(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<Receipt>, ApiError> {
    let rollout = context.rollout(&RolloutId(id))?;
    let receipt = context.engine.receipt(&rollout.id).await?;
    Ok(axum::Json(Receipt::of(&rollout.id, &rollout.plan.service, &receipt)))
}

async fn control<F>(
    context: &Context,
    id: String,
    ask: impl FnOnce(peregrine_engine::EngineHandle, RolloutId) -> F,
) -> Result<axum::Json<Move>, ApiError>
where
    F: Future<Output = Result<Rollout, EngineError>> + Send + 'static,
{
    let id = known(context, id)?;
    let rollout = carried_through(ask(context.engine.clone(), id)).await??;
    Ok(axum::Json(told(context, &rollout)))
}

fn known(context: &Context, id: String) -> Result<RolloutId, ApiError> {
    context.rollout(&RolloutId(id)).map(|rollout| rollout.id)
}
