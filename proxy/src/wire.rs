//! What a client's bytes pass through: a bare socket, or one with a TLS session.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::tls::TlsStream;

/// A client's connection.
pub(crate) enum Wire {
    /// Clear text.
    Clear(TcpStream),
    /// TLS. Boxed: most of what a session is would be moved around with clear-text connections otherwise.
    Tls(Box<TlsStream>),
}

impl Wire {
    /// Ready when the client has sent something, or has left.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Clear(socket) => socket.poll_read_ready(cx),
            Self::Tls(stream) => stream.poll_readable(cx),
        }
    }

    /// Sends what fits at once. Best effort, for the last word to somebody who may not listen.
    pub(crate) fn try_say(&mut self, bytes: &[u8]) {
        let cx = &mut Context::from_waker(Waker::noop());
        if Pin::new(&mut *self).poll_write(cx, bytes).is_ready() {
            drop(Pin::new(self).poll_flush(cx));
        }
    }

    /// Says over TLS that nothing more comes, as far as that can be sent at once. On clear text the end says itself.
    pub(crate) fn try_end(&mut self) {
        if let Self::Tls(stream) = self {
            drop(stream.poll_close(&mut Context::from_waker(Waker::noop())));
        }
    }
}

impl AsyncRead for Wire {
    #[inline]
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Clear(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    #[inline]
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Clear(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Clear(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Clear(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
        }
    }
}
