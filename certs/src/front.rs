//! The edges, as far as certificates are concerned.

use futures_util::future::BoxFuture;
use peregrine_routing::{CertificateId, ChallengeId, ChallengeSpec, HostPattern, StapleId};

/// Why the edges did not do what they were told. A retry is safe.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the edges cannot be told: {cause}")]
pub struct FrontError {
    /// Why, and which edge.
    pub cause: String,
}

/// Whoever answers validations and handshakes.
pub trait Front: Send + Sync + 'static {
    /// Resolves when every edge answers this validation: the authority may ask any of them.
    ///
    /// # Errors
    /// [`FrontError`] when an edge has not acknowledged it in time.
    fn answer(&self, challenge: ChallengeSpec) -> BoxFuture<'_, Result<(), FrontError>>;

    /// Ends that. Also of a challenge that nobody answers.
    ///
    /// # Errors
    /// [`FrontError`].
    fn withdraw(&self, challenge: ChallengeId) -> BoxFuture<'_, Result<(), FrontError>>;

    /// From now on `name` is served with `certificate`, which is in the vault, and with `staple`, if there is one, which
    /// lies beside it.
    ///
    /// # Errors
    /// [`FrontError`].
    fn publish(
        &self,
        name: HostPattern,
        certificate: CertificateId,
        staple: Option<StapleId>,
    ) -> BoxFuture<'_, Result<(), FrontError>>;
}
