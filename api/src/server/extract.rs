//! What comes with a request: body, query and path, each refused as a problem when it cannot be used.

use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::context::Context;
use super::error::ApiError;
use crate::codes;
use crate::config::Limits;
use crate::request;

/// A JSON body; unknown fields are refused.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned + Serialize> FromRequest<Context> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::new(&codes::CONTENT_TYPE, "the body must be declared as application/json"));
        }
        let body = read_body(request, &context.config.limits).await?;
        Ok(Self(request::parse(&body)?))
    }
}

/// No body, or an empty object: for requests whose path says everything.
pub(crate) struct NoBody;

impl FromRequest<Context> for NoBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, ApiError> {
        let body = read_body(request, &context.config.limits).await?;
        if body.is_empty() {
            return Ok(Self);
        }
        let given: serde_json::Map<String, serde_json::Value> = request::parse(&body)?;
        match given.keys().next() {
            None => Ok(Self),
            Some(key) => {
                Err(ApiError::new(&codes::UNKNOWN_FIELD, "this request has no fields").at(&format!("/{key}")))
            }
        }
    }
}

/// Query parameters; the type refuses unknown ones.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(error) => {
                let cause =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                Err(ApiError::new(&codes::QUERY, cause))
            }
        }
    }
}

/// The one parameter in the path.
pub(crate) struct Name(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Path::<String>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(name)) => Ok(Self(name)),
            Err(error) => Err(ApiError::new(&codes::PATH, error.body_text())),
        }
    }
}

/// The `Idempotency-Key` of a request, checked.
pub(crate) struct Key(pub(crate) Option<String>);

/// Longest key.
const MAX_KEY_BYTES: usize = 255;

impl<S: Sync> FromRequestParts<S> for Key {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        idempotency_key(&parts.headers).map(Self)
    }
}

pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all("idempotency-key").iter();
    let Some(key) = given.next() else { return Ok(None) };
    let key = key.to_str().unwrap_or_default().trim();
    let good = !key.is_empty() && key.len() <= MAX_KEY_BYTES && given.next().is_none();
    if !good {
        let detail = format!("there must be one key, of 1 to {MAX_KEY_BYTES} visible ASCII characters");
        return Err(ApiError::new(&codes::HEADER, detail).at("Idempotency-Key"));
    }
    Ok(Some(key.to_owned()))
}

/// How long the client asks to wait for the end of long work: `?wait_ms=`, or `Prefer: wait=SECONDS` (RFC 7240
/// §4.3), whichever is longer, up to the limit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wait(pub(crate) Duration);

impl FromRequestParts<Context> for Wait {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self, ApiError> {
        Ok(Self::asked(parts.uri.query(), &parts.headers, &context.config.limits))
    }
}

impl Wait {
    pub(crate) fn asked(query: Option<&str>, headers: &HeaderMap, limits: &Limits) -> Self {
        let by_query = query
            .into_iter()
            .flat_map(|query| query.split('&'))
            .filter_map(|pair| pair.strip_prefix("wait_ms=")?.parse::<u64>().ok())
            .max();
        let preferences = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
        let by_header = preferences
            .flat_map(|value| value.split([',', ';']))
            .filter_map(|preference| preference.trim().strip_prefix("wait=")?.parse::<u64>().ok())
            .map(|seconds| seconds.saturating_mul(1_000))
            .max();
        let wait_ms = by_query.max(by_header).unwrap_or_default();
        Self(Duration::from_millis(wait_ms.min(limits.max_wait_ms)))
    }
}

/// Reads a body within its limits of size and time.
pub(crate) async fn read_body(request: Request, limits: &Limits) -> Result<Bytes, ApiError> {
    let too_large = || {
        let detail = format!("the body has more than {} bytes", limits.max_body_bytes);
        ApiError::new(&codes::TOO_LARGE, detail)
    };
    let announced =
        request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > limits.max_body_bytes as u64) {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), limits.max_body_bytes).collect();
    match tokio::time::timeout(Duration::from_millis(limits.body_timeout_ms), body).await {
        Err(_) => {
            let detail = format!("the body did not end within {} ms", limits.body_timeout_ms);
            Err(ApiError::new(&codes::BODY_TIMEOUT, detail))
        }
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::new(&codes::MALFORMED_JSON, format!("the body broke off: {error}"))),
        Ok(Ok(body)) => Ok(body.to_bytes()),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_declared_in_any_of_its_forms() {
        for (value, good) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/merge-patch+json", true),
            ("text/json", false),
            ("application/x-www-form-urlencoded", false),
        ] {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().unwrap())]);
            assert_eq!(is_json(&headers), good, "{value}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[test]
    fn a_wish_to_wait_is_taken_from_query_or_header_and_never_beyond_the_limit() {
        let limits = Limits { max_wait_ms: 60_000, ..Limits::default() };
        let prefer =
            |value: &str| HeaderMap::from_iter([("prefer".parse().unwrap(), value.parse().unwrap())]);
        let asked = |query, headers: &HeaderMap| Wait::asked(query, headers, &limits).0.as_millis();
        assert_eq!(asked(None, &HeaderMap::new()), 0);
        assert_eq!(asked(Some("a=1&wait_ms=250"), &HeaderMap::new()), 250);
        assert_eq!(asked(None, &prefer("respond-async, wait=5")), 5_000);
        assert_eq!(asked(Some("wait_ms=250"), &prefer("wait=5")), 5_000);
        assert_eq!(asked(None, &prefer("wait=18446744073709551615")), 60_000);
        assert_eq!(asked(Some("wait_ms=x"), &HeaderMap::new()), 0);
    }

    #[test]
    fn a_key_that_is_empty_long_or_given_twice_is_refused() {
        let headers = |keys: &[&str]| {
            keys.iter()
                .map(|key| ("idempotency-key".parse().unwrap(), key.parse().unwrap()))
                .collect::<HeaderMap>()
        };
        assert_eq!(idempotency_key(&headers(&[])).unwrap(), None);
        assert_eq!(idempotency_key(&headers(&["abc"])).unwrap().as_deref(), Some("abc"));
        for bad in [&[""][..], &["a", "b"], &[&"x".repeat(256)]] {
            assert_eq!(idempotency_key(&headers(bad)).unwrap_err().code(), "request.invalid_header");
        }
    }
}
