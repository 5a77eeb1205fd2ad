//! `peregrine-bench table`: the routing table at full size.

use std::process::ExitCode;

use super::Done;
use crate::table::{Shape, run as measure};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Host patterns in the table.
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    hosts: usize,
    /// How many of them share one service.
    #[arg(long, value_name = "N", default_value_t = 1)]
    hosts_per_service: usize,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let report = measure(Shape { hosts: arguments.hosts, hosts_per_service: arguments.hosts_per_service })?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}
