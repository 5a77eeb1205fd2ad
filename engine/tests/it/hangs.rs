//! Machines that never answer: whatever the phase, an ask to go back takes effect within two seconds.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peregrine_engine::model::{InstanceState, Phase, Rollout, RolloutState};
use peregrine_engine::{Ask, MoveOverrides};

use crate::support::{Bench, shop_image, until, until_within};

/// Longest time from the ask to its effect.
const ABORT_LIMIT: Duration = Duration::from_secs(2);
/// Every verb of a runtime that a rollout uses.
const VERBS: [&str; 8] = ["info", "ensure", "inspect", "remove", "list", "image", "pull", "import"];

fn ask(soak_ms: u64) -> Ask {
    let overrides =
        MoveOverrides { steps: Some(vec![50, 100]), soak_ms: Some(soak_ms), ..MoveOverrides::default() };
    Ask::Move { service: "shop".to_owned(), to: "host-b".to_owned(), from: None, overrides }
}

async fn bench(step_hold_ms: u32) -> Bench {
    let bench = Bench::with_image().await;
    let mut spec = shop_image("shop:1");
    spec.move_settings.step_hold_ms = step_hold_ms;
    spec.move_settings.step_max_ms = step_hold_ms.max(20);
    spec.move_settings.start_timeout_ms = 60_000;
    bench.deploy(spec, Some("host-a")).await;
    bench
}

fn hang(bench: &Bench, machine: &str) {
    bench.world.faults(machine, |faults| faults.hang.extend(VERBS));
}

/// Everything hangs from here on; then somebody asks to go back.
async fn aborts_in_time(bench: &Bench, rollout: &Rollout) {
    hang(bench, "host-a");
    hang(bench, "host-b");
    let begun = Instant::now();
    bench.engine.abort(&rollout.id).await.expect("it is heard");
    until_within(ABORT_LIMIT, "the way back, with the traffic on the old copy", || {
        let state = bench.engine.state();
        let now = &state.rollouts[&rollout.id];
        let back = now.state == RolloutState::RollingBack || now.state.is_terminal();
        let old = &state.instances[&rollout.plan.retire[0]];
        (back && now.weight_percent == 0 && old.state == InstanceState::Serving).then_some(())
    })
    .await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
    assert!(begun.elapsed() < ABORT_LIMIT, "it took {:?}", begun.elapsed());
    // Another service goes its own way meanwhile.
    let plan = bench.engine.state().services["shop"].rollout.clone();
    assert!(plan.is_some_and(|id| id == rollout.id), "the service is still claimed: nothing is half undone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_followed_while_an_image_never_comes() {
    let bench = bench(5).await;
    bench.world.faults("host-b", |faults| faults.hang.extend(["import", "pull"]));
    let started = bench.start(ask(0)).await;
    until("the image to be on its way", || (bench.world.calls("host-b", "import") > 0).then_some(())).await;
    hang(&bench, "host-a");
    hang(&bench, "host-b");
    bench.engine.abort(&started.id).await.expect("it is heard");
    until_within(ABORT_LIMIT, "the way back", || {
        (bench.engine.state().rollouts[&started.id].state != RolloutState::Running).then_some(())
    })
    .await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_followed_while_a_start_never_answers() {
    let bench = bench(5).await;
    bench.world.faults("host-b", |faults| faults.hang.extend(["ensure"]));
    let started = bench.start(ask(0)).await;
    until("the start to be asked for", || (bench.world.calls("host-b", "ensure") > 0).then_some(())).await;
    aborts_in_time(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_followed_while_a_copy_never_gets_warm() {
    let bench = bench(5).await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(503));
    let started = bench.start(ask(0)).await;
    bench.until(&started, "the warm-up", |r| r.phase == Phase::Warm).await;
    aborts_in_time(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_followed_in_the_middle_of_a_shift() {
    let bench = bench(60_000).await;
    let started = bench.start(ask(0)).await;
    bench.until(&started, "half of the traffic", |r| r.weight_percent == 50).await;
    aborts_in_time(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_followed_while_an_old_copy_never_gets_empty() {
    let bench = bench(5).await;
    let old = bench.serving()[0].id.clone();
    let inside = bench.edge.get_later("/slow");
    until("somebody to be inside the old copy", || (bench.world.seen(&old).requests() > 0).then_some(()))
        .await;
    let started = bench.start(ask(0)).await;
    bench.until(&started, "the drain", |r| r.phase == Phase::Drain).await;
    aborts_in_time(&bench, &started).await;
    bench.world.behaviour(&old).let_go.store(true, Ordering::SeqCst);
    assert_eq!(inside.await.expect("no panic"), Ok(200), "who was inside is not cut");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_followed_in_a_soak() {
    let bench = bench(5).await;
    let started = bench.start(ask(60_000)).await;
    bench.until(&started, "the soak", |r| r.phase == Phase::Soak).await;
    let old = started.plan.retire[0].clone();
    until("the old copy to stand by", || {
        (bench.engine.state().instances[&old].state == InstanceState::Soaking).then_some(())
    })
    .await;
    aborts_in_time(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_never_answers_is_given_up_at_its_deadline_and_the_service_is_untouched() {
    let bench = Bench::with_image().await;
    let mut spec = shop_image("shop:1");
    spec.move_settings.start_timeout_ms = 300;
    bench.deploy(spec, Some("host-a")).await;
    bench.world.faults("host-b", |faults| faults.hang.extend(["ensure", "inspect"]));
    let ended = bench.ended(ask(0)).await;
    assert_eq!(ended.state, RolloutState::Failed);
    assert_eq!(ended.problem.expect("a reason").code, "instance.start_timeout");
    assert_eq!(bench.edge.get("/").await, Ok(200));
}
