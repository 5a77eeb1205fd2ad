//! A lease: the right to use an upstream for one request, and the entry that it leaves in the receipt.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::Upstream;
use crate::class::TrafficClass;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeaseEnd {
    Completed,
    SoftClosed,
    Cut,
}

/// The right to use an upstream for one request. It ends when it is dropped: keep it to the last frame
/// of the body, or to the end of the tunnel.
#[derive(Debug)]
#[must_use = "a lease that is dropped at once counts nothing"]
pub struct Lease {
    upstream: Arc<Upstream>,
    class: TrafficClass,
    sent: bool,
    end: LeaseEnd,
}

impl Lease {
    /// For a caller who has passed the gate.
    pub(super) fn new(upstream: Arc<Upstream>, class: TrafficClass) -> Self {
        upstream.begin(class);
        Self { upstream, class, sent: false, end: LeaseEnd::Completed }
    }

    /// The upstream that it is for.
    #[must_use]
    pub const fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// The class that it is counted in.
    #[must_use]
    pub const fn class(&self) -> TrafficClass {
        self.class
    }

    /// Says that the request is about to be written. A lease that was never sent leaves no trace in the
    /// receipt, unless it was cut.
    pub fn mark_sent(&mut self) {
        if !self.sent {
            self.sent = true;
            self.upstream.started.fetch_add(1, Relaxed);
        }
    }

    /// Moves the lease to another class, when the answer shows what the request really is.
    pub fn reclassify(&mut self, class: TrafficClass) {
        if class != self.class {
            self.upstream.begin(class);
            self.upstream.finish(self.class);
            self.class = class;
        }
    }

    /// Counts body bytes.
    pub fn add_bytes(&self, to_upstream: u64, to_client: u64) {
        if to_upstream > 0 {
            self.upstream.bytes_to_upstream.fetch_add(to_upstream, Relaxed);
        }
        if to_client > 0 {
            self.upstream.bytes_to_client.fetch_add(to_client, Relaxed);
        }
    }

    /// Says that the traffic was closed politely because its soft deadline passed. A lease that was cut
    /// stays cut.
    pub fn soft_close(&mut self) {
        if self.end != LeaseEnd::Cut {
            self.end = LeaseEnd::SoftClosed;
        }
    }

    /// Says that the request was cut at the hard deadline; its id goes into the receipt, sent or not,
    /// for its client got no whole answer.
    pub fn cut(&mut self, request_id: &str) {
        if self.end != LeaseEnd::Cut {
            self.end = LeaseEnd::Cut;
            self.upstream.list_cut(self.class, request_id);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let class = self.class.index();
        if self.sent {
            match self.end {
                LeaseEnd::Completed => {
                    self.upstream.completed[class].fetch_add(1, Relaxed);
                }
                LeaseEnd::SoftClosed => {
                    self.upstream.soft_closed[class].fetch_add(1, Relaxed);
                }
                LeaseEnd::Cut => {}
            }
        }
        self.upstream.finish(self.class);
        // Last: whoever sees the gate drained sees all of the counts above.
        self.upstream.leave();
    }
}
