//! Reading and verifying the audit, from the store itself: what is in memory is not what is asked about.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::audit::{self, AuditAct, AuditEntry, AuditHead, AuditReport};
use crate::core::Core;
use crate::error::EngineError;
use crate::keys;
use crate::model::{Rollout, RolloutId};
use crate::store::Survey;

type Entries = BTreeMap<u64, Result<Bytes, String>>;

pub(crate) async fn list(core: &Core) -> Result<Vec<AuditEntry>, EngineError> {
    let entries = entries(core.store.survey(keys::AUDIT).await?);
    Ok(entries.into_values().flatten().filter_map(|value| serde_json::from_slice(&value).ok()).collect())
}

pub(crate) async fn verify(core: &Core) -> Result<AuditReport, EngineError> {
    // One snapshot: entries, their head and the rollouts' receipts are of the same revision.
    let survey = core.store.survey("").await?;
    let head = survey.entries.iter().find(|entry| entry.key == keys::AUDIT_HEAD);
    let head: Option<AuditHead> = head.and_then(|entry| serde_json::from_slice(&entry.value).ok());
    let receipts: BTreeMap<RolloutId, _> = survey
        .entries
        .iter()
        .filter(|entry| entry.key.starts_with("rollouts/"))
        .filter_map(|entry| serde_json::from_slice::<Rollout>(&entry.value).ok())
        .filter_map(|rollout| Some((rollout.id, rollout.receipt?)))
        .collect();
    Ok(audit::verify(&entries(survey), &head.unwrap_or_default(), |id| receipts.get(id).cloned()))
}

fn entries(survey: Survey) -> Entries {
    let number = |key: &str| key.strip_prefix(keys::AUDIT)?.parse::<u64>().ok();
    let sound = survey.entries.into_iter().filter_map(|entry| Some((number(&entry.key)?, Ok(entry.value))));
    let unsound = survey.unsound.into_iter().filter_map(|(key, why)| Some((number(&key)?, Err(why))));
    sound.chain(unsound).collect()
}

pub(crate) async fn note_refusal(
    core: &Arc<Core>,
    service: Option<&str>,
    what: String,
) -> Result<(), EngineError> {
    let service = service.map(str::to_owned);
    core.commit(move |draft| {
        draft.audit(service.as_deref(), None, AuditAct::Refused { what });
        Ok(())
    })
    .await
}
