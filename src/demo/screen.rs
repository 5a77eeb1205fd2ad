//! Where the demo's story is told: lines that stay, and on a terminal a few that are redrawn.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The demo's output. Standard output is its data: the story, or with `--json` the one document at the end; then the
/// story goes to standard error, a line at a time.
pub(super) struct Screen {
    json: bool,
    live: Option<MultiProgress>,
    bars: Mutex<Vec<ProgressBar>>,
}

impl Screen {
    pub(super) fn new(json: bool) -> Self {
        let terminal = !json && std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self { json, live: terminal.then(MultiProgress::new), bars: Mutex::default() }
    }

    /// Whether lines can be redrawn.
    pub(super) const fn is_live(&self) -> bool {
        self.live.is_some()
    }

    /// A line that stays.
    pub(super) fn say(&self, line: &str) {
        let print = || {
            // Nobody reads any more: the demo goes on to its end and cleans up all the same.
            let _reader_gone = if self.json {
                writeln!(std::io::stderr(), "{line}")
            } else {
                writeln!(std::io::stdout(), "{line}")
            };
        };
        match &self.live {
            Some(live) => live.suspend(print),
            None => print(),
        }
    }

    /// Replaces the lines at the bottom; nothing without a terminal.
    pub(super) fn draw(&self, lines: &[String]) {
        let Some(live) = &self.live else { return };
        let mut bars = self.bars.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        while bars.len() < lines.len() {
            let style = if bars.is_empty() { "{spinner} {msg}" } else { "  {msg}" };
            let style =
                ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = live.add(ProgressBar::new_spinner().with_style(style));
            bar.enable_steady_tick(Duration::from_millis(120));
            bars.push(bar);
        }
        for (bar, line) in bars.iter().zip(lines) {
            bar.set_message(line.clone());
        }
    }

    /// Takes the lines at the bottom away.
    pub(super) fn clear(&self) {
        let mut bars = self.bars.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for bar in bars.drain(..) {
            bar.finish_and_clear();
        }
    }
}
