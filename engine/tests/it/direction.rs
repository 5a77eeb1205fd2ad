//! Health decides the way: a bad new copy sends a rollout back, a dead old one sends it forward.

use std::sync::atomic::Ordering;
use std::time::Duration;

use peregrine_engine::model::{Phase, Rollout, RolloutState};
use peregrine_engine::{Ask, MoveOverrides};

use crate::support::{Bench, move_to, shop, shop_version, until, until_within};

/// A move that stays for long at each of its steps.
fn held_move(steps: Vec<u8>) -> Ask {
    Ask::Move {
        service: "shop".to_owned(),
        to: "host-b".to_owned(),
        from: None,
        overrides: MoveOverrides { steps: Some(steps), ..MoveOverrides::default() },
    }
}

async fn held_bench() -> Bench {
    let bench = Bench::new().await;
    let mut spec = shop();
    // Long enough that whatever happens, happens in the step.
    spec.move_settings.step_hold_ms = 10_000;
    spec.move_settings.step_max_ms = 10_000;
    bench.deploy(spec, Some("host-a")).await;
    bench
}

async fn at_weight(bench: &Bench, rollout: &Rollout, percent: u8) {
    bench.until(rollout, "the weight", |r| r.phase == Phase::Shift && r.weight_percent == percent).await;
    let new = rollout.plan.add[0].id.clone();
    until("the new copy to serve", || {
        let state = bench.engine.state();
        (state.instances[&new].state == peregrine_engine::model::InstanceState::Serving).then_some(())
    })
    .await;
}

async fn new_copy_dies_at(percent: u8) {
    let bench = held_bench().await;
    bench.edge.load(4);
    let steps = if percent == 100 { vec![100] } else { vec![percent, 100] };
    let started = bench.start(held_move(steps)).await;
    at_weight(&bench, &started, percent).await;
    bench.world.kill(&started.plan.add[0].id);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack);
    assert_eq!(ended.problem.expect("a reason").code, "instance.died");
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-a");
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_dies_at_half_sends_it_back() {
    new_copy_dies_at(50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_dies_with_all_the_traffic_sends_it_back() {
    new_copy_dies_at(100).await;
}

async fn old_copy_dies_at(percent: u8) {
    let bench = held_bench().await;
    bench.edge.load(4);
    let old = bench.serving()[0].id.clone();
    let steps = if percent == 100 { vec![100] } else { vec![percent, 100] };
    let started = bench.start(held_move(steps)).await;
    at_weight(&bench, &started, percent).await;
    bench.world.kill(&old);
    // All of the traffic is on the living copy within a second, long before the step's own time.
    until_within(Duration::from_millis(1_500), "the traffic on the new copy", || {
        (bench.engine.state().rollouts[&started.id].weight_percent == 100).then_some(())
    })
    .await;
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Succeeded, "{:?}", ended.problem);
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-b");
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_that_dies_at_half_sends_it_forward() {
    old_copy_dies_at(50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_that_dies_after_the_last_shift_sends_it_forward() {
    old_copy_dies_at(100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_gets_unhealthy_sends_it_back() {
    let bench = held_bench().await;
    let started = bench.start(held_move(vec![50, 100])).await;
    at_weight(&bench, &started, 50).await;
    bench.world.behaviour(&started.plan.add[0].id).health_status.store(503, Ordering::SeqCst);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack);
    assert_eq!(ended.problem.expect("a reason").code, "instance.unwell");
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_answers_with_errors_fails_its_guard_and_clients_see_few_of_them() {
    let bench = held_bench().await;
    bench.edge.load(8);
    bench.world.faults("host-b", |faults| faults.status = Some(500));
    let started = bench.start(held_move(vec![10, 100])).await;
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack);
    assert_eq!(ended.problem.expect("a reason").code, "guard.failed");
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-a");
    let receipt = ended.receipt.expect("a receipt");
    assert!(receipt.failed > 0 && receipt.failed < 200, "{}", receipt.failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_is_much_slower_fails_its_guard() {
    let bench = held_bench().await;
    bench.edge.load(8);
    bench.world.faults("host-b", |faults| faults.delay_ms = Some(60));
    let started = bench.start(held_move(vec![50, 100])).await;
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack, "{:?}", ended.problem);
    assert!(ended.problem.expect("a reason").message.contains("p95"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_soak_a_dying_new_copy_gives_way_to_the_old_one_at_once() {
    let bench = Bench::with_shop().await;
    bench.edge.load(4);
    let started = bench.start(crate::support::slow_move_to("host-b", 60_000)).await;
    bench.until(&started, "the soak", |r| r.phase == Phase::Soak).await;
    let old = started.plan.retire[0].clone();
    until("the old copy to stand by", || {
        (bench.engine.state().instances[&old].state == peregrine_engine::model::InstanceState::Soaking)
            .then_some(())
    })
    .await;
    bench.world.kill(&started.plan.add[0].id);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack);
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ask_to_go_back_does_not_send_the_traffic_to_a_dead_copy() {
    let bench = Bench::with_shop().await;
    let old = bench.serving()[0].id.clone();
    bench.world.faults("host-a", |faults| {
        faults.fail.insert("ensure", 1_000);
    });
    let started = bench.start(slow_soak()).await;
    bench.until(&started, "the soak", |r| r.phase == Phase::Soak).await;
    bench.world.kill(&old);
    let looks = bench.world.calls("host-a", "inspect");
    until("the supervisor to look", || (bench.world.calls("host-a", "inspect") > looks + 4).then_some(()))
        .await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    let looks = bench.world.calls("host-b", "inspect");
    until("the supervisor to look again", || {
        (bench.world.calls("host-b", "inspect") > looks + 2).then_some(())
    })
    .await;
    assert_eq!(bench.engine.state().rollouts[&started.id].state, RolloutState::Running);
    assert_eq!(bench.edge.get("/").await, Ok(200));
    // When the old copy can be brought up again, the ask is followed.
    bench.world.faults("host-a", |faults| faults.fail.clear());
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Aborted);
    bench.assert_tidy(1).await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

fn slow_soak() -> Ask {
    Ask::Move {
        service: "shop".to_owned(),
        to: "host-b".to_owned(),
        from: None,
        overrides: MoveOverrides {
            soak_ms: Some(60_000),
            steps: Some(vec![100]),
            ..MoveOverrides::default()
        },
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_copies_under_load_are_never_sent_back() {
    let bench = Bench::with_shop().await;
    bench.edge.load(8);
    for turn in 0..20 {
        let ended = bench.ended(move_to(if turn % 2 == 0 { "host-b" } else { "host-a" })).await;
        assert_eq!(ended.state, RolloutState::Succeeded, "turn {turn}: {:?}", ended.problem);
    }
    bench.edge.quiet().await;
    bench.edge.assert_lossless(500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_traffic_the_probes_decide_and_the_deploy_goes_on() {
    let bench = Bench::with_shop().await;
    let ended = bench.deploy(shop_version("two"), None).await;
    assert_eq!(ended.receipt.expect("a receipt").requests, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_copies_that_die_on_the_way_back_turn_it_forward_again() {
    let bench = held_bench().await;
    let old = bench.serving()[0].id.clone();
    bench.world.faults("host-a", |faults| {
        faults.fail.insert("ensure", u32::MAX);
    });
    let started = bench.start(held_move(vec![50, 100])).await;
    at_weight(&bench, &started, 50).await;
    let new = started.plan.add[0].id.clone();
    // Whoever is inside the new copy keeps the way back from its end.
    let mut inside = Vec::new();
    until("somebody to be inside the new copy", || {
        inside.push(bench.edge.get_later("/slow"));
        (bench.world.seen(&new).requests() > 0).then_some(())
    })
    .await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    until("the way back to drain the new copy", || {
        let state = bench.engine.state();
        (state.instances[&new].state == peregrine_engine::model::InstanceState::Draining).then_some(())
    })
    .await;
    assert_eq!(bench.engine.state().rollouts[&started.id].state, RolloutState::RollingBack);
    bench.world.kill(&old);
    // It may be at its end before anybody looks: the reason stays.
    let turned = |r: &Rollout| r.problem.as_ref().is_some_and(|why| why.code == "instance.old_died");
    bench.until(&started, "the traffic to turn forward", turned).await;
    bench.world.behaviour(&new).let_go.store(true, Ordering::SeqCst);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Succeeded, "{:?} {:?}", ended.problem, ended.leftovers);
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].id, new, "in a new stretch of service");
    assert_eq!(bench.edge.get("/").await, Ok(200));
    let mut answers = Vec::new();
    for request in inside {
        answers.push(request.await.expect("a client does not panic"));
    }
    assert!(answers.contains(&Ok(200)), "who was inside the new copy was waited for: {answers:?}");
}
