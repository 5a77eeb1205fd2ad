//! Turns errors into answers. The only place that does.

use bytes::Bytes;
use http::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, LOCATION, RETRY_AFTER, STRICT_TRANSPORT_SECURITY,
    WWW_AUTHENTICATE,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use crate::body::ReplyBody;
use crate::error::{Blame, Reason};
use crate::grpc;
use crate::headers::{X_PEREGRINE_REASON, X_REQUEST_ID};
use crate::inflight::{FlightGuard, HostText};
use crate::route;
use crate::tls;

/// What a client is told to wait before it comes back, in seconds. Long enough for a retry to meet a
/// finished switch, short enough that nobody gives up.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");
const ALLOWED: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH");

/// Which form of page a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Html,
    Problem,
}

impl Form {
    /// Browsers ask for HTML by name; everybody else can read JSON (RFC 9457).
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let html = headers
            .get_all(ACCEPT)
            .iter()
            .any(|value| memchr::memmem::find(value.as_bytes(), b"text/html").is_some());
        if html { Self::Html } else { Self::Problem }
    }
}

/// An answer to a client. Its version is the client's connection's own.
pub(crate) fn response(status: StatusCode, headers: HeaderMap, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// The answer to a request that the edge cannot have answered by anybody else.
pub(crate) fn answer(reason: Reason, form: Form, guard: FlightGuard) -> Response<ReplyBody> {
    let flight = &guard.0;
    flight.reason.set(Some(reason));
    flight.status.set(reason.status_code());
    flight.complete.set(true);
    flight.conn.before_head.set(false);
    if flight.grpc.get() && reason.status().is_server_error() {
        return grpc_answer(reason, guard);
    }
    let retry_after_s = flight.retry_after_s.get();
    let request_id = flight.ids.request.clone();
    let own_page =
        if form == Form::Html { flight.error_page(reason, request_id.to_str().unwrap_or("-")) } else { None };
    let page = own_page.unwrap_or_else(|| page(reason, form, request_id.to_str().unwrap_or("-")));
    let http2 = flight.conn.http2.get();
    // A request with a fault may be followed by the rest of it: nothing more is read from such a client.
    let close = !http2 && (closes(reason) || flight.core.draining.get());
    let hsts = tls::hsts(&flight.core, &flight.conn, &flight.host.borrow());
    let challenge = if reason == Reason::AuthRequired { flight.challenge() } else { None };
    let mut response = Response::new(ReplyBody::Page(Some(page), Some(guard)));
    *response.status_mut() = reason.status();
    let headers = response.headers_mut();
    headers.insert(X_PEREGRINE_REASON, HeaderValue::from_static(reason.as_str()));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type(form)));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_REQUEST_ID, request_id);
    if let Some(hsts) = hsts {
        headers.insert(STRICT_TRANSPORT_SECURITY, hsts);
    }
    if let Some(challenge) = challenge {
        headers.insert(WWW_AUTHENTICATE, challenge);
    }
    if reason.status() == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, RETRY_AFTER_S);
    }
    if retry_after_s > 0 {
        headers.insert(RETRY_AFTER, HeaderValue::from(retry_after_s));
    }
    if reason.status() == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, ALLOWED);
    }
    if close {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The same address with `https` (RFC 9110 §15.4.9: the method stays). The host has been found canonical.
pub(crate) fn to_https(
    host: &HostText,
    port: u16,
    path: &PathAndQuery,
    guard: FlightGuard,
) -> Response<ReplyBody> {
    const HTTPS_PORT: u16 = 443;
    let host = route::canonical(host).unwrap_or_default();
    let path = if path.as_str() == "*" { "/" } else { path.as_str() };
    let location = match port {
        HTTPS_PORT => format!("https://{host}{path}"),
        _ => format!("https://{host}:{port}{path}"),
    };
    match HeaderValue::from_str(&location) {
        Ok(location) => redirect(StatusCode::PERMANENT_REDIRECT, location, guard),
        Err(_) => own(StatusCode::PERMANENT_REDIRECT, Bytes::new(), guard),
    }
}

/// Another address instead of an answer.
pub(crate) fn redirect(status: StatusCode, location: HeaderValue, guard: FlightGuard) -> Response<ReplyBody> {
    let flight = &guard.0;
    let hsts = tls::hsts(&flight.core, &flight.conn, &flight.host.borrow());
    let mut response = own(status, Bytes::new(), guard);
    let headers = response.headers_mut();
    headers.insert(LOCATION, location);
    if let Some(hsts) = hsts {
        headers.insert(STRICT_TRANSPORT_SECURITY, hsts);
    }
    response
}

/// Somebody else's answer, whole.
pub(crate) fn passed_on(answer: Response<Bytes>, guard: FlightGuard) -> Response<ReplyBody> {
    let (parts, body) = answer.into_parts();
    let hsts = tls::hsts(&guard.0.core, &guard.0.conn, &guard.0.host.borrow());
    let mut response = own(parts.status, body, guard);
    for (name, value) in &parts.headers {
        response.headers_mut().append(name, value.clone());
    }
    if let Some(hsts) = hsts {
        response.headers_mut().insert(STRICT_TRANSPORT_SECURITY, hsts);
    }
    response
}

/// What a certificate authority is to find (RFC 8555 §8.3).
pub(crate) fn challenge(text: &str, guard: FlightGuard) -> Response<ReplyBody> {
    let mut response = own(StatusCode::OK, Bytes::copy_from_slice(text.as_bytes()), guard);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// An answer of the edge's own that is no failure.
fn own(status: StatusCode, body: Bytes, guard: FlightGuard) -> Response<ReplyBody> {
    let flight = &guard.0;
    flight.status.set(status.as_u16());
    flight.complete.set(true);
    flight.conn.before_head.set(false);
    let close = !flight.conn.http2.get() && flight.core.draining.get();
    let mut response = Response::new(ReplyBody::Page(Some(body), Some(guard)));
    *response.status_mut() = status;
    if close {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The answer to a call: its client reads the status of gRPC, and takes another one of HTTP for a fault in between.
fn grpc_answer(reason: Reason, guard: FlightGuard) -> Response<ReplyBody> {
    let mut headers = HeaderMap::new();
    headers.insert(X_PEREGRINE_REASON, HeaderValue::from_static(reason.as_str()));
    headers.insert(CONTENT_TYPE, grpc::CONTENT_TYPE);
    headers.insert(X_REQUEST_ID, guard.0.ids.request.clone());
    grpc::say_unavailable(&mut headers, detail(reason));
    response(StatusCode::OK, headers, ReplyBody::Empty(guard))
}

const fn closes(reason: Reason) -> bool {
    matches!(reason.blame(), Blame::Client)
}

const fn content_type(form: Form) -> &'static str {
    match form {
        Form::Html => "text/html; charset=utf-8",
        Form::Problem => "application/problem+json",
    }
}

/// The whole answer as bytes, for clients whose request could not even be read.
pub(crate) fn raw_answer(reason: Reason) -> Bytes {
    let page = page(reason, Form::Problem, "-");
    let mut out = format!(
        "HTTP/1.1 {} {}\r\nx-peregrine-reason: {}\r\ncontent-type: {}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        reason.status_code(),
        reason.status().canonical_reason().unwrap_or("Error"),
        reason.as_str(),
        content_type(Form::Problem),
        page.len()
    )
    .into_bytes();
    out.extend_from_slice(&page);
    out.into()
}

/// The page. The request id has been checked: it needs no escaping in either form.
fn page(reason: Reason, form: Form, request_id: &str) -> Bytes {
    let status = reason.status_code();
    let title = reason.status().canonical_reason().unwrap_or("Error");
    let (name, detail) = (reason.as_str(), detail(reason));
    let text = match form {
        Form::Problem => format!(
            "{{\"type\":\"about:blank\",\"title\":\"{title}\",\"status\":{status},\"detail\":\"{detail}\",\
             \"reason\":\"{name}\",\"request_id\":\"{request_id}\"}}\n"
        ),
        Form::Html => format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{status} {title}</title>\
             <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:34em;margin:15vh auto;padding:0 1em}}\
             small{{color:#666}}</style><h1>{title}</h1><p>{detail}</p>\
             <p><small>{status} · {name} · {request_id}</small></p></html>\n"
        ),
    };
    text.into()
}

/// One sentence for people. It says nothing about the inside of the house.
const fn detail(reason: Reason) -> &'static str {
    match reason {
        Reason::NoRoute => "There is no site at this address.",
        Reason::NoUpstream
        | Reason::AuthUnavailable
        | Reason::HoldFull
        | Reason::HoldTooOld
        | Reason::Overloaded
        | Reason::RulesChanged
        | Reason::ServiceBusy
        | Reason::ShuttingDown
        | Reason::UpstreamCut
        | Reason::UpstreamRefused => "The site cannot take requests right now. Please try again in a moment.",
        Reason::AuthRequired => "This site asks for a name and a password.",
        Reason::AddressDenied => "This site is not open to your address.",
        Reason::RateLimited => "Too many requests. Please try again in a moment.",
        Reason::HeadTimeout | Reason::BodyTimeout => "The request took too long to arrive.",
        Reason::HeadTooLarge => "The request has headers that are too large or too many.",
        Reason::UriTooLong => "The address of the request is too long.",
        Reason::BodyTooLarge => "The request is larger than the site accepts.",
        Reason::MethodNotAllowed | Reason::ConnectNotSupported => {
            "The method of the request is not supported."
        }
        Reason::Misdirected => "This connection was made for another site. Please open a new one.",
        Reason::BadHost => "The request does not say which site it is for.",
        Reason::Internal => "Something went wrong while the request was handled.",
        _ => match reason.blame() {
            Blame::Client => "The request is malformed.",
            Blame::Upstream | Blame::Edge => {
                "The site did not answer properly. Please try again in a moment."
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_gets_a_page_and_a_program_gets_json() {
        let form = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
            Form::of(&headers)
        };
        assert_eq!(form("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"), Form::Html);
        assert_eq!(form("*/*"), Form::Problem);
        assert_eq!(Form::of(&HeaderMap::new()), Form::Problem);
    }

    #[test]
    fn every_reason_is_in_its_answer_once_as_a_field_and_the_length_is_right() {
        for reason in Reason::ALL {
            let raw = raw_answer(*reason);
            let text = std::str::from_utf8(&raw).expect("is text");
            let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
            assert!(head.contains(&format!("x-peregrine-reason: {}\r\n", reason.as_str())), "{head}");
            assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
            assert!(body.contains(&format!("\"reason\":\"{}\"", reason.as_str())), "{body}");
        }
    }
}
