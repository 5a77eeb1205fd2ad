//! The operator's language: from files to checked configuration.
//!
//! ```text
//!   Source (text) ─► raw: what was said, each value with its place ─► what it means, checked ─► Config of each room
//!                                                  └──────────► Mistakes: all of them, each with line, column and hint
//! ```
//!
//! There are two documents. The **server file** of `peregrine serve --config FILE` says where the edge and the API
//! listen, which machines there are, and may carry services: one file is a complete reverse proxy. The **manifest**
//! of `peregrine deploy` has services only. `peregrine.toml` beside this crate mentions every key with its default.
//!
//! Reading starts nothing, opens nothing but the file itself, and never stops at the first mistake. Values of
//! environments are never shown: not in a mistake, not in `Debug`.

mod acme;
mod api;
mod domain;
mod edge;
mod link;
mod machine;
mod mistake;
mod names;
mod raw;
mod service;
mod source;
mod suggest;
mod units;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use peregrine_engine::model::{MachineKind, MachineSpec, Workload};

pub use acme::{AcmeAuthority, AcmeChallenge, AcmeDns, AcmeExternalAccount, AcmeSettings, TsigAlgorithm};
pub use api::ApiSettings;
pub use domain::{ClientAuthSettings, DomainEntry, DomainFiles, HstsSettings};
pub use link::LinkSettings;
pub use mistake::{MAX_MISTAKES, Mistake, Mistakes};
pub use service::ServiceEntry;
pub use source::{MAX_FILE_BYTES, Source};

use raw::{Asked, Fields, quoted};

/// The file that `peregrine serve` is given.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// The edge.
    pub edge: peregrine_proxy::Config,
    /// Where an edge in a process of its own answers probes; `None` if it does not. Not for `serve`, which has the API.
    pub edge_admin: Option<SocketAddr>,
    /// The user to become once the ports are bound; `None` stays who it is.
    pub user: Option<String>,
    /// The API.
    pub api: ApiSettings,
    /// Where edges in other processes connect; `None` if there are none.
    pub link: Option<LinkSettings>,
    /// Names that are served over TLS with certificates from files, sorted by name.
    pub domains: Vec<DomainEntry>,
    /// Where certificates are ordered; `None` if they are not.
    pub acme: Option<AcmeSettings>,
    /// Machines, in the order of the file.
    pub machines: Vec<MachineSpec>,
    /// Services, in the order of the file. Each that is run has its machine.
    pub services: Vec<ServiceEntry>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            edge: edge::default_edge(),
            edge_admin: None,
            user: None,
            api: ApiSettings::default(),
            link: None,
            domains: Vec::new(),
            acme: None,
            machines: Vec::new(),
            services: Vec::new(),
        }
    }
}

/// The file that `peregrine deploy` is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Services, in the order of the file; at least one.
    pub services: Vec<ServiceEntry>,
}

impl ServerConfig {
    /// Reads and checks a server file.
    ///
    /// # Errors
    ///
    /// Every mistake in it.
    pub fn load(path: &Path) -> Result<Self, Mistakes> {
        Self::parse(&Source::read(path)?)
    }

    /// Checks the text of a server file.
    ///
    /// # Errors
    ///
    /// Every mistake in it.
    pub fn parse(source: &Source) -> Result<Self, Mistakes> {
        read_server(source).0
    }
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    ///
    /// Every mistake in it.
    pub fn load(path: &Path) -> Result<Self, Mistakes> {
        Self::parse(&Source::read(path)?)
    }

    /// Checks the text of a manifest.
    ///
    /// # Errors
    ///
    /// Every mistake in it.
    pub fn parse(source: &Source) -> Result<Self, Mistakes> {
        read_manifest(source).0
    }
}

fn read_server(source: &Source) -> (Result<ServerConfig, Mistakes>, Asked) {
    raw::read(source, |fields| {
        let (edge, edge_admin) =
            fields.take("edge").map_or_else(|| (edge::default_edge(), None), |node| edge::edge(&node));
        let mut user = None;
        fields.set("user", &mut user, |node| user_name(node).map(Some));
        let api = fields.take("api").map(|node| api::api(&node)).unwrap_or_default();
        let link = fields.take("link").map(|node| link::link(&node));
        let domains = fields.take("domain").map(|node| domain::domains(&node)).unwrap_or_default();
        let acme = fields.take("acme").map(|node| acme::acme(&node));
        let machines = fields.take("machine").map(|node| machine::machines(&node)).unwrap_or_default();
        let mut services = fields.take("service").map(|node| service::services(&node)).unwrap_or_default();
        services.iter_mut().for_each(|service| place(service, &machines));
        let services = services.into_iter().map(|read| read.entry).collect();
        Some(ServerConfig { edge, edge_admin, user, api, link, domains, acme, machines, services })
    })
}

/// A name as the system's own tools make it.
fn user_name(node: &raw::Node<'_>) -> Option<String> {
    let text = node.text("peregrine")?;
    let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.';
    let sound = !text.is_empty() && text.len() <= 32 && !text.starts_with('-') && text.bytes().all(fine);
    if !sound {
        let message = format_args!("{} is no name of a user", quoted(text));
        node.bad(message, "write 1 to 32 of A-Z, a-z, 0-9, - _ and ., and begin without a hyphen");
    }
    sound.then(|| text.to_owned())
}

fn read_manifest(source: &Source) -> (Result<Manifest, Mistakes>, Asked) {
    raw::read(source, |fields: &mut Fields<'_>| {
        let Some(node) = fields.take("service") else {
            fields
                .missing("there is no service in this file", "add [service.web] with image = … and port = …");
            return None;
        };
        let services = service::services(&node);
        Some(Manifest { services: services.into_iter().map(|read| read.entry).collect() })
    })
}

/// Finds the machine of a service that is run: the one that it names, or the only one that can.
fn place(service: &mut service::Read<'_>, machines: &[MachineSpec]) {
    let (noun, key, runs_here): (_, _, fn(&MachineKind) -> bool) = match service.entry.spec.workload {
        Workload::Image { .. } => ("an image", "docker", |kind| matches!(kind, MachineKind::Docker { .. })),
        Workload::Command { .. } => ("a command", "process", |kind| matches!(kind, MachineKind::Process)),
        Workload::Fixed { .. } => return,
    };
    let by_name: BTreeMap<_, _> = machines.iter().map(|machine| (machine.name.as_str(), machine)).collect();
    if let (Some(name), Some(node)) = (&service.entry.machine, &service.machine) {
        match by_name.get(name.as_str()) {
            None => {
                let names: Vec<_> = by_name.keys().copied().collect();
                let hint = suggest::word(name, &names).map_or_else(
                    || format!("add [machine.{name}] to this file, or name one that is in it"),
                    |near| format!("did you mean {near:?}?"),
                );
                node.bad(format_args!("there is no machine {}", quoted(name)), hint);
            }
            Some(machine) if !runs_here(&machine.kind) => node.wrong(
                "config.conflict",
                format_args!("machine {name} cannot run {noun}"),
                format_args!("name a machine that has {key} = …"),
            ),
            Some(_) => {}
        }
        return;
    }
    let able: Vec<_> = machines.iter().filter(|machine| runs_here(&machine.kind)).collect();
    match able[..] {
        [only] => service.entry.machine = Some(only.name.clone()),
        [] if service.machine.is_none() => service.node.wrong_key(
            "config.missing",
            format_args!("no machine in this file can run {noun}, which [{}] needs", service.node.path),
            match key {
                "docker" => "add [machine.here] with docker = \"unix:///var/run/docker.sock\"",
                _ => "add [machine.here] with process = true",
            },
        ),
        _ if service.machine.is_none() => service.node.wrong_key(
            "config.missing",
            format_args!("[{}] could run on several machines", service.node.path),
            format_args!("add machine = {:?}, or another of them", able[0].name),
        ),
        _ => {} // it names one, in a way that is wrong and told already
    }
}

#[cfg(test)]
mod tests;
