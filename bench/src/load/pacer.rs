//! Hands out request numbers: as fast as they are taken (closed loop), or each when it is due (open loop).
//!
//! Due times come from the rate alone, never from the answers. Tokio's timers are a millisecond coarse, which would
//! drown the latencies of a fast proxy, so the open loop is woken by a kernel timer every [`LoadOptions::tick_us`] at most.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

use super::options::{LoadOptions, Pace, Until};

const NS_PER_S: u64 = 1_000_000_000;

/// The right to send one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub(super) number: u64,
    /// The moment that the request's latency counts from.
    pub(super) due: Instant,
}

#[derive(Debug)]
pub(super) struct Pacer {
    pace: Pace,
    tick: Duration,
    duration: Option<Duration>,
    /// Numbers from here on are not sent.
    limit: u64,
    started: OnceLock<Instant>,
    next: AtomicU64,
    stopped: AtomicBool,
    /// Open loop: one permit for each request that is due and not taken.
    due: Semaphore,
}

impl Pacer {
    pub(super) fn new(options: &LoadOptions) -> Self {
        let duration = match options.until {
            Until::DurationMs(ms) => Some(Duration::from_millis(ms)),
            Until::Count(_) | Until::Stopped => None,
        };
        let limit = match (options.until, options.pace) {
            (Until::Count(count), _) => count,
            // The last request of an open loop is due before the end, and gets its answer after it.
            (Until::DurationMs(ms), Pace::Open { per_second }) => ms * u64::from(per_second) / 1000,
            _ => u64::MAX,
        };
        Self {
            pace: options.pace,
            tick: Duration::from_micros(options.tick_us),
            duration,
            limit,
            started: OnceLock::new(),
            next: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            due: Semaphore::new(0),
        }
    }

    /// The start of the run; the first caller sets it.
    pub(super) fn started(&self) -> Instant {
        *self.started.get_or_init(Instant::now)
    }

    pub(super) fn has_started(&self) -> bool {
        self.started.get().is_some()
    }

    /// Hands out nothing more.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.due.close();
    }

    /// The next request to send, when it is due; `None` at the end of the run.
    pub(super) async fn next(&self) -> Option<Ticket> {
        match self.pace {
            Pace::Closed => self.next_at_once(),
            Pace::Open { per_second } => self.next_due(per_second).await,
        }
    }

    fn next_at_once(&self) -> Option<Ticket> {
        let due = Instant::now();
        let is_over = self.duration.is_some_and(|duration| due.duration_since(self.started()) >= duration);
        if is_over || self.stopped.load(Ordering::Acquire) {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.limit).then_some(Ticket { number, due })
    }

    async fn next_due(&self, per_second: u32) -> Option<Ticket> {
        self.due.acquire().await.ok()?.forget();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let due = self.started() + due_after(number, per_second);
        (number < self.limit).then_some(Ticket { number, due })
    }

    /// Open loop: releases each request when it is due, until the run ends. `takers` is the number of callers of
    /// [`Pacer::next`], each of which must be woken once more to learn that it is over.
    pub(super) async fn release_when_due(&self, takers: usize) -> io::Result<()> {
        let Pace::Open { per_second } = self.pace else { return Ok(()) };
        let tick = self.tick.max(due_after(1, per_second));
        let timer = KernelTimer::every(tick)?;
        let mut released = 0;
        while released < self.limit && !self.stopped.load(Ordering::Acquire) {
            let due = due_at(self.started().elapsed(), per_second).min(self.limit);
            self.due.add_permits(usize::try_from(due - released).unwrap_or(Semaphore::MAX_PERMITS));
            released = due;
            timer.tick().await?;
        }
        self.due.add_permits(takers);
        Ok(())
    }
}

/// When request `number` is due, counted from the start.
fn due_after(number: u64, per_second: u32) -> Duration {
    let per_second = u64::from(per_second);
    let (seconds, rest) = (number / per_second, number % per_second);
    Duration::new(seconds, u32::try_from(rest * NS_PER_S / per_second).expect("below a second"))
}

/// How many requests are due at `elapsed` from the start.
fn due_at(elapsed: Duration, per_second: u32) -> u64 {
    let per_second = u64::from(per_second);
    elapsed.as_secs() * per_second + u64::from(elapsed.subsec_nanos()) * per_second / NS_PER_S + 1
}

struct KernelTimer(AsyncFd<OwnedFd>);

impl KernelTimer {
    fn every(interval: Duration) -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let interval = Timespec {
            tv_sec: interval.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: interval.subsec_nanos().into(),
        };
        let spec = Itimerspec { it_interval: interval, it_value: interval };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)?;
        #[expect(
            deprecated,
            reason = "its replacement is an unsafe function; an OwnedFd keeps the promise that it asks for"
        )]
        let registered = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self(registered))
    }

    async fn tick(&self) -> io::Result<()> {
        let mut expirations = [0; 8];
        self.0
            .async_io(Interest::READABLE, |timer| Ok(rustix::io::read(timer, &mut expirations).map(drop)?))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_due_exactly_from_its_due_time_on() {
        for per_second in [1, 7, 2000, 33_333] {
            for number in [1, 2, 99, 100_000] {
                let due = due_after(number, per_second);
                let slack = Duration::from_nanos(1);
                assert!(due_at(due + slack, per_second) > number, "{number} at {per_second}/s");
                assert!(due_at(due - slack, per_second) <= number, "{number} at {per_second}/s");
            }
        }
    }

    #[tokio::test]
    async fn an_open_loop_hands_out_the_whole_run_on_time_and_ends() {
        let mut options = LoadOptions::new(([127, 0, 0, 1], 1).into());
        options.pace = Pace::Open { per_second: 5000 };
        options.until = Until::DurationMs(200);
        let pacer = Pacer::new(&options);
        let take = async {
            let mut taken = 0;
            while let Some(ticket) = pacer.next().await {
                assert!(ticket.due <= Instant::now(), "taken before it was due");
                taken += 1;
            }
            taken
        };
        let (released, taken) = tokio::join!(pacer.release_when_due(1), take);
        released.expect("a timer");
        assert_eq!(taken, 1000);
        assert!(pacer.started().elapsed() >= Duration::from_millis(199));
    }

    #[tokio::test]
    async fn a_stopped_open_loop_wakes_who_waits_for_the_next_request() {
        let mut options = LoadOptions::new(([127, 0, 0, 1], 1).into());
        options.pace = Pace::Open { per_second: 1 };
        let pacer = Pacer::new(&options);
        let (ticket, ()) = tokio::join!(pacer.next(), async { pacer.stop() });
        assert!(ticket.is_none());
    }
}
