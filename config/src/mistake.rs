//! Mistakes: what is wrong in a file, where, and what to write instead.

use std::fmt::{self, Write as _};
use std::ops::Range;

use serde::Serialize;

use crate::source::Source;

/// More than this are counted, not listed.
pub const MAX_MISTAKES: usize = 100;
/// What hides a value that may be a secret.
const HIDDEN: &str = "…";
/// The offending line is shown up to this many characters.
const MAX_SHOWN_CHARS: usize = 160;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// The file, as the operator named it.
    pub file: String,
    /// Line, from 1; 0 when the file could not be read at all.
    pub line: usize,
    /// Column in characters, from 1; 0 as above.
    pub column: usize,
    /// Stable code, such as `config.unknown_key`.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    #[serde(skip)]
    excerpt: Option<Excerpt>,
}

/// The offending line and what is underlined in it, in characters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Excerpt {
    line: String,
    marked: Range<usize>,
}

/// Everything that is wrong with a file, in its order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Mistakes {
    list: Vec<Mistake>,
    #[serde(skip)]
    more: usize,
}

/// A mistake before it has a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) span: Range<usize>,
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Mistake {
    /// A file that cannot be read.
    pub(crate) fn unreadable(file: &str, why: impl fmt::Display, hint: &str) -> Self {
        Self {
            file: file.to_owned(),
            line: 0,
            column: 0,
            code: "config.unreadable",
            message: format!("cannot read {file}: {why}"),
            hint: Some(hint.to_owned()),
            excerpt: None,
        }
    }
}

impl Mistakes {
    pub(crate) const fn of(list: Vec<Mistake>) -> Self {
        Self { list, more: 0 }
    }

    /// Puts what was found in the order of the file. Nothing of `hidden` is shown.
    pub(crate) fn locate(source: &Source, mut found: Vec<Found>, hidden: &[Range<usize>]) -> Self {
        found.sort_by_key(|mistake| (mistake.span.start, mistake.span.end));
        found.dedup();
        let more = found.len().saturating_sub(MAX_MISTAKES);
        found.truncate(MAX_MISTAKES);
        let lines = Lines::of(&source.text);
        let list = found.into_iter().map(|found| lines.locate(source, found, hidden)).collect();
        Self { list, more }
    }

    /// The mistakes, at most [`MAX_MISTAKES`].
    #[must_use]
    pub fn list(&self) -> &[Mistake] {
        &self.list
    }

    /// How many more there are.
    #[must_use]
    pub const fn more(&self) -> usize {
        self.more
    }
}

impl std::error::Error for Mistakes {}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, mistake) in self.list.iter().enumerate() {
            if number > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{mistake}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, "\nand {more} more mistakes\n"),
        }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error[{}]: {}", self.code, self.message)?;
        let margin = " ".repeat(self.line.to_string().len());
        if let Some(excerpt) = &self.excerpt {
            writeln!(f, "{margin}--> {}:{}:{}", self.file, self.line, self.column)?;
            writeln!(f, "{margin} |")?;
            writeln!(f, "{} | {}", self.line, excerpt.line)?;
            writeln!(f, "{margin} | {}", excerpt.underline())?;
        }
        match &self.hint {
            Some(hint) => writeln!(f, "{margin} = {hint}"),
            None => Ok(()),
        }
    }
}

impl Excerpt {
    /// Tabs stay tabs, so that the carets stand below what they mean.
    fn underline(&self) -> String {
        let blank = |c| if c == '\t' { '\t' } else { ' ' };
        let mut text: String = self.line.chars().take(self.marked.start).map(blank).collect();
        text.extend(std::iter::repeat_n('^', self.marked.len()));
        text
    }
}

/// Where the lines of a text begin.
struct Lines {
    starts: Vec<usize>,
}

impl Lines {
    fn of(text: &str) -> Self {
        let next = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { starts: std::iter::once(0).chain(next).collect() }
    }

    fn locate(&self, source: &Source, found: Found, hidden: &[Range<usize>]) -> Mistake {
        let text = source.text.as_str();
        let at = floor(text, found.span.start);
        let line = self.starts.partition_point(|start| *start <= at) - 1;
        let start = self.starts[line];
        let end = self.starts.get(line + 1).map_or(text.len(), |next| next - 1);
        let content = text[start..end].trim_end_matches('\r');
        let marked = at..floor(text, found.span.end).clamp(at, start + content.len().max(at - start));
        Mistake {
            file: source.name.clone(),
            line: line + 1,
            column: text[start..at].chars().count() + 1,
            code: found.code,
            message: found.message,
            hint: found.hint,
            excerpt: Some(excerpt(content, start, marked, hidden)),
        }
    }
}

fn excerpt(content: &str, start: usize, marked: Range<usize>, hidden: &[Range<usize>]) -> Excerpt {
    let mut line = String::new();
    let (mut from, mut to) = (None, None);
    let mut was_hidden = false;
    let mut shown = 0;
    for (offset, c) in content.char_indices() {
        let at = start + offset;
        if at >= marked.start {
            from.get_or_insert(shown);
        }
        if at >= marked.end {
            to.get_or_insert(shown);
        }
        if shown == MAX_SHOWN_CHARS {
            break;
        }
        let hide = hidden.iter().any(|range| range.contains(&at));
        if hide && was_hidden {
            continue;
        }
        was_hidden = hide;
        shown += 1;
        match c {
            _ if hide => line.push_str(HIDDEN),
            c if c.is_control() && c != '\t' => line.push('\u{fffd}'), // would act on the terminal
            c => drop(line.write_char(c)),
        }
    }
    let from = from.unwrap_or(shown);
    let to = to.unwrap_or(shown).max(from + 1);
    Excerpt { line, marked: from..to }
}

/// The border of a character at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at.min(text.len()))
}
