//! The socket to an HTTP/1.1 upstream, with an eye on interim responses (RFC 9110 §15.2).
//!
//! hyper reads over them, but a proxy has to pass them on: `100 Continue` lets the request body go, and
//! the others (`103 Early Hints`) are the client's. Looking at the first bytes of an answer costs one
//! comparison; hyper's own hook would cost three allocations for every request.

use std::cell::{Cell, RefCell};
use std::io;
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

/// What to do with interim responses; set anew for each request on the connection.
#[derive(Default)]
pub(crate) struct Interims {
    /// The head of an answer is waited for.
    waiting: Cell<bool>,
    /// Who gets them; nobody if the client speaks HTTP/1.0 or HTTP/2.
    client: RefCell<Option<Rc<ConnState>>>,
    gate: RefCell<Option<Arc<ContinueGate>>>,
}

impl Interims {
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
    interims: Rc<Interims>,
    /// The beginning of an interim response whose end has not come.
    partial: Vec<u8>,
}

impl UpstreamStream {
    pub(crate) const fn new(socket: TcpStream, interims: Rc<Interims>) -> Self {
        Self { socket, interims, partial: Vec::new() }
    }

    pub(crate) fn into_socket(self) -> TcpStream {
        self.socket
    }

    fn look(&mut self, bytes: &[u8]) {
        if self.partial.is_empty() && !begins_interim(bytes) {
            self.interims.done();
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
            self.interims.pass(&self.partial);
            self.partial = rest;
        }
        if !self.partial.is_empty() {
            self.partial = Vec::new();
            self.interims.done();
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
        if self.interims.waiting.get() {
            self.look(&buf.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // One piece is the usual case, and cheaper as such.
        match slices {
            [one] => Pin::new(&mut self.socket).poll_write(cx, one),
            _ => Pin::new(&mut self.socket).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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
