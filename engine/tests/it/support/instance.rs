//! An instance: a real HTTP server on loopback inside the test process, with an exact count of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// How an instance behaves; changed while it runs.
#[derive(Debug)]
pub(crate) struct Behaviour {
    pub(crate) status: AtomicU16,
    pub(crate) health_status: AtomicU16,
    pub(crate) delay_ms: AtomicU64,
    pub(crate) health_delay_ms: AtomicU64,
    /// Ends its connections after each answer.
    pub(crate) closes: AtomicBool,
    /// Requests to `/slow` wait until this is set.
    pub(crate) let_go: AtomicBool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            status: AtomicU16::new(200),
            health_status: AtomicU16::new(200),
            delay_ms: AtomicU64::new(0),
            health_delay_ms: AtomicU64::new(0),
            closes: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
        }
    }
}

/// What an origin knows of the requests that reached it, by request id.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<BTreeMap<String, u32>>, AtomicU64);

impl Seen {
    /// Copies of requests; they are no requests of clients.
    pub(crate) fn copies(&self) -> u64 {
        self.1.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> u64 {
        self.0.lock().expect("not poisoned").values().map(|times| u64::from(*times)).sum()
    }

    pub(crate) fn twice(&self) -> Vec<String> {
        self.0
            .lock()
            .expect("not poisoned")
            .iter()
            .filter(|(_, times)| **times > 1)
            .map(|(id, _)| id.clone())
            .collect()
    }
}

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) behaviour: Arc<Behaviour>,
    server: tokio::task::JoinHandle<()>,
}

impl Running {
    pub(crate) async fn start(behaviour: Arc<Behaviour>, seen: Arc<Seen>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (how, who) = (Arc::clone(&behaviour), seen);
        let server = tokio::spawn(async move {
            // Its connections end with it, as those of a process do.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (how, who) = (Arc::clone(&how), Arc::clone(&who));
                connections.spawn(async move {
                    let service = hyper::service::service_fn(move |request| {
                        answer(request, Arc::clone(&how), Arc::clone(&who))
                    });
                    let served = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                    drop(served); // a client that left is no news
                });
            }
        });
        Self { address, behaviour, server }
    }

    pub(crate) fn kill(&self) {
        self.server.abort();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer(
    request: Request<hyper::body::Incoming>,
    how: Arc<Behaviour>,
    who: Arc<Seen>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let status = if path == "/healthz" {
        how.health_status.load(Ordering::SeqCst)
    } else {
        if request.headers().contains_key("peregrine-mirror") {
            who.1.fetch_add(1, Ordering::SeqCst);
        } else if let Some(id) = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()) {
            *who.0.lock().expect("not poisoned").entry(id.to_owned()).or_default() += 1;
        }
        how.status.load(Ordering::SeqCst)
    };
    let delay = if path == "/healthz" { &how.health_delay_ms } else { &how.delay_ms };
    let delay = delay.load(Ordering::SeqCst);
    if delay > 0 {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    while path == "/slow" && !how.let_go.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut answer = Response::builder().status(status);
    if how.closes.load(Ordering::SeqCst) {
        answer = answer.header("connection", "close");
    }
    Ok(answer.body(Full::from("fine")).expect("a plain answer"))
}
