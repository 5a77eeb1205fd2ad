//! `[domain."NAME"]`: names that are served over TLS, with certificates from files.
//!
//! What lies in the files is found out when they are read, at the start and at a reload.

use std::path::PathBuf;

use crate::names;
use crate::raw::{Fields, Node, quoted};

/// A year, as browsers' preload lists want it.
const DEFAULT_HSTS_MS: u64 = 365 * DAY_MS;
const DAY_MS: u64 = 86_400_000;
const MAX_HSTS_MS: u64 = 3_650 * DAY_MS;

/// A name that is served over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEntry {
    /// Exact name, `*.` and a name, or `*` for names that are nobody's.
    pub name: String,
    /// What is presented.
    pub files: DomainFiles,
    /// Clear text is redirected to `https`.
    pub redirect: bool,
    /// `Strict-Transport-Security`.
    pub hsts: Option<HstsSettings>,
    /// TLS 1.3 and nothing older.
    pub tls13_only: bool,
    /// Clients' certificates.
    pub client_auth: Option<ClientAuthSettings>,
}

/// What a domain presents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainFiles {
    /// A certificate with its chain (PEM), and the private key (PEM).
    Certificate {
        /// Chain, its own certificate first.
        chain: PathBuf,
        /// Private key.
        key: PathBuf,
    },
    /// Nothing: the service itself speaks TLS, and its bytes are passed on.
    PassThrough,
}

/// `Strict-Transport-Security` (RFC 6797).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HstsSettings {
    /// `max-age`.
    pub max_age_ms: u64,
    /// `includeSubDomains`.
    pub include_subdomains: bool,
    /// `preload`.
    pub preload: bool,
}

/// Clients' certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientAuthSettings {
    /// Authorities that they have to be signed by (PEM).
    pub authorities: PathBuf,
    /// A handshake without one fails.
    pub required: bool,
}

/// What is said of a domain, before it is put together.
struct Said<'d> {
    certificate: Option<Node<'d>>,
    key: Option<Node<'d>>,
    pass_through: Option<Node<'d>>,
    hsts: Option<Node<'d>>,
    min_version: Option<Node<'d>>,
    client_ca: Option<Node<'d>>,
    client_auth: Option<Node<'d>>,
}

pub(crate) fn domains(node: &Node<'_>) -> Vec<DomainEntry> {
    let Some(fields) = node.fields() else { return Vec::new() };
    let mut read: Vec<DomainEntry> = Vec::new();
    for (name, node) in fields.take_all() {
        let Some(entry) = domain(name, &node) else { continue };
        if read.iter().any(|known| known.name == entry.name) {
            let message = format_args!("{} is there twice", entry.name);
            node.wrong_key(
                "config.duplicate",
                message,
                "take one out: case and a dot at the end do not count",
            );
            continue;
        }
        read.push(entry);
    }
    read
}

fn domain(name: &str, node: &Node<'_>) -> Option<DomainEntry> {
    let name = match names::host_pattern(name) {
        Ok(name) if names::is_ip_address(&name) => {
            let message = format_args!("{} is an address, not a name", quoted(&name));
            let hint =
                "clients do not say addresses in a handshake: write [domain.\"*\"] for all who say no name";
            node.wrong_key("config.bad_name", message, hint);
            None
        }
        Ok(name) => Some(name),
        Err(why) => {
            let message = format_args!("{} cannot be a domain: {why}", quoted(name));
            node.wrong_key(
                "config.bad_name",
                message,
                "write \"shop.example.com\", \"*.example.com\" or \"*\"",
            );
            None
        }
    };
    let mut fields = node.fields()?;
    let redirect = fields.take("redirect").map(|node| node.boolean());
    let said = Said {
        certificate: fields.take("certificate"),
        key: fields.take("key"),
        pass_through: fields.take("pass_through"),
        hsts: fields.take("hsts"),
        min_version: fields.take("min_version"),
        client_ca: fields.take("client_ca"),
        client_auth: fields.take("client_auth"),
    };
    let files = files(&said, &fields);
    let hsts = said.hsts.as_ref().map(hsts);
    let tls13_only = said.min_version.as_ref().map(|node| node.word(&[("1.2", false), ("1.3", true)]));
    let client_auth = client_auth(&said);
    let files = files?;
    let name = name?;
    // A service that speaks TLS itself may have its reasons for what it says on clear text, and hosts that are nobody's
    // domain are on clear text only.
    let redirects = files != DomainFiles::PassThrough && name != "*";
    Some(DomainEntry {
        name,
        files,
        redirect: redirect.unwrap_or(Some(redirects))?,
        hsts: hsts.unwrap_or(Some(None))?,
        tls13_only: tls13_only.unwrap_or(Some(false))?,
        client_auth: client_auth?,
    })
}

/// What it presents. Every key that does not go with it is told.
fn files(said: &Said<'_>, fields: &Fields<'_>) -> Option<DomainFiles> {
    let passes = match &said.pass_through {
        Some(node) => node.boolean()?,
        None => false,
    };
    if passes {
        let others =
            [&said.certificate, &said.key, &said.hsts, &said.min_version, &said.client_ca, &said.client_auth];
        let mut fits = true;
        for node in others.into_iter().flatten() {
            let message = format_args!("{} goes with a domain whose TLS the edge speaks", node.path);
            node.wrong_key(
                "config.conflict",
                message,
                "take it out, or pass_through: with it the service speaks TLS",
            );
            fits = false;
        }
        return fits.then_some(DomainFiles::PassThrough);
    }
    match (&said.certificate, &said.key) {
        (Some(chain), Some(key)) => {
            let chain = chain.file_path("tls/shop.example.com.pem");
            let key = key.file_path("tls/shop.example.com.key");
            Some(DomainFiles::Certificate { chain: chain?, key: key? })
        }
        (Some(there), None) | (None, Some(there)) => {
            let other = if said.key.is_none() { "key" } else { "certificate" };
            let message = format_args!("{} has no {other}", fields.title());
            there.wrong_key(
                "config.missing",
                message,
                format_args!("add {other} = \"tls/shop.example.com.pem\""),
            );
            None
        }
        (None, None) => {
            let message = format_args!("{} does not say what it presents", fields.title());
            let hint = "add certificate = \"chain.pem\" and key = \"key.pem\", or pass_through = true";
            fields.missing(message, hint);
            None
        }
    }
}

/// `"365d"`, `true`, `false`, or a table.
fn hsts(node: &Node<'_>) -> Option<Option<HstsSettings>> {
    let mut settings =
        HstsSettings { max_age_ms: DEFAULT_HSTS_MS, include_subdomains: false, preload: false };
    match node.as_boolean() {
        Some(true) => return Some(Some(settings)),
        Some(false) => return Some(None),
        None => {}
    }
    if node.as_text().is_some() {
        settings.max_age_ms = node.duration_ms(0..=MAX_HSTS_MS)?;
        return Some(Some(settings));
    }
    let mut fields = node.fields()?;
    fields.set_duration("max_age", &mut settings.max_age_ms, 0..=MAX_HSTS_MS);
    fields.set("include_subdomains", &mut settings.include_subdomains, Node::boolean);
    fields.set("preload", &mut settings.preload, Node::boolean);
    Some(Some(settings))
}

fn client_auth(said: &Said<'_>) -> Option<Option<ClientAuthSettings>> {
    let required = match &said.client_auth {
        Some(node) => node.word(&[("required", true), ("optional", false)])?,
        None => true,
    };
    match (&said.client_ca, &said.client_auth) {
        (Some(node), _) => {
            let authorities = node.file_path("tls/clients.pem")?;
            Some(Some(ClientAuthSettings { authorities, required }))
        }
        (None, Some(node)) => {
            let message = "nothing says who signs the clients' certificates";
            node.wrong_key("config.missing", message, "add client_ca = \"tls/clients.pem\"");
            None
        }
        (None, None) => Some(None),
    }
}
