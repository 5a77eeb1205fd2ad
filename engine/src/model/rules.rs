//! Rules of a service: what its requests have to pass, and what is changed of them and of their answers on the way.
//!
//! Each part says by itself whether an edge could follow it, so that a file and the API give the same answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{CompressionSpec, HashBy, HiddenValues};

/// Rules of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulesSpec {
    /// Networks whose clients are served (`10.0.0.0/8`, `2001:db8::1`); empty: all.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Networks whose clients are not served.
    #[serde(default)]
    pub deny: Vec<String>,
    /// Requests in flight at a time; 0 is no limit.
    #[serde(default)]
    pub max_in_flight: u32,
    /// Requests of one client over time.
    #[serde(default)]
    pub rate_limit: Option<RateLimitSpec>,
    /// Changes of header fields.
    #[serde(default)]
    pub headers: HeadersSpec,
    /// Paths that lead elsewhere; the first that fits counts.
    #[serde(default)]
    pub redirects: Vec<RedirectSpec>,
    /// Another path for the origin.
    #[serde(default)]
    pub rewrite: Option<RewriteSpec>,
    /// A password.
    #[serde(default)]
    pub basic_auth: Option<BasicAuthSpec>,
    /// Another server that is asked.
    #[serde(default)]
    pub forward_auth: Option<ForwardAuthSpec>,
    /// Smaller answers.
    #[serde(default)]
    pub compression: Option<CompressionSpec>,
    /// HTML in place of the edge's own pages, by status (`503`) or hundred (`5xx`).
    #[serde(default)]
    pub error_pages: BTreeMap<String, String>,
}

/// So many requests in a time, evenly, with bursts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimitSpec {
    /// Requests …
    pub requests: u32,
    /// … in this time, in milliseconds.
    pub per_ms: u32,
    /// Requests that may come at once.
    pub burst: u32,
    /// What requests are counted by; without that header or cookie, by the client's address.
    pub by: HashBy,
}

/// Changes of header fields, by direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadersSpec {
    /// Of requests on the way to the origin.
    #[serde(default)]
    pub request: HeaderEditsSpec,
    /// Of the origin's answers on the way to the client.
    #[serde(default)]
    pub response: HeaderEditsSpec,
}

/// Changes of the header fields of a message, made in this order. `Debug` hides the values: they may be credentials.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderEditsSpec {
    /// Fields that are taken off.
    #[serde(default)]
    pub remove: Vec<String>,
    /// Fields that get this value and no other.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
    /// Fields that get one more value.
    #[serde(default)]
    pub add: BTreeMap<String, String>,
}

impl std::fmt::Debug for HeaderEditsSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeaderEditsSpec")
            .field("remove", &self.remove)
            .field("set", &HiddenValues(&self.set))
            .field("add", &HiddenValues(&self.add))
            .finish()
    }
}

/// A path that is answered with another address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedirectSpec {
    /// A path, or with `/*` at its end a path and all below it, whose rest is kept.
    pub from: String,
    /// A path, or an address with `http` or `https`.
    pub to: String,
    /// 301, 302, 307 or 308.
    pub status: u16,
}

/// Another path for the origin. The path before that decides on the route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewriteSpec {
    /// Taken off where a path begins with it.
    #[serde(default)]
    pub strip_prefix: Option<String>,
    /// Put before it.
    #[serde(default)]
    pub add_prefix: Option<String>,
}

/// A password asked of every request. `Debug` hides the hashes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BasicAuthSpec {
    /// What the password is for, as browsers show it.
    pub realm: String,
    /// Names with the hashes of their passwords: argon2id or bcrypt.
    pub users: BTreeMap<String, String>,
    /// Whether `Authorization` goes on to the origin.
    #[serde(default)]
    pub forward: bool,
}

impl std::fmt::Debug for BasicAuthSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BasicAuthSpec")
            .field("realm", &self.realm)
            .field("users", &HiddenValues(&self.users))
            .field("forward", &self.forward)
            .finish()
    }
}

/// Another server that decides whether a request goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardAuthSpec {
    /// `http://HOST:PORT/PATH`.
    pub url: String,
    /// Fields of its answer that the request goes on with.
    #[serde(default)]
    pub copy_headers: Vec<String>,
    /// Longest time for an answer.
    pub timeout_ms: u32,
}

/// Why no edge could follow a part of the rules, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unfit {
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub hint: String,
}

pub(super) fn unfit(message: impl Into<String>, hint: impl Into<String>) -> Unfit {
    Unfit { message: message.into(), hint: hint.into() }
}

impl RulesSpec {
    /// Networks in one list: each is looked at for each request.
    pub const MAX_NETWORKS: usize = 256;
    /// Fields that one list changes: each is looked for in each message.
    pub const MAX_EDITS: usize = 64;
    /// Longest value that a field is given.
    pub const MAX_VALUE_BYTES: usize = 4_096;
    /// Redirects of one service: each is looked at for each request.
    pub const MAX_REDIRECTS: usize = 256;
    /// Longest path or address in a redirect or rewrite.
    pub const MAX_PATH_BYTES: usize = 1_024;
    /// Accounts of one service.
    pub const MAX_USERS: usize = 1_024;
    /// Longest name of an account, and longest realm.
    pub const MAX_NAME_BYTES: usize = 128;
    /// How long another server may take to decide, unless it is said.
    pub const AUTH_TIMEOUT_MS: u32 = 5_000;
    /// How long it may be given.
    pub const MAX_AUTH_TIMEOUT_MS: u32 = 60_000;

    /// Whether every edge could follow these rules, but for networks and the rate.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check_changes(&self) -> Result<(), Unfit> {
        self.headers.request.check()?;
        self.headers.response.check()?;
        if self.redirects.len() > Self::MAX_REDIRECTS {
            return Err(unfit(
                format!("there are {} redirects", self.redirects.len()),
                format!(
                    "Write at most {}; a path with /* at its end stands for all below it.",
                    Self::MAX_REDIRECTS
                ),
            ));
        }
        self.redirects.iter().try_for_each(RedirectSpec::check)?;
        self.check_circles()?;
        self.rewrite.as_ref().map_or(Ok(()), RewriteSpec::check)?;
        self.basic_auth.as_ref().map_or(Ok(()), BasicAuthSpec::check)?;
        self.forward_auth.as_ref().map_or(Ok(()), ForwardAuthSpec::check)?;
        self.compression.as_ref().map_or(Ok(()), CompressionSpec::check)?;
        self.check_error_pages()
    }
}

impl RulesSpec {
    /// Whether redirects that lead to a path of this service come to an end.
    fn check_circles(&self) -> Result<(), Unfit> {
        let rendered: Vec<_> = self.redirects.iter().map(RedirectSpec::rendered).collect();
        for redirect in &self.redirects {
            let mut at = redirect.to.clone();
            let mut hops = 0;
            // The path as a client asks for it, in the form in which it is matched.
            while at.starts_with('/')
                && let Ok(canonical) =
                    peregrine_routing::canonical_path(at.split('?').next().unwrap_or_default())
                && let Some(next) = rendered.iter().find_map(|one| one.location(&canonical.path, None))
            {
                hops += 1;
                if hops > self.redirects.len() || next.len() > Self::MAX_PATH_BYTES {
                    return Err(unfit(
                        format!(
                            "the redirect from {:?} to {:?} leads in a circle",
                            redirect.from, redirect.to
                        ),
                        "Write a path that no redirect is for, or the address of another site.",
                    ));
                }
                at = next;
            }
        }
        Ok(())
    }
}

impl HeaderEditsSpec {
    /// Whether these are fields with values, and none of the edge's own.
    ///
    /// # Errors
    /// The first one that is not.
    pub fn check(&self) -> Result<(), Unfit> {
        for count in [self.remove.len(), self.set.len(), self.add.len()] {
            if count > RulesSpec::MAX_EDITS {
                let hint = format!("Write at most {} in one list.", RulesSpec::MAX_EDITS);
                return Err(unfit(format!("{count} header fields are changed"), hint));
            }
        }
        for name in self.remove.iter().chain(self.set.keys()).chain(self.add.keys()) {
            field_name(name)?;
        }
        for (name, value) in self.set.iter().chain(&self.add) {
            let sound = http::HeaderValue::from_str(value).is_ok() && value.trim() == value;
            if !sound || value.len() > RulesSpec::MAX_VALUE_BYTES {
                // The value may be a secret: it is not shown.
                return Err(unfit(
                    format!("the value for the header field {name:?} is none"),
                    format!(
                        "Write one line without spaces at its ends, at most {} bytes.",
                        RulesSpec::MAX_VALUE_BYTES
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Whether a field may be changed by rules.
fn field_name(name: &str) -> Result<(), Unfit> {
    const MAX_NAME_BYTES: usize = 128;
    if name.len() > MAX_NAME_BYTES || http::HeaderName::from_bytes(name.as_bytes()).is_err() {
        let short: String = name.chars().take(MAX_NAME_BYTES).collect();
        return Err(unfit(
            format!("{short:?} is no name of a header field"),
            "Use letters, digits and hyphens, such as x-tenant.",
        ));
    }
    if peregrine_routing::is_guarded_field(name) {
        return Err(unfit(
            format!("the header field {name:?} cannot be changed: it frames, routes or identifies"),
            "The edge alone writes such fields (docs/security.md). Take it out, or use a name of your own.",
        ));
    }
    Ok(())
}

/// A path that is written as it is matched.
fn canonical(what: &str, path: &str) -> Result<(), Unfit> {
    let canonical = peregrine_routing::canonical_path(path)
        .is_ok_and(|canonical| canonical.path == path && canonical.other_reading.is_none());
    if canonical && path.len() <= RulesSpec::MAX_PATH_BYTES {
        return Ok(());
    }
    Err(unfit(
        format!("{what} {path:?} is no path as requests are matched"),
        "Write it from the first slash on, without a query, dot segments, ; or escapes that need none, such as /old.",
    ))
}

impl RedirectSpec {
    /// The path that it is for, and whether also for what is below it.
    #[must_use]
    pub fn from_parts(&self) -> (&str, bool) {
        self.from.strip_suffix("/*").map_or((&*self.from, false), |path| (path, true))
    }

    /// Whether an edge could follow it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unfit> {
        let (from, below) = self.from_parts();
        if !(below && from.is_empty()) {
            canonical("the redirect from", from)?;
        }
        if ![301, 302, 307, 308].contains(&self.status) {
            let message = format!("the redirect from {:?} has the status {}", self.from, self.status);
            return Err(unfit(message, "Write 301, 302, 307 or 308."));
        }
        self.check_to(below)?;
        let redirect = self.rendered();
        if self.to.starts_with('/')
            && redirect.location(self.to.split('?').next().unwrap_or_default(), None).is_some()
        {
            return Err(unfit(
                format!("the redirect from {:?} to {:?} leads to itself", self.from, self.to),
                "Write a path that it is not for, or the address of another site.",
            ));
        }
        Ok(())
    }

    fn check_to(&self, below: bool) -> Result<(), Unfit> {
        let to = &*self.to;
        let is_site = || {
            let uri = to.parse::<http::Uri>().ok();
            uri.is_some_and(|uri| {
                matches!(uri.scheme_str(), Some("http" | "https"))
                    && uri
                        .authority()
                        .is_some_and(|host| !host.host().is_empty() && !host.as_str().contains('@'))
            })
        };
        let is_path = to.starts_with('/') && !to.starts_with("//");
        let plain = to.bytes().all(|b| b.is_ascii_graphic() && !b"\\\"<>^`{|}#".contains(&b));
        if !plain || to.len() > RulesSpec::MAX_PATH_BYTES || !(is_path || is_site()) {
            return Err(unfit(
                format!("the redirect from {:?} leads to {to:?}, which is no path and no address", self.from),
                "Write a path such as /new, or an address such as https://shop.example.com/new, escaped and without #.",
            ));
        }
        if below && to.contains('?') {
            return Err(unfit(
                format!("the redirect from {:?} has a query before the rest of the path", self.from),
                "Take the query out: the request's own is kept.",
            ));
        }
        Ok(())
    }

    /// As edges follow it.
    pub(crate) fn rendered(&self) -> peregrine_routing::Redirect {
        let (from, below) = self.from_parts();
        peregrine_routing::Redirect {
            from: from.into(),
            below,
            to: self.to.as_str().into(),
            status: self.status,
        }
    }
}

impl RewriteSpec {
    /// Whether an edge could follow it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unfit> {
        for (what, prefix) in [("strip_prefix", &self.strip_prefix), ("add_prefix", &self.add_prefix)] {
            let Some(prefix) = prefix else { continue };
            canonical(what, prefix)?;
            if prefix.ends_with('/') {
                return Err(unfit(
                    format!("{what} {prefix:?} ends in a slash"),
                    "Write it without, such as /api: it ends where a segment of the path does.",
                ));
            }
        }
        if self.strip_prefix.is_none() && self.add_prefix.is_none() {
            return Err(unfit(
                "the rewrite changes nothing",
                "Give it strip_prefix or add_prefix, or take it out.",
            ));
        }
        Ok(())
    }
}

impl BasicAuthSpec {
    /// Whether these are accounts that an edge would let in.
    ///
    /// # Errors
    /// Why not. Hashes are not shown.
    pub fn check(&self) -> Result<(), Unfit> {
        let visible = |text: &str| text.bytes().all(|b| (b' '..0x7f).contains(&b) && !b"\"\\".contains(&b));
        if self.realm.is_empty() || !visible(&self.realm) || self.realm.len() > RulesSpec::MAX_NAME_BYTES {
            return Err(unfit(
                format!("basic_auth has the realm {:?}", self.realm),
                format!(
                    "Write up to {} characters of ASCII without quotes, such as Staff.",
                    RulesSpec::MAX_NAME_BYTES
                ),
            ));
        }
        if self.users.is_empty() || self.users.len() > RulesSpec::MAX_USERS {
            return Err(unfit(
                format!("basic_auth has {} users", self.users.len()),
                format!("Give it 1 to {}, each with the hash of a password.", RulesSpec::MAX_USERS),
            ));
        }
        for (name, hash) in &self.users {
            let control = name.chars().any(char::is_control);
            if name.is_empty() || name.len() > RulesSpec::MAX_NAME_BYTES || name.contains(':') || control {
                return Err(unfit(
                    format!("basic_auth has a user {name:?}"),
                    format!("Write up to {} bytes without a colon (RFC 7617).", RulesSpec::MAX_NAME_BYTES),
                ));
            }
            peregrine_routing::PasswordHash::parse(hash).map_err(|error| {
                unfit(
                    format!("the password of the user {name:?}: {error}"),
                    "Write the hash that `argon2 SALT -id -e` or `htpasswd -nB NAME` prints, never the password itself.",
                )
            })?;
        }
        Ok(())
    }
}

impl ForwardAuthSpec {
    /// Whether an edge could ask there.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unfit> {
        let Self { url, copy_headers, timeout_ms } = self;
        if self.place().is_none() || url.len() > RulesSpec::MAX_PATH_BYTES {
            return Err(unfit(
                format!("forward_auth asks {url:?}, which is no address on plain HTTP"),
                "Write http://HOST:PORT/PATH, such as http://127.0.0.1:9091/verify; https and names of users are not for it.",
            ));
        }
        if copy_headers.len() > RulesSpec::MAX_EDITS {
            let message = format!("forward_auth copies {} header fields", copy_headers.len());
            return Err(unfit(message, format!("Write at most {}.", RulesSpec::MAX_EDITS)));
        }
        copy_headers.iter().try_for_each(|name| field_name(name))?;
        if !(1..=RulesSpec::MAX_AUTH_TIMEOUT_MS).contains(timeout_ms) {
            return Err(unfit(
                format!("forward_auth waits for {timeout_ms} ms"),
                format!("Write 1 to {} ms.", RulesSpec::MAX_AUTH_TIMEOUT_MS),
            ));
        }
        Ok(())
    }

    /// Host with port, and the path with its query.
    fn place(&self) -> Option<(String, String)> {
        const HTTP_PORT: u16 = 80;
        let uri = self.url.parse::<http::Uri>().ok().filter(|uri| uri.scheme_str() == Some("http"))?;
        let authority = uri.authority()?;
        let (host, port) = (authority.host(), authority.port_u16().unwrap_or(HTTP_PORT));
        let place = format!("{host}:{port}");
        // A user would be in front of the host; a port that is none behind it.
        let whole = authority.as_str() == host || authority.as_str() == place;
        let sound = whole && crate::render::address(&place).is_some() && !self.url.contains('#');
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        (sound && path.starts_with('/')).then(|| (place, path.to_owned()))
    }

    /// As edges follow it. One that cannot be read lets nobody in.
    pub(crate) fn rendered(&self) -> peregrine_routing::ForwardAuth {
        let (authority, path) = self.place().unwrap_or_default();
        peregrine_routing::ForwardAuth {
            authority: authority.into(),
            path: path.into(),
            copy_headers: self.copy_headers.iter().map(|name| name.to_ascii_lowercase().into()).collect(),
            timeout_ms: self.timeout_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edits(set: &[(&str, &str)], remove: &[&str]) -> HeaderEditsSpec {
        HeaderEditsSpec {
            set: set.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            remove: remove.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn fields_that_frame_route_or_identify_cannot_be_changed_and_rubbish_neither() {
        assert_eq!(edits(&[("X-Tenant", "a b")], &["server"]).check(), Ok(()));
        for (name, value) in [
            ("host", "x"),
            ("Content-Length", "1"),
            ("x_forwarded_for", "1.1.1.1"),
            ("connection", "close"),
            ("x-request-id", "1"),
            ("bad name", "x"),
            ("", "x"),
            ("x-a", "two\r\nlines"),
            ("x-a", " spaces "),
            ("x-a", "ü\u{7f}"),
        ] {
            let error = edits(&[(name, value)], &[]).check().expect_err(name);
            assert!(!error.hint.is_empty() && error.message.contains(&format!("{name:?}")), "{error:?}");
            assert!(value.len() < 2 || !error.message.contains(value), "{error:?}");
        }
        assert!(edits(&[], &["transfer-encoding"]).check().is_err());
    }

    #[test]
    fn a_redirect_that_no_browser_could_follow_is_refused() {
        let of =
            |from: &str, to: &str, status| RedirectSpec { from: from.into(), to: to.into(), status }.check();
        for (from, to) in [
            ("/old", "/new"),
            ("/old", "/new?x=1"),
            ("/old/*", "/new/"),
            ("/old/*", "https://new.test"),
            ("/*", "https://new.test:8443/shop"),
            ("/", "/shop"),
        ] {
            assert_eq!(of(from, to, 308), Ok(()), "{from} {to}");
        }
        for (from, to, status) in [
            ("/old", "/new", 303),
            ("/old", "/new", 200),
            ("old", "/new", 301),
            ("/old/../x", "/new", 301),
            ("/old?x", "/new", 301),
            ("/old", "new", 301),
            ("/old", "//evil.test", 301),
            ("/old", "javascript:alert(1)", 301),
            ("/old", "ftp://new.test/", 301),
            ("/old", "https://user@new.test/", 301),
            ("/old", "/new\r\nx: y", 301),
            ("/old", "/new#part", 301),
            ("/old/*", "/new?x=1", 301),
            ("/old", "/old", 301),
            ("/old/*", "/old/new", 301),
            ("/*", "/new", 301),
        ] {
            assert!(of(from, to, status).is_err(), "{from} {to} {status}");
        }
    }

    #[test]
    fn redirects_that_lead_in_a_circle_are_refused_however_they_are_spelled() {
        let of = |redirects: &[(&str, &str)]| {
            let redirect = |(from, to): &(&str, &str)| RedirectSpec {
                from: from.to_string(),
                to: to.to_string(),
                status: 308,
            };
            RulesSpec { redirects: redirects.iter().map(redirect).collect(), ..Default::default() }
                .check_changes()
        };
        for sound in [
            &[("/a", "/b"), ("/b", "/c"), ("/c", "https://new.test/a")][..],
            &[("/a", "/b"), ("/b", "/c"), ("/d", "/a")],
            &[("/old/*", "/new"), ("/new", "/")],
        ] {
            assert_eq!(of(sound), Ok(()), "{sound:?}");
        }
        for circle in [
            &[("/a", "/b"), ("/b", "/a")][..],
            &[("/old", "/%6fld")],
            &[("/old", "/./old")],
            &[("/a", "/b"), ("/b", "/c?x=1"), ("/c", "/a")],
            &[("/a/*", "/b"), ("/b/*", "/a/x")],
            &[("/x", "/y"), ("/y/*", "/y/z")],
        ] {
            assert!(of(circle).is_err(), "{circle:?}");
        }
    }

    #[test]
    fn accounts_have_hashes_that_are_not_shown() {
        let hash = "$2b$10$aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
        let of = |realm: &str, users: &[(&str, &str)]| BasicAuthSpec {
            realm: realm.into(),
            users: users.iter().map(|(name, hash)| (name.to_string(), hash.to_string())).collect(),
            forward: false,
        };
        let sound = of("Staff", &[("alice", hash)]);
        assert_eq!(sound.check(), Ok(()));
        assert!(!format!("{sound:?}").contains(hash) && format!("{sound:?}").contains("alice"));
        for bad in [
            of("", &[("alice", hash)]),
            of("Sta\"ff", &[("alice", hash)]),
            of("Staff", &[]),
            of("Staff", &[("a:b", hash)]),
            of("Staff", &[("", hash)]),
            of("Staff", &[("alice", "hunter2")]),
            of("Staff", &[("alice", "$2b$15$aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")]),
        ] {
            let error = bad.check().expect_err("is refused");
            assert!(!error.message.contains("hunter2") && !error.message.contains("$2b"), "{error:?}");
        }
    }

    #[test]
    fn another_server_is_asked_on_plain_http_at_a_place() {
        let of = |url: &str, copy: &[&str], timeout_ms| ForwardAuthSpec {
            url: url.into(),
            copy_headers: copy.iter().map(ToString::to_string).collect(),
            timeout_ms,
        };
        for (url, authority, path) in [
            ("http://127.0.0.1:9091/verify?a=b", "127.0.0.1:9091", "/verify?a=b"),
            ("http://auth.internal", "auth.internal:80", "/"),
            ("http://[::1]:9091/", "[::1]:9091", "/"),
        ] {
            let spec = of(url, &["X-User"], 5_000);
            assert_eq!(spec.check(), Ok(()), "{url}");
            let rendered = spec.rendered();
            assert_eq!(
                (&*rendered.authority, &*rendered.path, &*rendered.copy_headers[0]),
                (authority, path, "x-user")
            );
        }
        for bad in [
            "https://a:1/",
            "a:1",
            "/verify",
            "http://u@a:1/",
            "http://a:0/",
            "http://a:99999/",
            "http:///x",
            "",
        ] {
            assert!(of(bad, &[], 1).check().is_err(), "{bad}");
        }
        assert!(of("http://a:1/", &["host"], 1).check().is_err());
        assert!(
            of("http://a:1/", &[], 0).check().is_err() && of("http://a:1/", &[], 60_001).check().is_err()
        );
    }

    #[test]
    fn a_rewrite_has_whole_segments() {
        let of = |strip: Option<&str>, add: Option<&str>| {
            RewriteSpec { strip_prefix: strip.map(Into::into), add_prefix: add.map(Into::into) }.check()
        };
        assert_eq!(of(Some("/api"), Some("/v2/x")), Ok(()));
        for bad in ["/", "/api/", "api", "/a/../b", "/a;b", "/a%2fb", "//a", ""] {
            assert!(of(Some(bad), None).is_err() && of(None, Some(bad)).is_err(), "{bad}");
        }
        assert!(of(None, None).is_err());
    }
}
