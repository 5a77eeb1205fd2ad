//! What a specification has to be before anything else is asked of it.

use std::collections::BTreeSet;

use peregrine_routing::{HostPattern, IpNet, canonical_prefix};

use crate::error::{EngineError, ErrorKind};
use crate::model::{
    CAPABILITIES, CutoverSettings, MachineSpec, MoveSettings, Protocol, RulesSpec, ServiceSpec,
    TrafficPolicy, Workload,
};
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
        if let Err(error) = canonical_prefix(&route.path.as_str().into()) {
            let hint =
                "A path prefix is written as it is matched: from / on, without query and without steps up.";
            return Err(invalid(format!("{what}: route path {:?}: {error}", route.path), hint));
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
    proxy_protocol(&what, &spec.traffic)?;
    rules(&what, &spec.traffic.rules)?;
    single_writer(&what, spec)?;
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

/// Refuses a service of which one copy may run, and that is to have several.
fn single_writer(what: &str, spec: &ServiceSpec) -> Result<(), EngineError> {
    if !spec.move_settings.single_writer {
        return Ok(());
    }
    if matches!(spec.workload, Workload::Fixed { .. }) {
        let hint = "Take single_writer out: Peregrine does not run these servers and cannot stop them.";
        return Err(invalid(format!("{what}: fixed upstreams cannot be single_writer"), hint));
    }
    if spec.replicas > 1 {
        let hint = "Write replicas = 1, or take single_writer out of its move settings.";
        let message =
            format!("{what}: a single_writer service has one copy, and replicas is {}", spec.replicas);
        return Err(invalid(message, hint));
    }
    Ok(())
}

/// Refuses a header that says for whom a connection is where connections are for many.
fn proxy_protocol(what: &str, traffic: &TrafficPolicy) -> Result<(), EngineError> {
    if traffic.send_proxy_protocol.is_none() || traffic.protocol != Protocol::H2c {
        return Ok(());
    }
    Err(invalid(
        format!(
            "{what}: a connection of h2c serves many clients, and send_proxy_protocol says that it is for one"
        ),
        "Take send_proxy_protocol out, or write protocol = \"http1\".",
    ))
}

/// Refuses rules that no edge could follow.
fn rules(what: &str, rules: &RulesSpec) -> Result<(), EngineError> {
    for network in rules.allow.iter().chain(&rules.deny) {
        network.parse::<IpNet>().map_err(|error| {
            invalid(format!("{what}: rules: {error}"), "Write 10.0.0.0/8, 192.0.2.7 or 2001:db8::/32.")
        })?;
    }
    let most = RulesSpec::MAX_NETWORKS;
    if rules.allow.len().max(rules.deny.len()) > most {
        let hint = "Put them together into larger networks.";
        return Err(invalid(format!("{what}: rules: a list has more than {most} networks"), hint));
    }
    rules
        .check_changes()
        .map_err(|unfit| invalid(format!("{what}: rules: {}", unfit.message), unfit.hint))?;
    let Some(limit) = &rules.rate_limit else { return Ok(()) };
    if limit.requests == 0 || limit.per_ms == 0 || limit.burst == 0 {
        let hint = "Give requests, time and burst, each at least 1.";
        return Err(invalid(format!("{what}: rules: a rate limit of nothing lets nobody in"), hint));
    }
    if u64::from(limit.requests) > u64::from(limit.per_ms) * 1_000 {
        let hint = "Say fewer requests, or a longer time.";
        return Err(invalid(
            format!("{what}: rules: more than a million requests a second is no limit"),
            hint,
        ));
    }
    Ok(())
}

/// Refuses steps that do not rise to 100, and bounds of a cutover and a mirror that cannot be meant.
pub(crate) fn steps(what: &str, settings: &MoveSettings) -> Result<(), EngineError> {
    let steps = &settings.steps;
    let rising = steps.windows(2).all(|pair| pair[0] < pair[1]);
    let ends = steps.last() == Some(&100) && steps.first().is_some_and(|first| *first > 0);
    if rising && ends && steps.len() <= MAX_SHIFT_STEPS {
        cutover(what, &settings.cutover)?;
        return mirror(what, settings);
    }
    Err(invalid(
        format!(
            "{what}: move steps {steps:?} do not rise from above 0 to 100, in at most {MAX_SHIFT_STEPS} steps"
        ),
        "Write steps such as [1, 10, 50, 100].",
    ))
}

/// Refuses bounds under which nobody could be held, or nothing could be switched in time.
fn cutover(what: &str, settings: &CutoverSettings) -> Result<(), EngineError> {
    type Bounds = CutoverSettings;
    let longest_ms = u64::from(Bounds::MAX_MS);
    let bounds = [
        (
            "hold_deadline_ms",
            settings.hold_deadline_ms.into(),
            Bounds::MIN_HOLD_DEADLINE_MS.into(),
            longest_ms,
        ),
        ("hold_max_requests", settings.hold_max_requests.into(), 1, Bounds::MAX_HOLD_REQUESTS.into()),
        ("hold_max_bytes", settings.hold_max_bytes, Bounds::MIN_HOLD_BYTES, Bounds::MAX_HOLD_BYTES),
        ("hold_max_age_ms", settings.hold_max_age_ms.into(), 1, longest_ms),
        ("hold_release_per_s", settings.hold_release_per_s.into(), 1, Bounds::MAX_HOLD_RELEASE_PER_S.into()),
        ("drain_max_ms", settings.drain_max_ms.into(), 0, longest_ms),
    ];
    for (name, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            return Err(invalid(
                format!("{what}: cutover {name} is {value}"),
                format!("Write {least} to {most}, or leave it out."),
            ));
        }
    }
    Ok(())
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
    use crate::model::ProxyProtocol;

    #[test]
    fn a_connection_that_serves_many_clients_cannot_say_that_it_is_for_one() {
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            let sends = |protocol| TrafficPolicy {
                protocol,
                send_proxy_protocol: Some(version),
                ..TrafficPolicy::default()
            };
            assert!(proxy_protocol("service shop", &sends(Protocol::Http1)).is_ok());
            let error = proxy_protocol("service shop", &sends(Protocol::H2c)).expect_err("it is refused");
            assert_eq!((error.kind, error.code), (ErrorKind::Invalid, "spec.invalid"));
            assert!(error.message.contains("send_proxy_protocol"), "{}", error.message);
        }
    }

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
