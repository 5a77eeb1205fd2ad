//! What an engine says of a container, as an [`InstanceStatus`].

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum, NetworkSettings};

use super::spec::{EPOCH_LABEL, INSTALL_LABEL, INSTANCE_LABEL, PORT_LABEL, SERVICE_LABEL, port_name};
use crate::model::InstanceId;
use crate::runtime::InstanceStatus;

/// Where a container is in its life, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Made, never started.
    Created,
    /// Runs.
    Running,
    /// Frozen by somebody.
    Paused,
    /// Has ended and is started again by the engine in a moment.
    Restarting,
    /// Has ended.
    Exited,
    /// Is being removed.
    Removing,
    /// A removal failed half-way.
    Dead,
}

/// A container that was found under an instance's name.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// The engine's own name for this very container: one that is made later under the same name is another one.
    pub(super) container: String,
    /// Its life.
    pub(super) life: Life,
    /// Installation that it belongs to; `None` if it is none of Peregrine's.
    pub(super) install: Option<String>,
    /// For the engine's callers.
    pub(super) status: InstanceStatus,
}

/// Reads an inspection of the container named `id`, on a machine whose ports are published at `machine`.
pub(super) fn read(id: &InstanceId, machine: IpAddr, container: ContainerInspectResponse) -> Found {
    let own = container.id.unwrap_or_else(|| id.to_string());
    let labels = container.config.and_then(|config| config.labels).unwrap_or_default();
    let state = container.state.unwrap_or_default();
    let life = match state.status {
        Some(ContainerStateStatusEnum::CREATED) => Life::Created,
        Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::STOPPING) => Life::Running,
        Some(ContainerStateStatusEnum::PAUSED) => Life::Paused,
        Some(ContainerStateStatusEnum::RESTARTING) => Life::Restarting,
        Some(ContainerStateStatusEnum::REMOVING) => Life::Removing,
        Some(ContainerStateStatusEnum::DEAD) => Life::Dead,
        _ => Life::Exited,
    };
    let ours = labels.get(INSTANCE_LABEL).map(String::as_str) == Some(id.as_str());
    let running = life == Life::Running;
    let ended = matches!(life, Life::Exited | Life::Restarting | Life::Dead);
    Found {
        container: own,
        life,
        install: labels.get(INSTALL_LABEL).filter(|_| ours).cloned(),
        status: InstanceStatus {
            id: id.clone(),
            service: labels.get(SERVICE_LABEL).cloned().unwrap_or_default(),
            epoch: epoch(&labels),
            running,
            exit_code: state.exit_code.filter(|_| ended),
            out_of_memory: ended && state.oom_killed == Some(true),
            restarts: container.restart_count.and_then(|count| u64::try_from(count).ok()).unwrap_or(0),
            address: address(&labels, machine, container.network_settings).filter(|_| running),
        },
    }
}

/// The epoch in a container's labels; 0 if there is none.
pub(super) fn epoch(labels: &HashMap<String, String>) -> u64 {
    labels.get(EPOCH_LABEL).and_then(|epoch| epoch.parse().ok()).unwrap_or(0)
}

fn address(
    labels: &HashMap<String, String>,
    machine: IpAddr,
    network: Option<NetworkSettings>,
) -> Option<SocketAddr> {
    let port = port_name(labels.get(PORT_LABEL)?.parse().ok()?);
    let mut ports = network?.ports?;
    let binding = ports.remove(&port)??.into_iter().next()?;
    let published: u16 = binding.host_port?.parse().ok().filter(|port| *port != 0)?;
    let ip = binding.host_ip.and_then(|ip| ip.parse::<IpAddr>().ok()).filter(|ip| !ip.is_unspecified());
    Some(SocketAddr::new(ip.unwrap_or(machine), published))
}
