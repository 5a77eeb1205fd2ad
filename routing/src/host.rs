//! Hosts: the canonical form of what clients send, and the patterns that match it.

use std::borrow::Cow;
use std::sync::Arc;

/// Longest host name (RFC 1035 §2.3.4).
pub const MAX_HOST_BYTES: usize = 253;

/// Longest label of a host name (RFC 1035 §2.3.4).
pub const MAX_LABEL_BYTES: usize = 63;

/// Why a host is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Nothing there.
    #[error("the host is empty")]
    Empty,
    /// Longer than [`MAX_HOST_BYTES`], or a label longer than [`MAX_LABEL_BYTES`].
    #[error("the host is longer than {MAX_HOST_BYTES} bytes, or one of its labels than {MAX_LABEL_BYTES}")]
    TooLong,
    /// A byte that no host name or address literal has.
    #[error("the host has a character that is not allowed")]
    BadCharacter,
    /// An empty label, or a bracket without its mate.
    #[error("the host is malformed")]
    Malformed,
    /// What follows the colon is no port.
    #[error("the port is not a number from 1 to 65535")]
    BadPort,
}

/// Brings the value of `Host` or `:authority` into the form that tables are keyed by: lower case, no
/// port, no trailing dot, names of other scripts as A-labels (RFC 5891 §4.4, mapped as browsers do, UTS #46). IPv6
/// literals keep their brackets. User information is refused (RFC 9110 §4.2.4). Borrows when nothing has to change.
///
/// # Errors
/// [`HostError`] says what is wrong with it; the request deserves a 400 (RFC 9112 §3.2).
pub fn canonical_host(authority: &str) -> Result<Cow<'_, str>, HostError> {
    let host = strip_port(authority)?;
    if host.starts_with('[') {
        return ipv6_literal(host);
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    match check_name(host) {
        Ok(()) => {}
        Err(HostError::BadCharacter) if !host.is_ascii() => return international(host),
        Err(error) => return Err(error),
    }
    Ok(if host.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    })
}

fn strip_port(authority: &str) -> Result<&str, HostError> {
    let after_literal = authority.rfind(']').map_or(0, |end| end + 1);
    let Some(colon) = authority[after_literal..].find(':').map(|at| at + after_literal) else {
        return Ok(authority);
    };
    let port = &authority[colon + 1..];
    // "example.com:" is an empty port, which is the default one (RFC 3986 §3.2.3).
    let fine = port.is_empty()
        || (port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0));
    if fine { Ok(&authority[..colon]) } else { Err(HostError::BadPort) }
}

fn ipv6_literal(host: &str) -> Result<Cow<'_, str>, HostError> {
    let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).ok_or(HostError::Malformed)?;
    let address: std::net::Ipv6Addr = inner.parse().map_err(|_| HostError::Malformed)?;
    let canonical = format!("[{address}]");
    Ok(if canonical == host { Cow::Borrowed(host) } else { Cow::Owned(canonical) })
}

/// A name with U-labels. What it is mapped to may end in a dot of another script.
fn international(host: &str) -> Result<Cow<'_, str>, HostError> {
    // The mapping takes time; a name that is too long stays so, because A-labels are longer.
    if host.chars().count() > MAX_HOST_BYTES {
        return Err(HostError::TooLong);
    }
    let mapped = idna::domain_to_ascii(host).map_err(|_| HostError::BadCharacter)?;
    let mapped = mapped.strip_suffix('.').unwrap_or(&mapped);
    check_name(mapped)?;
    Ok(Cow::Owned(mapped.to_owned()))
}

fn check_name(host: &str) -> Result<(), HostError> {
    if host.is_empty() {
        return Err(HostError::Empty);
    }
    if host.len() > MAX_HOST_BYTES {
        return Err(HostError::TooLong);
    }
    let mut label = 0;
    for byte in host.bytes() {
        match byte {
            b'.' if label == 0 => return Err(HostError::Malformed),
            b'.' => label = 0,
            // Underscores are no host names, but people have them in DNS and in container networks.
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => label += 1,
            _ => return Err(HostError::BadCharacter),
        }
        if label > MAX_LABEL_BYTES {
            return Err(HostError::TooLong);
        }
    }
    if label == 0 { Err(HostError::Malformed) } else { Ok(()) }
}

/// Which hosts a route is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// One host.
    Exact(Arc<str>),
    /// Every host below this one, at any depth: `*.example.com` holds `example.com`.
    Wildcard(Arc<str>),
    /// Every host that nothing else matches.
    Any,
}

impl HostPattern {
    /// Reads `shop.example.com`, `*.example.com` or `*`.
    ///
    /// # Errors
    /// [`HostError`] if it is none of these; a port is refused too, as listeners decide on ports.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (name, wildcard) = text.strip_prefix("*.").map_or((text, false), |rest| (rest, true));
        let after_literal = name.rfind(']').map_or(0, |end| end + 1);
        if name[after_literal..].contains(':') {
            return Err(HostError::BadCharacter);
        }
        if wildcard && name.starts_with('[') {
            return Err(HostError::Malformed);
        }
        let host: Arc<str> = canonical_host(name)?.into();
        Ok(if wildcard { Self::Wildcard(host) } else { Self::Exact(host) })
    }
}

impl std::fmt::Display for HostPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(host) => f.write_str(host),
            Self::Wildcard(suffix) => write!(f, "*.{suffix}"),
            Self::Any => f.write_str("*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_brought_into_one_form() {
        for (raw, canonical) in [
            ("shop.example.com", "shop.example.com"),
            ("Shop.Example.COM:8080", "shop.example.com"),
            ("example.com.", "example.com"),
            ("example.com:", "example.com"),
            ("10.0.0.1:80", "10.0.0.1"),
            ("[::1]:8080", "[::1]"),
            ("[0:0:0:0:0:0:0:1]", "[::1]"),
            ("Bücher.Example:443", "xn--bcher-kva.example"),
            ("XN--BCHER-KVA.example.", "xn--bcher-kva.example"),
            ("bücher。example．", "xn--bcher-kva.example"),
            ("ＳＨＯＰ.example", "shop.example"),
        ] {
            assert_eq!(canonical_host(raw).as_deref(), Ok(canonical), "{raw}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for (raw, error) in [
            ("", HostError::Empty),
            (".", HostError::Empty),
            ("a..b", HostError::Malformed),
            (".a", HostError::Malformed),
            ("a b", HostError::BadCharacter),
            ("user@host", HostError::BadCharacter),
            ("a/b", HostError::BadCharacter),
            ("a,b", HostError::BadCharacter),
            ("a:0", HostError::BadPort),
            ("a:99999", HostError::BadPort),
            ("a:80:80", HostError::BadPort),
            ("a:+80", HostError::BadPort),
            ("[::1", HostError::BadPort),
            ("[::g]", HostError::Malformed),
            ("é,com", HostError::BadCharacter),
            ("é..com", HostError::Malformed),
            ("é／admin", HostError::BadCharacter),
        ] {
            assert_eq!(canonical_host(raw), Err(error), "{raw}");
        }
        assert_eq!(canonical_host(&"a".repeat(300)), Err(HostError::TooLong));
    }

    #[test]
    fn patterns_are_read_and_shown_alike() {
        for text in ["shop.example.com", "*.example.com", "*", "[::1]"] {
            assert_eq!(HostPattern::parse(text).expect("is a pattern").to_string(), text);
        }
        let international = HostPattern::parse("*.bücher.example").expect("is a pattern");
        assert_eq!(international.to_string(), "*.xn--bcher-kva.example");
        for (text, error) in [
            ("example.com:80", HostError::BadCharacter),
            ("[::1]:80", HostError::BadCharacter),
            ("a.*.com", HostError::BadCharacter),
            ("*.[::1]", HostError::Malformed),
            ("*.", HostError::Empty),
            ("*example.com", HostError::BadCharacter),
        ] {
            assert_eq!(HostPattern::parse(text), Err(error), "{text}");
        }
    }
}
