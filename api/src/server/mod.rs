//! The server: a listener, the routes, and an end that is bounded.
//!
//! ```text
//!   connection ─► outer (id, time-out, problem+json) ─► access (name, origin, token) ─► idempotency ─► handler
//!                                                                                                  │
//!                                                                     EngineHandle ◄───────────────┘
//! ```
//!
//! HTTP/1.1 on clear text: for this machine, or behind something that speaks TLS. An address that others can
//! reach is refused unless the operator says in so many words that clear text is fine there.

mod access;
mod context;
mod error;
mod extract;
mod idempotency;
mod logs;
mod outer;
mod page;
mod router;
#[allow(unused_qualifications, reason = "utoipa's macro writes `<Query as IntoParams>`")]
mod routes;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use peregrine_engine::EngineHandle;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::context::{Context, Inner};
use self::idempotency::Answers;
pub use self::router::openapi_json;
use crate::config::{Config, Limits};
use crate::token::{TokenDigest, TokenError, read_or_make_token};

/// Pause after a failed accept (out of file descriptors): the next one would fail at once too.
const ACCEPT_PAUSE_MS: u64 = 100;

/// Why the API does not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address can be reached by others, and tokens would cross the network in clear text.
    #[error(
        "the API is not started on {0}: others can reach that address, and the token would go there in clear text. \
         Listen on 127.0.0.1 and come through SSH or a proxy that speaks TLS, or set \
         allow_clear_text_on_public_address = true"
    )]
    ClearText(SocketAddr),
    /// The address is taken or not ours.
    #[error("the API cannot listen on {address}: {source}")]
    Listen {
        /// Address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// There is no token.
    #[error(transparent)]
    Token(#[from] TokenError),
}

/// The API, listening and not yet answering.
pub struct Api {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    limits: Limits,
    closing: CancellationToken,
}

impl Api {
    /// Listens, and makes or reads the token.
    ///
    /// # Errors
    /// [`BindError`]: a public address without permission, an address that is taken, or no token.
    pub async fn bind(mut config: Config, engine: EngineHandle) -> Result<Self, BindError> {
        if !config.listen.ip().is_loopback() && !config.allow_clear_text_on_public_address {
            return Err(BindError::ClearText(config.listen));
        }
        let token = read_or_make_token(&config.data_dir)?;
        let failed = |source| BindError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        config.listen = address;
        let closing = CancellationToken::new();
        let limits = config.limits;
        let context = Context::new(Inner {
            engine,
            token: TokenDigest::of(&token),
            answers: Answers::new(&limits),
            openapi: openapi_json(),
            closing: closing.clone(),
            config,
        });
        Ok(Self { listener, address, router: router::router(&context), limits, closing })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown`; then streams end, open requests finish within the limit, and it returns.
    ///
    /// # Errors
    /// The listener itself is broken; a lack of file descriptors or memory is waited out.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> io::Result<()> {
        let Self { listener, router, limits, closing, .. } = self;
        let mut connections = JoinSet::new();
        let places = Arc::new(Semaphore::new(limits.max_connections));
        let mut shutdown = std::pin::pin!(shutdown);
        let ended = loop {
            while connections.try_join_next().is_some() {} // those that have ended
            let place = tokio::select! {
                () = &mut shutdown => break Ok(()),
                place = Arc::clone(&places).acquire_owned() => place,
            };
            let stream = tokio::select! {
                () = &mut shutdown => break Ok(()),
                stream = accept(&listener) => match stream {
                    Ok(stream) => stream,
                    Err(error) => break Err(error),
                },
            };
            let serving = serve(stream, router.clone(), limits, closing.clone());
            connections.spawn(async move {
                serving.await;
                drop(place);
            });
        };
        drop(listener);
        closing.cancel();
        let finish = async { while connections.join_next().await.is_some() {} };
        let limit = Duration::from_millis(limits.shutdown_timeout_ms);
        if tokio::time::timeout(limit, finish).await.is_err() {
            tracing::warn!(open = connections.len(), "API connections were cut at the shutdown");
        }
        ended
    }
}

async fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error), // it does not listen
            Err(error) => {
                tracing::warn!(%error, "the API cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, router: Router, limits: Limits, closing: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(limits.head_timeout_ms))
        .max_buf_size(limits.max_head_bytes)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an API connection ended early");
    }
}
