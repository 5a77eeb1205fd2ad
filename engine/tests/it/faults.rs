//! Whatever fails, the service is as it was, and what is left over is named.

use std::sync::Arc;

use peregrine_engine::model::{InstanceState, Phase, Rollout, RolloutState};
use peregrine_engine::store::{Batch, Write};
use peregrine_engine::{Ask, ErrorKind, MoveOverrides};

use crate::support::life::Life;
use crate::support::memory::MemoryStore;
use crate::support::runtime::World;
use crate::support::{Bench, machine, move_to, shop, shop_image, shop_version, slow_move_to, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_leaves_everything_as_it_was() {
    let bench = Bench::with_shop().await;
    let before = bench.world.inventory();
    bench.world.faults("host-b", |faults| {
        faults.fail.insert("ensure", 1);
    });
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    assert_eq!(ended.problem.expect("a reason").code, "runtime.failed");
    bench.assert_tidy(1).await;
    assert_eq!(bench.world.inventory(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_copy_that_exits_fails_fast_with_its_last_output() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| faults.exit_at_start = Some(3));
    let begun = std::time::Instant::now();
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    let problem = ended.problem.expect("a reason");
    assert_eq!(problem.code, "instance.exited");
    assert!(
        problem.message.contains("code 3") && problem.message.contains("last words"),
        "{}",
        problem.message
    );
    assert!(begun.elapsed().as_secs() < 3, "the start's own time-out is 5 s");
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_never_gets_healthy_is_given_up_and_the_service_is_untouched() {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.start_timeout_ms = 300;
    bench.deploy(spec, Some("host-a")).await;
    bench.edge.load(2);
    bench.world.faults("host-b", |faults| faults.health_status = Some(500));
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    assert_eq!(ended.problem.expect("a reason").code, "instance.never_healthy");
    bench.assert_tidy(1).await;
    bench.edge.quiet().await;
    bench.edge.assert_lossless(5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_deploy_that_fails_leaves_no_service_behind() {
    let bench = Bench::new().await;
    bench.world.faults("host-a", |faults| faults.exit_at_start = Some(1));
    let ask = Ask::Deploy {
        spec: Box::new(shop()),
        machine: Some("host-a".to_owned()),
        overrides: MoveOverrides::default(),
    };
    let ended = bench.ended(ask).await;
    assert_eq!(ended.state, RolloutState::Failed);
    bench.assert_tidy(0).await;
    assert!(bench.engine.state().services.is_empty());
    assert!(bench.engine.state().versions.is_empty());
    until("the route to go", || bench.edge.reader().load().lookup("shop.test", "/").is_none().then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_deploy_keeps_the_specification_of_before() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-a", |faults| faults.exit_at_start = Some(1));
    let ask = Ask::Deploy {
        spec: Box::new(shop_version("two")),
        machine: None,
        overrides: MoveOverrides::default(),
    };
    assert_eq!(bench.ended(ask).await.state, RolloutState::Failed);
    assert_eq!(bench.engine.state().services["shop"].spec, shop());
    assert_eq!(bench.engine.state().services["shop"].version, Some(1));
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undo_that_fails_names_what_is_left_and_it_is_cleared_when_the_machine_answers() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| {
        faults.health_status = Some(500);
        faults.fail.insert("remove", 5);
    });
    let started = bench.start(move_to("host-b")).await;
    bench.until(&started, "the warm-up", |r| r.phase == Phase::Warm).await;
    bench.engine.abort(&started.id).await.expect("it is heard");
    let ended = bench.end_of(&started).await;
    assert_eq!(ended.state, RolloutState::NeedsOperator);
    let left = &started.plan.add[0].id;
    assert!(ended.leftovers.iter().any(|text| text.contains(left.as_str())), "{:?}", ended.leftovers);
    assert_eq!(bench.edge.get("/").await, Ok(200), "the service goes on");
    bench.assert_tidy(1).await;
    until("the list to be empty", || {
        bench.engine.state().rollouts[&started.id].leftovers.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_that_cannot_be_removed_is_named_while_the_new_one_serves() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-a", |faults| {
        faults.fail.insert("remove", 3);
    });
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::NeedsOperator);
    assert_eq!(ended.leftovers.len(), 1);
    assert_eq!(bench.edge.get("/").await, Ok(200));
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, "host-b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_dies_is_started_again_at_its_new_address() {
    let bench = Bench::with_shop().await;
    let before = bench.serving()[0].clone();
    bench.world.kill(&before.id);
    until("another stretch of service", || {
        bench
            .serving()
            .first()
            .filter(|now| now.generation > before.generation && now.address != before.address)
            .map(drop)
    })
    .await;
    bench.assert_tidy(1).await;
    // Durable, then visible: the table follows on the commit.
    let generation = bench.serving()[0].generation;
    until("the table to name it", || {
        let table = bench.edge.reader().load();
        let found = table.lookup("shop.test", "/").expect("the route is there");
        let named = found.service.upstreams().any(|(_, upstream)| upstream.generation().0 == generation);
        named.then_some(())
    })
    .await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_started_again_under_the_epoch_of_now_beside_newer_ones() {
    let bench = Bench::with_shop().await;
    let first = bench.serving()[0].id.clone();
    bench.done(Ask::Scale { service: "shop".to_owned(), replicas: 2, machine: None }).await;
    let epoch = bench.engine.state().services["shop"].epoch;
    bench.world.kill(&first);
    until("it to run again", || bench.world.runs("host-a", &first).then_some(())).await;
    // A machine refuses whatever bears a lower epoch than another copy of the service there.
    assert_eq!(bench.world.spec("host-a", &first).epoch, epoch);
    bench.assert_tidy(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_inside_of_a_drain_that_was_given_up_is_waited_for_by_the_next_one() {
    let bench = Bench::with_shop().await;
    let old = bench.serving()[0].id.clone();
    let inside = bench.edge.get_later("/slow");
    until("somebody to be inside", || (bench.world.seen(&old).requests() > 0).then_some(())).await;
    let waits = |r: &Rollout| {
        let waiting = r.waiting_for.as_deref();
        r.phase == Phase::Drain && waiting.is_some_and(|what| what.contains("to finish"))
    };
    let given_up = bench.start(move_to("host-b")).await;
    bench.until(&given_up, "the drain", waits).await;
    bench.engine.abort(&given_up.id).await.expect("it is heard");
    assert_eq!(bench.end_of(&given_up).await.state, RolloutState::Aborted);
    let next = bench.start(move_to("host-b")).await;
    bench.until(&next, "the next drain", waits).await;
    assert!(bench.world.runs("host-a", &old));
    bench.world.behaviour(&old).let_go.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(bench.end_of(&next).await.state, RolloutState::Succeeded);
    assert_eq!(inside.await.expect("a client does not panic"), Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_instance_with_our_label_is_removed_after_a_grace_and_a_strangers_is_not() {
    let bench = Bench::with_shop().await;
    let ours = bench.world.plant("host-a", &bench.engine.install()).await;
    let theirs = bench.world.plant("host-a", "pg_somebody_else").await;
    let check = bench.engine.check_machine("host-a").await.expect("it is known");
    assert_eq!((check.instances, check.orphans), (1, vec![ours.to_string()]));
    until("ours to go", || (!bench.world.runs("host-a", &ours)).then_some(())).await;
    assert!(bench.world.runs("host-a", &theirs));
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_comes_up_after_it_was_removed_is_swept_without_the_grace_of_strangers() {
    let world = World::new(&["host-a", "host-b"]);
    let bench = Bench::open_with(world, Arc::new(MemoryStore::default()), Life::new(), 3_600_000).await;
    for name in ["host-a", "host-b"] {
        bench.engine.add_machine(machine(name)).await.expect("a machine can be added");
    }
    bench.deploy(shop(), Some("host-a")).await;
    let old = bench.serving()[0].id.clone();
    bench.done(move_to("host-b")).await;
    assert!(!bench.world.runs("host-a", &old));
    // As a start that was abandoned and is done late.
    bench.world.plant_as("host-a", &bench.engine.install(), &old).await;
    let stranger = bench.world.plant("host-a", &bench.engine.install()).await;
    until("the late one to go", || (!bench.world.runs("host-a", &old)).then_some(())).await;
    assert!(bench.world.runs("host-a", &stranger), "that one may be a start that is not written down yet");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_rollout_stops_no_other() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| {
        faults.hang.extend(["ensure", "inspect", "remove", "list"]);
    });
    let stuck = bench.start(move_to("host-b")).await;
    let mut other = shop();
    other.name = "books".to_owned();
    other.routes[0].host = "books.test".to_owned();
    bench.deploy(other, Some("host-a")).await;
    assert!(!bench.engine.state().rollouts[&stuck.id].state.is_terminal());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_machine_blocks_a_move_to_it_and_can_be_checked() {
    let bench = Bench::with_shop().await;
    bench.world.faults("host-b", |faults| faults.unreachable = true);
    let refused =
        bench.engine.start(move_to("host-b"), "t".to_owned(), None, None).await.expect_err("blocked");
    assert_eq!(refused.kind, ErrorKind::Blocked);
    assert_eq!(refused.findings[0].code, "machine.unreachable");
    let check = bench.engine.check_machine("host-b").await.expect("it is known");
    assert_eq!(check.problem.expect("it does not answer").code, "machine.unreachable");
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_call_fails_once_the_end_is_tidy() {
    for verb in ["ensure", "inspect", "remove", "info", "list"] {
        let bench = Bench::with_shop().await;
        for machine in ["host-a", "host-b"] {
            bench.world.faults(machine, |faults| {
                faults.fail.insert(verb, 1);
            });
        }
        let started = bench.engine.start(move_to("host-b"), "t".to_owned(), None, None).await;
        if let Ok(Some(started)) = started {
            bench.end_of(&started).await;
        }
        bench.assert_tidy(1).await;
        assert_eq!(bench.edge.get("/").await, Ok(200), "{verb}");
        let state = bench.engine.state();
        assert!(state.instances.values().all(|i| i.state == InstanceState::Serving));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_cannot_be_brought_leaves_everything_as_it_was() {
    let bench = Bench::with_image().await;
    bench.deploy(shop_image("shop:1"), Some("host-a")).await;
    bench.world.faults("host-b", |faults| {
        faults.fail.insert("import", 1);
    });
    let ended = bench.ended(move_to("host-b")).await;
    assert_eq!(ended.state, RolloutState::Failed);
    bench.assert_tidy(1).await;
    // A version whose image nobody has fails in the phase prepare, and the service is untouched.
    let spec = shop_image("shop:typo");
    let ask = Ask::Deploy { spec: Box::new(spec), machine: None, overrides: MoveOverrides::default() };
    let ended = bench.ended(ask).await;
    assert_eq!(
        (ended.state, ended.problem.expect("a reason").code.as_str()),
        (RolloutState::Failed, "image.missing")
    );
    bench.assert_tidy(1).await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

/// An engine that was killed in the soak of a move, on a store of which one record is damaged since.
async fn damaged_in_the_soak(key: impl Fn(&Rollout) -> String) -> (Bench, Rollout) {
    let first = Bench::with_shop().await;
    let started = first.start(slow_move_to("host-b", 1_000)).await;
    let soaks = |r: &Rollout| r.phase == Phase::Soak && r.waiting_for.is_some();
    let soaking = first.until(&started, "the soak", soaks).await;
    first.crash();
    let writes = vec![Write::Put(key(&soaking), "{".into())];
    first.store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("it is stored");
    (first.reopened().await, soaking)
}

async fn some_looks(bench: &Bench) {
    let looks = bench.world.calls("host-a", "list");
    // Ten a second: the soak is over long before the last one.
    until("some looks", || (bench.world.calls("host-a", "list") > looks + 20).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_whose_record_cannot_be_read_is_held_with_its_rollout_and_loses_no_copy() {
    let (bench, soaking) = damaged_in_the_soak(|_| "services/shop".to_owned()).await;
    some_looks(&bench).await;
    for id in [&soaking.plan.retire[0], &soaking.plan.add[0].id] {
        let instance = bench.engine.state().instances[id].clone();
        assert!(bench.world.runs(&instance.machine, id), "{instance:?}");
    }
    let rollout = bench.engine.state().rollouts[&soaking.id].clone();
    assert!(!rollout.state.is_terminal(), "{rollout:?}");
    let alarms: Vec<String> = bench.engine.alarms().into_iter().map(|alarm| alarm.code).collect();
    assert_eq!(alarms, ["service.aside", "store.record_aside"]);
    assert_eq!(bench.engine.unreadable_services(), ["shop"]);
    // What is not known is not replaced by a guess.
    let deploy = Ask::Deploy { spec: Box::new(shop()), machine: None, overrides: MoveOverrides::default() };
    for ask in [deploy, move_to("host-a")] {
        let refused = bench.engine.start(ask, "test".to_owned(), None, None).await.expect_err("unknown");
        assert_eq!((refused.kind, refused.code), (ErrorKind::Conflict, "service.aside"));
    }
    assert_eq!(bench.engine.remove_service("shop").await.expect_err("unknown").code, "service.aside");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_whose_record_cannot_be_read_gives_its_copies_no_share_while_an_older_one_serves() {
    let first = Bench::new().await;
    let mut spec = shop();
    spec.move_settings.step_hold_ms = 30_000;
    first.deploy(spec, Some("host-a")).await;
    let old = first.serving()[0].id.clone();
    let started = first.start(move_to("host-b")).await;
    first.until(&started, "the first step", |r| r.weight_percent == 1).await;
    first.crash();
    let writes = vec![Write::Put(format!("rollouts/{}", started.id), "{".into())];
    first.store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("it is stored");
    let second = first.reopened().await;
    let new = second.world.seen(&started.plan.add[0].id);
    let before = (second.world.seen(&old).requests(), new.requests());
    for _ in 0..50 {
        assert_eq!(second.edge.get("/").await, Ok(200));
    }
    let after = (second.world.seen(&old).requests(), new.requests());
    assert_eq!((after.0 - before.0, after.1 - before.1), (50, 0), "one in a hundred was its share");
    // It still stands by.
    second.world.faults("host-a", |faults| {
        faults.hang.insert("ensure");
    });
    second.world.kill(&old);
    // What was in the queue of its socket is lost with it.
    let mut lost = 0;
    while second.edge.get("/").await != Ok(200) {
        lost += 1;
        assert!(lost < 3, "the new copy stands by");
    }
    for _ in 0..10 {
        assert_eq!(second.edge.get("/").await, Ok(200));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_whose_record_cannot_be_read_keeps_the_traffic_where_it_has_all_been_brought() {
    let (bench, soaking) = damaged_in_the_soak(|rollout| format!("rollouts/{}", rollout.id)).await;
    some_looks(&bench).await;
    let (old, new) = (&soaking.plan.retire[0], &soaking.plan.add[0].id);
    let before = (bench.world.seen(old).requests(), bench.world.seen(new).requests());
    for _ in 0..10 {
        assert_eq!(bench.edge.get("/").await, Ok(200));
    }
    let after = (bench.world.seen(old).requests(), bench.world.seen(new).requests());
    assert_eq!((after.0 - before.0, after.1 - before.1), (0, 10));
    assert!(bench.world.runs("host-a", old), "it still stands by");
}
