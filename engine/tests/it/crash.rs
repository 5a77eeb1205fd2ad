//! kill -9 before and after every commit of a rollout: it ends, one copy serves, nothing is orphaned.

use std::sync::Arc;

use peregrine_engine::model::RolloutState;
use peregrine_engine::{Ask, MoveOverrides};

use crate::support::life::{End, Life};
use crate::support::memory::MemoryStore;
use crate::support::runtime::World;
use crate::support::{Bench, move_to, shop, shop_version, until};

/// Runs an ask to its end in a life that ends at a commit, then in a second life; looks at what is left.
async fn crash_and_recover(ask: Ask, end: End) -> bool {
    let world = World::new(&["host-a", "host-b"]);
    let first = Bench::open(Arc::clone(&world), Arc::new(MemoryStore::default()), Life::new()).await;
    for name in ["host-a", "host-b"] {
        first.engine.add_machine(crate::support::machine(name)).await.expect("a machine can be added");
    }
    first.deploy(shop(), Some("host-a")).await;
    first.assert_tidy(1).await;
    first.life.end_at(end);
    // The start itself may be what dies.
    let (handle, asked) = (first.engine.clone(), ask.clone());
    let starting = tokio::spawn(async move { handle.start(asked, "crash".to_owned(), None, None).await });
    let over = until("the life to end, or the rollout", || {
        let state = first.engine.state();
        let ended = starting.is_finished()
            && state
                .rollouts
                .values()
                .next_back()
                .is_some_and(|r| r.reason == "crash" && r.state.is_terminal());
        (first.life.is_over() || (ended && first.life.commits() <= end.commit)).then(|| first.life.is_over())
    })
    .await;
    starting.abort();
    first.crash();
    let second = first.reopened().await;
    let state = second.engine.state();
    if let Some(rollout) = state.rollouts.values().next_back() {
        let ended = second.end_of(rollout).await;
        assert_eq!(
            ended.state,
            RolloutState::Succeeded,
            "{end:?}: {:?} {:?}",
            ended.problem,
            ended.leftovers
        );
    }
    second.assert_tidy(1).await;
    // It serves: whatever was under way, a client gets its answer.
    assert_eq!(second.edge.get("/").await, Ok(200), "{end:?}");
    over
}

async fn crash_everywhere(ask: impl Fn() -> Ask) {
    // Several at a time: each is its own world.
    let mut commit = 0;
    loop {
        let mut batch = tokio::task::JoinSet::new();
        for number in commit..commit + 8 {
            for after in [false, true] {
                let ask = ask();
                batch.spawn(async move { crash_and_recover(ask, End { commit: number, after }).await });
            }
        }
        commit += 8;
        let mut died = 0;
        while let Some(done) = batch.join_next().await {
            died += usize::from(done.expect("recovery works"));
        }
        if died < 16 {
            assert!(commit > 16, "a rollout has more commits than {commit}");
            return;
        }
        assert!(commit < 400, "a rollout ends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_ends_well_wherever_the_engine_is_killed() {
    crash_everywhere(|| move_to("host-b")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deploy_with_a_soak_ends_well_wherever_the_engine_is_killed() {
    crash_everywhere(|| Ask::Deploy {
        spec: Box::new(shop_version("two")),
        machine: None,
        overrides: MoveOverrides {
            soak_ms: Some(30),
            steps: Some(vec![50, 100]),
            ..MoveOverrides::default()
        },
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_ends_well_wherever_the_engine_is_killed() {
    let mut commit = 0;
    loop {
        let mut batch = tokio::task::JoinSet::new();
        for number in commit..commit + 8 {
            for after in [false, true] {
                batch.spawn(crash_on_the_way_back(End { commit: number, after }));
            }
        }
        commit += 8;
        let mut died = 0;
        while let Some(done) = batch.join_next().await {
            died += usize::from(done.expect("recovery works"));
        }
        if died < 16 {
            assert!(commit > 8, "a way back has more commits than {commit}");
            return;
        }
        assert!(commit < 400, "a way back ends");
    }
}

async fn crash_on_the_way_back(end: End) -> bool {
    let world = World::new(&["host-a", "host-b"]);
    let first = Bench::open(Arc::clone(&world), Arc::new(MemoryStore::default()), Life::new()).await;
    for name in ["host-a", "host-b"] {
        first.engine.add_machine(crate::support::machine(name)).await.expect("a machine can be added");
    }
    first.deploy(shop(), Some("host-a")).await;
    let started = first.start(crate::support::slow_move_to("host-b", 60_000)).await;
    first.until(&started, "the soak", |r| r.phase == peregrine_engine::model::Phase::Soak).await;
    first.life.end_at(end);
    let (handle, id) = (first.engine.clone(), started.id.clone());
    let aborting = tokio::spawn(async move { handle.abort(&id).await });
    let over = until("the life to end, or the rollout", || {
        let ended = first.engine.state().rollouts[&started.id].state.is_terminal();
        (first.life.is_over() || ended).then(|| first.life.is_over())
    })
    .await;
    aborting.abort();
    first.crash();
    let second = first.reopened().await;
    // An ask that was not durable was not heard.
    if second.engine.state().rollouts[&started.id].state != RolloutState::Aborted {
        drop(second.engine.abort(&started.id).await); // it may be on its way back already
    }
    let ended = second.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::Aborted, "{end:?}: {:?}", ended.problem);
    second.assert_tidy(1).await;
    assert_eq!(second.serving()[0].machine, "host-a");
    assert_eq!(second.edge.get("/").await, Ok(200), "{end:?}");
    over
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_died_with_the_engine_are_started_again() {
    let bench = Bench::with_shop().await;
    let copy = bench.serving()[0].id.clone();
    bench.crash();
    bench.world.kill(&copy);
    let second = bench.reopened().await;
    second.assert_tidy(1).await;
    until("the shop to answer", || {
        second.serving().first().filter(|i| second.world.runs(&i.machine, &i.id)).map(drop)
    })
    .await;
    assert_eq!(second.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_does_not_answer_stops_neither_the_start_nor_other_services() {
    let bench = Bench::with_shop().await;
    let mut other = shop();
    other.name = "books".to_owned();
    other.routes[0].host = "books.test".to_owned();
    bench.deploy(other, Some("host-b")).await;
    bench.crash();
    bench.world.faults("host-b", |faults| {
        faults.hang.extend(["inspect", "ensure", "list", "info"]);
    });
    let second = bench.reopened().await;
    assert_eq!(second.edge.get("/").await, Ok(200));
    let books = second.engine.state().instances_of("books").count();
    assert_eq!(books, 1, "it is not given up");
    let mut again = shop_version("two");
    again.move_settings.soak_ms = 0;
    second.deploy(again, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_record_that_cannot_be_read_stops_no_other() {
    use peregrine_engine::store::{Batch, Write};
    let bench = Bench::with_shop().await;
    let started = bench.start(crate::support::slow_move_to("host-b", 60_000)).await;
    bench.until(&started, "the soak", |r| r.phase == peregrine_engine::model::Phase::Soak).await;
    bench.crash();
    let writes = vec![
        Write::Put(format!("rollouts/{}", started.id), bytes::Bytes::from_static(b"{\"id\":")),
        Write::Put("machines/broken".to_owned(), bytes::Bytes::from_static(b"[]")),
    ];
    bench.store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("the store takes it");
    let second = bench.reopened().await;
    let state = second.engine.state();
    assert_eq!(state.aside.len(), 2, "{:?}", state.aside);
    // Its rollout is held: the service is not touched, and serves.
    assert_eq!(second.edge.get("/").await, Ok(200));
    let refused = second.engine.start(move_to("host-b"), "test".to_owned(), None, None).await;
    assert_eq!(refused.expect_err("it is held").rollout, Some(started.id));
    assert_eq!(second.world.inventory().len(), 2, "what belongs to it is left alone");
    let mut other = shop();
    other.name = "books".to_owned();
    other.routes[0].host = "books.test".to_owned();
    second.deploy(other, Some("host-b")).await;
}
