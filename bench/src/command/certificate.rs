//! `peregrine-bench certificate`: a certificate that signs itself, for a load over TLS.

use std::path::PathBuf;
use std::process::ExitCode;

use peregrine_bench::compare::Certificate;

use super::Done;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where `bench.pem` and `bench.key` go; the certificate is for `localhost`
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    Certificate::fresh()?.write(&arguments.out)?;
    Ok(ExitCode::SUCCESS)
}
