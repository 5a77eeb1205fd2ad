//! News as plain lines with a time in front: for pipelines, log files and dumb terminals.

use jiff::Timestamp;
use peregrine_api::types::Sample;

use super::story::News;
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::render;
use crate::cli::table::clean;

/// Readings are told at most so often.
const READING_EVERY_MS: u64 = 2_000;

/// Writes one line for each piece of news.
pub(crate) struct Plain {
    out: Output,
    service: String,
    last_reading: Option<Timestamp>,
}

impl Plain {
    /// For the moves of a service.
    pub(crate) fn new(out: Output, service: &str) -> Self {
        Self { out, service: clean(service), last_reading: None }
    }

    /// Tells it.
    pub(crate) fn tell(&mut self, news: &News, now: Timestamp) {
        if let News::Reading(sample) = news {
            let due = self
                .last_reading
                .is_none_or(|last| human::millis_between(last, sample.time) >= READING_EVERY_MS);
            if !due {
                return;
            }
            self.last_reading = Some(sample.time);
        }
        if let Some(text) = line(news) {
            self.out.note(&format!("{} {} {text}", human::stamp(now), self.service));
        }
    }
}

fn line(news: &News) -> Option<String> {
    Some(match news {
        News::Begun(phase) => format!("{} …", phase.name()),
        News::Ended { phase, took_ms, bytes } => {
            let bytes = bytes.map(|bytes| format!(", {}", human::bytes(bytes))).unwrap_or_default();
            format!("{} done in {}{bytes}", phase.name(), human::millis(*took_ms))
        }
        News::Weight(percent) => format!("{percent} % of the traffic is on the new copies"),
        News::Progress(progress) => clean(&progress.text()),
        News::Verdict { verdict, message } => format!("verdict {}: {}", clean(verdict), clean(message)),
        News::Reading(sample) => reading(sample),
        News::Waiting(what) => format!("waiting for {}", clean(what)),
        News::TurnedBack(problem) => {
            format!("going back: {} [{}]", render::finding(problem), clean(&problem.code))
        }
        News::State(state) => render::state(*state).to_owned(),
        News::Instance(change) => clean(change),
        News::Done(state) => render::state(*state).to_owned(),
    })
}

/// `old 118/s p95 4.20 ms · new 121/s p95 4.40 ms · failed 0 of 1,234`.
pub(crate) fn reading(sample: &Sample) -> String {
    format!(
        "old {} p95 {} · new {} p95 {} · failed {} of {}",
        human::rate(sample.from.requests_per_s),
        human::micros_or_dash(sample.from.p95_us),
        human::rate(sample.to.requests_per_s),
        human::micros_or_dash(sample.to.p95_us),
        human::count(sample.totals.failed),
        human::count(sample.totals.requests),
    )
}

#[cfg(test)]
mod tests {
    use peregrine_api::types::{MoveState, Phase};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_says_what_happened_without_any_escape() {
        let ended = News::Ended { phase: Phase::Prepare, took_ms: 9_100, bytes: Some(182 << 20) };
        assert_eq!(line(&ended).unwrap(), "prepare done in 9.10 s, 182 MiB");
        let evil = News::Waiting("health\u{1b}[2J\n1/3".into());
        assert_eq!(line(&evil).unwrap(), "waiting for health [2J 1/3");
        assert_eq!(line(&News::Done(MoveState::RolledBack)).unwrap(), "rolled_back");
    }

    #[test]
    fn a_reading_shows_both_sides_and_the_failed_requests() {
        let side = |rate: f64, p95: Option<u64>| json!({"requests_per_s": rate, "in_flight": 1, "errors": 0, "p50_us": null, "p95_us": p95, "p99_us": null});
        let sample: Sample = serde_json::from_value(json!({
            "time": "2026-01-31T12:00:00Z", "weight_percent": 50, "from": side(118.2, Some(4200)), "to": side(0.0, None),
            "totals": {"requests": 1234, "failed": 0, "longest_us": 9000}
        }))
        .unwrap();
        assert_eq!(reading(&sample), "old 118/s p95 4.20 ms · new 0/s p95 - · failed 0 of 1,234");
    }
}
