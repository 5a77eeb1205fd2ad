//! A draft: the writes of one commit, made from the state that it will be applied to.
//!
//! Only typed records go in, so that nothing is written that the replay could not read. Numbers that are
//! given out once (events, generations, journal sequences) are taken here, inside the commit.

use bytes::Bytes;
use serde::Serialize;

use crate::audit::{self, AuditAct, AuditHead, MAX_AUDIT_ENTRIES};
use crate::journal::{Answered, Install, JournalRecord, ServiceChange};
use crate::keys;
use crate::model::{
    Event, EventBody, Instance, InstanceId, Machine, Rollout, RolloutId, Service, UnixMs, Version,
};
use crate::state::State;
use crate::store::{Batch, Precondition, Write};

/// Stored events: at some 30 a rollout, the story of the last few hundred rollouts, in about 3 MB.
pub const MAX_STORED_EVENTS: u64 = 10_000;

/// The writes of one commit.
pub(crate) struct Draft<'a> {
    state: &'a State,
    now: UnixMs,
    batch: Batch,
    events: Vec<Event>,
    last_event: u64,
    last_generation: u64,
    sequences: Vec<(RolloutId, u64)>,
    audit: AuditHead,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(state: &'a State, now: UnixMs) -> Self {
        Self {
            state,
            now,
            batch: Batch { preconditions: Vec::new(), writes: Vec::new() },
            events: Vec::new(),
            last_event: state.last_event,
            last_generation: state.last_generation,
            sequences: Vec::new(),
            audit: state.audit.clone(),
        }
    }

    pub(crate) const fn state(&self) -> &'a State {
        self.state
    }

    pub(crate) const fn now(&self) -> UnixMs {
        self.now
    }

    pub(crate) fn finish(mut self) -> (Batch, Vec<Event>) {
        if self.last_generation != self.state.last_generation {
            let last = self.last_generation;
            self.write(keys::GENERATION.to_owned(), &last);
        }
        if self.audit != self.state.audit {
            let head = self.audit.clone();
            self.write(keys::AUDIT_HEAD.to_owned(), &head);
        }
        (self.batch, self.events)
    }

    /// A write for the vault, whose content is not the engine's matter.
    pub(crate) fn vault(&mut self, write: Write) {
        self.batch.writes.push(write);
    }

    pub(crate) fn require(&mut self, precondition: Precondition) {
        self.batch.preconditions.push(precondition);
    }

    /// Requires that the service in the store is the one of this state: the compare of compare-and-swap.
    pub(crate) fn require_service(&mut self, name: &str) {
        let key = keys::service(name);
        self.require(match self.state.services.get(name) {
            Some(service) => Precondition::Equals(key, encode(service)),
            None => Precondition::Absent(key),
        });
    }

    pub(crate) fn put_install(&mut self, install: &Install) {
        self.require(Precondition::Absent(keys::INSTALL.to_owned()));
        self.write(keys::INSTALL.to_owned(), install);
    }

    pub(crate) fn put_machine(&mut self, machine: &Machine) {
        self.write(keys::machine(&machine.spec.name), machine);
    }

    pub(crate) fn delete_machine(&mut self, name: &str) {
        self.delete(keys::machine(name));
    }

    pub(crate) fn put_service(&mut self, service: &Service) {
        self.write(keys::service(&service.spec.name), service);
    }

    pub(crate) fn delete_service(&mut self, name: &str) {
        self.delete(keys::service(name));
    }

    pub(crate) fn put_version(&mut self, version: &Version) {
        self.write(keys::version(&version.service, version.number), version);
    }

    pub(crate) fn delete_version(&mut self, service: &str, number: u32) {
        self.delete(keys::version(service, number));
    }

    pub(crate) fn put_instance(&mut self, instance: &Instance) {
        self.write(keys::instance(&instance.id), instance);
    }

    pub(crate) fn delete_instance(&mut self, id: &InstanceId) {
        self.delete(keys::instance(id));
    }

    pub(crate) fn put_rollout(&mut self, rollout: &Rollout) {
        self.write(keys::rollout(&rollout.id), rollout);
    }

    pub(crate) fn delete_rollout(&mut self, id: &RolloutId) {
        self.delete(keys::rollout(id));
    }

    pub(crate) fn put_change(&mut self, id: &RolloutId, change: &ServiceChange) {
        self.write(keys::change(id), change);
    }

    pub(crate) fn put_answered(&mut self, key: &str, answered: &Answered) {
        self.write(keys::idempotency(key), answered);
    }

    pub(crate) fn delete_answered(&mut self, key: &str) {
        self.delete(keys::idempotency(key));
    }

    /// Appends to a rollout's journal; returns the sequence number.
    pub(crate) fn journal(&mut self, id: &RolloutId, record: &JournalRecord) -> u64 {
        let known = self.sequences.iter().rev().find(|(of, _)| of == id).map(|(_, last)| *last);
        let last = known.unwrap_or_else(|| last_sequence(self.state, id));
        self.sequences.push((id.clone(), last + 1));
        self.write(keys::journal(id, last + 1), record);
        last + 1
    }

    /// Forgets what only a running rollout needs.
    pub(crate) fn close_rollout(&mut self, id: &RolloutId) {
        let sequences: Vec<u64> =
            self.state.journals.get(id).map(|journal| journal.keys().copied().collect()).unwrap_or_default();
        for sequence in sequences {
            self.delete(keys::journal(id, sequence));
        }
        self.delete(keys::change(id));
    }

    /// Gives out a routing generation, for good.
    pub(crate) const fn generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    /// Leaves generations out, for those that somebody may have seen already.
    pub(crate) const fn skip_generations(&mut self, count: u64) {
        self.last_generation += count;
    }

    pub(crate) fn event(&mut self, service: Option<&str>, rollout: Option<&RolloutId>, body: EventBody) {
        self.last_event += 1;
        let event = Event {
            id: self.last_event,
            at: self.now,
            service: service.map(str::to_owned),
            rollout: rollout.cloned(),
            body,
        };
        self.write(keys::event(event.id), &event);
        if event.id > MAX_STORED_EVENTS && self.state.first_event <= event.id - MAX_STORED_EVENTS {
            self.delete(keys::event(event.id - MAX_STORED_EVENTS));
        }
        self.events.push(event);
    }

    /// Appends to the audit. The entry must not be there: of two engines on one store, one is told.
    pub(crate) fn audit(&mut self, service: Option<&str>, rollout: Option<&RolloutId>, act: AuditAct) {
        let (value, head) = audit::seal(&self.audit, self.now, service, rollout, act);
        let key = keys::audit(head.number);
        self.require(Precondition::Absent(key.clone()));
        self.batch.writes.push(Write::Put(key, value));
        if head.number > MAX_AUDIT_ENTRIES {
            self.delete(keys::audit(head.number - MAX_AUDIT_ENTRIES));
        }
        self.audit = head;
    }

    fn write<T: Serialize>(&mut self, key: String, value: &T) {
        self.batch.writes.push(Write::Put(key, encode(value)));
    }

    fn delete(&mut self, key: String) {
        self.batch.writes.push(Write::Delete(key));
    }
}

pub(crate) fn last_sequence(state: &State, id: &RolloutId) -> u64 {
    state.journals.get(id).and_then(|journal| journal.last_key_value()).map_or(0, |(last, _)| *last)
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    // The records are maps with string keys and finite numbers, which JSON can always write.
    Bytes::from(serde_json::to_vec(value).expect("records can be written as JSON"))
}
