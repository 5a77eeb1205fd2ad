//! When the authority wants a certificate to be renewed (RFC 9773).

use super::{Context, Tracked, records};
use crate::domain::Window;
use crate::vault::VaultError;

/// An authority is asked for its window again after this time at the earliest and at the latest (RFC 9773 §4.3.2).
const ASK_WINDOW_MIN_MS: u64 = 60_000;
const ASK_WINDOW_MAX_MS: u64 = 24 * 3_600_000;
/// The same when it gave no answer (§4.3.3).
const ASK_WINDOW_FAILED_MS: u64 = 6 * 3_600_000;
/// Asks the authority when to renew (RFC 9773).
pub(super) async fn ask_window(cx: &Context, tracked: &mut Tracked) -> Result<(), VaultError> {
    let now_ms = cx.now_ms();
    let (window, ask_ms) = match window(cx, tracked).await {
        Ok(Some((window, after_ms))) => {
            (Some(window), Some(now_ms + after_ms.clamp(ASK_WINDOW_MIN_MS, ASK_WINDOW_MAX_MS)))
        }
        Ok(None) => (None, None),
        Err(why) => {
            tracing::info!(domain = tracked.domain.name, why, "the authority does not say when to renew");
            (None, Some(now_ms + ASK_WINDOW_FAILED_MS))
        }
    };
    tracked.domain.set_window(window, ask_ms, cx.random());
    tracked.save(cx.vault.as_ref(), Vec::new()).await
}

async fn window(cx: &Context, tracked: &Tracked) -> Result<Option<(Window, u64)>, String> {
    let Some(held) = &tracked.domain.held else { return Ok(None) };
    let authority = cx.authorities.iter().find(|a| Some(&a.config.id) == held.ca.as_ref());
    let leaf = records::leaf(cx.vault.as_ref(), held.id).await.map_err(|e| e.to_string())?;
    let (Some(authority), Some(ari)) = (authority, leaf.and_then(|leaf| leaf.ari)) else { return Ok(None) };
    if let Some((_, why)) = authority.paused(cx.now_ms()) {
        return Err(why);
    }
    let asked = async { authority.session(cx.vault.as_ref(), &cx.seal).await?.window(&ari).await };
    asked.await.map_err(|error: crate::acme::AcmeError| {
        authority.failed(&error, cx.now_ms(), cx.random(), &cx.config.limits);
        error.to_string()
    })
}
