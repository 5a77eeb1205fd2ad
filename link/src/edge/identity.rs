//! Who an edge is: its key, its certificate, its authority and where its engines are. All that it holds; none of it
//! opens anything but the link.

use std::path::Path;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::EdgeError;
use crate::authority::{self, ENGINE_NAME};
use crate::files;
use crate::tls;
use crate::token::JoinToken;
use crate::wire::{self, Attach, Greeting, MAX_FRAME_BYTES, MAX_GREETING_BYTES, Reply};

const FILE: &str = "identity.json";
const EPOCH_FILE: &str = "epoch";
const MAX_FILE_BYTES: u64 = 64 << 10;
/// Longest time for a connection with its greeting.
const CONNECT_TIMEOUT_MS: u64 = 5_000;

/// What an edge has become by joining.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// Its name.
    pub name: String,
    /// Where its engine is.
    pub engine: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) name: String,
    /// `HOST:PORT`, asked in turn.
    pub(super) engines: Vec<String>,
    certificate: Vec<u8>,
    authority: Vec<u8>,
    key_pem: String,
}

impl Identity {
    pub(super) fn read(folder: &Path) -> Result<Self, EdgeError> {
        let path = folder.join(FILE);
        let failed = |source| EdgeError::File { path: path.clone(), source };
        let bytes = files::read_bounded(&path, MAX_FILE_BYTES).map_err(failed)?;
        let bytes = bytes.ok_or_else(|| EdgeError::NotJoined(folder.to_owned()))?;
        serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))
    }
}

/// Joins an installation: proves itself with a token, gets a certificate, and writes its identity into a folder.
///
/// # Errors
/// [`EdgeError`]: it has joined already, the engine is not reached or is not the one of the token, or it refuses.
pub async fn join(folder: &Path, engine: &str, token: &JoinToken) -> Result<Joined, EdgeError> {
    let path = folder.join(FILE);
    let failed = |source| EdgeError::File { path: path.clone(), source };
    // The lock: an edge that runs must not be given another identity under its feet.
    let _lock = super::lock(folder)?;
    if path.try_exists().map_err(failed)? {
        return Err(EdgeError::HasJoined(folder.to_owned()));
    }
    let (key_pem, public_key) = authority::fresh_key()?;
    let config = tls::first_contact(token.authority)?;
    let greeting = Greeting::Join { version: wire::VERSION, secret: token.secret.to_vec(), public_key };
    let (_, reply) = greet(&TlsConnector::from(config), engine, &greeting).await?;
    let (name, certificate, authority) = match reply {
        Reply::Joined { name, certificate, authority } => (name, certificate, authority),
        Reply::Refused { code, message } => return Err(EdgeError::Refused { code, message }),
        Reply::Attached { .. } => return Err(out_of_place()),
    };
    if authority::fingerprint(&CertificateDer::from(authority.as_slice())) != token.authority {
        return Err(out_of_place());
    }
    let engines = vec![engine.to_owned()];
    let identity = Identity { name: name.clone(), engines, certificate, authority, key_pem };
    let bytes = serde_json::to_vec_pretty(&identity).map_err(|error| failed(error.into()))?;
    files::write_whole(&path, &bytes).map_err(failed)?;
    Ok(Joined { name, engine: engine.to_owned() })
}

fn out_of_place() -> EdgeError {
    EdgeError::Refused {
        code: "link.out_of_place".to_owned(),
        message: "it gave an answer to another question".to_owned(),
    }
}

/// Connects and attaches: the stream, the epoch of the engine, and how long it waits for this edge.
pub(super) async fn attach(
    identity: &Identity,
    engine: &str,
    attach: &Attach,
) -> Result<(TlsStream<TcpStream>, u64, u32), EdgeError> {
    let own = authority::Identity {
        certificate: CertificateDer::from(identity.certificate.clone()),
        key: authority::read_key(&identity.key_pem)?,
    };
    let config = tls::client(&CertificateDer::from(identity.authority.clone()), own)?;
    let greeting = Greeting::Attach(attach.clone());
    let (stream, reply) = greet(&TlsConnector::from(config), engine, &greeting).await?;
    match reply {
        Reply::Attached { epoch, lease_ms } => Ok((stream, epoch, lease_ms)),
        Reply::Refused { code, message } => Err(EdgeError::Refused { code, message }),
        Reply::Joined { .. } => Err(out_of_place()),
    }
}

async fn greet(
    connector: &TlsConnector,
    engine: &str,
    greeting: &Greeting,
) -> Result<(TlsStream<TcpStream>, Reply), EdgeError> {
    let limit = Duration::from_millis(CONNECT_TIMEOUT_MS);
    let unreachable = |source| EdgeError::Unreachable { address: engine.to_owned(), source };
    let broken = |source| EdgeError::Stream { address: engine.to_owned(), source };
    let work = async {
        let address = engine.strip_prefix("tls://").unwrap_or(engine);
        if address.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
        {
            return Err(EdgeError::BadAddress(engine.to_owned()));
        }
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let name = ServerName::try_from(ENGINE_NAME).expect("the name is one");
        let mut stream = connector.connect(name, stream).await.map_err(unreachable)?;
        let limit = match greeting {
            Greeting::Join { .. } => MAX_GREETING_BYTES * 4,
            Greeting::Attach(_) => MAX_FRAME_BYTES,
        };
        wire::write(&mut stream, greeting).await.map_err(broken)?;
        let reply = wire::read(&mut stream, limit).await.map_err(broken)?;
        Ok((stream, reply))
    };
    let greeted = tokio::time::timeout(limit, work).await;
    greeted.unwrap_or_else(|_| Err(unreachable(std::io::ErrorKind::TimedOut.into())))
}

/// Highest epoch of an engine that this edge has heard; 0 before the first.
pub(super) fn read_epoch(folder: &Path) -> Result<u64, EdgeError> {
    let path = folder.join(EPOCH_FILE);
    let failed = |source| EdgeError::File { path: path.clone(), source };
    let Some(bytes) = files::read_bounded(&path, MAX_FILE_BYTES).map_err(failed)? else { return Ok(0) };
    let text = String::from_utf8_lossy(&bytes);
    text.trim().parse().map_err(|_| {
        failed(std::io::Error::other("it is no epoch: remove it if you are certain that no old engine runs"))
    })
}

pub(super) fn write_epoch(folder: &Path, epoch: u64) -> Result<(), EdgeError> {
    let path = folder.join(EPOCH_FILE);
    files::write_whole(&path, format!("{epoch}\n").as_bytes())
        .map_err(|source| EdgeError::File { path: path.clone(), source })
}
