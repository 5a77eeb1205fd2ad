//! The `peregrine` binary: see `cli/` for the commands.

mod cli;
mod demo;
mod edge;
mod edge_admin;
mod edges;
mod serve;
mod standby;
mod telemetry;

fn main() -> std::process::ExitCode {
    // The shop of the demo is this binary too, so that its image needs nothing else.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == demo::SHOP_COMMAND) {
        return demo::shop();
    }
    cli::main()
}
