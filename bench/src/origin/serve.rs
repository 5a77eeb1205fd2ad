//! Connections: accept, tell HTTP/1.1 from HTTP/2 by the preface, serve, and end politely.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::record::Protocol;
use super::respond::respond;
use super::{Gauge, SHUTDOWN_TIMEOUT_MS, Shared, websocket};

/// How long a new connection may take to say which protocol it speaks, and a request to send its head, in milliseconds.
const HEAD_TIMEOUT_MS: u64 = 30_000;
/// Pause after a failed accept (out of file descriptors, mostly), in milliseconds.
const ACCEPT_PAUSE_MS: u64 = 50;
/// Requests at once on one HTTP/2 connection.
const MAX_CONCURRENT_STREAMS: u32 = 1000;
/// The least that tells "PRI * HTTP/2.0" (RFC 9113 §3.4) from every HTTP/1.1 method, in bytes: PROPFIND differs in the third.
const PREFACE_BYTES: usize = 3;

/// One accepted connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) number: u64,
    pub(super) protocol: Protocol,
    pub(super) peer: SocketAddr,
    /// Set by a request that switches protocols, with its id; served by the connection's own task after HTTP has let
    /// go.
    pub(super) upgrade: Mutex<Option<(OnUpgrade, Option<String>)>>,
}

pub(super) async fn accept_until_stopped(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = shared.stopped() => break,
        };
        match accepted {
            Ok(stream) => admit(&mut connections, stream, &shared),
            Err(error) => {
                eprintln!("origin {}: accept failed: {error}", shared.instance);
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
    // Whoever is in the kernel's queue has connected successfully and would see a reset if the listener just closed.
    while let Some(Ok(stream)) = listener.accept().now_or_never() {
        admit(&mut connections, stream, &shared);
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_millis(SHUTDOWN_TIMEOUT_MS), all_ended).await.is_err() {
        eprintln!(
            "origin {}: cut {} connections at the shutdown deadline",
            shared.instance,
            connections.len()
        );
    }
}

fn admit(connections: &mut JoinSet<()>, (stream, peer): (TcpStream, SocketAddr), shared: &Arc<Shared>) {
    let number = shared.counters.accepted.fetch_add(1, Ordering::Relaxed) + 1;
    let open = Gauge::raise(shared, |counters| &counters.open);
    let shared = shared.clone();
    connections.spawn(async move {
        let _open = open;
        // A failed connection is the client's to notice and to count; the origin has its records.
        drop(serve(stream, peer, number, shared).await);
    });
}

async fn serve(
    mut stream: TcpStream,
    peer: SocketAddr,
    number: u64,
    shared: Arc<Shared>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let preface = tokio::select! {
        preface = tokio::time::timeout(Duration::from_millis(HEAD_TIMEOUT_MS), read_preface(&mut stream)) => preface??,
        () = shared.stopped() => return Ok(()),
    };
    let protocol = if preface == b"PRI" { Protocol::H2 } else { Protocol::H1 };
    let connection = Arc::new(Connection { number, protocol, peer, upgrade: Mutex::default() });
    let io = TokioIo::new(Prefixed { prefix: preface, stream });
    match protocol {
        Protocol::H1 => serve_h1(io, connection, shared).await?,
        Protocol::H2 => serve_h2(io, connection, shared).await?,
    }
    Ok(())
}

/// Reads just enough to tell the protocols apart.
async fn read_preface(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut preface = Vec::with_capacity(PREFACE_BYTES);
    while b"PRI".starts_with(&preface) && preface.len() < PREFACE_BYTES {
        // One byte at a time at most: what is not the preface stays in the kernel for the codec.
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            break;
        }
        preface.push(byte[0]);
    }
    Ok(preface)
}

async fn serve_h1(
    io: TokioIo<Prefixed>,
    connection: Arc<Connection>,
    shared: Arc<Shared>,
) -> Result<(), hyper::Error> {
    let service = service_fn(|request| respond(shared.clone(), connection.clone(), request));
    let mut serving = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_millis(HEAD_TIMEOUT_MS))
            .serve_connection(io, service)
            .with_upgrades()
    );
    tokio::select! {
        served = serving.as_mut() => served?,
        () = shared.stopped() => {
            serving.as_mut().graceful_shutdown();
            serving.await?;
        }
    }
    let upgrade = connection.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((upgrade, id)) = upgrade {
        let end = websocket::echo(upgrade, &shared).await;
        shared.websocket_ended(id.as_deref(), &connection, end);
    }
    Ok(())
}

async fn serve_h2(
    io: TokioIo<Prefixed>,
    connection: Arc<Connection>,
    shared: Arc<Shared>,
) -> Result<(), hyper::Error> {
    let service = service_fn(|request| respond(shared.clone(), connection.clone(), request));
    let mut serving = pin!(
        hyper::server::conn::http2::Builder::new(Streams::default())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .serve_connection(io, service)
    );
    tokio::select! {
        served = serving.as_mut() => served,
        () = shared.stopped() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    }
}

/// Runs the streams of one HTTP/2 connection, and cuts them when the connection is dropped: a hanging request must not
/// outlive its origin.
#[derive(Clone, Default)]
struct Streams(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while streams.try_join_next().is_some() {}
        streams.spawn(stream);
    }
}

/// A stream whose first bytes were read already.
struct Prefixed {
    prefix: Vec<u8>,
    stream: TcpStream,
}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, into);
        }
        let len = self.prefix.len().min(into.remaining());
        into.put_slice(&self.prefix[..len]);
        self.prefix.drain(..len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
