//! The old process's side: the new one is started, given everything, and waited for.

use std::ffi::OsStr;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use peregrine_link::Before;
use peregrine_proxy::Sockets;
use tokio::process::{Child, Command};

use super::VARIABLE;
use super::channel::{self, FORM, Hello, Inbox, WireGroup, Word};

/// Longest time until the new process accepts. It reads its files and meets an engine meanwhile; nothing waits for it.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What is handed over.
pub(crate) struct Offer<'o> {
    pub(crate) before: Before,
    pub(crate) connected: bool,
    pub(crate) sockets: &'o Sockets,
    pub(crate) admin: Option<(SocketAddr, &'o TcpListener)>,
    pub(crate) control: Option<&'o UnixListener>,
    /// Our ends of the pairs with those before this process that live.
    pub(crate) elders: Vec<BorrowedFd<'o>>,
}

/// The process that takes over.
pub(crate) struct Heir {
    stream: tokio::net::UnixStream,
    inbox: Inbox,
    child: Child,
    pid: u32,
}

/// What a process says that accepts on every socket.
pub(crate) struct Ready {
    pub(crate) version: String,
    /// Addresses of which it has taken the sockets over; `None` is all of them.
    pub(crate) taken: Option<Vec<SocketAddr>>,
}

/// How whoever serves after this process ends: the one that has taken over, or those that it has handed over to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    /// It was told to stop.
    Stopped,
    /// By itself, or it was killed.
    Died,
}

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// The program that this process was started as, by the name that it was called by: what is there when an upgrade is asked
/// for. (The system's own link to it names the file that was there then.) To be called once before anything changes.
pub(crate) fn program() -> &'static Path {
    PROGRAM.get_or_init(|| {
        let called = std::env::args_os().next().unwrap_or_default();
        found(&called, std::env::var_os("PATH").as_deref())
            .or_else(|| std::env::current_exe().ok())
            .unwrap_or_else(|| PathBuf::from(called))
    })
}

fn found(called: &OsStr, path: Option<&OsStr>) -> Option<PathBuf> {
    let called = Path::new(called);
    if called.components().count() > 1 || called.is_absolute() {
        return std::path::absolute(called).ok();
    }
    std::env::split_paths(path?).map(|folder| folder.join(called)).find(|file| file.is_file())
}

/// Starts the new process and gives it everything. It is not waited for.
pub(crate) fn begin(program: &Path, offer: &Offer<'_>) -> io::Result<Heir> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).env(VARIABLE, "1").stdin(Stdio::from(OwnedFd::from(theirs)));
    let child = command.spawn()?;
    // With it goes our copy of their end: the end of theirs is to be seen.
    drop(command);
    let pid = child.id().ok_or_else(|| io::Error::other("it has ended at once"))?;
    offer.send(&ours)?;
    ours.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(ours)?;
    Ok(Heir { stream, inbox: Inbox::default(), child, pid })
}

impl Offer<'_> {
    fn send(&self, stream: &UnixStream) -> io::Result<()> {
        let groups = self.sockets.groups();
        let hello = Hello {
            form: FORM,
            incarnations: self.before.incarnations.clone(),
            connected: self.connected,
            groups: groups
                .iter()
                .map(|group| WireGroup {
                    asked: group.asked,
                    address: group.address,
                    count: group.sockets.len(),
                })
                .collect(),
            admin: self.admin.map(|(asked, _)| asked),
            control: self.control.is_some(),
            elders: self.elders.len(),
        };
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![self.before.lock.as_fd()];
        descriptors.extend(groups.iter().flat_map(|group| &group.sockets).map(AsFd::as_fd));
        descriptors.extend(self.admin.map(|(_, listener)| listener.as_fd()));
        descriptors.extend(self.control.map(AsFd::as_fd));
        descriptors.extend(&self.elders);
        channel::say_blocking(stream, &hello)?;
        channel::send_descriptors(stream, &descriptors)
    }
}

impl Heir {
    /// Its process.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it accepts on every socket, or says why it does not.
    pub(crate) async fn ready(&mut self) -> Result<Ready, String> {
        match tokio::time::timeout(READY_WITHIN, channel::hear::<Word>(&mut self.stream)).await {
            Ok(Ok(Word::Ready { version, taken })) => Ok(Ready { version, taken }),
            Ok(Ok(Word::Failed { why })) => Err(why),
            Ok(Ok(Word::Yours | Word::Stopping)) => Err("it says what it should not".to_owned()),
            Ok(Err(_)) => Err("it ended before it was ready; its last words are in the log".to_owned()),
            Err(_) => Err(format!("it was not ready within {} s", READY_WITHIN.as_secs())),
        }
    }

    /// Says that this process accepts and writes no more.
    pub(crate) async fn yours(&mut self) -> io::Result<()> {
        channel::say(&mut self.stream, &Word::Yours).await
    }

    /// Waits until nobody serves any more who comes after this process: the edge was told to stop, or the last of them has
    /// ended. Its end alone is not the end: it may have handed over, and then whoever serves has its end of the pair.
    /// Whoever waits may stop to, and wait again.
    pub(crate) async fn ends(&mut self) -> Ends {
        loop {
            match self.inbox.next(&self.stream).await.map(|word| serde_json::from_slice(&word)) {
                Ok(Ok(Word::Stopping)) => return Ends::Stopped,
                // Why it fails, which its end tells too, or what a later version says.
                Ok(word) => tracing::debug!(?word, "the process that has taken over says something else"),
                Err(error) => {
                    tracing::debug!(%error, "nobody is left who has taken over");
                    return Ends::Died;
                }
            }
        }
    }

    /// Ends it, if it has not ended by itself.
    pub(crate) async fn end(mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::debug!(%error, "the process that was to take over is gone");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_as_it_was_called() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("peregrine");
        std::fs::write(&file, "").expect("a file");
        let path = std::env::join_paths(["/nowhere".as_ref(), folder.path()]).expect("a path");
        assert_eq!(found("peregrine".as_ref(), Some(&path)), Some(file.clone()));
        assert_eq!(found("other".as_ref(), Some(&path)), None);
        assert_eq!(found(file.as_os_str(), None), Some(file.clone()));
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(found("target/peregrine".as_ref(), Some(&path)), Some(here.join("target/peregrine")));
    }
}
