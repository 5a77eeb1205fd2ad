//! The pace of a release: as many per second as were asked for, and never so few that the queue grows.

/// A release that was kept from going on for longer than this does not make up for it: the pace stays a pace.
const MAX_CATCH_UP_US: u64 = 10_000;
/// The pace that was asked for doubles each time that a release has lasted for so long: every queue has an end.
const DOUBLES_EVERY_US: u64 = 5_000_000;
/// A rate is taken over no less than this.
const SECOND_US: u64 = 1_000_000;
/// Beyond the rate at which requests come: while some wait all others queue behind them, and the queue has to shrink.
const ARRIVALS_FACTOR: u64 = 2;

/// How often requests come, from the beginning of a hold to the end of its release.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// When it was first looked at; `None` before that.
    since_us: Option<u64>,
    total: u64,
    /// Where the second that is under way began.
    second_us: u64,
    this_second: u64,
    last_second: u64,
}

impl Arrivals {
    /// From now on it is measured.
    pub(super) const fn begin(&mut self, now_us: u64) {
        if self.since_us.is_none() {
            (self.since_us, self.second_us) = (Some(now_us), now_us);
        }
    }

    /// A request has come.
    pub(super) fn note(&mut self, now_us: u64) {
        self.begin(now_us);
        self.roll(now_us);
        self.total += 1;
        self.this_second += 1;
    }

    fn roll(&mut self, now_us: u64) {
        let lasted_us = now_us.saturating_sub(self.second_us);
        if lasted_us >= SECOND_US {
            self.last_second = if lasted_us < 2 * SECOND_US { self.this_second } else { 0 };
            self.this_second = 0;
            self.second_us = now_us - lasted_us % SECOND_US;
        }
    }

    /// Requests per second: over all of the time or over the last second, whichever are more. 0 while no second has passed.
    fn per_s(&mut self, now_us: u64) -> u64 {
        self.roll(now_us);
        let lasted_us = now_us.saturating_sub(self.since_us.unwrap_or(now_us));
        if lasted_us < SECOND_US {
            return 0;
        }
        (self.total.saturating_mul(SECOND_US) / lasted_us).max(self.last_second)
    }
}

/// The pace of a release.
#[derive(Debug, Default)]
pub(super) struct Release {
    per_s: u32,
    /// When it began; `None` before the first turn of it.
    since_us: Option<u64>,
    /// When the next request may go.
    pub(super) due_us: u64,
}

impl Release {
    pub(super) const fn new(per_s: u32) -> Self {
        Self { per_s, since_us: None, due_us: 0 }
    }

    /// It goes on, if it had not begun already.
    pub(super) fn go_on(&mut self, now_us: u64) {
        if self.since_us.is_none() {
            self.since_us = Some(now_us);
            self.due_us = now_us;
        }
        self.due_us = self.due_us.max(now_us.saturating_sub(MAX_CATCH_UP_US));
    }

    /// Time between two requests.
    pub(super) fn interval_us(&self, now_us: u64, arrivals: &mut Arrivals) -> u64 {
        let lasted_us = now_us.saturating_sub(self.since_us.unwrap_or(now_us));
        let doubled = u32::try_from(lasted_us / DOUBLES_EVERY_US).unwrap_or(u32::MAX).min(32);
        let asked_per_s = u64::from(self.per_s.max(1)) << doubled;
        let per_s = asked_per_s.max(arrivals.per_s(now_us).saturating_mul(ARRIVALS_FACTOR));
        (SECOND_US / per_s).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_all_the_time_or_of_the_last_second_whichever_is_more() {
        let mut arrivals = Arrivals::default();
        arrivals.begin(0);
        (0..500).for_each(|n| arrivals.note(n * 1_000));
        assert_eq!(arrivals.per_s(999_999), 0, "nothing is known before a second has passed");
        assert_eq!(arrivals.per_s(1_000_000), 500);
        assert_eq!(arrivals.per_s(5_000_000), 100, "nobody came any more");
        (0..3_000).for_each(|n| arrivals.note(5_000_000 + n * 300));
        assert_eq!(arrivals.per_s(6_000_000), 3_000, "not the average of a time when nobody came");
        assert_eq!(arrivals.per_s(8_000_000), 3_500 / 8);
    }
}
