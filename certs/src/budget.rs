//! Token budgets: how many orders an authority gets from this installation, in all and for one registered domain. They are
//! records, so that a restart does not fill them. Some tokens are kept for certificates that expire.

use serde::{Deserialize, Serialize};

/// So many orders in so much time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetLimit {
    /// Orders.
    pub orders: u32,
    /// In this time.
    pub window_ms: u64,
}

/// The share of a budget that only renewals may use: one of this many.
const RESERVED_SHARE: u64 = 5;
/// A token is counted in thousandths, so that it comes back bit by bit.
const TOKEN: u64 = 1000;

/// What is left of a budget. A record of the vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Budget {
    thousandths: u64,
    at_ms: u64,
}

impl Budget {
    pub(crate) fn full(limit: BudgetLimit, now_ms: u64) -> Self {
        Self { thousandths: u64::from(limit.orders) * TOKEN, at_ms: now_ms }
    }

    /// Takes one token, or says when there is one.
    pub(crate) fn take(&mut self, limit: BudgetLimit, renewal: bool, now_ms: u64) -> Result<(), u64> {
        let capacity = u64::from(limit.orders) * TOKEN;
        let window_ms = limit.window_ms.max(1);
        // A clock that was ahead and was set right: what it had written must not last until then.
        self.at_ms = self.at_ms.min(now_ms);
        let passed_ms = now_ms.saturating_sub(self.at_ms);
        let back = u128::from(passed_ms) * u128::from(capacity) / u128::from(window_ms);
        let back = u64::try_from(back).unwrap_or(u64::MAX);
        let there = self.thousandths.saturating_add(back).min(capacity);
        let reserve = if renewal || limit.orders < 2 { 0 } else { (capacity / RESERVED_SHARE).max(TOKEN) };
        let needed = TOKEN + reserve;
        if there < needed {
            if capacity < needed {
                return Err(u64::MAX);
            }
            let missing = u128::from(needed - there) * u128::from(window_ms);
            let wait_ms = missing.div_ceil(u128::from(capacity));
            return Err(now_ms.saturating_add(u64::try_from(wait_ms).unwrap_or(u64::MAX)));
        }
        // What has come back by halves stays: time is only counted off when something of it was used.
        if back > 0 || there == capacity {
            self.at_ms = now_ms;
        }
        self.thousandths = there - TOKEN;
        Ok(())
    }

    /// Gives a token back that was not used.
    pub(crate) fn give_back(&mut self, limit: BudgetLimit) {
        let capacity = u64::from(limit.orders) * TOKEN;
        self.thousandths = self.thousandths.saturating_add(TOKEN).min(capacity);
    }
}

/// The domain that somebody registered: the label before the public suffix. What has none is its last two labels.
pub(crate) fn registered_domain(name: &str) -> &str {
    if let Some(domain) = psl::domain_str(name) {
        return domain;
    }
    let mut dots = name.rmatch_indices('.');
    match dots.nth(1) {
        Some((at, _)) => &name[at + 1..],
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: BudgetLimit = BudgetLimit { orders: 10, window_ms: 10_000 };

    #[test]
    fn the_registered_domain_is_the_label_before_the_public_suffix() {
        for (name, domain) in [
            ("shop.example.com", "example.com"),
            ("a.b.example.co.uk", "example.co.uk"),
            ("someone.github.io", "someone.github.io"),
            ("example.com", "example.com"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(registered_domain(name), domain);
        }
    }

    #[test]
    fn a_budget_keeps_a_fifth_for_renewals_and_says_when_there_is_a_token_again() {
        let mut budget = Budget::full(LIMIT, 0);
        for _ in 0..8 {
            budget.take(LIMIT, false, 0).unwrap();
        }
        assert_eq!(budget.take(LIMIT, false, 0), Err(1_000), "one token a second");
        budget.take(LIMIT, true, 0).unwrap();
        budget.take(LIMIT, true, 0).unwrap();
        assert_eq!(budget.take(LIMIT, true, 0), Err(1_000));
        assert_eq!(budget.take(LIMIT, true, 999), Err(1_000));
        budget.take(LIMIT, true, 1_000).unwrap();
        assert_eq!(budget.take(LIMIT, true, 1_000), Err(2_000));
    }

    #[test]
    fn a_clock_that_was_ahead_for_a_while_stops_no_budget() {
        let mut budget = Budget::full(LIMIT, 0);
        (0..10).for_each(|_| budget.take(LIMIT, true, 1_000_000).unwrap());
        assert_eq!(budget.take(LIMIT, true, 5_000), Err(6_000), "one token a second from now on");
        assert_eq!(budget.take(LIMIT, true, 6_000), Ok(()));
    }

    #[test]
    fn a_token_that_was_given_back_can_be_taken_again_and_none_is_made() {
        let mut budget = Budget::full(LIMIT, 0);
        (0..10).for_each(|_| budget.take(LIMIT, true, 0).unwrap());
        budget.give_back(LIMIT);
        budget.take(LIMIT, true, 0).unwrap();
        assert!(budget.take(LIMIT, true, 0).is_err());
        (0..20).for_each(|_| budget.give_back(LIMIT));
        assert_eq!((0..20).filter(|_| budget.take(LIMIT, true, 0).is_ok()).count(), 10);
    }

    #[test]
    fn in_no_window_more_is_taken_than_the_budget_and_what_came_back() {
        let mut budget = Budget::full(LIMIT, 0);
        let taken = (0..20_000u64).filter(|ms| budget.take(LIMIT, true, *ms).is_ok()).count();
        assert_eq!(taken, 10 + 19, "ten at once, then one a second");
        budget.take(LIMIT, true, 1_000_000).unwrap();
        let left = (0..20).filter(|_| budget.take(LIMIT, true, 1_000_000).is_ok()).count();
        assert_eq!(left, 9, "it does not fill beyond its capacity");
    }
}
