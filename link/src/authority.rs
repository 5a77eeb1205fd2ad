//! The installation's own certificate authority: small, offline to the world, good for this link and nothing else.
//!
//! Its key never leaves the engine's data folder (0600). Certificates do not end by time, so that no clock decides
//! whether an edge is heard; an edge is shut out by removing it from the registry, which names each certificate.

use std::io;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SignatureAlgorithm,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};

use crate::files;

/// The name in the certificate of every engine: edges know it by its authority and not by its address.
pub const ENGINE_NAME: &str = "engine.peregrine.internal";
/// Certificates and keys are some hundred bytes.
const MAX_FILE_BYTES: u64 = 64 << 10;
const KEY_FILE: &str = "authority.key";
const CERTIFICATE_FILE: &str = "authority.crt";

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// One of the two files is there and the other is not, or they do not fit.
    #[error(
        "{0}: the authority's key or certificate is damaged; restore both from a copy of that folder, or remove both and let every edge join anew"
    )]
    Damaged(String),
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// The authority of an installation.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// A certificate with its key.
pub(crate) struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Authority {
    /// Reads the authority in a folder, or makes one.
    ///
    /// # Errors
    /// [`AuthorityError`]: its files cannot be read or written, or are damaged.
    pub fn open(folder: &Path) -> Result<Self, AuthorityError> {
        let (key_path, certificate_path) = (folder.join(KEY_FILE), folder.join(CERTIFICATE_FILE));
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |source| AuthorityError::File { path, source }
        };
        files::private_folder(folder).map_err(failed(folder))?;
        let key = files::read_bounded(&key_path, MAX_FILE_BYTES).map_err(failed(&key_path))?;
        let certificate =
            files::read_bounded(&certificate_path, MAX_FILE_BYTES).map_err(failed(&certificate_path))?;
        let damaged = || AuthorityError::Damaged(folder.display().to_string());
        match (key, certificate) {
            (Some(key), Some(certificate)) => {
                let pem = String::from_utf8(key).map_err(|_| damaged())?;
                let key = KeyPair::from_pem(&pem).map_err(|_| damaged())?;
                let certificate = CertificateDer::from(certificate);
                let authority = Self { issuer: Issuer::new(own_params(), key), certificate };
                if authority.fits() { Ok(authority) } else { Err(damaged()) }
            }
            // A crash between the two files of the first start leaves a key that has signed nothing.
            (_, None) => {
                let key = KeyPair::generate()?;
                files::write_whole(&key_path, key.serialize_pem().as_bytes()).map_err(failed(&key_path))?;
                let certificate = own_params().self_signed(&key)?;
                files::write_whole(&certificate_path, certificate.der())
                    .map_err(failed(&certificate_path))?;
                Ok(Self { certificate: certificate.der().clone(), issuer: Issuer::new(own_params(), key) })
            }
            (None, Some(_)) => Err(damaged()),
        }
    }

    /// Whether the certificate is of this key: its public key is in it.
    fn fits(&self) -> bool {
        let key = self.issuer.key().der_bytes();
        self.certificate.windows(key.len()).any(|window| window == key)
    }

    pub(crate) const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// A new identity for an engine.
    pub(crate) fn engine(&self) -> Result<Identity, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![ENGINE_NAME.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, "peregrine engine");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { certificate: certificate.der().clone(), key: private(&key) })
    }

    /// A certificate for an edge that has this public key.
    pub(crate) fn edge(
        &self,
        name: &str,
        public_key: Vec<u8>,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let mut params = CertificateParams::new(vec![format!("{name}.edge.peregrine.internal")])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        Ok(params.signed_by(&PublicKey(public_key), &self.issuer)?.der().clone())
    }
}

/// SHA-256 of a certificate.
pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// The public key of an edge: a point of the curve that [`KeyPair::generate`] uses.
struct PublicKey(Vec<u8>);

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

/// Length of a public key: an uncompressed point of P-256 (SEC 1 §2.3.3).
pub(crate) const PUBLIC_KEY_BYTES: usize = 65;

/// A key that an edge makes for itself, with its PEM form and its public half.
pub(crate) fn fresh_key() -> Result<(String, Vec<u8>), AuthorityError> {
    let key = KeyPair::generate()?;
    Ok((key.serialize_pem(), key.der_bytes().to_vec()))
}

/// The private key in a PEM file.
pub(crate) fn read_key(pem: &str) -> Result<PrivateKeyDer<'static>, AuthorityError> {
    Ok(private(&KeyPair::from_pem(pem)?))
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

fn own_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "peregrine installation");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_authority_is_made_once_and_its_key_is_its_owners_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = Authority::open(folder.path()).expect("an authority").fingerprint();
        assert_eq!(Authority::open(folder.path()).expect("the same").fingerprint(), first);
        let mode = std::fs::metadata(folder.path().join(KEY_FILE)).expect("the key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_key_without_its_certificate_is_replaced_and_a_certificate_without_its_key_is_damage() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = Authority::open(folder.path()).expect("an authority").fingerprint();
        std::fs::remove_file(folder.path().join(CERTIFICATE_FILE)).expect("it is there");
        let second = Authority::open(folder.path()).expect("another one").fingerprint();
        assert_ne!(first, second);
        std::fs::remove_file(folder.path().join(KEY_FILE)).expect("it is there");
        assert!(matches!(Authority::open(folder.path()), Err(AuthorityError::Damaged(_))));
        let (other, _) = fresh_key().expect("a key");
        std::fs::write(folder.path().join(KEY_FILE), other).expect("a file");
        assert!(matches!(Authority::open(folder.path()), Err(AuthorityError::Damaged(_))));
    }
}
