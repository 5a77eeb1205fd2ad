//! A store that the previous version has written is taken up as it is.
//!
//! `fixtures/store-be570ca.db` was written by the code of commit be570ca and by no other: two services, moves that
//! have ended, a move that stands at half of the traffic and one that stands in its soak.

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt as _;
use peregrine_engine::model::{EventBody, HoldThen, PLAN_FORMAT, Phase, RolloutId, RolloutState};
use peregrine_engine::store::{Batch, Store as _, Write};

use crate::support::life::Life;
use crate::support::runtime::World;
use crate::support::{Bench, open_store, until};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/store-be570ca.db");
/// The move that has ended, at half, and in its soak.
const ENDED: &str = "mov_01a2054dd5967328bb588c96b3c02db6";
const AT_HALF: &str = "mov_01a2054dd65973419c67d1edfc01043c";
const IN_SOAK: &str = "mov_01a2054dd66170b9b2b6ba617f1ca23b";

fn copied() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::copy(FIXTURE, dir.path().join("store.db")).expect("the fixture is there");
    dir
}

async fn taken_up(dir: &Path) -> Bench {
    let store = open_store(dir).await;
    Bench::open(World::new(&["host-a", "host-b"]), store, Life::new()).await
}

fn id(text: &str) -> RolloutId {
    RolloutId(text.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_of_the_previous_version_is_read_whole_and_its_moves_come_to_their_end() {
    let dir = copied();
    let bench = taken_up(dir.path()).await;
    let state = bench.engine.state();
    assert_eq!(state.aside.keys().collect::<Vec<_>>(), [] as [&String; 0], "every record is understood");
    let ended = &state.rollouts[&id(ENDED)];
    assert_eq!(ended.state, RolloutState::Succeeded);
    assert!(ended.receipt.is_some());
    // What it could not have said is what it would have meant.
    let settings = &state.rollouts[&id(AT_HALF)].plan.settings;
    assert_eq!((settings.hold_max_ms, settings.hold_then), (60_000, HoldThen::Pause));
    let (half, soak) = (state.rollouts[&id(AT_HALF)].clone(), state.rollouts[&id(IN_SOAK)].clone());
    assert_eq!((half.weight_percent, half.phase), (50, Phase::Shift));
    assert_eq!(soak.phase, Phase::Soak);
    // The machines were restarted since: the copies are brought up, and the moves go on where they stood.
    until("every copy to run", || {
        let state = bench.engine.state();
        state.instances.values().all(|i| bench.world.runs(&i.machine, &i.id)).then_some(())
    })
    .await;
    for rollout in [&half, &soak] {
        bench.engine.promote(&rollout.id).await.expect("it is heard");
    }
    // Its steps are held for ten minutes each.
    bench.until(&half, "all of the traffic", |r| r.weight_percent == 100 && r.step == 4).await;
    bench.engine.promote(&half.id).await.expect("it is heard");
    for rollout in [&half, &soak] {
        let ended = bench.end_of(rollout).await;
        assert_eq!(ended.state, RolloutState::Succeeded, "{:?}", ended.problem);
        assert_eq!(ended.plan, rollout.plan, "a plan never changes");
    }
    bench.assert_tidy(2).await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
    let report = bench.engine.verify_audit().await.expect("it can be read");
    assert_eq!((report.broken, report.first), (Vec::new(), 1), "the audit begins with what came after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_of_a_version_that_is_not_known_is_held_and_stops_no_other() {
    let dir = copied();
    let store = open_store(dir.path()).await;
    let (_, entries) = store.range(&format!("rollouts/{AT_HALF}")).await.expect("it can be read");
    let mut rollout: serde_json::Value = serde_json::from_slice(&entries[0].value).expect("JSON");
    rollout["plan"]["format"] = (PLAN_FORMAT + 1).into();
    let value = serde_json::to_vec(&rollout).expect("JSON").into();
    let writes = vec![Write::Put(entries[0].key.clone(), value)];
    store.commit(Batch { preconditions: Vec::new(), writes }).await.expect("the store takes it");
    drop(store);

    let bench = taken_up(dir.path()).await;
    bench.engine.promote(&id(IN_SOAK)).await.expect("it is heard");
    let soak = bench.engine.state().rollouts[&id(IN_SOAK)].clone();
    assert_eq!(bench.end_of(&soak).await.state, RolloutState::Succeeded);
    let held = bench.engine.state().rollouts[&id(AT_HALF)].clone();
    assert_eq!((held.state, held.weight_percent), (RolloutState::Running, 50), "it stands where it stood");
    let alarms = bench.engine.alarms();
    assert_eq!(alarms.len(), 1, "{alarms:?}");
    assert_eq!(alarms[0].code, "plan.unknown_format");
    let mut held = Box::pin(bench.engine.events(0).filter_map(async |event| match event.body {
        EventBody::Held { problem } => Some((event.rollout, problem.code)),
        _ => None,
    }));
    let told = tokio::time::timeout(Duration::from_secs(30), held.next()).await.expect("it is told");
    assert_eq!(told, Some((Some(id(AT_HALF)), "plan.unknown_format".to_owned())));
    until("both copies of its service to serve", || {
        let state = bench.engine.state();
        let copies: Vec<_> = state.instances_of("shop").collect();
        (copies.len() == 2 && copies.iter().all(|i| bench.world.runs(&i.machine, &i.id))).then_some(())
    })
    .await;
    assert_eq!(bench.edge.get("/").await, Ok(200));
}
