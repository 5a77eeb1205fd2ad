//! Chains and private keys as PEM: read, checked against each other, and written. Whether a client trusts a chain is not
//! judged here: people bring certificates of authorities of their own.

use data_encoding::BASE64;
use peregrine_routing::{CertificateId, HostPattern};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::domain::Utc;

/// More certificates are no chain.
const MAX_CHAIN: usize = 10;
/// More names are not read.
const MAX_NAMES: usize = 1000;

/// What is wrong with a chain or a key. All of these are told to whoever brings them; a retry with the same is no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// There is no certificate.
    #[error("no certificate: expected a block that begins with -----BEGIN CERTIFICATE-----")]
    NoCertificate,
    /// There is no key.
    #[error(
        "no private key that can be read: expected an unencrypted block -----BEGIN PRIVATE KEY----- (or EC, RSA)"
    )]
    NoKey,
    /// Not PEM, or not X.509 inside.
    #[error("certificate {number} cannot be read: {cause}")]
    Unreadable {
        /// Which one, from 1.
        number: usize,
        /// Why.
        cause: String,
    },
    /// There are too many.
    #[error(
        "more than {MAX_CHAIN} certificates: a chain has the server's own and those between it and a root"
    )]
    TooLong,
    /// A certificate is not followed by its issuer's.
    #[error(
        "the chain is out of order: certificate {number} was issued by \"{issuer}\", and the next one is of \"{next}\""
    )]
    OutOfOrder {
        /// Which one, from 1.
        number: usize,
        /// Its issuer.
        issuer: String,
        /// Whose certificate follows.
        next: String,
    },
    /// The key is another certificate's.
    #[error("the private key does not belong to the first certificate (its names: {names})")]
    OtherKey {
        /// The certificate's names.
        names: String,
    },
    /// It names nobody.
    #[error(
        "the certificate has no DNS name in its subjectAltName: clients would refuse it (RFC 6125 §6.4.4)"
    )]
    NoNames,
    /// It is not for this name.
    #[error("the certificate is for {names} and not for {wanted}")]
    OtherName {
        /// The certificate's names.
        names: String,
        /// The one that was asked for.
        wanted: String,
    },
    /// It is over.
    #[error("the certificate ended {when}")]
    Expired {
        /// When, UTC.
        when: String,
    },
    /// It has not begun.
    #[error("the certificate is valid from {when} on only: check this machine's clock")]
    NotYet {
        /// From when, UTC.
        when: String,
    },
}

/// What a certificate says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// SHA-256 of its DER.
    pub id: CertificateId,
    /// DNS names, canonical; wildcards with their `*.`.
    pub names: Vec<String>,
    /// Unix time in milliseconds.
    pub not_before_ms: u64,
    /// Unix time in milliseconds.
    pub not_after_ms: u64,
    /// Who issued it.
    pub issuer: String,
    /// `keyIdentifier` of its authority and its serial number as they are encoded (RFC 9773 §4.1).
    pub(crate) ari: Option<(Vec<u8>, Vec<u8>)>,
}

impl Leaf {
    /// Whether a client that asks for `name` would be content. `name` may be a pattern.
    #[must_use]
    pub fn covers(&self, name: &str) -> bool {
        let above =
            name.strip_prefix("*.").map_or_else(|| name.split_once('.').map(|(_, above)| above), Some);
        self.names
            .iter()
            .any(|own| own == name || own.strip_prefix("*.").is_some_and(|own| Some(own) == above))
    }
}

/// A chain with its key.
pub struct Bundle {
    /// The server's own first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// What the first one says.
    pub leaf: Leaf,
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bundle")
            .field("leaf", &self.leaf)
            .field("chain", &self.chain.len())
            .finish_non_exhaustive()
    }
}

impl Bundle {
    /// Reads a chain and a key (which may stand in one text) and checks them against each other and `now_ms`.
    ///
    /// # Errors
    /// [`PemError`], the first thing that is wrong.
    pub fn read(chain_pem: &str, key_pem: &str, now_ms: u64) -> Result<Self, PemError> {
        let chain = read_chain(chain_pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| PemError::NoKey)?;
        Self::of(chain, key, now_ms)
    }

    pub(crate) fn of(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        now_ms: u64,
    ) -> Result<Self, PemError> {
        let leaf = read_leaf(chain.first().ok_or(PemError::NoCertificate)?)?;
        check_order(&chain)?;
        if leaf.names.is_empty() {
            return Err(PemError::NoNames);
        }
        let signing =
            rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).map_err(|_| PemError::NoKey)?;
        let pair = rustls::sign::CertifiedKey::new(chain.clone(), signing);
        match pair.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                return Err(PemError::OtherKey { names: leaf.names.join(", ") });
            }
            Err(e) => return Err(PemError::Unreadable { number: 1, cause: e.to_string() }),
        }
        if leaf.not_after_ms <= now_ms {
            return Err(PemError::Expired { when: Utc(leaf.not_after_ms).to_string() });
        }
        if leaf.not_before_ms > now_ms {
            return Err(PemError::NotYet { when: Utc(leaf.not_before_ms).to_string() });
        }
        Ok(Self { chain, key, leaf })
    }

    /// Whether it may be served for this pattern.
    ///
    /// # Errors
    /// [`PemError::OtherName`].
    pub fn is_for(&self, name: &str) -> Result<(), PemError> {
        if self.leaf.covers(name) {
            return Ok(());
        }
        Err(PemError::OtherName { names: self.leaf.names.join(", "), wanted: name.to_owned() })
    }
}

/// Certificates as PEM.
#[must_use]
pub fn chain_pem(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(|der| block("CERTIFICATE", der)).collect()
}

/// A key as PEM. Wiped when it is dropped.
#[must_use]
pub fn key_pem(key: &PrivateKeyDer<'_>) -> Zeroizing<String> {
    let (label, der) = match key {
        PrivateKeyDer::Pkcs1(key) => ("RSA PRIVATE KEY", key.secret_pkcs1_der()),
        PrivateKeyDer::Sec1(key) => ("EC PRIVATE KEY", key.secret_sec1_der()),
        PrivateKeyDer::Pkcs8(key) => ("PRIVATE KEY", key.secret_pkcs8_der()),
        _ => ("PRIVATE KEY", key.secret_der()),
    };
    Zeroizing::new(block(label, der))
}

/// One PEM block (RFC 7468).
fn block(label: &str, der: &[u8]) -> String {
    let digits = Zeroizing::new(BASE64.encode(der));
    let mut text = format!("-----BEGIN {label}-----\n");
    // Whole in one piece, so that no half of a key is left behind by a text that grows.
    text.reserve_exact(digits.len() + digits.len() / 64 + label.len() + 32);
    for line in digits.as_bytes().chunks(64) {
        text.extend(line.iter().map(|digit| char::from(*digit)));
        text.push('\n');
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}

pub(crate) fn read_chain(pem: &str) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let mut chain = Vec::new();
    for (at, certificate) in CertificateDer::pem_slice_iter(pem.as_bytes()).enumerate() {
        if at == MAX_CHAIN {
            return Err(PemError::TooLong);
        }
        let unreadable =
            |e: rustls_pki_types::pem::Error| PemError::Unreadable { number: at + 1, cause: e.to_string() };
        chain.push(certificate.map_err(unreadable)?);
    }
    if chain.is_empty() { Err(PemError::NoCertificate) } else { Ok(chain) }
}

fn parse(der: &CertificateDer<'_>, number: usize) -> Result<X509CertificateOwned, PemError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(X509CertificateOwned::of(&certificate)),
        Ok(_) => Err(PemError::Unreadable { number, cause: "there is something behind it".into() }),
        Err(e) => Err(PemError::Unreadable { number, cause: e.to_string() }),
    }
}

/// What of a certificate is needed here.
struct X509CertificateOwned {
    subject_raw: Vec<u8>,
    issuer_raw: Vec<u8>,
    subject: String,
    issuer: String,
    names: Vec<String>,
    not_before_ms: u64,
    not_after_ms: u64,
    ari: Option<(Vec<u8>, Vec<u8>)>,
}

impl X509CertificateOwned {
    fn of(certificate: &X509Certificate<'_>) -> Self {
        let mut names: Vec<String> = Vec::new();
        let mut authority = None;
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    let dns = san.general_names.iter().filter_map(|name| match name {
                        GeneralName::DNSName(name) => HostPattern::parse(name).ok(),
                        _ => None,
                    });
                    names.extend(dns.map(|name| name.to_string()).take(MAX_NAMES));
                }
                ParsedExtension::AuthorityKeyIdentifier(key) => {
                    authority = key.key_identifier.as_ref().map(|id| id.0.to_vec());
                }
                _ => {}
            }
        }
        let validity = certificate.validity();
        let ms = |seconds: i64| u64::try_from(seconds).unwrap_or(0).saturating_mul(1000);
        Self {
            subject_raw: certificate.subject().as_raw().to_vec(),
            issuer_raw: certificate.issuer().as_raw().to_vec(),
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            names,
            not_before_ms: ms(validity.not_before.timestamp()),
            not_after_ms: ms(validity.not_after.timestamp()),
            ari: authority.map(|key| (key, certificate.raw_serial().to_vec())),
        }
    }
}

pub(crate) fn read_leaf(der: &CertificateDer<'_>) -> Result<Leaf, PemError> {
    let read = parse(der, 1)?;
    let mut id = [0; 32];
    id.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der).as_ref());
    Ok(Leaf {
        id: CertificateId(id),
        names: read.names,
        not_before_ms: read.not_before_ms,
        not_after_ms: read.not_after_ms,
        issuer: read.issuer,
        ari: read.ari,
    })
}

fn check_order(chain: &[CertificateDer<'_>]) -> Result<(), PemError> {
    let mut before: Option<X509CertificateOwned> = None;
    for (at, der) in chain.iter().enumerate() {
        let own = parse(der, at + 1)?;
        if let Some(before) = before.filter(|before| before.issuer_raw != own.subject_raw) {
            return Err(PemError::OutOfOrder { number: at, issuer: before.issuer, next: own.subject });
        }
        before = Some(own);
    }
    Ok(())
}
