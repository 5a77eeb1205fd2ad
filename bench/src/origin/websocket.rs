//! WebSocket echo over an upgraded HTTP/1.1 connection.

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

use super::Shared;

/// The end of a connection without a close frame (RFC 6455 §7.1.5).
const ABNORMAL: u16 = 1006;
/// A close frame without a code (RFC 6455 §7.1.5).
const NO_STATUS: u16 = 1005;

/// Echoes text and binary messages until the peer closes; says "going away" (1001) when the origin stops. Returns the
/// code of the peer's close frame.
pub(super) async fn echo(upgrade: OnUpgrade, shared: &Shared) -> u16 {
    // The client left before the switch: there is nobody to tell.
    let Ok(upgraded) = upgrade.await else { return ABNORMAL };
    let mut end = ABNORMAL;
    let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
    let mut going_away = false;
    loop {
        let message = tokio::select! {
            message = socket.next() => message,
            () = shared.stopped(), if !going_away => {
                going_away = true;
                let close = CloseFrame { code: CloseCode::Away, reason: "origin stops".into() };
                if socket.close(Some(close)).await.is_err() {
                    return end;
                }
                continue;
            }
        };
        // Pings are answered and a close is acknowledged by the library; errors mean that the peer is gone.
        let Some(Ok(message)) = message else { return end };
        if let Message::Close(frame) = &message {
            end = frame.as_ref().map_or(NO_STATUS, |frame| frame.code.into());
        }
        if (message.is_text() || message.is_binary()) && !going_away && socket.send(message).await.is_err() {
            return end;
        }
    }
}
