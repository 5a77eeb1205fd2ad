//! The event stream: ordered, resumable, bounded; live and replayed state are the same.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use peregrine_engine::State;
use peregrine_engine::model::{Event, EventBody};
use peregrine_engine::store::{Committed, Store as _, Write};

use crate::support::life::Life;
use crate::support::memory::MemoryStore;
use crate::support::runtime::World;
use crate::support::{Bench, machine, move_to, open_store, shop, shop_version, until};

async fn stored_until(bench: &Bench, after: u64, last: u64) -> Vec<Event> {
    let mut events = bench.engine.events(after);
    let mut read = Vec::new();
    while let Some(event) = events.next().await {
        if matches!(event.body, EventBody::Sample(_)) {
            continue;
        }
        let id = event.id;
        read.push(event);
        if id >= last {
            break;
        }
    }
    read
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_comes_back_misses_nothing_and_sees_nothing_twice() {
    let bench = Bench::with_shop().await;
    let first_half = bench.engine.last_event();
    let reading = bench.engine.events(first_half);
    bench.done(move_to("host-b")).await;
    let last = bench.engine.last_event();
    let all = stored_until(&bench, 0, last).await;
    let ids: Vec<u64> = all.iter().map(|event| event.id).collect();
    assert_eq!(ids, (1..=last).collect::<Vec<u64>>());
    // One who listened from the middle on, live, has the same second half.
    let live: Vec<Event> = reading
        .filter(|event| futures_util::future::ready(!matches!(event.body, EventBody::Sample(_))))
        .take(usize::try_from(last - first_half).expect("few events"))
        .collect()
        .await;
    assert_eq!(live, all[usize::try_from(first_half).expect("few events")..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_damaged_hides_no_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open_store(dir.path()).await;
    let bench = Bench::open(World::new(&["host-a", "host-b"]), store, Life::new()).await;
    bench.engine.add_machine(machine("host-a")).await.expect("a machine can be added");
    bench.deploy(shop(), Some("host-a")).await;
    let (world, store) = bench.shut_down().await;
    drop(store);
    let file = rusqlite::Connection::open(dir.path().join("store.db")).expect("it is there");
    let forged = "UPDATE entry SET value = CAST('{' AS BLOB) WHERE key = 'events/00000000000000000003'";
    assert_eq!(file.execute(forged, ()).expect("it is changed"), 1);
    drop(file);
    let again = Bench::open(world, open_store(dir.path()).await, Life::new()).await;
    let last = again.engine.last_event();
    let events = stored_until(&again, 0, last).await;
    let expected: Vec<u64> = (1..=last).filter(|id| *id != 3).collect();
    assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_go_on_after_a_restart() {
    let bench = Bench::with_shop().await;
    let before = bench.engine.last_event();
    let (world, store) = bench.shut_down().await;
    let again = Bench::open(world, store, Life::new()).await;
    assert_eq!(again.engine.last_event(), before);
    again.done(move_to("host-b")).await;
    let events = stored_until(&again, before - 2, before + 2).await;
    assert_eq!(
        events.iter().map(|event| event.id).collect::<Vec<_>>(),
        [before - 1, before, before + 1, before + 2]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_rollout_gives_live_readings_and_one_at_each_change_of_weight() {
    let bench = Bench::with_shop().await;
    bench.edge.load(4);
    let mut events = bench.engine.events(bench.engine.last_event());
    bench.start(crate::support::slow_move_to("host-b", 1_200)).await;
    let mut weights = Vec::new();
    let read = async {
        while let Some(event) = events.next().await {
            match event.body {
                EventBody::Sample(sample) => weights.push((sample.weight_percent, sample.totals.requests)),
                EventBody::Done { .. } => break,
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read).await.expect("the rollout ends");
    assert!(weights.iter().any(|(weight, _)| *weight == 100), "{weights:?}");
    assert!(weights.windows(2).all(|pair| pair[0].1 <= pair[1].1), "totals never fall: {weights:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replaying_what_was_committed_gives_the_live_state() {
    let store = Arc::new(MemoryStore::default());
    let bench = Bench::open(World::new(&["host-a", "host-b"]), store.clone(), Life::new()).await;
    for name in ["host-a", "host-b"] {
        bench.engine.add_machine(machine(name)).await.expect("a machine can be added");
    }
    bench.deploy(shop(), Some("host-a")).await;
    bench.done(move_to("host-b")).await;
    bench.deploy(shop_version("two"), None).await;
    let started = bench.start(crate::support::slow_move_to("host-a", 60_000)).await;
    bench
        .until(&started, "the soak", |r| {
            r.phase == peregrine_engine::model::Phase::Soak && r.waiting_for.is_some()
        })
        .await;
    until("a quiet moment", || {
        (store.commits().last().map(|c| c.revision) == Some(bench.engine.state().revision)).then_some(())
    })
    .await;
    let live = bench.engine.state();
    // Commit by commit, as it went on.
    let mut replayed = State::default();
    for committed in store.commits().into_iter().filter(|committed| committed.revision <= live.revision) {
        replayed.apply(&committed).expect("what was committed may follow");
    }
    assert_eq!(*live, replayed);
    // At once, as at a start.
    let (revision, entries) = store.range("").await.expect("it can be read");
    let writes = entries.into_iter().map(|entry| Write::Put(entry.key, entry.value)).collect();
    let mut opened = State::default();
    opened.apply(&Committed { revision, writes }).expect("what is stored can be read");
    assert_eq!(*bench.engine.state(), opened);
}

#[test]
fn a_forged_number_is_kept_aside_and_the_numbers_go_on_where_they_were() {
    let mut state = State::default();
    let put = |key: &str, value: &str| Write::Put(key.to_owned(), bytes::Bytes::from(value.to_owned()));
    let writes = vec![
        put("events/00000000000000000003", "{}"),
        put("events/18446744073709551615", "{}"),
        put("audit/00000000000000000002", "{}"),
        put("audit/18446744073709551615", "{}"),
        put("meta/audit", r#"{"number":18446744073709551615,"hash":"x"}"#),
    ];
    let error = state.apply(&Committed { revision: 1, writes }).expect_err("some were never given out");
    assert_eq!((error.key.as_str(), state.aside.len()), ("events/18446744073709551615", 3));
    assert_eq!((state.last_event, state.audit.number), (3, 2));
}

#[test]
fn an_illegal_change_is_kept_aside_and_the_rest_is_applied() {
    let mut state = State::default();
    let put = |key: &str, value: &str| Write::Put(key.to_owned(), bytes::Bytes::from(value.to_owned()));
    let settled = r#"{"record":"settled","at":1,"intent":1,"output":"x","error":null}"#;
    let writes = vec![
        put("meta/generation", "7"),
        put("journal/mov_1/00000001", settled),
        put("nonsense/x", "1"),
        put("machines/broken", "{"),
        put("events/00000000000000000003", "{}"),
    ];
    let error = state.apply(&Committed { revision: 4, writes }).expect_err("some are wrong");
    assert_eq!(error.key, "journal/mov_1/00000001");
    assert_eq!(state.aside.len(), 3, "{:?}", state.aside);
    assert_eq!((state.revision, state.last_generation, state.last_event), (4, 7, 3));
    let back = state.apply(&Committed { revision: 5, writes: vec![put("meta/generation", "6")] });
    assert!(back.is_err(), "a generation is given out once");
    assert_eq!(state.last_generation, 7);
}
