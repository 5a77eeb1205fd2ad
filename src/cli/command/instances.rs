//! `peregrine instances`.

use clap::Args;
use peregrine_api::types::Instance;

use crate::cli::failure::Result;
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::Table;

/// List running copies with their traffic
#[derive(Args, Debug)]
pub(crate) struct Instances {
    /// Of this service only
    service: Option<String>,

    /// Also what they use (asks their machines)
    #[arg(long)]
    stats: bool,
}

impl Instances {
    /// Lists them.
    pub(crate) async fn run(self, session: &Session) -> Result {
        if let Some(service) = &self.service {
            session.ask("reading the service", session.client.service(service)).await?;
        }
        let call = session.patient.instances(self.service.as_deref(), self.stats);
        let instances = session.ask_patiently("reading the instances", call).await?;
        session.out.data(&instances, || list(&instances, self.stats, &session.out))
    }
}

fn list(instances: &[Instance], stats: bool, out: &Output) -> String {
    let mut header = vec![
        "id", "service", "version", "machine", "state", "health", "traffic", "inside", "requests", "errors",
        "p95",
    ];
    if stats {
        header.extend(["cpu", "memory", "processes"]);
    }
    let mut table =
        Table::new(&header).numeric(&[2, 6, 7, 8, 9, 10, 11, 12, 13][..if stats { 9 } else { 6 }]);
    for instance in instances {
        let mut row = vec![
            instance.id.clone(),
            instance.service.clone(),
            instance.version.to_string(),
            instance.machine.clone(),
            render::word(instance.state),
            render::word(instance.health),
            human::percent(instance.weight_percent),
            human::count(instance.in_flight),
            human::count(instance.requests),
            human::count(instance.errors),
            human::micros_or_dash(instance.p95_us),
        ];
        if stats {
            match &instance.usage {
                Some(usage) => row.extend([
                    format!("{:.1} s", usage.cpu_seconds),
                    human::bytes(usage.memory_bytes),
                    usage.pids.to_string(),
                ]),
                None => row.extend(["-".to_owned(), "-".to_owned(), "-".to_owned()]),
            }
        }
        table.row(row);
    }
    table.render(out)
}
