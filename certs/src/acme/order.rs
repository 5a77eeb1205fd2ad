//! An order at an authority (RFC 8555 §7.4), in steps that can each be repeated.

use std::fmt;
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::BASE64URL_NOPAD;
use instant_acme::{
    AuthorizationStatus, CertificateIdentifier, ChallengeStatus, ChallengeType, Identifier, NewOrder, Order,
    OrderStatus,
};
use rustls_pki_types::Der;

use super::transport::told;
use super::{AcmeError, AcmeErrorKind, Session, signed};
use crate::domain::Window;

/// An order, as the authority last told of it.
pub(crate) struct Running<'a> {
    order: Order,
    session: &'a Session,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Names have to be validated.
    Pending,
    /// The certificate can be asked for.
    Ready,
    /// The authority is at it.
    Processing,
    /// There is a certificate.
    Valid,
    /// It is over.
    Invalid,
}

/// Kinds of validation that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChallengeKind {
    /// A file over HTTP on port 80 (RFC 8555 §8.3).
    Http01,
    /// A handshake on port 443 (RFC 8737).
    TlsAlpn01,
    /// A TXT record (RFC 8555 §8.4).
    Dns01,
}

impl fmt::Display for ChallengeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http01 => "http-01",
            Self::TlsAlpn01 => "tls-alpn-01",
            Self::Dns01 => "dns-01",
        })
    }
}

/// What an authorization of an order needs.
pub(crate) enum Authorized {
    /// Nothing any more.
    Already,
    /// One of these.
    Needs(Vec<Challenge>),
    /// It has failed.
    Failed(String),
}

/// A challenge that can be answered.
pub(crate) struct Challenge {
    pub(crate) kind: ChallengeKind,
    /// The name, without `*.`.
    pub(crate) name: String,
    pub(crate) token: String,
    pub(crate) key_authorization: String,
    pub(crate) digest: [u8; 32],
    pub(crate) dns_value: String,
    /// The authority was told already that it is ready.
    pub(crate) processing: bool,
}

impl Challenge {
    fn new(kind: ChallengeKind, name: &str, challenge: &instant_acme::Challenge, thumbprint: &str) -> Self {
        // RFC 8555 §8.1.
        let key_authorization = format!("{}.{thumbprint}", challenge.token);
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, key_authorization.as_bytes()).as_ref());
        Self {
            kind,
            name: name.to_owned(),
            token: challenge.token.clone(),
            key_authorization,
            digest: hash,
            dns_value: BASE64URL_NOPAD.encode(&hash),
            processing: challenge.status == ChallengeStatus::Processing,
        }
    }
}

impl Session {
    /// Creates an order for `name`.
    pub(crate) async fn create_order(
        &self,
        name: &str,
        profile: Option<&str>,
        replaces: Option<&(Vec<u8>, Vec<u8>)>,
    ) -> Result<Running<'_>, AcmeError> {
        let names = [Identifier::Dns(name.to_owned())];
        let identifier = replaces.map(ari_id);
        let new = |with_replaces: bool| {
            let mut new = NewOrder::new(&names);
            if let Some(profile) = profile {
                new = new.profile(profile);
            }
            match identifier.clone().filter(|_| with_replaces) {
                Some(id) => new.replaces(id),
                None => new,
            }
        };
        let made = signed!(self.account.new_order(&new(true)).await);
        let order = match made {
            Ok(order) => order,
            // It has made the order and does not repeat `replaces`, as some do: the order is there.
            Err(instant_acme::Error::Other(e)) if e.to_string().starts_with("replaces field mismatch") => {
                let url = self.transport.seen().location;
                let url = url.ok_or_else(|| AcmeError::own("the authority named no order"))?;
                return self.resume_order(&url).await;
            }
            // It has none of RFC 9773, or the order that is to be replaced was replaced before (§5).
            Err(instant_acme::Error::Unsupported(_)) => signed!(self.account.new_order(&new(false)).await)?,
            Err(e) => {
                let e = AcmeError::from(e);
                if identifier.is_none() || e.kind != AcmeErrorKind::Refused {
                    return Err(e);
                }
                signed!(self.account.new_order(&new(false)).await)?
            }
        };
        Ok(Running { order, session: self })
    }

    /// Goes on with an order.
    pub(crate) async fn resume_order(&self, url: &str) -> Result<Running<'_>, AcmeError> {
        let order = signed!(self.account.order(url.to_owned()).await).map_err(|e| {
            let mut e = AcmeError::from(e);
            // Who refuses to tell of an order will not fulfil it.
            if e.kind == AcmeErrorKind::Refused {
                e.kind = AcmeErrorKind::Gone;
            }
            e
        })?;
        Ok(Running { order, session: self })
    }

    /// When the authority wants this certificate to be renewed, and in how many milliseconds to ask again; `None` when it does
    /// not say such things.
    pub(crate) async fn window(&self, ari: &(Vec<u8>, Vec<u8>)) -> Result<Option<(Window, u64)>, AcmeError> {
        match self.account.renewal_info(&ari_id(ari)).await {
            Ok((info, after)) => {
                let ms = |time| {
                    let since = SystemTime::from(time).duration_since(SystemTime::UNIX_EPOCH);
                    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
                };
                let window = info.suggested_window;
                let window = Window { start_ms: ms(window.start), end_ms: ms(window.end) };
                if window.end_ms <= window.start_ms {
                    // RFC 9773 §4.2: such a window is none.
                    return Ok(None);
                }
                Ok(Some((window, u64::try_from(after.as_millis()).unwrap_or(u64::MAX))))
            }
            Err(instant_acme::Error::Unsupported(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

fn ari_id((key, serial): &(Vec<u8>, Vec<u8>)) -> CertificateIdentifier<'static> {
    CertificateIdentifier::new(Der::from_slice(key), Der::from_slice(serial))
}

impl Running<'_> {
    pub(crate) fn url(&self) -> &str {
        self.order.url()
    }

    pub(crate) fn status(&mut self) -> Status {
        match self.order.state().status {
            OrderStatus::Pending => Status::Pending,
            OrderStatus::Ready => Status::Ready,
            OrderStatus::Processing => Status::Processing,
            OrderStatus::Valid => Status::Valid,
            OrderStatus::Invalid => Status::Invalid,
        }
    }

    /// What the authority says to have gone wrong.
    pub(crate) fn error(&mut self) -> Option<String> {
        self.order.state().error.as_ref().map(told)
    }

    /// Asks for its state. Returns how long the authority wants to be left alone now.
    pub(crate) async fn refresh(&mut self) -> Result<Option<u64>, AcmeError> {
        signed!(self.order.refresh().await.map(drop))?;
        Ok(self.session.transport.seen().retry_after_ms)
    }

    /// Looks at all authorizations.
    pub(crate) async fn authorizations(&mut self) -> Result<Vec<Authorized>, AcmeError> {
        // What was fetched before is kept by the library, so that a repetition costs only what is missing.
        signed!(self.fetch_authorizations().await)?;
        let thumbprint = self.session.account.key_thumbprint().to_owned();
        let mut all = Vec::new();
        let mut stream = self.order.authorizations();
        while let Some(authorization) = stream.next().await {
            let authorization = authorization?;
            let name = match authorization.identifier().identifier {
                Identifier::Dns(name) => name.clone(),
                other => {
                    return Err(AcmeError::own(format!(
                        "the order has a name of an unknown kind: {other:?}"
                    )));
                }
            };
            all.push(match authorization.status {
                AuthorizationStatus::Valid => Authorized::Already,
                AuthorizationStatus::Pending => {
                    let kinds = [ChallengeKind::Http01, ChallengeKind::TlsAlpn01, ChallengeKind::Dns01];
                    let needs = kinds.into_iter().filter_map(|kind| {
                        let of_kind =
                            |challenge: &&instant_acme::Challenge| challenge.r#type == library_kind(kind);
                        let challenge = authorization.challenges.iter().find(of_kind)?;
                        Some(Challenge::new(kind, &name, challenge, &thumbprint))
                    });
                    Authorized::Needs(needs.collect())
                }
                status => {
                    let error = authorization.challenges.iter().find_map(|challenge| {
                        challenge.error.as_ref().map(|problem| {
                            let known =
                                [ChallengeKind::Http01, ChallengeKind::TlsAlpn01, ChallengeKind::Dns01];
                            let kind = known.into_iter().find(|kind| library_kind(*kind) == challenge.r#type);
                            let kind = kind.map_or_else(|| "challenge".to_owned(), |kind| kind.to_string());
                            format!("{kind}: {}", told(problem))
                        })
                    });
                    Authorized::Failed(error.unwrap_or_else(|| format!("the authorization is {status:?}")))
                }
            });
        }
        Ok(all)
    }

    async fn fetch_authorizations(&mut self) -> Result<(), instant_acme::Error> {
        let mut stream = self.order.authorizations();
        while let Some(authorization) = stream.next().await {
            authorization?;
        }
        Ok(())
    }

    /// Fetches the authorizations again: what was told of them before is old.
    pub(crate) async fn forget_authorizations(&mut self) -> Result<(), AcmeError> {
        signed!(self.refresh_authorizations().await)?;
        Ok(())
    }

    async fn refresh_authorizations(&mut self) -> Result<(), instant_acme::Error> {
        let mut stream = self.order.authorizations();
        while let Some(authorization) = stream.next().await {
            authorization?.refresh().await?;
        }
        Ok(())
    }

    /// Tells the authority that the challenge of this token can be validated.
    pub(crate) async fn ready(&mut self, kind: ChallengeKind, token: &str) -> Result<(), AcmeError> {
        signed!(self.set_ready(kind, token).await)?;
        Ok(())
    }

    async fn set_ready(&mut self, kind: ChallengeKind, token: &str) -> Result<(), instant_acme::Error> {
        let mut stream = self.order.authorizations();
        while let Some(authorization) = stream.next().await {
            let mut authorization = authorization?;
            if let Some(mut handle) = authorization.challenge(library_kind(kind))
                && handle.token == token
            {
                return handle.set_ready().await;
            }
        }
        Ok(())
    }

    /// Asks for the certificate of this signing request (DER). Whether it is there, the order tells later.
    pub(crate) async fn finalize(&mut self, request: &[u8]) -> Result<(), AcmeError> {
        signed!(self.order.finalize_csr(request).await)?;
        Ok(())
    }

    /// The chain, PEM.
    pub(crate) async fn certificate(&mut self) -> Result<String, AcmeError> {
        let chain = signed!(self.order.certificate().await)?;
        chain.ok_or_else(|| AcmeError {
            kind: AcmeErrorKind::Ca,
            text: "it says that there is a certificate, and gives none".into(),
            after_ms: None,
        })
    }
}

const fn library_kind(kind: ChallengeKind) -> ChallengeType {
    match kind {
        ChallengeKind::Http01 => ChallengeType::Http01,
        ChallengeKind::TlsAlpn01 => ChallengeType::TlsAlpn01,
        ChallengeKind::Dns01 => ChallengeType::Dns01,
    }
}
