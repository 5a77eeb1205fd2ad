//! One file per subcommand: arguments in, exit code out.

pub(crate) mod certificate;
pub(crate) mod check;
pub(crate) mod compare;
pub(crate) mod load;
pub(crate) mod origin;
pub(crate) mod table;

use std::process::ExitCode;

/// How a subcommand ends.
pub(crate) type Done = Result<ExitCode, Box<dyn std::error::Error>>;
