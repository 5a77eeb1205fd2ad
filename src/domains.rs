//! Domains that were added, and their certificates: the room that keeps them, on the engine's store, with the edges in front.
//!
//! ```text
//!   API ─► Domains ─► certs::Manager ─┬─ Vault ─► the engine's store
//!                                     └─ Front ─► the engine's table ─► every edge
//! ```
//!
//! How a domain is served (redirect, HSTS) is a record of its own beside that of the manager. A domain of the configuration file
//! goes before one that was added.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use peregrine_api::types::{
    CaaCheck, Certificate, CertificateExport, CertificateImport, CertificateSource as From_,
    ClientAuth as AskedFor, ClientAuthRequest, Domain, DomainCheck, DomainOrigin, DomainRequest, DomainState,
    Hsts, instant,
};
use peregrine_api::{Domains, DomainsError};
use peregrine_certs::{self as certs, DomainView, Manager, ManagerError};
use peregrine_config::{AcmeAuthority, AcmeChallenge, AcmeExternalAccount, AcmeSettings, TsigAlgorithm};
use peregrine_engine::vault::{VaultExpected, VaultWrite};
use peregrine_engine::{DomainChange, EngineError, EngineHandle};
use peregrine_routing::{
    CertificateId, ChallengeId, ChallengeSpec, ClientAuth, DomainPolicy, DomainSpec, HostPattern, NotAnId,
    StapleId, TableReader,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// File of the key with which private keys are sealed, in the data folder.
pub(crate) const KEY_FILE: &str = "certificates.key";
/// Records of the vault that are the manager's.
const MANAGER: &str = "certs/";
/// Records that say what a domain is served with, and how.
const FRONT: &str = "front/";
/// Every domain that has a certificate has a record there that names it. Written by the first start of a version that has them.
const FRONT_IS_WHOLE: &str = "front-is-whole";
/// Orders in all, and for one registered domain, in the window: half of what Let's Encrypt gives, as others may use its account.
const ORDERS: certs::BudgetLimit = certs::BudgetLimit { orders: 150, window_ms: 3 * 3_600_000 };
const ORDERS_PER_DOMAIN: certs::BudgetLimit =
    certs::BudgetLimit { orders: 25, window_ms: 7 * 24 * 3_600_000 };
/// Names that edges are asked for, and that are decided on at a time. Whoever is beyond comes again.
const MAX_WANTED: usize = 64;
/// Names whose certificates edges wait for at a time.
const MAX_AWAITED: usize = 1_024;
/// Longest wait for one; edges wait no longer than this whatever their configuration says (`[edge.limits] certificate_wait`).
const MAX_AWAITED_MS: u64 = 60_000;
/// Authorities of clients for one domain.
const MAX_CLIENT_AUTHORITIES: usize = 32;
/// Domains that are put into the table at once when the server starts: a change is held in memory twice.
const MAX_SHOWN_AT_ONCE: usize = 20_000;
/// Such parts that wait for the table.
const MAX_UNSHOWN: usize = 4;
/// Records that are written at once when a server starts.
const MAX_WRITTEN_AT_ONCE: usize = 250;
/// Largest file of a shared key.
const MAX_SECRET_BYTES: u64 = 16 << 10;
/// Largest file of authorities to trust.
const MAX_TRUST_BYTES: u64 = 1 << 20;

/// How a domain is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Served {
    redirect: bool,
    hsts: Option<Hsts>,
    #[serde(default)]
    client_auth: Option<ServedClientAuth>,
}

/// Certificates of clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ServedClientAuth {
    /// DER of authorities.
    authorities: Vec<Arc<[u8]>>,
    required: bool,
}

impl Default for Served {
    fn default() -> Self {
        Self { redirect: true, hsts: None, client_auth: None }
    }
}

impl Served {
    /// Of a record that cannot be read: nobody is let in, for it may have said who may come.
    fn closed() -> Self {
        let nobody = ServedClientAuth { authorities: Vec::new(), required: true };
        Self { client_auth: Some(nobody), ..Self::default() }
    }

    fn policy(&self) -> DomainPolicy {
        let hsts = self.hsts.map(|hsts| peregrine_routing::Hsts {
            max_age_seconds: hsts.max_age_seconds,
            include_subdomains: hsts.include_subdomains,
            preload: hsts.preload,
        });
        let client_auth = self.client_auth.as_ref().map(|auth| {
            Arc::new(ClientAuth { authorities: auth.authorities.clone(), required: auth.required })
        });
        DomainPolicy { redirect_to_https: self.redirect, hsts, client_auth, ..DomainPolicy::default() }
    }
}

/// What a domain is served with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Presented {
    certificate: CertificateId,
    staple: Option<StapleId>,
}

/// What is kept of a domain beside the manager's record.
///
/// What it is served with is in that record, too: here it is for a server that starts, which so serves a million domains before
/// it has read what there is to know of each.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    redirect: bool,
    hsts: Option<Hsts>,
    #[serde(default)]
    client_auth: Option<ServedClientAuth>,
    #[serde(default)]
    certificate: Option<String>,
    #[serde(default)]
    staple: Option<String>,
}

/// What is known of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Told {
    /// Most domains are served alike, and share it.
    served: Arc<Served>,
    presented: Option<Presented>,
}

impl Told {
    fn read(name: &str, bytes: &[u8]) -> Self {
        let read = || -> anyhow::Result<Self> {
            let Record { redirect, hsts, client_auth, certificate, staple } = serde_json::from_slice(bytes)?;
            let staple = staple.map(|id| id.parse()).transpose()?;
            let presented =
                certificate.map(|id| Ok::<_, NotAnId>(Presented { certificate: id.parse()?, staple }));
            let served = Arc::new(Served { redirect, hsts, client_auth });
            Ok(Self { served, presented: presented.transpose()? })
        };
        read().unwrap_or_else(|error| {
            tracing::error!(%name, %error, "how a domain is served cannot be read, so it is not: say it again with `peregrine domains add`");
            Self::unreadable()
        })
    }

    /// Of a record that cannot be read, or is damaged.
    fn unreadable() -> Self {
        Self { served: Arc::new(Served::closed()), presented: None }
    }

    /// It is never written over by the server itself: somebody has to say anew how the domain is served.
    fn is_unreadable(&self) -> bool {
        *self.served == Served::closed()
    }

    fn record(&self) -> Record {
        let Served { redirect, hsts, client_auth } = (*self.served).clone();
        let certificate = self.presented.map(|presented| presented.certificate.to_string());
        let staple = self.presented.and_then(|presented| presented.staple).map(|id| id.to_string());
        Record { redirect, hsts, client_auth, certificate, staple }
    }

    fn write(&self, name: &str) -> Result<VaultWrite, serde_json::Error> {
        let bytes = serde_json::to_vec(&self.record())?;
        Ok(VaultWrite {
            key: format!("{FRONT}{name}"),
            bytes: Some(bytes.into()),
            expected: VaultExpected::Anything,
        })
    }
}

/// The engine's store, as the manager writes into it.
struct Records(EngineHandle);

/// The edges, as the manager tells them.
struct Edges {
    engine: EngineHandle,
    shown: Mutex<Shown>,
    /// One record after the other: each is made of the one before.
    writing: tokio::sync::Mutex<()>,
}

/// What the edges are told.
#[derive(Default)]
struct Shown {
    names: BTreeMap<Arc<str>, Told>,
    /// Names that the configuration file decides on.
    configured: BTreeSet<String>,
}

/// Domains that were added.
pub(crate) struct Kept {
    manager: Manager,
    edges: Arc<Edges>,
    engine: EngineHandle,
    /// Something can be ordered.
    orders: bool,
    /// Additions, imports and removals go one after the other: each changes a record, a policy and the table.
    changing: tokio::sync::Mutex<()>,
    /// For control work: edges ask from threads of their own.
    runtime: tokio::runtime::Handle,
    wanted: Arc<Semaphore>,
    awaited: Arc<Semaphore>,
    vault: Arc<Records>,
    /// The manager knows every domain.
    is_read: watch::Sender<bool>,
}

impl Kept {
    /// Opens what is in the engine's store, and puts it into the table: a table that is made anew has no domains. Nothing is
    /// ordered before [`Self::run`], and little can be asked before [`Self::read`].
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    pub(crate) async fn open(
        engine: &EngineHandle,
        acme: Option<&AcmeSettings>,
        data: &Path,
        configured: impl IntoIterator<Item = String>,
        table: TableReader,
    ) -> anyhow::Result<Self> {
        let shown = Shown { configured: configured.into_iter().collect(), ..Shown::default() };
        let edges = Edges { engine: engine.clone(), shown: Mutex::new(shown), writing: Default::default() };
        edges.read().await?;
        let edges = Arc::new(edges);
        let seal = certs::SealKey::open_or_create(&data.join(KEY_FILE))?;
        let config = configuration(engine, acme, table)?;
        let runtime = tokio::runtime::Handle::current();
        let vault = Arc::new(Records(engine.clone()));
        let front = Arc::clone(&edges) as _;
        let manager =
            Manager::closed(config, Arc::clone(&vault) as _, front, seal, certs::Outside::system())?;
        let (orders, changing) = (acme.is_some(), tokio::sync::Mutex::default());
        let (wanted, awaited) = (Arc::new(Semaphore::new(MAX_WANTED)), Arc::new(Semaphore::new(MAX_AWAITED)));
        let (is_read, engine) = (watch::Sender::new(false), engine.clone());
        let kept =
            Self { manager, edges, engine, orders, changing, runtime, wanted, awaited, vault, is_read };
        if kept.engine.vault().get(FRONT_IS_WHOLE).await?.is_none() {
            kept.read().await?;
            let bytes = Some(Default::default());
            let whole = VaultWrite { key: FRONT_IS_WHOLE.into(), bytes, expected: VaultExpected::Anything };
            kept.engine.vault().commit(vec![whole]).await?;
        }
        Ok(kept)
    }

    /// Has the manager read its domains, unless it has. The edges are told where their records say something else: a server may
    /// end between two writes.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub(crate) async fn read(&self) -> anyhow::Result<()> {
        if *self.is_read.borrow() {
            return Ok(());
        }
        let mut seen = BTreeSet::new();
        let mut others = Vec::new();
        let visit = |name: &str, held: Option<(CertificateId, Option<StapleId>)>| {
            let presented = held.map(|(certificate, staple)| Presented { certificate, staple });
            let shown = self.edges.shown();
            let known = shown.names.get_key_value(name);
            if presented != known.and_then(|(_, told)| told.presented) {
                others.push((Arc::from(name), presented));
            }
            seen.extend(known.map(|(name, _)| Arc::clone(name)));
        };
        self.manager.refresh_with(visit).await?;
        // Of a domain that went, and whose record did not.
        others.extend(self.edges.presented_but(&seen).into_iter().map(|name| (name, None)));
        drop(seen);
        self.edges.correct(&others).await?;
        self.is_read.send_replace(true);
        Ok(())
    }

    /// Orders and renews, for ever.
    pub(crate) async fn run(&self) {
        self.manager.run().await;
    }

    /// The configuration file names these from now on: others are served as they were added.
    pub(crate) fn configure(&self, names: impl IntoIterator<Item = String>) {
        let mut shown = self.edges.shown();
        let before = std::mem::replace(&mut shown.configured, names.into_iter().collect());
        let freed: Vec<String> = before.difference(&shown.configured).cloned().collect();
        let changes = freed.iter().filter_map(|name| shown.change(name)).collect();
        drop(shown);
        self.edges.publish_now(changes);
    }

    /// What is known of domains, as metrics: the recorder is told, and lines of single domains are returned.
    pub(crate) fn measured(&self) -> String {
        crate::certificate_metrics::measure(&self.manager)
    }

    /// Where what is sealed lies.
    pub(crate) fn vault(&self) -> Arc<dyn certs::Vault> {
        Arc::clone(&self.vault) as _
    }

    /// The certificate and its key, opened.
    ///
    /// # Errors
    /// It is not there, or it cannot be read.
    pub(crate) async fn load(&self, id: CertificateId) -> Result<certs::Bundle, certs::LoadError> {
        self.manager.load(id).await
    }

    /// What may be stapled to a certificate now, and until when (Unix time in milliseconds). That it cannot be read is told, and
    /// is no reason not to serve.
    pub(crate) async fn staple(&self, bundle: &certs::Bundle) -> Option<(Vec<u8>, u64)> {
        let found = self.manager.staple(bundle).await;
        found.unwrap_or_else(|error| {
            tracing::error!(certificate = %bundle.leaf.id, %error, "what is stapled to a certificate cannot be read");
            None
        })
    }

    /// An edge is asked for `name`, for which it has nothing: whether it may have one is decided here. Resolves when the edges
    /// have been told of its certificate (true), or when none comes soon.
    pub(crate) fn wanted(self: &Arc<Self>, name: &str) -> BoxFuture<'static, bool> {
        let no = || std::future::ready(false).boxed();
        // Of most names that strangers make up that is known here: they cost no task.
        if *self.is_read.borrow() && !self.manager.could_have(name) {
            return no();
        }
        let Ok(place) = Arc::clone(&self.wanted).try_acquire_owned() else { return no() };
        let (kept, name) = (Arc::clone(self), name.to_owned());
        let (answer, answered) = oneshot::channel();
        // A task of its own: what has begun goes on also when nobody waits for it.
        self.runtime.spawn(async move {
            let has = kept.is_obtained(&name, place).await;
            // Who asked may have left.
            let _ = answer.send(has);
        });
        async move { answered.await.unwrap_or(false) }.boxed()
    }

    /// Decides on a name, and then waits for its certificate.
    async fn is_obtained(&self, name: &str, place: OwnedSemaphorePermit) -> bool {
        // It ends with the server, and with it who asks.
        if self.is_read.subscribe().wait_for(|is_read| *is_read).await.is_err() {
            return false;
        }
        let decided = self.manager.obtain(name, 0).await;
        // A place is for a decision: those who wait keep nobody from his.
        drop(place);
        let awaited = match (decided, self.awaited.try_acquire()) {
            (Err(ManagerError::NotYet { .. }), Ok(_place)) => self.manager.obtain(name, MAX_AWAITED_MS).await,
            (decided, _) => decided,
        };
        match awaited {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%name, %error, "no certificate on demand");
                false
            }
        }
    }

    fn told(&self, view: DomainView) -> Domain {
        let served = self.edges.shown().names.get(&*view.name).map(|told| Served::clone(&told.served));
        let served = served.unwrap_or_default();
        Domain {
            state: match &view.state {
                certs::DomainState::New => DomainState::New,
                certs::DomainState::WaitingForDns { .. } => DomainState::WaitingForDns,
                certs::DomainState::Waiting { .. } => DomainState::Waiting,
                certs::DomainState::Ordering { .. } => DomainState::Ordering,
                certs::DomainState::Valid { .. } => DomainState::Valid,
                certs::DomainState::Expired { .. } => DomainState::Expired,
                certs::DomainState::Revoked { .. } => DomainState::Revoked,
                certs::DomainState::Failed { .. } => DomainState::Failed,
            },
            message: view.state.to_string(),
            origin: match view.origin {
                certs::Origin::Added => DomainOrigin::Added,
                certs::Origin::OnDemand => DomainOrigin::OnDemand,
            },
            automatic: view.automatic,
            certificate: view.certificate.map(|id| id.to_string()),
            not_after: view.not_after_ms.map(instant),
            failures: view.failures,
            redirect: served.redirect,
            hsts: served.hsts,
            client_auth: served.client_auth.map(|auth| match auth.required {
                true => AskedFor::Required,
                false => AskedFor::Optional,
            }),
            added_at: instant(view.added_ms),
            name: view.name,
        }
    }

    fn refuse_configured(&self, name: &str) -> Result<(), DomainsError> {
        if !self.edges.shown().configured.contains(name) {
            return Ok(());
        }
        Err(DomainsError::Configured(format!("{name} is in the server's configuration file")))
    }

    /// Keeps how a domain is served, and has the edges serve it so.
    async fn serve(&self, name: &str, served: Served) -> Result<(), DomainsError> {
        let changed = self.edges.change(name, |told| told.served = Arc::new(served)).await;
        changed.map(drop).map_err(|error| DomainsError::Failed(error.to_string()))
    }
}

impl Shown {
    /// What the edges have to be told of a name; nothing where the configuration file decides, or there is no certificate.
    fn change(&self, name: &str) -> Option<DomainChange> {
        if self.configured.contains(name) {
            return None;
        }
        let (name, told) = self.names.get_key_value(name)?;
        let Presented { certificate, staple } = told.presented?;
        let pattern = match HostPattern::parse(name).ok()? {
            // The same in the table and here.
            HostPattern::Exact(host) if host == *name => HostPattern::Exact(Arc::clone(name)),
            pattern => pattern,
        };
        let policy = told.served.policy();
        Some(DomainChange::Put(DomainSpec { name: pattern, certificate: Some(certificate), staple, policy }))
    }

    fn unless_configured(&self, name: &str) -> Option<HostPattern> {
        if self.configured.contains(name) { None } else { HostPattern::parse(name).ok() }
    }
}

impl Edges {
    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what domains are served with, and puts it into the table on the way.
    async fn read(&self) -> anyhow::Result<()> {
        let mut names: Vec<(Arc<str>, Told)> = Vec::new();
        let mut like = Arc::<Served>::default();
        let mut unshown = 0;
        // The table takes as long for a domain as the reading does: it has a thread of its own.
        let (show, shown) = mpsc::channel(MAX_UNSHOWN);
        let showing = tokio::task::spawn_blocking(self.showing(shown));
        let vault = self.engine.vault();
        let read = vault.for_each(FRONT, |record| {
            let name = record.key.strip_prefix(FRONT).unwrap_or_default();
            let mut told = Told::read(name, &record.bytes);
            if told.served == like {
                told.served = Arc::clone(&like);
            } else {
                like = Arc::clone(&told.served);
            }
            names.push((name.into(), told));
            unshown += 1;
            if unshown >= MAX_SHOWN_AT_ONCE {
                // What finds no room goes with the next ones.
                let last = || names[names.len() - unshown..].to_vec();
                unshown = show.try_reserve().map_or(unshown, |place| {
                    place.send(last());
                    0
                });
            }
        });
        read.await?;
        for key in vault.damaged(FRONT) {
            names.push((key.strip_prefix(FRONT).unwrap_or_default().into(), Told::unreadable()));
            unshown += 1;
        }
        let last = names[names.len() - unshown..].to_vec();
        anyhow::ensure!(show.send(last).await.is_ok(), "the table takes no domains");
        drop(show);
        showing.await?;
        // Nearly all come in their order, and of those the map is made without a gap.
        self.shown().names = names.into_iter().collect();
        Ok(())
    }

    /// Puts into the table what comes, until nothing more does.
    fn showing(&self, mut shown: mpsc::Receiver<Vec<(Arc<str>, Told)>>) -> impl FnOnce() + Send + use<> {
        let (engine, configured) = (self.engine.clone(), self.shown().configured.clone());
        move || {
            let mut part = Shown { configured, ..Shown::default() };
            while let Some(names) = shown.blocking_recv() {
                part.names = names.into_iter().collect();
                publish(&engine, part.names.keys().filter_map(|name| part.change(name)).collect());
            }
        }
    }

    /// Names that are served and are not among these.
    fn presented_but(&self, names: &BTreeSet<Arc<str>>) -> Vec<Arc<str>> {
        let shown = self.shown();
        let others =
            shown.names.iter().filter(|(name, told)| told.presented.is_some() && !names.contains(*name));
        others.map(|(name, _)| Arc::clone(name)).collect()
    }

    /// Brings what the edges are told to what the manager knows: what a domain is served with, or nothing.
    async fn correct(&self, others: &[(Arc<str>, Option<Presented>)]) -> anyhow::Result<()> {
        let _one = self.writing.lock().await;
        for some in others.chunks(MAX_WRITTEN_AT_ONCE) {
            let mut corrected = Vec::with_capacity(some.len());
            for (name, presented) in some {
                let told = self.shown().names.get(name).cloned().unwrap_or_default();
                corrected.push((Arc::clone(name), Told { presented: *presented, ..told }));
            }
            let readable = corrected.iter().filter(|(_, told)| !told.is_unreadable());
            let writes = readable.map(|(name, told)| told.write(name)).collect::<Result<_, _>>()?;
            self.engine.vault().commit(writes).await?;
            let mut shown = self.shown();
            let mut changes = Vec::with_capacity(some.len());
            for (name, told) in corrected {
                let is_served = told.presented.is_some();
                shown.names.insert(Arc::clone(&name), told);
                changes.extend(if is_served {
                    shown.change(&name)
                } else {
                    shown.unless_configured(&name).map(DomainChange::Remove)
                });
            }
            self.publish_now(changes);
        }
        Ok(())
    }

    /// Changes what is known of a name: on the disk, and then in the table. Returns the version that the edges have to have.
    async fn change(&self, name: &str, change: impl FnOnce(&mut Told) + Send) -> anyhow::Result<Option<u64>> {
        let _one = self.writing.lock().await;
        let before = self.shown().names.get(name).cloned();
        let mut after = before.clone().unwrap_or_default();
        change(&mut after);
        if before.as_ref() != Some(&after) && !after.is_unreadable() {
            self.engine.vault().commit(vec![after.write(name)?]).await?;
        }
        let mut shown = self.shown();
        shown.names.insert(name.into(), after);
        let Some(change) = shown.change(name) else { return Ok(None) };
        Ok(Some(self.engine.publish_domains(vec![change])?))
    }

    /// Serves a name no longer. Says whether there was something to forget.
    async fn forget(&self, name: &str, is_served: bool) -> Result<bool, EngineError> {
        let _one = self.writing.lock().await;
        let (left, pattern) = {
            let mut shown = self.shown();
            (shown.names.remove(name).is_some(), shown.unless_configured(name))
        };
        // The edges first, and also if the record went and something failed behind it: a repetition gets to the end.
        if is_served || left {
            self.publish_now(pattern.map(DomainChange::Remove).into_iter().collect());
        }
        let key = format!("{FRONT}{name}");
        let gone = VaultWrite { key, bytes: None, expected: VaultExpected::Anything };
        self.engine.vault().commit(vec![gone]).await?;
        Ok(left)
    }

    fn publish_now(&self, changes: Vec<DomainChange>) {
        publish(&self.engine, changes);
    }

    async fn apply(&self, changes: Vec<DomainChange>) -> Result<(), certs::FrontError> {
        let told = self.engine.apply_domains(changes).await;
        told.map(drop).map_err(|error| certs::FrontError { cause: error.to_string() })
    }
}

fn publish(engine: &EngineHandle, changes: Vec<DomainChange>) {
    if changes.is_empty() {
        return;
    }
    if let Err(error) = engine.publish_domains(changes) {
        tracing::error!(%error, "domains were not published");
    }
}

impl certs::Front for Edges {
    fn answer(&self, challenge: ChallengeSpec) -> BoxFuture<'_, Result<(), certs::FrontError>> {
        self.apply(vec![DomainChange::PutChallenge(challenge)]).boxed()
    }

    fn withdraw(&self, challenge: ChallengeId) -> BoxFuture<'_, Result<(), certs::FrontError>> {
        self.apply(vec![DomainChange::RemoveChallenge(challenge)]).boxed()
    }

    fn publish(
        &self,
        name: HostPattern,
        certificate: CertificateId,
        staple: Option<StapleId>,
    ) -> BoxFuture<'_, Result<(), certs::FrontError>> {
        async move {
            let presented = Some(Presented { certificate, staple });
            let changed = self.change(&name.to_string(), |told| told.presented = presented).await;
            let version = changed.map_err(|error| certs::FrontError { cause: error.to_string() })?;
            if let Some(version) = version {
                self.engine.domains_acknowledged(version).await;
            }
            Ok(())
        }
        .boxed()
    }
}

impl certs::Vault for Records {
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<certs::Record>, certs::VaultError>> {
        async move {
            let records = self.0.vault().list(&format!("{MANAGER}{prefix}")).await.map_err(unavailable)?;
            Ok(records.into_iter().map(record).collect())
        }
        .boxed()
    }

    fn for_each<'a>(
        &'a self,
        prefix: &'a str,
        visit: &'a mut (dyn FnMut(certs::Record) + Send),
    ) -> BoxFuture<'a, Result<(), certs::VaultError>> {
        async move {
            let (vault, prefix) = (self.0.vault(), format!("{MANAGER}{prefix}"));
            let visited = vault.for_each(&prefix, |found| visit(record(found)));
            visited.await.map_err(unavailable)
        }
        .boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<certs::Record>, certs::VaultError>> {
        async move {
            let found = self.0.vault().get(&format!("{MANAGER}{key}")).await.map_err(unavailable)?;
            Ok(found.map(record))
        }
        .boxed()
    }

    fn commit(&self, writes: Vec<certs::Write>) -> BoxFuture<'_, Result<certs::Revision, certs::VaultError>> {
        async move {
            let keys: Vec<String> = writes.iter().map(|write| write.key.clone()).collect();
            let writes = writes.into_iter().map(|write| VaultWrite {
                key: format!("{MANAGER}{}", write.key),
                bytes: write.bytes.map(Into::into),
                expected: match write.expected {
                    certs::Expected::Absent => VaultExpected::Absent,
                    certs::Expected::Revision(revision) => VaultExpected::Revision(revision),
                    certs::Expected::Anything => VaultExpected::Anything,
                },
            });
            self.0.vault().commit(writes.collect()).await.map_err(|error| match error.code {
                // The store names the key; of those that begin alike it is the longest.
                "store.conflict" => {
                    let named = |key: &&String| error.message.contains(&format!("{MANAGER}{key}"));
                    let key = keys.iter().filter(named).max_by_key(|key| key.len()).or(keys.first());
                    certs::VaultError::Conflict { key: key.cloned().unwrap_or_default() }
                }
                _ => unavailable(error),
            })
        }
        .boxed()
    }
}

fn record(record: peregrine_engine::vault::VaultRecord) -> certs::Record {
    let key = record.key.strip_prefix(MANAGER).unwrap_or(&record.key).to_owned();
    certs::Record { key, bytes: record.bytes.into(), revision: record.revision }
}

fn unavailable(error: EngineError) -> certs::VaultError {
    certs::VaultError::Unavailable { cause: error.message }
}

impl Domains for Kept {
    fn list(&self) -> Vec<Domain> {
        let mut domains: Vec<Domain> = self.manager.list().into_iter().map(|view| self.told(view)).collect();
        domains.sort_by(|one, other| one.name.cmp(&other.name));
        domains
    }

    fn get(&self, name: &str) -> Option<Domain> {
        self.manager.get(&canonical(name).ok()?).map(|view| self.told(view))
    }

    fn add(&self, request: DomainRequest) -> BoxFuture<'_, Result<Domain, DomainsError>> {
        async move {
            let DomainRequest { name, redirect, hsts, client_auth } = request;
            let client_auth = client_auth.as_ref().map(client_authorities).transpose()?;
            let name = canonical(&name)?;
            let _one = self.changing.lock().await;
            self.refuse_configured(&name)?;
            let known = self.manager.get(&name);
            if known.is_none() && !self.orders {
                let why = format!("no authority is configured that {name} could get a certificate from");
                return Err(DomainsError::NoAuthority(why));
            }
            let view = match known {
                Some(view) => view,
                None => self.manager.add(&name).await.map_err(|error| refused(&error))?,
            };
            self.serve(&view.name, Served { redirect, hsts, client_auth }).await?;
            Ok(self.told(view))
        }
        .boxed()
    }

    fn check<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<DomainCheck, DomainsError>> {
        async move {
            let name = &*canonical(name)?;
            let check = self.manager.check(name).await.map_err(|error| refused(&error))?;
            let caa: Vec<CaaCheck> = check
                .caa
                .into_iter()
                .map(|(authority, may)| CaaCheck { authority, problem: may.err() })
                .collect();
            let dns = check.dns.err();
            Ok(DomainCheck {
                name: name.to_owned(),
                ok: dns.is_none() && caa.iter().all(|caa| caa.problem.is_none()),
                dns,
                caa,
                domain: check.domain.map(|view| self.told(view)),
            })
        }
        .boxed()
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), DomainsError>> {
        async move {
            let name = &*canonical(name)?;
            let _one = self.changing.lock().await;
            let known = self.manager.get(name).is_some();
            let forgotten = self.edges.forget(name, known).await;
            let left = forgotten.map_err(|error| DomainsError::Failed(error.to_string()))?;
            match self.manager.remove(name).await {
                Err(ManagerError::NoDomain(_)) if left => Ok(()),
                removed => removed.map_err(|error| refused(&error)),
            }
        }
        .boxed()
    }

    fn certificates(&self) -> BoxFuture<'_, Result<Vec<Certificate>, DomainsError>> {
        async move {
            let mut domains: BTreeMap<CertificateId, Vec<String>> = BTreeMap::new();
            for view in self.manager.list() {
                if let Some(id) = view.certificate {
                    domains.entry(id).or_default().push(view.name);
                }
            }
            let records = self.manager.certificates().await.map_err(|error| refused(&error))?;
            let mut certificates: Vec<Certificate> = records
                .into_iter()
                .map(|record| Certificate {
                    id: record.id.to_string(),
                    names: record.names,
                    issuer: record.issuer,
                    source: match record.source {
                        certs::Source::Acme => From_::Acme,
                        certs::Source::Import => From_::Import,
                    },
                    authority: record.ca,
                    not_before: instant(record.not_before_ms),
                    not_after: instant(record.not_after_ms),
                    domains: domains.remove(&record.id).unwrap_or_default(),
                    chain: record.chain_pem,
                })
                .collect();
            certificates.sort_by(|one, other| one.id.cmp(&other.id));
            Ok(certificates)
        }
        .boxed()
    }

    fn renew<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Domain, DomainsError>> {
        async move {
            let name = &*canonical(name)?;
            if self.manager.get(name).is_some() && !self.orders {
                return Err(DomainsError::NoAuthority("no authority is configured".into()));
            }
            self.manager.renew(name).await.map(|view| self.told(view)).map_err(|error| refused(&error))
        }
        .boxed()
    }

    fn import(&self, import: CertificateImport) -> BoxFuture<'_, Result<Domain, DomainsError>> {
        async move {
            let CertificateImport { domain, chain, key } = import;
            let domain = canonical(&domain)?;
            let _one = self.changing.lock().await;
            self.refuse_configured(&domain)?;
            let view = self.manager.import(&domain, &chain, &key).await.map_err(|error| refused(&error))?;
            Ok(self.told(view))
        }
        .boxed()
    }

    fn export<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<CertificateExport, DomainsError>> {
        async move {
            let name = &*canonical(name)?;
            let (chain, key) = self.manager.export(name).await.map_err(|error| refused(&error))?;
            Ok(CertificateExport { domain: name.to_owned(), chain, key: key.to_string() })
        }
        .boxed()
    }
}

/// As the table, the records and the file name it.
fn canonical(name: &str) -> Result<String, DomainsError> {
    let bad =
        |error: peregrine_routing::HostError| DomainsError::BadName(format!("{name} is no host: {error}"));
    HostPattern::parse(name).map(|pattern| pattern.to_string()).map_err(bad)
}

/// Reads the authorities of clients.
fn client_authorities(request: &ClientAuthRequest) -> Result<ServedClientAuth, DomainsError> {
    let bad = |why: String| DomainsError::BadCertificate(format!("the authorities of clients: {why}"));
    let mut authorities = Vec::new();
    let mut roots = rustls::RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(request.authorities.as_bytes()) {
        let der = der.map_err(|error| bad(format!("they are no PEM: {error}")))?;
        roots
            .add(der.clone())
            .map_err(|error| bad(format!("certificate {}: {error}", authorities.len() + 1)))?;
        authorities.push(Arc::from(&*der));
    }
    if authorities.is_empty() || authorities.len() > MAX_CLIENT_AUTHORITIES {
        let why = format!(
            "{} certificates in PEM, from 1 to {MAX_CLIENT_AUTHORITIES} are expected",
            authorities.len()
        );
        return Err(bad(why));
    }
    Ok(ServedClientAuth { authorities, required: request.required })
}

fn refused(error: &ManagerError) -> DomainsError {
    let why = error.to_string();
    match error {
        ManagerError::BadName { .. } => DomainsError::BadName(why),
        ManagerError::NoDomain(_) | ManagerError::NotAllowed(_) => DomainsError::Unknown(why),
        ManagerError::Busy => DomainsError::Busy(why),
        ManagerError::NotYet { .. } => DomainsError::NoCertificate(why),
        ManagerError::Pem(_) => DomainsError::BadCertificate(why),
        ManagerError::Vault(certs::VaultError::Conflict { .. }) => DomainsError::Busy(why),
        ManagerError::Load(_) | ManagerError::Vault(_) | ManagerError::Config(_) => DomainsError::Failed(why),
    }
}

fn configuration(
    engine: &EngineHandle,
    acme: Option<&AcmeSettings>,
    table: TableReader,
) -> anyhow::Result<certs::Config> {
    let mut config = certs::Config {
        // One engine leads at a time, and the next one goes on with what it had begun.
        holder: engine.install(),
        authorities: Vec::new(),
        challenges: Vec::new(),
        dns: certs::DnsConfig::default(),
        on_demand: certs::OnDemand::default(),
        limits: certs::Limits::default(),
    };
    let Some(acme) = acme else { return Ok(config) };
    for authority in &acme.authorities {
        config.authorities.push(self::authority(authority, acme.agree_to_terms)?);
    }
    config.challenges = acme
        .challenges
        .iter()
        .map(|challenge| match challenge {
            AcmeChallenge::Http01 => certs::ChallengeKind::Http01,
            AcmeChallenge::TlsAlpn01 => certs::ChallengeKind::TlsAlpn01,
            AcmeChallenge::Dns01 => certs::ChallengeKind::Dns01,
        })
        .collect();
    config.dns.resolvers.clone_from(&acme.resolvers);
    config.dns.expected_addresses.clone_from(&acme.addresses);
    config.dns.expected_aliases.clone_from(&acme.aliases);
    for dns in &acme.dns {
        let kind = match dns.algorithm {
            TsigAlgorithm::HmacSha256 => certs::TsigKind::HmacSha256,
            TsigAlgorithm::HmacSha384 => certs::TsigKind::HmacSha384,
            TsigAlgorithm::HmacSha512 => certs::TsigKind::HmacSha512,
        };
        let secret = secret("[[acme.dns]] secret_file", &dns.secret)?;
        let provider = certs::Rfc2136::new(dns.server, &dns.zone, &dns.key_name, kind, secret.to_vec())?;
        config.dns.providers.push((dns.zone.clone(), Arc::new(provider)));
    }
    config.on_demand.ask = acme.ask.clone().map(certs::AskConfig::new);
    config.on_demand.owned = acme
        .owned_on_demand
        .then(|| Arc::new(move |name: &str| table.load().names_host(name)) as certs::Owned);
    Ok(config)
}

fn authority(settings: &AcmeAuthority, terms_agreed: bool) -> anyhow::Result<certs::CaConfig> {
    let external = |account: &AcmeExternalAccount| {
        let hmac_key = secret("[acme] hmac_key_file", &account.hmac_key)?;
        Ok::<_, anyhow::Error>(certs::ExternalAccount { key_id: account.key_id.clone(), hmac_key })
    };
    Ok(certs::CaConfig {
        id: settings.name.clone(),
        directory_url: settings.directory.clone(),
        contacts: settings.contacts.iter().map(|contact| format!("mailto:{contact}")).collect(),
        terms_agreed,
        roots_pem: settings.trust.as_deref().map(trusted).transpose()?,
        external_account: settings.external_account.as_ref().map(external).transpose()?,
        profile: settings.profile.clone(),
        caa_identities: settings.caa.clone(),
        orders: ORDERS,
        orders_per_domain: ORDERS_PER_DOMAIN,
    })
}

/// A secret in base64 from a file of its owner's. What is in it is never told.
fn secret(key: &str, file: &Path) -> anyhow::Result<zeroize::Zeroizing<Vec<u8>>> {
    use std::os::unix::fs::MetadataExt as _;

    use anyhow::Context as _;
    let shown = file.display();
    let metadata = std::fs::metadata(file).with_context(|| format!("{key}: {shown}"))?;
    let mode = metadata.mode() & 0o777;
    anyhow::ensure!(
        mode & 0o077 == 0,
        "{key}: {shown} can be read by others (mode {mode:04o}): chmod 600 {shown}"
    );
    anyhow::ensure!(
        metadata.len() <= MAX_SECRET_BYTES,
        "{key}: {shown} is longer than any key: is it the right file?"
    );
    let text = zeroize::Zeroizing::new(std::fs::read(file).with_context(|| format!("{key}: {shown}"))?);
    let secret = std::str::from_utf8(&text).ok().and_then(certs::secret_of_base64);
    secret.with_context(|| format!("{key}: {shown} holds no key in base64"))
}

fn trusted(file: &Path) -> anyhow::Result<Vec<u8>> {
    use anyhow::Context as _;
    let size = std::fs::metadata(file).with_context(|| format!("[acme] trust: {}", file.display()))?.len();
    anyhow::ensure!(size <= MAX_TRUST_BYTES, "[acme] trust: {} is no file of authorities", file.display());
    std::fs::read(file).with_context(|| format!("[acme] trust: {}", file.display()))
}
