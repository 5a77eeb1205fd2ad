//! Probes of one copy on the real path: what the edge would ask, sent straight to the instance.
//!
//! A probe opens its own connection, so that it tells of a copy what a first client would see.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use crate::model::{HealthKind, HealthSpec, Protocol, ProxyProtocol};
use crate::outside::{Connection, Dial};

/// Most bytes of an answer that a probe reads: it looks at the status, not at the content.
const MAX_PROBE_BODY_BYTES: usize = 1 << 20;

/// Longest time for one warm-up request, in time-outs of the probe: the first answer of a cold copy may
/// take longer than any later one.
const WARM_UP_TIMEOUTS: u32 = 5;

/// An answer to a GET.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// From the open connection to the last byte, less the time that the connection took: what is left is
    /// the copy's own, however far away it is.
    pub(crate) own: Duration,
}

/// How a copy is probed.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) address: SocketAddr,
    pub(crate) protocol: Protocol,
    /// What its connections begin with: a copy that insists on that would take no probe without it.
    pub(crate) send_proxy_protocol: Option<ProxyProtocol>,
    pub(crate) host: Option<String>,
    pub(crate) health: HealthSpec,
    pub(crate) dial: Dial,
}

impl Probe {
    /// One probe: how long it took, or why it is bad.
    pub(crate) async fn once(&self) -> Result<Duration, String> {
        let begun = Instant::now();
        let timeout = Duration::from_millis(u64::from(self.health.timeout_ms.max(1)));
        let probe = async {
            match &self.health.kind {
                HealthKind::Http { path } => {
                    let status = self.get(path).await?.status;
                    if (200..400).contains(&status) {
                        Ok(())
                    } else {
                        Err(format!("{path} answers {status}"))
                    }
                }
                HealthKind::Tcp | HealthKind::None => self.connect().await.map(drop),
            }
        };
        match tokio::time::timeout(timeout, probe).await {
            Ok(result) => result.map(|()| begun.elapsed()),
            Err(_) => Err(format!("no answer within {} ms", timeout.as_millis())),
        }
    }

    /// Asks for a path, with a bounded time.
    pub(crate) async fn warm_up(&self, path: &str) -> Result<Answer, String> {
        let timeout = Duration::from_millis(u64::from(self.health.timeout_ms.max(1))) * WARM_UP_TIMEOUTS;
        tokio::time::timeout(timeout, self.get(path))
            .await
            .unwrap_or_else(|_| Err(format!("{path}: no answer within {} ms", timeout.as_millis())))
    }

    /// Whether the copy keeps a connection after an answer, so that one may wait for its first request. A copy
    /// that does not may be a server of one connection at a time, which an idle one would block.
    pub(crate) async fn keeps_connections(&self) -> bool {
        let timeout = Duration::from_millis(u64::from(self.health.timeout_ms.max(1)));
        if self.send_proxy_protocol.is_some() {
            // It would have to be known now whose the first request will be.
            return false;
        }
        match (self.protocol, &self.health.kind) {
            (Protocol::H2c, _) => true,
            (Protocol::Http1, HealthKind::Http { path }) => {
                let asked = tokio::time::timeout(timeout, self.exchange(path, true)).await;
                matches!(asked, Ok(Ok((_, true))))
            }
            // Nothing is known of what it would answer, and only the operator may say what may be asked.
            (Protocol::Http1, HealthKind::Tcp | HealthKind::None) => false,
        }
    }

    async fn connect(&self) -> Result<Box<dyn Connection>, String> {
        let opened = async {
            let mut io = self.dial.connect(self.address).await?;
            if let Some(version) = self.send_proxy_protocol {
                io.write_all(version.of_nobody()).await?;
                io.flush().await?;
            }
            io::Result::Ok(io)
        };
        opened.await.map_err(|error| format!("cannot connect to {}: {error}", self.address))
    }

    async fn get(&self, path: &str) -> Result<Answer, String> {
        self.exchange(path, false).await.map(|(answer, _)| answer)
    }

    /// Asks once, and says whether the copy would `keep` the connection, if it was asked to.
    async fn exchange(&self, path: &str, keep: bool) -> Result<(Answer, bool), String> {
        let begun = Instant::now();
        let io = TokioIo::new(self.connect().await?);
        let connecting = begun.elapsed();
        let authority = self.host.clone().unwrap_or_else(|| self.address.to_string());
        let broken = |error: hyper::Error| format!("{path}: {error}");
        let builder = http::Request::get(match self.protocol {
            Protocol::Http1 => path.to_owned(),
            Protocol::H2c => format!("http://{authority}{path}"),
        });
        let builder = builder.header("user-agent", "peregrine-warm").header("accept", "*/*");
        let builder = match self.protocol {
            Protocol::Http1 if keep => builder.header("host", &authority),
            Protocol::Http1 => builder.header("host", &authority).header("connection", "close"),
            Protocol::H2c => builder,
        };
        let request = builder.body(Empty::<Bytes>::new()).map_err(|error| format!("{path}: {error}"))?;
        // The connection is driven in this task, so that it ends with the probe.
        let (status, kept) = match self.protocol {
            Protocol::Http1 => {
                let (mut send, driver) = hyper::client::conn::http1::handshake(io).await.map_err(broken)?;
                answered(send.send_request(request), driver).await.map_err(broken)?
            }
            Protocol::H2c => {
                let (mut send, driver) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.map_err(broken)?;
                answered(send.send_request(request), driver).await.map_err(broken)?
            }
        };
        Ok((Answer { status, own: begun.elapsed().saturating_sub(connecting * 2) }, kept))
    }
}

/// Reads an answer to its end: its status, and whether its connection may be used again.
async fn answered(
    response: impl Future<Output = hyper::Result<http::Response<hyper::body::Incoming>>>,
    driver: impl Future<Output = hyper::Result<()>>,
) -> hyper::Result<(u16, bool)> {
    let exchange = async {
        let response = response.await?;
        let status = response.status().as_u16();
        let closes = response.headers().get_all(http::header::CONNECTION).iter().any(|value| {
            let options = value.to_str().unwrap_or("close").split(',');
            options.into_iter().any(|option| option.trim().eq_ignore_ascii_case("close"))
        });
        let kept = !closes && response.version() != http::Version::HTTP_10;
        let mut body = response.into_body();
        let mut read = 0;
        while let Some(frame) = body.frame().await {
            read += frame?.data_ref().map_or(0, Bytes::len);
            if read > MAX_PROBE_BODY_BYTES {
                break;
            }
        }
        Ok((status, kept))
    };
    tokio::pin!(exchange, driver);
    tokio::select! {
        biased;
        done = &mut exchange => done,
        ended = &mut driver => match ended {
            // The connection may close right after the answer, which is still to be read.
            Ok(()) => exchange.await,
            Err(error) => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt as _, DuplexStream};

    use super::*;
    use crate::outside::Connection;

    /// A probe of a copy, and the copy's end of its only connection.
    fn probe(send_proxy_protocol: Option<ProxyProtocol>) -> (Probe, DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(1_024);
        let ours = Arc::new(Mutex::new(Some(ours)));
        let dial = Dial::new(move |_| {
            let io = ours.lock().expect("lock").take();
            Box::pin(async move {
                let io = io.ok_or(io::ErrorKind::ConnectionRefused)?;
                Ok(Box::new(io) as Box<dyn Connection>)
            })
        });
        let probe = Probe {
            address: ([127, 0, 0, 1], 1).into(),
            protocol: Protocol::Http1,
            send_proxy_protocol,
            host: None,
            health: HealthSpec::default(),
            dial,
        };
        (probe, theirs)
    }

    #[tokio::test]
    async fn a_probe_of_a_copy_that_insists_on_a_header_says_that_it_is_for_nobody() {
        for (version, header) in [
            (None, &b""[..]),
            (Some(ProxyProtocol::V1), b"PROXY UNKNOWN\r\n"),
            (Some(ProxyProtocol::V2), b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
        ] {
            let (connects, mut theirs) = probe(version);
            connects.once().await.expect("it connects");
            drop(connects);
            let mut said = Vec::new();
            theirs.read_to_end(&mut said).await.expect("is read");
            assert_eq!(said, header);

            let (asks, mut theirs) = probe(version);
            let copy = async {
                let mut said = vec![0; header.len() + 4];
                theirs.read_exact(&mut said).await.expect("is read");
                theirs.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("is written");
                said
            };
            let (answer, said) = tokio::join!(asks.warm_up("/"), copy);
            assert_eq!((answer.map(|answer| answer.status), said), (Ok(204), [header, b"GET "].concat()));
        }
    }

    #[tokio::test]
    async fn no_connection_waits_for_a_client_of_whom_it_would_have_to_say_who_he_is() {
        let (mut asks, _theirs) = probe(Some(ProxyProtocol::V2));
        asks.health.kind = HealthKind::Http { path: "/".into() };
        assert!(!asks.keeps_connections().await);
    }
}
