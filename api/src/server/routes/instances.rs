//! Instances.

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::NoQuery;
use crate::codes;
use crate::server::context::{Context, no_service};
use crate::server::error::ApiError;
use crate::server::extract::{Name, Query};
use crate::server::page::page;
use crate::types::{Instance, Page};

/// Which instances.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct InstancesQuery {
    /// Of this service.
    service: Option<String>,
    /// Asks the machines what the instances use.
    #[serde(default)]
    stats: bool,
    /// Most items of the page, 1 to 500; 50 unless given.
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Instances by id
#[utoipa::path(get, path = "/api/v1/instances", tag = "instances", params(InstancesQuery),
    responses((status = 200, description = "Instances", body = Page<Instance>)))]
pub(in crate::server) async fn list_instances(
    State(context): State<Context>,
    Query(query): Query<InstancesQuery>,
) -> Result<axum::Json<Page<Instance>>, ApiError> {
    if let Some(service) =
        query.service.as_ref().filter(|name| !context.engine.state().services.contains_key(*name))
    {
        return Err(no_service(service));
    }
    let mut views = context.engine.instances(query.service.as_deref(), query.stats).await?;
    views.sort_by(|a, b| a.instance.id.cmp(&b.instance.id));
    let instances = page(
        views.iter(),
        |view| view.instance.id.to_string(),
        false,
        query.limit,
        query.cursor.as_deref(),
        Into::into,
    )?;
    Ok(axum::Json(instances))
}

/// One instance, with what it uses
#[utoipa::path(get, path = "/api/v1/instances/{id}", tag = "instances",
    params(("id" = String, Path, description = "Id of the instance")),
    responses((status = 200, description = "Instance", body = Instance)))]
pub(in crate::server) async fn get_instance(
    State(context): State<Context>,
    Name(id): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<Instance>, ApiError> {
    let gone = || ApiError::new(&codes::NO_INSTANCE, format!("there is no instance {id}"));
    let state = context.engine.state();
    let (_, instance) = state.instances.iter().find(|(known, _)| known.as_str() == id).ok_or_else(gone)?;
    let views = context.engine.instances(Some(&instance.service), true).await?;
    let view = views.iter().find(|view| view.instance.id.as_str() == id).ok_or_else(gone)?;
    Ok(axum::Json(view.into()))
}
