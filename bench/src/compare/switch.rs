//! How each contender is told to send new requests to another upstream, in the way that its vendor means it.

use std::fs;
use std::io;
use std::path::Path;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::origin::{ORIGIN_PORTS, loopback};
use super::process::Process;

/// Where `conf/peregrine/peregrine.toml` puts the API.
const API_PORT: u16 = 19170;
/// The service of `conf/peregrine/peregrine.toml`.
const SERVICE: &str = "/api/v1/services/bench";

/// nginx: another `upstream` file and a reload, which starts new workers and lets the old ones finish.
pub(super) fn nginx(process: &Process, folder: &Path, upstream: usize) -> io::Result<()> {
    write_nginx_upstream(folder, upstream)?;
    process.signal(Signal::HUP)
}

pub(super) fn write_nginx_upstream(folder: &Path, upstream: usize) -> io::Result<()> {
    fs::write(folder.join("upstream.conf"), format!("server {};\n", loopback(ORIGIN_PORTS[upstream])))
}

/// HAProxy: its admin socket. The new server first, then the old one into drain: at no moment is there none.
pub(super) async fn haproxy(folder: &Path, upstream: usize) -> io::Result<()> {
    let (to, from) = if upstream == 0 { ("a", "b") } else { ("b", "a") };
    for command in
        [format!("set server bench/{to} state ready"), format!("set server bench/{from} state drain")]
    {
        let mut admin = UnixStream::connect(folder.join("admin.sock")).await?;
        admin.write_all(format!("{command}\n").as_bytes()).await?;
        let mut answer = String::new();
        admin.read_to_string(&mut answer).await?;
        if !answer.trim().is_empty() {
            return Err(io::Error::other(format!("`{command}`: {}", answer.trim())));
        }
    }
    Ok(())
}

/// Peregrine: its API. The service as it is, with another upstream.
pub(super) async fn peregrine(folder: &Path, upstream: usize) -> io::Result<()> {
    let token = fs::read_to_string(folder.join("data/api-token"))?;
    let mut service = call(token.trim(), Method::GET, None).await?;
    let spec =
        service.get_mut("spec").ok_or_else(|| io::Error::other(format!("GET {SERVICE} tells no spec")))?;
    let address = loopback(ORIGIN_PORTS[upstream]).to_string();
    spec["workload"] = json!({ "kind": "fixed", "upstreams": [{ "address": address }] });
    let spec = spec.take();
    call(token.trim(), Method::PUT, Some(&spec)).await?;
    Ok(())
}

async fn call(token: &str, method: Method, body: Option<&Value>) -> io::Result<Value> {
    let io = TokioIo::new(TcpStream::connect(loopback(API_PORT)).await?);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(io::Error::other)?;
    let driving = tokio::spawn(connection);
    let bytes = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(&method)
        .uri(SERVICE)
        .header(HOST, loopback(API_PORT).to_string())
        .header(AUTHORIZATION, format!("Bearer {token}"))
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(bytes)))
        .map_err(io::Error::other)?;
    let (head, body) = sender.send_request(request).await.map_err(io::Error::other)?.into_parts();
    let answer = body.collect().await.map_err(io::Error::other)?.to_bytes();
    driving.abort();
    if !head.status.is_success() {
        let answer = String::from_utf8_lossy(&answer);
        return Err(io::Error::other(format!("{method} {SERVICE}: {}: {answer}", head.status)));
    }
    if answer.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_slice(&answer)?) }
}
