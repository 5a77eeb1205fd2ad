//! News on a terminal: ended phases stay above, and below them three lines are redrawn: the phase with its
//! bar, the traffic on both sides, what is waited for.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use peregrine_api::types::{Finding, MoveState, Phase};

use super::plain;
use super::story::{News, Progress};
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::render;
use crate::cli::table::clean;

/// The bar is redrawn so often while nothing happens.
const TICK_MS: u64 = 100;

/// Redraws.
const DRAWS_PER_SECOND: u8 = 20;

/// Draws on standard error.
pub(crate) struct Live {
    out: Output,
    lines: MultiProgress,
    phase: ProgressBar,
    traffic: ProgressBar,
    waiting: ProgressBar,
    shifting: bool,
}

impl Live {
    /// Begins to draw.
    pub(crate) fn new(out: Output) -> Self {
        let lines = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
        let line = |template: &str| {
            // The templates are constants of this file; one that does not parse falls back to the default style.
            let style =
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = lines.add(ProgressBar::new(100));
            bar.set_style(style.progress_chars("█▓░").tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ "));
            bar
        };
        let phase = line("  {spinner} {prefix} {wide_msg} {elapsed}");
        let traffic = line("    {wide_msg}");
        let waiting = line("    {wide_msg}");
        phase.enable_steady_tick(Duration::from_millis(TICK_MS));
        Self { out, lines, phase, traffic, waiting, shifting: false }
    }

    /// Draws it.
    pub(crate) fn tell(&mut self, news: &News) {
        match news {
            News::Begun(phase) => self.begin(*phase),
            News::Ended { phase, took_ms, bytes } => self.end(*phase, *took_ms, *bytes),
            News::Weight(percent) => self.weight(*percent),
            News::Progress(progress) => self.progress(progress),
            News::Verdict { verdict, message } => {
                self.waiting.set_message(format!("verdict {}: {}", clean(verdict), clean(message)));
            }
            News::Reading(sample) => {
                self.traffic.set_message(plain::reading(sample));
                self.weight(sample.weight_percent);
            }
            News::Waiting(what) => self.waiting.set_message(format!("waiting for {}", clean(what))),
            News::TurnedBack(problem) => self.turned_back(problem),
            News::State(MoveState::Paused) => self.waiting.set_message("paused"),
            News::State(state) => self.waiting.set_message(render::state(*state)),
            News::Instance(change) => self.waiting.set_message(clean(change)),
            News::Done(_) => {}
        }
    }

    /// Takes away what is redrawn; ended phases stay.
    pub(crate) fn finish(&self) {
        for line in [&self.phase, &self.traffic, &self.waiting] {
            line.finish_and_clear();
        }
    }

    fn begin(&mut self, phase: Phase) {
        self.shifting = phase == Phase::Shift;
        self.phase.reset_elapsed();
        self.phase.set_prefix(format!("{:<9}", phase.name()));
        self.phase.set_message("");
        self.waiting.set_message("");
    }

    fn end(&self, phase: Phase, took_ms: u64, bytes: Option<u64>) {
        let bytes = bytes.map(|bytes| format!("  {}", human::bytes(bytes))).unwrap_or_default();
        self.above(&format!("  {} {:<9} {}{bytes}", self.mark(), phase.name(), human::millis(took_ms)));
    }

    fn weight(&self, percent: u8) {
        if self.shifting {
            self.phase.set_message(format!("{} {percent} % on the new copies", bar(percent)));
        }
    }

    fn progress(&self, progress: &Progress) {
        let share = progress.done.zip(progress.total).filter(|(_, total)| *total > 0);
        let drawn = share
            .and_then(|(done, total)| u8::try_from(done.saturating_mul(100) / total).ok())
            .map(|percent| format!("{} ", bar(percent.min(100))))
            .unwrap_or_default();
        self.phase.set_message(format!("{drawn}{}", clean(&progress.text())));
    }

    fn turned_back(&self, problem: &Finding) {
        let word = self.out.paint(clap::builder::styling::AnsiColor::Yellow, "going back:");
        self.above(&format!("  {word} {} [{}]", render::finding(problem), clean(&problem.code)));
    }

    fn mark(&self) -> String {
        self.out.paint(clap::builder::styling::AnsiColor::Green, "✔")
    }

    fn above(&self, text: &str) {
        // A terminal that went away takes the progress with it; the move and the exit code do not depend on it.
        drop(self.lines.println(text));
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Ten cells: `████░░░░░░`.
fn bar(percent: u8) -> String {
    let full = usize::from(percent.min(100)) / 10;
    format!("{}{}", "█".repeat(full), "░".repeat(10 - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_has_ten_cells() {
        assert_eq!(bar(0), "░░░░░░░░░░");
        assert_eq!(bar(50), "█████░░░░░");
        assert_eq!(bar(100), "██████████");
        assert_eq!(bar(200), "██████████");
    }
}
