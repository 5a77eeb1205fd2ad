//! Output: where every byte goes.
//!
//! Standard output carries data and nothing else: with `--json` exactly one document, or one a line for
//! streams. Everything for people (progress, notes, errors) goes to standard error, with colours and
//! redrawing only where that is a terminal. No other file of the command line prints.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};

use clap::builder::styling::{AnsiColor, Style};
use serde::Serialize;
use serde_json::json;

use super::failure::{Failure, Result};

/// How to speak, decided once from the arguments, the environment and the terminal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// `--json`.
    pub(crate) json: bool,
    /// `--quiet`: no notes and no progress.
    pub(crate) quiet: bool,
    /// Standard output is a terminal.
    pub(crate) stdout_terminal: bool,
    /// Standard error is a terminal that can redraw lines.
    pub(crate) live: bool,
    /// Colours on standard error (and on standard output where that is a terminal).
    pub(crate) color: bool,
}

/// What of the environment decides how to speak.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Surroundings {
    /// Standard output is a terminal.
    pub(crate) stdout_terminal: bool,
    /// Standard error is a terminal.
    pub(crate) stderr_terminal: bool,
    /// `NO_COLOR` is set and not empty.
    pub(crate) no_color: bool,
    /// `TERM=dumb`.
    pub(crate) dumb: bool,
}

impl Surroundings {
    /// Those of this process.
    pub(crate) fn of_this_process() -> Self {
        Self {
            stdout_terminal: std::io::stdout().is_terminal(),
            stderr_terminal: std::io::stderr().is_terminal(),
            no_color: std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
            dumb: std::env::var_os("TERM").is_some_and(|value| value == "dumb"),
        }
    }
}

impl Output {
    /// Decides before the arguments are parsed, so that a mistake in them is told in the right form too.
    pub(crate) fn new(arguments: &[OsString], surroundings: Surroundings) -> Self {
        let options: Vec<&OsString> =
            arguments.iter().skip(1).take_while(|argument| *argument != "--").collect();
        let given = |names: &[&str]| options.iter().any(|option| names.iter().any(|name| *option == name));
        let json = given(&["--json"]);
        let color = !given(&["--no-color"]) && !surroundings.no_color && !surroundings.dumb;
        Self {
            json,
            quiet: given(&["-q", "--quiet"]),
            stdout_terminal: surroundings.stdout_terminal,
            live: surroundings.stderr_terminal && !surroundings.dumb && !json,
            color: color && surroundings.stderr_terminal,
        }
    }

    /// The result of a command: one JSON document, or what `human` makes of it.
    pub(crate) fn data<T: Serialize>(&self, data: &T, human: impl FnOnce() -> String) -> Result {
        if self.json {
            return self.document(&json!({ "data": data }));
        }
        let mut text = human();
        if text.is_empty() {
            return Ok(());
        }
        if !text.ends_with('\n') {
            text.push('\n');
        }
        self.write(&text)
    }

    /// One element of a stream: one JSON document in one line, or the line that `human` makes of it.
    pub(crate) fn item<T: Serialize>(&self, key: &str, data: &T, human: impl FnOnce() -> String) -> Result {
        if self.json {
            return self.document(&json!({ key: data }));
        }
        let mut line = human();
        line.push('\n');
        self.write(&line)
    }

    /// Raw data, such as a completion script.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Result {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| Failure::output(&error))
    }

    /// Something for people, on standard error; nothing with `--quiet` or `--json`.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet && !self.json {
            Self::tell(text);
        }
    }

    /// A failure, in the form that was asked for.
    pub(crate) fn failure(&self, failure: &Failure) {
        if failure.silent {
            return;
        }
        if self.json {
            // When standard output cannot be written either, the exit code is all that is left.
            drop(self.document(&json!({ "error": failure.to_json() })));
        } else {
            Self::tell(&self.failure_text(failure));
        }
    }

    fn failure_text(&self, failure: &Failure) -> String {
        let mut text =
            failure.block.as_ref().map(|block| format!("{}\n", block.trim_end())).unwrap_or_default();
        text.push_str(&format!("{} {}", self.paint(AnsiColor::Red, "error:"), failure.message));
        for why in &failure.why {
            text.push_str(&format!("\n  {}   {}", self.dim("why"), indent(why)));
        }
        if let Some(hint) = &failure.hint {
            text.push_str(&format!("\n  {}  {}", self.dim("hint"), indent(hint)));
        }
        text.push_str(&format!("\n  {}  {}", self.dim("code"), failure.code));
        text
    }

    /// A coloured, bold word; plain without colours.
    pub(crate) fn paint(&self, color: AnsiColor, text: &str) -> String {
        self.styled(color.on_default().bold(), text)
    }

    /// A word that steps back.
    pub(crate) fn dim(&self, text: &str) -> String {
        self.styled(Style::new().dimmed(), text)
    }

    fn styled(&self, style: Style, text: &str) -> String {
        if self.color { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    /// Whether data on standard output may carry colours and borders.
    pub(crate) fn pretty(&self) -> bool {
        self.stdout_terminal && !self.json
    }

    fn document(&self, value: &serde_json::Value) -> Result {
        self.write(&format!("{value}\n"))
    }

    fn write(&self, text: &str) -> Result {
        self.raw(text.as_bytes())
    }

    /// Standard error may be closed; then nobody listens and nothing is lost.
    fn tell(text: &str) {
        drop(writeln!(std::io::stderr().lock(), "{text}"));
    }
}

fn indent(text: &str) -> String {
    text.trim_end().replace('\n', "\n        ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(arguments: &[&str], surroundings: Surroundings) -> Output {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        Output::new(&arguments, surroundings)
    }

    const TERMINAL: Surroundings =
        Surroundings { stdout_terminal: true, stderr_terminal: true, no_color: false, dumb: false };

    #[test]
    fn a_terminal_gets_colours_and_redrawing() {
        let out = output(&["peregrine", "status"], TERMINAL);
        assert!(out.color && out.live && !out.json && !out.quiet);
    }

    #[test]
    fn without_a_terminal_there_is_no_escape_byte() {
        let out = output(&["peregrine", "status"], Surroundings::default());
        assert!(!out.color && !out.live);
        let text = out.failure_text(&Failure::usage("no").why("because").hint("do that"));
        assert!(!text.contains('\u{1b}'), "{text:?}");
        assert_eq!(text, "error: no\n  why   because\n  hint  do that\n  code  cli.usage");
    }

    #[test]
    fn no_color_dumb_terminals_and_the_flag_switch_colours_off() {
        assert!(!output(&["peregrine"], Surroundings { no_color: true, ..TERMINAL }).color);
        assert!(!output(&["peregrine"], Surroundings { dumb: true, ..TERMINAL }).color);
        assert!(!output(&["peregrine", "status", "--no-color"], TERMINAL).color);
        assert!(!output(&["peregrine"], Surroundings { dumb: true, ..TERMINAL }).live);
    }

    #[test]
    fn an_option_after_two_dashes_is_not_ours() {
        assert!(!output(&["peregrine", "x", "--", "--json"], TERMINAL).json);
        assert!(output(&["peregrine", "--json", "x"], TERMINAL).json);
    }
}
