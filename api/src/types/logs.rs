//! Output of instances.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One line of output; a document of its own in an `application/x-ndjson` stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    /// When it was written.
    pub time: Timestamp,
    /// Service.
    pub service: String,
    /// Instance id.
    pub instance: String,
    /// Machine.
    pub machine: String,
    /// Where it comes from.
    pub source: LogSource,
    /// The line without its end; invalid UTF-8 is replaced.
    pub text: String,
}

/// Where a line comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Peregrine itself, for example because the output of an instance cannot be read.
    Notice,
}
