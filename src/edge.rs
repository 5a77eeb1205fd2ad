//! `peregrine edge`: an edge in a process of its own, fed over the link. Here is no engine, no store and no API.
//!
//! ```text
//!   disk or engine ─► link ─► TableWriter ─► TableReader ─► edge (a thread for each core)
//! ```
//!
//! Start: an edge that has a table listens at once; one that has none listens when it gets its first. End: the edge
//! stops accepting and finishes what is in flight, bounded; then the link gives its last report. What it says of itself to
//! probes and collectors is in `edge_admin.rs`.

use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use peregrine_config::ServerConfig;
use peregrine_link::{EdgeError, EdgeLink, JoinToken};
use peregrine_proxy::Edge;
use serde_json::json;
use tokio::sync::watch;

use crate::cli::args::{EdgeAction, EdgeArgs, EdgeJoinArgs};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::output::Output;
use crate::edge_admin;
use crate::serve::{Signals, block_on, configuration, ended};
use crate::telemetry;

/// A token file is a line.
const MAX_TOKEN_BYTES: u64 = 4 << 10;

/// Runs the command.
pub(crate) fn run(args: &EdgeArgs, out: Output) -> Result {
    if let Some(EdgeAction::Join(join)) = &args.action {
        return block_on(joined(join, &args.data, out));
    }
    let config = match &args.config {
        Some(file) => ServerConfig::load(file).map_err(|mistakes| configuration(&mistakes))?,
        None => ServerConfig::default(),
    };
    let (mut edge, admin) = (config.edge, args.admin.or(config.edge_admin));
    if !args.http.is_empty() {
        edge.http.clone_from(&args.http);
    }
    telemetry::log(args.log_format);
    block_on(serve(edge, admin, args))
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

async fn serve(config: peregrine_proxy::Config, admin: Option<SocketAddr>, args: &EdgeArgs) -> Result {
    no_engine_here(&args.data)?;
    let metrics = telemetry::metrics()
        .map_err(|error| Failure::new(Exit::Failed, "edge.metrics", format!("{error:#}")))?;
    peregrine_proxy::describe();
    let mut signals = Signals::new()?;
    let cores = u32::try_from(config.core_count()).unwrap_or(u32::MAX);
    let link = EdgeLink::open(&args.data, &args.engine, cores, Arc::new(peregrine_proxy::now_ms))
        .map_err(|error| failure(&error))?;
    let (reader, mut ready) = (link.reader(), link.ready());
    tracing::info!(edge = link.name(), engines = link.engines().join(" "), data = %args.data.display(), "an edge");
    let (stop, stopped) = watch::channel(false);
    let (stop_link, link_stopped) = watch::channel(false);
    let (serving, told_serving) = watch::channel(false);
    // To the end of this process.
    let _probes = match admin {
        Some(listen) => {
            let name = link.name().to_owned();
            let told = edge_admin::Told { name, link: link.status(), serving: told_serving, metrics };
            let probes = edge_admin::start(listen, told).await?;
            tracing::info!(admin = %format!("http://{}", probes.address()), "probes are answered");
            Some(probes)
        }
        None => None,
    };
    let link = tokio::spawn(link.run(ended(&link_stopped)));
    let has_table = tokio::select! {
        ready = ready.wait_for(|ready| *ready) => ready.is_ok(),
        () = signals.stop() => false,
    };
    let result = if has_table {
        serve_table(config, reader, &mut signals, (&stop, &stopped), &serving).await
    } else {
        Ok(())
    };
    // Last: the counts of what has finished are told too.
    stop_link.send_replace(true);
    match link.await {
        Ok(()) => result,
        Err(error) => {
            result.and(Err(Failure::new(Exit::Failed, "edge.panicked", format!("the link failed: {error}"))))
        }
    }
}

async fn serve_table(
    config: peregrine_proxy::Config,
    reader: peregrine_routing::TableReader,
    signals: &mut Signals,
    (stop, stopped): (&watch::Sender<bool>, &watch::Receiver<bool>),
    serving: &watch::Sender<bool>,
) -> Result {
    let edge = Edge::bind(config, reader)
        .map_err(|error| Failure::new(Exit::Failed, "edge.bind", error.to_string()))?;
    let addrs: Vec<String> = edge.addrs().iter().map(|addr| format!("http://{addr}")).collect();
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Failed, "edge.failed", error.to_string());
    let mut edge = tokio::spawn(edge.run(ended(stopped)));
    serving.send_replace(true);
    tracing::info!(edge = addrs.join(" "), "serving");
    let ran = tokio::select! {
        ran = &mut edge => ran,
        () = signals.stop() => {
            tracing::info!("stopping: no new connections; a second signal ends at once");
            // Told first: whoever sends requests here looks elsewhere from now on.
            serving.send_replace(false);
            stop.send_replace(true);
            tokio::select! {
                ran = &mut edge => ran,
                () = signals.stop() => {
                    let what = "ended before requests in flight had finished";
                    return Err(Failure::new(Exit::Failed, "edge.interrupted", what));
                }
            }
        }
    };
    ran.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
}

fn failure(error: &EdgeError) -> Failure {
    let (exit, code, hint) = match error {
        EdgeError::Locked(_) => {
            (Exit::Conflict, "edge.locked", "stop that one, or choose another folder with --data")
        }
        EdgeError::NotJoined(_) => (
            Exit::NotFound,
            "edge.not_joined",
            "`peregrine edges invite NAME` at the engine makes a token; `peregrine edge join` uses it",
        ),
        EdgeError::HasJoined(_) => {
            (Exit::Conflict, "edge.has_joined", "choose another folder with --data, or remove this one first")
        }
        EdgeError::File { .. } => {
            (Exit::Failed, "edge.file", "check that the folder can be written by this user")
        }
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
