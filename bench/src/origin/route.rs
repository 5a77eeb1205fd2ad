//! What a request asks for, decided from its head alone and before anything is answered.

use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, Request, StatusCode};

/// The longest answer of `/bytes/N`, in bytes.
const MAX_REPLY_BYTES: u64 = 4 << 30;
/// The longest wait that a query can ask for, in milliseconds.
const MAX_WAIT_MS: u64 = 600_000;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Page,
    Bytes(u64),
    Slow(Duration),
    Stream {
        chunks: u64,
        wait: Duration,
    },
    Events {
        first: u64,
        last: u64,
        wait: Duration,
    },
    Echo,
    Upload,
    WebSocket {
        key: String,
    },
    Trailers,
    /// A stream of gRPC messages, one in so much time.
    Messages(Duration),
    Status(StatusCode),
    Headers,
    Cookie,
    /// A request that is answered with its status and one line that says why.
    Refused(StatusCode, String),
}

impl Route {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let parsed = match request.uri().path() {
            "/" => Ok(Self::Page),
            "/slow" => query.wait(1000).map(Self::Slow),
            "/stream" => stream(&query),
            "/sse" => events(&query, request.headers()),
            "/echo" => Ok(Self::Echo),
            "/upload" => Ok(Self::Upload),
            "/ws" => Ok(websocket(request.headers())),
            "/trailers" => Ok(Self::Trailers),
            "/messages" => query.wait(100).map(Self::Messages),
            "/headers" => Ok(Self::Headers),
            "/cookie" => Ok(Self::Cookie),
            path => numbered(path),
        };
        parsed.unwrap_or_else(|why| Self::Refused(StatusCode::BAD_REQUEST, why))
    }

    pub(super) const fn status(&self) -> StatusCode {
        match self {
            Self::WebSocket { .. } => StatusCode::SWITCHING_PROTOCOLS,
            Self::Status(status) | Self::Refused(status, _) => *status,
            _ => StatusCode::OK,
        }
    }
}

fn numbered(path: &str) -> Result<Route, String> {
    if let Some(len) = path.strip_prefix("/bytes/") {
        let len: u64 = parse("/bytes/N", len)?;
        return if len <= MAX_REPLY_BYTES {
            Ok(Route::Bytes(len))
        } else {
            Err(format!("/bytes/N takes at most {MAX_REPLY_BYTES}, not {len}"))
        };
    }
    if let Some(status) = path.strip_prefix("/status/") {
        let status: u16 = parse("/status/N", status)?;
        // 1xx would announce an answer that never comes.
        return match StatusCode::from_u16(status) {
            Ok(status) if !status.is_informational() => Ok(Route::Status(status)),
            _ => Err(format!("/status/N takes 200 to 999, not {status}")),
        };
    }
    Ok(Route::Refused(StatusCode::NOT_FOUND, format!("no such path: {path}")))
}

fn stream(query: &Query<'_>) -> Result<Route, String> {
    Ok(Route::Stream { chunks: query.number("chunks", 10)?, wait: query.wait(100)? })
}

fn events(query: &Query<'_>, headers: &HeaderMap) -> Result<Route, String> {
    let count: u64 = query.number("count", 10)?;
    let seen: u64 = match headers.get("last-event-id").and_then(|id| id.to_str().ok()) {
        Some(id) => parse("Last-Event-ID", id)?,
        None => 0,
    };
    let last = if count == 0 { u64::MAX } else { count };
    Ok(Route::Events { first: seen.saturating_add(1), last, wait: query.wait(100)? })
}

fn websocket(headers: &HeaderMap) -> Route {
    let names = |header, token: &str| {
        headers
            .get_all(header)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|value| value.trim().eq_ignore_ascii_case(token))
    };
    let key = headers.get("sec-websocket-key").and_then(|key| key.to_str().ok());
    match key {
        Some(key) if names(CONNECTION, "upgrade") && names(UPGRADE, "websocket") => {
            Route::WebSocket { key: key.to_owned() }
        }
        _ => Route::Refused(
            StatusCode::UPGRADE_REQUIRED,
            "this path speaks WebSocket (RFC 6455) over HTTP/1.1".to_owned(),
        ),
    }
}

fn parse<N: FromStr>(name: &str, text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{name}: `{text}` is not a number that fits"))
}

struct Query<'a>(HashMap<&'a str, &'a str>);

impl<'a> Query<'a> {
    fn parse(query: &'a str) -> Self {
        Self(query.split('&').filter_map(|pair| pair.split_once('=')).collect())
    }

    fn number(&self, name: &str, default: u64) -> Result<u64, String> {
        self.0.get(name).map_or(Ok(default), |text| parse(name, text))
    }

    fn wait(&self, default_ms: u64) -> Result<Duration, String> {
        match self.number("ms", default_ms)? {
            ms if ms <= MAX_WAIT_MS => Ok(Duration::from_millis(ms)),
            ms => Err(format!("ms takes at most {MAX_WAIT_MS}, not {ms}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(uri: &str) -> Route {
        Route::of(&Request::get(uri).body(()).expect("a request"))
    }

    #[test]
    fn queries_choose_and_defaults_fill() {
        let wait = Duration::from_millis;
        assert_eq!(route("/stream?chunks=3&ms=5"), Route::Stream { chunks: 3, wait: wait(5) });
        assert_eq!(route("/stream"), Route::Stream { chunks: 10, wait: wait(100) });
        assert_eq!(route("/sse?count=0"), Route::Events { first: 1, last: u64::MAX, wait: wait(100) });
        assert_eq!(route("/bytes/0"), Route::Bytes(0));
    }

    #[test]
    fn an_event_stream_resumes_after_the_last_event_that_the_client_has() {
        let request = Request::get("/sse?count=9").header("last-event-id", "4").body(()).expect("a request");
        assert!(matches!(Route::of(&request), Route::Events { first: 5, last: 9, .. }));
    }

    #[test]
    fn a_bad_number_is_refused_by_name() {
        for uri in ["/bytes/x", "/bytes/-1", "/status/99", "/status/101", "/slow?ms=soon", "/slow?ms=600001"]
        {
            assert_eq!(route(uri).status(), StatusCode::BAD_REQUEST, "{uri}");
        }
        assert_eq!(route("/nowhere").status(), StatusCode::NOT_FOUND);
        assert_eq!(route("/ws").status(), StatusCode::UPGRADE_REQUIRED);
    }
}
