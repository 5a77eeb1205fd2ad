//! What the edge presents: certificates from the files of the configuration, read at the start and at a reload, and those of the
//! domains that were added.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use anyhow::{Context, Result, bail, ensure};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use peregrine_config::{ClientAuthSettings, DomainEntry, DomainFiles, ServerConfig};
use peregrine_proxy::{Certificate, CertificateSource, SourceError, Staple};
use peregrine_routing::{
    CertificateId, ClientAuth, DomainPolicy, DomainSpec, Domains, HostPattern, Hsts, TableReader, TlsMode,
    TlsVersion,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use tokio::signal::unix::{SignalKind, signal};

use crate::domains::Kept;

/// Chains and keys are small; anything else is the wrong file.
const MAX_PEM_BYTES: u64 = 1 << 20;
/// What others must not be allowed on a key's file.
const OTHERS: u32 = 0o077;

/// The certificates of a configuration, by what they are.
#[derive(Default)]
pub(crate) struct FileCertificates(RwLock<HashMap<CertificateId, Certificate>>);

/// Certificates from files first, then those that were ordered or imported.
pub(crate) struct AllCertificates {
    files: Arc<FileCertificates>,
    /// There once the engine is.
    kept: Arc<OnceLock<Arc<Kept>>>,
}

impl AllCertificates {
    pub(crate) const fn new(files: Arc<FileCertificates>, kept: Arc<OnceLock<Arc<Kept>>>) -> Self {
        Self { files, kept }
    }

    /// Chain and key.
    ///
    /// # Errors
    /// [`SourceError`].
    pub(crate) async fn find(&self, id: CertificateId) -> std::result::Result<Certificate, SourceError> {
        let (found, kept) = (self.files.find(id), self.kept.get());
        let (None, Some(kept)) = (&found, kept) else { return found.ok_or(SourceError::Unknown) };
        match kept.load(id).await {
            Ok(bundle) => Ok(Certificate {
                chain: bundle.chain.iter().map(|der| der.to_vec()).collect(),
                key: bundle.key.secret_der().to_vec(),
                staple: kept.staple(&bundle).await.map(|(response, until_ms)| Staple { response, until_ms }),
            }),
            Err(peregrine_certs::LoadError::Absent(_)) => Err(SourceError::Unknown),
            Err(error) => Err(SourceError::Failed(error.to_string())),
        }
    }

    /// Somebody shakes hands for a name that has no certificate. Resolves to whether the table has one, when that is known.
    pub(crate) fn is_wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        match self.kept.get() {
            Some(kept) => kept.wanted(name),
            None => std::future::ready(false).boxed(),
        }
    }
}

impl CertificateSource for AllCertificates {
    fn load<'a>(
        &'a self,
        id: CertificateId,
        _domain: &'a HostPattern,
    ) -> BoxFuture<'a, std::result::Result<Certificate, SourceError>> {
        self.find(id).boxed()
    }

    fn wanted(&self, name: &str) -> BoxFuture<'static, bool> {
        self.is_wanted(name)
    }
}

/// Domains as the table has them, and the certificates that they name.
#[derive(Default)]
pub(crate) struct Loaded {
    pub(crate) domains: Vec<DomainSpec>,
    certificates: HashMap<CertificateId, Certificate>,
}

impl Loaded {
    /// Names of the domains.
    pub(crate) fn names(&self) -> Vec<String> {
        self.domains.iter().map(|domain| domain.name.to_string()).collect()
    }
}

impl FileCertificates {
    pub(crate) fn of(loaded: &mut Loaded) -> Arc<Self> {
        Arc::new(Self(RwLock::new(std::mem::take(&mut loaded.certificates))))
    }

    /// Adds those of a reload. Older ones stay: edges may be told of the new ones a moment later.
    pub(crate) fn add(&self, loaded: &mut Loaded) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.extend(std::mem::take(&mut loaded.certificates));
    }

    fn ids(&self) -> HashSet<CertificateId> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Takes what was read again; its names. Those of the `last` time stay, because the engine may name them in a moment,
    /// and so does everything that is `named` still, however long ago it was read.
    fn replace(
        &self,
        loaded: Loaded,
        last: &HashSet<CertificateId>,
        named: &HashSet<CertificateId>,
    ) -> HashSet<CertificateId> {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|id, _| last.contains(id) || named.contains(id));
        let read = loaded.certificates.keys().copied().collect();
        known.extend(loaded.certificates);
        read
    }

    /// The one with this id.
    pub(crate) fn find(&self, id: CertificateId) -> Option<Certificate> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Whether there is one with this id.
    pub(crate) fn has(&self, id: CertificateId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains_key(&id)
    }

    /// Keeps those alone that a domain still names.
    pub(crate) fn keep(&self, domains: &[DomainSpec]) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|id, _| domains.iter().any(|domain| domain.certificate == Some(*id)));
    }
}

/// Reads the files again whenever the process is told to (SIGHUP), for an edge in a process of its own that serves from that
/// table. What cannot be read is told, and everything stays as it was.
pub(crate) async fn reload_at_hangup(file: PathBuf, certificates: Arc<FileCertificates>, table: TableReader) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(error) => return tracing::error!(%error, "certificates cannot be read again while this runs"),
    };
    let mut last = certificates.ids();
    while hangups.recv().await.is_some() {
        let loaded = ServerConfig::load(&file).map_err(|wrong| wrong.to_string());
        match loaded.and_then(|config| load(&config.domains)) {
            Ok(loaded) => {
                let named = named(table.load().domains());
                last = certificates.replace(loaded, &last, &named);
                tracing::info!(file = %file.display(), "certificates read again");
            }
            Err(wrong) => tracing::error!("certificates not read, they stay as they were:\n{wrong}"),
        }
    }
}

/// The certificates that a table names.
fn named(domains: &Domains) -> HashSet<CertificateId> {
    let mut named = HashSet::new();
    domains.for_each(|domain| named.extend(domain.certificate));
    named
}

/// Reads the files of all domains.
///
/// # Errors
/// Everything that is wrong with them, a line for each.
pub(crate) fn load(entries: &[DomainEntry]) -> std::result::Result<Loaded, String> {
    let mut loaded = Loaded::default();
    let mut wrong = Vec::new();
    for entry in entries {
        match domain(entry) {
            Ok((spec, certificate)) => {
                loaded.certificates.extend(spec.certificate.zip(certificate));
                loaded.domains.push(spec);
            }
            Err(error) => wrong.push(format!("[domain.{:?}]: {error:#}", entry.name)),
        }
    }
    if wrong.is_empty() { Ok(loaded) } else { Err(wrong.join("\n")) }
}

fn domain(entry: &DomainEntry) -> Result<(DomainSpec, Option<Certificate>)> {
    let name = HostPattern::parse(&entry.name)?;
    let policy = policy(entry)?;
    let DomainFiles::Certificate { chain, key } = &entry.files else {
        return Ok((DomainSpec { name, certificate: None, staple: None, policy }, None));
    };
    let certificate = certificate(chain, key)?;
    let id = peregrine_proxy::certificate_id(&certificate.chain[0]);
    Ok((DomainSpec { name, certificate: Some(id), staple: None, policy }, Some(certificate)))
}

fn policy(entry: &DomainEntry) -> Result<DomainPolicy> {
    Ok(DomainPolicy {
        mode: match entry.files {
            DomainFiles::Certificate { .. } => TlsMode::Terminate,
            DomainFiles::PassThrough => TlsMode::PassThrough,
        },
        redirect_to_https: entry.redirect,
        hsts: entry.hsts.map(|hsts| Hsts {
            max_age_seconds: u32::try_from(hsts.max_age_ms / 1_000).unwrap_or(u32::MAX),
            include_subdomains: hsts.include_subdomains,
            preload: hsts.preload,
        }),
        client_auth: entry.client_auth.as_ref().map(client_auth).transpose()?,
        min_version: if entry.tls13_only { TlsVersion::Tls13 } else { TlsVersion::Tls12 },
    })
}

fn client_auth(settings: &ClientAuthSettings) -> Result<Arc<ClientAuth>> {
    let authorities = chain(&settings.authorities)?;
    let authorities = authorities.iter().map(|der| Arc::from(&**der)).collect();
    Ok(Arc::new(ClientAuth { authorities, required: settings.required }))
}

fn certificate(chain_file: &Path, key_file: &Path) -> Result<Certificate> {
    let chain = chain(chain_file)?;
    let shown = key_file.display();
    let metadata = std::fs::metadata(key_file).with_context(|| format!("the private key {shown}"))?;
    let mode = metadata.mode() & 0o777;
    ensure!(
        mode & OTHERS == 0,
        "the private key {shown} can be read by others (mode {mode:04o}): chmod 600 {shown}"
    );
    let pem = read(key_file)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).with_context(|| {
        format!("{shown} holds no private key in PEM (BEGIN PRIVATE KEY) without a password")
    })?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    if let Err(error) = CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider) {
        bail!(
            "the private key {shown} does not go with the first certificate of {}: {error}",
            chain_file.display()
        );
    }
    let chain = chain.into_iter().map(|certificate| certificate.to_vec()).collect();
    // Who brings files staples nothing: nobody asks a responder for them.
    Ok(Certificate { chain, key: key.secret_der().to_vec(), staple: None })
}

fn chain(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read(file)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<std::result::Result<_, _>>()
        .with_context(|| format!("{} is no PEM", file.display()))?;
    ensure!(!chain.is_empty(), "{} holds no certificate in PEM (BEGIN CERTIFICATE)", file.display());
    Ok(chain)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let shown = file.display();
    let size = std::fs::metadata(file).with_context(|| format!("cannot read {shown}"))?.len();
    ensure!(size <= MAX_PEM_BYTES, "{shown} is larger than any certificate or key: is it the right file?");
    std::fs::read(file).with_context(|| format!("cannot read {shown}"))
}

#[cfg(test)]
mod tests {
    use peregrine_routing::Change;

    use super::*;

    fn read(number: u8) -> Loaded {
        let certificate = Certificate { chain: vec![vec![number]], key: Vec::new(), staple: None };
        Loaded {
            certificates: HashMap::from([(CertificateId([number; 32]), certificate)]),
            ..Loaded::default()
        }
    }

    #[test]
    fn a_certificate_stays_as_long_as_the_table_names_it_however_often_the_files_are_read() {
        let (mut writer, reader) = peregrine_routing::table();
        let mut name = |number: u8| {
            let domain = DomainSpec {
                name: HostPattern::parse("a.test").expect("a name"),
                certificate: Some(CertificateId([number; 32])),
                staple: None,
                policy: DomainPolicy::default(),
            };
            writer.apply(&[Change::PutDomain(domain)]).expect("is accepted");
        };
        name(1);
        let files = FileCertificates::of(&mut read(1));
        let mut last = files.ids();
        for number in 2..6 {
            last = files.replace(read(number), &last, &named(reader.load().domains()));
            let (first, latest) = (CertificateId([1; 32]), CertificateId([number; 32]));
            assert!(files.ids().contains(&first) && files.ids().contains(&latest), "{number}");
            assert!(files.ids().len() <= 3, "what nobody names goes");
        }
        name(5);
        last = files.replace(read(5), &last, &named(reader.load().domains()));
        files.replace(read(5), &last, &named(reader.load().domains()));
        assert_eq!(files.ids(), HashSet::from([CertificateId([5; 32])]));
    }
}
