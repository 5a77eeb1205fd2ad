//! `peregrine move`.

use clap::Args;
use peregrine_api::client::Submit;
use peregrine_api::types::MoveRequest;

use crate::cli::failure::Result;
use crate::cli::rollout_options::{Overrides, PlanOptions, WaitOptions, conclude_plan};
use crate::cli::session::Session;
use crate::cli::watch;

/// Move a service to another machine while it serves
///
/// Starts the new copies, warms them, shifts the traffic in steps, drains the old copies and gives their place back. No
/// request fails; the receipt at the end says so in numbers. `peregrine moves abort` takes it back, until the
/// old copies are being removed or, of a single-writer service, the new one takes over.
#[derive(Args, Debug)]
pub(crate) struct Move {
    /// Service
    service: String,

    /// Machine that it goes to
    #[arg(long, value_name = "MACHINE")]
    to: String,

    /// Only the copies on this machine
    #[arg(long, value_name = "MACHINE")]
    from: Option<String>,

    #[command(flatten)]
    plan: PlanOptions,

    #[command(flatten)]
    wait: WaitOptions,

    #[command(flatten)]
    overrides: Overrides,

    /// Why; kept with the move
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Move {
    /// Plans it, or starts it and watches.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let request = MoveRequest {
            service: self.service,
            to: self.to,
            from: self.from,
            settings: self.overrides.to_wire(),
            reason: self.reason,
            plan_hash: self.plan.plan_hash,
        };
        if self.plan.plan {
            let plan =
                session.ask_patiently("planning the move", session.patient.plan_move(&request)).await?;
            return conclude_plan(&session.out, &plan);
        }
        let submit = Submit::with_fresh_key();
        let started =
            session.ask_patiently("starting the move", session.patient.start_move(&request, &submit)).await?;
        let outcome = watch::follow(session, started, self.wait.follow(&session.out)).await?;
        watch::conclude(session, &outcome)
    }
}
