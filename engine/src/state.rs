//! State: everything that is stored, in memory, built by one pure function from what was committed.

use std::collections::BTreeMap;

use crate::model::{Instance, InstanceId, Machine, Rollout, RolloutId, Service, Version};
use crate::store::Revision;

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
    pub versions: BTreeMap<(String, u32), Version>,
    /// Instances by id.
    pub instances: BTreeMap<InstanceId, Instance>,
    /// Rollouts by id (which sorts by time).
    pub rollouts: BTreeMap<RolloutId, Rollout>,
}
