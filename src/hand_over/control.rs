//! The socket in an edge's data folder at which an upgrade is asked for. Whoever may write there may ask: that is the edge's
//! own user, and root.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};

/// Its name in the data folder.
const SOCKET: &str = "edge.sock";
/// Longest line: the path of a program.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// Longest time for the question to come.
const QUESTION_WITHIN: Duration = Duration::from_secs(5);
/// Longest time for the answer to come: longer than the new process may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
/// Pause after a failed accept (out of file descriptors): the next one would fail at once too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The question.
#[derive(Debug, Serialize, Deserialize)]
struct Question {
    /// The program that takes over; none is the one that this edge was started as.
    binary: Option<PathBuf>,
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// Another process serves.
    Upgraded {
        /// It.
        pid: u32,
        /// Its version.
        version: String,
    },
    /// The one that was there goes on.
    Failed {
        /// Why.
        why: String,
    },
}

/// An upgrade that was asked for.
pub(crate) struct Asked {
    /// The program, if it is another one than that of this process.
    pub(crate) binary: Option<PathBuf>,
    /// Where it is told how it went; none for a signal.
    pub(crate) reply: Option<oneshot::Sender<std::result::Result<(u32, String), String>>>,
}

/// The socket, and whoever answers at it.
pub(crate) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Control {
    /// Opens it in a data folder of which the lock is held, or takes the one that was handed over.
    pub(crate) fn open(data: &Path, before: Option<UnixListener>) -> io::Result<Self> {
        let path = data.join(SOCKET);
        let listener = match before {
            Some(listener) => listener,
            None => {
                // What is there is of a process that has ended: its lock is ours.
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => UnixListener::bind(&path)?,
                }
            }
        };
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// What is handed on.
    pub(crate) const fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Nobody is answered here any more, by any process.
    pub(crate) fn remove(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "the socket for upgrades was removed by somebody else");
        }
    }

    /// Answers until it is dropped.
    pub(crate) fn answer(&self, asked: mpsc::Sender<Asked>) -> io::Result<JoinSet<()>> {
        let listener = tokio::net::UnixListener::from_std(self.listener.try_clone()?)?;
        let mut answering = JoinSet::new();
        answering.spawn(async move {
            loop {
                match listener.accept().await {
                    // Not one of ours: an answer that is under way is given also when nobody is answered any more.
                    Ok((stream, _)) => drop(tokio::spawn(answer_one(stream, asked.clone()))),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept who asks for an upgrade");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
        Ok(answering)
    }
}

async fn answer_one(stream: UnixStream, asked: mpsc::Sender<Asked>) {
    let mut stream = BufReader::new(stream);
    let question = tokio::time::timeout(QUESTION_WITHIN, read::<Question>(&mut stream)).await;
    let answer = match question {
        Ok(Ok(question)) => {
            let (reply, told) = oneshot::channel();
            let one = Asked { binary: question.binary, reply: Some(reply) };
            let outcome = match asked.try_send(one) {
                Ok(()) => told.await.unwrap_or_else(|_| Err("the edge is ending".to_owned())),
                Err(_) => Err("an upgrade is under way, or the edge is ending".to_owned()),
            };
            outcome
                .map_or_else(|why| Answer::Failed { why }, |(pid, version)| Answer::Upgraded { pid, version })
        }
        _ => Answer::Failed { why: "that was no question".to_owned() },
    };
    if let Err(error) = write(stream.get_mut(), &answer).await {
        tracing::debug!(%error, "whoever has asked for an upgrade is gone");
    }
}

async fn read<T: serde::de::DeserializeOwned>(stream: &mut BufReader<UnixStream>) -> io::Result<T> {
    let mut line = Vec::new();
    stream.take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
    Ok(serde_json::from_slice(&line)?)
}

async fn write(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

/// Asks the edge of a data folder to be taken over: the process that serves then, and its version.
pub(crate) async fn ask(data: &Path, binary: Option<PathBuf>) -> Result<(u32, String)> {
    let path = data.join(SOCKET);
    let stream = UnixStream::connect(&path).await.map_err(|error| {
        let what = format!("no edge answers at {}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::PermissionDenied => Failure::new(Exit::Auth, "edge.upgrade_denied", what)
                .hint("ask as the user that the edge runs as, or as root"),
            _ => Failure::new(Exit::NotFound, "edge.not_running", what)
                .hint("is it running, and is that its data folder (--data)?"),
        }
    })?;
    let mut stream = BufReader::new(stream);
    let conversation = async {
        write(stream.get_mut(), &Question { binary }).await?;
        read::<Answer>(&mut stream).await
    };
    let failed = |why: &str| {
        Failure::new(Exit::Failed, "edge.upgrade_failed", format!("not upgraded: {why}"))
            .hint("the process that was there goes on serving; what the new one said is in the edge's log")
    };
    match tokio::time::timeout(ANSWER_WITHIN, conversation).await {
        Ok(Ok(Answer::Upgraded { pid, version })) => Ok((pid, version)),
        Ok(Ok(Answer::Failed { why })) => Err(failed(&why)),
        Ok(Err(error)) => Err(failed(&format!("the edge has ended: {error}"))),
        Err(_) => Err(failed("there was no answer in time")),
    }
}
