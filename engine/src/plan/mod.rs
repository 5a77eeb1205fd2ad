//! The planner: a pure function from the state, the ask and what was seen to an immutable plan.
//!
//! Every ask comes down to the same question: which copies are wanted? Those that are there already are
//! kept, those that are missing are added, the rest are retired. The steps follow from that alone.

mod observe;
mod target;
mod verdict;

use sha2::{Digest as _, Sha256};

use crate::alarms;
use crate::error::{EngineError, ErrorKind};
use crate::handle::{Ask, MoveOverrides};
use crate::journal::ServiceChange;
use crate::model::{
    Estimate, InstanceId, MirrorSettings, MoveSettings, PLAN_FORMAT, Plan, PlannedInstance, RolloutKind,
    ServiceSpec, Step, Version, Workload,
};
use crate::state::State;

pub use observe::{ImageSeen, MachineSeen, Observations};
pub(crate) use observe::{image_wanted, machines_of_interest};
use target::Target;

/// What a copy that stops and one that starts take together, as long as nobody has measured it for this service.
const STOP_AND_START_MS: u64 = 2_000;

/// A plan with what has to be stored along with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// What it changes of the service's record.
    pub change: ServiceChange,
    /// The version that it makes, but for its rollout and time; `None` if it is there already.
    pub version: Option<NewVersion>,
}

/// The workload of a new version.
#[derive(Clone, Debug, PartialEq)]
pub struct NewVersion {
    /// Number.
    pub number: u32,
    /// The specification that it is taken from.
    pub spec: Box<ServiceSpec>,
}

/// What an ask comes down to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A rollout (with blockers, perhaps).
    Rollout(Box<Planned>),
    /// Only settings (or fixed upstreams) change: no copy is touched.
    Settings(Box<ServiceSpec>),
}

/// Plans. `fresh` gives the ids of new copies; they are not part of the hash.
///
/// # Errors
/// The ask is wrong in itself, or names a service that is not there, or another rollout has the service
/// (with its id). What can be overcome is a blocker in the plan instead.
pub fn plan(
    state: &State,
    ask: &Ask,
    seen: &Observations,
    fresh: &mut dyn FnMut() -> InstanceId,
) -> Result<Outcome, EngineError> {
    alarms::refuse_aside(state, ask.service())?;
    let target = match target::target(state, ask)? {
        target::Wanted::Settings(spec) => {
            refuse_second(state, &spec.name)?;
            refuse_taken(state, &spec)?;
            return Ok(Outcome::Settings(spec));
        }
        target::Wanted::Copies(target) => target,
    };
    refuse_second(state, &target.service)?;
    Ok(Outcome::Rollout(Box::new(build(state, *target, seen, fresh))))
}

fn refuse_second(state: &State, service: &str) -> Result<(), EngineError> {
    let Some(running) = state.services.get(service).and_then(|service| service.rollout.clone()) else {
        return Ok(());
    };
    let mut error = EngineError::new(
        ErrorKind::Conflict,
        "move.in_progress",
        format!("service {service} is being changed by {running}"),
        format!("Wait for it (moves watch {running}) or take it back (moves abort {running})."),
    );
    error.rollout = Some(running);
    Err(error)
}

fn refuse_taken(state: &State, spec: &ServiceSpec) -> Result<(), EngineError> {
    let Some(taken) = verdict::routes_taken(state, spec).into_iter().next() else { return Ok(()) };
    Err(EngineError::new(ErrorKind::Conflict, "route.taken", taken.message, taken.hint))
}

fn build(
    state: &State,
    target: Target,
    seen: &Observations,
    fresh: &mut dyn FnMut() -> InstanceId,
) -> Planned {
    let add: Vec<PlannedInstance> = target
        .add
        .iter()
        .map(|machine| PlannedInstance { id: fresh(), machine: machine.clone(), version: target.to_version })
        .collect();
    let mut settings = target.settings.clone();
    if is_cutover(&target, &settings) {
        settings.warm.mirror = None; // while requests wait there is none to copy
    }
    let transfer = verdict::transfer_bytes(state, &target, seen);
    let mut plan = Plan {
        format: PLAN_FORMAT,
        service: target.service.clone(),
        kind: target.kind,
        from_version: target.from_version,
        to_version: target.to_version,
        steps: steps(&target, &add, &settings),
        blockers: verdict::blockers(state, &target, seen),
        warnings: verdict::warnings(state, &target, seen),
        estimate: Estimate {
            duration_ms: duration_ms(&target, &settings),
            pause_ms: pause_ms(state, &target, &settings),
            transfer_bytes: transfer,
        },
        add,
        retire: target.retire,
        keep: target.keep,
        settings,
        hash: String::new(),
    };
    plan.hash = hash(&plan, target.after.as_deref());
    let before = state.services.get(&target.service);
    let change = ServiceChange {
        before: before.map(|service| Box::new(service.spec.clone())),
        version_before: before.and_then(|service| service.version),
        previous_before: before.and_then(|service| service.previous_version),
        after: target.after.clone(),
    };
    let version = target
        .new_version
        .then(|| target.after.map(|spec| NewVersion { number: plan.to_version, spec }))
        .flatten();
    Planned { plan, change, version }
}

fn steps(target: &Target, add: &[PlannedInstance], settings: &MoveSettings) -> Vec<Step> {
    let mut steps = vec![Step::Claim];
    if is_cutover(target, settings) {
        steps.extend(cutover(target, add));
    } else if !add.is_empty() {
        steps.extend(prepare(target, add));
        steps.extend(add.iter().map(|added| Step::Start { instance: added.id.clone() }));
        steps.push(Step::Warm);
        // With no old copy there is nothing to compare with and nothing to protect.
        let first = target.retire.is_empty() && target.keep.is_empty();
        let percents = if first { &[100][..] } else { &settings.steps[..] };
        steps.extend(percents.iter().map(|percent| Step::Shift { percent: *percent }));
    }
    if is_cutover(target, settings) {
        steps.extend(target.retire.iter().map(|id| Step::Release { instance: id.clone() }));
    } else if !target.retire.is_empty() {
        steps.push(Step::Drain);
        if settings.soak_ms > 0 && !add.is_empty() {
            steps.push(Step::Soak);
        }
        steps.extend(target.retire.iter().map(|id| Step::Release { instance: id.clone() }));
    }
    steps
}

fn prepare(target: &Target, add: &[PlannedInstance]) -> Vec<Step> {
    if !matches!(target.workload, Workload::Image { .. }) {
        return Vec::new();
    }
    let mut machines: Vec<&String> = add.iter().map(|added| &added.machine).collect();
    machines.sort_unstable();
    machines.dedup();
    machines.into_iter().map(|machine| Step::Prepare { machine: machine.clone() }).collect()
}

/// Whether one copy takes over from another, and the two may not run at the same time.
fn is_cutover(target: &Target, settings: &MoveSettings) -> bool {
    settings.single_writer && !target.add.is_empty() && !target.retire.is_empty()
}

/// The old copy is stopped before the new one is started.
fn cutover(target: &Target, add: &[PlannedInstance]) -> Vec<Step> {
    let mut steps = prepare(target, add);
    steps.push(Step::Hold);
    steps.extend(target.retire.iter().map(|id| Step::Stop { instance: id.clone() }));
    steps.extend(add.iter().map(|added| Step::Start { instance: added.id.clone() }));
    steps.extend([Step::Warm, Step::Switch]);
    steps
}

/// How long clients are expected to wait: as long as the last time, or else for the probes and for a copy to stop and
/// another one to start.
fn pause_ms(state: &State, target: &Target, settings: &MoveSettings) -> u64 {
    if !is_cutover(target, settings) {
        return 0;
    }
    let mut before = state.rollouts.values().rev().filter(|rollout| rollout.plan.service == target.service);
    let last = before.find_map(|rollout| {
        rollout.receipt.as_ref().map(|receipt| receipt.pause_ms).filter(|pause_ms| *pause_ms > 0)
    });
    last.unwrap_or_else(|| STOP_AND_START_MS + warm_ms(settings))
}

fn warm_ms(settings: &MoveSettings) -> u64 {
    u64::from(settings.warm.probes) * u64::from(settings.warm.probe_interval_ms)
}

fn duration_ms(target: &Target, settings: &MoveSettings) -> u64 {
    if target.add.is_empty() {
        return 0;
    }
    if is_cutover(target, settings) {
        return warm_ms(settings);
    }
    let has_old = !(target.retire.is_empty() && target.keep.is_empty());
    let mirror =
        settings.warm.mirror.as_ref().filter(|_| has_old).map_or(0, |mirror| u64::from(mirror.max_ms));
    let warm = warm_ms(settings) + mirror;
    let steps =
        if target.retire.is_empty() && target.keep.is_empty() { 1 } else { settings.steps.len() as u64 };
    let soak = if target.retire.is_empty() { 0 } else { settings.soak_ms };
    warm + steps * u64::from(settings.step_hold_ms.midpoint(settings.step_max_ms)) + soak
}

/// The same ask on the same state gives the same hash: ids of new copies are named by their place instead.
fn hash(plan: &Plan, after: Option<&ServiceSpec>) -> String {
    let mut plan = plan.clone();
    for (index, added) in plan.add.iter_mut().enumerate() {
        let place = InstanceId(format!("new-{index}"));
        for step in &mut plan.steps {
            if let Step::Start { instance } = step
                && *instance == added.id
            {
                *instance = place.clone();
            }
        }
        added.id = place;
    }
    // What a measurement says of the same image may differ by the moment; it decides nothing.
    plan.estimate.transfer_bytes = None;
    let text = serde_json::to_vec(&(plan, after)).expect("a plan can be written as JSON");
    Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The settings of a service with those of one rollout over them.
pub(crate) fn resolve(settings: &MoveSettings, overrides: &MoveOverrides) -> MoveSettings {
    let mut settings = settings.clone();
    if let Some(steps) = &overrides.steps {
        settings.steps.clone_from(steps);
    }
    if let Some(soak_ms) = overrides.soak_ms {
        settings.soak_ms = soak_ms;
    }
    if let Some(increase) = overrides.error_ratio_increase {
        settings.guards.error_ratio_increase = increase;
    }
    if let Some(increase) = overrides.p95_increase {
        settings.guards.p95_increase = increase;
    }
    if let Some(sample_permille) = overrides.mirror_permille {
        let own = settings.warm.mirror.take().unwrap_or_default();
        settings.warm.mirror = (sample_permille > 0).then_some(MirrorSettings { sample_permille, ..own });
    }
    settings
}

/// Whether a version runs what a specification wants run.
pub(crate) fn runs_the_same(version: &Version, spec: &ServiceSpec) -> bool {
    version.workload == spec.workload && version.health == spec.health && version.resources == spec.resources
}

/// The plan of taking a service away: the same steps, with nothing to add.
pub(crate) fn plan_removal(state: &State, service: &str) -> Result<Option<Planned>, EngineError> {
    alarms::refuse_aside(state, service)?;
    refuse_second(state, service)?;
    let Some(known) = state.services.get(service) else { return Err(target::unknown_service(service)) };
    if matches!(known.spec.workload, Workload::Fixed { .. }) || state.instances_of(service).next().is_none() {
        return Ok(None);
    }
    let version = known.version.unwrap_or(known.last_version);
    let target = Target {
        service: service.to_owned(),
        kind: RolloutKind::Scale,
        from_version: known.version,
        to_version: version,
        new_version: false,
        workload: known.spec.workload.clone(),
        add: Vec::new(),
        retire: state.instances_of(service).map(|instance| instance.id.clone()).collect(),
        keep: Vec::new(),
        settings: known.spec.move_settings.clone(),
        after: None,
        blockers: Vec::new(),
    };
    let mut fresh = InstanceId::generate;
    let mut planned = build(state, target, &Observations::default(), &mut fresh);
    planned.plan.blockers.clear();
    planned.plan.warnings.clear();
    Ok(Some(planned))
}
