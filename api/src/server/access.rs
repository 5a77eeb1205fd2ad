//! Who may ask: a token, asked under a name of ours, and not by a page of another site.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Uri, header};

use super::context::Context;
use super::error::ApiError;
use crate::codes;

/// Routes that need no token: they tell nothing about services.
const OPEN: [&str; 3] = ["/livez", "/readyz", "/api/openapi.json"];

/// The middleware.
pub(crate) async fn checked(State(context): State<Context>, request: Request, next: Next) -> Response {
    match check(&context, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn check(context: &Context, request: &Request) -> Result<(), ApiError> {
    let host = authority(request.uri(), request.headers())?;
    let config = &context.config;
    // Against DNS rebinding: a page of another site that has its own name resolve to us still has to use that name.
    let any_name = !config.listen.ip().is_loopback() && config.allowed_hosts.is_empty();
    if !any_name && !is_ours(host.host(), &config.allowed_hosts) {
        return Err(ApiError::new(
            &codes::HOST_REFUSED,
            format!("{} is not a name of this API", host.host()),
        ));
    }
    same_origin(request.headers(), &host)?;
    let path = request.uri().path();
    if OPEN.contains(&path) || (path == "/metrics" && config.metrics_without_token) {
        return Ok(());
    }
    let challenge = |error: ApiError| {
        error.with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"peregrine\""))
    };
    match bearer(request.headers()) {
        None => Err(challenge(ApiError::new(&codes::AUTH_MISSING, "the request has no bearer token"))),
        Some(token) if context.token.is(token) => Ok(()),
        Some(_) => {
            Err(challenge(ApiError::new(&codes::AUTH_INVALID, "the token is not the one of this server")))
        }
    }
}

/// RFC 9112 §3.2: one Host, and the authority of an absolute target goes before it.
fn authority(uri: &Uri, headers: &HeaderMap) -> Result<Authority, ApiError> {
    if let Some(authority) = uri.authority() {
        return Ok(authority.clone());
    }
    let wrong = || {
        ApiError::new(&codes::HEADER, "the request must have one Host header with a name or an address")
            .at("Host")
    };
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().ok_or_else(wrong)?;
    if hosts.next().is_some() {
        return Err(wrong());
    }
    Authority::try_from(host.as_bytes()).map_err(|_| wrong())
}

fn is_ours(host: &str, allowed: &[String]) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<std::net::IpAddr>().is_ok()
        || host.eq_ignore_ascii_case("localhost")
        || allowed.iter().any(|name| name.eq_ignore_ascii_case(host))
}

fn same_origin(headers: &HeaderMap, host: &Authority) -> Result<(), ApiError> {
    let refused =
        |from: &str| Err(ApiError::new(&codes::ORIGIN_REFUSED, format!("the request comes from {from}")));
    if let Some(origin) = headers.get(header::ORIGIN) {
        let origin = origin.to_str().unwrap_or("?");
        let ours = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if ours.is_none_or(|ours| !ours.eq_ignore_ascii_case(host.as_str())) {
            return refused(origin);
        }
    }
    match headers.get("sec-fetch-site").and_then(|site| site.to_str().ok()) {
        Some(site @ ("cross-site" | "same-site")) => refused(&format!("another site ({site})")),
        _ => Ok(()),
    }
}

/// RFC 6750 §2.1; the scheme's name has no case (RFC 9110 §11.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_api_is_asked_by_address_or_localhost_and_not_by_a_strangers_name() {
        for host in ["127.0.0.1", "[::1]", "localhost", "LOCALHOST", "10.0.0.1"] {
            assert!(is_ours(host, &[]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.nip.example", ""] {
            assert!(!is_ours(host, &[]), "{host}");
        }
        assert!(is_ours("api.example.com", &["API.example.com".to_owned()]));
    }

    #[test]
    fn a_page_of_another_site_is_refused_and_our_own_is_not() {
        let host = Authority::from_static("127.0.0.1:7070");
        let with = |name: &'static str, value: &str| {
            HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())])
        };
        assert!(same_origin(&HeaderMap::new(), &host).is_ok());
        assert!(same_origin(&with("origin", "http://127.0.0.1:7070"), &host).is_ok());
        assert!(same_origin(&with("sec-fetch-site", "same-origin"), &host).is_ok());
        for origin in ["http://evil.example", "null", "http://127.0.0.1:8080", "file://127.0.0.1:7070"] {
            assert!(same_origin(&with("origin", origin), &host).is_err(), "{origin}");
        }
        assert!(same_origin(&with("sec-fetch-site", "cross-site"), &host).is_err());
    }

    #[test]
    fn only_a_bearer_token_is_a_token() {
        let with = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(bearer(&with("Bearer abc")), Some("abc"));
        assert_eq!(bearer(&with("bearer abc")), Some("abc"));
        assert_eq!(bearer(&with("Basic abc")), None);
        assert_eq!(bearer(&with("abc")), None);
    }
}
