//! `peregrine-bench origin`: serve until SIGTERM or SIGINT.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::BoolishValueParser;
use peregrine_bench::origin::{Fault, Origin, OriginOptions};
use tokio::signal::unix::{SignalKind, signal};

use super::Done;

/// The port without `--listen` and without `PORT`.
const DEFAULT_PORT: u16 = 8080;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Address to listen on [default: --host and --port].
    #[arg(long, env = "ORIGIN_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Address to listen on, where there is no --listen.
    #[arg(long, env = "HOST", value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    host: IpAddr,
    /// Port to listen on, where there is no --listen.
    #[arg(long, env = "PORT", value_name = "PORT", default_value_t = DEFAULT_PORT)]
    port: u16,
    /// Name in `x-instance` [default: PEREGRINE_INSTANCE, or the address it listens on].
    #[arg(long, env = "ORIGIN_INSTANCE", value_name = "NAME")]
    instance: Option<String>,
    /// Version in `x-version`.
    #[arg(long, env = "ORIGIN_VERSION", value_name = "VERSION")]
    version_label: Option<String>,
    /// Answer 503 to everything for this long after the start.
    #[arg(long, env = "ORIGIN_STARTUP_MS", value_name = "MS", default_value_t = 0)]
    startup_ms: u64,
    /// Wait before every answer.
    #[arg(long, env = "ORIGIN_LATENCY_MS", value_name = "MS", default_value_t = 0)]
    latency_ms: u64,
    /// Percentage of requests that are answered with 500.
    #[arg(long, env = "ORIGIN_ERROR_PERCENT", value_name = "PERCENT", default_value_t = 0,
          value_parser = clap::value_parser!(u8).range(0..=100))]
    error_percent: u8,
    /// What /healthz says once started.
    #[arg(long, env = "ORIGIN_HEALTHY", value_name = "BOOL", default_value = "true", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    healthy: bool,
    /// Take requests and answer none.
    #[arg(long, env = "ORIGIN_HANG", value_name = "BOOL", default_value = "false", action = clap::ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    hang: bool,
    /// Append one line per request with an id (`unix_ns id method proto conn status`) to a file, or send it to a
    /// collector.
    #[arg(long, env = "ORIGIN_RECORD", value_name = "FILE|tcp://HOST:PORT")]
    record: Option<PathBuf>,
}

pub(crate) async fn run(arguments: Arguments) -> Done {
    let listen = arguments.listen.unwrap_or(SocketAddr::new(arguments.host, arguments.port));
    let options = OriginOptions {
        listen,
        instance: arguments.instance.or_else(|| std::env::var("PEREGRINE_INSTANCE").ok()),
        version: arguments.version_label,
        startup_ms: arguments.startup_ms,
        fault: Fault {
            error_percent: arguments.error_percent,
            latency_ms: arguments.latency_ms,
            healthy: arguments.healthy,
            hang: arguments.hang,
        },
        record: arguments.record,
    };
    // Before the listener: a signal between the two must not kill a process that already has connections.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let origin = Origin::bind(options).await.map_err(|error| format!("origin on {listen}: {error}"))?;
    println!("origin listens on {}", origin.addr());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let stats = origin.shutdown().await;
    println!("origin stopped: {} requests, {} duplicates", stats.requests, stats.duplicates);
    Ok(ExitCode::SUCCESS)
}
