//! A domain and its certificate as a state machine: what it waits for, when it is due, and what follows from an outcome.
//! Pure: the time and random bits are handed in. The manager does what this says.

use std::fmt;

use jiff::Timestamp;
use peregrine_routing::{CertificateId, StapleId};
use serde::{Deserialize, Serialize};

use crate::limits::Limits;

/// A name and all that is known of its certificate. The record `domain/NAME` of the vault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Domain {
    /// As a pattern is written: `shop.example.com` or `*.example.com`.
    pub(crate) name: String,
    pub(crate) origin: Origin,
    pub(crate) added_ms: u64,
    /// Ordered and renewed by itself. An imported certificate is not.
    pub(crate) automatic: bool,
    pub(crate) held: Option<Held>,
    /// Boxed: most domains have none under way.
    pub(crate) order: Option<Box<Order>>,
    /// What may be presented somewhere and has to be taken back when the order ends.
    pub(crate) presented: Vec<Presented>,
    /// The certificate before this one: it goes when the edges know the new one.
    #[serde(with = "hex_id_option")]
    pub(crate) replaced: Option<CertificateId>,
    /// Number of orders that were begun. Who holds an order with a lower one has lost it.
    pub(crate) fence: u64,
    pub(crate) trouble: Option<Trouble>,
    /// Failures in a row.
    pub(crate) failures: u32,
    /// Nothing is tried before.
    pub(crate) next_try_ms: u64,
    /// An authority has asked for patience until then: nobody hurries it.
    #[serde(default)]
    pub(crate) not_before_ms: u64,
    /// When an order was last begun because a certificate was revoked; 0: never.
    #[serde(default)]
    pub(crate) revoked_order_ms: u64,
}

/// How a domain came here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Somebody added it.
    Added,
    /// A first handshake asked for it.
    OnDemand,
}

/// Where a certificate came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// An ACME authority issued it to this installation.
    Acme,
    /// Somebody brought it.
    Import,
}

/// The certificate that a domain is served with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    #[serde(with = "hex_id")]
    pub(crate) id: CertificateId,
    pub(crate) not_before_ms: u64,
    pub(crate) not_after_ms: u64,
    pub(crate) source: Source,
    /// Which authority of the configuration; `None` for an imported one.
    pub(crate) ca: Option<String>,
    pub(crate) renew_at_ms: u64,
    /// When the authority is asked again for its window (RFC 9773 §4.3).
    pub(crate) ask_window_ms: Option<u64>,
    pub(crate) window: Option<Window>,
    /// The edges were told.
    pub(crate) published: bool,
    /// What its authority's responder says.
    #[serde(default)]
    pub(crate) ocsp: Ocsp,
}

/// What the responder of a certificate's authority says of it (RFC 6960), and when it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ocsp {
    /// When it is asked (again), Unix time in milliseconds; `None`: there is nobody to ask.
    pub(crate) ask_ms: Option<u64>,
    /// When the edges are told of what has changed; `None`: they know it.
    pub(crate) tell_ms: Option<u64>,
    /// Failures in a row.
    pub(crate) failures: u32,
    /// What is stapled.
    #[serde(with = "hex_id_option")]
    pub(crate) staple: Option<StapleId>,
    /// Its end.
    pub(crate) until_ms: u64,
    /// Since when the certificate is revoked.
    pub(crate) revoked_ms: Option<u64>,
}

impl Default for Ocsp {
    /// Of a certificate of which nobody was asked yet, also one of a record that knew nothing of this.
    fn default() -> Self {
        Self { ask_ms: Some(0), tell_ms: None, failures: 0, staple: None, until_ms: 0, revoked_ms: None }
    }
}

/// What came of asking a responder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StapleOutcome {
    /// There is nobody to ask.
    Nobody,
    /// This may be stapled.
    Good { staple: StapleId, this_update_ms: u64, next_update_ms: u64 },
    /// The authority has revoked the certificate.
    Revoked { since_ms: u64 },
    /// No answer, or none that is of use.
    Failed,
}

/// When the authority wants a certificate to be renewed (RFC 9773 §4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Window {
    pub(crate) start_ms: u64,
    pub(crate) end_ms: u64,
}

/// An order that is under way. Its private key lies sealed beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    /// Which manager.
    pub(crate) holder: String,
    /// Nobody else takes it before.
    pub(crate) lease_until_ms: u64,
    pub(crate) ca: String,
    pub(crate) begun_ms: u64,
    /// Known once the authority has answered.
    pub(crate) url: Option<String>,
    /// The authority was asked for the certificate, or is about to be: it may exist.
    pub(crate) finalizing: bool,
    /// Troubles in a row with this order.
    pub(crate) troubles: u32,
}

/// A challenge that was, or is about to be, presented.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Presented {
    Http01 { token: String },
    TlsAlpn01 { name: String },
    Dns01 { record: String, value: String },
}

/// Why there is no (new) certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Trouble {
    Dns(String),
    Held(String),
    Failed(String),
}

/// A certificate is renewed no earlier than this, or a tenth of its life, after its beginning.
const MIN_AGE_MS: u64 = 3_600_000;

/// Nothing is put off for longer: seven days, as long as an authority's `Retry-After` is believed.
const MAX_WAIT_MS: u64 = 7 * 24 * 3_600_000;

/// A responder is asked again after this time at the earliest and at the latest.
const STAPLE_MIN_MS: u64 = 60_000;
const STAPLE_MAX_MS: u64 = 4 * 24 * 3_600_000;

/// What is to be done for a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Tell the edges of the certificate.
    Publish,
    /// Begin an order, or go on with one.
    Order,
    /// Ask the authority when to renew.
    AskWindow,
    /// Ask its responder for what is stapled, or tell the edges of it.
    Staple,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// There is a certificate.
    Issued(Held),
    /// Nothing was ordered: the name does not lead here.
    WaitingForDns(String),
    /// Nothing was ordered: a budget or an authority says not now.
    NotNow { why: String, until_ms: u64 },
    /// The order is alive and goes on later.
    GoesOn { why: String, after_ms: Option<u64> },
    /// The order, if there was one, is lost; the next one begins anew.
    Lost { why: String, after_ms: Option<u64> },
}

/// The state of a domain, as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// Nothing was tried yet.
    New,
    /// The name does not lead here; `what` says what was found and which record to create.
    WaitingForDns {
        /// What was looked up, what was expected, what was found.
        what: String,
    },
    /// It waits for a budget or for an authority's pause.
    Waiting {
        /// For what.
        what: String,
        /// Unix time in milliseconds.
        until_ms: u64,
    },
    /// An order is under way.
    Ordering {
        /// What hinders it, if something does.
        hindrance: Option<String>,
    },
    /// There is a certificate.
    Valid {
        /// Its end, Unix time in milliseconds.
        until_ms: u64,
        /// When it is renewed; `None` if it is not, because somebody brought it.
        renews_ms: Option<u64>,
        /// Why the last try to renew it failed, and when the next one is.
        renewal_failed: Option<(String, u64)>,
    },
    /// The certificate is over, and nothing renews it.
    Expired {
        /// Since when, Unix time in milliseconds.
        since_ms: u64,
    },
    /// The authority has revoked the certificate, and there is no other one yet.
    Revoked {
        /// Since when, Unix time in milliseconds.
        since_ms: u64,
        /// A new one is ordered by itself; not if somebody brought it.
        replaced: bool,
        /// Why the last try to get a new one failed, and when the next one is.
        trouble: Option<(String, u64)>,
    },
    /// There is no certificate.
    Failed {
        /// Why.
        why: String,
        /// Unix time in milliseconds.
        next_try_ms: u64,
    },
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::New => f.write_str("new"),
            Self::WaitingForDns { what } => write!(f, "waiting for DNS ({what})"),
            Self::Waiting { what, until_ms } => write!(f, "waiting: {what}, next try {}", Utc(*until_ms)),
            Self::Ordering { hindrance: None } => f.write_str("ordering"),
            Self::Ordering { hindrance: Some(why) } => write!(f, "ordering ({why})"),
            Self::Valid { until_ms, renews_ms, renewal_failed } => {
                write!(f, "valid until {}, ", Utc(*until_ms))?;
                match (renewal_failed, renews_ms) {
                    (Some((why, next)), _) => write!(f, "not renewed yet: {why}, next try {}", Utc(*next)),
                    (None, Some(at)) => write!(f, "renews {}", Utc(*at)),
                    (None, None) => f.write_str("imported, not renewed"),
                }
            }
            Self::Revoked { since_ms, replaced, trouble } => {
                write!(f, "revoked by its authority {}, ", Utc(*since_ms))?;
                match (trouble, replaced) {
                    (Some((why, next)), _) => write!(f, "not replaced yet: {why}, next try {}", Utc(*next)),
                    (None, true) => f.write_str("a new one is ordered"),
                    (None, false) => f.write_str("imported, not replaced"),
                }
            }
            Self::Expired { since_ms } => write!(f, "expired {}, imported, not renewed", Utc(*since_ms)),
            Self::Failed { why, next_try_ms } => write!(f, "failed: {why}, next try {}", Utc(*next_try_ms)),
        }
    }
}

/// Milliseconds as people write a time (RFC 3339, UTC).
pub(crate) struct Utc(pub(crate) u64);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(self.0 / 1000).unwrap_or(i64::MAX);
        match Timestamp::from_second(seconds) {
            Ok(time) => write!(f, "{time}"),
            Err(_) => f.write_str("never"),
        }
    }
}

/// What is worked on first: smaller is earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// An order that has begun costs nothing to go on with, and others may wait for it.
    Begun,
    /// By the end of the certificate.
    Expiring(u64),
    /// By the time that it was added.
    New(u64),
}

impl Domain {
    pub(crate) fn new(name: String, origin: Origin, now_ms: u64) -> Self {
        Self {
            name,
            origin,
            added_ms: now_ms,
            automatic: true,
            held: None,
            order: None,
            presented: Vec::new(),
            replaced: None,
            fence: 0,
            trouble: None,
            failures: 0,
            next_try_ms: 0,
            not_before_ms: 0,
            revoked_order_ms: 0,
        }
    }

    pub(crate) fn is_wildcard(&self) -> bool {
        self.name.starts_with("*.")
    }

    /// The name that is validated.
    pub(crate) fn base(&self) -> &str {
        self.name.strip_prefix("*.").unwrap_or(&self.name)
    }

    pub(crate) fn state(&self, now_ms: u64) -> DomainState {
        if let Some(held) = &self.held
            && (held.not_after_ms > now_ms || !self.automatic)
        {
            if held.not_after_ms <= now_ms {
                return DomainState::Expired { since_ms: held.not_after_ms };
            }
            let renewal_failed = match &self.trouble {
                Some(Trouble::Failed(why) | Trouble::Dns(why)) if self.failures > 0 => {
                    Some((why.clone(), self.next_try_ms))
                }
                // It is due, and something is in its way.
                Some(Trouble::Held(why)) if self.automatic && held.renew_at_ms <= now_ms => {
                    Some((why.clone(), self.next_try_ms))
                }
                _ => None,
            };
            if let Some(since_ms) = held.ocsp.revoked_ms {
                return DomainState::Revoked { since_ms, replaced: self.automatic, trouble: renewal_failed };
            }
            return DomainState::Valid {
                until_ms: held.not_after_ms,
                renews_ms: self.automatic.then_some(held.renew_at_ms),
                renewal_failed,
            };
        }
        match (&self.order, &self.trouble) {
            (Some(_), Some(Trouble::Failed(why) | Trouble::Held(why))) => {
                DomainState::Ordering { hindrance: Some(why.clone()) }
            }
            (Some(_), _) => DomainState::Ordering { hindrance: None },
            (None, Some(Trouble::Dns(what))) => DomainState::WaitingForDns { what: what.clone() },
            (None, Some(Trouble::Held(what))) => {
                DomainState::Waiting { what: what.clone(), until_ms: self.next_try_ms }
            }
            (None, Some(Trouble::Failed(why))) => {
                DomainState::Failed { why: why.clone(), next_try_ms: self.next_try_ms }
            }
            (None, None) => DomainState::New,
        }
    }

    /// When there is something to do, and what; `None`: never, until somebody changes something.
    pub(crate) fn due(&self, holder: &str) -> Option<(u64, Task)> {
        let certificate = self.certificate_due(holder);
        let Some(held) = self.held.as_ref().filter(|held| held.published) else { return certificate };
        let staple = held.ocsp.tell_ms.or(held.ocsp.ask_ms).map(|due_ms| (due_ms, Task::Staple));
        match (certificate, staple) {
            // An order that has begun, or is due, goes first.
            (Some(certificate), Some(staple)) => {
                Some(if staple.0 < certificate.0 { staple } else { certificate })
            }
            (certificate, staple) => certificate.or(staple),
        }
    }

    fn certificate_due(&self, holder: &str) -> Option<(u64, Task)> {
        if let Some(order) = &self.order {
            // Another's order is another's until its lease is over.
            let free_ms = if order.holder == holder { 0 } else { order.lease_until_ms };
            return Some((self.next_try_ms.max(free_ms), Task::Order));
        }
        let Some(held) = &self.held else {
            return self.automatic.then_some((self.next_try_ms, Task::Order));
        };
        if !held.published {
            return Some((self.next_try_ms, Task::Publish));
        }
        if !self.automatic {
            return None;
        }
        let renew_ms = held.renew_at_ms.max(self.next_try_ms);
        match held.ask_window_ms {
            Some(ask_ms) if ask_ms < renew_ms => Some((ask_ms, Task::AskWindow)),
            _ => Some((renew_ms, Task::Order)),
        }
    }

    pub(crate) fn priority(&self) -> Priority {
        match (&self.order, &self.held) {
            (Some(_), _) => Priority::Begun,
            (None, Some(held)) => Priority::Expiring(held.not_after_ms),
            (None, None) => Priority::New(self.added_ms),
        }
    }

    /// Begins an order: from here on it is `holder`'s until the lease ends.
    pub(crate) fn claim(&mut self, holder: &str, ca: &str, now_ms: u64, limits: &Limits) {
        self.fence += 1;
        self.order = Some(Box::new(Order {
            holder: holder.to_owned(),
            lease_until_ms: now_ms + limits.lease_ms,
            ca: ca.to_owned(),
            begun_ms: now_ms,
            url: None,
            finalizing: false,
            troubles: 0,
        }));
        self.trouble = None;
    }

    /// Takes over an order whose holder is gone, or holds one's own for longer.
    pub(crate) fn hold(&mut self, holder: &str, now_ms: u64, limits: &Limits) {
        if let Some(order) = &mut self.order {
            if order.holder != holder {
                order.holder = holder.to_owned();
                self.fence += 1;
            }
            order.lease_until_ms = now_ms + limits.lease_ms;
        }
    }

    /// What follows from an attempt. `bits` are random.
    pub(crate) fn settle(&mut self, outcome: Outcome, now_ms: u64, bits: u64, limits: &Limits) {
        match outcome {
            Outcome::Issued(held) => self.settle_held(held),
            Outcome::WaitingForDns(what) => {
                self.order = None;
                self.failures = self.failures.saturating_add(1);
                self.trouble = Some(Trouble::Dns(what));
                let delay = back_off(limits.dns_retry_ms, limits.dns_retry_max_ms, self.failures, bits);
                self.next_try_ms = now_ms + self.hurried(delay, now_ms, limits);
            }
            Outcome::NotNow { why, until_ms } => {
                self.order = None;
                self.trouble = Some(Trouble::Held(why));
                self.next_try_ms = until_ms.max(now_ms + limits.retry_ms);
            }
            Outcome::GoesOn { why, after_ms } => {
                let troubles = self.order.as_mut().map_or(1, |order| {
                    order.troubles = order.troubles.saturating_add(1);
                    order.troubles
                });
                self.trouble = Some(Trouble::Held(why));
                let delay = back_off(limits.order_retry_ms, limits.order_retry_max_ms, troubles, bits);
                self.next_try_ms = now_ms + delay.max(after_ms.unwrap_or(0));
                self.be_patient(now_ms, after_ms);
            }
            Outcome::Lost { why, after_ms } => {
                self.order = None;
                self.failures = self.failures.saturating_add(1);
                self.trouble = Some(Trouble::Failed(why));
                let delay = back_off(limits.retry_ms, limits.retry_max_ms, self.failures, bits);
                let delay = self.hurried(delay, now_ms, limits).max(after_ms.unwrap_or(0));
                self.next_try_ms = now_ms + delay;
                self.be_patient(now_ms, after_ms);
            }
        }
    }

    /// What follows from asking a responder. `bits` are random.
    pub(crate) fn settle_staple(&mut self, outcome: StapleOutcome, now_ms: u64, bits: u64, limits: &Limits) {
        let automatic = self.automatic;
        let Some(held) = &mut self.held else { return };
        let ocsp = &mut held.ocsp;
        let before = ocsp.staple;
        let mut is_newly_revoked = false;
        match outcome {
            StapleOutcome::Nobody => *ocsp = Ocsp { ask_ms: None, ..Ocsp::default() },
            StapleOutcome::Good { staple, this_update_ms, next_update_ms } => {
                let ask_ms = staple_again_ms(this_update_ms, next_update_ms, now_ms, bits);
                *ocsp = Ocsp {
                    ask_ms: Some(ask_ms),
                    staple: Some(staple),
                    until_ms: next_update_ms,
                    ..Ocsp::default()
                };
            }
            StapleOutcome::Revoked { since_ms } => {
                is_newly_revoked = ocsp.revoked_ms.is_none();
                // It may have been on hold only.
                let ask_ms = Some(now_ms + limits.staple_retry_max_ms);
                *ocsp = Ocsp { ask_ms, revoked_ms: Some(since_ms), ..Ocsp::default() };
            }
            StapleOutcome::Failed => {
                ocsp.failures = ocsp.failures.saturating_add(1);
                let pause_ms =
                    back_off(limits.staple_retry_ms, limits.staple_retry_max_ms, ocsp.failures, bits);
                ocsp.ask_ms = Some(now_ms + pause_ms);
                // What was good is good to its end.
                if ocsp.until_ms <= now_ms {
                    ocsp.staple = None;
                }
            }
        }
        if ocsp.staple != before {
            ocsp.tell_ms = Some(now_ms);
        }
        if is_newly_revoked && automatic {
            // At once; but an authority that revokes all that it has just issued gets one order an hour, not one a second.
            let earliest_ms = match self.revoked_order_ms {
                0 => now_ms,
                last_ms => now_ms.max(last_ms + MIN_AGE_MS),
            };
            self.revoked_order_ms = earliest_ms;
            held.renew_at_ms = held.renew_at_ms.min(earliest_ms);
            self.hurry(now_ms);
        }
    }

    fn be_patient(&mut self, now_ms: u64, after_ms: Option<u64>) {
        self.not_before_ms = after_ms.map_or(0, |after_ms| now_ms + after_ms);
    }

    /// Tries as soon as it may.
    pub(crate) fn hurry(&mut self, now_ms: u64) {
        self.next_try_ms = self.next_try_ms.min(now_ms.max(self.not_before_ms));
    }

    /// A clock that was ahead and was set right: what was written then must not last until then.
    pub(crate) fn bound(&mut self, now_ms: u64, limits: &Limits) {
        self.next_try_ms = self.next_try_ms.min(now_ms + MAX_WAIT_MS);
        self.not_before_ms = self.not_before_ms.min(now_ms + MAX_WAIT_MS);
        if let Some(order) = &mut self.order {
            order.lease_until_ms = order.lease_until_ms.min(now_ms + limits.lease_ms);
            order.begun_ms = order.begun_ms.min(now_ms);
        }
        if let Some(held) = &mut self.held {
            held.ask_window_ms = held.ask_window_ms.map(|ask_ms| ask_ms.min(now_ms + MAX_WAIT_MS));
            held.ocsp.ask_ms = held.ocsp.ask_ms.map(|ask_ms| ask_ms.min(now_ms + MAX_WAIT_MS));
            held.ocsp.tell_ms = held.ocsp.tell_ms.map(|tell_ms| tell_ms.min(now_ms + limits.order_retry_ms));
            self.revoked_order_ms = self.revoked_order_ms.min(now_ms + MIN_AGE_MS);
        }
    }

    /// The authority's window, and when to ask again. The time in it is chosen once: a window that stays keeps it.
    pub(crate) fn set_window(&mut self, window: Option<Window>, ask_again_ms: Option<u64>, bits: u64) {
        let Some(held) = &mut self.held else { return };
        held.ask_window_ms = ask_again_ms;
        if window.is_some() && window != held.window {
            // An authority that wants even what it has just issued to be renewed gets one order an hour, not one a second.
            let life_ms = held.not_after_ms.saturating_sub(held.not_before_ms);
            let earliest_ms = held.not_before_ms + MIN_AGE_MS.min(life_ms / 10);
            let at_ms = renew_at_ms(held.not_before_ms, held.not_after_ms, window, bits);
            held.renew_at_ms = at_ms.max(earliest_ms);
            held.window = window;
        }
    }

    /// Somebody brought a certificate: an order is given up, and nothing is ordered by itself.
    pub(crate) fn import(&mut self, held: Held) {
        self.settle_held(held);
        self.automatic = false;
    }

    fn settle_held(&mut self, held: Held) {
        self.order = None;
        self.trouble = None;
        self.failures = 0;
        self.next_try_ms = 0;
        self.not_before_ms = 0;
        let old = self.held.take().map(|old| old.id).filter(|old| *old != held.id);
        self.replaced = old.or(self.replaced);
        self.held = Some(held);
    }

    /// A certificate that is about to end is tried for more often than back-off alone would say.
    fn hurried(&self, delay_ms: u64, now_ms: u64, limits: &Limits) -> u64 {
        let Some(held) = &self.held else { return delay_ms };
        let left_ms = held.not_after_ms.saturating_sub(now_ms);
        delay_ms.min((left_ms / 8).max(limits.retry_ms))
    }
}

/// When a certificate is renewed: at a random time of the authority's window (RFC 9773 §4.2), or when two thirds of its life
/// are over and up to a thirtieth of it later, so that what was ordered together is not renewed together.
pub(crate) fn renew_at_ms(not_before_ms: u64, not_after_ms: u64, window: Option<Window>, bits: u64) -> u64 {
    let latest_ms = not_after_ms.saturating_sub(1);
    if let Some(Window { start_ms, end_ms }) = window {
        let span_ms = end_ms.saturating_sub(start_ms).max(1);
        return (start_ms + bits % span_ms).min(latest_ms);
    }
    let life_ms = not_after_ms.saturating_sub(not_before_ms);
    let spread_ms = (life_ms / 30).max(1);
    (not_before_ms + life_ms / 3 * 2 + bits % spread_ms).min(latest_ms)
}

/// When a responder is asked again: at half of an answer's time, or up to a tenth of it earlier, so that what was answered
/// together is not asked for together; never within a minute, and at the latest after four days, as it may have been revoked.
fn staple_again_ms(this_update_ms: u64, next_update_ms: u64, now_ms: u64, bits: u64) -> u64 {
    let life_ms = next_update_ms.saturating_sub(this_update_ms);
    let at_ms = this_update_ms + life_ms / 2 - bits % (life_ms / 10).max(1);
    // One that was made long ago: half of what is left.
    let at_ms = if at_ms > now_ms { at_ms } else { now_ms + next_update_ms.saturating_sub(now_ms) / 2 };
    at_ms.clamp(now_ms + STAPLE_MIN_MS, now_ms + STAPLE_MAX_MS)
}

/// Doubles with each failure up to `max_ms`, and is spread over a quarter to both sides.
pub(crate) fn back_off(base_ms: u64, max_ms: u64, failures: u32, bits: u64) -> u64 {
    let doublings = failures.saturating_sub(1).min(32);
    let delay_ms = base_ms.saturating_mul(1 << doublings).min(max_ms);
    delay_ms - delay_ms / 4 + bits % (delay_ms / 2).max(1)
}

/// Identifiers of certificates as 64 hex digits.
pub(crate) mod hex_id {
    use peregrine_routing::CertificateId;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(id: &CertificateId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(id)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<CertificateId, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// The same of certificates and staples, where there may be none.
mod hex_id_option {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Display, S: Serializer>(id: &Option<T>, to: S) -> Result<S::Ok, S::Error> {
        id.as_ref().map(T::to_string).serialize(to)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY_MS: u64 = 24 * 3_600_000;
    const ADDED_MS: u64 = 1_800_000_000_000;

    fn domain() -> Domain {
        Domain::new("shop.example.com".into(), Origin::Added, ADDED_MS)
    }

    fn held(not_before_ms: u64, days: u64) -> Held {
        let not_after_ms = not_before_ms + days * DAY_MS;
        Held {
            id: CertificateId([1; 32]),
            not_before_ms,
            not_after_ms,
            source: Source::Acme,
            ca: Some("ca".into()),
            renew_at_ms: renew_at_ms(not_before_ms, not_after_ms, None, 0),
            ask_window_ms: None,
            window: None,
            published: true,
            ocsp: Ocsp { ask_ms: None, ..Ocsp::default() },
        }
    }

    fn settled(domain: &mut Domain, outcome: Outcome, now_ms: u64) -> String {
        domain.settle(outcome, now_ms, 0, &Limits::default());
        domain.state(now_ms).to_string()
    }

    #[test]
    fn states_are_told_in_words() {
        let mut domain = domain();
        let limits = Limits::default();
        assert_eq!(domain.state(ADDED_MS).to_string(), "new");
        let what = "A shop.example.com → expected 203.0.113.7, found nothing";
        assert_eq!(
            settled(&mut domain, Outcome::WaitingForDns(what.into()), ADDED_MS),
            "waiting for DNS (A shop.example.com → expected 203.0.113.7, found nothing)"
        );
        domain.claim("one", "ca", ADDED_MS, &limits);
        assert_eq!(domain.state(ADDED_MS).to_string(), "ordering");
        let later = Outcome::GoesOn { why: "ca is still issuing".into(), after_ms: None };
        assert_eq!(settled(&mut domain, later, ADDED_MS), "ordering (ca is still issuing)");
        let lost = Outcome::Lost { why: "it said no".into(), after_ms: Some(DAY_MS) };
        assert_eq!(settled(&mut domain, lost, ADDED_MS), "failed: it said no, next try 2027-01-16T08:00:00Z");
        assert_eq!(
            settled(&mut domain, Outcome::Issued(held(ADDED_MS, 90)), ADDED_MS),
            "valid until 2027-04-15T08:00:00Z, renews 2027-03-16T08:00:00Z"
        );
        let at_ms = ADDED_MS + 60 * DAY_MS;
        let lost = Outcome::Lost { why: "it said no".into(), after_ms: None };
        assert_eq!(
            settled(&mut domain, lost, at_ms),
            "valid until 2027-04-15T08:00:00Z, not renewed yet: it said no, next try 2027-03-16T08:00:45Z"
        );
        assert_eq!(
            domain.state(ADDED_MS + 90 * DAY_MS).to_string(),
            "failed: it said no, next try 2027-03-16T08:00:45Z"
        );
        domain.import(held(ADDED_MS, 90));
        assert_eq!(
            domain.state(at_ms).to_string(),
            "valid until 2027-04-15T08:00:00Z, imported, not renewed"
        );
        assert_eq!(domain.due("one"), None);
    }

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_life_or_in_the_authoritys_window() {
        for bits in [0, 1, 77_777_777_777, u64::MAX] {
            for days in [6, 45, 90] {
                let end_ms = ADDED_MS + days * DAY_MS;
                let at_ms = renew_at_ms(ADDED_MS, end_ms, None, bits);
                let life_ms = days * DAY_MS;
                assert!(
                    at_ms >= ADDED_MS + life_ms / 3 * 2 && at_ms <= ADDED_MS + life_ms / 10 * 7 + DAY_MS / 4
                );
                let window = Window { start_ms: ADDED_MS + 10, end_ms: ADDED_MS + 20 };
                let at_ms = renew_at_ms(ADDED_MS, end_ms, Some(window), bits);
                assert!((window.start_ms..window.end_ms).contains(&at_ms));
            }
        }
        let mut domain = domain();
        domain.settle(Outcome::Issued(held(ADDED_MS, 90)), ADDED_MS, 0, &Limits::default());
        let window = Window { start_ms: ADDED_MS + 30 * DAY_MS, end_ms: ADDED_MS + 32 * DAY_MS };
        domain.set_window(Some(window), Some(ADDED_MS + DAY_MS), 5);
        assert_eq!(domain.due("one"), Some((ADDED_MS + DAY_MS, Task::AskWindow)));
        domain.set_window(Some(window), Some(ADDED_MS + 40 * DAY_MS), 999);
        assert_eq!(
            domain.due("one"),
            Some((window.start_ms + 5, Task::Order)),
            "the time in it is chosen once"
        );
        domain.set_window(None, None, 0);
        assert_eq!(domain.due("one"), Some((window.start_ms + 5, Task::Order)), "no answer changes nothing");
        domain.set_window(Some(Window { start_ms: 0, end_ms: 1 }), None, 0);
        assert_eq!(
            domain.due("one"),
            Some((ADDED_MS + MIN_AGE_MS, Task::Order)),
            "revoked: soon, and not at once again"
        );
    }

    const LIFE_MS: u64 = 7 * DAY_MS;

    fn good(id: u8, this_update_ms: u64) -> StapleOutcome {
        let next_update_ms = this_update_ms + LIFE_MS;
        StapleOutcome::Good { staple: StapleId([id; 32]), this_update_ms, next_update_ms }
    }

    fn stapled(domain: &Domain) -> Option<u8> {
        domain.held.as_ref().and_then(|held| held.ocsp.staple).map(|id| id.0[0])
    }

    /// One whose responder is to be asked.
    fn served() -> Domain {
        let mut domain = domain();
        domain.held = Some(Held { ocsp: Ocsp::default(), ..held(ADDED_MS, 90) });
        domain
    }

    #[test]
    fn a_staple_is_told_when_it_changes_and_asked_for_again_at_half_of_its_time() {
        let limits = Limits::default();
        let mut domain = served();
        assert_eq!(domain.due("one"), Some((0, Task::Staple)));
        for (bits, id) in [(0, 1), (LIFE_MS / 10 - 1, 2), (u64::MAX, 3)] {
            domain.settle_staple(good(id, ADDED_MS), ADDED_MS, bits, &limits);
            assert_eq!(domain.due("one"), Some((ADDED_MS, Task::Staple)), "the edges are told");
            domain.held.as_mut().unwrap().ocsp.tell_ms = None;
            let (ask_ms, task) = domain.due("one").unwrap();
            assert_eq!((stapled(&domain), task), (Some(id), Task::Staple));
            assert!(ask_ms <= ADDED_MS + LIFE_MS / 2 && ask_ms > ADDED_MS + LIFE_MS / 2 - LIFE_MS / 10);
        }
        domain.settle_staple(good(3, ADDED_MS), ADDED_MS, 0, &limits);
        assert_eq!(domain.held.as_ref().unwrap().ocsp.tell_ms, None, "it is the same one");
        // One that was made long ago, one for years, one for a second.
        let again = |this_ms, next_ms| staple_again_ms(this_ms, next_ms, ADDED_MS, 0) - ADDED_MS;
        assert_eq!(again(ADDED_MS - 6 * DAY_MS, ADDED_MS + DAY_MS), DAY_MS / 2);
        assert_eq!(again(ADDED_MS, ADDED_MS + 365 * DAY_MS), STAPLE_MAX_MS);
        assert_eq!(again(ADDED_MS, ADDED_MS + 1_000), STAPLE_MIN_MS);
    }

    #[test]
    fn a_responder_that_fails_is_asked_later_and_later_and_what_was_good_is_stapled_to_its_end() {
        let limits = Limits::default();
        let mut domain = served();
        domain.settle_staple(good(1, ADDED_MS), ADDED_MS, 0, &limits);
        domain.held.as_mut().unwrap().ocsp.tell_ms = None;
        let (mut now_ms, mut pause_ms) = (ADDED_MS + LIFE_MS / 2, 0);
        while now_ms < ADDED_MS + LIFE_MS {
            assert_eq!(stapled(&domain), Some(1));
            domain.settle_staple(StapleOutcome::Failed, now_ms, 0, &limits);
            let next_ms = domain.due("one").unwrap().0;
            assert!(next_ms - now_ms >= pause_ms && next_ms - now_ms <= limits.staple_retry_max_ms);
            (now_ms, pause_ms) = (next_ms, next_ms - now_ms);
        }
        domain.settle_staple(StapleOutcome::Failed, now_ms, 0, &limits);
        assert_eq!((stapled(&domain), domain.due("one")), (None, Some((now_ms, Task::Staple))), "it is over");
        domain.settle_staple(StapleOutcome::Nobody, now_ms, 0, &limits);
        assert_eq!(domain.due("one").map(|(_, task)| task), Some(Task::Order), "nobody is asked any more");
    }

    #[test]
    fn a_certificate_that_is_revoked_is_replaced_at_once_and_those_after_it_once_an_hour() {
        let limits = Limits::default();
        let mut domain = served();
        domain.settle_staple(good(1, ADDED_MS), ADDED_MS, 0, &limits);
        let revoked = StapleOutcome::Revoked { since_ms: ADDED_MS };
        let now_ms = ADDED_MS + DAY_MS;
        domain.settle_staple(revoked, now_ms, 0, &limits);
        assert_eq!(stapled(&domain), None);
        let words = "revoked by its authority 2027-01-15T08:00:00Z, a new one is ordered";
        assert_eq!(domain.state(now_ms).to_string(), words);
        // First the order, then the edges, which is of the same moment.
        assert_eq!(domain.due("one"), Some((now_ms, Task::Order)));
        let lost = Outcome::Lost { why: "it said no".into(), after_ms: None };
        let words = settled(&mut domain, lost, now_ms);
        assert!(words.contains("not replaced yet: it said no, next try 2027-01-16T08:00:45Z"), "{words}");
        assert_eq!(domain.due("one"), Some((now_ms, Task::Staple)), "nobody waits with that for the order");
        domain.held.as_mut().unwrap().ocsp.tell_ms = None;
        // Said again it changes nothing.
        let due = domain.certificate_due("one");
        domain.settle_staple(revoked, now_ms, 0, &limits);
        assert_eq!(domain.certificate_due("one"), due);
        // Each new one is revoked as soon as it is there.
        let fresh = |at_ms| Held { ocsp: Ocsp::default(), ..held(at_ms, 90) };
        domain.settle(Outcome::Issued(fresh(now_ms)), now_ms, 0, &limits);
        assert!(matches!(domain.state(now_ms), DomainState::Valid { .. }));
        domain.settle_staple(revoked, now_ms + 1, 0, &limits);
        assert_eq!(domain.certificate_due("one"), Some((now_ms + MIN_AGE_MS, Task::Order)));
        // What somebody brought nobody replaces.
        domain.import(fresh(now_ms));
        domain.settle_staple(revoked, now_ms, 0, &limits);
        assert!(domain.state(now_ms).to_string().ends_with("imported, not replaced"));
        assert_eq!(domain.certificate_due("one"), None);
    }

    #[test]
    fn a_record_that_knew_nothing_of_responders_is_read_and_its_responder_asked() {
        let mut record = serde_json::to_value(served()).unwrap();
        record.as_object_mut().unwrap().remove("revoked_order_ms");
        record["held"].as_object_mut().unwrap().remove("ocsp");
        let domain: Domain = serde_json::from_value(record).unwrap();
        assert_eq!(domain, served());
        let mut domain = served();
        domain.settle_staple(good(1, ADDED_MS), ADDED_MS, 0, &Limits::default());
        let read: Domain = serde_json::from_slice(&serde_json::to_vec(&domain).unwrap()).unwrap();
        assert_eq!(read, domain);
    }

    #[test]
    fn an_order_goes_before_an_expiring_certificate_and_that_before_a_new_name() {
        let limits = Limits::default();
        let (mut begun, mut soon, mut later, new) = (domain(), domain(), domain(), domain());
        begun.claim("one", "ca", ADDED_MS, &limits);
        soon.held = Some(held(ADDED_MS, 6));
        later.held = Some(held(ADDED_MS, 90));
        let mut all = [new.priority(), later.priority(), soon.priority(), begun.priority()];
        all.sort_unstable();
        assert_eq!(all, [begun.priority(), soon.priority(), later.priority(), new.priority()]);
    }

    #[test]
    fn an_order_is_its_holders_until_its_lease_ends_and_then_anybodys() {
        let limits = Limits::default();
        let mut domain = domain();
        domain.claim("one", "ca", ADDED_MS, &limits);
        assert_eq!(domain.due("one"), Some((0, Task::Order)), "after a restart it goes on at once");
        assert_eq!(domain.due("two"), Some((ADDED_MS + limits.lease_ms, Task::Order)));
        let fence = domain.fence;
        domain.hold("one", ADDED_MS + 1, &limits);
        assert_eq!(domain.fence, fence);
        domain.hold("two", ADDED_MS + limits.lease_ms, &limits);
        assert_eq!(domain.fence, fence + 1, "who takes it over fences the other off");
    }

    #[test]
    fn a_certificate_that_ends_soon_is_tried_for_more_often() {
        let limits = Limits::default();
        let mut domain = domain();
        domain.held = Some(held(ADDED_MS, 90));
        domain.failures = 30;
        let lost = || Outcome::Lost { why: String::new(), after_ms: None };
        let near_ms = ADDED_MS + 90 * DAY_MS - 3_600_000;
        domain.settle(lost(), near_ms, 0, &limits);
        assert_eq!(domain.next_try_ms - near_ms, 3_600_000 / 8);
        domain.settle(lost(), ADDED_MS, 0, &limits);
        assert_eq!(domain.next_try_ms - ADDED_MS, limits.retry_max_ms / 4 * 3);
    }

    proptest! {
        #[test]
        fn pauses_grow_and_stay_within_bounds(failures in 1u32.., bits: u64, base in 1u64..100_000, more in 0u64..100_000_000) {
            let max = base + more;
            let pause = back_off(base, max, failures, bits);
            prop_assert!(pause <= max + max / 4);
            prop_assert!(pause >= base - base / 4);
        }

        /// Whatever happens in whatever order: a domain that is automatic is due at some time, not before the authority's
        /// pause, and what is written is read.
        #[test]
        fn no_domain_is_forgotten(outcomes in proptest::collection::vec((0u8..5, any::<u64>(), 0u64..DAY_MS), 1..30)) {
            let limits = Limits::default();
            let mut domain = domain();
            let mut now_ms = ADDED_MS;
            for (kind, bits, passed_ms) in outcomes {
                now_ms += passed_ms;
                if domain.order.is_none() {
                    domain.claim("one", "ca", now_ms, &limits);
                }
                let after_ms = Some(bits % DAY_MS);
                let outcome = match kind {
                    0 => Outcome::Issued(held(now_ms, 90)),
                    1 => Outcome::WaitingForDns("dns".into()),
                    2 => Outcome::NotNow { why: "budget".into(), until_ms: now_ms + bits % DAY_MS },
                    3 => Outcome::GoesOn { why: "slow".into(), after_ms },
                    _ => Outcome::Lost { why: "no".into(), after_ms },
                };
                domain.settle(outcome, now_ms, bits, &limits);
                let (due_ms, _) = domain.due("one").expect("it is due at some time");
                if matches!(kind, 3 | 4) {
                    prop_assert!(due_ms >= now_ms + bits % DAY_MS, "Retry-After is kept to");
                }
                prop_assert!(due_ms <= now_ms + 91 * DAY_MS);
                let read: Domain = serde_json::from_slice(&serde_json::to_vec(&domain).unwrap()).unwrap();
                prop_assert_eq!(&read, &domain);
                prop_assert!(!domain.state(now_ms).to_string().is_empty());
            }
        }
    }
}
