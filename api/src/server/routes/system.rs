//! The server itself: life, readiness, version, metrics, status, the document of this API.

use axum::extract::State;
use axum::response::IntoResponse;
use http::{StatusCode, header};
use serde::Deserialize;
use utoipa::IntoParams;

use super::NoQuery;
use crate::server::context::Context;
use crate::server::error::ApiError;
use crate::server::extract::Query;
use crate::types::{Readiness, Status, Version};

const API: &str = "v1";

/// Whether the server lives
#[utoipa::path(get, path = "/livez", tag = "system", security(()),
    responses((status = 200, description = "It lives", body = String, content_type = "text/plain")))]
pub(in crate::server) async fn livez() -> &'static str {
    "ok\n"
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct ReadyQuery {
    /// Answers with 200 in any case: for readers of the report rather than of the status.
    #[serde(default)]
    report: bool,
}

/// Whether the server is ready for work
#[utoipa::path(get, path = "/readyz", tag = "system", security(()), params(ReadyQuery),
    responses((status = 200, description = "It is ready", body = Readiness),
        (status = 503, description = "It is not ready", body = Readiness)))]
pub(in crate::server) async fn readyz(
    State(context): State<Context>,
    Query(query): Query<ReadyQuery>,
) -> impl IntoResponse {
    let checks = context.config.readiness.as_ref().map(|checks| checks()).unwrap_or_default();
    let ready = checks.iter().all(|check| check.ok) && !context.closing.is_cancelled();
    let status = if ready || query.report { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(Readiness { ready, checks }))
}

/// Metrics in Prometheus' text form
#[utoipa::path(get, path = "/metrics", tag = "system",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain")))]
pub(in crate::server) async fn metrics(State(context): State<Context>) -> impl IntoResponse {
    let text_form = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (text_form, context.config.metrics.as_ref().map(|text| text()).unwrap_or_default())
}

/// This document
#[utoipa::path(get, path = "/api/openapi.json", tag = "system", security(()),
    responses((status = 200, description = "The OpenAPI 3.1 document", body = serde_json::Value)))]
pub(in crate::server) async fn openapi(State(context): State<Context>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], context.openapi.clone())
}

/// What answers
#[utoipa::path(get, path = "/api/v1/version", tag = "system",
    responses((status = 200, description = "Version", body = Version)))]
pub(in crate::server) async fn version(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
) -> axum::Json<Version> {
    axum::Json(Version {
        name: "peregrine".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: API.to_owned(),
        install: context.engine.install(),
    })
}

/// How everything stands
///
/// Services with their places, versions, health and weights, machines, and the moves under way, in one document.
#[utoipa::path(get, path = "/api/v1/status", tag = "system",
    responses((status = 200, description = "Status", body = Status)))]
pub(in crate::server) async fn status(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<Status>, ApiError> {
    let views = context.engine.instances(None, false).await?;
    let state = context.engine.state();
    Ok(axum::Json(Status::of(&context.engine, &state, &views, env!("CARGO_PKG_VERSION"))))
}
