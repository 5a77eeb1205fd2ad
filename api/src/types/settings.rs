//! Settings of a service: health, limits, traffic, and how a move goes about it. Defaults are the engine's.

use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{FieldError, Rules};

/// Health of one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Health {
    /// What is asked.
    pub probe: Probe,
    /// Path and query of an `http` probe.
    pub path: Option<String>,
    /// Time between probes.
    pub interval_ms: u32,
    /// Longest time for one probe.
    pub timeout_ms: u32,
    /// Good probes in a row that make it healthy.
    pub healthy: u32,
    /// Bad probes in a row that make it unhealthy.
    pub unhealthy: u32,
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// `GET path`; 2xx and 3xx are good.
    Http,
    /// A TCP connection that opens.
    Tcp,
    /// Nothing: only for fixed upstreams.
    None,
}

/// Limits of one instance; 0 is no limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Resources {
    /// Memory.
    pub memory_bytes: u64,
    /// CPU in thousandths of a core.
    pub cpu_millis: u32,
    /// Processes and threads.
    pub pids: u32,
}

/// What the edge has to know of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Traffic {
    /// Protocol spoken to instances.
    pub protocol: Protocol,
    /// How an instance is chosen.
    pub balance: Balance,
    /// Name of the sticky cookie.
    pub sticky_cookie: Option<String>,
    /// Longest time to open a connection to an instance.
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
    /// Connections to instances begin with a header of the PROXY protocol that says for whom they are, and serve nobody
    /// else: each request gets its own. Not with `h2c`. `null` sends none.
    pub send_proxy_protocol: Option<ProxyProtocol>,
    /// What requests have to pass before they go on.
    pub rules: Rules,
}

/// Protocol spoken to instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 on clear text with prior knowledge.
    H2c,
}

/// Versions of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Bytes.
    V2,
}

/// How an instance is chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "policy", rename_all = "snake_case")]
pub enum Balance {
    /// In turn.
    RoundRobin,
    /// Least in flight of two.
    LeastInFlight,
    /// Lowest latency times load of two.
    PeakEwma,
    /// Consistent hash of a header's value.
    HashHeader {
        /// Name of the header.
        name: String,
    },
    /// Consistent hash of a cookie's value.
    HashCookie {
        /// Name of the cookie.
        name: String,
    },
    /// Consistent hash of the client's address.
    HashClientAddress,
}

/// How a move goes about a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MoveSettings {
    /// Weights of the new copies in percent, rising, the last one 100.
    pub steps: Vec<u8>,
    /// Shortest time for each step but the last.
    pub step_hold_ms: u32,
    /// Requests that the new copies must have answered before a step is judged.
    pub step_min_samples: u32,
    /// Longest time that a step waits for them.
    pub step_max_ms: u32,
    /// When a step is judged to have failed.
    pub guards: Guards,
    /// Longest time that a step is held because something speaks against the new copies and it may be chance.
    pub hold_max_ms: u64,
    /// What happens then.
    pub hold_then: HoldThen,
    /// What a new copy has to show before it gets traffic.
    pub warm: Warm,
    /// Longest time from start to the first good probe.
    pub start_timeout_ms: u32,
    /// The old copies stay ready for so long after the drain; 0 is not at all.
    pub soak_ms: u64,
    /// How long traffic of each class may keep an old copy.
    pub drain: DrainDeadlines,
    /// Grace between SIGTERM and SIGKILL when an instance is stopped.
    pub stop_grace_ms: u32,
    /// At most one copy may run at any moment: requests wait at the edge while another one takes over.
    pub single_writer: bool,
    /// Bounds of that.
    pub cutover: Cutover,
}

/// Bounds of the cutover of a single-writer service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Cutover {
    /// Longest time that requests are held. Edges release by themselves after it; the move turns back when two thirds
    /// of it are over.
    pub hold_deadline_ms: u32,
    /// Requests that each edge may keep waiting.
    pub hold_max_requests: u32,
    /// Bytes of their heads and bodies that each edge may keep.
    pub hold_max_bytes: u64,
    /// How long one request may wait.
    pub hold_max_age_ms: u32,
    /// Requests per second that each edge releases, at first; it doubles every 5 s. Where requests come more than half as
    /// often, it is twice as many as come.
    pub hold_release_per_s: u32,
    /// How long what is inside of the old copy may take to finish while the others wait.
    pub drain_max_ms: u32,
}

impl Default for Cutover {
    fn default() -> Self {
        (&engine::CutoverSettings::default()).into()
    }
}

impl From<&engine::CutoverSettings> for Cutover {
    fn from(settings: &engine::CutoverSettings) -> Self {
        Self {
            hold_deadline_ms: settings.hold_deadline_ms,
            hold_max_requests: settings.hold_max_requests,
            hold_max_bytes: settings.hold_max_bytes,
            hold_max_age_ms: settings.hold_max_age_ms,
            hold_release_per_s: settings.hold_release_per_s,
            drain_max_ms: settings.drain_max_ms,
        }
    }
}

impl From<&Cutover> for engine::CutoverSettings {
    fn from(settings: &Cutover) -> Self {
        Self {
            hold_deadline_ms: settings.hold_deadline_ms,
            hold_max_requests: settings.hold_max_requests,
            hold_max_bytes: settings.hold_max_bytes,
            hold_max_age_ms: settings.hold_max_age_ms,
            hold_release_per_s: settings.hold_release_per_s,
            drain_max_ms: settings.drain_max_ms,
        }
    }
}

/// What happens to a step that was held for as long as it may be, without a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HoldThen {
    /// The move is paused at the present weights: a person decides.
    Pause,
    /// It goes on.
    GoOn,
    /// It goes back.
    GoBack,
}

/// When a shift is stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Guards {
    /// The new copies' error ratio may exceed the old ones', measured at the same time, by this much.
    pub error_ratio_increase: f64,
    /// The new copies' p95 may exceed the old ones' by this share (1.0 is twice); `null` is off.
    pub p95_increase: Option<f64>,
}

/// What a new copy has to show before it gets traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Warm {
    /// Good probes in a row.
    pub probes: u32,
    /// Time between them.
    pub probe_interval_ms: u32,
    /// Paths that are asked with GET after the probes; a 5xx fails the warm-up.
    pub paths: Vec<String>,
    /// Copies of clients' safe requests, before the new copies get traffic; without it nothing is mirrored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
}

/// A sample of safe requests (GET and HEAD without a body) goes to the new copies too while they warm. Its answers are
/// thrown away and compared with those that clients got.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Mirror {
    /// How many of a thousand safe requests are copied.
    pub sample_permille: u16,
    /// Answers that have to be compared for a verdict; with less, after `max_ms`, it is inconclusive and the move goes on.
    pub min_samples: u32,
    /// Longest time that is mirrored.
    pub max_ms: u32,
    /// Share of the copies that may be answered worse than the clients' requests were.
    pub differing_ratio: f64,
    /// Requests with `Authorization` or `Cookie` are copied too.
    pub with_credentials: bool,
    /// Most copies in a second, for each edge.
    pub max_requests_per_s: u32,
    /// Most copies at a time, for each edge.
    pub max_concurrent: u32,
    /// Longest time for one copy with its answer.
    pub timeout_ms: u32,
}

/// How long traffic of each class may keep an old copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
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

macro_rules! default_of_the_engine {
    ($($wire:ident = $engine:ident),* $(,)?) => {$(
        impl Default for $wire {
            fn default() -> Self {
                Self::from(&engine::$engine::default())
            }
        }
    )*};
}

default_of_the_engine!(
    Health = HealthSpec,
    Resources = Resources,
    Traffic = TrafficPolicy,
    MoveSettings = MoveSettings,
    Guards = Guards,
    Warm = WarmSettings,
    Mirror = MirrorSettings,
    DrainDeadlines = DrainDeadlines,
);

impl From<&engine::HealthSpec> for Health {
    fn from(health: &engine::HealthSpec) -> Self {
        let (probe, path) = match &health.kind {
            engine::HealthKind::Http { path } => (Probe::Http, Some(path.clone())),
            engine::HealthKind::Tcp => (Probe::Tcp, None),
            engine::HealthKind::None => (Probe::None, None),
        };
        Self {
            probe,
            path,
            interval_ms: health.interval_ms,
            timeout_ms: health.timeout_ms,
            healthy: health.healthy,
            unhealthy: health.unhealthy,
        }
    }
}

impl Health {
    pub(super) fn to_engine(&self, errors: &mut Vec<FieldError>) -> engine::HealthSpec {
        let kind = match (self.probe, &self.path) {
            (Probe::Http, Some(path)) => engine::HealthKind::Http { path: path.clone() },
            (Probe::Http, None) => {
                errors.push(FieldError::new(
                    "/health/path",
                    "an http probe needs a path, for example \"/healthz\"",
                ));
                engine::HealthKind::Tcp
            }
            (Probe::Tcp | Probe::None, Some(_)) => {
                errors.push(FieldError::new(
                    "/health/path",
                    "only an http probe has a path: set \"probe\": \"http\"",
                ));
                engine::HealthKind::Tcp
            }
            (Probe::Tcp, None) => engine::HealthKind::Tcp,
            (Probe::None, None) => engine::HealthKind::None,
        };
        engine::HealthSpec {
            kind,
            interval_ms: self.interval_ms,
            timeout_ms: self.timeout_ms,
            healthy: self.healthy,
            unhealthy: self.unhealthy,
        }
    }
}

impl From<&engine::Resources> for Resources {
    fn from(limits: &engine::Resources) -> Self {
        Self { memory_bytes: limits.memory_bytes, cpu_millis: limits.cpu_millis, pids: limits.pids }
    }
}

impl From<&Resources> for engine::Resources {
    fn from(limits: &Resources) -> Self {
        Self { memory_bytes: limits.memory_bytes, cpu_millis: limits.cpu_millis, pids: limits.pids }
    }
}

impl From<&engine::TrafficPolicy> for Traffic {
    fn from(policy: &engine::TrafficPolicy) -> Self {
        Self {
            protocol: match policy.protocol {
                engine::Protocol::Http1 => Protocol::Http1,
                engine::Protocol::H2c => Protocol::H2c,
            },
            balance: (&policy.balance).into(),
            sticky_cookie: policy.sticky_cookie.clone(),
            connect_timeout_ms: policy.connect_timeout_ms,
            response_head_timeout_ms: policy.response_head_timeout_ms,
            body_idle_timeout_ms: policy.body_idle_timeout_ms,
            tunnel_idle_timeout_ms: policy.tunnel_idle_timeout_ms,
            max_request_body_bytes: policy.max_request_body_bytes,
            slow_start_ms: policy.slow_start_ms,
            preserve_host: policy.preserve_host,
            send_proxy_protocol: policy.send_proxy_protocol.map(|version| match version {
                engine::ProxyProtocol::V1 => ProxyProtocol::V1,
                engine::ProxyProtocol::V2 => ProxyProtocol::V2,
            }),
            rules: (&policy.rules).into(),
        }
    }
}

impl From<&Traffic> for engine::TrafficPolicy {
    fn from(traffic: &Traffic) -> Self {
        Self {
            protocol: match traffic.protocol {
                Protocol::Http1 => engine::Protocol::Http1,
                Protocol::H2c => engine::Protocol::H2c,
            },
            balance: (&traffic.balance).into(),
            sticky_cookie: traffic.sticky_cookie.clone(),
            connect_timeout_ms: traffic.connect_timeout_ms,
            response_head_timeout_ms: traffic.response_head_timeout_ms,
            body_idle_timeout_ms: traffic.body_idle_timeout_ms,
            tunnel_idle_timeout_ms: traffic.tunnel_idle_timeout_ms,
            max_request_body_bytes: traffic.max_request_body_bytes,
            slow_start_ms: traffic.slow_start_ms,
            preserve_host: traffic.preserve_host,
            send_proxy_protocol: traffic.send_proxy_protocol.map(|version| match version {
                ProxyProtocol::V1 => engine::ProxyProtocol::V1,
                ProxyProtocol::V2 => engine::ProxyProtocol::V2,
            }),
            rules: (&traffic.rules).into(),
        }
    }
}

impl From<&engine::BalanceSpec> for Balance {
    fn from(balance: &engine::BalanceSpec) -> Self {
        use engine::{BalanceSpec, HashBy};
        match balance {
            BalanceSpec::RoundRobin => Self::RoundRobin,
            BalanceSpec::LeastInFlight => Self::LeastInFlight,
            BalanceSpec::PeakEwma => Self::PeakEwma,
            BalanceSpec::ConsistentHash(HashBy::Header(name)) => Self::HashHeader { name: name.clone() },
            BalanceSpec::ConsistentHash(HashBy::Cookie(name)) => Self::HashCookie { name: name.clone() },
            BalanceSpec::ConsistentHash(HashBy::ClientAddress) => Self::HashClientAddress,
        }
    }
}

impl From<&Balance> for engine::BalanceSpec {
    fn from(balance: &Balance) -> Self {
        use engine::HashBy;
        match balance {
            Balance::RoundRobin => Self::RoundRobin,
            Balance::LeastInFlight => Self::LeastInFlight,
            Balance::PeakEwma => Self::PeakEwma,
            Balance::HashHeader { name } => Self::ConsistentHash(HashBy::Header(name.clone())),
            Balance::HashCookie { name } => Self::ConsistentHash(HashBy::Cookie(name.clone())),
            Balance::HashClientAddress => Self::ConsistentHash(HashBy::ClientAddress),
        }
    }
}

impl From<&engine::MoveSettings> for MoveSettings {
    fn from(settings: &engine::MoveSettings) -> Self {
        Self {
            steps: settings.steps.clone(),
            step_hold_ms: settings.step_hold_ms,
            step_min_samples: settings.step_min_samples,
            step_max_ms: settings.step_max_ms,
            guards: (&settings.guards).into(),
            hold_max_ms: settings.hold_max_ms,
            hold_then: match settings.hold_then {
                engine::HoldThen::Pause => HoldThen::Pause,
                engine::HoldThen::GoOn => HoldThen::GoOn,
                engine::HoldThen::GoBack => HoldThen::GoBack,
            },
            warm: (&settings.warm).into(),
            start_timeout_ms: settings.start_timeout_ms,
            soak_ms: settings.soak_ms,
            drain: (&settings.drain).into(),
            stop_grace_ms: settings.stop_grace_ms,
            single_writer: settings.single_writer,
            cutover: (&settings.cutover).into(),
        }
    }
}

impl From<&MoveSettings> for engine::MoveSettings {
    fn from(settings: &MoveSettings) -> Self {
        Self {
            steps: settings.steps.clone(),
            step_hold_ms: settings.step_hold_ms,
            step_min_samples: settings.step_min_samples,
            step_max_ms: settings.step_max_ms,
            guards: engine::Guards {
                error_ratio_increase: settings.guards.error_ratio_increase,
                p95_increase: settings.guards.p95_increase,
            },
            hold_max_ms: settings.hold_max_ms,
            hold_then: match settings.hold_then {
                HoldThen::Pause => engine::HoldThen::Pause,
                HoldThen::GoOn => engine::HoldThen::GoOn,
                HoldThen::GoBack => engine::HoldThen::GoBack,
            },
            warm: engine::WarmSettings {
                probes: settings.warm.probes,
                probe_interval_ms: settings.warm.probe_interval_ms,
                paths: settings.warm.paths.clone(),
                mirror: settings.warm.mirror.as_ref().map(Into::into),
            },
            start_timeout_ms: settings.start_timeout_ms,
            soak_ms: settings.soak_ms,
            drain: engine::DrainDeadlines {
                request_ms: settings.drain.request_ms,
                transfer_ms: settings.drain.transfer_ms,
                sse_ms: settings.drain.sse_ms,
                grpc_stream_ms: settings.drain.grpc_stream_ms,
                websocket_ms: settings.drain.websocket_ms,
            },
            stop_grace_ms: settings.stop_grace_ms,
            single_writer: settings.single_writer,
            cutover: (&settings.cutover).into(),
        }
    }
}

impl From<&engine::Guards> for Guards {
    fn from(guards: &engine::Guards) -> Self {
        Self { error_ratio_increase: guards.error_ratio_increase, p95_increase: guards.p95_increase }
    }
}

impl From<&engine::WarmSettings> for Warm {
    fn from(warm: &engine::WarmSettings) -> Self {
        Self {
            probes: warm.probes,
            probe_interval_ms: warm.probe_interval_ms,
            paths: warm.paths.clone(),
            mirror: warm.mirror.as_ref().map(Into::into),
        }
    }
}

impl From<&engine::MirrorSettings> for Mirror {
    fn from(mirror: &engine::MirrorSettings) -> Self {
        Self {
            sample_permille: mirror.sample_permille,
            min_samples: mirror.min_samples,
            max_ms: mirror.max_ms,
            differing_ratio: mirror.differing_ratio,
            with_credentials: mirror.with_credentials,
            max_requests_per_s: mirror.max_requests_per_s,
            max_concurrent: mirror.max_concurrent,
            timeout_ms: mirror.timeout_ms,
        }
    }
}

impl From<&Mirror> for engine::MirrorSettings {
    fn from(mirror: &Mirror) -> Self {
        Self {
            sample_permille: mirror.sample_permille,
            min_samples: mirror.min_samples,
            max_ms: mirror.max_ms,
            differing_ratio: mirror.differing_ratio,
            with_credentials: mirror.with_credentials,
            max_requests_per_s: mirror.max_requests_per_s,
            max_concurrent: mirror.max_concurrent,
            timeout_ms: mirror.timeout_ms,
        }
    }
}

impl From<&engine::DrainDeadlines> for DrainDeadlines {
    fn from(drain: &engine::DrainDeadlines) -> Self {
        Self {
            request_ms: drain.request_ms,
            transfer_ms: drain.transfer_ms,
            sse_ms: drain.sse_ms,
            grpc_stream_ms: drain.grpc_stream_ms,
            websocket_ms: drain.websocket_ms,
        }
    }
}
