//! Machines and services from the configuration file of `serve`.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{machines, rollouts, services};
use crate::core::Core;
use crate::error::EngineError;
use crate::handle::{Ask, ConfigApplied, MoveOverrides};
use crate::model::{MachineSpec, ServiceSpec};

pub(crate) async fn apply(
    core: &Arc<Core>,
    machines: Vec<MachineSpec>,
    services: Vec<(ServiceSpec, Option<String>)>,
) -> Result<ConfigApplied, EngineError> {
    let core = Arc::clone(core);
    super::to_the_end(async move { Ok(apply_here(&core, machines, services).await) }).await
}

async fn apply_here(
    core: &Arc<Core>,
    wanted_machines: Vec<MachineSpec>,
    wanted_services: Vec<(ServiceSpec, Option<String>)>,
) -> ConfigApplied {
    let mut applied = ConfigApplied::default();
    let names: BTreeSet<String> = wanted_services.iter().map(|(spec, _)| spec.name.clone()).collect();
    let machine_names: BTreeSet<String> = wanted_machines.iter().map(|spec| spec.name.clone()).collect();
    for spec in wanted_machines {
        let name = spec.name.clone();
        if let Err(error) = machines::add(core, spec, true).await {
            applied.problems.push((name, error));
        }
    }
    // Services go before others come, so that a route can change hands in one file.
    remove_services(core, &names, &mut applied).await;
    for (spec, machine) in wanted_services {
        let name = spec.name.clone();
        let unchanged = core.state().services.get(&name).is_some_and(|known| {
            known.from_config && known.spec == spec && (known.version.is_some() || is_fixed(&spec))
        });
        // Where it runs was decided by its first deploy, and by moves since then.
        let known = core.state().services.get(&name).is_some_and(|known| known.version.is_some());
        if unchanged {
            continue;
        }
        let ask = Ask::Deploy {
            spec: Box::new(spec),
            machine: machine.filter(|_| !known),
            overrides: MoveOverrides::default(),
        };
        match rollouts::start_with(core, ask, "configuration file".to_owned(), None, None, true).await {
            Ok(rollout) => applied.rollouts.extend(rollout.map(|rollout| rollout.id)),
            Err(error) => applied.problems.push((name, error)),
        }
    }
    remove_machines(core, &machine_names, &mut applied).await;
    applied
}

fn is_fixed(spec: &ServiceSpec) -> bool {
    matches!(spec.workload, crate::model::Workload::Fixed { .. })
}

async fn remove_services(core: &Arc<Core>, keep: &BTreeSet<String>, applied: &mut ConfigApplied) {
    let state = core.state();
    let gone: Vec<(String, bool)> = state
        .services
        .values()
        .filter(|service| service.from_config && !keep.contains(&service.spec.name))
        .map(|service| (service.spec.name.clone(), is_fixed(&service.spec)))
        .collect();
    drop(state);
    for (name, fixed) in gone {
        if fixed {
            if let Err(error) = services::remove(core, &name).await {
                applied.problems.push((name, error));
            }
            continue;
        }
        // Draining takes its time; the start of the edge does not wait for it.
        let removing = Arc::clone(core);
        core.tasks.spawn(async move {
            if let Err(error) = services::remove(&removing, &name).await {
                tracing::error!(service = %name, %error, "a service that left the configuration file is not removed");
            }
        });
    }
}

async fn remove_machines(core: &Arc<Core>, keep: &BTreeSet<String>, applied: &mut ConfigApplied) {
    let state = core.state();
    let gone: Vec<String> = state
        .machines
        .values()
        .filter(|machine| machine.from_config && !keep.contains(&machine.spec.name))
        .map(|machine| machine.spec.name.clone())
        .collect();
    drop(state);
    for name in gone {
        if let Err(error) = machines::remove(core, &name).await {
            applied.problems.push((name, error));
        }
    }
}
