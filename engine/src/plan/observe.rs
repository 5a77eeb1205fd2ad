//! What the planner has to know of the world. It is gathered before, so that planning itself is pure.

use std::collections::BTreeMap;

use crate::handle::Ask;
use crate::model::{Finding, Workload};
use crate::runtime::{ImageInfo, RuntimeInfo};
use crate::state::State;

/// What was seen of the machines and of the image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observations {
    /// Machines that were asked, by name.
    pub machines: BTreeMap<String, MachineSeen>,
}

/// What a machine answered.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineSeen {
    /// What it is, or why it does not answer.
    pub info: Result<RuntimeInfo, Finding>,
    /// The image there, if one was asked for.
    pub image: ImageSeen,
}

/// What a machine says of an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ImageSeen {
    /// Not asked, or no answer.
    #[default]
    Unknown,
    /// It does not have it.
    Missing,
    /// It has it.
    Present(ImageInfo),
}

/// The image that an ask is about: by digest if the version is known, else by the operator's reference.
pub(crate) fn image_wanted(state: &State, ask: &Ask) -> Option<String> {
    let of_version = |service: &str, number: u32| {
        let version = state.version(service, number)?;
        match &version.workload {
            Workload::Image { image, .. } => Some(version.digest.clone().unwrap_or_else(|| image.clone())),
            _ => None,
        }
    };
    let known = |service: &str| state.services.get(service);
    match ask {
        Ask::Deploy { spec, .. } => {
            let serving =
                known(&spec.name).and_then(|s| s.version).and_then(|n| state.version(&spec.name, n));
            match serving {
                Some(version) if super::runs_the_same(version, spec) => {
                    of_version(&spec.name, version.number)
                }
                _ => match &spec.workload {
                    Workload::Image { image, .. } => Some(image.clone()),
                    _ => None,
                },
            }
        }
        Ask::Move { service, .. } | Ask::Scale { service, .. } => {
            of_version(service, known(service)?.version?)
        }
        Ask::Rollback { service, to_version } => {
            of_version(service, to_version.or(known(service)?.previous_version)?)
        }
    }
}

/// Machines to ask before planning: those that are named, and those that may have the image.
pub(crate) fn machines_of_interest(state: &State, ask: &Ask) -> Vec<String> {
    let (service, named) = match ask {
        Ask::Deploy { spec, machine, .. } => (spec.name.as_str(), machine.as_ref()),
        Ask::Move { service, to, .. } => (service.as_str(), Some(to)),
        Ask::Rollback { service, .. } => (service.as_str(), None),
        Ask::Scale { service, machine, .. } => (service.as_str(), machine.as_ref()),
    };
    let of_service = state.instances_of(service).map(|instance| &instance.machine);
    let all_for_image = state.machines.keys().filter(|_| image_wanted(state, ask).is_some());
    let only = (state.machines.len() == 1).then(|| state.machines.keys()).into_iter().flatten();
    let mut machines: Vec<String> =
        named.into_iter().chain(of_service).chain(all_for_image).chain(only).cloned().collect();
    machines.sort_unstable();
    machines.dedup();
    machines.retain(|machine| state.machines.contains_key(machine));
    machines
}
