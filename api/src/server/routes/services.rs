//! Services, their versions, and the changes of them.

use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use peregrine_engine::{Ask, model as engine};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{ChangeQuery, ListQuery, WaitQuery, location, progress, told as told_move};
use crate::server::context::{Context, carried_through, no_service};
use crate::server::error::ApiError;
use crate::server::extract::{Json, Key, Name, Query, Wait};
use crate::server::page::page;
use crate::types::{
    Applied, DeployRequest, Deployment, DryRun, FieldError, Instance, Page, Plan, RollbackRequest,
    ScaleRequest, Service, ServiceSpec, ServiceState, Workload,
};

/// A removal that takes longer is told to be under way.
const REMOVAL_ANSWER_MS: u64 = 5_000;

/// Services by name
#[utoipa::path(get, path = "/api/v1/services", tag = "services", params(ListQuery),
    responses((status = 200, description = "Services", body = Page<Service>)))]
pub(in crate::server) async fn list_services(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Service>>, ApiError> {
    let views = context.engine.instances(None, false).await?;
    let state = context.engine.state();
    let services = page(
        state.services.values(),
        |service| service.spec.name.clone(),
        false,
        query.limit,
        query.cursor.as_deref(),
        |service| {
            let own = views.iter().filter(|view| view.instance.service == service.spec.name);
            let own: Vec<Instance> = own.map(Into::into).collect();
            Service::of(service, ServiceState::of(service, &state, &own))
        },
    )?;
    Ok(axum::Json(services))
}

/// One service
#[utoipa::path(get, path = "/api/v1/services/{name}", tag = "services",
    params(("name" = String, Path, description = "Name of the service")),
    responses((status = 200, description = "Service", body = Service)))]
pub(in crate::server) async fn get_service(
    State(context): State<Context>,
    Name(name): Name,
    Query(super::NoQuery {}): Query<super::NoQuery>,
) -> Result<axum::Json<Service>, ApiError> {
    Ok(axum::Json(told(&context, &name).await?))
}

/// How a service is put.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct PutQuery {
    /// Machine for the first deploy; later ones stay where they are unless it is given.
    machine: Option<String>,
    /// Why; kept with the move.
    reason: Option<String>,
    /// Start only if the plan is still this one.
    plan_hash: Option<String>,
    /// Tells what would be done and does nothing.
    #[serde(default)]
    dry_run: bool,
    /// Answers when the work has ended, or after so long. `Prefer: wait=SECONDS` says the same.
    #[allow(dead_code, reason = "read by `Wait`, named here so that it is known and documented")]
    wait_ms: Option<u64>,
}

/// Create a service, or make it as the body says
///
/// A change of settings, routes or fixed upstreams is done when the answer comes (200). A change of what runs
/// starts a move (202). Environment variables whose value is `***` keep their value.
#[utoipa::path(put, path = "/api/v1/services/{name}", tag = "services", request_body = ServiceSpec,
    params(("name" = String, Path, description = "Name of the service"), PutQuery),
    responses((status = 200, description = "Done; with `dry_run` what would be done", body = Applied),
        (status = 202, description = "A move brings it about; Location says where to look", body = Applied)))]
pub(in crate::server) async fn put_service(
    State(context): State<Context>,
    Name(name): Name,
    Query(query): Query<PutQuery>,
    wait: Wait,
    Key(key): Key,
    Json(spec): Json<ServiceSpec>,
) -> Result<Response, ApiError> {
    let spec = named(spec, &name, "")?;
    let ask = Ask::Deploy {
        spec: Box::new(resolved(&context, &spec, "")?),
        machine: query.machine,
        overrides: peregrine_engine::MoveOverrides::default(),
    };
    let order =
        Order { ask, reason: query.reason, plan_hash: query.plan_hash, dry_run: query.dry_run, key, wait };
    order.carry_out(&context, &name).await
}

/// Remove a service
///
/// Drains, stops and removes its copies, then forgets it.
#[utoipa::path(delete, path = "/api/v1/services/{name}", tag = "services",
    params(("name" = String, Path, description = "Name of the service"), WaitQuery),
    responses((status = 204, description = "It is gone"),
        (status = 202, description = "It goes on; the service answers 404 once it is gone")))]
pub(in crate::server) async fn remove_service(
    State(context): State<Context>,
    Name(name): Name,
    Query(_): Query<WaitQuery>,
    Wait(wait): Wait,
) -> Result<Response, ApiError> {
    let engine = context.engine.clone();
    let service = name.clone();
    let removal = carried_through(async move {
        engine.remove_service(&service).await.inspect_err(|error| {
            tracing::warn!(service, code = error.code, "the service was not removed: {error}");
        })
    });
    let patience = wait.max(Duration::from_millis(REMOVAL_ANSWER_MS));
    match tokio::time::timeout(patience, removal).await {
        Ok(done) => done?.map(|()| StatusCode::NO_CONTENT.into_response()).map_err(Into::into),
        Err(_) => Ok((StatusCode::ACCEPTED, location(&["services", &name])).into_response()),
    }
}

/// Versions of a service, newest first
#[utoipa::path(get, path = "/api/v1/services/{name}/deployments", tag = "services",
    params(("name" = String, Path, description = "Name of the service"), ListQuery),
    responses((status = 200, description = "Versions", body = Page<Deployment>)))]
pub(in crate::server) async fn list_deployments(
    State(context): State<Context>,
    Name(name): Name,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Deployment>>, ApiError> {
    let state = context.engine.state();
    let service = state.services.get(&name).ok_or_else(|| no_service(&name))?;
    let versions = state.versions.range((name.clone(), 0)..=(name.clone(), u32::MAX)).rev();
    let deployments = page(
        versions,
        |((_, number), _)| format!("{number:010}"), // as text they sort as numbers do
        true,
        query.limit,
        query.cursor.as_deref(),
        |(_, version)| Deployment::of(version, Some(service)),
    )?;
    Ok(axum::Json(deployments))
}

/// Bring a new version to a service's machines
#[utoipa::path(post, path = "/api/v1/services/{name}/deployments", tag = "services", request_body = DeployRequest,
    params(("name" = String, Path, description = "Name of the service"), ChangeQuery),
    responses((status = 200, description = "Done; with `dry_run` what would be done", body = Applied),
        (status = 202, description = "A move brings it about; Location says where to look", body = Applied)))]
pub(in crate::server) async fn deploy(
    State(context): State<Context>,
    Name(name): Name,
    Query(query): Query<ChangeQuery>,
    wait: Wait,
    Key(key): Key,
    Json(request): Json<DeployRequest>,
) -> Result<Response, ApiError> {
    let mut spec = match request.service {
        Some(spec) => resolved(&context, &named(spec, &name, "/service")?, "/service")?,
        None => present(&context, &name).ok_or_else(|| no_service(&name))?,
    };
    if let Some(image) = request.image {
        with_image(&mut spec, image)?;
    }
    let ask =
        Ask::Deploy { spec: Box::new(spec), machine: request.machine, overrides: (&request.settings).into() };
    let order = Order {
        ask,
        reason: request.reason,
        plan_hash: request.plan_hash,
        dry_run: query.dry_run,
        key,
        wait,
    };
    order.carry_out(&context, &name).await
}

/// Go back to an earlier version
#[utoipa::path(post, path = "/api/v1/services/{name}/rollback", tag = "services", request_body = RollbackRequest,
    params(("name" = String, Path, description = "Name of the service"), ChangeQuery),
    responses((status = 200, description = "Done; with `dry_run` what would be done", body = Applied),
        (status = 202, description = "A move brings it about; Location says where to look", body = Applied)))]
pub(in crate::server) async fn rollback_service(
    State(context): State<Context>,
    Name(name): Name,
    Query(query): Query<ChangeQuery>,
    wait: Wait,
    Key(key): Key,
    Json(request): Json<RollbackRequest>,
) -> Result<Response, ApiError> {
    let ask = Ask::Rollback { service: name.clone(), to_version: request.to_version };
    let order = Order {
        ask,
        reason: request.reason,
        plan_hash: request.plan_hash,
        dry_run: query.dry_run,
        key,
        wait,
    };
    order.carry_out(&context, &name).await
}

/// Another number of copies
#[utoipa::path(post, path = "/api/v1/services/{name}/scale", tag = "services", request_body = ScaleRequest,
    params(("name" = String, Path, description = "Name of the service"), ChangeQuery),
    responses((status = 200, description = "Done; with `dry_run` what would be done", body = Applied),
        (status = 202, description = "A move brings it about; Location says where to look", body = Applied)))]
pub(in crate::server) async fn scale_service(
    State(context): State<Context>,
    Name(name): Name,
    Query(query): Query<ChangeQuery>,
    wait: Wait,
    Key(key): Key,
    Json(request): Json<ScaleRequest>,
) -> Result<Response, ApiError> {
    let ask = Ask::Scale { service: name.clone(), replicas: request.replicas, machine: request.machine };
    let order = Order {
        ask,
        reason: request.reason,
        plan_hash: request.plan_hash,
        dry_run: query.dry_run,
        key,
        wait,
    };
    order.carry_out(&context, &name).await
}

/// A change of a service, ready to be planned or started.
struct Order {
    ask: Ask,
    reason: Option<String>,
    plan_hash: Option<String>,
    dry_run: bool,
    key: Option<String>,
    wait: Wait,
}

impl Order {
    async fn carry_out(self, context: &Context, service: &str) -> Result<Response, ApiError> {
        if self.dry_run {
            let plan = context.engine.plan(self.ask).await?;
            return Ok(axum::Json(DryRun::from(Plan::from(&plan))).into_response());
        }
        let engine = context.engine.clone();
        let reason = reason(self.reason);
        let work = async move { engine.start(self.ask, reason, self.plan_hash, self.key).await };
        let Some(rollout) = carried_through(work).await?? else {
            let service = told(context, service).await?;
            return Ok(axum::Json(Applied { service, rollout: None }).into_response());
        };
        let rollout = context.ended_within(rollout, self.wait.0).await;
        let service = told(context, service).await?;
        let applied = Applied { service, rollout: Some(told_move(context, &rollout)) };
        Ok(progress(&rollout, applied))
    }
}

pub(super) fn reason(given: Option<String>) -> String {
    given.unwrap_or_else(|| "asked by API".to_owned())
}

async fn told(context: &Context, name: &str) -> Result<Service, ApiError> {
    let views = context.engine.instances(Some(name), false).await?;
    let state = context.engine.state();
    let service = state.services.get(name).ok_or_else(|| no_service(name))?;
    let instances: Vec<Instance> = views.iter().map(Into::into).collect();
    Ok(Service::of(service, ServiceState::of(service, &state, &instances)))
}

/// The specification under the name that the path gives it.
fn named(mut spec: ServiceSpec, name: &str, pointer: &str) -> Result<ServiceSpec, ApiError> {
    if spec.name.is_empty() {
        name.clone_into(&mut spec.name);
    }
    if spec.name != name {
        let message = format!("the path names {name:?} and the body {:?}: make them the same", spec.name);
        return Err(ApiError::fields(vec![FieldError::new(format!("{pointer}/name"), message)]));
    }
    Ok(spec)
}

fn resolved(context: &Context, spec: &ServiceSpec, pointer: &str) -> Result<engine::ServiceSpec, ApiError> {
    let present = present(context, &spec.name);
    spec.to_engine(present.as_ref()).map_err(|mut errors| {
        for error in &mut errors {
            error.pointer.insert_str(0, pointer);
        }
        ApiError::fields(errors)
    })
}

fn present(context: &Context, name: &str) -> Option<engine::ServiceSpec> {
    context.engine.state().services.get(name).map(|service| service.spec.clone())
}

fn with_image(spec: &mut engine::ServiceSpec, new: String) -> Result<(), ApiError> {
    if let engine::Workload::Image { image, .. } = &mut spec.workload {
        *image = new;
        return Ok(());
    }
    let kind = match Workload::redacted(&spec.workload) {
        Workload::Command { .. } => "a command",
        _ => "fixed upstreams",
    };
    let message = format!("the service runs {kind}, not an image: give the whole `service`");
    Err(ApiError::fields(vec![FieldError::new("/image", message)]))
}
