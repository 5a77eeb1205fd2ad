//! The typed client: every call of the API, as the command line uses it.
//!
//! No call hangs: opening a connection, the head and the body of an answer each have a named limit. Streams
//! go on by themselves after a broken connection; a call that bears an idempotency key is made once more. An error says whether the server was reached at all, and
//! is the server's own [`Problem`](crate::types::Problem) when it was.

mod error;
mod events;
mod logs;
mod sse;
mod transport;

use http::{Method, StatusCode};
use serde::de::DeserializeOwned;

pub use error::ClientError;
pub use events::EventStream;
pub use logs::{LogQuery, LogStream};
pub use transport::{BODY_TIMEOUT_MS, CONNECT_TIMEOUT_MS, HEAD_TIMEOUT_MS, MAX_ANSWER_BYTES};
use transport::{Call, Transport};

use crate::types::{
    Applied, AuditEntry, AuditReport, Certificate, CertificateExport, CertificateImport, DeployRequest,
    Deployment, Domain, DomainCheck, DomainRequest, DryRun, Edge, Instance, Invite, InviteRequest, Machine,
    MachineCheck, MachineSpec, Move, MoveRequest, MoveState, Page, Plan, Readiness, Receipt, RollbackRequest,
    ScaleRequest, Service, ServiceSpec, Status, Version,
};

/// A stream on which nothing came for so long is broken; the server gives a sign of life every 10 s.
pub const STREAM_IDLE_TIMEOUT_MS: u64 = 30_000;
/// A stream whose server stays away for so long ends with the error.
pub const STREAM_RECONNECT_MS: u64 = 60_000;
/// Pause before the first new attempt of a stream; each next one is twice as long.
pub const STREAM_RETRY_MS: u64 = 100;
/// Longest pause between two attempts.
pub const STREAM_RETRY_MAX_MS: u64 = 2_000;
/// Largest page: lists are read with as few calls as possible.
const PAGE_LIMIT: u32 = 500;

/// How to reach the server.
#[derive(Clone)]
pub struct ClientConfig {
    /// Base URL, such as `http://127.0.0.1:7070`.
    pub url: String,
    /// Bearer token; `None` for the calls that need none.
    pub token: Option<String>,
    /// Longest time from a request to the head of its answer.
    pub head_timeout_ms: u64,
}

impl ClientConfig {
    /// With the usual time-outs.
    #[must_use]
    pub fn new(url: impl Into<String>, token: Option<String>) -> Self {
        Self { url: url.into(), token, head_timeout_ms: HEAD_TIMEOUT_MS }
    }
}

impl std::fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "***");
        f.debug_struct("ClientConfig").field("url", &self.url).field("token", &token).finish_non_exhaustive()
    }
}

/// How a change is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Submit {
    /// Makes a repeated request the same request: a key that was used for another one is refused.
    pub idempotency_key: Option<String>,
    /// Answer only when the work has ended, or after so long.
    pub wait_ms: Option<u64>,
}

impl Submit {
    /// With a key of its own: the same `Submit` may be sent again when an answer was lost, and nothing is done twice.
    #[must_use]
    pub fn with_fresh_key() -> Self {
        Self { idempotency_key: Some(uuid::Uuid::new_v4().to_string()), wait_ms: None }
    }
}

/// How a service is put.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutService {
    /// Machine for the first deploy; later ones stay where they are unless it is given.
    pub machine: Option<String>,
    /// Why; kept with the move.
    pub reason: Option<String>,
    /// Start only if the plan is still this one.
    pub plan_hash: Option<String>,
    /// How it is asked for.
    pub submit: Submit,
}

/// Which moves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MoveFilter {
    /// Of this service.
    pub service: Option<String>,
    /// In this state.
    pub state: Option<MoveState>,
    /// At most so many.
    pub limit: Option<u32>,
    /// From this place of the list on.
    pub cursor: Option<String>,
}

/// Which events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Of this service.
    pub service: Option<String>,
    /// Of this move.
    pub move_id: Option<String>,
    /// Stored events after this id; `None` begins now.
    pub after: Option<u64>,
}

/// What came of the removal of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone.
    Done,
    /// It goes on; the service answers 404 once it is gone.
    UnderWay,
}

/// The client. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    transport: Transport,
}

impl Client {
    /// A client; connects with the first call.
    ///
    /// # Errors
    /// [`ClientError::Settings`] when URL or token cannot be used.
    pub fn new(config: &ClientConfig) -> Result<Self, ClientError> {
        let transport = Transport::new(&config.url, config.token.as_deref(), config.head_timeout_ms)?;
        Ok(Self { transport })
    }

    /// The base URL.
    #[must_use]
    pub fn url(&self) -> &str {
        self.transport.base()
    }
}

/// Every call fails with [`ClientError`]: `Unreachable` without an answer, `Problem` with the server's reason,
/// `NotUnderstood` when something else answers.
#[allow(clippy::missing_errors_doc)]
impl Client {
    // --- the server

    /// What answers.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get(&["version"]).await
    }

    /// Whether the server is ready; needs no token. One that is not ready answers too.
    pub async fn readiness(&self) -> Result<Readiness, ClientError> {
        self.transport.json(Call::new(Method::GET, &["readyz"]).query("report", Some(true))).await
    }

    /// How everything stands.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get(&["status"]).await
    }

    /// The metrics in Prometheus' text form.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        self.transport.text(Call::new(Method::GET, &["metrics"]).accept("text/plain")).await
    }

    /// The OpenAPI document; needs no token.
    pub async fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        self.transport.json(Call::new(Method::GET, &["api", "openapi.json"])).await
    }

    // --- machines

    /// All machines, by name.
    pub async fn machines(&self) -> Result<Vec<Machine>, ClientError> {
        self.all(&["machines"], |call| call).await
    }

    /// One machine.
    pub async fn machine(&self, name: &str) -> Result<Machine, ClientError> {
        self.get(&["machines", name]).await
    }

    /// Adds a machine.
    pub async fn add_machine(&self, spec: &MachineSpec, submit: &Submit) -> Result<Machine, ClientError> {
        self.post(&["machines"], submit, |call| call.json(spec)).await
    }

    /// Removes a machine on which nothing runs.
    pub async fn remove_machine(&self, name: &str) -> Result<(), ClientError> {
        self.transport.status(v1(Method::DELETE, &["machines", name])).await.map(drop)
    }

    /// Asks a machine itself; answers for an unreachable one too, with the problem.
    pub async fn check_machine(&self, name: &str) -> Result<MachineCheck, ClientError> {
        self.post(&["machines", name, "check"], &Submit::default(), |call| call).await
    }

    // --- edges

    /// All edges in other processes, by name.
    pub async fn edges(&self) -> Result<Vec<Edge>, ClientError> {
        self.all(&["edges"], |call| call).await
    }

    /// Makes a token for an edge. It is not asked for with a key: the token is shown once, and kept nowhere.
    pub async fn invite_edge(&self, request: &InviteRequest) -> Result<Invite, ClientError> {
        self.post(&["edges", "invites"], &Submit::default(), |call| call.json(request)).await
    }

    /// Shuts an edge out.
    pub async fn remove_edge(&self, name: &str) -> Result<(), ClientError> {
        self.transport.status(v1(Method::DELETE, &["edges", name])).await.map(drop)
    }

    // --- domains

    /// All domains, by name.
    pub async fn domains(&self) -> Result<Vec<Domain>, ClientError> {
        self.all(&["domains"], |call| call).await
    }

    /// One domain.
    pub async fn domain(&self, name: &str) -> Result<Domain, ClientError> {
        self.get(&["domains", name]).await
    }

    /// Adds a domain, or changes how it is served.
    pub async fn add_domain(&self, request: &DomainRequest) -> Result<Domain, ClientError> {
        self.post(&["domains"], &Submit::default(), |call| call.json(request)).await
    }

    /// Looks at a name from outside.
    pub async fn check_domain(&self, name: &str) -> Result<DomainCheck, ClientError> {
        self.post(&["domains", name, "check"], &Submit::default(), |call| call).await
    }

    /// Removes a domain with its certificate.
    pub async fn remove_domain(&self, name: &str) -> Result<(), ClientError> {
        self.transport.status(v1(Method::DELETE, &["domains", name])).await.map(drop)
    }

    /// All certificates, by id.
    pub async fn certificates(&self) -> Result<Vec<Certificate>, ClientError> {
        self.all(&["certificates"], |call| call).await
    }

    /// Orders a new certificate now.
    pub async fn renew_certificate(&self, domain: &str) -> Result<Domain, ClientError> {
        self.post(&["domains", domain, "renew"], &Submit::default(), |call| call).await
    }

    /// Brings a certificate with its key.
    pub async fn import_certificate(&self, import: &CertificateImport) -> Result<Domain, ClientError> {
        self.post(&["certificates"], &Submit::default(), |call| call.json(import)).await
    }

    /// A certificate with its key. Not asked for with a key of its own: the answer is a secret, and kept nowhere.
    pub async fn export_certificate(&self, domain: &str) -> Result<CertificateExport, ClientError> {
        self.post(&["domains", domain, "export"], &Submit::default(), |call| call).await
    }

    // --- services

    /// All services, by name.
    pub async fn services(&self) -> Result<Vec<Service>, ClientError> {
        self.all(&["services"], |call| call).await
    }

    /// One service.
    pub async fn service(&self, name: &str) -> Result<Service, ClientError> {
        self.get(&["services", name]).await
    }

    /// Creates a service or makes it as `spec` says.
    pub async fn put_service(&self, spec: &ServiceSpec, put: &PutService) -> Result<Applied, ClientError> {
        self.transport.json(submitted(put_call(spec, put), &put.submit)).await
    }

    /// What [`Self::put_service`] would do.
    pub async fn plan_put_service(
        &self,
        spec: &ServiceSpec,
        put: &PutService,
    ) -> Result<DryRun, ClientError> {
        self.transport.json(put_call(spec, put).query("dry_run", Some(true))).await
    }

    /// Drains, stops and forgets a service.
    pub async fn remove_service(&self, name: &str, wait_ms: Option<u64>) -> Result<Removal, ClientError> {
        let call = v1(Method::DELETE, &["services", name]).wait_ms(wait_ms);
        let status = self.transport.status(call).await?;
        Ok(if status == StatusCode::ACCEPTED { Removal::UnderWay } else { Removal::Done })
    }

    /// The versions of a service, newest first.
    pub async fn deployments(&self, service: &str) -> Result<Vec<Deployment>, ClientError> {
        self.all(&["services", service, "deployments"], |call| call).await
    }

    /// Brings a new version to a service's machines.
    pub async fn deploy(
        &self,
        service: &str,
        request: &DeployRequest,
        submit: &Submit,
    ) -> Result<Applied, ClientError> {
        self.post(&["services", service, "deployments"], submit, |call| call.json(request)).await
    }

    /// What [`Self::deploy`] would do.
    pub async fn plan_deploy(&self, service: &str, request: &DeployRequest) -> Result<DryRun, ClientError> {
        self.dry_run(&["services", service, "deployments"], |call| call.json(request)).await
    }

    /// Back to an earlier version.
    pub async fn rollback(
        &self,
        service: &str,
        request: &RollbackRequest,
        submit: &Submit,
    ) -> Result<Applied, ClientError> {
        self.post(&["services", service, "rollback"], submit, |call| call.json(request)).await
    }

    /// What [`Self::rollback`] would do.
    pub async fn plan_rollback(
        &self,
        service: &str,
        request: &RollbackRequest,
    ) -> Result<DryRun, ClientError> {
        self.dry_run(&["services", service, "rollback"], |call| call.json(request)).await
    }

    /// Another number of copies.
    pub async fn scale(
        &self,
        service: &str,
        request: &ScaleRequest,
        submit: &Submit,
    ) -> Result<Applied, ClientError> {
        self.post(&["services", service, "scale"], submit, |call| call.json(request)).await
    }

    /// What [`Self::scale`] would do.
    pub async fn plan_scale(&self, service: &str, request: &ScaleRequest) -> Result<DryRun, ClientError> {
        self.dry_run(&["services", service, "scale"], |call| call.json(request)).await
    }

    // --- moves

    /// One page of moves, newest first.
    pub async fn moves(&self, filter: &MoveFilter) -> Result<Page<Move>, ClientError> {
        let state = filter.state.and_then(|state| serde_json::to_value(state).ok());
        let call = v1(Method::GET, &["moves"])
            .query("service", filter.service.as_deref())
            .query("state", state.as_ref().and_then(|state| state.as_str()))
            .query("limit", filter.limit)
            .query("cursor", filter.cursor.as_deref());
        self.transport.json(call).await
    }

    /// What a move would do.
    pub async fn plan_move(&self, request: &MoveRequest) -> Result<Plan, ClientError> {
        self.post(&["moves", "plan"], &Submit::default(), |call| call.json(request)).await
    }

    /// Starts a move.
    pub async fn start_move(&self, request: &MoveRequest, submit: &Submit) -> Result<Move, ClientError> {
        self.post(&["moves"], submit, |call| call.json(request)).await
    }

    /// One move. (`move` is a word of the language.)
    pub async fn get_move(&self, id: &str) -> Result<Move, ClientError> {
        self.get(&["moves", id]).await
    }

    /// Holds a move at its present weights.
    pub async fn pause_move(&self, id: &str) -> Result<Move, ClientError> {
        self.control(id, "pause", &Submit::default()).await
    }

    /// Lets a move go on.
    pub async fn resume_move(&self, id: &str) -> Result<Move, ClientError> {
        self.control(id, "resume", &Submit::default()).await
    }

    /// Skips what is left of the present waiting.
    pub async fn promote_move(&self, id: &str) -> Result<Move, ClientError> {
        self.control(id, "promote", &Submit::default()).await
    }

    /// Goes back to the old copies; answers once the ask is durable.
    pub async fn abort_move(&self, id: &str, submit: &Submit) -> Result<Move, ClientError> {
        self.control(id, "abort", submit).await
    }

    /// Goes back after the end: the answer is the move that does it.
    pub async fn rollback_move(&self, id: &str, submit: &Submit) -> Result<Move, ClientError> {
        self.control(id, "rollback", submit).await
    }

    /// Tries again to remove what a move left behind; fails with what is still left.
    pub async fn clean_up_move(&self, id: &str) -> Result<Move, ClientError> {
        self.control(id, "cleanup", &Submit::default()).await
    }

    /// What a move amounted to.
    pub async fn receipt(&self, id: &str) -> Result<Receipt, ClientError> {
        self.get(&["moves", id, "receipt"]).await
    }

    /// The events of a move, from its beginning or after an id; ends with the move.
    #[must_use]
    pub fn move_events(&self, id: &str, after: Option<u64>) -> EventStream {
        let segments = ["api", "v1", "moves", id, "events"];
        EventStream::new(self.transport.clone(), &segments, None, Some(id.to_owned()), after)
    }

    // --- audit

    /// The newest entries of the audit, or those before a cursor.
    pub async fn audit(
        &self,
        limit: Option<u32>,
        cursor: Option<String>,
    ) -> Result<Page<AuditEntry>, ClientError> {
        self.transport.json(v1(Method::GET, &["audit"]).query("limit", limit).query("cursor", cursor)).await
    }

    /// Whether every entry of the audit is the one that was written.
    pub async fn verify_audit(&self) -> Result<AuditReport, ClientError> {
        self.get(&["audit", "verify"]).await
    }

    // --- instances, events, logs

    /// All instances, or those of a service; with what they use if asked for.
    pub async fn instances(&self, service: Option<&str>, stats: bool) -> Result<Vec<Instance>, ClientError> {
        self.all(&["instances"], |call| call.query("service", service).query("stats", stats.then_some(true)))
            .await
    }

    /// One instance, with what it uses.
    pub async fn instance(&self, id: &str) -> Result<Instance, ClientError> {
        self.get(&["instances", id]).await
    }

    /// Events of everything, or of one service or move. Never ends by itself.
    #[must_use]
    pub fn events(&self, filter: &EventFilter) -> EventStream {
        let service = filter.service.as_ref().map(|name| format!("service:{name}"));
        let of_move = filter.move_id.as_ref().map(|id| format!("move:{id}"));
        let topics: Vec<String> = service.into_iter().chain(of_move).collect();
        let topics = (!topics.is_empty()).then(|| topics.join(","));
        EventStream::new(self.transport.clone(), &["api", "v1", "events"], topics, None, filter.after)
    }

    /// Output of every instance of a service, merged.
    #[must_use]
    pub fn logs(&self, service: &str, query: LogQuery) -> LogStream {
        LogStream::new(self.transport.clone(), &["api", "v1", "services", service, "logs"], query)
    }

    /// Output of one instance.
    #[must_use]
    pub fn instance_logs(&self, id: &str, query: LogQuery) -> LogStream {
        LogStream::new(self.transport.clone(), &["api", "v1", "instances", id, "logs"], query)
    }
}

impl Client {
    async fn get<T: DeserializeOwned>(&self, segments: &[&str]) -> Result<T, ClientError> {
        self.transport.json(v1(Method::GET, segments)).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        submit: &Submit,
        with: impl FnOnce(Call) -> Call,
    ) -> Result<T, ClientError> {
        self.transport.json(submitted(with(v1(Method::POST, segments)), submit)).await
    }

    async fn dry_run(
        &self,
        segments: &[&str],
        with: impl FnOnce(Call) -> Call,
    ) -> Result<DryRun, ClientError> {
        self.transport.json(with(v1(Method::POST, segments)).query("dry_run", Some(true))).await
    }

    async fn control(&self, id: &str, action: &str, submit: &Submit) -> Result<Move, ClientError> {
        self.post(&["moves", id, action], submit, |call| call).await
    }

    /// Every page of a list.
    async fn all<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        with: impl Fn(Call) -> Call,
    ) -> Result<Vec<T>, ClientError> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let call =
                with(v1(Method::GET, segments)).query("limit", Some(PAGE_LIMIT)).query("cursor", cursor);
            let page: Page<T> = self.transport.json(call).await?;
            items.extend(page.items);
            cursor = page.next_cursor;
            if cursor.is_none() {
                return Ok(items);
            }
        }
    }
}

fn v1(method: Method, segments: &[&str]) -> Call {
    Call::new(method, &[&["api", "v1"], segments].concat())
}

fn submitted(call: Call, submit: &Submit) -> Call {
    call.idempotency_key(submit.idempotency_key.clone()).wait_ms(submit.wait_ms)
}

fn put_call(spec: &ServiceSpec, put: &PutService) -> Call {
    v1(Method::PUT, &["services", &spec.name])
        .json(spec)
        .query("machine", put.machine.as_deref())
        .query("reason", put.reason.as_deref())
        .query("plan_hash", put.plan_hash.as_deref())
}
