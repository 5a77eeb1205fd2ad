//! What stands in a plan's way, and what the operator should know.

use crate::model::{Finding, HealthKind, Instance, InstanceState, MachineKind, ServiceSpec, Workload};
use crate::runtime::ImageInfo;
use crate::state::State;

use super::observe::{ImageSeen, Observations};
use super::target::{Target, finding};

/// Whether a machine of this kind can run a workload.
pub(super) const fn fits(workload: &Workload, kind: &MachineKind) -> bool {
    match workload {
        Workload::Image { .. } => matches!(kind, MachineKind::Docker { .. }),
        Workload::Command { .. } => matches!(kind, MachineKind::Process),
        Workload::Fixed { .. } => false,
    }
}

pub(super) fn blockers(state: &State, target: &Target, seen: &Observations) -> Vec<Finding> {
    let mut found = target.blockers.clone();
    let mut machines: Vec<&String> = target.add.iter().collect();
    machines.sort_unstable();
    machines.dedup();
    for machine in machines {
        found.extend(machine_blocker(state, target, seen, machine));
    }
    if found.is_empty() && !target.add.is_empty() {
        found.extend(image_missing(state, target, seen));
    }
    found.extend(copy_left(state, target));
    found.extend(target.after.iter().flat_map(|after| routes_taken(state, after)));
    found
}

/// Of a single writer no copy is started while another one may still run somewhere.
fn copy_left(state: &State, target: &Target) -> Option<Finding> {
    let is_left = |instance: &&Instance| instance.state != InstanceState::Serving;
    let mut left = state.instances_of(&target.service).filter(is_left);
    let instance = left.next().filter(|_| target.settings.single_writer && !target.add.is_empty())?;
    Some(finding(
        "service.copy_left",
        format!(
            "{} on {} is not confirmed to be gone, and at most one copy of service {} may run",
            instance.id, instance.machine, target.service
        ),
        "Bring its machine back: it is removed by itself then (peregrine moves cleanup tries at once).",
    ))
}

fn machine_blocker(state: &State, target: &Target, seen: &Observations, name: &str) -> Option<Finding> {
    let Some(machine) = state.machines.get(name) else {
        let known: Vec<&str> = state.machines.keys().map(String::as_str).collect();
        let hint = if known.is_empty() {
            "Add one: peregrine machines add.".to_owned()
        } else {
            format!("Name one of: {}.", known.join(", "))
        };
        return Some(finding("machine.unknown", format!("there is no machine {name}"), hint));
    };
    if !fits(&target.workload, &machine.spec.kind) {
        return Some(match target.workload {
            Workload::Image { .. } => finding(
                "machine.needs_docker",
                format!("service {} is a container image, and {name} runs plain processes", target.service),
                "Choose a machine with a Docker engine.",
            ),
            _ => finding(
                "machine.needs_process",
                format!("service {} is a command, and {name} runs containers", target.service),
                "Choose a machine of the process runtime, or put the command into an image.",
            ),
        });
    }
    let answer = seen.machines.get(name)?;
    match &answer.info {
        Err(problem) => Some(problem.clone()),
        Ok(info) => {
            let image = any_image(seen)?;
            let differs = !image.architecture.is_empty() && image.architecture != info.architecture;
            (differs && matches!(target.workload, Workload::Image { .. })).then(|| {
                finding(
                    "image.architecture",
                    format!("the image is for {}, and {name} is {}", image.architecture, info.architecture),
                    format!(
                        "Choose a machine of {}, or deploy an image for {}.",
                        image.architecture, info.architecture
                    ),
                )
            })
        }
    }
}

fn any_image(seen: &Observations) -> Option<&ImageInfo> {
    seen.machines.values().find_map(|machine| match &machine.image {
        ImageSeen::Present(image) => Some(image),
        _ => None,
    })
}

/// An image that is known by its id alone cannot be pulled: one of our machines has to have it.
fn image_missing(state: &State, target: &Target, seen: &Observations) -> Option<Finding> {
    let Workload::Image { image, .. } = &target.workload else { return None };
    let digest = state.version(&target.service, target.to_version).and_then(|v| v.digest.clone());
    let by_id = image.starts_with("sha256:") || is_hex_id(image);
    if any_image(seen).is_some() || !(by_id || digest.is_some()) {
        return None;
    }
    let pullable = !by_id && image.contains('@');
    (!pullable).then(|| {
        let id = digest.as_deref().unwrap_or(image);
        finding(
            "image.missing",
            format!("no reachable machine has image {id} of service {}", target.service),
            "Deploy the service again with an image that is on a machine or in a registry, or bring the machine that has it back.",
        )
    })
}

fn is_hex_id(image: &str) -> bool {
    image.len() == 64 && image.bytes().all(|b| b.is_ascii_hexdigit())
}

pub(super) fn routes_taken(state: &State, after: &ServiceSpec) -> Vec<Finding> {
    // What a running rollout is about to give to another service is taken too.
    let coming = state.changes.values().filter_map(|change| change.after.as_deref());
    let specs = state.services.values().map(|service| &service.spec).chain(coming);
    let others = specs.filter(|spec| spec.name != after.name);
    let taken = others.flat_map(|other| other.routes.iter().map(move |route| (other, route)));
    let mut found: Vec<Finding> = taken
        .filter(|(_, route)| {
            after
                .routes
                .iter()
                .any(|own| own.path == route.path && own.host.eq_ignore_ascii_case(&route.host))
        })
        .map(|(other, route)| {
            finding(
                "route.taken",
                format!("{}{} belongs to service {}", route.host, route.path, other.name),
                "Give one of the two services another host or path.",
            )
        })
        .collect();
    found.dedup();
    found
}

pub(super) fn warnings(state: &State, target: &Target, seen: &Observations) -> Vec<Finding> {
    let Some(after) = &target.after else { return Vec::new() };
    let mut found = Vec::new();
    if target.add.is_empty() {
        return found;
    }
    if !matches!(after.health.kind, HealthKind::Http { .. }) {
        found.push(finding(
            "health.no_path",
            format!("service {} has no HTTP health check: a copy counts as good as soon as it accepts a connection", after.name),
            "Set health.path in the manifest.",
        ));
    }
    if after.replicas == 1 {
        found.push(finding(
            "replicas.single",
            format!(
                "service {} has one copy: it is without a spare whenever it is not being moved",
                after.name
            ),
            "Run two copies if it has to outlive a machine: peregrine scale.",
        ));
    }
    if after.routes.is_empty() {
        found.push(finding(
            "route.none",
            format!("service {} has no route: it runs and is not reachable through the edge", after.name),
            "Set hosts in the manifest.",
        ));
    }
    if let Workload::Image { image, .. } = &target.workload
        && any_image(seen).is_none()
        && state.version(&target.service, target.to_version).is_none()
    {
        found.push(finding(
            "image.to_be_pulled",
            format!("no machine has image {image} yet: whether a registry has it shows when it is pulled"),
            "A wrong name fails in the phase prepare and leaves the service as it is.",
        ));
    }
    found
}

/// Bytes to bring to the targets; `None` if the size is not known.
pub(super) fn transfer_bytes(state: &State, target: &Target, seen: &Observations) -> Option<u64> {
    if !matches!(target.workload, Workload::Image { .. }) {
        return Some(0);
    }
    let mut machines: Vec<&String> =
        target.add.iter().filter(|machine| state.machines.contains_key(*machine)).collect();
    machines.sort_unstable();
    machines.dedup();
    let missing = machines.iter().filter(|machine| {
        !matches!(seen.machines.get(**machine).map(|m| &m.image), Some(ImageSeen::Present(_)))
    });
    match (missing.count() as u64, any_image(seen)) {
        (0, _) => Some(0),
        (count, Some(image)) => Some(count * image.size_bytes),
        (_, None) => None,
    }
}
