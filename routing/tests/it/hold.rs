//! The hold queue under arbitrary orders of everything, beside a model of what it promises.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use peregrine_routing::{
    Balance, Change, EdgeId, HoldCounts, HoldQueue, HoldSpec, HoldVerdict, HostPattern, Joined, RouteSpec,
    ServicePolicy, ServiceSpec, TableReader, TableWriter, Ticket, table,
};
use proptest::prelude::*;

const MAX_REQUESTS: u32 = 8;
const MAX_BYTES: u64 = 1_000;
const MAX_AGE_MS: u32 = 500;
const PER_S: u32 = 100;

fn spec(id: u64, until_ms: u64) -> HoldSpec {
    HoldSpec {
        id,
        until_ms,
        max_requests: MAX_REQUESTS,
        max_bytes: MAX_BYTES,
        max_age_ms: MAX_AGE_MS,
        release_per_s: PER_S,
    }
}

struct World {
    writer: TableWriter,
    reader: TableReader,
    now_us: u64,
    waiting: VecDeque<(u64, Ticket)>,
    went: Vec<u64>,
    next: u64,
}

impl World {
    fn new() -> Self {
        let (writer, reader) = table();
        let mut world =
            Self { writer, reader, now_us: 1_000_000, waiting: VecDeque::new(), went: Vec::new(), next: 0 };
        world.put(None);
        world
    }

    fn put(&mut self, hold: Option<HoldSpec>) {
        let service = ServiceSpec {
            name: "shop".into(),
            routes: vec![RouteSpec { host: HostPattern::Any, path_prefix: "/".into() }],
            pools: Vec::new(),
            balance: Balance::default(),
            policy: ServicePolicy { hold: hold.map(Box::new), ..ServicePolicy::default() },
        };
        self.writer.apply(&[Change::Put(service)]).expect("it is accepted");
    }

    fn queue(&self) -> Option<Arc<HoldQueue>> {
        self.reader.load().lookup("shop.test", "/").expect("the service").service.hold().cloned()
    }

    /// Asks; whether it may go on at once, or `None` if it is refused.
    fn ask(&mut self, bytes: u64) -> Option<bool> {
        let Some(queue) = self.queue().filter(|queue| queue.is_closed()) else { return Some(true) };
        match queue.join(bytes, self.now_us) {
            Joined::Pass => Some(true),
            Joined::Full => None,
            Joined::Wait(ticket) => {
                self.waiting.push_back((self.next, ticket));
                self.next += 1;
                Some(false)
            }
        }
    }

    /// Lets time pass as a keeper does: at every moment that the queue names.
    fn pass(&mut self, us: u64) {
        let end = self.now_us + us;
        while let Some(at) = self.queue().and_then(|queue| queue.turn(self.now_us)).filter(|at| *at <= end) {
            self.now_us = at.max(self.now_us + 1);
            self.collect();
        }
        self.now_us = end;
        let _ = self.queue().map(|queue| queue.turn(end));
        self.collect();
    }

    /// Takes in the verdicts; they come to the first ones only.
    fn collect(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut still = VecDeque::new();
        for (number, mut ticket) in self.waiting.drain(..) {
            match ticket.poll_verdict(&mut cx) {
                Poll::Pending => still.push_back((number, ticket)),
                Poll::Ready(verdict) => {
                    assert!(still.is_empty(), "{number} went before somebody who came earlier");
                    if verdict == HoldVerdict::Go {
                        self.went.push(number);
                    }
                }
            }
        }
        self.waiting = still;
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Ask(u64),
    Grow(usize, u64, u64),
    Leave(usize),
    Pass(u64),
    Hold(u64),
    Release,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        5 => (1..400_u64).prop_map(Deed::Ask),
        3 => (0..8_usize, 1..400_u64, 0..400_u64).prop_map(|(at, asks, keeps)| Deed::Grow(at, asks, keeps.min(asks))),
        2 => (0..8_usize).prop_map(Deed::Leave),
        4 => (0..200_000_u64).prop_map(Deed::Pass),
        1 => (1..1_500_u64).prop_map(Deed::Hold),
        1 => Just(Deed::Release),
    ]
}

proptest! {
    #[test]
    fn order_bounds_and_counts_hold_whatever_happens(deeds in proptest::collection::vec(deed(), 1..120)) {
        let mut world = World::new();
        let mut id = 0;
        let mut refused = 0;
        let mut before = HoldCounts::default();
        for deed in deeds {
            match deed {
                Deed::Ask(bytes) => refused += u64::from(world.ask(bytes).is_none()),
                Deed::Grow(at, asks, keeps) => {
                    if let Some((_, ticket)) = world.waiting.get(at)
                        && ticket.reserve(asks)
                    {
                        ticket.settle(asks, keeps);
                    }
                }
                Deed::Leave(at) => drop(world.waiting.remove(at)),
                Deed::Pass(us) => world.pass(us),
                Deed::Hold(ms) => {
                    id += 1;
                    world.put(Some(spec(id, world.now_us / 1_000 + ms)));
                }
                Deed::Release => world.put(None),
            }
            let counts = world.writer.hold_counts("shop");
            prop_assert!(counts.waiting <= u64::from(MAX_REQUESTS) && counts.bytes <= MAX_BYTES, "{counts:?}");
            prop_assert!(counts.waiting <= world.waiting.len() as u64, "{counts:?}");
            prop_assert_eq!(counts.held, counts.waiting + counts.released + counts.aged_out + counts.left);
            prop_assert_eq!(counts.overflowed, refused);
            let rises = |now: u64, before: u64| now >= before;
            prop_assert!(
                rises(counts.held, before.held)
                    && rises(counts.released, before.released)
                    && rises(counts.aged_out, before.aged_out)
                    && rises(counts.left, before.left),
                "{:?} after {:?}", counts, before
            );
            before = counts;
        }
        prop_assert!(world.went.is_sorted());
        // Nobody is forgotten: released or too old, every one comes to an end.
        world.pass(u64::from(MAX_AGE_MS) * 1_000 + 1);
        world.pass(2_000_000);
        prop_assert!(world.waiting.is_empty());
        let counts = world.writer.hold_counts("shop");
        prop_assert_eq!((counts.waiting, counts.bytes), (0, 0));
        prop_assert_eq!(world.ask(1), Some(true), "and who comes then goes on at once");
    }
}

#[test]
fn a_release_keeps_its_pace_also_when_its_keeper_was_late() {
    let mut world = World::new();
    let hold = HoldSpec { max_requests: 1_000, max_bytes: 1 << 20, max_age_ms: 60_000, ..spec(1, 60_000) };
    world.put(Some(hold));
    (0..100).for_each(|_| assert_eq!(world.ask(1), Some(false)));
    world.put(None);
    let queue = world.queue().expect("they wait");
    let _ = queue.turn(world.now_us);
    world.collect();
    assert_eq!(world.went.len(), 1);
    // A keeper that comes half a second late lets no fifty go at once.
    world.now_us += 500_000;
    let _ = queue.turn(world.now_us);
    world.collect();
    assert!(world.went.len() <= 3, "{:?}", world.went);
    let before = world.went.len();
    world.pass(300_000);
    assert!((28..=32).contains(&(world.went.len() - before)), "{}", world.went.len());
}

#[test]
fn the_pace_doubles_so_that_every_queue_has_an_end() {
    let mut world = World::new();
    let hold =
        HoldSpec { max_requests: 100_000, max_bytes: 1 << 30, max_age_ms: 600_000, ..spec(1, 900_000) };
    world.put(Some(hold));
    // Few come, over a long time; no faster release is due to how many they are.
    for _ in 0..1_000 {
        assert_eq!(world.ask(1), Some(false));
        world.now_us += 100_000;
    }
    world.put(None);
    let mut ms = 0;
    while !world.waiting.is_empty() {
        world.pass(10_000);
        ms += 10;
        assert!(ms < 30_000, "{} wait", world.waiting.len());
    }
    // Five seconds at a hundred, and the rest at two hundred.
    assert!((7_000..8_000).contains(&ms), "{ms} ms");
}

/// A service that is asked 2,000 times a second, is held for so long and then released at 1,000 a second, at first.
/// How long the release takes, and how many were refused.
fn release_under_load(hold_ms: u64) -> (u64, u64) {
    const PER_MS: u64 = 2;
    let mut world = World::new();
    let hold = HoldSpec {
        max_requests: 10_000,
        max_bytes: 1 << 30,
        max_age_ms: 600_000,
        release_per_s: 1_000,
        ..spec(1, 900_000)
    };
    world.put(Some(hold));
    let queue = world.queue().expect("it is held");
    // Kept to the end: none of them leaves.
    let mut tickets = Vec::new();
    let mut step = |now_us: u64| {
        for _ in 0..PER_MS {
            if let Joined::Wait(ticket) = queue.join(1, now_us) {
                tickets.push(ticket);
            }
        }
        let _ = queue.turn(now_us);
        queue.counts_here()
    };
    let begun_us = world.now_us;
    for ms in 0..hold_ms {
        step(begun_us + ms * 1_000);
    }
    world.put(None);
    for ms in 0..60_000 {
        let counts = step(begun_us + (hold_ms + ms) * 1_000);
        if counts.waiting == 0 {
            return (ms, counts.overflowed);
        }
    }
    panic!("the release has no end");
}

#[test]
fn a_release_is_faster_than_requests_come_so_that_none_is_refused_after_it() {
    // Six thousand wait, and the setting alone would have the queue grow.
    let (ms, refused) = release_under_load(3_000);
    assert_eq!(refused, 0);
    assert!((2_000..6_000).contains(&ms), "{ms} ms");
    // Of a hold that is too short to measure anything the release learns on its way.
    let (ms, refused) = release_under_load(300);
    assert_eq!(refused, 0);
    assert!(ms < 5_000, "{ms} ms");
}

#[test]
fn the_longest_wait_is_that_of_the_last_hold() {
    let mut world = World::new();
    world.put(Some(spec(1, 900_000)));
    assert_eq!(world.ask(1), Some(false));
    world.pass(400_000);
    world.put(None);
    world.pass(0);
    let first = world.writer.hold_counts("shop");
    assert_eq!((first.hold, first.longest_wait_us), (Some(1), 400_000));
    world.put(Some(spec(2, 900_000)));
    let second = world.writer.hold_counts("shop");
    assert_eq!((second.hold, second.longest_wait_us), (Some(2), 0), "nobody has waited in it");
    assert_eq!(world.ask(1), Some(false));
    world.pass(100_000);
    // Told again, it is the same hold.
    world.put(Some(spec(2, 900_000)));
    world.put(None);
    world.pass(0);
    let second = world.writer.hold_counts("shop").since(&first);
    assert_eq!((second.longest_wait_us, second.released), (100_000, 1));
}

#[test]
fn a_client_that_leaves_in_the_moment_of_its_release_takes_no_count_back() {
    let mut world = World::new();
    world.put(Some(spec(1, 900_000)));
    assert_eq!(world.ask(1), Some(false));
    world.put(None);
    let queue = world.queue().expect("it waits");
    let _ = queue.turn(world.now_us);
    // Who tells the metrics has read this.
    let told = queue.counts_here();
    assert_eq!(told.released, 1);
    world.waiting.clear();
    assert_eq!(queue.counts_here(), told);
}

#[test]
fn what_is_kept_of_a_request_is_counted_as_it_comes_and_given_back_with_it() {
    let mut world = World::new();
    world.put(Some(spec(1, 900_000)));
    assert_eq!(world.ask(100), Some(false));
    let (_, ticket) = world.waiting.front().expect("it waits");
    let bytes = || world.writer.hold_counts("shop").bytes;
    assert!(ticket.reserve(500));
    assert_eq!(bytes(), 600);
    assert!(!ticket.reserve(401), "beyond the bound");
    ticket.settle(500, 30);
    assert_eq!(bytes(), 130);
    assert!(ticket.reserve(870));
    world.put(None);
    world.pass(0);
    assert_eq!(world.writer.hold_counts("shop").bytes, 0);
}

fn of(held: u64, unserved: u64) -> HoldCounts {
    HoldCounts { held, unserved, waiting: 1, bytes: 1, ..HoldCounts::default() }
}

#[test]
fn what_an_edge_elsewhere_has_counted_stays_when_it_is_lost_comes_back_or_ends() {
    let mut world = World::new();
    world.put(Some(spec(1, 900_000)));
    let join = |id: u64| world.reader.join(EdgeId(id), &Arc::from("edge"), 1);
    let held = || {
        let counts = world.writer.hold_counts("shop");
        (counts.held, counts.unserved, counts.waiting)
    };
    let edge = join(7);
    edge.report_hold("shop", of(100, 0), true);
    assert_eq!(held(), (0, 0, 1), "what was before it joined is not ours");
    edge.report_hold("shop", of(150, 2), false);
    assert_eq!(held(), (50, 2, 1));
    drop(edge);
    assert_eq!(held(), (50, 2, 0), "lost, it holds nobody");
    // The same process, after its lease: a new seat.
    let edge = join(7);
    edge.report_hold("shop", of(160, 3), true);
    assert_eq!(held(), (60, 3, 1), "also what it did meanwhile");
    edge.leave();
    drop(edge);
    assert_eq!(held(), (60, 3, 0));
    // However many come and go, they are counted, once.
    for id in 100..200 {
        let edge = join(id);
        edge.report_hold("shop", of(0, 0), true);
        edge.report_hold("shop", of(1, 0), false);
        drop(edge);
    }
    assert_eq!(held(), (160, 3, 0));
    let long_gone = join(100);
    long_gone.report_hold("shop", of(1, 0), true);
    assert_eq!(held(), (160, 3, 1));
}

#[test]
fn a_service_that_was_made_anew_is_told_of_by_the_same_edge() {
    let mut world = World::new();
    world.put(Some(spec(1, 900_000)));
    let edge = world.reader.join(EdgeId(7), &Arc::from("edge"), 1);
    edge.report_hold("shop", of(5, 0), false);
    world.writer.apply(&[Change::Remove("shop".into())]).expect("it is accepted");
    world.put(Some(spec(2, 900_000)));
    edge.report_hold("shop", of(3, 0), false);
    assert_eq!(world.writer.hold_counts("shop").held, 3);
}

#[test]
fn a_service_that_goes_away_lets_go_of_those_who_wait() {
    let mut world = World::new();
    world.put(Some(spec(1, 900_000)));
    assert_eq!(world.ask(1), Some(false));
    let queue = world.queue().expect("it is held");
    world.writer.apply(&[Change::Remove("shop".into())]).expect("it is accepted");
    let _ = queue.turn(world.now_us);
    world.collect();
    assert_eq!(world.went, [0]);
}

#[test]
fn a_service_that_was_never_held_has_no_queue() {
    let world = World::new();
    assert!(world.queue().is_none());
    assert_eq!(world.reader.load().held_services().count(), 0);
}
