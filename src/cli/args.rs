//! The command line as a whole: global options and the list of commands.
//!
//! Each command's own arguments, help text and deed are in its file under `command/`. `serve` and `demo` are
//! carried out elsewhere (`src/serve.rs`, `src/demo/`); only their arguments are here.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum, ValueHint};

use super::command;
use super::exit::Exit;

/// Heading of the options that every command has.
const GLOBAL: &str = "Global options";

/// An edge reverse proxy that moves containers between machines while they serve
#[derive(Debug, Parser)]
#[command(
    name = "peregrine",
    version,
    disable_help_subcommand = true,
    disable_help_flag = true,
    disable_version_flag = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100,
    before_help = "Examples:\n  \
        peregrine demo                                  see it: two hosts, a shop, a move under load\n  \
        peregrine serve --config peregrine.toml         run the edge, the engine and the API\n  \
        peregrine deploy -f shop.toml --machine host-a  run a service, or bring a new version of it\n  \
        peregrine move shop --to host-b                 move it while it serves"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command has.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// One JSON document on standard output, errors too; one a line for streams
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) json: bool,

    /// Address of the server
    #[arg(long, global = true, value_name = "URL", env = "PEREGRINE_API", value_hint = ValueHint::Url,
          default_value = DEFAULT_API, help_heading = GLOBAL)]
    pub(crate) api: String,

    /// Token for the server; other users of this machine can see it: prefer --token-file [env: PEREGRINE_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN", conflicts_with = "token_file", help_heading = GLOBAL)]
    pub(crate) token: Option<String>,

    /// File with the token [env: PEREGRINE_TOKEN_FILE] [default: api-token in the data folder]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = GLOBAL)]
    pub(crate) token_file: Option<PathBuf>,

    /// Data folder of the server [default: /var/lib/peregrine for root, else ~/.local/share/peregrine]
    #[arg(long, global = true, value_name = "DIR", env = "PEREGRINE_DATA", value_hint = ValueHint::DirPath,
          help_heading = GLOBAL)]
    pub(crate) data: Option<PathBuf>,

    /// Do what would otherwise be asked about first
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    pub(crate) yes: bool,

    /// No colours (as do NO_COLOR and TERM=dumb)
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) no_color: bool,

    /// No notes and no progress, only results and errors
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    pub(crate) quiet: bool,

    /// Help on a command: -h in short, --help in full
    #[arg(short, long, global = true, action = clap::ArgAction::Help, help_heading = GLOBAL)]
    pub(crate) help: Option<bool>,

    /// Version of this binary
    #[arg(short = 'V', long, action = clap::ArgAction::Version, help_heading = GLOBAL)]
    pub(crate) version: Option<bool>,
}

/// Where the server listens unless it is told otherwise.
pub(crate) const DEFAULT_API: &str = "http://127.0.0.1:7070";

/// Every command. The help text of each is the documentation of its arguments.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(ServeArgs),
    Engine(EngineArgs),
    Edge(EdgeArgs),
    Demo(DemoArgs),
    Deploy(command::deploy::Deploy),
    Move(command::move_service::Move),
    Moves(command::moves::Moves),
    Rollback(command::rollback::Rollback),
    Scale(command::scale::Scale),
    Status(command::status::Status),
    Services(command::services::Services),
    Instances(command::instances::Instances),
    Machines(command::machines::Machines),
    Domains(command::domains::Domains),
    Certs(command::certs::Certs),
    Edges(command::edges::Edges),
    Logs(command::logs::Logs),
    Events(command::events::Events),
    Audit(command::audit::Audit),
    Server(command::server::Server),
    Doctor(command::doctor::Doctor),
    Config(command::config::Config),
    Completion(command::completion::Completion),
    Man(command::man::Man),
    Version(command::version::Version),
    Help(command::help::Help),
}

/// Run the edge, the engine and the API
///
/// Reads the configuration, takes up unfinished moves where they stood, and serves until SIGTERM or Ctrl-C; then it
/// stops accepting and lets running requests finish. The first start writes the API's token to `api-token` in the data
/// folder.
#[derive(Args, Clone, Debug)]
pub(crate) struct ServeArgs {
    /// Configuration: edge, API, machines and services
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,

    /// Form of the log on standard error [default: text on a terminal, else json]
    #[arg(long, value_enum, value_name = "FORM")]
    pub(crate) log_format: Option<LogFormat>,

    /// Data folder: the global `--data`, with its default filled in.
    #[arg(skip)]
    pub(crate) data: PathBuf,
}

/// Run the engine and the API, without an edge
///
/// As `serve`, for installations whose edges run in processes of their own: it listens for them at `[link]`. Edges go
/// on serving while it is stopped, restarted or replaced.
#[derive(Args, Clone, Debug)]
pub(crate) struct EngineArgs {
    /// Configuration: API, link, machines and services; its [edge] is not used
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,

    /// Wait until no other engine leads on this data folder, then take over
    #[arg(long)]
    pub(crate) standby: bool,

    /// Form of the log on standard error [default: text on a terminal, else json]
    #[arg(long, value_enum, value_name = "FORM")]
    pub(crate) log_format: Option<LogFormat>,

    /// Data folder: the global `--data`, with its default filled in.
    #[arg(skip)]
    pub(crate) data: PathBuf,
}

/// Run an edge, without an engine; `edge join` makes it one of an installation
///
/// Takes its table from an engine and keeps it on its disk: without the engine it starts from there and serves for as
/// long as it takes. It holds a key for that one stream, and no other credential.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct EdgeArgs {
    #[command(subcommand)]
    pub(crate) action: Option<EdgeAction>,

    /// Configuration: its [edge] says where to listen; the rest is not used
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,

    /// Address to listen on instead of those of the configuration; may be repeated
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) http: Vec<std::net::SocketAddr>,

    /// Address at which /livez, /readyz and /metrics answer, instead of that of the configuration; none: they do not
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) admin: Option<std::net::SocketAddr>,

    /// User to become once the ports are bound, instead of that of the configuration; for an edge that is started by root
    #[arg(long, value_name = "NAME", value_hint = ValueHint::Username)]
    pub(crate) user: Option<String>,

    /// Engine, HOST:PORT, instead of the one that it joined with; may be repeated: they are asked in turn
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) engine: Vec<String>,

    /// Form of the log on standard error [default: text on a terminal, else json]
    #[arg(long, value_enum, value_name = "FORM")]
    pub(crate) log_format: Option<LogFormat>,

    /// Data folder: the global `--data`, with its default filled in.
    #[arg(skip)]
    pub(crate) data: PathBuf,
}

/// What to do with an edge besides running it.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum EdgeAction {
    Join(EdgeJoinArgs),
    Upgrade(EdgeUpgradeArgs),
}

/// Have another process take over from the edge that runs on this data folder, without a gap
///
/// The new process is started with the arguments of the one that runs, reads the configuration anew, and accepts on the
/// same sockets; then the one before stops accepting and ends what it has. If the new one does not come up, the one before
/// goes on as it was, and this command says why.
#[derive(Args, Clone, Debug)]
pub(crate) struct EdgeUpgradeArgs {
    /// Program to take over, instead of the one at the path that the edge was started from
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) binary: Option<PathBuf>,
}

/// Make this data folder that of an edge of an installation
///
/// Uses up a token of `peregrine edges invite`, gets a certificate and writes both into the data folder. The token also
/// tells the real engine from a false one.
#[derive(Args, Clone, Debug)]
pub(crate) struct EdgeJoinArgs {
    /// Engine, HOST:PORT
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) engine: String,

    /// File with the token, `-` for standard input: arguments can be seen by other users of this machine
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) join_token_file: PathBuf,
}

/// Form of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Show a move under load: two hosts, a sample shop, steady traffic
///
/// Starts everything on this machine, moves the shop from host-a to host-b and back while requests keep coming, and
/// prints the receipt. Uses Docker where an engine answers, else plain processes on two loopback addresses; says
/// which. Ctrl-C leaves nothing behind. With --json the story goes to standard error, and one document with the receipts
/// and what the clients counted to standard output at the end.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoArgs {
    /// Keep everything running after the moves, and print what to type next
    #[arg(long)]
    pub(crate) stay: bool,

    /// What runs the shop
    #[arg(long, value_enum, default_value = "auto", value_name = "RUNTIME")]
    pub(crate) runtime: DemoRuntime,

    /// Requests per second
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) rate: u32,

    /// How many moves, to and fro
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) moves: u32,

    /// Data folder: the global `--data` if it was given as an option (never from the environment: the demo must
    /// not touch a real installation). `None` is a folder of its own that goes at the end.
    #[arg(skip)]
    pub(crate) data: Option<PathBuf>,
}

/// What runs the demo's shop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoRuntime {
    /// Docker where an engine answers, else processes
    Auto,
    /// Docker
    Docker,
    /// Plain processes
    Process,
}

/// The whole command line as clap sees it, with what cannot be said in attributes.
pub(crate) fn build() -> clap::Command {
    let mut command = Cli::command().after_long_help(Exit::help()).after_help("Exit codes: see --help");
    command.build();
    command
}
