//! The new process's side: what it is given, and the process that gave it.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use peregrine_link::Before;
use peregrine_proxy::{Group, Speaks};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::VARIABLE;
use super::channel::{self, FORM, Hello, Word};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};

/// The process that starts this one has everything at hand.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// What a process of an edge begins with, if it takes over.
pub(crate) struct Inherited {
    /// The lock of the data folder, and who is beside it.
    pub(crate) before: Before,
    /// Listening sockets.
    pub(crate) groups: Vec<Group>,
    /// The socket for probes, and the address that it was asked for.
    pub(crate) admin: Option<(SocketAddr, TcpListener)>,
    /// Where upgrades are asked for.
    pub(crate) control: Option<UnixListener>,
    /// Whether the process before has an engine.
    pub(crate) connected: bool,
}

/// The process that this one takes over from, and those before it.
#[derive(Clone)]
pub(crate) struct Predecessor {
    stream: Arc<UnixStream>,
    /// They wait for the end of whoever serves, as the one does that this one takes over from.
    elders: Arc<[UnixStream]>,
}

/// What the process that started this one hands over; `None` if this one is to begin by itself.
pub(crate) fn inherited() -> Result<Option<(Inherited, Predecessor)>> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(None);
    }
    let failed = |error: io::Error| {
        let what = format!("{VARIABLE} is set, but nothing was handed over on standard input: {error}");
        Failure::new(Exit::Failed, "edge.hand_over", what)
            .hint("that variable is for `peregrine edge upgrade` alone: start the edge without it")
    };
    let stream = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from).map_err(failed)?;
    // Its end is told by the end of the last descriptor: standard input is not to be one.
    let nothing = File::open("/dev/null").map_err(failed)?;
    rustix::stdio::dup2_stdin(&nothing).map_err(|error| failed(error.into()))?;
    stream.set_read_timeout(Some(HELLO_WITHIN)).map_err(failed)?;
    let mut predecessor = Predecessor { stream: Arc::new(stream), elders: Arc::default() };
    match predecessor.receive() {
        Ok((inherited, elders)) => {
            predecessor.elders = elders.into();
            Ok(Some((inherited, predecessor)))
        }
        Err(error) => {
            predecessor.failed(&error.to_string());
            Err(failed(error))
        }
    }
}

impl Predecessor {
    fn receive(&self) -> io::Result<(Inherited, Vec<UnixStream>)> {
        let hello: Hello = channel::hear_blocking(&self.stream)?;
        if hello.form != FORM {
            return Err(io::Error::other(format!(
                "the edge that runs hands over in form {}, this program takes form {FORM}: stop that one and start this one",
                hello.form
            )));
        }
        let mut descriptors = channel::receive_descriptors(&self.stream, hello.descriptors()?)?.into_iter();
        let missing = || io::Error::other("a socket is missing");
        let mut next = || descriptors.next().ok_or_else(missing);
        let lock = File::from(next()?);
        let mut groups = Vec::with_capacity(hello.groups.len());
        for group in hello.groups {
            let sockets = (0..group.count).map(|_| next().map(TcpListener::from));
            let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
            if sockets.is_empty() {
                return Err(missing());
            }
            groups.push(Group {
                speaks: Speaks::default(),
                asked: group.asked,
                address: group.address,
                sockets,
            });
        }
        let admin = hello.admin.map(|asked| next().map(|fd: OwnedFd| (asked, fd.into()))).transpose()?;
        let control = hello.control.then(&mut next).transpose()?.map(UnixListener::from);
        let elders = (0..hello.elders).map(|_| next().map(UnixStream::from)).collect::<io::Result<_>>()?;
        let before = Before { lock, incarnations: hello.incarnations };
        Ok((Inherited { before, groups, admin, control, connected: hello.connected }, elders))
    }

    /// This end of the pairs with those that live: for the process that takes over from this one.
    pub(crate) fn living(&self) -> Vec<BorrowedFd<'_>> {
        self.all().filter(|stream| !has_ended(stream)).map(AsFd::as_fd).collect()
    }

    fn all(&self) -> impl Iterator<Item = &UnixStream> {
        std::iter::once(&*self.stream).chain(&*self.elders)
    }

    /// Says that this process cannot take over. That nobody hears it makes no difference.
    pub(crate) fn failed(&self, why: &str) {
        if let Err(error) = channel::say_blocking(&self.stream, &Word::Failed { why: why.to_owned() }) {
            tracing::debug!(%error, "the process before this one is gone");
        }
    }

    /// Says that this process accepts on every socket, and which of them are those of the other one, who closes the others.
    /// That he is gone already is seen by the one who waits for him.
    pub(crate) fn ready(&self, taken: &[SocketAddr]) {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let word = Word::Ready { version, taken: Some(taken.to_vec()) };
        if let Err(error) = channel::say_blocking(&self.stream, &word) {
            tracing::debug!(%error, "the process before this one is gone");
        }
    }

    /// Says to all of them that the edge is to end. That nobody hears it makes no difference.
    pub(crate) fn stopping(&self) {
        for stream in self.all() {
            if let Err(error) = channel::say_blocking(stream, &Word::Stopping) {
                tracing::debug!(%error, "a process before this one is gone");
            }
        }
    }

    /// What it waits for with.
    pub(crate) fn watch(&self) -> io::Result<Watch> {
        let stream = self.stream.try_clone()?;
        stream.set_nonblocking(true)?;
        Ok(Watch { stream: tokio::net::UnixStream::from_std(stream)? })
    }
}

/// Whether nobody is at the other end any more. To be asked once this process serves: then nothing is said there.
fn has_ended(stream: &UnixStream) -> bool {
    loop {
        let mut said = [0; 64];
        match recv(stream, &mut said, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return error != Errno::AGAIN,
        }
    }
}

/// Waits for the process before this one.
pub(crate) struct Watch {
    stream: tokio::net::UnixStream,
}

impl Watch {
    /// Waits until the process before accepts and writes no more, by its word or by its end.
    pub(crate) async fn hands_over(&mut self) {
        // What says anything means the same, and so does the end: nothing has to be taken out of the stream whole.
        let said = loop {
            let read = match self.stream.readable().await {
                Ok(()) => self.stream.try_read(&mut [0; 64]),
                Err(error) => Err(error),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => break read.unwrap_or(0),
            }
        };
        if said > 0 {
            tracing::info!("the process before this one has handed over");
        } else {
            tracing::info!("the process before this one has ended: this one serves alone");
        }
    }
}
