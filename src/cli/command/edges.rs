//! `peregrine edges`.

use clap::{Args, Subcommand};
use peregrine_api::types::{Edge, InviteRequest};
use serde_json::json;

use crate::cli::failure::Result;
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::parse;
use crate::cli::prompt;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};

/// List edges in other processes, let one join, shut one out
#[derive(Args, Debug)]
pub(crate) struct Edges {
    #[command(subcommand)]
    action: EdgesAction,
}

/// What to do with edges.
#[derive(Debug, Subcommand)]
enum EdgesAction {
    /// List edges: state, lease, version of the table, last seen
    List,
    /// Make a token with which an edge joins, once
    ///
    /// The token is shown here and kept nowhere; the server keeps a digest. An edge of that name that is there goes on
    /// until the new one joins.
    Invite {
        /// Name of the edge, such as edge-fra-1
        edge: String,
        /// How long the token is good, at most 7d
        #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse::duration_ms)]
        ttl: u64,
    },
    /// Shut an edge out; asked about first (or needs --yes)
    ///
    /// It is heard no more. It goes on serving its last table until it is stopped.
    Remove {
        /// Edge
        edge: String,
    },
}

impl Edges {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let out = &session.out;
        match self.action {
            EdgesAction::List => {
                let edges = session.ask("reading the edges", session.client.edges()).await?;
                out.data(&edges, || list(&edges, out))
            }
            EdgesAction::Invite { edge, ttl } => {
                let request = InviteRequest { name: edge, ttl_ms: Some(ttl) };
                let invite = session.ask("making a token", session.client.invite_edge(&request)).await?;
                out.data(&invite, || invite.token.clone())?;
                out.note(&format!(
                    "  good for one use until {}; on the machine of the edge, with the address at which it reaches this server ({} here):",
                    human::moment(invite.expires_at),
                    clean(&invite.listen)
                ));
                out.note("  peregrine edge join --engine HOST:PORT --join-token-file FILE");
                Ok(())
            }
            EdgesAction::Remove { edge } => {
                prompt::confirm(&format!("Shut {edge} out?"), session.yes)?;
                session.ask("shutting it out", session.client.remove_edge(&edge)).await?;
                out.data(&json!({ "edge": edge, "removed": true }), || format!("{} removed", clean(&edge)))
            }
        }
    }
}

fn list(edges: &[Edge], out: &Output) -> String {
    let mut table =
        Table::new(&["edge", "state", "address", "cores", "table", "lease", "seen", "problem"]).numeric(&[3]);
    for edge in edges {
        let newest = edge.newest_version;
        table.row(vec![
            edge.name.clone(),
            render::word(edge.state),
            edge.address.clone().unwrap_or_else(|| "-".to_owned()),
            edge.cores.to_string(),
            if edge.table_version >= newest {
                newest.to_string()
            } else {
                format!("{} of {newest}", edge.table_version)
            },
            edge.lease_left_ms.map_or_else(|| "-".to_owned(), |ms| format!("{} s", ms.div_ceil(1_000))),
            edge.seen_at.map_or_else(|| "never".to_owned(), human::ago),
            problem(edge).unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.render(out)
}

fn problem(edge: &Edge) -> Option<String> {
    let connected = edge.state == peregrine_api::types::EdgeState::Connected;
    let unsaved = (connected && !edge.saved).then(|| "its table is not on its disk".to_owned());
    edge.problem.clone().or(unsaved)
}
