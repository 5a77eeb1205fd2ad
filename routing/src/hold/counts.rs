//! What became of the requests that were held: the counts of one edge, and those of all others added up.

use crate::upstream::EdgeId;

/// Edges that were lost and may come back with what they have counted meanwhile. Of more the counts are kept, and
/// what they say when they come back begins anew.
const MAX_LOST_EDGES: usize = 16;

/// What became of the requests of a service that were held, since its edge first knew it. Every count only rises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldCounts {
    /// Requests that wait now.
    pub waiting: u64,
    /// Bytes that are kept for them.
    pub bytes: u64,
    /// Requests that were taken into the queue.
    pub held: u64,
    /// Of these, how many were let go on; one whose client left in that very moment is among them.
    pub released: u64,
    /// Requests that found no room.
    pub overflowed: u64,
    /// Requests that waited for longer than they may.
    pub aged_out: u64,
    /// Requests whose client left first.
    pub left: u64,
    /// Requests that were not held (any more), because the deadline had passed, and for which there was no upstream.
    pub unserved: u64,
    /// The hold that [`HoldCounts::longest_wait_us`] is of, the last one; `None` before the first.
    pub hold: Option<u64>,
    /// Longest wait of one that went on, in microseconds, in the last hold.
    pub longest_wait_us: u64,
}

impl HoldCounts {
    /// Requests that were answered with an error because they could not be held, or not for long enough.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.overflowed + self.aged_out + self.unserved
    }

    /// What happened since `earlier`; what waits, and the longest wait, are those of now.
    #[must_use]
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            held: self.held.saturating_sub(earlier.held),
            released: self.released.saturating_sub(earlier.released),
            overflowed: self.overflowed.saturating_sub(earlier.overflowed),
            aged_out: self.aged_out.saturating_sub(earlier.aged_out),
            left: self.left.saturating_sub(earlier.left),
            unserved: self.unserved.saturating_sub(earlier.unserved),
            ..*self
        }
    }

    /// Of the longest waits, those of the same hold count.
    pub(super) fn add(&mut self, other: &Self) {
        self.waiting += other.waiting;
        self.bytes += other.bytes;
        self.held += other.held;
        self.released += other.released;
        self.overflowed += other.overflowed;
        self.aged_out += other.aged_out;
        self.left += other.left;
        self.unserved += other.unserved;
        if self.hold == other.hold {
            self.longest_wait_us = self.longest_wait_us.max(other.longest_wait_us);
        }
    }

    /// The longest wait counts anew with each hold.
    pub(super) fn begin_hold(&mut self, hold: Option<u64>) {
        if self.hold != hold {
            (self.hold, self.longest_wait_us) = (hold, 0);
        }
    }
}

/// What edges in other processes say.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// Those that were lost in the order in which they were.
    edges: Vec<(EdgeId, Part)>,
    /// The counts of edges that do not come back.
    gone: HoldCounts,
}

#[derive(Debug)]
struct Part {
    /// What the edge had counted before it was known here.
    base: HoldCounts,
    now: HoldCounts,
    lost: bool,
}

impl Part {
    const fn counts(&self) -> HoldCounts {
        self.now.since(&self.base)
    }
}

impl Elsewhere {
    /// The newest word of an edge. `base` is what it had counted before, if it is not known.
    pub(super) fn report(&mut self, edge: EdgeId, now: HoldCounts, base: HoldCounts) {
        match self.place(edge) {
            Some(at) => {
                let (_, part) = &mut self.edges[at];
                (part.now, part.lost) = (now, false);
            }
            None => self.edges.push((edge, Part { base, now, lost: false })),
        }
    }

    /// An edge that is not heard of any more holds nobody; what it has counted stays. `hold` is the last one.
    pub(super) fn lose(&mut self, edge: EdgeId, hold: Option<u64>) {
        let Some(at) = self.place(edge) else { return };
        let (_, mut part) = self.edges.remove(at);
        (part.now.waiting, part.now.bytes, part.lost) = (0, 0, true);
        self.edges.push((edge, part));
        let lost = self.edges.iter().filter(|(_, part)| part.lost).count();
        let oldest = self.edges.iter().find(|(_, part)| part.lost).map(|(edge, _)| *edge);
        if let Some(oldest) = oldest.filter(|_| lost > MAX_LOST_EDGES) {
            self.end(oldest, hold);
        }
    }

    /// An edge does not come back; what it has counted stays.
    pub(super) fn end(&mut self, edge: EdgeId, hold: Option<u64>) {
        let Some(at) = self.place(edge) else { return };
        let (_, mut part) = self.edges.remove(at);
        (part.now.waiting, part.now.bytes) = (0, 0);
        self.gone.begin_hold(hold);
        self.gone.add(&part.counts());
    }

    pub(super) fn add_to(&self, counts: &mut HoldCounts) {
        counts.add(&self.gone);
        self.edges.iter().for_each(|(_, part)| counts.add(&part.counts()));
    }

    fn place(&self, edge: EdgeId) -> Option<usize> {
        self.edges.iter().position(|(known, _)| *known == edge)
    }
}
