//! Names whose service speaks TLS itself: the hello has been read, for its name, and goes on as it came with everything
//! after it. The edge sees no request and holds no key.
//!
//! It is a tunnel like that of a WebSocket: a lease while it lasts, ended by silence, by either side, or by a cut. Where the
//! service asks for it, a header of the PROXY protocol goes before the hello: nothing else could say who the client is.

use std::rc::Rc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Version};
use peregrine_routing::RetryClass;
use tokio::net::TcpStream;

use super::hello::{self, Alert};
use crate::choose::Choice;
use crate::conn::ConnState;
use crate::core::{Core, ServiceEntry};
use crate::error::{ProxyError, Reason};
use crate::forward::{connect, find_service};
use crate::headers::Wishes;
use crate::hold;
use crate::inflight::{Flight, FlightGuard, HostText, Start};
use crate::route::Target;
use crate::rules;
use crate::upgrade::{self, Tunnel};
use crate::wire::Wire;

/// Upstreams that are tried.
const MAX_ATTEMPTS: u8 = 3;

/// A connection that is passed on.
pub(crate) struct Passed {
    pub(crate) socket: TcpStream,
    pub(crate) name: String,
    /// All that was read of it.
    pub(crate) early: Vec<u8>,
}

/// Passes a connection on, to its end.
pub(crate) async fn run(core: &Rc<Core>, state: &Rc<ConnState>, passed: Passed) {
    let Passed { socket, name, early } = passed;
    let guard = begin(core, state, &name);
    match upstream(core, &guard.0).await {
        Ok((upstream, entry)) => {
            let flight = &guard.0;
            flight.mark_sent();
            flight.status.set(StatusCode::OK.as_u16());
            let idle_ms = entry.service.policy().tunnel_idle_timeout_ms;
            let tunnel = Tunnel { socket: upstream, early: Bytes::new(), guard, idle_ms, websocket: false };
            upgrade::run(Wire::Clear(socket), early.into(), tunnel).await;
        }
        Err(reason) => {
            let flight = &guard.0;
            flight.reason.set(Some(reason));
            flight.status.set(reason.status_code());
            flight.complete.set(true);
            let unknown = reason == Reason::NoRoute;
            hello::refuse(&socket, if unknown { Alert::UnrecognizedName } else { Alert::InternalError });
        }
    }
}

/// In the log it is what a client would ask a proxy for to get such a tunnel (RFC 9110 §9.3.6).
fn begin(core: &Rc<Core>, state: &Rc<ConnState>, name: &str) -> FlightGuard {
    let host = HeaderValue::from_str(name).map_or(HostText::None, HostText::Field);
    let ids = core.ids.ids(&core.random, None, None);
    let (method, version) = (Method::CONNECT, Version::HTTP_11);
    let (client, path) = (state.peer_ip(), Some(PathAndQuery::from_static("/")));
    Flight::begin(core, state, Start { ids, method, version, client, host, path, agent: None })
}

async fn upstream(core: &Rc<Core>, flight: &Rc<Flight>) -> Result<(TcpStream, Rc<ServiceEntry>), Reason> {
    let path = PathAndQuery::from_static("/");
    let target = Target { host: flight.host.borrow().clone(), path, other_reading: None };
    let mut entry = find_service(core, &target)?;
    *flight.service.borrow_mut() = Some(Rc::clone(&entry));
    // The connection counts as one request.
    rules::check(core, &entry, flight, &HeaderMap::new())?;
    if entry.rules.as_ref().is_some_and(|rules| rules.asks_who()) {
        // Nobody can be asked inside of somebody else's TLS.
        return Err(Reason::AuthRequired);
    }
    let wishes = Wishes { upgrade: true, ..Wishes::default() };
    let mut choice = Choice::of(&entry.service, &HeaderMap::new(), flight, wishes);
    let (parts, ()) = Request::new(()).into_parts();
    loop {
        if entry.service.hold().is_some_and(|queue| queue.is_closed()) {
            hold::pass(core, &mut entry, flight, &parts, None).await?;
        }
        match choice.enter(core, &mut entry, flight) {
            Ok(Some(lease)) => flight.take_lease(lease),
            Ok(None) => continue,
            Err(reason) => {
                hold::note_unserved(&entry, reason);
                return Err(reason);
            }
        }
        flight.attempts.set(flight.attempts.get() + 1);
        let upstream = flight.upstream.borrow().clone().ok_or(Reason::NoUpstream)?;
        let error = match connect(core, &upstream, entry.service.policy(), flight).await {
            Ok(socket) => return Ok((socket, entry)),
            Err(error) => error,
        };
        give_up(flight, &error);
        if flight.attempts.get() >= MAX_ATTEMPTS || flight.is_cut() || !is_safe(&error) {
            return Err(error.reason);
        }
        choice.tried.extend(flight.generation());
        flight.release_lease();
    }
}

fn is_safe(error: &ProxyError) -> bool {
    // Nothing of the client's was written yet: only connecting can fail here.
    error.evidence.is_some_and(|evidence| evidence.class() == RetryClass::A)
}

fn give_up(flight: &Flight, error: &ProxyError) {
    if let Some(failure) = error.reason.failure() {
        flight.record(peregrine_routing::Outcome::Failed(failure));
    }
}
