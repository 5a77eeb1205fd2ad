//! `peregrine-scale DATA TEMPLATE COUNT`: adds COUNT domains `d0000000.scale.test`, `d0000001.scale.test`, … to the store of a
//! stopped server, each with a certificate of its own (ECDSA P-256, one authority, one key for all), and otherwise as the domain
//! TEMPLATE is, whose certificate was imported. Prints the authority's certificate.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use bytes::Bytes;
use peregrine_certs::SealKey;
use peregrine_engine::store::{Batch, SqliteStore, Store, Write};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Domains that are written at once; each is four records.
const AT_ONCE: usize = 250;
/// The file of the key that seals private keys, in the data folder.
const KEY_FILE: &str = "certificates.key";

/// What a sealed key of this kind begins with.
const PKCS8: u8 = 8;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [data, template, count] = words.as_slice() else {
        eprintln!("usage: peregrine-scale DATA TEMPLATE COUNT");
        return ExitCode::from(2);
    };
    let Ok(count) = count.parse() else {
        eprintln!("peregrine-scale: {count} is no number of domains");
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let filled = runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(fill(Path::new(data), template, count)));
    match filled {
        Ok(authority) => {
            print!("{authority}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("peregrine-scale: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What there is of the template, by the family of its keys.
struct Template {
    domain: Value,
    front: Value,
    certificate: Value,
}

async fn fill(data: &Path, name: &str, count: usize) -> Result<String> {
    let store = SqliteStore::open(data)?;
    let seal = SealKey::open_or_create(&data.join(KEY_FILE))?;
    let template = Template::read(&store, name).await?;
    let key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    for from in (0..count).step_by(AT_ONCE) {
        let mut writes = Vec::with_capacity(AT_ONCE * 4);
        for number in from..count.min(from + AT_ONCE) {
            let name = format!("d{number:07}.scale.test");
            let signed = CertificateParams::new(vec![name.clone()])?.signed_by(&key, &authority)?;
            writes.extend(template.records(&seal, &name, signed.der(), &signed.pem(), &key)?);
        }
        store.commit(Batch { preconditions: Vec::new(), writes }).await?;
    }
    Ok(authority.pem())
}

impl Template {
    async fn read(store: &SqliteStore, name: &str) -> Result<Self> {
        let get = async |key: &str| -> Result<Option<Bytes>> {
            let (_, found) = store.range(key).await?;
            Ok(found.into_iter().find(|entry| entry.key == key).map(|entry| entry.value))
        };
        let missing = || format!("there is no imported domain {name} in this store");
        let domain = get(&format!("vault/certs/domain/{name}")).await?.ok_or_else(missing)?;
        let domain: Value = serde_json::from_slice(&domain)?;
        let id = domain["held"]["id"].as_str().ok_or_else(missing)?.to_owned();
        let certificate = get(&format!("vault/certs/certificate/{id}")).await?.ok_or_else(missing)?;
        let front = get(&format!("vault/front/{name}")).await?.ok_or_else(missing)?;
        let front = serde_json::from_slice(&front)?;
        Ok(Self { domain, front, certificate: serde_json::from_slice(&certificate)? })
    }

    fn records(&self, seal: &SealKey, name: &str, der: &[u8], pem: &str, key: &KeyPair) -> Result<Vec<Write>> {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        let id: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let (mut domain, mut certificate, mut front) =
            (self.domain.clone(), self.certificate.clone(), self.front.clone());
        front["certificate"] = json!(id);
        domain["name"] = json!(name);
        domain["held"]["id"] = json!(id);
        certificate["id"] = json!(id);
        certificate["names"] = json!([name]);
        certificate["chain_pem"] = json!(pem);
        let key_record = format!("sealed/certificate/{id}");
        let sealed = seal.seal(&key_record, &[&[PKCS8][..], &key.serialize_der()].concat())?;
        let put = |key: String, value: Bytes| Write::Put(format!("vault/{key}"), value);
        Ok(vec![
            put(format!("front/{name}"), serde_json::to_vec(&front)?.into()),
            put(format!("certs/domain/{name}"), serde_json::to_vec(&domain)?.into()),
            put(format!("certs/certificate/{id}"), serde_json::to_vec(&certificate)?.into()),
            put(format!("certs/{key_record}"), sealed.into()),
        ])
    }
}
