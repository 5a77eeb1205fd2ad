//! Gathers the records of origins that run where their files cannot be read afterwards.
//!
//! An origin connects once and sends its name, then one line per execution, before it answers. So a record is on its
//! way before the client can know of the request, and what is in the socket when the origin dies still arrives.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::origin::Record;

/// One record and the origin that sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// Name of the origin.
    pub instance: Arc<str>,
    /// What it executed.
    pub record: Record,
}

/// A listener for records. Stops when it is dropped.
#[derive(Debug)]
pub struct Collector {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    collected: Mutex<Vec<Collected>>,
    broken: Mutex<Vec<String>>,
    open: watch::Sender<usize>,
}

impl Collector {
    /// Listens on `listen`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(listen: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            collected: Mutex::default(),
            broken: Mutex::default(),
            open: watch::Sender::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared))).abort_handle();
        Ok(Self { addr, shared, accepting })
    }

    /// The address that it listens on.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Waits until every origin that connected has gone and its last line is here.
    pub async fn all_gone(&self) {
        let mut open = self.shared.open.subscribe();
        // The sender lives as long as `self`.
        let _still_here = open.wait_for(|open| *open == 0).await;
    }

    /// Every record so far, in order of arrival here.
    ///
    /// # Errors
    /// A line was not a record: every count would be a guess.
    pub fn collected(&self) -> Result<Vec<Collected>, String> {
        match lock(&self.shared.broken).first() {
            Some(line) => Err(line.clone()),
            None => Ok(lock(&self.shared.collected).clone()),
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut readers = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        shared.open.send_modify(|open| *open += 1);
        readers.spawn(read(stream, Arc::clone(&shared)));
        while readers.try_join_next().is_some() {}
    }
}

async fn read(stream: TcpStream, shared: Arc<Shared>) {
    let mut lines = BufReader::new(stream).lines();
    let mut instance: Option<Arc<str>> = None;
    // An origin that is killed may leave a torn last line, which ends the stream like any other end.
    while let Ok(Some(line)) = lines.next_line().await {
        match &instance {
            None => instance = Some(line.into()),
            Some(instance) => match line.parse() {
                Ok(record) => {
                    lock(&shared.collected).push(Collected { instance: Arc::clone(instance), record })
                }
                Err(why) => lock(&shared.broken).push(format!("{instance}: {why}: {line}")),
            },
        }
    }
    shared.open.send_modify(|open| *open -= 1);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
