//! From a request to its answer: decide, record, misbehave if told so, answer.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, SEC_WEBSOCKET_ACCEPT, SET_COOKIE, TRAILER, UPGRADE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::body::{self, AnswerBody};
use super::fault::FaultChange;
use super::route::Route;
use super::serve::Connection;
use super::{Gauge, INSTANCE_HEADER, REQUEST_ID_HEADER, Shared};

/// The longest body of `POST /__origin/fault`, in bytes.
const MAX_FAULT_BYTES: usize = 4096;

type Answer = Response<AnswerBody>;

pub(super) async fn respond(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let is_head = request.method() == Method::HEAD;
    let id = request.headers().get(REQUEST_ID_HEADER).cloned();
    let mut answer = match request.uri().path() {
        path if path.starts_with("/__origin/") => administer(&shared, request).await,
        "/healthz" => health(&shared).await,
        _ => execute(&shared, &connection, request).await,
    };
    let headers = answer.headers_mut();
    if let Some(id) = id {
        headers.insert(REQUEST_ID_HEADER, id);
    }
    if let Ok(instance) = HeaderValue::from_str(&shared.instance) {
        headers.insert(INSTANCE_HEADER, instance);
    }
    if let Some(Ok(version)) = shared.version.as_deref().map(HeaderValue::from_str) {
        headers.insert("x-version", version);
    }
    Ok(if is_head { without_body(answer) } else { answer })
}

/// A request of the workload: recorded, counted, and subject to faults.
async fn execute(shared: &Arc<Shared>, connection: &Connection, request: Request<Incoming>) -> Answer {
    let in_flight = Gauge::raise(shared, |counters| &counters.in_flight);
    let fault = shared.faults.now();
    let route = if !shared.is_ready() {
        refused(StatusCode::SERVICE_UNAVAILABLE, "still starting")
    } else if shared.faults.next_fails(fault.error_percent) {
        refused(StatusCode::INTERNAL_SERVER_ERROR, "failing as told")
    } else {
        Route::of(&request)
    };
    let id = request.headers().get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok());
    let via = (connection.protocol, connection.number);
    if let Err(error) = shared.ledger.arrived(id, request.method(), via, route.status().as_u16()) {
        // An origin that cannot record must not look as if it had: whoever counts later would miss this request.
        eprintln!("origin {}: cannot record: {error}", shared.instance);
        return text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot record: {error}\n"));
    }
    shared.faults.not_hanging().await;
    if fault.latency_ms > 0 {
        tokio::time::sleep(Duration::from_millis(fault.latency_ms)).await;
    }
    answer(shared, connection, route, request).await.map(|body| body::counted(body, Some(in_flight)))
}

fn refused(status: StatusCode, why: &str) -> Route {
    Route::Refused(status, why.to_owned())
}

async fn answer(
    shared: &Arc<Shared>,
    connection: &Connection,
    route: Route,
    request: Request<Incoming>,
) -> Answer {
    match route {
        Route::Echo => echo(request),
        Route::Upload => upload(request.into_body()).await,
        Route::WebSocket { key } => switch_to_websocket(connection, &key, request),
        route => {
            let (head, body) = request.into_parts();
            // The whole request first: an answer that overtakes its request would cost the connection.
            if let Err(error) = drain(body).await {
                return text(StatusCode::BAD_REQUEST, format!("the request's body ended early: {error}\n"));
            }
            answer_without_body(shared, connection, route, &head).await
        }
    }
}

async fn answer_without_body(
    shared: &Arc<Shared>,
    connection: &Connection,
    route: Route,
    head: &http::request::Parts,
) -> Answer {
    match route {
        Route::Bytes(len) => typed("application/octet-stream", body::pattern(len)),
        Route::Slow(wait) => {
            tokio::time::sleep(wait).await;
            page(shared)
        }
        Route::Stream { chunks, wait } => typed("text/plain", body::timed_chunks(chunks, wait)),
        Route::Events { first, last, wait } => {
            let mut answer = typed("text/event-stream", body::events(shared.clone(), first, last, wait));
            answer.headers_mut().insert("cache-control", HeaderValue::from_static("no-cache"));
            answer
        }
        Route::Trailers => trailers(&shared.instance),
        Route::Messages(wait) => typed("application/grpc", body::messages(shared.clone(), wait)),
        Route::Status(status) => status_only(status),
        Route::Headers => headers_as_json(head, connection),
        Route::Cookie => cookies(shared, &head.headers),
        Route::Refused(status, why) => text(status, format!("{why}\n")),
        Route::Page | Route::Echo | Route::Upload | Route::WebSocket { .. } => page(shared),
    }
}

fn page(shared: &Shared) -> Answer {
    let version = shared.version.as_deref().unwrap_or("unversioned");
    let page = format!(
        "<!doctype html><title>Sample shop</title><h1>Sample shop</h1><p>served by <b>{}</b>, {version}</p>\n",
        shared.instance
    );
    typed("text/html; charset=utf-8", body::full(page))
}

fn echo(request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    let mut answer = Response::new(body.map_err(Into::into).boxed_unsync());
    if let Some(kind) = head.headers.get(CONTENT_TYPE) {
        answer.headers_mut().insert(CONTENT_TYPE, kind.clone());
    }
    if let Ok(method) = HeaderValue::from_str(head.method.as_str()) {
        answer.headers_mut().insert("x-method", method);
    }
    answer
}

async fn upload(mut body: Incoming) -> Answer {
    let mut length = 0;
    let mut digest = Sha256::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => {
                if let Some(data) = frame.data_ref() {
                    length += data.len() as u64;
                    digest.update(data);
                }
            }
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("the upload ended early: {error}\n")),
        }
    }
    let sha256: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    as_json(&json!({ "length": length, "sha256": sha256 }))
}

fn switch_to_websocket(connection: &Connection, key: &str, mut request: Request<Incoming>) -> Answer {
    let id = request.headers().get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok()).map(str::to_owned);
    let upgrade = hyper::upgrade::on(&mut request);
    *connection.upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, id));
    let mut answer = Response::new(body::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    answer
}

fn trailers(instance: &str) -> Answer {
    let body =
        body::with_trailers(body::message(instance), &[("grpc-status", "0"), ("grpc-message", "done")]);
    let mut answer = typed("application/grpc", body);
    answer.headers_mut().insert(TRAILER, HeaderValue::from_static("grpc-status, grpc-message"));
    answer
}

fn status_only(status: StatusCode) -> Answer {
    match status {
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => {
            let mut answer = Response::new(body::empty());
            *answer.status_mut() = status;
            answer
        }
        status => text(status, format!("{status}\n")),
    }
}

fn headers_as_json(head: &http::request::Parts, connection: &Connection) -> Answer {
    let headers: Vec<_> = head
        .headers
        .iter()
        .map(|(name, value)| [name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()])
        .collect();
    as_json(&json!({
        "method": head.method.as_str(),
        "uri": head.uri.to_string(),
        "version": format!("{:?}", head.version),
        "headers": headers,
        "peer": connection.peer.to_string(),
        "connection": connection.number,
    }))
}

fn cookies(shared: &Shared, headers: &HeaderMap) -> Answer {
    let sent: Vec<_> = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok()).collect();
    let mut answer = text(StatusCode::OK, format!("{}\n", sent.join("; ")));
    for cookie in [format!("origin={}; Path=/", shared.instance), "basket=1; Path=/; HttpOnly".to_owned()] {
        if let Ok(cookie) = HeaderValue::from_str(&cookie) {
            answer.headers_mut().append(SET_COOKIE, cookie);
        }
    }
    answer
}

async fn health(shared: &Shared) -> Answer {
    shared.faults.not_hanging().await;
    if !shared.is_ready() {
        text(StatusCode::SERVICE_UNAVAILABLE, "starting\n")
    } else if !shared.faults.now().healthy {
        text(StatusCode::SERVICE_UNAVAILABLE, "unhealthy as told\n")
    } else {
        text(StatusCode::OK, "ok\n")
    }
}

async fn administer(shared: &Shared, request: Request<Incoming>) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/__origin/stats") => as_json(&shared.stats()),
        (&Method::GET, "/__origin/ids") => {
            let executions = shared.ledger.executions();
            let ids: std::collections::BTreeMap<&str, u64> =
                executions.iter().map(|(id, times)| (&**id, *times)).collect();
            as_json(&ids)
        }
        (&Method::GET, "/__origin/fault") => as_json(&shared.faults.now()),
        (&Method::POST, "/__origin/fault") => match read_fault_change(request.into_body()).await {
            Ok(change) => as_json(&shared.faults.change(change)),
            Err(why) => text(StatusCode::BAD_REQUEST, format!("{why}\n")),
        },
        (method, path) => text(StatusCode::NOT_FOUND, format!("no such thing: {method} {path}\n")),
    }
}

async fn read_fault_change(body: Incoming) -> Result<FaultChange, String> {
    let bytes =
        Limited::new(body, MAX_FAULT_BYTES).collect().await.map_err(|error| error.to_string())?.to_bytes();
    let change: FaultChange = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    match change.error_percent {
        Some(percent) if percent > 100 => Err(format!("error_percent takes 0 to 100, not {percent}")),
        _ => Ok(change),
    }
}

async fn drain(mut body: Incoming) -> Result<(), hyper::Error> {
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}

fn text(status: StatusCode, line: impl Into<Bytes>) -> Answer {
    let mut answer = typed("text/plain; charset=utf-8", body::full(line));
    *answer.status_mut() = status;
    answer
}

fn as_json(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(bytes) => typed("application/json", body::full(bytes)),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn typed(kind: &'static str, body: AnswerBody) -> Answer {
    let mut answer = Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// The answer to HEAD: the same head, with the length that GET would have had (RFC 9110 §9.3.2).
fn without_body(answer: Answer) -> Answer {
    let (mut head, body) = answer.into_parts();
    if let Some(length) = body.size_hint().exact()
        && !head.status.is_informational()
        && head.status != StatusCode::NO_CONTENT
    {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Response::from_parts(head, body::empty())
}
