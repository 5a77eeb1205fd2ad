//! What there is to measure of domains that were added. Taken when somebody asks for it.
//!
//! A line for each domain is written here and not kept by the recorder, which would show one that was removed for ever.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use metrics::{counter, describe_counter, describe_gauge, gauge};
use peregrine_certs::{DomainState, DomainView, Manager};

/// Domains that have a line of their own: those whose certificates end first.
const MAX_DOMAINS: usize = 10_000;
const NOT_AFTER: &str = "peregrine_certificate_not_after_seconds";

/// States as metrics have them: every one is there, also where it is nobody's.
const STATES: [&str; 8] =
    ["new", "waiting_for_dns", "waiting", "ordering", "valid", "expired", "failed", "revoked"];

/// Says what each is.
pub(crate) fn describe() {
    describe_gauge!("peregrine_domains", "Domains that were added or got a certificate on demand, by state");
    describe_gauge!(
        "peregrine_certificate_next_renewal_seconds",
        "Unix time of the next renewal that is planned; 0 without one"
    );
    describe_counter!(
        "peregrine_certificate_orders_total",
        "Attempts to get a certificate, by how they ended"
    );
}

/// Tells the recorder what is of all of them, and returns the lines of single domains.
#[expect(clippy::cast_precision_loss, reason = "gauges")]
pub(crate) fn measure(manager: &Manager) -> String {
    let views = manager.list();
    let mut states: BTreeMap<&str, u64> = STATES.into_iter().map(|state| (state, 0)).collect();
    for view in &views {
        *states.entry(state(&view.state)).or_default() += 1;
    }
    for (state, count) in states {
        gauge!("peregrine_domains", "state" => state).set(count as f64);
    }
    let next_ms = views.iter().filter_map(renews_ms).min().unwrap_or(0);
    gauge!("peregrine_certificate_next_renewal_seconds").set((next_ms / 1_000) as f64);
    let counts = manager.counts();
    for (outcome, count) in [
        ("issued", counts.issued),
        ("failed", counts.failed),
        ("waited_for_dns", counts.waited_for_dns),
        ("put_off", counts.put_off),
        ("continued", counts.continued),
    ] {
        counter!("peregrine_certificate_orders_total", "outcome" => outcome).absolute(count);
    }
    lines(&views)
}

/// In the text format of Prometheus. Names have no character that would have to be escaped.
fn lines(views: &[DomainView]) -> String {
    let mut ends: Vec<_> = views.iter().filter_map(|view| Some((view.not_after_ms?, &view.name))).collect();
    if ends.is_empty() {
        return String::new();
    }
    ends.sort_unstable();
    ends.truncate(MAX_DOMAINS);
    let mut text = format!(
        "# HELP {NOT_AFTER} Unix time at which the certificate of a domain ends\n# TYPE {NOT_AFTER} gauge\n"
    );
    for (not_after_ms, name) in ends {
        // Into a string nothing fails.
        let _ = writeln!(text, "{NOT_AFTER}{{domain=\"{name}\"}} {}", not_after_ms / 1_000);
    }
    text.push('\n');
    text
}

const fn state(state: &DomainState) -> &'static str {
    match state {
        DomainState::New => STATES[0],
        DomainState::WaitingForDns { .. } => STATES[1],
        DomainState::Waiting { .. } => STATES[2],
        DomainState::Ordering { .. } => STATES[3],
        DomainState::Valid { .. } => STATES[4],
        DomainState::Expired { .. } => STATES[5],
        DomainState::Failed { .. } => STATES[6],
        DomainState::Revoked { .. } => STATES[7],
    }
}

const fn renews_ms(view: &DomainView) -> Option<u64> {
    match &view.state {
        DomainState::Valid { renews_ms, .. } => *renews_ms,
        _ => None,
    }
}
