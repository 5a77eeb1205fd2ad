//! What the receipt of a cutover says of requests that no copy has seen.

use peregrine_engine::model::{Phase, RolloutState};

use crate::support::{Bench, HOST, move_to, shop, until};

async fn with_writer() -> Bench {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.single_writer = true;
    spec.move_settings.stop_grace_ms = 100;
    spec.move_settings.start_timeout_ms = 10_000;
    bench.deploy(spec, Some("host-a")).await;
    bench
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_for_which_no_copy_was_there_are_among_the_failed_ones_of_the_receipt() {
    let bench = with_writer().await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    let table = bench.edge.reader().load();
    let queue = table.lookup(HOST, "/").and_then(|found| found.service.hold()).expect("it is held");
    (0..3).for_each(|_| queue.note_unserved());
    bench.engine.abort(&started.id).await.expect("it is heard");
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Aborted);
    let receipt = ended.receipt.expect("a receipt");
    assert_eq!(receipt.failed, 3, "{receipt:?}");
    assert!(receipt.notes.iter().any(|note| note.contains("3 requests were answered 503")), "{receipt:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_wait_of_a_receipt_is_that_of_its_own_cutover() {
    const LONG_MS: u64 = 2_000;
    let bench = with_writer().await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    let begun = std::time::Instant::now();
    let waits = bench.edge.get_later("/");
    until("it has waited for long", || {
        (begun.elapsed() > std::time::Duration::from_millis(LONG_MS)).then_some(())
    })
    .await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    let first = bench.end_of(&started).await.receipt.expect("a receipt");
    assert_eq!(waits.await.expect("no panic"), Ok(200));
    assert!(first.longest_extra_wait_ms >= LONG_MS, "{first:?}");
    bench.world.faults("host-b", |faults| faults.health_status = None);
    let second = bench.done(move_to("host-b")).await.receipt.expect("a receipt");
    assert!(second.longest_extra_wait_ms < LONG_MS, "{second:?}");
    assert_eq!(second.failed, 0);
}
