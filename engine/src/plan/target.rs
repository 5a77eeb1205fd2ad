//! From an ask to the copies that are wanted: which are kept, which are added, which are retired.

use crate::check;
use crate::error::{EngineError, ErrorKind};
use crate::handle::{Ask, MoveOverrides};
use crate::model::{
    Finding, Instance, InstanceId, InstanceState, MachineKind, MoveSettings, RolloutKind, Service,
    ServiceSpec, Workload,
};
use crate::state::State;

use super::{resolve, runs_the_same};

/// What an ask wants.
pub(super) enum Wanted {
    Settings(Box<ServiceSpec>),
    Copies(Box<Target>),
}

/// The copies that are wanted, and how to get there.
pub(super) struct Target {
    pub(super) service: String,
    pub(super) kind: RolloutKind,
    pub(super) from_version: Option<u32>,
    pub(super) to_version: u32,
    pub(super) new_version: bool,
    pub(super) workload: Workload,
    /// Machines of the copies to add.
    pub(super) add: Vec<String>,
    pub(super) retire: Vec<InstanceId>,
    pub(super) keep: Vec<InstanceId>,
    pub(super) settings: MoveSettings,
    pub(super) after: Option<Box<ServiceSpec>>,
    /// Found on the way.
    pub(super) blockers: Vec<Finding>,
}

pub(super) fn target(state: &State, ask: &Ask) -> Result<Wanted, EngineError> {
    match ask {
        Ask::Deploy { spec, machine, overrides } => deploy(state, spec, machine.as_deref(), overrides),
        Ask::Move { service, to, from, overrides } => {
            let known = managed(state, service)?;
            let settings = settings_of(known, overrides)?;
            let mut target = same_version(state, known, RolloutKind::Move, settings);
            move_to(state, &mut target, to, from.as_deref());
            Ok(Wanted::Copies(Box::new(target)))
        }
        Ask::Rollback { service, to_version } => rollback(state, service, *to_version),
        Ask::Scale { service, replicas, machine } => scale(state, service, *replicas, machine.as_deref()),
    }
}

fn settings_of(service: &Service, overrides: &MoveOverrides) -> Result<MoveSettings, EngineError> {
    let settings = resolve(&service.spec.move_settings, overrides);
    check::steps(&format!("service {}", service.spec.name), &settings)?;
    Ok(settings)
}

/// The copies that a rollout starts from: what serves now.
fn serving<'a>(state: &'a State, service: &'a str) -> Vec<&'a Instance> {
    state.instances_of(service).filter(|instance| instance.state == InstanceState::Serving).collect()
}

fn same_version(state: &State, known: &Service, kind: RolloutKind, settings: MoveSettings) -> Target {
    Target {
        service: known.spec.name.clone(),
        kind,
        from_version: known.version,
        to_version: known.version.unwrap_or(known.last_version),
        new_version: false,
        workload: known.spec.workload.clone(),
        add: Vec::new(),
        retire: Vec::new(),
        keep: serving(state, &known.spec.name).into_iter().map(|instance| instance.id.clone()).collect(),
        settings,
        after: Some(Box::new(known.spec.clone())),
        blockers: Vec::new(),
    }
}

fn move_to(state: &State, target: &mut Target, to: &str, from: Option<&str>) {
    let copies = serving(state, &target.service);
    let leave = |copy: &&&Instance| copy.machine != to && from.is_none_or(|from| copy.machine == from);
    let leaving: Vec<&&Instance> = copies.iter().filter(leave).collect();
    if leaving.is_empty() {
        target.blockers.push(if copies.is_empty() {
            finding(
                "service.not_running",
                format!("service {} has no copy to move", target.service),
                "Deploy it first.",
            )
        } else if let Some(from) = from.filter(|from| copies.iter().all(|copy| copy.machine != **from)) {
            finding(
                "move.nothing_there",
                format!("service {} has no copy on {from}", target.service),
                "See where its copies are: peregrine status.",
            )
        } else {
            finding(
                "move.same_place",
                format!("service {} is on {to} already", target.service),
                "Name another machine with --to.",
            )
        });
    }
    target.add = vec![to.to_owned(); leaving.len()];
    target.retire = leaving.iter().map(|copy| copy.id.clone()).collect();
    let retire = target.retire.clone();
    target.keep.retain(|id| !retire.contains(id));
}

fn deploy(
    state: &State,
    spec: &ServiceSpec,
    machine: Option<&str>,
    overrides: &MoveOverrides,
) -> Result<Wanted, EngineError> {
    check::service(spec)?;
    let known = state.services.get(&spec.name);
    let is_fixed = |workload: &Workload| matches!(workload, Workload::Fixed { .. });
    let before_fixed = known.map(|service| is_fixed(&service.spec.workload));
    if is_fixed(&spec.workload) && before_fixed != Some(false) {
        return Ok(Wanted::Settings(Box::new(spec.clone())));
    }
    let mut settings = resolve(&spec.move_settings, overrides);
    // The copies of before keep the promise that they were started with.
    settings.single_writer |= known.is_some_and(|known| known.spec.move_settings.single_writer);
    check::steps(&format!("service {}", spec.name), &settings)?;
    let serving_version = known.and_then(|s| s.version).and_then(|n| state.version(&spec.name, n));
    let same = serving_version.filter(|version| runs_the_same(version, spec));
    let mut target = Target {
        service: spec.name.clone(),
        kind: RolloutKind::Deploy,
        from_version: known.and_then(|service| service.version),
        to_version: same.map_or_else(|| known.map_or(1, |s| s.last_version + 1), |version| version.number),
        new_version: same.is_none(),
        workload: spec.workload.clone(),
        add: Vec::new(),
        retire: Vec::new(),
        keep: Vec::new(),
        settings,
        after: Some(Box::new(spec.clone())),
        blockers: Vec::new(),
    };
    if before_fixed.is_some_and(|fixed| fixed != is_fixed(&spec.workload)) {
        target.blockers.push(finding(
            "workload.kind_changed",
            format!(
                "service {} cannot change between fixed upstreams and a workload that Peregrine runs",
                spec.name
            ),
            "Remove the service and deploy it anew, or deploy it under another name.",
        ));
        return Ok(Wanted::Copies(Box::new(target)));
    }
    let copies = serving(state, &spec.name);
    let places = places(state, &mut target, &copies, machine, spec.replicas);
    if same.is_some() {
        diff(&mut target, &copies, places);
        if target.add.is_empty() && target.retire.is_empty() && target.blockers.is_empty() {
            return Ok(Wanted::Settings(Box::new(spec.clone())));
        }
    } else {
        target.add = places;
        target.retire = copies.iter().map(|copy| copy.id.clone()).collect();
    }
    Ok(Wanted::Copies(Box::new(target)))
}

/// Where the copies are to be: on the machine that was named, else where they are, else on the only one.
fn places(
    state: &State,
    target: &mut Target,
    copies: &[&Instance],
    machine: Option<&str>,
    replicas: u32,
) -> Vec<String> {
    let wanted = replicas as usize;
    if let Some(machine) = machine {
        return vec![machine.to_owned(); wanted];
    }
    let mut places: Vec<String> = copies.iter().take(wanted).map(|copy| copy.machine.clone()).collect();
    let spread: Vec<String> = if copies.is_empty() {
        let fits = |kind: &MachineKind| super::verdict::fits(&target.workload, kind);
        let fit: Vec<&String> =
            state.machines.iter().filter(|(_, m)| fits(&m.spec.kind)).map(|(n, _)| n).collect();
        let [only] = fit[..] else {
            target.blockers.push(finding(
                "machine.not_named",
                if fit.is_empty() {
                    format!("no machine can run service {}", target.service)
                } else {
                    format!("service {} could go to any of {} machines", target.service, fit.len())
                },
                if fit.is_empty() { "Add a machine: peregrine machines add." } else { "Name one with --to." },
            ));
            return Vec::new();
        };
        vec![only.clone()]
    } else {
        places.clone()
    };
    let missing = wanted.saturating_sub(places.len());
    places.extend(spread.into_iter().cycle().take(missing));
    places
}

/// Keeps the copies whose place is wanted, adds what is missing, retires the rest.
fn diff(target: &mut Target, copies: &[&Instance], mut places: Vec<String>) {
    for copy in copies {
        if let Some(at) = places.iter().position(|place| *place == copy.machine) {
            places.swap_remove(at);
            target.keep.push(copy.id.clone());
        } else {
            target.retire.push(copy.id.clone());
        }
    }
    target.add = places;
}

fn rollback(state: &State, service: &str, to_version: Option<u32>) -> Result<Wanted, EngineError> {
    let known = managed(state, service)?;
    let mut target =
        same_version(state, known, RolloutKind::Rollback, settings_of(known, &MoveOverrides::default())?);
    let number = to_version.or(known.previous_version).filter(|number| Some(*number) != known.version);
    let Some(version) = number.and_then(|number| state.version(service, number)) else {
        target.blockers.push(match to_version {
            Some(number) if known.version == Some(number) => finding(
                "rollback.same_version",
                format!("service {service} runs version {number} already"),
                "Name another version with --to-version.",
            ),
            Some(number) => finding(
                "rollback.unknown_version",
                format!("service {service} has no version {number}"),
                "See its versions: peregrine services show.",
            ),
            None => finding(
                "rollback.nothing",
                format!("service {service} has no earlier version to go back to"),
                "A rollback needs a second deploy; a move is taken back by moving again.",
            ),
        });
        return Ok(Wanted::Copies(Box::new(target)));
    };
    let mut spec = known.spec.clone();
    spec.workload = version.workload.clone();
    spec.health = version.health.clone();
    spec.resources = version.resources.clone();
    let copies = serving(state, service);
    target.to_version = version.number;
    target.workload = version.workload.clone();
    target.after = Some(Box::new(spec));
    target.add = copies.iter().map(|copy| copy.machine.clone()).collect();
    target.retire = std::mem::take(&mut target.keep);
    Ok(Wanted::Copies(Box::new(target)))
}

fn scale(state: &State, service: &str, replicas: u32, machine: Option<&str>) -> Result<Wanted, EngineError> {
    let known = managed(state, service)?;
    let mut target =
        same_version(state, known, RolloutKind::Scale, settings_of(known, &MoveOverrides::default())?);
    let copies = serving(state, service);
    let (have, want) = (copies.len(), replicas as usize);
    let wrong = |code: &str, message: String, hint: &str| finding(code, message, hint);
    if replicas == 0 || replicas > check::MAX_REPLICAS {
        target.blockers.push(wrong(
            "scale.out_of_range",
            format!("service {service} can have from 1 to {} copies", check::MAX_REPLICAS),
            "To stop a service, remove it.",
        ));
    } else if replicas > 1 && target.settings.single_writer {
        target.blockers.push(wrong(
            "service.single_writer",
            format!("at most one copy of service {service} may run: it is a single_writer"),
            "Deploy it without single_writer first, if several copies may write.",
        ));
    } else if copies.is_empty() {
        target.blockers.push(wrong(
            "service.not_running",
            format!("service {service} runs nowhere"),
            "Deploy it first.",
        ));
    } else if have == want {
        target.blockers.push(wrong(
            "scale.same",
            format!("service {service} has {have} copies already"),
            "Name another number.",
        ));
    }
    if !target.blockers.is_empty() {
        return Ok(Wanted::Copies(Box::new(target)));
    }
    let mut spec = known.spec.clone();
    spec.replicas = replicas;
    target.after = Some(Box::new(spec));
    let spread: Vec<String> = copies.iter().map(|copy| copy.machine.clone()).collect();
    let places = machine.map_or(spread, |machine| vec![machine.to_owned()]);
    target.add = places.into_iter().cycle().take(want.saturating_sub(have)).collect();
    target.retire = target.keep.split_off(want.min(have)); // ids sort by time: the newest go first
    Ok(Wanted::Copies(Box::new(target)))
}

fn managed<'a>(state: &'a State, service: &str) -> Result<&'a Service, EngineError> {
    let known = state.services.get(service).ok_or_else(|| unknown_service(service))?;
    if matches!(known.spec.workload, Workload::Fixed { .. }) {
        return Err(EngineError::new(
            ErrorKind::Invalid,
            "workload.fixed",
            format!("service {service} has fixed upstreams, which Peregrine does not run"),
            "Change its upstreams in the manifest and deploy it; the traffic follows at once.",
        ));
    }
    Ok(known)
}

pub(super) fn unknown_service(service: &str) -> EngineError {
    EngineError::new(
        ErrorKind::NotFound,
        "service.unknown",
        format!("there is no service {service}"),
        "See the services: peregrine services.",
    )
}

pub(super) fn finding(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Finding {
    Finding { code: code.to_owned(), message: message.into(), hint: hint.into() }
}
