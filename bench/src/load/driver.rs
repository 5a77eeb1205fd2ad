//! The workers of a run: take a ticket, send, count.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, TE};
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::connection::{Connection, RequestBody};
use super::idle::IdleConnections;
use super::options::{Expect, LoadError, LoadOptions, Protocol};
use super::pacer::{Pacer, Ticket};
use super::tally::{FailureKind, Outcome, Sample, Summary, Tally};
use super::tls::{Connector, Stream};
use crate::origin::REQUEST_ID_HEADER;

/// Pause of a worker that got no connection, in milliseconds: a dead target must not be hammered.
const CONNECT_PAUSE_MS: u64 = 20;

/// A gRPC message without content: one byte "not compressed", four bytes length.
const EMPTY_MESSAGE: &[u8] = &[0; 5];

/// What the tasks of one run share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: LoadOptions,
    pub(super) samples: watch::Sender<Sample>,
    pub(super) ended: watch::Sender<bool>,
    tls: Option<Connector>,
    request: Template,
    pacer: Pacer,
    tally: Mutex<Tally>,
    duration_ms: Mutex<Option<u64>>,
}

/// The parts that all requests of a run have in common.
#[derive(Debug)]
struct Template {
    uri: Uri,
    host: Option<HeaderValue>,
    id: HeaderName,
    post_body: Bytes,
}

impl Shared {
    pub(super) fn new(options: LoadOptions) -> Result<Self, LoadError> {
        options.check()?;
        Ok(Self {
            tls: Connector::of(&options)?,
            request: Template::new(&options),
            pacer: Pacer::new(&options),
            options,
            samples: watch::Sender::new(Sample::default()),
            ended: watch::Sender::new(false),
            tally: Mutex::new(Tally::new()),
            duration_ms: Mutex::default(),
        })
    }

    pub(super) fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to the target, with its TLS.
    pub(super) async fn connect(&self) -> std::io::Result<Stream> {
        let stream = TcpStream::connect(self.options.target).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Stream::Plain(stream)) };
        let (stream, resumed) = tls.connect(stream).await?;
        self.tally().tls_resumed += u64::from(resumed);
        Ok(stream)
    }

    pub(super) fn elapsed_ms(&self) -> u64 {
        if self.pacer.has_started() { as_ms(self.pacer.started().elapsed()) } else { 0 }
    }

    pub(super) fn stop(&self) {
        self.pacer.stop();
    }

    pub(super) fn summary(&self) -> Summary {
        let ended = *self.duration_ms.lock().unwrap_or_else(PoisonError::into_inner);
        self.tally().summary(&self.options.run, ended.unwrap_or_else(|| self.elapsed_ms()))
    }

    fn id(&self, number: u64) -> HeaderValue {
        let id = format!("{}-{number}", self.options.run);
        HeaderValue::from_maybe_shared(Bytes::from(id)).expect("the run's name was checked")
    }

    /// Whether request `number` is a POST: spread over each hundred, so that short runs have their share too.
    const fn is_post(&self, number: u64) -> bool {
        // 37 and 100 have no common factor, so the numbers of a hundred map to each of 0..100 once.
        number * 37 % 100 < self.options.post_percent as u64
    }

    pub(super) fn request(&self, number: u64, id: HeaderValue) -> Request<RequestBody> {
        let Template { uri, host, id: id_header, post_body } = &self.request;
        let mut request = Request::new(RequestBody::default());
        *request.uri_mut() = uri.clone();
        if let Some(host) = host {
            request.headers_mut().insert(HOST, host.clone());
        }
        request.headers_mut().insert(id_header.clone(), id);
        if self.is_post(number) {
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            *request.body_mut() = RequestBody::new(post_body.clone());
        }
        if self.options.expect == Expect::Call {
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
            *request.body_mut() = RequestBody::new(Bytes::from_static(EMPTY_MESSAGE));
        }
        if self.options.connection_per_request && self.options.protocol == Protocol::Http1 {
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        request
    }
}

impl Template {
    fn new(options: &LoadOptions) -> Self {
        let (uri, host) = match options.protocol {
            Protocol::Http1 => (options.path.clone(), Some(options.host.as_str())),
            Protocol::H2c => {
                let scheme = if options.tls.is_some() { "https" } else { "http" };
                (format!("{scheme}://{}{}", options.host, options.path), None)
            }
        };
        Self {
            uri: uri.parse().expect("host and path were checked"),
            host: host.map(|host| HeaderValue::from_str(host).expect("the host was checked")),
            id: HeaderName::from_static(REQUEST_ID_HEADER),
            post_body: Bytes::from(vec![b'p'; options.post_body_bytes]),
        }
    }
}

/// Runs to the end or until stopped.
pub(super) async fn run(shared: Arc<Shared>) {
    let idle = IdleConnections::open_for(&shared).await;
    let mut workers = JoinSet::new();
    shared.pacer.started();
    let streams = shared.options.concurrency() / shared.options.connections;
    for _ in 0..shared.options.connections {
        let slot = Arc::new(Slot::default());
        for _ in 0..streams {
            workers.spawn(work(shared.clone(), slot.clone()));
        }
    }
    let pacing = shared.clone();
    let takers = shared.options.concurrency();
    workers.spawn(async move {
        if let Err(error) = pacing.pacer.release_when_due(takers).await {
            panic!("the kernel timer of the open loop failed: {error}");
        }
    });
    sample_until_done(&shared, &mut workers).await;
    *shared.duration_ms.lock().unwrap_or_else(PoisonError::into_inner) = Some(shared.elapsed_ms());
    drop(idle);
    shared.ended.send_replace(true);
}

async fn sample_until_done(shared: &Shared, workers: &mut JoinSet<()>) {
    let length = Duration::from_millis(shared.options.sample_ms);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + length, length);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Sample::default();
    let mut publish = || {
        let sample = shared.tally().next_sample(&mut before, shared.elapsed_ms());
        shared.samples.send_replace(sample);
    };
    loop {
        tokio::select! {
            joined = workers.join_next() => match joined {
                Some(Ok(())) => {}
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                None => break,
            },
            _ = ticks.tick() => publish(),
        }
    }
    publish();
}

/// The place of one connection; the streams of an HTTP/2 connection share it.
#[derive(Default)]
struct Slot(tokio::sync::Mutex<Option<Connection>>);

impl Slot {
    /// A connection that was usable a moment ago, newly opened if need be.
    async fn take(&self, shared: &Arc<Shared>) -> Result<Connection, String> {
        let mut held = self.0.lock().await;
        let mut connection = match held.take() {
            Some(connection) => connection,
            None => Connection::open(shared).await?,
        };
        if !connection.ready().await {
            connection = Connection::open(shared).await?;
        }
        match connection.share() {
            Some(shared) => *held = Some(shared),
            None => *held = None,
        }
        Ok(connection)
    }

    /// Gives an HTTP/1.1 connection back for the next request.
    async fn put_back(&self, connection: Connection) {
        let mut held = self.0.lock().await;
        held.get_or_insert(connection);
    }

    async fn discard(&self) {
        *self.0.lock().await = None;
    }
}

async fn work(shared: Arc<Shared>, slot: Arc<Slot>) {
    while let Some(ticket) = shared.pacer.next().await {
        // In the closed loop requests begin when they are taken, which is their due time as well.
        let outcome = attempt(&shared, &slot, ticket).await;
        let took_us = as_us(Instant::now().saturating_duration_since(ticket.due));
        let refused = matches!(outcome, Outcome::Failed { kind: FailureKind::Connect, .. });
        shared.tally().ended(&shared.options.run, ticket.number, outcome, took_us, shared.elapsed_ms());
        if refused {
            tokio::time::sleep(Duration::from_millis(CONNECT_PAUSE_MS)).await;
        }
    }
}

async fn attempt(shared: &Arc<Shared>, slot: &Slot, ticket: Ticket) -> Outcome {
    let mut connection = match slot.take(shared).await {
        Ok(connection) => connection,
        Err(detail) => return Outcome::Failed { kind: FailureKind::Connect, detail },
    };
    let id = shared.id(ticket.number);
    let request = shared.request(ticket.number, id.clone());
    let deadline = Duration::from_millis(shared.options.request_timeout_ms);
    let outcome = match tokio::time::timeout(deadline, connection.exchange(shared, id, request)).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::Failed {
            kind: FailureKind::Timeout,
            detail: format!("no complete answer within {} ms", deadline.as_millis()),
        },
    };
    // Only a connection whose answer came whole is in step for the next request; HTTP/2 has its own handle in the slot.
    let in_step = matches!(outcome, Outcome::Ok { .. } | Outcome::Failed { kind: FailureKind::Non2xx, .. });
    if shared.options.connection_per_request {
        slot.discard().await;
    } else if in_step {
        slot.put_back(connection).await;
    }
    outcome
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn as_us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
