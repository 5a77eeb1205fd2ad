//! Changes of header fields, made ready once for each version of the table.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use peregrine_routing::{HeaderEdits, is_guarded_field};

/// Changes of the fields of a message.
#[derive(Default)]
pub(crate) struct Edits {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    /// Fields that are nobody else's: what a client sends of them in another spelling does not go on.
    own: Vec<HeaderName>,
}

impl Edits {
    /// Changes of requests: origins that take `_` for `-` (CGI, RFC 3875 §4.1.18) read nothing else than what is set here.
    pub(super) fn of_requests(edits: &HeaderEdits) -> Self {
        let edits = Self::of(edits);
        let own = edits.remove.iter().chain(edits.set.iter().map(|(name, _)| name)).cloned().collect();
        Self { own, ..edits }
    }

    /// What is no field or the edge's alone was refused when the service was taken in; if it has come in all the same, it
    /// changes nothing.
    pub(super) fn of(edits: &HeaderEdits) -> Self {
        let name =
            |text: &str| HeaderName::from_bytes(text.as_bytes()).ok().filter(|_| !is_guarded_field(text));
        let fields = |fields: &[(Arc<str>, Arc<str>)]| {
            let field = |(n, v): &(Arc<str>, Arc<str>)| Some((name(n)?, HeaderValue::from_str(v).ok()?));
            fields.iter().filter_map(field).collect()
        };
        Self {
            remove: edits.remove.iter().filter_map(|text| name(text)).collect(),
            set: fields(&edits.set),
            add: fields(&edits.add),
            own: Vec::new(),
        }
    }

    /// Fields of requests that are taken off or set.
    pub(super) fn own(&self) -> &[HeaderName] {
        &self.own
    }

    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        take_off(&self.own, headers);
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
    }
}

/// Takes fields off, also where `_` stands for `-`.
pub(super) fn take_off(names: &[HeaderName], headers: &mut HeaderMap) {
    let is_one = |have: &HeaderName| {
        names.iter().any(|name| {
            let (have, name) = (have.as_str().bytes(), name.as_str().bytes());
            let dashed = |b: u8| if b == b'_' { b'-' } else { b };
            have.map(dashed).eq(name.map(dashed))
        })
    };
    let found: Vec<HeaderName> = headers.keys().filter(|name| is_one(name)).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::Seen;

    #[test]
    fn the_fields_that_the_edge_guards_are_those_that_nobody_may_change() {
        // These two matter to the edge only because it reads them.
        let only_read = Seen::ACCEPT | Seen::COOKIE;
        for name in [
            "te",
            "via",
            "host",
            "accept",
            "expect",
            "cookie",
            "upgrade",
            "trailer",
            "forwarded",
            "x-real-ip",
            "connection",
            "keep-alive",
            "client-cert",
            "traceparent",
            "x-request-id",
            "content-length",
            "http2-settings",
            "proxy-connection",
            "peregrine-mirror",
            "client-cert-chain",
            "transfer-encoding",
            "proxy-authenticate",
            "x-peregrine-reason",
            "proxy-authorization",
            "x-client-cert-subject",
            "x-forwarded-for",
            "x-forwarded-anything",
            "x-tenant",
            "authorization",
            "server",
            "date",
        ] {
            assert_eq!(Seen::bit_of(name) & !only_read != 0, is_guarded_field(name), "{name}");
        }
    }

    #[test]
    fn a_field_that_is_the_edges_alone_is_not_changed_even_if_the_table_says_so() {
        let edits = Edits::of(&HeaderEdits {
            remove: vec!["content-length".into(), "x-old".into()],
            set: vec![
                ("host".into(), "evil".into()),
                ("x-new".into(), "1".into()),
                ("bad name".into(), "1".into()),
            ],
            add: vec![("x_forwarded_for".into(), "6.6.6.6".into()), ("x-new".into(), "2".into())],
        });
        let mut headers = HeaderMap::new();
        for (name, value) in [("content-length", "5"), ("host", "a"), ("x-old", "0"), ("x-new", "0")] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        edits.apply(&mut headers);
        assert_eq!(
            (&headers["content-length"], &headers["host"]),
            (&HeaderValue::from_static("5"), &HeaderValue::from_static("a"))
        );
        assert_eq!(headers.get_all("x-new").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(headers.len(), 4, "{headers:?}");
    }
}
