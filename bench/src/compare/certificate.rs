//! The certificate of every contender: ECDSA P-256, made for one comparison.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::{fs, io};

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::scenario::TLS_HOST;
use crate::load::Tls;

/// A certificate that signs itself, with its key.
#[derive(Debug)]
pub struct Certificate {
    pub(super) chain_pem: String,
    pub(super) key_pem: String,
    der: Vec<u8>,
}

impl Certificate {
    /// Makes one for `localhost`.
    ///
    /// # Errors
    /// The library's.
    pub fn fresh() -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let signed = CertificateParams::new(vec![TLS_HOST.to_owned()])?.self_signed(&key)?;
        Ok(Self { chain_pem: signed.pem(), key_pem: key.serialize_pem(), der: signed.der().to_vec() })
    }

    /// Writes `bench.pem` and `bench.key` (0600) into a folder.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::write(folder.join("bench.pem"), &self.chain_pem)?;
        write_secret(&folder.join("bench.key"), &self.key_pem)
    }

    /// For clients that trust it.
    pub(super) fn tls(&self) -> Tls {
        Tls { trusted: self.der.clone(), resume: false }
    }
}

/// A file of ours alone that was not there.
pub(super) fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}
