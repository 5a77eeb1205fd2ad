//! `peregrine config`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use peregrine_config::{Manifest, Mistakes, ServerConfig, Source};
use serde::Serialize;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::output::Output;

/// Check configuration files
#[derive(Args, Debug)]
pub(crate) struct Config {
    #[command(subcommand)]
    action: ConfigAction,
}

/// What to do with configuration files.
#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Check a file of `serve` or a manifest of `deploy`, without starting anything
    ///
    /// Shows every mistake with line, column and what to write instead; exit code 2 if there is one.
    Check {
        /// File
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// What it is [default: what it looks like]
        #[arg(long = "as", value_enum, value_name = "KIND")]
        kind: Option<Kind>,
    },
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// The file of `peregrine serve`
    Server,
    /// The manifest of `peregrine deploy`
    Manifest,
}

/// What a good file says.
#[derive(Debug, Serialize)]
struct Checked {
    file: PathBuf,
    kind: Kind,
    services: Vec<String>,
    machines: Vec<String>,
}

impl Config {
    /// Does it.
    pub(crate) fn run(self, out: &Output) -> Result {
        let ConfigAction::Check { file, kind } = self.action;
        let source = Source::read(&file).map_err(|mistakes| wrong(&file, &mistakes))?;
        let checked = check(&file, &source, kind).map_err(|mistakes| wrong(&file, &mistakes))?;
        out.data(&checked, || {
            let kind = match checked.kind {
                Kind::Server => "a file for serve",
                Kind::Manifest => "a manifest for deploy",
            };
            format!(
                "{} is {kind}, without mistakes: {}, {}",
                file.display(),
                human::plural(checked.services.len() as u64, "service", "services"),
                human::plural(checked.machines.len() as u64, "machine", "machines"),
            )
        })
    }
}

fn check(file: &Path, source: &Source, kind: Option<Kind>) -> std::result::Result<Checked, Mistakes> {
    let as_server = || {
        ServerConfig::parse(source).map(|config| Checked {
            file: file.to_owned(),
            kind: Kind::Server,
            services: config.services.iter().map(|entry| entry.spec.name.clone()).collect(),
            machines: config.machines.iter().map(|machine| machine.name.clone()).collect(),
        })
    };
    let as_manifest = || {
        Manifest::parse(source).map(|manifest| Checked {
            file: file.to_owned(),
            kind: Kind::Manifest,
            services: manifest.services.iter().map(|entry| entry.spec.name.clone()).collect(),
            machines: Vec::new(),
        })
    };
    match kind {
        Some(Kind::Server) => as_server(),
        Some(Kind::Manifest) => as_manifest(),
        // A file without mistakes is what it is; else it is what it has fewer mistakes as.
        None => match (as_server(), as_manifest()) {
            (Ok(server), _) => Ok(server),
            (_, Ok(manifest)) => Ok(manifest),
            (Err(server), Err(manifest)) if count(&manifest) < count(&server) => Err(manifest),
            (Err(server), Err(_)) => Err(server),
        },
    }
}

fn count(mistakes: &Mistakes) -> usize {
    mistakes.list().len() + mistakes.more()
}

/// The failure that a file with mistakes is.
pub(crate) fn wrong(file: &Path, mistakes: &Mistakes) -> Failure {
    let number = human::plural(count(mistakes) as u64, "mistake", "mistakes");
    let message = match mistakes.list() {
        [only] if only.line == 0 => only.message.clone(),
        _ => format!("{} has {number}", file.display()),
    };
    let hint = match mistakes.list() {
        [only] => only.hint.clone().unwrap_or_default(),
        _ => "every key with its default is in config/peregrine.toml".to_owned(),
    };
    let code = match mistakes.list() {
        [only] => only.code,
        _ => "config.invalid",
    };
    let located = mistakes.list().iter().any(|mistake| mistake.line > 0);
    let failure = Failure::new(Exit::Usage, code, message).hint(hint).detail("mistakes", mistakes);
    if located { failure.block(mistakes.to_string()) } else { failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str, kind: Option<Kind>) -> std::result::Result<Checked, Mistakes> {
        check(Path::new("x.toml"), &Source::new("x.toml", "/", text), kind)
    }

    #[test]
    fn a_file_is_what_it_looks_like() {
        let server = checked("[edge]\nhttp = [\"127.0.0.1:8080\"]\n", None).expect("a server file");
        assert_eq!(server.kind, Kind::Server);
        let manifest = checked("[service.web]\nimage = \"shop:1\"\nport = 80\nhosts = [\"*\"]\n", None)
            .expect("a manifest");
        assert_eq!((manifest.kind, manifest.services), (Kind::Manifest, vec!["web".to_owned()]));
    }

    #[test]
    fn a_mistake_is_a_usage_failure_with_line_and_column() {
        let mistakes = checked("[edge]\nhtpp = [\"127.0.0.1:8080\"]\n", None).expect_err("a mistake");
        let failure = wrong(Path::new("x.toml"), &mistakes);
        let json = failure.to_json();
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!((&json["mistakes"][0]["line"], &json["mistakes"][0]["column"]), (&2.into(), &1.into()));
        assert!(failure.block.expect("a rendered mistake").contains("x.toml:2:1"));
    }

    #[test]
    fn a_file_that_is_not_there_is_told_by_its_name() {
        let mistakes = Source::read(Path::new("/nowhere/x.toml")).expect_err("no file");
        let failure = wrong(Path::new("/nowhere/x.toml"), &mistakes);
        assert!(failure.message.contains("/nowhere/x.toml") && failure.block.is_none(), "{failure:?}");
    }
}
