//! What this process asks an engine for besides its table. Bounded in number and in time; without an engine there is no
//! answer, and nobody waits for long.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use peregrine_routing::{CertificateId, HostPattern};
use tokio::sync::{mpsc, oneshot, watch};

use super::status::LinkStatus;
use crate::wire::{Given, KeyedCertificate, Secret};

/// Questions that wait for a connection.
const MAX_WAITING: usize = 256;
/// How long an answer is waited for, also while there is no connection.
const ANSWER_WITHIN_MS: u64 = 4_000;
/// Longest name that is told as wanted (RFC 1035 §2.3.4).
const MAX_NAME_BYTES: usize = 253;

/// Why an engine did not give a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotGiven {
    /// No engine has answered.
    #[error("no engine has answered within {ANSWER_WITHIN_MS} ms")]
    NoAnswer,
    /// It cannot be had now.
    #[error("the engine says: {0}")]
    NotNow(String),
}

/// A question.
pub(super) enum Ask {
    Certificate { id: CertificateId, domain: HostPattern, answer: oneshot::Sender<Arc<Given>> },
    Wanted { name: String, answer: oneshot::Sender<bool> },
}

/// The way to ask an engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SecretsHandle {
    asks: mpsc::Sender<Ask>,
    ticket_keys: watch::Receiver<Option<Secret>>,
    status: watch::Receiver<LinkStatus>,
}

/// The end of it that is the link's.
pub(super) struct Asked {
    pub(super) asks: mpsc::Receiver<Ask>,
    pub(super) ticket_keys: watch::Sender<Option<Secret>>,
}

pub(super) fn channel(status: watch::Receiver<LinkStatus>) -> (SecretsHandle, Asked) {
    let (asks, asked) = mpsc::channel(MAX_WAITING);
    let (tell, ticket_keys) = watch::channel(None);
    (SecretsHandle { asks, ticket_keys, status }, Asked { asks: asked, ticket_keys: tell })
}

impl SecretsHandle {
    /// A certificate that the table names for this domain, with its key; `None` if the engine has none, or its table
    /// does not name it there.
    ///
    /// # Errors
    /// [`NotGiven`]; it may be asked for again.
    pub async fn certificate(
        &self,
        id: CertificateId,
        domain: &HostPattern,
    ) -> Result<Option<KeyedCertificate>, NotGiven> {
        let asking = async {
            loop {
                let (answer, answered) = oneshot::channel();
                let ask = Ask::Certificate { id, domain: domain.clone(), answer };
                self.asks.send(ask).await.ok()?;
                // A connection that ended meanwhile gave none; the next one may.
                if let Ok(given) = answered.await {
                    return Some(given);
                }
            }
        };
        let given = tokio::time::timeout(Duration::from_millis(ANSWER_WITHIN_MS), asking).await;
        match given.ok().flatten().as_deref() {
            Some(Given::Certificate(certificate)) => Ok(Some(certificate.clone())),
            Some(Given::Nothing) => Ok(None),
            Some(Given::NotNow(why)) => Err(NotGiven::NotNow(why.clone())),
            None => Err(NotGiven::NoAnswer),
        }
    }

    /// Tells the engine of a name without a certificate that somebody shakes hands for; resolves to whether the table has one,
    /// when that is known. Without an engine, or with too much to say, it is not told: whoever wants it comes again.
    #[must_use = "it resolves to the answer; what is told is told also if nobody waits for that"]
    pub fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !self.is_connected() {
            return std::future::ready(false).boxed();
        }
        let (answer, answered) = oneshot::channel();
        if self.asks.try_send(Ask::Wanted { name: name.to_owned(), answer }).is_err() {
            tracing::debug!(%name, "too much to say: that a name is wanted is not told");
        }
        // An error: it was not told, or the connection has ended before the answer.
        async move { answered.await.unwrap_or(false) }.boxed()
    }

    /// Whether there is an engine to ask now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.status.borrow().engine.is_some()
    }

    /// The keys of session tickets as the engine told them last; `None` before the first time in this process.
    #[must_use]
    pub fn ticket_keys(&self) -> watch::Receiver<Option<Secret>> {
        self.ticket_keys.clone()
    }
}
