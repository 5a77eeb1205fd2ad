//! A handshake from its first byte to its end.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use peregrine_routing::{DomainSpec, TlsMode};
use rustls::{HandshakeKind, ServerConfig};
use tokio::net::TcpStream;

use super::certificates::Missing;
use super::client::ClientIdentity;
use super::hello::{self, Alert, Hello};
use super::metrics::Result as Told;
use super::passthrough::Passed;
use super::places::{Network, Place};
use super::settings::{H2, SettingsKey};
use super::stream::TlsStream;
use super::{Session, awaited, challenge, passthrough};
use crate::conn::{ConnState, Kill};
use crate::core::Core;
use crate::detect::Detected;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("the client has left")]
    Left,
    #[error("the connection broke: {0}")]
    Broke(io::Error),
    #[error("what came is no hello: {0}")]
    Hello(rustls::Error),
    #[error("a hello that does not end")]
    TooLong,
    #[error("a name that is nobody's")]
    UnknownName,
    #[error("a name whose certificate is not there")]
    NoCertificate,
    /// The client and this edge could not agree, or the client did not prove what it has to.
    #[error("no agreement: {0}")]
    Handshake(io::Error),
    #[error("the time for it is over")]
    Cut,
}

/// What a handshake came to.
enum Shaken {
    /// A session, for this domain.
    Session(Box<TlsStream>, Arc<DomainSpec>),
    /// A certificate authority has seen what it wanted to see.
    Validated,
    /// The service speaks TLS itself.
    PassThrough(Passed),
}

/// Shakes hands with a client. `None` if there is nothing more to do; the client has been told why as far as TLS has words.
pub(crate) async fn accept(
    core: &Rc<Core>,
    state: &Rc<ConnState>,
    socket: TcpStream,
) -> Option<(Box<TlsStream>, Detected)> {
    let metrics = &core.tls.metrics;
    metrics.begun();
    let mut drains = false;
    let work = shake_hands(core, state, socket);
    let result = unless_cut(state, &mut drains, work).await.unwrap_or(Err(Fault::Cut));
    metrics.ended();
    state.handshaking.set(false);
    match result {
        Ok(Shaken::Session(stream, domain)) => {
            let session = stream.session();
            let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
            metrics.tell(Told::Done { version: session.protocol_version(), resumed });
            let is_h2 = session.alpn_protocol() == Some(H2);
            let client =
                session.peer_certificates().and_then(<[_]>::first).map(|der| ClientIdentity::of(der));
            // Set once: the connection is new.
            drop(state.session.set(Box::new(Session { domain, client })));
            state.head_since_ms.set(core.coarse_now_ms());
            if drains {
                state.kill(Kill::Drain);
            }
            Some((stream, if is_h2 { Detected::Http2 } else { Detected::Http1 }))
        }
        Ok(Shaken::Validated) => {
            metrics.tell(Told::Validated);
            None
        }
        Ok(Shaken::PassThrough(passed)) => {
            metrics.tell(Told::PassedThrough);
            passthrough::run(core, state, passed).await;
            None
        }
        Err(fault) => {
            metrics.tell(told(&fault));
            tracing::debug!(peer = %state.peer, %fault, "no TLS session");
            None
        }
    }
}

const fn told(fault: &Fault) -> Told {
    match fault {
        Fault::Left | Fault::Broke(_) => Told::Left,
        Fault::Hello(_) | Fault::TooLong | Fault::Handshake(_) => Told::Failed,
        Fault::UnknownName => Told::UnknownName,
        Fault::NoCertificate => Told::NoCertificate,
        Fault::Cut => Told::Cut,
    }
}

/// Runs a handshake until the core has had enough of it. One that stops lets it finish: its client is about to ask.
async fn unless_cut<T>(state: &ConnState, drains: &mut bool, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    poll_fn(|cx| {
        match state.asked(cx) {
            Kill::No | Kill::Rest => {}
            Kill::Drain => *drains = true,
            Kill::Idle | Kill::HeadTimeout | Kill::Abort => return Poll::Ready(None),
        }
        work.as_mut().poll(cx).map(Some)
    })
    .await
}

async fn shake_hands(core: &Rc<Core>, state: &ConnState, mut socket: TcpStream) -> Result<Shaken, Fault> {
    let mut hello = hello::read(&mut socket).await?;
    let name = hello.name();
    let mut domain = domain_of(core, name.as_deref());
    if hello.is_validation() {
        let digest = digest_of(core, name.as_deref());
        // A service that speaks TLS itself may have asked for it.
        let is_its_own = domain.as_ref().is_some_and(|domain| domain.policy.mode == TlsMode::PassThrough);
        if digest.is_some() || !is_its_own {
            return validated(core, state, socket, hello, name.as_deref().zip(digest)).await;
        }
    }
    if domain.as_deref().is_none_or(awaited::lacks_certificate)
        && let Some(name) = &name
    {
        // Rare, and the future of every handshake would be larger for it.
        let found = Box::pin(awaited::wait(core, state, &mut socket, &mut hello, name)).await?;
        domain = found.or(domain);
    }
    let Some(domain) = domain else {
        hello::refuse(&socket, Alert::UnrecognizedName);
        return Err(Fault::UnknownName);
    };
    if domain.policy.mode == TlsMode::PassThrough {
        let name = name.unwrap_or_default();
        return Ok(Shaken::PassThrough(Passed { socket, name, early: hello.raw }));
    }
    let Some(id) = domain.certificate else {
        hello::refuse(&socket, Alert::UnrecognizedName);
        return Err(Fault::NoCertificate);
    };
    let _place = place(core, state).await;
    let settings = match core.tls.shared.certificates.get(id, &domain, &SettingsKey::of(&domain)).await {
        Ok(settings) => settings,
        Err(Missing::Failed | Missing::Busy) => {
            hello::refuse(&socket, Alert::InternalError);
            return Err(Fault::NoCertificate);
        }
    };
    let stream = finish(socket, hello, settings).await?;
    Ok(Shaken::Session(stream, domain))
}

async fn place(core: &Core, state: &ConnState) -> Place {
    core.tls.places.enter(Network::of(state.peer.ip()), || core.tls.metrics.delayed()).await
}

/// A handshake with these settings, to its end.
async fn finish(
    socket: TcpStream,
    hello: Hello,
    settings: Arc<ServerConfig>,
) -> Result<Box<TlsStream>, Fault> {
    let Hello { accepted, raw, beyond } = hello;
    let session = match accepted.into_connection(settings) {
        Ok(session) => session,
        Err((error, mut alert)) => {
            hello::say(&socket, |out| alert.write_all(out));
            return Err(Fault::Handshake(io::Error::other(error)));
        }
    };
    let mut stream = Box::new(TlsStream::new(socket, session));
    stream.feed(&raw[raw.len() - beyond..]).map_err(Fault::Handshake)?;
    drop(raw);
    poll_fn(|cx| stream.poll_handshake(cx)).await.map_err(Fault::Handshake)?;
    Ok(stream)
}

/// Answers a certificate authority, if the table says that one is expected for this name.
async fn validated(
    core: &Core,
    state: &ConnState,
    socket: TcpStream,
    hello: Hello,
    expected: Option<(&str, [u8; 32])>,
) -> Result<Shaken, Fault> {
    let Some((name, digest)) = expected else {
        hello::refuse(&socket, Alert::UnrecognizedName);
        return Err(Fault::UnknownName);
    };
    let _place = place(core, state).await;
    let provider = core.tls.shared.certificates.provider();
    let settings = challenge::settings(name, digest, provider).map_err(Fault::Handshake)?;
    let mut stream = finish(socket, hello, settings).await?;
    // RFC 8737 §3: nothing but the handshake; what is left is said, and it is over.
    drop(poll_fn(|cx| stream.poll_close(cx)).await);
    Ok(Shaken::Validated)
}

/// What a validation of this name is answered with.
fn digest_of(core: &Core, name: Option<&str>) -> Option<[u8; 32]> {
    core.reader.borrow_mut().load().domains().tls_challenge(name?)
}

/// Whose name it is: a domain's, or that of those who are nobody's.
pub(crate) fn domain_of(core: &Core, name: Option<&str>) -> Option<Arc<DomainSpec>> {
    let mut reader = core.reader.borrow_mut();
    let domains = reader.load().domains();
    name.and_then(|name| domains.get(name)).or_else(|| domains.fallback()).map(Arc::clone)
}
