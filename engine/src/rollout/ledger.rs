//! The ledger of a rollout: what each copy was given and made of it, from the edge's own counts.
//!
//! A copy that served before the rollout is read once at its beginning, and only the difference counts. Each
//! stretch of service (generation) is an entry of its own. Counts live in the edge's memory: after a crash the
//! ledger begins anew, and the receipt says so.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peregrine_routing::{DrainReceipt, HoldCounts, OutcomeCounts, PerClass, TrafficClass, Upstream};

use crate::core::Core;
use crate::model::{
    ClassCounts, Instance, InstanceId, InstanceReceipt, PhaseTime, Receipt, Rollout, RolloutId, SideSample,
    Totals,
};

#[derive(Default)]
pub(crate) struct Ledger {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    parts: Vec<Part>,
    /// What the edges had held before.
    holds: HoldCounts,
    resumed: bool,
}

struct Part {
    instance: InstanceId,
    machine: String,
    new: bool,
    upstream: Arc<Upstream>,
    base: Reading,
}

/// A side of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Copies that served before it.
    Old,
    /// Copies that it starts.
    New,
}

/// A reading of one upstream's counts, or a difference of two.
#[derive(Clone)]
struct Reading {
    receipt: DrainReceipt,
    outcomes: OutcomeCounts,
}

impl Reading {
    fn of(upstream: &Upstream) -> Self {
        Self { receipt: upstream.receipt(), outcomes: upstream.outcomes() }
    }
}

impl Ledger {
    /// Reads what the copies of the service have done before.
    pub(super) fn begin(&self, core: &Core, id: &RolloutId, resumed: bool) {
        let state = core.state();
        let Some(rollout) = state.rollouts.get(id) else { return };
        let holds = core.table.hold_counts(&rollout.plan.service);
        let mut inner = self.lock();
        (inner.resumed, inner.holds) = (resumed, holds);
        drop(inner);
        for instance in state.instances_of(&rollout.plan.service) {
            self.enter(core, rollout, instance, true);
        }
    }

    /// Takes a copy's present stretch of service into the account. `known` says that it served before.
    pub(crate) fn enter(&self, core: &Core, rollout: &Rollout, instance: &Instance, known: bool) {
        let Some(upstream) = core.table.upstream(instance.generation) else { return };
        let mut inner = self.lock();
        if inner.parts.iter().any(|part| part.upstream.generation() == upstream.generation()) {
            return;
        }
        let mut base = Reading::of(&upstream);
        // A stretch of service has one drain, and what is cut in it is cut by this rollout, whoever was there to see it.
        base.receipt.hard_cut.clear();
        if !known {
            // It has entered the table for this rollout: all that it ever did counts.
            base.outcomes = OutcomeCounts::default();
            base.receipt = zero(&base.receipt);
        }
        inner.parts.push(Part {
            instance: instance.id.clone(),
            machine: instance.machine.clone(),
            new: rollout.plan.add.iter().any(|added| added.id == instance.id),
            upstream,
            base,
        });
    }

    /// Outcomes of a side since the rollout began.
    pub(crate) fn outcomes(&self, side: Side) -> OutcomeCounts {
        let inner = self.lock();
        let mut sum = OutcomeCounts::default();
        for part in inner.parts.iter().filter(|part| part.new == (side == Side::New)) {
            sum.add(&part.upstream.outcomes().since(&part.base.outcomes));
        }
        sum
    }

    /// Requests sent to a side since the rollout began, and leases out now.
    pub(crate) fn traffic(&self, side: Side) -> (u64, u64) {
        let inner = self.lock();
        let parts = inner.parts.iter().filter(|part| part.new == (side == Side::New));
        parts.fold((0, 0), |(started, in_flight), part| {
            let receipt = part.upstream.receipt();
            (
                started + receipt.started.saturating_sub(part.base.receipt.started),
                in_flight + receipt.in_flight.total(),
            )
        })
    }

    /// Every retired upstream may be forgotten, as far as this is about its counts: they are in the receipt.
    pub(super) fn release(&self, core: &Core) {
        let state = core.state();
        let mut inner = self.lock();
        for part in inner.parts.drain(..).filter(|part| part.upstream.is_empty()) {
            core.table.forget(&state, &part.upstream);
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        let mut outcomes = self.outcomes(Side::Old);
        outcomes.add(&self.outcomes(Side::New));
        Totals {
            requests: self.traffic(Side::Old).0 + self.traffic(Side::New).0,
            failed: outcomes.errors(),
            longest_us: outcomes.latency.quantile_us(1.0).unwrap_or(0),
            typical_us: outcomes.latency.quantile_us(0.5).unwrap_or(0),
        }
    }

    /// One side since an earlier reading.
    pub(crate) fn side_sample(&self, side: Side, last: &mut LastSample, seconds: f64) -> SideSample {
        let outcomes = self.outcomes(side);
        let (started, in_flight) = self.traffic(side);
        let since = outcomes.since(&last.outcomes);
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let requests_per_s = started.saturating_sub(last.started) as f64 / seconds.max(0.001);
        let sample = SideSample {
            requests_per_s,
            in_flight,
            errors: since.errors(),
            p50_us: since.latency.quantile_us(0.5),
            p95_us: since.latency.quantile_us(0.95),
            p99_us: since.latency.quantile_us(0.99),
        };
        *last = LastSample { outcomes, started };
        sample
    }

    /// What the rollout amounted to; it has ended.
    /// `holds` are the counts of its service's queue.
    pub(super) fn receipt(&self, rollout: &Rollout, holds: &HoldCounts) -> Receipt {
        let at = rollout.ended_at.unwrap_or(rollout.started_at);
        let totals = self.totals();
        let inner = self.lock();
        let held = if rollout.hold.is_some() { holds.since(&inner.holds) } else { HoldCounts::default() };
        // The longest wait of the hold of this rollout, and of none before it.
        let is_ours = rollout.hold.as_ref().is_some_and(|hold| held.hold == Some(hold.id));
        let longest_wait_us = if is_ours { held.longest_wait_us } else { 0 };
        let longest_us = totals.longest_extra_us().max(longest_wait_us);
        let mut receipt = Receipt {
            at,
            duration_ms: at.saturating_sub(rollout.started_at),
            phases: phase_times(rollout, at),
            requests: totals.requests,
            failed: totals.failed + held.refused(),
            retried: 0,
            held: held.held,
            pause_ms: pause_ms(rollout, at),
            longest_extra_wait_ms: longest_us / 1_000,
            bytes_to_upstream: 0,
            bytes_to_client: 0,
            transferred_bytes: rollout.transferred_bytes,
            instances: Vec::new(),
            hard_cut: Vec::new(),
            hard_cut_by_class: BTreeMap::new(),
            mirror: rollout.mirror.clone(),
            notes: notes(rollout, inner.resumed, &lost_edges(&inner.parts), &held),
        };
        for part in &inner.parts {
            add_part(&mut receipt, part);
        }
        receipt
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a side had done at the last sample.
#[derive(Clone, Default)]
pub(crate) struct LastSample {
    outcomes: OutcomeCounts,
    started: u64,
}

fn add_part(receipt: &mut Receipt, part: &Part) {
    let now = part.upstream.receipt();
    let base = &part.base.receipt;
    let started = now.started.saturating_sub(base.started);
    let completed = counts(&now.completed, &base.completed);
    let soft_closed = counts(&now.soft_closed, &base.soft_closed);
    receipt.bytes_to_upstream += now.bytes_to_upstream.saturating_sub(base.bytes_to_upstream);
    receipt.bytes_to_client += now.bytes_to_client.saturating_sub(base.bytes_to_client);
    receipt.retried += now.retried.saturating_sub(base.retried);
    let cut = now.hard_cut_classes.iter().zip(&now.hard_cut).skip(base.hard_cut.len());
    for (class, id) in cut {
        receipt.hard_cut.push(id.clone());
        receipt.hard_cut_by_class.entry(class.name().to_owned()).or_default().push(id.clone());
    }
    match receipt.instances.iter_mut().find(|entry| entry.instance == part.instance) {
        Some(entry) => {
            entry.started += started;
            entry.drained = now.empty;
            add(&mut entry.completed, completed);
            add(&mut entry.soft_closed, soft_closed);
        }
        None => receipt.instances.push(InstanceReceipt {
            instance: part.instance.clone(),
            machine: part.machine.clone(),
            new: part.new,
            drained: now.empty,
            started,
            completed,
            soft_closed,
        }),
    }
}

/// Edges that were given up in this rollout while they may have been inside of one of its copies, with what they had out.
fn lost_edges(parts: &[Part]) -> BTreeMap<Arc<str>, u64> {
    let mut lost = BTreeMap::new();
    for part in parts {
        let before = part.base.receipt.lost.iter().map(|one| one.number).max().unwrap_or(0);
        for one in part.upstream.receipt().lost.into_iter().filter(|one| one.number > before) {
            *lost.entry(one.edge).or_default() += one.in_flight;
        }
    }
    lost
}

fn pause_ms(rollout: &Rollout, end: u64) -> u64 {
    let hold = rollout.hold.as_ref();
    hold.map_or(0, |hold| hold.released_at.unwrap_or(end).min(hold.until).saturating_sub(hold.since))
}

fn notes(rollout: &Rollout, resumed: bool, lost: &BTreeMap<Arc<str>, u64>, held: &HoldCounts) -> Vec<String> {
    let mut notes = Vec::new();
    if held.overflowed + held.aged_out > 0 {
        notes.push(format!(
            "{} requests were refused while others were held: {} found no room, {} waited for too long.",
            held.overflowed + held.aged_out,
            held.overflowed,
            held.aged_out
        ));
    }
    if held.unserved > 0 {
        notes.push(format!(
            "{} requests were answered 503 because no copy served: they could be held for no longer.",
            held.unserved
        ));
    }
    if held.left > 0 {
        notes.push(format!(
            "{} clients left while their requests were held; these were sent nowhere.",
            held.left
        ));
    }
    if resumed {
        notes.push(
            "The engine was restarted during this rollout: requests before the restart were served and are not counted here."
                .to_owned(),
        );
    }
    for (edge, in_flight) in lost {
        notes.push(format!(
            "Edge {edge} was given up, because it was not heard of until its lease ended or did not use a table in time: {in_flight} requests were under way there when it was last heard of, and neither their end nor anything that it did later is counted here."
        ));
    }
    if rollout.plan.retire.is_empty() && rollout.plan.keep.is_empty() {
        notes.push("First deploy: there was no copy to compare the new one with.".to_owned());
    }
    notes
}

fn phase_times(rollout: &Rollout, end: u64) -> Vec<PhaseTime> {
    let ends = rollout.phases.iter().skip(1).map(|(_, at)| *at).chain([end]);
    let times = rollout.phases.iter().zip(ends);
    times
        .map(|((phase, at), end)| PhaseTime { phase: *phase, duration_ms: end.saturating_sub(*at) })
        .collect()
}

fn zero(receipt: &DrainReceipt) -> DrainReceipt {
    DrainReceipt {
        generation: receipt.generation,
        empty: false,
        started: 0,
        completed: PerClass::default(),
        soft_closed: PerClass::default(),
        hard_cut: Vec::new(),
        hard_cut_classes: Vec::new(),
        retried: 0,
        in_flight: PerClass::default(),
        bytes_to_upstream: 0,
        bytes_to_client: 0,
        lost: Vec::new(),
    }
}

fn counts(now: &PerClass<u64>, base: &PerClass<u64>) -> ClassCounts {
    let of = |class: TrafficClass| now[class].saturating_sub(base[class]);
    ClassCounts {
        request: of(TrafficClass::Request),
        transfer: of(TrafficClass::Transfer),
        sse: of(TrafficClass::Sse),
        grpc_stream: of(TrafficClass::GrpcStream),
        websocket: of(TrafficClass::WebSocket),
        held: of(TrafficClass::Held),
    }
}

const fn add(sum: &mut ClassCounts, more: ClassCounts) {
    sum.request += more.request;
    sum.transfer += more.transfer;
    sum.sse += more.sse;
    sum.grpc_stream += more.grpc_stream;
    sum.websocket += more.websocket;
    sum.held += more.held;
}
