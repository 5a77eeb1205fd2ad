//! One connection of an edge.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use peregrine_routing::{
    CertificateId, Change, EdgeId, Generation, HostPattern, Publication, RemoteEdge, RoutingTable,
    TrafficClass, Upstream,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{GREETING_TIMEOUT_MS, Process, Shared};
use crate::authority::fingerprint;
use crate::registry::now;
use crate::token::hex;
use crate::wire::{
    self, Attach, Down, FrameError, Given, Greeting, MAX_FRAME_BYTES, MAX_GREETING_BYTES, Reply, Up,
    WireChange, WireTally,
};

/// Frames that wait to be written; who says more waits for room.
const MAX_QUEUED_FRAMES: usize = 256;
/// Questions of an edge for certificates that are worked on at a time: twice what an edge has under way, as an answer may be
/// there before its work is seen to have ended.
const MAX_ANSWERING: usize = 128;
/// How long it may take to find one.
const ANSWER_TIMEOUT_MS: u64 = 3_000;
/// Names without a certificate that an edge waits for at a time: twice what it has under way, as above.
const MAX_WANTED: usize = 512;

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
    let (name, certificate) = match shared.admit(secret, public_key) {
        Ok(admitted) => admitted,
        Err(error) => return Err(refuse(stream, "join.refused", error.to_string()).await),
    };
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
    let known = print.and_then(|print| Some((shared.name_of(&print)?, print)));
    let Some((name, print)) = known else {
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
    let attached = shared.attach(&name, &print, peer, attach);
    let Some((remote, end)) = attached else { return Err(Ended::Replaced) };
    tracing::info!(edge = %name, %peer, "an edge is connected");
    let (down, frames) = mpsc::channel(MAX_QUEUED_FRAMES);
    let (shared, unusable) = (Arc::clone(shared), Arc::default());
    let session = Session { shared, name, remote, down, end, unusable };
    let ended = session.run(stream, frames).await;
    let Err(ended) = ended else { return Ok(()) };
    session.over(&ended);
    Err(ended)
}

/// What is wrong with an edge that is not waited for, whatever it acknowledges but the newest table.
fn stalled() -> (u64, String) {
    (u64::MAX, "it did not use the newest table in time: moves do not wait for it until it does".to_owned())
}

impl Shared {
    fn name_of(&self, print: &str) -> Option<String> {
        let edges = self.edges();
        edges.iter().find(|(_, edge)| edge.record.fingerprint == print).map(|(name, _)| name.clone())
    }

    /// Gives a connected edge its place; `None` if it was removed or replaced meanwhile.
    pub(super) fn attach(
        &self,
        name: &str,
        print: &str,
        peer: SocketAddr,
        attach: &Attach,
    ) -> Option<(Arc<RemoteEdge>, Arc<Notify>)> {
        let mut edges = self.edges();
        let edge = edges.get_mut(name).filter(|edge| edge.record.fingerprint == print)?;
        let end = Arc::new(Notify::new());
        let id = EdgeId(attach.incarnation);
        let mut replaced = Vec::new();
        if edge.processes.iter().all(|process| process.remote.id() != id) {
            // Another process of the same edge. What those had out that it does not live beside died with them; one that
            // has handed over was given up by us, and says nothing of the others.
            let lives = |other: &Process| attach.handed_over || attach.beside.contains(&other.remote.id().0);
            replaced.extend(edge.processes.extract_if(.., |other| !lives(other)));
            let cores = attach.cores as usize;
            let remote = if edge.stalled.contains(&id) {
                self.reader.join_unawaited(id, &name.into(), cores)
            } else {
                self.reader.join(id, &name.into(), cores)
            };
            // The last one is the edge: one that has handed over is not.
            let place = if attach.handed_over { 0 } else { edge.processes.len() };
            edge.processes.insert(place, Process::new(remote, attach.cores));
        }
        let process = edge.processes.iter_mut().find(|process| process.remote.id() == id)?;
        process.end_session();
        process.session = Some((peer, Arc::clone(&end)));
        let is_waited = process.remote.is_waited();
        (process.seen, process.problem) = (Instant::now(), (!is_waited).then(stalled));
        let remote = Arc::clone(&process.remote);
        edge.lost = false;
        edge.record.seen_at = now();
        edge.note_processes();
        drop(edges);
        // Before it is told anything: an engine that starts again has to wait for it.
        let ours = self.keep(name);
        replaced.iter_mut().for_each(Process::end_session);
        drop(replaced);
        ours.then_some((remote, end))
    }

    /// Runs on the process of this session, unless another session has taken its place.
    fn with_process(&self, name: &str, end: &Arc<Notify>, work: impl FnOnce(&mut Process)) {
        let mut edges = self.edges();
        let ours = |process: &&mut Process| {
            process.session.as_ref().is_some_and(|(_, other)| Arc::ptr_eq(end, other))
        };
        if let Some(process) = edges.get_mut(name).and_then(|edge| edge.processes.iter_mut().find(ours)) {
            work(process);
        }
    }
}

#[derive(Clone)]
struct Session {
    shared: Arc<Shared>,
    name: String,
    remote: Arc<RemoteEdge>,
    down: mpsc::Sender<Vec<u8>>,
    end: Arc<Notify>,
    /// It could not use what it was told.
    unusable: Arc<Notify>,
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
        let keys = self.clone();
        parts.spawn(async move { keys.tell_ticket_keys().await });
        let heard = async {
            let (mut answers, mut wanted) = (JoinSet::new(), JoinSet::new());
            loop {
                while answers.try_join_next().is_some() {} // given
                while wanted.try_join_next().is_some() {} // told
                let up: Up = wire::read(&mut incoming, MAX_FRAME_BYTES).await?;
                self.shared.with_process(&self.name, &self.end, |process| process.seen = Instant::now());
                match up {
                    Up::Ready => ready.notify_one(),
                    Up::Certificate { id, .. } if answers.len() >= MAX_ANSWERING => self.put_off(id)?,
                    Up::Certificate { id, domain } => {
                        let session = self.clone();
                        answers.spawn(async move { session.answer(CertificateId(id), &domain).await });
                    }
                    Up::Wanted { name } if wanted.len() >= MAX_WANTED => self.tell_none(name)?,
                    Up::Wanted { name } => {
                        let session = self.clone();
                        wanted.spawn(async move { session.tell_wanted(name).await });
                    }
                    up => self.hear(up)?,
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

    /// The connection has gone. The edge has its lease.
    fn over(&self, why: &Ended) {
        let left = matches!(why, Ended::Left);
        let (mut ours, mut gone) = (false, None);
        self.shared.with_process(&self.name, &self.end, |process| (ours, process.session) = (true, None));
        if !ours {
            return;
        }
        if let Some(edge) = self.shared.edges().get_mut(&self.name) {
            edge.record.seen_at = now();
            if left {
                // By its identity: it may have met us anew meanwhile, and it has left all the same.
                let id = self.remote.id();
                gone = edge.processes.extract_if(.., |process| process.remote.id() == id).next();
                edge.note_processes();
            }
        }
        self.shared.keep(&self.name);
        if let Some(process) = gone {
            process.remote.leave();
        }
    }

    // --- up

    fn hear(&self, up: Up) -> Result<(), Ended> {
        match up {
            Up::Known(tallies) => self.take(tallies, true),
            Up::Ready | Up::Certificate { .. } | Up::Wanted { .. } => {
                return Err(Ended::OutOfPlace("a question"));
            }
            Up::Acknowledged { version, open, saved } => {
                let open: Vec<_> = open.into_iter().map(Generation).collect();
                // First: whoever waits for the acknowledgement may look at once.
                self.shared.with_process(&self.name, &self.end, |process| {
                    process.saved = saved;
                    process.problem.take_if(|(unusable, _)| version >= *unusable);
                });
                self.acknowledge(version, &open);
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
            Up::Held { services, from_before } => {
                for (service, counts) in services {
                    self.remote.report_hold(&service, counts.into(), from_before);
                }
            }
            Up::Unusable { version, why } => {
                tracing::error!(edge = %self.name, version, %why, "an edge cannot use the table, and keeps the one that it has");
                self.shared
                    .with_process(&self.name, &self.end, |process| process.problem = Some((version, why)));
                self.unusable.notify_one();
            }
            Up::Leaving => return Err(Ended::Left),
        }
        Ok(())
    }

    fn acknowledge(&self, version: u64, open: &[Generation]) {
        let was_waited = self.remote.is_waited();
        self.remote.acknowledge(version, open);
        if was_waited || !self.remote.is_waited() {
            return;
        }
        tracing::info!(edge = %self.name, version, "an edge that did not use a table in time does: it is waited for again");
        if let Some(edge) = self.shared.edges().get_mut(&self.name) {
            edge.stalled.retain(|id| *id != self.remote.id());
        }
        self.shared.with_process(&self.name, &self.end, |process| process.problem = None);
    }

    fn take(&self, tallies: Vec<(u64, WireTally)>, from_before: bool) {
        let now_ms = (self.shared.config.clock)();
        for (generation, tally) in tallies {
            self.remote.report(Generation(generation), tally.tally(now_ms), from_before);
        }
    }

    // --- secrets

    /// Has the edge ask again. Never waited for, as with reports: who asks too much may hear nothing.
    fn put_off(&self, id: [u8; 32]) -> Result<(), Ended> {
        let given = Given::NotNow("too many certificates are asked for at once".to_owned());
        if self.down.try_send(wire::frame(&Down::Certificate { id, given })?).is_err() {
            tracing::debug!(edge = %self.name, "there is no room to say that a certificate is not given");
        }
        Ok(())
    }

    /// Too many are waited for: it is decided on, and nobody waits. Must not wait itself, see [`Self::put_off`].
    fn tell_none(&self, name: String) -> Result<(), Ended> {
        if let Some(secrets) = self.shared.secrets.get() {
            drop(secrets.wanted(&name));
        }
        if self.down.try_send(wire::frame(&Down::Wanted { name, has: false })?).is_err() {
            tracing::debug!(edge = %self.name, "there is no room to say that a name has no certificate");
        }
        Ok(())
    }

    async fn tell_wanted(&self, name: String) -> Result<(), Ended> {
        let has = match self.shared.secrets.get() {
            Some(secrets) => secrets.wanted(&name).await,
            None => false,
        };
        self.say(&Down::Wanted { name, has }).await
    }

    async fn answer(&self, id: CertificateId, domain: &str) -> Result<(), Ended> {
        let limit = Duration::from_millis(ANSWER_TIMEOUT_MS);
        let given = tokio::time::timeout(limit, self.given(id, domain)).await;
        let given = given.unwrap_or_else(|_| Given::NotNow("it was not found in time".to_owned()));
        match &given {
            Given::Certificate(_) => {
                tracing::debug!(edge = %self.name, %domain, certificate = %id, "an edge was given a certificate");
            }
            Given::Nothing => {
                tracing::warn!(edge = %self.name, ?domain, certificate = %id, "an edge asked for a certificate that the table does not name there, or that is not here");
            }
            Given::NotNow(why) => {
                tracing::error!(edge = %self.name, %domain, certificate = %id, %why, "an edge cannot be given a certificate");
            }
        }
        self.say(&Down::Certificate { id: id.0, given }).await
    }

    async fn given(&self, id: CertificateId, domain: &str) -> Given {
        let (Some(secrets), Ok(domain)) = (self.shared.secrets.get(), HostPattern::parse(domain)) else {
            return Given::Nothing;
        };
        // Only what edges are to present now: what else lies in the store is none of their business.
        let table = self.shared.reader.load();
        if table.domains().of(&domain).and_then(|domain| domain.certificate) != Some(id) {
            return Given::Nothing;
        }
        drop(table);
        match secrets.certificate(id).await {
            Ok(Some(certificate)) => match certificate.to_bytes() {
                Ok(_) => Given::Certificate(certificate),
                Err(error) => Given::NotNow(error.to_string()),
            },
            Ok(None) => Given::Nothing,
            Err(why) => Given::NotNow(why),
        }
    }

    /// Tells the keys of session tickets, now and when they change.
    async fn tell_ticket_keys(&self) -> Result<(), Ended> {
        let Some(secrets) = self.shared.secrets.get() else { return std::future::pending().await };
        let mut keys = secrets.ticket_keys();
        loop {
            let now = keys.borrow_and_update().clone();
            self.say(&Down::TicketKeys(now)).await?;
            if keys.changed().await.is_err() {
                // Nobody changes them any more, which is no reason to end.
                return std::future::pending().await;
            }
        }
    }

    // --- down

    async fn tell(self) -> Result<(), Ended> {
        let mut drains: JoinSet<Result<(), Ended>> = JoinSet::new();
        let mut watched: Vec<Generation> = Vec::new();
        let mut beats = tokio::time::interval(self.shared.beat());
        let mut turn = self.start_over()?;
        let mut rests = false;
        let rest = tokio::time::sleep(Duration::ZERO);
        let mut rest = std::pin::pin!(rest);
        loop {
            while drains.try_join_next().is_some() {} // drained
            tokio::select! {
                () = self.unusable.notified() => {
                    // It cannot use what would follow either: everything, and not at once, for it may be the same again.
                    turn = self.start_over()?;
                    rests = true;
                    rest.as_mut().reset(Instant::now() + self.shared.lease());
                }
                () = &mut rest, if rests => rests = false,
                publication = self.remote.next(turn), if !rests => {
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

    /// Begins to tell it from the start, unless another connection of it is told already.
    fn start_over(&self) -> Result<u64, Ended> {
        let mut turn = None;
        self.shared.with_process(&self.name, &self.end, |_| turn = Some(self.remote.start_over()));
        turn.ok_or(Ended::Replaced)
    }

    async fn publish(&self, publication: Publication) -> Result<(), Ended> {
        match publication {
            Publication::Changes(version, changes) => {
                self.say(&Down::Begin { whole: false }).await?;
                for change in changes.iter() {
                    self.say(&Down::Change(Box::new(self.wire(change)))).await?;
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
            self.say(&Down::Change(Box::new(self.wire(&change)))).await?;
        }
        let mut doors = Vec::new();
        table.domains().for_each(|domain| doors.push(Change::PutDomain((**domain).clone())));
        doors.extend(table.domains().challenges().map(|spec| Change::PutChallenge((**spec).clone())));
        for change in doors {
            self.say(&Down::Change(Box::new(self.wire(&change)))).await?;
        }
        for service in self.shared.kept.get().into_iter().flatten() {
            self.say(&Down::Keep { service: service.clone() }).await?;
        }
        self.say(&Down::Publish { version: table.version() }).await
    }

    fn wire(&self, change: &Change) -> WireChange {
        WireChange::from(change).departs((self.shared.config.clock)())
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
