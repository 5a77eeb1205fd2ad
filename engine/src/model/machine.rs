//! Machines: where instances run, and how the engine and the edge reach them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::UnixMs;

/// A machine as the operator describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Unique name, a DNS label.
    pub name: String,
    /// What runs instances there.
    pub kind: MachineKind,
    /// Address at which the edge reaches the published ports of this machine's instances.
    pub address: IpAddr,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What runs instances on a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "runtime", rename_all = "snake_case")]
pub enum MachineKind {
    /// A Docker engine.
    Docker {
        /// How it is reached.
        endpoint: DockerEndpoint,
    },
    /// Plain child processes of this machine's supervisor, which bind [`MachineSpec::address`].
    Process,
}

/// How a Docker engine is reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "snake_case")]
pub enum DockerEndpoint {
    /// A unix socket on this machine.
    Unix {
        /// Path of the socket.
        path: PathBuf,
    },
    /// TCP. Without TLS only on loopback or with `insecure`.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
        /// Mutual TLS.
        tls: Option<TlsFiles>,
        /// The operator has said in so many words that clear text is fine here.
        #[serde(default)]
        insecure: bool,
    },
    /// SSH to the host, then its unix socket (direct-streamlocal).
    Ssh {
        /// Host name or address.
        host: String,
        /// Port, usually 22.
        port: u16,
        /// User.
        user: String,
        /// Private key file.
        key: PathBuf,
        /// The host's public key in OpenSSH form (`ssh-ed25519 AAAA…`): any other is refused.
        host_key: String,
        /// Path of the engine's socket there.
        socket: PathBuf,
    },
}

/// Files of a mutual TLS connection (PEM).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Certificate of the authority that signed the engine's certificate.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Our private key.
    pub key: PathBuf,
}

/// A machine that the engine knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// What the operator said.
    pub spec: MachineSpec,
    /// When it was added.
    pub added_at: UnixMs,
    /// It came from the configuration file of `serve` (and goes when it is taken out there).
    #[serde(default)]
    pub from_config: bool,
}
