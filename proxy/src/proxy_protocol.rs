//! The PROXY protocol, versions 1 and 2: who is behind a load balancer that passes bytes on and cannot add a field.
//!
//! Only a pure parser and the reading of one header. It is asked for connections from configured networks only, and
//! there it must be there: whoever may speak for others has to say for whom. From anybody else such a header is what it
//! looks like, a malformed request.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest header of version 1, with its line end.
const MAX_V1_BYTES: usize = 107;
/// What every header of version 2 begins with.
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
const V2_HEAD_BYTES: usize = 16;
/// Largest addresses and additions of version 2 that are read. Some 200 bytes are usual, with a certificate's name.
const MAX_V2_BODY_BYTES: usize = 4 * 1024;

/// A header that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Its length in bytes.
    pub(crate) length: usize,
    /// Whom the connection is for; `None` if the sender speaks for itself (a probe of its own).
    pub(crate) source: Option<SocketAddr>,
}

/// What bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A header.
    Whole(Header),
    /// The beginning of one; at least this many bytes more.
    Needs(usize),
}

/// Bytes that are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what came first is no header of the PROXY protocol")]
pub(crate) struct NoHeader;

/// Reads a header at the start of `bytes`.
///
/// # Errors
/// [`NoHeader`] as soon as it is sure that they do not begin with one.
pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, NoHeader> {
    match bytes.first() {
        None => Ok(Parsed::Needs(1)),
        Some(b'P') => parse_v1(bytes),
        Some(_) => parse_v2(bytes),
    }
}

fn parse_v1(bytes: &[u8]) -> Result<Parsed, NoHeader> {
    const PREFIX: &[u8] = b"PROXY ";
    let common = PREFIX.len().min(bytes.len());
    if bytes[..common] != PREFIX[..common] {
        return Err(NoHeader);
    }
    let searched = &bytes[..bytes.len().min(MAX_V1_BYTES)];
    let Some(end) = memchr::memchr(b'\n', searched) else {
        return if searched.len() < MAX_V1_BYTES { Ok(Parsed::Needs(1)) } else { Err(NoHeader) };
    };
    let line = bytes[..end].strip_suffix(b"\r").ok_or(NoHeader)?;
    let text = std::str::from_utf8(line).map_err(|_| NoHeader)?;
    let mut words = text.split(' ').skip(1);
    let source = match words.next() {
        // What follows is to be ignored.
        Some("UNKNOWN") => None,
        Some(family @ ("TCP4" | "TCP6")) => {
            let mut word = || words.next().ok_or(NoHeader);
            let (source, destination, port, to) = (word()?, word()?, word()?, word()?);
            let (source, _) = (v1_address(family, source)?, v1_address(family, destination)?);
            let (port, _) = (v1_port(port)?, v1_port(to)?);
            if words.next().is_some() {
                return Err(NoHeader);
            }
            Some(SocketAddr::new(source, port))
        }
        _ => return Err(NoHeader),
    };
    Ok(Parsed::Whole(Header { length: end + 1, source }))
}

fn v1_address(family: &str, text: &str) -> Result<IpAddr, NoHeader> {
    match family {
        "TCP4" => text.parse().map(IpAddr::V4).map_err(|_| NoHeader),
        _ => text.parse().map(IpAddr::V6).map_err(|_| NoHeader),
    }
}

fn v1_port(text: &str) -> Result<u16, NoHeader> {
    let is_plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if is_plain { text.parse().map_err(|_| NoHeader) } else { Err(NoHeader) }
}

fn parse_v2(bytes: &[u8]) -> Result<Parsed, NoHeader> {
    let common = V2_SIGNATURE.len().min(bytes.len());
    if bytes[..common] != V2_SIGNATURE[..common] {
        return Err(NoHeader);
    }
    let Some(head) = bytes.get(..V2_HEAD_BYTES) else {
        return Ok(Parsed::Needs(V2_HEAD_BYTES - bytes.len()));
    };
    let (command, family) = (head[12], head[13]);
    let body_bytes = usize::from(u16::from_be_bytes([head[14], head[15]]));
    if body_bytes > MAX_V2_BODY_BYTES {
        return Err(NoHeader);
    }
    let length = V2_HEAD_BYTES + body_bytes;
    let Some(body) = bytes.get(V2_HEAD_BYTES..length) else {
        return Ok(Parsed::Needs(length - bytes.len()));
    };
    let source = match (command, family) {
        // LOCAL: whatever the addresses say, they are to be ignored.
        (0x20, _) => None,
        // PROXY over TCP.
        (0x21, 0x11) => {
            let [a, b, c, d, _, _, _, _, high, low, ..] = *body else { return Err(NoHeader) };
            if body.len() < 12 {
                return Err(NoHeader);
            }
            Some(SocketAddr::from((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low]))))
        }
        (0x21, 0x21) => {
            let address: [u8; 16] = body.get(..16).and_then(|part| part.try_into().ok()).ok_or(NoHeader)?;
            let port: [u8; 2] = body.get(32..34).and_then(|part| part.try_into().ok()).ok_or(NoHeader)?;
            if body.len() < 36 {
                return Err(NoHeader);
            }
            Some(SocketAddr::from((Ipv6Addr::from(address), u16::from_be_bytes(port))))
        }
        // PROXY of something that has no address (AF_UNSPEC), or none of IP (AF_UNIX).
        (0x21, 0x00 | 0x31) => None,
        _ => return Err(NoHeader),
    };
    Ok(Parsed::Whole(Header { length, source }))
}

/// Reads one header and not a byte more.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if there is none, and what reading gives.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Header> {
    let mut bytes = Vec::with_capacity(V2_HEAD_BYTES);
    loop {
        match parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
            Parsed::Whole(header) => return Ok(header),
            Parsed::Needs(more) => {
                let have = bytes.len();
                bytes.resize(have + more, 0);
                stream.read_exact(&mut bytes[have..]).await?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u16).to_be_bytes();
        [&V2_SIGNATURE[..], &[command, family], &length, body].concat()
    }

    fn source(bytes: &[u8]) -> Result<Option<String>, NoHeader> {
        match parse(bytes)? {
            Parsed::Whole(header) => {
                assert!(header.length <= bytes.len());
                Ok(header.source.map(|source| source.to_string()))
            }
            Parsed::Needs(_) => panic!("is whole: {bytes:?}"),
        }
    }

    fn samples() -> Vec<(Vec<u8>, Option<&'static str>)> {
        let v4 = [198, 51, 100, 7, 192, 0, 2, 1, 0xdd, 0xd5, 0, 80];
        let mut v6 = [0_u8; 36];
        v6[..2].copy_from_slice(&[0x20, 0x01]);
        (v6[15], v6[32], v6[33]) = (9, 0x01, 0x02);
        let with_additions = [&v4[..], &[0x03, 0, 4, 1, 2, 3, 4]].concat();
        vec![
            (b"PROXY TCP4 198.51.100.7 192.0.2.1 56789 80\r\n".to_vec(), Some("198.51.100.7:56789")),
            (b"PROXY TCP6 2001::9 2001:db8::1 258 443\r\n".to_vec(), Some("[2001::9]:258")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN whatever ::1\r\n".to_vec(), None),
            (v2(0x21, 0x11, &v4), Some("198.51.100.7:56789")),
            (v2(0x21, 0x11, &with_additions), Some("198.51.100.7:56789")),
            (v2(0x21, 0x21, &v6), Some("[2001::9]:258")),
            (v2(0x20, 0x00, b""), None),
            (v2(0x20, 0x11, &v4), None),
            (v2(0x21, 0x00, b""), None),
            (v2(0x21, 0x31, &[0; 216]), None),
        ]
    }

    #[test]
    fn both_versions_say_whom_a_connection_is_for() {
        for (bytes, expected) in samples() {
            assert_eq!(source(&bytes), Ok(expected.map(str::to_owned)), "{bytes:?}");
            let longer = [&bytes[..], b"GET / HTTP/1.1\r\n"].concat();
            let length = bytes.len();
            assert!(matches!(parse(&longer), Ok(Parsed::Whole(header)) if header.length == length));
            for cut in 0..bytes.len() {
                assert!(
                    matches!(parse(&bytes[..cut]), Ok(Parsed::Needs(more)) if more <= length - cut),
                    "{cut}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PUT / HTTP/1.1\r\n",
            b"proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\r\n",
            b"PROXY TCP4  1.2.3.4 1.2.3.4 1 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n",
            b"PROXY TCP4 ::1 ::1 1 1\r\n",
            b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n",
            b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n",
            b"PROXY \r\n",
            long.as_bytes(),
            &v2(0x11, 0x11, &[0; 12]),
            &v2(0x22, 0x11, &[0; 12]),
            &v2(0x21, 0x12, &[0; 12]),
            &v2(0x21, 0x11, &[0; 11]),
            &v2(0x21, 0x21, &[0; 35]),
            &v2(0x20, 0x00, &[0; 4097]),
            b"\r\n\r\nGET",
            b"\x16\x03\x01",
        ] {
            assert_eq!(parse(bytes), Err(NoHeader), "{}", String::from_utf8_lossy(bytes));
        }
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_needed_is_enough(bytes in prop::collection::vec(any::<u8>(), 0..300), sample in 0_usize..11, keep in 0_usize..60) {
            let start = &samples()[sample].0;
            let bytes = [&start[..keep.min(start.len())], &bytes[..]].concat();
            match parse(&bytes) {
                Ok(Parsed::Whole(header)) => prop_assert!(header.length <= bytes.len()),
                Ok(Parsed::Needs(more)) => prop_assert!(more > 0 && bytes.len() + more <= V2_HEAD_BYTES + MAX_V2_BODY_BYTES),
                Err(NoHeader) => {}
            }
        }
    }
}
