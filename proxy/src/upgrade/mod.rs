//! Tunnels: what an upgraded connection (WebSocket or another protocol) is after its 101. Bytes pass both
//! ways, are counted, and keep the tunnel alive; silence, either side's end or a cut end it.
//!
//! When its upstream leaves, a WebSocket is closed as its protocol wants it: each direction gets a `Close`
//! after the frame that is under way, from the only one who writes to it, and the answers are awaited. Other
//! protocols have no end that the edge could speak: they go on until they are cut.
//!
//! ```text
//!   a direction:   Open ─► Farewell ─► Done     the edge's `Close`; what its reader still sends goes nowhere
//!                    └───► Closing ──► Done     the end of its reader's connection, passed on
//! ```

pub(crate) mod frames;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use self::frames::{Frames, close_frame};
use crate::choose::service_of_now;
use crate::error::Reason;
use crate::inflight::{Flight, FlightGuard, Waits};
use crate::wire::Wire;

/// What one direction holds at a time.
const BUFFER_BYTES: usize = 16 * 1024;
/// How long a peer has to answer a `Close`: its network's round trip and its busy moment.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The upstream's half of a tunnel, on its way from the request to the connection's task.
pub(crate) struct Tunnel {
    pub(crate) socket: TcpStream,
    /// What the upstream sent right after its head.
    pub(crate) early: Bytes,
    pub(crate) guard: FlightGuard,
    pub(crate) idle_ms: u32,
    /// It is a WebSocket, whose frames are followed.
    pub(crate) websocket: bool,
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// One direction.
struct Pipe {
    buffer: Box<[u8]>,
    /// What was read and not written yet.
    filled: std::ops::Range<usize>,
    /// Written before what is in the buffer.
    early: Bytes,
    /// Written behind what is in the buffer, as the last of this direction.
    farewell: Bytes,
    state: PipeState,
    /// Follows what was read; `None` if it is no WebSocket.
    frames: Option<Frames>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PipeState {
    Open,
    /// The reader has ended: pass that on.
    Closing,
    /// The edge's own `Close` is the last that is written; what still comes is looked at for the reader's.
    Farewell,
    Done,
}

impl Pipe {
    fn new(early: Bytes, websocket: bool) -> Self {
        let frames = websocket.then(|| {
            let mut frames = Frames::default();
            frames.pass(&early);
            frames
        });
        Self {
            buffer: vec![0; BUFFER_BYTES].into(),
            filled: 0..0,
            early,
            farewell: Bytes::new(),
            state: PipeState::Open,
            frames,
        }
    }

    /// Whether a `Close` of its reader has come.
    fn has_closed(&self) -> bool {
        self.frames.as_ref().is_some_and(Frames::is_closed)
    }

    /// Whether its writer's peer has been sent the last byte that it may get: a `Close` or the end.
    fn is_said(&self) -> bool {
        let last = self.state != PipeState::Open || self.has_closed();
        last && self.early.is_empty() && self.filled.is_empty() && self.farewell.is_empty()
    }

    /// Whether nothing is awaited of its reader any more.
    fn is_over(&self) -> bool {
        self.is_said() && (self.state == PipeState::Done || self.has_closed())
    }

    /// Moves what can be moved. With a `farewell`, that is the last, behind the frame that is under way.
    /// Ready when this direction is done.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        moved: &mut u64,
        farewell: Option<&Bytes>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_write(cx, to, moved))?;
            match self.state {
                PipeState::Done => return Poll::Ready(Ok(())),
                PipeState::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.state = PipeState::Done;
                }
                PipeState::Open => {
                    if let Some(farewell) = farewell
                        && self.may_end()
                    {
                        self.end_with(farewell);
                        continue;
                    }
                    let read = ready!(self.poll_read(cx, from))?;
                    if read == 0 {
                        self.state = PipeState::Closing;
                    }
                    self.filled = 0..self.follow(read, farewell);
                }
                PipeState::Farewell => {
                    let read = ready!(self.poll_read(cx, from))?;
                    self.follow(read, None);
                    if read == 0 || self.has_closed() {
                        self.state = PipeState::Done;
                    }
                }
            }
        }
    }

    /// Whether a `Close` of the edge may follow what was read: a frame has ended, and it was no `Close`.
    fn may_end(&self) -> bool {
        self.frames.as_ref().is_some_and(|frames| frames.is_between() && !frames.is_closed())
    }

    fn end_with(&mut self, farewell: &Bytes) {
        self.farewell = farewell.clone();
        self.state = PipeState::Farewell;
    }

    /// Follows what was read. How much of it goes on: all, or the rest of the frame that a farewell waits for.
    fn follow(&mut self, read: usize, farewell: Option<&Bytes>) -> usize {
        let Some(frames) = &mut self.frames else { return read };
        let bytes = &self.buffer[..read];
        let Some(farewell) = farewell.filter(|_| !frames.is_closed()) else {
            frames.pass(bytes);
            return read;
        };
        let goes_on = frames.pass_frame(bytes);
        if self.may_end() {
            self.end_with(farewell);
            // Not passed on any more; but the reader's `Close` may be in it.
            if let Some(frames) = &mut self.frames {
                frames.pass(&self.buffer[goes_on..read]);
            }
        }
        goes_on
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut (impl AsyncWrite + Unpin),
        moved: &mut u64,
    ) -> Poll<io::Result<()>> {
        while !self.early.is_empty() {
            let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.early))?;
            self.early.advance(written);
            *moved += written as u64;
        }
        while !self.filled.is_empty() {
            let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.filled.clone()]))?;
            self.filled.start += written;
            *moved += written as u64;
        }
        while !self.farewell.is_empty() {
            let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.farewell))?;
            self.farewell.advance(written);
        }
        // What was taken may wait to be sealed with more, and more does not come now.
        Pin::new(to).poll_flush(cx)
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(&mut self.buffer);
        ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

/// The polite end of a WebSocket whose upstream leaves.
struct Leave {
    websocket: bool,
    /// Until the edge begins to close: tunnels that all end at once all come back at once.
    jitter: Option<Pin<Box<Sleep>>>,
    begun: bool,
    /// What ends each direction, towards the upstream and towards the client; empty when one side has begun
    /// to close by itself.
    farewells: Option<(Bytes, Bytes)>,
    /// Until the answers are waited for in vain.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Leave {
    /// Begins to close when that is asked for and the tunnel's moment has come.
    fn poll_begin(&mut self, cx: &mut Context<'_>, flight: &Flight, up: &Pipe, down: &Pipe) {
        if self.begun || !self.websocket || !flight.is_closing() {
            return;
        }
        let jitter = self.jitter.get_or_insert_with(|| {
            let spread_ms = u64::from(close_spread_ms(flight));
            let delay_ms = flight.core.random.next() % (spread_ms + 1);
            Box::pin(tokio::time::sleep(Duration::from_millis(delay_ms)))
        });
        if jitter.as_mut().poll(cx).is_pending() {
            return;
        }
        self.begun = true;
        if !up.has_closed() && !down.has_closed() {
            let [a, b, c, d, ..] = flight.core.random.next().to_be_bytes();
            self.farewells = Some((close_frame(Some([a, b, c, d])).into(), close_frame(None).into()));
        }
    }

    /// Ready when both sides have said that they close, or have had their time to.
    fn poll_end(&mut self, cx: &mut Context<'_>, up: &Pipe, down: &Pipe) -> Poll<()> {
        // Where one side has begun to close by itself, the other has to answer that.
        let awaited = self.farewells.is_none() || (up.is_said() && down.is_said());
        if !self.begun || !awaited {
            return Poll::Pending;
        }
        if up.is_over() && down.is_over() {
            return Poll::Ready(());
        }
        let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(CLOSE_TIMEOUT)));
        patience.as_mut().poll(cx)
    }
}

/// Time over which the closing of many tunnels is spread, as the table says when it is asked for: who was let in when
/// there was time leaves at once when others wait for that.
fn close_spread_ms(flight: &Flight) -> u32 {
    let entry = service_of_now(flight);
    entry.map_or(0, |entry| entry.service.policy().websocket_close_spread_ms)
}

/// How a tunnel came to its end.
enum Ended {
    /// By one of its sides.
    ByItself,
    /// By the edge, as its protocol wants it.
    Politely,
    Because(Reason),
}

/// Runs a tunnel to its end.
pub(crate) async fn run(mut client: Wire, early: Bytes, tunnel: Tunnel) {
    let Tunnel { socket: mut upstream, early: from_upstream, guard, idle_ms, websocket } = tunnel;
    let flight = &guard.0;
    let (mut up, mut down) = (Pipe::new(early, websocket), Pipe::new(from_upstream, websocket));
    let mut leave = Leave { websocket, jitter: None, begun: false, farewells: None, patience: None };
    flight.wait(Waits::Tunnel, idle_ms);
    let ended = poll_fn(|cx| {
        leave.poll_begin(cx, flight, &up, &down);
        let (mut sent, mut received) = (0, 0);
        let (to_upstream, to_client) = leave.farewells.as_ref().map(|(up, down)| (up, down)).unzip();
        let upwards = up.poll(cx, &mut client, &mut upstream, &mut sent, to_upstream);
        let downwards = down.poll(cx, &mut upstream, &mut client, &mut received, to_client);
        if sent + received > 0 {
            flight.bytes_in.set(flight.bytes_in.get() + sent);
            flight.bytes_out.set(flight.bytes_out.get() + received);
            flight.wait(Waits::Tunnel, idle_ms);
        }
        let said = leave.begun && up.is_said() && down.is_said();
        if leave.poll_end(cx, &up, &down).is_ready() || (said && flight.is_cut()) {
            return Poll::Ready(Ended::Politely);
        }
        if flight.is_cut() {
            return Poll::Ready(Ended::Because(Reason::UpstreamCut));
        }
        if flight.is_expired() {
            return Poll::Ready(Ended::Because(Reason::TunnelIdle));
        }
        flight.note_waker(cx);
        match (upwards, downwards) {
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) if said => Poll::Ready(Ended::Politely),
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => Poll::Ready(Ended::ByItself),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(Ended::ByItself),
            _ => Poll::Pending,
        }
    })
    .await;
    match ended {
        Ended::ByItself => {}
        Ended::Politely => flight.soft_close_lease(),
        Ended::Because(reason) => {
            if reason == Reason::UpstreamCut {
                flight.cut_lease();
            }
            flight.reason.set(Some(reason));
        }
    }
    flight.complete.set(true);
}
