//! `peregrine-bench`: the tools of the `peregrine_bench` library on the command line.

mod command;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "peregrine-bench",
    about = "Recording origin, failure-counting load and side-by-side benchmarks",
    version
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP/1.1 and h2c, remembering every request id.
    Origin(command::origin::Arguments),
    /// Put load on one address and count every failure.
    Load(command::load::Arguments),
    /// Hold the acknowledged ids of a load against the records of origins.
    Check(command::check::Arguments),
    /// Make a certificate for a load over TLS.
    Certificate(command::certificate::Arguments),
    /// Measure Peregrine beside nginx and HAProxy.
    Compare(command::compare::Arguments),
    /// Measure the routing table at full size.
    Table(command::table::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("peregrine-bench: cannot start a runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(async {
        match arguments.command {
            Command::Origin(arguments) => command::origin::run(arguments).await,
            Command::Load(arguments) => command::load::run(arguments).await,
            Command::Check(arguments) => command::check::run(&arguments),
            Command::Certificate(arguments) => command::certificate::run(&arguments),
            Command::Compare(arguments) => command::compare::run(arguments).await,
            Command::Table(arguments) => command::table::run(&arguments),
        }
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("peregrine-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
