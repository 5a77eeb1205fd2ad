//! Rules of services, as they are sent and kept. They are on an edge's disk too: one that begins without its engine must not
//! let in whom it kept out.

use std::net::IpAddr;
use std::sync::Arc;

use peregrine_routing as routing;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WireRules {
    allow: Vec<(IpAddr, u8)>,
    deny: Vec<(IpAddr, u8)>,
    max_in_flight: u32,
    rate: Option<WireRate>,
    request_headers: WireEdits,
    response_headers: WireEdits,
    redirects: Vec<WireRedirect>,
    rewrite: Option<WireRewrite>,
    basic_auth: Option<WireBasicAuth>,
    forward_auth: Option<WireForwardAuth>,
    compression: Option<WireCompression>,
    error_pages: Vec<WireErrorPage>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireRate {
    requests: u32,
    per_ms: u32,
    burst: u32,
    by: WireRateKey,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum WireRateKey {
    ClientAddress,
    Header(String),
    Cookie(String),
}

/// `Debug` hides the values: they may be credentials.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WireEdits {
    remove: Vec<String>,
    set: Vec<(String, String)>,
    add: Vec<(String, String)>,
}

impl std::fmt::Debug for WireEdits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(&Twin::<routing::HeaderEdits>::twin(self), f)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireRedirect {
    from: String,
    below: bool,
    to: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireRewrite {
    strip_prefix: Option<String>,
    add_prefix: Option<String>,
}

/// `Debug` hides the hashes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WireBasicAuth {
    realm: String,
    users: Vec<(String, String)>,
    forward: bool,
}

impl std::fmt::Debug for WireBasicAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(&Twin::<routing::BasicAuth>::twin(self), f)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireForwardAuth {
    authority: String,
    path: String,
    copy_headers: Vec<String>,
    timeout_ms: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireCompression {
    codings: Vec<WireCoding>,
    types: Vec<String>,
    min_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum WireCoding {
    Zstd,
    Brotli,
    Gzip,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WireErrorPage {
    status: u16,
    html: String,
}

/// What was written of rules before anything was changed by them, and is still on disks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RulesOfForm3 {
    allow: Vec<(IpAddr, u8)>,
    deny: Vec<(IpAddr, u8)>,
    max_in_flight: u32,
    rate: Option<WireRate>,
}

impl From<RulesOfForm3> for WireRules {
    fn from(before: RulesOfForm3) -> Self {
        let RulesOfForm3 { allow, deny, max_in_flight, rate } = before;
        Self { allow, deny, max_in_flight, rate, ..Self::from(&routing::Rules::default()) }
    }
}

/// The same on the other side of the wire.
trait Twin<T> {
    fn twin(&self) -> T;
}

macro_rules! as_it_is {
    ($($type:ty),*) => {$(
        impl Twin<$type> for $type {
            fn twin(&self) -> $type {
                *self
            }
        }
    )*};
}

as_it_is!(u16, u32, u64, bool);

impl Twin<String> for Arc<str> {
    fn twin(&self) -> String {
        self.to_string()
    }
}

impl Twin<Arc<str>> for String {
    fn twin(&self) -> Arc<str> {
        self.as_str().into()
    }
}

impl<A: Twin<C>, B: Twin<D>, C, D> Twin<(C, D)> for (A, B) {
    fn twin(&self) -> (C, D) {
        (self.0.twin(), self.1.twin())
    }
}

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
    ($($wire:ident = $routing:ident { $($field:ident),* })*) => {$(
        impl Twin<routing::$routing> for $wire {
            fn twin(&self) -> routing::$routing {
                let Self { $($field),* } = self;
                routing::$routing { $($field: $field.twin()),* }
            }
        }

        impl Twin<$wire> for routing::$routing {
            fn twin(&self) -> $wire {
                let Self { $($field),* } = self;
                $wire { $($field: $field.twin()),* }
            }
        }
    )*};
}

twins! {
    WireRules = Rules {
        allow, deny, max_in_flight, rate, request_headers, response_headers, redirects, rewrite,
        basic_auth, forward_auth, compression, error_pages
    }
    WireRate = RateLimit { requests, per_ms, burst, by }
    WireEdits = HeaderEdits { remove, set, add }
    WireRedirect = Redirect { from, below, to, status }
    WireRewrite = Rewrite { strip_prefix, add_prefix }
    WireBasicAuth = BasicAuth { realm, users, forward }
    WireForwardAuth = ForwardAuth { authority, path, copy_headers, timeout_ms }
    WireCompression = Compression { codings, types, min_bytes }
    WireErrorPage = ErrorPage { status, html }
}

impl Twin<(IpAddr, u8)> for routing::IpNet {
    fn twin(&self) -> (IpAddr, u8) {
        (self.address(), self.prefix_bits())
    }
}

impl Twin<routing::IpNet> for (IpAddr, u8) {
    fn twin(&self) -> routing::IpNet {
        // A prefix that is longer than its address means the address.
        let width = if self.0.is_ipv4() { 32 } else { 128 };
        routing::IpNet::new(self.0, self.1.min(width)).expect("no prefix is longer than its address")
    }
}

impl Twin<routing::RateKey> for WireRateKey {
    fn twin(&self) -> routing::RateKey {
        match self {
            Self::ClientAddress => routing::RateKey::ClientAddress,
            Self::Header(name) => routing::RateKey::Header(name.twin()),
            Self::Cookie(name) => routing::RateKey::Cookie(name.twin()),
        }
    }
}

impl Twin<WireRateKey> for routing::RateKey {
    fn twin(&self) -> WireRateKey {
        match self {
            Self::ClientAddress => WireRateKey::ClientAddress,
            Self::Header(name) => WireRateKey::Header(name.twin()),
            Self::Cookie(name) => WireRateKey::Cookie(name.twin()),
        }
    }
}

impl Twin<routing::Coding> for WireCoding {
    fn twin(&self) -> routing::Coding {
        match self {
            Self::Zstd => routing::Coding::Zstd,
            Self::Brotli => routing::Coding::Brotli,
            Self::Gzip => routing::Coding::Gzip,
        }
    }
}

impl Twin<WireCoding> for routing::Coding {
    fn twin(&self) -> WireCoding {
        match self {
            Self::Zstd => WireCoding::Zstd,
            Self::Brotli => WireCoding::Brotli,
            Self::Gzip => WireCoding::Gzip,
        }
    }
}

impl From<&routing::Rules> for WireRules {
    fn from(rules: &routing::Rules) -> Self {
        rules.twin()
    }
}

impl From<WireRules> for routing::Rules {
    fn from(rules: WireRules) -> Self {
        rules.twin()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn rules(by: routing::RateKey) -> routing::Rules {
        routing::Rules {
            allow: vec!["10.0.0.0/8".parse().expect("a network"), "::1".parse().expect("an address")],
            deny: vec!["10.1.0.0/16".parse().expect("a network")],
            max_in_flight: 7,
            rate: Some(routing::RateLimit { requests: 1, per_ms: 2, burst: 3, by }),
            request_headers: routing::HeaderEdits {
                remove: vec!["a".into()],
                set: vec![("b".into(), "c".into())],
                add: vec![("d".into(), "e".into())],
            },
            response_headers: routing::HeaderEdits { remove: vec!["server".into()], ..Default::default() },
            redirects: vec![routing::Redirect {
                from: "/old".into(),
                below: true,
                to: "/new".into(),
                status: 301,
            }],
            rewrite: Some(routing::Rewrite {
                strip_prefix: Some("/api".into()),
                add_prefix: Some("/v2".into()),
            }),
            basic_auth: Some(routing::BasicAuth {
                realm: "Staff".into(),
                users: vec![("alice".into(), "hash".into())],
                forward: true,
            }),
            forward_auth: Some(routing::ForwardAuth {
                authority: "127.0.0.1:9091".into(),
                path: "/verify".into(),
                copy_headers: vec!["x-user".into()],
                timeout_ms: 7,
            }),
            compression: Some(routing::Compression {
                codings: routing::Coding::ALL.to_vec(),
                types: vec!["text/*".into()],
                min_bytes: 7,
            }),
            error_pages: vec![routing::ErrorPage { status: 503, html: "<h1>{status}</h1>".into() }],
        }
    }

    #[test]
    fn rules_arrive_as_they_were_sent() {
        use routing::RateKey;
        for by in [RateKey::ClientAddress, RateKey::Header("x".into()), RateKey::Cookie("y".into())] {
            for rules in [rules(by), routing::Rules::default()] {
                let bytes = postcard::to_stdvec(&WireRules::from(&rules)).expect("bytes");
                let back: WireRules = postcard::from_bytes(&bytes).expect("rules");
                assert_eq!(routing::Rules::from(back), rules);
            }
        }
    }
}
