//! `peregrine status`.

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use peregrine_api::types::{ServiceStatus, Status as StatusDocument};
use serde::Serialize;

use crate::cli::failure::Result;
use crate::cli::human;
use crate::cli::names::Names;
use crate::cli::output::Output;
use crate::cli::parse;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};
use crate::cli::watch;

/// Show on one page how everything stands
#[derive(Args, Debug)]
pub(crate) struct Status {
    /// Show it again and again, until Ctrl-C; with --json one document a line
    #[arg(long, short)]
    watch: bool,

    /// How often
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse::interval, requires = "watch")]
    every: Duration,
}

impl Status {
    /// Shows it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        if !self.watch {
            let read = Read::ask(session).await?;
            return session.out.data(&read, || page(&read, &session.out));
        }
        tokio::select! {
            result = again_and_again(session, self.every) => result,
            () = watch::interrupted() => Ok(()),
        }
    }
}

/// What was read.
#[derive(Serialize)]
struct Read {
    #[serde(flatten)]
    status: StatusDocument,
    /// Names that are served over TLS; `null` if the server cannot say.
    domains: Option<Names>,
}

impl Read {
    async fn ask(session: &Session) -> Result<Self> {
        let status = session.ask("reading the status", session.client.status()).await?;
        let domains = Names::ask(session, Timestamp::now()).await;
        Ok(Self { status, domains })
    }
}

async fn again_and_again(session: &Session, every: Duration) -> Result {
    let out = &session.out;
    let redraw = out.pretty() && out.live;
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        let read = Read::ask(session).await?;
        if redraw {
            // Home and clear: the terminal shows one page that changes.
            out.raw(b"\x1b[H\x1b[2J")?;
        }
        let time = read.status.time;
        out.item("data", &read, || format!("{}\n{}", human::moment(time), page(&read, out)))?;
    }
}

fn page(read: &Read, out: &Output) -> String {
    let Read { status, domains } = read;
    let mut text = String::new();
    for alarm in &status.alarms {
        let what = out.paint(clap::builder::styling::AnsiColor::Red, "alarm");
        text.push_str(&format!("{what}: {}\n  {}\n\n", clean(&alarm.message), clean(&alarm.hint)));
    }
    if status.services.is_empty() {
        text.push_str("no services yet: peregrine deploy -f peregrine.toml\n");
    } else {
        text.push_str(&services(&status.services, out));
        text.push('\n');
    }
    if !status.machines.is_empty() {
        let mut table = Table::new(&["machine", "runtime", "address", "copies"]).numeric(&[3]);
        for machine in &status.machines {
            let copies = machine.instances.to_string();
            table.row(vec![
                machine.name.clone(),
                render::word(machine.runtime),
                machine.address.clone(),
                copies,
            ]);
        }
        text.push_str(&format!("\n{}\n", table.render(out)));
    }
    if let Some(domains) = domains {
        text.push_str(&domains.section(out));
    }
    for of in &status.moves {
        let totals = of.totals.as_ref().map_or_else(String::new, |totals| {
            format!(", failed {} of {}", human::count(totals.failed), human::count(totals.requests))
        });
        text.push_str(&format!(
            "\n{} {}: {}, {} % on the new copies{totals}; watch it: peregrine moves watch {}\n",
            render::what(of),
            render::state(of.state),
            of.phase.name(),
            of.weight_percent,
            of.id,
        ));
    }
    text
}

fn services(services: &[ServiceStatus], out: &Output) -> String {
    let mut table = Table::new(&[
        "service", "state", "version", "copies", "where", "inside", "requests", "errors", "hosts",
    ])
    .numeric(&[2, 3, 5, 6, 7]);
    for service in services {
        let healthy: u32 = service.places.iter().map(|place| place.healthy).sum();
        let sum = |count: fn(&peregrine_api::types::PlaceStatus) -> u64| {
            if service.places.is_empty() {
                "-".to_owned()
            } else {
                human::count(service.places.iter().map(count).sum())
            }
        };
        table.row(vec![
            service.name.clone(),
            render::word(service.state),
            service.version.map_or_else(|| "-".to_owned(), |version| version.to_string()),
            if service.upstreams.is_empty() {
                format!("{healthy}/{}", service.replicas)
            } else {
                "-".to_owned()
            },
            place(service),
            sum(|place| place.in_flight),
            sum(|place| place.requests),
            sum(|place| place.errors),
            service.routes.iter().map(|route| route.host.clone()).collect::<Vec<_>>().join(", "),
        ]);
    }
    table.render(out)
}

/// `host-a`, or with the shares while there is more than one: `host-a 50 %, host-b 50 %`.
fn place(service: &ServiceStatus) -> String {
    match service.places.as_slice() {
        [] if service.upstreams.is_empty() => "-".to_owned(),
        [] => service.upstreams.join(", "),
        [one] => one.machine.clone(),
        several => several
            .iter()
            .map(|place| format!("{} {}", clean(&place.machine), human::percent(place.weight_percent)))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::names::tests as names;
    use crate::cli::output::Surroundings;

    #[test]
    fn the_page_shows_services_machines_and_running_moves() {
        let place = |machine: &str| {
            json!({"machine": machine, "instances": 1, "healthy": 1, "weight_percent": 50.0,
            "in_flight": 3, "requests": 1000, "errors": 0, "versions": [1]})
        };
        let status: StatusDocument = serde_json::from_value(json!({
            "time": "2026-01-31T12:00:00Z", "version": "0.1.0", "install": "i", "last_event": 9,
            "services": [{"name": "shop", "state": "moving", "version": 1, "replicas": 1,
                "routes": [{"host": "shop.example", "path": "/"}], "places": [place("host-a"), place("host-b")],
                "upstreams": [], "move": "mov_1"}],
            "machines": [{"name": "host-a", "runtime": "process", "address": "127.0.0.1", "instances": 1}],
            "moves": [render::tests::a_move("running")]
        }))
        .expect("a status");
        let domains = [names::domain("shop.example", "failed", None), names::domain("a.test", "valid", None)];
        let read = Read { status, domains: Some(Names::of(&domains, names::now())) };
        let text = page(&read, &Output::new(&[], Surroundings::default()));
        assert!(
            text.contains("shop\tmoving\t1\t2/1\thost-a 50 %, host-b 50 %\t6\t2,000\t0\tshop.example"),
            "{text}"
        );
        assert!(text.contains("host-a\tprocess\t127.0.0.1\t1"), "{text}");
        assert!(text.contains("watch it: peregrine moves watch mov_1"), "{text}");
        assert!(text.contains("\ndomains: 1 failed, 1 valid\n"), "{text}");
        assert!(text.contains("shop.example\tfailed\t-\tfailed: why"), "{text}");
        let told = serde_json::to_value(&read).expect("a document");
        assert_eq!((&told["install"], &told["domains"]["by_state"]["failed"]), (&json!("i"), &json!(1)));
        assert_eq!(told["domains"]["concerns"][0]["domain"], "shop.example");
    }
}
