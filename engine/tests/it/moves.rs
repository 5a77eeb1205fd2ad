//! Deploying and moving.

use peregrine_engine::model::{EventBody, Phase};

use crate::support::{Bench, machines_of, move_to, shop};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_deploy_brings_a_copy_that_serves() {
    let bench = Bench::new().await;
    let ended = bench.deploy(shop(), Some("host-a")).await;
    assert_eq!(machines_of(&bench.engine.state()), ["host-a"]);
    assert_eq!(bench.edge.get("/").await, Ok(200));
    assert_eq!(ended.weight_percent, 100);
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_under_load_loses_no_request_and_executes_none_twice() {
    let bench = Bench::with_shop().await;
    bench.edge.load(8);
    for turn in 0..6 {
        bench.done(move_to(if turn % 2 == 0 { "host-b" } else { "host-a" })).await;
    }
    bench.edge.quiet().await;
    bench.edge.assert_lossless(100);
    let twice: Vec<String> = bench.world.all_seen().iter().flat_map(|seen| seen.twice()).collect();
    assert!(twice.is_empty(), "{twice:?}");
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_phases_of_a_move_come_in_order() {
    let bench = Bench::with_shop().await;
    let ended = bench.done(move_to("host-b")).await;
    let phases: Vec<Phase> = ended.phases.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, [Phase::Plan, Phase::Start, Phase::Warm, Phase::Shift, Phase::Drain, Phase::Release]);
    let weights = {
        use futures_util::StreamExt as _;
        let events = bench.engine.events(0).take_while(|event| {
            let more = event.id < bench.engine.last_event();
            async move { more }
        });
        events
            .filter_map(|event| async move {
                match event.body {
                    EventBody::Weight { percent } if event.rollout == Some(ended.id.clone()) => Some(percent),
                    _ => None,
                }
            })
            .collect::<Vec<u8>>()
            .await
    };
    assert_eq!(weights, [1, 10, 50, 100]);
}
