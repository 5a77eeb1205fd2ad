//! What DNS says of a name, asked anew each time: nobody who has just created a record wants to wait for a cache of ours.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{RData, RecordType};

/// One question waits so long for its answer.
const QUESTION_TIMEOUT_MS: u64 = 3_000;
const QUESTION_ATTEMPTS: usize = 2;

/// A resolver without a memory.
pub(crate) struct Names {
    resolver: TokioResolver,
}

/// Where names of this installation lead.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pointing {
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) aliases: BTreeSet<String>,
}

/// What is found under a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) aliases: Vec<String>,
}

impl Names {
    /// Asks `servers`, or those of the system if there are none.
    pub(crate) fn new(servers: &[SocketAddr]) -> Result<Self, String> {
        let mut builder = if servers.is_empty() {
            TokioResolver::builder_tokio()
                .map_err(|e| format!("the system's resolver cannot be read: {e}"))?
        } else {
            let servers = servers.iter().map(|server| {
                let (mut udp, mut tcp) = (ConnectionConfig::udp(), ConnectionConfig::tcp());
                udp.port = server.port();
                tcp.port = server.port();
                NameServerConfig::new(server.ip(), true, vec![udp, tcp])
            });
            let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options: &mut ResolverOpts = builder.options_mut();
        options.cache_size = 0;
        options.timeout = Duration::from_millis(QUESTION_TIMEOUT_MS);
        options.attempts = QUESTION_ATTEMPTS;
        options.preserve_intermediates = true;
        options.use_hosts_file = hickory_resolver::config::ResolveHosts::Never;
        let resolver = builder.build().map_err(|e| format!("no resolver: {e}"))?;
        Ok(Self { resolver })
    }

    /// All records of a kind; none is an answer, no answer is an error.
    pub(crate) async fn records(&self, name: &str, kind: RecordType) -> Result<Vec<RData>, String> {
        match self.resolver.lookup(format!("{name}."), kind).await {
            Ok(found) => Ok(found.answers().iter().map(|record| record.data.clone()).collect()),
            Err(NetError::Dns(e)) if is_nothing(&e) => Ok(Vec::new()),
            Err(e) => Err(format!("{kind} {name}: the resolver has no answer ({e})")),
        }
    }

    /// Addresses and aliases of a name.
    pub(crate) async fn find(&self, name: &str) -> Result<Found, String> {
        let (four, six) =
            tokio::join!(self.records(name, RecordType::A), self.records(name, RecordType::AAAA));
        let mut found = Found::default();
        for data in four?.into_iter().chain(six?) {
            match data {
                RData::A(a) => drop(found.addresses.insert(IpAddr::V4(a.0))),
                RData::AAAA(a) => drop(found.addresses.insert(IpAddr::V6(a.0))),
                RData::CNAME(alias) => {
                    let alias = alias.0.to_ascii();
                    let alias = alias.trim_end_matches('.').to_ascii_lowercase();
                    if !found.aliases.contains(&alias) {
                        found.aliases.push(alias);
                    }
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Whether a TXT record has this value.
    pub(crate) async fn has_text(&self, name: &str, value: &str) -> Result<bool, String> {
        let records = self.records(name, RecordType::TXT).await?;
        Ok(records.iter().any(|data| match data {
            RData::TXT(text) => text.txt_data.concat() == value.as_bytes(),
            _ => false,
        }))
    }

    /// Nothing if `name` leads here; otherwise what was found, and which record to create.
    pub(crate) async fn check(&self, name: &str, pointing: &Pointing) -> Result<(), String> {
        if pointing.addresses.is_empty() && pointing.aliases.is_empty() {
            return Ok(());
        }
        judge(name, &self.find(name).await?, pointing)
    }
}

fn is_nothing(error: &hickory_resolver::net::DnsError) -> bool {
    matches!(error, hickory_resolver::net::DnsError::NoRecordsFound(found)
        if matches!(found.response_code, hickory_resolver::proto::op::ResponseCode::NoError
            | hickory_resolver::proto::op::ResponseCode::NXDomain))
}

/// Whether what was found leads here: through an alias of ours, or with every address ours. An address of somebody else
/// beside ours is not fine: an authority picks one of them, and IPv6 first.
pub(crate) fn judge(name: &str, found: &Found, pointing: &Pointing) -> Result<(), String> {
    if found.aliases.iter().any(|alias| pointing.aliases.contains(alias)) {
        return Ok(());
    }
    let foreign: Vec<&IpAddr> = found.addresses.difference(&pointing.addresses).collect();
    if foreign.is_empty() && !found.addresses.is_empty() {
        return Ok(());
    }
    let ours_there = found.addresses.iter().any(|address| pointing.addresses.contains(address));
    if ours_there {
        let kind = kind_of(foreign[0]);
        return Err(format!("{kind} {name} → also {}: remove that record", listed(&foreign)));
    }
    let mut ways = Vec::new();
    let (six, four): (Vec<&IpAddr>, Vec<&IpAddr>) = pointing.addresses.iter().partition(|a| a.is_ipv6());
    for addresses in [four, six] {
        if let Some(first) = addresses.first() {
            ways.push(format!("{} {name} → expected {}", kind_of(first), alternatives(&addresses)));
        }
    }
    for alias in &pointing.aliases {
        ways.push(format!("CNAME {name} → expected {alias}"));
    }
    let mut seen = Vec::new();
    seen.extend(found.aliases.iter().map(|alias| format!("CNAME {alias}")));
    seen.extend(foreign.iter().map(ToString::to_string));
    let seen = if seen.is_empty() { "nothing".to_owned() } else { seen.join(", ") };
    Err(format!("{}, found {seen}", ways.join(", or ")))
}

const fn kind_of(address: &IpAddr) -> &'static str {
    if address.is_ipv6() { "AAAA" } else { "A" }
}

fn listed(addresses: &[&IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn alternatives(addresses: &[&IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(addresses: &[&str], aliases: &[&str]) -> Found {
        Found {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            aliases: aliases.iter().map(|&a| a.to_owned()).collect(),
        }
    }

    fn pointing(addresses: &[&str], aliases: &[&str]) -> Pointing {
        let found = found(addresses, aliases);
        Pointing { addresses: found.addresses, aliases: found.aliases.into_iter().collect() }
    }

    #[test]
    fn a_name_that_does_not_lead_here_is_told_with_the_record_to_create() {
        let here = pointing(&["203.0.113.7"], &[]);
        let name = "shop.example.com";
        assert_eq!(judge(name, &found(&["203.0.113.7"], &[]), &here), Ok(()));
        for (found, expected) in [
            (found(&[], &[]), "A shop.example.com → expected 203.0.113.7, found nothing"),
            (found(&["192.0.2.1"], &[]), "A shop.example.com → expected 203.0.113.7, found 192.0.2.1"),
            (
                found(&["192.0.2.1"], &["old.example.net"]),
                "A shop.example.com → expected 203.0.113.7, found CNAME old.example.net, 192.0.2.1",
            ),
            (
                found(&["203.0.113.7", "2001:db8::1"], &[]),
                "AAAA shop.example.com → also 2001:db8::1: remove that record",
            ),
        ] {
            assert_eq!(judge(name, &found, &here).unwrap_err(), expected);
        }
    }

    #[test]
    fn an_alias_of_ours_is_enough_and_is_offered() {
        let here = pointing(&["203.0.113.7", "2001:db8::7"], &["edge.example.net"]);
        let name = "shop.example.com";
        assert_eq!(judge(name, &found(&["192.0.2.1"], &["x.test", "edge.example.net"]), &here), Ok(()));
        assert_eq!(
            judge(name, &found(&[], &[]), &here).unwrap_err(),
            "A shop.example.com → expected 203.0.113.7, or AAAA shop.example.com → expected 2001:db8::7, \
             or CNAME shop.example.com → expected edge.example.net, found nothing"
        );
    }
}
