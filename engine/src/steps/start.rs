//! Start: the copy is made sure of, named by its id. Back: it is removed.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Done, Problem, StepContext, remove_instance};
use crate::model::{Finding, Instance, InstanceId, InstanceState, Workload};
use crate::runtime::{InstanceSpec, Run, RuntimeError};
use crate::state::State;

pub(super) async fn forward(context: &StepContext, id: &InstanceId) -> Result<Done, Problem> {
    let state = context.core.state();
    let Some(instance) = state.instances.get(id).cloned() else {
        return Err(missing(id));
    };
    let spec = instance_spec(&state, &instance, &context.core.install())?;
    drop(state);
    let runtime = context.runtime(&instance.machine)?;
    context.waiting_for(Some(format!("{} to start {id}", instance.machine))).await;
    let lock = context.core.instance_lock(id);
    let _alone = lock.lock().await;
    let limit = Duration::from_millis(u64::from(context.plan.settings.start_timeout_ms));
    let address = match tokio::time::timeout(limit, runtime.ensure(&spec)).await {
        Ok(Ok(address)) => address,
        Ok(Err(error)) => return Err(Problem::Failed(named(&instance, &error))),
        Err(_) => return Err(too_slow(&instance, limit)),
    };
    stand_by(context, id, address).await?;
    context.publish_unawaited()?;
    Ok(Done::new(format!("{id} listens on {address}")))
}

pub(super) async fn back(context: &StepContext, id: &InstanceId) -> Result<Done, Problem> {
    remove_instance(&context.core, id, context.plan.settings.stop_grace_ms).await?;
    Ok(Done::new(format!("{id} is gone")))
}

/// The copy enters the table with weight 0: the edges probe it and open connections, and send nothing.
async fn stand_by(context: &StepContext, id: &InstanceId, address: SocketAddr) -> Result<(), Problem> {
    let id = id.clone();
    context
        .commit(move |draft, _| {
            let Some(instance) = draft.state().instances.get(&id) else { return Ok(()) };
            let mut instance = instance.clone();
            let moved = instance.address != Some(address);
            instance.address = Some(address);
            if instance.state == InstanceState::Planned {
                instance.state = InstanceState::Started;
            }
            if instance.generation == 0 || moved {
                instance.generation = draft.generation();
            }
            draft.put_instance(&instance);
            Ok(())
        })
        .await?;
    Ok(())
}

fn missing(id: &InstanceId) -> Problem {
    Problem::Failed(Finding {
        code: "instance.unknown".to_owned(),
        message: format!("there is no record of {id}"),
        hint: "Start the rollout again.".to_owned(),
    })
}

fn named(instance: &Instance, error: &RuntimeError) -> Finding {
    let mut finding = Finding::from(error);
    finding.message =
        format!("{} on {} did not start: {}", instance.service, instance.machine, finding.message);
    finding
}

fn too_slow(instance: &Instance, limit: Duration) -> Problem {
    Problem::Failed(Finding {
        code: "instance.start_timeout".to_owned(),
        message: format!(
            "{} did not start on {} within {} ms",
            instance.service,
            instance.machine,
            limit.as_millis()
        ),
        hint: "See its output (logs) and the machine (machines check), or raise move.start_timeout_ms."
            .to_owned(),
    })
}

/// What a runtime is told of an instance.
pub(crate) fn instance_spec(
    state: &State,
    instance: &Instance,
    install: &str,
) -> Result<InstanceSpec, Problem> {
    let version = state.version(&instance.service, instance.version);
    let machine = state.machines.get(&instance.machine);
    let (Some(version), Some(machine)) = (version, machine) else {
        return Err(missing(&instance.id));
    };
    let (run, env) = match &version.workload {
        Workload::Image { image, port, command, env, capabilities } => {
            let image = version.digest.clone().unwrap_or_else(|| image.clone());
            let capabilities = capabilities.iter().cloned().collect();
            (Run::Container { image, command: command.clone(), port: *port, capabilities }, env)
        }
        Workload::Command { command, directory, env } => {
            (Run::Process { command: command.clone(), directory: directory.clone() }, env)
        }
        Workload::Fixed { .. } => return Err(missing(&instance.id)),
    };
    Ok(InstanceSpec {
        install: install.to_owned(),
        id: instance.id.clone(),
        service: instance.service.clone(),
        version: instance.version,
        // The epoch of now: the machine refuses an elder one beside a copy that a later rollout has put there.
        epoch: state.services.get(&instance.service).map_or(instance.epoch, |service| service.epoch),
        run,
        env: env.clone(),
        resources: version.resources.clone(),
        publish: machine.spec.address,
    })
}
