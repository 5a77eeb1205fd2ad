//! How the link of an edge stands, for whoever looks after that edge: told, never asked for by the link itself.

use tokio::time::Instant;

/// How the link of an edge stands.
#[derive(Clone, Debug)]
pub struct LinkStatus {
    /// The engine that it is connected to; `None` while it is away.
    pub engine: Option<String>,
    /// Since when it is connected, or away.
    pub since: Instant,
    /// When it has last heard of an engine; `None` if never in this process.
    pub heard: Option<Instant>,
    /// Highest epoch of an engine that it has heard, also before this process.
    pub epoch: u64,
    /// There is a table to serve from.
    pub has_table: bool,
    /// The engine's version of the table that every core uses; `None` while it is the one of the disk.
    pub table_version: Option<u64>,
    /// That table is on the disk.
    pub saved: bool,
    /// Why the engine's newest table could not be used.
    pub problem: Option<String>,
}

impl LinkStatus {
    /// Before the first connection, with a table of the disk or without one.
    pub(super) fn away(epoch: u64, has_table: bool) -> Self {
        Self {
            engine: None,
            since: Instant::now(),
            heard: None,
            epoch,
            has_table,
            table_version: None,
            saved: has_table,
            problem: None,
        }
    }

    pub(super) fn connected(&mut self, engine: &str, epoch: u64) {
        let now = Instant::now();
        (self.engine, self.since, self.heard) = (Some(engine.to_owned()), now, Some(now));
        self.epoch = epoch;
    }

    pub(super) fn lost(&mut self) {
        (self.engine, self.since) = (None, Instant::now());
    }

    pub(super) fn uses(&mut self, version: u64, saved: bool, problem: Option<String>) {
        (self.has_table, self.table_version, self.saved) = (true, Some(version), saved);
        self.problem = problem;
    }
}
