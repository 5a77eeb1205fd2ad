//! What the commands that start a rollout share (deploy, move, rollback, scale): options, and the ends.

use clap::Args;
use peregrine_api::types::{self, Applied, Plan};

use super::exit::Exit;
use super::failure::{Failure, Result};
use super::output::Output;
use super::parse::{self, AbortOn, Steps};
use super::render;
use super::session::Session;
use super::table::clean;
use super::watch;

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

    /// Copy a share of the safe requests to the new copies while they warm, and compare the answers, such as 20% or off
    #[arg(long, value_name = "SHARE", value_parser = parse::sample, help_heading = HOW)]
    pub(crate) mirror: Option<u16>,
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

impl Overrides {
    /// As the server takes them.
    pub(crate) fn to_wire(&self) -> types::Overrides {
        let guards = self.abort_on.unwrap_or_default();
        types::Overrides {
            steps: self.steps.clone().map(|steps| steps.0),
            soak_ms: self.soak,
            error_ratio_increase: guards.error_ratio_increase,
            p95_increase: guards.p95_increase,
            mirror_permille: self.mirror,
        }
    }
}

/// Shows one plan; one that is blocked is a failure with its blockers.
pub(crate) fn conclude_plan(out: &Output, plan: &Plan) -> Result {
    match blocked(out, std::slice::from_ref(plan))? {
        Some(failure) => Err(failure),
        None => out.data(plan, || render::plan(plan, out)),
    }
}

/// Shows a list of plans, one for each service.
pub(crate) fn conclude_plans(out: &Output, plans: &[Plan]) -> Result {
    match blocked(out, plans)? {
        Some(failure) => Err(failure),
        None => out.data(&plans, || text_of_plans(out, plans)),
    }
}

/// The failure that plans are of which one is blocked. People see all of the plans before it.
fn blocked(out: &Output, plans: &[Plan]) -> Result<Option<Failure>> {
    let blockers: Vec<_> = plans.iter().flat_map(|plan| &plan.blockers).collect();
    let Some(first) = blockers.first() else { return Ok(None) };
    if !out.json {
        out.raw(text_of_plans(out, plans).as_bytes())?;
    }
    let services: Vec<_> =
        plans.iter().filter(|plan| !plan.blockers.is_empty()).map(|plan| plan.service.as_str()).collect();
    let message = format!("{} cannot be done as planned", clean(&services.join(", ")));
    let mut failure = Failure::new(Exit::Blocked, "plan.blocked", message).hint(first.hint.clone());
    for blocker in &blockers {
        failure = failure.why(format!("{} [{}]", blocker.message, blocker.code));
    }
    Ok(Some(failure.detail("blockers", &blockers).detail("plans", plans)))
}

fn text_of_plans(out: &Output, plans: &[Plan]) -> String {
    plans.iter().map(|plan| render::plan(plan, out)).collect::<Vec<_>>().join("\n")
}

/// Watches what was started, if anything had to be.
pub(crate) async fn conclude_applied(session: &Session, applied: Applied, wait: WaitOptions) -> Result {
    match applied.rollout {
        Some(started) => {
            let outcome = watch::follow(session, started, wait.follow(&session.out)).await?;
            watch::conclude(session, &outcome)
        }
        None => {
            let unchanged = serde_json::json!({ "move": null, "service": applied.service });
            session
                .out
                .data(&unchanged, || format!("{}: nothing has to be moved", clean(&applied.service.name)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_stays_as_the_service_is_set() {
        assert_eq!(Overrides::default().to_wire(), types::Overrides::default());
    }

    #[test]
    fn options_go_to_the_server_in_its_units() {
        let given = Overrides {
            steps: parse::steps("50,100").ok(),
            soak: parse::duration_ms("10m").ok(),
            abort_on: parse::abort_on("error-rate=1%,p95=off").ok(),
            mirror: parse::sample("20%").ok(),
        };
        let wire = given.to_wire();
        assert_eq!((wire.steps, wire.soak_ms), (Some(vec![50, 100]), Some(600_000)));
        assert_eq!((wire.error_ratio_increase, wire.p95_increase), (Some(0.01), Some(None)));
        assert_eq!(wire.mirror_permille, Some(200));
        assert_eq!((parse::sample("off"), parse::sample("100%")), (Ok(0), Ok(1_000)));
        assert!(["0%", "101%", "20", "x%", ""].iter().all(|text| parse::sample(text).is_err()));
    }

    #[test]
    fn a_watch_in_json_is_a_stream_and_leaving_is_never_the_default() {
        use std::ffi::OsString;
        let out = |arguments: &[&str]| {
            Output::new(
                &arguments.iter().map(OsString::from).collect::<Vec<_>>(),
                super::super::output::Surroundings::default(),
            )
        };
        let watch = WaitOptions { watch: true, detach: false };
        assert_eq!(watch.follow(&out(&["peregrine", "--json"])), Follow::Stream);
        assert_eq!(watch.follow(&out(&["peregrine"])), Follow::Wait);
        assert_eq!(WaitOptions::default().follow(&out(&["peregrine", "--json"])), Follow::Wait);
        assert_eq!(WaitOptions { watch: false, detach: true }.follow(&out(&["peregrine"])), Follow::Detach);
    }
}
