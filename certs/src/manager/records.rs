//! How things lie in the vault.
//!
//! | key | content |
//! |---|---|
//! | `domain/NAME` | the domain's state and its order |
//! | `certificate/ID` | names, times, source, and the chain as PEM |
//! | `staple/ID` | what is stapled to it: an OCSP response (DER) |
//! | `sealed/certificate/ID` | its private key (DER), sealed |
//! | `sealed/order/NAME` | the private key of an order under way, sealed |
//! | `sealed/account/CA` | the account and its key, sealed |
//! | `budget/CA`, `budget/CA/DOMAIN` | what is left of a budget |

use peregrine_routing::CertificateId;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::domain::{Source, hex_id};
use crate::pem::{Bundle, Leaf, PemError, chain_pem, read_chain, read_leaf};
use crate::sealed::{SealError, SealKey};
use crate::vault::{Expected, Vault, VaultError, Write};

/// What is kept of a certificate beside its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRecord {
    /// SHA-256 of its DER.
    #[serde(with = "hex_id")]
    pub id: CertificateId,
    /// DNS names.
    pub names: Vec<String>,
    /// Unix time in milliseconds.
    pub not_before_ms: u64,
    /// Unix time in milliseconds.
    pub not_after_ms: u64,
    /// Who issued it, as it says.
    pub issuer: String,
    /// Where it came from.
    pub source: Source,
    /// Which authority of the configuration.
    pub ca: Option<String>,
    /// When it was stored, Unix time in milliseconds.
    pub stored_ms: u64,
    /// The chain, its own certificate first.
    pub chain_pem: String,
}

/// Why a certificate cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It is not in the vault.
    #[error("there is no certificate {0}")]
    Absent(CertificateId),
    /// The vault.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The key cannot be opened.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// What lies there is not what was written.
    #[error("certificate {id} is damaged: {cause}")]
    Damaged {
        /// Which one.
        id: CertificateId,
        /// How one sees that.
        cause: String,
    },
}

/// Chain and key of a certificate, for who presents it. Needs no manager, only the vault and the key file.
///
/// # Errors
/// [`LoadError`].
pub async fn load_certificate(
    vault: &dyn Vault,
    seal: &SealKey,
    id: CertificateId,
) -> Result<Bundle, LoadError> {
    let damaged = |cause: String| LoadError::Damaged { id, cause };
    let record = certificate(vault, id).await?.ok_or(LoadError::Absent(id))?;
    let key_record = key_key(id);
    let sealed = vault.get(&key_record).await?.ok_or(LoadError::Absent(id))?;
    let der = seal.open(&key_record, &sealed.bytes)?;
    let key = key_of(&der).ok_or_else(|| damaged("its key is of an unknown kind".into()))?;
    let chain = read_chain(&record.chain_pem).map_err(|e| damaged(e.to_string()))?;
    // Whether it is over is for others to judge: here it is only read.
    let leaf = read_leaf(&chain[0]).map_err(|e| damaged(e.to_string()))?;
    let when_ms = leaf.not_before_ms;
    Bundle::of(chain, key, when_ms).map_err(|e: PemError| damaged(e.to_string()))
}

/// The record of a certificate.
pub(crate) async fn certificate(
    vault: &dyn Vault,
    id: CertificateId,
) -> Result<Option<CertificateRecord>, LoadError> {
    let Some(found) = vault.get(&certificate_key(id)).await? else { return Ok(None) };
    let read = serde_json::from_slice(&found.bytes);
    read.map(Some).map_err(|e| LoadError::Damaged { id, cause: e.to_string() })
}

/// What a certificate says of itself.
pub(crate) async fn leaf(vault: &dyn Vault, id: CertificateId) -> Result<Option<Leaf>, LoadError> {
    let Some(record) = certificate(vault, id).await? else { return Ok(None) };
    let damaged = |e: PemError| LoadError::Damaged { id, cause: e.to_string() };
    let chain = read_chain(&record.chain_pem).map_err(damaged)?;
    read_leaf(&chain[0]).map(Some).map_err(damaged)
}

/// Writes of a certificate with its key. Its id says what is in it, so that writing it twice is the same.
pub(crate) fn certificate_writes(
    seal: &SealKey,
    bundle: &Bundle,
    source: Source,
    ca: Option<&str>,
    now_ms: u64,
) -> Result<[Write; 2], SealError> {
    let leaf = &bundle.leaf;
    let record = CertificateRecord {
        id: leaf.id,
        names: leaf.names.clone(),
        not_before_ms: leaf.not_before_ms,
        not_after_ms: leaf.not_after_ms,
        issuer: leaf.issuer.clone(),
        source,
        ca: ca.map(str::to_owned),
        stored_ms: now_ms,
        chain_pem: chain_pem(&bundle.chain),
    };
    let key_record = key_key(leaf.id);
    let sealed = seal.seal(&key_record, &kind_and_der(&bundle.key))?;
    Ok([
        Write::put(certificate_key(leaf.id), json(&record), Expected::Anything),
        Write::put(key_record, sealed, Expected::Anything),
    ])
}

pub(crate) fn certificate_deletes(id: CertificateId) -> [Write; 3] {
    [certificate_key(id), key_key(id), staple_key(id)].map(|key| Write::delete(key, Expected::Anything))
}

/// One byte for the encoding, then the key.
fn kind_and_der(key: &PrivateKeyDer<'_>) -> Zeroizing<Vec<u8>> {
    let kind = match key {
        PrivateKeyDer::Pkcs1(_) => 1,
        PrivateKeyDer::Sec1(_) => 2,
        _ => 8,
    };
    let mut out = Zeroizing::new(vec![kind]);
    out.extend_from_slice(key.secret_der());
    out
}

fn key_of(text: &[u8]) -> Option<PrivateKeyDer<'static>> {
    let (kind, der) = text.split_first()?;
    Some(match kind {
        1 => PrivatePkcs1KeyDer::from(der.to_vec()).into(),
        2 => PrivateSec1KeyDer::from(der.to_vec()).into(),
        8 => PrivatePkcs8KeyDer::from(der.to_vec()).into(),
        _ => return None,
    })
}

pub(crate) fn domain_key(name: &str) -> String {
    format!("{DOMAINS}{name}")
}

pub(crate) const DOMAINS: &str = "domain/";
pub(crate) const CERTIFICATES: &str = "certificate/";

pub(crate) fn certificate_key(id: CertificateId) -> String {
    format!("{CERTIFICATES}{id}")
}

pub(crate) fn staple_key(id: CertificateId) -> String {
    format!("staple/{id}")
}

fn key_key(id: CertificateId) -> String {
    format!("sealed/certificate/{id}")
}

pub(crate) fn order_key(name: &str) -> String {
    format!("sealed/order/{name}")
}

/// Records of ours are plain structures: writing them cannot fail.
pub(crate) fn json(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).unwrap_or_default()
}
