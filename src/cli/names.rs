//! Names that are served over TLS, as `status` and `doctor` show them: how many stand how, and those that deserve a look.

use std::collections::BTreeMap;

use jiff::Timestamp;
use peregrine_api::types::{Domain, DomainState};
use serde::Serialize;

use super::human;
use super::output::Output;
use super::render;
use super::session::Session;
use super::table::{Table, clean};

const DAY_MS: u64 = 24 * 3_600_000;
/// A certificate that nobody renews by itself is told of for so long before its end: orders and approvals take days.
const IMPORTED_ENDS_SOON_MS: u64 = 21 * DAY_MS;
/// One that is renewed by itself is renewed when a third of its life is left, two days at the shortest lives (6 days).
const RENEWED_ENDS_SOON_MS: u64 = DAY_MS;
/// Failures of a renewal matter more when so little is left.
const FAILING_ENDS_SOON_MS: u64 = 7 * DAY_MS;
/// Names that one page shows with their reasons; the others are counted.
pub(crate) const MAX_SHOWN: usize = 10;

/// How the names stand.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Names {
    /// How many are in each state.
    pub(crate) by_state: BTreeMap<String, usize>,
    /// Those that deserve a look, the worst first, then those that end first.
    pub(crate) concerns: Vec<Concern>,
}

/// A name that deserves a look.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Concern {
    /// Clients get no certificate, or soon will get none.
    pub(crate) urgent: bool,
    /// End of the certificate that it has.
    pub(crate) not_after: Option<Timestamp>,
    /// Name.
    pub(crate) domain: String,
    /// How it stands.
    pub(crate) state: DomainState,
    /// The server's words for it.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) fix: String,
}

impl Names {
    /// Asks the server. `None` if it cannot say: one of an earlier version.
    pub(crate) async fn ask(session: &Session, now: Timestamp) -> Option<Self> {
        let domains = session.ask("reading the domains", session.client.domains()).await.ok()?;
        Some(Self::of(&domains, now))
    }

    pub(crate) fn of(domains: &[Domain], now: Timestamp) -> Self {
        let mut by_state = BTreeMap::new();
        for domain in domains {
            *by_state.entry(render::word(domain.state)).or_default() += 1;
        }
        let mut concerns: Vec<_> = domains.iter().filter_map(|domain| concern(domain, now)).collect();
        let order = |one: &Concern| (!one.urgent, one.not_after, one.domain.clone());
        concerns.sort_by_key(order);
        Self { by_state, concerns }
    }

    /// `12 valid, 1 failed`.
    pub(crate) fn counts(&self) -> String {
        let counts =
            self.by_state.iter().map(|(state, count)| format!("{} {state}", human::count(*count as u64)));
        counts.collect::<Vec<_>>().join(", ")
    }

    /// A section of a page; empty if there is no name.
    pub(crate) fn section(&self, out: &Output) -> String {
        if self.by_state.is_empty() {
            return String::new();
        }
        let mut text = format!("\ndomains: {}\n", self.counts());
        if self.concerns.is_empty() {
            return text;
        }
        let mut table = Table::new(&["domain", "state", "until", "what"]);
        for concern in self.concerns.iter().take(MAX_SHOWN) {
            table.row(vec![
                concern.domain.clone(),
                render::word(concern.state),
                concern.not_after.map_or_else(|| "-".to_owned(), human::moment),
                concern.message.clone(),
            ]);
        }
        text.push_str(&format!("{}\n", table.render(out)));
        if self.concerns.len() > MAX_SHOWN {
            let more = human::count((self.concerns.len() - MAX_SHOWN) as u64);
            text.push_str(&format!("and {more} more: peregrine domains list\n"));
        }
        text
    }
}

fn concern(domain: &Domain, now: Timestamp) -> Option<Concern> {
    let left_ms = domain.not_after.map(|end| human::millis_between(now, end));
    let ends_within = |ms: u64| left_ms.is_some_and(|left_ms| left_ms < ms);
    let name = clean(&domain.name);
    let look = || format!("`peregrine domains check {name}` looks from outside; it is tried again by itself");
    let bring = || format!("bring a new one: peregrine certs import {name} --chain FILE --key FILE");
    let (urgent, fix) = match domain.state {
        DomainState::Expired => (true, bring()),
        DomainState::Failed => (true, look()),
        DomainState::WaitingForDns | DomainState::Waiting => (false, look()),
        _ if !domain.automatic && ends_within(IMPORTED_ENDS_SOON_MS) => {
            (ends_within(FAILING_ENDS_SOON_MS), bring())
        }
        _ if domain.failures > 0 => (ends_within(FAILING_ENDS_SOON_MS), look()),
        _ if domain.automatic && ends_within(RENEWED_ENDS_SOON_MS) => (true, look()),
        _ => return None,
    };
    Some(Concern {
        urgent,
        not_after: domain.not_after,
        domain: domain.name.clone(),
        state: domain.state,
        message: domain.message.clone(),
        fix,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::output::Surroundings;

    pub(crate) fn now() -> Timestamp {
        "2026-01-31T12:00:00Z".parse().expect("a time")
    }

    /// A domain whose certificate ends in so many hours, if it has one.
    pub(crate) fn domain(name: &str, state: &str, ends_in_h: Option<i64>) -> Domain {
        let end = ends_in_h.map(|hours| now() + jiff::SignedDuration::from_hours(hours));
        serde_json::from_value(json!({"name": name, "state": state, "message": format!("{state}: why"),
            "origin": "added", "automatic": true, "certificate": null, "not_after": end, "failures": 0,
            "redirect": true, "hsts": null, "client_auth": null, "added_at": "2026-01-01T12:00:00Z"}))
        .expect("a domain")
    }

    fn page(names: &Names) -> String {
        names.section(&Output::new(&[], Surroundings::default()))
    }

    #[test]
    fn names_are_counted_by_state_and_those_that_fail_or_end_soon_are_told_with_their_reason() {
        let failing = Domain { failures: 3, ..domain("failing.test", "valid", Some(24 * 20)) };
        let failing_long = Domain { failures: 9, ..domain("failing-long.test", "valid", Some(24 * 6)) };
        let imported = Domain { automatic: false, ..domain("imported.test", "valid", Some(24 * 20)) };
        let fresh = Domain { automatic: false, ..domain("fresh.test", "valid", Some(24 * 22)) };
        let names = Names::of(
            &[
                domain("well.test", "valid", Some(24 * 60)),
                domain("short.test", "valid", Some(25)),
                fresh,
                domain("ordering.test", "ordering", None),
                failing,
                domain("dns.test", "waiting_for_dns", None),
                domain("failed.test", "failed", None),
                imported,
                failing_long,
                domain("stuck.test", "valid", Some(23)),
                Domain { automatic: false, ..domain("over.test", "expired", Some(-1)) },
            ],
            now(),
        );
        let told: Vec<_> = names.concerns.iter().map(|one| (&*one.domain, one.urgent)).collect();
        assert_eq!(
            told,
            [
                ("failed.test", true),
                ("over.test", true),
                ("stuck.test", true),
                ("failing-long.test", true),
                ("dns.test", false),
                ("failing.test", false),
                ("imported.test", false),
            ]
        );
        assert_eq!(names.counts(), "1 expired, 1 failed, 1 ordering, 7 valid, 1 waiting_for_dns");
        let text = page(&names);
        assert!(text.starts_with("\ndomains: 1 expired, 1 failed"), "{text}");
        assert!(text.contains("failed.test\tfailed\t-\tfailed: why"), "{text}");
        assert!(!text.contains("well.test") && !text.contains("short.test"), "{text}");
    }

    #[test]
    fn where_all_is_well_there_is_one_line_and_without_names_none() {
        assert_eq!(page(&Names::of(&[], now())), "");
        let well = [domain("a.test", "valid", Some(24 * 60)), domain("b.test", "valid", Some(24 * 60))];
        assert_eq!(page(&Names::of(&well, now())), "\ndomains: 2 valid\n");
    }

    #[test]
    fn of_many_names_that_fail_a_page_shows_a_few_and_counts_the_others() {
        let all: Vec<_> =
            (0..MAX_SHOWN + 3).map(|n| domain(&format!("{n:02}.test"), "failed", None)).collect();
        let text = page(&Names::of(&all, now()));
        assert!(text.contains("09.test") && !text.contains("10.test"), "{text}");
        assert!(text.ends_with("and 3 more: peregrine domains list\n"), "{text}");
    }
}
