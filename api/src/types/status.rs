//! One document that says how everything stands.

use std::collections::BTreeMap;

use jiff::Timestamp;
use peregrine_engine::{EngineHandle, InstanceView, State, model as engine};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Finding, Instance, InstanceHealth, InstanceState, Move, Route, RuntimeKind, ServiceState};

/// How everything stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// When it was read.
    pub time: Timestamp,
    /// Version of the server.
    pub version: String,
    /// Id of this installation.
    pub install: String,
    /// Id of the newest stored event: `?after=` it misses nothing that comes after this document.
    pub last_event: u64,
    /// Services by name.
    pub services: Vec<ServiceStatus>,
    /// Machines by name.
    pub machines: Vec<MachineStatus>,
    /// Moves under way, newest first.
    pub moves: Vec<Move>,
    /// What is held because the server cannot read it, and waits for a person.
    #[serde(default)]
    pub alarms: Vec<Finding>,
}

/// How a service stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceStatus {
    /// Name.
    pub name: String,
    /// In one word.
    pub state: ServiceState,
    /// Version that serves.
    pub version: Option<u32>,
    /// Copies wanted.
    pub replicas: u32,
    /// Ways in.
    pub routes: Vec<Route>,
    /// Where its copies are, by machine.
    pub places: Vec<PlaceStatus>,
    /// Addresses of fixed upstreams.
    pub upstreams: Vec<String>,
    /// The move that is under way.
    #[serde(rename = "move")]
    pub move_id: Option<String>,
}

/// The copies of a service on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlaceStatus {
    /// Machine.
    pub machine: String,
    /// Copies there, in any state.
    pub instances: u32,
    /// Copies that get traffic and are healthy.
    pub healthy: u32,
    /// Percent of the service's traffic.
    pub weight_percent: f64,
    /// Requests and connections inside now.
    pub in_flight: u64,
    /// Requests since the copies entered the table.
    pub requests: u64,
    /// Errors since then.
    pub errors: u64,
    /// Versions there.
    pub versions: Vec<u32>,
}

/// How a machine stands, by what is stored: `POST /api/v1/machines/{name}/check` asks the machine itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineStatus {
    /// Name.
    pub name: String,
    /// What runs instances there.
    pub runtime: RuntimeKind,
    /// Address at which the edge reaches it.
    pub address: String,
    /// Copies there.
    pub instances: u32,
}

impl Status {
    /// The document, from one state and one live picture.
    #[must_use]
    pub fn of(engine: &EngineHandle, state: &State, views: &[InstanceView], version: &str) -> Self {
        Self {
            time: Timestamp::now(),
            version: version.to_owned(),
            install: engine.install(),
            last_event: engine.last_event(),
            alarms: engine.alarms().iter().map(Into::into).collect(),
            services: state
                .services
                .values()
                .map(|service| ServiceStatus::of(service, state, views))
                .collect(),
            machines: state.machines.values().map(|machine| MachineStatus::of(machine, state)).collect(),
            moves: state
                .rollouts
                .values()
                .rev()
                .filter(|rollout| !rollout.state.is_terminal())
                .map(|rollout| Move::of(rollout, engine.sample(&rollout.id).as_ref(), state))
                .collect(),
        }
    }
}

impl ServiceStatus {
    fn of(service: &engine::Service, state: &State, views: &[InstanceView]) -> Self {
        let own: Vec<Instance> =
            views.iter().filter(|view| view.instance.service == service.spec.name).map(Into::into).collect();
        let upstreams = match &service.spec.workload {
            engine::Workload::Fixed { upstreams } => {
                upstreams.iter().map(|fixed| fixed.address.clone()).collect()
            }
            _ => Vec::new(),
        };
        Self {
            name: service.spec.name.clone(),
            state: ServiceState::of(service, state, &own),
            version: service.version,
            replicas: service.spec.replicas,
            routes: service
                .spec
                .routes
                .iter()
                .map(|route| Route { host: route.host.clone(), path: route.path.clone() })
                .collect(),
            places: places(&own),
            upstreams,
            move_id: service.rollout.as_ref().map(ToString::to_string),
        }
    }
}

fn places(instances: &[Instance]) -> Vec<PlaceStatus> {
    let mut places: BTreeMap<&str, PlaceStatus> = BTreeMap::new();
    for instance in instances {
        let place = places.entry(&instance.machine).or_insert_with(|| PlaceStatus {
            machine: instance.machine.clone(),
            instances: 0,
            healthy: 0,
            weight_percent: 0.0,
            in_flight: 0,
            requests: 0,
            errors: 0,
            versions: Vec::new(),
        });
        place.instances += 1;
        place.healthy += u32::from(serves(instance));
        place.weight_percent += instance.weight_percent;
        place.in_flight += instance.in_flight;
        place.requests += instance.requests;
        place.errors += instance.errors;
        if !place.versions.contains(&instance.version) {
            place.versions.push(instance.version);
        }
    }
    places.into_values().collect()
}

fn serves(instance: &Instance) -> bool {
    instance.state == InstanceState::Serving && instance.health == InstanceHealth::Healthy
}

impl ServiceState {
    /// The one word for a service.
    #[must_use]
    pub fn of(service: &engine::Service, state: &State, instances: &[Instance]) -> Self {
        if let Some(rollout) = service.rollout.as_ref().and_then(|id| state.rollouts.get(id)) {
            return Self::under_way(rollout);
        }
        if matches!(service.spec.workload, engine::Workload::Fixed { .. }) {
            return Self::Running; // the edge probes them; their health is in its metrics
        }
        let wanted = service.spec.replicas;
        if service.version.is_none() || wanted == 0 {
            return Self::Stopped;
        }
        let serving = instances.iter().filter(|instance| instance.state == InstanceState::Serving);
        if serving.clone().any(|instance| instance.health == InstanceHealth::Unknown) {
            return Self::Unknown;
        }
        let healthy = serving.filter(|instance| serves(instance)).count();
        match u32::try_from(healthy).unwrap_or(u32::MAX) {
            0 => Self::Failed,
            some if some < wanted => Self::Degraded,
            _ => Self::Running,
        }
    }

    fn under_way(rollout: &engine::Rollout) -> Self {
        match (rollout.state, rollout.plan.kind) {
            (engine::RolloutState::RollingBack, _) | (_, engine::RolloutKind::Rollback) => Self::RollingBack,
            (_, engine::RolloutKind::Deploy) => Self::Deploying,
            (_, engine::RolloutKind::Move) => Self::Moving,
            (_, engine::RolloutKind::Scale) => Self::Scaling,
        }
    }
}

impl MachineStatus {
    fn of(machine: &engine::Machine, state: &State) -> Self {
        let instances =
            state.instances.values().filter(|instance| instance.machine == machine.spec.name).count();
        Self {
            name: machine.spec.name.clone(),
            runtime: match machine.spec.kind {
                engine::MachineKind::Docker { .. } => RuntimeKind::Docker,
                engine::MachineKind::Process => RuntimeKind::Process,
            },
            address: machine.spec.address.to_string(),
            instances: u32::try_from(instances).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ServiceSpec;

    fn instance(state: InstanceState, health: InstanceHealth) -> Instance {
        serde_json::from_value(serde_json::json!({
            "id": "ins_1", "service": "shop", "version": 1, "machine": "a", "move": "mov_1", "address": null,
            "state": state, "health": health, "weight_percent": 100.0, "in_flight": 0, "requests": 0,
            "errors": 0, "p50_us": null, "p95_us": null, "probe_latency_us": null, "usage": null,
            "created_at": "2026-01-01T00:00:00Z"
        }))
        .unwrap()
    }

    fn service(replicas: u32) -> engine::Service {
        let spec: ServiceSpec = serde_json::from_value(serde_json::json!({
            "name": "shop", "replicas": replicas, "workload": {"kind": "command", "command": ["x"]}
        }))
        .unwrap();
        engine::Service {
            spec: spec.to_engine(None).unwrap(),
            version: Some(1),
            previous_version: None,
            last_version: 1,
            epoch: 1,
            rollout: None,
            from_config: false,
            fixed_generations: BTreeMap::new(),
            created_at: 0,
        }
    }

    #[test]
    fn the_word_for_a_service_follows_from_its_healthy_copies() {
        use InstanceHealth::{Healthy, Unhealthy, Unknown};
        use InstanceState::{Serving, Soaking};
        let word = |copies: &[Instance]| ServiceState::of(&service(2), &State::default(), copies);
        let good = instance(Serving, Healthy);
        assert_eq!(word(&[good.clone(), good.clone()]), ServiceState::Running);
        assert_eq!(word(&[good.clone(), instance(Serving, Unhealthy)]), ServiceState::Degraded);
        assert_eq!(word(&[good.clone(), instance(Soaking, Healthy)]), ServiceState::Degraded);
        assert_eq!(word(&[instance(Serving, Unhealthy)]), ServiceState::Failed);
        assert_eq!(word(&[]), ServiceState::Failed);
        assert_eq!(word(&[good, instance(Serving, Unknown)]), ServiceState::Unknown);
        assert_eq!(ServiceState::of(&service(0), &State::default(), &[]), ServiceState::Stopped);
    }

    #[test]
    fn the_copies_on_one_machine_are_one_place() {
        let good = instance(InstanceState::Serving, InstanceHealth::Healthy);
        let bad = instance(InstanceState::Serving, InstanceHealth::Ejected);
        let places = places(&[good, bad]);
        assert_eq!(places.len(), 1);
        assert_eq!((places[0].instances, places[0].healthy), (2, 1));
        assert_eq!(places[0].versions, [1]);
    }
}
