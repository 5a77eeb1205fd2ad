//! The tasks that serve a core's client connections. A task that has seen its connection to the end waits for the
//! next one: for a client that sends one request, a new task (kilobytes to allocate, to fill and to move) would be a
//! noticeable part of the work.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Poll, Waker};

use tokio::net::TcpStream;

use crate::conn::ConnState;
use crate::core::{ConnPlace, Conns, Core};
use crate::serve::{Servers, serve};

/// Tasks that wait for a connection, per core. Those that are too many end.
const MAX_RESTING: usize = 128;

/// A connection that is to be served.
struct Job {
    socket: TcpStream,
    state: Rc<ConnState>,
    place: ConnPlace,
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
    pub(crate) fn serve(self: &Rc<Self>, socket: TcpStream, peer: SocketAddr) {
        let core = &self.core;
        let state = ConnState::new(peer, core.config.trusts(peer.ip()), core.coarse_now_ms());
        // Counted at once, so that the acceptor knows how many there are.
        let place = Conns::add(core, &state);
        let job = Job { socket, state, place };
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
            serve(&self.core, &self.servers, job.socket, job.state).await;
            drop(job.place);
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
