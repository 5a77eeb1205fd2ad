//! TLS of clients: reads the hello, finds what the table wants for its name, fetches the certificate if it is not at
//! hand, and shakes hands.
//!
//! ```text
//!   accepted ─► hello ─► domain ──► place ──► certificate ──► handshake ─► h1 or h2, as ALPN says
//!                 │        │ unknown: an alert, nothing else      (control thread loads, nobody else waits)
//!                 │        │ its certificate is on its way: waits for it   (`awaited`, bounded)
//!                 │        └ passed through: a tunnel to its service
//!                 └ acme-tls/1 alone: the answer to a validation, and no more
//! ```
//!
//! What a stranger says in a hello costs a look-up in the table and no more: no disk, no network, no memory that stays.
//! A handshake has one deadline from the accepted connection on. Keys are never shown, and sessions are in their
//! tickets: nothing is kept here for a client that has left.

mod accept;
mod authority;
mod awaited;
mod certificates;
mod challenge;
mod client;
mod hello;
mod metrics;
mod passthrough;
mod places;
mod settings;
mod source;
mod stream;
mod tickets;
mod wanted;

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use peregrine_routing::{DomainSpec, TableReader};

pub(crate) use self::accept::accept;
pub(crate) use self::authority::{Admitted, Verdict, admit, hsts};
use self::awaited::Waits;
use self::certificates::{Certificates, Loader};
pub use self::certificates::{certificate_id, staple_id};
use self::client::ClientIdentity;
pub(crate) use self::client::{CLIENT_CERT, CLIENT_CERT_CHAIN, CLIENT_CERT_SUBJECT};
use self::metrics::TlsMetrics;
pub(crate) use self::metrics::describe;
use self::places::Places;
use self::settings::Settings;
use self::source::NoCertificates;
pub use self::source::{Certificate, CertificateSource, SourceError, Staple};
pub(crate) use self::stream::TlsStream;
pub use self::tickets::{
    MAX_TICKET_KEYS, NoRandom, TICKET_KEY_LIFE_MS, TicketKeys, TicketKeysError, Tickets,
};
use crate::clock::now_ms;
use crate::config::Limits;

/// What a handshake has settled for all requests of its connection.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) domain: Arc<DomainSpec>,
    /// Who the client has proved to be.
    pub(crate) client: Option<ClientIdentity>,
}

/// What the cores of an edge share.
pub(crate) struct EdgeTls {
    certificates: Arc<Certificates>,
    waits: Arc<Waits>,
}

/// What is done for them on the control thread.
pub(crate) struct Work {
    loader: Loader,
    /// Keys of our own, to be replaced in time.
    own_keys: Option<(TicketKeys, Tickets)>,
}

/// What a core has of it.
pub(crate) struct CoreTls {
    shared: Arc<EdgeTls>,
    places: Rc<Places>,
    metrics: TlsMetrics,
    table: TableReader,
    /// Handshakes of this core that wait for a certificate.
    waiting: Rc<Cell<u32>>,
}

impl EdgeTls {
    pub(crate) fn new(
        source: Option<Arc<dyn CertificateSource>>,
        tickets: Option<Tickets>,
        limits: &Limits,
    ) -> io::Result<(Arc<Self>, Work)> {
        let (tickets, own_keys) = match tickets {
            Some(tickets) => (tickets, None),
            None => {
                let keys = TicketKeys::generate(now_ms()).map_err(io::Error::other)?;
                let tickets = Tickets::new(&keys);
                (tickets.clone(), Some((keys, tickets)))
            }
        };
        let max = limits.max_certificates as usize;
        let source = source.unwrap_or_else(|| Arc::new(NoCertificates));
        let (certificates, loader) = Certificates::new(source, Settings::new(tickets), max);
        let waits = Waits::new(limits);
        Ok((Arc::new(Self { certificates, waits }), Work { loader, own_keys }))
    }
}

impl Work {
    pub(crate) async fn run(self) {
        if let Some((keys, tickets)) = self.own_keys {
            tokio::task::spawn_local(rotate(keys, tickets));
        }
        self.loader.run().await;
    }
}

/// Replaces keys that nobody else cares for.
async fn rotate(mut keys: TicketKeys, tickets: Tickets) {
    let life = std::time::Duration::from_millis(TICKET_KEY_LIFE_MS);
    loop {
        tokio::time::sleep(life).await;
        match keys.rotated(now_ms()) {
            Ok(next) => keys = next,
            Err(error) => {
                tracing::error!(%error, "session tickets keep their keys for longer than they should");
                continue;
            }
        }
        tickets.replace(&keys);
    }
}

impl CoreTls {
    pub(crate) fn new(shared: Arc<EdgeTls>, limits: &Limits, table: TableReader) -> Self {
        let places = Places::new(limits.max_handshakes_per_core, limits.max_handshakes_per_network);
        Self { shared, places, metrics: TlsMetrics::new(), table, waiting: Rc::default() }
    }

    /// Hands the counts to the metrics.
    pub(crate) fn flush(&self) {
        self.metrics.flush(self.waiting.get());
    }
}
