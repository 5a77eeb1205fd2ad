//! What an engine hands to its edges besides the table: certificates with their keys, and the keys of session tickets.
//!
//! An edge is handed the certificates that the table names, and no others, and only over the stream that both sides have
//! proved who they are on. Where they come from is for whoever puts the rooms together.

use futures_util::future::BoxFuture;
use peregrine_routing::CertificateId;
use tokio::sync::watch;

use crate::wire::{KeyedCertificate, Secret};

/// The engine's side.
pub trait Secrets: Send + Sync {
    /// A certificate that the table names, with its key; `None` if there is none of that name.
    ///
    /// # Errors
    /// Why it cannot be had now, in words.
    fn certificate(&self, id: CertificateId) -> BoxFuture<'_, Result<Option<KeyedCertificate>, String>>;

    /// An edge is asked for `name`, for which it has nothing. Must return at once; the future resolves when the table has a
    /// certificate for it (true), or when it is known that it has none soon.
    fn wanted(&self, name: &str) -> BoxFuture<'static, bool>;

    /// The keys of session tickets, now and from now on.
    fn ticket_keys(&self) -> watch::Receiver<Secret>;
}
