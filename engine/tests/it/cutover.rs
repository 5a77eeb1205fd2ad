//! Single-writer services: whatever happens, two copies never run at the same time, and clients only wait.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use peregrine_engine::journal::Direction;
use peregrine_engine::model::{
    Control, CutoverSettings, InstanceState, Phase, Rollout, RolloutState, ServiceSpec, Step,
};
use peregrine_engine::store::{Batch, Write};
use peregrine_engine::{Ask, ErrorKind};

use crate::support::life::{Border, End, Life};
use crate::support::memory::MemoryStore;
use crate::support::runtime::World;
use crate::support::{Bench, machine, move_to, shop, shop_version, until};

/// The shop, of which one copy may run.
fn writer() -> ServiceSpec {
    one_writer(shop())
}

fn one_writer(mut spec: ServiceSpec) -> ServiceSpec {
    spec.move_settings.single_writer = true;
    spec.move_settings.stop_grace_ms = 100;
    spec.move_settings.start_timeout_ms = 10_000;
    spec
}

async fn with_writer() -> Bench {
    let bench = Bench::new().await;
    bench.deploy(writer(), Some("host-a")).await;
    bench
}

fn names(steps: &[Step]) -> Vec<String> {
    let name = |step: &Step| format!("{:?}", step.kind());
    steps.iter().map(name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_stops_the_old_copy_before_the_new_one_starts_and_no_request_fails() {
    let bench = with_writer().await;
    bench.edge.load(4);
    bench.edge.answers(5).await;
    let plan = bench.engine.plan(move_to("host-b")).await.expect("a plan");
    assert_eq!(names(&plan.steps), ["Claim", "Hold", "Stop", "Start", "Warm", "Switch", "Release"]);
    assert!(plan.estimate.pause_ms > 0, "clients will wait, and the plan says so");
    let ended = bench.done(move_to("host-b")).await;
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-b");
    assert_eq!(bench.world.most_at_once("shop"), 1);
    bench.edge.answers(5).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
    let receipt = ended.receipt.expect("a receipt");
    assert!(receipt.held >= 1 && receipt.pause_ms > 0, "{receipt:?}");
    assert_eq!((receipt.failed, &receipt.hard_cut[..]), (0, &[][..]));
    assert!(receipt.longest_extra_wait_ms <= receipt.pause_ms + 1_000, "{receipt:?}");
    // What was measured is what the next plan says.
    let plan = bench.engine.plan(move_to("host-a")).await.expect("a plan");
    assert_eq!(plan.estimate.pause_ms, receipt.pause_ms);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deploy_and_a_rollback_go_the_same_way() {
    let bench = with_writer().await;
    bench.edge.load(2);
    bench.edge.answers(5).await;
    bench.deploy(one_writer(shop_version("two")), None).await;
    bench.done(Ask::Rollback { service: "shop".to_owned(), to_version: None }).await;
    bench.assert_tidy(1).await;
    assert_eq!(bench.world.most_at_once("shop"), 1);
    bench.edge.answers(5).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deploy_that_takes_single_writer_out_still_stops_the_old_copy_first() {
    let bench = with_writer().await;
    bench.deploy(shop_version("two"), None).await;
    assert_eq!(bench.world.most_at_once("shop"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_never_gets_healthy_gives_way_to_the_old_one_and_no_request_fails() {
    let bench = Bench::new().await;
    let mut spec = writer();
    spec.move_settings.cutover.hold_deadline_ms = 6_000;
    bench.deploy(spec, Some("host-a")).await;
    bench.edge.load(2);
    bench.edge.answers(5).await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::RolledBack, "{:?}", ended.problem);
    assert_eq!(ended.problem.expect("a reason").code, "cutover.too_long");
    let receipt = ended.receipt.expect("a receipt");
    assert!((4_000..=6_000).contains(&receipt.pause_ms), "{receipt:?}");
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-a");
    assert_eq!(bench.world.most_at_once("shop"), 1);
    bench.edge.answers(5).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_verb_that_fails_once_sends_it_back_to_the_old_copy_or_is_done_again() {
    for (host, verb) in [("host-a", "remove"), ("host-b", "ensure"), ("host-b", "inspect")] {
        let bench = with_writer().await;
        bench.edge.load(2);
        bench.edge.answers(5).await;
        bench.world.faults(host, |faults| {
            faults.fail.insert(verb, 1);
        });
        let ended = bench.ended(move_to("host-b")).await;
        let fine = matches!(ended.state, RolloutState::RolledBack | RolloutState::Succeeded);
        assert!(fine, "{verb}: {:?} {:?}", ended.state, ended.problem);
        bench.assert_tidy(1).await;
        let place = if ended.state == RolloutState::Succeeded { "host-b" } else { "host-a" };
        assert_eq!(bench.serving()[0].machine, place);
        assert_eq!(bench.world.most_at_once("shop"), 1, "{verb}");
        bench.edge.answers(5).await;
        bench.edge.quiet().await;
        bench.edge.assert_lossless(10);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_copy_is_not_started_while_nobody_knows_whether_the_new_one_runs() {
    let bench = Bench::new().await;
    let mut spec = writer();
    spec.move_settings.cutover.hold_deadline_ms = 6_000;
    bench.deploy(spec, Some("host-a")).await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    bench.world.faults("host-b", |faults| {
        faults.fail.insert("remove", 5);
    });
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack, "{:?} {:?}", ended.problem, ended.leftovers);
    assert!(bench.world.calls("host-b", "remove") >= 6, "it was asked again until it was sure");
    bench.assert_tidy(1).await;
    assert_eq!(bench.world.most_at_once("shop"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_goes_back_to_the_old_copy_until_the_new_one_has_the_requests() {
    let bench = with_writer().await;
    bench.edge.load(2);
    bench.edge.answers(5).await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Aborted);
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-a");
    assert_eq!(bench.world.most_at_once("shop"), 1);
    bench.edge.answers(5).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_copies_of_a_single_writer_are_refused() {
    let bench = with_writer().await;
    let mut two = writer();
    two.replicas = 2;
    let ask = Ask::Deploy { spec: Box::new(two), machine: None, overrides: Default::default() };
    let refused = bench.engine.plan(ask).await.expect_err("it is wrong in itself");
    assert!(refused.message.contains("single_writer"), "{refused}");
    let ask = Ask::Scale { service: "shop".to_owned(), replicas: 2, machine: None };
    let plan = bench.engine.plan(ask).await.expect("a plan");
    assert_eq!(plan.blockers[0].code, "service.single_writer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_about_to_exit_is_not_taken_for_one_that_was_never_stopped() {
    let bench = with_writer().await;
    bench.edge.load(2);
    bench.edge.answers(5).await;
    bench.world.faults("host-a", |faults| faults.exits_after_ms = 1_000);
    let old = bench.serving()[0].id.clone();
    let started = bench.start(move_to("host-b")).await;
    until("the old copy to be told to end", || (bench.world.calls("host-a", "remove") > 0).then_some(()))
        .await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Aborted);
    bench.assert_tidy(1).await;
    assert!(bench.world.runs("host-a", &old));
    assert_eq!(bench.world.most_at_once("shop"), 1);
    // Whoever was let go to the one that was about to exit has met its end by now.
    let looks = bench.world.calls("host-a", "list");
    until("some looks", || (bench.world.calls("host-a", "list") > looks + 12).then_some(())).await;
    bench.edge.answers(5).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_says_nothing_makes_nobody_wait_longer_than_the_way_back_allows() {
    let bench = Bench::new().await;
    let mut spec = writer();
    spec.move_settings.cutover.hold_deadline_ms = 3_000;
    bench.deploy(spec, Some("host-a")).await;
    let silent = bench.edge.reader().register();
    bench.edge.load(2);
    bench.edge.answers(5).await;
    let started = bench.start(move_to("host-b")).await;
    let held = bench.until(&started, "the hold", |r| r.hold.is_some()).await.hold.expect("it is held");
    let released = |r: &Rollout| r.hold.as_ref().is_some_and(|hold| hold.released_at.is_some());
    let back = bench.until(&started, "the way back", released).await;
    let pause_ms = back.hold.and_then(|hold| hold.released_at).expect("it was released") - held.since;
    assert!(
        (2_000..3_000).contains(&pause_ms),
        "before the edges would have let go by themselves: {pause_ms}"
    );
    bench.edge.answers(5).await;
    drop(silent);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::RolledBack, "{:?}", ended.problem);
    let problem = ended.problem.expect("a reason");
    assert_eq!(problem.code, "cutover.too_long");
    assert!(problem.message.starts_with("not every edge"), "{}", problem.message);
    bench.assert_tidy(1).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounds_under_which_nobody_could_be_held_or_nothing_switched_are_refused() {
    let bench = Bench::new().await;
    type Spoil = fn(&mut CutoverSettings);
    let spoiled: [(&str, Spoil); 10] = [
        ("hold_deadline_ms is 0", |bounds| bounds.hold_deadline_ms = 0),
        ("hold_deadline_ms is 999", |bounds| bounds.hold_deadline_ms = 999),
        ("hold_deadline_ms is 4294967295", |bounds| bounds.hold_deadline_ms = u32::MAX),
        ("hold_max_requests is 0", |bounds| bounds.hold_max_requests = 0),
        ("hold_max_bytes is 0", |bounds| bounds.hold_max_bytes = 0),
        ("hold_max_bytes is 18446744073709551615", |bounds| bounds.hold_max_bytes = u64::MAX),
        ("hold_max_age_ms is 0", |bounds| bounds.hold_max_age_ms = 0),
        ("hold_release_per_s is 0", |bounds| bounds.hold_release_per_s = 0),
        ("hold_release_per_s is 4294967295", |bounds| bounds.hold_release_per_s = u32::MAX),
        ("drain_max_ms is 4294967295", |bounds| bounds.drain_max_ms = u32::MAX),
    ];
    let deploy = |bounds: CutoverSettings| {
        let mut spec = writer();
        spec.move_settings.cutover = bounds;
        Ask::Deploy { spec: Box::new(spec), machine: None, overrides: Default::default() }
    };
    for (words, spoil) in spoiled {
        let mut bounds = CutoverSettings::default();
        spoil(&mut bounds);
        let refused = bench.engine.plan(deploy(bounds)).await.expect_err(words);
        assert_eq!((refused.kind, refused.code), (ErrorKind::Invalid, "spec.invalid"));
        assert!(refused.message.contains(words), "{words}: {}", refused.message);
    }
    // The least that can be meant.
    let least = CutoverSettings {
        hold_deadline_ms: 1_000,
        hold_max_requests: 1,
        hold_max_bytes: 1_024,
        hold_max_age_ms: 1,
        hold_release_per_s: 1,
        drain_max_ms: 0,
    };
    bench.engine.plan(deploy(least)).await.expect("it can be meant");
}

// --- pauses

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_in_the_middle_of_a_cutover_is_refused_and_nobody_waits_for_a_person() {
    let bench = with_writer().await;
    bench.edge.load(2);
    bench.edge.answers(5).await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    let refused = bench.engine.pause(&started.id).await.expect_err("clients wait");
    assert_eq!((refused.kind, refused.code), (ErrorKind::Conflict, "move.holding"));
    assert!(refused.hint.contains("moves abort"), "{}", refused.hint);
    let new = &started.plan.add[0].id;
    bench.world.behaviour(new).health_status.store(200, Ordering::SeqCst);
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Succeeded, "{:?}", ended.problem);
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_is_heard_just_before_the_hold_keeps_nobody_waiting() {
    let bench = with_writer().await;
    let plan = bench.engine.plan(move_to("host-b")).await.expect("a plan");
    let hold = plan.steps.iter().position(|step| *step == Step::Hold).expect("a hold");
    // While the settlement of the step before is being stored, the pause waits behind it, and the hold behind both.
    let gate = bench.life.keep_back(move |rollout| rollout.step == hold);
    let before = bench.life.begun().len();
    let started = bench.start(move_to("host-b")).await;
    until("the settlement of the step before", || gate.is_reached().then_some(())).await;
    let (engine, id) = (bench.engine.clone(), started.id.clone());
    let pausing = tokio::spawn(async move { engine.pause(&id).await });
    let looks = bench.world.calls("host-a", "list");
    until("some looks", || (bench.world.calls("host-a", "list") > looks + 3).then_some(())).await;
    gate.open();
    let paused = pausing.await.expect("no panic").expect("nobody is held yet");
    assert_eq!((paused.state, paused.hold), (RolloutState::Paused, None));
    let looks = bench.world.calls("host-a", "list");
    until("some looks", || (bench.world.calls("host-a", "list") > looks + 5).then_some(())).await;
    let begun = bench.life.begun().split_off(before);
    assert!(begun.iter().all(|(step, _)| *step < hold), "{begun:?}");
    assert_eq!(bench.edge.get("/").await, Ok(200));
    bench.engine.resume(&started.id).await.expect("it goes on");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_that_was_paused_in_its_middle_by_an_earlier_version_goes_on_to_its_switch() {
    let first = with_writer().await;
    first.world.faults("host-b", |faults| faults.health_status = Some(500));
    let started = first.start(move_to("host-b")).await;
    let mut warming = first.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    first.crash();
    (warming.control, warming.state) = (Control::Pause, RolloutState::Paused);
    let value = serde_json::to_vec(&warming).expect("a record");
    let writes = vec![Write::Put(format!("rollouts/{}", warming.id), value.into())];
    first.store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("it is stored");
    let new = &started.plan.add[0].id;
    first.world.behaviour(new).health_status.store(200, Ordering::SeqCst);
    let second = first.reopened().await;
    let switched = |r: &Rollout| r.weight_percent == 100 && r.step + 1 == r.plan.steps.len();
    let after = second.until(&started, "the switch", switched).await;
    assert_eq!(after.state, RolloutState::Paused, "the pause takes effect after it");
    assert_eq!(second.edge.get("/").await, Ok(200));
    second.engine.resume(&started.id).await.expect("it goes on");
    assert_eq!(second.end_of(&started).await.state, RolloutState::Succeeded);
    assert_eq!(second.world.most_at_once("shop"), 1);
}

// --- the engine dies

async fn crash_and_recover(end: End) -> bool {
    let world = World::new(&["host-a", "host-b"]);
    let first = Bench::open(Arc::clone(&world), Arc::new(MemoryStore::default()), Life::new()).await;
    for name in ["host-a", "host-b"] {
        first.engine.add_machine(machine(name)).await.expect("a machine can be added");
    }
    first.deploy(writer(), Some("host-a")).await;
    first.assert_tidy(1).await;
    first.life.end_at(end);
    let handle = first.engine.clone();
    let starting =
        tokio::spawn(async move { handle.start(move_to("host-b"), "crash".to_owned(), None, None).await });
    let over = until("the life to end, or the rollout", || {
        let state = first.engine.state();
        let last = state.rollouts.values().next_back();
        let ended =
            starting.is_finished() && last.is_some_and(|r| r.reason == "crash" && r.state.is_terminal());
        (first.life.is_over() || (ended && first.life.commits() <= end.commit)).then(|| first.life.is_over())
    })
    .await;
    starting.abort();
    first.crash();
    let second = first.reopened().await;
    let state = second.engine.state();
    if let Some(rollout) = state.rollouts.values().next_back() {
        let ended = second.end_of(rollout).await;
        let problem = (&ended.problem, &ended.leftovers);
        assert_eq!(ended.state, RolloutState::Succeeded, "{end:?}: {problem:?}");
    }
    second.assert_tidy(1).await;
    assert_eq!(second.edge.get("/").await, Ok(200), "{end:?}");
    assert_eq!(world.most_at_once("shop"), 1, "{end:?}");
    over
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_ends_well_wherever_the_engine_is_killed() {
    let mut commit = 0;
    loop {
        let mut batch = tokio::task::JoinSet::new();
        for number in commit..commit + 4 {
            for after in [false, true] {
                batch.spawn(crash_and_recover(End { commit: number, after }));
            }
        }
        commit += 4;
        let mut died = 0;
        while let Some(done) = batch.join_next().await {
            died += usize::from(done.expect("recovery works"));
        }
        if died < 8 {
            assert!(commit > 16, "a cutover has more commits than {commit}");
            return;
        }
        assert!(commit < 400, "a cutover ends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_ends_well_wherever_the_engine_is_killed() {
    let steps = with_writer().await.engine.plan(move_to("host-b")).await.expect("a plan").steps;
    let undone = steps.iter().position(|step| *step == Step::Warm).expect("a warm-up");
    for border in (0..=undone)
        .flat_map(|step| [Border::Begun(step, Direction::Back), Border::Done(step, Direction::Back)])
    {
        let first = Bench::new().await;
        let mut spec = writer();
        spec.move_settings.start_timeout_ms = 300;
        first.deploy(spec, Some("host-a")).await;
        first.world.faults("host-b", |faults| faults.health_status = Some(500));
        first.life.end_at_step(border);
        let started = first.start(move_to("host-b")).await;
        until(&format!("{border:?}"), || first.life.is_over().then_some(())).await;
        first.crash();
        let second = first.reopened().await;
        let ended = second.end_of(&started).await;
        assert_eq!(ended.state, RolloutState::RolledBack, "{border:?}: {:?}", ended.problem);
        second.assert_tidy(1).await;
        assert_eq!(second.serving()[0].machine, "host-a", "{border:?}");
        assert_eq!(second.edge.get("/").await, Ok(200), "{border:?}");
        assert_eq!(second.world.most_at_once("shop"), 1, "{border:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_copy_is_brought_up_by_nobody_else() {
    let bench = with_writer().await;
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let old = bench.serving()[0].id.clone();
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warming", |r| r.phase == Phase::Warm).await;
    assert_eq!(bench.engine.state().instances[&old].state, InstanceState::Stopped);
    // The reconciler looks ten times a second.
    let looks = bench.world.calls("host-b", "list");
    until("some looks", || (bench.world.calls("host-b", "list") > looks + 5).then_some(())).await;
    assert!(!bench.world.runs("host-a", &old));
    bench.engine.abort(&started.id).await.expect("it is heard");
    bench.end_of(&started).await;
    assert!(bench.world.runs("host-a", &old));
}
