//! WebSockets as fast as they go: a message to the target, the same one back, the next one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::driver::Shared;
use super::options::{LoadError, LoadOptions, Tls};

/// Longest time for a connection with its handshakes, and for a message to come back.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to send, and for how long.
#[derive(Debug, Clone)]
pub struct EchoOptions {
    /// Where to connect to.
    pub target: SocketAddr,
    /// `Host`, and the name in the certificate.
    pub host: String,
    /// Path of the WebSocket.
    pub path: String,
    /// TLS 1.3; clear text without it.
    pub tls: Option<Tls>,
    /// WebSockets, each with one message under way.
    pub connections: usize,
    /// Length of a message, in bytes.
    pub message_bytes: usize,
    /// For how long, in milliseconds.
    pub duration_ms: u64,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Echoed {
    /// Messages that came back as they were sent.
    pub messages: u64,
    /// WebSockets that could not be opened, ended early, or brought something else back.
    pub failed: u64,
}

/// Runs to the end of [`EchoOptions::duration_ms`].
///
/// # Errors
/// The options contradict themselves; nothing was sent.
pub async fn echo(options: EchoOptions) -> Result<Echoed, LoadError> {
    let load = LoadOptions {
        host: options.host.clone(),
        tls: options.tls.clone(),
        ..LoadOptions::new(options.target)
    };
    let shared = Arc::new(Shared::new(load)?);
    let until = Instant::now() + Duration::from_millis(options.duration_ms);
    let (messages, options) = (Arc::new(AtomicU64::new(0)), Arc::new(options));
    let mut clients = JoinSet::new();
    for _ in 0..options.connections {
        clients.spawn(client(Arc::clone(&shared), Arc::clone(&options), until, Arc::clone(&messages)));
    }
    let mut echoed = Echoed::default();
    while let Some(ended) = clients.join_next().await {
        echoed.failed += u64::from(!matches!(ended, Ok(Ok(()))));
    }
    echoed.messages = messages.load(Ordering::Relaxed);
    Ok(echoed)
}

async fn client(
    shared: Arc<Shared>,
    options: Arc<EchoOptions>,
    until: Instant,
    messages: Arc<AtomicU64>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let opening = async {
        let stream = shared.connect().await?;
        let url = format!("ws://{}{}", options.host, options.path);
        let opened = tokio_tungstenite::client_async(url, stream).await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(opened.0)
    };
    let mut socket = tokio::time::timeout(PATIENCE, opening).await??;
    let message = Message::binary(vec![b'x'; options.message_bytes]);
    while Instant::now() < until {
        socket.send(message.clone()).await?;
        let back = tokio::time::timeout(PATIENCE, socket.next()).await?.ok_or("it ended")??;
        if back != message {
            return Err("that is another message".into());
        }
        messages.fetch_add(1, Ordering::Relaxed);
    }
    socket.close(None).await?;
    Ok(())
}
