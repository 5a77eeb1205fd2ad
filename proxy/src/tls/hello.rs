//! Reading a hello (RFC 8446 §4.1.2) before anything is decided, and refusing one.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Poll, ready};

use peregrine_routing::canonical_host;
use rustls::server::{Accepted, Acceptor};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::net::TcpStream;

use rustix::net::RecvFlags;

use super::accept::Fault;

/// What is read at once: nearly every hello fits, with a post-quantum key share.
const READ_BYTES: usize = 4 * 1024;
/// Bytes on the wire until a hello has to be whole. A hello is 64 KiB at most; in small records it has more wrapping than
/// content.
const MAX_HELLO_BYTES: usize = 128 * 1024;
/// What a client may send behind its hello before it is answered: data that it hopes we take early, which we never do.
const MAX_BEYOND_BYTES: usize = 16 * 1024;
/// The protocol of a validation by a certificate authority (RFC 8737 §6.2).
pub(crate) const ACME_TLS: &[u8] = b"acme-tls/1";

/// Alerts that are said before there is a session (RFC 8446 §6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alert {
    InternalError = 80,
    UnrecognizedName = 112,
}

/// A hello.
pub(crate) struct Hello {
    pub(crate) accepted: Accepted,
    /// All that was read, as it came.
    pub(crate) raw: Vec<u8>,
    /// How much of it belongs to what follows the hello.
    pub(crate) beyond: usize,
}

impl Hello {
    /// The canonical form of the name that is asked for, if there is one.
    pub(crate) fn name(&self) -> Option<String> {
        let hello = self.accepted.client_hello();
        canonical_host(hello.server_name()?).ok().map(std::borrow::Cow::into_owned)
    }

    /// Whether a certificate authority asks, and nobody else.
    pub(crate) fn is_validation(&self) -> bool {
        let hello = self.accepted.client_hello();
        let Some(mut protocols) = hello.alpn() else { return false };
        protocols.next() == Some(ACME_TLS) && protocols.next().is_none()
    }
}

/// Reads until the hello is whole.
pub(crate) async fn read(socket: &mut TcpStream) -> Result<Hello, Fault> {
    let mut acceptor = Acceptor::default();
    let mut raw = at_hand(socket).ok_or(Fault::Left)?;
    let mut fed = 0;
    loop {
        while fed < raw.len() {
            let mut fresh = &raw[fed..];
            acceptor.read_tls(&mut fresh).map_err(Fault::Broke)?;
            fed = raw.len() - fresh.len();
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let beyond = raw.len() - fed;
                    return Ok(Hello { accepted, raw, beyond });
                }
                Ok(None) => {}
                Err((error, mut alert)) => {
                    say(socket, |out| alert.write_all(out));
                    return Err(Fault::Hello(error));
                }
            }
        }
        if raw.len() > MAX_HELLO_BYTES {
            return Err(Fault::TooLong);
        }
        let before = raw.len();
        poll_fn(|cx| {
            let mut chunk = [MaybeUninit::uninit(); READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut chunk);
            ready!(Pin::new(&mut *socket).poll_read(cx, &mut buffer))?;
            raw.extend_from_slice(buffer.filled());
            Poll::Ready(io::Result::Ok(()))
        })
        .await
        .map_err(Fault::Broke)?;
        if raw.len() == before {
            return Err(Fault::Left);
        }
    }
}

/// Resolves when there is no use in an answer to this hello any more. What else comes meanwhile is kept for the handshake.
pub(crate) async fn until_gone(socket: &TcpStream, hello: &mut Hello) -> Fault {
    loop {
        if let Err(error) = socket.ready(Interest::READABLE).await {
            return Fault::Broke(error);
        }
        let before = hello.raw.len();
        match socket.try_read_buf(&mut hello.raw) {
            Ok(0) => return Fault::Left,
            Ok(_) => hello.beyond += hello.raw.len() - before,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Fault::Broke(error),
        }
        if hello.beyond > MAX_BEYOND_BYTES {
            return Fault::TooLong;
        }
    }
}

/// What has come already (see `serve::at_hand`): nearly always the whole hello.
fn at_hand(socket: &TcpStream) -> Option<Vec<u8>> {
    let mut chunk = [MaybeUninit::uninit(); READ_BYTES];
    match rustix::net::recv(socket, &mut chunk[..], RecvFlags::empty()) {
        Ok((_, 0)) => None,
        Ok(((bytes, _), _)) => Some(bytes.to_vec()),
        Err(_) => Some(Vec::new()),
    }
}

/// Refuses: a fatal alert in a record of its own, and no more.
pub(crate) fn refuse(socket: &TcpStream, alert: Alert) {
    const FATAL: u8 = 2;
    let record = [21, 3, 3, 0, 2, FATAL, alert as u8];
    // Best effort: who does not read it finds the connection closed.
    drop(socket.try_write(&record));
}

/// Says what rustls has to say.
pub(crate) fn say(socket: &TcpStream, write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) {
    let mut out = Vec::new();
    if write(&mut out).is_ok() && !out.is_empty() {
        drop(socket.try_write(&out));
    }
}
