//! Heads: requests' as bytes, answers' into maps.

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::header::CONNECTION;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use super::Http1Error;
use crate::framing::Framing;
use crate::headers::{self, Seen};

/// Most fields of an answer, whatever is configured: room on the stack.
const MAX_FIELDS: usize = 256;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// Reads `timeout=5, max=100`: seconds that an idle connection is kept.
fn announced_ms(value: &[u8]) -> Option<u32> {
    let mut parameters = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    let (_, seconds) = parameters.find_map(|parameter| {
        parameter.split_at_checked(8).filter(|(name, _)| name.eq_ignore_ascii_case(b"timeout="))
    })?;
    let seconds: u32 = std::str::from_utf8(seconds).ok()?.parse().ok()?;
    Some(seconds.saturating_mul(1_000))
}

/// Largest head of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadLimits {
    pub(crate) bytes: usize,
    pub(crate) fields: usize,
}

/// The head of an answer as it was read.
pub(super) struct Parsed {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// `None` is a body that ends with the connection.
    pub(super) framing: Option<Framing>,
    pub(super) keep_alive: bool,
    /// What the upstream says of idle connections (`Keep-Alive: timeout`).
    pub(super) announced_ms: Option<u32>,
    /// The bytes of the head.
    pub(super) raw: Bytes,
    /// What was read beyond it.
    pub(super) rest: Bytes,
}

impl Parsed {
    /// 101 is no interim response: it is the last one in this protocol.
    pub(super) fn is_interim(&self) -> bool {
        self.status.is_informational() && self.status != StatusCode::SWITCHING_PROTOCOLS
    }
}

// --- requests --------------------------------------------------------------------------------------------

pub(crate) fn write_request_line(out: &mut Vec<u8>, method: &Method, target: &PathAndQuery) {
    out.extend_from_slice(method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(target.as_str().as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
}

pub(crate) fn write_field(out: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    out.extend_from_slice(name.as_str().as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value.as_bytes());
    out.extend_from_slice(b"\r\n");
}

// --- answers ---------------------------------------------------------------------------------------------

/// Takes a head off the front of `input`, if it is there as a whole. What is behind it goes into
/// [`Parsed::rest`], or stays in `input` behind an interim response. `room` is a map that is used for the
/// fields.
pub(super) fn take(
    input: &mut BytesMut,
    limits: HeadLimits,
    room: &mut HeaderMap,
) -> Result<Option<Parsed>, Http1Error> {
    if input.is_empty() {
        return Ok(None);
    }
    let whole = input.split().freeze();
    let mut fields = [const { MaybeUninit::<httparse::Header<'_>>::uninit() }; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut []);
    let fields = &mut fields[..limits.fields.min(MAX_FIELDS)];
    let config = httparse::ParserConfig::default();
    let parsed = match config.parse_response_with_uninit_headers(&mut response, &whole, fields) {
        Ok(httparse::Status::Complete(length)) if length <= limits.bytes => {
            read(&response, &whole, length, room)?
        }
        Ok(httparse::Status::Partial) if whole.len() < limits.bytes => {
            // Rare, so that putting it back may cost a copy.
            *input = BytesMut::from(whole);
            return Ok(None);
        }
        Ok(_) => return Err(Http1Error::Malformed("the head is too large")),
        Err(httparse::Error::TooManyHeaders) => return Err(Http1Error::Malformed("too many fields")),
        Err(httparse::Error::HeaderName) => return Err(Http1Error::Malformed("a field name")),
        Err(httparse::Error::HeaderValue) => return Err(Http1Error::Malformed("a field value")),
        Err(_) => return Err(Http1Error::Malformed("the head")),
    };
    if parsed.is_interim() {
        *input = BytesMut::from(parsed.rest.clone());
    }
    Ok(Some(parsed))
}

fn read(
    response: &httparse::Response<'_, '_>,
    whole: &Bytes,
    length: usize,
    room: &mut HeaderMap,
) -> Result<Parsed, Http1Error> {
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or(Http1Error::Malformed("the status"))?;
    let mut fields = Fields {
        headers: std::mem::take(room),
        http10: response.version == Some(0),
        switching: status == StatusCode::SWITCHING_PROTOCOLS,
        seen: 0,
        length: None,
        close: false,
        stays: false,
        announced_ms: None,
        nominates: false,
    };
    fields.headers.clear();
    fields.headers.reserve(response.headers.len());
    for field in response.headers.iter() {
        fields.add(field.name, whole.slice_ref(field.value))?;
    }
    let framing = fields.framing()?;
    let keep_alive = if fields.http10 { fields.stays && !fields.close } else { !fields.close };
    let announced_ms = fields.announced_ms;
    let mut headers = fields.headers;
    if fields.nominates {
        headers::strip_nominated(&mut headers);
        headers.remove(CONNECTION);
    }
    Ok(Parsed {
        status,
        headers,
        framing,
        keep_alive,
        announced_ms,
        raw: whole.slice(..length),
        rest: whole.slice(length..),
    })
}

/// The fields of an answer on their way into its map. What is meant for this connection only, and what is
/// the edge's own word, never gets there.
struct Fields {
    headers: HeaderMap,
    http10: bool,
    switching: bool,
    seen: u32,
    length: Option<u64>,
    close: bool,
    stays: bool,
    announced_ms: Option<u32>,
    nominates: bool,
}

impl Fields {
    fn add(&mut self, name: &str, value: Bytes) -> Result<(), Http1Error> {
        let name =
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| Http1Error::Malformed("a field name"))?;
        let bit = Seen::bit_of(name.as_str());
        match bit {
            Seen::CONNECTION if self.connection(&value) => return Ok(()),
            Seen::TRANSFER_ENCODING => return self.transfer_encoding(&value),
            Seen::CONTENT_LENGTH => {
                let length = content_length(&value).ok_or(Http1Error::Malformed("Content-Length"))?;
                if self.length.is_some_and(|known| known != length) {
                    return Err(Http1Error::Malformed("two lengths"));
                }
                if self.length.replace(length).is_some() {
                    return Ok(());
                }
            }
            // Says which protocol was agreed to; otherwise it is an offer to the edge.
            Seen::UPGRADE if !self.switching => return Ok(()),
            Seen::HOP if name == KEEP_ALIVE => {
                self.announced_ms = announced_ms(&value);
                return Ok(());
            }
            Seen::HOP | Seen::TE | Seen::REASON => return Ok(()),
            _ => {}
        }
        self.seen |= bit;
        let value =
            HeaderValue::from_maybe_shared(value).map_err(|_| Http1Error::Malformed("a field value"))?;
        self.headers.append(name, value);
        Ok(())
    }

    /// Reads a `Connection` field; true if it nominates nothing.
    fn connection(&mut self, value: &[u8]) -> bool {
        let mut plain = true;
        for token in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
            if token.eq_ignore_ascii_case(b"close") {
                self.close = true;
            } else if token.eq_ignore_ascii_case(b"keep-alive") {
                self.stays = true;
            } else if !token.eq_ignore_ascii_case(b"upgrade") && !token.is_empty() {
                plain = false;
            }
        }
        self.nominates |= !plain;
        plain
    }

    /// One `chunked` in HTTP/1.1 is all that is understood: what an answer is otherwise wrapped in, the
    /// edge could neither undo nor pass on (RFC 9112 §6.1).
    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Http1Error> {
        let known = value.eq_ignore_ascii_case(b"chunked") && !self.http10;
        if !known || self.seen & Seen::TRANSFER_ENCODING != 0 {
            return Err(Http1Error::Malformed("Transfer-Encoding"));
        }
        self.seen |= Seen::TRANSFER_ENCODING;
        Ok(())
    }

    fn framing(&self) -> Result<Option<Framing>, Http1Error> {
        match (self.seen & Seen::TRANSFER_ENCODING != 0, self.length) {
            // Whoever reads the other of the two finds the end elsewhere (RFC 9112 §6.3).
            (true, Some(_)) => Err(Http1Error::Malformed("Content-Length beside Transfer-Encoding")),
            (true, None) => Ok(Some(Framing::Chunked)),
            (false, length) => Ok(length.map(Framing::Length)),
        }
    }
}

/// Digits, or the same digits several times in a list (RFC 9110 §8.6).
fn content_length(value: &[u8]) -> Option<u64> {
    let mut length = None;
    for part in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
        if part.is_empty() || !part.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let number = std::str::from_utf8(part).ok()?.parse().ok()?;
        if length.replace(number).is_some_and(|known: u64| known != number) {
            return None;
        }
    }
    length
}

/// Copies the head of an interim response without the fields that end here.
pub(crate) fn clean_interim(head: &[u8], out: &mut Vec<u8>) {
    const OFF: [&[u8]; 8] = [
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"x-peregrine-reason",
    ];
    for line in head.split_inclusive(|b| *b == b'\n') {
        let name = line.split(|b| *b == b':').next().unwrap_or_default().trim_ascii();
        if !OFF.iter().any(|off| name.eq_ignore_ascii_case(off)) {
            out.extend_from_slice(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 512, fields: 8 };

    fn taken(text: &str) -> Result<Option<Parsed>, Http1Error> {
        take(&mut BytesMut::from(text), LIMITS, &mut HeaderMap::new())
    }

    fn parsed(text: &str) -> Parsed {
        taken(text).unwrap_or_else(|error| panic!("{text:?}: {error}")).expect("a whole head")
    }

    #[test]
    fn an_answers_head_is_read_and_what_is_meant_for_the_connection_stays_here() {
        let head = parsed(concat!(
            "HTTP/1.1 200 Fine\r\nServer: x\r\nConnection: keep-alive, X-Own\r\nKeep-Alive: timeout=5\r\n",
            "X-Own: 1\r\nUpgrade: h2c\r\nX-Peregrine-Reason: made-up\r\nContent-Length: 3\r\n\r\nabcHTTP"
        ));
        let names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["server", "content-length"]);
        assert_eq!((head.framing, head.keep_alive), (Some(Framing::Length(3)), true));
        assert_eq!(head.rest, "abcHTTP");
    }

    #[test]
    fn the_end_of_a_body_is_found_by_the_rules_or_refused() {
        let framing = |fields: &str| {
            taken(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).map(|p| p.expect("whole").framing)
        };
        assert_eq!(framing("").expect("fine"), None);
        assert_eq!(
            framing("Content-Length: 5\r\nContent-Length: 5\r\n").expect("fine"),
            Some(Framing::Length(5))
        );
        assert_eq!(framing("Content-Length: 5, 5\r\n").expect("fine"), Some(Framing::Length(5)));
        assert_eq!(framing("Transfer-Encoding: Chunked\r\n").expect("fine"), Some(Framing::Chunked));
        for bad in [
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            "Content-Length: 5, 6\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: \r\n",
            "Content-Length: 99999999999999999999\r\n",
            "Transfer-Encoding: gzip, chunked\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        ] {
            assert!(framing(bad).is_err(), "{bad}");
        }
        assert!(taken("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
    }

    #[test]
    fn a_connection_stays_by_its_versions_rule() {
        let stays = |text: &str| parsed(text).keep_alive;
        assert!(stays("HTTP/1.1 200 OK\r\n\r\n"));
        assert!(!stays("HTTP/1.1 200 OK\r\nConnection: Close\r\n\r\n"));
        assert!(!stays("HTTP/1.0 200 OK\r\n\r\n"));
        assert!(stays("HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n\r\n"));
    }

    #[test]
    fn a_head_in_pieces_is_waited_for_and_one_without_end_is_refused() {
        let whole = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nA: b\r\n\r\n";
        let mut input = BytesMut::new();
        let mut found = Vec::new();
        for byte in whole.bytes() {
            input.extend_from_slice(&[byte]);
            while let Some(head) = take(&mut input, LIMITS, &mut HeaderMap::new()).expect("fine so far") {
                found.push((head.status.as_u16(), head.raw.len()));
            }
        }
        assert_eq!(found, [(103, 40), (200, 25)]);
        let endless = format!("HTTP/1.1 200 OK\r\nA: {}", "x".repeat(512));
        assert!(taken(&endless).is_err());
        assert!(taken(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(9))).is_err());
        assert!(taken("HTTP/1.1 200 OK\r\nA : b\r\n\r\n").is_err());
        assert!(taken("ICY 200 OK\r\n\r\n").is_err());
        assert!(taken("HTTP/1.1 99 Odd\r\n\r\n").is_err());
    }

    #[test]
    fn fields_that_end_here_are_not_in_what_is_passed_on() {
        let mut out = Vec::new();
        clean_interim(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x\r\nContent-Length: 5\r\n\r\n",
            &mut out,
        );
        assert_eq!(out, b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
    }
}
