//! A client's connection once its TLS session stands: plain bytes on one side, records on the other.
//!
//! What is written is sealed at once and sent when the protocol engine flushes, or when enough has come together: small
//! answers of several streams become one system call, and large bodies fill their records (RFC 8446 §5.1: 16 KiB). What is
//! read passes through room on the stack, as much as a record has: an upload costs one system call for each, not one for
//! each 4 KiB as rustls alone would read. When nothing more comes, the session lets go of what a large record has needed.

use std::io::{self, BufRead, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::ServerConnection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Sealed bytes that wait to be sent, at most. A multiple of whole records with what sealing adds to them.
const MAX_SEALED_BYTES: usize = 4 * (16 * 1024 + RECORD_ROOM_BYTES);
/// What sealing adds to a record: its header, type, tag, and in TLS 1.2 a nonce.
const RECORD_ROOM_BYTES: usize = 32;

/// What is read at once.
const READ_BYTES: usize = 16 * 1024;

/// A socket with a TLS session.
pub(crate) struct TlsStream {
    socket: TcpStream,
    session: ServerConnection,
    /// What was read and the session had no room for: seldom anything.
    unfed: Vec<u8>,
    /// The end has been said to the client (RFC 8446 §6.1).
    closing: bool,
    /// Bytes that the socket has taken.
    sent: u64,
}

impl TlsStream {
    pub(crate) fn new(socket: TcpStream, mut session: ServerConnection) -> Self {
        session.set_buffer_limit(Some(MAX_SEALED_BYTES));
        Self { socket, session, unfed: Vec::new(), closing: false, sent: 0 }
    }

    pub(crate) const fn session(&self) -> &ServerConnection {
        &self.session
    }

    /// Bytes that the client's system has been given so far.
    pub(crate) const fn sent(&self) -> u64 {
        self.sent
    }

    /// Ready when the client has sent something, or has left. Asked when the session has been read to its end.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unfed.is_empty() { self.socket.poll_read_ready(cx) } else { Poll::Ready(Ok(())) }
    }

    /// Gives the session what was read from the socket. What it cannot take before its plain bytes are read is kept.
    pub(crate) fn feed(&mut self, mut read: &[u8]) -> io::Result<()> {
        while !read.is_empty() {
            match self.session.read_tls(&mut read) {
                // What follows the end that the client has said is nobody's.
                Ok(0) => return Ok(()),
                Ok(_) => self.process()?,
                Err(_) if self.session.reader().fill_buf().is_ok() => {
                    self.unfed = read.to_vec();
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the handshake as far as the client has come. Ready when it is done; what is said last (session tickets)
    /// is sent with the first answer.
    pub(crate) fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.session.is_handshaking() {
            if let Poll::Ready(Err(error)) = self.poll_send(cx) {
                return Poll::Ready(Err(error));
            }
            if ready!(self.poll_receive(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what has been sealed.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Sender { socket: &mut self.socket, cx }) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(sent) => self.sent += sent as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes in what the client has sent. Called when the session has no plain bytes left; 0 is the end.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if !self.unfed.is_empty() {
            let unfed = std::mem::take(&mut self.unfed);
            return Poll::Ready(self.take_in(cx, &unfed));
        }
        let mut room = [MaybeUninit::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut room);
        let Poll::Ready(read) = Pin::new(&mut self.socket).poll_read(cx, &mut buffer) else {
            // It makes its room smaller when it is about to read, and has nothing left.
            drop(self.session.read_tls(&mut Nothing));
            return Poll::Pending;
        };
        read?;
        if buffer.filled().is_empty() {
            // So that the reader knows whether the client has said its end before.
            return Poll::Ready(self.session.read_tls(&mut io::empty()));
        }
        Poll::Ready(self.take_in(cx, buffer.filled()))
    }

    fn take_in(&mut self, cx: &mut Context<'_>, read: &[u8]) -> io::Result<usize> {
        let fed = self.feed(read);
        if fed.is_err() {
            // The alert that says why; the error is what counts.
            drop(self.poll_send(cx));
        }
        fed.map(|()| read.len())
    }

    fn process(&mut self) -> io::Result<()> {
        self.session
            .process_new_packets()
            .map(drop)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Says that nothing more comes, and sends what there is.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.closing, true) {
            self.session.send_close_notify();
        }
        self.poll_send(cx)
    }

    pub(crate) fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        loop {
            let taken = match slices {
                [one] => self.session.writer().write(one),
                _ => self.session.writer().write_vectored(slices),
            }?;
            if taken > 0 {
                return Poll::Ready(Ok(taken));
            }
            ready!(self.poll_send(cx))?;
        }
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = &mut *self;
        loop {
            match me.session.reader().fill_buf() {
                Ok(plain) => {
                    let taken = plain.len().min(buf.remaining());
                    buf.put_slice(&plain[..taken]);
                    me.session.reader().consume(taken);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            match me.poll_receive(cx) {
                // At the end of the stream the reader says which end it is.
                Poll::Ready(read) => _ = read?,
                Poll::Pending => {
                    // Tickets, and answers to what only concerns the session: nobody else will send them.
                    if let Poll::Ready(Err(error)) = me.poll_send(cx) {
                        return Poll::Ready(Err(error));
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, &[IoSlice::new(bytes)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_close(cx))?;
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Has nothing to read at present.
struct Nothing;

impl Read for Nothing {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// rustls writes as if it could wait; here "not now" is an error that it hands through.
struct Sender<'a, 'c> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'c>,
}

impl Write for Sender<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        or_would_block(Pin::new(&mut *self.socket).poll_write(self.cx, bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match slices {
            [one] => self.write(one),
            _ => or_would_block(Pin::new(&mut *self.socket).poll_write_vectored(self.cx, slices)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn or_would_block(polled: Poll<io::Result<usize>>) -> io::Result<usize> {
    match polled {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}
