//! What an edge in a process of its own keeps secret: certificates that the engine gave it, and the keys of session tickets.
//!
//! ```text
//!   handshake ─► files of its configuration ─► sealed on this disk ─► the engine, over the link
//!   table     ─► what it names is fetched ahead of the first handshake; what no table names any more is forgotten
//! ```
//!
//! On the disk everything is sealed with the edge's own key file, so that a copy of the folder without it is worth nothing. An
//! edge that starts without an engine presents what it has here. Nothing is written in clear text, and no key is logged.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use peregrine_certs::SealKey;
use peregrine_link::{KeyedCertificate, PlaceHandle, SecretsHandle};
use peregrine_proxy::{Certificate, CertificateSource, SourceError, Staple, TicketKeys, Tickets};
use peregrine_routing::{CertificateId, HostPattern, StapleId, TableReader, TlsMode};
use tokio::sync::watch;

use crate::certificates::FileCertificates;
use crate::ticket_keys::{left_ms, unix_ms};

/// The key that everything here is sealed with, in the data folder.
const KEY_FILE: &str = "certificates.key";
/// The folder of certificates: a file for each.
const FOLDER: &str = "certificates";
/// The keys of session tickets.
const TICKETS_FILE: &str = "tickets";
/// A sealed certificate is as long as what the link bounds, and a little more.
const MAX_FILE_BYTES: u64 = 512 << 10;
/// So many are fetched before anybody has asked for them; of a larger table those that are asked for.
const MAX_AHEAD: usize = 4_096;
/// So many are on the disk; those beyond are asked for again after a restart.
const MAX_KEPT: usize = 65_536;
/// Fetched ahead at a time: those that somebody waits for go beside them.
const FETCHES_AT_ONCE: usize = 8;
/// Between two looks at a table that changes all the time.
const LOOK_PAUSE_MS: u64 = 500;
/// Until what could not be fetched ahead is tried again.
const RETRY_MS: u64 = 15_000;
/// An edge that hears no engine for so long after its ticket keys were due goes on with a key of its own.
const TICKETS_GRACE_MS: u64 = 10 * 60_000;

/// See the module.
pub(crate) struct EdgeSecrets {
    files: Arc<FileCertificates>,
    seal: SealKey,
    data: PathBuf,
    engine: SecretsHandle,
    reader: TableReader,
    place: PlaceHandle,
    tickets: Tickets,
    first_keys: TicketKeys,
    /// Certificates on the disk.
    kept: AtomicUsize,
    /// What is stapled to those on the disk, as far as it is known.
    staples: Mutex<HashMap<CertificateId, Option<StapleId>>>,
}

/// The name of what is stapled to a certificate.
fn staple_of(certificate: &KeyedCertificate) -> Option<StapleId> {
    certificate.staple.as_ref().map(|staple| peregrine_proxy::staple_id(&staple.response))
}

impl EdgeSecrets {
    /// Opens what is on the disk.
    ///
    /// # Errors
    /// The key file, or the folder, cannot be used: in words.
    pub(crate) fn open(
        data: &Path,
        files: Arc<FileCertificates>,
        engine: SecretsHandle,
        reader: TableReader,
        place: PlaceHandle,
    ) -> Result<Arc<Self>> {
        let seal = SealKey::open_or_create(&data.join(KEY_FILE))?;
        let folder = data.join(FOLDER);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.with_context(|| format!("the folder {}", folder.display()))?;
        if place.owns_disk() {
            remove_torn(&folder).with_context(|| format!("the folder {}", folder.display()))?;
        }
        let first_keys = match kept_ticket_keys(&seal, &data.join(TICKETS_FILE)) {
            Some(keys) => keys,
            None => TicketKeys::generate(unix_ms())?,
        };
        let tickets = Tickets::new(&first_keys);
        let kept = AtomicUsize::new(0);
        Ok(Arc::new(Self {
            files,
            seal,
            data: data.to_owned(),
            engine,
            reader,
            place,
            tickets,
            first_keys,
            kept,
            staples: Mutex::default(),
        }))
    }

    /// The keys of session tickets, which change by themselves while [`Self::run`] runs.
    pub(crate) fn tickets(&self) -> Tickets {
        self.tickets.clone()
    }

    /// Follows the engine, for ever: its table once there is one.
    pub(crate) async fn run(self: Arc<Self>, mut has_table: watch::Receiver<bool>) {
        let table = async {
            // Without a table nothing is named, and everything would be forgotten.
            if has_table.wait_for(|has| *has).await.is_ok() {
                self.follow_table().await;
            }
        };
        tokio::join!(table, self.follow_ticket_keys());
    }

    // --- ticket keys

    /// Uses the keys that the engine tells. Without an engine for long it makes its own: what a key can open when it is
    /// stolen is to be bounded here, too.
    async fn follow_ticket_keys(&self) {
        let mut told = self.engine.ticket_keys();
        told.mark_changed();
        let mut keys = self.first_keys.clone();
        loop {
            let patience = Duration::from_millis(left_ms(&keys) + TICKETS_GRACE_MS);
            let news = tokio::time::timeout(patience, told.changed()).await;
            let next = match news {
                Ok(Ok(())) => match &*told.borrow_and_update() {
                    Some(secret) => TicketKeys::from_bytes(secret.bytes()).map_err(|error| error.to_string()),
                    None => continue,
                },
                // The link is gone, and this process with it.
                Ok(Err(_)) => return,
                Err(_) => keys.rotated(unix_ms()).map_err(|error| error.to_string()),
            };
            match next {
                Ok(next) => keys = next,
                Err(error) => {
                    tracing::error!(%error, "session tickets keep their keys");
                    tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
                    continue;
                }
            }
            self.tickets.replace(&keys);
            let sealed = self.seal.seal(TICKETS_FILE, &keys.to_bytes()).map_err(anyhow::Error::from);
            if let Err(error) = self.write(self.data.join(TICKETS_FILE), sealed).await {
                tracing::error!(%error, "the keys of session tickets cannot be kept: a restart would begin with others");
            }
        }
    }

    // --- the table

    async fn follow_table(&self) {
        let mut version = 0;
        loop {
            let complete = self.look().await;
            let changed = self.reader.newer_than(version);
            if complete {
                version = changed.await;
            } else {
                // Whatever comes first: what could not be had is tried again.
                let retry = Duration::from_millis(RETRY_MS);
                version = tokio::time::timeout(retry, changed).await.unwrap_or(version);
            }
            tokio::time::sleep(Duration::from_millis(LOOK_PAUSE_MS)).await;
        }
    }

    /// Forgets what no table names any more, and fetches what it names and is not here. Whether everything is.
    async fn look(&self) -> bool {
        let here = match self.on_disk() {
            Ok(here) => here,
            Err(error) => {
                tracing::error!(%error, "the certificates on the disk cannot be listed");
                return false;
            }
        };
        let (named, missing) = self.compare(&here);
        let mut kept = here.len();
        if self.place.owns_disk() {
            for id in here.difference(&named) {
                self.staples().remove(id);
                match std::fs::remove_file(self.path(*id)) {
                    Ok(()) => kept -= 1,
                    Err(error) => {
                        tracing::error!(certificate = %id, %error, "a certificate that is not named any more cannot be removed")
                    }
                }
            }
        }
        self.kept.store(kept, Ordering::Relaxed);
        if !missing.is_empty() && !self.engine.is_connected() {
            return false;
        }
        let fetched = futures_util::stream::iter(missing)
            .map(|(id, domain)| async move { self.fetched(id, &domain).await.is_ok() })
            .buffer_unordered(FETCHES_AT_ONCE);
        fetched.fold(true, |all, one| std::future::ready(all && one)).await
    }

    /// Which of those on the disk the table names, and what it names that is neither there, with its staple, nor in a file.
    fn compare(
        &self,
        here: &HashSet<CertificateId>,
    ) -> (HashSet<CertificateId>, HashMap<CertificateId, HostPattern>) {
        let (mut named, mut missing) = (HashSet::new(), HashMap::new());
        self.reader.load().domains().for_each(|domain| {
            let Some(id) = domain.certificate.filter(|_| domain.policy.mode == TlsMode::Terminate) else {
                return;
            };
            if here.contains(&id) {
                named.insert(id);
            }
            let is_here =
                || here.contains(&id) && domain.staple.is_none_or(|staple| self.has_staple(id, staple));
            if is_here() {
                // As the table names it.
            } else if missing.len() < MAX_AHEAD && !self.files.has(id) {
                missing.entry(id).or_insert_with(|| domain.name.clone());
            }
        });
        (named, missing)
    }

    fn on_disk(&self) -> io::Result<HashSet<CertificateId>> {
        let entries = std::fs::read_dir(self.data.join(FOLDER))?;
        Ok(entries.flatten().filter_map(|entry| id_of(entry.file_name().to_str()?)).collect())
    }

    // --- a certificate

    fn staples(&self) -> MutexGuard<'_, HashMap<CertificateId, Option<StapleId>>> {
        self.staples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a certificate on the disk has this staple. It is opened once for that.
    fn has_staple(&self, id: CertificateId, staple: StapleId) -> bool {
        let known = self.staples().get(&id).copied();
        let has = known.unwrap_or_else(|| {
            let has = self.kept(id).as_ref().and_then(staple_of);
            self.staples().insert(id, has);
            has
        });
        has == Some(staple)
    }

    fn path(&self, id: CertificateId) -> PathBuf {
        self.data.join(FOLDER).join(id.to_string())
    }

    /// From this disk; `None` if it is not there, or cannot be used.
    fn kept(&self, id: CertificateId) -> Option<KeyedCertificate> {
        let open = || -> Result<Option<KeyedCertificate>> {
            let Some(sealed) = read(&self.path(id))? else { return Ok(None) };
            let opened = self.seal.open(&record(id), &sealed)?;
            Ok(Some(KeyedCertificate::from_bytes(&opened)?))
        };
        open().unwrap_or_else(|error| {
            tracing::error!(certificate = %id, %error, "a certificate on the disk cannot be used: the engine is asked for it");
            None
        })
    }

    /// From the engine, and then on this disk.
    async fn fetched(
        &self,
        id: CertificateId,
        domain: &HostPattern,
    ) -> Result<KeyedCertificate, SourceError> {
        let given = self.engine.certificate(id, domain).await;
        let given =
            given.map_err(|error| SourceError::Failed(error.to_string()))?.ok_or(SourceError::Unknown)?;
        // What it gives is what the table names, or nothing is kept of it.
        if given.chain.first().is_none_or(|first| peregrine_proxy::certificate_id(first) != id) {
            return Err(SourceError::Failed("the engine has given another certificate".to_owned()));
        }
        self.staples().insert(id, staple_of(&given));
        if self.kept.fetch_add(1, Ordering::Relaxed) < MAX_KEPT {
            let bytes = given.to_bytes().map_err(anyhow::Error::from);
            let sealed = bytes.and_then(|bytes| Ok(self.seal.seal(&record(id), &bytes)?));
            if let Err(error) = self.write(self.path(id), sealed).await {
                tracing::error!(certificate = %id, %error, "a certificate cannot be kept: after a restart the engine is asked for it again");
            }
        }
        Ok(given)
    }

    /// Puts sealed bytes into a file: whole or not at all, and nobody else's to read.
    async fn write(&self, path: PathBuf, sealed: Result<Vec<u8>>) -> Result<()> {
        let sealed = sealed?;
        tokio::task::spawn_blocking(move || write_whole(&path, &sealed)).await?.map_err(Into::into)
    }
}

impl CertificateSource for EdgeSecrets {
    fn load<'a>(
        &'a self,
        id: CertificateId,
        domain: &'a HostPattern,
    ) -> BoxFuture<'a, Result<Certificate, SourceError>> {
        async move {
            if let Some(found) = self.files.find(id) {
                return Ok(found);
            }
            let wanted = self.reader.load().domains().of(domain).and_then(|domain| domain.staple);
            let kept = self.kept(id);
            let will_do = |kept: &KeyedCertificate| {
                wanted.is_none() || staple_of(kept) == wanted || !self.engine.is_connected()
            };
            let found = match kept {
                Some(kept) if will_do(&kept) => kept,
                // What is here is presented, if there is nothing newer to be had.
                Some(kept) => self.fetched(id, domain).await.unwrap_or(kept),
                None => self.fetched(id, domain).await?,
            };
            let KeyedCertificate { chain, key, staple } = found;
            let staple = staple.map(|given| Staple { response: given.response, until_ms: given.until_ms });
            Ok(Certificate { chain, key: key.bytes().to_vec(), staple })
        }
        .boxed()
    }

    fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        self.engine.wanted(name)
    }
}

/// The name that a certificate is sealed under: another's file cannot be put in its place.
fn record(id: CertificateId) -> String {
    format!("{FOLDER}/{id}")
}

/// The certificate that a file is named after.
fn id_of(name: &str) -> Option<CertificateId> {
    let mut id = [0; 32];
    if name.len() != 64 || !name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return None;
    }
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(name.get(at * 2..at * 2 + 2)?, 16).ok()?;
    }
    Some(CertificateId(id))
}

/// Keys that cannot be read are no reason not to start: clients make a whole handshake once.
fn kept_ticket_keys(seal: &SealKey, path: &Path) -> Option<TicketKeys> {
    let open = || -> Result<Option<TicketKeys>> {
        let Some(sealed) = read(path)? else { return Ok(None) };
        Ok(Some(TicketKeys::from_bytes(&seal.open(TICKETS_FILE, &sealed)?)?))
    };
    open().unwrap_or_else(|error| {
        tracing::error!(%error, "the keys of session tickets cannot be read: new ones are made");
        None
    })
}

/// What a write left that did not come to its end.
fn remove_torn(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains('~') {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let size = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    anyhow::ensure!(size <= MAX_FILE_BYTES, "it is larger than {MAX_FILE_BYTES} bytes");
    Ok(Some(std::fs::read(path)?))
}

/// Beside it, flushed, then in its place. Two that write the same at once do not meet.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!("~{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let beside = PathBuf::from(beside);
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)?;
        path.parent().map_or(Ok(()), |folder| std::fs::File::open(folder)?.sync_all())
    };
    write().inspect_err(|_| {
        // What is half there is nobody's.
        drop(std::fs::remove_file(&beside));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_after_its_certificate_and_others_are_left_alone() {
        let id = CertificateId([0xab; 32]);
        assert_eq!(id_of(&id.to_string()), Some(id));
        for other in ["", "ab", &format!("{id}~7-1"), &id.to_string().to_uppercase()] {
            assert_eq!(id_of(other), None, "{other}");
        }
    }
}
