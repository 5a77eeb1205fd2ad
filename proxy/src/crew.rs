//! The tasks that serve a core's client connections. A task that has seen its connection to the end waits for the
//! next one: for a client that sends one request, a new task (kilobytes to allocate, to fill and to move) would be a
//! noticeable part of the work.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::net::TcpStream;

use crate::conn::ConnState;
use crate::core::{ConnPlace, Conns, Core};
use crate::listen::Speaks;
use crate::proxy_protocol;
use crate::serve::{Servers, serve};
use crate::sources::SourcePlace;

/// Tasks that wait for a connection, per core. Those that are too many end.
const MAX_RESTING: usize = 128;

/// A connection that is to be served.
struct Job {
    socket: TcpStream,
    speaks: Speaks,
    state: Rc<ConnState>,
    place: ConnPlace,
    source: Option<SourcePlace>,
    /// Who it is for comes first, in a header of the PROXY protocol.
    is_introduced: bool,
}

/// Where a resting task is handed its next connection.
#[derive(Default)]
struct Seat {
    job: Cell<Option<Job>>,
    waker: RefCell<Option<Waker>>,
}

/// The tasks of one core.
pub(crate) struct Crew {
    core: Rc<Core>,
    servers: Rc<Servers>,
    resting: RefCell<Vec<Rc<Seat>>>,
}

impl Crew {
    pub(crate) fn new(core: Rc<Core>, servers: Rc<Servers>) -> Rc<Self> {
        Rc::new(Self { core, servers, resting: RefCell::default() })
    }

    /// Has a connection served to its end.
    pub(crate) fn serve(self: &Rc<Self>, socket: TcpStream, speaks: Speaks, peer: SocketAddr) {
        let core = &self.core;
        let is_introduced = core.config.speaks_proxy_protocol(peer.ip());
        let trusted = core.config.trusts(peer.ip());
        let Some(source) = source_of(core, peer, trusted || is_introduced) else { return };
        // It has one as long as it is connected, and who has left needs none.
        let local = socket.local_addr().unwrap_or_else(|_| (Ipv4Addr::UNSPECIFIED, 0).into());
        let state = ConnState::new(peer, local, trusted, core.coarse_now_ms());
        // Counted at once, so that the acceptor knows how many there are.
        let place = Conns::add(core, &state);
        state.handshaking.set(speaks == Speaks::Https);
        let job = Job { socket, speaks, state, place, source, is_introduced };
        let rested = self.resting.borrow_mut().pop();
        match rested {
            Some(seat) => {
                seat.job.set(Some(job));
                if let Some(waker) = &*seat.waker.borrow() {
                    waker.wake_by_ref();
                }
            }
            None => drop(tokio::task::spawn_local(Rc::clone(self).work(job))),
        }
    }

    async fn work(self: Rc<Self>, mut job: Job) {
        let seat = Rc::new(Seat::default());
        loop {
            // Rare, and the future of every connection would be larger for it.
            if !job.is_introduced || Box::pin(introduce(&self.core, &mut job)).await {
                serve(&self.core, &self.servers, job.socket, job.speaks, job.state).await;
            } else {
                drop(job.socket);
            }
            drop((job.place, job.source));
            {
                let mut resting = self.resting.borrow_mut();
                if resting.len() >= MAX_RESTING {
                    return;
                }
                resting.push(Rc::clone(&seat));
            }
            job = seat.next().await;
        }
    }
}

/// A place among the connections of a source; `None` if it may have no more. Who speaks for others needs none.
fn source_of(core: &Core, peer: SocketAddr, is_exempt: bool) -> Option<Option<SourcePlace>> {
    let Some(sources) = core.guards.sources.as_ref().filter(|_| !is_exempt) else { return Some(None) };
    let place = sources.enter(peer.ip());
    if place.is_none() {
        refused("source");
    }
    place.map(Some)
}

fn refused(reason: &'static str) {
    metrics::counter!("peregrine_edge_refused_connections_total", "reason" => reason).increment(1);
}

/// Reads whom a connection is for. False if that is not said, or if he may have no more connections.
async fn introduce(core: &Rc<Core>, job: &mut Job) -> bool {
    let timeout = Duration::from_millis(u64::from(core.config.limits.head_timeout_ms));
    let Ok(Ok(header)) = tokio::time::timeout(timeout, proxy_protocol::read(&mut job.socket)).await else {
        tracing::debug!(peer = %job.state.peer, "no header of the PROXY protocol");
        refused("proxy_protocol");
        return false;
    };
    let Some(client) = header.source else { return true };
    let trusted = core.config.trusts(client.ip());
    let Some(source) = source_of(core, client, trusted) else { return false };
    job.source = source;
    let local = header.destination.unwrap_or(job.state.local);
    let state = ConnState::new(client, local, trusted, core.coarse_now_ms());
    state.handshaking.set(job.speaks == Speaks::Https);
    // What was asked of it while the header came.
    state.takes_over(&job.state);
    job.state = state;
    job.place.replace(&job.state);
    true
}

impl Seat {
    async fn next(&self) -> Job {
        poll_fn(|cx| {
            if let Some(job) = self.job.take() {
                return Poll::Ready(job);
            }
            let mut waker = self.waker.borrow_mut();
            if waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }
}
