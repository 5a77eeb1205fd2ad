//! Large bodies from socket to socket inside the kernel (`splice(2)`): no byte of them is copied to us.
//!
//! ```text
//!   upstream's socket ─► pipe ─► client's socket
//!                          │
//!   body ── frame of so many marker bytes ── hyper ── ClientStream: marker bytes? that many out of the pipe
//! ```
//!
//! hyper frames answers and knows nothing of this. What it is given for bytes that are in the pipe is a piece of
//! a buffer that nobody reads, the *marker*: as long as those bytes, and told apart by where it lies. The
//! stream below hyper writes the pipe's bytes in its place. Order is kept, because a pipe is filled
//! only when it is empty, and hyper keeps the order of what it is given.
//!
//! It is for bodies of a known length, from HTTP/1.1 to HTTP/1.1 on clear text; for everything else, and where no
//! pipe can be had, bytes are copied.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What is left of a body must be this much to begin: below, a copy costs less than two more system calls.
pub(crate) const MIN_SPLICED_BYTES: u64 = 64 * 1024;
/// Wanted size of a pipe, and most that is moved at a time.
const PIPE_BYTES: usize = 256 * 1024;
/// A smaller one (the kernel gives small ones to users who have many) would cost more than it saves.
const MIN_PIPE_BYTES: usize = 64 * 1024;
/// Empty pipes that a core keeps.
const MAX_SPARE_PIPES: usize = 32;

/// A core's pipes, and the marker that stands for what is in them.
pub(crate) struct Splicer {
    marker: Bytes,
    spare: RefCell<Vec<Pipe>>,
}

/// A pipe that nobody else knows.
#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

/// What of a connection's answer is in a pipe.
#[derive(Debug, Default)]
pub(crate) struct InPipe {
    pipe: RefCell<Option<Pipe>>,
    bytes: Cell<usize>,
    /// The body has been asked for more while there was something in the pipe.
    waits: Cell<bool>,
}

impl Splicer {
    pub(crate) fn new() -> Rc<Self> {
        // Never written to and never read: the kernel need not even give it memory.
        Rc::new(Self { marker: Bytes::from(vec![0; PIPE_BYTES]), spare: RefCell::default() })
    }

    /// Moves up to `left` bytes from an upstream into the pipe. Ready with the marker that stands for them, or
    /// with nothing at the end of the stream. `None` if there is no pipe: then bytes are to be copied.
    pub(crate) fn poll_fill(
        &self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        into: &InPipe,
        left: u64,
    ) -> Option<Poll<io::Result<Bytes>>> {
        if into.bytes.get() > 0 {
            into.waits.set(true);
            return Some(Poll::Pending);
        }
        let pipe = self.spare.borrow_mut().pop().or_else(Pipe::new)?;
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(pipe.capacity).min(PIPE_BYTES);
        let moved = loop {
            match from.poll_read_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
            match from.try_io(Interest::READABLE, || Ok(splice(from, None, &pipe.write, None, most, FLAGS)?))
            {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => break Poll::Ready(moved),
            }
        };
        Some(match moved {
            Poll::Ready(Ok(bytes)) if bytes > 0 => {
                into.bytes.set(bytes);
                *into.pipe.borrow_mut() = Some(pipe);
                Poll::Ready(Ok(self.marker.slice(..bytes)))
            }
            other => {
                self.keep(pipe);
                other.map_ok(|_end| Bytes::new())
            }
        })
    }

    /// Whether `bytes` stand for what is in a pipe.
    pub(crate) fn is_marker(&self, bytes: &[u8]) -> bool {
        self.marker.as_ptr_range().contains(&bytes.as_ptr())
    }

    /// Writes up to `length` bytes out of the pipe. Says in the second value whether the body waits for that.
    pub(crate) fn poll_drain(
        &self,
        cx: &mut Context<'_>,
        from: &InPipe,
        into: &TcpStream,
        length: usize,
    ) -> Poll<io::Result<(usize, bool)>> {
        let mut slot = from.pipe.borrow_mut();
        let Some(pipe) = &*slot else { return Poll::Ready(Err(io::ErrorKind::InvalidData.into())) };
        let most = length.min(from.bytes.get());
        let moved = loop {
            ready!(into.poll_write_ready(cx))?;
            match into.try_io(Interest::WRITABLE, || Ok(splice(&pipe.read, None, into, None, most, FLAGS)?)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => break moved?,
            }
        };
        from.bytes.set(from.bytes.get() - moved);
        if from.bytes.get() > 0 {
            return Poll::Ready(Ok((moved, false)));
        }
        if let Some(pipe) = slot.take() {
            self.keep(pipe);
        }
        Poll::Ready(Ok((moved, from.waits.take())))
    }

    /// Keeps an empty pipe for another time.
    fn keep(&self, pipe: Pipe) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < MAX_SPARE_PIPES {
            spare.push(pipe);
        }
    }
}

const FLAGS: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

impl InPipe {
    /// Whether something is in the pipe.
    pub(crate) const fn is_filled(&self) -> bool {
        self.bytes.get() > 0
    }
}

impl Pipe {
    /// `None` where the system has no more of them, or only small ones.
    fn new() -> Option<Self> {
        let (read, write) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES); // what came of it is asked next
        let capacity = fcntl_getpipe_size(&write).ok()?;
        (capacity >= MIN_PIPE_BYTES).then_some(Self { read, write, capacity })
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::{Read, Write};

    use super::*;

    /// A socket of ours and its peer.
    fn pair() -> (TcpStream, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        (TcpStream::from_std(ours).unwrap(), theirs)
    }

    #[tokio::test]
    async fn what_goes_into_the_pipe_comes_out_and_a_marker_stands_for_it() {
        let splicer = Splicer::new();
        let ((from, mut upstream), (into, mut client)) = (pair(), pair());
        let in_pipe = InPipe::default();
        upstream.write_all(b"0123456789").unwrap();
        let fill = |cx: &mut Context<'_>| splicer.poll_fill(cx, &from, &in_pipe, 8).expect("a pipe");
        let marker = poll_fn(fill).await.unwrap();
        assert_eq!(marker.len(), 8, "no more than is left of the body");
        assert!(
            splicer.is_marker(&marker) && splicer.is_marker(&marker[3..]) && !splicer.is_marker(b"01234567")
        );
        let waits = poll_fn(|cx| Poll::Ready(fill(cx).is_pending())).await;
        assert!(waits, "a pipe is filled only when it is empty");
        let drain = |length| {
            let (splicer, in_pipe, into) = (&splicer, &in_pipe, &into);
            poll_fn(move |cx| splicer.poll_drain(cx, in_pipe, into, length))
        };
        assert_eq!(drain(5).await.unwrap(), (5, false));
        assert_eq!(drain(3).await.unwrap(), (3, true), "the body waits for that");
        assert!(!in_pipe.is_filled());
        let mut came = [0; 8];
        client.read_exact(&mut came).unwrap();
        assert_eq!(&came, b"01234567");
        assert_eq!(splicer.spare.borrow().len(), 1, "the pipe is kept for the next one");
        drop(upstream);
        assert_eq!(poll_fn(fill).await.unwrap().len(), 2);
        drain(2).await.unwrap();
        assert!(poll_fn(fill).await.unwrap().is_empty(), "the end");
    }
}
