//! From a request head to a host and a path that the table understands, or to a refusal.

use std::borrow::Cow;

use http::header::HOST;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderValue, Method, Uri, Version};
use peregrine_routing::{CanonicalPath, canonical_host, canonical_path};

use crate::error::Reason;
use crate::inflight::HostText;

/// Where a request wants to go.
#[derive(Debug)]
pub(crate) struct Target {
    /// The host as it was sent.
    pub(crate) host: HostText,
    /// Path and query as they go on, the path in its canonical form.
    pub(crate) path: PathAndQuery,
    /// Another path that origins may read in it; where it would be routed elsewhere, the request is refused.
    pub(crate) other_reading: Option<Box<str>>,
}

const ASTERISK: &str = "*";

/// Reads host and path (RFC 9112 §3.2 and §3.3, RFC 9113 §8.3.1).
///
/// # Errors
/// [`Reason::BadHost`], [`Reason::BadTarget`] or [`Reason::AmbiguousPath`].
pub(crate) fn target(
    method: &Method,
    uri: &Uri,
    version: Version,
    headers: &HeaderMap,
) -> Result<Target, Reason> {
    let field = host_field(headers)?;
    let host = match (uri.authority(), field) {
        // HTTP/2 says the same thing twice, or it is up to something.
        (Some(authority), Some(field)) if version == Version::HTTP_2 => {
            if !same_host(authority.as_str(), field) {
                return Err(Reason::BadHost);
            }
            HostText::Authority(authority.clone())
        }
        // In absolute form the target's host counts and the field is ignored (RFC 9112 §3.2.2).
        (Some(authority), _) => HostText::Authority(authority.clone()),
        (None, Some(field)) if !field.as_bytes().is_ascii() => HostText::Authority(with_a_labels(field)?),
        (None, Some(field)) => HostText::Field(field.clone()),
        (None, None) if version == Version::HTTP_10 => HostText::None,
        (None, None) => return Err(Reason::BadHost),
    };
    let sent = path(method, uri)?;
    let (path, other_reading) = canonical_target(sent)?;
    Ok(Target { host, path, other_reading })
}

/// A host with U-labels goes on in the form that it is routed by.
fn with_a_labels(field: &HeaderValue) -> Result<Authority, Reason> {
    let text = std::str::from_utf8(field.as_bytes()).map_err(|_| Reason::BadHost)?;
    let port = text.rfind(':').map_or("", |colon| &text[colon..]);
    let host = canonical_host(text).map_err(|_| Reason::BadHost)?;
    format!("{host}{port}").parse().map_err(|_| Reason::BadHost)
}

/// The path in its canonical form, which decides on the route and goes on (RFC 3986 §6.2.2).
fn canonical_target(sent: PathAndQuery) -> Result<(PathAndQuery, Option<Box<str>>), Reason> {
    if sent.as_str() == ASTERISK {
        return Ok((sent, None));
    }
    let CanonicalPath { path, other_reading } =
        canonical_path(sent.path()).map_err(|_| Reason::AmbiguousPath)?;
    let Cow::Owned(path) = path else { return Ok((sent, other_reading)) };
    let whole = match sent.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    Ok((PathAndQuery::try_from(whole).map_err(|_| Reason::BadTarget)?, other_reading))
}

fn host_field(headers: &HeaderMap) -> Result<Option<&HeaderValue>, Reason> {
    let mut fields = headers.get_all(HOST).iter();
    let first = fields.next();
    if fields.next().is_some() { Err(Reason::BadHost) } else { Ok(first) }
}

fn same_host(authority: &str, field: &HeaderValue) -> bool {
    if authority.as_bytes() == field.as_bytes() {
        return true;
    }
    let field = field.to_str().ok().and_then(|field| canonical_host(field).ok());
    field.is_some() && field == canonical_host(authority).ok()
}

fn path(method: &Method, uri: &Uri) -> Result<PathAndQuery, Reason> {
    let sent = uri.path_and_query().cloned();
    if uri.scheme().is_some_and(|scheme| scheme.as_str() != "http" && scheme.as_str() != "https") {
        return Err(Reason::BadTarget);
    }
    match sent {
        Some(path) if path.as_str() == ASTERISK => {
            if *method == Method::OPTIONS {
                Ok(path)
            } else {
                Err(Reason::BadTarget)
            }
        }
        Some(path) if path.as_str().starts_with('/') => Ok(path),
        // "http://host?query" has an empty path, which goes on as "/" (RFC 9112 §3.2.1).
        Some(path) if uri.scheme().is_some() => {
            PathAndQuery::try_from(format!("/{}", path.as_str())).map_err(|_| Reason::BadTarget)
        }
        None if uri.scheme().is_some() => Ok(PathAndQuery::from_static("/")),
        _ => Err(Reason::BadTarget),
    }
}

/// The host in the form that the table is keyed by; empty without one, which only `*` matches.
///
/// # Errors
/// [`Reason::BadHost`].
pub(crate) fn canonical(host: &HostText) -> Result<Cow<'_, str>, Reason> {
    match host {
        HostText::None => Ok(Cow::Borrowed("")),
        _ => {
            let text = std::str::from_utf8(host.as_bytes()).map_err(|_| Reason::BadHost)?;
            canonical_host(text).map_err(|_| Reason::BadHost)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(
        method: &str,
        uri: &str,
        version: Version,
        hosts: &[&'static str],
    ) -> Result<(String, String), Reason> {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_static(host));
        }
        let method = Method::from_bytes(method.as_bytes()).expect("method");
        let target = target(&method, &uri.parse().expect("URI"), version, &headers)?;
        Ok((canonical(&target.host)?.into_owned(), target.path.to_string()))
    }

    fn there(host: &str, path: &str) -> Result<(String, String), Reason> {
        Ok((host.to_owned(), path.to_owned()))
    }

    #[test]
    fn host_and_path_are_found_in_every_form_of_target() {
        let h1 = |method, uri, hosts| read(method, uri, Version::HTTP_11, hosts);
        assert_eq!(h1("GET", "/a?b", &["Shop.Example.com:80"]), there("shop.example.com", "/a?b"));
        assert_eq!(h1("GET", "http://A.example/x", &["other"]), there("a.example", "/x"));
        assert_eq!(h1("GET", "http://a.example?q", &["a.example"]), there("a.example", "/?q"));
        assert_eq!(h1("GET", "http://a.example", &["a.example"]), there("a.example", "/"));
        assert_eq!(h1("OPTIONS", "*", &["a"]), there("a", "*"));
        assert_eq!(h1("GET", "*", &["a"]), Err(Reason::BadTarget));
        assert_eq!(h1("GET", "ftp://a/x", &["a"]), Err(Reason::BadTarget));
        assert_eq!(read("GET", "/", Version::HTTP_10, &[]), there("", "/"));
    }

    #[test]
    fn the_path_that_goes_on_is_the_canonical_one_and_the_query_is_left_alone() {
        let h1 = |uri| read("GET", uri, Version::HTTP_11, &["a"]);
        assert_eq!(h1("/x/../%61%2fb?%61=..%2f"), there("a", "/a%2Fb?%61=..%2f"));
        assert_eq!(h1("/x?a/../b"), there("a", "/x?a/../b"));
        assert_eq!(h1("http://a/./x"), there("a", "/x"));
        for bad in ["/../x", "/%zz", "/a\\b", "/a%00", "/a/..%2f"] {
            assert_eq!(h1(bad), Err(Reason::AmbiguousPath), "{bad}");
        }
    }

    #[test]
    fn a_host_that_is_missing_doubled_or_rubbish_is_refused() {
        for hosts in [&[][..], &["a", "a"], &["a b"], &[""], &["u@a"], &["a:x"], &["a,b"]] {
            assert_eq!(read("GET", "/", Version::HTTP_11, hosts), Err(Reason::BadHost), "{hosts:?}");
        }
        assert_eq!(read("GET", "http://u@a/", Version::HTTP_11, &["a"]), Err(Reason::BadHost));
    }

    #[test]
    fn authority_and_host_of_http2_have_to_agree() {
        let h2 = |uri, hosts| read("GET", uri, Version::HTTP_2, hosts);
        assert_eq!(h2("http://a.example/", &[]), there("a.example", "/"));
        assert_eq!(h2("http://a.example/", &["A.example:80"]), there("a.example", "/"));
        assert_eq!(h2("http://a.example/", &["b.example"]), Err(Reason::BadHost));
        assert_eq!(h2("/", &["b.example"]), there("b.example", "/"));
        assert_eq!(h2("/", &[]), Err(Reason::BadHost));
    }
}
