//! The certificates that an edge has at hand: those used last, loaded when the first handshake needs them.
//!
//! ```text
//!   handshake ─► at hand? ─► its settings
//!                   └─ no ─► failed a moment ago? ─► refused      (bounded, forgotten after a while)
//!                              └─ no ─► control thread: source.load() ─► all who wait go on
//! ```
//!
//! What is stapled to a certificate changes while the certificate stays: where the table names another staple than the one at hand, the
//! source is asked again, and what is at hand is presented meanwhile. Where it names none, none is stapled; nor is one that is over.
//!
//! Shared by the cores of an edge. A handshake takes the lock for a look-up, a request never. What is kept is bounded in
//! number; only names of the table's certificates ever get here, so what strangers say costs nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest;
use peregrine_routing::{CertificateId, DomainSpec, HostPattern, StapleId};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;
use tokio::sync::{mpsc, oneshot};

use super::places::Network;
use super::settings::{Only, Settings, SettingsKey, Stapled};
use super::source::{Certificate, CertificateSource, SourceError, Staple};
use super::wanted::{Answer, Wanted};
use crate::clock::now_ms;

/// Certificates that are being loaded at a time. More would be a source that does not answer.
const MAX_LOADING: usize = 256;
/// How long a source has.
const LOAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a certificate that could not be loaded is not asked for again.
const FAILED_FOR_MS: u64 = 10_000;
/// A certificate that has just been loaded is not asked for again because of its staple for so long: table and source may
/// be told of a new one one after the other.
const AGAIN_AFTER_MS: u64 = 1_000;
/// Failures that are remembered.
const MAX_REMEMBERED: usize = 4_096;

/// What was loaded of a certificate.
#[derive(Clone)]
struct Loaded {
    key: Arc<CertifiedKey>,
    /// What is stapled, and the same key with it.
    staple: Option<(StapleId, Arc<Stapled>)>,
}

impl Loaded {
    fn resolver(&self, is_stapled: bool) -> Arc<dyn ResolvesServerCert> {
        match &self.staple {
            Some((_, stapled)) if is_stapled => Arc::clone(stapled) as _,
            _ => Arc::new(Only(Arc::clone(&self.key))),
        }
    }
}

/// What is at hand for a certificate.
#[derive(Clone)]
struct Entry {
    loaded: Loaded,
    /// One for each policy that it is used with.
    settings: Vec<(SettingsKey, Arc<ServerConfig>)>,
    /// Not asked for again before, Unix time in milliseconds.
    again_ms: u64,
}

/// Why there is nothing to present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// It could not be loaded.
    Failed,
    /// Too many are being loaded.
    Busy,
}

struct Inner {
    /// Used since the last turn.
    recent: HashMap<CertificateId, Entry>,
    /// Used before that; those that are used again move over, the others go with the next turn.
    before: HashMap<CertificateId, Entry>,
    loading: HashMap<CertificateId, Vec<oneshot::Sender<()>>>,
    /// Until when not to ask again.
    failed: HashMap<CertificateId, u64>,
}

/// The certificates of an edge.
pub(crate) struct Certificates {
    inner: Mutex<Inner>,
    wanted: Wanted,
    /// How many are kept.
    max: usize,
    asks: mpsc::UnboundedSender<(CertificateId, HostPattern)>,
    source: Arc<dyn CertificateSource>,
    settings: Settings,
}

/// The end that loads; runs on the control thread.
pub(crate) struct Loader {
    asks: mpsc::UnboundedReceiver<(CertificateId, HostPattern)>,
    certificates: Arc<Certificates>,
}

enum Found {
    Settings(Arc<ServerConfig>),
    Key(Loaded),
    Wait(oneshot::Receiver<()>),
    Missing(Missing),
}

impl Certificates {
    pub(crate) fn new(
        source: Arc<dyn CertificateSource>,
        settings: Settings,
        max: usize,
    ) -> (Arc<Self>, Loader) {
        let (asks, asked) = mpsc::unbounded_channel();
        let inner = Inner {
            recent: HashMap::new(),
            before: HashMap::new(),
            loading: HashMap::new(),
            failed: HashMap::new(),
        };
        let (inner, wanted) = (Mutex::new(inner), Wanted::default());
        let certificates = Arc::new(Self { inner, wanted, max, asks, source, settings });
        (Arc::clone(&certificates), Loader { asks: asked, certificates })
    }

    pub(crate) const fn provider(&self) -> &Arc<CryptoProvider> {
        self.settings.provider()
    }

    /// What a handshake for `domain` goes on with. Waits if the certificate has to be loaded.
    pub(crate) async fn get(
        &self,
        id: CertificateId,
        domain: &DomainSpec,
        key: &SettingsKey,
    ) -> Result<Arc<ServerConfig>, Missing> {
        let mut waited = false;
        loop {
            match self.find(id, domain, key, waited) {
                Found::Settings(settings) => return Ok(settings),
                Found::Key(loaded) => {
                    // Made without the lock: two that make it at once make the same.
                    let made = self.settings.make(loaded.resolver(key.is_stapled), key).map_err(|error| {
                        tracing::error!(certificate = %id, %error, "a certificate cannot be used as its domain wants it");
                        Missing::Failed
                    })?;
                    self.lock().keep(id, key, &loaded, &made);
                    return Ok(made);
                }
                Found::Wait(loaded) => {
                    // An error is the end of the loader, and with it of the edge.
                    let _ = loaded.await;
                    waited = true;
                }
                Found::Missing(why) => return Err(why),
            }
        }
    }

    /// Tells the source of a name without a certificate that somebody of a network wants, once in a while, and gives what it
    /// answers, or has answered; `None` where too many such names are known.
    pub(crate) fn want(&self, name: &str, network: Network) -> Option<Answer> {
        self.wanted.ask(name, network, now_ms(), || self.source.wanted(name))
    }

    fn find(&self, id: CertificateId, domain: &DomainSpec, key: &SettingsKey, waited: bool) -> Found {
        let mut inner = self.lock();
        if let Some(entry) = inner.touch(&id, self.max) {
            let made = entry.settings.iter().find(|(known, _)| known == key);
            let found = made.map_or_else(
                || Found::Key(entry.loaded.clone()),
                |(_, settings)| Found::Settings(Arc::clone(settings)),
            );
            let staple = entry.loaded.staple.as_ref().map(|(id, _)| *id);
            if domain.staple.is_some() && domain.staple != staple && entry.again_ms <= now_ms() {
                entry.again_ms = now_ms() + FAILED_FOR_MS;
                // Nobody waits for it. Without room it is the next handshake's turn, after a while.
                let has_room = inner.loading.len() < MAX_LOADING && !inner.loading.contains_key(&id);
                if has_room && self.asks.send((id, domain.name.clone())).is_ok() {
                    inner.loading.insert(id, Vec::new());
                }
            }
            return found;
        }
        if waited || inner.failed.get(&id).is_some_and(|until_ms| *until_ms > now_ms()) {
            return Found::Missing(Missing::Failed);
        }
        if inner.loading.len() >= MAX_LOADING && !inner.loading.contains_key(&id) {
            return Found::Missing(Missing::Busy);
        }
        let (loaded, waits) = oneshot::channel();
        let is_asked = inner.loading.contains_key(&id);
        inner.loading.entry(id).or_default().push(loaded);
        if !is_asked && self.asks.send((id, domain.name.clone())).is_err() {
            inner.loading.remove(&id);
            return Found::Missing(Missing::Failed);
        }
        Found::Wait(waits)
    }

    fn loaded(&self, id: CertificateId, result: Result<Loaded, SourceError>) {
        let mut inner = self.lock();
        match result {
            Ok(loaded) => {
                inner.failed.remove(&id);
                inner.before.remove(&id);
                let again_ms = now_ms() + AGAIN_AFTER_MS;
                inner.insert(id, Entry { loaded, settings: Vec::new(), again_ms }, self.max);
            }
            // What is at hand is presented still: it was asked for again because of what is stapled.
            Err(error) if inner.touch(&id, self.max).is_some() => {
                tracing::warn!(certificate = %id, %error, "a staple cannot be had now");
            }
            Err(error) => {
                tracing::error!(certificate = %id, %error, "a certificate cannot be presented");
                let now_ms = now_ms();
                if inner.failed.len() >= MAX_REMEMBERED {
                    inner.failed.retain(|_, until_ms| *until_ms > now_ms);
                }
                if inner.failed.len() < MAX_REMEMBERED {
                    inner.failed.insert(id, now_ms + FAILED_FOR_MS);
                }
            }
        }
        for waiting in inner.loading.remove(&id).unwrap_or_default() {
            // Who has left does not wait.
            let _ = waiting.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in it is half-done at any point where it could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Notes a use.
    fn touch(&mut self, id: &CertificateId, max: usize) -> Option<&mut Entry> {
        if !self.recent.contains_key(id) {
            let entry = self.before.remove(id)?;
            self.insert(*id, entry, max);
        }
        self.recent.get_mut(id)
    }

    fn insert(&mut self, id: CertificateId, entry: Entry, max: usize) {
        if self.recent.len() >= (max / 2).max(1) {
            self.before = std::mem::take(&mut self.recent);
        }
        self.recent.insert(id, entry);
    }

    fn keep(&mut self, id: CertificateId, key: &SettingsKey, of: &Loaded, made: &Arc<ServerConfig>) {
        // Few: a certificate has the names of one owner, and these seldom differ in policy.
        const MAX_SETTINGS: usize = 16;
        // Unless it was loaded anew meanwhile.
        if let Some(entry) = self.recent.get_mut(&id).filter(|entry| Arc::ptr_eq(&entry.loaded.key, &of.key))
        {
            if entry.settings.len() >= MAX_SETTINGS {
                entry.settings.remove(0);
            }
            entry.settings.push((key.clone(), Arc::clone(made)));
        }
    }
}

impl Loader {
    /// Loads until the edge ends.
    pub(crate) async fn run(mut self) {
        while let Some((id, domain)) = self.asks.recv().await {
            let certificates = Arc::clone(&self.certificates);
            tokio::task::spawn_local(async move {
                let loaded = tokio::time::timeout(LOAD_TIMEOUT, certificates.source.load(id, &domain)).await;
                let result = loaded
                    .unwrap_or_else(|_| Err(SourceError::Failed("its source did not answer in time".into())))
                    .and_then(|certificate| certified(id, certificate, certificates.settings.provider()));
                certificates.loaded(id, result);
            });
        }
    }
}

/// Checks what a source gave, and makes it ready to sign.
fn certified(
    id: CertificateId,
    certificate: Certificate,
    provider: &CryptoProvider,
) -> Result<Loaded, SourceError> {
    let failed = |what: &dyn std::fmt::Display| SourceError::Failed(what.to_string());
    let Certificate { chain, key, staple } = certificate;
    let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
    let first = chain.first().ok_or_else(|| failed(&"its chain is empty"))?;
    if certificate_id(first) != id {
        return Err(failed(&"its source has given another one"));
    }
    let key = PrivateKeyDer::try_from(key).map_err(|error| failed(&error))?;
    let key = CertifiedKey::from_der(chain, key, provider).map_err(|error| failed(&error))?;
    let (with, key) = (key.clone(), Arc::new(key));
    let staple = staple.map(|Staple { response, until_ms }| {
        let id = staple_id(&response);
        let stapled = Arc::new(CertifiedKey { ocsp: Some(response), ..with });
        (id, Arc::new(Stapled { bare: Arc::clone(&key), stapled, until_ms }))
    });
    Ok(Loaded { key, staple })
}

/// The name of a staple in the table, from the DER of its OCSP response.
#[must_use]
pub fn staple_id(response: &[u8]) -> StapleId {
    let mut id = [0; 32];
    id.copy_from_slice(digest::digest(&digest::SHA256, response).as_ref());
    StapleId(id)
}

/// The name of a certificate in the table, from its DER.
#[must_use]
pub fn certificate_id(end_entity: &[u8]) -> CertificateId {
    let mut id = [0; 32];
    id.copy_from_slice(digest::digest(&digest::SHA256, end_entity).as_ref());
    CertificateId(id)
}
