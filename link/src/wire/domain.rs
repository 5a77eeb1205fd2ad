//! Domains and challenges as they travel and as the former lie on an edge's disk, see [`super::spec`].

use std::sync::Arc;

use peregrine_routing as routing;
use routing::{CertificateId, ChallengeAnswer, ChallengeId, HostPattern, StapleId, TlsMode, TlsVersion};
use serde::{Deserialize, Serialize};

use super::spec::BadHost;

/// A [`routing::DomainSpec`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireDomain {
    name: String,
    certificate: Option<[u8; 32]>,
    pass_through: bool,
    redirect_to_https: bool,
    /// Seconds, subdomains, preload.
    hsts: Option<(u32, bool, bool)>,
    /// Authorities, and whether a certificate of theirs is demanded.
    client_auth: Option<(Vec<Vec<u8>>, bool)>,
    tls13_only: bool,
    staple: Option<[u8; 32]>,
}

/// As it lay on an edge's disk before anything was stapled.
#[derive(Serialize, Deserialize)]
pub(crate) struct DomainOfForm4 {
    name: String,
    certificate: Option<[u8; 32]>,
    pass_through: bool,
    redirect_to_https: bool,
    hsts: Option<(u32, bool, bool)>,
    client_auth: Option<(Vec<Vec<u8>>, bool)>,
    tls13_only: bool,
}

impl From<DomainOfForm4> for WireDomain {
    fn from(before: DomainOfForm4) -> Self {
        let DomainOfForm4 {
            name,
            certificate,
            pass_through,
            redirect_to_https,
            hsts,
            client_auth,
            tls13_only,
        } = before;
        let staple = None;
        Self { name, certificate, pass_through, redirect_to_https, hsts, client_auth, tls13_only, staple }
    }
}

/// A [`routing::ChallengeSpec`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireChallenge {
    name: String,
    answer: WireAnswer,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum WireAnswer {
    Http01(String, String),
    TlsAlpn01([u8; 32]),
}

/// A [`routing::ChallengeId`] on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WireChallengeId {
    /// By its token.
    Http01(String),
    /// By its name.
    TlsAlpn01(String),
}

impl From<&routing::DomainSpec> for WireDomain {
    fn from(spec: &routing::DomainSpec) -> Self {
        let routing::DomainSpec { name, certificate, staple, policy } = spec;
        let routing::DomainPolicy { mode, redirect_to_https, hsts, client_auth, min_version } = policy;
        let hsts = hsts.map(|routing::Hsts { max_age_seconds, include_subdomains, preload }| {
            (max_age_seconds, include_subdomains, preload)
        });
        let client_auth = client_auth.as_deref().map(|routing::ClientAuth { authorities, required }| {
            (authorities.iter().map(|der| der.to_vec()).collect(), *required)
        });
        Self {
            name: name.to_string(),
            certificate: certificate.map(|id| id.0),
            pass_through: *mode == TlsMode::PassThrough,
            redirect_to_https: *redirect_to_https,
            hsts,
            client_auth,
            tls13_only: *min_version == TlsVersion::Tls13,
            staple: staple.map(|id| id.0),
        }
    }
}

impl TryFrom<WireDomain> for routing::DomainSpec {
    type Error = BadHost;

    fn try_from(domain: WireDomain) -> Result<Self, BadHost> {
        let hsts = domain.hsts.map(|(max_age_seconds, include_subdomains, preload)| routing::Hsts {
            max_age_seconds,
            include_subdomains,
            preload,
        });
        let client_auth = domain.client_auth.map(|(authorities, required)| {
            let authorities = authorities.into_iter().map(Into::into).collect();
            Arc::new(routing::ClientAuth { authorities, required })
        });
        Ok(Self {
            name: pattern(domain.name)?,
            certificate: domain.certificate.map(CertificateId),
            staple: domain.staple.map(StapleId),
            policy: routing::DomainPolicy {
                mode: if domain.pass_through { TlsMode::PassThrough } else { TlsMode::Terminate },
                redirect_to_https: domain.redirect_to_https,
                hsts,
                client_auth,
                min_version: if domain.tls13_only { TlsVersion::Tls13 } else { TlsVersion::Tls12 },
            },
        })
    }
}

/// Reads the name of a domain that goes away.
pub(super) fn pattern(name: String) -> Result<HostPattern, BadHost> {
    HostPattern::parse(&name).map_err(|why| BadHost::of_domain(name, why))
}

impl From<&routing::ChallengeSpec> for WireChallenge {
    fn from(spec: &routing::ChallengeSpec) -> Self {
        let answer = match &spec.answer {
            ChallengeAnswer::Http01 { token, key_authorization } => {
                WireAnswer::Http01(token.to_string(), key_authorization.to_string())
            }
            ChallengeAnswer::TlsAlpn01 { digest } => WireAnswer::TlsAlpn01(*digest),
        };
        Self { name: spec.name.to_string(), answer }
    }
}

impl From<WireChallenge> for routing::ChallengeSpec {
    fn from(challenge: WireChallenge) -> Self {
        let answer = match challenge.answer {
            WireAnswer::Http01(token, key_authorization) => {
                ChallengeAnswer::Http01 { token: token.into(), key_authorization: key_authorization.into() }
            }
            WireAnswer::TlsAlpn01(digest) => ChallengeAnswer::TlsAlpn01 { digest },
        };
        Self { name: challenge.name.into(), answer }
    }
}

impl From<&ChallengeId> for WireChallengeId {
    fn from(id: &ChallengeId) -> Self {
        match id {
            ChallengeId::Http01(token) => Self::Http01(token.to_string()),
            ChallengeId::TlsAlpn01(name) => Self::TlsAlpn01(name.to_string()),
        }
    }
}

impl From<WireChallengeId> for ChallengeId {
    fn from(id: WireChallengeId) -> Self {
        match id {
            WireChallengeId::Http01(token) => Self::Http01(token.into()),
            WireChallengeId::TlsAlpn01(name) => Self::TlsAlpn01(name.into()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use routing::{ChallengeSpec, Change, ClientAuth, DomainPolicy, DomainSpec, Hsts};

    use super::*;
    use crate::wire::WireChange;

    /// As an edge wrote it before anything was stapled.
    pub(crate) fn of_form_4(spec: &DomainSpec) -> DomainOfForm4 {
        let WireDomain {
            name,
            certificate,
            pass_through,
            redirect_to_https,
            hsts,
            client_auth,
            tls13_only,
            staple: _,
        } = spec.into();
        DomainOfForm4 { name, certificate, pass_through, redirect_to_https, hsts, client_auth, tls13_only }
    }

    /// One with everything that a domain can have.
    pub(crate) fn domain(name: &str) -> DomainSpec {
        DomainSpec {
            name: HostPattern::parse(name).expect("a name"),
            certificate: Some(CertificateId([5; 32])),
            staple: Some(StapleId([6; 32])),
            policy: DomainPolicy {
                mode: TlsMode::PassThrough,
                redirect_to_https: true,
                hsts: Some(Hsts { max_age_seconds: 7, include_subdomains: true, preload: true }),
                client_auth: Some(Arc::new(ClientAuth {
                    authorities: vec![[1, 2, 3][..].into()],
                    required: true,
                })),
                min_version: TlsVersion::Tls13,
            },
        }
    }

    #[test]
    fn what_is_said_of_domains_arrives_as_it_was() {
        let (name, policy) = (HostPattern::Any, DomainPolicy::default());
        let plain = DomainSpec { name, certificate: None, staple: None, policy };
        let http = ChallengeAnswer::Http01 { token: "t".into(), key_authorization: "t.k".into() };
        let challenges = [http, ChallengeAnswer::TlsAlpn01 { digest: [9; 32] }]
            .map(|answer| ChallengeSpec { name: "example.com".into(), answer });
        let mut changes = vec![
            Change::PutDomain(domain("example.com")),
            Change::PutDomain(domain("*.example.com")),
            Change::PutDomain(plain),
            Change::RemoveDomain(HostPattern::parse("*.example.com").expect("a name")),
        ];
        changes.extend(challenges.iter().map(|spec| Change::RemoveChallenge(spec.id())));
        changes.extend(challenges.map(Change::PutChallenge));
        for change in changes {
            let bytes = postcard::to_stdvec(&WireChange::from(&change)).expect("written");
            let wire: WireChange = postcard::from_bytes(&bytes).expect("read");
            assert_eq!(Change::try_from(wire).expect("a change"), change);
        }
    }

    #[test]
    fn a_domain_of_no_name_is_refused_with_its_name() {
        let mut wire = WireDomain::from(&domain("example.com"));
        wire.name = "a b".into();
        let refused = DomainSpec::try_from(wire).expect_err("no name");
        assert!(refused.to_string().contains("\"a b\""), "{refused}");
    }
}
