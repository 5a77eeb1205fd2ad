//! State: everything that is stored, in memory, built by one pure function from what was committed.
//!
//! [`State::apply`] is the only way in, live and at start. It decides which change may follow which
//! ([`State::judge`]): a writer asks before it commits, and the replay asks again. A record that cannot be
//! read or may not follow is kept aside under its key, with the reason; it never stops the others.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::audit::{self, AuditHead};
use crate::journal::{Answered, Install, JournalRecord, ServiceChange};
use crate::model::{Instance, InstanceId, Machine, Rollout, RolloutId, Service, Version};
use crate::store::{Committed, Revision, Write};

/// Highest number of an event or an entry of the audit that is believed: a million a second for ten thousand years, and far
/// from the end of what can be counted.
const MAX_GIVEN: u64 = 1 << 58;

/// The whole (small) state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Revision that it is of.
    pub revision: Revision,
    /// Machines by name.
    pub machines: BTreeMap<String, Machine>,
    /// Services by name.
    pub services: BTreeMap<String, Service>,
    /// Versions by service and number.
    pub versions: BTreeMap<(String, u32), Arc<Version>>,
    /// Instances by id.
    pub instances: BTreeMap<InstanceId, Instance>,
    /// Rollouts by id (which sorts by time). A thousand that have ended are kept: a copy of the state shares them.
    pub rollouts: BTreeMap<RolloutId, Arc<Rollout>>,
    /// Journals of running rollouts.
    pub journals: BTreeMap<RolloutId, BTreeMap<u64, JournalRecord>>,
    /// What running rollouts change of their services.
    pub changes: BTreeMap<RolloutId, ServiceChange>,
    /// Answers to asks with an idempotency key.
    pub answered: BTreeMap<String, Answered>,
    /// This installation.
    pub install: Option<Install>,
    /// Highest routing generation given out.
    pub last_generation: u64,
    /// Oldest stored event; 0 without any.
    pub first_event: u64,
    /// Newest stored event; 0 without any.
    pub last_event: u64,
    /// Newest entry of the audit.
    pub audit: AuditHead,
    /// Records that could not be read or may not follow, by key, with the reason.
    pub aside: BTreeMap<String, String>,
}

/// A change that cannot be read, or may not follow on the present state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct IllegalChange {
    /// Key of the record.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A record that was read and may follow.
enum Change {
    Install(Install),
    Generation(u64),
    Machine(String, Option<Box<Machine>>),
    Service(String, Option<Box<Service>>),
    Version(String, u32, Option<Box<Version>>),
    Instance(InstanceId, Option<Box<Instance>>),
    Rollout(RolloutId, Option<Box<Rollout>>),
    Pending(RolloutId, Option<Box<ServiceChange>>),
    Journal(RolloutId, u64, Option<JournalRecord>),
    Event(u64, bool),
    /// The hash of what is there; `None` when it is given up.
    Audit(u64, Option<String>),
    AuditHead(AuditHead),
    Answered(String, Option<Answered>),
    /// Not the engine's matter, see [`crate::vault`].
    Vault,
}

impl State {
    /// Applies what was committed. Every readable and legal record is applied, whatever the others are.
    ///
    /// # Errors
    /// The first [`IllegalChange`], after the rest was applied; it and its like are in [`State::aside`].
    pub fn apply(&mut self, committed: &Committed) -> Result<(), IllegalChange> {
        let mut first = None;
        for write in &committed.writes {
            match self.judge(write) {
                Ok(change) => {
                    self.aside.remove(key_of(write));
                    self.take(change);
                }
                Err(illegal) => {
                    self.aside.insert(illegal.key.clone(), illegal.reason.clone());
                    first.get_or_insert(illegal);
                }
            }
        }
        self.revision = self.revision.max(committed.revision);
        first.map_or(Ok(()), Err)
    }

    /// Whether a write can be read and may follow on this state; changes nothing.
    ///
    /// # Errors
    /// [`IllegalChange`] says why not.
    pub fn check(&self, write: &Write) -> Result<(), IllegalChange> {
        self.judge(write).map(drop)
    }

    fn judge(&self, write: &Write) -> Result<Change, IllegalChange> {
        let (key, value) = match write {
            Write::Put(key, value) => (key.as_str(), Some(value)),
            Write::Delete(key) => (key.as_str(), None),
        };
        let illegal = |reason: String| IllegalChange { key: key.to_owned(), reason };
        let change = parse(key, value).map_err(illegal)?;
        self.may_follow(&change).map_err(illegal)?;
        Ok(change)
    }

    fn may_follow(&self, change: &Change) -> Result<(), String> {
        match change {
            Change::Install(install) => match &self.install {
                Some(known) if known.id != install.id => Err("the installation's id never changes".into()),
                _ => Ok(()),
            },
            Change::Generation(next) if *next < self.last_generation => {
                Err(format!("generation {next} was given out before"))
            }
            Change::Service(name, Some(next)) => match self.services.get(name) {
                Some(now) if next.epoch < now.epoch => {
                    Err(format!("epoch {} is behind epoch {}", next.epoch, now.epoch))
                }
                Some(now) if next.last_version < now.last_version => {
                    Err("version numbers are given out once".into())
                }
                _ => Ok(()),
            },
            Change::Version(service, number, Some(next)) => {
                match self.versions.get(&(service.clone(), *number)) {
                    Some(now) if now.workload != next.workload => Err("a version never changes".into()),
                    Some(now) if now.digest.is_some() && now.digest != next.digest => {
                        Err("the digest of a version never changes".into())
                    }
                    _ => Ok(()),
                }
            }
            Change::Rollout(id, Some(next)) => match self.rollouts.get(id) {
                Some(now) if now.state.is_terminal() && !next.state.is_terminal() => {
                    Err("an ended rollout does not run again".into())
                }
                Some(now) if now.plan.hash != next.plan.hash => Err("a plan never changes".into()),
                _ => Ok(()),
            },
            Change::Journal(id, sequence, Some(record)) => self.journal_may_follow(id, *sequence, record),
            _ => Ok(()),
        }
    }

    fn journal_may_follow(
        &self,
        id: &RolloutId,
        sequence: u64,
        record: &JournalRecord,
    ) -> Result<(), String> {
        let journal = self.journals.get(id);
        let last = journal.and_then(|journal| journal.last_key_value()).map_or(0, |(last, _)| *last);
        if sequence != last + 1 {
            return Err(format!("record {sequence} does not follow on {last}"));
        }
        let JournalRecord::Settled { intent, .. } = record else { return Ok(()) };
        match journal.and_then(|journal| journal.get(intent)) {
            Some(JournalRecord::Intent { .. }) => Ok(()),
            _ => Err(format!("record {sequence} settles {intent}, which is no intent")),
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Install(install) => self.install = Some(install),
            Change::Generation(generation) => self.last_generation = generation,
            Change::Machine(name, value) => set(&mut self.machines, name, value),
            Change::Service(name, value) => set(&mut self.services, name, value),
            Change::Version(service, number, value) => share(&mut self.versions, (service, number), value),
            Change::Instance(id, value) => set(&mut self.instances, id, value),
            Change::Rollout(id, value) => share(&mut self.rollouts, id, value),
            Change::Pending(id, value) => set(&mut self.changes, id, value),
            Change::Answered(key, value) => set(&mut self.answered, key, value.map(Box::new)),
            Change::Journal(id, sequence, Some(record)) => {
                self.journals.entry(id).or_default().insert(sequence, record);
            }
            Change::Journal(id, sequence, None) => {
                if let Some(journal) = self.journals.get_mut(&id) {
                    journal.remove(&sequence);
                    if journal.is_empty() {
                        self.journals.remove(&id);
                    }
                }
            }
            Change::Event(id, true) => {
                self.last_event = self.last_event.max(id);
                self.first_event = if self.first_event == 0 { id } else { self.first_event.min(id) };
            }
            // What is there counts: a head that is behind it would have its number given out twice.
            Change::Audit(number, Some(hash)) if number >= self.audit.number => {
                self.audit = AuditHead { number, hash };
            }
            Change::AuditHead(head) if head.number >= self.audit.number => self.audit = head,
            Change::Audit(..) | Change::AuditHead(_) | Change::Vault => {}
            Change::Event(id, false) => self.first_event = self.first_event.max(id + 1),
        }
    }

    /// The instances of a service.
    pub fn instances_of<'a>(&'a self, service: &'a str) -> impl Iterator<Item = &'a Instance> + 'a {
        self.instances.values().filter(move |instance| instance.service == service)
    }

    /// The rollout that has claimed a service, unless its record cannot be read.
    #[must_use]
    pub fn rollout_of(&self, service: &str) -> Option<&Rollout> {
        let id = self.services.get(service)?.rollout.as_ref()?;
        self.rollouts.get(id).map(Arc::as_ref)
    }

    /// The version record.
    #[must_use]
    pub fn version(&self, service: &str, number: u32) -> Option<&Version> {
        self.versions.get(&(service.to_owned(), number)).map(Arc::as_ref)
    }
}

fn key_of(write: &Write) -> &str {
    match write {
        Write::Put(key, _) | Write::Delete(key) => key,
    }
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<Box<V>>) {
    match value {
        Some(value) => {
            map.insert(key, *value);
        }
        None => {
            map.remove(&key);
        }
    }
}

fn share<K: Ord, V>(map: &mut BTreeMap<K, Arc<V>>, key: K, value: Option<Box<V>>) {
    set(map, key, value.map(|value| Box::new(Arc::from(value))));
}

fn parse(key: &str, value: Option<&Bytes>) -> Result<Change, String> {
    let (family, rest) = key.split_once('/').ok_or("a key without a family")?;
    Ok(match family {
        "meta" => match (rest, value) {
            ("install", Some(value)) => Change::Install(read(value)?),
            ("audit", Some(value)) => {
                let head: AuditHead = read(value)?;
                believed(head.number)?;
                Change::AuditHead(head)
            }
            ("generation", Some(value)) => Change::Generation(read(value)?),
            _ => return Err("this version does not know it".into()),
        },
        "machines" => Change::Machine(rest.into(), boxed(value)?),
        "services" => Change::Service(rest.into(), boxed(value)?),
        "versions" => {
            let (service, number) = pair(rest)?;
            Change::Version(service, number, boxed(value)?)
        }
        "instances" => Change::Instance(InstanceId(rest.into()), boxed(value)?),
        "rollouts" => Change::Rollout(RolloutId(rest.into()), boxed(value)?),
        "changes" => Change::Pending(RolloutId(rest.into()), boxed(value)?),
        "journal" => {
            let (rollout, sequence) = pair(rest)?;
            Change::Journal(RolloutId(rollout), sequence, value.map(read).transpose()?)
        }
        "audit" => Change::Audit(given(rest)?, value.map(|value| audit::fingerprint(value))),
        "events" => Change::Event(given(rest)?, value.is_some()),
        "vault" => Change::Vault,
        "idempotency" => Change::Answered(rest.into(), value.map(read).transpose()?),
        _ => return Err("this version does not know it".into()),
    })
}

fn pair<N: std::str::FromStr>(rest: &str) -> Result<(String, N), String> {
    let (name, sequence) = rest.rsplit_once('/').ok_or("the key has no number")?;
    Ok((name.to_owned(), number(sequence)?))
}

fn number<N: std::str::FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

/// A number after which others are given out.
fn given(text: &str) -> Result<u64, String> {
    number(text).and_then(believed)
}

fn believed(number: u64) -> Result<u64, String> {
    if number > MAX_GIVEN { Err(format!("{number} was never given out")) } else { Ok(number) }
}

fn boxed<T: DeserializeOwned>(value: Option<&Bytes>) -> Result<Option<Box<T>>, String> {
    value.map(|value| read(value).map(Box::new)).transpose()
}

fn read<T: DeserializeOwned>(value: &Bytes) -> Result<T, String> {
    serde_json::from_slice(value).map_err(|error| format!("it cannot be read: {error}"))
}
