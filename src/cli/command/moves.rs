//! `peregrine moves`.

use clap::{Args, Subcommand};
use peregrine_api::client::{MoveFilter, Submit};
use peregrine_api::types::{Move, MoveState};

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::render;
use crate::cli::rollout_options::{Follow, WaitOptions};
use crate::cli::session::Session;
use crate::cli::watch;

/// Look at moves and act on them: every deploy, move, rollback and scale is one
#[derive(Args, Debug)]
pub(crate) struct Moves {
    #[command(subcommand)]
    action: MovesAction,
}

/// What to do with moves.
#[derive(Debug, Subcommand)]
enum MovesAction {
    /// List moves, newest first
    List {
        /// Of this service only
        #[arg(long, value_name = "SERVICE")]
        service: Option<String>,
        /// In this state only
        #[arg(long, value_name = "STATE", value_parser = move_state,
              help = "In this state only: running, paused, rolling_back, succeeded, rolled_back, aborted, failed, needs_operator")]
        state: Option<MoveState>,
        /// At most so many
        #[arg(long, short = 'n', value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
        limit: u32,
        /// Go on from here (next_cursor of the page before)
        #[arg(long, value_name = "CURSOR")]
        cursor: Option<String>,
    },
    /// Show one move
    Show {
        /// Id, mov_…
        id: String,
    },
    /// Watch a move to its end; the exit code says how it ended
    Watch {
        /// Id, mov_…
        id: String,
    },
    /// Hold a move at its present weights
    Pause {
        /// Id, mov_…
        id: String,
    },
    /// Let a paused move go on
    Resume {
        /// Id, mov_…
        id: String,
    },
    /// Skip what is left of the present waiting, or of the soak
    Promote {
        /// Id, mov_…
        id: String,
    },
    /// Go back to the old copies, until they are being removed
    ///
    /// Refused with exit code 5 from the release on, and of a single-writer service once the new copy takes over: `moves
    /// rollback` takes it back then. Ends with exit code 0 when the move went back (with `moves watch`, 10 says so).
    Abort {
        /// Id, mov_…
        id: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// Undo a move that has ended, by a move of its own
    Rollback {
        /// Id, mov_…
        id: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// Try again to remove what a move that has ended left behind
    ///
    /// For a move that ended as needs_operator. Exit code 0 when nothing is left, also when nothing was; 9 with what
    /// is still left.
    Cleanup {
        /// Id, mov_…
        id: String,
    },
    /// Show what a move amounted to
    Receipt {
        /// Id, mov_…
        id: String,
    },
}

/// A state by its name on the wire.
fn move_state(text: &str) -> std::result::Result<MoveState, String> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).map_err(|_| {
        "not a state: running, paused, rolling_back, succeeded, rolled_back, aborted, failed, needs_operator".to_owned()
    })
}

impl Moves {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let client = &session.client;
        match self.action {
            MovesAction::List { service, state, limit, cursor } => {
                list(session, &MoveFilter { service, state, limit: Some(limit), cursor }).await
            }
            MovesAction::Show { id } => {
                let of = session.ask("reading the move", client.get_move(&id)).await?;
                session.out.data(&of, || render::one_move(&of, &session.out))
            }
            MovesAction::Watch { id } => {
                let of = session.ask("reading the move", client.get_move(&id)).await?;
                let follow = if session.out.json { Follow::Stream } else { Follow::Wait };
                let outcome = watch::follow(session, of, follow).await?;
                watch::conclude(session, &outcome)
            }
            MovesAction::Pause { id } => {
                let of = session.ask("pausing the move", client.pause_move(&id)).await?;
                acted(session, &of, "it stays at its present weights; go on: peregrine moves resume")
            }
            MovesAction::Resume { id } => {
                let of = session.ask("resuming the move", client.resume_move(&id)).await?;
                acted(session, &of, "it goes on; watch it: peregrine moves watch")
            }
            MovesAction::Promote { id } => {
                let of = session.ask("promoting the move", client.promote_move(&id)).await?;
                acted(session, &of, "it does not wait any longer; watch it: peregrine moves watch")
            }
            MovesAction::Abort { id, wait } => abort(session, &id, wait).await,
            MovesAction::Rollback { id, wait } => {
                let submit = Submit::with_fresh_key();
                let started = session
                    .ask_patiently("starting the way back", session.patient.rollback_move(&id, &submit))
                    .await?;
                let outcome = watch::follow(session, started, wait.follow(&session.out)).await?;
                watch::conclude(session, &outcome)
            }
            MovesAction::Cleanup { id } => {
                let call = session.patient.clean_up_move(&id);
                let of = session.ask_patiently("removing what is left", call).await?;
                session.out.data(&of, || format!("{}: nothing is left", of.id))
            }
            MovesAction::Receipt { id } => {
                let receipt = session.ask("reading the receipt", client.receipt(&id)).await?;
                session.out.data(&receipt, || render::receipt(&receipt, &session.out))
            }
        }
    }
}

async fn list(session: &Session, filter: &MoveFilter) -> Result {
    let page = session.ask("reading the moves", session.client.moves(filter)).await?;
    session.out.data(&page, || render::moves(&page.items, &session.out))?;
    if let Some(cursor) = &page.next_cursor {
        session.out.note(&format!("there are more: --cursor {cursor}"));
    }
    Ok(())
}

fn acted(session: &Session, of: &Move, next: &str) -> Result {
    session.out.data(of, || format!("{} {}", of.id, render::state(of.state)))?;
    session.out.note(&format!("{next} {}", of.id));
    Ok(())
}

/// An abort has done its deed when the move went back: for this command that is a success.
async fn abort(session: &Session, id: &str, wait: WaitOptions) -> Result {
    let submit = Submit::with_fresh_key();
    let of = session.ask_patiently("aborting the move", session.patient.abort_move(id, &submit)).await?;
    let outcome = watch::follow(session, of, wait.follow(&session.out)).await?;
    match outcome.of.state {
        MoveState::Aborted | MoveState::RolledBack => session.out.data(&outcome, || {
            let receipt = outcome.receipt.as_ref().map(|receipt| render::receipt(receipt, &session.out));
            format!(
                "{}: the old copies serve\n{}",
                render::state(outcome.of.state),
                receipt.unwrap_or_default()
            )
        }),
        MoveState::Succeeded => Err(Failure::new(
            Exit::Conflict,
            "move.ended",
            format!("{}: it had succeeded before the abort could take effect", render::what(&outcome.of)),
        )
        .hint(format!("undo it: peregrine moves rollback {id}"))
        .detail("outcome", &outcome)),
        _ => watch::conclude(session, &outcome),
    }
}
