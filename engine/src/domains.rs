//! Domains and challenges on their way into the table. The engine is the table's only writer, so whoever knows of them
//! asks here; where they are stored, and whether they are, is the asker's matter.

use peregrine_routing::{ChallengeId, ChallengeSpec, Change, DomainSpec, HostPattern};

use crate::error::EngineError;
use crate::handle::EngineHandle;

/// A change of what edges present, or of what they answer a certificate authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainChange {
    /// Serve a domain so, whatever it was before.
    Put(DomainSpec),
    /// Serve it no longer.
    Remove(HostPattern),
    /// Answer a validation.
    PutChallenge(ChallengeSpec),
    /// It is over.
    RemoveChallenge(ChallengeId),
}

impl From<DomainChange> for Change {
    fn from(change: DomainChange) -> Self {
        match change {
            DomainChange::Put(spec) => Self::PutDomain(spec),
            DomainChange::Remove(name) => Self::RemoveDomain(name),
            DomainChange::PutChallenge(spec) => Self::PutChallenge(spec),
            DomainChange::RemoveChallenge(id) => Self::RemoveChallenge(id),
        }
    }
}

impl EngineHandle {
    /// Puts changes of domains into the table, all in one version, and returns it at once.
    ///
    /// # Errors
    /// The table refuses them; then it stays as it was.
    pub fn publish_domains(&self, changes: Vec<DomainChange>) -> Result<u64, EngineError> {
        let changes: Vec<Change> = changes.into_iter().map(Change::from).collect();
        self.core.table.apply_domains(&changes)
    }

    /// Waits until every edge goes by what [`Self::publish_domains`] has returned, or its lease has ended.
    pub async fn domains_acknowledged(&self, version: u64) {
        self.core.table.acknowledged(version).await;
    }

    /// As [`Self::publish_domains`], and waits until every edge goes by it, or its lease has ended.
    ///
    /// # Errors
    /// The table refuses them; then it stays as it was.
    pub async fn apply_domains(&self, changes: Vec<DomainChange>) -> Result<u64, EngineError> {
        let version = self.publish_domains(changes)?;
        self.domains_acknowledged(version).await;
        Ok(version)
    }
}
