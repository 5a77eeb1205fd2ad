//! Keys of the store: one family per noun. Numbers are padded so that the order of keys is their order.

use crate::model::{InstanceId, RolloutId};

pub(crate) const INSTALL: &str = "meta/install";
pub(crate) const GENERATION: &str = "meta/generation";
pub(crate) const AUDIT_HEAD: &str = "meta/audit";
pub(crate) const AUDIT: &str = "audit/";
pub(crate) const EVENTS: &str = "events/";
pub(crate) const SERVICES: &str = "services/";
pub(crate) const VAULT: &str = "vault/";

pub(crate) fn machine(name: &str) -> String {
    format!("machines/{name}")
}

pub(crate) fn service(name: &str) -> String {
    format!("{SERVICES}{name}")
}

pub(crate) fn version(service: &str, number: u32) -> String {
    format!("versions/{service}/{number:08}")
}

pub(crate) fn instance(id: &InstanceId) -> String {
    format!("instances/{id}")
}

pub(crate) fn rollout(id: &RolloutId) -> String {
    format!("rollouts/{id}")
}

pub(crate) fn change(id: &RolloutId) -> String {
    format!("changes/{id}")
}

pub(crate) fn journal(id: &RolloutId, sequence: u64) -> String {
    format!("journal/{id}/{sequence:08}")
}

pub(crate) fn audit(number: u64) -> String {
    format!("{AUDIT}{number:020}")
}

pub(crate) fn event(id: u64) -> String {
    format!("{EVENTS}{id:020}")
}

/// The number of an event's key.
pub(crate) fn event_number(key: &str) -> Option<u64> {
    key.strip_prefix(EVENTS)?.parse().ok()
}

pub(crate) fn vault(key: &str) -> String {
    format!("{VAULT}{key}")
}

pub(crate) fn idempotency(key: &str) -> String {
    format!("idempotency/{key}")
}
