//! Moves: every rollout (deploy, move, rollback, scale) on its way, under one name.

use jiff::Timestamp;
use peregrine_engine::{State, model as engine};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Estimate, Finding, instant};

/// A rollout on its way, or ended: what it does, where it stands and what may be asked of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Move {
    /// Id, `mov_…`. Ids sort by time.
    pub id: String,
    /// Service.
    pub service: String,
    /// Kind of change.
    pub kind: MoveKind,
    /// Where it stands.
    pub state: MoveState,
    /// Phase of the present step.
    pub phase: Phase,
    /// The phases entered so far, in order.
    pub phases: Vec<PhaseTime>,
    /// Position in the plan.
    pub step: StepPosition,
    /// Percent of the traffic on the new copies.
    pub weight_percent: u8,
    /// Version that served before.
    pub from_version: Option<u32>,
    /// Version that serves after.
    pub to_version: u32,
    /// Where the old copies are.
    pub from: Vec<Place>,
    /// Where the new copies are.
    pub to: Vec<Place>,
    /// What an operator asked of it last.
    pub control: Control,
    /// Who asked for it, and why.
    pub reason: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// What the present step waits for.
    pub waiting_for: Option<String>,
    /// Limits that stop the shift. The verdict on a step is in the `move.guard` events.
    pub guards: Vec<Guard>,
    /// Counts since it began; `null` before the first reading.
    pub totals: Option<Totals>,
    /// Latest live reading; `null` when it has ended or before the first one.
    pub sample: Option<Sample>,
    /// Bytes of image brought to targets.
    pub transferred_bytes: u64,
    /// What it was expected to take.
    pub estimate: Estimate,
    /// Hash of its plan.
    pub plan_hash: String,
    /// Why it failed or went back.
    pub problem: Option<Finding>,
    /// What an undo could not clean up.
    pub leftovers: Vec<String>,
    /// What may be asked of it now.
    #[serde(rename = "_actions")]
    pub actions: Vec<Action>,
    /// Where to go on.
    #[serde(rename = "_links")]
    pub links: Links,
}

/// What kind of change a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveKind {
    /// A new version.
    Deploy,
    /// A new place.
    Move,
    /// An earlier version or place.
    Rollback,
    /// Another number of copies.
    Scale,
}

/// Where a move stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveState {
    /// On its way forward.
    Running,
    /// Held by an operator, or by a shift without a verdict.
    Paused,
    /// On its way back.
    RollingBack,
    /// Done.
    Succeeded,
    /// Back on the old copies because of a failure or a guard.
    RolledBack,
    /// Back on the old copies because it was asked for.
    Aborted,
    /// It could not be done; the service is as it was, or had no copy before.
    Failed,
    /// An undo failed; `leftovers` says what is left.
    NeedsOperator,
}

impl MoveState {
    /// Whether it has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(self, Self::Running | Self::Paused | Self::RollingBack)
    }
}

/// The phases of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Deciding.
    Plan,
    /// Getting a machine.
    Provision,
    /// Bringing the image.
    Prepare,
    /// Copying volumes.
    Copy,
    /// Starting the copies.
    Start,
    /// Probing them.
    Warm,
    /// Shifting the traffic.
    Shift,
    /// Draining the old copies.
    Drain,
    /// Keeping them ready.
    Soak,
    /// Giving them back.
    Release,
}

impl Phase {
    /// Its name on the wire, in events, metrics and on the screen.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Provision => "provision",
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::Start => "start",
            Self::Warm => "warm",
            Self::Shift => "shift",
            Self::Drain => "drain",
            Self::Soak => "soak",
            Self::Release => "release",
        }
    }
}

/// A phase with its times.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseTime {
    /// Phase.
    pub phase: Phase,
    /// When it began.
    pub started_at: Timestamp,
    /// How long it took; `null` while it goes on.
    pub duration_ms: Option<u64>,
}

/// Position in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StepPosition {
    /// Index of the present step, from 0.
    pub index: u32,
    /// Steps in all.
    pub total: u32,
}

/// A copy's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// Instance id.
    pub instance: String,
    /// Machine; `null` when the instance has been forgotten.
    pub machine: Option<String>,
}

/// What an operator asked of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Go on.
    Run,
    /// Stay at the present weights.
    Pause,
    /// Skip what is left of the present step's waiting, or the soak.
    Promote,
    /// Go back to the old copies.
    Abort,
}

/// A limit that stops the shift, with its latest reading.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Guard {
    /// `error_ratio_increase` or `p95_increase`.
    pub name: String,
    /// Limit; `null` is off.
    pub limit: Option<f64>,
    /// Reading from the latest sample; `null` when there is none.
    pub value: Option<f64>,
    /// The reading is within the limit; `null` when there is none.
    pub ok: Option<bool>,
}

/// Counts over the whole move so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Totals {
    /// Requests sent to old and new copies.
    pub requests: u64,
    /// Answers 5xx and requests without an answer.
    pub failed: u64,
    /// Longest time to a response head, rounded up to its bucket; `null` when only the receipt knows.
    pub longest_us: Option<u64>,
}

/// A live reading of a move, about once a second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// When.
    pub time: Timestamp,
    /// Percent on the new copies.
    pub weight_percent: u8,
    /// Old copies.
    pub from: SideSample,
    /// New copies.
    pub to: SideSample,
    /// Since the move began.
    pub totals: Totals,
}

/// One side of a [`Sample`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SideSample {
    /// Requests per second since the sample before.
    pub requests_per_s: f64,
    /// Requests and connections inside now.
    pub in_flight: u64,
    /// Errors since the sample before.
    pub errors: u64,
    /// Median time to the response head since the sample before; `null` without requests.
    pub p50_us: Option<u64>,
    /// 95th percentile.
    pub p95_us: Option<u64>,
    /// 99th percentile.
    pub p99_us: Option<u64>,
}

/// What may be asked of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Stay at the present weights.
    Pause,
    /// Go on after a pause.
    Resume,
    /// Skip what is left of the present waiting.
    Promote,
    /// Go back to the old copies.
    Abort,
    /// Go back after the end.
    Rollback,
    /// Try again to remove what was left over.
    Cleanup,
}

/// Where to go on from a move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Links {
    /// The move.
    #[serde(rename = "self")]
    pub this: String,
    /// Its events.
    pub events: String,
    /// Its receipt, once there is one.
    pub receipt: Option<String>,
}

impl Move {
    /// A rollout with its latest live reading.
    #[must_use]
    pub fn of(rollout: &engine::Rollout, sample: Option<&engine::Sample>, state: &State) -> Self {
        let plan = &rollout.plan;
        let sample = sample.filter(|_| !rollout.state.is_terminal()).map(Sample::from);
        Self {
            id: rollout.id.to_string(),
            service: plan.service.clone(),
            kind: plan.kind.into(),
            state: rollout.state.into(),
            phase: rollout.phase.into(),
            phases: phase_times(rollout),
            step: StepPosition { index: count(rollout.step), total: count(plan.steps.len()) },
            weight_percent: rollout.weight_percent,
            from_version: plan.from_version,
            to_version: plan.to_version,
            from: plan.retire.iter().map(|id| Place::of(id, rollout, state)).collect(),
            to: plan
                .add
                .iter()
                .map(|new| Place { instance: new.id.to_string(), machine: Some(new.machine.clone()) })
                .collect(),
            control: rollout.control.into(),
            reason: rollout.reason.clone(),
            started_at: instant(rollout.started_at),
            ended_at: rollout.ended_at.map(instant),
            waiting_for: rollout.waiting_for.clone(),
            guards: Guard::all(&plan.settings.guards, sample.as_ref()),
            totals: totals(rollout, sample.as_ref()),
            sample,
            transferred_bytes: rollout.transferred_bytes,
            estimate: (&plan.estimate).into(),
            plan_hash: plan.hash.clone(),
            problem: rollout.problem.as_ref().map(Into::into),
            leftovers: rollout.leftovers.clone(),
            actions: actions(rollout, state),
            links: Links::of(rollout),
        }
    }
}

/// What the engine would take now. The engine decides when it is asked; this is what a reader is told before.
fn actions(rollout: &engine::Rollout, state: &State) -> Vec<Action> {
    let goes_back = rollout.control == engine::Control::Abort;
    let forward = match rollout.state {
        engine::RolloutState::Running if !goes_back => Action::Pause,
        engine::RolloutState::Paused if !goes_back => Action::Resume,
        engine::RolloutState::Succeeded if is_newest_and_service_is_free(rollout, state) => {
            return vec![Action::Rollback];
        }
        ended if ended.is_terminal() && !rollout.leftovers.is_empty() => {
            let service = state.services.get(&rollout.plan.service);
            let is_free = service.is_none_or(|service| service.rollout.is_none());
            return if is_free { vec![Action::Cleanup] } else { Vec::new() };
        }
        _ => return Vec::new(),
    };
    // While the old copies are being removed there is nothing to wait for and nothing to go back to.
    if rollout.phase == engine::Phase::Release {
        vec![forward]
    } else {
        vec![forward, Action::Promote, Action::Abort]
    }
}

fn is_newest_and_service_is_free(rollout: &engine::Rollout, state: &State) -> bool {
    let free = state.services.get(&rollout.plan.service).is_some_and(|service| service.rollout.is_none());
    let newest = state
        .rollouts
        .range(rollout.id.clone()..)
        .skip(1)
        .all(|(_, later)| later.plan.service != rollout.plan.service);
    free && newest
}

fn phase_times(rollout: &engine::Rollout) -> Vec<PhaseTime> {
    let ends = rollout.phases.iter().skip(1).map(|(_, at)| Some(*at)).chain([rollout.ended_at]);
    rollout
        .phases
        .iter()
        .zip(ends)
        .map(|((phase, start), end)| PhaseTime {
            phase: (*phase).into(),
            started_at: instant(*start),
            duration_ms: end.map(|end| end.saturating_sub(*start)),
        })
        .collect()
}

fn totals(rollout: &engine::Rollout, sample: Option<&Sample>) -> Option<Totals> {
    let from_receipt = rollout.receipt.as_ref().map(|receipt| Totals {
        requests: receipt.requests,
        failed: receipt.failed,
        longest_us: None,
    });
    from_receipt.or_else(|| sample.map(|sample| sample.totals.clone()))
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Place {
    fn of(id: &engine::InstanceId, rollout: &engine::Rollout, state: &State) -> Self {
        let in_receipt = || {
            let receipt = rollout.receipt.as_ref()?;
            receipt.instances.iter().find(|part| part.instance == *id).map(|part| part.machine.clone())
        };
        let machine = state.instances.get(id).map(|instance| instance.machine.clone()).or_else(in_receipt);
        Self { instance: id.to_string(), machine }
    }
}

impl Links {
    fn of(rollout: &engine::Rollout) -> Self {
        let this = format!("/api/v1/moves/{}", rollout.id);
        Self {
            events: format!("{this}/events"),
            receipt: rollout.receipt.as_ref().map(|_| format!("{this}/receipt")),
            this,
        }
    }
}

impl Guard {
    fn all(guards: &engine::Guards, sample: Option<&Sample>) -> Vec<Self> {
        let errors =
            sample.and_then(|sample| Some((error_ratio(&sample.to)? - error_ratio(&sample.from)?).max(0.0)));
        let p95 = sample.and_then(|sample| {
            let (old, new) = (sample.from.p95_us?, sample.to.p95_us?);
            (old > 0).then(|| (new as f64 / old as f64 - 1.0).max(0.0))
        });
        vec![
            Self::new("error_ratio_increase", Some(guards.error_ratio_increase), errors),
            Self::new("p95_increase", guards.p95_increase, p95),
        ]
    }

    fn new(name: &str, limit: Option<f64>, value: Option<f64>) -> Self {
        let ok = limit.zip(value).map(|(limit, value)| value <= limit);
        Self { name: name.to_owned(), limit, value, ok }
    }
}

/// Errors of a side among its requests of the latest second; nothing without requests.
fn error_ratio(side: &SideSample) -> Option<f64> {
    (side.requests_per_s > 0.0).then(|| (side.errors as f64 / side.requests_per_s).min(1.0))
}

impl From<&engine::Sample> for Sample {
    fn from(sample: &engine::Sample) -> Self {
        Self {
            time: instant(sample.at),
            weight_percent: sample.weight_percent,
            from: (&sample.from).into(),
            to: (&sample.to).into(),
            totals: Totals {
                requests: sample.totals.requests,
                failed: sample.totals.failed,
                longest_us: Some(sample.totals.longest_us),
            },
        }
    }
}

impl From<&engine::SideSample> for SideSample {
    fn from(side: &engine::SideSample) -> Self {
        Self {
            requests_per_s: side.requests_per_s,
            in_flight: side.in_flight,
            errors: side.errors,
            p50_us: side.p50_us,
            p95_us: side.p95_us,
            p99_us: side.p99_us,
        }
    }
}

impl From<engine::RolloutKind> for MoveKind {
    fn from(kind: engine::RolloutKind) -> Self {
        match kind {
            engine::RolloutKind::Deploy => Self::Deploy,
            engine::RolloutKind::Move => Self::Move,
            engine::RolloutKind::Rollback => Self::Rollback,
            engine::RolloutKind::Scale => Self::Scale,
        }
    }
}

impl From<engine::RolloutState> for MoveState {
    fn from(state: engine::RolloutState) -> Self {
        match state {
            engine::RolloutState::Running => Self::Running,
            engine::RolloutState::Paused => Self::Paused,
            engine::RolloutState::RollingBack => Self::RollingBack,
            engine::RolloutState::Succeeded => Self::Succeeded,
            engine::RolloutState::RolledBack => Self::RolledBack,
            engine::RolloutState::Aborted => Self::Aborted,
            engine::RolloutState::Failed => Self::Failed,
            engine::RolloutState::NeedsOperator => Self::NeedsOperator,
        }
    }
}

impl From<engine::Phase> for Phase {
    fn from(phase: engine::Phase) -> Self {
        match phase {
            engine::Phase::Plan => Self::Plan,
            engine::Phase::Provision => Self::Provision,
            engine::Phase::Prepare => Self::Prepare,
            engine::Phase::Copy => Self::Copy,
            engine::Phase::Start => Self::Start,
            engine::Phase::Warm => Self::Warm,
            engine::Phase::Shift => Self::Shift,
            engine::Phase::Drain => Self::Drain,
            engine::Phase::Soak => Self::Soak,
            engine::Phase::Release => Self::Release,
        }
    }
}

impl From<engine::Control> for Control {
    fn from(control: engine::Control) -> Self {
        match control {
            engine::Control::Run => Self::Run,
            engine::Control::Pause => Self::Pause,
            engine::Control::Promote => Self::Promote,
            engine::Control::Abort => Self::Abort,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn rollout(state: engine::RolloutState, phase: engine::Phase) -> engine::Rollout {
        engine::Rollout {
            id: engine::RolloutId::generate(),
            plan: engine::Plan {
                format: engine::PLAN_FORMAT,
                service: "shop".into(),
                kind: engine::RolloutKind::Move,
                from_version: Some(1),
                to_version: 1,
                add: vec![engine::PlannedInstance {
                    id: engine::InstanceId("ins_new".into()),
                    machine: "host-b".into(),
                    version: 1,
                }],
                retire: vec![engine::InstanceId("ins_old".into())],
                keep: Vec::new(),
                steps: vec![engine::Step::Claim, engine::Step::Warm],
                settings: engine::MoveSettings::default(),
                blockers: Vec::new(),
                warnings: Vec::new(),
                estimate: engine::Estimate::default(),
                hash: "abc".into(),
            },
            state,
            phase,
            step: 1,
            epoch: 3,
            control: engine::Control::Run,
            weight_percent: 10,
            reason: "test".into(),
            started_at: 1_000,
            ended_at: None,
            phases: vec![(engine::Phase::Plan, 1_000), (engine::Phase::Start, 1_250)],
            waiting_for: None,
            problem: None,
            hold: None,
            leftovers: Vec::new(),
            transferred_bytes: 0,
            mirror: None,
            receipt: None,
        }
    }

    fn side(requests_per_s: f64, errors: u64, p95_us: Option<u64>) -> engine::SideSample {
        engine::SideSample { requests_per_s, errors, p95_us, ..Default::default() }
    }

    #[test]
    fn what_may_be_asked_follows_from_state_and_phase() {
        use engine::{Phase as P, RolloutState as S};
        let told = |state, phase| Move::of(&rollout(state, phase), None, &State::default()).actions;
        assert_eq!(told(S::Running, P::Release), [Action::Pause]);
        assert_eq!(told(S::Running, P::Shift), [Action::Pause, Action::Promote, Action::Abort]);
        assert_eq!(told(S::Paused, P::Shift), [Action::Resume, Action::Promote, Action::Abort]);
        assert_eq!(told(S::RollingBack, P::Shift), []);
        for ended in [S::Aborted, S::RolledBack, S::Failed, S::NeedsOperator] {
            assert_eq!(told(ended, P::Release), [], "{ended:?}");
        }
        let mut left_over = rollout(S::NeedsOperator, P::Release);
        left_over.leftovers.push("ins_old on host-a".into());
        assert_eq!(Move::of(&left_over, None, &State::default()).actions, [Action::Cleanup]);
    }

    #[test]
    fn a_phase_that_goes_on_has_no_duration_and_one_that_ended_has() {
        let told =
            Move::of(&rollout(engine::RolloutState::Running, engine::Phase::Start), None, &State::default());
        let durations: Vec<_> = told.phases.iter().map(|phase| phase.duration_ms).collect();
        assert_eq!(durations, [Some(250), None]);
    }

    #[test]
    fn a_guard_reads_the_latest_sample_and_says_nothing_without_one() {
        let rollout = rollout(engine::RolloutState::Running, engine::Phase::Shift);
        let without = Move::of(&rollout, None, &State::default());
        assert!(without.guards.iter().all(|guard| guard.value.is_none() && guard.ok.is_none()));
        let sample = engine::Sample {
            at: 1,
            weight_percent: 10,
            from: side(100.0, 0, Some(10_000)),
            to: side(100.0, 5, Some(15_000)),
            totals: engine::Totals::default(),
        };
        let told = Move::of(&rollout, Some(&sample), &State::default());
        assert_eq!(told.guards[0].value, Some(0.05));
        assert_eq!(told.guards[0].ok, Some(false));
        assert_eq!(told.guards[1].value, Some(0.5));
        assert_eq!(told.guards[1].ok, Some(true));
    }

    #[test]
    fn a_move_is_read_back_by_a_client_even_with_fields_that_it_does_not_know() {
        let told =
            Move::of(&rollout(engine::RolloutState::Running, engine::Phase::Start), None, &State::default());
        let mut json = serde_json::to_value(&told).unwrap();
        json["from_the_future"] = serde_json::json!({"x": 1});
        assert_eq!(serde_json::from_value::<Move>(json).unwrap(), told);
    }
}
