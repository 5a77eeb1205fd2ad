//! A client's connection as the edge sees it: its bytes on the way to and from the protocol engine, and
//! the little state that its requests, its task and the core's timekeeper share.
//!
//! Everything here lives on one core; nothing is locked.

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use rustix::net::SendFlags;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::address::AddressText;
use crate::core::Core;
use crate::error::Reason;
use crate::framing::Follower;
use crate::glitches::Glitches;
use crate::respond;
use crate::splice::{InPipe, Splicer};
use crate::tls::{Admitted, Session, TlsStream};
use crate::upgrade::Tunnel;
use crate::wire::Wire;

/// Why the core asks a connection's task to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kill {
    /// Nothing is asked.
    No,
    /// Finish what is in flight, take nothing new, tell the client.
    Drain,
    /// Nothing came for a moment: let go of what only requests need.
    Rest,
    /// Nothing came for too long: close.
    Idle,
    /// A request head did not become complete in time.
    HeadTimeout,
    /// Break off, so that the client sees that something is missing.
    Abort,
}

/// What a connection's task, its requests and the timekeeper share.
#[derive(Debug)]
pub(crate) struct ConnState {
    pub(crate) peer: SocketAddr,
    /// Where the peer connected to.
    pub(crate) local: SocketAddr,
    pub(crate) trusted: bool,
    /// The peer's address as text.
    pub(crate) peer_text: AddressText,
    pub(crate) follower: RefCell<Follower>,
    /// Requests in flight.
    pub(crate) in_flight: Cell<u32>,
    /// When the last request ended, or the connection opened.
    pub(crate) idle_since_ms: Cell<u64>,
    /// When the client last took something.
    pub(crate) wrote_ms: Cell<u64>,
    /// When the first byte of an incomplete head came; 0 if there is none.
    pub(crate) head_since_ms: Cell<u64>,
    /// Whether a request was ever complete.
    pub(crate) served: Cell<bool>,
    pub(crate) http2: Cell<bool>,
    /// What a handshake has settled; empty on clear text.
    pub(crate) session: OnceCell<Box<Session>>,
    /// The handshake is not over.
    pub(crate) handshaking: Cell<bool>,
    /// It waits for a certificate, which has a limit of its own.
    pub(crate) awaits_certificate: Cell<bool>,
    /// The host that was found to be served here last, where domains have a say in it.
    pub(crate) admitted: RefCell<Option<Box<Admitted>>>,
    pub(crate) draining: Cell<bool>,
    /// Whether the client has asked for the connection to be closed after this request.
    pub(crate) is_last: Cell<bool>,
    /// Requests that the client cancelled before their answers' heads, less those that it did not.
    pub(crate) cancelled: Cell<u32>,
    kill: Cell<Kill>,
    waker: RefCell<Option<Waker>>,
    /// The upstream's half of an upgraded connection, left by the request for the connection's task.
    pub(crate) tunnel: RefCell<Option<Tunnel>>,
    /// The status that hyper answered by itself, because it could not read the request.
    pub(crate) rejected: Cell<Option<Reason>>,
    /// The client may still be sending: read on for a moment before the socket is closed, or the reset
    /// that answers those bytes takes our answer with it.
    pub(crate) linger: Cell<bool>,
    /// Interim responses that wait to be written. They have their place before the answer's head.
    pub(crate) interim: RefCell<Vec<u8>>,
    /// Whether the answer's head is still to come.
    pub(crate) before_head: Cell<bool>,
    /// The field lines that are the same for every request to one host.
    pub(crate) steady: RefCell<Steady>,
    /// What of an answer is on its way past us.
    pub(crate) in_pipe: InPipe,
    /// Whether the protocol engine has nothing left to write.
    pub(crate) flushed: Cell<bool>,
    /// It has nothing in memory but the socket and its session.
    pub(crate) resting: Cell<bool>,
}

/// Field lines with what they were made for.
#[derive(Debug, Default)]
pub(crate) struct Steady {
    /// Whether they were asked for before: what a connection needs once is not kept.
    pub(crate) again: bool,
    pub(crate) host: Vec<u8>,
    pub(crate) via: Vec<u8>,
    pub(crate) lines: Vec<u8>,
}

impl ConnState {
    pub(crate) fn new(peer: SocketAddr, local: SocketAddr, trusted: bool, now_ms: u64) -> Rc<Self> {
        Rc::new(Self {
            peer,
            local,
            trusted,
            peer_text: AddressText::of(peer.ip().to_canonical()),
            follower: RefCell::new(Follower::new()),
            in_flight: Cell::new(0),
            idle_since_ms: Cell::new(now_ms),
            wrote_ms: Cell::new(now_ms),
            head_since_ms: Cell::new(now_ms),
            served: Cell::new(false),
            http2: Cell::new(false),
            session: OnceCell::new(),
            handshaking: Cell::new(false),
            awaits_certificate: Cell::new(false),
            admitted: RefCell::new(None),
            draining: Cell::new(false),
            is_last: Cell::new(false),
            cancelled: Cell::new(0),
            kill: Cell::new(Kill::No),
            waker: RefCell::new(None),
            tunnel: RefCell::new(None),
            rejected: Cell::new(None),
            linger: Cell::new(false),
            interim: RefCell::new(Vec::new()),
            before_head: Cell::new(false),
            steady: RefCell::default(),
            in_pipe: InPipe::default(),
            flushed: Cell::new(false),
            resting: Cell::new(false),
        })
    }

    /// Whether the client speaks TLS with this edge.
    pub(crate) fn is_tls(&self) -> bool {
        self.session.get().is_some()
    }

    pub(crate) fn peer_ip(&self) -> IpAddr {
        self.peer.ip().to_canonical()
    }

    /// Called by the connection's task at each poll: notes whom to wake, and says what is asked.
    pub(crate) fn asked(&self, cx: &Context<'_>) -> Kill {
        let mut waker = self.waker.borrow_mut();
        if waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        self.kill.replace(Kill::No)
    }

    pub(crate) fn kill(&self, how: Kill) {
        // What is asked for comfort never takes the place of what has to be.
        if how != Kill::Rest || self.kill.get() == Kill::No {
            self.kill.set(how);
        }
        self.wake();
    }

    /// Whether nothing is under way: no request, no part of one, and nothing that the client has not been sent.
    pub(crate) fn can_rest(&self) -> bool {
        self.in_flight.get() == 0
            && self.head_since_ms.get() == 0
            && self.flushed.get()
            && !self.draining.get()
            && !self.linger.get()
            && self.rejected.get().is_none()
            && self.tunnel.borrow().is_none()
            && self.follower.borrow().is_between_requests()
    }

    /// Lets go of what only requests need.
    pub(crate) fn shrink(&self) {
        self.follower.borrow_mut().shrink();
        *self.steady.borrow_mut() = Steady::default();
    }

    /// This state is in the place of another one from now on: what nobody has heard yet is asked of this one.
    pub(crate) fn takes_over(&self, before: &Self) {
        self.kill.set(before.kill.replace(Kill::No));
    }

    pub(crate) fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// A request has begun.
    pub(crate) fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.head_since_ms.set(0);
        self.served.set(true);
        self.before_head.set(true);
    }

    /// A request has ended.
    pub(crate) fn end(&self, now_ms: u64) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.idle_since_ms.set(now_ms);
        if !self.http2.get() && self.follower.borrow().has_partial_head() {
            self.head_since_ms.set(now_ms);
        }
    }
}

/// The socket under the protocol engine.
pub(crate) struct ClientStream {
    wire: Wire,
    state: Rc<ConnState>,
    /// What was read to find the protocol.
    prefix: Bytes,
    /// An answer of our own that takes the place of hyper's bare one.
    own_answer: Bytes,
    clock_ms: Rc<Cell<u64>>,
    /// The core's, to make one piece of a small answer.
    joined: Rc<RefCell<Vec<u8>>>,
    splicer: Rc<Splicer>,
    /// What an HTTP/2 client sends of no use.
    glitches: Option<Box<Glitches>>,
}

/// Up to this size the pieces of an answer are copied together: one `send` costs less than one `writev`.
const MAX_JOINED_BYTES: usize = 2048;

impl ClientStream {
    pub(crate) fn new(wire: Wire, state: Rc<ConnState>, prefix: Bytes, core: &Core) -> Self {
        Self {
            wire,
            state,
            prefix,
            own_answer: Bytes::new(),
            clock_ms: core.clock(),
            joined: Rc::clone(&core.joined),
            splicer: Rc::clone(&core.splicer),
            glitches: None,
        }
    }

    /// From now on frames of HTTP/2 are counted, see [`Glitches`].
    pub(crate) fn count_glitches(&mut self, budget: u32) {
        self.glitches = Some(Box::new(Glitches::new(budget, self.clock_ms.get())));
    }

    pub(crate) fn into_wire(self) -> Wire {
        self.wire
    }

    /// Puts bytes back that were read and belong to a request that has not begun.
    pub(crate) fn put_back(&mut self, bytes: Bytes) {
        debug_assert!(self.prefix.is_empty(), "it was read before what came after it");
        self.prefix = bytes;
    }

    /// Ready when there is something to read, be it the end.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.prefix.is_empty() {
            return Poll::Ready(());
        }
        // An error is found again by who reads.
        self.wire.poll_readable(cx).map(drop)
    }

    /// Takes note of what was read. An error is a fault in the framing of a body; the parser takes it for its own.
    fn note_read(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(glitches) = &mut self.glitches
            && glitches.read(bytes, self.clock_ms.get()).is_err()
        {
            metrics::counter!("peregrine_edge_refused_connections_total", "reason" => "flood").increment(1);
            tracing::debug!(client = %self.state.peer, "an HTTP/2 client sent too many frames of no use");
            return Err(io::ErrorKind::InvalidData.into());
        }
        if self.state.http2.get() || bytes.is_empty() {
            return Ok(());
        }
        if self.state.follower.borrow_mut().read(bytes).is_err() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if self.state.in_flight.get() == 0 && self.state.head_since_ms.get() == 0 {
            self.state.head_since_ms.set(self.clock_ms.get());
        }
        Ok(())
    }

    fn note_written(&mut self, bytes: usize) {
        self.state.wrote_ms.set(self.clock_ms.get());
        if let Some(glitches) = &mut self.glitches {
            glitches.sent(bytes);
        }
    }

    /// What a TLS session has taken is as good as sent, for a client that acknowledges it.
    fn note_taken(&mut self, taken: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let (Some(glitches), Poll::Ready(Ok(bytes))) = (&mut self.glitches, &taken) {
            glitches.sent(*bytes);
        }
        taken
    }

    /// hyper answers what it cannot parse with a bare status line, from inside. It is told apart from a
    /// forwarded answer by three facts: no request is in flight, a head is left unread, and its exact form.
    fn bare_rejection(&self, bytes: &[u8]) -> Option<Reason> {
        if !bytes.starts_with(b"HTTP/1.1 4")
            || self.state.in_flight.get() > 0
            || !self.state.follower.borrow().has_partial_head()
        {
            return None;
        }
        let reason = match bytes.get(9..12)? {
            b"400" => Reason::BadRequestHead,
            b"414" => Reason::UriTooLong,
            b"431" => Reason::HeadTooLarge,
            _ => return None,
        };
        let head = bytes.split(|b| *b == b'\n').nth(1)?;
        (head == b"connection: close\r").then_some(reason)
    }

    fn poll_own(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.own_answer.is_empty() {
            let written = std::task::ready!(Pin::new(&mut self.wire).poll_write(cx, &self.own_answer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.own_answer.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what is in the pipe in the place of its marker.
    fn poll_splice(&self, cx: &mut Context<'_>, length: usize) -> Poll<io::Result<usize>> {
        let Wire::Clear(socket) = &self.wire else {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        };
        let drained = self.splicer.poll_drain(cx, &self.state.in_pipe, socket, length);
        let (written, body_waits) = std::task::ready!(drained)?;
        self.state.wrote_ms.set(self.clock_ms.get());
        if body_waits {
            self.state.wake();
        }
        Poll::Ready(Ok(written))
    }

    /// Writes on clear text.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Clear(socket) => poll_send(socket, &self.state, cx, bytes),
            Wire::Tls(stream) => Pin::new(&mut **stream).poll_write(cx, bytes),
        }
    }

    /// Does something with the session that may send; then notes whether the client has taken anything.
    fn sealed<T>(&mut self, work: impl FnOnce(&mut TlsStream) -> T) -> Option<T> {
        let Wire::Tls(stream) = &mut self.wire else { return None };
        let before = stream.sent();
        let done = work(stream);
        if stream.sent() != before {
            self.state.wrote_ms.set(self.clock_ms.get());
        }
        Some(done)
    }

    /// Says whether what hyper wants to write is to be replaced, and by what.
    fn before_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<bool>> {
        self.state.flushed.set(false);
        if !self.own_answer.is_empty() {
            std::task::ready!(self.poll_own(cx))?;
        }
        if !self.state.interim.borrow().is_empty() {
            let interim = self.state.interim.take();
            if bytes.starts_with(b"HTTP/1.1 ") {
                self.own_answer = interim.into();
                std::task::ready!(self.poll_own(cx))?;
            }
        }
        if let Some(reason) = self.bare_rejection(bytes) {
            self.state.rejected.set(Some(reason));
            self.own_answer = respond::raw_answer(reason);
            return Poll::Ready(Ok(true));
        }
        Poll::Ready(Ok(false))
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.prefix.is_empty() {
            std::task::ready!(Pin::new(&mut self.wire).poll_read(cx, buf))?;
        } else {
            let here = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix.split_to(here));
        }
        Poll::Ready(self.note_read(&buf.filled()[before..]))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if std::task::ready!(self.before_write(cx, bytes))? {
            return Poll::Ready(Ok(bytes.len()));
        }
        if let Some(taken) = self.sealed(|stream| stream.poll_write_slices(cx, &[io::IoSlice::new(bytes)])) {
            return self.note_taken(taken);
        }
        if self.state.in_pipe.is_filled() && self.splicer.is_marker(bytes) {
            return self.poll_splice(cx, bytes.len());
        }
        let written = std::task::ready!(self.poll_send(cx, bytes))?;
        self.note_written(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.first().map_or(&[][..], |slice| slice);
        let total = slices.iter().map(|slice| slice.len()).sum();
        if std::task::ready!(self.before_write(cx, first))? {
            return Poll::Ready(Ok(total));
        }
        if let Some(taken) = self.sealed(|stream| stream.poll_write_slices(cx, slices)) {
            return self.note_taken(taken);
        }
        let me = &mut *self;
        let (mut slices, mut total) = (slices, total);
        if me.state.in_pipe.is_filled() {
            match slices.iter().position(|slice| me.splicer.is_marker(slice)) {
                Some(0) => return me.poll_splice(cx, slices[0].len()),
                Some(marker) => {
                    slices = &slices[..marker];
                    total = slices.iter().map(|slice| slice.len()).sum();
                }
                None => {}
            }
        }
        let written = match slices {
            [one] => me.poll_send(cx, one),
            _ if total <= MAX_JOINED_BYTES => {
                let joined = Rc::clone(&me.joined);
                let mut joined = joined.borrow_mut();
                joined.clear();
                slices.iter().for_each(|slice| joined.extend_from_slice(slice));
                me.poll_send(cx, &joined)
            }
            _ => match &mut me.wire {
                Wire::Clear(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
                Wire::Tls(stream) => stream.poll_write_slices(cx, slices),
            },
        };
        let written = std::task::ready!(written)?;
        me.note_written(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper flushes when it has nothing left to write: the place where an interim response fits in
    /// without cutting a message in two.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.own_answer.is_empty()
            && self.state.before_head.get()
            && !self.state.interim.borrow().is_empty()
        {
            let interim = self.state.interim.take();
            self.own_answer = interim.into();
        }
        std::task::ready!(self.poll_own(cx))?;
        std::task::ready!(self.sealed(|stream| stream.poll_send(cx)).unwrap_or(Poll::Ready(Ok(()))))?;
        self.state.flushed.set(true);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The socket is closed right after this, which says the same to the client in one system call instead of
        // two; where it is not (see `serve::finish_http1`), it is shut down there. TLS has an end of its own to say.
        std::task::ready!(self.poll_own(cx))?;
        self.sealed(|stream| stream.poll_close(cx)).unwrap_or(Poll::Ready(Ok(())))
    }
}

/// Writes. The end of a connection's last answer is kept back for the moment until the socket is closed, so that it
/// goes in one segment with the FIN: a segment less to make, to send and to acknowledge.
fn poll_send(
    socket: &mut TcpStream,
    state: &ConnState,
    cx: &mut Context<'_>,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    let is_end = state.is_last.get() && state.in_flight.get() == 0 && state.follower.borrow().is_at_head();
    if !is_end {
        return Pin::new(socket).poll_write(cx, bytes);
    }
    let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
    loop {
        std::task::ready!(socket.poll_write_ready(cx))?;
        let send = || Ok(rustix::net::send(&*socket, bytes, flags)?);
        match socket.try_io(Interest::WRITABLE, send) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return Poll::Ready(sent),
        }
    }
}
