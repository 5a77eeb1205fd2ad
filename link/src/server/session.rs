//! One connection of an edge.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use peregrine_routing::{
    Change, EdgeId, Generation, Publication, RemoteEdge, RoutingTable, TrafficClass, Upstream,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{Edge, GREETING_TIMEOUT_MS, Shared};
use crate::authority::fingerprint;
use crate::registry::now;
use crate::token::hex;
use crate::wire::{
    self, Attach, Down, FrameError, Greeting, MAX_FRAME_BYTES, MAX_GREETING_BYTES, Reply, Up, WireTally,
};

/// Frames that wait to be written; who says more waits for room.
const MAX_QUEUED_FRAMES: usize = 256;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the handshake failed: {0}")]
    Handshake(std::io::Error),
    #[error("no greeting in time")]
    Timeout,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("refused: {0}")]
    Refused(String),
    #[error("it said what it may not say now: {0}")]
    OutOfPlace(&'static str),
    #[error("it was replaced, removed or given up")]
    Replaced,
    #[error("it cannot be written to")]
    Unwritable,
    #[error("it ends in order")]
    Left,
}

pub(super) async fn serve(shared: &Arc<Shared>, acceptor: &TlsAcceptor, stream: TcpStream, peer: SocketAddr) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let limit = Duration::from_millis(GREETING_TIMEOUT_MS);
    let greeted = tokio::time::timeout(limit, greet(acceptor, stream)).await;
    let ended = match greeted {
        Err(_) => Err(Ended::Timeout),
        Ok(Err(ended)) => Err(ended),
        Ok(Ok((stream, Greeting::Join { version, secret, public_key }))) => {
            join(shared, stream, version, &secret, public_key).await
        }
        Ok(Ok((stream, Greeting::Attach(attach)))) => attach_edge(shared, stream, peer, &attach).await,
    };
    if let Err(why) = ended {
        tracing::info!(%peer, %why, "a connection of an edge has ended");
    }
}

async fn greet(acceptor: &TlsAcceptor, stream: TcpStream) -> Result<(TlsStream<TcpStream>, Greeting), Ended> {
    let mut stream = acceptor.accept(stream).await.map_err(Ended::Handshake)?;
    let greeting = wire::read(&mut stream, MAX_GREETING_BYTES).await?;
    Ok((stream, greeting))
}

async fn refuse(mut stream: TlsStream<TcpStream>, code: &str, message: String) -> Ended {
    let reply = Reply::Refused { code: code.to_owned(), message: message.clone() };
    let limit = Duration::from_millis(GREETING_TIMEOUT_MS);
    let told = async {
        wire::write(&mut stream, &reply).await?;
        stream.shutdown().await.map_err(FrameError::from)
    };
    if let Ok(Err(error)) = tokio::time::timeout(limit, told).await {
        tracing::debug!(%error, "an edge that was refused did not wait for the reason");
    }
    Ended::Refused(message)
}

fn speaks(version: u16) -> Result<(), String> {
    if version == wire::VERSION {
        return Ok(());
    }
    Err(format!(
        "the edge speaks version {version} of the link, this engine {}: bring both to the same release",
        wire::VERSION
    ))
}

async fn join(
    shared: &Arc<Shared>,
    mut stream: TlsStream<TcpStream>,
    version: u16,
    secret: &[u8],
    public_key: Vec<u8>,
) -> Result<(), Ended> {
    if let Err(why) = speaks(version) {
        return Err(refuse(stream, "link.version", why).await);
    }
    let (name, certificate) = match shared.registry.admit(&shared.authority, secret, public_key) {
        Ok(admitted) => admitted,
        Err(error) => return Err(refuse(stream, "join.refused", error.to_string()).await),
    };
    shared.take_in(&name);
    tracing::info!(edge = %name, "an edge has joined");
    let reply = Reply::Joined { name, certificate, authority: shared.authority.certificate().to_vec() };
    wire::write(&mut stream, &reply).await?;
    stream.shutdown().await.map_err(FrameError::from)?;
    Ok(())
}

async fn attach_edge(
    shared: &Arc<Shared>,
    mut stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    attach: &Attach,
) -> Result<(), Ended> {
    if let Err(why) = speaks(attach.version) {
        return Err(refuse(stream, "link.version", why).await);
    }
    let certificates = stream.get_ref().1.peer_certificates();
    let print =
        certificates.and_then(|chain| chain.first()).map(|certificate| hex(&fingerprint(certificate)));
    let Some(name) = print.and_then(|print| shared.name_of(&print)) else {
        let why = "this edge is not in the registry: it was removed, or has not joined".to_owned();
        return Err(refuse(stream, "edge.unknown", why).await);
    };
    if attach.epoch > shared.config.epoch {
        let why = format!(
            "this engine is of epoch {}, and the edge has heard one of epoch {}: another engine leads",
            shared.config.epoch, attach.epoch
        );
        tracing::error!(edge = %name, %why, "an edge refuses this engine");
        return Err(refuse(stream, "engine.outdated", why).await);
    }
    let reply = Reply::Attached { epoch: shared.config.epoch, lease_ms: shared.config.lease_ms };
    wire::write(&mut stream, &reply).await?;
    let Some((remote, end)) = shared.attach(&name, peer, attach) else { return Err(Ended::Replaced) };
    tracing::info!(edge = %name, %peer, "an edge is connected");
    let (down, frames) = mpsc::channel(MAX_QUEUED_FRAMES);
    let session = Session { shared: Arc::clone(shared), name, remote, down, end: Arc::clone(&end) };
    let ended = session.run(stream, frames).await;
    let Err(ended) = ended else { return Ok(()) };
    session.over(&ended);
    Err(ended)
}

impl Shared {
    fn name_of(&self, print: &str) -> Option<String> {
        let edges = self.edges();
        edges.iter().find(|(_, edge)| edge.record.fingerprint == print).map(|(name, _)| name.clone())
    }

    /// A fresh record: whoever had that name before is shut out.
    fn take_in(&self, name: &str) {
        let Ok(records) = self.registry.edges() else { return };
        let Some((_, record)) = records.into_iter().find(|(known, _)| known == name) else { return };
        let replaced = self.edges().insert(name.to_owned(), Edge::new(record));
        if let Some((_, end)) = replaced.and_then(|edge| edge.session) {
            end.notify_one();
        }
    }

    /// Gives a connected edge its place; `None` if it was removed meanwhile.
    fn attach(
        &self,
        name: &str,
        peer: SocketAddr,
        attach: &Attach,
    ) -> Option<(Arc<RemoteEdge>, Arc<Notify>)> {
        let mut edges = self.edges();
        let edge = edges.get_mut(name)?;
        let end = Arc::new(Notify::new());
        if let Some((_, before)) = edge.session.replace((peer, Arc::clone(&end))) {
            before.notify_one();
        }
        let same = edge.remote.as_ref().filter(|remote| remote.id() == EdgeId(attach.incarnation));
        let (remote, replaced) = match same {
            Some(remote) => (Arc::clone(remote), None),
            // Another process of the same edge: what the one before had out died with it.
            None => {
                let cores = attach.cores as usize;
                let fresh = self.reader.join(EdgeId(attach.incarnation), &name.into(), cores);
                let fresh = Arc::new(fresh);
                (Arc::clone(&fresh), edge.remote.replace(fresh))
            }
        };
        edge.seen = Instant::now();
        (edge.lost, edge.problem) = (false, None);
        edge.record.incarnation = Some(attach.incarnation);
        edge.record.cores = attach.cores;
        edge.record.seen_at = now();
        edge.record.away = false;
        let record = edge.record.clone();
        drop(edges);
        // Before it is told anything: an engine that starts again has to wait for it.
        self.keep(name, &record);
        drop(replaced);
        Some((remote, end))
    }

    /// Runs on the edge of this session, unless another one has taken its place.
    fn with_edge(&self, name: &str, end: &Arc<Notify>, work: impl FnOnce(&mut Edge)) {
        let mut edges = self.edges();
        let ours = |edge: &&mut Edge| edge.session.as_ref().is_some_and(|(_, other)| Arc::ptr_eq(end, other));
        if let Some(edge) = edges.get_mut(name).filter(ours) {
            work(edge);
        }
    }
}

struct Session {
    shared: Arc<Shared>,
    name: String,
    remote: Arc<RemoteEdge>,
    down: mpsc::Sender<Vec<u8>>,
    end: Arc<Notify>,
}

impl Session {
    async fn run(
        &self,
        stream: TlsStream<TcpStream>,
        mut frames: mpsc::Receiver<Vec<u8>>,
    ) -> Result<(), Ended> {
        let (mut incoming, mut outgoing) = tokio::io::split(stream);
        // What is told and what is heard must not wait for one another: each side may be slow to read.
        let mut parts: JoinSet<Result<(), Ended>> = JoinSet::new();
        parts.spawn(async move {
            while let Some(frame) = frames.recv().await {
                outgoing.write_all(&frame).await.map_err(FrameError::from)?;
                if frames.is_empty() {
                    outgoing.flush().await.map_err(FrameError::from)?;
                }
            }
            Err(Ended::Unwritable)
        });
        let told = self.clone();
        let ready = Arc::new(Notify::new());
        let may_tell = Arc::clone(&ready);
        parts.spawn(async move {
            may_tell.notified().await;
            told.tell().await
        });
        let heard = async {
            loop {
                let up: Up = wire::read(&mut incoming, MAX_FRAME_BYTES).await?;
                self.shared.with_edge(&self.name, &self.end, |edge| edge.seen = Instant::now());
                if up == Up::Ready {
                    ready.notify_one();
                } else {
                    self.hear(up)?;
                }
            }
        };
        tokio::select! {
            ended = heard => ended,
            ended = parts.join_next() => match ended {
                Some(Ok(ended)) => ended,
                _ => Err(Ended::Unwritable),
            },
            () = self.end.notified() => Err(Ended::Replaced),
        }
    }

    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            name: self.name.clone(),
            remote: Arc::clone(&self.remote),
            down: self.down.clone(),
            end: Arc::clone(&self.end),
        }
    }

    /// The connection has gone. The edge has its lease.
    fn over(&self, why: &Ended) {
        let left = matches!(why, Ended::Left);
        let mut gone = None;
        self.shared.with_edge(&self.name, &self.end, |edge| {
            edge.session = None;
            edge.record.seen_at = now();
            if left {
                edge.record.away = true;
                gone = edge.remote.take();
            }
            self.shared.keep(&self.name, &edge.record);
        });
        if let Some(remote) = gone {
            remote.leave();
        }
    }

    // --- up

    fn hear(&self, up: Up) -> Result<(), Ended> {
        match up {
            Up::Known(tallies) => self.take(tallies, true),
            Up::Ready => return Err(Ended::OutOfPlace("ready")),
            Up::Acknowledged { version, open, saved } => {
                let open: Vec<_> = open.into_iter().map(Generation).collect();
                self.remote.acknowledge(version, &open);
                self.shared.with_edge(&self.name, &self.end, |edge| {
                    (edge.saved, edge.problem) = (saved, None);
                });
            }
            Up::Report { number, tallies, ended } => {
                self.take(tallies, false);
                for generation in ended {
                    self.remote.let_go(Generation(generation));
                }
                // Never waited for: an edge that does not read meanwhile must not keep us from reading. The next one says
                // the same, and there is one in every heartbeat.
                if self.down.try_send(wire::frame(&Down::Received { report: number })?).is_err() {
                    tracing::debug!(edge = %self.name, "there is no room to say that a report was received");
                }
            }
            Up::Unusable { version, why } => {
                tracing::error!(edge = %self.name, version, %why, "an edge cannot use the table, and keeps the one that it has");
                self.shared.with_edge(&self.name, &self.end, |edge| edge.problem = Some(why));
            }
            Up::Leaving => return Err(Ended::Left),
        }
        Ok(())
    }

    fn take(&self, tallies: Vec<(u64, WireTally)>, from_before: bool) {
        let now_ms = (self.shared.config.clock)();
        for (generation, tally) in tallies {
            self.remote.report(Generation(generation), tally.tally(now_ms), from_before);
        }
    }

    // --- down

    async fn tell(self) -> Result<(), Ended> {
        let mut drains: JoinSet<Result<(), Ended>> = JoinSet::new();
        let mut watched: Vec<Generation> = Vec::new();
        let mut beats = tokio::time::interval(self.shared.beat());
        let turn = self.remote.start_over();
        loop {
            while drains.try_join_next().is_some() {} // drained
            tokio::select! {
                publication = self.remote.next(turn) => {
                    self.publish(publication).await?;
                    let draining = self.remote.draining();
                    watched.retain(|known| draining.iter().any(|upstream| upstream.generation() == *known));
                    for upstream in draining {
                        if !watched.contains(&upstream.generation()) {
                            watched.push(upstream.generation());
                            drains.spawn(tell_deadlines(upstream, self.down.clone()));
                        }
                    }
                }
                _ = beats.tick() => self.say(&Down::Beat).await?,
            }
        }
    }

    async fn publish(&self, publication: Publication) -> Result<(), Ended> {
        match publication {
            Publication::Changes(version, changes) => {
                self.say(&Down::Begin { whole: false }).await?;
                for change in changes.iter() {
                    self.say(&Down::Change(Box::new(change.into()))).await?;
                }
                self.say(&Down::Publish { version }).await
            }
            Publication::Whole(table) => self.publish_whole(&table).await,
        }
    }

    async fn publish_whole(&self, table: &RoutingTable) -> Result<(), Ended> {
        self.say(&Down::Begin { whole: true }).await?;
        let mut services = Vec::new();
        table.for_each_service(|service| services.push(Arc::clone(service)));
        for service in services {
            let change = Change::Put(service.spec().clone());
            self.say(&Down::Change(Box::new((&change).into()))).await?;
        }
        self.say(&Down::Publish { version: table.version() }).await
    }

    async fn say(&self, down: &Down) -> Result<(), Ended> {
        say(&self.down, down).await
    }
}

async fn say(frames: &mpsc::Sender<Vec<u8>>, down: &Down) -> Result<(), Ended> {
    frames.send(wire::frame(down)?).await.map_err(|_| Ended::Unwritable)
}

/// Tells the edge of the deadlines of a retired upstream as they pass, until no edge is inside.
async fn tell_deadlines(upstream: Arc<Upstream>, frames: mpsc::Sender<Vec<u8>>) -> Result<(), Ended> {
    let mut told = (0, 0);
    loop {
        let turn = upstream.listen();
        let bits = |is: &dyn Fn(TrafficClass) -> bool| {
            TrafficClass::ALL.into_iter().filter(|c| is(*c)).fold(0_u8, |bits, c| bits | 1 << c.index())
        };
        let now = (bits(&|class| upstream.is_closing(class)), bits(&|class| upstream.is_class_cut(class)));
        if now != told {
            told = now;
            let (generation, (closing, cut)) = (upstream.generation().0, now);
            say(&frames, &Down::Deadlines { generation, closing, cut }).await?;
        }
        if upstream.is_empty() {
            return Ok(());
        }
        turn.await;
    }
}
