//! Header rules: what ends at the edge, what goes on, and what the edge adds.
//!
//! ```text
//!   scan (one pass over the names) ► checks ► hop-by-hop fields off (RFC 9110 §7.6.1)
//!        ► forwarding fields: a stranger's off, a trusted proxy's extended (RFC 7239)
//!        ► Via, x-request-id, traceparent on
//! ```
//!
//! The received map is changed in place. What the edge adds goes into it only if the client sent a field of
//! that name; the rest is owed, and put on as the upstream's protocol has it.

use bytes::BytesMut;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::conn::ConnState;
use crate::error::Reason;
use crate::ids::Ids;
use crate::tls::{CLIENT_CERT, CLIENT_CERT_CHAIN, CLIENT_CERT_SUBJECT};

pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(crate) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(crate) const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(crate) const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(crate) const X_PEREGRINE_REASON: HeaderName = HeaderName::from_static("x-peregrine-reason");
/// Marks a copy of a request, whose answer nobody gets. Only a trusted proxy may send it.
pub(crate) const PEREGRINE_MIRROR: HeaderName = HeaderName::from_static("peregrine-mirror");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const PROXY_AUTHENTICATE: HeaderName = HeaderName::from_static("proxy-authenticate");
const PROXY_AUTHORIZATION: HeaderName = HeaderName::from_static("proxy-authorization");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");
const HTTP: HeaderValue = HeaderValue::from_static("http");
const HTTPS: HeaderValue = HeaderValue::from_static("https");

/// Which fields that matter to an edge are there. One bit each.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen(u32);

macro_rules! bits {
    ($($name:ident = $bit:literal;)*) => { impl Seen { $(pub(crate) const $name: u32 = 1 << $bit;)* } };
}

bits! {
    CONNECTION = 0; HOP = 1; TE = 2; TRANSFER_ENCODING = 3; UPGRADE = 4; EXPECT = 5; COOKIE = 6;
    CONTENT_LENGTH = 7; VIA = 8; FORWARDING = 9; REQUEST_ID = 10; TRACEPARENT = 11; UNDERSCORE = 12;
    HOST = 13; REASON = 14; TRAILER = 15; ACCEPT = 16;
}

impl Seen {
    /// Looks at every name once.
    pub(crate) fn scan(headers: &HeaderMap) -> Self {
        let mut seen = 0;
        for name in headers.keys() {
            seen |= Self::bit_of(name.as_str());
        }
        Self(seen)
    }

    pub(crate) const fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }

    /// The bit of a name in lower case; 0 if it does not matter.
    pub(crate) fn bit_of(name: &str) -> u32 {
        match name.len() {
            2 if name == "te" => Self::TE,
            3 if name == "via" => Self::VIA,
            4 if name == "host" => Self::HOST,
            6 if name == "accept" => Self::ACCEPT,
            6 if name == "expect" => Self::EXPECT,
            6 if name == "cookie" => Self::COOKIE,
            7 if name == "upgrade" => Self::UPGRADE,
            7 if name == "trailer" => Self::TRAILER,
            9 if name == "forwarded" => Self::FORWARDING,
            9 if name == "x-real-ip" => Self::FORWARDING,
            10 if name == "connection" => Self::CONNECTION,
            10 if name == "keep-alive" => Self::HOP,
            11 if name == "client-cert" => Self::FORWARDING,
            11 if name == "traceparent" => Self::TRACEPARENT,
            12 if name == "x-request-id" => Self::REQUEST_ID,
            14 if name == "content-length" => Self::CONTENT_LENGTH,
            14 if name == "http2-settings" => Self::HOP,
            16 if name == "proxy-connection" => Self::HOP,
            16 if name == "peregrine-mirror" => Self::FORWARDING,
            17 if name == "client-cert-chain" => Self::FORWARDING,
            17 if name == "transfer-encoding" => Self::TRANSFER_ENCODING,
            18 if name == "proxy-authenticate" => Self::HOP,
            18 if name == "x-peregrine-reason" => Self::REASON,
            19 if name == "proxy-authorization" => Self::HOP,
            21 if name == "x-client-cert-subject" => Self::FORWARDING,
            _ if name.starts_with("x-forwarded-") => {
                // Both, or a twin of one of them would pass for the field itself.
                Self::FORWARDING | if name.contains('_') { Self::UNDERSCORE } else { 0 }
            }
            _ if name.as_bytes().contains(&b'_') => Self::UNDERSCORE,
            _ => 0,
        }
    }
}

/// What the fields of a request say about how it is to be forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// A real upgrade of an HTTP/1.1 connection.
    pub(crate) upgrade: bool,
    /// `Expect: 100-continue`.
    pub(crate) expects_continue: bool,
    /// `TE: trailers`.
    pub(crate) trailers: bool,
}

/// Checks the fields that decide on framing and on the connection. What is wrong here never goes on.
pub(crate) fn check(headers: &HeaderMap, seen: Seen, http11: bool, has_body: bool) -> Result<Wishes, Reason> {
    let mut wishes = Wishes::default();
    if seen.has(Seen::TRANSFER_ENCODING) {
        let mut values = headers.get_all(TRANSFER_ENCODING).iter();
        let only = values.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !only || values.next().is_some() {
            return Err(Reason::BadTransferEncoding);
        }
        if seen.has(Seen::CONTENT_LENGTH) {
            return Err(Reason::ConflictingLength);
        }
    }
    if seen.has(Seen::EXPECT) {
        let all_known = headers
            .get_all(EXPECT)
            .iter()
            .all(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        if !all_known {
            return Err(Reason::ExpectationFailed);
        }
        wishes.expects_continue = has_body;
    }
    if seen.has(Seen::TE) {
        wishes.trailers = has_token(headers, &TE, "trailers");
    }
    if seen.has(Seen::UPGRADE) && http11 && has_token(headers, &CONNECTION, "upgrade") {
        // h2c by Upgrade is obsolete (RFC 9113 §3.1), and through a proxy it is a way around its rules.
        wishes.upgrade = !has_token(headers, &UPGRADE, "h2c");
        if wishes.upgrade && has_body {
            return Err(Reason::UpgradeWithBody);
        }
    }
    Ok(wishes)
}

/// What `Connection` said (RFC 9110 §7.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Nothing, or `keep-alive` alone.
    Nothing,
    /// `close` alone.
    Close,
    /// Something else: fields that it nominated may have been taken off.
    Other,
}

/// Takes off what is meant for this connection only (RFC 9110 §7.6.1).
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap, seen: Seen) -> Asked {
    let mut asked = Asked::Nothing;
    if seen.has(Seen::CONNECTION) {
        asked = what_is_asked(headers);
        if asked == Asked::Other {
            strip_nominated(headers);
        }
        headers.remove(CONNECTION);
    }
    if seen.has(Seen::HOP) {
        for name in [KEEP_ALIVE, PROXY_CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, HTTP2_SETTINGS] {
            headers.remove(name);
        }
    }
    if seen.has(Seen::TE) {
        headers.remove(TE);
    }
    if seen.has(Seen::TRANSFER_ENCODING) {
        headers.remove(TRANSFER_ENCODING);
    }
    if seen.has(Seen::UPGRADE) {
        headers.remove(UPGRADE);
    }
    asked
}

/// Nearly every `Connection` is a single `close` or `keep-alive`. (Not by `entry`: that makes room for one more field,
/// and with it a new map.)
fn what_is_asked(headers: &HeaderMap) -> Asked {
    let mut values = headers.get_all(CONNECTION).into_iter().map(HeaderValue::as_bytes);
    match (values.next(), values.next()) {
        (Some(only), None) if only.eq_ignore_ascii_case(b"close") => Asked::Close,
        (Some(only), None) if only.eq_ignore_ascii_case(b"keep-alive") => Asked::Nothing,
        _ => Asked::Other,
    }
}

/// Fields that are no option of a connection whatever it says. To take off one that frames the message would let its body
/// pass for the next request, and one that the edge adds or believes would change what is known of the client.
const NOT_NOMINATED: u32 =
    Seen::CONTENT_LENGTH | Seen::HOST | Seen::FORWARDING | Seen::VIA | Seen::REQUEST_ID | Seen::TRACEPARENT;

pub(crate) fn strip_nominated(headers: &mut HeaderMap) {
    let mut nominated: Vec<HeaderName> = Vec::new();
    for value in headers.get_all(CONNECTION) {
        for token in value.as_bytes().split(|b| *b == b',').map(<[u8]>::trim_ascii) {
            let common = [&b"keep-alive"[..], b"close", b"upgrade", b"te"];
            if common.iter().any(|known| token.eq_ignore_ascii_case(known)) {
                continue;
            }
            let name = HeaderName::from_bytes(token).ok();
            nominated.extend(name.filter(|name| Seen::bit_of(name.as_str()) & NOT_NOMINATED == 0));
        }
    }
    for name in nominated {
        headers.remove(name);
    }
}

/// What the edge adds to a request.
pub(crate) struct Added<'a> {
    pub(crate) ids: &'a Ids,
    pub(crate) via: &'a HeaderValue,
    /// The host as the client sent it; `None` in HTTP/1.0.
    pub(crate) host: Option<&'a HeaderValue>,
}

/// Fields that the edge adds and of which the client has sent none. They are owed until the upstream is
/// known: to HTTP/1.1 they go as lines ([`write_owed`]), which costs a fraction of what a map does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Owed(u8);

impl Owed {
    const FORWARDING: u8 = 1;
    const VIA: u8 = 1 << 1;
    const REQUEST_ID: u8 = 1 << 2;
    const TRACEPARENT: u8 = 1 << 3;
    /// Those whose lines are the same for every request of a connection to one host.
    const STEADY: u8 = Self::FORWARDING | Self::VIA;

    const fn has(self, bits: u8) -> bool {
        self.0 & bits == bits
    }
}

/// Brings what the client sent of the forwarding fields, `Via` and the ids into the form in which it goes
/// on, and says which of them are owed because it sent none.
pub(crate) fn settle(headers: &mut HeaderMap, seen: Seen, conn: &ConnState, added: &Added<'_>) -> Owed {
    let mut owed = 0;
    if seen.has(Seen::UNDERSCORE) {
        strip_lookalikes(headers);
    }
    if seen.has(Seen::FORWARDING) && conn.trusted {
        extend_forwarding(headers, conn, added);
    } else {
        if seen.has(Seen::FORWARDING) {
            strip_forwarding(headers);
        }
        owed |= Owed::FORWARDING;
    }
    if seen.has(Seen::VIA) {
        headers.append(VIA, added.via.clone());
    } else {
        owed |= Owed::VIA;
    }
    if seen.has(Seen::REQUEST_ID) {
        headers.insert(X_REQUEST_ID, added.ids.request.clone());
    } else {
        owed |= Owed::REQUEST_ID;
    }
    if seen.has(Seen::TRACEPARENT) {
        headers.insert(TRACEPARENT, added.ids.traceparent.clone());
    } else {
        owed |= Owed::TRACEPARENT;
    }
    Owed(owed)
}

/// Puts what is owed into a map.
pub(crate) fn insert_owed(headers: &mut HeaderMap, owed: Owed, conn: &ConnState, added: &Added<'_>) {
    if owed.has(Owed::FORWARDING) {
        headers.insert(X_FORWARDED_FOR, conn.peer_text.to_value());
        headers.insert(X_FORWARDED_PROTO, scheme(conn));
        headers.insert(FORWARDED, forwarded_element(conn, added.host));
        if let Some(host) = added.host {
            headers.insert(X_FORWARDED_HOST, host.clone());
        }
    }
    if owed.has(Owed::VIA) {
        headers.insert(VIA, added.via.clone());
    }
    if owed.has(Owed::REQUEST_ID) {
        headers.insert(X_REQUEST_ID, added.ids.request.clone());
    }
    if owed.has(Owed::TRACEPARENT) {
        headers.insert(TRACEPARENT, added.ids.traceparent.clone());
    }
}

/// Writes what is owed as field lines of HTTP/1.1. Values hold no line end: they are [`HeaderValue`]s.
pub(crate) fn write_owed(out: &mut Vec<u8>, owed: Owed, conn: &ConnState, added: &Added<'_>) {
    if owed.has(Owed::STEADY) {
        write_steady(out, conn, added);
    } else if owed.has(Owed::FORWARDING) {
        write_forwarding(out, conn, added);
    } else if owed.has(Owed::VIA) {
        write_line(out, b"via: ", added.via.as_bytes());
    }
    if owed.has(Owed::REQUEST_ID) {
        write_line(out, b"x-request-id: ", added.ids.request.as_bytes());
    }
    if owed.has(Owed::TRACEPARENT) {
        write_line(out, b"traceparent: ", added.ids.traceparent.as_bytes());
    }
}

fn write_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn write_forwarding(out: &mut Vec<u8>, conn: &ConnState, added: &Added<'_>) {
    let host = added.host.map_or(&b""[..], HeaderValue::as_bytes);
    write_line(out, b"x-forwarded-for: ", conn.peer_text.as_bytes());
    write_line(out, b"x-forwarded-proto: ", scheme_bytes(conn));
    out.extend_from_slice(b"forwarded: ");
    write_forwarded(out, conn, host);
    out.extend_from_slice(b"\r\n");
    if added.host.is_some() {
        write_line(out, b"x-forwarded-host: ", host);
    }
}

/// The steady lines, remembered from a connection's second request on: clients stay with a host and a version.
fn write_steady(out: &mut Vec<u8>, conn: &ConnState, added: &Added<'_>) {
    let host = added.host.map_or(&b""[..], HeaderValue::as_bytes);
    let mut remembered = conn.steady.borrow_mut();
    if !std::mem::replace(&mut remembered.again, true) {
        write_forwarding(out, conn, added);
        write_line(out, b"via: ", added.via.as_bytes());
        return;
    }
    if remembered.host != host || remembered.via != added.via.as_bytes() || remembered.lines.is_empty() {
        remembered.host = host.into();
        remembered.via = added.via.as_bytes().into();
        remembered.lines.clear();
        write_forwarding(&mut remembered.lines, conn, added);
        write_line(&mut remembered.lines, b"via: ", added.via.as_bytes());
    }
    out.extend_from_slice(&remembered.lines);
}

/// [`settle`] and [`insert_owed`] in one.
#[cfg(any(test, fuzzing))]
pub(crate) fn add(headers: &mut HeaderMap, seen: Seen, conn: &ConnState, added: &Added<'_>) {
    let owed = settle(headers, seen, conn, added);
    insert_owed(headers, owed, conn, added);
}

fn extend_forwarding(headers: &mut HeaderMap, conn: &ConnState, added: &Added<'_>) {
    append_to_list(headers, &X_FORWARDED_FOR, &conn.peer_text.to_value());
    append_to_list(headers, &FORWARDED, &forwarded_element(conn, added.host));
    headers.entry(X_FORWARDED_PROTO).or_insert(scheme(conn));
    if let Some(host) = added.host {
        headers.entry(X_FORWARDED_HOST).or_insert_with(|| host.clone());
    }
}

fn append_to_list(headers: &mut HeaderMap, name: &HeaderName, last: &HeaderValue) {
    let mut joined = BytesMut::new();
    for value in headers.get_all(name).iter().chain([last]) {
        if !joined.is_empty() {
            joined.extend_from_slice(b", ");
        }
        joined.extend_from_slice(value.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_maybe_shared(joined.freeze()) {
        headers.insert(name, joined);
    }
}

/// One element of `Forwarded` (RFC 7239 §4).
fn forwarded_element(conn: &ConnState, host: Option<&HeaderValue>) -> HeaderValue {
    let mut text = Vec::with_capacity(128);
    write_forwarded(&mut text, conn, host.map_or(&b""[..], HeaderValue::as_bytes));
    HeaderValue::from_maybe_shared(bytes::Bytes::from(text)).unwrap_or(scheme(conn))
}

fn write_forwarded(out: &mut Vec<u8>, conn: &ConnState, host: &[u8]) {
    let (before, after): (&[u8], &[u8]) =
        if conn.peer_ip().is_ipv4() { (b"for=", b"") } else { (b"for=\"[", b"]\"") };
    out.extend_from_slice(before);
    out.extend_from_slice(conn.peer_text.as_bytes());
    out.extend_from_slice(after);
    // A host has been checked: it holds no quote and no backslash.
    let token = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if !host.is_empty() {
        let quote: &[u8] = if host.iter().all(token) { b"" } else { b"\"" };
        out.extend_from_slice(b";host=");
        out.extend_from_slice(quote);
        out.extend_from_slice(host);
        out.extend_from_slice(quote);
    }
    out.extend_from_slice(b";proto=");
    out.extend_from_slice(scheme_bytes(conn));
}

/// The scheme that the client used with this edge.
fn scheme(conn: &ConnState) -> HeaderValue {
    if conn.is_tls() { HTTPS } else { HTTP }
}

/// The scheme that the client used: with this edge, or with a trusted proxy before it.
pub(crate) fn believed_scheme(headers: &HeaderMap, conn: &ConnState) -> HeaderValue {
    let said = headers.get(X_FORWARDED_PROTO).filter(|_| conn.trusted);
    said.cloned().unwrap_or_else(|| scheme(conn))
}

fn scheme_bytes(conn: &ConnState) -> &'static [u8] {
    if conn.is_tls() { b"https" } else { b"http" }
}

fn strip_forwarding(headers: &mut HeaderMap) {
    headers.remove(FORWARDED);
    headers.remove(X_REAL_IP);
    headers.remove(PEREGRINE_MIRROR);
    for name in [CLIENT_CERT, CLIENT_CERT_CHAIN, CLIENT_CERT_SUBJECT] {
        headers.remove(name);
    }
    let others: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-forwarded-")).cloned().collect();
    for name in others {
        headers.remove(name);
    }
}

/// Origins of the CGI kind take `_` for `-`: such a field would pass for one that the edge guards.
fn strip_lookalikes(headers: &mut HeaderMap) {
    let guarded = |name: &HeaderName| {
        let text = name.as_str();
        text.contains('_') && Seen::bit_of(&text.replace('_', "-")) != 0
    };
    let lookalikes: Vec<HeaderName> = headers.keys().filter(|name| guarded(name)).cloned().collect();
    for name in lookalikes {
        headers.remove(name);
    }
}

/// Joins the crumbs that a cookie field of HTTP/2 may be split into (RFC 9113 §8.2.3).
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(COOKIE).iter();
    let (first, second) = (crumbs.next(), crumbs.next());
    if first.is_none() || second.is_none() {
        return;
    }
    let joined =
        headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b"; "[..]);
    if let Ok(joined) = HeaderValue::from_maybe_shared(bytes::Bytes::from(joined)) {
        headers.insert(COOKIE, joined);
    }
}

/// The value of a cookie.
pub(crate) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let crumbs = headers.get_all(COOKIE).iter().flat_map(|value| value.as_bytes().split(|b| *b == b';'));
    crumbs.map(<[u8]>::trim_ascii).find_map(|crumb| crumb.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// Asks an HTTP/2 upstream for trailers.
pub(crate) fn ask_for_trailers(headers: &mut HeaderMap) {
    headers.insert(TE, TRAILERS);
}

/// Takes off an answer what was meant for the edge only.
pub(crate) fn clean_response(headers: &mut HeaderMap) -> Seen {
    let seen = Seen::scan(headers);
    strip_hop_by_hop(headers, seen);
    if seen.has(Seen::REASON) {
        // The reason is the edge's own word.
        headers.remove(X_PEREGRINE_REASON);
    }
    seen
}

/// Takes off a trailer section what must not come in one (RFC 9110 §6.5.1).
pub(crate) fn clean_trailers(trailers: &mut HeaderMap) {
    trim(trailers);
    let seen = Seen::scan(trailers);
    strip_hop_by_hop(trailers, seen);
    if seen.has(Seen::FORWARDING) {
        strip_forwarding(trailers);
    }
    for name in [HOST, CONTENT_LENGTH, TRAILER, COOKIE, EXPECT] {
        trailers.remove(name);
    }
}

/// Takes the white space off the ends of values. HTTP/1.1 does not hand it over, and HTTP/2 does not allow it (RFC 9113 §8.2.1);
/// clients of gRPC send it all the same.
pub(crate) fn trim(headers: &mut HeaderMap) {
    for value in headers.values_mut() {
        let bytes = value.as_bytes();
        let blank = |b: Option<&u8>| matches!(b, Some(b' ' | b'\t'));
        if blank(bytes.first()) || blank(bytes.last()) {
            let is_sensitive = value.is_sensitive();
            let trimmed = HeaderValue::from_bytes(bytes.trim_ascii());
            *value = trimmed.unwrap_or(HeaderValue::from_static(""));
            value.set_sensitive(is_sensitive);
        }
    }
}

/// Whether a list field holds a token, in any case.
pub(crate) fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let parts = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    parts.map(<[u8]>::trim_ascii).any(|part| part.eq_ignore_ascii_case(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    fn conn(peer: &str, trusted: bool) -> std::rc::Rc<ConnState> {
        ConnState::new(peer.parse().expect("address"), "192.0.2.9:80".parse().expect("address"), trusted, 1)
    }

    fn added_to(headers: &mut HeaderMap, conn: &ConnState, host: &'static str) {
        let seen = Seen::scan(headers);
        let ids = Ids { request: HeaderValue::from_static("r"), traceparent: HeaderValue::from_static("t") };
        let (via, host) = (HeaderValue::from_static("1.1 peregrine"), HeaderValue::from_static(host));
        add(headers, seen, conn, &Added { ids: &ids, via: &via, host: Some(&host) });
    }

    fn all(headers: &HeaderMap, name: &str) -> Vec<String> {
        headers.get_all(name).iter().map(|v| v.to_str().expect("text").to_owned()).collect()
    }

    #[test]
    fn fields_that_end_here_do_not_go_on() {
        let mut headers = map(&[
            ("connection", "close, X-Secret, Content-Length, Host, X-Forwarded-For"),
            ("connection", "keep-alive"),
            ("host", "a"),
            ("content-length", "5"),
            ("x-forwarded-for", "198.51.100.1"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("te", "trailers, deflate"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABk"),
            ("x-kept", "1"),
        ]);
        let seen = Seen::scan(&headers);
        strip_hop_by_hop(&mut headers, seen);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "x-forwarded-for", "x-kept"]);
    }

    #[test]
    fn a_strangers_forwarding_fields_are_replaced() {
        let mut headers = map(&[
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "evil.example"),
            ("x-forwarded-port", "443"),
            ("x_forwarded_for", "1.1.1.1"),
            ("x-real-ip", "1.1.1.1"),
            ("forwarded", "for=1.1.1.1"),
            ("my_own", "1"),
        ]);
        added_to(&mut headers, &conn("203.0.113.9:5", false), "shop.example.com:8080");
        assert_eq!(all(&headers, "x-forwarded-for"), ["203.0.113.9"]);
        assert_eq!(all(&headers, "x-forwarded-proto"), ["http"]);
        assert_eq!(all(&headers, "x-forwarded-host"), ["shop.example.com:8080"]);
        assert_eq!(all(&headers, "forwarded"), ["for=203.0.113.9;host=\"shop.example.com:8080\";proto=http"]);
        for gone in ["x-forwarded-port", "x_forwarded_for", "x-real-ip"] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
        assert!(headers.contains_key("my_own"));
    }

    #[test]
    fn lines_say_the_same_as_the_map() {
        let ids = Ids { request: HeaderValue::from_static("r"), traceparent: HeaderValue::from_static("t") };
        let (via10, via11) = (HeaderValue::from_static("1.0 edge"), HeaderValue::from_static("1.1 edge"));
        let sent: [&[(&'static str, &'static str)]; 5] = [
            &[],
            &[("via", "1.1 front")],
            &[("x-request-id", "r"), ("x-kept", "1")],
            &[("traceparent", "old"), ("x-forwarded-for", "6.6.6.6")],
            &[("via", "1.1 front"), ("forwarded", "for=6.6.6.6"), ("x-forwarded-host", "evil")],
        ];
        for trusted in [false, true] {
            // One connection for all: what it remembers must not end up with another host or version.
            let conn = conn("203.0.113.9:5", trusted);
            for (host, via) in [("a.example", &via11), ("b.example:81", &via11), ("", &via11), ("", &via10)] {
                let host = HeaderValue::from_static(host);
                let added = Added { ids: &ids, via, host: (!host.is_empty()).then_some(&host) };
                for fields in sent {
                    let (mut whole, mut settled) = (map(fields), map(fields));
                    let seen = Seen::scan(&whole);
                    add(&mut whole, seen, &conn, &added);
                    let owed = settle(&mut settled, seen, &conn, &added);
                    let mut lines = Vec::new();
                    write_owed(&mut lines, owed, &conn, &added);
                    for line in String::from_utf8(lines).expect("text").lines() {
                        let (name, value) = line.split_once(": ").expect("a field line");
                        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
                        let before = settled.insert(name, HeaderValue::from_str(value).expect("a value"));
                        assert_eq!(before, None, "{line}");
                    }
                    assert_eq!(settled, whole, "{fields:?}");
                }
            }
        }
    }

    #[test]
    fn a_trusted_proxys_forwarding_fields_are_extended() {
        let mut headers = map(&[
            ("x-forwarded-for", "198.51.100.1"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "shop.example.com"),
            ("forwarded", "for=198.51.100.1;proto=https"),
            ("via", "1.1 front"),
        ]);
        added_to(&mut headers, &conn("[2001:db8::1]:5", true), "inner");
        assert_eq!(all(&headers, "x-forwarded-for"), ["198.51.100.1, 10.0.0.2, 2001:db8::1"]);
        assert_eq!(all(&headers, "x-forwarded-proto"), ["https"]);
        assert_eq!(all(&headers, "x-forwarded-host"), ["shop.example.com"]);
        assert_eq!(
            all(&headers, "forwarded"),
            ["for=198.51.100.1;proto=https, for=\"[2001:db8::1]\";host=inner;proto=http"]
        );
        assert_eq!(all(&headers, "via"), ["1.1 front", "1.1 peregrine"]);
    }

    #[test]
    fn transfer_encoding_is_one_chunked_or_refused() {
        let checked = |fields: &[(&'static str, &'static str)]| {
            let headers = map(fields);
            check(&headers, Seen::scan(&headers), true, true)
        };
        assert!(checked(&[("transfer-encoding", "Chunked")]).is_ok());
        for bad in ["gzip, chunked", "chunked, chunked", "identity", "xchunked", "chunked;q=1", ""] {
            assert_eq!(checked(&[("transfer-encoding", bad)]), Err(Reason::BadTransferEncoding), "{bad}");
        }
        let twice = [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")];
        assert_eq!(checked(&twice), Err(Reason::BadTransferEncoding));
        let both = [("transfer-encoding", "chunked"), ("content-length", "3")];
        assert_eq!(checked(&both), Err(Reason::ConflictingLength));
        assert_eq!(checked(&[("expect", "200-ok")]), Err(Reason::ExpectationFailed));
    }

    #[test]
    fn an_upgrade_is_real_only_with_its_token_and_without_h2c() {
        let upgrade = |value, connection| {
            let headers = map(&[("upgrade", value), ("connection", connection)]);
            check(&headers, Seen::scan(&headers), true, false).map(|wishes| wishes.upgrade)
        };
        assert_eq!(upgrade("websocket", "keep-alive, Upgrade"), Ok(true));
        assert_eq!(upgrade("websocket", "keep-alive"), Ok(false));
        assert_eq!(upgrade("h2c", "Upgrade, HTTP2-Settings"), Ok(false));
        assert_eq!(upgrade("websocket, H2C", "Upgrade"), Ok(false));
        let headers = map(&[("upgrade", "websocket"), ("connection", "upgrade")]);
        assert_eq!(check(&headers, Seen::scan(&headers), true, true), Err(Reason::UpgradeWithBody));
    }

    #[test]
    fn cookie_crumbs_become_one_cookie() {
        let mut headers = map(&[("cookie", "a=1"), ("cookie", "b=2; c=3")]);
        assert_eq!(cookie(&headers, "c"), Some(&b"3"[..]));
        join_cookies(&mut headers);
        assert_eq!(all(&headers, "cookie"), ["a=1; b=2; c=3"]);
        assert_eq!(cookie(&headers, "b"), Some(&b"2"[..]));
        assert_eq!(cookie(&headers, ""), None);
    }

    #[test]
    fn a_trailer_section_changes_neither_framing_nor_routing() {
        let mut trailers = map(&[
            ("grpc-status", "0"),
            ("content-length", "5"),
            ("transfer-encoding", "chunked"),
            ("host", "evil"),
            ("x-forwarded-for", "1.1.1.1"),
            ("connection", "close"),
        ]);
        clean_trailers(&mut trailers);
        assert_eq!(trailers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["grpc-status"]);
    }
}
