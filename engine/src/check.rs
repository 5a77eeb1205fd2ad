//! What a specification has to be before anything else is asked of it.

use std::collections::BTreeSet;

use peregrine_routing::HostPattern;

use crate::error::{EngineError, ErrorKind};
use crate::model::{CAPABILITIES, MachineSpec, MoveSettings, ServiceSpec, Workload};
use crate::render;

/// Longest DNS label (RFC 1035 §2.3.4).
const MAX_NAME_BYTES: usize = 63;
/// Copies of one service: shares of the traffic stay exact up to here.
pub const MAX_REPLICAS: u32 = 1_000;
/// Steps of one shift.
const MAX_SHIFT_STEPS: usize = 20;

/// Refuses a service that cannot be meant.
pub(crate) fn service(spec: &ServiceSpec) -> Result<(), EngineError> {
    let what = format!("service {}", spec.name);
    name("service", &spec.name)?;
    for route in &spec.routes {
        HostPattern::parse(&route.host)
            .map_err(|error| invalid(format!("{what}: route host {:?}: {error}", route.host), HOST_HINT))?;
        if !route.path.starts_with('/') || route.path.bytes().any(|b| b"?# ".contains(&b)) {
            let hint = "A path prefix begins with / and has no ?, # or spaces.";
            return Err(invalid(format!("{what}: route path {:?} is no path prefix", route.path), hint));
        }
    }
    let routes: BTreeSet<_> = spec.routes.iter().map(|r| (r.host.to_lowercase(), &r.path)).collect();
    if routes.len() != spec.routes.len() {
        return Err(invalid(format!("{what} has the same route twice"), "Take one of them out."));
    }
    if !matches!(spec.workload, Workload::Fixed { .. }) && !(1..=MAX_REPLICAS).contains(&spec.replicas) {
        let hint = "To stop a service, remove it.";
        return Err(invalid(format!("{what}: replicas must be from 1 to {MAX_REPLICAS}"), hint));
    }
    workload(&what, &spec.workload)?;
    steps(&what, &spec.move_settings)
}

const HOST_HINT: &str =
    "Write a host such as shop.example.com, a wildcard *.example.com, or * for every host.";

fn workload(what: &str, workload: &Workload) -> Result<(), EngineError> {
    match workload {
        Workload::Image { image, .. } if image.trim().is_empty() => {
            Err(invalid(format!("{what} names no image"), "Write image = \"name:tag\"."))
        }
        Workload::Image { port: 0, .. } => {
            Err(invalid(format!("{what}: port 0"), "Write the port that the container listens on."))
        }
        Workload::Image { capabilities, .. } => {
            match capabilities.iter().find(|name| !CAPABILITIES.contains(&name.as_str())) {
                Some(name) => Err(invalid(
                    format!("{what}: a container cannot be given the capability {name:?}"),
                    format!("Write names such as SETUID, without CAP_: {}.", CAPABILITIES.join(", ")),
                )),
                None => Ok(()),
            }
        }
        Workload::Command { command, .. } if command.is_empty() => Err(invalid(
            format!("{what} has an empty command"),
            "Write command = [\"program\", \"argument\"].",
        )),
        Workload::Fixed { upstreams } => {
            let mut seen = BTreeSet::new();
            for upstream in upstreams {
                if render::address(&upstream.address).is_none() || !seen.insert(&upstream.address) {
                    return Err(invalid(
                        format!(
                            "{what}: upstream {:?} is no address with a port, or is there twice",
                            upstream.address
                        ),
                        "Write upstreams as \"10.0.0.5:8080\" or \"backend.internal:8080\", each once.",
                    ));
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Refuses steps that do not rise to 100, and a mirror that cannot be meant.
pub(crate) fn steps(what: &str, settings: &MoveSettings) -> Result<(), EngineError> {
    let steps = &settings.steps;
    let rising = steps.windows(2).all(|pair| pair[0] < pair[1]);
    let ends = steps.last() == Some(&100) && steps.first().is_some_and(|first| *first > 0);
    if rising && ends && steps.len() <= MAX_SHIFT_STEPS {
        return mirror(what, settings);
    }
    Err(invalid(
        format!(
            "{what}: move steps {steps:?} do not rise from above 0 to 100, in at most {MAX_SHIFT_STEPS} steps"
        ),
        "Write steps such as [1, 10, 50, 100].",
    ))
}

/// Refuses a mirror that could not be meant.
fn mirror(what: &str, settings: &MoveSettings) -> Result<(), EngineError> {
    let Some(mirror) = &settings.warm.mirror else { return Ok(()) };
    let sample = (1..=1_000).contains(&mirror.sample_permille);
    let caps = mirror.max_requests_per_s > 0 && mirror.max_concurrent > 0;
    let times = mirror.max_ms > 0 && mirror.timeout_ms > 0;
    if sample && caps && times && (0.0..=1.0).contains(&mirror.differing_ratio) {
        return Ok(());
    }
    Err(invalid(
        format!("{what}: the mirror {mirror:?} can copy nothing, or its tolerated share is none"),
        "Leave mirroring out, or give it a sample of 1 to 1000 of a thousand, caps and times above 0, and a tolerated \
         share from 0 to 1.",
    ))
}

/// Refuses a machine that cannot be meant.
pub(crate) fn machine(spec: &MachineSpec) -> Result<(), EngineError> {
    name("machine", &spec.name)
}

fn name(kind: &str, name: &str) -> Result<(), EngineError> {
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name.bytes().all(fine)
        && !name.starts_with('-')
        && !name.ends_with('-')
    {
        return Ok(());
    }
    Err(invalid(
        format!("{kind} name {name:?} is no DNS label"),
        format!("Use lower-case letters, digits and hyphens inside, at most {MAX_NAME_BYTES} characters."),
    ))
}

fn invalid(message: String, hint: impl Into<String>) -> EngineError {
    EngineError::new(ErrorKind::Invalid, "spec.invalid", message, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowing(name: &str) -> Workload {
        Workload::Image {
            image: "shop:1".to_owned(),
            port: 80,
            command: None,
            env: Default::default(),
            capabilities: [name.to_owned()].into(),
        }
    }

    #[test]
    fn a_container_is_given_back_only_capabilities_that_are_no_power_over_the_machine() {
        for name in CAPABILITIES {
            assert!(workload("service shop", &allowing(name)).is_ok(), "{name}");
        }
        for name in ["SYS_ADMIN", "ALL", "CAP_SETUID", "setuid", "", " SETUID"] {
            let error = workload("service shop", &allowing(name)).expect_err(name);
            assert_eq!((error.kind, error.code), (ErrorKind::Invalid, "spec.invalid"));
            assert!(error.message.contains(&format!("{name:?}")), "{}", error.message);
            assert!(error.hint.contains("SETUID, SYS_CHROOT"), "{}", error.hint);
        }
    }
}
