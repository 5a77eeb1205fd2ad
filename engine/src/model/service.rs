//! Services: what is to run, how it is reached and how it may be moved.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{CutoverSettings, HiddenValues, MirrorSettings, RolloutId, RulesSpec, UnixMs};

/// A service as the operator describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Unique name, a DNS label.
    pub name: String,
    /// Ways in. Empty: the service is run but not routed.
    pub routes: Vec<Route>,
    /// What runs.
    pub workload: Workload,
    /// Health of one instance.
    pub health: HealthSpec,
    /// Limits of one instance.
    pub resources: Resources,
    /// How many instances.
    pub replicas: u32,
    /// What the edge has to know.
    pub traffic: TrafficPolicy,
    /// How a rollout goes about it.
    #[serde(rename = "move")]
    pub move_settings: MoveSettings,
    /// Free labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// One way in: a host pattern (`shop.example.com`, `*.example.com`, `*`) and a path prefix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Host pattern.
    pub host: String,
    /// Path prefix on segment borders.
    pub path: String,
}

/// What runs. `Debug` hides the values of the environment.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Workload {
    /// A container image. Needs a Docker machine.
    Image {
        /// Reference as the operator wrote it.
        image: String,
        /// Port inside the container.
        port: u16,
        /// Replaces the image's command.
        #[serde(default)]
        command: Option<Vec<String>>,
        /// Environment. Values may be `${secret:NAME}` later; they are never logged.
        #[serde(default)]
        env: BTreeMap<String, String>,
        /// What is given back of the capabilities that containers do not have here: some of [`CAPABILITIES`].
        #[serde(default)]
        capabilities: BTreeSet<String>,
    },
    /// A command. Needs a process machine. It is told its address by `HOST` and `PORT`.
    Command {
        /// Program and arguments. `{port}` and `{host}` are replaced.
        command: Vec<String>,
        /// Working directory.
        #[serde(default)]
        directory: Option<PathBuf>,
        /// Environment.
        #[serde(default)]
        env: BTreeMap<String, String>,
    },
    /// Servers that Peregrine does not manage.
    Fixed {
        /// Where they listen.
        upstreams: Vec<FixedUpstream>,
    },
}

/// Capabilities (capabilities(7), without `CAP_`) that a container may be given back: those that engines give
/// without being asked, and two that let it take more of its own machine's memory and time. Every other one is
/// power over the machine.
pub const CAPABILITIES: [&str; 16] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
    "SYS_NICE",
];

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image { image, port, command, env, capabilities } => f
                .debug_struct("Image")
                .field("image", image)
                .field("port", port)
                .field("command", command)
                .field("env", &HiddenValues(env))
                .field("capabilities", capabilities)
                .finish(),
            Self::Command { command, directory, env } => f
                .debug_struct("Command")
                .field("command", command)
                .field("directory", directory)
                .field("env", &HiddenValues(env))
                .finish(),
            Self::Fixed { upstreams } => f.debug_struct("Fixed").field("upstreams", upstreams).finish(),
        }
    }
}

/// A server that Peregrine does not manage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedUpstream {
    /// Address or host name with port.
    pub address: String,
    /// Relative capacity, at least 1.
    pub weight: u32,
}

/// Protocol spoken to instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 on clear text with prior knowledge.
    H2c,
}

/// Versions of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Bytes.
    V2,
}

impl ProxyProtocol {
    /// The header of a connection that is for nobody but who opened it (proxy-protocol.txt §2.1 `UNKNOWN`, §2.2 `LOCAL`):
    /// a probe.
    pub(crate) const fn of_nobody(self) -> &'static [u8] {
        match self {
            Self::V1 => b"PROXY UNKNOWN\r\n",
            Self::V2 => b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00",
        }
    }
}

/// Health of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HealthSpec {
    /// What is asked.
    pub kind: HealthKind,
    /// Time between probes once it serves.
    pub interval_ms: u32,
    /// Longest time for one probe.
    pub timeout_ms: u32,
    /// Good probes in a row that make it healthy.
    pub healthy: u32,
    /// Bad probes in a row that make it unhealthy.
    pub unhealthy: u32,
}

impl Default for HealthSpec {
    fn default() -> Self {
        Self {
            kind: HealthKind::Tcp, // works for anything that listens; the plan warns that a path would tell more
            interval_ms: 1_000,
            timeout_ms: 2_000,
            healthy: 1,
            unhealthy: 3, // one lost packet or one pause of a garbage collector ejects nobody
        }
    }
}

/// What a probe asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "probe", rename_all = "snake_case")]
pub enum HealthKind {
    /// `GET path`, with the service's first host; 2xx and 3xx are good.
    Http {
        /// Path and query.
        path: String,
    },
    /// A TCP connection that opens.
    Tcp,
    /// No active probes: only for fixed upstreams.
    None,
}

/// Limits of one instance; 0 is no limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Memory.
    pub memory_bytes: u64,
    /// CPU in thousandths of a core.
    pub cpu_millis: u32,
    /// Processes and threads.
    pub pids: u32,
}

impl Default for Resources {
    fn default() -> Self {
        Self { memory_bytes: 512 << 20, cpu_millis: 0, pids: 1024 }
    }
}

/// What the edge has to know of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrafficPolicy {
    /// Protocol spoken to instances.
    pub protocol: Protocol,
    /// How an instance is chosen.
    pub balance: BalanceSpec,
    /// Sticky cookie.
    pub sticky_cookie: Option<String>,
    /// Time-outs in milliseconds, as in the edge's own policy.
    pub connect_timeout_ms: u32,
    /// Longest time from the end of the request to the head of the answer.
    pub response_head_timeout_ms: u32,
    /// Longest time without a byte of body.
    pub body_idle_timeout_ms: u32,
    /// Longest time without a byte in an upgraded connection.
    pub tunnel_idle_timeout_ms: u32,
    /// Largest request body; 0 is no limit.
    pub max_request_body_bytes: u64,
    /// Slow start of a newly healthy instance.
    pub slow_start_ms: u32,
    /// Sends the client's Host on.
    pub preserve_host: bool,
    /// Connections to instances begin with a header of the PROXY protocol that says for whom they are. Not with
    /// [`Protocol::H2c`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_proxy_protocol: Option<ProxyProtocol>,
    /// What requests have to pass.
    #[serde(default)]
    pub rules: RulesSpec,
}

impl Default for TrafficPolicy {
    fn default() -> Self {
        let edge = peregrine_routing::ServicePolicy::default();
        Self {
            protocol: Protocol::default(),
            balance: BalanceSpec::default(),
            sticky_cookie: None,
            connect_timeout_ms: edge.connect_timeout_ms,
            response_head_timeout_ms: edge.response_head_timeout_ms,
            body_idle_timeout_ms: edge.body_idle_timeout_ms,
            tunnel_idle_timeout_ms: edge.tunnel_idle_timeout_ms,
            max_request_body_bytes: edge.max_request_body_bytes,
            slow_start_ms: edge.slow_start_ms,
            preserve_host: edge.preserve_host,
            send_proxy_protocol: None,
            rules: RulesSpec::default(),
        }
    }
}

/// How an instance is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceSpec {
    /// In turn.
    RoundRobin,
    /// Least in flight of two.
    #[default]
    LeastInFlight,
    /// Lowest latency times load of two.
    PeakEwma,
    /// Consistent hashing.
    ConsistentHash(HashBy),
}

/// What a request is hashed by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashBy {
    /// Value of a header.
    Header(String),
    /// Value of a cookie.
    Cookie(String),
    /// Client address.
    ClientAddress,
}

/// How a rollout goes about a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveSettings {
    /// Weights of the new copy in percent, rising, the last one 100.
    pub steps: Vec<u8>,
    /// Shortest time for each step but the last.
    pub step_hold_ms: u32,
    /// Requests that the new copy must have answered before a step is judged; with less, after
    /// `step_max_ms`, the verdict is "inconclusive" and the step is decided by probes alone.
    pub step_min_samples: u32,
    /// Longest time that a step waits for samples.
    pub step_max_ms: u32,
    /// When a step is judged to have failed.
    pub guards: Guards,
    /// Longest time that a step is held because something speaks against the new copies and it may be chance.
    #[serde(default = "default_hold_max_ms")]
    pub hold_max_ms: u64,
    /// What happens then.
    #[serde(default)]
    pub hold_then: HoldThen,
    /// Before any traffic.
    pub warm: WarmSettings,
    /// Longest time from start to the first good probe.
    pub start_timeout_ms: u32,
    /// The old copy stays ready for so long after the drain; 0 is not at all.
    pub soak_ms: u64,
    /// Drain deadlines.
    pub drain: DrainDeadlines,
    /// Grace between SIGTERM and SIGKILL when an instance is stopped.
    pub stop_grace_ms: u32,
    /// At most one copy may run at any moment: requests wait while another one takes over.
    #[serde(default)]
    pub single_writer: bool,
    /// Bounds of that.
    #[serde(default)]
    pub cutover: CutoverSettings,
}

impl Default for MoveSettings {
    fn default() -> Self {
        Self {
            steps: vec![1, 10, 50, 100],
            step_hold_ms: 200, // a stateless move is to be over in 3 s
            step_min_samples: 20,
            step_max_ms: 500,
            guards: Guards::default(),
            hold_max_ms: default_hold_max_ms(),
            hold_then: HoldThen::default(),
            warm: WarmSettings::default(),
            start_timeout_ms: 60_000,
            soak_ms: 0,
            drain: DrainDeadlines::default(),
            stop_grace_ms: 10_000,
            single_writer: false,
            cutover: CutoverSettings::default(),
        }
    }
}

const fn default_hold_max_ms() -> u64 {
    60_000 // at a few requests per second this is enough to tell chance from fault
}

/// What happens to a step that was held for as long as it may be, without a verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldThen {
    /// The rollout is paused at the present weights and says so: a person decides.
    #[default]
    Pause,
    /// It goes on.
    GoOn,
    /// It goes back.
    GoBack,
}

/// When a shift is stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guards {
    /// The new copy's error ratio may exceed the old one's, measured at the same time, by this much.
    pub error_ratio_increase: f64,
    /// The new copy's p95 may exceed the old one's by this share (1.0 = twice), if by more than 5 ms; `None` is off.
    pub p95_increase: Option<f64>,
}

impl Default for Guards {
    fn default() -> Self {
        Self { error_ratio_increase: 0.01, p95_increase: Some(1.0) }
    }
}

/// What a new copy has to show before it gets traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WarmSettings {
    /// Good probes in a row.
    pub probes: u32,
    /// Time between them.
    pub probe_interval_ms: u32,
    /// Paths that are asked with GET after the probes; a 5xx fails the warm-up.
    pub paths: Vec<String>,
    /// Copies of clients' safe requests, before they get traffic; `None` is off. Off by default: there are
    /// applications whose GET does something, and for these twice is not once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorSettings>,
}

impl Default for WarmSettings {
    fn default() -> Self {
        Self { probes: 3, probe_interval_ms: 100, paths: Vec::new(), mirror: None }
    }
}

/// How long traffic of each class may keep a retired copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainDeadlines {
    /// Requests.
    pub request_ms: u64,
    /// Uploads and downloads, while bytes flow.
    pub transfer_ms: u64,
    /// Server-sent events.
    pub sse_ms: u64,
    /// gRPC streams.
    pub grpc_stream_ms: u64,
    /// WebSockets and other tunnels.
    pub websocket_ms: u64,
}

impl Default for DrainDeadlines {
    fn default() -> Self {
        Self {
            request_ms: 30_000,
            transfer_ms: 600_000,
            sse_ms: 60_000,
            grpc_stream_ms: 60_000,
            websocket_ms: 300_000,
        }
    }
}

/// Longest time over which edges spread the closing of WebSockets.
const MAX_WEBSOCKET_SPREAD_MS: u32 = 10_000;

impl DrainDeadlines {
    /// Time over which edges spread the closing of WebSockets from their deadline on: a tenth of what they had,
    /// so that a short drain stays short.
    #[must_use]
    pub fn websocket_spread_ms(&self) -> u32 {
        u32::try_from(self.websocket_ms / 10).unwrap_or(u32::MAX).min(MAX_WEBSOCKET_SPREAD_MS)
    }
}

/// An immutable version of a service's workload. A deploy makes one; a rollback goes to an earlier one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Version {
    /// Service.
    pub service: String,
    /// 1, 2, 3, …
    pub number: u32,
    /// What runs.
    pub workload: Workload,
    /// Digest of the image (`sha256:…`, the image id of the engine that had it first); `None` for commands.
    pub digest: Option<String>,
    /// Health, port and limits belong to the version: a rollback brings them back.
    pub health: HealthSpec,
    /// Limits.
    pub resources: Resources,
    /// When it was made.
    pub created_at: UnixMs,
    /// The rollout that made it.
    pub rollout: RolloutId,
}

/// A service that the engine knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// What the operator wants.
    pub spec: ServiceSpec,
    /// Version that serves; `None` before the first deploy, and for fixed upstreams.
    pub version: Option<u32>,
    /// Version that served before.
    pub previous_version: Option<u32>,
    /// Highest version number given out.
    pub last_version: u32,
    /// Fencing epoch: rises with every rollout that claims the service.
    pub epoch: u64,
    /// The rollout that has claimed it.
    pub rollout: Option<RolloutId>,
    /// It came from the configuration file of `serve`.
    #[serde(default)]
    pub from_config: bool,
    /// Routing generations of its fixed upstreams, by address: edges in other processes know them by these.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fixed_generations: BTreeMap<String, u64>,
    /// When it was first seen.
    pub created_at: UnixMs,
}
