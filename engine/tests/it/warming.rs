//! A new copy gets no traffic before it is about as fast as the old one, asked the same at the same time.

use std::sync::atomic::Ordering;

use peregrine_engine::MoveOverrides;
use peregrine_engine::model::{Phase, Rollout, RolloutState};

use crate::support::{Bench, move_to, shop};

/// A shop whose warm-up may take so long, with warm-up paths.
async fn bench_with(start_timeout_ms: u32, paths: &[&str]) -> Bench {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.start_timeout_ms = start_timeout_ms;
    spec.move_settings.warm.paths = paths.iter().map(|&path| path.to_owned()).collect();
    bench.deploy(spec, Some("host-a")).await;
    bench
}

async fn found_slow(bench: &Bench, started: &Rollout) {
    bench
        .until(started, "the new copy to be found slow", |r| {
            r.waiting_for.as_ref().is_some_and(|what| what.contains("as fast as the old copies"))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_copy_is_warmed_on_until_it_is_as_fast_as_the_old_one() {
    let bench = bench_with(20_000, &[]).await;
    bench.edge.load(2);
    bench.world.faults("host-b", |faults| faults.health_delay_ms = Some(60));
    let started = bench.start(move_to("host-b")).await;
    found_slow(&bench, &started).await;
    let now = bench.engine.state().rollouts[&started.id].clone();
    assert_eq!((now.phase, now.weight_percent), (Phase::Warm, 0));
    bench.world.behaviour(&started.plan.add[0].id).health_delay_ms.store(0, Ordering::SeqCst);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Succeeded, "{:?}", ended.problem);
    bench.edge.quiet().await;
    bench.edge.assert_lossless(5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_stays_slow_is_given_up_with_both_figures_and_gets_no_request() {
    let bench = bench_with(1_000, &["/page"]).await;
    bench.edge.load(2);
    bench.world.faults("host-b", |faults| faults.delay_ms = Some(80));
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    let problem = ended.problem.clone().expect("a reason");
    assert_eq!(problem.code, "warm.too_slow");
    let figure = |before: &str| -> f64 {
        let rest = problem.message.split_once(before).expect("the figure is named").1;
        rest.split_once(" ms").expect("in milliseconds").0.parse().expect("a number")
    };
    let (new, old) = (figure("p95 of warm-up requests "), figure("old copy "));
    assert!(new >= 80.0 && old < new, "{}", problem.message);
    assert!(problem.hint.contains("p95_increase"), "{}", problem.hint);
    bench.assert_tidy(1).await;
    let new = bench.world.seen(&ended.plan.add[0].id);
    assert_eq!(new.requests(), 0, "no client has met it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_slows_both_copies_alike_does_not_hold_a_move_up() {
    let bench = bench_with(20_000, &[]).await;
    bench.world.behaviour(&bench.serving()[0].id).health_delay_ms.store(60, Ordering::SeqCst);
    bench.world.faults("host-b", |faults| faults.health_delay_ms = Some(60));
    bench.done(move_to("host-b")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_compared_when_the_guard_on_p95_is_off() {
    let bench = bench_with(20_000, &[]).await;
    bench.world.faults("host-b", |faults| faults.health_delay_ms = Some(60));
    let overrides = MoveOverrides { p95_increase: Some(None), ..MoveOverrides::default() };
    let ask = peregrine_engine::Ask::Move {
        service: "shop".to_owned(),
        to: "host-b".to_owned(),
        from: None,
        overrides,
    };
    bench.done(ask).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_takes_effect_while_a_cold_copy_is_warmed_on() {
    let bench = bench_with(60_000, &[]).await;
    bench.world.faults("host-b", |faults| faults.health_delay_ms = Some(60));
    let started = bench.start(move_to("host-b")).await;
    found_slow(&bench, &started).await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Aborted);
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edges_are_connected_to_a_new_copy_before_its_first_traffic_and_are_not_asked_again() {
    let bench = Bench::with_shop().await;
    bench.edge.ahead().asked.lock().expect("not poisoned").clear();
    let ended = bench.done(move_to("host-b")).await;
    let serving = bench.serving()[0].clone();
    assert_eq!(serving.id, ended.plan.add[0].id);
    assert_eq!(*bench.edge.ahead().asked.lock().expect("not poisoned"), [(serving.generation, 2)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_goes_on_without_the_connections_that_edges_cannot_open() {
    let bench = Bench::with_shop().await;
    bench.edge.ahead().refuses.store(true, Ordering::SeqCst);
    let started = bench.start(move_to("host-b")).await;
    let warm_for = std::time::Instant::now();
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Succeeded, "{:?}", ended.problem);
    assert!(warm_for.elapsed() >= std::time::Duration::from_secs(1), "they were waited for");
    assert_eq!(
        bench.edge.ahead().asked.lock().expect("not poisoned").last().map(|(_, count)| *count),
        Some(2)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_left_open_to_a_copy_that_ends_each_after_its_answer() {
    let bench = Bench::with_shop().await;
    bench.edge.ahead().asked.lock().expect("not poisoned").clear();
    bench.world.faults("host-b", |faults| faults.closes = true);
    bench.done(move_to("host-b")).await;
    assert_eq!(*bench.edge.ahead().asked.lock().expect("not poisoned"), []);
}
