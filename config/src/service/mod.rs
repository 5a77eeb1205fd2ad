//! `[service.NAME]`: what runs or where it is, how it is reached, and how it may be moved.

mod rollout;
mod rules;
mod traffic;
mod workload;

use std::collections::BTreeMap;

use peregrine_engine::model::{Route, ServiceSpec, Workload};

pub(crate) use self::workload::unlimited;
use crate::names;
use crate::raw::{Node, quoted};

/// Copies of one service: shares of the traffic stay exact up to here.
const MAX_REPLICAS: i64 = 1_000;

/// A service of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceEntry {
    /// What is wanted.
    pub spec: ServiceSpec,
    /// Machine for its first deploy; `None`: the engine's choice, and none for fixed upstreams.
    pub machine: Option<String>,
}

/// A service that was read, with the places that later checks need.
pub(crate) struct Read<'d> {
    pub(crate) entry: ServiceEntry,
    pub(crate) node: Node<'d>,
    pub(crate) machine: Option<Node<'d>>,
}

/// Reads every service, and finds hosts that two of them claim.
pub(crate) fn services<'d>(node: &Node<'d>) -> Vec<Read<'d>> {
    let Some(fields) = node.fields() else { return Vec::new() };
    let mut claimed = Claims::default();
    fields.take_all().into_iter().filter_map(|(name, node)| service(name, node, &mut claimed)).collect()
}

/// Who has claimed a host and path.
type Claims = BTreeMap<(String, String), String>;

fn service<'d>(name: &str, node: Node<'d>, claimed: &mut Claims) -> Option<Read<'d>> {
    let named = names::name("service", name, &node);
    let mut fields = node.fields()?;
    let routes = fields.take("hosts").map(|hosts| routes(name, &hosts, claimed)).unwrap_or_default();
    let machine = fields.take("machine");
    let machine_name = machine.as_ref().and_then(|node| node.text("host-a")).map(str::to_owned);
    let replicas_node = fields.take("replicas");
    let labels = fields.take("labels").map(|node| labels(&node)).unwrap_or_default();
    let workload = workload::workload(&mut fields);
    let traffic = traffic::traffic(&mut fields);
    let (health, no_probes) = traffic::health(&mut fields);
    let resources_node = fields.take("resources");
    let move_node = fields.take("move");
    let mut replicas = 1;
    if let Some(count) = replicas_node.as_ref().and_then(replica_count) {
        replicas = count;
    }
    let resources = resources_node.as_ref().map(workload::resources).unwrap_or_default();
    let move_settings = move_node.as_ref().map(rollout::move_settings).unwrap_or_default();
    if matches!(workload, Some(Workload::Fixed { .. })) {
        let managed = [&machine, &replicas_node, &resources_node, &move_node];
        for node in managed.into_iter().filter_map(Option::as_ref) {
            let message = format_args!(
                "{} has no meaning here: Peregrine does not run the servers in upstreams",
                node.path
            );
            node.wrong_key("config.conflict", message, "take it out");
        }
    } else if let Some(node) = no_probes {
        traffic::refuse_no_probes(&node);
    }
    if let Some(node) = replicas_node.as_ref().filter(|_| move_settings.single_writer && replicas > 1) {
        let message =
            format_args!("{} is {replicas}, and of a single_writer at most one copy may run", node.path);
        node.wrong(
            "config.conflict",
            message,
            "write replicas = 1, or take single_writer out of its move settings",
        );
    }
    let workload = workload?;
    drop(fields);
    let spec = ServiceSpec {
        name: name.to_owned(),
        routes,
        workload,
        health,
        resources,
        replicas,
        traffic,
        move_settings,
        labels,
    };
    named.then_some(Read { entry: ServiceEntry { spec, machine: machine_name }, node, machine })
}

/// `hosts`: each a host pattern, perhaps with a path prefix behind it.
fn routes(service: &str, node: &Node<'_>, claimed: &mut Claims) -> Vec<Route> {
    const HINT: &str = "write \"shop.example.com\", \"*.example.com\" or \"*\", with a path behind it if need be: \
                        \"shop.example.com/api\"";
    let mut routes = Vec::new();
    for (text, node) in node.texts("shop.example.com").unwrap_or_default() {
        let slash = text.find('/').filter(|_| !text.contains("://")).unwrap_or(text.len());
        let (host, path) = text.split_at(slash);
        let host = names::host_pattern(host);
        let path = names::path_prefix(if path.is_empty() { "/" } else { path });
        let (host, path) = match (host, path) {
            (Ok(host), Ok(path)) => (host, path),
            (Err(why), _) | (_, Err(why)) => {
                node.bad(format_args!("{} is no host: {why}", quoted(text)), HINT);
                continue;
            }
        };
        let claim = claimed.entry((host.clone(), path.clone()));
        if let std::collections::btree_map::Entry::Occupied(first) = &claim {
            let owner = first.get();
            let whose = if owner == service { "this service".to_owned() } else { format!("service {owner}") };
            node.wrong(
                "config.duplicate",
                format_args!("{} is a way into {whose} already", quoted(text)),
                "a host and path lead to one service: take one out, or add a path to one of them",
            );
            continue;
        }
        claim.or_insert_with(|| service.to_owned());
        routes.push(Route { host, path });
    }
    routes
}

fn replica_count(node: &Node<'_>) -> Option<u32> {
    if node.is_zero() {
        node.bad(
            "a service without a copy answers nobody",
            "write replicas = 1 or more, or take the service out",
        );
        return None;
    }
    node.integer(1..=MAX_REPLICAS).and_then(|count| u32::try_from(count).ok())
}

/// Free labels: strings by name.
pub(crate) fn labels(node: &Node<'_>) -> BTreeMap<String, String> {
    const MAX_LABEL_CHARS: usize = 63;
    let Some(fields) = node.fields() else { return BTreeMap::new() };
    let mut labels = BTreeMap::new();
    for (name, node) in fields.take_all() {
        let Some(value) = node.text("eu") else { continue };
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        let sound = !name.is_empty() && name.chars().all(fine) && name.len() <= MAX_LABEL_CHARS;
        if sound && value.chars().count() <= MAX_LABEL_CHARS && !value.chars().any(char::is_control) {
            labels.insert(name.to_owned(), value.to_owned());
        } else {
            node.bad(
                format_args!("{} is no label", node.path),
                "a label's name has letters, digits, - _ . /, its value any text; both at most 63 characters",
            );
        }
    }
    labels
}
