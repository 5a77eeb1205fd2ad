//! Receipts: they equal what the origins themselves have counted.

use std::sync::atomic::Ordering;

use peregrine_engine::model::InstanceId;
use peregrine_routing::{Enter, Lease, TrafficClass};

use crate::support::{Bench, move_to, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_crash_the_receipt_says_what_it_cannot_know() {
    let bench = Bench::with_shop().await;
    let started = bench.start(crate::support::slow_move_to("host-b", 60_000)).await;
    bench.until(&started, "the soak", |r| r.phase == peregrine_engine::model::Phase::Soak).await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
    bench.crash();
    let again = bench.reopened().await;
    for _ in 0..3 {
        assert_eq!(again.edge.get("/").await, Ok(200));
    }
    again.engine.promote(&started.id).await.expect("it goes on");
    let receipt = again.end_of(&started).await.receipt.expect("a receipt");
    assert!(receipt.notes.iter().any(|note| note.contains("restarted")), "{:?}", receipt.notes);
    assert!(receipt.requests <= 3, "the one before the crash is not made up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_the_rollout_are_counted_by_instance_and_to_the_last_one() {
    let bench = Bench::with_shop().await;
    for _ in 0..25 {
        assert_eq!(bench.edge.get("/").await, Ok(200));
    }
    let old = bench.serving()[0].id.clone();
    // Held in the first step until the clients have come and gone.
    let started = bench.start(crate::support::slow_move_to("host-b", 60_000)).await;
    bench
        .until(&started, "the soak", |r| {
            r.phase == peregrine_engine::model::Phase::Soak && r.waiting_for.is_some()
        })
        .await;
    for _ in 0..40 {
        assert_eq!(bench.edge.get("/").await, Ok(200));
    }
    bench.engine.promote(&started.id).await.expect("it goes on");
    let receipt = bench.end_of(&started).await.receipt.expect("a receipt");
    let new = &started.plan.add[0].id;
    let of = |id: &InstanceId| {
        receipt.instances.iter().find(|entry| entry.instance == *id).expect("an entry").clone()
    };
    assert_eq!(receipt.requests, 40);
    assert_eq!(receipt.failed, 0);
    assert_eq!((of(new).started, of(new).completed.request), (40, 40));
    assert_eq!(of(&old).started, 0, "the 25 before are not the rollout's");
    assert!(of(&old).drained && !of(&old).new && of(new).new);
    assert_eq!(bench.world.seen(new).requests(), 40);
    assert!(receipt.hard_cut.is_empty());
    assert_eq!(bench.engine.receipt(&started.id).await.expect("it is kept"), receipt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_both_sides_add_up_to_what_the_origins_saw() {
    let bench = Bench::with_shop().await;
    let old = bench.serving()[0].id.clone();
    let started = bench.start(crate::support::slow_move_to("host-b", 60_000)).await;
    bench.edge.load(6);
    bench.until(&started, "the soak", |r| r.phase == peregrine_engine::model::Phase::Soak).await;
    until("some requests", || (bench.edge.tally.ok.load(Ordering::SeqCst) > 100).then_some(())).await;
    bench.edge.quiet().await;
    bench.engine.promote(&started.id).await.expect("it goes on");
    let receipt = bench.end_of(&started).await.receipt.expect("a receipt");
    let new = &started.plan.add[0].id;
    let origins = bench.world.seen(&old).requests() + bench.world.seen(new).requests();
    assert_eq!(receipt.requests, origins);
    bench.edge.assert_lossless(100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_outlives_its_deadline_is_cut_and_named() {
    let bench = Bench::new().await;
    let mut spec = crate::support::shop();
    spec.move_settings.drain.request_ms = 150;
    bench.deploy(spec, Some("host-a")).await;
    let old = bench.serving()[0].id.clone();
    let mut lease = enter(&bench, TrafficClass::Request);
    let upstream = std::sync::Arc::clone(lease.upstream());
    let cutter = tokio::spawn(async move {
        upstream.class_cut_asked(TrafficClass::Request).await;
        lease.cut("r-late");
    });
    let ended = bench.done(move_to("host-b")).await;
    cutter.await.expect("it was cut");
    let receipt = ended.receipt.expect("a receipt");
    assert_eq!(receipt.hard_cut, ["r-late"]);
    assert_eq!(receipt.hard_cut_by_class["request"], ["r-late"]);
    assert!(receipt.instances.iter().any(|entry| entry.instance == old && entry.drained));
}

/// A sent lease of our own, as the small edge does not look at deadlines.
fn enter(bench: &Bench, class: TrafficClass) -> Lease {
    let table = bench.edge.reader().load();
    let service = table.lookup("shop.test", "/").expect("a route").service.clone();
    let ask = Enter { now_ms: 1_000, random: 1, hash: None, prefer: None, tried: &[], class };
    let mut lease = service.enter(ask).expect("it is entered");
    lease.mark_sent();
    lease
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_class_has_its_own_time_in_a_drain() {
    let bench = Bench::new().await;
    let mut spec = crate::support::shop();
    spec.move_settings.drain.request_ms = 700;
    spec.move_settings.drain.sse_ms = 100;
    spec.move_settings.drain.websocket_ms = 300;
    bench.deploy(spec, Some("host-a")).await;
    let old = bench.serving()[0].id.clone();
    let (mut request, mut stream) = (enter(&bench, TrafficClass::Request), enter(&bench, TrafficClass::Sse));
    let mut socket = enter(&bench, TrafficClass::WebSocket);
    let upstream = std::sync::Arc::clone(request.upstream());
    let closed = std::sync::Arc::clone(&upstream);
    let watching = tokio::spawn(async move {
        let mut closings = Vec::new();
        while closings.len() < 2 {
            let turn = closed.listen();
            for class in [TrafficClass::Sse, TrafficClass::WebSocket] {
                if closed.is_closing(class) && !closings.iter().any(|(known, _)| *known == class) {
                    assert!(!closed.is_class_cut(class), "first politely");
                    closings.push((class, std::time::Instant::now()));
                    let lease = if class == TrafficClass::Sse { &mut stream } else { &mut socket };
                    lease.soft_close();
                }
            }
            if closings.len() < 2 {
                turn.await;
            }
        }
        drop((stream, socket));
        closed.class_cut_asked(TrafficClass::Request).await;
        request.cut("r-late");
        (closings, std::time::Instant::now())
    });
    let ended = bench.done(move_to("host-b")).await;
    let (closings, cut_at) = watching.await.expect("the deadlines come");
    let [(first, sse_at), (second, socket_at)] = closings[..] else { panic!("two classes") };
    assert_eq!((first, second), (TrafficClass::Sse, TrafficClass::WebSocket));
    let least = |later: std::time::Instant, earlier, ms| {
        assert!(later - earlier >= std::time::Duration::from_millis(ms), "{:?}", later - earlier);
    };
    // Timers are late and never early, so a gap may be shorter by no more than the first was late.
    least(socket_at, sse_at, 100);
    least(cut_at, socket_at, 200);
    let receipt = ended.receipt.expect("a receipt");
    assert_eq!(receipt.hard_cut, ["r-late"]);
    let entry = receipt.instances.iter().find(|entry| entry.instance == old).expect("an entry");
    assert_eq!((entry.soft_closed.sse, entry.soft_closed.websocket, entry.drained), (1, 1, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_patient_is_not_cut_for_the_class_that_is_not_and_holds_the_drain_only_itself() {
    let bench = Bench::new().await;
    let mut spec = crate::support::shop();
    spec.move_settings.drain.request_ms = 100;
    bench.deploy(spec, Some("host-a")).await;
    let (mut request, socket) =
        (enter(&bench, TrafficClass::Request), enter(&bench, TrafficClass::WebSocket));
    let upstream = std::sync::Arc::clone(request.upstream());
    let started = bench.start(move_to("host-b")).await;
    tokio::time::timeout(crate::support::PATIENCE, upstream.class_cut_asked(TrafficClass::Request))
        .await
        .expect("the request does not have the five minutes of the socket");
    request.cut("r-late");
    drop(request);
    assert!(!upstream.is_closing(TrafficClass::WebSocket) && !upstream.is_empty());
    drop(socket);
    let receipt = bench.end_of(&started).await.receipt.expect("a receipt");
    assert_eq!(receipt.hard_cut, ["r-late"]);
}
