//! A small listener for probes and collectors: `/livez`, `/readyz`, `/metrics`, and nothing else. For processes without an
//! API: an edge of its own, and an engine that stands by. Clear text, to anybody who reaches it; nothing can be changed here.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::config::MetricsText;

/// Says whether the process is ready, and how it stands. Called for each request, must not block.
pub type Report = Arc<dyn Fn() -> (bool, serde_json::Value) + Send + Sync>;

/// The listener, until it is dropped or ended.
pub struct Probes {
    address: SocketAddr,
    serving: JoinSet<()>,
}

impl Probes {
    /// Listens and answers. `metrics` gives the text of `/metrics`; without it there is none.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn bind(
        listen: SocketAddr,
        report: Report,
        metrics: Option<MetricsText>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        Self::on(listener.into_std()?, report, metrics)
    }

    /// As [`Probes::bind`], on a socket that listens already.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn on(
        listener: std::net::TcpListener,
        report: Report,
        metrics: Option<MetricsText>,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let mut router = Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(ready))
            .with_state(report);
        if let Some(metrics) = metrics {
            router = router.merge(Router::new().route("/metrics", get(text)).with_state(metrics));
        }
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "probes are not answered any more");
            }
        });
        Ok(Self { address, serving })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it. When this returns, the address is free.
    pub async fn end(mut self) {
        self.serving.shutdown().await;
    }
}

async fn ready(State(report): State<Report>) -> Response {
    let (ready, body) = report();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(body)).into_response()
}

async fn text(State(metrics): State<MetricsText>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics()).into_response()
}
