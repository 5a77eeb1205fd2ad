//! `peregrine audit`.

use clap::{Args, Subcommand};
use peregrine_api::types::{AuditEntry, AuditReport};

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};

/// Look at who asked for what and how it ended, and verify that nobody has changed it
#[derive(Args, Debug)]
pub(crate) struct Audit {
    #[command(subcommand)]
    action: AuditAction,
}

/// What to do with the audit.
#[derive(Debug, Subcommand)]
enum AuditAction {
    /// List entries, newest first
    List {
        /// At most so many
        #[arg(long, short = 'n', value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
        limit: u32,
        /// Go on from here (next_cursor of the page before)
        #[arg(long, value_name = "CURSOR")]
        cursor: Option<String>,
    },
    /// Verify every entry: each is sealed over the one before; exit code 9 names what was changed
    Verify,
}

impl Audit {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        match self.action {
            AuditAction::List { limit, cursor } => {
                let page =
                    session.ask("reading the audit", session.client.audit(Some(limit), cursor)).await?;
                session.out.data(&page, || table(&page.items, session))
            }
            AuditAction::Verify => {
                let report =
                    session.ask_patiently("verifying the audit", session.patient.verify_audit()).await?;
                verdict(&report, session)
            }
        }
    }
}

fn verdict(report: &AuditReport, session: &Session) -> Result {
    if report.verified {
        return session.out.data(report, || match report.entries {
            0 => "the audit has no entries yet".to_owned(),
            entries => format!(
                "verified: {}, {} to {}; the newest is {}",
                human::plural(entries, "entry", "entries"),
                report.first,
                report.last,
                clean(&report.hash)
            ),
        });
    }
    let names: Vec<String> = report.broken.iter().map(|broken| broken.entry.to_string()).collect();
    let message = format!(
        "the audit was changed: {} {}",
        if names.len() == 1 { "entry" } else { "entries" },
        names.join(", ")
    );
    let failure = Failure::new(Exit::Failed, "audit.broken", message)
        .hint("Keep a copy of the data folder, and compare with a backup: peregrine server backup.");
    let told = |failure: Failure, broken: &peregrine_api::types::AuditBreak| {
        failure.why(clean(&format!("entry {}: {}", broken.entry, broken.what)))
    };
    Err(report.broken.iter().fold(failure, told).detail("report", report))
}

fn table(entries: &[AuditEntry], session: &Session) -> String {
    let mut table = Table::new(&["entry", "time", "act", "service", "move", "what"]).numeric(&[0]);
    for entry in entries {
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        table.row(vec![
            entry.number.to_string(),
            human::stamp(entry.time),
            entry.act.clone(),
            or_dash(&entry.service),
            or_dash(&entry.move_id),
            what(entry),
        ]);
    }
    table.render(&session.out)
}

/// The part of an entry that tells it from others of its kind.
fn what(entry: &AuditEntry) -> String {
    let fields = ["reason", "control", "state", "what", "machine", "left", "revision"];
    let told = fields.iter().find_map(|field| entry.data.get(field));
    told.map_or_else(String::new, |value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}
