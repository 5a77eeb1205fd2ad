//! The `peregrine` binary: see `cli/` for the commands.

mod certificate_metrics;
mod certificates;
mod cli;
mod demo;
mod domains;
mod edge;
mod edge_admin;
mod edge_life;
mod edge_secrets;
mod edges;
mod hand_over;
mod privileges;
mod serve;
mod standby;
mod systemd;
mod telemetry;
mod ticket_keys;

/// Each request allocates and frees a little; and what a burst needed goes back to the system, which the C library's
/// allocator keeps once for each thread.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // The shop of the demo is this binary too, so that its image needs nothing else.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == demo::SHOP_COMMAND) {
        return demo::shop();
    }
    // Before anything changes the folder that it was found from.
    hand_over::program();
    cli::main()
}
