//! Deploying and moving.

use std::sync::Arc;

use futures_util::StreamExt as _;
use peregrine_engine::model::{EventBody, FixedUpstream, Phase, Workload};
use peregrine_engine::runtime::Run;
use peregrine_engine::{Ask, MoveOverrides};

use crate::support::{Bench, machines_of, move_to, shop, shop_image, until};

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
    let mut events = bench.engine.events(0);
    let mut weights = Vec::new();
    while let Some(event) = events.next().await {
        if event.rollout.as_ref() != Some(&ended.id) {
            continue;
        }
        match event.body {
            EventBody::Weight { percent } => weights.push(percent),
            EventBody::Done { .. } => break,
            _ => {}
        }
    }
    assert_eq!(weights, [1, 10, 50, 100]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_no_registry_has_is_streamed_from_a_machine_that_has_it() {
    let bench = Bench::with_image().await;
    let world = Arc::clone(&bench.world);
    bench.deploy(shop_image("shop:1"), Some("host-a")).await;
    assert_eq!(bench.engine.state().versions[&("shop".to_owned(), 1)].digest.as_deref(), Some("sha256:1"));
    // The tag means another image by now; the version is still what it was.
    world.put_image("host-a", "shop:1", "sha256:2");
    world.put_image("host-a", "old", "sha256:1");
    let ended = bench.done(move_to("host-b")).await;
    assert!(ended.transferred_bytes > 0);
    assert_eq!(world.calls("host-b", "import"), 1);
    bench.assert_tidy(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capabilities_go_with_the_version_to_the_containers_and_a_change_is_a_new_version() {
    let bench = Bench::with_image().await;
    bench.deploy(shop_image("shop:1"), Some("host-a")).await;
    let given = |bench: &Bench| {
        let copy = &bench.serving()[0];
        match bench.world.spec(&copy.machine, &copy.id).run {
            Run::Container { capabilities, .. } => (copy.version, capabilities),
            Run::Process { .. } => panic!("it is a container"),
        }
    };
    assert_eq!(given(&bench), (1, Vec::new()));
    let mut spec = shop_image("shop:1");
    if let Workload::Image { capabilities, .. } = &mut spec.workload {
        *capabilities = ["SETUID".to_owned(), "SETGID".to_owned()].into();
    }
    bench.deploy(spec.clone(), None).await;
    assert_eq!(given(&bench), (2, vec!["SETGID".to_owned(), "SETUID".to_owned()]));
    bench.done(Ask::Rollback { service: "shop".to_owned(), to_version: None }).await;
    assert_eq!(given(&bench), (1, Vec::new()));
    if let Workload::Image { capabilities, .. } = &mut spec.workload {
        *capabilities = ["SYS_ADMIN".to_owned()].into();
    }
    let overrides = MoveOverrides::default();
    let ask = Ask::Deploy { spec: Box::new(spec), machine: None, overrides };
    let refused = bench.engine.start(ask, "test".to_owned(), None, None).await.expect_err("power");
    assert_eq!(refused.code, "spec.invalid");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fixed_upstreams_go_to_the_table_at_once_and_change_without_loss() {
    let bench = Bench::with_shop().await;
    let address = |bench: &Bench| bench.serving()[0].address.expect("it runs").to_string();
    let mut spec = shop();
    spec.name = "fixed".to_owned();
    spec.routes[0].host = "fixed.test".to_owned();
    let upstreams = |addresses: &[String]| Workload::Fixed {
        upstreams: addresses
            .iter()
            .map(|address| FixedUpstream { address: address.clone(), weight: 1 })
            .collect(),
    };
    let shown = |bench: &Bench| {
        let table = bench.edge.reader().load();
        let found = table.lookup("fixed.test", "/").map(|found| {
            found
                .service
                .upstreams()
                .map(|(_, u)| (u.generation(), u.address().to_string()))
                .collect::<Vec<_>>()
        });
        found.unwrap_or_default()
    };
    for addresses in [vec![address(&bench)], vec![address(&bench), "10.0.0.9:80".to_owned()]] {
        spec.workload = upstreams(&addresses);
        let ask =
            Ask::Deploy { spec: Box::new(spec.clone()), machine: None, overrides: MoveOverrides::default() };
        let before = shown(&bench);
        assert_eq!(bench.engine.start(ask, "t".to_owned(), None, None).await.expect("accepted"), None);
        let now = shown(&bench);
        assert_eq!(now.len(), addresses.len());
        assert!(before.iter().all(|kept| now.contains(kept)), "what stays keeps its generation");
    }
    bench.engine.remove_service("fixed").await.expect("it is removed");
    until("the route to go", || shown(&bench).is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_default_settings_a_move_takes_less_than_three_seconds() {
    let bench = Bench::new().await;
    let mut spec = shop();
    spec.move_settings = peregrine_engine::model::MoveSettings::default();
    bench.deploy(spec, Some("host-a")).await;
    bench.edge.load(2);
    let ended = bench.done(move_to("host-b")).await;
    let took = ended.ended_at.expect("it has ended") - ended.started_at;
    assert!(took <= 3_000, "{took} ms");
    bench.edge.quiet().await;
    bench.edge.assert_lossless(50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_configuration_file_adds_changes_and_removes_what_is_its_own() {
    let bench = Bench::new().await;
    bench.deploy(shop(), Some("host-a")).await;
    let mut books = shop();
    books.name = "books".to_owned();
    books.routes[0].host = "books.test".to_owned();
    let applied =
        bench.engine.apply_config(Vec::new(), vec![(books.clone(), Some("host-b".to_owned()))]).await;
    let applied = applied.expect("it is applied");
    assert_eq!((applied.rollouts.len(), applied.problems.len()), (1, 0), "{:?}", applied.problems);
    bench.engine.ended(&applied.rollouts[0]).await.expect("it ends");
    bench.assert_tidy(2).await;
    let again = bench.engine.apply_config(Vec::new(), vec![(books, Some("host-b".to_owned()))]).await;
    assert!(again.expect("it is applied").rollouts.is_empty(), "nothing has changed");
    bench.engine.apply_config(Vec::new(), Vec::new()).await.expect("it is applied");
    bench.assert_tidy(1).await;
    assert!(bench.engine.state().services.contains_key("shop"), "that came in another way");
}
