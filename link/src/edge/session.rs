//! One connection to an engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use peregrine_routing::{CertificateId, Change, Generation, Tally};
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;

use super::secrets::{Ask, Asked};
use super::status::LinkStatus;
use super::table::{EdgeTable, Saving};
use crate::BEATS_PER_LEASE;
use crate::saved::SavedError;
use crate::wire::{self, Down, FrameError, Given, MAX_FRAME_BYTES, Up, WireTally};

/// Between two reports while there is news: what a shift is judged by must not be old.
const REPORT_INTERVAL_MS: u64 = 25;
/// Between two looks at every service, also those that have long been the same.
const LOOK_AT_ALL_MS: u64 = 1_000;
/// Upstreams in one report: far below the longest frame.
const MAX_REPORTED: usize = 256;
/// Frames that wait between the stream and the table.
const MAX_QUEUED_FRAMES: usize = 256;

/// Questions for certificates that are under way at a time.
const MAX_ASKED: usize = 64;
/// Names without a certificate that the engine is asked for at a time; of more it is told, and nobody waits.
const MAX_WANTED: usize = 256;

/// The outcome of using a publication.
struct Used {
    version: u64,
    /// The table is on the disk.
    saved: bool,
    /// The save goes on.
    rest: Option<Saving>,
}

/// How long is waited.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    /// For a word of the engine.
    pub(super) lease: Duration,
    /// For the disk.
    pub(super) save: Duration,
}

/// Whom a session tells how it goes.
pub(super) struct Told<'e> {
    pub(super) ready: &'e watch::Sender<bool>,
    pub(super) status: &'e watch::Sender<LinkStatus>,
    /// Whether the disk is this process's.
    pub(super) ours: watch::Receiver<bool>,
}

/// The publication that is coming in.
struct Coming {
    whole: bool,
    changes: Vec<Change>,
    /// Why one of its changes cannot be read.
    unreadable: Option<String>,
}

pub(super) struct Session<'e> {
    table: &'e mut EdgeTable,
    asked: &'e mut Asked,
    /// Who waits for which certificate.
    asking: HashMap<CertificateId, Vec<oneshot::Sender<Arc<Given>>>>,
    /// Who waits for which name.
    wanting: HashMap<String, Vec<oneshot::Sender<bool>>>,
    told: Told<'e>,
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    patience: Patience,
    incoming: mpsc::Receiver<Result<Down, FrameError>>,
    reading: JoinHandle<()>,
    outgoing: WriteHalf<TlsStream<TcpStream>>,
    coming: Option<Coming>,
    /// Why a publication could not be used. Those that follow cannot be either, up to the next whole one.
    behind: Option<String>,
    using: FuturesOrdered<BoxFuture<'static, Used>>,
    /// Saves that were not waited for to the end, by the version that was acknowledged without them.
    late: FuturesUnordered<BoxFuture<'static, (u64, bool)>>,
    /// The version that was acknowledged last.
    acknowledged: Option<u64>,
    report: u64,
    received: u64,
    said: Instant,
    looked_at_all: Instant,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl<'e> Session<'e> {
    pub(super) fn new(
        table: &'e mut EdgeTable,
        asked: &'e mut Asked,
        stream: TlsStream<TcpStream>,
        patience: Patience,
        told: Told<'e>,
        clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    ) -> Self {
        let (mut input, outgoing) = tokio::io::split(stream);
        let (frames, incoming) = mpsc::channel(MAX_QUEUED_FRAMES);
        // A task of its own: a frame that is half read must not be dropped because something else was ready first.
        let reading = tokio::spawn(async move {
            loop {
                let frame = wire::read::<Down>(&mut input, MAX_FRAME_BYTES).await;
                let broken = frame.is_err();
                if frames.send(frame).await.is_err() || broken {
                    return;
                }
            }
        });
        Self {
            table,
            asked,
            asking: HashMap::new(),
            wanting: HashMap::new(),
            told,
            clock,
            patience,
            incoming,
            reading,
            outgoing,
            coming: None,
            behind: None,
            using: FuturesOrdered::new(),
            late: FuturesUnordered::new(),
            acknowledged: None,
            report: 0,
            received: 0,
            said: Instant::now(),
            looked_at_all: Instant::now(),
        }
    }

    /// Talks until the engine is gone or silent, or until `asked` to leave. Not to be dropped before it ends, if
    /// anything is to be said after it: it may be in the middle of a frame.
    pub(super) async fn run(&mut self, mut asked: oneshot::Receiver<()>) -> Result<(), FrameError> {
        let known = self.table.known();
        for part in known.chunks(MAX_REPORTED) {
            let part = self.on_its_way(part.to_vec());
            self.say(&Up::Known(part)).await?;
        }
        self.tell_holds(true).await?;
        self.say(&Up::Ready).await?;
        let mut reports = tokio::time::interval(Duration::from_millis(REPORT_INTERVAL_MS));
        reports.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                _ = &mut asked => return self.leave().await,
                frame = self.incoming.recv() => {
                    heard = Instant::now();
                    self.told.status.send_modify(|status| status.heard = Some(heard));
                    self.hear(frame.unwrap_or_else(|| Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()))?).await?;
                }
                Some(used) = self.using.next() => self.acknowledge(used).await?,
                Some((version, saved)) = self.late.next() => self.tell_late_save(version, saved).await?,
                Ok(()) = self.told.ours.changed() => self.save_what_is_left(),
                Some(ask) = self.asked.asks.recv(), if self.asking.len() < MAX_ASKED => self.ask(ask).await?,
                _ = reports.tick() => {
                    if heard.elapsed() > self.patience.lease {
                        return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it is silent").into());
                    }
                    self.forget_unanswered();
                    self.tell_news().await?;
                }
            }
        }
    }

    /// The last report, and the engine's word that it has it.
    async fn leave(&mut self) -> Result<(), FrameError> {
        self.looked_at_all = Instant::now() - Duration::from_millis(LOOK_AT_ALL_MS);
        self.said = Instant::now() - self.patience.lease;
        self.tell_news().await?;
        while self.received < self.report {
            match self.incoming.recv().await {
                Some(Ok(Down::Received { report })) => self.received = report,
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                None => break,
            }
        }
        self.say(&Up::Leaving).await?;
        self.outgoing.shutdown().await?;
        Ok(())
    }

    async fn hear(&mut self, down: Down) -> Result<(), FrameError> {
        match down {
            Down::Begin { whole } => {
                self.coming = Some(Coming { whole, changes: Vec::new(), unreadable: None });
            }
            Down::Change(change) => {
                let Some(coming) = &mut self.coming else { return Ok(()) };
                match Change::try_from(change.arrives((self.clock)())) {
                    Ok(change) => coming.changes.push(change),
                    Err(why) => drop(coming.unreadable.get_or_insert(why.to_string())),
                }
            }
            Down::Keep { service } => {
                if let (Some(coming), Some(known)) = (&mut self.coming, self.table.known_service(&service))
                    && coming.whole
                {
                    coming.changes.push(known);
                }
            }
            Down::Publish { version } => self.publish(version).await?,
            Down::Deadlines { generation, closing, cut } => {
                self.table.deadlines(Generation(generation), closing, cut);
            }
            Down::Received { report } => {
                self.received = report;
                self.table.received(report);
            }
            Down::Certificate { id, given } => {
                let given = Arc::new(given);
                for waiting in self.asking.remove(&CertificateId(id)).unwrap_or_default() {
                    // Who has given up does not wait.
                    drop(waiting.send(Arc::clone(&given)));
                }
            }
            Down::Wanted { name, has } => {
                for waiting in self.wanting.remove(&name).unwrap_or_default() {
                    // Who has given up does not wait.
                    let _ = waiting.send(has);
                }
            }
            Down::TicketKeys(keys) => drop(self.asked.ticket_keys.send_replace(Some(keys))),
            Down::Beat => {}
        }
        Ok(())
    }

    async fn ask(&mut self, ask: Ask) -> Result<(), FrameError> {
        match ask {
            Ask::Certificate { answer, .. } if answer.is_closed() => Ok(()),
            Ask::Certificate { id, domain, answer } => {
                let waiting = self.asking.entry(id).or_default();
                waiting.push(answer);
                if waiting.len() > 1 {
                    return Ok(());
                }
                self.say(&Up::Certificate { id: id.0, domain: domain.to_string() }).await
            }
            Ask::Wanted { name, answer } => {
                if let Some(waiting) = self.wanting.get_mut(&name) {
                    waiting.push(answer);
                    return Ok(());
                }
                if self.wanting.len() < MAX_WANTED {
                    self.wanting.insert(name.clone(), vec![answer]);
                }
                self.say(&Up::Wanted { name }).await
            }
        }
    }

    /// Makes room of those who have given up.
    fn forget_unanswered(&mut self) {
        self.asking.retain(|_, waiting| {
            waiting.retain(|answer| !answer.is_closed());
            !waiting.is_empty()
        });
        self.wanting.retain(|_, waiting| {
            waiting.retain(|answer| !answer.is_closed());
            !waiting.is_empty()
        });
    }

    async fn publish(&mut self, version: u64) -> Result<(), FrameError> {
        let Some(Coming { whole, changes, unreadable }) = self.coming.take() else { return Ok(()) };
        // An acknowledgement is of everything up to a version: differences from what is not here are of no use.
        let behind = if whole { None } else { self.behind.take() };
        if let Some(why) = unreadable.or(behind) {
            return self.refuse(version, why).await;
        }
        let changes = if whole { self.table.differences(changes) } else { changes };
        let own = match self.table.apply(&changes) {
            Ok(own) => own,
            Err(why) => return self.refuse(version, why.to_string()).await,
        };
        self.behind = None;
        let used = self.table.acknowledged(own);
        let never_saved = !*self.told.ready.borrow();
        let to_save = !changes.is_empty() || never_saved || !self.table.is_on_disk();
        let saving = to_save.then(|| self.table.save());
        self.told.ready.send_replace(true);
        self.use_then_save(version, used, saving);
        Ok(())
    }

    fn use_then_save(
        &mut self,
        version: u64,
        used: impl Future<Output = ()> + Send + 'static,
        saving: Option<Saving>,
    ) {
        let patience = self.patience.save;
        self.using.push_back(Box::pin(async move {
            used.await;
            // What was not to be saved is there already.
            let Some(saving) = saving else { return Used { version, saved: true, rest: None } };
            let (saved, rest) = in_time(saving, patience).await;
            Used { version, saved, rest }
        }));
    }

    /// Saves what was used while the disk was another process's, or hung, and says so.
    fn save_what_is_left(&mut self) {
        if !self.table.is_unsaved() {
            return;
        }
        let saving = self.table.save();
        let Some(version) = self.acknowledged else { return };
        self.use_then_save(version, std::future::ready(()), Some(saving));
    }

    /// A save that was not waited for has ended. It is of no interest if another table is in use by now.
    async fn tell_late_save(&mut self, version: u64, saved: bool) -> Result<(), FrameError> {
        if saved && self.acknowledged == Some(version) {
            self.acknowledge(Used { version, saved: true, rest: None }).await?;
        }
        self.save_what_is_left();
        Ok(())
    }

    /// Keeps the table as it is, and says so.
    async fn refuse(&mut self, version: u64, why: String) -> Result<(), FrameError> {
        tracing::error!(version, %why, "the engine's table cannot be used; this edge keeps the one that it has");
        self.told.status.send_modify(|status| status.problem = Some(why.clone()));
        self.behind = Some(why.clone());
        self.say(&Up::Unusable { version, why }).await
    }

    async fn acknowledge(&mut self, used: Used) -> Result<(), FrameError> {
        let Used { version, saved, rest } = used;
        self.acknowledged = Some(version);
        if let Some(rest) = rest {
            self.late.push(Box::pin(async move { (version, is_saved(rest.await)) }));
        }
        let problem = self.behind.clone();
        self.told.status.send_modify(|status| status.uses(version, saved, problem));
        // What is over has its last word before the acknowledgement that says so.
        self.tell_news().await?;
        let open = self.table.open().into_iter().map(|generation| generation.0).collect();
        self.say(&Up::Acknowledged { version, open, saved }).await
    }

    async fn tell_news(&mut self) -> Result<(), FrameError> {
        let all = self.looked_at_all.elapsed() >= Duration::from_millis(LOOK_AT_ALL_MS);
        if all {
            self.looked_at_all = Instant::now();
        }
        let news = self.table.news(self.report + 1, all);
        self.tell_holds(false).await?;
        let silent = self.said.elapsed() >= self.patience.lease / BEATS_PER_LEASE;
        if news.tallies.is_empty() && news.ended.is_empty() && !silent {
            return Ok(());
        }
        self.report += 1;
        let mut tallies = news.tallies;
        // What has ended is told with the last part: its counts are in this one or in an earlier one.
        while tallies.len() > MAX_REPORTED {
            let part = tallies.split_off(tallies.len() - MAX_REPORTED);
            let tallies = self.on_its_way(part);
            self.say(&Up::Report { number: self.report - 1, tallies, ended: Vec::new() }).await?;
        }
        let tallies = self.on_its_way(tallies);
        let ended = news.ended.into_iter().map(|generation| generation.0).collect();
        self.say(&Up::Report { number: self.report, tallies, ended }).await
    }

    async fn tell_holds(&mut self, from_before: bool) -> Result<(), FrameError> {
        let news = self.table.hold_news();
        if news.is_empty() {
            return Ok(());
        }
        let services = news.into_iter().map(|(name, counts)| (name.to_string(), counts.into())).collect();
        self.say(&Up::Held { services, from_before }).await
    }

    fn on_its_way(&self, tallies: Vec<(Generation, Tally)>) -> Vec<(u64, WireTally)> {
        let now_ms = (self.clock)();
        tallies.into_iter().map(|(generation, tally)| (generation.0, WireTally::new(tally, now_ms))).collect()
    }

    async fn say(&mut self, up: &Up) -> Result<(), FrameError> {
        self.said = Instant::now();
        let said = wire::write(&mut self.outgoing, up);
        // An engine that does not read for a whole lease is as good as gone.
        match tokio::time::timeout(self.patience.lease, said).await {
            Ok(said) => said,
            Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
        }
    }
}

/// Whether a save has ended well, for as long as there is patience; then the rest of it, too.
pub(super) async fn in_time(mut saving: Saving, patience: Duration) -> (bool, Option<Saving>) {
    match tokio::time::timeout(patience, &mut saving).await {
        Ok(saved) => (is_saved(saved), None),
        Err(_) => {
            tracing::error!(
                waited_ms = patience.as_millis(),
                "the table is in use and the disk does not take it: a restart without an engine would begin with an older one"
            );
            (false, Some(saving))
        }
    }
}

fn is_saved(saved: Result<bool, SavedError>) -> bool {
    if let Err(error) = &saved {
        tracing::error!(%error, "the table is in use and cannot be saved: a restart without an engine would begin with an older one");
    }
    saved.unwrap_or(false)
}
