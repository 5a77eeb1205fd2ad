//! Events: the ordered, resumable story of everything that happened.

use serde::{Deserialize, Serialize};

use super::{Finding, Phase, RolloutId, RolloutState, Sample, UnixMs};

/// One event. Ids rise; a reader that remembers the last one misses nothing that is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Position in the stream. Samples are live only and carry the id of the stored event before them.
    pub id: u64,
    /// When.
    pub at: UnixMs,
    /// Service, if it is about one.
    pub service: Option<String>,
    /// Rollout, if it is about one.
    pub rollout: Option<RolloutId>,
    /// What happened.
    pub body: EventBody,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum EventBody {
    /// A machine was added.
    #[serde(rename = "machine.added")]
    MachineAdded {
        /// Machine.
        machine: String,
    },
    /// A machine was removed.
    #[serde(rename = "machine.removed")]
    MachineRemoved {
        /// Machine.
        machine: String,
    },
    /// An engine that was replaced while it stood still went on, and its late writes were refused.
    #[serde(rename = "engine.fenced")]
    EngineFenced {
        /// Its epoch.
        epoch: u64,
        /// Batches that it tried to write.
        writes: u64,
    },
    /// A service was created or its settings changed.
    #[serde(rename = "service.changed")]
    ServiceChanged {},
    /// A service was removed.
    #[serde(rename = "service.removed")]
    ServiceRemoved {},
    /// A rollout was accepted.
    #[serde(rename = "move.created")]
    RolloutCreated {
        /// Kind, such as `move`.
        kind: super::RolloutKind,
    },
    /// A rollout entered a phase.
    #[serde(rename = "move.phase")]
    Phase {
        /// Phase.
        phase: Phase,
    },
    /// Weights changed and every edge has acknowledged them.
    #[serde(rename = "move.weight")]
    Weight {
        /// Percent on the new copies.
        percent: u8,
    },
    /// Progress inside a phase, in words and, for transfers, in bytes.
    #[serde(rename = "move.progress")]
    Progress {
        /// What goes on.
        message: String,
        /// Bytes done.
        bytes_done: Option<u64>,
        /// Bytes in all.
        bytes_total: Option<u64>,
    },
    /// A verdict on a shift step, or on what was mirrored.
    #[serde(rename = "move.guard")]
    Guard {
        /// `pass`, `fail` or `inconclusive`.
        verdict: String,
        /// The numbers behind it.
        message: String,
    },
    /// A live reading; not stored.
    #[serde(rename = "move.sample")]
    Sample(Sample),
    /// A rollout turned back.
    #[serde(rename = "move.turned_back")]
    TurnedBack {
        /// Why.
        problem: Finding,
    },
    /// A rollout is held where it stands, because this version cannot read its plan.
    #[serde(rename = "move.held")]
    Held {
        /// Why, and what to do.
        problem: Finding,
    },
    /// A rollout ended.
    #[serde(rename = "move.done")]
    Done {
        /// How.
        state: RolloutState,
        /// Why, unless it succeeded.
        problem: Option<Finding>,
    },
    /// An instance changed its state or died.
    #[serde(rename = "instance.changed")]
    InstanceChanged {
        /// Instance.
        instance: super::InstanceId,
        /// In words: `serving`, `exited with 1`, …
        change: String,
    },
}
