//! Options that the commands which start a rollout share: deploy, move, rollback, scale.

use clap::Args;

use super::output::Output;
use super::parse::{self, AbortOn, Steps};

/// Heading of the options that change how this one rollout goes about it.
const HOW: &str = "How it goes about it (else as the service is set)";

/// Whether to watch, wait or leave.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct WaitOptions {
    /// Show how it goes until it ends [default on a terminal]; with --json as a stream of events
    #[arg(long, conflicts_with = "detach")]
    pub(crate) watch: bool,

    /// Return as soon as it is started, with its id
    #[arg(long, short)]
    pub(crate) detach: bool,
}

/// Plan only, or this plan only.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PlanOptions {
    /// Only show what would be done; exit code 8 if something blocks it
    #[arg(long, conflicts_with_all = ["watch", "detach", "plan_hash"])]
    pub(crate) plan: bool,

    /// Do it only if its plan still has this hash (from --plan)
    #[arg(long, value_name = "HASH")]
    pub(crate) plan_hash: Option<String>,
}

/// Settings of one rollout.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Overrides {
    /// Weights of the new copies in percent, rising to 100, such as 1,10,50,100
    #[arg(long, value_name = "PERCENT,…", value_parser = parse::steps, help_heading = HOW)]
    pub(crate) steps: Option<Steps>,

    /// How long the old copies stay ready afterwards, such as 10m
    #[arg(long, value_name = "DURATION", value_parser = parse::duration_ms, help_heading = HOW)]
    pub(crate) soak: Option<u64>,

    /// When to turn back by itself, compared with the old copies, such as error-rate=1%,p95=+50% or p95=off
    #[arg(long, value_name = "GUARDS", value_parser = parse::abort_on, help_heading = HOW)]
    pub(crate) abort_on: Option<AbortOn>,
}

/// What happens after the rollout was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follow {
    /// Return with its id.
    Detach,
    /// Wait for the end; with `--json` one document then.
    Wait,
    /// Every event as a document.
    Stream,
}

impl WaitOptions {
    /// Waiting is the default everywhere, so that a pipeline gets the exit code.
    pub(crate) fn follow(self, out: &Output) -> Follow {
        if self.detach {
            Follow::Detach
        } else if self.watch && out.json {
            Follow::Stream
        } else {
            Follow::Wait
        }
    }
}
