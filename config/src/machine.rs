//! `[machine.NAME]`: where instances run, and how their engine is reached.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use peregrine_engine::model::{DockerEndpoint, MachineKind, MachineSpec, TlsFiles};

use crate::names;
use crate::raw::{Fields, Node, quoted};
use crate::service::labels;

/// Socket of a Docker engine, unless the address says another.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Port of SSH, unless the address says another.
const SSH_PORT: u16 = 22;
const DOCKER_FORMS: &str =
    "write \"unix:///var/run/docker.sock\", \"tcp://10.0.0.2:2376\" or \"ssh://user@10.0.0.3\"";

/// What a `docker` address says.
enum Address {
    Unix(PathBuf),
    Tcp(String, u16),
    Ssh { user: String, host: String, port: u16, socket: PathBuf },
}

/// Keys that go with one kind of machine only.
struct Keys<'d> {
    docker: Option<Node<'d>>,
    process: Option<Node<'d>>,
    tls: Option<Node<'d>>,
    allow_clear_text: Option<Node<'d>>,
    ssh_key: Option<Node<'d>>,
    host_key: Option<Node<'d>>,
}

pub(crate) fn machines(node: &Node<'_>) -> Vec<MachineSpec> {
    let Some(fields) = node.fields() else { return Vec::new() };
    fields.take_all().into_iter().filter_map(|(name, node)| machine(name, &node)).collect()
}

fn machine(name: &str, node: &Node<'_>) -> Option<MachineSpec> {
    let named = names::name("machine", name, node);
    let mut fields = node.fields()?;
    let keys = Keys {
        docker: fields.take("docker"),
        process: fields.take("process"),
        tls: fields.take("tls"),
        allow_clear_text: fields.take("allow_clear_text"),
        ssh_key: fields.take("ssh_key"),
        host_key: fields.take("host_key"),
    };
    let address_node = fields.take("address");
    let address = address_node.as_ref().map(names::ip_address);
    let labels = fields.take("labels").map(|node| labels(&node)).unwrap_or_default();
    let (kind, reached_at) = kind(&keys, &fields)?;
    let address = match address {
        Some(address) => address?,
        None => reached_at.or_else(|| {
            let message = format_args!("{} has no address", fields.title());
            fields
                .missing(message, "add address = \"10.0.0.2\": the IP address at which the edge reaches it");
            None
        })?,
    };
    named.then(|| MachineSpec { name: name.to_owned(), kind, address, labels })
}

/// What runs there, and the address that follows from how it is reached.
fn kind(keys: &Keys<'_>, fields: &Fields<'_>) -> Option<(MachineKind, Option<IpAddr>)> {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let process = keys.process.as_ref().map(|node| (node, node.boolean()));
    match (&keys.docker, process) {
        (Some(_), Some((node, _))) => {
            let message = format_args!("{} is given both docker and process", fields.title());
            node.wrong_key("config.conflict", message, "a machine has one of them: take one out");
            None
        }
        (None, Some((_, Some(true)))) => {
            refuse(
                &[&keys.tls, &keys.allow_clear_text, &keys.ssh_key, &keys.host_key],
                "a process machine is this one",
            );
            Some((MachineKind::Process, Some(loopback)))
        }
        (Some(docker), None) => {
            let address = docker_address(docker)?;
            let reached_at = match &address {
                Address::Unix(_) => Some(loopback),
                Address::Tcp(host, _) | Address::Ssh { host, .. } => host.parse().ok(),
            };
            Some((MachineKind::Docker { endpoint: endpoint(address, docker, keys)? }, reached_at))
        }
        (None, None | Some((_, Some(false)))) => {
            let message = format_args!("{} does not say what runs instances there", fields.title());
            let hint = "add docker = \"unix:///var/run/docker.sock\" (or tcp://, ssh://), or process = true";
            fields.missing(message, hint);
            None
        }
        (None, Some((_, None))) => None,
    }
}

fn endpoint(address: Address, docker: &Node<'_>, keys: &Keys<'_>) -> Option<DockerEndpoint> {
    match address {
        Address::Unix(path) => {
            refuse(
                &[&keys.tls, &keys.allow_clear_text, &keys.ssh_key, &keys.host_key],
                "a unix socket needs no key and no certificate",
            );
            Some(DockerEndpoint::Unix { path })
        }
        Address::Tcp(host, port) => {
            refuse(&[&keys.ssh_key, &keys.host_key], "it goes with an ssh:// address");
            let tls = keys.tls.as_ref().map(tls_files);
            let insecure = keys.allow_clear_text.as_ref().and_then(Node::boolean).unwrap_or(false);
            let local = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
            if tls.is_none() && !insecure && !local {
                docker.wrong(
                    "config.unsafe",
                    format_args!("{host}:{port} would be reached in clear text: who can reach it is root there"),
                    "add tls = { ca = \"ca.pem\", cert = \"cert.pem\", key = \"key.pem\" }, use ssh://, or say \
                     allow_clear_text = true if that network is yours alone",
                );
                return None;
            }
            let tls = match tls {
                Some(files) => Some(files?),
                None => None,
            };
            Some(DockerEndpoint::Tcp { host, port, tls, insecure })
        }
        Address::Ssh { user, host, port, socket } => {
            refuse(&[&keys.tls, &keys.allow_clear_text], "it goes with a tcp:// address");
            let need = |node: &Option<Node<'_>>, message: &str, hint: &str| {
                if node.is_none() {
                    docker.wrong("config.missing", message, hint);
                }
            };
            need(
                &keys.ssh_key,
                "an ssh:// address needs a private key",
                "add ssh_key = \"/home/you/.ssh/id_ed25519\"",
            );
            need(
                &keys.host_key,
                "an ssh:// address needs the host's public key, so that nobody else can pass for it",
                "add host_key = \"ssh-ed25519 AAAA…\": `ssh-keyscan -t ed25519 HOST` prints it, compare it there",
            );
            let key = keys.ssh_key.as_ref().and_then(|node| node.file_path("/home/you/.ssh/id_ed25519"));
            let host_key = keys.host_key.as_ref().and_then(host_key);
            Some(DockerEndpoint::Ssh { host, port, user, key: key?, host_key: host_key?, socket })
        }
    }
}

fn docker_address(node: &Node<'_>) -> Option<Address> {
    let text = node.text("unix:///var/run/docker.sock")?;
    let parsed = match text.split_once("://") {
        Some(("unix", path)) if path.starts_with('/') && path.len() > 1 => Some(Address::Unix(path.into())),
        Some(("tcp", rest)) => {
            names::upstream_address(rest.trim_end_matches('/')).map(|(host, port)| Address::Tcp(host, port))
        }
        Some(("ssh", rest)) => ssh_address(rest),
        _ => None,
    };
    if parsed.is_none() {
        node.bad(format_args!("{} is no address of a Docker engine", quoted(text)), DOCKER_FORMS);
    }
    parsed
}

/// `user@host[:port][/path/of/the/socket]`.
fn ssh_address(text: &str) -> Option<Address> {
    let (place, socket) = match text.find('/') {
        Some(slash) if text.len() > slash + 1 => (&text[..slash], &text[slash..]),
        Some(slash) => (&text[..slash], DOCKER_SOCKET),
        None => (text, DOCKER_SOCKET),
    };
    let (user, place) = place.split_once('@').filter(|(user, _)| !user.is_empty() && !user.contains(':'))?;
    let (host, port) =
        names::upstream_address(place).or_else(|| names::upstream_address(&format!("{place}:{SSH_PORT}")))?;
    Some(Address::Ssh { user: user.to_owned(), host, port, socket: socket.into() })
}

fn tls_files(node: &Node<'_>) -> Option<TlsFiles> {
    let mut fields = node.fields()?;
    let mut file = |key| {
        let node = fields.take(key);
        if node.is_none() {
            let message = format_args!("{} has no {key}", fields.title());
            fields.missing(
                message,
                format_args!("add {key} = \"{key}.pem\": all of ca, cert and key are needed"),
            );
        }
        node.and_then(|node| node.file_path("ca.pem"))
    };
    let (ca, cert, key) = (file("ca"), file("cert"), file("key"));
    Some(TlsFiles { ca: ca?, cert: cert?, key: key? })
}

/// A public key in OpenSSH form: its kind and its base64. A comment after them is dropped.
fn host_key(node: &Node<'_>) -> Option<String> {
    const KINDS: [&str; 5] =
        ["ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"];
    let text = node.text("ssh-ed25519 AAAA…")?;
    let mut words = text.split_ascii_whitespace();
    let (kind, key) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let base64 = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/' || b == b'=';
    if KINDS.contains(&kind) && key.starts_with("AAAA") && key.bytes().all(base64) {
        return Some(format!("{kind} {key}"));
    }
    node.bad(
        format_args!("{} is no public key of a host", quoted(text)),
        "write it as `ssh-keyscan -t ed25519 HOST` prints it, without the host: \"ssh-ed25519 AAAA…\"",
    );
    None
}

fn refuse(nodes: &[&Option<Node<'_>>], why: &str) {
    for node in nodes.iter().filter_map(|node| node.as_ref()) {
        node.wrong_key(
            "config.conflict",
            format_args!("{} has no meaning here: {why}", node.path),
            "take it out",
        );
    }
}
