//! The audit.

use jiff::Timestamp;
use peregrine_engine::audit as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::instant;

/// One entry of the audit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// 1, 2, 3, …
    pub number: u64,
    /// When.
    pub time: Timestamp,
    /// Service that it is about.
    pub service: Option<String>,
    /// Move that it is about.
    #[serde(rename = "move")]
    pub move_id: Option<String>,
    /// What was done: `asked`, `steered`, `ended`, `cleaned_up`, `refused`, `settings_changed`, `machine_added`,
    /// `machine_removed`, `store_restored`, or `unknown` to this version.
    pub act: String,
    /// What belongs to the act, such as the reason or the receipt, as it was sealed.
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
    /// Hash of the entry before, in hex.
    pub previous: String,
    /// SHA-256 of this entry, in hex.
    pub hash: String,
}

/// What a verification of the audit found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditReport {
    /// Every entry is the one that was written.
    pub verified: bool,
    /// Entries that were looked at.
    pub entries: u64,
    /// Oldest number; 0 without entries.
    pub first: u64,
    /// Newest number; 0 without entries.
    pub last: u64,
    /// Hash of the newest entry. Noted elsewhere, it shows later whether anything up to it was changed.
    pub hash: String,
    /// What is wrong.
    pub broken: Vec<AuditBreak>,
}

/// An entry that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditBreak {
    /// Its number.
    pub entry: u64,
    /// What is wrong with it.
    pub what: String,
}

impl From<&engine::AuditEntry> for AuditEntry {
    fn from(entry: &engine::AuditEntry) -> Self {
        // An act is a map with its name under `type`, which every act can be written as.
        let mut data = serde_json::to_value(&entry.act).unwrap_or_default();
        let act = data.as_object_mut().and_then(|fields| fields.remove("type"));
        Self {
            number: entry.number,
            time: instant(entry.at),
            service: entry.service.clone(),
            move_id: entry.rollout.as_ref().map(ToString::to_string),
            act: act.as_ref().and_then(|act| act.as_str()).unwrap_or("unknown").to_owned(),
            data,
            previous: entry.previous.clone(),
            hash: entry.hash.clone(),
        }
    }
}

impl From<&engine::AuditReport> for AuditReport {
    fn from(report: &engine::AuditReport) -> Self {
        let broken = report.broken.iter();
        Self {
            verified: report.broken.is_empty(),
            entries: report.entries,
            first: report.first,
            last: report.last,
            hash: report.hash.clone(),
            broken: broken.map(|b| AuditBreak { entry: b.entry, what: b.what.clone() }).collect(),
        }
    }
}
