//! Retry classes and the retry budget. What is safe to send again is decided here, by evidence.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What is known of a request that got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// Not one byte of it was written: the dial failed, or the connection was found closed.
    NotSent,
    /// The upstream says that it did not process it: HTTP/2 `REFUSED_STREAM` (RFC 9113 §8.7).
    NotProcessed,
    /// The upstream was leaving the connection, and says that it did not process it: a stream above the last one
    /// named by GOAWAY (RFC 9113 §6.8). No sign of distress, and everything that was under way comes at once: it
    /// is no retry that the budget is there to bound.
    LeftBehind,
    /// It was written, whole or in part, and the connection broke before the first byte of an answer.
    Ambiguous,
    /// A byte of the answer has gone to the client.
    Committed,
}

/// What may be done about it; the classes of `docs/life-of-a-request.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryClass {
    /// Not sent: any method may be tried again, on another instance first.
    A,
    /// Provably not processed: any method.
    B,
    /// Ambiguous: idempotent methods only, and only with a body that can be replayed.
    C,
    /// Committed: never.
    D,
}

impl Evidence {
    /// The class of this evidence.
    #[must_use]
    pub const fn class(self) -> RetryClass {
        match self {
            Self::NotSent => RetryClass::A,
            Self::NotProcessed | Self::LeftBehind => RetryClass::B,
            Self::Ambiguous => RetryClass::C,
            Self::Committed => RetryClass::D,
        }
    }
}

/// Share of requests that may be retries.
const RETRY_PERCENT: u64 = 20;
/// Retries that are always allowed, for services with little traffic.
const FLOOR_PER_SECOND: u64 = 10;
/// Savings are bounded to so many seconds of the floor, so that a quiet hour does not pay for a storm.
const MAX_SAVED_SECONDS: u64 = 10;
/// One retry, in the unit of account: a request earns [`RETRY_PERCENT`] of them.
const RETRY_COST: u64 = 100;

/// A token bucket: 20 % of requests plus 10 per second. Shared by the cores of an edge, lock-free.
#[derive(Debug)]
pub struct RetryBudget {
    /// Hundredths of a retry.
    tokens: AtomicU64,
    /// When the floor was last paid in.
    paid_until_ms: AtomicU64,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { tokens: AtomicU64::new(FLOOR_PER_SECOND * RETRY_COST), paid_until_ms: AtomicU64::new(0) }
    }
}

impl RetryBudget {
    /// Counts a request that came in from a client.
    pub fn earn(&self) {
        if self.tokens.load(Relaxed) < max_tokens() {
            self.tokens.fetch_add(RETRY_PERCENT, Relaxed);
        }
    }

    /// Takes one retry; false means that the budget is spent and the failure has to be told.
    pub fn spend(&self, now_ms: u64) -> bool {
        self.pay_floor(now_ms);
        self.tokens.fetch_update(Relaxed, Relaxed, |tokens| tokens.checked_sub(RETRY_COST)).is_ok()
    }

    fn pay_floor(&self, now_ms: u64) {
        let before = self.paid_until_ms.load(Relaxed);
        let elapsed_ms = now_ms.saturating_sub(before).min(MAX_SAVED_SECONDS * 1_000);
        let pay = elapsed_ms * FLOOR_PER_SECOND * RETRY_COST / 1_000;
        // One of several cores pays; the others see that it was done.
        if pay > 0 && self.paid_until_ms.compare_exchange(before, now_ms, Relaxed, Relaxed).is_ok() {
            let _ =
                self.tokens.fetch_update(Relaxed, Relaxed, |tokens| Some((tokens + pay).min(max_tokens())));
        }
    }
}

const fn max_tokens() -> u64 {
    FLOOR_PER_SECOND * MAX_SAVED_SECONDS * RETRY_COST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_below_a_fifth_of_requests_and_the_floor() {
        let budget = RetryBudget::default();
        let mut retries = 0;
        for i in 0..100_000_u64 {
            budget.earn();
            if budget.spend(i / 10) {
                retries += 1;
            }
        }
        let seconds = 10;
        let allowed = 100_000 * RETRY_PERCENT / 100 + FLOOR_PER_SECOND * (seconds + MAX_SAVED_SECONDS);
        assert!(retries <= allowed, "{retries} retries of 100,000 requests");
        assert!(retries >= 100_000 * RETRY_PERCENT / 100, "the budget is there to be used: {retries}");
    }

    #[test]
    fn a_quiet_service_may_still_retry() {
        let budget = RetryBudget::default();
        assert!(budget.spend(1));
    }
}
