//! Entering, retiring and the receipt, also while many do it at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use peregrine_routing::{Draining, Generation, Lease, PerClass, TrafficClass, Upstream};

use super::support::{World, pool, service};

/// Blocks the thread until the future is done.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        thread::park();
    }
}

fn one() -> Arc<Upstream> {
    let world = World::of(service(vec![pool("main", 1, &[7])]));
    Arc::clone(world.upstream(7))
}

fn enter(upstream: &Arc<Upstream>, class: TrafficClass) -> Lease {
    upstream.enter(class).expect("is open")
}

#[test]
fn the_receipt_adds_up_every_lease_by_its_last_class_and_end() {
    let upstream = one();
    let mut finished = enter(&upstream, TrafficClass::Request);
    finished.mark_sent();
    finished.mark_sent();
    finished.add_bytes(10, 200);
    let mut stream = enter(&upstream, TrafficClass::Request);
    stream.mark_sent();
    stream.reclassify(TrafficClass::Sse);
    stream.add_bytes(1, 0);
    let mut socket = enter(&upstream, TrafficClass::WebSocket);
    socket.mark_sent();
    socket.soft_close();
    let mut slow = enter(&upstream, TrafficClass::Transfer);
    slow.mark_sent();
    slow.cut("request-1");
    slow.cut("request-1");
    slow.soft_close();
    let unsent = enter(&upstream, TrafficClass::Held);
    let live = upstream.receipt();
    assert_eq!((live.in_flight.total(), live.in_flight[TrafficClass::Request]), (5, 1));
    assert_eq!((live.in_flight[TrafficClass::Sse], live.in_flight[TrafficClass::Held]), (1, 1));
    upstream.retire();
    assert!(!upstream.receipt().empty);
    drop((finished, stream, socket, slow, unsent));
    let receipt = upstream.receipt();
    let mut completed = PerClass::default();
    completed[TrafficClass::Request] = 1;
    completed[TrafficClass::Sse] = 1;
    let mut soft_closed = PerClass::default();
    soft_closed[TrafficClass::WebSocket] = 1;
    assert_eq!(receipt.generation, Generation(7));
    assert!(receipt.empty);
    assert_eq!(receipt.started, 4);
    assert_eq!(receipt.completed, completed);
    assert_eq!(receipt.soft_closed, soft_closed);
    assert_eq!(receipt.hard_cut, ["request-1"]);
    assert_eq!(receipt.in_flight, PerClass::default());
    assert_eq!((receipt.bytes_to_upstream, receipt.bytes_to_client), (11, 200));
}

#[test]
fn a_retired_upstream_lets_nobody_in_and_is_drained_when_the_last_has_left() {
    let upstream = one();
    let last = enter(&upstream, TrafficClass::Request);
    upstream.retire();
    upstream.retire();
    assert_eq!(upstream.enter(TrafficClass::Request).map(drop), Err(Draining(Generation(7))));
    let drained = {
        let upstream = Arc::clone(&upstream);
        thread::spawn(move || block_on(upstream.drained()))
    };
    assert!(!upstream.is_empty());
    drop(last);
    drained.join().expect("no panic");
    assert!(upstream.is_empty() && upstream.receipt().empty);
}

#[test]
fn an_upstream_without_leases_is_drained_by_retiring_it() {
    let upstream = one();
    let drained = {
        let upstream = Arc::clone(&upstream);
        thread::spawn(move || block_on(upstream.drained()))
    };
    upstream.retire();
    drained.join().expect("no panic");
}

#[test]
fn whoever_waits_for_the_hard_deadline_is_told() {
    let upstream = one();
    let waiting = {
        let upstream = Arc::clone(&upstream);
        thread::spawn(move || block_on(upstream.cut_asked()))
    };
    assert!(!upstream.is_cut());
    upstream.cut();
    waiting.join().expect("no panic");
    assert!(upstream.is_cut());
}

#[test]
fn whoever_waits_for_the_deadline_of_one_class_is_told_of_it_and_not_of_another() {
    let upstream = one();
    let waiting = {
        let upstream = Arc::clone(&upstream);
        thread::spawn(move || {
            block_on(upstream.class_cut_asked(TrafficClass::Request));
            TrafficClass::ALL.map(|class| upstream.is_class_cut(class))
        })
    };
    upstream.close_class(TrafficClass::WebSocket);
    assert!(upstream.is_closing(TrafficClass::WebSocket) && !upstream.is_class_cut(TrafficClass::WebSocket));
    upstream.cut_class(TrafficClass::Request);
    let seen = waiting.join().expect("no panic");
    assert_eq!(seen, TrafficClass::ALL.map(|class| class == TrafficClass::Request));
    assert!(!upstream.is_cut(), "the other classes have their time");
    upstream.cut();
    assert!(TrafficClass::ALL.into_iter().all(|class| upstream.is_class_cut(class)));
    assert!(upstream.is_cut());
}

#[test]
fn every_deadline_wakes_who_listens_for_the_next_turn() {
    let upstream = one();
    let close: fn(&Upstream) = |upstream| upstream.close_class(TrafficClass::Sse);
    let cut: fn(&Upstream) = |upstream| upstream.cut_class(TrafficClass::Sse);
    for deed in [close, cut, Upstream::cut] {
        let mut turn = std::pin::pin!(upstream.listen());
        let mut poll = || turn.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(poll(), Poll::Pending);
        deed(&upstream);
        assert_eq!(poll(), Poll::Ready(()));
    }
}

/// What one thread did with its leases, as it knows it itself.
#[derive(Default)]
struct Account {
    started: u64,
    completed: PerClass<u64>,
    soft_closed: PerClass<u64>,
    cut: Vec<String>,
    bytes: u64,
}

impl Account {
    /// One lease with a fate that depends on `i`, held while another is taken.
    fn visit(&mut self, upstream: &Arc<Upstream>, who: usize, i: u64) -> Result<(), Draining> {
        let class = TrafficClass::ALL[(i % 6) as usize];
        let mut lease = upstream.enter(class)?;
        let _unsent = upstream.enter(TrafficClass::Request).ok().filter(|_| i.is_multiple_of(3));
        lease.mark_sent();
        self.started += 1;
        lease.add_bytes(i, 0);
        self.bytes += i;
        let last = TrafficClass::ALL[(i / 6 % 6) as usize];
        lease.reclassify(last);
        match i % 11 {
            0 => {
                lease.soft_close();
                self.soft_closed[last] += 1;
            }
            1 => {
                let id = format!("{who}-{i}");
                lease.cut(&id);
                self.cut.push(id);
            }
            _ => self.completed[last] += 1,
        }
        Ok(())
    }
}

#[test]
fn while_threads_come_and_go_retiring_is_final_and_the_receipt_is_the_sum_of_their_leases() {
    const THREADS: usize = 4;
    for round in 0..200_u64 {
        let upstream = one();
        let (begin, is_retired) = (Barrier::new(THREADS + 2), AtomicBool::new(false));
        let entered = AtomicU64::new(0);
        let (accounts, at_drain) = thread::scope(|scope| {
            let visitors: Vec<_> = (0..THREADS)
                .map(|who| {
                    let (upstream, begin, is_retired, entered) = (&upstream, &begin, &is_retired, &entered);
                    scope.spawn(move || {
                        let mut account = Account::default();
                        begin.wait();
                        for i in 0.. {
                            let was_retired = is_retired.load(SeqCst);
                            let visit = account.visit(upstream, who, i);
                            assert!(!(was_retired && visit.is_ok()), "entered after retire had returned");
                            if visit.is_err() {
                                break;
                            }
                            entered.fetch_add(1, SeqCst);
                        }
                        account
                    })
                })
                .collect();
            let waiting = scope.spawn(|| {
                begin.wait();
                block_on(upstream.drained());
                // While others may still be knocking.
                upstream.receipt()
            });
            begin.wait();
            // A random moment, counted in visits and not in time.
            while entered.load(SeqCst) < round * 7 % 500 {
                thread::yield_now();
            }
            upstream.retire();
            is_retired.store(true, SeqCst);
            let accounts: Vec<Account> = visitors.into_iter().map(|v| v.join().expect("no panic")).collect();
            (accounts, waiting.join().expect("no panic"))
        });
        let mut sum = Account::default();
        for account in accounts {
            sum.started += account.started;
            sum.completed.add(&account.completed);
            sum.soft_closed.add(&account.soft_closed);
            sum.bytes += account.bytes;
            sum.cut.extend(account.cut);
        }
        let mut receipt = upstream.receipt();
        assert_eq!(at_drain, receipt, "what was seen at the drain was final");
        assert!(receipt.empty);
        receipt.hard_cut.sort_unstable();
        sum.cut.sort_unstable();
        assert_eq!(receipt.started, sum.started);
        assert_eq!(receipt.completed, sum.completed);
        assert_eq!(receipt.soft_closed, sum.soft_closed);
        assert_eq!(receipt.hard_cut, sum.cut);
        assert_eq!(receipt.bytes_to_upstream, sum.bytes);
        assert_eq!(receipt.in_flight, PerClass::default());
        let ended = sum.completed.total() + sum.soft_closed.total() + sum.cut.len() as u64;
        assert_eq!(receipt.started, ended);
    }
}

#[test]
fn while_copies_are_switched_every_request_finds_one_and_none_enters_a_retired_one() {
    const SWITCHES: u64 = 2_000;
    let mut world = World::of(service(vec![pool("main", 1, &[0])]));
    let oldest_open = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let requests: Vec<_> = (0..3_u64)
            .map(|seed| {
                let mut reader = world.reader.cached();
                let (oldest_open, is_over) = (&oldest_open, &is_over);
                scope.spawn(move || {
                    let mut served = 0_u64;
                    while !is_over.load(SeqCst) {
                        let open = oldest_open.load(SeqCst);
                        let lease = serve_one(&mut reader, seed ^ served);
                        let generation = lease.upstream().generation().0;
                        assert!(generation >= open, "{generation} was retired before {open} was published");
                        served += 1;
                    }
                    served
                })
            })
            .collect();
        for generation in 1..=SWITCHES {
            let retired = world.put(service(vec![pool("main", 1, &[generation])]));
            oldest_open.store(generation, SeqCst);
            assert_eq!(retired.len(), 1);
            block_on(retired[0].drained());
            assert!(retired[0].receipt().empty);
            world.writer.forget(Generation(generation - 1));
        }
        is_over.store(true, SeqCst);
        for request in requests {
            assert!(request.join().expect("no panic") > 0);
        }
    });
}

/// What an edge does: look, enter, and look again where the table has changed meanwhile.
fn serve_one(reader: &mut peregrine_routing::CachedReader, random: u64) -> Lease {
    loop {
        let table = reader.load();
        let ask = peregrine_routing::Enter {
            now_ms: 1,
            random,
            hash: None,
            prefer: None,
            tried: &[],
            class: TrafficClass::Request,
        };
        let (version, found) = (table.version(), table.lookup("web.test", "/").expect("web is routed"));
        match found.service.enter(ask) {
            Ok(lease) => return lease,
            Err(_) => assert!(reader.load().version() > version, "refused, and no newer table to look at"),
        }
    }
}
