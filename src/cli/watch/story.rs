//! The story of a move: events and readings in, news out. Pure, and deaf to repetitions, so that a
//! reconnected stream or a poll beside the stream tells nothing twice.

use jiff::Timestamp;
use peregrine_api::types::{Event, EventBody, Finding, Move, MoveState, Phase, Sample};

use crate::cli::human;

/// Progress inside a phase is told at most so often, and whenever its words change.
const PROGRESS_EVERY_MS: u64 = 1_000;

/// Something worth telling.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum News {
    /// A phase began.
    Begun(Phase),
    /// A phase ended.
    Ended {
        /// Which.
        phase: Phase,
        /// How long it took.
        took_ms: u64,
        /// Bytes that it brought, if it brought any.
        bytes: Option<u64>,
    },
    /// Weights changed, and the edges have acknowledged it.
    Weight(u8),
    /// How far a phase is.
    Progress(Progress),
    /// A step of the shift was judged.
    Verdict {
        /// `pass`, `fail`, `inconclusive`.
        verdict: String,
        /// The numbers behind it.
        message: String,
    },
    /// A live reading.
    Reading(Sample),
    /// It waits for something.
    Waiting(String),
    /// It turned back.
    TurnedBack(Finding),
    /// It was paused, or goes on.
    State(MoveState),
    /// An instance changed or died.
    Instance(String),
    /// It ended.
    Done(MoveState),
}

/// How far a phase is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// What goes on.
    pub(crate) message: String,
    /// Bytes done.
    pub(crate) done: Option<u64>,
    /// Bytes in all.
    pub(crate) total: Option<u64>,
}

impl Progress {
    /// As a line: `image to host-b: 12.0 MiB of 182 MiB (7 %)`.
    pub(crate) fn text(&self) -> String {
        match (self.done, self.total) {
            (Some(done), Some(total)) if total > 0 => {
                let percent = done.saturating_mul(100) / total;
                format!("{}: {} of {} ({percent} %)", self.message, human::bytes(done), human::bytes(total))
            }
            (Some(done), _) => format!("{}: {}", self.message, human::bytes(done)),
            _ => self.message.clone(),
        }
    }
}

/// What has been told so far.
#[derive(Debug, Default)]
pub(crate) struct Story {
    last_event: u64,
    phase: Option<(Phase, Timestamp)>,
    phase_bytes: Option<u64>,
    progress: Option<(String, Timestamp)>,
    waiting: Option<String>,
    state: Option<MoveState>,
    weight: Option<u8>,
    turned_back: bool,
    ended: bool,
}

impl Story {
    /// The move has ended, and it was told.
    pub(crate) const fn has_ended(&self) -> bool {
        self.ended
    }

    /// What is new in an event.
    pub(crate) fn hear(&mut self, event: &Event) -> Vec<News> {
        if event.body.is_stored() {
            if event.id <= self.last_event {
                return Vec::new();
            }
            self.last_event = event.id;
        }
        if self.ended || self.phase.is_some_and(|(_, since)| event.time < since) {
            return Vec::new(); // a reading was ahead of the stream and has told it
        }
        match &event.body {
            EventBody::MovePhase { phase } => self.enter(*phase, event.time),
            EventBody::MoveWeight { weight_percent } => self.weight(*weight_percent),
            EventBody::MoveProgress { message, bytes_done, bytes_total } => {
                let progress = Progress { message: message.clone(), done: *bytes_done, total: *bytes_total };
                self.progress(progress, event.time)
            }
            EventBody::MoveGuard { verdict, message } => {
                vec![News::Verdict { verdict: verdict.clone(), message: message.clone() }]
            }
            EventBody::MoveSample(sample) => vec![News::Reading(sample.clone())],
            EventBody::MoveTurnedBack { problem } => self.turn_back(problem),
            EventBody::MoveDone { state, .. } => self.end(*state, event.time),
            EventBody::InstanceChanged { instance, change } => {
                vec![News::Instance(format!("{instance} {change}"))]
            }
            _ => Vec::new(),
        }
    }

    /// What is new in a reading of the whole move: the states that no event tells, and whatever a broken
    /// stream has missed.
    pub(crate) fn read(&mut self, of: &Move, now: Timestamp) -> Vec<News> {
        if self.ended {
            return Vec::new();
        }
        let mut news = if self.phase.is_none() { ended_phases(of) } else { Vec::new() };
        if let Some(current) = of.phases.last()
            && self.phase.is_none_or(|(_, since)| current.started_at > since)
        {
            news.extend(self.enter(current.phase, current.started_at));
        }
        if of.weight_percent > 0 {
            news.extend(self.weight(of.weight_percent));
        }
        if self.waiting != of.waiting_for {
            self.waiting.clone_from(&of.waiting_for);
            news.extend(of.waiting_for.clone().map(News::Waiting));
        }
        if of.state.is_terminal() {
            news.extend(self.end(of.state, of.ended_at.unwrap_or(now)));
        } else if self.state.replace(of.state).is_some_and(|before| before != of.state) {
            news.push(News::State(of.state));
        }
        news
    }

    fn enter(&mut self, phase: Phase, at: Timestamp) -> Vec<News> {
        if self.phase.is_some_and(|(present, _)| present == phase) {
            return Vec::new();
        }
        let mut news: Vec<_> = self.leave(at).into_iter().collect();
        self.phase = Some((phase, at));
        news.push(News::Begun(phase));
        news
    }

    fn leave(&mut self, at: Timestamp) -> Option<News> {
        let (phase, since) = self.phase.take()?;
        self.progress = None;
        Some(News::Ended { phase, took_ms: human::millis_between(since, at), bytes: self.phase_bytes.take() })
    }

    fn weight(&mut self, percent: u8) -> Vec<News> {
        if self.weight.replace(percent) == Some(percent) { Vec::new() } else { vec![News::Weight(percent)] }
    }

    fn progress(&mut self, progress: Progress, at: Timestamp) -> Vec<News> {
        self.phase_bytes = progress.done.or(self.phase_bytes);
        let complete = progress.total.is_some() && progress.done == progress.total;
        let due = self.progress.as_ref().is_none_or(|(message, told)| {
            *message != progress.message || complete || human::millis_between(*told, at) >= PROGRESS_EVERY_MS
        });
        if !due {
            return Vec::new();
        }
        self.progress = Some((progress.message.clone(), at));
        vec![News::Progress(progress)]
    }

    fn turn_back(&mut self, problem: &Finding) -> Vec<News> {
        if std::mem::replace(&mut self.turned_back, true) {
            return Vec::new();
        }
        self.state = Some(MoveState::RollingBack);
        vec![News::TurnedBack(problem.clone())]
    }

    fn end(&mut self, state: MoveState, at: Timestamp) -> Vec<News> {
        self.ended = true;
        let mut news: Vec<_> = self.leave(at).into_iter().collect();
        news.push(News::Done(state));
        news
    }
}

/// The phases that were over when the watch began.
fn ended_phases(of: &Move) -> Vec<News> {
    let mut news = Vec::new();
    for part in of.phases.iter().rev().skip(1).rev() {
        let bytes =
            (part.phase == Phase::Prepare && of.transferred_bytes > 0).then_some(of.transferred_bytes);
        news.extend(part.duration_ms.map(|took_ms| News::Ended { phase: part.phase, took_ms, bytes }));
    }
    news
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::render::tests::a_move;

    #[expect(clippy::needless_pass_by_value, reason = "every caller makes it on the spot")]
    fn event(id: u64, seconds: f64, kind: &str, data: serde_json::Value) -> Event {
        let at = Timestamp::from_millisecond(1_769_860_800_000 + (seconds * 1e3) as i64).unwrap();
        serde_json::from_value(json!({
            "id": id, "time": at, "service": "shop", "move": "mov_1", "type": kind, "data": data
        }))
        .unwrap()
    }

    #[test]
    fn a_phase_ends_when_the_next_one_begins_and_says_how_long_it_took() {
        let mut story = Story::default();
        assert_eq!(
            story.hear(&event(1, 0.0, "move.phase", json!({"phase": "prepare"}))),
            [News::Begun(Phase::Prepare)]
        );
        story.hear(&event(
            2,
            0.5,
            "move.progress",
            json!({"message": "image", "bytes_done": 4096, "bytes_total": 4096}),
        ));
        let next = story.hear(&event(3, 1.2, "move.phase", json!({"phase": "start"})));
        let ended = News::Ended { phase: Phase::Prepare, took_ms: 1_200, bytes: Some(4096) };
        assert_eq!(next, [ended, News::Begun(Phase::Start)]);
    }

    #[test]
    fn a_repeated_event_is_told_once() {
        let mut story = Story::default();
        let phase = event(5, 0.0, "move.phase", json!({"phase": "warm"}));
        assert_eq!(story.hear(&phase).len(), 1);
        assert!(story.hear(&phase).is_empty());
        assert!(story.hear(&event(4, 0.0, "move.weight", json!({"weight_percent": 1}))).is_empty());
        assert_eq!(story.last_event, 5);
    }

    #[test]
    fn a_reading_tells_what_a_broken_stream_has_missed_and_nothing_twice() {
        let mut story = Story::default();
        story.hear(&event(1, 0.0, "move.phase", json!({"phase": "start"})));
        let mut of = a_move("running");
        of.waiting_for = Some("health 1/3".into());
        let now = of.started_at;
        let news = story.read(&of, now);
        assert!(news.contains(&News::Begun(Phase::Shift)), "{news:?}");
        assert!(news.contains(&News::Weight(50)), "{news:?}");
        assert!(news.contains(&News::Waiting("health 1/3".into())), "{news:?}");
        assert!(story.read(&of, now).is_empty());
        assert!(story.hear(&event(2, 1.2, "move.phase", json!({"phase": "shift"}))).is_empty());
    }

    #[test]
    fn a_watch_that_begins_in_the_middle_tells_the_phases_that_are_over_and_no_old_event() {
        let mut story = Story::default();
        let of = a_move("running");
        let news = story.read(&of, of.started_at);
        assert_eq!(news[0], News::Ended { phase: Phase::Start, took_ms: 1_200, bytes: None });
        assert_eq!(news[1], News::Begun(Phase::Shift));
        assert!(story.hear(&event(1, 0.0, "move.phase", json!({"phase": "start"}))).is_empty());
        assert_eq!(
            story.hear(&event(2, 1.5, "move.weight", json!({"weight_percent": 100}))),
            [News::Weight(100)]
        );
    }

    #[test]
    fn the_end_is_told_once_whoever_tells_it_first() {
        let mut story = Story::default();
        let of = a_move("rolled_back");
        assert!(story.read(&of, of.started_at).contains(&News::Done(MoveState::RolledBack)));
        assert!(story.has_ended());
        assert!(
            story
                .hear(&event(9, 3.0, "move.done", json!({"state": "rolled_back", "problem": null})))
                .is_empty()
        );
    }

    #[test]
    fn progress_is_told_once_a_second_and_at_its_end() {
        let mut story = Story::default();
        let told = |story: &mut Story, id, seconds, done: u64| {
            let data = json!({"message": "image", "bytes_done": done, "bytes_total": 100});
            story.hear(&event(id, seconds, "move.progress", data)).len()
        };
        assert_eq!(told(&mut story, 1, 0.0, 1), 1);
        assert_eq!(told(&mut story, 2, 0.3, 20), 0);
        assert_eq!(told(&mut story, 3, 1.1, 60), 1);
        assert_eq!(told(&mut story, 4, 1.2, 100), 1);
    }

    #[test]
    fn progress_in_bytes_says_of_how_many() {
        let progress =
            Progress { message: "image to host-b".into(), done: Some(12 << 20), total: Some(182 << 20) };
        assert_eq!(progress.text(), "image to host-b: 12.0 MiB of 182 MiB (6 %)");
        let unknown = Progress { total: None, ..progress };
        assert_eq!(unknown.text(), "image to host-b: 12.0 MiB");
    }
}
