//! Requests of a service that is held wait here for their turn; the order, the bounds and the pace are those of
//! [`HoldQueue`], one for all cores.
//!
//! Nothing of this runs for a service that is not held. A client that leaves drops the request's future, and with
//! it the place in the queue. While a request waits, a little of its body is taken in: so its end comes to light
//! also when the client goes in the middle of it.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::request::Parts;
use metrics::{counter, gauge, histogram};
use peregrine_routing::{HoldCounts, HoldQueue, HoldVerdict, Joined, TableReader, Ticket};

use crate::body::RequestBody;
use crate::choose::reload;
use crate::clock::now_us;
use crate::core::{Core, ServiceEntry};
use crate::error::Reason;
use crate::inflight::Flight;

/// Of one request's body this much is taken in while it waits; the rest stays with the client.
pub(crate) const MAX_EARLY_BODY_BYTES: u64 = 64 * 1024;
/// Room that has to be there before a frame of a body is taken in: the largest frame of HTTP/2 that the edge lets clients
/// send. A larger piece of an HTTP/1.1 body is counted when it is there.
pub(crate) const EARLY_FRAME_BYTES: u64 = 16 * 1024;
/// Times that one request may be held: a service that is held again and again must not keep it for ever.
const MAX_HOLDS: u8 = 3;
/// While somebody waits, the counts are handed to the metrics at least this often.
const TELL_INTERVAL_US: u64 = 250_000;
/// Services that have labels of their own.
const MAX_SERVICE_LABELS: usize = 1_000;

/// Says what each metric means.
pub(crate) fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_gauge!("peregrine_edge_held_requests", "Requests that wait because their service is held");
    describe_gauge!("peregrine_edge_held_bytes", Unit::Bytes, "What is kept of them");
    describe_counter!(
        "peregrine_edge_held_total",
        "Requests that were taken into the queue of a held service"
    );
    describe_counter!(
        "peregrine_edge_held_ended_total",
        "How held requests ended: released, overflowed (found no room), aged_out, left (the client has gone), \
         unserved (the hold was over and no copy was there)"
    );
    describe_histogram!(
        "peregrine_edge_held_seconds",
        Unit::Seconds,
        "How long released requests had waited"
    );
}

/// Waits until the request may go on, and looks the service up anew if it had to wait.
pub(crate) async fn pass(
    core: &Core,
    entry: &mut Rc<ServiceEntry>,
    flight: &Flight,
    parts: &Parts,
    body: Option<&Rc<RequestBody>>,
) -> Result<(), Reason> {
    for _ in 0..MAX_HOLDS {
        let Some(queue) = entry.service.hold().filter(|queue| queue.is_closed()) else { return Ok(()) };
        let begun_us = now_us();
        match queue.join(kept_bytes(parts, body), begun_us) {
            Joined::Pass => return Ok(()),
            Joined::Full => return Err(Reason::HoldFull),
            Joined::Wait(ticket) => wait(ticket, body).await?,
        }
        let now_us = now_us();
        core.set_now(now_us / 1_000);
        flight.held_us.set(flight.held_us.get() + (now_us - begun_us));
        #[expect(clippy::cast_precision_loss, reason = "a time for people")]
        histogram!("peregrine_edge_held_seconds").record((now_us - begun_us) as f64 / 1e6);
        *entry = reload(core, flight)?;
        // What was released is let through, whoever waits behind it. If there is another hold by now, it counts.
        if entry.service.hold().is_none_or(|queue| !queue.is_held()) {
            return Ok(());
        }
    }
    if let Some(queue) = entry.service.hold() {
        queue.note_unserved();
    }
    Err(Reason::HoldTooOld)
}

/// Counts a request that is refused because its service, which is or was to be held, has no upstream.
pub(crate) fn note_unserved(entry: &ServiceEntry, reason: Reason) {
    if let Some(queue) = entry.service.hold().filter(|_| reason == Reason::NoUpstream) {
        queue.note_unserved();
    }
}

async fn wait(mut ticket: Ticket, body: Option<&Rc<RequestBody>>) -> Result<(), Reason> {
    std::future::poll_fn(|cx| {
        if let Poll::Ready(verdict) = ticket.poll_verdict(cx) {
            return Poll::Ready(match verdict {
                HoldVerdict::Go => Ok(()),
                HoldVerdict::TooOld => Err(Reason::HoldTooOld),
            });
        }
        match body.and_then(|body| body.take_early(cx, &ticket)) {
            Some(fault) => Poll::Ready(Err(fault)),
            None => Poll::Pending,
        }
    })
    .await
}

/// What is kept for a request that begins to wait; of its body more may come to it.
fn kept_bytes(parts: &Parts, body: Option<&Rc<RequestBody>>) -> u64 {
    let fields: usize = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let path = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
    (fields + path) as u64 + body.map_or(0, |body| body.kept_bytes())
}

/// Keeps the queues of held services going, on the control side. Runs until it is dropped.
pub(crate) async fn keep(table: TableReader) {
    let mut kept: Vec<(Arc<HoldQueue>, tokio::task::JoinHandle<()>)> = Vec::new();
    let mut labels: HashSet<Arc<str>> = HashSet::new();
    let mut version = 0;
    loop {
        kept.retain(|(_, keeper)| !keeper.is_finished());
        for service in table.load().held_services() {
            let Some(queue) = service.hold() else { continue };
            if kept.iter().any(|(known, _)| Arc::ptr_eq(known, queue)) {
                continue;
            }
            let name = service.name();
            let own = labels.len() < MAX_SERVICE_LABELS || labels.contains(name);
            let label: Arc<str> = if own { Arc::clone(name) } else { "other".into() };
            labels.insert(Arc::clone(&label));
            let keeper = Keeper { queue: Arc::clone(queue), label, told: HoldCounts::default() };
            kept.push((Arc::clone(queue), tokio::task::spawn_local(keeper.run(table.clone()))));
        }
        version = table.newer_than(version).await;
    }
}

/// Keeps one queue going until no table names it and nobody waits in it.
struct Keeper {
    queue: Arc<HoldQueue>,
    label: Arc<str>,
    told: HoldCounts,
}

impl Keeper {
    async fn run(mut self, table: TableReader) {
        self.told = HoldCounts { waiting: 0, bytes: 0, ..self.queue.counts_here() };
        loop {
            let changed = self.queue.listen();
            let now_us = now_us();
            let next_us = self.queue.turn(now_us);
            self.tell();
            let Some(next_us) = next_us else {
                if !self.is_named(&table) {
                    return;
                }
                changed.await;
                continue;
            };
            let wait_us = next_us.saturating_sub(now_us).min(TELL_INTERVAL_US);
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(Duration::from_micros(wait_us)) => {}
            }
        }
    }

    fn is_named(&self, table: &TableReader) -> bool {
        table.load().held_services().any(|s| s.hold().is_some_and(|queue| Arc::ptr_eq(queue, &self.queue)))
    }

    fn tell(&mut self) {
        let (now, told) = (self.queue.counts_here(), self.told);
        if now == told {
            return;
        }
        let label = || self.label.to_string();
        level("peregrine_edge_held_requests", label(), now.waiting, told.waiting);
        level("peregrine_edge_held_bytes", label(), now.bytes, told.bytes);
        counter!("peregrine_edge_held_total", "service" => label()).increment(now.held - told.held);
        let ended = |how: &'static str, now: u64, told: u64| {
            counter!("peregrine_edge_held_ended_total", "service" => label(), "end" => how)
                .increment(now.saturating_sub(told));
        };
        ended("released", now.released, told.released);
        ended("overflowed", now.overflowed, told.overflowed);
        ended("aged_out", now.aged_out, told.aged_out);
        ended("left", now.left, told.left);
        ended("unserved", now.unserved, told.unserved);
        self.told = now;
    }
}

#[expect(clippy::cast_precision_loss, reason = "a level for people")]
fn level(name: &'static str, service: String, now: u64, told: u64) {
    let gauge = gauge!(name, "service" => service);
    if now >= told {
        gauge.increment((now - told) as f64);
    } else {
        gauge.decrement((told - now) as f64);
    }
}
