//! Names, hosts, paths and addresses: what may be called what.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::raw::{Node, quoted};

/// Longest DNS label (RFC 1035 §2.3.4).
const MAX_LABEL_BYTES: usize = 63;
/// Longest host name (RFC 1035 §2.3.4).
const MAX_HOST_BYTES: usize = 253;
/// Longest path prefix.
const MAX_PATH_BYTES: usize = 1_024;
/// Names that would be mistaken for something else: Peregrine's own metrics and containers, and "every one".
const RESERVED: [&str; 2] = ["peregrine", "all"];

/// A name of a service or machine: a DNS label, so that it can be a host, a label and a metric.
pub(crate) fn name(kind: &str, name: &str, node: &Node<'_>) -> bool {
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if RESERVED.contains(&name) {
        let message = format_args!("a {kind} cannot be called {name}: that name is Peregrine's own");
        node.wrong_key("config.bad_name", message, "choose another name");
        return false;
    }
    let sound = !name.is_empty()
        && name.len() <= MAX_LABEL_BYTES
        && name.bytes().all(fine)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if !sound {
        node.wrong_key(
            "config.bad_name",
            format_args!("{} is no name for a {kind}", quoted(name)),
            "use a-z, 0-9 and hyphens inside, at most 63 characters, such as web or host-a",
        );
    }
    sound
}

/// A host pattern in its canonical form, as the edge matches it, or why it is none.
pub(crate) fn host_pattern(text: &str) -> Result<String, &'static str> {
    if text == "*" {
        return Ok(text.to_owned());
    }
    if text.contains("://") {
        return Err("a host has no scheme");
    }
    if text.starts_with('[') {
        let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let address = inner.and_then(|inner| inner.parse::<Ipv6Addr>().ok());
        return address
            .map(|a| format!("[{a}]"))
            .ok_or("an IPv6 address is written in brackets, without a port");
    }
    if text.contains(':') {
        return Err("a host has no port: [edge] says where to listen");
    }
    let (name, prefix) = text.strip_prefix("*.").map_or((text, ""), |rest| (rest, "*."));
    if name.contains('*') {
        return Err("a wildcard stands for whole labels at the front: *.example.com");
    }
    // As the table has it: in A-labels. A dot of another script is one afterwards.
    let name = if name.is_ascii() {
        Cow::Borrowed(name)
    } else if name.len() > 4 * MAX_HOST_BYTES {
        return Err("a host has at most 253 characters");
    } else {
        idna::domain_to_ascii(name).map_err(|_| "a host has letters, digits, hyphens and dots")?.into()
    };
    let name = name.strip_suffix('.').unwrap_or(&name);
    host_name(name).map(|()| format!("{prefix}{}", name.to_ascii_lowercase()))
}

/// Whether a host is an address: `10.0.0.1` or `[::1]`.
pub(crate) fn is_ip_address(host: &str) -> bool {
    host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok()
}

fn host_name(name: &str) -> Result<(), &'static str> {
    if name.len() > MAX_HOST_BYTES {
        return Err("a host has at most 253 characters");
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err("a host has no empty labels");
        }
        if label.len() > MAX_LABEL_BYTES {
            return Err("a label of a host has at most 63 characters");
        }
        if !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err("a host has letters, digits, hyphens and dots");
        }
    }
    Ok(())
}

/// A path prefix without its last slash, or why it is none.
pub(crate) fn path_prefix(text: &str) -> Result<String, &'static str> {
    if !text.starts_with('/') {
        return Err("a path begins with /");
    }
    if text.len() > MAX_PATH_BYTES {
        return Err("a path has at most 1024 characters");
    }
    if text.bytes().any(|b| b <= b' ' || b == b'?' || b == b'#' || b >= 0x7f) {
        return Err("a path prefix has no ?, #, spaces or unescaped characters beyond ASCII");
    }
    let lower = text.to_ascii_lowercase();
    let several = [";", "\\", "%2f", "%5c", "%25", "%00", "%2e"];
    if several.iter().any(|part| lower.contains(part))
        || text.split('/').any(|part| part == "." || part == "..")
    {
        return Err(
            "a path prefix has no ;, backslash, %2F, %5C, %25 or dot segments, which origins read in different ways",
        );
    }
    let trimmed = text.trim_end_matches('/');
    Ok(if trimmed.is_empty() { "/".to_owned() } else { trimmed.to_owned() })
}

/// What can be asked with GET: a path, perhaps with a query.
pub(crate) fn request_path(node: &Node<'_>, example: &str) -> Option<String> {
    let text = node.text(example)?;
    let sound = text.starts_with('/')
        && text.len() <= MAX_PATH_BYTES
        && text.bytes().all(|b| b > b' ' && b < 0x7f && b != b'#');
    if !sound {
        let message = format_args!("{} is no path that can be requested", quoted(text));
        node.bad(message, format_args!("write it from the first slash on, escaped: {example:?}"));
    }
    sound.then(|| text.to_owned())
}

/// A host name or address with a port.
pub(crate) fn upstream_address(text: &str) -> Option<(String, u16)> {
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return (socket.port() != 0).then(|| (socket.ip().to_string(), socket.port()));
    }
    let (host, port) = text.rsplit_once(':')?;
    let digits = port.bytes().all(|b| b.is_ascii_digit()); // parsing would take +80 too
    let port = port.parse().ok().filter(|port| digits && *port != 0)?;
    let fine = host_name(host.strip_suffix('.').unwrap_or(host)).is_ok();
    fine.then(|| (host.to_owned(), port))
}

/// An address to listen on.
pub(crate) fn listen_address(node: &Node<'_>, example: &str) -> Option<SocketAddr> {
    let text = node.text(example)?;
    let address = text.parse().ok();
    if address.is_none() {
        let hint = if text.starts_with(':') && text[1..].parse::<u16>().is_ok() {
            format!(
                "write \"0.0.0.0{text}\" or \"[::]{text}\" for every address, \"127.0.0.1{text}\" for this machine only"
            )
        } else {
            format!("write an IP address and a port: {example:?}")
        };
        node.bad(format_args!("{} is no address to listen on", quoted(text)), hint);
    }
    address
}

/// An address of somebody else, with a port.
pub(crate) fn socket_address(node: &Node<'_>, example: &str) -> Option<SocketAddr> {
    let text = node.text(example)?;
    let address = text.parse().ok();
    if address.is_none() {
        let message = format_args!("{} is no IP address with a port", quoted(text));
        node.bad(message, format_args!("write it as in {example:?}"));
    }
    address
}

/// An IP address.
pub(crate) fn ip_address(node: &Node<'_>) -> Option<IpAddr> {
    let text = node.text("10.0.0.2")?;
    let address = text.parse().ok();
    if address.is_none() {
        let hint = "write the IP address at which the edge reaches the machine, such as \"10.0.0.2\"";
        node.bad(format_args!("{} is no IP address", quoted(text)), hint);
    }
    address
}

/// A name of a header or cookie (RFC 9110 §5.6.2).
pub(crate) fn token(node: &Node<'_>, example: &str) -> Option<String> {
    let text = node.text(example)?;
    let sound = !text.is_empty()
        && text.len() <= MAX_LABEL_BYTES
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    if !sound {
        let message = format_args!("{} is no name of a header or cookie", quoted(text));
        node.bad(message, format_args!("use letters, digits, - and _, at most 63 characters: {example:?}"));
    }
    sound.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_brought_into_the_form_that_the_edge_matches() {
        for (said, meant) in [
            ("shop.example.com", "shop.example.com"),
            ("Shop.Example.COM.", "shop.example.com"),
            ("*.example.com", "*.example.com"),
            ("*", "*"),
            ("10.0.0.1", "10.0.0.1"),
            ("[2001:DB8::1]", "[2001:db8::1]"),
            ("my_service", "my_service"),
            ("Ä.example", "xn--4ca.example"),
            ("*.bücher。example．", "*.xn--bcher-kva.example"),
        ] {
            assert_eq!(host_pattern(said).as_deref(), Ok(meant), "{said}");
        }
        for said in [
            "",
            ".",
            "a..b",
            "a b",
            "shop.example.com:80",
            "http://a",
            "*.*.a",
            "a.*",
            "*a.b",
            "*.",
            "a\u{ad}b c.example",
            "[::1",
            "[::1]:80",
            "::1",
            "*.[::1]",
            "a/b",
        ] {
            assert!(host_pattern(said).is_err(), "{said}");
        }
        assert!(host_pattern(&"a".repeat(64)).is_err());
        assert!(host_pattern(&["a"; 128].join(".")).is_err());
    }

    #[test]
    fn path_prefixes_lose_their_last_slash() {
        for (said, meant) in
            [("/", "/"), ("/api", "/api"), ("/api/", "/api"), ("//", "/"), ("/a%20b", "/a%20b")]
        {
            assert_eq!(path_prefix(said).as_deref(), Ok(meant), "{said}");
        }
        for said in
            ["", "api", "/a b", "/a?b", "/a#b", "/ä", "/a\n", "/a;b", "/a/../b", "/a%2Fb", "/%2e", "/a\\b"]
        {
            assert!(path_prefix(said).is_err(), "{said}");
        }
    }

    #[test]
    fn upstreams_have_a_host_and_a_port() {
        for said in ["10.0.0.5:8080", "[::1]:80", "backend.internal:8080", "backend:1", "my_app:3000"] {
            assert!(upstream_address(said).is_some(), "{said}");
        }
        for said in
            ["", "10.0.0.5", ":80", "a:0", "a:65536", "a:b", "http://a:80", "::1:80", "a b:80", "a:+80"]
        {
            assert!(upstream_address(said).is_none(), "{said}");
        }
    }
}
