//! Domains: what an edge presents to a TLS handshake for a name, and how it answers who validates it.
//!
//! They travel with the table, so that a challenge has reached every edge when its version is acknowledged. The
//! table names a certificate and what is stapled to it, and holds nothing of them: chains, private keys and staples go another way.

use std::collections::HashMap;
use std::sync::Arc;

use crate::host::HostPattern;
use crate::host_key::HostKey;
use crate::keyed::Keyed;
use crate::spec::Change;

/// Name of a certificate: SHA-256 of its end-entity certificate (DER).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CertificateId(pub [u8; 32]);

impl std::fmt::Display for CertificateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for CertificateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Name of what is stapled to a certificate: SHA-256 of an OCSP response (DER).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StapleId(pub [u8; 32]);

impl std::fmt::Display for StapleId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for StapleId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Not 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 64 hexadecimal digits")]
pub struct NotAnId;

impl std::str::FromStr for CertificateId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        digest(text).map(Self)
    }
}

impl std::str::FromStr for StapleId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        digest(text).map(Self)
    }
}

fn digest(text: &str) -> Result<[u8; 32], NotAnId> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(NotAnId) };
    let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(NotAnId);
    let mut bytes = [0; 32];
    if pairs.len() != bytes.len() {
        return Err(NotAnId);
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = (digit(*high)? << 4 | digit(*low)?) as u8;
    }
    Ok(bytes)
}

/// A name that is served over TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSpec {
    /// Exact name, or a wildcard, which holds for one label only as in certificates (RFC 6125 §6.4.3); `*` is for
    /// names that are nobody's, and for handshakes without one.
    pub name: HostPattern,
    /// What is presented; `None` while there is none yet.
    pub certificate: Option<CertificateId>,
    /// What is stapled to it (RFC 6066 §8); `None`: nothing, whatever was before.
    pub staple: Option<StapleId>,
    /// The rest.
    pub policy: DomainPolicy,
}

/// How a domain is served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainPolicy {
    /// Who speaks TLS with the client.
    pub mode: TlsMode,
    /// Requests on clear text are sent to `https` (308), those for ACME challenges excepted.
    pub redirect_to_https: bool,
    /// `Strict-Transport-Security` on answers over TLS (RFC 6797).
    pub hsts: Option<Hsts>,
    /// Clients have to, or may, present a certificate.
    pub client_auth: Option<Arc<ClientAuth>>,
    /// Lowest protocol version.
    pub min_version: TlsVersion,
}

/// Who speaks TLS with the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// The edge.
    #[default]
    Terminate,
    /// The service that the name's root leads to; the edge passes bytes on and reads the hello only.
    PassThrough,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// TLS 1.2 (RFC 5246).
    #[default]
    Tls12,
    /// TLS 1.3 (RFC 8446).
    Tls13,
}

/// `Strict-Transport-Security`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hsts {
    /// `max-age` in seconds.
    pub max_age_seconds: u32,
    /// `includeSubDomains`.
    pub include_subdomains: bool,
    /// `preload`, which browsers' lists ask for.
    pub preload: bool,
}

/// Client certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientAuth {
    /// DER of the authorities that they have to be signed by.
    pub authorities: Vec<Arc<[u8]>>,
    /// A handshake without one fails; otherwise it is asked for only.
    pub required: bool,
}

/// The answer to a validation by a certificate authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChallengeSpec {
    /// The name that is validated, without `*.`.
    pub name: Arc<str>,
    /// How.
    pub answer: ChallengeAnswer,
}

/// How an edge answers a validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChallengeAnswer {
    /// `GET /.well-known/acme-challenge/TOKEN` on clear text (RFC 8555 §8.3).
    Http01 {
        /// The token.
        token: Arc<str>,
        /// What is answered.
        key_authorization: Arc<str>,
    },
    /// A handshake with ALPN `acme-tls/1` (RFC 8737).
    TlsAlpn01 {
        /// SHA-256 of the key authorization, for the certificate's `acmeIdentifier`.
        digest: [u8; 32],
    },
}

/// Which challenge of a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ChallengeId {
    /// By its token.
    Http01(Arc<str>),
    /// By its name.
    TlsAlpn01(Arc<str>),
}

impl ChallengeSpec {
    /// Which one it is.
    #[must_use]
    pub fn id(&self) -> ChallengeId {
        match &self.answer {
            ChallengeAnswer::Http01 { token, .. } => ChallengeId::Http01(Arc::clone(token)),
            ChallengeAnswer::TlsAlpn01 { .. } => ChallengeId::TlsAlpn01(Arc::clone(&self.name)),
        }
    }
}

/// The domains of a table. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Domains {
    exact: Keyed<HostKey, Arc<DomainSpec>>,
    wildcard: Keyed<HostKey, Arc<DomainSpec>>,
    any: Option<Arc<DomainSpec>>,
    /// Few, and only for a short time.
    challenges: Arc<HashMap<ChallengeId, Arc<ChallengeSpec>>>,
}

impl Domains {
    /// Whether nothing is served over TLS, so that nobody needs to look.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.wildcard.is_empty() && self.any.is_none()
    }

    /// The domain of a canonical name (see [`crate::canonical_host`]): itself, or the wildcard one label above.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<DomainSpec>> {
        let above = || {
            let (_, above) = name.split_once('.')?;
            self.wildcard.get(above.as_bytes())
        };
        self.exact.get(name.as_bytes()).or_else(above)
    }

    /// The domains of all wildcards above a name, the nearest first. Certificates do not go so far, routes do.
    pub fn above<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Arc<DomainSpec>> {
        let parent = |name: &&'a str| name.split_once('.').map(|(_, above)| above);
        let first = if self.wildcard.is_empty() { None } else { parent(&name) };
        std::iter::successors(first, parent).filter_map(|above| self.wildcard.get(above.as_bytes()))
    }

    /// What names that are nobody's get.
    #[must_use]
    pub const fn fallback(&self) -> Option<&Arc<DomainSpec>> {
        self.any.as_ref()
    }

    /// The domain of exactly this pattern.
    #[must_use]
    pub fn of(&self, pattern: &HostPattern) -> Option<&Arc<DomainSpec>> {
        match pattern {
            HostPattern::Exact(name) => self.exact.get(name.as_bytes()),
            HostPattern::Wildcard(above) => self.wildcard.get(above.as_bytes()),
            HostPattern::Any => self.any.as_ref(),
        }
    }

    /// Whether any validation is to be answered.
    #[must_use]
    pub fn has_challenges(&self) -> bool {
        !self.challenges.is_empty()
    }

    /// The answer to `token`, if `host` is the name that it was made for.
    #[must_use]
    pub fn http_challenge(&self, host: &str, token: &str) -> Option<&Arc<str>> {
        let spec = self.challenges.get(&ChallengeId::Http01(token.into()))?;
        match &spec.answer {
            ChallengeAnswer::Http01 { key_authorization, .. } if *spec.name == *host => {
                Some(key_authorization)
            }
            _ => None,
        }
    }

    /// The digest for a handshake with `acme-tls/1` for `name`.
    #[must_use]
    pub fn tls_challenge(&self, name: &str) -> Option<[u8; 32]> {
        match self.challenges.get(&ChallengeId::TlsAlpn01(name.into()))?.answer {
            ChallengeAnswer::TlsAlpn01 { digest } => Some(digest),
            ChallengeAnswer::Http01 { .. } => None,
        }
    }

    /// Calls `visit` with every domain. Takes as long as there are domains.
    pub fn for_each<'a>(&'a self, mut visit: impl FnMut(&'a Arc<DomainSpec>)) {
        self.exact.for_each(&mut visit);
        self.wildcard.for_each(&mut visit);
        self.any.iter().for_each(visit);
    }

    /// The validations that are to be answered.
    pub fn challenges(&self) -> impl Iterator<Item = &Arc<ChallengeSpec>> {
        self.challenges.values()
    }

    /// Applies what a change says of domains; others are for services.
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Put(_) | Change::Remove(_) => {}
            Change::PutDomain(spec) => self.set(&spec.name, Some(Arc::new(spec.clone()))),
            Change::RemoveDomain(name) => self.set(name, None),
            Change::PutChallenge(spec) => {
                Arc::make_mut(&mut self.challenges).insert(spec.id(), Arc::new(spec.clone()));
            }
            Change::RemoveChallenge(id) => {
                if self.challenges.contains_key(id) {
                    Arc::make_mut(&mut self.challenges).remove(id);
                }
            }
        }
    }

    fn set(&mut self, name: &HostPattern, next: Option<Arc<DomainSpec>>) {
        match name {
            HostPattern::Exact(name) => self.exact.update(&name.into(), |_| next),
            HostPattern::Wildcard(above) => self.wildcard.update(&above.into(), |_| next),
            HostPattern::Any => self.any = next,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::table;

    fn domain(name: &str, id: u8) -> Change {
        Change::PutDomain(DomainSpec {
            name: HostPattern::parse(name).unwrap(),
            certificate: Some(CertificateId([id; 32])),
            staple: None,
            policy: DomainPolicy::default(),
        })
    }

    fn certificate(domains: &Domains, name: &str) -> Option<u8> {
        domains.get(name).and_then(|domain| domain.certificate).map(|id| id.0[0])
    }

    #[test]
    fn ids_are_read_as_they_are_written() {
        let id = CertificateId(std::array::from_fn(|at| at as u8 * 8 + 7));
        let text = id.to_string();
        assert_eq!((text.parse(), text.to_uppercase().parse()), (Ok(id), Ok(id)));
        assert_eq!(text.parse(), Ok(StapleId(id.0)));
        for wrong in ["", &text[1..], &format!("{text}00"), &text.replace('f', "g"), &text.replace('f', "é")]
        {
            assert_eq!(wrong.parse::<CertificateId>(), Err(NotAnId), "{wrong}");
        }
    }

    #[test]
    fn a_name_has_its_own_certificate_or_the_wildcards_one_label_above() {
        let (mut writer, reader) = table();
        assert!(reader.load().domains().is_empty());
        let changes = [domain("example.com", 1), domain("*.example.com", 2), domain("a.example.com", 3)];
        writer.apply(&changes).unwrap();
        let table = reader.load();
        for (name, expected) in [
            ("example.com", Some(1)),
            ("b.example.com", Some(2)),
            ("a.example.com", Some(3)),
            ("a.b.example.com", None),
            ("com", None),
            ("other.test", None),
        ] {
            assert_eq!(certificate(table.domains(), name), expected, "{name}");
        }
        assert!(table.domains().fallback().is_none());
        writer
            .apply(&[Change::RemoveDomain(HostPattern::parse("a.example.com").unwrap()), domain("*", 9)])
            .unwrap();
        let table = reader.load();
        assert_eq!(certificate(table.domains(), "a.example.com"), Some(2));
        assert_eq!(table.domains().fallback().unwrap().certificate, Some(CertificateId([9; 32])));
        let mut seen = 0;
        table.domains().for_each(|_| seen += 1);
        assert_eq!(seen, 3);
    }

    #[test]
    fn the_wildcards_above_a_name_are_found_at_any_depth_the_nearest_first() {
        let (mut writer, reader) = table();
        assert_eq!(reader.load().domains().above("a.b.example.com").count(), 0);
        let changes = [domain("*.example.com", 1), domain("*.b.example.com", 2), domain("example.com", 3)];
        writer.apply(&changes).unwrap();
        let table = reader.load();
        let above = |name: &str| -> Vec<u8> {
            table.domains().above(name).filter_map(|domain| Some(domain.certificate?.0[0])).collect()
        };
        assert_eq!(above("x.a.b.example.com"), [2, 1]);
        assert_eq!(above("b.example.com"), [1]);
        assert_eq!(above("example.com"), [0; 0]);
        assert_eq!(above(""), [0; 0]);
    }

    #[test]
    fn a_challenge_is_answered_for_its_own_name_only_and_until_it_is_removed() {
        let (mut writer, reader) = table();
        let http = ChallengeSpec {
            name: "example.com".into(),
            answer: ChallengeAnswer::Http01 { token: "t1".into(), key_authorization: "t1.key".into() },
        };
        let tls = ChallengeSpec {
            name: "example.com".into(),
            answer: ChallengeAnswer::TlsAlpn01 { digest: [7; 32] },
        };
        writer.apply(&[Change::PutChallenge(http.clone()), Change::PutChallenge(tls)]).unwrap();
        let table = reader.load();
        let domains = table.domains();
        assert_eq!(domains.http_challenge("example.com", "t1").map(|text| &**text), Some("t1.key"));
        assert_eq!(domains.http_challenge("other.test", "t1"), None, "another name's token is nobody's");
        assert_eq!(domains.http_challenge("example.com", "t2"), None);
        assert_eq!(domains.tls_challenge("example.com"), Some([7; 32]));
        writer.apply(&[Change::RemoveChallenge(http.id())]).unwrap();
        let table = reader.load();
        assert_eq!(table.domains().http_challenge("example.com", "t1"), None);
        assert!(table.domains().has_challenges());
    }

    #[test]
    fn changes_of_domains_leave_services_alone() {
        let (mut writer, reader) = table();
        let applied = writer.apply(&[domain("example.com", 1)]).unwrap();
        assert!(applied.retired.is_empty());
        assert_eq!(reader.load().version(), applied.version);
        let mut services = 0;
        reader.load().for_each_service(|_| services += 1);
        assert_eq!(services, 0);
    }
}
