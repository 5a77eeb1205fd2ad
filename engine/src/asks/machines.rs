//! Machines: adding, removing, asking.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::observe::{ANSWER_LIMIT_MS, no_answer};
use crate::audit::AuditAct;
use crate::check;
use crate::core::Core;
use crate::error::{EngineError, ErrorKind};
use crate::handle::{EngineProblem, MachineCheck};
use crate::model::{EventBody, Finding, Machine, MachineSpec};
use crate::runtime::InstanceStatus;

pub(crate) async fn add(
    core: &Arc<Core>,
    spec: MachineSpec,
    from_config: bool,
) -> Result<Machine, EngineError> {
    check::machine(&spec)?;
    core.commit(move |draft| {
        let known = draft.state().machines.get(&spec.name);
        let used = draft.state().instances.values().any(|instance| instance.machine == spec.name);
        let same_kind = known.is_none_or(|known| {
            std::mem::discriminant(&known.spec.kind) == std::mem::discriminant(&spec.kind)
        });
        if used && !same_kind {
            return Err(in_use(&spec.name, "cannot change its runtime"));
        }
        let machine = Machine {
            added_at: known.map_or(draft.now(), |known| known.added_at),
            from_config: from_config || known.is_some_and(|known| known.from_config),
            spec,
        };
        if known != Some(&machine) {
            draft.put_machine(&machine);
            draft.event(None, None, EventBody::MachineAdded { machine: machine.spec.name.clone() });
            draft.audit(None, None, AuditAct::MachineAdded { machine: machine.spec.name.clone() });
        }
        Ok(machine)
    })
    .await
}

pub(crate) async fn remove(core: &Arc<Core>, name: &str) -> Result<(), EngineError> {
    let name = name.to_owned();
    core.commit(move |draft| {
        let state = draft.state();
        if !state.machines.contains_key(&name) {
            return Err(unknown(&name));
        }
        if state.instances.values().any(|instance| instance.machine == name) {
            return Err(in_use(&name, "cannot be removed"));
        }
        draft.delete_machine(&name);
        draft.audit(None, None, AuditAct::MachineRemoved { machine: name.clone() });
        draft.event(None, None, EventBody::MachineRemoved { machine: name });
        Ok(())
    })
    .await
}

pub(crate) async fn check(core: &Arc<Core>, name: &str) -> Result<MachineCheck, EngineError> {
    let runtime = core.runtime(name).ok_or_else(|| unknown(name))?;
    let begun = Instant::now();
    let limit = Duration::from_millis(ANSWER_LIMIT_MS);
    let info = tokio::time::timeout(limit, runtime.info()).await;
    let latency_ms = begun.elapsed().as_secs_f64() * 1_000.0;
    let info = match info {
        Ok(Ok(info)) => info,
        Ok(Err(error)) => return Ok(silent(latency_ms, Finding::from(&error))),
        Err(_) => return Ok(silent(latency_ms, no_answer(name))),
    };
    let listed = match tokio::time::timeout(limit, runtime.list(&core.install())).await {
        Ok(Ok(listed)) => listed,
        Ok(Err(error)) => return Ok(silent(latency_ms, Finding::from(&error))),
        Err(_) => return Ok(silent(latency_ms, no_answer(name))),
    };
    let state = core.state();
    let is_known = |status: &&InstanceStatus| state.instances.contains_key(&status.id);
    let orphans =
        listed.iter().filter(|status| !is_known(status)).map(|status| status.id.to_string()).collect();
    Ok(MachineCheck {
        info: Some(info),
        latency_ms,
        problem: None,
        instances: listed.iter().filter(is_known).count(),
        orphans,
    })
}

fn silent(latency_ms: f64, problem: Finding) -> MachineCheck {
    let Finding { code, message, hint } = problem;
    MachineCheck {
        info: None,
        latency_ms,
        problem: Some(EngineProblem { code, message, hint }),
        instances: 0,
        orphans: Vec::new(),
    }
}

fn unknown(name: &str) -> EngineError {
    EngineError::new(
        ErrorKind::NotFound,
        "machine.unknown",
        format!("there is no machine {name}"),
        "See the machines: peregrine machines list.",
    )
}

fn in_use(name: &str, what: &str) -> EngineError {
    EngineError::new(
        ErrorKind::Conflict,
        "machine.in_use",
        format!("machine {name} {what}: it has copies of services"),
        "Move them away first: peregrine move SERVICE --to MACHINE.",
    )
}
