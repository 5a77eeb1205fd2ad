//! The command line: arguments in, one command carried out, an exit code out.
//!
//! It knows the server by its API alone and decides nothing that the server could decide. Everything that it
//! prints goes through `output.rs`; every way to fail is a `Failure` with its exit code.
//!
//! ```text
//! args ─► command/… ─► session (API) ─► watch/ ─► output ─► exit code
//! ```

pub(crate) mod args;
mod command;
mod connect;
pub(crate) mod exit;
pub(crate) mod failure;
mod human;
mod output;
mod parse;
mod prompt;
mod rollout_options;
mod table;
mod tree;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ColorChoice, FromArgMatches};

use args::{Cli, Command};
use connect::Environment;
use exit::Exit;
use failure::{Failure, Result};
use output::{Output, Surroundings};

/// Runs the command that the arguments of this process ask for.
pub(crate) fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let out = Output::new(&arguments, Surroundings::of_this_process());
    match run(&arguments, &out) {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            out.failure(&failure);
            failure.exit.into()
        }
    }
}

fn run(arguments: &[OsString], out: &Output) -> Result {
    let color = if out.color { ColorChoice::Auto } else { ColorChoice::Never };
    let matches = match args::build().color(color).try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => return not_a_command(&error, out),
    };
    let cli = Cli::from_arg_matches(&matches).map_err(|error| usage(&error))?;
    let environment = Environment::of_this_process();
    dispatch(cli, given_as_option(&matches, "data"), &environment, out)
}

fn dispatch(cli: Cli, data_given: bool, environment: &Environment, out: &Output) -> Result {
    let global = cli.global;
    match cli.command {
        Command::Completion(command) => command.run(out),
        Command::Man(command) => command.run(out),
        Command::Version(command) => command.run(out),
        Command::Help(command) => command.run(out),
        _ => Ok(()),
    }
}

/// Help and versions are answers; everything else is a mistake on the command line.
fn not_a_command(error: &clap::Error, out: &Output) -> Result {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion if out.json => {
            out.data(&tree::tree(&args::build()), String::new)
        }
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            error.print().map_err(|error| Failure::output(&error))
        }
        _ => Err(usage(error)),
    }
}

/// A mistake on the command line, with what clap has found out about it.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let mut paragraphs = text.trim().trim_start_matches("error: ").splitn(2, "\n\n");
    let message = paragraphs.next().unwrap_or_default().trim().to_owned();
    let rest = paragraphs.next().unwrap_or_default().trim();
    let hint = rest.strip_prefix("tip: ").unwrap_or(rest);
    Failure::new(Exit::Usage, "cli.usage", message).hint(hint)
}

fn given_as_option(matches: &clap::ArgMatches, id: &str) -> bool {
    let mut level = Some(matches);
    while let Some(matches) = level {
        if matches.value_source(id) == Some(ValueSource::CommandLine) {
            return true;
        }
        level = matches.subcommand().map(|(_, below)| below);
    }
    false
}
