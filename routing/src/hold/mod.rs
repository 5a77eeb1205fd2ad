//! Holding the requests of a service at the edge for a while: bounded, first in, first out, released at a pace.
//!
//! ```text
//!   request ─► join ─┬─ Pass       nobody is held: go on
//!                    ├─ Full       no room: 503
//!                    └─ Ticket ─► waits ─┬─ Go      its turn has come: read the table anew and go on
//!                                        ├─ TooOld  503
//!                                        └─ dropped: the client has gone, its place and its bytes are free
//! ```
//!
//! A hold is in force from the publication that names it until one that does not, or until its deadline: then the
//! edge releases by itself, to whatever the table says, and does not take up the same hold again. While requests
//! of a hold wait, those that come later queue behind them, over all cores of an edge.
//!
//! There is no clock here: somebody calls [`HoldQueue::turn`] when it says. The lock is taken by requests that are
//! held and by nobody else; a service that was never held has no queue at all.

mod counts;
mod pace;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use event_listener::{Event, EventListener};

pub use counts::HoldCounts;

use crate::upstream::EdgeId;
use counts::Elsewhere;
use pace::{Arrivals, Release};

/// That a service is held, and within which bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldSpec {
    /// Names this hold among all that the service ever has. One whose deadline has passed is not taken up again.
    pub id: u64,
    /// When the edge releases by itself, in milliseconds of its clock.
    pub until_ms: u64,
    /// Requests that may wait.
    pub max_requests: u32,
    /// Bytes of heads and bodies that may be kept.
    pub max_bytes: u64,
    /// How long one request may wait.
    pub max_age_ms: u32,
    /// Requests per second that are released, at first and at least. It doubles every 5 s; where requests come more often
    /// than half of it, it is twice as many as come.
    pub release_per_s: u32,
}

/// Requests of one service that wait, over all versions of the table.
#[derive(Debug, Default)]
pub struct HoldQueue {
    /// Whether a request may have to wait. Decides nothing by itself: who finds it set asks under the lock.
    closed: AtomicBool,
    inner: Mutex<Inner>,
    /// Told when [`HoldQueue::turn`] has to be asked anew.
    changed: Event,
    /// What edges in other processes say.
    elsewhere: Mutex<Elsewhere>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The hold that is in force.
    hold: Option<HoldSpec>,
    /// The last hold that has ended by its deadline.
    over: Option<u64>,
    waiting: BTreeMap<u64, Waiting>,
    next_number: u64,
    release: Release,
    arrivals: Arrivals,
    bounds: Bounds,
    counts: HoldCounts,
}

/// What of a hold goes on to bind while its requests are released.
#[derive(Debug, Default)]
struct Bounds {
    requests: u64,
    bytes: u64,
    age_us: u64,
}

#[derive(Debug)]
struct Waiting {
    since_us: u64,
    bytes: u64,
    verdict: Arc<AtomicU8>,
    waker: Option<Waker>,
}

/// What a request is told that may have to wait.
#[derive(Debug)]
pub enum Joined {
    /// Nobody is held (any more): go on.
    Pass,
    /// There is no room.
    Full,
    /// Wait.
    Wait(Ticket),
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldVerdict {
    /// Go on, with the table of now.
    Go,
    /// It has waited for as long as it may.
    TooOld,
}

const WAITS: u8 = 0;
const GO: u8 = 1;
const TOO_OLD: u8 = 2;

/// A place in the queue. Dropped before its turn, it is given up.
#[derive(Debug)]
pub struct Ticket {
    queue: Arc<HoldQueue>,
    number: u64,
    verdict: Arc<AtomicU8>,
    told: bool,
}

impl HoldQueue {
    /// Whether a request may have to wait: [`HoldQueue::join`] says.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// What the table says from now on. Called when the table that says it is visible.
    pub(crate) fn settle(&self, spec: Option<&HoldSpec>) {
        let mut inner = self.lock();
        if let Some(spec) = spec.filter(|spec| inner.over != Some(spec.id)) {
            if inner.counts.hold != Some(spec.id) {
                inner.counts.begin_hold(Some(spec.id));
                inner.arrivals = Arrivals::default();
            }
            inner.release = Release::new(spec.release_per_s);
            inner.bounds = Bounds {
                requests: u64::from(spec.max_requests),
                bytes: spec.max_bytes,
                age_us: u64::from(spec.max_age_ms) * 1_000,
            };
            inner.hold = Some(spec.clone());
        } else {
            inner.hold = None;
        }
        self.close_or_open(&inner);
        drop(inner);
        self.changed.notify(usize::MAX);
    }

    /// Whether a hold is in force, as far as the last turn knows. A release does not count.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lock().hold.is_some()
    }

    /// Whether nothing is held and nobody waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.lock().is_idle()
    }

    /// A request of `bytes` asks to go on. `now_us` is the time in microseconds of the clock that
    /// [`HoldSpec::until_ms`] is of.
    #[must_use]
    pub fn join(self: &Arc<Self>, bytes: u64, now_us: u64) -> Joined {
        let mut inner = self.lock();
        inner.end_by_deadline(now_us);
        if inner.is_idle() {
            self.close_or_open(&inner);
            return Joined::Pass;
        }
        inner.arrivals.note(now_us);
        if !inner.has_room_for_one(bytes) {
            inner.counts.overflowed += 1;
            return Joined::Full;
        }
        let number = inner.next_number;
        inner.next_number += 1;
        let verdict = Arc::new(AtomicU8::new(WAITS));
        let first = inner.waiting.is_empty();
        let waiting = Waiting { since_us: now_us, bytes, verdict: Arc::clone(&verdict), waker: None };
        inner.waiting.insert(number, waiting);
        inner.counts.held += 1;
        inner.counts.bytes += bytes;
        drop(inner);
        if first {
            self.changed.notify(usize::MAX);
        }
        Joined::Wait(Ticket { queue: Arc::clone(self), number, verdict, told: false })
    }

    /// Does what is due at `now_us`; says when to be called next, or `None` if only a change can make that
    /// necessary ([`HoldQueue::listen`]).
    pub fn turn(&self, now_us: u64) -> Option<u64> {
        let mut inner = self.lock();
        inner.end_by_deadline(now_us);
        if !inner.is_idle() {
            inner.arrivals.begin(now_us);
        }
        let mut wake = inner.send_old_away(now_us);
        if inner.hold.is_none() {
            inner.release_due(now_us, &mut wake);
        }
        let next = inner.next_turn_us();
        self.close_or_open(&inner);
        drop(inner);
        wake.into_iter().for_each(Waker::wake);
        next
    }

    /// A listener for the next change; ask [`HoldQueue::turn`] after taking it.
    #[must_use]
    pub fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    /// What became of the requests at the edge of this process.
    #[must_use]
    pub fn counts_here(&self) -> HoldCounts {
        let inner = self.lock();
        HoldCounts { waiting: inner.waiting.len() as u64, ..inner.counts }
    }

    /// What became of the requests, over all edges.
    #[must_use]
    pub fn counts(&self) -> HoldCounts {
        let mut counts = self.counts_here();
        self.elsewhere().add_to(&mut counts);
        counts
    }

    /// A request of the service is answered that there is no upstream, although it is, or should be, held.
    pub fn note_unserved(&self) {
        self.lock().counts.unserved += 1;
    }

    /// The newest word of an edge elsewhere. `base` is what it had counted before it was known; it is of no account for
    /// one that has come back.
    pub(crate) fn report_of(&self, edge: EdgeId, counts: HoldCounts, base: HoldCounts) {
        self.elsewhere().report(edge, counts, base);
    }

    /// An edge that is not heard of any more holds nobody; what it has counted stays.
    pub(crate) fn lose_edge(&self, edge: EdgeId) {
        let hold = self.lock().counts.hold;
        self.elsewhere().lose(edge, hold);
    }

    /// An edge has ended and does not come back; what it has counted stays.
    pub(crate) fn end_edge(&self, edge: EdgeId) {
        let hold = self.lock().counts.hold;
        self.elsewhere().end(edge, hold);
    }

    fn elsewhere(&self) -> MutexGuard<'_, Elsewhere> {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_or_open(&self, inner: &Inner) {
        self.closed.store(!inner.is_idle(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn is_idle(&self) -> bool {
        self.hold.is_none() && self.waiting.is_empty()
    }

    fn has_room_for_one(&self, bytes: u64) -> bool {
        (self.waiting.len() as u64) < self.bounds.requests && self.has_room(bytes)
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.counts.bytes.saturating_add(bytes) <= self.bounds.bytes
    }

    fn end_by_deadline(&mut self, now_us: u64) {
        if let Some(hold) = self.hold.take_if(|hold| now_us >= hold.until_ms.saturating_mul(1_000)) {
            self.over = Some(hold.id);
        }
    }

    fn send_old_away(&mut self, now_us: u64) -> Vec<Waker> {
        let mut wake = Vec::new();
        while let Some(first) = self.waiting.first_entry() {
            if now_us < first.get().since_us.saturating_add(self.bounds.age_us) {
                break;
            }
            let gone = first.remove();
            self.counts.aged_out += 1;
            self.counts.bytes -= gone.bytes;
            gone.verdict.store(TOO_OLD, Ordering::Release);
            wake.extend(gone.waker);
        }
        wake
    }

    fn release_due(&mut self, now_us: u64, wake: &mut Vec<Waker>) {
        self.release.go_on(now_us);
        let interval_us = self.release.interval_us(now_us, &mut self.arrivals);
        while self.release.due_us <= now_us {
            let Some((_, next)) = self.waiting.pop_first() else { break };
            self.release.due_us += interval_us;
            let waited_us = now_us.saturating_sub(next.since_us);
            self.counts.released += 1;
            self.counts.bytes -= next.bytes;
            self.counts.longest_wait_us = self.counts.longest_wait_us.max(waited_us);
            next.verdict.store(GO, Ordering::Release);
            wake.extend(next.waker);
        }
    }

    fn next_turn_us(&self) -> Option<u64> {
        let until_us = self.hold.as_ref().map(|hold| hold.until_ms.saturating_mul(1_000));
        let first = self.waiting.first_key_value().map(|(_, first)| first);
        let old_us = first.map(|first| first.since_us.saturating_add(self.bounds.age_us));
        let due_us = first.filter(|_| self.hold.is_none()).map(|_| self.release.due_us);
        [until_us, old_us, due_us].into_iter().flatten().min()
    }
}

impl Ticket {
    /// Asks for room for more of the request. Without room, or when the verdict has come, there is none.
    #[must_use]
    pub fn reserve(&self, bytes: u64) -> bool {
        let mut inner = self.queue.lock();
        let has_room = inner.has_room(bytes);
        let Some(waiting) = inner.waiting.get_mut(&self.number).filter(|_| has_room) else { return false };
        waiting.bytes += bytes;
        inner.counts.bytes += bytes;
        true
    }

    /// Of what was reserved, so much is really kept.
    pub fn settle(&self, reserved: u64, kept: u64) {
        let mut inner = self.queue.lock();
        // Released meanwhile, it has given everything back.
        let Some(waiting) = inner.waiting.get_mut(&self.number) else { return };
        waiting.bytes = waiting.bytes.saturating_sub(reserved) + kept;
        inner.counts.bytes = inner.counts.bytes.saturating_sub(reserved) + kept;
    }

    /// Waits for the verdict.
    pub fn poll_verdict(&mut self, cx: &mut Context<'_>) -> Poll<HoldVerdict> {
        if self.verdict.load(Ordering::Acquire) == WAITS {
            let mut inner = self.queue.lock();
            // Verdicts are given under the lock: whoever is still in the queue has none.
            if let Some(waiting) = inner.waiting.get_mut(&self.number) {
                if waiting.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    waiting.waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
        }
        self.told = true;
        Poll::Ready(if self.verdict.load(Ordering::Acquire) == TOO_OLD {
            HoldVerdict::TooOld
        } else {
            HoldVerdict::Go
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        let mut inner = self.queue.lock();
        // With a verdict it is counted already: what was told of a count must not be taken back.
        if let Some(waiting) = inner.waiting.remove(&self.number) {
            inner.counts.left += 1;
            inner.counts.bytes -= waiting.bytes;
        }
        self.queue.close_or_open(&inner);
    }
}
