//! `peregrine-bench load`: one run, its summary, and an exit code that says whether anything failed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use peregrine_bench::load::{Expect, Load, LoadOptions, Pace, Protocol, Sample, Summary, Tls, Until};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::signal::unix::{SignalKind, signal};

use super::Done;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Address to send to.
    #[arg(long, value_name = "ADDRESS:PORT")]
    target: SocketAddr,
    /// Value of the Host header [default: the target].
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Path and query.
    #[arg(long, value_name = "PATH", default_value = "/")]
    path: String,
    /// Protocol.
    #[arg(long, value_enum, default_value_t = ProtocolArgument::Http1)]
    protocol: ProtocolArgument,
    /// Connections that carry requests.
    #[arg(long, value_name = "N", default_value_t = 16)]
    connections: usize,
    /// Requests at once on each HTTP/2 connection.
    #[arg(long, value_name = "N", default_value_t = 8)]
    streams: usize,
    /// Requests per second at fixed times (open loop); without it as fast as possible (closed loop).
    #[arg(long, value_name = "N")]
    rate: Option<u32>,
    /// How finely the open loop releases requests; finer costs more processor time.
    #[arg(long, value_name = "US", default_value_t = 1000)]
    tick_us: u64,
    /// Stop after this time [default: 10 s where there is no --count].
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Stop after this many requests.
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    count: Option<u64>,
    /// Percentage of requests that are POST with a small body.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    post_percent: u8,
    /// A new connection for every request.
    #[arg(long)]
    connection_per_request: bool,
    /// Connections that are held open besides and carry nothing after their first request.
    #[arg(long, value_name = "N", default_value_t = 0)]
    idle_connections: usize,
    /// Give a request up after this time.
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    request_timeout_ms: u64,
    /// Every answer's body must have this many bytes.
    #[arg(long, value_name = "N")]
    expect_bytes: Option<u64>,
    /// Speak TLS, and trust the certificate in this file (PEM); the server's name is that of --host
    #[arg(long, value_name = "FILE")]
    trust: Option<PathBuf>,
    /// Resume sessions over TLS
    #[arg(long, requires = "trust")]
    resume: bool,
    /// Print the summary as JSON on standard output.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ProtocolArgument {
    /// HTTP/1.1 with keep-alive
    Http1,
    /// HTTP/2 on clear text, prior knowledge
    H2c,
}

impl Arguments {
    fn into_options(self) -> Result<LoadOptions, Box<dyn std::error::Error>> {
        let mut options = LoadOptions::new(self.target);
        options.host = self.host.unwrap_or(options.host);
        options.path = self.path;
        options.protocol = match self.protocol {
            ProtocolArgument::Http1 => Protocol::Http1,
            ProtocolArgument::H2c => Protocol::H2c,
        };
        options.connections = self.connections;
        options.streams_per_connection = self.streams;
        options.pace = self.rate.map_or(Pace::Closed, |per_second| Pace::Open { per_second });
        options.tick_us = self.tick_us;
        options.until = match (self.count, self.seconds) {
            (Some(count), _) => Until::Count(count),
            (None, seconds) => Until::DurationMs(seconds.unwrap_or(10) * 1000),
        };
        options.post_percent = self.post_percent;
        options.connection_per_request = self.connection_per_request;
        options.idle_connections = self.idle_connections;
        options.request_timeout_ms = self.request_timeout_ms;
        options.expect = self.expect_bytes.map_or(Expect::Whole, Expect::Length);
        if let Some(file) = self.trust {
            let trusted =
                CertificateDer::from_pem_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            options.tls = Some(Tls { trusted: trusted.to_vec(), resume: self.resume });
        }
        Ok(options)
    }
}

pub(crate) async fn run(arguments: Arguments) -> Done {
    let json = arguments.json;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut handle = Load::start(arguments.into_options()?)?;
    let mut samples = handle.samples();
    loop {
        tokio::select! {
            () = handle.ended() => break,
            _ = interrupt.recv() => break,
            Ok(()) = samples.changed() => eprintln!("{}", sample_line(&samples.borrow_and_update())),
        }
    }
    let summary = handle.stop().await;
    if json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print_summary(&summary);
    }
    Ok(if summary.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sample_line(sample: &Sample) -> String {
    let by_instance: Vec<String> =
        sample.per_instance.iter().map(|(instance, requests)| format!("{instance} {requests}")).collect();
    format!(
        "{:>6.1} s  {} ok  {} failed  longest {} us  {}",
        sample.at_ms as f64 / 1000.0,
        sample.ok,
        sample.failed,
        sample.longest_us,
        by_instance.join("  ")
    )
}

fn print_summary(summary: &Summary) {
    let Summary { sent, ok, failed, latency_us, .. } = summary;
    println!(
        "sent {sent}, ok {ok}, failed {}, {:.0} requests/s",
        failed.total(),
        summary.requests_per_second()
    );
    if failed.total() > 0 {
        println!("failed by kind: {failed:?}");
    }
    println!(
        "latency us: p50 {} p90 {} p99 {} p99.9 {} longest {}",
        latency_us.p50, latency_us.p90, latency_us.p99, latency_us.p99_9, latency_us.max
    );
    println!(
        "connections: {} opened, {} closed by the peer; {} body bytes",
        summary.connections_opened, summary.connections_closed_by_peer, summary.body_bytes
    );
    if summary.idle_connections_failed > 0 {
        println!("idle connections that failed: {}", summary.idle_connections_failed);
    }
    for (instance, requests) in &summary.per_instance {
        println!("instance {instance}: {requests}");
    }
    for failure in &summary.failures {
        println!("failure at {} ms, {}: {}: {}", failure.at_ms, failure.id, failure.kind, failure.detail);
    }
}
