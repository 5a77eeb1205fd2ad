//! Failures: what, why, what to do next, a stable code, and the exit code of the process.
//!
//! A [`Failure`] is the only error of a command. It is rendered in one place (`output.rs`), as text or as
//! `{"error": …}`, so that no command can forget the hint or the code. It never carries a secret.

use serde_json::{Map, Value, json};

use super::exit::Exit;

/// Why a command did not do what it was asked.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// Exit code of the process.
    pub(crate) exit: Exit,
    /// Stable, dotted, such as `move.in_progress`.
    pub(crate) code: String,
    /// What went wrong.
    pub(crate) message: String,
    /// Why, if more is known than the message says. One entry a line.
    pub(crate) why: Vec<String>,
    /// What to do next.
    pub(crate) hint: Option<Box<str>>,
    /// A rendered picture of it (the lines of a file with what is wrong), shown before the message.
    pub(crate) block: Option<Box<str>>,
    /// More fields of the JSON form, such as the move or the findings.
    pub(crate) details: Box<Map<String, Value>>,
    /// The reader of standard output has gone: there is nobody to tell.
    pub(crate) silent: bool,
}

/// What commands return.
pub(crate) type Result<T = (), E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure with its exit code, code and message.
    pub(crate) fn new(exit: Exit, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            exit,
            code: code.into(),
            message: message.into(),
            why: Vec::new(),
            hint: None,
            block: None,
            details: Box::default(),
            silent: false,
        }
    }

    /// A mistake on the command line.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "cli.usage", message)
    }

    /// The same with one more line of reasons.
    pub(crate) fn why(mut self, why: impl Into<String>) -> Self {
        self.why.push(why.into());
        self
    }

    /// The same with what to do next.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        let hint: String = hint.into();
        self.hint = (!hint.is_empty()).then(|| hint.into());
        self
    }

    /// The same with one more field of the JSON form.
    pub(crate) fn detail(mut self, name: &str, value: impl serde::Serialize) -> Self {
        match serde_json::to_value(value) {
            Ok(value) => self.details.insert(name.to_owned(), value),
            Err(error) => self.details.insert(name.to_owned(), Value::String(error.to_string())),
        };
        self
    }

    /// The same with a rendered picture.
    pub(crate) fn block(mut self, block: impl Into<String>) -> Self {
        self.block = Some(block.into().into());
        self
    }

    /// A file that cannot be read or written.
    pub(crate) fn file(path: &std::path::Path, doing: &str, error: &std::io::Error) -> Self {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => "check the path; relative paths start at the current folder",
            std::io::ErrorKind::PermissionDenied => "run as the user who owns the file, or change its rights",
            _ => "",
        };
        Self::new(Exit::Usage, "cli.file", format!("cannot {doing} {}: {error}", path.display())).hint(hint)
    }

    /// Standard output cannot be written. A reader that went away (`| head`) is no failure.
    pub(crate) fn output(error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self { silent: true, ..Self::new(Exit::Ok, "cli.output_closed", "the reader has gone") };
        }
        Self::new(Exit::Failed, "cli.output", format!("cannot write to standard output: {error}"))
    }

    /// The JSON form, without the outer `{"error": …}`.
    pub(crate) fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("code".into(), json!(self.code));
        object.insert("message".into(), json!(self.message));
        if !self.why.is_empty() {
            object.insert("why".into(), json!(self.why));
        }
        object.insert("hint".into(), json!(self.hint));
        object.insert("exit_code".into(), json!(self.exit.code()));
        for (name, value) in self.details.iter() {
            object.entry(name.clone()).or_insert_with(|| value.clone());
        }
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_cannot_hide_the_code() {
        let failure = Failure::usage("no").detail("code", "other").detail("move", "mov_1");
        let json = failure.to_json();
        assert_eq!(json["code"], "cli.usage");
        assert_eq!(json["move"], "mov_1");
        assert_eq!(json["exit_code"], 2);
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let gone = Failure::output(&std::io::ErrorKind::BrokenPipe.into());
        assert!(gone.silent && gone.exit == Exit::Ok);
        let full = Failure::output(&std::io::ErrorKind::StorageFull.into());
        assert!(!full.silent && full.exit == Exit::Failed);
    }
}
