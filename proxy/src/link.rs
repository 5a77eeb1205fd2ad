//! The socket to an HTTP/1.1 upstream, and what the request that has the connection and that socket tell
//! each other past hyper.
//!
//! *Down:* the field lines that the edge adds. They go in behind the request line as bytes; as entries of a
//! header map they would be hashed, stored, looked up and copied one by one.
//!
//! *Up:* interim responses (RFC 9110 §15.2). hyper reads over them, but a proxy has to pass them on:
//! `100 Continue` lets the request body go, and the others (`103 Early Hints`) are the client's. Looking at
//! the first bytes of an answer costs one comparison; hyper's own hook would cost three allocations for
//! every request.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use memchr::memmem;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::body::ContinueGate;
use crate::conn::ConnState;

/// Largest interim response that is passed on; a longer one is only read over.
const MAX_INTERIM_BYTES: usize = 8 * 1024;

/// Set anew for each request on the connection.
#[derive(Default)]
pub(crate) struct Link {
    /// Field lines for the next head that is written, each with its line end.
    pub(crate) lines: RefCell<Vec<u8>>,
    /// The head of an answer is waited for.
    waiting: Cell<bool>,
    /// Who gets them; nobody if the client speaks HTTP/1.0 or HTTP/2.
    client: RefCell<Option<Rc<ConnState>>>,
    gate: RefCell<Option<Arc<ContinueGate>>>,
}

impl Link {
    pub(crate) fn expect(&self, client: Option<Rc<ConnState>>, gate: Option<Arc<ContinueGate>>) {
        self.waiting.set(true);
        *self.client.borrow_mut() = client;
        *self.gate.borrow_mut() = gate;
    }

    fn pass(&self, head: &[u8]) {
        if head.get(9..12) == Some(b"100") {
            if let Some(gate) = &*self.gate.borrow() {
                gate.open();
            }
        } else if let Some(client) = &*self.client.borrow() {
            cleaned(head, &mut client.interim.borrow_mut());
            client.wake();
        }
    }

    fn done(&self) {
        self.waiting.set(false);
        *self.client.borrow_mut() = None;
        *self.gate.borrow_mut() = None;
    }
}

/// Copies a head without the fields that end here.
fn cleaned(head: &[u8], out: &mut Vec<u8>) {
    const OFF: [&[u8]; 8] = [
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"x-peregrine-reason",
    ];
    for line in head.split_inclusive(|b| *b == b'\n') {
        let name = line.split(|b| *b == b':').next().unwrap_or_default().trim_ascii();
        if !OFF.iter().any(|off| name.eq_ignore_ascii_case(off)) {
            out.extend_from_slice(line);
        }
    }
}

/// The socket under hyper's client.
pub(crate) struct UpstreamStream {
    socket: TcpStream,
    link: Rc<Link>,
    /// The beginning of an interim response whose end has not come.
    partial: Vec<u8>,
    /// A head with the added lines, as far as `unsent` is not empty; kept for its room.
    head: Vec<u8>,
    unsent: Range<usize>,
}

/// Up to this size a body that comes with its head is written with it.
const MAX_JOINED_BYTES: usize = 8 * 1024;

impl UpstreamStream {
    pub(crate) const fn new(socket: TcpStream, link: Rc<Link>) -> Self {
        Self { socket, link, partial: Vec::new(), head: Vec::new(), unsent: 0..0 }
    }

    /// The socket, unless a part of a head is still to be written to it.
    pub(crate) fn into_socket(self) -> Option<TcpStream> {
        self.unsent.is_empty().then_some(self.socket)
    }

    /// Takes a head over, with the added lines behind its first.
    fn take_head(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<()> {
        let mut lines = self.link.lines.borrow_mut();
        let first = slices.first().map_or(&[][..], |slice| slice);
        let end = memchr::memchr(b'\n', first).map(|at| at + 1).ok_or(io::ErrorKind::InvalidData)?;
        self.head.clear();
        self.head.extend_from_slice(&first[..end]);
        self.head.append(&mut lines);
        self.head.extend_from_slice(&first[end..]);
        slices[1..].iter().for_each(|slice| self.head.extend_from_slice(slice));
        self.unsent = 0..self.head.len();
        Ok(())
    }

    fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let rest = &self.head[self.unsent.clone()];
            let written = ready!(Pin::new(&mut self.socket).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.start += written;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes the head of a request with the lines that are added to it. What it takes it keeps, so that
    /// the answer is the number of bytes that were handed in, whatever the socket has taken.
    fn poll_write_head(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let slices = if total <= MAX_JOINED_BYTES { slices } else { &slices[..slices.len().min(1)] };
        let taken = slices.iter().map(|slice| slice.len()).sum();
        self.take_head(slices)?;
        match self.poll_unsent(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn look(&mut self, bytes: &[u8]) {
        if self.partial.is_empty() && !begins_interim(bytes) {
            self.link.done();
            return;
        }
        self.partial.extend_from_slice(bytes);
        while begins_interim(&self.partial) {
            let Some(end) = memmem::find(&self.partial, b"\r\n\r\n").map(|at| at + 4) else {
                if self.partial.len() > MAX_INTERIM_BYTES {
                    break;
                }
                return;
            };
            let rest = self.partial.split_off(end);
            self.link.pass(&self.partial);
            self.partial = rest;
        }
        if !self.partial.is_empty() {
            self.partial = Vec::new();
            self.link.done();
        }
    }
}

/// Whether these bytes are, or may become, an interim response other than 101.
fn begins_interim(bytes: &[u8]) -> bool {
    const START: &[u8] = b"HTTP/1.1 1";
    let common = bytes.len().min(START.len());
    bytes[..common] == START[..common] && !bytes.is_empty() && bytes.get(9..12) != Some(b"101")
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        if self.link.waiting.get() {
            self.look(&buf.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(cx))?;
        if !self.link.lines.borrow().is_empty() {
            return self.poll_write_head(cx, &[io::IoSlice::new(bytes)]);
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(cx))?;
        if !self.link.lines.borrow().is_empty() {
            return self.poll_write_head(cx, slices);
        }
        // One piece is the usual case, and cheaper as such.
        match slices {
            [one] => Pin::new(&mut self.socket).poll_write(cx, one),
            _ => Pin::new(&mut self.socket).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_unsent(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_unsent(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_start_of_an_interim_response_is_one() {
        for (bytes, is) in [
            (&b"HTTP/1.1 103 Early Hints"[..], true),
            (b"HTTP/1.1 1", true),
            (b"HTT", true),
            (b"HTTP/1.1 101 Switching", false),
            (b"HTTP/1.1 200 OK", false),
            (b"", false),
            (b"data", false),
        ] {
            assert_eq!(begins_interim(bytes), is, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn fields_that_end_here_are_not_in_what_is_passed_on() {
        let mut out = Vec::new();
        cleaned(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x\r\nContent-Length: 5\r\n\r\n",
            &mut out,
        );
        assert_eq!(out, b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
    }
}
