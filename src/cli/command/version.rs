//! `peregrine version`.

use clap::Args;
use serde_json::json;

use crate::cli::failure::Result;
use crate::cli::output::Output;

/// Print the version of this binary
#[derive(Args, Debug)]
pub(crate) struct Version {}

impl Version {
    /// Prints it. Asks no server: `peregrine doctor` compares the two.
    pub(crate) fn run(&self, out: &Output) -> Result {
        let version = env!("CARGO_PKG_VERSION");
        out.data(&json!({ "version": version }), || format!("peregrine {version}"))
    }
}
