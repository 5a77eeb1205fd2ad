//! What a service asks of its requests before they may go on, and what is changed of them and their answers on the way:
//! plain data, and nothing for a service without.

mod answers;
mod auth;
mod headers;
mod redirect;

use std::net::IpAddr;
use std::sync::Arc;

use crate::net::IpNet;

pub use answers::{Coding, Compression, ErrorPage};
pub use auth::{BasicAuth, ForwardAuth, PasswordHash, PasswordHashError};
pub use headers::{HeaderEdits, is_guarded_field};
pub use redirect::{Redirect, Rewrite};

/// Rules of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Networks whose clients are served; empty: all of them.
    pub allow: Vec<IpNet>,
    /// Networks whose clients are not served, also if they are allowed. Where there are any, a client whose address
    /// cannot be read is not served either.
    pub deny: Vec<IpNet>,
    /// Requests in flight at a time over all upstreams; 0 is no limit. Cores look at the sum each for itself, so a burst
    /// may go above it by one for each core.
    pub max_in_flight: u32,
    /// Requests of one client over time.
    pub rate: Option<RateLimit>,
    /// Changes of a request's fields on the way to the origin.
    pub request_headers: HeaderEdits,
    /// Changes of an answer's fields on the way to the client.
    pub response_headers: HeaderEdits,
    /// Paths that lead elsewhere; the first that fits counts.
    pub redirects: Vec<Redirect>,
    /// Another path for the origin.
    pub rewrite: Option<Rewrite>,
    /// A password.
    pub basic_auth: Option<BasicAuth>,
    /// Another server that is asked.
    pub forward_auth: Option<ForwardAuth>,
    /// Smaller answers.
    pub compression: Option<Compression>,
    /// Pages in place of the edge's own.
    pub error_pages: Vec<ErrorPage>,
}

/// So many requests of one key in a time, evenly, with bursts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests …
    pub requests: u32,
    /// … in this time, in milliseconds.
    pub per_ms: u32,
    /// Requests that may come at once, at least 1.
    pub burst: u32,
    /// What requests are counted by.
    pub by: RateKey,
}

/// What requests are counted by. A request without the header or cookie is counted by its client's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RateKey {
    /// The client's address; of IPv6 its /64.
    ClientAddress,
    /// The value of a header.
    Header(Arc<str>),
    /// The value of a cookie.
    Cookie(Arc<str>),
}

impl Rules {
    /// Whether a client is served. The unspecified address (`0.0.0.0`, `::`) is that of a client whose own cannot be read: it
    /// may be anybody's, so it is served only where nobody is asked for it.
    #[must_use]
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        if client.is_unspecified() {
            return self.allow.is_empty() && self.deny.is_empty();
        }
        let holds = |nets: &[IpNet]| nets.iter().any(|net| net.contains(client));
        !holds(&self.deny) && (self.allow.is_empty() || holds(&self.allow))
    }
}

impl RateLimit {
    /// Decides on a request at `now_us` by the generic cell rate algorithm: `state_us` is the moment at which the key will
    /// have used up nothing, 0 for a new one. The new state, or the microseconds until the next request fits.
    ///
    /// # Errors
    /// How long to wait.
    pub fn take(&self, state_us: u64, now_us: u64) -> Result<u64, u64> {
        let interval_us = u64::from(self.per_ms) * 1_000 / u64::from(self.requests.max(1));
        let most_us = interval_us * u64::from(self.burst.max(1));
        let next_us = state_us.max(now_us) + interval_us;
        match (next_us - now_us).checked_sub(most_us) {
            None | Some(0) => Ok(next_us),
            Some(wait_us) => Err(wait_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect("a network")).collect()
    }

    #[test]
    fn who_is_denied_is_not_served_even_if_he_is_allowed() {
        let rules =
            Rules { allow: nets(&["10.0.0.0/8", "::1"]), deny: nets(&["10.1.0.0/16"]), ..Rules::default() };
        for (client, served) in [
            ("10.2.3.4", true),
            ("::ffff:10.2.3.4", true),
            ("10.1.3.4", false),
            ("::1", true),
            ("192.0.2.1", false),
        ] {
            assert_eq!(rules.admits(client.parse().expect("address")), served, "{client}");
        }
        assert!(Rules::default().admits("192.0.2.1".parse().expect("address")));
        let rules = Rules { deny: nets(&["0.0.0.0/0", "::/0"]), ..Rules::default() };
        assert!(!rules.admits("192.0.2.1".parse().expect("address")));
    }

    #[test]
    fn a_client_whose_address_cannot_be_read_is_served_only_where_nobody_is_asked_for_it() {
        let asks = |allow: &[&str], deny: &[&str]| Rules {
            allow: nets(allow),
            deny: nets(deny),
            max_in_flight: 1,
            ..Rules::default()
        };
        for nobody in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
            let nobody = nobody.parse().expect("address");
            assert!(asks(&[], &[]).admits(nobody));
            for rules in
                [asks(&[], &["192.0.2.7"]), asks(&["10.0.0.0/8"], &[]), asks(&["0.0.0.0/0", "::/0"], &[])]
            {
                assert!(!rules.admits(nobody), "{rules:?}");
            }
        }
    }

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate_holds() {
        let limit = RateLimit { requests: 10, per_ms: 1_000, burst: 3, by: RateKey::ClientAddress };
        let (mut state, mut passed) = (0, Vec::new());
        for ms in 5_000..6_000_u64 {
            match limit.take(state, ms * 1_000) {
                Ok(next) => {
                    state = next;
                    passed.push(ms - 5_000);
                }
                Err(wait_us) => assert!((1..=100_000).contains(&wait_us)),
            }
        }
        assert_eq!(passed, [0, 1, 2, 100, 200, 300, 400, 500, 600, 700, 800, 900]);
        let now_us = 6_000_000;
        let wait_us = limit.take(state, now_us - 1).expect_err("is too early");
        assert!(limit.take(state, now_us - 1 + wait_us).is_ok(), "what was said is true");
    }
}
