//! Copies of requests go to a new copy before it gets traffic: one that answers them worse is never met by a client.

use std::sync::Arc;

use futures_util::StreamExt as _;
use peregrine_engine::model::{
    EventBody, MirrorReport, MirrorSettings, Phase, Rollout, RolloutState, ServiceSpec,
};
use peregrine_engine::{Ask, MoveOverrides};
use peregrine_routing::Mirror;

use crate::support::life::{End, Life};
use crate::support::memory::MemoryStore;
use crate::support::runtime::World;
use crate::support::{Bench, HOST, machine, move_to, shop, until};

/// Everything is mirrored, until ten answers were compared.
fn settings() -> MirrorSettings {
    MirrorSettings {
        sample_permille: 1_000,
        min_samples: 10,
        max_ms: 20_000,
        max_requests_per_s: 100_000,
        max_concurrent: 100,
        ..MirrorSettings::default()
    }
}

fn mirroring_shop(settings: MirrorSettings) -> ServiceSpec {
    let mut spec = shop();
    spec.move_settings.warm.mirror = Some(settings);
    spec
}

async fn bench_with(settings: MirrorSettings) -> Bench {
    let bench = Bench::new().await;
    bench.deploy(mirroring_shop(settings), Some("host-a")).await;
    bench
}

/// What the table says now.
fn mirror_now(bench: &Bench) -> Option<Arc<Mirror>> {
    bench.edge.reader().load().lookup(HOST, "/").and_then(|found| found.service.mirror().cloned())
}

fn report(ended: &Rollout) -> MirrorReport {
    let of_receipt = ended.receipt.as_ref().and_then(|receipt| receipt.mirror.clone());
    assert_eq!(of_receipt, ended.mirror, "the receipt says the same");
    ended.mirror.clone().expect("it was mirrored")
}

/// What was told of the mirror.
async fn verdicts(bench: &Bench, of: &Rollout) -> Vec<(String, String)> {
    let last = bench.engine.last_event();
    let mut events = bench.engine.events(0);
    let mut told = Vec::new();
    while let Some(event) = events.next().await {
        match event.body {
            EventBody::Guard { verdict, message }
                if event.rollout.as_ref() == Some(&of.id) && message.contains("compared") =>
            {
                told.push((verdict, message));
            }
            _ => {}
        }
        if event.id >= last {
            break;
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_well_on_its_health_path_only_fails_in_warm_and_no_client_meets_it() {
    let bench = bench_with(settings()).await;
    bench.edge.load(3);
    bench.world.faults("host-b", |faults| faults.status = Some(500));
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    let problem = ended.problem.clone().expect("a reason");
    assert_eq!(problem.code, "warm.mirror_differs");
    assert!(problem.hint.contains("No client has met them"), "{}", problem.hint);
    let report = report(&ended);
    assert_eq!(report.verdict, "fail");
    assert_eq!((report.differed.get("2xx>5xx"), report.failed), (Some(&report.compared), 0), "{report:?}");
    let new = bench.world.seen(&ended.plan.add[0].id);
    assert_eq!(new.requests(), 0, "no client has met it");
    assert!(new.copies() >= report.compared && report.compared >= 5, "{report:?}");
    assert_eq!(verdicts(&bench, &ended).await.len(), 1);
    assert!(mirror_now(&bench).is_none());
    bench.edge.quiet().await;
    bench.edge.assert_lossless(5);
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_answers_alike_passes_and_the_receipt_says_what_was_compared() {
    let bench = bench_with(settings()).await;
    bench.edge.load(3);
    let ended = bench.done(move_to("host-b")).await;
    let report = report(&ended);
    assert_eq!((report.verdict.as_str(), report.unequal, report.failed), ("pass", 0, 0), "{report:?}");
    assert!(report.compared >= 10 && report.client_p95_us.is_some() && report.mirror_p95_us.is_some());
    assert_eq!(verdicts(&bench, &ended).await[0].0, "pass");
    assert!(mirror_now(&bench).is_none());
    bench.edge.quiet().await;
    bench.edge.assert_lossless(10);
    // Copies are no requests: the receipt's counts are those of clients.
    let receipt = ended.receipt.expect("a receipt");
    assert_eq!(receipt.failed, 0);
    let seen: u64 = bench.world.all_seen().iter().map(|seen| seen.requests()).sum();
    assert!(receipt.requests <= seen, "{} of {seen}", receipt.requests);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_few_requests_are_no_verdict_and_the_move_goes_on_and_says_so() {
    let bench = bench_with(MirrorSettings { max_ms: 200, ..settings() }).await;
    let begun = std::time::Instant::now();
    let ended = bench.done(move_to("host-b")).await;
    assert!(begun.elapsed() >= std::time::Duration::from_millis(200), "requests were waited for");
    let report = report(&ended);
    assert_eq!((report.verdict.as_str(), report.compared), ("inconclusive", 0));
    assert!(report.message.contains("0 of 10 answers in 200 ms"), "{}", report.message);
    let told = verdicts(&bench, &ended).await;
    assert_eq!(told, [("inconclusive".to_owned(), report.message)]);
    assert!(mirror_now(&bench).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_mirrored_unless_it_is_asked_for_and_an_ask_may_switch_it_off_or_on() {
    let bench = Bench::with_shop().await;
    bench.edge.load(2);
    let ended = bench.done(move_to("host-b")).await;
    assert_eq!(ended.mirror, None);
    assert_eq!(bench.world.all_seen().iter().map(|seen| seen.copies()).sum::<u64>(), 0);

    let to = |machine: &str, permille: u16| Ask::Move {
        service: "shop".to_owned(),
        to: machine.to_owned(),
        from: None,
        overrides: MoveOverrides { mirror_permille: Some(permille), ..MoveOverrides::default() },
    };
    let ended = bench.done(to("host-a", 1_000)).await;
    assert_eq!(ended.plan.settings.warm.mirror.as_ref().map(|mirror| mirror.sample_permille), Some(1_000));
    assert_eq!(report(&ended).verdict, "pass");
    assert_eq!(bench.done(to("host-b", 0)).await.mirror, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_copy_of_a_service_has_nothing_to_be_compared_with() {
    let bench = Bench::new().await;
    let ended = bench.deploy(mirroring_shop(settings()), Some("host-a")).await;
    assert_eq!(ended.mirror, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_on_while_the_copy_warms_at_no_weight_and_an_abort_ends_it() {
    let bench = bench_with(MirrorSettings { min_samples: 1_000_000, max_ms: 60_000, ..settings() }).await;
    bench.edge.load(2);
    let started = bench.start(move_to("host-b")).await;
    let on = until("the mirror to be on", || mirror_now(&bench)).await;
    let now = bench.engine.state().rollouts[&started.id].clone();
    assert_eq!((now.phase, now.weight_percent), (Phase::Warm, 0));
    assert_eq!((on.spec().sample_permille, on.spec().lasts_ms), (1_000, 65_000));
    until("copies to be sent", || (on.targets()[0].mirrored().sent > 0).then_some(())).await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    assert_eq!(bench.end_of(&started).await.state, RolloutState::Aborted);
    assert!(mirror_now(&bench).is_none() && !on.is_on(crate::support::edge::now_ms()));
    bench.edge.quiet().await;
    bench.edge.assert_lossless(2);
    bench.assert_tidy(1).await;
}

/// Moves with a mirror in a life that ends at a commit, then in a second life; says whether it ended so.
async fn killed_at(end: End, healthy: bool) -> bool {
    let world = World::new(&["host-a", "host-b"]);
    let first = Bench::open(Arc::clone(&world), Arc::new(MemoryStore::default()), Life::new()).await;
    for name in ["host-a", "host-b"] {
        first.engine.add_machine(machine(name)).await.expect("a machine can be added");
    }
    first.deploy(mirroring_shop(MirrorSettings { max_ms: 2_000, ..settings() }), Some("host-a")).await;
    if !healthy {
        world.faults("host-b", |faults| faults.status = Some(500));
    }
    first.edge.load(2);
    first.life.end_at(end);
    let (handle, ask) = (first.engine.clone(), move_to("host-b"));
    let starting = tokio::spawn(async move { handle.start(ask, "crash".to_owned(), None, None).await });
    let over = until("the life to end, or the rollout", || {
        let state = first.engine.state();
        let last = state.rollouts.values().next_back();
        let ended = last.is_some_and(|r| r.reason == "crash" && r.state.is_terminal());
        (first.life.is_over() || (starting.is_finished() && ended)).then(|| first.life.is_over())
    })
    .await;
    starting.abort();
    first.crash();
    let second = first.reopened().await;
    second.edge.load(2);
    let last = second.engine.state().rollouts.values().next_back().cloned();
    if let Some(rollout) = last.filter(|rollout| rollout.reason == "crash") {
        let ended = second.end_of(&rollout).await;
        let wanted = if healthy { RolloutState::Succeeded } else { RolloutState::Failed };
        assert_eq!(ended.state, wanted, "{end:?}: {:?} {:?}", ended.problem, ended.leftovers);
        if !healthy {
            let new = world.seen(&ended.plan.add[0].id);
            assert_eq!(new.requests(), 0, "{end:?}: a client has met it");
        }
    }
    second.assert_tidy(1).await;
    assert!(mirror_now(&second).is_none(), "{end:?}: it is left on");
    second.edge.quiet().await;
    second.edge.assert_lossless(0);
    over
}

async fn killed_everywhere(healthy: bool) {
    let mut commit = 0;
    loop {
        let mut batch = tokio::task::JoinSet::new();
        for (number, after) in (commit..commit + 4).flat_map(|number| [(number, false), (number, true)]) {
            batch.spawn(killed_at(End { commit: number, after }, healthy));
        }
        commit += 4;
        let mut died = 0;
        while let Some(done) = batch.join_next().await {
            died += usize::from(done.expect("recovery works"));
        }
        if died < 8 {
            assert!(commit > 12, "a rollout has more commits than {commit}");
            return;
        }
        assert!(commit < 400, "a rollout ends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_with_a_mirror_ends_well_wherever_the_engine_is_killed_and_it_is_never_left_on() {
    killed_everywhere(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_the_mirror_fails_is_met_by_no_client_wherever_the_engine_is_killed() {
    killed_everywhere(false).await;
}
