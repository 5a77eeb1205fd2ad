//! `[acme]`: the authorities that certificates are ordered from, and how names are validated.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::names;
use crate::raw::{Fields, Node, quoted};

/// Let's Encrypt's directory, what its host ends with, and what it is called in CAA records.
const DEFAULT_DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";
const LETS_ENCRYPT: (&str, &str) = (".api.letsencrypt.org", "letsencrypt.org");
/// Name of the authority that `[acme]` itself describes. It is in records: it stays.
const FIRST: &str = "acme";

/// What ordering certificates needs to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcmeSettings {
    /// The operator has read the authorities' terms of service, and agrees. Without it nothing is ordered.
    pub agree_to_terms: bool,
    /// Authorities, in the order in which they are asked. There is one at least.
    pub authorities: Vec<AcmeAuthority>,
    /// Where names have to lead before anything is ordered for them. Neither these nor `aliases`: that is not checked.
    pub addresses: Vec<IpAddr>,
    /// A CNAME to one of these will do.
    pub aliases: Vec<String>,
    /// Resolvers that are asked; the system's if there are none.
    pub resolvers: Vec<SocketAddr>,
    /// How names are validated, in this order.
    pub challenges: Vec<AcmeChallenge>,
    /// Servers that take records for DNS-01.
    pub dns: Vec<AcmeDns>,
    /// A name that is among the hosts of a service gets a certificate at its first handshake, although nobody added it.
    pub owned_on_demand: bool,
    /// A name that nobody added gets a certificate at its first handshake if a GET of this URL with `?domain=NAME` is answered 200.
    pub ask: Option<String>,
}

/// An authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcmeAuthority {
    /// Its name in records and states.
    pub name: String,
    /// Its ACME directory.
    pub directory: String,
    /// Addresses of people that it may write to.
    pub contacts: Vec<String>,
    /// Authorities to trust, beside the system's, when speaking with it (PEM).
    pub trust: Option<PathBuf>,
    /// Which kind of certificate, if it offers several.
    pub profile: Option<String>,
    /// External account binding (RFC 8555 §7.3.4).
    pub external_account: Option<AcmeExternalAccount>,
    /// What it is called in CAA records (RFC 8659 §4.2); without it CAA is left to it.
    pub caa: Vec<String>,
}

/// What an authority gave out beside ACME.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcmeExternalAccount {
    /// Name of the key.
    pub key_id: String,
    /// File with the key, in base64.
    pub hmac_key: PathBuf,
}

/// A server that takes signed updates of a zone (RFC 2136, RFC 8945).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcmeDns {
    /// The zone.
    pub zone: String,
    /// Where updates are sent, over TCP.
    pub server: SocketAddr,
    /// Name of the key.
    pub key_name: String,
    /// Algorithm of the key.
    pub algorithm: TsigAlgorithm,
    /// File with the key, in base64.
    pub secret: PathBuf,
}

/// How updates are signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TsigAlgorithm {
    /// `hmac-sha256`.
    #[default]
    HmacSha256,
    /// `hmac-sha384`.
    HmacSha384,
    /// `hmac-sha512`.
    HmacSha512,
}

/// How a name is validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcmeChallenge {
    /// RFC 8555 §8.3.
    Http01,
    /// RFC 8737.
    TlsAlpn01,
    /// RFC 8555 §8.4.
    Dns01,
}

impl Default for AcmeAuthority {
    fn default() -> Self {
        Self {
            name: FIRST.to_owned(),
            directory: DEFAULT_DIRECTORY.to_owned(),
            contacts: Vec::new(),
            trust: None,
            profile: None,
            external_account: None,
            caa: vec![LETS_ENCRYPT.1.to_owned()],
        }
    }
}

impl Default for AcmeSettings {
    fn default() -> Self {
        Self {
            agree_to_terms: false,
            authorities: vec![AcmeAuthority::default()],
            addresses: Vec::new(),
            aliases: Vec::new(),
            resolvers: Vec::new(),
            challenges: vec![AcmeChallenge::Http01, AcmeChallenge::TlsAlpn01],
            dns: Vec::new(),
            owned_on_demand: false,
            ask: None,
        }
    }
}

pub(crate) fn acme(node: &Node<'_>) -> AcmeSettings {
    let mut settings = AcmeSettings::default();
    let Some(mut fields) = node.fields() else { return settings };
    let agreed = fields.take("agree_to_terms");
    if let Some(node) = &agreed {
        settings.agree_to_terms = node.boolean().unwrap_or_default();
    }
    settings.authorities = authorities(&mut fields);
    fields.set("addresses", &mut settings.addresses, |node| {
        Some(node.list("203.0.113.7")?.iter().filter_map(names::ip_address).collect())
    });
    fields.set("aliases", &mut settings.aliases, |node| Some(aliases(node)));
    fields.set("resolvers", &mut settings.resolvers, |node| {
        let read = |node| names::socket_address(node, "127.0.0.53:53");
        Some(node.list("127.0.0.53:53")?.iter().filter_map(read).collect())
    });
    fields.set("dns", &mut settings.dns, |node| {
        Some(node.list("[[acme.dns]] and its keys below")?.iter().filter_map(dns).collect())
    });
    settings.challenges = challenges(&mut fields, !settings.dns.is_empty());
    fields.set("on_demand", &mut settings.owned_on_demand, |node| {
        node.word(&[("owned", true), ("never", false)])
    });
    fields.set("ask", &mut settings.ask, |node| {
        url(node, "http://127.0.0.1:9000/allowed", &["https://", "http://"]).map(Some)
    });
    if !settings.agree_to_terms {
        let message = "nothing is ordered from an authority whose terms of service nobody has agreed to";
        fields.missing(message, "read them, and say agree_to_terms = true");
    }
    settings
}

/// The one that `[acme]` describes, and those that are asked when it cannot.
fn authorities(fields: &mut Fields<'_>) -> Vec<AcmeAuthority> {
    let mut first = AcmeAuthority::default();
    let directory = fields.take("directory");
    authority(fields, directory.as_ref(), &mut first);
    let mut all = vec![first];
    let Some(others) = fields.take("authority") else { return all };
    for node in others.list("[[acme.authority]] and its keys below").unwrap_or_default() {
        let Some(mut fields) = node.fields() else { continue };
        let contacts = all[0].contacts.clone();
        let mut next = AcmeAuthority { contacts, ..AcmeAuthority::default() };
        let name = fields.take("name");
        match &name {
            Some(node) => {
                if let Some(text) =
                    node.text("another-ca").filter(|text| names::name("authority", text, node))
                {
                    text.clone_into(&mut next.name);
                }
            }
            None => fields.missing(
                "an authority has no name",
                "add name = \"another-ca\", and let it stay: it is in records",
            ),
        }
        let directory = fields.take("directory");
        if directory.is_none() {
            fields.missing(
                "an authority has no directory",
                "add directory = \"https://acme.example.com/directory\"",
            );
        }
        authority(&mut fields, directory.as_ref(), &mut next);
        if let Some(node) = name.filter(|_| all.iter().any(|known| known.name == next.name)) {
            let message = format_args!("{} is another authority's name", quoted(&next.name));
            node.wrong(
                "config.duplicate",
                message,
                "give each a name of its own; the first one's is \"acme\"",
            );
            continue;
        }
        all.push(next);
    }
    all
}

/// What is said of every authority in the same words.
fn authority(fields: &mut Fields<'_>, directory: Option<&Node<'_>>, into: &mut AcmeAuthority) {
    if let Some(said) = directory.and_then(|node| url(node, DEFAULT_DIRECTORY, &["https://"])) {
        let host = said["https://".len()..].split(['/', ':']).next().unwrap_or_default();
        let is_lets_encrypt = host.ends_with(LETS_ENCRYPT.0);
        into.caa = is_lets_encrypt.then(|| LETS_ENCRYPT.1.to_owned()).into_iter().collect();
        into.directory = said;
    }
    fields.set("contact", &mut into.contacts, |node| Some(contacts(node)));
    fields.set("trust", &mut into.trust, |node| node.file_path("tls/authority.pem").map(Some));
    fields
        .set("profile", &mut into.profile, |node| node.text("shortlived").map(|text| Some(text.to_owned())));
    fields.set("caa", &mut into.caa, |node| {
        let texts = node.texts("letsencrypt.org")?;
        Some(texts.into_iter().map(|(text, _)| text.to_ascii_lowercase()).collect())
    });
    fields.set("external_account", &mut into.external_account, |node| external_account(node).map(Some));
}

fn external_account(node: &Node<'_>) -> Option<AcmeExternalAccount> {
    let mut fields = node.fields()?;
    let key_id = fields.take("key_id");
    let hmac_key = fields.take("hmac_key_file");
    if key_id.is_none() || hmac_key.is_none() {
        let message = "an external account has a key, and the key's name";
        fields.missing(message, "write { key_id = \"kid-1\", hmac_key_file = \"acme/hmac.key\" }");
    }
    let key_id = key_id?.text("kid-1")?.to_owned();
    Some(AcmeExternalAccount { key_id, hmac_key: hmac_key?.file_path("acme/hmac.key")? })
}

fn dns(node: &Node<'_>) -> Option<AcmeDns> {
    const ZONE: &str = "example.com";
    const KEYS: &str = "zone, server, key_name and secret_file";
    let mut fields = node.fields()?;
    let (zone, server) = (fields.take("zone"), fields.take("server"));
    let (key_name, secret) = (fields.take("key_name"), fields.take("secret_file"));
    let mut algorithm = TsigAlgorithm::default();
    fields.set("algorithm", &mut algorithm, |node| {
        node.word(&[
            ("hmac-sha256", TsigAlgorithm::HmacSha256),
            ("hmac-sha384", TsigAlgorithm::HmacSha384),
            ("hmac-sha512", TsigAlgorithm::HmacSha512),
        ])
    });
    if [&zone, &server, &key_name, &secret].iter().any(|node| node.is_none()) {
        let message = "a server that takes records is told by its zone, its address, and a key";
        fields.missing(message, format_args!("write {KEYS}"));
    }
    let (zone, key_name) = (zone?, key_name?);
    let named = |node: &Node<'_>| {
        let text = node.text(ZONE)?;
        let host = names::host_pattern(text.trim_end_matches('.'));
        let host = host.ok().filter(|host| !host.contains('*') && !names::is_ip_address(host));
        if host.is_none() {
            let message = format_args!("{} is no name in DNS", quoted(text));
            node.bad(message, format_args!("write it as in \"{ZONE}\""));
        }
        host
    };
    Some(AcmeDns {
        zone: named(&zone)?,
        server: names::socket_address(&server?, "192.0.2.53:53")?,
        key_name: named(&key_name)?,
        algorithm,
        secret: secret?.file_path("acme/tsig.key")?,
    })
}

fn challenges(fields: &mut Fields<'_>, has_dns: bool) -> Vec<AcmeChallenge> {
    let words = [
        ("http-01", AcmeChallenge::Http01),
        ("tls-alpn-01", AcmeChallenge::TlsAlpn01),
        ("dns-01", AcmeChallenge::Dns01),
    ];
    let Some(node) = fields.take("challenges") else {
        let usual = [AcmeChallenge::Http01, AcmeChallenge::TlsAlpn01];
        return usual.into_iter().chain(has_dns.then_some(AcmeChallenge::Dns01)).collect();
    };
    let items = node.list("[\"http-01\"]").unwrap_or_default();
    let said: Vec<_> = items.iter().filter_map(|node| node.word(&words)).collect();
    if said.contains(&AcmeChallenge::Dns01) && !has_dns {
        let message = "dns-01 needs a server that takes records";
        node.bad(message, "add [[acme.dns]] with zone, server, key_name and secret_file");
    }
    if said.is_empty() && items.is_empty() {
        node.bad("names have to be validated somehow", "write one of: http-01, tls-alpn-01, dns-01");
    }
    said
}

fn url(node: &Node<'_>, example: &str, schemes: &[&str]) -> Option<String> {
    let text = node.text(example)?;
    if schemes.iter().any(|scheme| text.len() > scheme.len() && text.starts_with(scheme)) {
        return Some(text.to_owned());
    }
    node.bad(
        format_args!("{} is no URL that begins with {}", quoted(text), schemes.join(" or ")),
        format_args!("write it as in \"{example}\""),
    );
    None
}

fn contacts(node: &Node<'_>) -> Vec<String> {
    const EXAMPLE: &str = "ops@example.com";
    let mut contacts = Vec::new();
    for (text, item) in node.texts(EXAMPLE).unwrap_or_default() {
        let address = text.strip_prefix("mailto:").unwrap_or(text);
        if address.split_once('@').is_some_and(|(who, host)| !who.is_empty() && host.contains('.')) {
            contacts.push(address.to_owned());
        } else {
            item.bad(
                format_args!("{} is no address of a person", quoted(text)),
                format_args!("write it as in \"{EXAMPLE}\""),
            );
        }
    }
    contacts
}

fn aliases(node: &Node<'_>) -> Vec<String> {
    const EXAMPLE: &str = "edge.example.com";
    let mut aliases = Vec::new();
    for (text, item) in node.texts(EXAMPLE).unwrap_or_default() {
        match names::host_pattern(text) {
            Ok(host) if !host.contains('*') && !names::is_ip_address(&host) => aliases.push(host),
            _ => item.bad(
                format_args!("{} is no name that a CNAME can lead to", quoted(text)),
                format_args!("write it as in \"{EXAMPLE}\""),
            ),
        }
    }
    aliases
}
