//! Bodies on their way: a request's to the upstream, an answer's to the client. Frames pass one by one,
//! so that back-pressure of either side reaches the other; nothing is collected.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use peregrine_routing::{Failure, Outcome, Ticket, TrafficClass};

use crate::early::Early;
use crate::error::Reason;
use crate::grpc::{self, Messages};
use crate::headers;
use crate::hold::{EARLY_FRAME_BYTES, MAX_EARLY_BODY_BYTES};
use crate::http1::{Http1Conn, PolledFrame};
use crate::inflight::{Flight, FlightGuard, Waits};
use crate::pool::{Http2Ticket, UpstreamPool};
use crate::rules::{Compressing, MAX_PIECES_IN_A_ROW};

/// Why a body broke off. Tells hyper to break the message off too, without a proper end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{}", .0.as_str())]
pub(crate) struct Broken(pub(crate) Reason);

/// Bytes of a request body that are kept until the upstream has shown that it processes the request, so
/// that a refused stream (retry class B) can be sent elsewhere.
const MAX_KEPT_BYTES: usize = 64 * 1024;

// --- request -------------------------------------------------------------------------------------------

/// A request body as one attempt sends it.
pub(crate) enum ForwardBody {
    Empty,
    Stream { shared: Rc<RequestBody>, replayed: usize },
}

/// A request body, shared by the attempts to send it.
pub(crate) struct RequestBody {
    /// `None` when it was abandoned: an answer came before the client was asked for a byte.
    incoming: RefCell<Option<Incoming>>,
    flight: Rc<Flight>,
    max_bytes: u64,
    body_idle_ms: u32,
    head_timeout_ms: u32,
    /// The first frame, if it was there with the head.
    first: RefCell<Option<Frame<Bytes>>>,
    /// What was taken in before there was an upstream for it; `None` if the request never had to wait.
    early: RefCell<Option<Box<Early>>>,
    /// Frames that were taken from the client, while they may be needed again.
    kept: RefCell<Option<Vec<Bytes>>>,
    taken: Cell<bool>,
    ended: Cell<bool>,
    fault: Cell<Option<Reason>>,
    gate: Option<Arc<ContinueGate>>,
    /// From when on it is a transfer; 0 is never.
    late_from_ms: Cell<u64>,
}

/// Holds a body back until the upstream says `100 Continue` or has had its time (RFC 9110 §10.1.1).
#[derive(Debug, Default)]
pub(crate) struct ContinueGate {
    open: AtomicBool,
    waker: futures_util::task::AtomicWaker,
}

impl ContinueGate {
    pub(crate) fn open(&self) {
        self.open.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    fn poll_open(&self, cx: &Context<'_>) -> Poll<()> {
        if self.open.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        self.waker.register(cx.waker());
        if self.open.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// What a request body needs to know.
pub(crate) struct RequestBodyLimits {
    pub(crate) max_bytes: u64,
    pub(crate) body_idle_ms: u32,
    pub(crate) head_timeout_ms: u32,
    pub(crate) first: Option<Frame<Bytes>>,
    /// Whether frames are kept for another attempt.
    pub(crate) keep: bool,
    pub(crate) gate: Option<Arc<ContinueGate>>,
    /// From when on the upload counts as a transfer.
    pub(crate) late_from_ms: u64,
}

impl RequestBody {
    pub(crate) fn new(incoming: Incoming, flight: Rc<Flight>, limits: RequestBodyLimits) -> Rc<Self> {
        Rc::new(Self {
            incoming: RefCell::new(Some(incoming)),
            flight,
            max_bytes: limits.max_bytes,
            body_idle_ms: limits.body_idle_ms,
            head_timeout_ms: limits.head_timeout_ms,
            first: RefCell::new(limits.first),
            early: RefCell::default(),
            kept: RefCell::new(limits.keep.then(Vec::new)),
            taken: Cell::new(false),
            ended: Cell::new(false),
            fault: Cell::new(None),
            gate: limits.gate,
            late_from_ms: Cell::new(limits.late_from_ms),
        })
    }

    /// A body for one more attempt, if nothing of it is lost.
    pub(crate) fn attempt(self: &Rc<Self>) -> Option<ForwardBody> {
        let whole = !self.taken.get() || self.kept.borrow().is_some();
        whole.then(|| ForwardBody::Stream { shared: Rc::clone(self), replayed: 0 })
    }

    /// From now on what is taken from the client is kept for another attempt. Too late when something was taken.
    pub(crate) fn keep(&self) {
        if !self.taken.get() {
            self.kept.borrow_mut().get_or_insert_default();
        }
    }

    /// What the client did wrong, if it did.
    pub(crate) fn fault(&self) -> Option<Reason> {
        self.fault.get()
    }

    /// Lets go of a body of which the client was not asked for a byte, because the answer is there
    /// already (a 417, a redirect). The client then knows that it need not send it.
    pub(crate) fn abandon_if_untouched(&self) -> bool {
        let untouched = self.gate.as_ref().is_some_and(|gate| !gate.is_open()) && !self.taken.get();
        if untouched {
            *self.incoming.borrow_mut() = None;
        }
        untouched
    }

    /// Whether it is a large body of which the client has more to send, for all that is known.
    pub(crate) fn is_far_from_its_end(&self) -> bool {
        let left = self.incoming.borrow().as_ref().map_or(0, |incoming| incoming.size_hint().lower());
        !self.ended.get() && self.flight.bytes_in.get().max(left) > MAX_KEPT_BYTES as u64
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.incoming.borrow().is_none()
    }

    /// Bytes of it that were taken from the client and are still here.
    pub(crate) fn kept_bytes(&self) -> u64 {
        let first = self.first.borrow().as_ref().and_then(Frame::data_ref).map_or(0, Bytes::len);
        let early = self.early.borrow().as_ref().map_or(0, |early| early.bytes());
        let kept: usize = self.kept.borrow().iter().flatten().map(Bytes::len).sum();
        (first + kept) as u64 + early
    }

    /// Takes in what is there, up to the limit and as far as there is room; what the client did wrong, if it did.
    pub(crate) fn take_early(&self, cx: &mut Context<'_>, ticket: &Ticket) -> Option<Reason> {
        if self.fault.get().is_some() || self.ended.get() || self.gate.as_ref().is_some_and(|g| !g.is_open())
        {
            return self.fault.get();
        }
        let mut slot = self.incoming.borrow_mut();
        let (Some(incoming), mut early) = (&mut *slot, self.early.borrow_mut()) else { return None };
        let early = early.get_or_insert_default();
        while !incoming.is_end_stream() && early.bytes() < MAX_EARLY_BODY_BYTES {
            // How large the next frame is comes to light with it: room is asked for before, and what is too much given back.
            let left = incoming.size_hint().exact();
            let reserved = left.map_or(EARLY_FRAME_BYTES, |left| left.min(EARLY_FRAME_BYTES));
            if !ticket.reserve(reserved) {
                break;
            }
            let polled = Pin::new(&mut *incoming).poll_frame(cx);
            let Poll::Ready(Some(Ok(frame))) = polled else {
                ticket.settle(reserved, 0);
                if let Poll::Ready(Some(Err(error))) = polled {
                    self.fault.set(Some(client_fault(&error)));
                }
                break;
            };
            ticket.settle(reserved, early.push(frame));
        }
        self.fault.get()
    }

    fn poll_client(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if let Some(fault) = self.fault.get() {
            return Poll::Ready(Some(Err(Broken(fault))));
        }
        if self.ended.get() {
            return Poll::Ready(None);
        }
        if let Some(gate) = &self.gate {
            std::task::ready!(gate.poll_open(cx));
        }
        let first = self.first.borrow_mut().take();
        let first = first.or_else(|| self.early.borrow_mut().as_mut().and_then(|early| early.pop()));
        if let Some(first) = first {
            return Poll::Ready(Some(self.pass(first)));
        }
        let mut slot = self.incoming.borrow_mut();
        let Some(incoming) = &mut *slot else {
            // The connection ends with the answer; until then it is to wait.
            return Poll::Pending;
        };
        let polled = Pin::new(incoming).poll_frame(cx);
        drop(slot);
        match polled {
            Poll::Pending => {
                if self.flight.waits.get() != Waits::RequestBody {
                    self.flight.wait(Waits::RequestBody, self.body_idle_ms);
                }
                Poll::Pending
            }
            Poll::Ready(None) => {
                self.end();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                let reason = client_fault(&error);
                self.fault.set(Some(reason));
                Poll::Ready(Some(Err(Broken(reason))))
            }
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(self.pass(frame))),
        }
    }

    fn pass(&self, mut frame: Frame<Bytes>) -> Result<Frame<Bytes>, Broken> {
        self.taken.set(true);
        if let Some(data) = frame.data_ref() {
            let total = self.flight.bytes_in.get() + data.len() as u64;
            self.flight.bytes_in.set(total);
            if self.max_bytes > 0 && total > self.max_bytes {
                self.fault.set(Some(Reason::BodyTooLarge));
                return Err(Broken(Reason::BodyTooLarge));
            }
            if self.late_from_ms.get() != 0 && self.flight.core.coarse_now_ms() > self.late_from_ms.get() {
                self.late_from_ms.set(0);
                self.flight.reclassify(TrafficClass::Transfer);
            }
            let mut kept = self.kept.borrow_mut();
            if total > MAX_KEPT_BYTES as u64 {
                *kept = None;
            }
            if let Some(kept) = &mut *kept {
                kept.push(data.clone());
            }
        }
        if let Some(trailers) = frame.trailers_mut() {
            headers::clean_trailers(trailers);
            if let Some(rules) = self.flight.service.borrow().as_ref().and_then(|entry| entry.rules.as_ref())
            {
                rules.clean_trailers(trailers);
            }
            *self.kept.borrow_mut() = None;
        }
        if self.is_at_end() {
            self.end();
        } else {
            // Until it is asked for the next frame, the upstream is the one who has to move.
            self.flight.wait(Waits::UpstreamReads, self.body_idle_ms);
        }
        Ok(frame)
    }

    fn is_at_end(&self) -> bool {
        self.first.borrow().is_none()
            && self.early.borrow().as_ref().is_none_or(|early| early.is_empty())
            && self.incoming.borrow().as_ref().is_some_and(Incoming::is_end_stream)
    }

    fn end(&self) {
        self.ended.set(true);
        if self.flight.status.get() == 0 {
            self.flight.wait(Waits::Head, self.head_timeout_ms);
        }
    }
}

/// Looks at what of a chunked body came with the head. A body that is malformed from the start is
/// refused before any upstream hears of the request.
///
/// # Errors
/// The client's fault.
pub(crate) fn first_frame(incoming: &mut Incoming) -> Result<Option<Frame<Bytes>>, Reason> {
    match Pin::new(incoming).poll_frame(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Some(Ok(frame))) => Ok(Some(frame)),
        Poll::Ready(Some(Err(error))) => Err(client_fault(&error)),
        Poll::Ready(None) | Poll::Pending => Ok(None),
    }
}

/// A client that breaks its own framing is told apart from one that has gone.
fn client_fault(error: &hyper::Error) -> Reason {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                std::io::ErrorKind::InvalidData | std::io::ErrorKind::InvalidInput => Reason::BadRequestBody,
                _ => Reason::ClientClosed,
            };
        }
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            let rubbish = h2.is_library() && h2.reason() == Some(h2::Reason::PROTOCOL_ERROR);
            return if rubbish { Reason::BadRequestBody } else { Reason::ClientClosed };
        }
        source = cause.source();
    }
    Reason::ClientClosed
}

impl Body for ForwardBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Stream { shared, replayed } => {
                let kept = shared.kept.borrow().as_ref().and_then(|kept| kept.get(*replayed).cloned());
                if let Some(data) = kept {
                    *replayed += 1;
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                let polled = shared.poll_client(cx);
                if matches!(&polled, Poll::Ready(Some(Ok(frame))) if frame.is_data()) {
                    *replayed += 1;
                }
                polled
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream { shared, replayed } => {
                let kept = shared.kept.borrow().as_ref().map_or(0, Vec::len);
                (shared.ended.get() || shared.is_at_end()) && *replayed >= kept
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream { shared, .. } if shared.taken.get() => SizeHint::default(),
            Self::Stream { shared, .. } => {
                shared.incoming.borrow().as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
            }
        }
    }
}

// --- answer ---------------------------------------------------------------------------------------------

/// What hyper's server sends as a body. Holds the flight until its last frame.
pub(crate) enum ReplyBody {
    /// A page of the edge itself.
    Page(Option<Bytes>, #[expect(dead_code, reason = "ends the flight when dropped")] Option<FlightGuard>),
    /// No body at all; the flight ends with the head.
    Empty(#[expect(dead_code, reason = "ends the flight when dropped")] FlightGuard),
    /// The upstream's body.
    Stream(FlightGuard),
}

/// The upstream's half of an answer. Kept in the flight, so that the timekeeper and a cut can drop it
/// although the client takes nothing.
pub(crate) struct UpstreamBody {
    pub(crate) source: Source,
    pub(crate) body_idle_ms: u32,
    /// The class that it gets if it goes on beyond `late_from_ms`; 0 is never.
    pub(crate) late_class: TrafficClass,
    pub(crate) late_from_ms: u64,
    /// Where the messages of a call end.
    pub(crate) messages: Option<Messages>,
    /// It is compressed on its way.
    pub(crate) compressing: Option<Box<Compressing>>,
}

impl UpstreamBody {
    /// A piece has come, and more will: it is the client's turn.
    fn goes_on(&mut self, flight: &Flight) {
        flight.wait(Waits::Client, self.body_idle_ms);
        if self.late_from_ms != 0 && flight.core.coarse_now_ms() > self.late_from_ms {
            self.late_from_ms = 0;
            flight.reclassify(self.late_class);
        }
    }
}

/// Where an answer's body comes from.
pub(crate) enum Source {
    Http1(Box<Http1Conn>, Rc<UpstreamPool>),
    /// A stream of an HTTP/2 connection.
    Http2(Incoming, #[expect(dead_code, reason = "counts the stream until dropped")] Http2Ticket),
    /// Answers of this kind have no content, whatever the upstream has sent.
    Nothing,
}

/// An upstream's body that broke off.
struct BrokeOff;

impl Source {
    fn poll(&mut self, cx: &mut Context<'_>) -> PolledFrame<BrokeOff> {
        match self {
            Self::Http1(conn, _) => conn.poll_frame(cx).map_err(|_| BrokeOff),
            Self::Http2(incoming, _) => Pin::new(incoming).poll_frame(cx).map_err(|_| BrokeOff),
            Self::Nothing => Poll::Ready(None),
        }
    }

    /// The next piece of the body past us, if it can go that way.
    #[inline]
    fn poll_spliced(&mut self, flight: &Flight, cx: &mut Context<'_>) -> Option<PolledFrame<BrokeOff>> {
        match self {
            Self::Http1(conn, _) if !flight.conn.http2.get() && !flight.conn.is_tls() => {
                let spliced = conn.poll_spliced(cx, &flight.core.splicer, &flight.conn.in_pipe)?;
                Some(spliced.map_err(|_| BrokeOff))
            }
            _ => None,
        }
    }

    pub(crate) fn is_end(&self) -> bool {
        match self {
            Self::Http1(conn, _) => conn.is_end(),
            Self::Http2(incoming, _) => incoming.is_end_stream(),
            Self::Nothing => true,
        }
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(conn, _) => conn.size_hint(),
            Self::Http2(incoming, _) => incoming.size_hint(),
            Self::Nothing => SizeHint::with_exact(0),
        }
    }

    /// The whole body has been read: the connection is free.
    pub(crate) fn done(self) {
        if let Self::Http1(conn, pool) = self {
            pool.give_back(conn);
        }
    }
}

/// Where the events of a `text/event-stream` end: after a blank line (WHATWG HTML, "Parsing an event stream";
/// a line ends with LF, CR or both).
#[derive(Debug)]
pub(crate) struct Events {
    /// Nothing of the present line has passed.
    line_is_empty: bool,
    after_cr: bool,
    /// What has passed are whole events.
    between: bool,
    /// It reads like text that begins as an event does; `None` before the first byte. In a stream that is
    /// encoded (gzip), blank lines mean nothing.
    is_plain: Option<bool>,
}

impl Default for Events {
    fn default() -> Self {
        Self { line_is_empty: true, after_cr: false, between: true, is_plain: None }
    }
}

impl Events {
    /// Of a stream that says that it is encoded: it ends by itself or is cut.
    pub(crate) fn encoded() -> Self {
        Self { is_plain: Some(false), ..Self::default() }
    }

    /// Whether the stream may end here.
    const fn is_between(&self) -> bool {
        self.between && !matches!(self.is_plain, Some(false))
    }

    /// Follows bytes on their way. If the stream is `closing`, they are shortened to the end of the event
    /// that is under way; says whether that has come.
    fn pass(&mut self, data: &mut Bytes, closing: bool) -> bool {
        if self.is_plain.is_none() && !data.is_empty() {
            self.is_plain = Some(begins_an_event(data));
        }
        for (at, byte) in data.iter().enumerate() {
            match byte {
                b'\n' if self.after_cr => self.after_cr = false,
                b'\n' | b'\r' => {
                    self.between = self.line_is_empty;
                    self.line_is_empty = true;
                    self.after_cr = *byte == b'\r';
                }
                0..0x20 if *byte != b'\t' => self.is_plain = Some(false),
                _ => (self.line_is_empty, self.after_cr, self.between) = (false, false, false),
            }
            if closing && self.is_between() {
                data.truncate(at + 1);
                return true;
            }
        }
        false
    }
}

/// Whether a stream that begins so is one of events in plain text.
fn begins_an_event(data: &[u8]) -> bool {
    const BEGINNINGS: [&[u8]; 8] =
        [b"data", b"event", b"id", b"retry", b":", b"\n", b"\r", "\u{feff}".as_bytes()];
    BEGINNINGS.iter().any(|beginning| data.starts_with(beginning))
}

impl ReplyBody {
    fn poll_stream(flight: &Rc<Flight>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let mut slot = flight.body.borrow_mut();
        let Some(body) = &mut *slot else {
            let ended = flight.complete.get();
            let reason = flight.reason.get().unwrap_or(Reason::Internal);
            return Poll::Ready(if ended { None } else { Some(Err(Broken(reason))) });
        };
        if body.compressing.is_some() {
            return Self::poll_compressed(flight, &mut slot, cx);
        }
        let closing = flight.is_closing() && body.source.size_hint().exact().is_none();
        let mut events = flight.events.borrow_mut();
        if closing && events.as_ref().is_some_and(|events| events.is_between()) {
            end_politely(flight, &mut slot);
            return Poll::Ready(None);
        }
        let calls_off = flight.is_closing() || flight.is_cut();
        if let Some(messages) = body.messages.as_ref().filter(|_| calls_off)
            && (messages.is_between() || flight.is_cut())
        {
            end_politely(flight, &mut slot);
            return Poll::Ready(Some(Ok(Frame::trailers(unavailable()))));
        }
        let spliced = if events.is_none() { body.source.poll_spliced(flight, cx) } else { None };
        match spliced.unwrap_or_else(|| body.source.poll(cx)) {
            Poll::Pending => {
                if flight.is_expired() {
                    return fail(flight, &mut slot, flight.timeout_reason(), cx);
                }
                flight.note_waker(cx);
                // Nothing more is taken from the upstream before the client has taken what is in the pipe.
                let waits = if flight.conn.in_pipe.is_filled() { Waits::Client } else { Waits::Body };
                if flight.waits.get() != waits {
                    flight.wait(waits, body.body_idle_ms);
                }
                Poll::Pending
            }
            Poll::Ready(Some(Ok(mut frame))) => {
                let mut ended = false;
                if let Some(data) = frame.data_mut() {
                    if let Some(events) = &mut *events {
                        ended = events.pass(data, closing);
                    }
                    if let Some(messages) = &mut body.messages {
                        if calls_off {
                            data.truncate(messages.pass_message(data));
                        } else {
                            messages.pass(data);
                        }
                    }
                    flight.bytes_out.set(flight.bytes_out.get() + data.len() as u64);
                }
                if let Some(trailers) = frame.trailers_mut() {
                    headers::clean_trailers(trailers);
                }
                drop(events);
                if ended {
                    end_politely(flight, &mut slot);
                } else if body.source.is_end() && !(calls_off && body.messages.is_some()) {
                    complete(flight, &mut slot);
                } else {
                    body.goes_on(flight);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_))) => broke_off(flight, &mut slot, cx),
            Poll::Ready(None) => {
                complete(flight, &mut slot);
                Poll::Ready(None)
            }
        }
    }

    /// Takes pieces of the upstream's until something comes out of them. What is there is given when no more is.
    fn poll_compressed(
        flight: &Rc<Flight>,
        slot: &mut Option<UpstreamBody>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        for _ in 0..MAX_PIECES_IN_A_ROW {
            let Some(body) = slot else { return Poll::Ready(None) };
            let UpstreamBody { source, compressing: Some(compressing), body_idle_ms, .. } = body else {
                return Poll::Ready(None);
            };
            if compressing.ended {
                let trailers = compressing.trailers.take();
                complete(flight, slot);
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
            }
            let polled = if source.is_end() { Poll::Ready(None) } else { source.poll(cx) };
            let out = match polled {
                Poll::Pending if flight.is_expired() => {
                    return fail(flight, slot, flight.timeout_reason(), cx);
                }
                Poll::Pending => {
                    let out = compressing.flush();
                    if matches!(out, Ok(None)) {
                        flight.note_waker(cx);
                        if flight.waits.get() != Waits::Body {
                            flight.wait(Waits::Body, *body_idle_ms);
                        }
                        return Poll::Pending;
                    }
                    out
                }
                Poll::Ready(Some(Err(_))) => return broke_off(flight, slot, cx),
                Poll::Ready(None) => compressing.finish(),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => compressing.pass(&data),
                    Err(frame) => {
                        let mut trailers = frame.into_trailers().unwrap_or_default();
                        headers::clean_trailers(&mut trailers);
                        compressing.trailers = Some(trailers);
                        compressing.finish()
                    }
                },
            };
            let Ok(out) = out else { return fail(flight, slot, Reason::Internal, cx) };
            let (ended, trailers) = (compressing.ended, compressing.trailers.is_some());
            let Some(out) = out else { continue };
            flight.bytes_out.set(flight.bytes_out.get() + out.len() as u64);
            if ended && !trailers {
                complete(flight, slot);
            } else {
                body.goes_on(flight);
            }
            return Poll::Ready(Some(Ok(Frame::data(out))));
        }
        // Much has gone in and nothing come out: others have their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// An upstream's answer ended before its end.
fn broke_off<T>(flight: &Flight, slot: &mut Option<UpstreamBody>, cx: &Context<'_>) -> Poll<T> {
    // Its head was counted as an answer; one that was an error is one already.
    if flight.status.get() < 500 {
        flight.record(Outcome::Failed(Failure::Reset));
    } else {
        flight.strike();
    }
    fail(flight, slot, Reason::UpstreamBodyAborted, cx)
}

fn complete(flight: &Flight, slot: &mut Option<UpstreamBody>) {
    flight.complete.set(true);
    if let Some(body) = slot.take() {
        // On a connection of HTTP/2 the last piece may have to wait for its client's window.
        flight.wait(Waits::Client, body.body_idle_ms);
        body.source.done();
    }
}

/// Ends an answer that has no end of its own at a place where the client loses nothing.
fn end_politely(flight: &Flight, slot: &mut Option<UpstreamBody>) {
    flight.soft_close_lease();
    flight.complete.set(true);
    // Not given back: the upstream has more to say on this connection.
    *slot = None;
}

fn unavailable() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    grpc::say_unavailable(&mut trailers, "the server is being replaced: call again");
    trailers
}

/// Lets go of the upstream, and breaks the answer off at the next poll: hyper drops what it holds when
/// a body fails, and what came before the failure is to reach the client.
fn fail<T>(flight: &Flight, slot: &mut Option<UpstreamBody>, reason: Reason, cx: &Context<'_>) -> Poll<T> {
    flight.reason.set(Some(reason));
    *slot = None;
    cx.waker().wake_by_ref();
    Poll::Pending
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut *self {
            Self::Page(page, _) => Poll::Ready(page.take().map(|page| Ok(Frame::data(page)))),
            Self::Empty(_) => Poll::Ready(None),
            Self::Stream(guard) => Self::poll_stream(&guard.0, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Page(page, _) => page.is_none(),
            Self::Empty(_) => true,
            Self::Stream(guard) => guard.0.complete.get(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Page(page, _) => SizeHint::with_exact(page.as_ref().map_or(0, Bytes::len) as u64),
            Self::Empty(_) => SizeHint::with_exact(0),
            Self::Stream(guard) => {
                let body = guard.0.body.borrow();
                let as_it_is = body.as_ref().filter(|body| body.compressing.is_none());
                as_it_is.map_or_else(SizeHint::default, |body| body.source.size_hint())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes pieces, the last one while closing; what of that one goes on, if the stream ends in it.
    fn closing_in(pieces: &[&'static [u8]]) -> Option<Vec<u8>> {
        let mut events = Events::default();
        let (last, before) = pieces.split_last().expect("a piece");
        for piece in before {
            assert!(!events.pass(&mut Bytes::from_static(piece), false), "nobody closes");
        }
        let mut last = Bytes::from_static(last);
        events.pass(&mut last, true).then(|| last.to_vec())
    }

    #[test]
    fn a_closing_stream_ends_with_the_event_that_is_under_way() {
        for (pieces, end) in [
            (&[&b"data: 1\n\ndata: 2"[..], b"2\n\ndata: 3\n\n"][..], &b"2\n\n"[..]),
            (&[b"data: 1\r\n", b"\r\ndata: 2"], b"\r"),
            (&[b"data: 1\r\n\r", b"\ndata: 2\n\n"], b"\n"),
            (&[b"id: 1\r", b"data: 1\r\rdata"], b"data: 1\r\r"),
            (&[b": hello\n", b"\n"], b"\n"),
            (&["\u{feff}data: ü".as_bytes(), b"\n\n"], b"\n\n"),
        ] {
            assert_eq!(closing_in(pieces).as_deref(), Some(end), "{pieces:?}");
        }
    }

    #[test]
    fn a_stream_does_not_end_inside_an_event_nor_where_it_cannot_be_read() {
        for pieces in [
            &[&b"data: 1\n\ndata: 2"[..], b"2\ndata: 3\r\ndata"][..],
            &[b"\x1f\x8b\x08\x00zip", b"\n\n"],
            &[b"{\"not\": \"events\"}", b"\n\n"],
            &[b"data\0", b"\n\n"],
        ] {
            assert_eq!(closing_in(pieces), None, "{pieces:?}");
        }
    }

    #[test]
    fn an_encoded_stream_is_never_ended_early_not_even_before_its_first_byte() {
        let mut events = Events::encoded();
        assert!(!events.is_between());
        assert!(!events.pass(&mut Bytes::from_static(b"data: 1\n\n"), true));
    }

    #[test]
    fn a_stream_may_end_before_its_first_byte_and_between_two_events() {
        let mut events = Events::default();
        assert!(events.is_between());
        events.pass(&mut Bytes::from_static(b"data: 1"), false);
        assert!(!events.is_between());
        events.pass(&mut Bytes::from_static(b"\n\n"), false);
        assert!(events.is_between());
    }
}
