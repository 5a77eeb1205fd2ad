//! One attempt at one domain: from a check of DNS to a stored certificate, as far as it goes now.
//!
//! Each step is committed before what follows from it is done outside: the claim with the private key before the order, the
//! order's URL before its challenges, the challenges before they are presented, and `finalizing` before the certificate is
//! asked for. Who finds such a record goes on with that order. A commit names the revision that was read, so that who was
//! replaced meanwhile is told and stops.

use std::sync::Arc;
use std::time::Duration;

use peregrine_routing::{ChallengeAnswer, ChallengeId, ChallengeSpec, HostPattern};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{Context, Tracked, records};
use crate::acme::{
    AcmeError, AcmeErrorKind, Authority, Authorized, Challenge, ChallengeKind, Running, Session, Status,
};
use crate::budget::{Budget, BudgetLimit, registered_domain};
use crate::domain::{Held, Ocsp, Outcome, Presented, Source, renew_at_ms};
use crate::pem::{Bundle, PemError, read_chain};
use crate::vault::{Expected, VaultError, Write};

/// First pause between two questions for an order's state, and the longest.
const POLL_MS: u64 = 250;
const POLL_MAX_MS: u64 = 5_000;
/// A pause that an authority asks for is waited out within an attempt up to here; a longer one ends the attempt.
const MAX_PAUSE_WITHIN_MS: u64 = 15_000;
/// First pause between two looks for a record of ours, and the longest.
const LOOK_MS: u64 = 250;
const LOOK_MAX_MS: u64 = 4_000;
/// A conflict over a budget is tried again this often.
const MAX_BUDGET_TRIES: u32 = 8;

/// Why an attempt stops.
pub(super) enum Stop {
    /// This is how it ended.
    Outcome(Box<Outcome>),
    /// Nothing can be kept, or somebody else has the domain: nothing more is done.
    Vault(VaultError),
}

impl From<Outcome> for Stop {
    fn from(outcome: Outcome) -> Self {
        Self::Outcome(Box::new(outcome))
    }
}

impl From<VaultError> for Stop {
    fn from(error: VaultError) -> Self {
        Self::Vault(error)
    }
}

fn lost(why: impl Into<String>) -> Stop {
    Stop::from(Outcome::Lost { why: why.into(), after_ms: None })
}

fn goes_on(error: &AcmeError) -> Stop {
    Stop::from(Outcome::GoesOn { why: error.text.clone(), after_ms: error.after_ms })
}

/// Runs it and commits how it ended.
pub(super) async fn attempt(cx: &Context, tracked: &mut Tracked) -> Result<(), VaultError> {
    let mut writes = Vec::new();
    let outcome = match run(cx, tracked, &mut writes).await {
        Ok(outcome) => outcome,
        Err(Stop::Outcome(outcome)) => *outcome,
        Err(Stop::Vault(error)) => return Err(error),
    };
    if !matches!(outcome, Outcome::GoesOn { .. }) {
        withdraw(cx, tracked).await;
        writes.push(Write::delete(records::order_key(&tracked.domain.name), Expected::Anything));
    }
    cx.counters.count(&outcome);
    tracked.domain.settle(outcome, cx.now_ms(), cx.random(), &cx.config.limits);
    tracked.save(cx.vault.as_ref(), writes).await
}

async fn run(cx: &Context, tracked: &mut Tracked, writes: &mut Vec<Write>) -> Result<Outcome, Stop> {
    let resumable = tracked.domain.order.as_ref().is_some_and(|order| order.url.is_some());
    if resumable {
        tracked.domain.hold(&cx.config.holder, cx.now_ms(), &cx.config.limits);
        tracked.save(cx.vault.as_ref(), Vec::new()).await?;
        if let Some(outcome) = resume(cx, tracked, writes).await? {
            return Ok(outcome);
        }
        tracing::warn!(domain = tracked.domain.name, "order given up, the next authority is asked");
        withdraw(cx, tracked).await;
        tracked.domain.order = None;
    }
    begin(cx, tracked, writes).await
}

/// Whether the order's authority is in trouble and had its time, and another one is there that could be asked.
fn is_given_up(cx: &Context, tracked: &Tracked) -> bool {
    let Some(order) = &tracked.domain.order else { return false };
    let now_ms = cx.now_ms();
    let limits = &cx.config.limits;
    let patience_ms = if order.finalizing { limits.finalize_patience_ms } else { limits.order_patience_ms };
    let is_paused = |authority: &Authority| authority.paused(now_ms).is_some();
    let own = cx.authorities.iter().any(|a| a.config.id == order.ca && is_paused(a));
    let other = cx.authorities.iter().any(|a| a.config.id != order.ca && !is_paused(a));
    own && other && now_ms.saturating_sub(order.begun_ms) > patience_ms
}

/// Goes on with the order. `None`: it is given up, somebody else is to be asked.
async fn resume(
    cx: &Context,
    tracked: &mut Tracked,
    writes: &mut Vec<Write>,
) -> Result<Option<Outcome>, Stop> {
    let order = tracked.domain.order.clone();
    let Some((order, url)) = order.and_then(|order| order.url.clone().map(|url| (order, url))) else {
        return Err(lost("the order has no address"));
    };
    let Some(authority) = cx.authorities.iter().find(|authority| authority.config.id == order.ca) else {
        return Err(lost(format!("authority {} is not configured any more", order.ca)));
    };
    let work = async {
        if let Some((until_ms, why)) = authority.paused(cx.now_ms()) {
            let after_ms = Some(until_ms.saturating_sub(cx.now_ms()));
            return Err(AcmeError { kind: AcmeErrorKind::Ca, text: why, after_ms }).map_err(|e| goes_on(&e));
        }
        let session = session(cx, authority).await?;
        let running = session.resume_order(&url).await;
        let mut running = running.map_err(|e| stop(cx, authority, &e))?;
        authority.answered();
        drive(cx, tracked, authority, &mut running, writes).await
    };
    match work.await {
        Err(Stop::Outcome(outcome)) => match *outcome {
            Outcome::GoesOn { .. } if is_given_up(cx, tracked) => Ok(None),
            // Whatever becomes of it, nobody waits for it any more; a failure counts, so that another way is tried.
            Outcome::GoesOn { why, .. }
                if cx.now_ms().saturating_sub(order.begun_ms) > cx.config.limits.finalize_patience_ms =>
            {
                let hours = cx.config.limits.finalize_patience_ms / 3_600_000;
                Err(lost(format!("the order has not ended in {hours} h: {why}")))
            }
            outcome => Err(outcome.into()),
        },
        other => other.map(Some),
    }
}

/// What follows from an error at an authority once an order is there.
fn stop(cx: &Context, authority: &Authority, error: &AcmeError) -> Stop {
    authority.failed(error, cx.now_ms(), cx.random(), &cx.config.limits);
    match error.kind {
        AcmeErrorKind::Ca | AcmeErrorKind::RateLimited | AcmeErrorKind::Own => goes_on(error),
        AcmeErrorKind::Gone | AcmeErrorKind::NoAccount | AcmeErrorKind::Refused | AcmeErrorKind::Invalid => {
            Stop::from(Outcome::Lost { why: error.text.clone(), after_ms: error.after_ms })
        }
    }
}

async fn session(cx: &Context, authority: &Authority) -> Result<Session, Stop> {
    let session = authority.session(cx.vault.as_ref(), &cx.seal).await;
    session.map_err(|e| stop(cx, authority, &e))
}

/// Checks DNS, chooses an authority, and creates an order there.
async fn begin(cx: &Context, tracked: &mut Tracked, writes: &mut Vec<Write>) -> Result<Outcome, Stop> {
    let name = tracked.domain.name.clone();
    let waiting = |what: String| Stop::from(Outcome::WaitingForDns(what));
    let by_dns = cx.config.dns.provider(tracked.domain.base()).is_some()
        && cx.config.challenges.contains(&ChallengeKind::Dns01);
    if tracked.domain.is_wildcard() {
        if !by_dns {
            return Err(lost(
                "a wildcard name is validated by dns-01 only: configure a DNS provider for its zone",
            ));
        }
    } else if !(by_dns && cx.config.challenges.len() == 1) {
        cx.names.check(tracked.domain.base(), &cx.pointing).await.map_err(waiting)?;
    }
    let needs_caa = cx.authorities.iter().any(|authority| !authority.config.caa_identities.is_empty());
    let caa = match needs_caa {
        true => Some(cx.names.caa(tracked.domain.base()).await.map_err(waiting)?),
        false => None,
    };
    let mut obstacles: Vec<String> = Vec::new();
    let mut earliest_ms: Option<u64> = None;
    for authority in &cx.authorities {
        let identities = &authority.config.caa_identities;
        let allowed = caa.as_ref().map_or(Ok(()), |caa| caa.allows(identities, tracked.domain.is_wildcard()));
        if let Err(why) = allowed {
            obstacles.push(why);
            continue;
        }
        if let Some((until_ms, why)) = authority.paused(cx.now_ms()) {
            obstacles.push(format!("{}: {why}", authority.config.id));
            earliest_ms = Some(earliest_ms.map_or(until_ms, |earliest| earliest.min(until_ms)));
            continue;
        }
        // An authority that cannot be reached costs nothing: the tokens are taken when it has answered.
        let error = match authority.session(cx.vault.as_ref(), &cx.seal).await {
            Err(error) => error,
            Ok(session) => {
                if let Err((until_ms, why)) = claim(cx, tracked, authority).await? {
                    obstacles.push(why);
                    earliest_ms = Some(earliest_ms.map_or(until_ms, |earliest| earliest.min(until_ms)));
                    continue;
                }
                match order(cx, tracked, authority, &session, writes).await {
                    Ok(ended) => return ended,
                    Err(error) => {
                        // An answer that is lost may have been that there is an order.
                        if error.kind != AcmeErrorKind::Ca {
                            give_back(cx, tracked, authority).await;
                        }
                        error
                    }
                }
            }
        };
        tracing::warn!(domain = name, ca = authority.config.id, error = %error, "no order");
        let now_ms = cx.now_ms();
        let random = cx.random();
        authority.failed(&error, now_ms, random, &cx.config.limits);
        match error.kind {
            AcmeErrorKind::NoAccount => authority.forget_account(cx.vault.as_ref()).await?,
            AcmeErrorKind::Ca | AcmeErrorKind::RateLimited => {
                let after_ms = error.after_ms.unwrap_or(cx.config.limits.retry_ms);
                let until_ms = now_ms + after_ms;
                earliest_ms = Some(earliest_ms.map_or(until_ms, |earliest| earliest.min(until_ms)));
            }
            _ => {}
        }
        obstacles.push(format!("{}: {}", authority.config.id, error.text));
    }
    let why =
        if obstacles.is_empty() { "no authority is configured".to_owned() } else { obstacles.join("; ") };
    let after_ms = earliest_ms.map(|until_ms| until_ms.saturating_sub(cx.now_ms()));
    if tracked.domain.order.is_none()
        && let Some(until_ms) = earliest_ms
    {
        return Ok(Outcome::NotNow { why, until_ms });
    }
    Ok(Outcome::Lost { why, after_ms })
}

/// Writes the claim with a new private key, and takes tokens of the budgets in the same commit. Inside: until when there are none.
async fn claim(
    cx: &Context,
    tracked: &mut Tracked,
    authority: &Authority,
) -> Result<Result<(), (u64, String)>, Stop> {
    let own = |e: &dyn std::fmt::Display| lost(format!("no private key can be made: {e}"));
    let key = rcgen::KeyPair::generate().map_err(|e| own(&e))?;
    let record = records::order_key(&tracked.domain.name);
    let sealed = cx.seal.seal(&record, &Zeroizing::new(key.serialize_der())).map_err(|e| own(&e))?;
    for _ in 0..MAX_BUDGET_TRIES {
        let now_ms = cx.now_ms();
        let mut writes = match budgets(cx, tracked, authority, now_ms).await? {
            Ok(writes) => writes,
            Err(missing) => return Ok(Err(missing)),
        };
        writes.push(Write::put(&record, sealed.clone(), Expected::Anything));
        let before = tracked.domain.clone();
        tracked.domain.claim(&cx.config.holder, &authority.config.id, now_ms, &cx.config.limits);
        match tracked.save(cx.vault.as_ref(), writes).await {
            Ok(()) => return Ok(Ok(())),
            Err(VaultError::Conflict { key }) if key.starts_with("budget/") => tracked.domain = before,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(Err((cx.now_ms(), "another manager takes from the same budget".into())))
}

/// The budgets that an order is counted in: record, limit, and what it is of.
fn budgets_of(tracked: &Tracked, authority: &Authority) -> [(String, BudgetLimit, String); 2] {
    let ca = &authority.config;
    let domain = registered_domain(tracked.domain.base());
    [
        (format!("budget/{}", ca.id), ca.orders, format!("orders at {}", ca.id)),
        (
            format!("budget/{}/{domain}", ca.id),
            ca.orders_per_domain,
            format!("orders for {domain} at {}", ca.id),
        ),
    ]
}

/// Puts the tokens of a claim back: the authority has refused to make an order. What cannot be written is lost, and comes back
/// with time.
async fn give_back(cx: &Context, tracked: &Tracked, authority: &Authority) {
    for (record, limit, _) in budgets_of(tracked, authority) {
        for _ in 0..MAX_BUDGET_TRIES {
            let Ok(Some(found)) = cx.vault.get(&record).await else { break };
            let Ok(mut budget) = serde_json::from_slice::<Budget>(&found.bytes) else { break };
            budget.give_back(limit);
            let write = Write::put(&record, records::json(&budget), Expected::Revision(found.revision));
            match cx.vault.commit(vec![write]).await {
                Err(VaultError::Conflict { .. }) => {}
                _ => break,
            }
        }
    }
}

async fn budgets(
    cx: &Context,
    tracked: &Tracked,
    authority: &Authority,
    now_ms: u64,
) -> Result<Result<Vec<Write>, (u64, String)>, Stop> {
    let mut writes = Vec::new();
    for (record, limit, what) in budgets_of(tracked, authority) {
        let found = cx.vault.get(&record).await?;
        let expected = found.as_ref().map_or(Expected::Absent, |found| Expected::Revision(found.revision));
        let kept = found.and_then(|found| serde_json::from_slice::<Budget>(&found.bytes).ok());
        let mut budget = kept.unwrap_or_else(|| Budget::full(limit, now_ms));
        let before = budget;
        if let Err(until_ms) = budget.take(limit, tracked.domain.held.is_some(), now_ms) {
            if budget != before {
                // The clock was ahead when it was written. Somebody else's write will do as well.
                let write = Write::put(record, records::json(&budget), expected);
                let _written_by_another = cx.vault.commit(vec![write]).await;
            }
            let window_h = limit.window_ms / 3_600_000;
            let why = format!("the budget of {} {what} in {window_h} h is used up", limit.orders);
            return Ok(Err((until_ms, why)));
        }
        writes.push(Write::put(record, records::json(&budget), expected));
    }
    Ok(Ok(writes))
}

/// Creates the order and goes on with it. The outer error: there is no order, somebody else may be asked.
async fn order(
    cx: &Context,
    tracked: &mut Tracked,
    authority: &Authority,
    session: &Session,
    writes: &mut Vec<Write>,
) -> Result<Result<Outcome, Stop>, AcmeError> {
    let replaces = match &tracked.domain.held {
        Some(held) if held.ca.as_deref() == Some(&authority.config.id) => {
            records::leaf(cx.vault.as_ref(), held.id).await.ok().flatten().and_then(|leaf| leaf.ari)
        }
        _ => None,
    };
    let profile = authority.config.profile.as_deref();
    let created = session.create_order(&tracked.domain.name, profile, replaces.as_ref()).await;
    let mut running = created?;
    authority.answered();
    if let Some(order) = &mut tracked.domain.order {
        order.url = Some(running.url().to_owned());
    }
    if let Err(e) = tracked.save(cx.vault.as_ref(), Vec::new()).await {
        return Ok(Err(e.into()));
    }
    Ok(drive(cx, tracked, authority, &mut running, writes).await)
}

/// Does what the order's state asks for until there is a certificate, or time is over.
async fn drive(
    cx: &Context,
    tracked: &mut Tracked,
    authority: &Authority,
    running: &mut Running<'_>,
    writes: &mut Vec<Write>,
) -> Result<Outcome, Stop> {
    let until = Instant::now() + Duration::from_millis(cx.config.limits.poll_patience_ms);
    let mut presented = false;
    let mut asked = false;
    let mut pause_ms = POLL_MS;
    loop {
        let failed = |e: AcmeError| stop(cx, authority, &e);
        match running.status() {
            Status::Pending if !presented => {
                validate(cx, tracked, authority, running).await?;
                presented = true;
            }
            Status::Ready if !asked => {
                if let Some(order) = &mut tracked.domain.order {
                    order.finalizing = true;
                }
                tracked.save(cx.vault.as_ref(), Vec::new()).await?;
                let request = signing_request(cx, tracked).await?;
                asked = true;
                match running.finalize(&request).await {
                    Ok(()) => continue,
                    // Whether it was too early, or was done already, the order tells.
                    Err(e) if e.kind == AcmeErrorKind::Refused => {
                        running.refresh().await.map_err(failed)?;
                        if matches!(running.status(), Status::Ready | Status::Pending) {
                            return Err(stop(cx, authority, &e));
                        }
                        continue;
                    }
                    Err(e) => return Err(failed(e)),
                }
            }
            Status::Valid => {
                let chain = running.certificate().await.map_err(failed)?;
                return store(cx, tracked, authority, &chain, writes).await;
            }
            Status::Invalid => return Err(invalid(cx, authority, running).await),
            Status::Pending | Status::Ready | Status::Processing => {}
        }
        let said_ms = running.refresh().await.map_err(failed)?;
        if !matches!(running.status(), Status::Pending | Status::Processing) {
            continue;
        }
        let wait_ms = said_ms.unwrap_or(pause_ms).max(pause_ms);
        let wait = Duration::from_millis(wait_ms);
        if wait_ms > MAX_PAUSE_WITHIN_MS || Instant::now() + wait > until {
            let is_asked = tracked.domain.order.as_ref().is_some_and(|order| order.finalizing);
            let what = if is_asked { "issuing" } else { "validating" };
            let why = format!("{} is still {what}", authority.config.id);
            return Err(Stop::from(Outcome::GoesOn { why, after_ms: Some(wait_ms) }));
        }
        tokio::time::sleep(wait).await;
        pause_ms = (pause_ms * 3 / 2).min(POLL_MAX_MS);
        keep_lease(cx, tracked).await?;
    }
}

/// An order that is waited for stays ours.
async fn keep_lease(cx: &Context, tracked: &mut Tracked) -> Result<(), Stop> {
    let limits = &cx.config.limits;
    let now_ms = cx.now_ms();
    let soon = |until_ms: u64| until_ms < now_ms + limits.lease_ms / 2;
    if tracked.domain.order.as_ref().is_some_and(|order| soon(order.lease_until_ms)) {
        tracked.domain.hold(&cx.config.holder, now_ms, limits);
        tracked.save(cx.vault.as_ref(), Vec::new()).await?;
    }
    Ok(())
}

async fn invalid(cx: &Context, authority: &Authority, running: &mut Running<'_>) -> Stop {
    // An authorization tells more than the order.
    let mut why = running.error();
    if running.forget_authorizations().await.is_ok()
        && let Ok(all) = running.authorizations().await
    {
        let failed = all.into_iter().find_map(|authorized| match authorized {
            Authorized::Failed(detail) => Some(detail),
            _ => None,
        });
        why = failed.or(why);
    }
    let why = why.unwrap_or_else(|| "it does not say why".into());
    authority.failed(
        &AcmeError { kind: AcmeErrorKind::Invalid, text: why.clone(), after_ms: None },
        cx.now_ms(),
        0,
        &cx.config.limits,
    );
    lost(format!("{} could not validate the name: {why}", authority.config.id))
}

/// Presents a challenge for each name that is not validated yet, and tells the authority.
async fn validate(
    cx: &Context,
    tracked: &mut Tracked,
    authority: &Authority,
    running: &mut Running<'_>,
) -> Result<(), Stop> {
    let failed = |e: AcmeError| stop(cx, authority, &e);
    for authorized in running.authorizations().await.map_err(failed)? {
        let challenges = match authorized {
            Authorized::Already => continue,
            Authorized::Failed(why) => {
                return Err(lost(format!("{} could not validate the name: {why}", authority.config.id)));
            }
            Authorized::Needs(challenges) => challenges,
        };
        let challenge = choose(cx, tracked, challenges)?;
        let what = presented(&challenge);
        if !tracked.domain.presented.contains(&what) {
            tracked.domain.presented.push(what);
            tracked.save(cx.vault.as_ref(), Vec::new()).await?;
        }
        present(cx, &challenge).await?;
        if !challenge.processing {
            told(running, &challenge).await.map_err(failed)?;
        }
    }
    Ok(())
}

/// Tells the authority that a challenge can be validated. One that was told before, and whose answer was lost, may refuse: then the
/// order tells how it went.
async fn told(running: &mut Running<'_>, challenge: &Challenge) -> Result<(), AcmeError> {
    let Err(error) = running.ready(challenge.kind, &challenge.token).await else { return Ok(()) };
    if error.kind != AcmeErrorKind::Refused {
        return Err(error);
    }
    running.forget_authorizations().await?;
    let pending =
        |needs: &Vec<Challenge>| needs.iter().any(|own| own.token == challenge.token && !own.processing);
    let all = running.authorizations().await?;
    let still = all.iter().any(|authorized| matches!(authorized, Authorized::Needs(needs) if pending(needs)));
    if still { Err(error) } else { Ok(()) }
}

/// The kinds that are enabled and offered, in turn: after a failure the next one is tried.
fn choose(cx: &Context, tracked: &Tracked, challenges: Vec<Challenge>) -> Result<Challenge, Stop> {
    let provider = cx.config.dns.provider(tracked.domain.base()).is_some();
    let wanted = cx.config.challenges.iter().filter(|kind| match kind {
        ChallengeKind::Dns01 => provider,
        _ => !tracked.domain.is_wildcard(),
    });
    let offered: Vec<ChallengeKind> =
        wanted.copied().filter(|kind| challenges.iter().any(|challenge| challenge.kind == *kind)).collect();
    let turn = tracked.domain.failures as usize % offered.len().max(1);
    let kind = offered.get(turn).copied();
    challenges
        .into_iter()
        .find(|challenge| Some(challenge.kind) == kind)
        .ok_or_else(|| lost("the authority offers no way to validate this name that is enabled here"))
}

fn presented(challenge: &Challenge) -> Presented {
    match challenge.kind {
        ChallengeKind::Http01 => Presented::Http01 { token: challenge.token.clone() },
        ChallengeKind::TlsAlpn01 => Presented::TlsAlpn01 { name: challenge.name.clone() },
        ChallengeKind::Dns01 => Presented::Dns01 {
            record: format!("_acme-challenge.{}", challenge.name),
            value: challenge.dns_value.clone(),
        },
    }
}

async fn present(cx: &Context, challenge: &Challenge) -> Result<(), Stop> {
    // The order stays as it is while the edges or the DNS server cannot be told.
    let later = |why: String| Stop::from(Outcome::GoesOn { why, after_ms: None });
    let answer = match challenge.kind {
        ChallengeKind::Http01 => ChallengeAnswer::Http01 {
            token: challenge.token.as_str().into(),
            key_authorization: challenge.key_authorization.as_str().into(),
        },
        ChallengeKind::TlsAlpn01 => ChallengeAnswer::TlsAlpn01 { digest: challenge.digest },
        ChallengeKind::Dns01 => {
            let record = format!("_acme-challenge.{}", challenge.name);
            let provider = cx.config.dns.provider(&challenge.name).map(Arc::clone);
            let provider = provider.ok_or_else(|| lost("no DNS provider for this zone"))?;
            let value = &challenge.dns_value;
            provider.present(&record, value).await.map_err(|e| later(format!("TXT {record}: {e}")))?;
            return propagated(cx, &record, value).await;
        }
    };
    let spec = ChallengeSpec { name: challenge.name.as_str().into(), answer };
    cx.front.answer(spec).await.map_err(|e| later(e.to_string()))
}

/// Waits until the resolver sees the record.
async fn propagated(cx: &Context, record: &str, value: &str) -> Result<(), Stop> {
    let until = Instant::now() + Duration::from_millis(cx.config.limits.dns_propagation_ms);
    let mut pause_ms = LOOK_MS;
    loop {
        let seen = cx.names.has_text(record, value).await;
        if let Ok(true) = seen {
            return Ok(());
        }
        if Instant::now() > until {
            let why =
                seen.err().unwrap_or_else(|| "the resolver does not see the record that was written".into());
            let why = format!("TXT {record}: {why}");
            return Err(Stop::from(Outcome::GoesOn { why, after_ms: None }));
        }
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        pause_ms = (pause_ms * 2).min(LOOK_MAX_MS);
    }
}

/// Takes back what was presented. What cannot be taken back now is left for the next attempt.
pub(super) async fn withdraw(cx: &Context, tracked: &mut Tracked) {
    let mut left = Vec::new();
    for what in std::mem::take(&mut tracked.domain.presented) {
        let done = match &what {
            Presented::Http01 { token } => {
                cx.front.withdraw(ChallengeId::Http01(token.as_str().into())).await.map_err(|e| e.to_string())
            }
            Presented::TlsAlpn01 { name } => cx
                .front
                .withdraw(ChallengeId::TlsAlpn01(name.as_str().into()))
                .await
                .map_err(|e| e.to_string()),
            Presented::Dns01 { record, value } => match cx.config.dns.provider(record).map(Arc::clone) {
                Some(provider) => provider.remove(record, value).await.map_err(|e| e.to_string()),
                None => Ok(()),
            },
        };
        if let Err(error) = done {
            tracing::warn!(domain = tracked.domain.name, error, "a challenge could not be taken back");
            left.push(what);
        }
    }
    tracked.domain.presented = left;
}

async fn order_key(cx: &Context, name: &str) -> Result<Zeroizing<Vec<u8>>, Stop> {
    let record = records::order_key(name);
    let found = cx.vault.get(&record).await?.ok_or_else(|| lost("the order's private key is gone"))?;
    cx.seal.open(&record, &found.bytes).map_err(|e| lost(e.to_string()))
}

async fn signing_request(cx: &Context, tracked: &Tracked) -> Result<Vec<u8>, Stop> {
    let own = |e: rcgen::Error| lost(format!("no signing request can be made: {e}"));
    let der = order_key(cx, &tracked.domain.name).await?;
    let key = rcgen::KeyPair::try_from(&PrivatePkcs8KeyDer::from(der.as_slice())).map_err(own)?;
    let mut params = rcgen::CertificateParams::new(vec![tracked.domain.name.clone()]).map_err(own)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params.serialize_request(&key).map_err(own)?.der().to_vec())
}

/// Checks what was issued; the writes make it durable together with the outcome.
async fn store(
    cx: &Context,
    tracked: &Tracked,
    authority: &Authority,
    chain: &str,
    writes: &mut Vec<Write>,
) -> Result<Outcome, Stop> {
    let refuse = |e: PemError| lost(format!("{} issued what cannot be used: {e}", authority.config.id));
    let der = order_key(cx, &tracked.domain.name).await?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.to_vec()));
    let chain = read_chain(chain).map_err(refuse)?;
    let now_ms = cx.now_ms();
    // An authority's clock may be a little before ours.
    let leaf = crate::pem::read_leaf(&chain[0]).map_err(refuse)?;
    let bundle = Bundle::of(chain, key, now_ms.max(leaf.not_before_ms)).map_err(refuse)?;
    bundle.is_for(&tracked.domain.name).map_err(refuse)?;
    let leaf = &bundle.leaf;
    let stored =
        records::certificate_writes(&cx.seal, &bundle, Source::Acme, Some(&authority.config.id), now_ms);
    writes.extend(stored.map_err(|e| lost(e.to_string()))?);
    Ok(Outcome::Issued(Held {
        id: leaf.id,
        not_before_ms: leaf.not_before_ms,
        not_after_ms: leaf.not_after_ms,
        source: Source::Acme,
        ca: Some(authority.config.id.clone()),
        renew_at_ms: renew_at_ms(leaf.not_before_ms, leaf.not_after_ms, None, cx.random()),
        ask_window_ms: Some(now_ms),
        window: None,
        published: false,
        ocsp: Ocsp::default(),
    }))
}

/// Tells the edges of the certificate, and lets go of the one before.
pub(super) async fn publish(cx: &Context, tracked: &mut Tracked) -> Result<(), VaultError> {
    let Some(held) = &mut tracked.domain.held else { return Ok(()) };
    let Ok(name) = HostPattern::parse(&tracked.domain.name) else { return Ok(()) };
    if let Err(e) = cx.front.publish(name, held.id, held.ocsp.staple).await {
        tracing::warn!(domain = tracked.domain.name, error = %e, "the edges do not know the new certificate yet");
        tracked.domain.next_try_ms = cx.now_ms() + cx.config.limits.order_retry_ms;
        return Ok(());
    }
    held.published = true;
    held.ocsp.tell_ms = None;
    tracked.domain.next_try_ms = 0;
    if tracked.domain.order.is_none() {
        // Of an order that was given up for what somebody brought.
        withdraw(cx, tracked).await;
    }
    let mut writes = Vec::new();
    if let Some(old) = tracked.domain.replaced.take()
        && !cx.is_used(old, &tracked.domain.name)
    {
        writes.extend(records::certificate_deletes(old));
    }
    tracked.save(cx.vault.as_ref(), writes).await
}
