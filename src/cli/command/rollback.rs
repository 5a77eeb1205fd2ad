//! `peregrine rollback`.

use clap::Args;
use peregrine_api::client::Submit;
use peregrine_api::types::RollbackRequest;

use crate::cli::failure::Result;
use crate::cli::rollout_options::{PlanOptions, WaitOptions, conclude_applied, conclude_plan};
use crate::cli::session::Session;

/// Bring back an earlier version of a service
///
/// To undo a move to another machine, use `peregrine moves rollback`.
#[derive(Args, Debug)]
pub(crate) struct Rollback {
    /// Service
    service: String,

    /// Version; without it, the one before
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    to_version: Option<u32>,

    #[command(flatten)]
    plan: PlanOptions,

    #[command(flatten)]
    wait: WaitOptions,

    /// Why; kept with the move
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Rollback {
    /// Plans it, or starts it and watches.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let request = RollbackRequest {
            to_version: self.to_version,
            reason: self.reason,
            plan_hash: self.plan.plan_hash,
        };
        if self.plan.plan {
            let call = session.patient.plan_rollback(&self.service, &request);
            let planned = session.ask_patiently("planning the rollback", call).await?;
            return conclude_plan(&session.out, &planned.plan);
        }
        let submit = Submit::with_fresh_key();
        let call = session.patient.rollback(&self.service, &request, &submit);
        let applied = session.ask_patiently("starting the rollback", call).await?;
        conclude_applied(session, applied, self.wait).await
    }
}
