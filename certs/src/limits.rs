//! Every limit of this room, with its default.

/// Times and numbers that the manager keeps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long an order belongs to the manager that began it without a word from that one.
    pub lease_ms: u64,
    /// First pause after a failure; doubles with each further one.
    pub retry_ms: u64,
    /// Longest pause after a failure.
    pub retry_max_ms: u64,
    /// First pause when the name does not lead here yet.
    pub dns_retry_ms: u64,
    /// Longest pause when the name does not lead here.
    pub dns_retry_max_ms: u64,
    /// First pause when an order is hindered.
    pub order_retry_ms: u64,
    /// Longest pause when an order is hindered.
    pub order_retry_max_ms: u64,
    /// How long an authority that does not answer keeps an order before the next authority is asked, if there is one
    /// and no certificate was asked for yet.
    pub order_patience_ms: u64,
    /// The same once the certificate was asked for: it may exist.
    pub finalize_patience_ms: u64,
    /// How long one attempt waits for an authority to validate or to issue, before it is continued later.
    pub poll_patience_ms: u64,
    /// How long a record of DNS-01 may take until the resolver sees it.
    pub dns_propagation_ms: u64,
    /// Orders under way at once.
    pub max_orders: usize,
    /// First pause after a responder gave no staple; doubles with each further failure.
    pub staple_retry_ms: u64,
    /// Longest pause after a responder gave no staple, and between two questions for a certificate that was revoked.
    pub staple_retry_max_ms: u64,
    /// First pause for an authority that does not answer; doubles with each further failure.
    pub ca_pause_ms: u64,
    /// Longest pause for an authority that does not answer.
    pub ca_pause_max_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lease_ms: 120_000,
            retry_ms: 60_000,
            // An authority allows five failed validations an hour and name, typically.
            retry_max_ms: 6 * 3_600_000,
            dns_retry_ms: 15_000,
            dns_retry_max_ms: 900_000,
            order_retry_ms: 5_000,
            order_retry_max_ms: 600_000,
            order_patience_ms: 30_000,
            finalize_patience_ms: 24 * 3_600_000,
            poll_patience_ms: 90_000,
            dns_propagation_ms: 120_000,
            max_orders: 8,
            staple_retry_ms: 60_000,
            staple_retry_max_ms: 3_600_000,
            ca_pause_ms: 10_000,
            ca_pause_max_ms: 600_000,
        }
    }
}
