//! What a run amounted to: faults, requests, violations; and the sum over many runs as a table.

use std::fmt;

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    EngineKilled,
    EngineKilledAtCommit,
    EdgeKilled,
    CopyKilled,
    MachineRebooted,
    BadVersion,
    RuntimeUnreachable,
    RuntimeAmbiguous,
    RuntimeHangs,
    RuntimeSlow,
    RuntimeFails,
    EdgeCutOff,
    LinkLost,
    LinkDoubled,
    LinkCut,
    LateAcknowledgement,
    ClockJump,
    StoreFull,
    OperatorAborts,
}

impl Faults {
    const ALL: [(Self, &'static str); 19] = [
        (Self::EngineKilled, "engine killed"),
        (Self::EngineKilledAtCommit, "engine killed before or after a commit"),
        (Self::EdgeKilled, "edge killed"),
        (Self::CopyKilled, "copy killed"),
        (Self::MachineRebooted, "machine rebooted"),
        (Self::BadVersion, "version that exits or answers with errors"),
        (Self::RuntimeUnreachable, "runtime unreachable for a while"),
        (Self::RuntimeAmbiguous, "runtime does it and its answer is lost"),
        (Self::RuntimeHangs, "runtime never answers"),
        (Self::RuntimeSlow, "runtime does it seconds later"),
        (Self::RuntimeFails, "runtime fails"),
        (Self::EdgeCutOff, "machine cut off from the edges"),
        (Self::LinkLost, "message between engine and edge lost"),
        (Self::LinkDoubled, "message between engine and edge doubled"),
        (Self::LinkCut, "engine and edge cut apart"),
        (Self::LateAcknowledgement, "late acknowledgement"),
        (Self::ClockJump, "clock jump of up to an hour"),
        (Self::StoreFull, "store takes nothing for a while"),
        (Self::OperatorAborts, "operator aborts, pauses or promotes"),
    ];
}

/// What one seed amounted to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Hash of everything that happened, with its time.
    pub trace_hash: u64,
    /// Events in the trace.
    pub events: u64,
    /// Invariants that did not hold; empty is a pass.
    pub violations: Vec<String>,
    /// Requests of clients.
    pub requests: u64,
    /// Of these: lost to a fault that no proxy can hide (its edge, or the copy that executed it, died).
    pub excused: u64,
    /// Requests that had to wait because the service was held.
    pub held: u64,
    /// Attempts that were made again.
    pub retried: u64,
    /// Rollouts that ended, by end: succeeded, rolled back, aborted, failed, needs operator.
    pub ends: [u64; 5],
    /// Virtual time until everything was at rest.
    pub virtual_ms: u64,
    tried: [u64; Faults::ALL.len()],
}

impl Report {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    pub(crate) const fn tried(&mut self, kind: Faults) {
        self.tried[kind as usize] += 1;
    }
}

/// The sum over many seeds. `Display` is the table of `docs/reliability.md`.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds that ran.
    pub seeds: u64,
    /// Seeds in which an invariant did not hold.
    pub failed: Vec<Report>,
    requests: u64,
    excused: u64,
    held: u64,
    retried: u64,
    ends: [u64; 5],
    virtual_ms: u64,
    tried: [u64; Faults::ALL.len()],
    lost: [u64; Faults::ALL.len()],
}

impl Summary {
    /// Adds a seed.
    pub fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.requests += report.requests;
        self.excused += report.excused;
        self.held += report.held;
        self.retried += report.retried;
        self.virtual_ms += report.virtual_ms;
        let failed = !report.violations.is_empty();
        for (kind, tried) in report.tried.iter().enumerate() {
            self.tried[kind] += tried;
            self.lost[kind] += if failed { *tried } else { 0 };
        }
        for (sum, end) in self.ends.iter_mut().zip(report.ends) {
            *sum += end;
        }
        if failed {
            self.failed.push(report);
        }
    }

    /// Requests that had to wait because their service was held.
    #[must_use]
    pub const fn held(&self) -> u64 {
        self.held
    }

    /// Adds another sum to this one.
    pub fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.requests += other.requests;
        self.excused += other.excused;
        self.held += other.held;
        self.retried += other.retried;
        self.virtual_ms += other.virtual_ms;
        for (mine, theirs) in self.tried.iter_mut().zip(other.tried) {
            *mine += theirs;
        }
        for (mine, theirs) in self.lost.iter_mut().zip(other.lost) {
            *mine += theirs;
        }
        for (mine, theirs) in self.ends.iter_mut().zip(other.ends) {
            *mine += theirs;
        }
        self.failed.extend(other.failed);
        self.failed.sort_by_key(|report| report.seed);
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hours = self.virtual_ms / 3_600_000;
        let [succeeded, back, aborted, failed, operator] = self.ends;
        writeln!(
            f,
            "{} seeds, {hours} hours of virtual time, {} seeds failed",
            self.seeds,
            self.failed.len()
        )?;
        writeln!(
            f,
            "{} requests: {} held, {} lost (with the edge or the copy that had them, or held in vain), {} attempts made again",
            self.requests, self.held, self.excused, self.retried
        )?;
        writeln!(
            f,
            "rollouts: {succeeded} succeeded, {back} rolled back, {aborted} aborted, {failed} failed, {operator} needed an operator"
        )?;
        writeln!(f)?;
        writeln!(f, "| fault | tried | survived | lost |")?;
        writeln!(f, "|---|---:|---:|---:|")?;
        for (kind, name) in Faults::ALL {
            let (tried, lost) = (self.tried[kind as usize], self.lost[kind as usize]);
            writeln!(f, "| {name} | {tried} | {} | {lost} |", tried - lost)?;
        }
        Ok(())
    }
}
