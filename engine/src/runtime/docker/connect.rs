//! Ways to an engine, and HTTP over them.
//!
//! ```text
//!   bollard request ─► dial (unix │ tcp │ tcp + mutual TLS │ channel in the kept SSH session) ─► HTTP/1.1
//! ```
//!
//! Every request has a connection of its own. None is kept, so none can turn out to be stale in the middle of a
//! request whose outcome then nobody knows; a move makes about a dozen calls, and a dial takes milliseconds.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bollard::errors::Error;
use bollard::{API_DEFAULT_VERSION, BollardRequest, Docker};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Response, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::ssh::Session;
use super::tls;
use crate::model::{DockerEndpoint, TlsFiles};

/// From the first packet to a connection that can be used, whatever the way.
const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// Silence after which TCP asks whether the other side is still there.
const KEEPALIVE_MS: u64 = 15_000;

/// A byte stream to an engine.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// How an engine is dialled.
#[derive(Debug)]
pub(super) enum Way {
    Unix { path: PathBuf },
    Tcp { host: String, port: u16 },
    Tls { host: String, port: u16, files: TlsFiles },
    Ssh(Box<Session>),
}

impl Way {
    /// The way to an endpoint.
    ///
    /// # Errors
    ///
    /// The endpoint's description cannot be used, in words for the operator.
    pub(super) fn to(endpoint: &DockerEndpoint) -> Result<Self, String> {
        match endpoint {
            DockerEndpoint::Unix { path } => Ok(Self::Unix { path: path.clone() }),
            DockerEndpoint::Tcp { host, port, tls: Some(files), .. } => {
                Ok(Self::Tls { host: host.clone(), port: *port, files: files.clone() })
            }
            DockerEndpoint::Tcp { host, port, tls: None, insecure } => {
                if *insecure || is_loopback(host) {
                    Ok(Self::Tcp { host: host.clone(), port: *port })
                } else {
                    Err(format!(
                        "clear text to the engine at {host}:{port} would give that host to anybody on the way; \
                         use TLS or SSH, or say `insecure` if the network is private"
                    ))
                }
            }
            DockerEndpoint::Ssh { host, port, user, key, host_key, socket } => {
                Session::new(host, *port, user, key, host_key, socket)
                    .map(|session| Self::Ssh(Box::new(session)))
            }
        }
    }

    async fn dial(&self) -> io::Result<Box<dyn Io>> {
        match self {
            Self::Unix { path } => match UnixStream::connect(path).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) => Err(say(format_args!("socket {}", path.display()), &error)),
            },
            Self::Tcp { host, port } => Ok(Box::new(tcp(host, *port).await?)),
            Self::Tls { host, port, files } => {
                Ok(Box::new(tls::connect(tcp(host, *port).await?, host, files).await?))
            }
            Self::Ssh(session) => Ok(Box::new(session.open().await?)),
        }
    }
}

/// A TCP connection that notices when the other side is gone.
pub(super) async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream =
        TcpStream::connect((host, port)).await.map_err(|error| say(format_args!("{host}:{port}"), &error))?;
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_millis(KEEPALIVE_MS))
        .with_interval(Duration::from_millis(KEEPALIVE_MS));
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    Ok(stream)
}

/// A client for the engine at the end of `way`. It asks for `timeout_s` until the head of an answer.
pub(super) fn client(way: &Arc<Way>, timeout_s: u64) -> Result<Docker, Error> {
    let way = Arc::clone(way);
    let transport = move |request: BollardRequest| send(Arc::clone(&way), request);
    Docker::connect_with_custom_transport(transport, Some("http://engine"), timeout_s, API_DEFAULT_VERSION)
}

async fn send(way: Arc<Way>, mut request: BollardRequest) -> Result<Response<Incoming>, Error> {
    let dial = tokio::time::timeout(Duration::from_millis(CONNECT_TIMEOUT_MS), way.dial());
    let stream = dial.await.unwrap_or_else(|_| {
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no connection within {} s", CONNECT_TIMEOUT_MS / 1_000),
        ))
    })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends when the answer's body has been read or dropped; its error is also the request's.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to an engine");
        }
    });
    // RFC 9112, section 3.2.1: the target is the path alone, the host stands in its own field.
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    *request.uri_mut() = target.parse::<Uri>().map_err(http::Error::from)?;
    request.headers_mut().insert(HOST, HeaderValue::from_static("engine"));
    Ok(sender.send_request(request).await?)
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn say(what: std::fmt::Arguments<'_>, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clear(host: &str, insecure: bool) -> DockerEndpoint {
        DockerEndpoint::Tcp { host: host.to_owned(), port: 2375, tls: None, insecure }
    }

    #[test]
    fn clear_text_is_for_loopback_or_for_those_who_say_insecure() {
        for host in ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"] {
            assert!(Way::to(&clear(host, false)).is_ok(), "{host}");
        }
        for host in ["10.0.0.5", "docker.example.com", "0.0.0.0"] {
            assert!(Way::to(&clear(host, false)).unwrap_err().contains("insecure"), "{host}");
            assert!(Way::to(&clear(host, true)).is_ok(), "{host}");
        }
    }
}
