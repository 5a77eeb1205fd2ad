//! DNS updates (RFC 2136) that are signed with a shared key (TSIG, RFC 8945), over TCP. Replies have to be signed, too.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hickory_proto::op::update_message::{append, delete_by_rdata};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::rdata::tsig::TsigAlgorithm;
use hickory_proto::rr::{Name, RData, Record, RecordSet, TSigner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{DnsError, DnsProvider};

/// An update has to be answered within this time.
const UPDATE_TIMEOUT_MS: u64 = 10_000;
/// How far the clocks of server and client may be apart (RFC 8945 §10).
const FUDGE_SECONDS: u16 = 300;
/// Challenges live shortly: so may what resolvers remember of them.
const TTL_SECONDS: u32 = 5;

/// Algorithms that servers and we know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TsigKind {
    /// `hmac-sha256`.
    #[default]
    HmacSha256,
    /// `hmac-sha384`.
    HmacSha384,
    /// `hmac-sha512`.
    HmacSha512,
}

/// A server that takes updates of a zone.
pub struct Rfc2136 {
    server: SocketAddr,
    zone: Name,
    signer: TSigner,
}

impl fmt::Debug for Rfc2136 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rfc2136")
            .field("server", &self.server)
            .field("zone", &self.zone.to_ascii())
            .field("key_name", &self.signer.signer_name().to_ascii())
            .finish_non_exhaustive()
    }
}

impl Rfc2136 {
    /// Updates `zone` at `server` with the key `key_name`. `key` is decoded.
    ///
    /// # Errors
    /// [`DnsError`] if one of the names is none, or the key cannot be used.
    pub fn new(
        server: SocketAddr,
        zone: &str,
        key_name: &str,
        kind: TsigKind,
        key: Vec<u8>,
    ) -> Result<Self, DnsError> {
        let algorithm = match kind {
            TsigKind::HmacSha256 => TsigAlgorithm::HmacSha256,
            TsigKind::HmacSha384 => TsigAlgorithm::HmacSha384,
            TsigKind::HmacSha512 => TsigAlgorithm::HmacSha512,
        };
        let signer = TSigner::new(key, algorithm, name(key_name)?, FUDGE_SECONDS);
        let signer = signer.map_err(|e| DnsError { cause: format!("TSIG key {key_name}: {e}") })?;
        Ok(Self { server, zone: name(zone)?, signer })
    }

    async fn update(&self, mut message: Message) -> Result<(), DnsError> {
        let failed = |cause: String| DnsError { cause: format!("DNS server {}: {cause}", self.server) };
        let mut id = [0; 2];
        aws_lc_rs::rand::fill(&mut id).map_err(|_| failed("no random bytes".into()))?;
        message.metadata.id = u16::from_be_bytes(id);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let verifier = message.finalize(&self.signer, since).map_err(|e| failed(e.to_string()))?;
        let request = message.to_vec().map_err(|e| failed(e.to_string()))?;
        let limit = Duration::from_millis(UPDATE_TIMEOUT_MS);
        let exchanged = tokio::time::timeout(limit, self.exchange(&request)).await;
        let reply = exchanged.map_err(|_| failed(format!("no answer in {UPDATE_TIMEOUT_MS} ms")))?;
        let reply = reply.map_err(|e| failed(e.to_string()))?;
        let told =
            Message::from_vec(&reply).map_err(|e| failed(format!("its answer cannot be read: {e}")))?;
        let code = told.metadata.response_code;
        match verifier {
            // Who refuses our key cannot sign (RFC 8945 §5.2.1): what it says is shown, not believed.
            Some(mut verifier) if code == ResponseCode::NoError => {
                verifier
                    .verify(&reply)
                    .map_err(|e| failed(format!("its answer is not signed by the key: {e}")))?;
            }
            _ => {}
        }
        match code {
            ResponseCode::NoError => Ok(()),
            ResponseCode::NotAuth => Err(failed(format!(
                "it refuses the update (NOTAUTH): check the name, the algorithm and the secret of key {}, and both clocks",
                self.signer.signer_name()
            ))),
            ResponseCode::Refused => Err(failed(format!(
                "it refuses the update (REFUSED): allow key {} to update zone {}",
                self.signer.signer_name(),
                self.zone
            ))),
            other => Err(failed(format!("it refuses the update of zone {} ({other})", self.zone))),
        }
    }

    /// One message each way; over TCP each has its length before it (RFC 1035 §4.2.2).
    async fn exchange(&self, request: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(self.server).await?;
        let length = u16::try_from(request.len()).map_err(std::io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes()[..], request].concat()).await?;
        let length = stream.read_u16().await?;
        let mut reply = vec![0; usize::from(length)];
        stream.read_exact(&mut reply).await?;
        Ok(reply)
    }

    fn text(&self, record: &str, value: &str) -> Result<RecordSet, DnsError> {
        let name = name(record)?;
        if !self.zone.zone_of(&name) {
            return Err(DnsError { cause: format!("{record} is not in zone {}", self.zone) });
        }
        let data = RData::TXT(TXT::new(vec![value.to_owned()]));
        Ok(RecordSet::from(Record::from_rdata(name, TTL_SECONDS, data)))
    }
}

impl DnsProvider for Rfc2136 {
    fn present<'a>(&'a self, record: &'a str, value: &'a str) -> BoxFuture<'a, Result<(), DnsError>> {
        async move {
            let set = self.text(record, value)?;
            self.update(append(set, self.zone.clone(), false, false)).await
        }
        .boxed()
    }

    fn remove<'a>(&'a self, record: &'a str, value: &'a str) -> BoxFuture<'a, Result<(), DnsError>> {
        async move {
            let set = self.text(record, value)?;
            self.update(delete_by_rdata(set, self.zone.clone(), false)).await
        }
        .boxed()
    }
}

fn name(text: &str) -> Result<Name, DnsError> {
    let mut name =
        Name::from_ascii(text).map_err(|e| DnsError { cause: format!("{text} is no name: {e}") })?;
    name.set_fqdn(true);
    Ok(name)
}
