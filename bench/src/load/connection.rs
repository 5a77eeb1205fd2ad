//! One client connection, and what one request over it came to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::driver::Shared;
use super::options::{Expect, Protocol};
use super::tally::{FailureKind, Outcome};
use crate::origin::{INSTANCE_HEADER, REQUEST_ID_HEADER, pattern_matches};

/// What a gRPC call came to.
const GRPC_STATUS: &str = "grpc-status";
/// How much of a non-2xx answer's body goes into its failure, in bytes.
const MAX_DETAIL_BYTES: usize = 200;
/// Receive window of an HTTP/2 stream, and of its connection, in bytes: the client must not be what slows an answer.
const H2_WINDOW_BYTES: u32 = 1 << 20;

pub(super) type RequestBody = Full<Bytes>;

/// A connection that can carry a request, or several at once over HTTP/2.
#[derive(Debug)]
pub(super) struct Connection {
    // Before the sender: by the time the last sender goes, the end of the connection must be known as ours.
    ours: Arc<EndsByUs>,
    sender: Sender,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    H2(http2::SendRequest<RequestBody>),
}

impl Connection {
    /// Connects and shakes hands.
    pub(super) async fn open(shared: &Arc<Shared>) -> Result<Self, String> {
        let deadline = Duration::from_millis(shared.options.connect_timeout_ms);
        match tokio::time::timeout(deadline, Self::connect(shared)).await {
            Ok(Ok(connection)) => {
                shared.tally().connections_opened += 1;
                Ok(connection)
            }
            Ok(Err(error)) => Err(with_causes(&*error)),
            Err(_) => Err(format!("no connection within {} ms", deadline.as_millis())),
        }
    }

    async fn connect(shared: &Arc<Shared>) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let io = TokioIo::new(shared.connect().await?);
        let by_us = Arc::new(AtomicBool::new(false));
        let sender = match shared.options.protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(io).await?;
                tokio::spawn(watch_end(connection, by_us.clone(), shared.clone()));
                Sender::Http1(sender)
            }
            Protocol::H2c => {
                let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                    .initial_stream_window_size(H2_WINDOW_BYTES)
                    .initial_connection_window_size(H2_WINDOW_BYTES)
                    .handshake(io)
                    .await?;
                tokio::spawn(watch_end(connection, by_us.clone(), shared.clone()));
                Sender::H2(sender)
            }
        };
        Ok(Self { ours: Arc::new(EndsByUs(by_us)), sender })
    }

    /// A second handle to an HTTP/2 connection; HTTP/1.1 carries one request at a time and has none.
    pub(super) fn share(&self) -> Option<Self> {
        match &self.sender {
            Sender::Http1(_) => None,
            Sender::H2(sender) => Some(Self { ours: self.ours.clone(), sender: Sender::H2(sender.clone()) }),
        }
    }

    /// Waits until the connection can take a request; false if it has ended.
    pub(super) async fn ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::H2(sender) => sender.ready().await.is_ok(),
        }
    }

    async fn send(&mut self, request: Request<RequestBody>) -> hyper::Result<Response<Incoming>> {
        match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::H2(sender) => sender.send_request(request).await,
        }
    }

    /// Sends one request and takes its whole answer.
    pub(super) async fn exchange(
        &mut self,
        shared: &Shared,
        id: HeaderValue,
        request: Request<RequestBody>,
    ) -> Outcome {
        if shared.options.connection_per_request {
            // We asked for the close that will follow.
            self.ours.0.store(true, Ordering::Release);
        }
        match self.send(request).await {
            Ok(response) => examine(shared, &id, response).await,
            Err(error) => Outcome::Failed {
                kind: if error.is_parse() { FailureKind::Malformed } else { FailureKind::Reset },
                detail: with_causes(&error),
            },
        }
    }
}

/// Marks the end of a connection as ours when its last handle goes.
#[derive(Debug)]
struct EndsByUs(Arc<AtomicBool>);

impl Drop for EndsByUs {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

async fn watch_end<T>(
    connection: impl Future<Output = hyper::Result<T>>,
    by_us: Arc<AtomicBool>,
    shared: Arc<Shared>,
) {
    // What the end did to a request is that request's outcome; here it only matters who ended the connection.
    drop(connection.await);
    if !by_us.load(Ordering::Acquire) {
        shared.tally().connections_closed_by_peer += 1;
    }
}

async fn examine(shared: &Shared, id: &HeaderValue, response: Response<Incoming>) -> Outcome {
    let (head, body) = response.into_parts();
    let announces_close = head.headers.get(CONNECTION).is_some_and(|value| value.as_bytes() == b"close");
    if announces_close && !shared.options.connection_per_request {
        shared.tally().close_announced += 1;
    }
    let instance = head.headers.get(INSTANCE_HEADER).cloned();
    let mut taken = Taken::new(shared.options.expect);
    let ended = taken.take_all(body).await;
    shared.tally().body_bytes += taken.len;
    if !head.status.is_success() {
        let from = instance.as_ref().map_or("nobody", |name| name.to_str().unwrap_or("?"));
        let body = String::from_utf8_lossy(&taken.beginning);
        let detail = format!("{} from {from}: {}", head.status, body.trim_end());
        return Outcome::Failed { kind: FailureKind::Non2xx, detail };
    }
    if let Err(error) = ended {
        let detail = format!("after {} bytes: {}", taken.len, with_causes(&error));
        return Outcome::Failed { kind: FailureKind::Truncated, detail };
    }
    if let Some(answered) = head.headers.get(REQUEST_ID_HEADER)
        && answered != id
    {
        let detail = format!("the answer is to {answered:?}");
        return Outcome::Failed { kind: FailureKind::Malformed, detail };
    }
    match taken.verdict() {
        Ok(()) => Outcome::Ok { instance },
        Err(detail) => Outcome::Failed { kind: FailureKind::Malformed, detail },
    }
}

/// What of a body has arrived.
struct Taken {
    expect: Expect,
    len: u64,
    differs_at: Option<u64>,
    /// What the trailers say of a gRPC call.
    status: Option<HeaderValue>,
    beginning: Vec<u8>,
}

impl Taken {
    const fn new(expect: Expect) -> Self {
        Self { expect, len: 0, differs_at: None, status: None, beginning: Vec::new() }
    }

    async fn take_all(&mut self, mut body: Incoming) -> hyper::Result<()> {
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            if let Some(data) = frame.data_ref() {
                self.take(data);
            }
            if let Some(trailers) = frame.trailers_ref() {
                self.status = trailers.get(GRPC_STATUS).cloned();
            }
        }
        Ok(())
    }

    fn take(&mut self, data: &Bytes) {
        let room = MAX_DETAIL_BYTES - self.beginning.len();
        if room > 0 {
            self.beginning.extend_from_slice(&data[..data.len().min(room)]);
        }
        if matches!(self.expect, Expect::Pattern(_)) && !pattern_matches(self.len, data) {
            self.differs_at.get_or_insert(self.len);
        }
        self.len += data.len() as u64;
    }

    fn verdict(&self) -> Result<(), String> {
        match (self.expect, self.differs_at) {
            (_, Some(at)) => Err(format!("wrong content in the piece at byte {at}")),
            (Expect::Length(len) | Expect::Pattern(len), None) if len != self.len => {
                Err(format!("{} body bytes instead of {len}", self.len))
            }
            (Expect::Call, None) if self.status.as_ref().is_none_or(|status| status != "0") => {
                Err(format!("a gRPC call that ended with status {:?}", self.status))
            }
            _ => Ok(()),
        }
    }
}

/// An error with its causes: the outermost alone mostly says nothing.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
