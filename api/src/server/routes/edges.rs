//! Edges in other processes.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;

use super::{ListQuery, NoQuery};
use crate::codes;
use crate::config::{Edges, EdgesError};
use crate::server::context::Context;
use crate::server::error::ApiError;
use crate::server::extract::{Json, Name, Query};
use crate::server::page::page;
use crate::types::{Edge, Invite, InviteRequest, Page};

/// A token is good for so long unless something else is asked for: the time to log in to another machine.
const DEFAULT_TTL_MS: u64 = 3_600_000;
/// A token that is good for longer lies about.
const MAX_TTL_MS: u64 = 7 * 24 * 3_600_000;

/// Edges by name
#[utoipa::path(get, path = "/api/v1/edges", tag = "edges", params(ListQuery),
    responses((status = 200, description = "Edges in other processes", body = Page<Edge>)))]
pub(in crate::server) async fn list_edges(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Edge>>, ApiError> {
    let edges = context.config.edges.as_ref().map(|edges| edges.list()).unwrap_or_default();
    let edges = page(
        edges.iter(),
        |edge| edge.name.clone(),
        false,
        query.limit,
        query.cursor.as_deref(),
        Clone::clone,
    )?;
    Ok(axum::Json(edges))
}

/// Make a token for an edge
///
/// The edge of this name joins with it, once. An edge of this name that is there goes on until the new one joins.
#[utoipa::path(post, path = "/api/v1/edges/invites", tag = "edges", request_body = InviteRequest,
    responses((status = 201, description = "The token, shown once", body = Invite)))]
pub(in crate::server) async fn invite_edge(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
    Json(request): Json<InviteRequest>,
) -> Result<(StatusCode, axum::Json<Invite>), ApiError> {
    let edges = linked(&context)?;
    let ttl_ms = request.ttl_ms.unwrap_or(DEFAULT_TTL_MS).min(MAX_TTL_MS);
    let made = off_thread(move || edges.invite(&request.name, ttl_ms)).await?;
    Ok((StatusCode::CREATED, axum::Json(made)))
}

/// Shut an edge out
///
/// It is heard no more. It goes on serving its last table until it is stopped.
#[utoipa::path(delete, path = "/api/v1/edges/{name}", tag = "edges",
    params(("name" = String, Path, description = "Name of the edge")),
    responses((status = 204, description = "Shut out")))]
pub(in crate::server) async fn remove_edge(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<StatusCode, ApiError> {
    let Some(edges) = context.config.edges.clone() else {
        return Err(ApiError::new(&codes::NO_EDGE, format!("there is no edge {name}")));
    };
    off_thread(move || edges.remove(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn linked(context: &Context) -> Result<Arc<dyn Edges>, ApiError> {
    let none = || ApiError::new(&codes::NO_LINK, "this server does not listen for edges");
    context.config.edges.clone().ok_or_else(none)
}

/// Files are written: not on a thread that answers others.
async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EdgesError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|error| Err(EdgesError::Failed(error.to_string())));
    done.map_err(|error| match error {
        EdgesError::BadName(why) => ApiError::new(&codes::EDGE_NAME, why),
        EdgesError::Unknown(why) => ApiError::new(&codes::NO_EDGE, why),
        EdgesError::Failed(why) => ApiError::new(&codes::INTERNAL, why),
    })
}
