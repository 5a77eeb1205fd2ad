//! A service's rules: asks them about a request before anything of it goes anywhere, and makes their changes on the way.
//! A service without rules pays a branch at each of the places that ask.
//!
//! ```text
//!   address ► rate ► in flight ► redirects ► who? ► … ► fields of the edge's own ► edits, path ► upstream
//!   403       429    503         3xx         401, …
//!                              client ◄ compression ◄ sticky cookie, HSTS ◄ edits ◄ upstream
//! ```
//!
//! Of answers that the edge makes itself, only the page is a rule's.

mod basic_auth;
mod compression;
mod edits;
mod forward_auth;

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use peregrine_routing::{Coding, ErrorPage, RateKey, RateLimit, Rules, Service};

use crate::clock::now_us;
use crate::core::{Core, ServiceEntry};
use crate::error::Reason;
use crate::headers;
use crate::inflight::Flight;
use crate::rates::{Key, Own, Rates};
use crate::route::Target;
use basic_auth::Accounts;
pub(crate) use basic_auth::Passwords;
pub(crate) use compression::{Asked, Compressing, MAX_PIECES_IN_A_ROW};
use edits::{Edits, take_off};
use forward_auth::Authority;
pub(crate) use forward_auth::{Authorities, Verdict};

/// The parts of a service's rules that are made ready for requests, once for each version of the table.
pub(crate) struct Ready {
    service: Arc<Service>,
    request: Edits,
    pub(crate) response: Edits,
    accounts: Option<Accounts>,
    /// Who is asked; `None` inside if nobody can be.
    authority: Option<Option<Authority>>,
}

impl Ready {
    /// `None` for a service without rules.
    pub(crate) fn of(service: &Arc<Service>) -> Option<Box<Self>> {
        let rules = service.policy().rules.as_deref()?;
        Some(Box::new(Self {
            service: Arc::clone(service),
            request: Edits::of_requests(&rules.request_headers),
            response: Edits::of(&rules.response_headers),
            accounts: rules.basic_auth.as_ref().map(Accounts::of),
            authority: rules.forward_auth.as_ref().map(Authority::of),
        }))
    }

    fn rules(&self) -> Option<&Rules> {
        self.service.policy().rules.as_deref()
    }

    /// Where a request is sent instead of an upstream.
    pub(crate) fn redirect(&self, target: &Target) -> Option<(StatusCode, HeaderValue)> {
        let redirects = &self.rules()?.redirects;
        let (path, query) = (target.path.path(), target.path.query());
        redirects.iter().find_map(|redirect| {
            let location = redirect.location(path, query)?;
            Some((StatusCode::from_u16(redirect.status).ok()?, HeaderValue::try_from(location).ok()?))
        })
    }

    /// Whether clients have to be somebody.
    pub(crate) const fn asks_who(&self) -> bool {
        self.accounts.is_some() || self.authority.is_some()
    }

    /// Asks who a client is. What decides that it may go on is the last word.
    ///
    /// # Errors
    /// What the client is told.
    pub(crate) async fn ask_who(
        &self,
        core: &Rc<Core>,
        flight: &Flight,
        headers: &mut HeaderMap,
        target: &Target,
    ) -> Result<Verdict, Reason> {
        flight.asked.set(true);
        if self.authority.is_some() && target.other_reading.is_some() {
            return Err(Reason::AmbiguousPath);
        }
        if let Some(accounts) = &self.accounts {
            accounts.check(&core.guards.passwords, flight.client, headers).await?;
            if !accounts.forward {
                headers.remove(AUTHORIZATION);
            }
        }
        match &self.authority {
            None => Ok(Verdict::GoOn(Vec::new())),
            Some(None) => Err(Reason::AuthUnavailable),
            Some(Some(authority)) => authority.ask(core, flight, headers, target).await,
        }
    }

    /// What the body of an answer to this client would be compressed with.
    pub(crate) fn coding(&self, headers: &HeaderMap) -> Option<Coding> {
        compression::choose(self.rules()?.compression.as_ref()?, headers)
    }

    /// Begins to compress an answer, if it is one for that, and changes its head.
    pub(crate) fn compress(&self, asked: &Asked<'_>, headers: &mut HeaderMap) -> Option<Box<Compressing>> {
        compression::begin(self.rules()?.compression.as_ref()?, asked, headers)
    }

    /// The operator's page for an answer that the edge makes itself.
    pub(crate) fn error_page(&self, status: u16) -> Option<&ErrorPage> {
        ErrorPage::of(&self.rules()?.error_pages, status)
    }

    /// What a client without a password is told.
    pub(crate) fn challenge(&self) -> Option<&HeaderValue> {
        self.accounts.as_ref().map(|accounts| &accounts.challenge)
    }

    /// Changes a request's fields, with those that were decided on. The edge's own are on by now, and those for one
    /// connection off.
    pub(crate) fn change(&self, headers: &mut HeaderMap, decided: Vec<(HeaderName, HeaderValue)>) {
        if let Some(Some(authority)) = &self.authority {
            forward_auth::copy(&authority.copied, decided, headers);
        }
        self.request.apply(headers);
    }

    /// Takes trailers off that would be what rules took off or set before the body.
    pub(crate) fn clean_trailers(&self, trailers: &mut HeaderMap) {
        take_off(self.request.own(), trailers);
        if let Some(Some(authority)) = &self.authority {
            take_off(&authority.copied, trailers);
        }
    }

    /// Another path that goes on instead of this one.
    ///
    /// # Errors
    /// [`Reason::UriTooLong`]: it would be longer than any path can be.
    pub(crate) fn rewrite(&self, path: &PathAndQuery) -> Result<Option<PathAndQuery>, Reason> {
        let rewrite = self.rules().and_then(|rules| rules.rewrite.as_ref());
        let Some(rewritten) = rewrite.and_then(|rewrite| rewrite.apply(path.path())) else { return Ok(None) };
        let whole = match path.query() {
            Some(query) => format!("{rewritten}?{query}"),
            None => rewritten,
        };
        // It is canonical, as the path and the prefix are: only its length can be wrong.
        PathAndQuery::try_from(whole).map(Some).map_err(|_| Reason::UriTooLong)
    }
}

/// Whether a request may go on.
///
/// # Errors
/// What the client is told.
pub(crate) fn check(
    core: &Core,
    entry: &ServiceEntry,
    flight: &Flight,
    headers: &HeaderMap,
) -> Result<(), Reason> {
    match &entry.service.policy().rules {
        None => Ok(()),
        Some(rules) => ask(core, entry, flight, headers, rules),
    }
}

fn ask(
    core: &Core,
    entry: &ServiceEntry,
    flight: &Flight,
    headers: &HeaderMap,
    rules: &Rules,
) -> Result<(), Reason> {
    if !rules.admits(flight.client) {
        return Err(Reason::AddressDenied);
    }
    if let Some(limit) = &rules.rate {
        let key = key(&core.guards.rates, limit, entry.service.name(), flight.client, headers);
        if let Err(wait_us) = core.guards.rates.take(limit, key, now_us()) {
            flight.retry_after_s.set(u32::try_from(wait_us.div_ceil(1_000_000)).unwrap_or(u32::MAX));
            return Err(Reason::RateLimited);
        }
    }
    has_room(entry)
}

/// Whether so few of a service's requests are in flight that one more may be.
///
/// # Errors
/// [`Reason::ServiceBusy`].
pub(crate) fn has_room(entry: &ServiceEntry) -> Result<(), Reason> {
    let most = entry.service.policy().rules.as_ref().map_or(0, |rules| rules.max_in_flight);
    let in_flight = || entry.service.upstreams().map(|(_, upstream)| upstream.in_flight()).sum::<u64>();
    if most > 0 && in_flight() >= u64::from(most) { Err(Reason::ServiceBusy) } else { Ok(()) }
}

/// Whether what a request has passed is what it would have to pass now: the table may have changed while it waited. Then it is
/// the client's to ask again, with what the new rules take off and put on.
pub(crate) fn still_hold(before: &ServiceEntry, now: &ServiceEntry) -> bool {
    let same_service = before.service.name() == now.service.name();
    match (&before.service.policy().rules, &now.service.policy().rules) {
        (None, None) => true,
        (before, now) => same_service && before == now,
    }
}

/// What a request is counted by: its service with its client, or with the value of a header or cookie.
fn key(rates: &Rates, limit: &RateLimit, service: &str, client: IpAddr, headers: &HeaderMap) -> Key {
    let by_value = match &limit.by {
        RateKey::ClientAddress => None,
        RateKey::Header(name) => headers.get(&**name).map(HeaderValue::as_bytes),
        RateKey::Cookie(name) => headers::cookie(headers, name),
    };
    match (by_value, client) {
        (Some(value), _) => rates.key(service, Own::Value(value)),
        (None, IpAddr::V4(v4)) => rates.key(service, Own::Address(&v4.octets())),
        // One customer has a /64 at the least (RFC 6177 §2).
        (None, IpAddr::V6(v6)) => rates.key(service, Own::Address(&v6.octets()[..8])),
    }
}
