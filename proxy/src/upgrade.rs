//! Tunnels: what an upgraded connection (WebSocket or another protocol) is after its 101. Bytes pass both
//! ways, are counted, and keep the tunnel alive; silence, either side's end or a cut end it.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::error::Reason;
use crate::inflight::{FlightGuard, Waits};

/// What one direction holds at a time.
const BUFFER_BYTES: usize = 16 * 1024;

/// The upstream's half of a tunnel, on its way from the request to the connection's task.
pub(crate) struct Tunnel {
    pub(crate) socket: TcpStream,
    /// What the upstream sent right after its head.
    pub(crate) early: Bytes,
    pub(crate) guard: FlightGuard,
    pub(crate) idle_ms: u32,
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
    early: Bytes,
    state: PipeState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PipeState {
    Open,
    /// The reader has ended: pass that on.
    Closing,
    Closed,
}

impl Pipe {
    fn new(early: Bytes) -> Self {
        Self { buffer: vec![0; BUFFER_BYTES].into(), filled: 0..0, early, state: PipeState::Open }
    }

    /// Moves what can be moved. Ready when this direction is closed.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        moved: &mut u64,
    ) -> Poll<io::Result<()>> {
        loop {
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
            match self.state {
                PipeState::Closed => return Poll::Ready(Ok(())),
                PipeState::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.state = PipeState::Closed;
                }
                PipeState::Open => {
                    let mut buffer = ReadBuf::new(&mut self.buffer);
                    ready!(Pin::new(&mut *from).poll_read(cx, &mut buffer))?;
                    self.filled = 0..buffer.filled().len();
                    if self.filled.is_empty() {
                        self.state = PipeState::Closing;
                    }
                }
            }
        }
    }
}

/// Runs a tunnel to its end.
pub(crate) async fn run(mut client: TcpStream, early: Bytes, tunnel: Tunnel) {
    let Tunnel { socket: mut upstream, early: from_upstream, guard, idle_ms } = tunnel;
    let flight = &guard.0;
    let (mut up, mut down) = (Pipe::new(early), Pipe::new(from_upstream));
    flight.wait(Waits::Tunnel, idle_ms);
    let ended = poll_fn(|cx| {
        let (mut sent, mut received) = (0, 0);
        let up = up.poll(cx, &mut client, &mut upstream, &mut sent);
        let down = down.poll(cx, &mut upstream, &mut client, &mut received);
        if sent + received > 0 {
            flight.bytes_in.set(flight.bytes_in.get() + sent);
            flight.bytes_out.set(flight.bytes_out.get() + received);
            flight.wait(Waits::Tunnel, idle_ms);
        }
        if flight.is_cut() {
            return Poll::Ready(Some(Reason::UpstreamCut));
        }
        if flight.is_expired() {
            return Poll::Ready(Some(Reason::TunnelIdle));
        }
        flight.note_waker(cx);
        match (up, down) {
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => Poll::Ready(None),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(None),
            _ => Poll::Pending,
        }
    })
    .await;
    if ended == Some(Reason::UpstreamCut) {
        flight.cut_lease();
    }
    flight.reason.set(ended);
    flight.complete.set(true);
}
