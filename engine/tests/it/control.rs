//! Pausing, promoting, aborting, taking back.

use std::time::{Duration, Instant};

use peregrine_engine::model::{EventBody, Phase, Rollout, RolloutState};
use peregrine_engine::{Ask, ErrorKind, MoveOverrides};

use crate::support::{Bench, move_to, shop, shop_version, slow_move_to, until};

/// Longest time for an abort to take effect, whatever is going on.
const ABORT_LIMIT: Duration = Duration::from_secs(2);

async fn abort_ends_it(bench: &Bench, started: &Rollout) {
    let begun = Instant::now();
    bench.engine.abort(&started.id).await.expect("it is heard");
    let ended = bench.end_of(started).await;
    assert_eq!(ended.state, RolloutState::Aborted);
    assert!(begun.elapsed() < ABORT_LIMIT, "it took {:?}", begun.elapsed());
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-a");
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_takes_effect_while_a_start_hangs() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| {
        faults.hang.insert("ensure");
    });
    let started = bench.start(move_to("host-b")).await;
    until("the start to hang", || (bench.world.calls("host-b", "ensure") > 0).then_some(())).await;
    abort_ends_it(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_takes_effect_while_the_new_copy_is_warmed() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(503));
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warm-up", |r| r.phase == Phase::Warm).await;
    abort_ends_it(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_takes_effect_in_the_middle_of_a_shift() {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.step_hold_ms = 30_000;
    bench.deploy(spec, Some("host-a")).await;
    bench.edge.load(4);
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the shift", |r| r.phase == Phase::Shift && r.weight_percent == 1).await;
    abort_ends_it(&bench, &started).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_takes_effect_while_a_drain_waits() {
    let bench = Bench::with_shop().await;
    let old = bench.serving()[0].id.clone();
    let slow = bench.edge.get_later("/slow");
    until("the slow request to arrive", || (bench.world.seen(&old).requests() > 0).then_some(())).await;
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the drain", |r| r.phase == Phase::Drain && r.waiting_for.is_some()).await;
    abort_ends_it(&bench, &started).await;
    bench.world.behaviour(&old).let_go.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(slow.await.expect("no panic"), Ok(200), "the way back does not cut it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_in_the_soak_turns_the_traffic_in_less_than_two_seconds_and_loses_nothing() {
    let bench = Bench::with_shop().await;
    bench.edge.load(4);
    let started = bench.start(slow_move_to("host-b", 60_000)).await;
    bench.until(&started, "the soak", |r| r.phase == Phase::Soak).await;
    abort_ends_it(&bench, &started).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_refused_once_the_old_copies_are_being_removed() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-a", |faults| {
        faults.hang.insert("remove");
    });
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the release", |r| r.phase == Phase::Release).await;
    let refused = bench.engine.abort(&started.id).await.expect_err("too late");
    assert_eq!((refused.kind, refused.code), (ErrorKind::Conflict, "move.past_return"));
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_holds_the_weights_and_a_resume_goes_on() {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.step_hold_ms = 300;
    bench.deploy(spec, Some("host-a")).await;
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the first step", |r| r.weight_percent == 1).await;
    let paused = bench.engine.pause(&started.id).await.expect("it is paused");
    assert_eq!(paused.state, RolloutState::Paused);
    let weight = bench.engine.state().rollouts[&started.id].weight_percent;
    let looks = bench.world.calls("host-b", "inspect");
    until("the supervisor to look twice", || {
        (bench.world.calls("host-b", "inspect") > looks + 2).then_some(())
    })
    .await;
    let now = bench.engine.state().rollouts[&started.id].clone();
    assert_eq!((now.weight_percent, now.state), (weight, RolloutState::Paused));
    bench.engine.resume(&started.id).await.expect("it goes on");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_ends_the_soak() {
    let bench = Bench::with_shop().await;
    let started = bench.start(slow_move_to("host-b", 60_000)).await;
    bench.until(&started, "the soak", |r| r.phase == Phase::Soak).await;
    bench.engine.promote(&started.id).await.expect("it is promoted");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Succeeded);
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_skips_the_rest_of_one_step_only() {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.step_hold_ms = 30_000;
    bench.deploy(spec, Some("host-a")).await;
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the first step", |r| r.weight_percent == 1).await;
    bench.engine.promote(&started.id).await.expect("it is promoted");
    bench.until(&started, "the second step", |r| r.weight_percent == 10).await;
    let looks = bench.world.calls("host-b", "inspect");
    until("the supervisor to look", || (bench.world.calls("host-b", "inspect") > looks + 2).then_some(()))
        .await;
    assert_eq!(bench.engine.state().rollouts[&started.id].weight_percent, 10);
    abort_ends_it(&bench, &started).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_rollout_of_the_same_service_is_refused_with_the_running_one() {
    let bench = Bench::with_shop().await;
    let started = bench.start(slow_move_to("host-b", 60_000)).await;
    let refused = bench
        .engine
        .start(move_to("host-b"), "second".to_owned(), None, None)
        .await
        .expect_err("one at a time");
    assert_eq!((refused.kind, refused.code), (ErrorKind::Conflict, "move.in_progress"));
    assert_eq!(refused.rollout, Some(started.id.clone()));
    let planned = bench.engine.plan(move_to("host-b")).await.expect_err("nor planned");
    assert_eq!(planned.rollout, Some(started.id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_starts_at_the_same_time_are_one_rollout_and_one_refusal() {
    let bench = Bench::with_shop().await;
    let (one, two) = tokio::join!(
        bench.engine.start(slow_move_to("host-b", 0), "one".to_owned(), None, None),
        bench.engine.start(slow_move_to("host-b", 0), "two".to_owned(), None, None),
    );
    assert_eq!(usize::from(one.is_ok()) + usize::from(two.is_ok()), 1, "{one:?} {two:?}");
    let refused = one.err().or(two.err()).expect("one is refused");
    assert_eq!(refused.code, "move.in_progress");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_gives_the_same_rollout_and_another_ask_with_it_is_refused() {
    let bench = Bench::with_shop().await;
    let key = Some("k1".to_owned());
    let first = bench.engine.start(move_to("host-b"), "one".to_owned(), None, key.clone()).await;
    let first = first.expect("accepted").expect("a rollout");
    let again = bench.engine.start(move_to("host-b"), "one".to_owned(), None, key.clone()).await;
    assert_eq!(again.expect("the same").expect("a rollout").id, first.id);
    bench.end_of(&first).await;
    let later = bench.engine.start(move_to("host-b"), "one".to_owned(), None, key.clone()).await;
    assert_eq!(later.expect("still the same").expect("a rollout").id, first.id);
    let other =
        bench.engine.start(move_to("host-a"), "one".to_owned(), None, key).await.expect_err("another ask");
    assert_eq!((other.kind, other.code), (ErrorKind::Invalid, "idempotency.mismatch"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_that_has_changed_since_it_was_shown_is_not_started() {
    let bench = Bench::with_shop().await;
    let shown = bench.engine.plan(move_to("host-b")).await.expect("a plan");
    assert_eq!(
        shown.hash,
        bench.engine.plan(move_to("host-b")).await.expect("a plan").hash,
        "ids are not in it"
    );
    bench.deploy(shop_version("two"), None).await;
    let refused = bench.engine.start(move_to("host-b"), "t".to_owned(), Some(shown.hash), None).await;
    assert_eq!(refused.expect_err("it has changed").code, "plan.changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ended_move_is_taken_back_by_a_move_of_its_own() {
    let bench = Bench::with_shop().await;
    let moved = bench.done(move_to("host-b")).await;
    let back = bench.engine.rollback_rollout(&moved.id, None).await.expect("it is taken back");
    assert_ne!(back.id, moved.id);
    assert_eq!(bench.end_of(&back).await.state, RolloutState::Succeeded);
    assert_eq!(bench.serving()[0].machine, "host-a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_brings_the_version_before_back_with_its_settings() {
    let bench = Bench::with_shop().await;
    let mut second = shop_version("two");
    second.resources.pids = 77;
    let deployed = bench.deploy(second, None).await;
    assert_eq!(bench.serving()[0].version, 2);
    let back = bench.engine.rollback_rollout(&deployed.id, None).await.expect("it is taken back");
    assert_eq!(bench.end_of(&back).await.state, RolloutState::Succeeded);
    assert_eq!(bench.serving()[0].version, 1);
    let state = bench.engine.state();
    assert_eq!(state.services["shop"].spec.workload, shop().workload);
    assert_eq!(state.services["shop"].spec.resources.pids, 1024);
    assert_eq!((state.services["shop"].version, state.services["shop"].previous_version), (Some(1), Some(2)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_is_scaled_up_and_down_under_load_without_loss() {
    let bench = Bench::with_shop().await;
    bench.edge.load(4);
    let scale = |replicas, machine: Option<&str>| Ask::Scale {
        service: "shop".to_owned(),
        replicas,
        machine: machine.map(str::to_owned),
    };
    bench.done(scale(3, Some("host-b"))).await;
    bench.assert_tidy(3).await;
    let shares: Vec<f64> = bench
        .engine
        .instances(Some("shop"), true)
        .await
        .expect("they are known")
        .iter()
        .map(|v| v.weight_percent)
        .collect();
    assert!(shares.iter().all(|share| (share - 33.333).abs() < 0.1), "{shares:?}");
    bench.done(move_to("host-b")).await;
    bench.assert_tidy(3).await;
    bench.done(scale(1, None)).await;
    bench.assert_tidy(1).await;
    assert_eq!(bench.engine.state().services["shop"].spec.replicas, 1);
    bench.edge.quiet().await;
    bench.edge.assert_lossless(50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_service_is_drained_and_forgotten() {
    let bench = Bench::with_shop().await;
    let slow = bench.edge.get_later("/slow");
    let copy = bench.serving()[0].id.clone();
    until("the slow request to arrive", || (bench.world.seen(&copy).requests() > 0).then_some(())).await;
    let (handle, id) = (bench.engine.clone(), copy.clone());
    let removing = tokio::spawn(async move { handle.remove_service("shop").await });
    until("the route to go", || bench.edge.reader().load().lookup("shop.test", "/").is_none().then_some(()))
        .await;
    assert!(bench.world.runs("host-a", &id), "somebody is inside");
    bench.world.behaviour(&copy).let_go.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(slow.await.expect("no panic"), Ok(200));
    removing.await.expect("no panic").expect("it is removed");
    assert!(bench.engine.state().services.is_empty() && bench.engine.state().versions.is_empty());
    bench.assert_tidy(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_settings_needs_no_rollout_and_is_in_the_table_at_once() {
    let bench = Bench::with_shop().await;
    let mut spec = shop();
    spec.traffic.response_head_timeout_ms = 1_234;
    let ask = Ask::Deploy { spec: Box::new(spec), machine: None, overrides: MoveOverrides::default() };
    let started = bench.engine.start(ask, "settings".to_owned(), None, None).await.expect("accepted");
    assert_eq!(started, None);
    let table = bench.edge.reader().load();
    let policy = table.lookup("shop.test", "/").expect("a route").service.policy().clone();
    assert_eq!(policy.response_head_timeout_ms, 1_234);
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_rollout_tells_so_in_its_events() {
    use futures_util::StreamExt as _;
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| faults.exit_at_start = Some(3));
    let ended = bench.ended(move_to("host-b")).await;
    let mut events = bench.engine.events(0);
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        if event.rollout == Some(ended.id.clone()) {
            let done = matches!(event.body, EventBody::Done { .. });
            seen.push(event.body);
            if done {
                break;
            }
        }
    }
    assert!(seen.iter().any(|body| matches!(body, EventBody::TurnedBack { problem } if problem.code == "instance.exited" && problem.message.contains("last words"))), "{seen:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_whose_asker_hangs_up_is_carried_out_all_the_same() {
    let bench = Bench::with_shop().await;
    for turn in 0..40_u32 {
        let to = if bench.serving()[0].machine == "host-a" { "host-b" } else { "host-a" };
        let asking = bench.engine.start(move_to(to), "hang up".to_owned(), None, None);
        // Hung up at ever later moments: before it is heard, while it is stored, right after.
        drop(tokio::time::timeout(Duration::from_micros(25) * turn, asking).await);
        until("the rollout to be there and to end", || {
            let state = bench.engine.state();
            let ended = state.rollouts.values().filter(|rollout| rollout.state.is_terminal()).count();
            (ended == turn as usize + 2).then_some(())
        })
        .await;
        bench.assert_tidy(1).await;
    }
}
