//! `peregrine scale`.

use clap::Args;
use peregrine_api::client::Submit;
use peregrine_api::types::ScaleRequest;

use crate::cli::failure::Result;
use crate::cli::prompt;
use crate::cli::rollout_options::{PlanOptions, WaitOptions, conclude_applied, conclude_plan};
use crate::cli::session::Session;

/// Change the number of copies of a service
///
/// 0 stops it; that is asked about first (or needs --yes).
#[derive(Args, Debug)]
pub(crate) struct Scale {
    /// Service
    service: String,

    /// How many copies
    #[arg(value_name = "N")]
    replicas: u32,

    /// Machine for new ones; without it, where the others are
    #[arg(long, value_name = "MACHINE")]
    machine: Option<String>,

    #[command(flatten)]
    plan: PlanOptions,

    #[command(flatten)]
    wait: WaitOptions,

    /// Why; kept with the move
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

impl Scale {
    /// Plans it, or starts it and watches.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let request = ScaleRequest {
            replicas: self.replicas,
            machine: self.machine,
            reason: self.reason,
            plan_hash: self.plan.plan_hash,
        };
        if self.plan.plan {
            let call = session.patient.plan_scale(&self.service, &request);
            let planned = session.ask_patiently("planning the change", call).await?;
            return conclude_plan(&session.out, &planned.plan);
        }
        if self.replicas == 0 {
            prompt::confirm(&format!("Stop every copy of {}?", self.service), session.yes)?;
        }
        let submit = Submit::with_fresh_key();
        let call = session.patient.scale(&self.service, &request, &submit);
        let applied = session.ask_patiently("starting the change", call).await?;
        conclude_applied(session, applied, self.wait).await
    }
}
