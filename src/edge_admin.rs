//! What an edge in a process of its own says of itself: life, readiness, metrics. Nothing can be changed here.
//!
//! An edge is ready when it listens and has a table: that its engine is away is told, and makes no difference to whether it
//! should be sent requests.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;
use peregrine_api::probes::Probes;
use peregrine_link::LinkStatus;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};

/// What the answers are made of.
#[derive(Clone)]
pub(crate) struct Told {
    /// Its name in the installation.
    pub(crate) name: String,
    /// How the link stands.
    pub(crate) link: watch::Receiver<LinkStatus>,
    /// Whether it listens for clients.
    pub(crate) serving: watch::Receiver<bool>,
    /// Metrics of this process.
    pub(crate) metrics: PrometheusHandle,
}

/// `/readyz` as JSON.
#[derive(Serialize)]
struct Readiness {
    ready: bool,
    edge: String,
    /// It listens for clients.
    serving: bool,
    has_table: bool,
    /// Version of the engine's table that every core uses; none while it is the one of the disk.
    table_version: Option<u64>,
    /// The table is on the disk: a restart without an engine begins with it.
    saved: bool,
    /// Highest epoch of an engine that it has heard.
    epoch: u64,
    engine: Engine,
    /// Why the newest table could not be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Serialize)]
struct Engine {
    connected: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    /// For so long it is connected, or away.
    since_ms: u64,
    /// Since its last word; none if there was none in this process.
    heard_ms_ago: Option<u64>,
}

/// Listens, for probes to be answered later.
pub(crate) fn bind(listen: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(listen).map_err(|error| failure(listen, &error))
}

/// Answers on a socket until the probes are dropped.
pub(crate) fn start(asked: SocketAddr, listener: &TcpListener, told: Told) -> Result<Probes> {
    describe();
    let (reporting, measuring) = (told.clone(), told);
    let report = Arc::new(move || reporting.readiness());
    let metrics: peregrine_api::MetricsText = Arc::new(move || measuring.rendered());
    let probes = listener.try_clone().and_then(|listener| Probes::on(listener, report, Some(metrics)));
    probes.map_err(|error| failure(asked, &error))
}

fn failure(listen: SocketAddr, error: &std::io::Error) -> Failure {
    Failure::new(Exit::Failed, "edge.admin", format!("cannot listen on {listen} for probes: {error}"))
        .hint("give it another address with [edge] admin or --admin, or none")
}

fn describe() {
    use metrics::describe_gauge;
    crate::telemetry::describe();
    describe_gauge!("peregrine_link_connected", "1 while the edge is connected to an engine");
    describe_gauge!(
        "peregrine_link_silence_seconds",
        "Seconds since the last word of an engine; -1 before the first"
    );
    describe_gauge!("peregrine_link_epoch", "Highest epoch of an engine that the edge has heard");
    describe_gauge!(
        "peregrine_link_table_version",
        "The engine's version of the table in use; 0 while it is the one of the disk"
    );
    describe_gauge!("peregrine_link_table_saved", "1 if the table in use is on the disk");
    describe_gauge!("peregrine_edge_ready", "1 while the edge listens and has a table");
}

impl Told {
    fn readiness(&self) -> (bool, serde_json::Value) {
        let (link, serving) = (self.link.borrow().clone(), *self.serving.borrow());
        let ready = serving && link.has_table;
        let engine = Engine {
            connected: link.engine.is_some(),
            address: link.engine,
            since_ms: link.since.elapsed().as_millis() as u64,
            heard_ms_ago: link.heard.map(|heard| heard.elapsed().as_millis() as u64),
        };
        let readiness = Readiness {
            ready,
            edge: self.name.clone(),
            serving,
            has_table: link.has_table,
            table_version: link.table_version,
            saved: link.saved,
            epoch: link.epoch,
            engine,
            problem: link.problem,
        };
        (ready, json!(readiness))
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges")]
    fn rendered(&self) -> String {
        let (link, serving) = (self.link.borrow().clone(), *self.serving.borrow());
        let yes = |is: bool| f64::from(u8::from(is));
        gauge!("peregrine_link_connected").set(yes(link.engine.is_some()));
        let silence = link.heard.map_or(-1.0, |heard| heard.elapsed().as_secs_f64());
        gauge!("peregrine_link_silence_seconds").set(silence);
        gauge!("peregrine_link_epoch").set(link.epoch as f64);
        gauge!("peregrine_link_table_version").set(link.table_version.unwrap_or(0) as f64);
        gauge!("peregrine_link_table_saved").set(yes(link.saved));
        gauge!("peregrine_edge_ready").set(yes(serving && link.has_table));
        crate::telemetry::tell_tasks();
        self.metrics.render()
    }
}
