//! Who a client is behind trusted proxies, by what they say of him: `X-Forwarded-For`, or `Forwarded` (RFC 7239) where that
//! is all there is.
//!
//! Each proxy adds the address that it was connected from, so the list is read from its end: the first address that is
//! not a trusted proxy's is the client's, and what is before it is the client's own word. An entry that cannot be
//! read is nobody's address and never the proxy's: who may come in by his address does not come in by it, and where some may
//! not come in by theirs, nobody comes in without one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::HeaderMap;
use http::header::FORWARDED;

use crate::config::Config;
use crate::conn::ConnState;
use crate::headers::{Seen, X_FORWARDED_FOR};

/// The address of a client whom a trusted proxy does not name in a way that can be read. No client has it (RFC 6890 §2.2.2).
pub(crate) const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// The client as the edge believes it: the peer, or whom trusted proxies name.
pub(crate) fn client_address(headers: &HeaderMap, seen: Seen, conn: &ConnState, config: &Config) -> IpAddr {
    let peer = conn.peer_ip();
    if !conn.trusted || !seen.has(Seen::FORWARDING) {
        return peer;
    }
    let mut believed = Believed { client: None, config };
    let lines = headers.get_all(X_FORWARDED_FOR).iter().rev().map(http::HeaderValue::as_bytes);
    let entries = lines.flat_map(|line| line.rsplit(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    // Empty elements mean nothing (RFC 9110 §5.6.1).
    for entry in entries.filter(|entry| !entry.is_empty()) {
        if believed.ends_with(node(entry)) {
            break;
        }
    }
    if believed.client.is_none() {
        let lines = headers.get_all(FORWARDED).iter().rev().map(http::HeaderValue::as_bytes);
        for element in lines.flat_map(|line| split(line, b',').into_iter().rev()) {
            if !element.is_empty() && believed.ends_with(named_for(element)) {
                break;
            }
        }
    }
    believed.client.unwrap_or(peer)
}

struct Believed<'c> {
    client: Option<IpAddr>,
    config: &'c Config,
}

impl Believed<'_> {
    /// Takes what the last proxy says; whether nobody before it is believed.
    fn ends_with(&mut self, named: Option<IpAddr>) -> bool {
        let client = named.map_or(NOBODY, |address| address.to_canonical());
        self.client = Some(client);
        named.is_none() || !self.config.trusts(client)
    }
}

/// The `for` of an element (RFC 7239 §4 and §6). What is not well-formed names nobody: a quotation that does not end would
/// let a client swallow what the proxy has added.
fn named_for(element: &[u8]) -> Option<IpAddr> {
    let mut named = None;
    for pair in split(element, b';') {
        let at = pair.iter().position(|byte| *byte == b'=');
        let (name, value) = at.map(|at| (&pair[..at], &pair[at + 1..]))?;
        let value = match value {
            [b'"', inner @ .., b'"'] if !inner.iter().any(|byte| matches!(byte, b'"' | b'\\')) => inner,
            _ if value.contains(&b'"') => return None,
            token => token,
        };
        if name.eq_ignore_ascii_case(b"for") && named.replace(node(value)?).is_some() {
            return None;
        }
    }
    named
}

/// The parts of a text between separators outside of quotations, without the white space around them.
fn split(text: &[u8], separator: u8) -> Vec<&[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    let parts = text.split(|byte| {
        let is_escaped = escaped;
        escaped = quoted && !is_escaped && *byte == b'\\';
        quoted ^= *byte == b'"' && !is_escaped;
        *byte == separator && !quoted
    });
    parts.map(<[u8]>::trim_ascii).collect()
}

/// An address, alone or with a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn node(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let (address, port): (IpAddr, _) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        Some((address, "")) => return address.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        Some((address, rest)) => (address.parse::<Ipv6Addr>().ok()?.into(), rest.strip_prefix(':')?),
        None => {
            let (address, port) = text.split_once(':')?;
            (address.parse::<Ipv4Addr>().ok()?.into(), port)
        }
    };
    // A number, or a name of the proxy's own for it (RFC 7239 §6.3).
    let is_hidden = |port: &str| {
        port.strip_prefix('_').is_some_and(|name| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        })
    };
    let is_number = !port.is_empty() && port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit());
    (is_number || is_hidden(port)).then_some(address)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn of(fields: &[(&'static str, &'static str)], trusted: bool) -> String {
        let config =
            Config { trusted_proxies: vec!["10.0.0.0/8".parse().expect("network")], ..Config::default() };
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let (peer, local) = ("10.0.0.1:5", "10.0.0.9:80");
        let [peer, local] = [peer, local].map(|text| text.parse().expect("address"));
        let conn = ConnState::new(peer, local, trusted, 1);
        client_address(&headers, Seen::scan(&headers), &conn, &config).to_string()
    }

    #[test]
    fn the_client_is_the_last_address_that_is_not_ours() {
        let spoofed = [("x-forwarded-for", "6.6.6.6, 198.51.100.1, 10.0.0.2")];
        assert_eq!(of(&spoofed, true), "198.51.100.1");
        assert_eq!(of(&spoofed, false), "10.0.0.1");
        assert_eq!(of(&[("x-forwarded-for", "10.0.0.9, 10.0.0.2")], true), "10.0.0.9");
        assert_eq!(
            of(&[("x-forwarded-for", "198.51.100.1, , "), ("x-forwarded-for", "")], true),
            "198.51.100.1"
        );
        assert_eq!(of(&[], true), "10.0.0.1");
    }

    #[test]
    fn an_entry_may_have_a_port() {
        for (entry, client) in [
            ("198.51.100.1:4711", "198.51.100.1"),
            ("2001:db8::7", "2001:db8::7"),
            ("[2001:db8::7]", "2001:db8::7"),
            ("[2001:db8::7]:4711", "2001:db8::7"),
            ("[::ffff:198.51.100.1]:1", "198.51.100.1"),
            ("198.51.100.1, 10.0.0.2:80", "198.51.100.1"),
        ] {
            assert_eq!(of(&[("x-forwarded-for", entry)], true), client, "{entry}");
        }
    }

    #[test]
    fn an_entry_that_cannot_be_read_is_nobodys_and_not_the_proxys() {
        for entry in [
            "198.51.100.1, rubbish, 10.0.0.2",
            "rubbish",
            "unknown",
            "198.51.100.1:",
            "198.51.100.1:123456",
            "198.51.100.1:80:80",
            "[198.51.100.1]:80",
            "[2001:db8::7",
            "[2001:db8::7]80",
            "\"198.51.100.1\"",
        ] {
            assert_eq!(of(&[("x-forwarded-for", entry)], true), NOBODY.to_string(), "{entry}");
        }
    }

    #[test]
    fn the_standard_field_is_read_where_it_is_all_that_there_is() {
        for (value, client) in [
            ("for=198.51.100.1", "198.51.100.1"),
            ("For=\"198.51.100.1:80\";proto=http;by=10.0.0.2", "198.51.100.1"),
            ("for=6.6.6.6, for=198.51.100.1;host=\"a,b;c\", for=10.0.0.2", "198.51.100.1"),
            ("proto=https;for=\"[2001:db8::7]:_hidden\"", "2001:db8::7"),
            ("for=198.51.100.1,", "198.51.100.1"),
        ] {
            assert_eq!(of(&[("forwarded", value)], true), client, "{value}");
            assert_eq!(of(&[("forwarded", value)], false), "10.0.0.1");
            let both = [("forwarded", value), ("x-forwarded-for", "192.0.2.9")];
            assert_eq!(of(&both, true), "192.0.2.9", "who sends the other one means it");
        }
        // In two lines.
        assert_eq!(of(&[("forwarded", "for=6.6.6.6"), ("forwarded", "for=192.0.2.1")], true), "192.0.2.1");
    }

    #[test]
    fn an_element_that_is_not_well_formed_names_nobody() {
        for value in [
            "for=unknown",
            "for=_hidden",
            "proto=https",
            "for=6.6.6.6;x=\", for=198.51.100.1",
            "for=6.6.6.6;x=\"\\\", for=\"[2001:db8::7]\"",
            "for=6.6.6.6;for=198.51.100.1",
            "for=6.6.6.6;x",
            "for=\"6.6.6.6\"x",
            "for",
        ] {
            assert_eq!(of(&[("forwarded", value)], true), NOBODY.to_string(), "{value}");
        }
    }
}
