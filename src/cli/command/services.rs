//! `peregrine services`.

use std::time::Duration;

use clap::{Args, Subcommand};
use peregrine_api::client::{ClientError, Removal};
use peregrine_api::types::{Deployment, Service, Workload};
use serde_json::json;

use crate::cli::failure::Result;
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::prompt;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};

/// The server is asked to wait for so long with one call; then it is asked again.
const REMOVE_WAIT_MS: u64 = 20_000;
/// A removal that takes longer is left to the server.
const REMOVE_LIMIT_MS: u64 = 900_000;

/// List, show and remove services
#[derive(Args, Debug)]
pub(crate) struct Services {
    #[command(subcommand)]
    action: ServicesAction,
}

/// What to do with services.
#[derive(Debug, Subcommand)]
enum ServicesAction {
    /// List services
    List,
    /// Show one service with its versions
    Show {
        /// Service
        service: String,
    },
    /// Drain, stop and forget a service; asked about first (or needs --yes)
    Remove {
        /// Service
        service: String,
        /// Return as soon as it is under way
        #[arg(long, short)]
        detach: bool,
    },
}

impl Services {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        match self.action {
            ServicesAction::List => {
                let services = session.ask("reading the services", session.client.services()).await?;
                session.out.data(&services, || list(&services, &session.out))
            }
            ServicesAction::Show { service } => show(session, &service).await,
            ServicesAction::Remove { service, detach } => remove(session, &service, detach).await,
        }
    }
}

async fn show(session: &Session, name: &str) -> Result {
    let service = session.ask("reading the service", session.client.service(name)).await?;
    let versions = session.ask("reading its versions", session.client.deployments(name)).await?;
    session.out.data(&json!({ "service": service, "versions": versions }), || {
        format!("{}\n{}", one(&service, &session.out), table_of_versions(&versions, &session.out))
    })
}

async fn remove(session: &Session, name: &str, detach: bool) -> Result {
    prompt::confirm(&format!("Remove {name} with all its copies?"), session.yes)?;
    let wait_ms = (!detach).then_some(REMOVE_WAIT_MS);
    let removal =
        session.ask_patiently("draining and removing", session.patient.remove_service(name, wait_ms)).await?;
    let gone = match removal {
        Removal::Done => true,
        Removal::UnderWay if detach => false,
        Removal::UnderWay => {
            let limit = Duration::from_millis(REMOVE_LIMIT_MS);
            tokio::select! {
                gone = tokio::time::timeout(limit, until_gone(session, name)) => match gone {
                    Ok(result) => result.map(|()| true)?,
                    Err(_) => false,
                },
                () = crate::cli::watch::interrupted() => false,
            }
        }
    };
    session.out.data(&json!({ "service": name, "removed": gone }), || {
        if gone { format!("{} removed", clean(name)) } else { format!("{} is being removed", clean(name)) }
    })?;
    if !gone {
        session.out.note(&format!("  the server goes on with it; see: peregrine services show {name}"));
    }
    Ok(())
}

/// Asks again until the server has forgotten it, at the pace of the server's own waiting.
async fn until_gone(session: &Session, name: &str) -> Result {
    loop {
        let call = session.patient.remove_service(name, Some(REMOVE_WAIT_MS));
        match call.await {
            Ok(Removal::Done) => return Ok(()),
            Ok(Removal::UnderWay) => {}
            Err(ClientError::Problem(problem)) if problem.status == 404 => return Ok(()),
            Err(error) => return Err(session.failure(&error)),
        }
    }
}

fn list(services: &[Service], out: &Output) -> String {
    let mut table = Table::new(&["service", "state", "version", "copies", "hosts", "runs"]).numeric(&[2, 3]);
    for service in services {
        table.row(vec![
            service.name.clone(),
            render::word(service.state),
            service.version.map_or_else(|| "-".to_owned(), |version| version.to_string()),
            service.spec.replicas.to_string(),
            hosts(service),
            runs(&service.spec.workload),
        ]);
    }
    table.render(out)
}

fn one(service: &Service, out: &Output) -> String {
    let mut text = format!("{}\n", clean(&service.name));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {:<9} {value}\n", out.dim(name)));
    line("state", render::word(service.state));
    line("hosts", hosts(service));
    line("runs", runs(&service.spec.workload));
    if let Workload::Image { capabilities, .. } = &service.spec.workload
        && !capabilities.is_empty()
    {
        line("caps", clean(&capabilities.iter().map(String::as_str).collect::<Vec<_>>().join(", ")));
    }
    line("copies", service.spec.replicas.to_string());
    if let Some(version) = service.version {
        let before =
            service.previous_version.map(|before| format!(", before it {before}")).unwrap_or_default();
        line("version", format!("{version}{before}"));
    }
    if let Some(id) = &service.move_id {
        line("move", id.clone());
    }
    if service.from_config {
        line("from", "the configuration file of the server: change it there".to_owned());
    }
    line("since", human::moment(service.created_at));
    text
}

fn table_of_versions(versions: &[Deployment], out: &Output) -> String {
    if versions.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["version", "role", "runs", "digest", "made", "by"]).numeric(&[0]);
    for version in versions {
        let mark = if version.current {
            "serves"
        } else if version.previous {
            "before"
        } else {
            "-"
        };
        table.row(vec![
            version.version.to_string(),
            mark.to_owned(),
            runs(&version.workload),
            version.digest.as_deref().map_or_else(|| "-".to_owned(), short_digest),
            human::ago(version.created_at),
            version.move_id.clone(),
        ]);
    }
    table.render(out)
}

fn hosts(service: &Service) -> String {
    let hosts: Vec<_> = service
        .spec
        .routes
        .iter()
        .map(
            |route| {
                if route.path == "/" { route.host.clone() } else { format!("{}{}", route.host, route.path) }
            },
        )
        .collect();
    if hosts.is_empty() { "-".to_owned() } else { hosts.join(", ") }
}

/// What runs, in a few words; never a value of its environment.
fn runs(workload: &Workload) -> String {
    match workload {
        Workload::Image { image, .. } => image.clone(),
        Workload::Command { command, .. } => command.join(" "),
        Workload::Fixed { upstreams } => {
            upstreams.iter().map(|fixed| fixed.address.as_str()).collect::<Vec<_>>().join(", ")
        }
    }
}

fn short_digest(digest: &str) -> String {
    digest.chars().take(19).collect()
}
