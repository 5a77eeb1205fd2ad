//! A client connection's task: finds its protocol, runs it, and ends it properly.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::conn::{ClientStream, ConnState, Kill};
use crate::core::{Core, LocalExecutor};
use crate::detect::{Detected, detect};
use crate::error::Reason;
use crate::forward;
use crate::framing::Framing;
use crate::listen::Speaks;
use crate::respond;
use crate::tls;
use crate::upgrade;
use crate::wire::Wire;

/// What is read at once to find the protocol: most heads fit.
const FIRST_READ_BYTES: usize = 2 * 1024;
/// How long, and how much, a client that has been refused may go on sending.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1024 * 1024;

/// hyper's settings for client connections, made once per core.
pub(crate) struct Servers {
    http1: http1::Builder,
    http2: http2::Builder<LocalExecutor>,
}

impl Servers {
    pub(crate) fn new(limits: &crate::config::Limits) -> Rc<Self> {
        let mut http1 = http1::Builder::new();
        http1
            // The edge keeps its own time, by core instead of by connection.
            .header_read_timeout(None)
            .max_headers(limits.max_headers as usize)
            .max_header_size(limits.max_header_bytes as usize)
            .max_buf_size((limits.max_header_bytes as usize).max(64 * 1024));
        let mut http2 = http2::Builder::new(LocalExecutor);
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.http2_max_concurrent_streams)
            .initial_stream_window_size(limits.http2_stream_window_bytes)
            .initial_connection_window_size(limits.http2_connection_window_bytes)
            .max_header_list_size(limits.max_header_bytes)
            .max_pending_accept_reset_streams(limits.http2_max_pending_reset_streams as usize)
            .max_local_error_reset_streams(limits.http2_max_local_error_resets as usize);
        Rc::new(Self { http1, http2 })
    }
}

/// Serves one connection to its end.
pub(crate) async fn serve(
    core: &Rc<Core>,
    servers: &Servers,
    mut socket: TcpStream,
    speaks: Speaks,
    state: Rc<ConnState>,
) {
    let (wire, prefix, protocol) = match speaks {
        Speaks::Http => {
            let Some((prefix, protocol)) = first_bytes(&state, &mut socket).await else { return };
            (Wire::Clear(socket), prefix, protocol)
        }
        // What a handshake needs is let go when it is over, and clear text never has it.
        Speaks::Https => match boxed(|| tls::accept(core, &state, socket)).await {
            Some((stream, protocol)) => (Wire::Tls(stream), Bytes::new(), protocol),
            None => return,
        },
    };
    let stream = ClientStream::new(wire, Rc::clone(&state), prefix, core);
    if let Detected::Http2 = protocol {
        return boxed(|| serve_http2(core, servers, state, stream)).await;
    }
    let mut next = Some(stream);
    while let Some(stream) = next {
        // Let go of in between: of 10,000 clients few ask for something at a time.
        next = match boxed(|| serve_http1(core, servers, &state, stream)).await {
            Some(stream) => rest(core, &state, stream).await,
            None => None,
        };
    }
}

/// A future that is made where it lies: who awaits it has no room for it.
#[inline(never)]
fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::pin(make())
}

/// Counts a connection among those that rest.
struct Resting<'a> {
    at_rest: &'a Cell<usize>,
    here: &'a Cell<bool>,
}

impl<'a> Resting<'a> {
    fn begin(core: &'a Core, state: &'a ConnState) -> Self {
        let at_rest = &core.conns.at_rest;
        at_rest.set(at_rest.get() + 1);
        state.resting.set(true);
        Self { at_rest, here: &state.resting }
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.at_rest.set(self.at_rest.get() - 1);
        self.here.set(false);
    }
}

/// Waits for the next request with nothing but the socket and its session in memory. `None` if the connection has ended.
async fn rest(core: &Core, state: &ConnState, stream: ClientStream) -> Option<ClientStream> {
    state.shrink();
    let _resting = Resting::begin(core, state);
    let asked = poll_fn(|cx| match state.asked(cx) {
        Kill::No | Kill::Rest => stream.poll_readable(cx).map(|()| Kill::No),
        how => Poll::Ready(how),
    })
    .await;
    if asked == Kill::No {
        return Some(stream);
    }
    finish_http1(core, state, stream.into_wire(), &End::Asked(asked)).await;
    None
}

/// Reads until the protocol is known. `None` if the client leaves or takes too long.
async fn first_bytes(state: &ConnState, socket: &mut TcpStream) -> Option<(Bytes, Detected)> {
    let mut read = at_hand(socket)?;
    loop {
        match detect(&read) {
            Detected::Unclear => {}
            found => return Some((read, found)),
        }
        let got = poll_fn(|cx| {
            if state.asked(cx) != Kill::No {
                return Poll::Ready(Ok(0));
            }
            let mut chunk = [MaybeUninit::uninit(); FIRST_READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut chunk);
            ready!(Pin::new(&mut *socket).poll_read(cx, &mut buffer))?;
            read = if read.is_empty() {
                Bytes::copy_from_slice(buffer.filled())
            } else {
                [&read, buffer.filled()].concat().into()
            };
            Poll::Ready(io::Result::Ok(buffer.filled().len()))
        });
        if got.await.unwrap_or(0) == 0 {
            return None;
        }
    }
}

/// What has come already. Nearly always that is a whole head (see `listen::bind`), and tokio would wait for the kernel
/// to say so. `None` if the client has left; an error comes again at the next look.
fn at_hand(socket: &TcpStream) -> Option<Bytes> {
    let mut chunk = [MaybeUninit::uninit(); FIRST_READ_BYTES];
    match rustix::net::recv(socket, &mut chunk[..], RecvFlags::empty()) {
        Ok((_, 0)) => None,
        Ok(((bytes, _), _)) => Some(Bytes::copy_from_slice(bytes)),
        Err(_) => Some(Bytes::new()),
    }
}

/// How a connection's protocol came to its end.
enum End {
    /// By itself.
    Http(hyper::Result<()>),
    /// Because it was asked to.
    Asked(Kill),
}

/// Serves requests until the connection ends, or until nothing is under way and it is asked to rest.
async fn serve_http1(
    core: &Rc<Core>,
    servers: &Servers,
    state: &Rc<ConnState>,
    stream: ClientStream,
) -> Option<ClientStream> {
    let (its_core, conn) = (Rc::clone(core), Rc::clone(state));
    let service = service_fn(move |request: Request<Incoming>| {
        let framing = request.body().size_hint().exact().map_or(Framing::Chunked, Framing::Length);
        let framing = conn.follower.borrow_mut().head(framing);
        forward::handle(Rc::clone(&its_core), Rc::clone(&conn), request, framing)
    });
    let mut http = servers.http1.serve_connection(TokioIo::new(stream), service);
    let mut rests = false;
    let end = poll_fn(|cx| {
        match state.asked(cx) {
            Kill::No => {}
            Kill::Drain => {
                state.draining.set(true);
                Pin::new(&mut http).graceful_shutdown();
            }
            Kill::Rest => rests = true,
            how => return Poll::Ready(End::Asked(how)),
        }
        // First what may have come meanwhile.
        match Pin::new(&mut http).poll(cx) {
            Poll::Pending if std::mem::take(&mut rests) && state.can_rest() => {
                Poll::Ready(End::Asked(Kill::Rest))
            }
            polled => polled.map(End::Http),
        }
    })
    .await;
    let parts = http.into_parts();
    let mut stream = parts.io.into_inner();
    if let End::Asked(Kill::Rest) = end {
        // Without content it would still keep the buffer that it is a part of.
        if !parts.read_buf.is_empty() {
            stream.put_back(parts.read_buf);
        }
        return Some(stream);
    }
    let wire = stream.into_wire();
    let tunnel = state.tunnel.borrow_mut().take();
    if let (Some(tunnel), End::Http(Ok(()))) = (tunnel, &end) {
        upgrade::run(wire, parts.read_buf, tunnel).await;
        return None;
    }
    finish_http1(core, state, wire, &end).await;
    None
}

async fn finish_http1(core: &Core, state: &ConnState, mut wire: Wire, end: &End) {
    if let Some(reason) = state.rejected.get() {
        note_rejected(core, state, reason);
        state.linger.set(true);
    }
    match end {
        End::Asked(Kill::HeadTimeout) if state.follower.borrow().has_partial_head() => {
            note_rejected(core, state, Reason::HeadTimeout);
            // Best effort: somebody who sends a byte a minute may not read either.
            wire.try_say(&respond::raw_answer(Reason::HeadTimeout));
        }
        End::Asked(_) | End::Http(_) => {}
    }
    if matches!(end, End::Asked(Kill::Drain | Kill::Idle | Kill::HeadTimeout)) {
        wire.try_end();
    }
    if state.linger.get() {
        let _ = tokio::time::timeout(LINGER, async {
            drop(wire.shutdown().await);
            read_on(&mut wire).await;
        })
        .await;
    }
}

fn note_rejected(core: &Core, state: &ConnState, reason: Reason) {
    core.metrics.error(reason);
    core.metrics.request(None, reason.status_code(), 0);
    if let Some(log) = &core.log {
        log.push_rejected(state.peer_ip(), reason.status_code(), reason);
    }
}

async fn read_on(wire: &mut Wire) {
    let mut sink = vec![0; 16 * 1024];
    let mut total = 0;
    while total < LINGER_BYTES {
        let read = poll_fn(|cx| {
            let mut buffer = ReadBuf::new(&mut sink);
            ready!(Pin::new(&mut *wire).poll_read(cx, &mut buffer))?;
            Poll::Ready(io::Result::Ok(buffer.filled().len()))
        });
        match read.await {
            Ok(0) | Err(_) => return,
            Ok(read) => total += read,
        }
    }
}

async fn serve_http2(core: &Rc<Core>, servers: &Servers, state: Rc<ConnState>, mut stream: ClientStream) {
    stream.count_glitches(core.config.limits.http2_max_glitches);
    state.http2.set(true);
    state.follower.borrow_mut().turn_off();
    let (its_core, conn) = (Rc::clone(core), Rc::clone(&state));
    let service = service_fn(move |request: Request<Incoming>| {
        forward::handle(Rc::clone(&its_core), Rc::clone(&conn), request, Ok(()))
    });
    let mut http = pin!(servers.http2.serve_connection(TokioIo::new(stream), service));
    let mut leaving = false;
    poll_fn(|cx| {
        match state.asked(cx) {
            Kill::No | Kill::Rest => {}
            Kill::Drain => {
                state.draining.set(true);
                http.as_mut().graceful_shutdown();
            }
            // First the client is told (GOAWAY), and at the next look the connection is closed.
            Kill::Idle if !leaving => {
                leaving = true;
                http.as_mut().graceful_shutdown();
            }
            Kill::Idle | Kill::HeadTimeout | Kill::Abort => return Poll::Ready(()),
        }
        http.as_mut().poll(cx).map(|ended| {
            if let Err(error) = ended {
                tracing::debug!(%error, "HTTP/2 connection of a client ended");
            }
        })
    })
    .await;
}
