//! Rules of a service: what its requests have to pass, and what is changed on the way.

use std::collections::BTreeMap;

use peregrine_engine::model as engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{FieldError, REDACTED};

/// What requests of a service have to pass before they go on, and what is changed of them and their answers on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Rules {
    /// Networks whose clients are served (`10.0.0.0/8`, `2001:db8::1`); empty: all. Others get 403.
    pub allow: Vec<String>,
    /// Networks whose clients get 403, also if they are allowed.
    pub deny: Vec<String>,
    /// Requests in flight at a time; more get 503. 0 is no limit.
    pub max_in_flight: u32,
    /// Requests of one client over time; more get 429.
    pub rate_limit: Option<RateLimit>,
    /// Changes of header fields.
    pub headers: Headers,
    /// Paths that are answered with another address; the first that fits counts.
    pub redirects: Vec<Redirect>,
    /// Another path for the origin. The path before that decides on the route.
    pub rewrite: Option<Rewrite>,
    /// A password. Who has none gets 401.
    pub basic_auth: Option<BasicAuth>,
    /// Another server that decides whether a request goes on. When it cannot be asked, clients get 503.
    pub forward_auth: Option<ForwardAuth>,
    /// Smaller answers for clients that take them. Off.
    pub compression: Option<Compression>,
    /// HTML in place of the pages that the edge makes itself, by status (`503`) or hundred (`5xx`), for clients that ask for
    /// HTML. `{status}`, `{reason}` and `{request_id}` in it are filled in.
    pub error_pages: BTreeMap<String, String>,
}

/// So many requests in a time, evenly, with bursts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RateLimit {
    /// Requests …
    pub requests: u32,
    /// … in this time.
    pub per_ms: u32,
    /// Requests that may come at once.
    pub burst: u32,
    /// What requests are counted by.
    pub by: RateKey,
}

/// What requests are counted by. One without the header or cookie is counted by its client's address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "key", rename_all = "snake_case")]
pub enum RateKey {
    /// The client's address; of IPv6 its /64.
    ClientAddress,
    /// The value of a header.
    Header {
        /// Name of the header.
        name: String,
    },
    /// The value of a cookie.
    Cookie {
        /// Name of the cookie.
        name: String,
    },
}

/// Changes of header fields, by direction. Fields that frame, route or identify are the edge's alone and refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Headers {
    /// Of requests on the way to the origin.
    pub request: HeaderEdits,
    /// Of the origin's answers on the way to the client.
    pub response: HeaderEdits,
}

/// Changes of the header fields of a message, made in this order. Of requests, the values are `***` in answers: they may be
/// credentials; sent back, that means "as it is".
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct HeaderEdits {
    /// Fields that are taken off.
    pub remove: Vec<String>,
    /// Fields that get this value and no other.
    pub set: BTreeMap<String, String>,
    /// Fields that get one more value.
    pub add: BTreeMap<String, String>,
}

impl std::fmt::Debug for HeaderEdits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeaderEdits")
            .field("remove", &self.remove)
            .field("set", &self.set.keys())
            .field("add", &self.add.keys())
            .finish()
    }
}

/// A path that is answered with another address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Redirect {
    /// A path, or with `/*` at its end a path and all below it, whose rest is kept. The query is kept, too.
    pub from: String,
    /// A path, or an address with `http` or `https`.
    pub to: String,
    /// 301, 302, 307 or 308.
    #[serde(default = "permanent")]
    pub status: u16,
}

const fn permanent() -> u16 {
    308
}

/// Another path for the origin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Rewrite {
    /// Taken off where a path begins with it, on a segment border.
    pub strip_prefix: Option<String>,
    /// Put before it.
    pub add_prefix: Option<String>,
}

/// A password asked of every request.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BasicAuth {
    /// What the password is for, as browsers show it.
    pub realm: String,
    /// Names with the hashes of their passwords, argon2id or bcrypt. In answers the hashes are `***`; sent back, that means
    /// "as it is".
    pub users: BTreeMap<String, String>,
    /// Whether `Authorization` goes on to the origin.
    #[serde(default)]
    pub forward: bool,
}

impl std::fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BasicAuth")
            .field("realm", &self.realm)
            .field("users", &self.users.keys())
            .field("forward", &self.forward)
            .finish()
    }
}

/// Another server that decides whether a request goes on: 2xx lets it, any other answer is the client's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForwardAuth {
    /// `http://HOST:PORT/PATH`, asked with GET on plain HTTP/1.1.
    pub url: String,
    /// Fields of its answer that the request goes on with; the client's own of these names do not.
    #[serde(default)]
    pub copy_headers: Vec<String>,
    /// Longest time for an answer.
    #[serde(default = "auth_timeout_ms")]
    pub timeout_ms: u32,
}

/// Which answers are compressed on their way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Compression {
    /// What may be used; where a client likes several as much, the first.
    pub codings: Vec<Coding>,
    /// Media types: `text/html`, or `text/*` for all that begin so.
    pub types: Vec<String>,
    /// Answers of which it is known that they are smaller go on as they are.
    pub min_bytes: u64,
}

impl Default for Compression {
    fn default() -> Self {
        engine::CompressionSpec::default().twin()
    }
}

/// A content coding, by its name in `Content-Encoding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Coding {
    /// RFC 8878.
    Zstd,
    /// RFC 7932.
    Br,
    /// RFC 1952.
    Gzip,
}

const fn auth_timeout_ms() -> u32 {
    engine::RulesSpec::AUTH_TIMEOUT_MS
}

impl Rules {
    /// Without the hashes of passwords, and without what origins are told in header fields: that may be a credential.
    pub(super) fn redact(&mut self) {
        let hashes = self.basic_auth.iter_mut().flat_map(|auth| auth.users.values_mut());
        let edits = &mut self.headers.request;
        for secret in hashes.chain(edits.set.values_mut()).chain(edits.add.values_mut()) {
            REDACTED.clone_into(secret);
        }
    }
}

/// Puts the present secrets where [`REDACTED`] stands for them.
pub(super) fn fill(
    rules: &mut engine::RulesSpec,
    present: Option<&engine::RulesSpec>,
    errors: &mut Vec<FieldError>,
) {
    let kept = |of: fn(&engine::RulesSpec) -> Option<&BTreeMap<String, String>>| present.and_then(of);
    let users = rules.basic_auth.as_mut().map(|auth| &mut auth.users);
    let edits = &mut rules.headers.request;
    let secrets = [
        ("basic_auth/users", users, kept(|rules| rules.basic_auth.as_ref().map(|auth| &auth.users))),
        ("headers/request/set", Some(&mut edits.set), kept(|rules| Some(&rules.headers.request.set))),
        ("headers/request/add", Some(&mut edits.add), kept(|rules| Some(&rules.headers.request.add))),
    ];
    for (place, values, kept) in secrets {
        for (name, value) in values.into_iter().flatten().filter(|(_, value)| *value == REDACTED) {
            match kept.and_then(|kept| kept.get(name)) {
                Some(kept) => value.clone_from(kept),
                None => errors.push(FieldError::new(
                    format!("/traffic/rules/{place}/{}", name.replace('~', "~0").replace('/', "~1")),
                    format!("\"{REDACTED}\" keeps the present value, and {name} has none: give the value"),
                )),
            }
        }
    }
}

/// The same in the other room.
trait Twin<T> {
    fn twin(&self) -> T;
}

macro_rules! as_it_is {
    ($($type:ty),*) => {$(
        impl Twin<$type> for $type {
            fn twin(&self) -> $type {
                self.clone()
            }
        }
    )*};
}

as_it_is!(String, u16, u32, u64, bool, BTreeMap<String, String>);

impl<A: Twin<B>, B> Twin<Vec<B>> for Vec<A> {
    fn twin(&self) -> Vec<B> {
        self.iter().map(Twin::twin).collect()
    }
}

impl<A: Twin<B>, B> Twin<Option<B>> for Option<A> {
    fn twin(&self) -> Option<B> {
        self.as_ref().map(Twin::twin)
    }
}

/// Twins that have the same fields.
macro_rules! twins {
    ($($wire:ident = $engine:ident { $($field:ident),* })*) => {$(
        impl Twin<engine::$engine> for $wire {
            fn twin(&self) -> engine::$engine {
                engine::$engine { $($field: self.$field.twin()),* }
            }
        }

        impl Twin<$wire> for engine::$engine {
            fn twin(&self) -> $wire {
                $wire { $($field: self.$field.twin()),* }
            }
        }
    )*};
}

twins! {
    Rules = RulesSpec {
        allow, deny, max_in_flight, rate_limit, headers, redirects, rewrite, basic_auth, forward_auth,
        compression, error_pages
    }
    RateLimit = RateLimitSpec { requests, per_ms, burst, by }
    Headers = HeadersSpec { request, response }
    HeaderEdits = HeaderEditsSpec { remove, set, add }
    Redirect = RedirectSpec { from, to, status }
    Rewrite = RewriteSpec { strip_prefix, add_prefix }
    BasicAuth = BasicAuthSpec { realm, users, forward }
    ForwardAuth = ForwardAuthSpec { url, copy_headers, timeout_ms }
    Compression = CompressionSpec { codings, types, min_bytes }
}

impl Twin<engine::CodingSpec> for Coding {
    fn twin(&self) -> engine::CodingSpec {
        match self {
            Self::Zstd => engine::CodingSpec::Zstd,
            Self::Br => engine::CodingSpec::Br,
            Self::Gzip => engine::CodingSpec::Gzip,
        }
    }
}

impl Twin<Coding> for engine::CodingSpec {
    fn twin(&self) -> Coding {
        match self {
            Self::Zstd => Coding::Zstd,
            Self::Br => Coding::Br,
            Self::Gzip => Coding::Gzip,
        }
    }
}

impl Twin<engine::HashBy> for RateKey {
    fn twin(&self) -> engine::HashBy {
        match self {
            Self::ClientAddress => engine::HashBy::ClientAddress,
            Self::Header { name } => engine::HashBy::Header(name.clone()),
            Self::Cookie { name } => engine::HashBy::Cookie(name.clone()),
        }
    }
}

impl Twin<RateKey> for engine::HashBy {
    fn twin(&self) -> RateKey {
        match self {
            Self::ClientAddress => RateKey::ClientAddress,
            Self::Header(name) => RateKey::Header { name: name.clone() },
            Self::Cookie(name) => RateKey::Cookie { name: name.clone() },
        }
    }
}

impl From<&engine::RulesSpec> for Rules {
    fn from(rules: &engine::RulesSpec) -> Self {
        rules.twin()
    }
}

impl From<&Rules> for engine::RulesSpec {
    fn from(rules: &Rules) -> Self {
        rules.twin()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"{
        "allow": ["10.0.0.0/8"], "deny": ["10.1.0.0/16"], "max_in_flight": 7,
        "rate_limit": {"requests": 1, "per_ms": 2, "burst": 3, "by": {"key": "header", "name": "x"}},
        "headers": {"request": {"remove": ["a"], "set": {"b": "c"}, "add": {"d": "e"}},
            "response": {"remove": ["server"], "set": {}, "add": {}}},
        "redirects": [{"from": "/old/*", "to": "/new", "status": 301}],
        "rewrite": {"strip_prefix": "/api", "add_prefix": null},
        "basic_auth": {"realm": "Staff", "users": {"alice": "hash"}, "forward": true},
        "forward_auth": {"url": "http://a:1/", "copy_headers": ["x-user"], "timeout_ms": 7},
        "compression": {"codings": ["br", "gzip"], "types": ["text/*"], "min_bytes": 7},
        "error_pages": {"5xx": "<h1>{status}</h1>"}
    }"#;

    #[test]
    fn rules_survive_the_way_to_the_engine_and_back() {
        let rules: Rules = serde_json::from_str(FULL).unwrap();
        let spec = engine::RulesSpec::from(&rules);
        assert_eq!(Rules::from(&spec), rules);
        // Nothing of it is lost: every field of the document is there again.
        let (said, back): (serde_json::Value, _) =
            (serde_json::from_str(FULL).unwrap(), serde_json::to_value(Rules::from(&spec)).unwrap());
        assert_eq!(said, back);
        assert_eq!(Rules::from(&engine::RulesSpec::default()), Rules::default());
    }
}
