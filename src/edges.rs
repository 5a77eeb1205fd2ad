//! Edges in other processes, from the link's words into the API's; and what they are handed besides the table.

use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use peregrine_api::types::{Edge, EdgeState, Invite, instant};
use peregrine_api::{Edges, EdgesError};
use peregrine_link::{
    EdgeState as Standing, EdgeView, KeyedCertificate, LinkHandle, RegistryError, Secret, Secrets,
    Staple as Given,
};
use peregrine_proxy::{Certificate, SourceError, Staple};
use peregrine_routing::CertificateId;
use tokio::sync::watch;

use crate::certificates::AllCertificates;
use crate::ticket_keys::InstallationKeys;

/// The link as the API asks it.
pub(crate) struct LinkedEdges {
    link: LinkHandle,
    listen: std::net::SocketAddr,
}

impl LinkedEdges {
    /// Of a link that listens there.
    pub(crate) const fn new(link: LinkHandle, listen: std::net::SocketAddr) -> Self {
        Self { link, listen }
    }
}

/// What edges in other processes are handed: the certificates that an edge beside the engine would have, and the keys of
/// session tickets.
pub(crate) struct Handed {
    pub(crate) certificates: Arc<AllCertificates>,
    pub(crate) ticket_keys: Arc<InstallationKeys>,
}

impl Secrets for Handed {
    fn certificate(&self, id: CertificateId) -> BoxFuture<'_, Result<Option<KeyedCertificate>, String>> {
        async move {
            match self.certificates.find(id).await {
                Ok(Certificate { chain, key, staple }) => {
                    let staple = staple.map(|Staple { response, until_ms }| Given { response, until_ms });
                    Ok(Some(KeyedCertificate { chain, key: Secret::new(key), staple }))
                }
                Err(SourceError::Unknown) => Ok(None),
                Err(error @ SourceError::Failed(_)) => Err(error.to_string()),
            }
        }
        .boxed()
    }

    fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        self.certificates.is_wanted(name)
    }

    fn ticket_keys(&self) -> watch::Receiver<Secret> {
        self.ticket_keys.told()
    }
}

impl Edges for LinkedEdges {
    fn list(&self) -> Vec<Edge> {
        self.link.edges().into_iter().map(edge).collect()
    }

    fn invite(&self, name: &str, ttl_ms: u64) -> Result<Invite, EdgesError> {
        let made = self.link.invite(name, ttl_ms).map_err(|error| refused(&error))?;
        Ok(Invite {
            token: made.token.text(),
            name: made.edge,
            expires_at: instant(made.expires_at),
            listen: self.listen.to_string(),
        })
    }

    fn remove(&self, name: &str) -> Result<(), EdgesError> {
        self.link.remove(name).map_err(|error| refused(&error))
    }
}

fn refused(error: &RegistryError) -> EdgesError {
    match error {
        RegistryError::BadName(_) => EdgesError::BadName(error.to_string()),
        RegistryError::Unknown(_) => EdgesError::Unknown(error.to_string()),
        _ => EdgesError::Failed(error.to_string()),
    }
}

fn edge(view: EdgeView) -> Edge {
    Edge {
        name: view.name,
        state: match view.state {
            Standing::Connected => EdgeState::Connected,
            Standing::Waited => EdgeState::Waited,
            Standing::Lost => EdgeState::Lost,
            Standing::Away => EdgeState::Away,
        },
        address: view.address.map(|address| address.to_string()),
        cores: view.cores,
        lease_left_ms: view.lease_ms,
        table_version: view.table_version,
        newest_version: view.newest_version,
        saved: view.saved,
        problem: view.problem,
        seen_at: (view.seen_at > 0).then(|| instant(view.seen_at)),
        joined_at: instant(view.joined_at),
    }
}
