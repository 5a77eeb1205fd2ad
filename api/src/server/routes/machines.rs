//! Machines.

use axum::extract::State;
use axum::response::IntoResponse;
use http::StatusCode;

use super::{ListQuery, NoQuery, location};
use crate::codes;
use crate::server::context::{Context, carried_through};
use crate::server::error::ApiError;
use crate::server::extract::{Json, Name, NoBody, Query};
use crate::server::page::page;
use crate::types::{Machine, MachineCheck, MachineSpec, Page};

/// Machines by name
#[utoipa::path(get, path = "/api/v1/machines", tag = "machines", params(ListQuery),
    responses((status = 200, description = "Machines", body = Page<Machine>)))]
pub(in crate::server) async fn list_machines(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Machine>>, ApiError> {
    let state = context.engine.state();
    let machines = page(
        state.machines.values(),
        |machine| machine.spec.name.clone(),
        false,
        query.limit,
        query.cursor.as_deref(),
        |machine| told(&state, machine),
    )?;
    Ok(axum::Json(machines))
}

/// Add a machine, or change one
///
/// It is not asked: one that does not answer yet may be added. A machine with instances keeps its runtime.
#[utoipa::path(post, path = "/api/v1/machines", tag = "machines", request_body = MachineSpec,
    responses((status = 201, description = "Added", body = Machine),
        (status = 200, description = "Changed", body = Machine)))]
pub(in crate::server) async fn add_machine(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
    Json(spec): Json<MachineSpec>,
) -> Result<impl IntoResponse, ApiError> {
    let spec = spec.to_engine().map_err(ApiError::fields)?;
    let engine = context.engine.clone();
    let is_new = !engine.state().machines.contains_key(&spec.name);
    let machine = carried_through(async move { engine.add_machine(spec).await }).await??;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let place = location(&["machines", &machine.spec.name]);
    Ok((status, place, axum::Json(told(&context.engine.state(), &machine))))
}

/// One machine
#[utoipa::path(get, path = "/api/v1/machines/{name}", tag = "machines",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 200, description = "Machine", body = Machine)))]
pub(in crate::server) async fn get_machine(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<Machine>, ApiError> {
    let state = context.engine.state();
    let machine = state.machines.get(&name).ok_or_else(|| no_machine(&name))?;
    Ok(axum::Json(told(&state, machine)))
}

/// Remove a machine
///
/// Refused while instances are placed on it.
#[utoipa::path(delete, path = "/api/v1/machines/{name}", tag = "machines",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 204, description = "Removed")))]
pub(in crate::server) async fn remove_machine(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<StatusCode, ApiError> {
    let engine = context.engine.clone();
    carried_through(async move { engine.remove_machine(&name).await }).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Ask a machine itself
///
/// Answers for a machine that cannot be reached too: `ok` is false and `problem` says why.
#[utoipa::path(post, path = "/api/v1/machines/{name}/check", tag = "machines",
    params(("name" = String, Path, description = "Name of the machine")),
    responses((status = 200, description = "What it answered", body = MachineCheck)))]
pub(in crate::server) async fn check_machine(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<axum::Json<MachineCheck>, ApiError> {
    let check = context.engine.check_machine(&name).await?;
    Ok(axum::Json(MachineCheck::of(&name, &check)))
}

fn told(state: &peregrine_engine::State, machine: &peregrine_engine::model::Machine) -> Machine {
    let placed = state.instances.values().filter(|instance| instance.machine == machine.spec.name);
    Machine::of(machine, placed.count())
}

fn no_machine(name: &str) -> ApiError {
    ApiError::new(&codes::NO_MACHINE, format!("there is no machine {name}"))
}
