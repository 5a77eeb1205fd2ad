//! Changes of header fields: what an operator may change, and what is the edge's alone.

use std::fmt;
use std::sync::Arc;

/// Changes of the header fields of a message, made in this order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// Fields that are taken off.
    pub remove: Vec<Arc<str>>,
    /// Fields that get this value and no other.
    pub set: Vec<(Arc<str>, Arc<str>)>,
    /// Fields that get one more value.
    pub add: Vec<(Arc<str>, Arc<str>)>,
}

impl HeaderEdits {
    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }
}

/// Values may be credentials for an origin: only names are shown.
impl fmt::Debug for HeaderEdits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |fields: &[(Arc<str>, Arc<str>)]| {
            fields.iter().map(|(name, _)| Arc::clone(name)).collect::<Vec<_>>()
        };
        f.debug_struct("HeaderEdits")
            .field("remove", &self.remove)
            .field("set", &names(&self.set))
            .field("add", &names(&self.add))
            .finish_non_exhaustive()
    }
}

/// Fields that frame a message, are meant for one connection, route a request or say who its client is. The edge alone
/// writes them. In any case of letters, and also where `_` stands for `-`, as origins of the CGI kind read it.
#[must_use]
pub fn is_guarded_field(name: &str) -> bool {
    const GUARDED: [&str; 21] = [
        "client-cert",
        "client-cert-chain",
        "connection",
        "content-length",
        "expect",
        "forwarded",
        "host",
        "http2-settings",
        "keep-alive",
        "peregrine-mirror",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "traceparent",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
        "x-peregrine-reason",
        "x-request-id",
    ];
    let name = name.to_ascii_lowercase().replace('_', "-");
    GUARDED.contains(&&*name)
        || matches!(&*name, "x-real-ip" | "x-client-cert-subject")
        || name.starts_with("x-forwarded-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_frame_route_or_identify_are_guarded_in_every_spelling() {
        for name in
            ["Host", "content-length", "Content_Length", "X_Forwarded_For", "x-forwarded-anything", "TE"]
        {
            assert!(is_guarded_field(name), "{name}");
        }
        for name in ["x-tenant", "authorization", "cookie", "set-cookie", "accept", "x-forwarded", "my_own"] {
            assert!(!is_guarded_field(name), "{name}");
        }
    }

    #[test]
    fn values_are_not_shown() {
        let edits = HeaderEdits {
            set: vec![("authorization".into(), "Bearer hunter2".into())],
            ..Default::default()
        };
        let shown = format!("{edits:?}");
        assert!(shown.contains("authorization") && !shown.contains("hunter2"), "{shown}");
    }
}
