//! One connection to an engine.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use peregrine_routing::{Change, Generation, Tally};
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;

use super::status::LinkStatus;
use super::table::EdgeTable;
use crate::BEATS_PER_LEASE;
use crate::wire::{self, Down, FrameError, MAX_FRAME_BYTES, Up, WireTally};

/// Between two reports while there is news: what a shift is judged by must not be old.
const REPORT_INTERVAL_MS: u64 = 25;
/// Between two looks at every service, also those that have long been the same.
const LOOK_AT_ALL_MS: u64 = 1_000;
/// Upstreams in one report: far below the longest frame.
const MAX_REPORTED: usize = 256;
/// Frames that wait between the stream and the table.
const MAX_QUEUED_FRAMES: usize = 256;

/// The outcome of using a publication: its version, and whether the table is on the disk.
type Used = (u64, bool);

/// Whom a session tells how it goes.
pub(super) struct Told<'e> {
    pub(super) ready: &'e watch::Sender<bool>,
    pub(super) status: &'e watch::Sender<LinkStatus>,
}

pub(super) struct Session<'e> {
    table: &'e mut EdgeTable,
    told: Told<'e>,
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    lease: Duration,
    incoming: mpsc::Receiver<Result<Down, FrameError>>,
    reading: JoinHandle<()>,
    outgoing: WriteHalf<TlsStream<TcpStream>>,
    /// The publication that is coming in, and whether it is whole.
    coming: Option<(bool, Vec<Change>)>,
    using: FuturesOrdered<BoxFuture<'static, Used>>,
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
        stream: TlsStream<TcpStream>,
        lease_ms: u32,
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
            told,
            clock,
            lease: Duration::from_millis(u64::from(lease_ms)),
            incoming,
            reading,
            outgoing,
            coming: None,
            using: FuturesOrdered::new(),
            report: 0,
            received: 0,
            said: Instant::now(),
            looked_at_all: Instant::now(),
        }
    }

    /// Talks until the engine is gone or silent.
    pub(super) async fn run(&mut self) -> Result<(), FrameError> {
        let known = self.table.known();
        for part in known.chunks(MAX_REPORTED) {
            let part = self.on_its_way(part.to_vec());
            self.say(&Up::Known(part)).await?;
        }
        self.say(&Up::Ready).await?;
        let mut reports = tokio::time::interval(Duration::from_millis(REPORT_INTERVAL_MS));
        reports.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                frame = self.incoming.recv() => {
                    heard = Instant::now();
                    self.told.status.send_modify(|status| status.heard = Some(heard));
                    self.hear(frame.unwrap_or_else(|| Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()))?).await?;
                }
                Some(used) = self.using.next() => self.acknowledge(used).await?,
                _ = reports.tick() => {
                    if heard.elapsed() > self.lease {
                        return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it is silent").into());
                    }
                    self.tell_news().await?;
                }
            }
        }
    }

    /// The last report, and the engine's word that it has it.
    pub(super) async fn leave(&mut self) -> Result<(), FrameError> {
        self.looked_at_all = Instant::now() - Duration::from_millis(LOOK_AT_ALL_MS);
        self.said = Instant::now() - self.lease;
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
            Down::Begin { whole } => self.coming = Some((whole, Vec::new())),
            Down::Change(change) => match Change::try_from(*change) {
                Ok(change) => {
                    if let Some((_, changes)) = &mut self.coming {
                        changes.push(change);
                    }
                }
                Err(why) => {
                    // One service that cannot be read must not hold the others back; it stays as it was.
                    tracing::error!(%why, "a service cannot be used");
                }
            },
            Down::Publish { version } => self.publish(version).await?,
            Down::Deadlines { generation, closing, cut } => {
                self.table.deadlines(Generation(generation), closing, cut);
            }
            Down::Received { report } => {
                self.received = report;
                self.table.received(report);
            }
            Down::Beat => {}
        }
        Ok(())
    }

    async fn publish(&mut self, version: u64) -> Result<(), FrameError> {
        let Some((whole, changes)) = self.coming.take() else { return Ok(()) };
        let changes = if whole { self.table.differences(changes) } else { changes };
        let own = match self.table.apply(&changes) {
            Ok(own) => own,
            Err(why) => {
                tracing::error!(version, %why, "the engine's table cannot be used; this edge keeps the one that it has");
                let why = why.to_string();
                self.told.status.send_modify(|status| status.problem = Some(why.clone()));
                return self.say(&Up::Unusable { version, why }).await;
            }
        };
        let used = self.table.acknowledged(own);
        let never_saved = !*self.told.ready.borrow();
        let saved = (!changes.is_empty() || never_saved).then(|| self.table.save());
        self.told.ready.send_replace(true);
        self.using.push_back(Box::pin(async move {
            used.await;
            let Some(saved) = saved else { return (version, true) };
            let saved = saved.await;
            if let Err(error) = &saved {
                tracing::error!(%error, "the table is in use and cannot be saved: a restart without an engine would begin with an older one");
            }
            (version, saved.is_ok())
        }));
        Ok(())
    }

    async fn acknowledge(&mut self, (version, saved): Used) -> Result<(), FrameError> {
        self.told.status.send_modify(|status| status.uses(version, saved));
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
        let silent = self.said.elapsed() >= self.lease / BEATS_PER_LEASE;
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

    fn on_its_way(&self, tallies: Vec<(Generation, Tally)>) -> Vec<(u64, WireTally)> {
        let now_ms = (self.clock)();
        tallies.into_iter().map(|(generation, tally)| (generation.0, WireTally::new(tally, now_ms))).collect()
    }

    async fn say(&mut self, up: &Up) -> Result<(), FrameError> {
        self.said = Instant::now();
        let said = wire::write(&mut self.outgoing, up);
        // An engine that does not read for a whole lease is as good as gone.
        match tokio::time::timeout(self.lease, said).await {
            Ok(said) => said,
            Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
        }
    }
}
