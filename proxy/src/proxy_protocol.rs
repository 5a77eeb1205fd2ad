//! The PROXY protocol, versions 1 and 2: who is behind a load balancer that passes bytes on and cannot add a field
//! (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>).
//!
//! A pure parser and the reading of one header. It is asked for connections from configured networks only, and
//! there it must be there: whoever may speak for others has to say for whom. From anybody else such a header is what it
//! looks like, a malformed request.
//!
//! And the writing of one, for upstreams of services that ask for it. Who has been told for whom a connection is takes
//! all that comes on it for his: such a connection is never used for anybody else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use peregrine_routing::{ProxyProtocol, ServicePolicy, Upstream, UpstreamProtocol};
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
    /// Where he connected to; known when the source is.
    pub(crate) destination: Option<SocketAddr>,
}

impl Header {
    fn of(length: usize, ends: Option<(SocketAddr, SocketAddr)>) -> Self {
        let (source, destination) = ends.unzip();
        Self { length, source, destination }
    }
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
    let ends = match words.next() {
        // What follows is to be ignored.
        Some("UNKNOWN") => None,
        Some(family @ ("TCP4" | "TCP6")) => {
            let mut word = || words.next().ok_or(NoHeader);
            let (source, destination, port, to) = (word()?, word()?, word()?, word()?);
            let (source, destination) = (v1_address(family, source)?, v1_address(family, destination)?);
            let (port, to) = (v1_port(port)?, v1_port(to)?);
            if words.next().is_some() {
                return Err(NoHeader);
            }
            Some((SocketAddr::new(source, port), SocketAddr::new(destination, to)))
        }
        _ => return Err(NoHeader),
    };
    Ok(Parsed::Whole(Header::of(end + 1, ends)))
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
    let ends = match (command, family) {
        // LOCAL: whatever the addresses say, they are to be ignored.
        (0x20, _) => None,
        // PROXY over TCP.
        (0x21, 0x11) => {
            let at = |start| bytes_at::<4>(body, start).map(Ipv4Addr::from);
            Some(((at(0)?, port_at(body, 8)?).into(), (at(4)?, port_at(body, 10)?).into()))
        }
        (0x21, 0x21) => {
            let at = |start| bytes_at::<16>(body, start).map(Ipv6Addr::from);
            Some(((at(0)?, port_at(body, 32)?).into(), (at(16)?, port_at(body, 34)?).into()))
        }
        // PROXY of something that has no address (AF_UNSPEC), or none of IP (AF_UNIX).
        (0x21, 0x00 | 0x31) => None,
        _ => return Err(NoHeader),
    };
    Ok(Parsed::Whole(Header::of(length, ends)))
}

fn bytes_at<const N: usize>(body: &[u8], start: usize) -> Result<[u8; N], NoHeader> {
    body.get(start..start + N).and_then(|part| part.try_into().ok()).ok_or(NoHeader)
}

fn port_at(body: &[u8], start: usize) -> Result<u16, NoHeader> {
    bytes_at(body, start).map(u16::from_be_bytes)
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

// --- headers of our own ---------------------------------------------------------------------------------

/// What connections to an upstream begin with. Nothing where one of them serves many clients.
pub(crate) fn wanted(policy: &ServicePolicy, upstream: &Upstream) -> Option<ProxyProtocol> {
    policy.send_proxy_protocol.filter(|_| upstream.protocol() == UpstreamProtocol::Http1)
}

/// The header of a connection that is for nobody but this edge: a probe. In version 1 there is no word for that but
/// "unknown".
pub(crate) const fn of_nobody(version: ProxyProtocol) -> &'static [u8] {
    match version {
        ProxyProtocol::V1 => b"PROXY UNKNOWN\r\n",
        ProxyProtocol::V2 => b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00",
    }
}

/// The header of a connection for a client that came from `source` to `destination`. Both are of one family: where
/// they are not, they are written as IPv6.
pub(crate) fn header(version: ProxyProtocol, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let (ports, ips) = ((source.port(), destination.port()), (source.ip(), destination.ip()));
    match (version, ips.0.to_canonical(), ips.1.to_canonical()) {
        (ProxyProtocol::V1, IpAddr::V4(from), IpAddr::V4(to)) => {
            format!("PROXY TCP4 {from} {to} {} {}\r\n", ports.0, ports.1).into_bytes()
        }
        (ProxyProtocol::V1, from, to) => {
            let (from, to) = (v1_text(as_v6(from)), v1_text(as_v6(to)));
            format!("PROXY TCP6 {from} {to} {} {}\r\n", ports.0, ports.1).into_bytes()
        }
        (ProxyProtocol::V2, IpAddr::V4(from), IpAddr::V4(to)) => {
            v2_header(0x11, &from.octets(), &to.octets(), ports)
        }
        (ProxyProtocol::V2, from, to) => v2_header(0x21, &as_v6(from).octets(), &as_v6(to).octets(), ports),
    }
}

const fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// Of groups of digits alone (§2.1): the usual form of a mapped address has dots in it.
fn v1_text(address: Ipv6Addr) -> String {
    let [.., high, low] = address.segments();
    match address.to_ipv4_mapped() {
        Some(_) => format!("::ffff:{high:x}:{low:x}"),
        None => address.to_string(),
    }
}

fn v2_header(family: u8, source: &[u8], destination: &[u8], ports: (u16, u16)) -> Vec<u8> {
    let proxy = 0x21;
    let length = (source.len() + destination.len() + 4) as u16; // 12 or 36
    let (from, to) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    [&V2_SIGNATURE[..], &[proxy, family], &length.to_be_bytes(), source, destination, &from, &to].concat()
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

    fn socket(text: &str) -> SocketAddr {
        text.parse().expect("an address with a port")
    }

    /// What a header that was written says when it is read, and that it is no byte longer.
    fn read_back(version: ProxyProtocol, source: SocketAddr, destination: SocketAddr) -> (String, String) {
        let bytes = header(version, source, destination);
        let Ok(Parsed::Whole(header)) = parse(&bytes) else { panic!("no header: {bytes:?}") };
        assert_eq!(header.length, bytes.len());
        let text = |end: Option<SocketAddr>| end.expect("it is for somebody").to_string();
        (text(header.source), text(header.destination))
    }

    #[test]
    fn a_header_of_version_1_is_the_line_of_the_specification() {
        let line = |source: &str, destination: &str| {
            String::from_utf8(header(ProxyProtocol::V1, socket(source), socket(destination))).expect("text")
        };
        // The example of §2.1.
        assert_eq!(
            line("192.168.0.1:56324", "192.168.0.11:443"),
            "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
        );
        // The longest ones that §2.1 lists.
        assert_eq!(
            line("255.255.255.255:65535", "255.255.255.255:65535"),
            "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n"
        );
        let ones = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let end = format!("[{ones}]:65535");
        let longest = line(&end, &end);
        assert_eq!(longest, format!("PROXY TCP6 {ones} {ones} 65535 65535\r\n"));
        assert!(longest.len() <= MAX_V1_BYTES);
        assert_eq!(line("[2001:db8::7]:1", "[::1]:0"), "PROXY TCP6 2001:db8::7 ::1 1 0\r\n");
    }

    #[test]
    fn a_header_of_version_2_is_the_bytes_of_the_specification() {
        // §2.2: the signature; version 2 and PROXY; TCP over IPv4; twelve bytes: addresses, then ports.
        let signature = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
        let v4 = header(ProxyProtocol::V2, socket("192.168.0.1:56324"), socket("192.168.0.11:443"));
        let rest = [0x21, 0x11, 0, 12, 192, 168, 0, 1, 192, 168, 0, 11, 0xdc, 0x04, 0x01, 0xbb];
        assert_eq!(v4, [&signature[..], &rest].concat());
        let v6 = header(ProxyProtocol::V2, socket("[2001:db8::7]:258"), socket("[::1]:443"));
        assert_eq!((&v6[..12], &v6[12..16], v6.len()), (&signature[..], &[0x21, 0x21, 0, 36][..], 52));
        assert_eq!((&v6[16..20], v6[31], v6[47]), (&[0x20, 0x01, 0x0d, 0xb8][..], 7, 1));
        assert_eq!(v6[48..], [0x01, 0x02, 0x01, 0xbb]);
    }

    #[test]
    fn a_probe_says_that_it_is_for_nobody() {
        assert_eq!(of_nobody(ProxyProtocol::V1), b"PROXY UNKNOWN\r\n");
        assert_eq!(of_nobody(ProxyProtocol::V2), v2(0x20, 0x00, b""));
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            assert_eq!(source(of_nobody(version)), Ok(None));
        }
    }

    #[test]
    fn both_ends_are_of_one_family() {
        let (v4, v6) = (socket("192.0.2.1:1"), socket("[2001:db8::7]:2"));
        let mapped = socket("[::ffff:192.0.2.1]:1");
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            assert_eq!(read_back(version, v4, v6), (mapped.to_string(), v6.to_string()));
            assert_eq!(read_back(version, v6, mapped), (v6.to_string(), mapped.to_string()));
            assert_eq!(read_back(version, mapped, mapped), (v4.to_string(), v4.to_string()), "is IPv4");
        }
        let line = header(ProxyProtocol::V1, v4, v6);
        assert_eq!(line, b"PROXY TCP6 ::ffff:c000:201 2001:db8::7 1 2\r\n");
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
        fn what_is_written_is_read_as_it_was(source: (IpAddr, u16), destination: (IpAddr, u16), v2: bool) {
            let version = if v2 { ProxyProtocol::V2 } else { ProxyProtocol::V1 };
            let (source, destination) = (SocketAddr::from(source), SocketAddr::from(destination));
            let (from, to) = read_back(version, source, destination);
            let ends = (socket(&from), socket(&to));
            prop_assert_eq!(ends.0.is_ipv4(), ends.1.is_ipv4());
            prop_assert_eq!(ends.0.ip().to_canonical(), source.ip().to_canonical());
            prop_assert_eq!(ends.1.ip().to_canonical(), destination.ip().to_canonical());
            prop_assert_eq!((ends.0.port(), ends.1.port()), (source.port(), destination.port()));
        }

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
