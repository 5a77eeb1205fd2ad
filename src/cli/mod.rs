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
mod endpoint;
pub(crate) mod exit;
pub(crate) mod failure;
mod human;
mod names;
pub(crate) mod output;
mod parse;
mod prompt;
mod render;
mod rollout_options;
mod session;
mod table;
mod tree;
mod watch;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ColorChoice, FromArgMatches};

use args::{Cli, Command, Global};
use connect::Environment;
use exit::Exit;
use failure::{Failure, Result};
use output::{Output, Surroundings};
use session::Session;

/// Runs the command that the arguments of this process ask for.
pub(crate) fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let out = Output::new(&arguments, Surroundings::of_this_process());
    match run(&arguments, out) {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            out.failure(&failure);
            failure.exit.into()
        }
    }
}

fn run(arguments: &[OsString], out: Output) -> Result {
    let color = if out.color { ColorChoice::Auto } else { ColorChoice::Never };
    let matches = match args::build().color(color).try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => return not_a_command(&error, &out),
    };
    let Cli { global, mut command } = Cli::from_arg_matches(&matches).map_err(|error| usage(&error))?;
    let environment = Environment::of_this_process();
    match &mut command {
        Command::Serve(args) => args.data = connect::data_folder(&global, &environment),
        Command::Engine(args) => args.data = connect::data_folder(&global, &environment),
        Command::Edge(args) => args.data = connect::data_folder(&global, &environment),
        Command::Demo(args) if given_as_option(&matches, "data") => args.data.clone_from(&global.data),
        _ => {}
    }
    Call { global, environment, out }.run(command)
}

/// A command line that was understood, less the command.
struct Call {
    global: Global,
    environment: Environment,
    out: Output,
}

impl Call {
    fn run(&self, command: Command) -> Result {
        let out = &self.out;
        match command {
            Command::Serve(args) => crate::serve::run(&args),
            Command::Engine(args) => crate::serve::run_engine(&args),
            Command::Edge(args) => crate::edge::run(&args, *out),
            Command::Demo(args) => crate::demo::run(&args, *out),
            Command::Deploy(deploy) => self.online(async |session| deploy.run(session).await),
            Command::Move(to) => self.online(async |session| to.run(session).await),
            Command::Moves(moves) => self.online(async |session| moves.run(session).await),
            Command::Rollback(rollback) => self.online(async |session| rollback.run(session).await),
            Command::Scale(scale) => self.online(async |session| scale.run(session).await),
            Command::Status(status) => self.online(async |session| status.run(session).await),
            Command::Services(services) => self.online(async |session| services.run(session).await),
            Command::Instances(instances) => self.online(async |session| instances.run(session).await),
            Command::Machines(machines) => self.online(async |session| machines.run(session).await),
            Command::Domains(domains) => self.online(async |session| domains.run(session).await),
            Command::Certs(certs) => self.online(async |session| certs.run(session).await),
            Command::Edges(edges) => self.online(async |session| edges.run(session).await),
            Command::Logs(logs) => self.online(async |session| logs.run(session).await),
            Command::Events(events) => self.online(async |session| events.run(session).await),
            Command::Audit(audit) => self.online(async |session| audit.run(session).await),
            Command::Server(server) => {
                server.run(&connect::data_folder(&self.global, &self.environment), out)
            }
            Command::Doctor(doctor) => session::block_on(doctor.run(&self.global, &self.environment, out)),
            Command::Config(config) => config.run(out),
            Command::Completion(completion) => completion.run(out),
            Command::Man(man) => man.run(out),
            Command::Version(version) => version.run(out),
            Command::Help(help) => help.run(out),
        }
    }

    /// A command that asks the server.
    fn online(&self, command: impl AsyncFnOnce(&Session) -> Result) -> Result {
        session::block_on(async {
            let session = Session::open(&self.global, &self.environment, self.out)?;
            command(&session).await
        })
    }
}

/// Help and versions are answers; everything else is a mistake on the command line.
fn not_a_command(error: &clap::Error, out: &Output) -> Result {
    match error.kind() {
        ErrorKind::DisplayHelp if out.json => out.data(&tree::tree(&args::build()), String::new),
        ErrorKind::DisplayVersion if out.json => command::version::Version {}.run(out),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            error.print().map_err(|error| Failure::output(&error))
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if !out.json => {
            out.note(&error.render().to_string());
            Err(Failure::usage("a command is missing").hint("peregrine help lists the commands"))
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Err(Failure::usage("a command is missing").hint("peregrine help lists the commands"))
        }
        _ => Err(usage(error)),
    }
}

/// A mistake on the command line, with what clap has found out about it.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let mut paragraphs = text.trim().split("\n\n").map(str::trim);
    let message = paragraphs.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let rest = paragraphs.map(|paragraph| paragraph.strip_prefix("tip: ").unwrap_or(paragraph));
    let hint: Vec<_> = rest.filter(|paragraph| !paragraph.starts_with("For more information")).collect();
    let hint = if hint.is_empty() { "--help says what is accepted".to_owned() } else { hint.join("\n") };
    Failure::new(Exit::Usage, "cli.usage", message).hint(hint)
}

/// Whether an option was typed, as opposed to being taken from the environment.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(arguments: &[&str]) -> Failure {
        let arguments = [&["peregrine"], arguments].concat();
        let error = args::build().try_get_matches_from(arguments).expect_err("a mistake");
        usage(&error)
    }

    #[test]
    fn a_typo_in_a_command_or_an_option_is_told_with_what_was_meant() {
        let command = mistake(&["depoly"]);
        assert_eq!((command.exit, command.code.as_str()), (Exit::Usage, "cli.usage"));
        assert!(command.hint.expect("a hint").contains("deploy"));
        let option = mistake(&["move", "shop", "--too", "host-b"]);
        assert!(option.hint.expect("a hint").contains("--to"));
    }

    #[test]
    fn a_bad_value_says_what_a_good_one_looks_like() {
        let steps = mistake(&["move", "shop", "--to", "b", "--steps", "50,10"]);
        assert!(steps.message.contains("1,10,50,100"), "{}", steps.message);
        let soak = mistake(&["move", "shop", "--to", "b", "--soak", "10"]);
        assert!(soak.message.contains("10m"), "{}", soak.message);
    }

    #[test]
    fn the_definition_of_the_command_line_holds_together() {
        args::build().debug_assert();
    }

    #[test]
    fn a_data_folder_from_the_environment_is_not_one_that_was_typed() {
        let matches = |arguments: &[&str]| args::build().try_get_matches_from(arguments).expect("arguments");
        assert!(given_as_option(&matches(&["peregrine", "demo", "--data", "/x"]), "data"));
        assert!(given_as_option(&matches(&["peregrine", "--data", "/x", "demo"]), "data"));
        assert!(!given_as_option(&matches(&["peregrine", "demo"]), "data"));
    }
}
