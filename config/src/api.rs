//! `[api]`: where the API listens.

use std::net::{Ipv4Addr, SocketAddr};

use crate::names;
use crate::raw::{Node, quoted};

/// Where the API listens unless told otherwise.
const DEFAULT_PORT: u16 = 7070;

/// What the API has to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiSettings {
    /// Address. Loopback, because it speaks clear text and who has its token can run anything.
    pub listen: SocketAddr,
    /// The operator has said in so many words that clear text is fine on an address that others can reach.
    pub allow_clear_text_on_public_address: bool,
    /// Names under which it may be asked besides `localhost` and IP addresses.
    pub allowed_hosts: Vec<String>,
    /// `/metrics` needs no token.
    pub metrics_without_token: bool,
}

impl Default for ApiSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)),
            allow_clear_text_on_public_address: false,
            allowed_hosts: Vec::new(),
            metrics_without_token: false,
        }
    }
}

pub(crate) fn api(node: &Node<'_>) -> ApiSettings {
    let mut settings = ApiSettings::default();
    let Some(mut fields) = node.fields() else { return settings };
    let allow = "allow_clear_text_on_public_address";
    fields.set(allow, &mut settings.allow_clear_text_on_public_address, Node::boolean);
    fields.set("allowed_hosts", &mut settings.allowed_hosts, |node| Some(allowed_hosts(node)));
    fields.set("metrics_without_token", &mut settings.metrics_without_token, Node::boolean);
    let listen = fields.take("listen");
    if let Some(address) = listen.as_ref().and_then(|node| names::listen_address(node, "127.0.0.1:7070")) {
        settings.listen = address;
    }
    if let Some(node) = listen.filter(|_| !settings.is_safe()) {
        node.wrong(
            "config.unsafe",
            format_args!("the API would speak clear text on {}, which others can reach", settings.listen),
            format_args!(
                "listen on 127.0.0.1 and reach it through SSH (ssh -L 7070:127.0.0.1:7070 …), or say {allow} = true \
                 if that network is yours alone"
            ),
        );
    }
    settings
}

fn allowed_hosts(node: &Node<'_>) -> Vec<String> {
    const EXAMPLE: &str = "api.example.com";
    let mut hosts = Vec::new();
    for (text, item) in node.texts(EXAMPLE).unwrap_or_default() {
        let host = match names::host_pattern(text) {
            Ok(host) if host.contains('*') => Err("a wildcard would let the pages of others in"),
            Ok(host) if host == "localhost" || names::is_ip_address(&host) => {
                Err("localhost and IP addresses are names of the API anyhow")
            }
            other => other,
        };
        match host {
            Err(why) => item.bad(
                format_args!("{} cannot be in {}: {why}", quoted(text), node.path),
                format_args!("write the whole name, without scheme and port: {EXAMPLE:?}"),
            ),
            Ok(host) if hosts.contains(&host) => {
                item.wrong(
                    "config.duplicate",
                    format_args!("{host} is in {} twice", node.path),
                    "take one out",
                );
            }
            Ok(host) => hosts.push(host),
        }
    }
    hosts
}

impl ApiSettings {
    const fn is_safe(&self) -> bool {
        self.listen.ip().is_loopback() || self.allow_clear_text_on_public_address
    }
}
