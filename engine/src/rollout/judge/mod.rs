//! The verdict on a shift: the new copies compared with the old ones, measured at the same time.
//!
//! Pure: counts and times are handed in. The verdict has three values. *Fail* needs evidence that chance hardly
//! ever makes, reckoned over all the looks at all the steps of a shift: both tests are e-processes, which may be
//! looked at whenever one likes (`chance.rs`). *Pass* needs enough requests and nothing that speaks against the
//! new copies. Everything else is *inconclusive*: a lack of data, or a suspicion, which holds the step.
//!
//! * **Errors** (`errors.rs`). Time is cut into blocks. Given how many requests failed in a block, how the
//!   failures fall on the two sides depends on the odds ratio alone. The bet is on odds ratios of 2 to 256
//!   (a mixture of Wald's probability ratios over Fisher's noncentral hypergeometric distribution; compare Turner,
//!   Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for optional stopping",
//!   2021). Fail: odds of 50 to 1, two failures at least, and a difference above `error_ratio_increase`. Where
//!   the old copies get nothing (at 100 %), a bet against the highest rate that would be fine.
//! * **Latency** (`latency.rs`). Requests of the same moment are slow together, so the unit is a block of at
//!   least 200 ms, not a request. A block is slow if a lower bound of the new p95 (an order statistic,
//!   distribution-free) is above the old p95 of the same block by more than `p95_increase` and 5 ms. The bet is
//!   on more slow blocks than the quarter that is granted to equal copies on a busy machine. Fail: odds of 100 to 1.
//!
//! So of 100 shifts of equal copies, at most 2 + 1 + 1 are expected to be stopped.

mod chance;
mod errors;
mod latency;
mod mirrored;
#[cfg(test)]
mod tests;

use peregrine_routing::OutcomeCounts;

use self::errors::{Errors, Finding, Table};
use self::latency::Latency;
pub(crate) use self::mirrored::MirrorJudge;
use crate::model::Guards;

/// A step that lasts is looked at afresh so often, so that what went well for long hides nothing.
const RESTART_MS: u64 = 60_000;

/// What is to be thought of a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    /// Enough was seen, and nothing speaks against the new copies.
    Pass,
    /// The new copies do worse; with the numbers.
    Fail(String),
    /// Too few requests for a verdict.
    TooFew,
    /// Something speaks against the new copies, and it may be chance; with the numbers.
    Suspicion(String),
}

/// What has to be known to judge a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) guards: &'a Guards,
    /// Answers of the new copies in this step without which there is no verdict.
    pub(crate) min_samples: u64,
    /// The old copies get a share of the traffic too.
    pub(crate) side_by_side: bool,
}

/// Both sides' counts, since the rollout began.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) new: OutcomeCounts,
    pub(crate) old: OutcomeCounts,
}

/// What was seen in one shift so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Judge {
    errors: Errors,
    latency: Latency,
    /// When the present step began.
    step: Reading,
    begun: bool,
    restarted_at_ms: u64,
}

impl Judge {
    /// A step begins. Times are in milliseconds of one monotonic clock.
    pub(crate) fn begin_step(&mut self, at_ms: u64, now: Reading) {
        if self.begun {
            self.restart(at_ms);
        } else {
            self.errors = Errors::begin(at_ms, Table::of(&now.new, &now.old));
            self.latency = Latency::begin(at_ms, &now.new.latency, &now.old.latency);
            (self.begun, self.restarted_at_ms) = (true, at_ms);
        }
        self.step = now;
    }

    /// Takes in what was measured up to now.
    pub(crate) fn look(&mut self, at_ms: u64, now: &Reading, guards: &Guards) {
        self.errors.look(at_ms, Table::of(&now.new, &now.old));
        if let Some(increase) = guards.p95_increase {
            self.latency.look(at_ms, &now.new.latency, &now.old.latency, increase);
        }
        if at_ms.saturating_sub(self.restarted_at_ms) >= RESTART_MS {
            self.restart(at_ms);
        }
    }

    /// What is to be thought of the present step after the looks so far.
    pub(crate) fn verdict(&self, now: &Reading, terms: Terms<'_>) -> Verdict {
        let allowed = terms.guards.error_ratio_increase;
        let step = Table::of(&now.new.since(&self.step.new), &now.old.since(&self.step.old));
        let mut suspicion = None;
        if terms.side_by_side {
            let slow =
                if terms.guards.p95_increase.is_some() { self.latency.finding() } else { Finding::Nothing };
            for finding in [self.errors.finding(allowed), slow] {
                match finding {
                    Finding::Worse(why) => return Verdict::Fail(why),
                    Finding::Suspicion(why) => suspicion = suspicion.or(Some(why)),
                    Finding::Nothing => {}
                }
            }
        }
        if step.old_n == 0 || !terms.side_by_side {
            let old = &self.step.old;
            if let Some(why) = errors::alone(step, (old.errors(), old.samples()), allowed) {
                return Verdict::Fail(why);
            }
        }
        match suspicion {
            Some(why) => Verdict::Suspicion(why),
            None if step.n < terms.min_samples => Verdict::TooFew,
            None => Verdict::Pass,
        }
    }

    /// Answers and failures in the present step, for people.
    pub(crate) fn step_numbers(&self, now: &Reading) -> String {
        let step = Table::of(&now.new.since(&self.step.new), &now.old.since(&self.step.old));
        format!(
            "new {} requests, {} failed; old {} requests, {} failed",
            step.n, step.bad, step.old_n, step.old_bad
        )
    }

    fn restart(&mut self, at_ms: u64) {
        self.errors.restart();
        self.latency.restart();
        self.restarted_at_ms = at_ms;
    }
}
