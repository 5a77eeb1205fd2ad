//! How fast a new copy answers beside an old one: both are asked the same at the same moment, pair by pair, so
//! that a busy machine or a slow network slows both alike.
//!
//! What is asked are the warm-up paths, or else the path of the health probe. The time to open the
//! connection is taken off, so that a machine farther away is not a colder copy; that clients feel the distance
//! is for the shift to judge. A probe that only connects says nothing of speed: then nothing is compared.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::HealthKind;
use crate::probe::Probe;

/// Pairs of one round: the 95th percentile leaves out the slowest one.
const ROUND_PAIRS: usize = 20;
/// A round of slow answers ends earlier, …
const ROUND_LIMIT_MS: u64 = 1_000;
/// … but not with fewer pairs than these.
const MIN_PAIRS: usize = 5;
/// Below this difference nobody feels a slower answer.
const MIN_P95_DIFFERENCE_MS: u64 = 5;

/// What a round has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    new_p95: Duration,
    old_p95: Duration,
}

impl Pace {
    fn of(new: &mut [Duration], old: &mut [Duration], min_pairs: usize) -> Option<Self> {
        (new.len() >= min_pairs).then(|| Self { new_p95: p95(new), old_p95: p95(old) })
    }

    /// Slower by more than the share `increase` (1.0 = twice) and by more than [`MIN_P95_DIFFERENCE_MS`].
    pub(super) fn is_slower(self, increase: f64) -> bool {
        self.new_p95 > self.allowed(increase)
    }

    fn allowed(self, increase: f64) -> Duration {
        let old = self.old_p95;
        let share =
            Duration::try_from_secs_f64(old.as_secs_f64() * (1.0 + increase)).unwrap_or(Duration::MAX);
        share.max(old + Duration::from_millis(MIN_P95_DIFFERENCE_MS))
    }

    /// With what would have been enough.
    pub(super) fn judged(self, increase: f64) -> String {
        format!("{self} (allowed: {:.1} ms)", ms(self.allowed(increase)))
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p95 of warm-up requests {:.1} ms, old copy {:.1} ms", ms(self.new_p95), ms(self.old_p95))
    }
}

/// Measures one round. `None` if there is nothing to compare by: no path to ask, or the old copy does not
/// answer what the new one does.
///
/// # Errors
/// The new copy did not answer well: it has to show anew that it works.
pub(super) async fn measure(
    new: &Probe,
    old: &Probe,
    paths: &[String],
    deadline: Instant,
) -> Result<Option<Pace>, String> {
    let asked = asked(new, old, paths);
    if asked.is_empty() {
        return Ok(None);
    }
    let end = deadline.min(Instant::now() + Duration::from_millis(ROUND_LIMIT_MS));
    let (mut news, mut olds) = (Vec::new(), Vec::new());
    let pairs = ROUND_PAIRS.next_multiple_of(asked.len());
    for (turn, (of_new, of_old)) in asked.iter().cycle().take(pairs).enumerate() {
        let late = Instant::now() >= end && turn >= MIN_PAIRS && turn % asked.len() == 0;
        if late || Instant::now() >= deadline {
            break;
        }
        let (new, old) = tokio::join!(new.warm_up(of_new), old.warm_up(of_old));
        let new = new?;
        if new.status >= 500 {
            return Err(format!("{of_new} answers {}", new.status));
        }
        // An old version may not know a path of the new one, and answers quickly that it does not.
        if let Ok(old) = old
            && old.status < 400
            && new.status < 400
        {
            news.push(new.own);
            olds.push(old.own);
        }
    }
    // At the deadline there will be no better measurement than this.
    let min_pairs = if Instant::now() >= deadline { 1 } else { MIN_PAIRS };
    Ok(Pace::of(&mut news, &mut olds, min_pairs))
}

/// What the new copy and the old one are asked, side by side.
fn asked<'a>(new: &'a Probe, old: &'a Probe, paths: &'a [String]) -> Vec<(&'a str, &'a str)> {
    if !paths.is_empty() {
        return paths.iter().map(|path| (path.as_str(), path.as_str())).collect();
    }
    match (&new.health.kind, &old.health.kind) {
        (HealthKind::Http { path: new }, HealthKind::Http { path: old }) => vec![(new, old)],
        _ => Vec::new(),
    }
}

/// Nearest rank; the slice is not empty.
fn p95(samples: &mut [Duration]) -> Duration {
    samples.sort_unstable();
    let rank = (samples.len() * 95).div_ceil(100);
    samples[rank.saturating_sub(1)]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(new_ms: u64, old_ms: u64) -> Pace {
        Pace { new_p95: Duration::from_millis(new_ms), old_p95: Duration::from_millis(old_ms) }
    }

    #[test]
    fn slower_is_more_than_the_share_and_more_than_anybody_feels() {
        for (new_ms, old_ms, slower) in
            [(2, 1, false), (6, 1, false), (7, 1, true), (20, 10, false), (21, 10, true), (1, 50, false)]
        {
            assert_eq!(pace(new_ms, old_ms).is_slower(1.0), slower, "{new_ms} {old_ms}");
        }
        assert!(pace(16, 10).is_slower(0.5));
    }

    #[test]
    fn one_slow_answer_among_twenty_is_no_slow_copy() {
        let mut new: Vec<_> = (0..20).map(|i| Duration::from_millis(if i == 7 { 900 } else { 2 })).collect();
        let mut old = vec![Duration::from_millis(2); 20];
        let one = Pace::of(&mut new, &mut old, MIN_PAIRS).expect("enough pairs");
        assert!(!one.is_slower(1.0), "{one}");
        new[0] = Duration::from_millis(900);
        assert!(Pace::of(&mut new, &mut old, MIN_PAIRS).expect("enough pairs").is_slower(1.0));
    }

    #[test]
    fn too_few_pairs_say_nothing() {
        let mut few = vec![Duration::from_millis(1); MIN_PAIRS - 1];
        assert_eq!(Pace::of(&mut few.clone(), &mut few, MIN_PAIRS), None);
    }

    #[test]
    fn what_would_have_been_enough_is_said_with_both_figures() {
        let said = pace(80, 3).judged(1.0);
        assert_eq!(said, "p95 of warm-up requests 80.0 ms, old copy 3.0 ms (allowed: 8.0 ms)");
    }
}
