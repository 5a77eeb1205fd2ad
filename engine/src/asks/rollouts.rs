//! Planning and starting rollouts.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::observe::observe;
use crate::audit::AuditAct;
use crate::core::Core;
use crate::draft::Draft;
use crate::error::{EngineError, ErrorKind};
use crate::handle::{Ask, IdempotencyKey};
use crate::journal::Answered;
use crate::model::{
    Control, EventBody, Instance, InstanceState, Phase, Plan, Rollout, RolloutId, RolloutState, Service,
    ServiceSpec, Version,
};
use crate::plan::{self, Observations, Outcome, Planned};
use crate::rollout;

/// Answers to keyed asks that are kept: a key has to be repeated soon to be of use.
const MAX_ANSWERED: usize = 1_000;
/// Versions of a service that are kept to roll back to.
const MAX_VERSIONS: usize = 50;

pub(crate) async fn plan(core: &Arc<Core>, ask: Ask) -> Result<Plan, EngineError> {
    // What is wrong in itself is told before any machine is asked.
    plan::plan(&core.state(), &ask, &Observations::default(), &mut || core.new_instance_id())?;
    let seen = observe(core, &ask).await;
    match plan::plan(&core.state(), &ask, &seen, &mut || core.new_instance_id())? {
        Outcome::Rollout(planned) => Ok(planned.plan),
        Outcome::Settings(spec) => Ok(settings_plan(core, &ask, &spec)),
    }
}

/// A plan without steps: nothing but settings changes.
fn settings_plan(core: &Core, ask: &Ask, spec: &ServiceSpec) -> Plan {
    let state = core.state();
    let service = state.services.get(&spec.name);
    let version = service.and_then(|service| service.version);
    Plan {
        format: crate::model::PLAN_FORMAT,
        service: spec.name.clone(),
        kind: crate::model::RolloutKind::Deploy,
        from_version: version,
        to_version: version.unwrap_or(0),
        add: Vec::new(),
        retire: Vec::new(),
        keep: state.instances_of(&spec.name).map(|instance| instance.id.clone()).collect(),
        steps: Vec::new(),
        settings: spec.move_settings.clone(),
        blockers: Vec::new(),
        warnings: Vec::new(),
        estimate: crate::model::Estimate::default(),
        hash: fingerprint(ask),
    }
}

pub(crate) async fn start(
    core: &Arc<Core>,
    ask: Ask,
    reason: String,
    expect_hash: Option<String>,
    key: IdempotencyKey,
) -> Result<Option<Rollout>, EngineError> {
    let core = Arc::clone(core);
    super::to_the_end(async move { start_with(&core, ask, reason, expect_hash, key, false).await }).await
}

pub(super) async fn start_with(
    core: &Arc<Core>,
    ask: Ask,
    reason: String,
    expect_hash: Option<String>,
    key: IdempotencyKey,
    from_config: bool,
) -> Result<Option<Rollout>, EngineError> {
    let fingerprint = fingerprint(&ask);
    if let Some(answer) = answered(core, key.as_deref(), &fingerprint) {
        return answer;
    }
    plan::plan(&core.state(), &ask, &Observations::default(), &mut || core.new_instance_id())?;
    let seen = observe(core, &ask).await;
    let asked = fingerprint.clone();
    let keyed = key.clone();
    let (id, ids) = (core.new_rollout_id(), Arc::clone(core));
    let accepted = core
        .commit(move |draft| {
            let outcome = plan::plan(draft.state(), &ask, &seen, &mut || ids.new_instance_id())?;
            let accepted = match outcome {
                Outcome::Settings(spec) => settings(draft, &spec, from_config),
                Outcome::Rollout(planned) => {
                    refuse_blocked(&planned.plan, expect_hash.as_deref())?;
                    Accepted::Rollout(Box::new(accept(draft, &id, *planned, reason, from_config)))
                }
            };
            if let Some(key) = &keyed {
                answer(draft, key, asked, &accepted);
            }
            Ok(accepted)
        })
        .await;
    match accepted {
        Ok(Accepted::Settings(service)) => {
            core.publish(&service).await?;
            Ok(None)
        }
        Ok(Accepted::Rollout(rollout)) => {
            rollout::spawn(core, &rollout.id, false);
            Ok(Some(*rollout))
        }
        // Two with the same key at once: the other one was faster.
        Err(error) if error.kind == ErrorKind::Conflict => {
            answered(core, key.as_deref(), &fingerprint).unwrap_or(Err(error))
        }
        Err(error) => Err(error),
    }
}

enum Accepted {
    Settings(String),
    Rollout(Box<Rollout>),
}

/// The ask as a hash: what an idempotency key stands for. Values of the environment are in it, unreadable.
fn fingerprint(ask: &Ask) -> String {
    Sha256::digest(format!("{ask:?}").as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answered(core: &Core, key: Option<&str>, ask: &str) -> Option<Result<Option<Rollout>, EngineError>> {
    let state = core.state();
    let known = state.answered.get(key?)?;
    if known.ask != ask {
        return Some(Err(EngineError::new(
            ErrorKind::Invalid,
            "idempotency.mismatch",
            "the idempotency key was used for another request",
            "Use a new key for each request, and the same key only to repeat one.",
        )));
    }
    let Some(id) = &known.rollout else { return Some(Ok(None)) };
    state.rollouts.get(id).map(|rollout| Ok(Some(Rollout::clone(rollout))))
}

fn answer(draft: &mut Draft<'_>, key: &str, ask: String, accepted: &Accepted) {
    let rollout = match accepted {
        Accepted::Rollout(rollout) => Some(rollout.id.clone()),
        Accepted::Settings(_) => None,
    };
    let at = draft.now();
    draft.put_answered(key, &Answered { ask, rollout, at });
    let known = &draft.state().answered;
    if known.len() >= MAX_ANSWERED
        && let Some((oldest, _)) = known.iter().min_by_key(|(_, answered)| answered.at)
    {
        draft.delete_answered(oldest);
    }
}

fn refuse_blocked(plan: &Plan, expect_hash: Option<&str>) -> Result<(), EngineError> {
    if let Some(first) = plan.blockers.first() {
        let mut error =
            EngineError::new(ErrorKind::Blocked, "plan.blocked", first.message.clone(), first.hint.clone());
        error.findings.clone_from(&plan.blockers);
        return Err(error);
    }
    if expect_hash.is_some_and(|hash| hash != plan.hash) {
        return Err(EngineError::new(
            ErrorKind::Conflict,
            "plan.changed",
            format!("the plan for service {} is not the one that was shown any more", plan.service),
            "Plan again, look at it, and start with the new hash.",
        ));
    }
    Ok(())
}

fn settings(draft: &mut Draft<'_>, spec: &ServiceSpec, from_config: bool) -> Accepted {
    draft.require_service(&spec.name);
    let known = draft.state().services.get(&spec.name);
    let mut service = known.cloned().unwrap_or_else(|| new_service(spec, draft.now()));
    service.spec = spec.clone();
    service.from_config = from_config;
    draft.put_service(&service);
    draft.event(Some(&spec.name), None, EventBody::ServiceChanged {});
    draft.audit(Some(&spec.name), None, AuditAct::SettingsChanged {});
    Accepted::Settings(spec.name.clone())
}

fn new_service(spec: &ServiceSpec, created_at: u64) -> Service {
    Service {
        spec: spec.clone(),
        version: None,
        previous_version: None,
        last_version: 0,
        epoch: 0,
        rollout: None,
        from_config: false,
        fixed_generations: std::collections::BTreeMap::new(),
        created_at,
    }
}

/// Takes the service for the rollout, and writes down everything that it will need.
pub(super) fn accept(
    draft: &mut Draft<'_>,
    id: &RolloutId,
    planned: Planned,
    reason: String,
    from_config: bool,
) -> Rollout {
    let Planned { plan, change, version } = planned;
    let (name, now) = (plan.service.clone(), draft.now());
    draft.require_service(&name);
    let known = draft.state().services.get(&name).cloned();
    // Whoever came first decides where a service belongs, unless the file takes it over.
    let mut service = match (known, &change.after) {
        (Some(service), _) => service,
        (None, Some(after)) => new_service(after, now),
        (None, None) => unreachable!("a service that is not there is not taken away"),
    };
    service.from_config |= from_config;
    service.epoch += 1;
    service.rollout = Some(id.clone());
    service.last_version = service.last_version.max(plan.to_version);
    draft.put_service(&service);
    if let Some(made) = version {
        put_version(draft, &name, made, id);
    }
    for added in &plan.add {
        draft.put_instance(&Instance {
            id: added.id.clone(),
            service: name.clone(),
            version: added.version,
            machine: added.machine.clone(),
            epoch: service.epoch,
            rollout: id.clone(),
            address: None,
            generation: 0,
            former: Vec::new(),
            state: InstanceState::Planned,
            created_at: now,
        });
    }
    draft.put_change(id, &change);
    let rollout = Rollout {
        id: id.clone(),
        state: RolloutState::Running,
        phase: Phase::Plan,
        step: 0,
        epoch: service.epoch,
        control: Control::Run,
        weight_percent: 0,
        reason,
        started_at: now,
        ended_at: None,
        phases: Vec::new(),
        waiting_for: None,
        problem: None,
        hold: None,
        leftovers: Vec::new(),
        transferred_bytes: 0,
        mirror: None,
        receipt: None,
        plan,
    };
    draft.put_rollout(&rollout);
    draft.event(Some(&name), Some(id), EventBody::RolloutCreated { kind: rollout.plan.kind });
    let (kind, reason, plan) = (rollout.plan.kind, rollout.reason.clone(), rollout.plan.hash.clone());
    draft.audit(Some(&name), Some(id), AuditAct::Asked { kind, reason, plan });
    rollout
}

fn put_version(draft: &mut Draft<'_>, service: &str, made: plan::NewVersion, rollout: &RolloutId) {
    let created_at = draft.now();
    draft.put_version(&Version {
        service: service.to_owned(),
        number: made.number,
        workload: made.spec.workload,
        digest: None,
        health: made.spec.health,
        resources: made.spec.resources,
        created_at,
        rollout: rollout.clone(),
    });
    let state = draft.state();
    let known = state.services.get(service);
    let in_use = |number: &u32| {
        known.is_some_and(|s| s.version == Some(*number) || s.previous_version == Some(*number))
            || state.instances_of(service).any(|instance| instance.version == *number)
    };
    let numbers: Vec<u32> =
        state.versions.keys().filter(|(of, _)| of == service).map(|(_, number)| *number).collect();
    let too_many = (numbers.len() + 1).saturating_sub(MAX_VERSIONS);
    for number in numbers.into_iter().filter(|number| !in_use(number)).take(too_many) {
        draft.delete_version(service, number);
    }
}
