//! Events: the ordered, resumable story of everything that happens.

use jiff::Timestamp;
use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Finding, MoveKind, MoveState, Phase, Sample, instant};

/// One event: the `data` of a server-sent event. Its `id` and `type` are also the `id:` and `event:` lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(from = "RawEvent", into = "RawEvent")]
pub struct Event {
    /// Position in the stream, rising. A sample is live only and carries the id of the stored event before it.
    pub id: u64,
    /// When.
    pub time: Timestamp,
    /// Service that it is about.
    pub service: Option<String>,
    /// Move that it is about.
    #[serde(rename = "move")]
    pub move_id: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub body: EventBody,
}

/// What happened: a `type`, and `data` that belongs to the type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", content = "data")]
pub enum EventBody {
    /// A machine was added.
    #[serde(rename = "machine.added")]
    MachineAdded {
        /// Machine.
        machine: String,
    },
    /// A machine was removed.
    #[serde(rename = "machine.removed")]
    MachineRemoved {
        /// Machine.
        machine: String,
    },
    /// An engine that was replaced while it stood still went on, and its late writes were refused.
    #[serde(rename = "engine.fenced")]
    EngineFenced {
        /// Its epoch.
        epoch: u64,
        /// Batches that it tried to write.
        writes: u64,
    },
    /// A service was created or its settings changed.
    #[serde(rename = "service.changed")]
    ServiceChanged {},
    /// A service was removed.
    #[serde(rename = "service.removed")]
    ServiceRemoved {},
    /// A move was accepted.
    #[serde(rename = "move.created")]
    MoveCreated {
        /// Kind of change.
        kind: MoveKind,
    },
    /// A move entered a phase.
    #[serde(rename = "move.phase")]
    MovePhase {
        /// Phase.
        phase: Phase,
    },
    /// Weights changed, and every edge has acknowledged them.
    #[serde(rename = "move.weight")]
    MoveWeight {
        /// Percent on the new copies.
        weight_percent: u8,
    },
    /// Progress inside a phase.
    #[serde(rename = "move.progress")]
    MoveProgress {
        /// What goes on.
        message: String,
        /// Bytes done, for transfers.
        bytes_done: Option<u64>,
        /// Bytes in all, if known.
        bytes_total: Option<u64>,
    },
    /// The verdict on a step of the shift.
    #[serde(rename = "move.guard")]
    MoveGuard {
        /// `pass`, `fail` or `inconclusive`.
        verdict: String,
        /// The numbers behind it.
        message: String,
    },
    /// A live reading; not stored.
    #[serde(rename = "move.sample")]
    MoveSample(Sample),
    /// A move turned back.
    #[serde(rename = "move.turned_back")]
    MoveTurnedBack {
        /// Why.
        problem: Finding,
    },
    /// A move is held where it stands, because this version cannot read its plan.
    #[serde(rename = "move.held")]
    MoveHeld {
        /// Why, and what to do.
        problem: Finding,
    },
    /// A move ended.
    #[serde(rename = "move.done")]
    MoveDone {
        /// How.
        state: MoveState,
        /// Why, unless it succeeded.
        problem: Option<Finding>,
    },
    /// An instance changed its state or died.
    #[serde(rename = "instance.changed")]
    InstanceChanged {
        /// Instance id.
        instance: String,
        /// In words.
        change: String,
    },
    /// A type that this client does not know: a later server speaks.
    #[serde(skip)]
    #[schema(ignore)]
    Unknown {
        /// Its type.
        kind: String,
        /// Its data.
        data: serde_json::Value,
    },
}

/// The form on the wire, in which a type that nobody knows yet is no error.
#[derive(Clone, Serialize, Deserialize)]
struct RawEvent {
    id: u64,
    time: Timestamp,
    #[serde(default)]
    service: Option<String>,
    #[serde(rename = "move", default)]
    move_id: Option<String>,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    data: serde_json::Value,
}

impl From<RawEvent> for Event {
    fn from(raw: RawEvent) -> Self {
        let tagged = serde_json::json!({"type": raw.kind, "data": raw.data});
        let body =
            serde_json::from_value(tagged).unwrap_or(EventBody::Unknown { kind: raw.kind, data: raw.data });
        Self { id: raw.id, time: raw.time, service: raw.service, move_id: raw.move_id, body }
    }
}

impl From<Event> for RawEvent {
    fn from(event: Event) -> Self {
        let (kind, data) = event.body.into_parts();
        Self { id: event.id, time: event.time, service: event.service, move_id: event.move_id, kind, data }
    }
}

impl EventBody {
    fn into_parts(self) -> (String, serde_json::Value) {
        if let Self::Unknown { kind, data } = self {
            return (kind, data);
        }
        // A body of our own always becomes an object with these two keys: it has string keys only.
        let mut tagged = serde_json::to_value(&self).unwrap_or_default();
        (self.kind().to_owned(), tagged["data"].take())
    }

    /// The type, such as `move.phase`.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::MachineAdded { .. } => "machine.added",
            Self::MachineRemoved { .. } => "machine.removed",
            Self::EngineFenced { .. } => "engine.fenced",
            Self::ServiceChanged {} => "service.changed",
            Self::ServiceRemoved {} => "service.removed",
            Self::MoveCreated { .. } => "move.created",
            Self::MovePhase { .. } => "move.phase",
            Self::MoveWeight { .. } => "move.weight",
            Self::MoveProgress { .. } => "move.progress",
            Self::MoveGuard { .. } => "move.guard",
            Self::MoveSample(_) => "move.sample",
            Self::MoveTurnedBack { .. } => "move.turned_back",
            Self::MoveHeld { .. } => "move.held",
            Self::MoveDone { .. } => "move.done",
            Self::InstanceChanged { .. } => "instance.changed",
            Self::Unknown { kind, .. } => kind,
        }
    }

    /// Whether it is kept: one that is not can be missed by a reader that was away.
    #[must_use]
    pub const fn is_stored(&self) -> bool {
        !matches!(self, Self::MoveSample(_))
    }
}

impl From<&engine::Event> for Event {
    fn from(event: &engine::Event) -> Self {
        Self {
            id: event.id,
            time: instant(event.at),
            service: event.service.clone(),
            move_id: event.rollout.as_ref().map(ToString::to_string),
            body: (&event.body).into(),
        }
    }
}

impl From<&engine::EventBody> for EventBody {
    fn from(body: &engine::EventBody) -> Self {
        use engine::EventBody as Told;
        match body {
            Told::MachineAdded { machine } => Self::MachineAdded { machine: machine.clone() },
            Told::MachineRemoved { machine } => Self::MachineRemoved { machine: machine.clone() },
            Told::EngineFenced { epoch, writes } => Self::EngineFenced { epoch: *epoch, writes: *writes },
            Told::ServiceChanged {} => Self::ServiceChanged {},
            Told::ServiceRemoved {} => Self::ServiceRemoved {},
            Told::RolloutCreated { kind } => Self::MoveCreated { kind: (*kind).into() },
            Told::Phase { phase } => Self::MovePhase { phase: (*phase).into() },
            Told::Weight { percent } => Self::MoveWeight { weight_percent: *percent },
            Told::Progress { message, bytes_done, bytes_total } => Self::MoveProgress {
                message: message.clone(),
                bytes_done: *bytes_done,
                bytes_total: *bytes_total,
            },
            Told::Guard { verdict, message } => {
                Self::MoveGuard { verdict: verdict.clone(), message: message.clone() }
            }
            Told::Sample(sample) => Self::MoveSample(sample.into()),
            Told::TurnedBack { problem } => Self::MoveTurnedBack { problem: problem.into() },
            Told::Held { problem } => Self::MoveHeld { problem: problem.into() },
            Told::Done { state, problem } => {
                Self::MoveDone { state: (*state).into(), problem: problem.as_ref().map(Into::into) }
            }
            Told::InstanceChanged { instance, change } => {
                Self::InstanceChanged { instance: instance.to_string(), change: change.clone() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(body: engine::EventBody) -> Event {
        Event::from(&engine::Event {
            id: 7,
            at: 1_000,
            service: Some("shop".into()),
            rollout: Some(engine::RolloutId("mov_1".into())),
            body,
        })
    }

    fn every_body() -> Vec<engine::EventBody> {
        use engine::EventBody as B;
        let finding = engine::Finding { code: "a.b".into(), message: "m".into(), hint: "h".into() };
        vec![
            B::MachineAdded { machine: "a".into() },
            B::MachineRemoved { machine: "a".into() },
            B::EngineFenced { epoch: 7, writes: 2 },
            B::ServiceChanged {},
            B::ServiceRemoved {},
            B::RolloutCreated { kind: engine::RolloutKind::Scale },
            B::Phase { phase: engine::Phase::Warm },
            B::Weight { percent: 50 },
            B::Progress { message: "image".into(), bytes_done: Some(1), bytes_total: None },
            B::Guard { verdict: "pass".into(), message: "ok".into() },
            B::Sample(engine::Sample {
                at: 1,
                weight_percent: 50,
                from: engine::SideSample::default(),
                to: engine::SideSample::default(),
                totals: engine::Totals::default(),
            }),
            B::TurnedBack { problem: finding.clone() },
            B::Held { problem: finding.clone() },
            B::Done { state: engine::RolloutState::RolledBack, problem: Some(finding) },
            B::InstanceChanged { instance: engine::InstanceId("ins_1".into()), change: "serving".into() },
        ]
    }

    #[test]
    fn every_event_of_the_engine_is_read_back_by_the_client_as_it_was_told() {
        for body in every_body() {
            let event = told(body);
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["type"], event.body.kind());
            assert_eq!(json["move"], "mov_1");
            assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
        }
    }

    #[test]
    fn an_event_of_a_type_from_the_future_is_kept_as_it_is() {
        let json = serde_json::json!({
            "id": 9, "time": "2026-01-01T00:00:00Z", "service": null, "move": null,
            "type": "moon.phase", "data": {"x": 1}
        });
        let event: Event = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(event.body.kind(), "moon.phase");
        assert_eq!(serde_json::to_value(&event).unwrap(), json);
    }
}
