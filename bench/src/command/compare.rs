//! `peregrine-bench compare`: measure, print the table, keep the raw runs.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use peregrine_bench::compare::{CompareOptions, compare};

use super::Done;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Release binary of Peregrine; without it nginx and HAProxy are compared alone.
    #[arg(long, value_name = "PATH")]
    peregrine: Option<PathBuf>,
    /// Seconds of each closed loop; an open loop takes half of it.
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Interleaved rounds.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    rounds: u64,
    /// The scenarios over TLS instead of those on clear text.
    #[arg(long)]
    tls: bool,
    /// Only these scenarios, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    scenarios: Vec<String>,
    /// Only these contenders, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    contenders: Vec<String>,
    /// Switch the access logs of all contenders off.
    #[arg(long)]
    no_access_log: bool,
    /// Core of the contender.
    #[arg(long, value_name = "N", default_value_t = 1)]
    contender_core: usize,
    /// Core of the load and the origin.
    #[arg(long, value_name = "N", default_value_t = 0)]
    load_core: usize,
    /// Folder that the raw runs are kept in.
    #[arg(long, value_name = "FOLDER", default_value = "bench/runs")]
    out: PathBuf,
    /// Keep nothing.
    #[arg(long, conflicts_with = "out")]
    dry: bool,
}

pub(crate) async fn run(arguments: Arguments) -> Done {
    let options = CompareOptions {
        peregrine: arguments.peregrine,
        seconds: arguments.seconds,
        rounds: arguments.rounds,
        tls: arguments.tls,
        scenarios: arguments.scenarios,
        contenders: arguments.contenders,
        access_log: !arguments.no_access_log,
        contender_core: arguments.contender_core,
        load_core: arguments.load_core,
    };
    let report = tokio::select! {
        report = compare(&options, |step| eprintln!("{step}")) => report?,
        // Dropping the comparison ends its servers and removes its folder.
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            return Err("interrupted; nothing was kept".into());
        }
    };
    print!("{}", report.to_markdown());
    if !arguments.dry {
        let (day, time) = report.started.split_once('T').ok_or("a start time without a day")?;
        let folder = arguments.out.join(format!("{day}-{}cores", report.machine.cores));
        let name = format!("compare-{}", time.replace(':', "").trim_end_matches('Z'));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("{name}.json")), serde_json::to_vec_pretty(&report)?)?;
        fs::write(folder.join(format!("{name}.md")), report.to_markdown())?;
        eprintln!("raw runs kept in {}", folder.join(format!("{name}.json")).display());
    }
    Ok(ExitCode::SUCCESS)
}
