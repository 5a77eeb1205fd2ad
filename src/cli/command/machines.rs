//! `peregrine machines`.

use std::net::IpAddr;

use clap::{ArgGroup, Args, Subcommand, ValueHint};
use peregrine_api::client::Submit;
use peregrine_api::types::{Machine, MachineCheck, MachineSpec, RuntimeKind, TlsFiles};
use serde_json::json;

use crate::cli::endpoint::{self, EngineUrl, Keys};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::parse;
use crate::cli::prompt;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};

/// Add, list, show, check and remove machines
#[derive(Args, Debug)]
pub(crate) struct Machines {
    #[command(subcommand)]
    action: MachinesAction,
}

/// What to do with machines.
#[derive(Debug, Subcommand)]
enum MachinesAction {
    Add(Box<Add>),
    /// List machines
    List,
    /// Show one machine
    Show {
        /// Machine
        machine: String,
    },
    /// Ask a machine itself whether it can be used; exit code 9 if not
    Check {
        /// Machine
        machine: String,
    },
    /// Forget a machine on which nothing runs; asked about first (or needs --yes)
    Remove {
        /// Machine
        machine: String,
    },
}

/// Add a machine
///
/// Paths are those of the machine on which the server runs.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("runtime").required(true).args(["docker", "process"]))]
struct Add {
    /// Name, such as host-a
    machine: String,

    /// Its Docker engine: unix:///var/run/docker.sock, tcp://HOST[:PORT], ssh://USER@HOST[:PORT][/SOCKET]
    #[arg(long, value_name = "URL")]
    docker: Option<EngineUrl>,

    /// It runs plain processes on the machine of the server
    #[arg(long)]
    process: bool,

    /// Address at which the edge reaches what runs there
    #[arg(long, value_name = "IP")]
    address: IpAddr,

    /// Private key for ssh://
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    ssh_key: Option<String>,

    /// Public key of the host for ssh://, such as `ssh-ed25519 AAAA…`; any other is refused
    #[arg(long, value_name = "KEY")]
    host_key: Option<String>,

    /// Authority of the engine's certificate for tcp:// (PEM)
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_ca: Option<String>,

    /// Our certificate for tcp:// (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_ca")]
    tls_cert: Option<String>,

    /// Our private key for tcp:// (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_ca")]
    tls_key: Option<String>,

    /// Clear text over tcp:// is fine there: whoever reaches the port owns the machine
    #[arg(long, conflicts_with = "tls_ca")]
    insecure: bool,

    /// Free label, may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse::label)]
    labels: Vec<(String, String)>,
}

impl Machines {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let out = &session.out;
        match self.action {
            MachinesAction::Add(add) => {
                let spec = add.spec()?;
                let submit = Submit::with_fresh_key();
                let machine = session
                    .ask_patiently("adding the machine", session.patient.add_machine(&spec, &submit))
                    .await?;
                out.data(&machine, || format!("{} added", clean(&machine.name)))?;
                out.note(&format!(
                    "  ask it whether it can be used: peregrine machines check {}",
                    machine.name
                ));
                Ok(())
            }
            MachinesAction::List => {
                let machines = session.ask("reading the machines", session.client.machines()).await?;
                out.data(&machines, || list(&machines, out))
            }
            MachinesAction::Show { machine } => {
                let machine = session.ask("reading the machine", session.client.machine(&machine)).await?;
                out.data(&machine, || one(&machine, out))
            }
            MachinesAction::Check { machine } => {
                let check = session
                    .ask_patiently("asking the machine", session.patient.check_machine(&machine))
                    .await?;
                if let Some(failure) = failed(&check) {
                    return Err(failure);
                }
                out.data(&check, || checked(&check, out))
            }
            MachinesAction::Remove { machine } => {
                prompt::confirm(&format!("Forget {machine}?"), session.yes)?;
                session
                    .ask_patiently("removing the machine", session.patient.remove_machine(&machine))
                    .await?;
                out.data(&json!({ "machine": machine, "removed": true }), || {
                    format!("{} removed", clean(&machine))
                })
            }
        }
    }
}

impl Add {
    fn spec(self) -> Result<MachineSpec> {
        let tls = match (self.tls_ca, self.tls_cert, self.tls_key) {
            (Some(ca), Some(cert), Some(key)) => Some(TlsFiles { ca, cert, key }),
            _ => None,
        };
        let keys = Keys { ssh_key: self.ssh_key, host_key: self.host_key, tls, insecure: self.insecure };
        let (runtime, endpoint) = match self.docker {
            Some(url) => (RuntimeKind::Docker, Some(url.endpoint(keys).map_err(Failure::usage)?)),
            None => (RuntimeKind::Process, None),
        };
        Ok(MachineSpec {
            name: self.machine,
            runtime,
            endpoint,
            address: self.address,
            labels: self.labels.into_iter().collect(),
        })
    }
}

/// The failure that a check is whose machine cannot be used.
pub(crate) fn failed(check: &MachineCheck) -> Option<Failure> {
    if check.ok {
        return None;
    }
    let failure = match &check.problem {
        Some(problem) => {
            Failure::new(Exit::Failed, problem.code.clone(), format!("{} cannot be used", check.machine))
                .why(problem.message.clone())
                .hint(problem.hint.clone())
        }
        None => Failure::new(Exit::Failed, "machine.no_answer", format!("{} cannot be used", check.machine))
            .hint("is its engine running, and is its address right? peregrine machines show"),
    };
    Some(failure.detail("check", check))
}

fn list(machines: &[Machine], out: &Output) -> String {
    let mut table = Table::new(&["machine", "runtime", "engine", "address", "copies", "added"]).numeric(&[4]);
    for machine in machines {
        table.row(vec![
            machine.name.clone(),
            render::word(machine.spec.runtime),
            machine.spec.endpoint.as_ref().map_or_else(|| "-".to_owned(), endpoint::text),
            machine.spec.address.to_string(),
            machine.instances.to_string(),
            human::ago(machine.added_at),
        ]);
    }
    table.render(out)
}

fn one(machine: &Machine, out: &Output) -> String {
    let mut text = format!("{}\n", clean(&machine.name));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {:<9} {value}\n", out.dim(name)));
    line("runtime", render::word(machine.spec.runtime));
    if let Some(endpoint) = &machine.spec.endpoint {
        line("engine", clean(&endpoint::text(endpoint)));
    }
    line("address", machine.spec.address.to_string());
    line("copies", machine.instances.to_string());
    for (key, value) in &machine.spec.labels {
        line("label", clean(&format!("{key}={value}")));
    }
    if machine.from_config {
        line("from", "the configuration file of the server: change it there".to_owned());
    }
    line("added", human::moment(machine.added_at));
    text
}

fn checked(check: &MachineCheck, out: &Output) -> String {
    let mut text = format!("{} can be used\n", clean(&check.machine));
    let mut line = |name: &str, value: String| text.push_str(&format!("  {:<9} {value}\n", out.dim(name)));
    if let Some(runtime) = &check.runtime {
        line("engine", clean(&format!("{}, {}/{}", runtime.version, runtime.os, runtime.architecture)));
    }
    line("answers", format!("in {:.1} ms", check.latency_ms));
    line("copies", check.instances.to_string());
    for orphan in &check.orphans {
        line("unknown", format!("{} (of this installation, not known to the server)", clean(orphan)));
    }
    text
}
