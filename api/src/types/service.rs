//! Services and their versions.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rules::fill;
use super::{FieldError, Health, MoveSettings, Resources, Traffic, instant};

/// What stands for the value of an environment variable, and for the hash of a password, in every answer. Sent back in a request it means
/// "as it is".
pub const REDACTED: &str = "***";

/// A service as the operator describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceSpec {
    /// Unique name, a DNS label. May be left out where the path of the request says it.
    #[serde(default)]
    pub name: String,
    /// Ways in. Empty: the service is run but not routed.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// What runs.
    pub workload: Workload,
    /// Health of one instance.
    #[serde(default)]
    pub health: Health,
    /// Limits of one instance.
    #[serde(default)]
    pub resources: Resources,
    /// How many instances.
    #[serde(default = "one")]
    pub replicas: u32,
    /// What the edge has to know.
    #[serde(default)]
    pub traffic: Traffic,
    /// How a move goes about it.
    #[serde(rename = "move", default)]
    pub move_settings: MoveSettings,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

/// One way in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Route {
    /// Host pattern: `shop.example.com`, `*.example.com`, or `*` for every host.
    pub host: String,
    /// Path prefix on segment borders.
    #[serde(default = "every_path")]
    pub path: String,
}

fn every_path() -> String {
    "/".to_owned()
}

/// What runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Workload {
    /// A container image. Needs a Docker machine.
    Image {
        /// Reference.
        image: String,
        /// Port inside the container.
        port: u16,
        /// Replaces the image's command.
        #[serde(default)]
        command: Option<Vec<String>>,
        /// Environment. In answers every value is `***`.
        #[serde(default)]
        env: BTreeMap<String, String>,
        /// What the container is given back of the capabilities that it does not have otherwise: names of
        /// capabilities(7) without `CAP_`, such as `SETUID`.
        #[serde(default)]
        capabilities: BTreeSet<String>,
    },
    /// A command. Needs a process machine. It is told its address by `HOST` and `PORT`.
    Command {
        /// Program and arguments. `{port}` and `{host}` are replaced.
        command: Vec<String>,
        /// Working directory.
        #[serde(default)]
        directory: Option<String>,
        /// Environment. In answers every value is `***`.
        #[serde(default)]
        env: BTreeMap<String, String>,
    },
    /// Servers that Peregrine does not manage.
    Fixed {
        /// Where they listen.
        upstreams: Vec<FixedUpstream>,
    },
}

/// A server that Peregrine does not manage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FixedUpstream {
    /// Address or host name with port.
    pub address: String,
    /// Relative capacity, at least 1.
    #[serde(default = "one")]
    pub weight: u32,
}

/// A service that the server knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// Name.
    pub name: String,
    /// How it stands.
    pub state: ServiceState,
    /// What the operator wants; values of environment variables are `***`.
    pub spec: ServiceSpec,
    /// Version that serves; `null` before the first deploy, and for fixed upstreams.
    pub version: Option<u32>,
    /// Version that served before.
    pub previous_version: Option<u32>,
    /// Highest version number given out.
    pub latest_version: u32,
    /// The move that is under way.
    #[serde(rename = "move")]
    pub move_id: Option<String>,
    /// It came from the configuration file of `serve`.
    pub from_config: bool,
    /// When it was first seen.
    pub created_at: Timestamp,
}

/// How a service stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceState {
    /// As it should be.
    Running,
    /// Fewer healthy copies than wanted, and at least one.
    Degraded,
    /// A new version is on its way.
    Deploying,
    /// On its way to another place.
    Moving,
    /// On its way back to an earlier version or place.
    RollingBack,
    /// On its way to another number of copies.
    Scaling,
    /// Nothing of it is meant to run.
    Stopped,
    /// No healthy copy.
    Failed,
    /// Not probed yet.
    Unknown,
}

/// An immutable version of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Deployment {
    /// Service.
    pub service: String,
    /// 1, 2, 3, …
    pub version: u32,
    /// It serves now.
    pub current: bool,
    /// It served before the current one: a rollback goes here.
    pub previous: bool,
    /// What runs; values of environment variables are `***`.
    pub workload: Workload,
    /// Digest of the image, `sha256:…`.
    pub digest: Option<String>,
    /// Health.
    pub health: Health,
    /// Limits.
    pub resources: Resources,
    /// When it was made.
    pub created_at: Timestamp,
    /// The move that made it.
    #[serde(rename = "move")]
    pub move_id: String,
}

impl Service {
    /// A service as it is told: without the values of its environment.
    #[must_use]
    pub fn of(service: &engine::Service, state: ServiceState) -> Self {
        Self {
            name: service.spec.name.clone(),
            state,
            spec: ServiceSpec::redacted(&service.spec),
            version: service.version,
            previous_version: service.previous_version,
            latest_version: service.last_version,
            move_id: service.rollout.as_ref().map(ToString::to_string),
            from_config: service.from_config,
            created_at: instant(service.created_at),
        }
    }
}

impl Deployment {
    /// A version as it is told: without the values of its environment.
    #[must_use]
    pub fn of(version: &engine::Version, service: Option<&engine::Service>) -> Self {
        Self {
            service: version.service.clone(),
            version: version.number,
            current: service.is_some_and(|service| service.version == Some(version.number)),
            previous: service.is_some_and(|service| service.previous_version == Some(version.number)),
            workload: Workload::redacted(&version.workload),
            digest: version.digest.clone(),
            health: (&version.health).into(),
            resources: (&version.resources).into(),
            created_at: instant(version.created_at),
            move_id: version.rollout.to_string(),
        }
    }
}

// There is no `From<engine::ServiceSpec>` on purpose: whoever converts has to say whether secrets go along.
impl ServiceSpec {
    /// For answers: without the values of environment variables.
    #[must_use]
    pub fn redacted(spec: &engine::ServiceSpec) -> Self {
        let mut redacted = Self::around(spec, Workload::redacted(&spec.workload));
        redacted.traffic.rules.redact();
        redacted
    }

    /// For requests: with the values of environment variables.
    #[must_use]
    pub fn with_values(spec: &engine::ServiceSpec) -> Self {
        Self::around(spec, Workload::with_values(&spec.workload))
    }

    fn around(spec: &engine::ServiceSpec, workload: Workload) -> Self {
        Self {
            name: spec.name.clone(),
            routes: spec
                .routes
                .iter()
                .map(|route| Route { host: route.host.clone(), path: route.path.clone() })
                .collect(),
            workload,
            health: (&spec.health).into(),
            resources: (&spec.resources).into(),
            replicas: spec.replicas,
            traffic: (&spec.traffic).into(),
            move_settings: (&spec.move_settings).into(),
            labels: spec.labels.clone(),
        }
    }

    /// The engine's form of it. Environment variables whose value is [`REDACTED`] keep the value that they
    /// have in `present`.
    ///
    /// # Errors
    /// Everything that is wrong, each with the pointer to it below the specification.
    pub fn to_engine(
        &self,
        present: Option<&engine::ServiceSpec>,
    ) -> Result<engine::ServiceSpec, Vec<FieldError>> {
        let mut errors = Vec::new();
        let mut spec = engine::ServiceSpec {
            name: self.name.clone(),
            routes: self
                .routes
                .iter()
                .map(|route| engine::Route { host: route.host.clone(), path: route.path.clone() })
                .collect(),
            workload: self.workload.to_engine(present.map(|spec| &spec.workload), &mut errors),
            health: self.health.to_engine(&mut errors),
            resources: (&self.resources).into(),
            replicas: self.replicas,
            traffic: (&self.traffic).into(),
            move_settings: (&self.move_settings).into(),
            labels: self.labels.clone(),
        };
        fill(&mut spec.traffic.rules, present.map(|spec| &spec.traffic.rules), &mut errors);
        if errors.is_empty() { Ok(spec) } else { Err(errors) }
    }
}

impl Workload {
    /// For answers: without the values of environment variables.
    #[must_use]
    pub fn redacted(workload: &engine::Workload) -> Self {
        let mut workload = Self::with_values(workload);
        match &mut workload {
            Self::Image { env, .. } | Self::Command { env, .. } => {
                for value in env.values_mut() {
                    REDACTED.clone_into(value);
                }
            }
            Self::Fixed { .. } => {}
        }
        workload
    }

    /// For requests: with the values of environment variables.
    #[must_use]
    pub fn with_values(workload: &engine::Workload) -> Self {
        match workload {
            engine::Workload::Image { image, port, command, env, capabilities } => Self::Image {
                image: image.clone(),
                port: *port,
                command: command.clone(),
                env: env.clone(),
                capabilities: capabilities.clone(),
            },
            engine::Workload::Command { command, directory, env } => Self::Command {
                command: command.clone(),
                directory: directory.as_ref().map(|path| path.to_string_lossy().into_owned()),
                env: env.clone(),
            },
            engine::Workload::Fixed { upstreams } => Self::Fixed {
                upstreams: upstreams
                    .iter()
                    .map(|upstream| FixedUpstream {
                        address: upstream.address.clone(),
                        weight: upstream.weight,
                    })
                    .collect(),
            },
        }
    }

    fn to_engine(
        &self,
        present: Option<&engine::Workload>,
        errors: &mut Vec<FieldError>,
    ) -> engine::Workload {
        match self {
            Self::Image { image, port, command, env, capabilities } => engine::Workload::Image {
                image: image.clone(),
                port: *port,
                command: command.clone(),
                env: filled(env, present, errors),
                capabilities: known(capabilities, errors),
            },
            Self::Command { command, directory, env } => engine::Workload::Command {
                command: command.clone(),
                directory: directory.as_ref().map(Into::into),
                env: filled(env, present, errors),
            },
            Self::Fixed { upstreams } => engine::Workload::Fixed {
                upstreams: upstreams
                    .iter()
                    .map(|upstream| engine::FixedUpstream {
                        address: upstream.address.clone(),
                        weight: upstream.weight,
                    })
                    .collect(),
            },
        }
    }
}

/// The capabilities, if a container can be given all of them.
fn known(capabilities: &BTreeSet<String>, errors: &mut Vec<FieldError>) -> BTreeSet<String> {
    let unknown = capabilities.iter().filter(|name| !engine::CAPABILITIES.contains(&name.as_str()));
    errors.extend(unknown.map(|name| {
        let names = engine::CAPABILITIES.join(", ");
        let message = format!("a container cannot be given {name:?}; it can be given {names}");
        FieldError::new("/workload/capabilities", message)
    }));
    capabilities.clone()
}

/// The environment with every redacted value replaced by the present one.
fn filled(
    env: &BTreeMap<String, String>,
    present: Option<&engine::Workload>,
    errors: &mut Vec<FieldError>,
) -> BTreeMap<String, String> {
    let present = match present {
        Some(engine::Workload::Image { env, .. } | engine::Workload::Command { env, .. }) => Some(env),
        _ => None,
    };
    let mut filled = BTreeMap::new();
    for (name, value) in env {
        let value = if value == REDACTED {
            let Some(kept) = present.and_then(|env| env.get(name)) else {
                errors.push(FieldError::new(
                    format!("/workload/env/{}", name.replace('~', "~0").replace('/', "~1")),
                    format!("\"{REDACTED}\" keeps the present value, and {name} has none: give the value"),
                ));
                continue;
            };
            kept
        } else {
            value
        };
        filled.insert(name.clone(), value.clone());
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"{
        "name": "shop",
        "routes": [{"host": "shop.example.com", "path": "/"}, {"host": "*"}],
        "workload": {"kind": "image", "image": "shop:1", "port": 3000, "env": {"KEY": "secret-value"},
            "capabilities": ["SETGID", "SETUID"]},
        "health": {"probe": "http", "path": "/healthz"},
        "replicas": 2,
        "traffic": {"balance": {"policy": "hash_cookie", "name": "sid"}, "send_proxy_protocol": "v2"},
        "move": {"steps": [50, 100], "guards": {"p95_increase": null}}
    }"#;

    fn parsed(text: &str) -> ServiceSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_service_survives_the_way_to_the_engine_and_back() {
        let spec = parsed(FULL);
        assert_eq!(ServiceSpec::with_values(&spec.to_engine(None).unwrap()), spec);
    }

    #[test]
    fn what_is_left_out_is_the_engines_own_default() {
        let spec =
            parsed(r#"{"name":"a","workload":{"kind":"fixed","upstreams":[{"address":"10.0.0.5:80"}]}}"#)
                .to_engine(None)
                .unwrap();
        assert_eq!(spec.move_settings, engine::MoveSettings::default());
        assert_eq!(spec.traffic, engine::TrafficPolicy::default());
        assert_eq!(spec.resources, engine::Resources::default());
        assert_eq!(spec.health, engine::HealthSpec::default());
        assert_eq!(spec.replicas, 1);
    }

    #[test]
    fn an_answer_never_bears_the_value_of_an_environment_variable() {
        let spec = ServiceSpec::redacted(&parsed(FULL).to_engine(None).unwrap());
        let text = serde_json::to_string(&spec).unwrap();
        assert!(!text.contains("secret-value"), "{text}");
        assert!(text.contains(r#""KEY":"***""#), "{text}");
    }

    #[test]
    fn a_redacted_value_that_comes_back_keeps_the_present_one() {
        let present = parsed(FULL).to_engine(None).unwrap();
        let sent = ServiceSpec::redacted(&present);
        assert_eq!(sent.to_engine(Some(&present)).unwrap(), present);
    }

    #[test]
    fn hashes_of_passwords_are_kept_like_values() {
        let mut spec = parsed(FULL);
        spec.traffic.rules.basic_auth =
            serde_json::from_str(r#"{"realm":"r","users":{"alice":"hunter2"}}"#).unwrap();
        let present = spec.to_engine(None).unwrap();
        let sent = ServiceSpec::redacted(&present);
        let text = format!("{sent:?}{}", serde_json::to_string(&sent).unwrap());
        assert!(!text.contains("hunter2") && text.contains(r#""alice":"***""#), "{text}");
        assert_eq!(sent.to_engine(Some(&present)).unwrap(), present);
        assert_eq!(
            sent.to_engine(Some(&parsed(FULL).to_engine(None).unwrap())).unwrap_err()[0].pointer,
            "/traffic/rules/basic_auth/users/alice"
        );
    }

    #[test]
    fn a_redacted_value_without_a_present_one_is_refused_at_its_variable() {
        let sent =
            parsed(r#"{"name":"a","workload":{"kind":"image","image":"x","port":1,"env":{"A/B":"***"}}}"#);
        assert_eq!(sent.to_engine(None).unwrap_err()[0].pointer, "/workload/env/A~1B");
    }

    #[test]
    fn a_capability_that_no_container_gets_is_refused_where_it_is() {
        let sent = parsed(
            r#"{"name":"a","workload":{"kind":"image","image":"x","port":1,"capabilities":["SYS_ADMIN","KILL"]}}"#,
        );
        let errors = sent.to_engine(None).unwrap_err();
        assert_eq!((errors.len(), errors[0].pointer.as_str()), (1, "/workload/capabilities"));
        assert!(
            errors[0].message.contains("\"SYS_ADMIN\"") && errors[0].message.contains("SETUID"),
            "{errors:?}"
        );
    }

    #[test]
    fn an_http_probe_without_a_path_and_a_tcp_probe_with_one_are_refused() {
        for health in [r#"{"probe":"http"}"#, r#"{"probe":"tcp","path":"/x"}"#] {
            let text =
                format!(r#"{{"name":"a","workload":{{"kind":"fixed","upstreams":[]}},"health":{health}}}"#);
            assert_eq!(parsed(&text).to_engine(None).unwrap_err()[0].pointer, "/health/path");
        }
    }
}
