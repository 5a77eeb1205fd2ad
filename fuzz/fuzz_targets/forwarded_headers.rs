//! The head of a request on its way to an upstream, by the edge and by a model that goes through a list of fields.
//!
//! First line `PEER`, an address: 10.0.0.0/8 and 2001:db8::/32 are trusted proxies. Then requests on one
//! connection, an empty line after each: `METHOD TARGET VERSION` with version 1.0, 1.1 or 2 and perhaps `body`
//! behind it, and a line `NAME:VALUE` for each field. What no parser would hand over is passed over.

#![no_main]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use libfuzzer_sys::fuzz_target;
use peregrine_proxy::fuzzing::{Client, Forwarded};
use peregrine_proxy::{IpNet, Reason};

/// More than the edge takes of a client.
const MAX_FIELDS: usize = 150;

const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];
/// Names with a twin in `_` that some origins could not tell from it; of `x-forwarded-` there are more.
const GUARDED: [&str; 10] = [
    "content-length",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "transfer-encoding",
    "x-peregrine-reason",
    "x-real-ip",
    "x-request-id",
];

/// By name the values, in order.
type Fields = BTreeMap<String, Vec<Vec<u8>>>;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|b| *b == b'\n');
    let Some(peer) = lines.next().and_then(text).and_then(|line| line.parse::<IpAddr>().ok()) else { return };
    let trusted = ["10.0.0.0/8", "2001:db8::/32"].map(|net| net.parse::<IpNet>().expect("is a network"));
    let client = Client::new(SocketAddr::new(peer, 5), trusted.to_vec());
    let model = Model { peer: peer.to_canonical(), trusted };
    while let Some(line) = lines.next() {
        let fields = lines.by_ref().take_while(|line| !line.is_empty()).take(MAX_FIELDS).filter_map(field);
        let Some(sent) = Sent::read(line, fields.collect()) else { continue };
        model.judge(&sent, client.forward(sent.request(), sent.has_body));
    }
});

fn text(line: &[u8]) -> Option<&str> {
    std::str::from_utf8(line).ok()
}

fn latin1(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

fn field(line: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let colon = line.iter().position(|b| *b == b':')?;
    let name = HeaderName::from_bytes(&line[..colon]).ok()?;
    Some((name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?))
}

struct Sent {
    method: Method,
    uri: Uri,
    version: Version,
    has_body: bool,
    fields: Vec<(HeaderName, HeaderValue)>,
}

impl Sent {
    fn read(line: &[u8], fields: Vec<(HeaderName, HeaderValue)>) -> Option<Self> {
        let mut words = text(line)?.split(' ');
        let method = words.next()?.parse().ok()?;
        let uri = words.next()?.parse().ok()?;
        let version = match words.next()? {
            "1.0" => Version::HTTP_10,
            "1.1" => Version::HTTP_11,
            "2" => Version::HTTP_2,
            _ => return None,
        };
        Some(Self { method, uri, version, has_body: words.next() == Some("body"), fields })
    }

    fn request(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        for (name, value) in &self.fields {
            request.headers_mut().append(name, value.clone());
        }
        request
    }

    fn all(&self, name: &str) -> Vec<&[u8]> {
        let named = self.fields.iter().filter(|(have, _)| have.as_str() == name);
        named.map(|(_, value)| value.as_bytes()).collect()
    }

    /// What a list field says, in small letters.
    fn tokens(&self, name: &str) -> Vec<String> {
        let tokens = self.all(name).join(&b","[..]);
        let tokens = tokens.split(|b| *b == b',').map(|token| token.trim_ascii().to_ascii_lowercase());
        tokens.map(|token| String::from_utf8_lossy(&token).into_owned()).collect()
    }

    /// The host that counts, as it goes on: in another script by its A-labels, with its port.
    fn host(&self) -> Option<Vec<u8>> {
        let authority = self.uri.authority().map(|authority| authority.as_str().as_bytes().to_vec());
        authority.or_else(|| {
            let sent = *self.all("host").first()?;
            let text = text(sent).filter(|text| !text.is_ascii());
            let Some(Ok(labels)) = text.map(peregrine_routing::canonical_host) else {
                return Some(sent.to_vec());
            };
            let port = text
                .and_then(|text| text.rsplit_once(':'))
                .map_or(String::new(), |(_, port)| format!(":{port}"));
            Some(format!("{labels}{port}").into_bytes())
        })
    }

    /// The same request to another spelling of its host.
    fn to(&self, host: &str) -> Option<Request<()>> {
        let mut request = self.request();
        if self.uri.authority().is_some() {
            let mut uri = self.uri.clone().into_parts();
            uri.authority = Some(host.parse().ok()?);
            *request.uri_mut() = Uri::from_parts(uri).ok()?;
        } else {
            request.headers_mut().insert("host", HeaderValue::from_str(host).ok()?);
        }
        Some(request)
    }
}

fn has_one_path(sent: &Sent) -> bool {
    let path = sent.uri.path();
    path == "*" || peregrine_routing::canonical_path(path).is_ok()
}

struct Model {
    peer: IpAddr,
    trusted: [IpNet; 2],
}

impl Model {
    fn judge(&self, sent: &Sent, outcome: Result<Forwarded, Reason>) {
        let forwarded = match outcome {
            Ok(forwarded) => forwarded,
            Err(reason) => return self.is_refused_rightly(sent, reason),
        };
        assert_eq!(self.framing_fault(sent), None, "this must not go on");
        assert!(has_one_path(sent), "a path of two meanings goes on");
        assert_eq!(forwarded.client, self.client(sent), "the client");
        self.has_one_host(sent, &forwarded);
        let mut to_http2 = fields_of(&forwarded.headers);
        let mut to_http1 = fields_of(&forwarded.settled);
        for line in forwarded.lines.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let line = line.strip_suffix(b"\r").expect("a line ends like a line");
            let (name, value) = field(line).expect("the edge writes fields");
            let before = to_http1.insert(name.as_str().to_owned(), vec![value.as_bytes().to_vec()]);
            assert_eq!(before, None, "{name} would go on twice");
        }
        assert_eq!(shown(&to_http1), shown(&to_http2), "both protocols say the same");
        self.has_ids(sent, &mut to_http2);
        assert_eq!(shown(&to_http2), shown(&self.expected(sent)), "from {} {:?}", self.peer, sent.fields);
    }

    // --- what is refused ---

    fn is_refused_rightly(&self, sent: &Sent, reason: Reason) {
        match reason {
            // What a host is, `table_lookup` and the unit tests of hosts know better than this model.
            Reason::BadHost => {
                let host = sent.host().map(|host| String::from_utf8(host).ok());
                let canonical = host.flatten().and_then(|host| {
                    let canonical = peregrine_routing::canonical_host(&host).ok()?;
                    Some(canonical.into_owned())
                });
                let doubted = sent.version == Version::HTTP_2 && sent.uri.authority().is_some();
                assert!(
                    canonical.is_none() || sent.all("host").len() > 1 || doubted,
                    "a good host is refused"
                );
            }
            Reason::BadTarget => {
                let scheme = sent.uri.scheme_str();
                let path = sent.uri.path_and_query().map_or("", |path| path.as_str());
                let fine =
                    matches!(scheme, Some("http" | "https")) || scheme.is_none() && path.starts_with('/');
                assert!(!fine || path == "*", "a good target is refused");
            }
            // What a path's one form is, `table_lookup` and the properties of canonical paths judge.
            Reason::AmbiguousPath => assert!(!has_one_path(sent), "a good path is refused"),
            other => assert_eq!(Some(other), self.framing_fault(sent)),
        }
    }

    fn framing_fault(&self, sent: &Sent) -> Option<Reason> {
        let codings = sent.all("transfer-encoding");
        if !codings.is_empty() {
            if codings.len() > 1 || !codings[0].eq_ignore_ascii_case(b"chunked") {
                return Some(Reason::BadTransferEncoding);
            }
            if !sent.all("content-length").is_empty() {
                return Some(Reason::ConflictingLength);
            }
        }
        if sent.all("expect").iter().any(|value| !value.eq_ignore_ascii_case(b"100-continue")) {
            return Some(Reason::ExpectationFailed);
        }
        let upgrades = sent.version == Version::HTTP_11
            && !sent.all("upgrade").is_empty()
            && sent.tokens("connection").iter().any(|token| token == "upgrade")
            && sent.tokens("upgrade").iter().all(|token| token != "h2c");
        (upgrades && sent.has_body).then_some(Reason::UpgradeWithBody)
    }

    // --- who and where ---

    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|net| net.contains(address))
    }

    fn client(&self, sent: &Sent) -> IpAddr {
        let listed = |name: &str| -> Vec<String> {
            let values = sent.all(name).into_iter().flat_map(|value| listed(&latin1(value)));
            values.filter(|entry| !entry.is_empty()).collect()
        };
        // Quotations are for the standard field alone.
        let plain = sent.all("x-forwarded-for").into_iter().map(latin1).collect::<Vec<_>>().join(",");
        let plain = plain.split(',').map(|entry| entry.trim_matches(is_space).to_owned());
        let mut chain: Vec<_> = plain.filter(|entry| !entry.is_empty()).map(|entry| node(&entry)).collect();
        if chain.is_empty() {
            chain = listed("forwarded").iter().map(|element| named_for(element)).collect();
        }
        let mut client = self.peer;
        while self.trusts(client)
            && let Some(before) = chain.pop()
        {
            client = before.map_or(IpAddr::from([0; 4]), |address| address.to_canonical());
        }
        client
    }

    /// Case, port and a dot at the end do not make another host of it.
    fn has_one_host(&self, sent: &Sent, forwarded: &Forwarded) {
        let Some(host) = sent.host() else {
            assert!(forwarded.host.is_empty() && sent.version == Version::HTTP_10);
            return;
        };
        let host = String::from_utf8(host).expect("a host is text");
        assert!(!forwarded.host.contains(char::is_uppercase) && !forwarded.host.ends_with('.'));
        let end = host.rfind(']').map_or(0, |end| end + 1);
        let bare = &host[..host[end..].find(':').map_or(host.len(), |at| end + at)];
        let client = Client::new(SocketAddr::new(self.peer, 5), self.trusted.to_vec());
        let dotted = if bare.ends_with(['.', ']']) { bare.to_owned() } else { format!("{bare}.") };
        let others = [bare.to_ascii_uppercase(), bare.to_ascii_lowercase(), format!("{bare}:8080"), dotted];
        for other in others {
            let request = sent.to(&other).expect("another spelling of a good host is one");
            let again = client.forward(request, sent.has_body).expect("and is taken too");
            assert_eq!(again.host, forwarded.host, "{host} as {other}");
        }
    }

    // --- what goes on ---

    /// Takes the ids out, after a look at them.
    fn has_ids(&self, sent: &Sent, goes_on: &mut Fields) {
        let mut one = |name: &str| {
            let values = goes_on.remove(name).unwrap_or_default();
            assert_eq!(values.len(), 1, "{name}");
            latin1(&values[0])
        };
        let (id, trace) = (one("x-request-id"), one("traceparent"));
        assert!(is_traceparent(&trace), "{trace:?}");
        let first = |name: &str| sent.all(name).first().map(|value| latin1(value));
        match first("traceparent").filter(|sent| is_traceparent(sent)) {
            Some(sent) => assert_eq!(trace, sent, "a good trace is continued"),
            None => assert!(trace.starts_with("00-")),
        }
        match first("x-request-id").filter(|sent| is_request_id(sent)) {
            Some(sent) => assert_eq!(id, sent, "a good id is kept"),
            None => assert_eq!(id, trace[3..35], "one name finds everything"),
        }
    }

    /// All fields but the ids.
    fn expected(&self, sent: &Sent) -> Fields {
        let nominated = sent.tokens("connection");
        let mut fields = Fields::new();
        for (name, value) in &sent.fields {
            let name = name.as_str();
            // "close" is an option of the connection and never the name of a field (RFC 9110 §7.6.1).
            let ends_here = HOP_BY_HOP.contains(&name)
                || (name != "close" && !is_kept(name) && nominated.iter().any(|token| token == name))
                || ["host", "x-request-id", "traceparent"].contains(&name)
                || is_lookalike(name)
                || (is_forwarding(name) && !self.trusts(self.peer));
            if !ends_here {
                fields.entry(name.to_owned()).or_default().push(value.as_bytes().to_vec());
            }
        }
        if sent.version == Version::HTTP_2
            && let Some(crumbs) = fields.get_mut("cookie")
        {
            *crumbs = vec![crumbs.join(&b"; "[..])];
        }
        let version = match sent.version {
            Version::HTTP_10 => "1.0",
            Version::HTTP_2 => "2.0",
            _ => "1.1",
        };
        fields.entry("via".to_owned()).or_default().push(format!("{version} edge").into_bytes());
        if let Some(host) = sent.host() {
            fields.insert("host".to_owned(), vec![host]);
        }
        self.add_forwarding(&mut fields, sent.host());
        fields
    }

    fn add_forwarding(&self, fields: &mut Fields, host: Option<Vec<u8>>) {
        let peer = match self.peer {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("\"[{v6}]\""),
        };
        let mut element = format!("for={peer}").into_bytes();
        if let Some(host) = &host {
            let quoted = host.iter().any(|b| !b.is_ascii_alphanumeric() && !b"-._".contains(b));
            let quote = if quoted { &b"\""[..] } else { b"" };
            element.extend([b";host=", quote, host, quote].concat());
        }
        element.extend(b";proto=http");
        for (name, last) in [("x-forwarded-for", self.peer.to_string().into_bytes()), ("forwarded", element)]
        {
            let values = fields.entry(name.to_owned()).or_default();
            // Empty elements at the beginning mean nothing (RFC 9110 §5.6.1).
            let from = values.iter().position(|value| !value.is_empty()).unwrap_or(values.len());
            let known = values.split_off(from);
            *values = vec![known.into_iter().chain([last]).collect::<Vec<_>>().join(&b", "[..])];
        }
        fields.entry("x-forwarded-proto".to_owned()).or_insert_with(|| vec![b"http".to_vec()]);
        if let Some(host) = host {
            fields.entry("x-forwarded-host".to_owned()).or_insert_with(|| vec![host]);
        }
    }
}

const fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t')
}

/// The elements of a list with quotations in it.
fn listed(value: &str) -> Vec<String> {
    let mut elements = vec![String::new()];
    let mut characters = value.chars();
    let mut quoted = false;
    while let Some(character) = characters.next() {
        let last = elements.last_mut().expect("there is one");
        match character {
            ',' if !quoted => elements.push(String::new()),
            '\\' if quoted => {
                last.push(character);
                last.extend(characters.next());
            }
            _ => {
                quoted ^= character == '"';
                last.push(character);
            }
        }
    }
    elements.iter().map(|element| element.trim_matches(is_space).to_owned()).collect()
}

/// Whom an element of `Forwarded` names; nobody if it is not `NAME=VALUE` in all of its parts, with one `for` among them.
fn named_for(element: &str) -> Option<IpAddr> {
    let mut named = Vec::new();
    let parts = listed(&element.replace(',', "\u{1}").replace(';', ",").replace('\u{1}', ";"));
    for part in parts {
        // What was swapped lies in quotations only, and no address has it.
        let (name, value) = part.split_once('=')?;
        let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        let value = inner.filter(|_| value.len() > 1).unwrap_or(value);
        if value.contains('"') || inner.is_some() && value.contains('\\') {
            return None;
        }
        if name.eq_ignore_ascii_case("for") {
            named.push(node(value)?);
        }
    }
    if named.len() == 1 { named.pop() } else { None }
}

/// An address, alone or with a port that is a number or hidden.
fn node(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let (address, port) = match text.strip_suffix(']') {
        Some(_) => (text, None),
        None => text.rsplit_once(':').map(|(address, port)| (address, Some(port)))?,
    };
    let fine = port.is_none_or(|port| match port.strip_prefix('_') {
        Some(name) => {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        }
        None => (1..=5).contains(&port.len()) && port.chars().all(|c| c.is_ascii_digit()),
    });
    let v6 = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
    let address = match v6 {
        Some(v6) => IpAddr::V6(v6.parse().ok()?),
        None => IpAddr::V4(address.parse().ok()?),
    };
    fine.then_some(address)
}

fn fields_of(headers: &HeaderMap) -> Fields {
    let mut fields = Fields::new();
    for (name, value) in headers {
        fields.entry(name.as_str().to_owned()).or_default().push(value.as_bytes().to_vec());
    }
    fields
}

/// What frames a message or is guarded by the edge is no option of a connection.
fn is_kept(name: &str) -> bool {
    is_forwarding(name) || ["content-length", "host", "via", "peregrine-mirror"].contains(&name)
}

fn is_forwarding(name: &str) -> bool {
    name == "forwarded" || name == "x-real-ip" || name.starts_with("x-forwarded-")
}

/// Whether origins of the CGI kind, which take `_` for `-`, would take it for a field that is guarded.
fn is_lookalike(name: &str) -> bool {
    let plain = name.replace('_', "-");
    plain != name && (GUARDED.contains(&plain.as_str()) || plain.starts_with("x-forwarded-"))
}

fn is_request_id(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:+/=@~".contains(c))
}

fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(5, '-').collect();
    let hex = |part: &str| part.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
    let [version, trace, parent, flags, rest @ ..] = parts.as_slice() else { return false };
    [version.len(), trace.len(), parent.len(), flags.len()] == [2, 32, 16, 2]
        && [version, trace, parent, flags].iter().all(|part| hex(part))
        && [trace, parent].iter().all(|part| part.chars().any(|c| c != '0'))
        && *version != "ff"
        && (rest.is_empty() || *version != "00")
}

fn shown(fields: &Fields) -> BTreeMap<&str, Vec<String>> {
    let text = |value: &Vec<u8>| value.escape_ascii().to_string();
    fields.iter().map(|(name, values)| (name.as_str(), values.iter().map(text).collect())).collect()
}
