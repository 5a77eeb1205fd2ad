//! Output of instances as NDJSON: one line, one document.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use jiff::Timestamp;
use peregrine_engine::model::{Instance, InstanceId};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::codes;
use crate::server::context::{Context, no_service};
use crate::server::error::ApiError;
use crate::server::extract::{Name, Query};
use crate::server::logs::{Lines, Which};
use crate::types::LogLine;

/// Most lines that `tail` may ask for.
const MAX_TAIL_LINES: usize = 100_000;

/// Which lines.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct LogsQuery {
    /// Goes on with new lines, also of copies that start later. An empty line every 10 s is a sign of life.
    #[serde(default)]
    follow: bool,
    /// So many of the last lines, at most 100000; without it all.
    tail: Option<usize>,
    /// Lines since this instant (RFC 3339).
    since: Option<Timestamp>,
}

/// Output of a service
///
/// Of all its copies, merged by time. A copy whose output cannot be read is told in a line of its own (`source`
/// is `notice`).
#[utoipa::path(get, path = "/api/v1/services/{name}/logs", tag = "logs",
    params(("name" = String, Path, description = "Name of the service"), LogsQuery),
    responses((status = 200, description = "Lines", body = LogLine, content_type = "application/x-ndjson")))]
pub(in crate::server) async fn service_logs(
    State(context): State<Context>,
    Name(name): Name,
    Query(query): Query<LogsQuery>,
) -> Result<Response, ApiError> {
    if !context.engine.state().services.contains_key(&name) {
        return Err(no_service(&name));
    }
    answer(&context, Which::Service(name), &query)
}

/// Output of one instance
#[utoipa::path(get, path = "/api/v1/instances/{id}/logs", tag = "logs",
    params(("id" = String, Path, description = "Id of the instance"), LogsQuery),
    responses((status = 200, description = "Lines", body = LogLine, content_type = "application/x-ndjson")))]
pub(in crate::server) async fn instance_logs(
    State(context): State<Context>,
    Name(id): Name,
    Query(query): Query<LogsQuery>,
) -> Result<Response, ApiError> {
    let known = |instance: &Instance| instance.id.as_str() == id;
    if !context.engine.state().instances.values().any(known) {
        return Err(ApiError::new(&codes::NO_INSTANCE, format!("there is no instance {id}")));
    }
    answer(&context, Which::Instance(InstanceId(id)), &query)
}

fn answer(context: &Context, which: Which, query: &LogsQuery) -> Result<Response, ApiError> {
    if query.tail.is_some_and(|lines| lines > MAX_TAIL_LINES) {
        return Err(ApiError::new(&codes::QUERY, format!("tail must be at most {MAX_TAIL_LINES}")).at("tail"));
    }
    let since = query.since.map(|since| u64::try_from(since.as_millisecond()).unwrap_or(0));
    let lines = Lines { engine: context.engine.clone(), which, tail: query.tail, since };
    let body = lines.stream(query.follow, context.heartbeat(), context.closing.clone());
    let form = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((form, axum::body::Body::from_stream(body)).into_response())
}
