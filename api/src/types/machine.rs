//! Machines.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{FieldError, Finding, instant};

/// A machine as the operator describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineSpec {
    /// Unique name, a DNS label.
    pub name: String,
    /// What runs instances there.
    pub runtime: RuntimeKind,
    /// How the Docker engine is reached; only with `"runtime": "docker"`.
    #[serde(default)]
    pub endpoint: Option<DockerEndpoint>,
    /// Address at which the edge reaches the published ports of this machine's instances.
    #[schema(value_type = String, example = "10.0.0.5")]
    pub address: IpAddr,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What runs instances on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RuntimeKind {
    /// A Docker engine.
    Docker,
    /// Plain processes on the machine of the server, bound to the machine's address.
    Process,
}

/// How a Docker engine is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "transport", rename_all = "snake_case")]
pub enum DockerEndpoint {
    /// A unix socket on the machine of the server.
    Unix {
        /// Path of the socket.
        path: String,
    },
    /// TCP. Without TLS only on loopback or with `insecure`.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
        /// Mutual TLS.
        #[serde(default)]
        tls: Option<TlsFiles>,
        /// Says in so many words that clear text is fine here.
        #[serde(default)]
        insecure: bool,
    },
    /// SSH to the host, then its unix socket.
    Ssh {
        /// Host name or address.
        host: String,
        /// Port.
        #[serde(default = "ssh_port")]
        port: u16,
        /// User.
        user: String,
        /// Private key file on the machine of the server.
        key: String,
        /// The host's public key in OpenSSH form (`ssh-ed25519 AAAA…`): any other is refused.
        host_key: String,
        /// Path of the engine's socket there.
        #[serde(default = "docker_socket")]
        socket: String,
    },
}

fn ssh_port() -> u16 {
    22
}

fn docker_socket() -> String {
    "/var/run/docker.sock".to_owned()
}

/// Files of a mutual TLS connection (PEM) on the machine of the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TlsFiles {
    /// Certificate of the authority that signed the engine's certificate.
    pub ca: String,
    /// Our certificate.
    pub cert: String,
    /// Our private key.
    pub key: String,
}

/// A machine that the server knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// Name.
    pub name: String,
    /// What the operator said.
    pub spec: MachineSpec,
    /// When it was added.
    pub added_at: Timestamp,
    /// It came from the configuration file of `serve`.
    pub from_config: bool,
    /// Instances placed on it.
    pub instances: u32,
}

/// What a machine answered when it was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MachineCheck {
    /// Machine.
    pub machine: String,
    /// It answered and can be used.
    pub ok: bool,
    /// What it is, if it answered.
    pub runtime: Option<RuntimeInfo>,
    /// Round trip to it.
    pub latency_ms: f64,
    /// Why it cannot be used, and what to do.
    pub problem: Option<Finding>,
    /// Instances of this installation found there.
    pub instances: u64,
    /// Ids of instances of this installation there that the server does not know.
    pub orphans: Vec<String>,
}

/// What a machine's runtime says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RuntimeInfo {
    /// For people: name, version, API version.
    pub version: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `linux`.
    pub os: String,
}

impl Machine {
    /// A machine with the number of instances that the state places on it.
    #[must_use]
    pub fn of(machine: &engine::Machine, instances: usize) -> Self {
        Self {
            name: machine.spec.name.clone(),
            spec: (&machine.spec).into(),
            added_at: instant(machine.added_at),
            from_config: machine.from_config,
            instances: u32::try_from(instances).unwrap_or(u32::MAX),
        }
    }
}

impl MachineCheck {
    /// The outcome of a check.
    #[must_use]
    pub fn of(machine: &str, check: &peregrine_engine::MachineCheck) -> Self {
        Self {
            machine: machine.to_owned(),
            ok: check.info.is_some() && check.problem.is_none(),
            runtime: check.info.as_ref().map(|info| RuntimeInfo {
                version: info.version.clone(),
                architecture: info.architecture.clone(),
                os: info.os.clone(),
            }),
            latency_ms: check.latency_ms,
            problem: check.problem.as_ref().map(|problem| Finding {
                code: problem.code.clone(),
                message: problem.message.clone(),
                hint: problem.hint.clone(),
            }),
            instances: check.instances as u64,
            orphans: check.orphans.clone(),
        }
    }
}

impl From<&engine::MachineSpec> for MachineSpec {
    fn from(spec: &engine::MachineSpec) -> Self {
        let (runtime, endpoint) = match &spec.kind {
            engine::MachineKind::Docker { endpoint } => (RuntimeKind::Docker, Some(endpoint.into())),
            engine::MachineKind::Process => (RuntimeKind::Process, None),
        };
        Self {
            name: spec.name.clone(),
            runtime,
            endpoint,
            address: spec.address,
            labels: spec.labels.clone(),
        }
    }
}

impl From<&engine::DockerEndpoint> for DockerEndpoint {
    fn from(endpoint: &engine::DockerEndpoint) -> Self {
        match endpoint {
            engine::DockerEndpoint::Unix { path } => Self::Unix { path: text(path) },
            engine::DockerEndpoint::Tcp { host, port, tls, insecure } => Self::Tcp {
                host: host.clone(),
                port: *port,
                tls: tls.as_ref().map(|tls| TlsFiles {
                    ca: text(&tls.ca),
                    cert: text(&tls.cert),
                    key: text(&tls.key),
                }),
                insecure: *insecure,
            },
            engine::DockerEndpoint::Ssh { host, port, user, key, host_key, socket } => Self::Ssh {
                host: host.clone(),
                port: *port,
                user: user.clone(),
                key: text(key),
                host_key: host_key.clone(),
                socket: text(socket),
            },
        }
    }
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

impl MachineSpec {
    /// The engine's form of it.
    ///
    /// # Errors
    /// What is wrong with which field: a Docker machine without endpoint, or a process machine with one.
    pub fn to_engine(&self) -> Result<engine::MachineSpec, Vec<FieldError>> {
        let kind = match (self.runtime, &self.endpoint) {
            (RuntimeKind::Docker, Some(endpoint)) => {
                engine::MachineKind::Docker { endpoint: endpoint.to_engine() }
            }
            (RuntimeKind::Docker, None) => {
                return Err(vec![FieldError::new(
                    "/endpoint",
                    "a docker machine needs an endpoint, for example {\"transport\": \"unix\", \"path\": \"/var/run/docker.sock\"}",
                )]);
            }
            (RuntimeKind::Process, None) => engine::MachineKind::Process,
            (RuntimeKind::Process, Some(_)) => {
                return Err(vec![FieldError::new(
                    "/endpoint",
                    "a process machine has no endpoint: leave it out",
                )]);
            }
        };
        Ok(engine::MachineSpec {
            name: self.name.clone(),
            kind,
            address: self.address,
            labels: self.labels.clone(),
        })
    }
}

impl DockerEndpoint {
    fn to_engine(&self) -> engine::DockerEndpoint {
        match self {
            Self::Unix { path } => engine::DockerEndpoint::Unix { path: path.into() },
            Self::Tcp { host, port, tls, insecure } => engine::DockerEndpoint::Tcp {
                host: host.clone(),
                port: *port,
                tls: tls.as_ref().map(|tls| engine::TlsFiles {
                    ca: (&tls.ca).into(),
                    cert: (&tls.cert).into(),
                    key: (&tls.key).into(),
                }),
                insecure: *insecure,
            },
            Self::Ssh { host, port, user, key, host_key, socket } => engine::DockerEndpoint::Ssh {
                host: host.clone(),
                port: *port,
                user: user.clone(),
                key: key.into(),
                host_key: host_key.clone(),
                socket: socket.into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> MachineSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn every_kind_of_machine_survives_the_way_to_the_engine_and_back() {
        for text in [
            r#"{"name":"a","runtime":"process","address":"127.0.0.2"}"#,
            r#"{"name":"a","runtime":"docker","address":"10.0.0.1","endpoint":{"transport":"unix","path":"/s"}}"#,
            r#"{"name":"a","runtime":"docker","address":"::1","endpoint":{"transport":"tcp","host":"h","port":2376,"tls":{"ca":"a","cert":"b","key":"c"}}}"#,
            r#"{"name":"a","runtime":"docker","address":"10.0.0.1","labels":{"x":"y"},"endpoint":{"transport":"ssh","host":"h","user":"u","key":"/k","host_key":"ssh-ed25519 AAAA"}}"#,
        ] {
            let spec = parsed(text);
            assert_eq!(MachineSpec::from(&spec.to_engine().unwrap()), spec, "{text}");
        }
    }

    #[test]
    fn an_ssh_endpoint_has_the_usual_port_and_socket_unless_told_otherwise() {
        let spec = parsed(
            r#"{"name":"a","runtime":"docker","address":"10.0.0.1","endpoint":{"transport":"ssh","host":"h","user":"u","key":"/k","host_key":"x"}}"#,
        );
        let Some(DockerEndpoint::Ssh { port, socket, .. }) = spec.endpoint else { panic!("not ssh") };
        assert_eq!((port, socket.as_str()), (22, "/var/run/docker.sock"));
    }

    #[test]
    fn a_docker_machine_without_endpoint_and_a_process_machine_with_one_are_refused_at_the_field() {
        let docker = parsed(r#"{"name":"a","runtime":"docker","address":"10.0.0.1"}"#);
        assert_eq!(docker.to_engine().unwrap_err()[0].pointer, "/endpoint");
        let process = parsed(
            r#"{"name":"a","runtime":"process","address":"10.0.0.1","endpoint":{"transport":"unix","path":"/s"}}"#,
        );
        assert_eq!(process.to_engine().unwrap_err()[0].pointer, "/endpoint");
    }
}
