//! `peregrine-bench check`: the exactly-once verdict over files.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use peregrine_bench::oracle::{AcknowledgedIds, check_exactly_once, read_records};
use serde::Deserialize;

use super::Done;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// What `peregrine-bench load --json` printed.
    #[arg(long, value_name = "FILE")]
    summary: PathBuf,
    /// Record file of an origin; repeat it for several.
    #[arg(long, value_name = "FILE", required = true)]
    record: Vec<PathBuf>,
}

/// The one part of a summary that the verdict needs.
#[derive(Deserialize)]
struct Acknowledged {
    acknowledged: AcknowledgedIds,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let place = |path: &PathBuf, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = File::open(&arguments.summary).map_err(|error| place(&arguments.summary, &error))?;
    let summary: Acknowledged =
        serde_json::from_reader(BufReader::new(file)).map_err(|error| place(&arguments.summary, &error))?;
    let mut records = Vec::new();
    for path in &arguments.record {
        records.extend(read_records(path).map_err(|error| place(path, &error))?);
    }
    let report = check_exactly_once(&summary.acknowledged, &records);
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(if report.is_exactly_once() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
