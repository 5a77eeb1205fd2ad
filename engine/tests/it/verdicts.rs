//! The third verdict: what holds a step, and how a hold ends.

use std::sync::atomic::Ordering;

use futures_util::StreamExt as _;
use peregrine_engine::model::{Control, EventBody, HoldThen, Rollout, RolloutState};
use peregrine_engine::{Ask, MoveOverrides};

use crate::support::{Bench, HOST, PATIENCE, move_to, shop, until};

/// A move at 10 % on which one request of the new copy has failed: not enough for a verdict, too much to go on.
async fn suspected(hold_then: HoldThen) -> (Bench, Rollout) {
    let bench = Bench::new().await;
    let mut spec = shop();
    // Longer than a block of evidence.
    (spec.move_settings.step_hold_ms, spec.move_settings.step_max_ms) = (1_500, 1_500);
    (spec.move_settings.hold_max_ms, spec.move_settings.hold_then) = (300, hold_then);
    bench.deploy(spec, Some("host-a")).await;
    let overrides = MoveOverrides { steps: Some(vec![10, 100]), ..MoveOverrides::default() };
    let started = bench
        .start(Ask::Move { service: "shop".to_owned(), to: "host-b".to_owned(), from: None, overrides })
        .await;
    let new = started.plan.add[0].id.clone();
    until("the first weight", || {
        let state = bench.engine.state();
        (state.instances[&new].state == peregrine_engine::model::InstanceState::Serving).then_some(())
    })
    .await;
    bench.world.behaviour(&new).status.store(500, Ordering::SeqCst);
    let mut requests = 0;
    while bench.edge.get("/").await == Ok(200) {
        requests += 1;
        assert!(requests < 1_000, "a tenth goes to the new copy of {HOST}");
    }
    bench.world.behaviour(&new).status.store(200, Ordering::SeqCst);
    for _ in 0..20 {
        assert_eq!(bench.edge.get("/").await, Ok(200));
    }
    (bench, started)
}

async fn guard_events(bench: &Bench, rollout: &Rollout) -> Vec<(String, String)> {
    let last = bench.engine.last_event();
    let stored = bench.engine.events(0).take_while(|event| std::future::ready(event.id < last));
    let told = stored.filter_map(|event| {
        let own = event.rollout.as_ref() == Some(&rollout.id);
        std::future::ready(match event.body {
            EventBody::Guard { verdict, message } if own => Some((verdict, message)),
            _ => None,
        })
    });
    tokio::time::timeout(PATIENCE, told.collect()).await.expect("stored events are read")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspicion_holds_the_step_until_the_move_is_paused_and_a_person_decides() {
    let (bench, started) = suspected(HoldThen::Pause).await;
    let held = bench.until(&started, "the pause", |r| r.state == RolloutState::Paused).await;
    assert_eq!(held.weight_percent, 10, "it stays where it is");
    let waits = held.waiting_for.expect("it says so");
    assert!(waits.starts_with("a decision (resume, promote or abort)"), "{waits}");
    bench.engine.resume(&started.id).await.expect("it is heard");
    bench.until(&started, "the next pause", |r| r.state == RolloutState::Paused).await;
    bench.engine.promote(&started.id).await.expect("it is heard");
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Succeeded, "{:?}", ended.problem);
    let events = guard_events(&bench, &started).await;
    let told = events.iter().filter(|(verdict, _)| verdict == "inconclusive").map(|(_, message)| message);
    let told: Vec<_> = told.collect();
    assert!(told[0].contains("1 failed") && told[0].contains("without a verdict"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_that_is_being_stored_is_not_overwritten_by_the_pause_of_a_held_step() {
    let (bench, started) = suspected(HoldThen::Pause).await;
    let gate = bench.life.keep_back(|rollout| rollout.control == Control::Abort);
    let waits = |r: &Rollout| r.waiting_for.as_ref().is_some_and(|what| what.starts_with("a verdict"));
    bench.until(&started, "the hold", waits).await;
    let (engine, id) = (bench.engine.clone(), started.id.clone());
    let aborting = tokio::spawn(async move { engine.abort(&id).await });
    until("the abort to be on its way to the disk", || gate.is_reached().then_some(())).await;
    // The step gives up its hold meanwhile, and wants to commit that behind the abort.
    let looks = bench.world.calls("host-a", "list");
    until("some looks", || (bench.world.calls("host-a", "list") > looks + 8).then_some(())).await;
    gate.open();
    aborting.await.expect("no panic").expect("it is heard");
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Aborted, "{:?}", ended.problem);
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_goes_back_or_on_where_the_plan_says_so() {
    let (bench, started) = suspected(HoldThen::GoBack).await;
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack);
    let problem = ended.problem.expect("a reason");
    assert_eq!(problem.code, "guard.failed");
    assert!(problem.message.contains("without a verdict"), "{}", problem.message);
    bench.assert_tidy(1).await;

    let (bench, started) = suspected(HoldThen::GoOn).await;
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Succeeded);
    let events = guard_events(&bench, &started).await;
    assert!(
        events.iter().any(|(verdict, why)| verdict == "inconclusive" && why.contains("held for")),
        "{events:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_traffic_probes_stand_in_and_the_verdict_is_neither_pass_nor_fail() {
    let bench = Bench::with_shop().await;
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Succeeded);
    let events = guard_events(&bench, &ended).await;
    assert_eq!(events.len(), 4, "one for each step: {events:?}");
    for (verdict, message) in events {
        assert_eq!(verdict, "inconclusive", "{message}");
        assert!(message.contains("1 probes of the new copies were good"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_traffic_a_copy_whose_probes_are_bad_is_held_and_then_sent_back() {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.health.unhealthy = 8; // the supervisor takes its time
    (spec.move_settings.step_hold_ms, spec.move_settings.step_max_ms) = (100, 100);
    bench.deploy(spec, Some("host-a")).await;
    let overrides = MoveOverrides { steps: Some(vec![50, 100]), ..MoveOverrides::default() };
    let started = bench
        .start(Ask::Move { service: "shop".to_owned(), to: "host-b".to_owned(), from: None, overrides })
        .await;
    bench.until(&started, "half of the traffic", |r| r.weight_percent == 50).await;
    bench.world.behaviour(&started.plan.add[0].id).health_status.store(503, Ordering::SeqCst);
    let held = |r: &Rollout| r.waiting_for.as_ref().is_some_and(|what| what.contains("/healthz answers 503"));
    bench.until(&started, "the hold", held).await;
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack);
    assert_eq!(ended.problem.expect("a reason").code, "instance.unwell");
    assert_eq!(ended.weight_percent, 0);
}
