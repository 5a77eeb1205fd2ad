//! `peregrine edge`: an edge in a process of its own, fed over the link. Here is no engine, no store and no API.
//!
//! ```text
//!   disk or engine ─► link ─► TableWriter ─► TableReader ─► edge (a thread for each core)
//! ```
//!
//! Start: an edge that has a table listens at once; one that has none listens when it gets its first. End: the edge
//! stops accepting and finishes what is in flight, bounded; then the link gives its last report. What it says of itself to
//! probes and collectors is in `edge_admin.rs`.

use std::cell::RefCell;
use std::io::Read;
use std::path::Path;

use peregrine_config::ServerConfig;
use peregrine_link::{EdgeError, JoinToken};
use peregrine_proxy::Sockets;
use serde_json::json;

use crate::certificates::{self, FileCertificates};
use crate::cli::args::{EdgeAction, EdgeArgs, EdgeJoinArgs, EdgeUpgradeArgs};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::output::Output;
use crate::edge_life::{self, Own, Start};
use crate::hand_over::{self, Inherited};
use crate::serve::{block_on, configuration, wrong_certificates};
use crate::{edge_admin, privileges, telemetry};

/// A token file is a line.
const MAX_TOKEN_BYTES: u64 = 4 << 10;

/// Runs the command.
pub(crate) fn run(args: &EdgeArgs, out: Output) -> Result {
    match &args.action {
        Some(EdgeAction::Join(join)) => return block_on(joined(join, &args.data, out)),
        Some(EdgeAction::Upgrade(upgrade)) => return block_on(upgraded(upgrade, &args.data, out)),
        None => {}
    }
    telemetry::log(args.log_format);
    let Some((inherited, predecessor)) = hand_over::inherited()? else {
        return start(args, Start::fresh(), None);
    };
    let Inherited { before, groups, admin, control, connected } = inherited;
    let start_with = Start {
        before: Some(before),
        control,
        connected,
        predecessor: Some(predecessor.clone()),
        takes_over: true,
        taken: Vec::new(),
    };
    let result = start(args, start_with, Some((groups, admin)));
    if let Err(failure) = &result {
        predecessor.failed(&failure.message);
    }
    result
}

/// Sockets that are there: listening ones, and that for probes with the address that it was asked for.
type There = (Vec<peregrine_proxy::Group>, Option<(std::net::SocketAddr, std::net::TcpListener)>);

/// What may need root, then no root any more, then the rest.
fn start(args: &EdgeArgs, mut begin: Start, there: Option<There>) -> Result {
    no_engine_here(&args.data)?;
    let config = match &args.config {
        Some(file) => ServerConfig::load(file).map_err(|mistakes| configuration(&mistakes))?,
        None => ServerConfig::default(),
    };
    let (mut edge, admin) = (config.edge, args.admin.or(config.edge_admin));
    if !args.http.is_empty() {
        edge.http.clone_from(&args.http);
    }
    let (groups, admin_there) = there.unwrap_or_default();
    let before: Vec<_> = groups.iter().map(|group| group.address).collect();
    let sockets = Sockets::take_over(&edge, groups)
        .map_err(|error| Failure::new(Exit::Failed, "edge.bind", error.to_string()))?;
    let kept = sockets.groups().iter().map(|group| group.address).filter(|address| before.contains(address));
    begin.taken.extend(kept);
    let asked_admin = admin;
    let admin = match (admin, admin_there) {
        (Some(asked), Some((before, listener))) if asked == before => {
            begin.taken.extend(listener.local_addr());
            Some((asked, listener))
        }
        (Some(asked), _) => Some((asked, edge_admin::bind(asked)?)),
        (None, _) => None,
    };
    privileges::lower(args.user.as_deref().or(config.user.as_deref()))?;
    // As the user who reads them anew later on: what root alone may read would be there now and missing then. Which domains
    // there are is the engine's matter; the files here are what this edge can present for them.
    let mut loaded = certificates::load(&config.domains).map_err(wrong_certificates)?;
    let certificates = FileCertificates::of(&mut loaded);
    let (sockets, admin) = (RefCell::new(sockets), RefCell::new(admin));
    block_on(edge_life::serve(&Own { args, config: edge, sockets, admin, asked_admin, certificates }, begin))
}

async fn upgraded(args: &EdgeUpgradeArgs, data: &Path, out: Output) -> Result {
    let binary = args.binary.as_deref().map(std::path::absolute).transpose();
    let binary = binary.map_err(|error| Failure::usage(format!("--binary: {error}")))?;
    let (pid, version) = hand_over::ask(data, binary).await?;
    out.data(&json!({ "pid": pid, "version": version }), || {
        format!("process {pid} serves, version {version}; the one before ends what it has")
    })
}

async fn joined(args: &EdgeJoinArgs, data: &Path, out: Output) -> Result {
    no_engine_here(data)?;
    let token = token(&args.join_token_file)?;
    let joined = peregrine_link::join(data, &args.engine, &token).await.map_err(|error| failure(&error))?;
    let told = json!({ "edge": joined.name, "engine": joined.engine, "data": data.display().to_string() });
    out.data(&told, || format!("joined as {}", joined.name))?;
    out.note(&format!("  start it: peregrine edge --data {}", data.display()));
    Ok(())
}

fn token(file: &Path) -> Result<JoinToken> {
    let failed = |error: &std::io::Error| Failure::file(file, "read the join token", error);
    let mut text = String::new();
    if file.as_os_str() == "-" {
        std::io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut text).map_err(|error| failed(&error))?;
    } else {
        let opened = std::fs::File::open(file).map_err(|error| failed(&error))?;
        opened.take(MAX_TOKEN_BYTES).read_to_string(&mut text).map_err(|error| failed(&error))?;
    }
    JoinToken::parse(&text).map_err(|error| Failure::usage(error.to_string()))
}

/// An edge beside an engine's secrets would hold what an edge must not hold.
fn no_engine_here(data: &Path) -> Result {
    if data.join("store.db").exists() {
        let what = format!("{} is the data folder of an engine", data.display());
        return Err(Failure::new(Exit::Conflict, "edge.engine_folder", what)
            .hint("give the edge a folder of its own with --data"));
    }
    Ok(())
}

pub(crate) fn failure(error: &EdgeError) -> Failure {
    let (exit, code, hint) = match error {
        EdgeError::Locked(_) => {
            (Exit::Conflict, "edge.locked", "stop that one, or choose another folder with --data")
        }
        EdgeError::OtherFolder(_) => (
            Exit::Conflict,
            "edge.other_folder",
            "an upgrade keeps the data folder: start another edge for another one",
        ),
        EdgeError::NotJoined(_) => (
            Exit::NotFound,
            "edge.not_joined",
            "`peregrine edges invite NAME` at the engine makes a token; `peregrine edge join` uses it",
        ),
        EdgeError::HasJoined(_) => {
            (Exit::Conflict, "edge.has_joined", "choose another folder with --data, or remove this one first")
        }
        EdgeError::File { .. } => (
            Exit::Failed,
            "edge.file",
            "check that the folder belongs to the user that the edge runs as (chown -R)",
        ),
        EdgeError::Table(_) => (
            Exit::Failed,
            "edge.table",
            "take the files table and table.before away: the engine sends a new one",
        ),
        EdgeError::Authority(_) | EdgeError::Tls(_) => (
            Exit::Failed,
            "edge.identity",
            "its identity is damaged: invite it again and join into an empty folder",
        ),
        EdgeError::Unreachable { .. } | EdgeError::Stream { .. } => (
            Exit::Unreachable,
            "engine.unreachable",
            "does the engine run, with [link] in its configuration, and is that its address?",
        ),
        EdgeError::Refused { code, .. } if code == "join.refused" => {
            (Exit::Auth, "edge.join_refused", "`peregrine edges invite NAME` makes another token")
        }
        EdgeError::Refused { .. } => (Exit::Conflict, "edge.refused", "see the log of the engine"),
        EdgeError::BadAddress(_) => (Exit::Usage, "cli.address", "such as 10.0.0.5:7071"),
    };
    Failure::new(exit, code, error.to_string()).hint(hint)
}
