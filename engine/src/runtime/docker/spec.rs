//! An [`InstanceSpec`] as a container.
//!
//! Containers are confined: no new privileges, every capability dropped, limits on memory (swap included), CPU
//! and pids, and output that cannot fill the disk. An image whose program begins as an almighty root (changes
//! owners, changes users) needs the service to name the capabilities that are given back; ports below 1024 work
//! without, because `net.ipv4.ip_unprivileged_port_start` is 0 inside.
//!
//! The restart policy is `unless-stopped`: a crash or a reboot of the machine brings the container back also
//! while Peregrine itself is down; the engine's own back-off (100 ms doubling to a minute) bounds a crash loop,
//! which is seen by its count of restarts. A bounded `on-failure` would leave a service down after a bad hour.

use std::collections::HashMap;

use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigLogConfig, PortBinding, RestartPolicy, RestartPolicyNameEnum,
};

use crate::runtime::{InstanceSpec, Run, RuntimeError};

/// Label: id of the installation.
pub(super) const INSTALL_LABEL: &str = "peregrine.install";
/// Label: service.
pub(super) const SERVICE_LABEL: &str = "peregrine.service";
/// Label: instance.
pub(super) const INSTANCE_LABEL: &str = "peregrine.instance";
/// Label: version of the service.
pub(super) const VERSION_LABEL: &str = "peregrine.version";
/// Label: epoch.
pub(super) const EPOCH_LABEL: &str = "peregrine.epoch";
/// Label: port inside.
pub(super) const PORT_LABEL: &str = "peregrine.port";

/// Output of one container kept by the engine: so much in each file …
const LOG_FILE_SIZE: &str = "10m";
/// … and so many files.
const LOG_FILES: &str = "3";

/// The container of an instance. `init` adds the engine's own init process, which reaps orphans and passes
/// signals on: programs that were not written to be process 1 ignore SIGTERM otherwise.
///
/// # Errors
///
/// The instance is no container.
pub(super) fn container(spec: &InstanceSpec, init: bool) -> Result<ContainerCreateBody, RuntimeError> {
    let Run::Container { image, command, port, capabilities } = &spec.run else {
        return Err(RuntimeError::Unsupported(
            "a Docker engine runs images, not commands: give the service an image, or use a process machine"
                .to_owned(),
        ));
    };
    let inside = port_name(*port);
    let mut env: Vec<String> = spec
        .env
        .iter()
        .filter(|(name, _)| name.as_str() != "PORT")
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    env.push(format!("PORT={port}"));
    Ok(ContainerCreateBody {
        image: Some(image.clone()),
        cmd: command.clone(),
        env: Some(env),
        exposed_ports: Some(vec![inside.clone()]),
        labels: Some(labels(spec, *port)),
        host_config: Some(HostConfig { init: Some(init), ..confinement(spec, inside, capabilities) }),
        ..ContainerCreateBody::default()
    })
}

/// A port as the engine names it.
pub(super) fn port_name(port: u16) -> String {
    format!("{port}/tcp")
}

fn labels(spec: &InstanceSpec, port: u16) -> HashMap<String, String> {
    [
        (INSTALL_LABEL, spec.install.clone()),
        (SERVICE_LABEL, spec.service.clone()),
        (INSTANCE_LABEL, spec.id.to_string()),
        (VERSION_LABEL, spec.version.to_string()),
        (EPOCH_LABEL, spec.epoch.to_string()),
        (PORT_LABEL, port.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

fn confinement(spec: &InstanceSpec, inside: String, capabilities: &[String]) -> HostConfig {
    let resources = &spec.resources;
    let memory = i64::try_from(resources.memory_bytes).ok().filter(|bytes| *bytes > 0);
    let binding = PortBinding {
        host_ip: Some(spec.publish.to_string()),
        host_port: Some(String::new()), // any free one: two copies of a service can share a machine
    };
    HostConfig {
        memory,
        memory_swap: memory, // memory and swap together: no swap
        nano_cpus: (resources.cpu_millis > 0).then(|| i64::from(resources.cpu_millis) * 1_000_000),
        pids_limit: (resources.pids > 0).then(|| i64::from(resources.pids)),
        cap_drop: Some(vec!["ALL".to_owned()]),
        cap_add: (!capabilities.is_empty()).then(|| capabilities.to_vec()),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        sysctls: Some([("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into()),
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::UNLESS_STOPPED),
            maximum_retry_count: None,
        }),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(
                [("max-size", LOG_FILE_SIZE), ("max-file", LOG_FILES)]
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
            ),
        }),
        port_bindings: Some([(inside, Some(vec![binding]))].into()),
        ..HostConfig::default()
    }
}
