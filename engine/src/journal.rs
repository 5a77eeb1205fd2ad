//! The journal of a rollout: the intent before each deed, its settlement after it, and every turn.
//!
//! A record is appended, never changed. The sequence numbers of one rollout rise by one. The journal lives
//! as long as its rollout runs; what is left of it afterwards is the rollout's record with its receipt.

use serde::{Deserialize, Serialize};

use crate::model::{Finding, ServiceSpec, UnixMs};

/// Which way a step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Towards the new copies.
    Forward,
    /// Back to the old ones.
    Back,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum JournalRecord {
    /// What is about to be done.
    Intent {
        /// When.
        at: UnixMs,
        /// Index of the step in the plan.
        step: usize,
        /// Forward or back.
        direction: Direction,
        /// 1, 2, 3, … for the same step and direction.
        attempt: u32,
        /// The same for every attempt: names the deed, so that it can be found and repeated.
        token: String,
        /// When it is given up, in wall time; waiting is measured on a monotonic clock that is never
        /// longer than what the step was given.
        deadline: UnixMs,
    },
    /// What became of it.
    Settled {
        /// When.
        at: UnixMs,
        /// Sequence number of the intent.
        intent: u64,
        /// What it brought about, in words; `None` if it failed.
        output: Option<String>,
        /// Why it failed.
        error: Option<Finding>,
    },
    /// The rollout goes the other way from here on.
    Turn {
        /// When.
        at: UnixMs,
        /// Which way.
        direction: Direction,
        /// Why.
        why: Finding,
    },
}

/// What a rollout changes of its service's record, and what it was before: kept beside the rollout until
/// it ends, so that the way back needs nothing that was forgotten.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceChange {
    /// The specification before; `None` if the service is new.
    pub before: Option<Box<ServiceSpec>>,
    /// Version before.
    pub version_before: Option<u32>,
    /// Version before that.
    pub previous_before: Option<u32>,
    /// The specification after; `None` if the service goes away.
    pub after: Option<Box<ServiceSpec>>,
}

/// What was answered to an ask with an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// SHA-256 of the ask.
    pub ask: String,
    /// The rollout that it started, if it needed one.
    pub rollout: Option<crate::model::RolloutId>,
    /// When.
    pub at: UnixMs,
}

/// This installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    /// Random, made once: the label of everything that this installation starts.
    pub id: String,
    /// When.
    pub created_at: UnixMs,
}
