//! Accepting: each core has listeners of its own, so that the kernel spreads connections and no core waits for another.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::core::Core;
use crate::crew::Crew;

/// Pause after an error of `accept` that will not go away at once (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What clients of an address speak first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP on clear text.
    #[default]
    Http,
    /// TLS, with HTTP in it.
    Https,
}

/// Addresses that nobody accepts on after a hand-over: who has the other sockets has no use for these.
#[derive(Clone, Debug, Default)]
pub struct Orphans(Arc<Mutex<Vec<SocketAddr>>>);

impl Orphans {
    /// To be said before the hand-over: what waits in the queues of these addresses is taken first.
    pub fn are(&self, addresses: Vec<SocketAddr>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    fn contain(&self, listener: &TcpListener) -> bool {
        let orphans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listener.local_addr().is_ok_and(|address| orphans.contains(&address))
    }
}

/// Tells a core's acceptors to stop.
#[derive(Default)]
pub(crate) struct Stop {
    asked: Cell<bool>,
    /// What waits in the queue is left to whoever has the same socket.
    leaves_queue: Cell<bool>,
    orphans: Orphans,
    told: Notify,
}

impl Stop {
    pub(crate) fn new(orphans: Orphans) -> Self {
        Self { orphans, ..Self::default() }
    }

    pub(crate) fn ask(&self, leaves_queue: bool) {
        self.leaves_queue.set(leaves_queue);
        self.asked.set(true);
        self.told.notify_waiters();
    }
}

/// Accepts until it is told to stop; then takes what is in the queue already, because closing the socket would reset
/// those clients, unless somebody else has the socket too.
pub(crate) async fn accept(
    core: Rc<Core>,
    crew: Rc<Crew>,
    (listener, speaks): (TcpListener, Speaks),
    stop: Rc<Stop>,
) {
    let limit = (core.config.limits.max_connections as usize).div_ceil(core.config.core_count());
    while !stop.asked.get() {
        let told = stop.told.notified();
        if stop.asked.get() {
            break;
        }
        if core.conns.len() >= limit {
            tokio::select! {
                () = core.conns.fewer_than(limit) => {}
                () = told => {}
            }
            continue;
        }
        let mut told = pin!(told);
        let turn = poll_fn(|cx| {
            // All that wait, in one turn.
            while core.conns.len() < limit {
                match listener.poll_accept(cx) {
                    Poll::Ready(Ok((socket, peer))) => crew.serve(socket, speaks, peer),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return told.as_mut().poll(cx).map(Ok),
                }
            }
            Poll::Ready(Ok(()))
        });
        if let Err(error) = turn.await {
            pause_after(&error).await;
        }
    }
    if stop.leaves_queue.get() && !stop.orphans.contain(&listener) {
        return;
    }
    poll_fn(|cx| {
        while let Poll::Ready(Ok((socket, peer))) = listener.poll_accept(cx) {
            crew.serve(socket, speaks, peer);
        }
        Poll::Ready(())
    })
    .await;
}

async fn pause_after(error: &io::Error) {
    // A client that left while it was waiting is nothing to pause for.
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        tracing::warn!(%error, "cannot accept connections; are there enough file descriptors (ulimit -n)?");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
