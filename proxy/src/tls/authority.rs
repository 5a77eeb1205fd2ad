//! Which hosts a connection may be asked for, and what every answer to them says of TLS.
//!
//! A connection was made for one name. With HTTP/2 a client may ask for others on it that the certificate covers too
//! (RFC 9113 §9.1.1). What has another certificate or another client authentication in the table is another's:
//! 421 (RFC 9110 §15.5.20), so that nobody gets past a domain's policy over the connection of its neighbour.
//!
//! A certificate's wildcard holds for one label, a route's for any number of them. So the policy of a wildcard that is for
//! known clients only holds for all names below it that have no domain of their own.

use std::sync::Arc;

use http::HeaderValue;
use peregrine_routing::{DomainSpec, Domains, Hsts, RoutingTable};

use crate::conn::ConnState;
use crate::core::Core;
use crate::error::Reason;
use crate::inflight::HostText;
use crate::route::{self, Target};

/// RFC 8555 §8.3: what lies below is asked for on clear text, also where everything else is redirected.
const CHALLENGES: &str = "/.well-known/acme-challenge/";

/// The host that was found to be served on a connection last, in one version of the table.
#[derive(Debug, Default)]
pub(crate) struct Admitted {
    version: u64,
    /// As it was sent.
    host: Vec<u8>,
    /// What answers say of it.
    hsts: Option<HeaderValue>,
}

/// What becomes of a request before any route is looked for.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It goes on.
    Admitted,
    /// The same address with `https`.
    Redirect,
    /// The answer to a certificate authority.
    Challenge(Arc<str>),
}

/// Decides on a request. Costs a comparison where the last one on its connection was for the same host, and one branch
/// where nothing is served over TLS.
pub(crate) fn admit(conn: &ConnState, table: &RoutingTable, target: &Target) -> Result<Verdict, Reason> {
    let session = conn.session.get();
    let domains = table.domains();
    if session.is_none() && domains.is_empty() && !domains.has_challenges() {
        return Ok(Verdict::Admitted);
    }
    let sent = target.host.as_bytes();
    if session.is_none()
        && let Some(token) = target.path.path().strip_prefix(CHALLENGES)
    {
        let host = route::canonical(&target.host)?;
        if let Some(text) = domains.http_challenge(&host, token) {
            return Ok(Verdict::Challenge(Arc::clone(text)));
        }
        // Somebody else's challenge may be the service's own matter, but not where nobody gets in unknown.
        let is_for_known = asked_domain(domains, &host, requires_client).is_some_and(requires_client);
        return if is_for_known { on_clear_text(&host) } else { Ok(Verdict::Admitted) };
    }
    if let Some(known) = &*conn.admitted.borrow()
        && known.version == table.version()
        && known.host == sent
    {
        return Ok(Verdict::Admitted);
    }
    let host = route::canonical(&target.host)?;
    let hsts = match session {
        None if asked_domain(domains, &host, is_for_tls).is_some_and(is_for_tls) => {
            return on_clear_text(&host);
        }
        None => None,
        Some(session) => match asked_domain(domains, &host, requires_client) {
            Some(domain) if covers(&session.domain, domain) => domain.policy.hsts.as_ref().map(value),
            // HTTP/1.0 may say nothing of a host: then it is nobody's.
            None if host.is_empty() => None,
            _ => return Err(Reason::Misdirected),
        },
    };
    let mut known = conn.admitted.borrow_mut();
    let known = known.get_or_insert_default();
    known.version = table.version();
    known.host.clear();
    known.host.extend_from_slice(sent);
    known.hsts = hsts;
    Ok(Verdict::Admitted)
}

/// `Strict-Transport-Security` for a host on this connection.
pub(crate) fn hsts(core: &Core, conn: &ConnState, host: &HostText) -> Option<HeaderValue> {
    conn.session.get()?;
    if let Some(known) = &*conn.admitted.borrow()
        && known.host == host.as_bytes()
    {
        return known.hsts.clone();
    }
    // Streams of one connection take turns.
    let host = route::canonical(host).ok().filter(|host| !host.is_empty())?;
    let mut reader = core.reader.borrow_mut();
    asked_domain(reader.load().domains(), &host, requires_client)?.policy.hsts.as_ref().map(value)
}

/// What becomes of a request on clear text that is to come over TLS. Without a host there is no address to send it to.
fn on_clear_text(host: &str) -> Result<Verdict, Reason> {
    if host.is_empty() { Err(Reason::Misdirected) } else { Ok(Verdict::Redirect) }
}

/// Whether nobody is served on clear text: by wish, or because nobody can prove there who he is.
fn is_for_tls(domain: &Arc<DomainSpec>) -> bool {
    domain.policy.redirect_to_https || requires_client(domain)
}

fn requires_client(domain: &Arc<DomainSpec>) -> bool {
    domain.policy.client_auth.as_ref().is_some_and(|auth| auth.required)
}

/// The domain whose policy holds for a host: its own; else the nearest wildcard above, at any depth, that is guarded so;
/// else that of names that are nobody's, also for no name.
fn asked_domain<'a>(
    domains: &'a Domains,
    host: &'a str,
    is_guarded: fn(&Arc<DomainSpec>) -> bool,
) -> Option<&'a Arc<DomainSpec>> {
    let above = || domains.above(host).find(|domain| is_guarded(domain));
    domains.get(host).or_else(above).or_else(|| domains.fallback())
}

/// Whether what was settled for one domain is what the other asks for.
fn covers(settled: &Arc<DomainSpec>, asked: &Arc<DomainSpec>) -> bool {
    let same = Arc::ptr_eq(settled, asked) || settled.name == asked.name;
    let (a, b) = (&settled.policy, &asked.policy);
    (same || settled.certificate == asked.certificate)
        && a.client_auth == b.client_auth
        && a.mode == b.mode
        && a.min_version == b.min_version
}

fn value(hsts: &Hsts) -> HeaderValue {
    let mut text = format!("max-age={}", hsts.max_age_seconds);
    if hsts.include_subdomains {
        text.push_str("; includeSubDomains");
    }
    if hsts.preload {
        text.push_str("; preload");
    }
    // Digits and letters only.
    HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("max-age=0"))
}
