//! `peregrine demo`: the whole of Peregrine on one machine, with real traffic and real moves.
//!
//! It starts what `serve` starts, two hosts, and a shop (the recording origin), sends steady traffic through
//! the edge, moves the shop to and fro, and prints the receipts beside what the clients counted. Everything
//! that it makes bears its own names and goes at the end, also after Ctrl-C and after a failure.

mod hosts;
mod screen;
mod story;
mod traffic;

use std::path::{Path, PathBuf};
use std::time::Instant;

use peregrine_api::types::Receipt;
use peregrine_config::ServerConfig;
use peregrine_engine::model::{
    HealthKind, HealthSpec, MoveSettings, Resources, Route, ServiceSpec, TrafficPolicy,
};
use peregrine_engine::{Ask, EngineHandle, ErrorKind, MoveOverrides};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::args::DemoArgs;
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::output::Output;
use crate::serve::{Rooms, Server, block_on};
use hosts::Hosts;
use screen::Screen;

/// Name of the demo's service.
const SHOP: &str = "shop";
/// The hidden command that runs the shop: the binary is the program of the demo's containers and processes, too.
pub(crate) const SHOP_COMMAND: &str = "demo-shop";

/// Runs the command.
pub(crate) fn run(args: &DemoArgs, out: Output) -> Result {
    crate::telemetry::quiet_log();
    block_on(with_folder(args, out))
}

/// The shop itself: what the demo's containers and processes run.
pub(crate) fn shop() -> std::process::ExitCode {
    story::run_shop()
}

async fn with_folder(args: &DemoArgs, out: Output) -> Result {
    let temporary = match &args.data {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("peregrine-demo-")
                .tempdir()
                .map_err(|e| failed("a folder for the demo", &e))?,
        ),
    };
    let data = args
        .data
        .clone()
        .unwrap_or_else(|| temporary.as_ref().map_or_else(PathBuf::new, |dir| dir.path().to_owned()));
    std::fs::create_dir_all(&data).map_err(|error| Failure::file(&data, "make", &error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| failed("signals", &error))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| failed("signals", &error))?;
    let screen = Screen::new(out.json);
    let mut running = Running::default();
    let (result, interrupted) = tokio::select! {
        result = running.play(args, &data, &screen) => (result, false),
        _ = interrupt.recv() => { screen.say("interrupted: taking everything down"); (Ok(()), true) }
        _ = terminate.recv() => { screen.say("asked to end: taking everything down"); (Ok(()), true) }
    };
    let report = running.report(interrupted);
    let cleaned = running.take_down(&data, &screen).await;
    drop(temporary);
    result.and(cleaned)?;
    // The story was told as it went; the document has what it amounted to.
    out.data(&report, String::new)
}

/// What is up, so that it can be taken down at any moment.
#[derive(Default)]
struct Running {
    hosts: Option<Hosts>,
    server: Option<Server>,
    traffic: Option<traffic::Traffic>,
    /// Of each move that has ended, in order.
    receipts: Vec<Receipt>,
}

impl Running {
    /// What it amounted to so far, for `--json`.
    fn report(&self, interrupted: bool) -> serde_json::Value {
        let clients = self.traffic.as_ref();
        json!({
            "receipts": self.receipts,
            "clients": {
                "requests": clients.map_or(0, traffic::Traffic::sent),
                "failed": clients.map_or(0, traffic::Traffic::failed),
            },
            "interrupted": interrupted,
        })
    }

    async fn play(&mut self, args: &DemoArgs, data: &Path, screen: &Screen) -> Result {
        let begin = Instant::now();
        screen.say("starting two hosts, the edge, the engine and the API");
        // Put away before it is complete: what was made is known even if a later part fails.
        let hosts = self.hosts.insert(Hosts::find(args.runtime)?);
        hosts.bring_up(data, screen).await?;
        let config = config();
        let server = self.server.insert(Server::start(config, data, Rooms::WithEdge).await?);
        for machine in hosts.machines() {
            server.engine().add_machine(machine).await.map_err(|error| refused(&error))?;
        }
        deploy(server, hosts).await?;
        let edge =
            server.edge_addrs().first().copied().ok_or_else(|| failed_text("the edge has no address"))?;
        traffic::first_answer(edge).await.map_err(|error| failed("the first request", &error))?;
        screen.say(&format!("hosts    {}", hosts.words()));
        screen.say(&format!(
            "shop     http://{edge}/     first request served after {:.1} s",
            begin.elapsed().as_secs_f64()
        ));
        screen.say(&format!("api      http://{}     data {}", server.api_addr(), data.display()));
        screen.say(&format!(
            "traffic  {} requests per second, HTTP/1.1 and HTTP/2, a tenth of them POST",
            args.rate
        ));
        let traffic = self
            .traffic
            .insert(traffic::Traffic::start(edge, args.rate).map_err(|error| failed_text(&error))?);
        for number in 0..args.moves {
            let to = if number % 2 == 0 { hosts::HOST_B } else { hosts::HOST_A };
            let moved = story::show_move(server.engine(), traffic, screen, (number + 1, args.moves), to);
            self.receipts.push(moved.await?);
        }
        let failed = traffic.failed();
        screen.say(&format!("clients  {} requests, {} failed", traffic.sent(), failed));
        if args.stay {
            let next = if args.moves.is_multiple_of(2) { hosts::HOST_B } else { hosts::HOST_A };
            story::next_commands(screen, server.api_addr(), data, edge, next);
            std::future::pending::<()>().await;
        }
        if failed > 0 {
            Err(failed_text(&format!("{failed} requests failed: {}", traffic.first_failures())))
        } else {
            Ok(())
        }
    }

    async fn take_down(self, data: &Path, screen: &Screen) -> Result {
        if let Some(traffic) = self.traffic {
            traffic.stop().await;
        }
        let mut result = Ok(());
        let install = self.server.as_ref().map(|server| server.engine().install());
        if let Some(server) = self.server {
            // Services go first, while there is an engine to take them down: the shop, if it came up at all, and
            // whatever else was deployed during `--stay`.
            let services: Vec<String> = server.engine().state().services.keys().cloned().collect();
            for service in services {
                result = result.and(remove(server.engine(), &service).await);
            }
            result = result.and(server.stop().await);
        }
        if let Some(hosts) = self.hosts {
            result = result.and(hosts.take_down(data, install.as_deref()).await);
        }
        if result.is_ok() {
            screen.say("everything is gone");
        }
        result
    }
}

/// Removes a service. A move of it that is under way is turned back first, or, past its return, ends.
async fn remove(engine: &EngineHandle, service: &str) -> Result {
    let running = engine.state().services.get(service).and_then(|known| known.rollout.clone());
    if let Some(id) = running {
        match engine.abort(&id).await {
            Err(error) if error.kind != ErrorKind::Conflict => return Err(refused(&error)),
            _ => {}
        }
        engine.ended(&id).await.map_err(|error| refused(&error))?;
    }
    match engine.remove_service(service).await {
        Err(error) if error.kind != ErrorKind::NotFound => Err(refused(&error)),
        _ => Ok(()),
    }
}

async fn deploy(server: &Server, hosts: &Hosts) -> Result {
    let spec = ServiceSpec {
        name: SHOP.to_owned(),
        routes: vec![Route { host: "*".to_owned(), path: "/".to_owned() }],
        workload: hosts.workload()?,
        health: HealthSpec {
            kind: HealthKind::Http { path: "/healthz".to_owned() },
            ..HealthSpec::default()
        },
        resources: Resources::default(),
        replicas: 1,
        traffic: TrafficPolicy::default(),
        move_settings: MoveSettings::default(),
        labels: std::collections::BTreeMap::new(),
    };
    let ask = Ask::Deploy {
        spec: Box::new(spec),
        machine: Some(hosts::HOST_A.to_owned()),
        overrides: MoveOverrides::default(),
    };
    let started =
        server.engine().start(ask, "demo".to_owned(), None, None).await.map_err(|error| refused(&error))?;
    if let Some(rollout) = started {
        let ended = server.engine().ended(&rollout.id).await.map_err(|error| refused(&error))?;
        if ended.state != peregrine_engine::model::RolloutState::Succeeded {
            return Err(story::went_wrong(&ended));
        }
    }
    Ok(())
}

fn config() -> ServerConfig {
    let mut config = ServerConfig::default();
    // Free ports: a demo must not meet what already runs here.
    config.edge.http = vec![([127, 0, 0, 1], 0).into()];
    config.api.listen = ([127, 0, 0, 1], 0).into();
    config
}

fn refused(error: &peregrine_engine::EngineError) -> Failure {
    Failure::new(Exit::Failed, error.code, error.message.clone()).hint(error.hint.clone())
}

fn failed(what: &str, error: &std::io::Error) -> Failure {
    failed_text(&format!("{what}: {error}"))
}

fn failed_text(message: &str) -> Failure {
    Failure::new(Exit::Failed, "demo.failed", message)
}
