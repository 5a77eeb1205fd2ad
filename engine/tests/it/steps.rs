//! Every step of a plan, one after the other: done twice, undone twice, failed, and with an undo that fails. The steps
//! are those of the plan itself, so that a new one is covered without being named here.

use std::sync::Arc;

use peregrine_engine::Ask;
use peregrine_engine::journal::Direction;
use peregrine_engine::model::{Control, InstanceId, Rollout, RolloutState, Step};
use peregrine_engine::store::{Batch, Write};

use crate::support::life::{Border, Life};
use crate::support::{Bench, shop_image, slow_move_to, until};

/// A move from one Docker machine to another, with a soak: it has a step of every kind.
fn ask() -> Ask {
    slow_move_to("host-b", 10)
}

/// The shop as an image that only `host-a` has.
async fn image_bench() -> Bench {
    let bench = Bench::with_image().await;
    bench.deploy(shop_image("shop:1"), Some("host-a")).await;
    bench.assert_tidy(1).await;
    bench
}

/// The steps of the move, and the first one from which there is no way back.
async fn steps_of_the_plan() -> (Vec<Step>, usize) {
    let bench = image_bench().await;
    let plan = bench.engine.plan(ask()).await.expect("it can be planned");
    let past_return = plan.steps.iter().position(|step| matches!(step, Step::Release { .. }));
    let past_return = past_return.expect("old copies are released");
    assert!(past_return >= 8, "a step of each kind: {:?}", plan.steps);
    (plan.steps, past_return)
}

/// A move whose engine dies at a border.
async fn move_up_to(border: Border) -> (Bench, Rollout) {
    let bench = image_bench().await;
    bench.life.end_at_step(border);
    // Its answer may die with the engine.
    let (engine, ask) = (bench.engine.clone(), ask());
    let starting = tokio::spawn(async move { engine.start(ask, "test".to_owned(), None, None).await });
    until(&format!("{border:?}"), || bench.life.is_over().then_some(())).await;
    starting.abort();
    bench.crash();
    let rollout = stored_rollout(&bench).await;
    (bench, rollout)
}

/// The newest rollout, as it is on the disk.
async fn stored_rollout(bench: &Bench) -> Rollout {
    let (_, entries) = bench.store.range("rollouts/").await.expect("it can be read");
    let newest = entries.last().expect("there is a rollout");
    serde_json::from_slice(&newest.value).expect("a rollout")
}

/// As if the operator had asked to go back just before the engine died.
async fn ask_to_go_back(bench: &Bench, rollout: &Rollout) {
    let mut rollout = rollout.clone();
    rollout.control = Control::Abort;
    let value = serde_json::to_vec(&rollout).expect("it can be written");
    let writes = vec![Write::Put(format!("rollouts/{}", rollout.id), value.into())];
    bench.store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("the store takes it");
}

/// Another engine on the same world and store, which dies at the border.
async fn next_life(bench: &Bench, border: Option<Border>) -> Bench {
    let life = Life::new();
    if let Some(border) = border {
        life.end_at_step(border);
    }
    let next = Bench::open(Arc::clone(&bench.world), Arc::clone(&bench.store), life).await;
    if let Some(border) = border {
        until(&format!("{border:?}"), || next.life.is_over().then_some(())).await;
        next.crash();
    }
    next
}

async fn assert_serves(bench: &Bench, machine: &str) {
    bench.assert_tidy(1).await;
    assert_eq!(bench.serving()[0].machine, machine);
    assert_eq!(bench.edge.get("/").await, Ok(200));
}

/// Does something with every step, several at a time: each is its own world.
async fn for_each_step<F: Future<Output = ()> + Send + 'static>(
    steps: std::ops::Range<usize>,
    deed: impl Fn(usize) -> F,
) {
    let mut indices = steps.peekable();
    while indices.peek().is_some() {
        let mut batch = tokio::task::JoinSet::new();
        for index in indices.by_ref().take(4) {
            batch.spawn(deed(index));
        }
        while let Some(done) = batch.join_next().await {
            done.expect("the step");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_in_which_any_step_is_done_twice_ends_as_one_in_which_none_is() {
    let (steps, _) = steps_of_the_plan().await;
    for_each_step(0..steps.len(), |index| async move {
        let (first, rollout) = move_up_to(Border::Done(index, Direction::Forward)).await;
        let second = next_life(&first, None).await;
        let ended = second.end_of(&rollout).await;
        assert!(second.life.begun().contains(&(index, Direction::Forward)), "step {index} is done again");
        assert_eq!(ended.state, RolloutState::Succeeded, "step {index}: {:?}", ended.problem);
        assert_eq!(ended.leftovers, [] as [String; 0]);
        assert_serves(&second, "host-b").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_on_which_any_undo_is_done_twice_ends_where_the_move_began() {
    let (_, past_return) = steps_of_the_plan().await;
    for_each_step(0..past_return, |index| async move {
        let (first, rollout) = move_up_to(Border::Done(index, Direction::Forward)).await;
        ask_to_go_back(&first, &rollout).await;
        let second = next_life(&first, Some(Border::Done(index, Direction::Back))).await;
        let third = next_life(&second, None).await;
        let ended = third.end_of(&rollout).await;
        assert!(third.life.begun().contains(&(index, Direction::Back)), "step {index} is undone again");
        assert_eq!(ended.state, RolloutState::Aborted, "step {index}: {:?}", ended.problem);
        assert_eq!(ended.leftovers, [] as [String; 0]);
        assert_serves(&third, "host-a").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_step_fails_what_runs_is_what_ran_before_and_the_service_goes_on() {
    let (steps, past_return) = steps_of_the_plan().await;
    let shifts = steps.iter().position(|step| matches!(step, Step::Shift { .. })).expect("it shifts");
    for_each_step(0..past_return, move |index| async move {
        let (first, rollout) = move_up_to(Border::Begun(index, Direction::Forward)).await;
        let new = &rollout.plan.add[0].id;
        // From here on nothing new comes to that machine, and what was there has died: whatever the step needs of it.
        first.world.faults("host-b", |faults| {
            faults.fail.extend([("import", u32::MAX), ("ensure", u32::MAX)]);
        });
        if first.world.runs("host-b", new) {
            first.world.kill(new);
        }
        let second = next_life(&first, None).await;
        let ended = second.end_of(&rollout).await;
        let end = if index < shifts { RolloutState::Failed } else { RolloutState::RolledBack };
        assert_eq!(ended.state, end, "step {index}: {:?}", ended.problem);
        assert!(ended.problem.is_some(), "step {index}: it says why");
        assert_eq!(ended.leftovers, [] as [String; 0]);
        let left: Vec<String> = second.world.inventory().into_iter().map(|(machine, _)| machine).collect();
        assert_eq!(left, ["host-a"], "step {index}");
        assert_serves(&second, "host-a").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_step_is_undone_when_undos_fail_the_list_names_exactly_what_is_left() {
    let (steps, past_return) = steps_of_the_plan().await;
    for_each_step(0..steps.len(), |index| async move {
        let is_past = index >= past_return;
        // Past the return there is no undo: there it is the step itself that fails.
        let border = if is_past { Border::Begun } else { Border::Done };
        let (first, rollout) = move_up_to(border(index, Direction::Forward)).await;
        let (before, after) = if is_past { ("host-a", "host-b") } else { ("host-b", "host-a") };
        first.world.faults(before, |faults| {
            faults.fail.insert("remove", u32::MAX);
        });
        if !is_past {
            ask_to_go_back(&first, &rollout).await;
        }
        let second = next_life(&first, None).await;
        let ended = second.end_of(&rollout).await;
        assert_eq!(second.edge.get("/").await, Ok(200), "the service goes on");
        let left: Vec<InstanceId> =
            second.world.inventory().into_iter().filter(|(on, _)| on == before).map(|(_, id)| id).collect();
        let end = match (left.is_empty(), is_past) {
            (false, _) => RolloutState::NeedsOperator,
            (true, true) => RolloutState::Succeeded,
            (true, false) => RolloutState::Aborted,
        };
        assert_eq!(ended.state, end, "step {index}: {:?}", ended.leftovers);
        assert_eq!(ended.leftovers.len(), left.len(), "step {index}: {:?}", ended.leftovers);
        for id in &left {
            assert!(ended.leftovers.iter().any(|text| text.contains(id.as_str())), "{:?}", ended.leftovers);
        }
        // While it still fails, a clean-up says so and loses nothing from the list.
        let cleaned = second.engine.cleanup(&rollout.id).await;
        if left.is_empty() {
            drop(cleaned); // a copy that never was may be on the way out
        } else {
            let error = cleaned.expect_err("removals fail");
            assert_eq!((error.code, error.findings.len()), ("cleanup.incomplete", left.len()));
            assert_eq!(second.engine.state().rollouts[&rollout.id].leftovers.len(), left.len());
        }
        second.world.faults(before, |faults| faults.fail.clear());
        for _ in 0..2 {
            let cleaned = second.engine.cleanup(&rollout.id).await.expect("nothing is left");
            assert_eq!(cleaned.leftovers, [] as [String; 0]);
        }
        assert_eq!(second.world.inventory().len(), 1);
        assert_serves(&second, after).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_up_is_refused_while_a_rollout_runs_and_for_one_that_is_not_known() {
    let bench = Bench::with_shop().await;
    let started = bench.start(slow_move_to("host-b", 60_000)).await;
    let refused = bench.engine.cleanup(&started.id).await.expect_err("it runs");
    assert_eq!(refused.code, "move.running");
    let unknown = peregrine_engine::model::RolloutId::generate();
    assert_eq!(bench.engine.cleanup(&unknown).await.expect_err("unknown").code, "move.unknown");
}
