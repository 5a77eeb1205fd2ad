//! Listening sockets: one per core and address (SO_REUSEPORT), so that the kernel spreads connections
//! and no core waits for another.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::core::Core;
use crate::crew::Crew;

/// Connections that the kernel holds until they are accepted; it is cut to `net.core.somaxconn`.
const BACKLOG: i32 = 4_096;
/// What the kernel takes for a client beyond what the network does. Without a bound it takes megabytes for each slow
/// client, and for minutes nobody can tell a slow client from one that has stopped.
const MAX_UNSENT_BYTES: u32 = 128 * 1024;
/// How long the kernel waits for the first byte before it hands a connection over without.
const SPEAKS_WITHIN_S: i32 = 1;
/// Pause after an error of `accept` that will not go away at once (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Binds one socket of a group that shares an address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it: one system call for all of them instead of one for each.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(MAX_UNSENT_BYTES)?;
    socket.bind(&address.into())?;
    // A client of HTTP speaks first: the kernel hands over connections with their first bytes, and keeps back those of
    // whom nothing comes.
    uapi::setsockopt(socket.as_raw_fd(), uapi::c::IPPROTO_TCP, uapi::c::TCP_DEFER_ACCEPT, &SPEAKS_WITHIN_S)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Tells a core's acceptors to stop.
#[derive(Default)]
pub(crate) struct Stop {
    asked: Cell<bool>,
    told: Notify,
}

impl Stop {
    pub(crate) fn ask(&self) {
        self.asked.set(true);
        self.told.notify_waiters();
    }
}

/// Accepts until it is told to stop; then takes what is in the queue already, because closing the
/// socket would reset those clients.
pub(crate) async fn accept(core: Rc<Core>, crew: Rc<Crew>, listener: TcpListener, stop: Rc<Stop>) {
    let limit = (core.config.limits.max_connections as usize).div_ceil(core.config.core_count());
    while !stop.asked.get() {
        let told = stop.told.notified();
        if stop.asked.get() {
            break;
        }
        if core.conns.len() >= limit {
            tokio::select! {
                () = core.conns.ended.notified() => {}
                () = told => {}
            }
            continue;
        }
        let mut told = pin!(told);
        let turn = poll_fn(|cx| {
            // All that wait, in one turn.
            while core.conns.len() < limit {
                match listener.poll_accept(cx) {
                    Poll::Ready(Ok((socket, peer))) => crew.serve(socket, peer),
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
    poll_fn(|cx| {
        while let Poll::Ready(Ok((socket, peer))) = listener.poll_accept(cx) {
            crew.serve(socket, peer);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accepted_connection_sends_at_once_and_keeps_little_in_the_kernel() {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listener.set_nonblocking(false).unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.nodelay().unwrap());
        let accepted = Socket::from(accepted);
        assert_eq!(accepted.tcp_notsent_lowat().unwrap(), MAX_UNSENT_BYTES);
    }
}
