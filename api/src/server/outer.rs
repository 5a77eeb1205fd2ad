//! The outermost layer: an id for each request, a limit on its time, and problem+json for whatever refused it.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, header};

use super::context::Context;
use super::error::ApiError;
use super::extract::Wait;
use crate::codes;

/// Longest request id that is taken over.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// The middleware.
pub(crate) async fn wrapped(State(context): State<Context>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let limits = &context.config.limits;
    let wait = Wait::asked(request.uri().query(), request.headers(), limits).0;
    let limit = Duration::from_millis(limits.request_timeout_ms) + wait;
    let begin = Instant::now();

    let answer = AssertUnwindSafe(tokio::time::timeout(limit, next.run(request))).catch_unwind().await;
    let mut answer = match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => {
            let detail = format!("no answer within {} ms", limit.as_millis());
            ApiError::new(&codes::TIMEOUT, detail).into_response()
        }
        // A defect in one handler is that request's end, not the server's; the panic itself is in the log.
        Err(_) => ApiError::new(&codes::INTERNAL, "a defect in the server ended the request").into_response(),
    };
    if let Some(error) = answer.extensions_mut().remove::<ApiError>() {
        log_refusal(&error, &id);
        answer = error.into_problem(&path, &id);
    }
    let status = answer.status().as_u16();
    tracing::debug!(%method, path, status, request_id = id, ms = begin.elapsed().as_millis() as u64, "api");
    let headers = answer.headers_mut();
    headers.insert("x-request-id", HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("-")));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    answer
}

fn log_refusal(error: &ApiError, request_id: &str) {
    if error.status().is_server_error() {
        tracing::warn!(code = error.code(), request_id, "{}", error.detail());
    }
}

/// The client's id if it can be one, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|id| id.to_str().ok());
    let is_plain = |id: &&str| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    given.filter(is_plain).map_or_else(|| format!("req_{}", uuid::Uuid::now_v7().simple()), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_request_id_is_taken_over_and_any_other_is_replaced() {
        let with = |id: &str| HeaderMap::from_iter([("x-request-id".parse().unwrap(), id.parse().unwrap())]);
        assert_eq!(request_id(&with("abc-1.2:3_4")), "abc-1.2:3_4");
        for bad in ["", "a b", "a\"b", &"x".repeat(129)] {
            assert!(request_id(&with(bad)).starts_with("req_"), "{bad}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
