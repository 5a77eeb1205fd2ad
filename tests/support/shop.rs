//! A service to move: the recording origin on two hosts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use peregrine_bench::collector::{Collected, Collector};
use peregrine_bench::origin::Record;
use serde_json::Value;

use super::docker::{Engines, ORIGIN_IMAGE, ORIGIN_PORT};
use super::server::Peregrine;
use super::{origin_program, wait_for};

/// Two machines of the process runtime, on two loopback addresses.
pub(crate) const TWO_HOSTS: &str = r#"
[machine.host-a]
process = true
address = "127.0.0.1"

[machine.host-b]
process = true
address = "127.0.0.2"
"#;

/// A server with two hosts, and the shop on host-a.
pub(crate) struct Shop {
    pub(crate) server: Peregrine,
    collector: Collector,
    runtime: tokio::runtime::Runtime,
}

impl Shop {
    /// Starts everything. `settings` goes into the manifest behind the usual keys of the service.
    pub(crate) fn open(settings: &str) -> Self {
        let shop = Self::closed(Peregrine::start(TWO_HOSTS));
        shop.deploy(&[], settings);
        shop
    }

    /// A server on which the shop is not deployed yet.
    pub(crate) fn closed(server: Peregrine) -> Self {
        let mut threads = tokio::runtime::Builder::new_multi_thread();
        let runtime = threads.worker_threads(1).enable_all().build().expect("a runtime");
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        let collector = runtime.block_on(Collector::bind(any)).expect("a free port");
        Self { server, collector, runtime }
    }

    /// Port at which origins deliver their records.
    pub(crate) const fn collector_port(&self) -> u16 {
        self.collector.addr().port()
    }

    /// Deploys the shop with this environment and these settings, and waits for the end.
    #[track_caller]
    pub(crate) fn deploy(&self, env: &[(&str, &str)], settings: &str) -> Value {
        let manifest = self.manifest(env, settings);
        self.server.ok(&["deploy", "-f", &manifest, "--machine", "host-a"])
    }

    /// Deploys the shop as a container on host-a, and waits for the end.
    #[track_caller]
    pub(crate) fn deploy_image(&self, engines: &Engines, keys: &str, env: &[(&str, &str)], settings: &str) {
        let env: String = env.iter().map(|(name, value)| format!("{name} = \"{value}\"\n")).collect();
        // Both hosts reach the collector at the address of host-a's side of this machine: it listens on all of them.
        let manifest = format!(
            r#"
[service.shop]
hosts = ["*"]
image = "{ORIGIN_IMAGE}"
port = {ORIGIN_PORT}
health = {{ path = "/healthz", interval = "200ms" }}
{keys}
{settings}

[service.shop.env]
ORIGIN_RECORD = "tcp://{}:{}"
{env}
"#,
            engines.this_machine(0),
            self.collector_port()
        );
        let manifest = self.server.file("shop.toml", &manifest);
        self.server.ok(&["deploy", "-f", &manifest, "--machine", "host-a"]);
    }

    /// Writes the manifest and returns its path.
    pub(crate) fn manifest(&self, env: &[(&str, &str)], settings: &str) -> String {
        let env: String = env.iter().map(|(name, value)| format!("{name} = \"{value}\"\n")).collect();
        let manifest = format!(
            r#"
[service.shop]
hosts = ["*"]
command = ["{}", "origin", "--listen", "{{host}}:{{port}}"]
health = {{ path = "/healthz", interval = "200ms" }}
{settings}

[service.shop.env]
ORIGIN_RECORD = "tcp://127.0.0.1:{}"
{env}
"#,
            origin_program().display(),
            self.collector_port(),
        );
        self.server.file("shop.toml", &manifest)
    }

    /// Moves the shop and waits for the end.
    #[track_caller]
    pub(crate) fn move_to(&self, machine: &str) -> Value {
        self.server.ok(&["move", "shop", "--to", machine])
    }

    /// Every execution at any copy of the shop, with the copy's instance id.
    pub(crate) fn collected(&self) -> Vec<Collected> {
        self.collector.collected().expect("whole records")
    }

    /// Waits until every copy that has delivered records is gone, and its last record is here.
    pub(crate) async fn all_delivered(&self) {
        self.collector.all_gone().await;
    }

    /// Every execution at any copy of the shop.
    pub(crate) fn records(&self) -> Vec<Record> {
        self.collected().into_iter().map(|collected| collected.record).collect()
    }

    /// What the copies themselves say of when they were asked does not overlap; how many were asked.
    #[track_caller]
    pub(crate) fn assert_one_copy_at_a_time(&self) -> usize {
        let mut spans: BTreeMap<Arc<str>, (u64, u64)> = BTreeMap::new();
        for one in self.collected() {
            let at = one.record.unix_ns;
            let span = spans.entry(one.instance).or_insert((at, at));
            *span = (span.0.min(at), span.1.max(at));
        }
        let mut spans: Vec<_> = spans.into_values().collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|pair| pair[0].1 < pair[1].0), "{spans:?}");
        spans.len()
    }

    /// A runtime for what a story does besides.
    pub(crate) const fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }

    /// The shop's instances, as the server sees them.
    #[track_caller]
    pub(crate) fn instances(&self) -> Vec<Value> {
        let listed = self.server.ok(&["instances", "shop"]);
        listed.get("items").unwrap_or(&listed).as_array().expect("a list").clone()
    }

    /// Machines on which the shop has an instance now, in order.
    #[track_caller]
    pub(crate) fn places(&self) -> Vec<String> {
        let mut places: Vec<String> = self
            .instances()
            .iter()
            .map(|item| item["machine"].as_str().expect("machine").to_owned())
            .collect();
        places.sort();
        places
    }

    /// Starts a move and returns its id at once.
    #[track_caller]
    pub(crate) fn begin_move(&self, to: &str) -> String {
        id_of(&self.server.ok(&["move", "shop", "--to", to, "--detach"]))
    }

    /// The move as it is now.
    #[track_caller]
    pub(crate) fn the_move(&self, id: &str) -> Value {
        self.server.ok(&["moves", "show", id])
    }

    /// Waits until the move has ended.
    #[track_caller]
    pub(crate) fn ended(&self, id: &str) -> Value {
        wait_for("the move to end", || {
            let now = self.the_move(id);
            let state = now["state"].as_str().expect("state");
            (!matches!(state, "running" | "paused" | "rolling_back")).then_some(now)
        })
    }

    /// Waits until the new copy has this share of the traffic.
    #[track_caller]
    pub(crate) fn at_weight(&self, id: &str, percent: u64) {
        wait_for(&format!("{percent} % on the new copy"), || {
            let now = self.the_move(id);
            assert!(
                !matches!(now["state"].as_str(), Some("succeeded" | "failed")),
                "it ended too soon: {now:#}"
            );
            (now["weight_percent"] == percent && now["phase"] == "shift").then_some(())
        });
    }

    /// The instance of this move on one side: `from` or `to`.
    #[track_caller]
    pub(crate) fn instance_of(&self, id: &str, side: &str) -> String {
        let now = self.the_move(id);
        now[side][0]["instance"].as_str().unwrap_or_else(|| panic!("{side} in {now:#}")).to_owned()
    }

    /// Makes an instance behave: `{"error_percent": 100}` and the like, over its own port.
    #[track_caller]
    pub(crate) fn fault(&self, instance: &str, fault: &str) {
        Self::fault_at(self.address_of(instance), fault);
    }

    pub(crate) fn address_of(&self, instance: &str) -> SocketAddr {
        self.instances()
            .iter()
            .find(|item| item["id"] == instance)
            .and_then(|item| item["address"].as_str()?.parse().ok())
            .unwrap_or_else(|| panic!("{instance} has an address"))
    }

    /// As [`Shop::fault`], when there may be no server to ask where the copy is.
    pub(crate) fn fault_at(address: SocketAddr, fault: &str) {
        let length = fault.len();
        let request = format!(
            "POST /__origin/fault HTTP/1.1\r\nhost: origin\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\nconnection: close\r\n\r\n{fault}"
        );
        let answer = super::server::http(address, &request).expect("the origin answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// Kills an instance's process as a crash would.
    #[track_caller]
    pub(crate) fn kill_instance(&self, instance: &str) {
        let pids = self.server.pids_of(instance);
        assert_eq!(pids.len(), 1, "one process of {instance}: {pids:?}");
        super::server::signal(pids[0], "KILL");
    }
}

/// The id in what `--detach` printed.
#[track_caller]
pub(crate) fn id_of(printed: &Value) -> String {
    let moved = printed.get("move").unwrap_or(printed);
    moved["id"].as_str().unwrap_or_else(|| panic!("an id in {printed:#}")).to_owned()
}
