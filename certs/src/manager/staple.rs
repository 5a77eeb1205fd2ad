//! What is stapled to a certificate: asked of the responder that it names (RFC 6960), checked, kept beside it, told to the edges,
//! and asked for again at half of its time. A responder that is silent or talks nonsense costs nobody a handshake.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use peregrine_routing::{CertificateId, HostPattern, StapleId};

use super::records::LoadError;
use super::{Context, Tracked, records};
use crate::domain::StapleOutcome;
use crate::ocsp::{Checked, MAX_RESPONSE_BYTES, OcspError, Status, Subject, responder};
use crate::pem::{Bundle, read_chain};
use crate::vault::{Expected, VaultError, Write};

/// An answer has to be there within this time, connecting included.
const ANSWER_TIMEOUT_MS: u64 = 10_000;
/// What is asked in (RFC 6960 §A.1).
const ASKS: &str = "application/ocsp-request";
const ANSWERS: &str = "application/ocsp-response";

/// Connections to responders: in clear text, as answers are signed. Nothing is kept open: each is asked once in days.
pub(crate) struct Responders(Client<HttpConnector, Full<Bytes>>);

impl Responders {
    pub(crate) fn new() -> Self {
        Self(Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(HttpConnector::new()))
    }

    /// Asks a responder. Redirects are not followed.
    async fn ask(&self, url: &str, question: Vec<u8>) -> Result<Bytes, String> {
        let request = Request::post(url)
            .header(CONTENT_TYPE, ASKS)
            .header(ACCEPT, ANSWERS)
            .body(Full::new(Bytes::from(question)))
            .map_err(|error| format!("{url} is no address: {error}"))?;
        let work = async {
            let (head, body) = self.0.request(request).await.map_err(|error| error.to_string())?.into_parts();
            if head.status != StatusCode::OK {
                return Err(format!("it answered {}", head.status));
            }
            let body = Limited::new(body, MAX_RESPONSE_BYTES).collect().await;
            body.map(http_body_util::Collected::to_bytes)
                .map_err(|error| format!("its answer broke off: {error}"))
        };
        let answer = tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), work).await;
        let answer =
            answer.unwrap_or_else(|_| Err(format!("no answer within {} s", ANSWER_TIMEOUT_MS / 1_000)));
        answer.map_err(|why| format!("the responder {url}: {why}"))
    }
}

/// What an answer came to.
enum Answer {
    /// The certificate names no responder, or its issuer is not in its chain.
    Nobody,
    /// It may be stapled.
    Good(Bytes, Checked),
    /// The authority has revoked it.
    Revoked(u64),
}

/// Tells the edges what has changed, or asks the responder.
pub(super) async fn refresh(cx: &Context, tracked: &mut Tracked) -> Result<(), VaultError> {
    let Some(held) = &tracked.domain.held else { return Ok(()) };
    let (id, old) = (held.id, held.ocsp.staple);
    if held.ocsp.tell_ms.is_some() {
        return tell(cx, tracked).await;
    }
    let mut writes = Vec::new();
    let outcome = match ask(cx, id).await {
        Ok(Answer::Nobody) => StapleOutcome::Nobody,
        Ok(Answer::Good(response, checked)) => {
            let staple = staple_id(&response);
            writes.push(Write::put(records::staple_key(id), response.to_vec(), Expected::Anything));
            let Checked { this_update_ms, next_update_ms, .. } = checked;
            StapleOutcome::Good { staple, this_update_ms, next_update_ms }
        }
        Ok(Answer::Revoked(since_ms)) => StapleOutcome::Revoked { since_ms },
        Err(why) => {
            tracing::warn!(domain = tracked.domain.name, certificate = %id, why, "no staple");
            StapleOutcome::Failed
        }
    };
    tracked.domain.settle_staple(outcome, cx.now_ms(), cx.random(), &cx.config.limits);
    if let Some(held) = &tracked.domain.held
        && held.ocsp.staple.is_none()
        && old.is_some()
    {
        // Revoked, or over: nobody is to find it there.
        writes.push(Write::delete(records::staple_key(id), Expected::Anything));
    }
    if let StapleOutcome::Revoked { .. } = outcome {
        tracing::error!(domain = tracked.domain.name, certificate = %id, "its authority has revoked the certificate");
    }
    tracked.save(cx.vault.as_ref(), writes).await?;
    if tracked.domain.held.as_ref().is_some_and(|held| held.ocsp.tell_ms.is_some()) {
        return tell(cx, tracked).await;
    }
    Ok(())
}

async fn tell(cx: &Context, tracked: &mut Tracked) -> Result<(), VaultError> {
    let Some(held) = &mut tracked.domain.held else { return Ok(()) };
    let Ok(name) = HostPattern::parse(&tracked.domain.name) else { return Ok(()) };
    held.ocsp.tell_ms = match cx.front.publish(name, held.id, held.ocsp.staple).await {
        Ok(()) => None,
        Err(error) => {
            tracing::warn!(domain = tracked.domain.name, %error, "the edges do not know the new staple yet");
            Some(cx.now_ms() + cx.config.limits.order_retry_ms)
        }
    };
    tracked.save(cx.vault.as_ref(), Vec::new()).await
}

async fn ask(cx: &Context, id: CertificateId) -> Result<Answer, String> {
    let record = records::certificate(cx.vault.as_ref(), id).await.map_err(|error| error.to_string())?;
    let Some(record) = record else { return Ok(Answer::Nobody) };
    let chain = read_chain(&record.chain_pem).map_err(|error| error.to_string())?;
    let [own, issuer, ..] = &chain[..] else { return Ok(Answer::Nobody) };
    let Some(url) = responder(own) else { return Ok(Answer::Nobody) };
    let told = |error: OcspError| error.to_string();
    let subject = Subject::of(own, issuer).map_err(told)?;
    let response = cx.responders.ask(&url, subject.request().map_err(told)?).await?;
    let checked = subject.check(&response, cx.now_ms());
    let checked = checked.map_err(|error| format!("the responder {url}: {error}"))?;
    match checked.status {
        Status::Good => Ok(Answer::Good(response, checked)),
        Status::Revoked(since_ms) => Ok(Answer::Revoked(since_ms)),
        Status::Unknown => Err(format!("the responder {url} does not know the certificate")),
    }
}

/// What lies beside a certificate and may be stapled now: the response, and until when. It is checked again: the vault is not
/// believed more than a responder.
pub(super) async fn kept(cx: &Context, bundle: &Bundle) -> Result<Option<(Vec<u8>, u64)>, LoadError> {
    let [own, issuer, ..] = &bundle.chain[..] else { return Ok(None) };
    let id = bundle.leaf.id;
    let Some(found) = cx.vault.get(&records::staple_key(id)).await? else { return Ok(None) };
    let checked = Subject::of(own, issuer).and_then(|subject| subject.check(&found.bytes, cx.now_ms()));
    match checked {
        Ok(Checked { status: Status::Good, next_update_ms, .. }) => Ok(Some((found.bytes, next_update_ms))),
        Ok(_) | Err(OcspError::Over) => Ok(None),
        Err(error) => Err(LoadError::Damaged { id, cause: format!("its staple: {error}") }),
    }
}

fn staple_id(response: &[u8]) -> StapleId {
    let mut id = [0; 32];
    id.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, response).as_ref());
    StapleId(id)
}
