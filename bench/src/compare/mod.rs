//! Peregrine beside nginx, HAProxy, Caddy and a minimal Pingora proxy, in one run.
//!
//! Each contender runs alone on one core ([`CompareOptions::contender_core`]); load and origin share another. Every
//! measurement starts a fresh process, in interleaved rounds (A B C, A B C, …), so that what else the machine does
//! falls on all alike. What cannot be measured is told with its reason, never left out or guessed.
//!
//! Needs `taskset` and `setpriv` (util-linux), `nginx` (also the origin), `wrk` and `h2load`; the others take part where
//! they are. Uses the loopback ports 19101 to 19103, 19143, 19170, 19180 and 19182.

mod certificate;
mod client;
mod contender;
mod measure;
mod origin;
mod process;
mod report;
mod scenario;
mod switch;

use std::ffi::OsStr;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use thiserror::Error;

pub use self::certificate::Certificate;
use self::client::Clients;
use self::contender::{Contender, Kind, version_of};
use self::measure::Bench;
use self::origin::{ECHO_PORT, Origin, loopback};
use self::process::{Core, Process};
use self::report::Spread;
pub use self::report::{ClosedRun, Machine, OpenRun, Report, ScenarioReport};
use self::scenario::{Client, SCENARIOS, Scenario, TLS_SCENARIOS};
use crate::load::LoadError;

/// The longest that a comparison may take, in seconds.
pub const MAX_RUN_S: u64 = 1_200;
/// What a measurement costs besides its load: start, warm-up, stop; in milliseconds.
const OVERHEAD_MS: u64 = 500;
/// The open loop's share of what the slowest contender can do, in percent.
const OPEN_LOOP_PERCENT: f64 = 70.0;
/// Ports that must be free, those of the files under `bench/conf`.
const PORTS: [u16; 7] = [19101, 19102, 19103, 19143, 19170, 19180, 19182];

/// What to compare, and how long.
#[derive(Debug, Clone)]
pub struct CompareOptions {
    /// The release binary of Peregrine; without it Peregrine is skipped.
    pub peregrine: Option<PathBuf>,
    /// Seconds of each closed loop; an open loop takes half of it.
    pub seconds: u64,
    /// Interleaved rounds.
    pub rounds: u64,
    /// The scenarios over TLS instead of those on clear text, unless scenarios are named.
    pub tls: bool,
    /// Names of the scenarios to run; empty means all of one kind.
    pub scenarios: Vec<String>,
    /// Names of the contenders to run; empty means all.
    pub contenders: Vec<String>,
    /// Access logs on, as in production, or off.
    pub access_log: bool,
    /// Core of the contender.
    pub contender_core: usize,
    /// Core of the load and the origin.
    pub load_core: usize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self {
            peregrine: None,
            seconds: 5,
            rounds: 3,
            tls: false,
            scenarios: Vec::new(),
            contenders: Vec::new(),
            access_log: true,
            contender_core: 1,
            load_core: 0,
        }
    }
}

/// Why a comparison could not be made.
#[derive(Debug, Error)]
pub enum CompareError {
    /// The options name something unknown or ask for too much.
    #[error("{0}")]
    Options(String),
    /// A program is not installed: its name and Debian's package.
    #[error("`{0}` is not installed; `apt-get install {1}`")]
    Missing(&'static str, &'static str),
    /// A port of the configurations under `bench/conf` is in use.
    #[error("port {0} is in use: {1}; end what listens there and try again")]
    PortTaken(u16, io::Error),
    /// A server could not be started.
    #[error("cannot start {0}: {1}")]
    Start(String, io::Error),
    /// A server started and does not serve.
    #[error("{0}")]
    NotServing(String),
    /// The origin did not tell its counts.
    #[error("the origin's stub_status: {0}")]
    Origin(String),
    /// A load client failed.
    #[error("{0}")]
    Client(String),
    /// A contender could not be told to switch its upstream.
    #[error("cannot switch the upstream of {0}: {1}")]
    Switch(&'static str, io::Error),
    /// The open loop was given impossible options.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// This process could not be confined to the load's core, or its scratch folder could not be made.
    #[error("cannot prepare the machine: {0}")]
    Prepare(io::Error),
}

impl CompareError {
    fn start(program: &Path, error: io::Error) -> Self {
        let name = program.file_name().unwrap_or_default();
        Self::Start(name.to_string_lossy().into_owned(), error)
    }
}

/// A contender that is not measured, and the reason.
pub type Absent = (String, String);

/// Runs the comparison; `progress` hears of each step in one line.
///
/// Confines the calling thread to the load's core, and leaves it so.
///
/// # Errors
/// Nothing can be compared: something is missing, a port is taken, or a server does not serve.
pub async fn compare(options: &CompareOptions, progress: impl Fn(&str)) -> Result<Report, CompareError> {
    let scenarios = options.chosen_scenarios()?;
    let (contenders, skipped) = options.chosen_contenders()?;
    for (name, why) in &skipped {
        progress(&format!("{name} does not take part: {why}"));
    }
    let planned_s = options.planned_s(scenarios.len(), contenders.len());
    if planned_s > MAX_RUN_S {
        let why =
            format!("this would take {planned_s} s, more than {MAX_RUN_S}; lower --seconds or --rounds");
        return Err(CompareError::Options(why));
    }
    progress(&format!("{} scenarios, {} contenders, about {planned_s} s", scenarios.len(), contenders.len()));
    let machine = Machine::this();
    prepare(options).map_err(CompareError::Prepare)?;
    check_ports()?;
    let scratch = Scratch::new().map_err(CompareError::Prepare)?;
    let clients = Clients::find()?;
    let versions = versions(&contenders, &clients);
    let origin = Origin::start(Core(options.load_core), &scratch.0.join("origin")).await?;
    let certificate = Certificate::fresh()
        .map_err(|error| CompareError::Prepare(io::Error::other(format!("no certificate: {error}"))))?;
    let _echo = if scenarios.iter().any(|scenario| scenario.client == Client::Echo) {
        Some(echo_origin(Core(options.load_core), &scratch.0.join("echo"))?)
    } else {
        None
    };
    let core = Core(options.contender_core);
    let bench = Bench { clients, origin, core, certificate, scratch: &scratch.0 };
    let mut report = Report {
        started: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        machine,
        versions,
        seconds: options.seconds,
        rounds: options.rounds,
        access_log: options.access_log,
        skipped,
        scenarios: Vec::new(),
    };
    for scenario in scenarios {
        report.scenarios.push(run_scenario(options, &bench, scenario, &contenders, &progress).await?);
    }
    bench.origin.stop().await;
    Ok(report)
}

/// This program's own origin, where WebSockets are echoed. Ends when it is dropped.
fn echo_origin(core: Core, folder: &Path) -> Result<Process, CompareError> {
    let this = std::env::current_exe().map_err(CompareError::Prepare)?;
    std::fs::create_dir(folder).map_err(CompareError::Prepare)?;
    let listen = loopback(ECHO_PORT).to_string();
    let arguments = ["origin", "--listen", &listen].map(OsStr::new);
    Process::start(core, folder, &this, &arguments, &[])
}

async fn run_scenario(
    options: &CompareOptions,
    bench: &Bench<'_>,
    scenario: &Scenario,
    contenders: &[Contender],
    progress: &impl Fn(&str),
) -> Result<ScenarioReport, CompareError> {
    let mut able = Vec::new();
    let mut not_measured = Vec::new();
    for contender in contenders {
        match if scenario.switching { bench.try_switching(contender, scenario).await } else { Ok(()) } {
            Ok(()) => able.push(contender),
            Err(why @ CompareError::Switch(..)) => {
                progress(&format!("{}: not measured: {why}", scenario.name));
                not_measured.push((contender.kind.name().to_owned(), why.to_string()));
            }
            Err(why) => return Err(why),
        }
    }
    let mut report = ScenarioReport {
        name: scenario.name.to_owned(),
        title: scenario.title.to_owned(),
        open_loop_rate: 0,
        closed: Vec::new(),
        open: Vec::new(),
        not_measured,
    };
    for round in 1..=options.rounds {
        for contender in &able {
            let run = bench.closed(contender, scenario, round, options.seconds).await?;
            progress(&format!(
                "{} round {round} {}: {:.0} requests/s, {:.1} us, {} failed",
                scenario.name, run.contender, run.requests_per_second, run.cpu_us_per_request, run.failed
            ));
            report.closed.push(run);
        }
    }
    // Messages of a WebSocket have no open loop.
    let able = if scenario.client == Client::Echo { Vec::new() } else { able };
    report.open_loop_rate = if able.is_empty() { 0 } else { open_loop_rate(&report.closed, scenario.tls) };
    for round in 1..=options.rounds {
        for contender in &able {
            let pace = (report.open_loop_rate, options.open_loop_ms());
            let run = bench.open(contender, scenario, round, pace).await?;
            progress(&format!(
                "{} round {round} {} at {}/s: p50 {} us, p99 {} us, {} failed",
                scenario.name, run.contender, report.open_loop_rate, run.p50_us, run.p99_us, run.failed
            ));
            report.open.push(run);
        }
    }
    Ok(report)
}

/// 70 % of what the slowest contender could do, or, over TLS, of what Peregrine could: one rate for all, or latencies
/// could not be compared.
fn open_loop_rate(closed: &[ClosedRun], of_peregrine: bool) -> u32 {
    let is_peregrine = |run: &&ClosedRun| run.contender == Kind::Peregrine.name();
    let of_peregrine = of_peregrine && closed.iter().any(|run| is_peregrine(&run));
    let slowest = closed
        .iter()
        .filter(|run| !of_peregrine || is_peregrine(run))
        .map(|of| closed.iter().filter(|run| run.contender == of.contender))
        .map(|runs| Spread::of(runs.map(|run| run.requests_per_second)).median)
        .min_by(f64::total_cmp);
    let rate = (slowest.unwrap_or(0.0) * OPEN_LOOP_PERCENT / 100.0).round();
    // A rate is far below 2^32; a negative one cannot be.
    (rate as u32).max(1)
}

impl CompareOptions {
    fn chosen_scenarios(&self) -> Result<Vec<&'static Scenario>, CompareError> {
        let all = || SCENARIOS.iter().chain(&TLS_SCENARIOS);
        let known: Vec<&str> = all().map(|scenario| scenario.name).collect();
        check_names("scenario", &self.scenarios, &known)?;
        if self.scenarios.is_empty() {
            return Ok(if self.tls { TLS_SCENARIOS.iter().collect() } else { SCENARIOS.iter().collect() });
        }
        Ok(all().filter(|scenario| self.scenarios.iter().any(|chosen| chosen == scenario.name)).collect())
    }

    /// Who takes part, and who does not and why.
    fn chosen_contenders(&self) -> Result<(Vec<Contender>, Vec<Absent>), CompareError> {
        check_names("contender", &self.contenders, &Kind::ALL.map(Kind::name))?;
        let mut found = Vec::new();
        let mut skipped = Vec::new();
        for kind in Kind::ALL {
            if !self.contenders.is_empty() && !self.contenders.iter().any(|chosen| chosen == kind.name()) {
                continue;
            }
            match Contender::find(kind, self.peregrine.as_deref(), self.access_log) {
                Ok(contender) => found.push(contender),
                Err(why) => skipped.push((kind.name().to_owned(), why)),
            }
        }
        if found.is_empty() {
            let reasons: Vec<String> = skipped.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            return Err(CompareError::Options(format!("no contender takes part ({})", reasons.join("; "))));
        }
        Ok((found, skipped))
    }

    const fn open_loop_ms(&self) -> u64 {
        self.seconds * 1000 / 2
    }

    fn planned_s(&self, scenarios: usize, contenders: usize) -> u64 {
        let measurements = (scenarios * contenders) as u64 * self.rounds;
        measurements * (self.seconds * 1000 + self.open_loop_ms() + 2 * OVERHEAD_MS) / 1000
    }
}

fn check_names(what: &str, chosen: &[String], known: &[&str]) -> Result<(), CompareError> {
    match chosen.iter().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let known = known.join(", ");
            Err(CompareError::Options(format!("there is no {what} `{name}`; there are {known}")))
        }
    }
}

fn check_ports() -> Result<(), CompareError> {
    for port in PORTS {
        drop(TcpListener::bind(loopback(port)).map_err(|error| CompareError::PortTaken(port, error))?);
    }
    Ok(())
}

/// Confines this process to the load's core and lets it hold many connections.
fn prepare(options: &CompareOptions) -> io::Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    if options.contender_core == options.load_core || cores < 2 {
        return Err(io::Error::other(
            "two different cores are needed, one for the contender and one for load and origin",
        ));
    }
    let mut set = CpuSet::new();
    set.set(options.load_core);
    sched_setaffinity(None, &set)?;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(())
}

fn versions(contenders: &[Contender], clients: &Clients) -> Vec<(String, String)> {
    let mut versions: Vec<(String, String)> =
        contenders.iter().map(|contender| (contender.kind.name().to_owned(), contender.version())).collect();
    versions.push(("wrk".to_owned(), version_of(&clients.wrk, "-v")));
    versions.push(("h2load".to_owned(), version_of(&clients.h2load, "--version")));
    versions
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map_or("unknown processor", |name| name.trim_start_matches(['\t', ' ', ':']))
            .to_owned();
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            processor,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average: read("/proc/loadavg").split(' ').next().unwrap_or("unknown").to_owned(),
        }
    }
}

/// A folder for configurations, logs and sockets of the servers; gone with the comparison.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("peregrine-bench-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        std::fs::create_dir(path.join("origin"))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_comparison_stays_below_the_longest() {
        let planned_s = CompareOptions::default().planned_s(SCENARIOS.len(), Kind::ALL.len());
        assert!(planned_s < MAX_RUN_S, "{planned_s} s");
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let options = CompareOptions { scenarios: vec!["h3".to_owned()], ..CompareOptions::default() };
        let error = options.chosen_scenarios().expect_err("unknown").to_string();
        assert!(error.contains("h3") && error.contains("h1-100b"), "{error}");
        let options = CompareOptions { contenders: vec!["apache".to_owned()], ..CompareOptions::default() };
        assert!(options.chosen_contenders().is_err());
    }

    #[test]
    fn a_peregrine_that_is_not_built_is_skipped_with_the_reason() {
        let options = CompareOptions {
            peregrine: Some("no/such/binary".into()),
            contenders: vec!["nginx".to_owned(), "peregrine".to_owned()],
            ..CompareOptions::default()
        };
        let skipped = match options.chosen_contenders() {
            Ok((_, skipped)) => {
                skipped.into_iter().map(|(name, why)| format!("{name}: {why}")).collect::<String>()
            }
            // Where nginx is missing too, nobody is left.
            Err(error) => error.to_string(),
        };
        assert!(skipped.contains("peregrine: no binary at no/such/binary"), "{skipped}");
    }

    #[test]
    fn the_open_loop_runs_at_a_share_of_the_slowest() {
        let run = |contender: &str, requests_per_second| ClosedRun {
            contender: contender.to_owned(),
            round: 1,
            requests: 1,
            failed: 0,
            requests_per_second,
            cpu_us_per_request: 1.0,
            core_use: 1.0,
            others_use: 0.0,
            memory_kib: 1,
            upstream_connections: 1,
            upstream_requests: 1,
            switches: 0,
            idle_closed: 0,
            bytes_per_idle_connection: 0,
        };
        assert_eq!(open_loop_rate(&[run("a", 1000.0), run("b", 500.0)], true), 350);
        assert_eq!(open_loop_rate(&[run("peregrine", 1000.0), run("b", 500.0)], true), 700);
    }

    #[test]
    fn the_committed_configurations_use_the_ports_that_are_checked() {
        let files = [
            include_str!("../../conf/origin/nginx.conf"),
            include_str!("../../conf/nginx/nginx.conf"),
            include_str!("../../conf/haproxy/haproxy.cfg"),
            include_str!("../../conf/peregrine/peregrine.toml"),
            include_str!("../../conf/nginx/tls.conf"),
            include_str!("../../conf/haproxy/tls.cfg"),
            include_str!("../../conf/peregrine/tls.toml"),
            include_str!("../../conf/caddy/Caddyfile"),
        ];
        for file in files {
            for (at, _) in file.match_indices("127.0.0.1:") {
                let port: String = file[at + 10..].chars().take_while(char::is_ascii_digit).collect();
                let port: u16 = port.parse().expect("a port");
                assert!(PORTS.contains(&port), "{port}");
            }
        }
    }
}
