//! The manager: keeps domains, and works on those that are due. It sleeps until the earliest is, or somebody changes something.
//!
//! Everything that it knows is in the vault; its index is a copy. Two managers on one vault do not harm each other: an order is
//! claimed by a commit that only one can make. What another manager has changed is seen when it is due, or when
//! [`Manager::refresh`] is called.

mod attempt;
mod counts;
mod records;
mod staple;
mod views;
mod window;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use counts::Counters;
pub use counts::Counts;
use peregrine_routing::{CertificateId, HostPattern, StapleId};
pub use records::{CertificateRecord, LoadError, load_certificate};
use staple::Responders;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinSet;
use views::view;
pub use views::{Check, DomainView, Event, EventKind, ManagerError};
use window::ask_window;
use zeroize::Zeroizing;

use crate::acme::{Authorities, Authority};
use crate::ask::Asker;
use crate::config::{Config, Outside};
use crate::dns::{Names, Pointing};
use crate::domain::{Domain, Held, Ocsp, Origin, Source, Task};
use crate::front::Front;
use crate::pem::{Bundle, key_pem};
use crate::sealed::SealKey;
use crate::vault::{Expected, Revision, Vault, VaultError, Write};

/// Between two looks the manager sleeps at most so long: a clock that was set is noticed.
const MAX_SLEEP_MS: u64 = 60_000;
/// A change that somebody else's write keeps from being written is tried this often.
const MAX_CHANGE_TRIES: u32 = 16;
/// Events that a slow listener may be behind.
const MAX_EVENTS: usize = 1024;
/// Domains whose edges are told of a certificate, or whose responder is asked, at once.
const MAX_PUBLISHING: usize = 32;
/// The vault is read again this often: somebody else may have written, or it may not have been readable.
const READ_AGAIN_MS: u64 = 3_600_000;
/// A domain of an on-demand handshake that failed so often without a certificate is forgotten: a handshake brings it back.
const MAX_ON_DEMAND_FAILURES: u32 = 5;
/// Domains that are looked at while nobody else can look.
const MAX_VISITED_AT_ONCE: usize = 1000;
/// Domains of on-demand handshakes that may wait for their first certificate at once.
const MAX_ON_DEMAND: usize = 1000;

/// A domain with the revision that was read.
#[derive(Clone, Debug)]
pub(crate) struct Tracked {
    pub(crate) domain: Domain,
    pub(crate) revision: Option<Revision>,
}

impl Tracked {
    /// Makes the domain durable as it is now, together with `more`.
    pub(crate) async fn save(&mut self, vault: &dyn Vault, more: Vec<Write>) -> Result<(), VaultError> {
        let expected = self.revision.map_or(Expected::Absent, Expected::Revision);
        let mut writes = more;
        writes.push(Write::put(
            records::domain_key(&self.domain.name),
            records::json(&self.domain),
            expected,
        ));
        self.revision = Some(vault.commit(writes).await?);
        Ok(())
    }

    async fn read(cx: &Context, name: &str) -> Result<Option<Self>, VaultError> {
        let Some(found) = cx.vault.get(&records::domain_key(name)).await? else { return Ok(None) };
        Self::of(cx, &found).map(Some)
    }

    fn of(cx: &Context, found: &crate::vault::Record) -> Result<Self, VaultError> {
        let mut domain: Domain = serde_json::from_slice(&found.bytes)
            .map_err(|e| VaultError::Damaged { key: found.key.clone(), cause: e.to_string() })?;
        domain.bound(cx.now_ms(), &cx.config.limits);
        Ok(Self { domain, revision: Some(found.revision) })
    }
}

/// Attempts that are under way.
#[derive(Default)]
struct Running {
    tasks: JoinSet<()>,
    /// Whose they are, and whether they ask an authority.
    of: HashMap<tokio::task::Id, (String, bool)>,
    names: HashSet<String>,
}

impl Running {
    fn number(&self, asks_authority: bool) -> usize {
        self.of.values().filter(|(_, asks)| *asks == asks_authority).count()
    }

    fn start(&mut self, cx: Arc<Context>, name: String, asks_authority: bool) {
        self.names.insert(name.clone());
        let of = name.clone();
        let started = self.tasks.spawn(async move { work(&cx, &of).await });
        self.of.insert(started.id(), (name, asks_authority));
    }

    fn ended(&mut self, id: tokio::task::Id) -> Option<String> {
        let (name, _) = self.of.remove(&id)?;
        self.names.remove(&name);
        Some(name)
    }
}

/// What attempts need.
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) vault: Arc<dyn Vault>,
    pub(crate) front: Arc<dyn Front>,
    pub(crate) seal: SealKey,
    pub(crate) outside: Outside,
    pub(crate) authorities: Authorities,
    pub(crate) names: Names,
    pub(crate) pointing: Pointing,
    pub(crate) responders: Responders,
    asker: Option<Asker>,
    counters: Counters,
    index: Mutex<Index>,
    changed: Notify,
    events: broadcast::Sender<Event>,
}

/// The domains that are known, and when each is due.
#[derive(Default)]
struct Index {
    domains: BTreeMap<Arc<str>, Box<Known>>,
    due: BTreeSet<(u64, Arc<str>)>,
    /// How many domains are served with a certificate.
    used: HashMap<CertificateId, u32>,
    /// How often the vault was read, or is being read.
    reading: u64,
}

/// A domain of the index. There may be a million of them, so that what is the same twice is kept once.
struct Known {
    tracked: Tracked,
    due_ms: Option<u64>,
    /// It was in the vault at this reading.
    seen: u64,
}

impl Index {
    fn get(&self, name: &str) -> Option<&Tracked> {
        self.domains.get(name).map(|known| &known.tracked)
    }

    /// Takes what somebody has read or written, unless it is older than what is known.
    fn put(&mut self, tracked: Tracked, holder: &str) {
        let seen = self.reading;
        let known = self.domains.get_mut(&*tracked.domain.name);
        if let Some(known) = known.filter(|known| known.tracked.revision > tracked.revision) {
            known.seen = seen;
            return;
        }
        let name = match self.domains.get_key_value(&*tracked.domain.name) {
            Some((name, _)) => Arc::clone(name),
            None => Arc::from(&*tracked.domain.name),
        };
        self.remove(&name);
        let due_ms = tracked.domain.due(holder).map(|(due_ms, _)| due_ms);
        self.due.extend(due_ms.map(|due_ms| (due_ms, Arc::clone(&name))));
        if let Some(held) = &tracked.domain.held {
            *self.used.entry(held.id).or_default() += 1;
        }
        self.domains.insert(name, Box::new(Known { tracked, due_ms, seen }));
    }

    fn set_due(&mut self, name: &str, due_ms: Option<u64>) {
        let Some((name, _)) = self.domains.get_key_value(name) else { return };
        let name = Arc::clone(name);
        let Some(known) = self.domains.get_mut(&name) else { return };
        let before_ms = std::mem::replace(&mut known.due_ms, due_ms);
        if let Some(before_ms) = before_ms {
            self.due.remove(&(before_ms, Arc::clone(&name)));
        }
        self.due.extend(due_ms.map(|due_ms| (due_ms, name)));
    }

    fn remove(&mut self, name: &str) {
        let Some((name, known)) = self.domains.remove_entry(name) else { return };
        if let Some(due_ms) = known.due_ms {
            self.due.remove(&(due_ms, name));
        }
        let Some(held) = &known.tracked.domain.held else { return };
        let Some(count) = self.used.get_mut(&held.id) else { return };
        *count -= 1;
        if *count == 0 {
            self.used.remove(&held.id);
        }
    }
}

impl Context {
    pub(crate) fn now_ms(&self) -> u64 {
        (self.outside.now_ms)()
    }

    pub(crate) fn random(&self) -> u64 {
        (self.outside.random)()
    }

    fn index(&self) -> std::sync::MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `visit` with every domain, by name. Nobody waits for all of them: an edge may ask for one meanwhile.
    fn for_each(&self, mut visit: impl FnMut(&Arc<str>, &Known)) {
        let mut last: Option<Arc<str>> = None;
        loop {
            let index = self.index();
            let from = last.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
            let part = index.domains.range::<str, _>((from, Bound::Unbounded)).take(MAX_VISITED_AT_ONCE);
            let mut visited = None;
            for (name, known) in part {
                visit(name, known);
                visited = Some(Arc::clone(name));
            }
            let Some(name) = visited else { return };
            last = Some(name);
        }
    }

    /// Whether a domain other than `but` is served with this certificate.
    pub(crate) fn is_used(&self, id: CertificateId, but: &str) -> bool {
        let index = self.index();
        let by_all = index.used.get(&id).copied().unwrap_or(0);
        let own = index.get(but).and_then(|tracked| tracked.domain.held.as_ref());
        by_all > u32::from(own.is_some_and(|held| held.id == id))
    }

    /// Puts what is in the vault into the index, and tells of it if it is something else than before.
    fn note(&self, tracked: Tracked) {
        // A million domains are read when a server starts, and nobody listens then.
        let listened = self.events.receiver_count() > 0;
        let now_ms = self.now_ms();
        let name = tracked.domain.name.clone();
        let told = |tracked: &Tracked| {
            let domain = &tracked.domain;
            let held = domain.held.as_ref().map(|held| (held.id, held.published));
            (domain.state(now_ms), held)
        };
        let mut index = self.index();
        let before = if listened { index.get(&name).map(told) } else { None };
        index.put(tracked, &self.config.holder);
        self.changed.notify_one();
        // Who has begun to listen since finds it in the index, or hears of it here.
        if self.events.receiver_count() == 0 {
            return;
        }
        let Some(after) = index.get(&name).map(told) else { return };
        drop(index);
        if before.as_ref() != Some(&after) {
            // Nobody has to listen.
            let _unheard = self.events.send(Event { domain: name, what: EventKind::State(after.0) });
        }
    }

    fn forget(&self, name: &str) {
        self.index().remove(name);
        self.changed.notify_one();
        let _unheard = self.events.send(Event { domain: name.to_owned(), what: EventKind::Removed });
    }
}

/// Keeps domains and their certificates. Cheap to clone; [`Manager::run`] does the work.
#[derive(Clone)]
pub struct Manager {
    cx: Arc<Context>,
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("config", &self.cx.config).finish_non_exhaustive()
    }
}

impl Manager {
    /// Opens a manager, and reads all domains from the vault.
    ///
    /// # Errors
    /// [`ManagerError::Config`], [`ManagerError::Vault`].
    pub async fn open(
        config: Config,
        vault: Arc<dyn Vault>,
        front: Arc<dyn Front>,
        seal: SealKey,
        outside: Outside,
    ) -> Result<Self, ManagerError> {
        let manager = Self::closed(config, vault, front, seal, outside)?;
        manager.refresh().await?;
        Ok(manager)
    }

    /// A manager that knows of no domains before its first [`Manager::refresh`]. It loads certificates; whoever asks it for
    /// more is told what there is of nothing.
    ///
    /// # Errors
    /// [`ManagerError::Config`].
    pub fn closed(
        config: Config,
        vault: Arc<dyn Vault>,
        front: Arc<dyn Front>,
        seal: SealKey,
        outside: Outside,
    ) -> Result<Self, ManagerError> {
        let mut authorities = Authorities::new();
        for ca in &config.authorities {
            let bad = |cause: String| ManagerError::Config(format!("authority {}: {cause}", ca.id));
            if !ca.directory_url.starts_with("https://") {
                return Err(bad(format!("{} is no https:// URL (RFC 8555 §6.1)", ca.directory_url)));
            }
            if ca.id.is_empty()
                || ca.id.contains('/')
                || authorities.iter().any(|a: &Arc<Authority>| a.config.id == ca.id)
            {
                return Err(bad("its id is empty, has a slash, or is another's".into()));
            }
            authorities.push(Arc::new(Authority::new(ca.clone()).map_err(bad)?));
        }
        let names = Names::new(&config.dns.resolvers).map_err(ManagerError::Config)?;
        let pointing = Pointing {
            addresses: config.dns.expected_addresses.iter().copied().collect(),
            aliases: config
                .dns
                .expected_aliases
                .iter()
                .map(|a| a.trim_end_matches('.').to_ascii_lowercase())
                .collect(),
        };
        let asker = match &config.on_demand.ask {
            Some(ask) => {
                Some(Asker::new(ask.clone(), crate::acme::client_tls(None).map_err(ManagerError::Config)?))
            }
            None => None,
        };
        let (events, _) = broadcast::channel(MAX_EVENTS);
        let cx = Arc::new(Context {
            config,
            vault,
            front,
            seal,
            outside,
            authorities,
            names,
            pointing,
            responders: Responders::new(),
            asker,
            counters: Counters::default(),
            index: Mutex::default(),
            changed: Notify::new(),
            events,
        });
        Ok(Self { cx })
    }

    /// Reads all domains again: somebody else may have written.
    ///
    /// # Errors
    /// [`ManagerError::Vault`].
    pub async fn refresh(&self) -> Result<(), ManagerError> {
        self.refresh_with(|_, _| {}).await
    }

    /// The same, and calls `visit` with the name of each, and with what it is served and what is stapled to that.
    ///
    /// # Errors
    /// [`ManagerError::Vault`]. Some domains may have been visited then.
    pub async fn refresh_with(
        &self,
        mut visit: impl FnMut(&str, Option<(CertificateId, Option<StapleId>)>) + Send,
    ) -> Result<(), ManagerError> {
        let reading = {
            let mut index = self.cx.index();
            index.reading += 1;
            index.reading
        };
        let mut note = |record| match Tracked::of(&self.cx, &record) {
            Ok(tracked) => {
                let held = tracked.domain.held.as_ref();
                visit(&tracked.domain.name, held.map(|held| (held.id, held.ocsp.staple)));
                self.cx.note(tracked);
            }
            // One damaged record is no reason to let all others expire.
            Err(e) => tracing::error!(error = %e, "a domain is left out"),
        };
        self.cx.vault.for_each(records::DOMAINS, &mut note).await?;
        let mut gone = Vec::new();
        self.cx.for_each(|name, known| {
            if known.seen < reading {
                gone.push(Arc::clone(name));
            }
        });
        gone.iter().for_each(|name| self.cx.forget(name));
        Ok(())
    }

    /// How attempts ended since the start of this process.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.cx.counters.now()
    }

    /// What happens from now on. A listener that is too slow is told that it missed something.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.cx.events.subscribe()
    }

    /// Works for as long as it is polled. What is under way when it is dropped goes on with the next run.
    pub async fn run(&self) {
        let mut running = Running::default();
        let mut read = tokio::time::Instant::now();
        loop {
            let wake_ms = self.start_due(&mut running);
            let sleep = tokio::time::sleep(Duration::from_millis(wake_ms));
            tokio::select! {
                () = sleep => {}
                () = self.cx.changed.notified() => {}
                Some(done) = running.tasks.join_next_with_id(), if !running.tasks.is_empty() => {
                    let (id, panicked) = match done {
                        Ok((id, ())) => (id, None),
                        Err(e) => (e.id(), Some(e)),
                    };
                    let name = running.ended(id);
                    if let (Some(name), Some(error)) = (name, panicked) {
                        // It would happen again at once.
                        tracing::error!(domain = name, %error, "an attempt ended in the middle");
                        let again_ms = self.cx.now_ms() + self.cx.config.limits.order_retry_max_ms;
                        self.cx.index().set_due(&name, Some(again_ms));
                    }
                }
            }
            if read.elapsed() >= Duration::from_millis(READ_AGAIN_MS) {
                read = tokio::time::Instant::now();
                if let Err(error) = self.refresh().await {
                    tracing::error!(%error, "the domains cannot be read again");
                }
            }
        }
    }

    /// Starts what is due, the most urgent first. Returns for how long nothing else is.
    fn start_due(&self, running: &mut Running) -> u64 {
        let now_ms = self.cx.now_ms();
        let index = self.cx.index();
        let mut due: Vec<_> = index
            .due
            .iter()
            .take_while(|(due_ms, _)| *due_ms <= now_ms)
            .filter(|(_, name)| !running.names.contains(&**name))
            .filter_map(|(_, name)| index.get(name))
            .map(|tracked| {
                let task = tracked.domain.due(&self.cx.config.holder).map(|(_, task)| task);
                // Telling the edges, and asking for a staple, takes none of an order's places, and waits for none.
                let is_beside = matches!(task, Some(Task::Publish | Task::Staple));
                (!is_beside, tracked.domain.priority(), tracked.domain.name.clone())
            })
            .collect();
        let next_ms = index.due.iter().map(|(due_ms, _)| *due_ms).find(|due_ms| *due_ms > now_ms);
        drop(index);
        due.sort_unstable();
        for (asks_authority, _, name) in due {
            let room = if asks_authority { self.cx.config.limits.max_orders } else { MAX_PUBLISHING };
            if running.number(asks_authority) < room {
                running.start(Arc::clone(&self.cx), name, asks_authority);
            }
        }
        next_ms.map_or(MAX_SLEEP_MS, |at_ms| at_ms.saturating_sub(now_ms).clamp(1, MAX_SLEEP_MS))
    }

    /// Adds a name or a wildcard; does nothing if it is there.
    ///
    /// # Errors
    /// [`ManagerError::BadName`], [`ManagerError::Vault`].
    pub async fn add(&self, name: &str) -> Result<DomainView, ManagerError> {
        self.put(&certifiable(name)?, Origin::Added).await
    }

    async fn put(&self, name: &str, origin: Origin) -> Result<DomainView, ManagerError> {
        let now_ms = self.cx.now_ms();
        self.change(name, |found| Some(found.unwrap_or_else(|| Domain::new(name.to_owned(), origin, now_ms))))
            .await
    }

    /// Reads, changes and writes, again if somebody else has written meanwhile.
    async fn change(
        &self,
        name: &str,
        change: impl Fn(Option<Domain>) -> Option<Domain>,
    ) -> Result<DomainView, ManagerError> {
        self.change_with(name, &[], change).await
    }

    async fn change_with(
        &self,
        name: &str,
        more: &[Write],
        change: impl Fn(Option<Domain>) -> Option<Domain>,
    ) -> Result<DomainView, ManagerError> {
        let mut conflict = None;
        for _ in 0..MAX_CHANGE_TRIES {
            let found = Tracked::read(&self.cx, name).await?;
            let revision = found.as_ref().and_then(|found| found.revision);
            let before = found.map(|found| found.domain);
            let Some(after) = change(before.clone()) else {
                return Err(ManagerError::NoDomain(name.to_owned()));
            };
            let mut tracked = Tracked { domain: after, revision };
            if before.as_ref() != Some(&tracked.domain) {
                match tracked.save(self.cx.vault.as_ref(), more.to_vec()).await {
                    Ok(()) => {}
                    Err(e @ VaultError::Conflict { .. }) => {
                        conflict = Some(e);
                        continue;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            self.cx.note(tracked.clone());
            return Ok(view(&tracked.domain, self.cx.now_ms()));
        }
        Err(conflict.map_or_else(|| ManagerError::NoDomain(name.to_owned()), ManagerError::Vault))
    }

    /// Looks at DNS and CAA of a name now, and tries at once if it waits for them.
    ///
    /// # Errors
    /// [`ManagerError::BadName`], [`ManagerError::Vault`].
    pub async fn check(&self, name: &str) -> Result<Check, ManagerError> {
        let name = certifiable(name)?;
        let base = name.strip_prefix("*.").unwrap_or(&name);
        let wildcard = base.len() != name.len();
        let dns = if wildcard { Ok(()) } else { self.cx.names.check(base, &self.cx.pointing).await };
        let caa = self.cx.names.caa(base).await;
        let allowed = self.cx.authorities.iter().map(|authority| {
            let allowed = caa.as_ref().map_err(Clone::clone);
            let allowed = allowed.and_then(|caa| caa.allows(&authority.config.caa_identities, wildcard));
            (authority.config.id.clone(), allowed)
        });
        let caa = allowed.collect();
        let now_ms = self.cx.now_ms();
        let found = self.change(&name, |found| {
            found.map(|mut domain| {
                let waits = domain.order.is_none() && (domain.held.is_none() || domain.failures > 0);
                if waits && dns.is_ok() {
                    domain.hurry(now_ms);
                }
                domain
            })
        });
        let domain = match found.await {
            Ok(view) => Some(view),
            Err(ManagerError::NoDomain(_)) => None,
            Err(e) => return Err(e),
        };
        Ok(Check { domain, dns, caa })
    }

    /// All domains, by name.
    #[must_use]
    pub fn list(&self) -> Vec<DomainView> {
        let now_ms = self.cx.now_ms();
        let mut all = Vec::new();
        self.cx.for_each(|_, known| all.push(view(&known.tracked.domain, now_ms)));
        all
    }

    /// One domain.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<DomainView> {
        let now_ms = self.cx.now_ms();
        self.cx.index().get(name).map(|tracked| view(&tracked.domain, now_ms))
    }

    /// Removes a domain with its certificate, if no other domain uses that. The front has to be told before.
    ///
    /// # Errors
    /// [`ManagerError::NoDomain`], [`ManagerError::Vault`].
    pub async fn remove(&self, name: &str) -> Result<(), ManagerError> {
        let name = certifiable(name)?;
        let mut conflict = None;
        for _ in 0..MAX_CHANGE_TRIES {
            let found = Tracked::read(&self.cx, &name).await?;
            let mut found = found.ok_or_else(|| ManagerError::NoDomain(name.clone()))?;
            let expected = found.revision.map_or(Expected::Absent, Expected::Revision);
            let mut writes = vec![
                Write::delete(records::domain_key(&name), expected),
                Write::delete(records::order_key(&name), Expected::Anything),
            ];
            let ids = found.domain.held.iter().map(|held| held.id).chain(found.domain.replaced);
            for id in ids.filter(|id| !self.cx.is_used(*id, &name)) {
                writes.extend(records::certificate_deletes(id));
            }
            match self.cx.vault.commit(writes).await {
                Ok(_) => {
                    // At once: while the edges are told, somebody may add it again.
                    self.cx.forget(&name);
                    attempt::withdraw(&self.cx, &mut found).await;
                    return Ok(());
                }
                Err(e @ VaultError::Conflict { .. }) => conflict = Some(e),
                Err(e) => return Err(e.into()),
            }
        }
        Err(conflict.map_or_else(|| ManagerError::NoDomain(name), ManagerError::Vault))
    }

    /// Orders a new certificate now, also for a domain whose certificate was imported, which is automatic from here on.
    ///
    /// # Errors
    /// [`ManagerError::NoDomain`], [`ManagerError::Vault`].
    pub async fn renew(&self, name: &str) -> Result<DomainView, ManagerError> {
        let now_ms = self.cx.now_ms();
        let abandoned_ms = self.cx.config.limits.order_retry_max_ms;
        let name = certifiable(name)?;
        let renewed = self.change(&name, |found| {
            found.map(|mut domain| {
                domain.automatic = true;
                domain.hurry(now_ms);
                // One that an authority leaves lying is not waited for; one that may have a certificate already is.
                if domain.order.as_ref().is_some_and(|o| !o.finalizing && o.begun_ms + abandoned_ms < now_ms)
                {
                    domain.order = None;
                }
                if let Some(held) = &mut domain.held {
                    held.renew_at_ms = held.renew_at_ms.min(now_ms);
                }
                domain
            })
        });
        renewed.await
    }

    /// Stores a chain with its key, and serves `name` with it. Not renewed by itself until [`Manager::renew`] is called.
    ///
    /// # Errors
    /// [`ManagerError::Pem`] says what is wrong with it; [`ManagerError::BadName`], [`ManagerError::Vault`].
    pub async fn import(&self, name: &str, chain: &str, key: &str) -> Result<DomainView, ManagerError> {
        let name = certifiable(name)?;
        let now_ms = self.cx.now_ms();
        let bundle = Bundle::read(chain, key, now_ms)?;
        bundle.is_for(&name)?;
        let writes = records::certificate_writes(&self.cx.seal, &bundle, Source::Import, None, now_ms);
        let writes = writes.map_err(LoadError::Seal)?;
        let held = Held {
            id: bundle.leaf.id,
            not_before_ms: bundle.leaf.not_before_ms,
            not_after_ms: bundle.leaf.not_after_ms,
            source: Source::Import,
            ca: None,
            renew_at_ms: bundle.leaf.not_after_ms,
            ask_window_ms: None,
            window: None,
            published: false,
            ocsp: Ocsp::default(),
        };
        let imported = self.change_with(&name, &writes, |found| {
            let mut domain = found.unwrap_or_else(|| Domain::new(name.clone(), Origin::Added, now_ms));
            domain.import(held.clone());
            Some(domain)
        });
        imported.await
    }

    /// All certificates, by their end.
    ///
    /// # Errors
    /// [`ManagerError::Vault`].
    pub async fn certificates(&self) -> Result<Vec<CertificateRecord>, ManagerError> {
        let found = self.cx.vault.list(records::CERTIFICATES).await?;
        let mut all = Vec::with_capacity(found.len());
        for record in found {
            let read = serde_json::from_slice::<CertificateRecord>(&record.bytes);
            all.push(read.map_err(|e| VaultError::Damaged { key: record.key, cause: e.to_string() })?);
        }
        all.sort_unstable_by_key(|record| (record.not_after_ms, record.id));
        Ok(all)
    }

    /// One certificate.
    ///
    /// # Errors
    /// [`ManagerError::Load`].
    pub async fn certificate(&self, id: CertificateId) -> Result<CertificateRecord, ManagerError> {
        let found = records::certificate(self.cx.vault.as_ref(), id).await?;
        Ok(found.ok_or(LoadError::Absent(id))?)
    }

    /// Chain and key, for who presents them.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn load(&self, id: CertificateId) -> Result<Bundle, LoadError> {
        load_certificate(self.cx.vault.as_ref(), &self.cx.seal, id).await
    }

    /// What may be stapled to a certificate now: an OCSP response (DER), and until when, Unix time in milliseconds. None that is
    /// over, not good, or not the issuer's.
    ///
    /// # Errors
    /// [`LoadError`]: what lies there is not what was written.
    pub async fn staple(&self, bundle: &Bundle) -> Result<Option<(Vec<u8>, u64)>, LoadError> {
        staple::kept(&self.cx, bundle).await
    }

    /// Chain and key as PEM.
    ///
    /// # Errors
    /// [`ManagerError::NoDomain`], [`ManagerError::NotYet`], [`ManagerError::Load`].
    pub async fn export(&self, name: &str) -> Result<(String, Zeroizing<String>), ManagerError> {
        let name = certifiable(name)?;
        let view = self.get(&name).ok_or_else(|| ManagerError::NoDomain(name.clone()))?;
        let id =
            view.certificate.ok_or_else(|| ManagerError::NotYet { name, state: view.state.to_string() })?;
        let bundle = self.load(id).await?;
        Ok((crate::pem::chain_pem(&bundle.chain), key_pem(&bundle.key)))
    }

    /// Whether a name that nobody added may have a certificate: a service owns it, or who is asked says yes.
    pub async fn is_allowed(&self, name: &str) -> bool {
        let Ok(name) = certifiable(name) else { return false };
        if name.starts_with("*.") {
            return false;
        }
        if self.cx.config.on_demand.owned.as_ref().is_some_and(|owned| owned(&name)) {
            return true;
        }
        match &self.cx.asker {
            Some(asker) => asker.allows(&name, self.cx.now_ms()).await,
            None => false,
        }
    }

    /// Whether a name that somebody shakes hands for could have a certificate, as far as that is known without asking anybody:
    /// it is a domain's, a service owns it, or there is somebody to ask.
    #[must_use]
    pub fn could_have(&self, name: &str) -> bool {
        let Ok(name) = certifiable(name) else { return false };
        let is_owned = || self.cx.config.on_demand.owned.as_ref().is_some_and(|owned| owned(&name));
        self.cx.asker.is_some() || self.cx.index().domains.contains_key(&*name) || is_owned()
    }

    /// The certificate of a name that somebody shakes hands for. If it may have one and has none, it is ordered, and waited for
    /// up to `wait_ms`, but not if the next try comes later than that anyway.
    ///
    /// # Errors
    /// [`ManagerError::NotAllowed`], [`ManagerError::NotYet`], [`ManagerError::Busy`], [`ManagerError::Vault`].
    pub async fn obtain(&self, name: &str, wait_ms: u64) -> Result<CertificateId, ManagerError> {
        let name = certifiable(name)?;
        let mut events = self.events();
        if self.get(&name).is_none() {
            if !self.is_allowed(&name).await {
                return Err(ManagerError::NotAllowed(name));
            }
            let waiting = {
                let index = self.cx.index();
                let on_demand = index.due.iter().filter_map(|(_, name)| index.get(name)).filter(|tracked| {
                    tracked.domain.origin == Origin::OnDemand && tracked.domain.held.is_none()
                });
                on_demand.take(MAX_ON_DEMAND).count()
            };
            if waiting >= MAX_ON_DEMAND {
                return Err(ManagerError::Busy);
            }
            // A stranger may ask for any name; one that does not lead here is not remembered.
            if let Err(why) = self.cx.names.check(&name, &self.cx.pointing).await {
                tracing::debug!(%name, why, "no certificate on demand");
                return Err(ManagerError::NotAllowed(name));
            }
            self.put(&name, Origin::OnDemand).await?;
        }
        let published = || {
            let index = self.cx.index();
            let held = index.get(&name).and_then(|tracked| tracked.domain.held.as_ref());
            held.filter(|held| held.published && held.not_after_ms > self.cx.now_ms()).map(|held| held.id)
        };
        let until_ms = self.cx.now_ms().saturating_add(wait_ms);
        // Gone, never due, or due too late; what is being worked on was due.
        let is_vain = || {
            let index = self.cx.index();
            index.domains.get(&*name).and_then(|known| known.due_ms).is_none_or(|due_ms| due_ms > until_ms)
        };
        let waiting = async {
            loop {
                if let Some(id) = published() {
                    return Some(id);
                }
                if is_vain() {
                    return None;
                }
                match events.recv().await {
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        };
        let found = tokio::time::timeout(Duration::from_millis(wait_ms), waiting).await.ok().flatten();
        found.ok_or_else(|| {
            let state = self.get(&name).map(|view| view.state.to_string()).unwrap_or_default();
            ManagerError::NotYet { name, state }
        })
    }
}

/// Does what is due for one domain, and notes what the vault says afterwards.
async fn work(cx: &Context, name: &str) {
    let mut tracked = match Tracked::read(cx, name).await {
        Ok(Some(tracked)) => tracked,
        Ok(None) => return cx.forget(name),
        Err(e) => return later(cx, name, &e),
    };
    let now_ms = cx.now_ms();
    let Some((due_ms, task)) = tracked.domain.due(&cx.config.holder) else { return cx.note(tracked) };
    if due_ms > now_ms {
        return cx.note(tracked);
    }
    let done = match task {
        Task::Order => {
            let done = attempt::attempt(cx, &mut tracked).await;
            // The edges are told at once.
            let fresh = tracked.domain.held.as_ref().is_some_and(|held| !held.published);
            match done {
                Ok(()) if fresh => attempt::publish(cx, &mut tracked).await,
                done => done,
            }
        }
        Task::Publish => attempt::publish(cx, &mut tracked).await,
        Task::AskWindow => ask_window(cx, &mut tracked).await,
        Task::Staple => staple::refresh(cx, &mut tracked).await,
    };
    let domain = &tracked.domain;
    let is_vain = domain.origin == Origin::OnDemand
        && domain.held.is_none()
        && domain.order.is_none()
        && domain.failures >= MAX_ON_DEMAND_FAILURES;
    match done {
        Ok(()) if is_vain => {
            let expected = tracked.revision.map_or(Expected::Absent, Expected::Revision);
            match cx.vault.commit(vec![Write::delete(records::domain_key(name), expected)]).await {
                Ok(_) => cx.forget(name),
                Err(e) => later(cx, name, &e),
            }
        }
        Ok(()) => cx.note(tracked),
        Err(VaultError::Conflict { key }) => {
            tracing::info!(domain = name, record = key, "somebody else has it now");
            match Tracked::read(cx, name).await {
                Ok(Some(tracked)) => cx.note(tracked),
                Ok(None) => cx.forget(name),
                Err(e) => later(cx, name, &e),
            }
        }
        Err(e) => later(cx, name, &e),
    }
}

/// The vault cannot be used now: the domain stays as it is there, and is looked at again in a while.
fn later(cx: &Context, name: &str, error: &VaultError) {
    tracing::error!(domain = name, error = %error, "nothing can be kept");
    let at_ms = cx.now_ms() + cx.config.limits.order_retry_ms;
    cx.index().set_due(name, Some(at_ms));
    cx.changed.notify_one();
}

/// The canonical form of a name that an authority could issue for.
fn certifiable(name: &str) -> Result<String, ManagerError> {
    let bad = |cause: &str| ManagerError::BadName { name: name.to_owned(), cause: cause.to_owned() };
    let pattern = HostPattern::parse(name).map_err(|e| bad(&e.to_string()))?;
    let base = match &pattern {
        HostPattern::Exact(base) | HostPattern::Wildcard(base) => base,
        HostPattern::Any => return Err(bad("it is no name")),
    };
    if base.starts_with('[') || base.parse::<std::net::IpAddr>().is_ok() {
        return Err(bad("it is an address; bring a certificate of your own and serve it as the default"));
    }
    if !base.contains('.') {
        return Err(bad("it has one label only, and no public authority knows it"));
    }
    if base.contains('_') {
        return Err(bad("an underscore is for DNS records, not for hosts (RFC 1123 §2.1)"));
    }
    Ok(pattern.to_string())
}
