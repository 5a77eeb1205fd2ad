//! Services: created, changed, deployed, rolled back, scaled, removed; secrets kept.

use peregrine_api::client::{PutService, Removal};
use peregrine_api::types::{
    Action, DeployRequest, FixedUpstream, MoveKind, MoveState, Probe, ProblemKind, RollbackRequest,
    ScaleRequest, ServiceState, Workload,
};

use crate::support::{Server, instance, patient, problem, shop};

#[tokio::test]
async fn fixed_upstreams_are_applied_when_the_answer_comes() {
    let server = Server::start().await;
    let mut spec = shop();
    spec.workload =
        Workload::Fixed { upstreams: vec![FixedUpstream { address: "127.0.0.1:9".into(), weight: 1 }] };
    spec.health.probe = Probe::None;
    spec.health.path = None;
    let applied = server.client.put_service(&spec, &PutService::default()).await.unwrap();
    assert!(applied.rollout.is_none());
    assert_eq!(applied.service.state, ServiceState::Running);
    assert_eq!(server.client.status().await.unwrap().services[0].upstreams, ["127.0.0.1:9"]);
}

#[tokio::test]
async fn a_new_service_is_accepted_at_once_with_the_place_to_look_at() {
    let server = Server::start().await;
    let body = serde_json::to_string(&shop()).unwrap();
    let answer = server.ask("PUT", "/api/v1/services/shop?machine=host-a", Some(&body)).await;
    assert_eq!(answer.status, 202);
    let id = answer.json()["move"]["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.header("location"), Some(format!("/api/v1/moves/{id}").as_str()));
    let ended = server.until(&id, "the end", |rollout| rollout.state.is_terminal()).await;
    assert_eq!((ended.state, ended.kind, ended.to_version), (MoveState::Succeeded, MoveKind::Deploy, 1));
    let service = server.client.service("shop").await.unwrap();
    assert_eq!((service.version, service.latest_version), (Some(1), 1));
}

#[tokio::test]
async fn a_wish_to_wait_gets_the_end_in_the_answer() {
    let server = Server::start().await;
    let body = serde_json::to_string(&shop()).unwrap();
    let lines = ["Content-Type: application/json", "Prefer: wait=30"];
    let answer = server.ask_with("PUT", "/api/v1/services/shop?machine=host-a", &lines, &body).await;
    assert_eq!(
        (answer.status, answer.json()["move"]["state"].as_str()),
        (200, Some("succeeded")),
        "{answer:?}"
    );
}

#[tokio::test]
async fn no_answer_of_any_route_bears_the_value_of_an_environment_variable() {
    let server = Server::start().await;
    let applied = server.with_shop().await;
    let id = applied.rollout.unwrap().id;
    for path in [
        "/api/v1/services",
        "/api/v1/services/shop",
        "/api/v1/services/shop/deployments",
        "/api/v1/status",
        "/api/v1/instances",
        "/api/v1/moves",
        &format!("/api/v1/moves/{id}"),
        &format!("/api/v1/moves/{id}/receipt"),
        &format!("/api/v1/moves/{id}/events"),
    ] {
        let answer = server.ask("GET", path, None).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(!answer.body.contains("not-to-be-shown"), "{path}: {}", answer.body);
    }
    let shown = server.ask("GET", "/api/v1/services/shop", None).await;
    assert_eq!(shown.json()["spec"]["workload"]["env"]["SECRET"], "***");
}

#[tokio::test]
async fn a_service_that_is_read_and_put_back_as_it_is_changes_nothing() {
    let server = Server::start().await;
    server.with_shop().await;
    let read = server.client.service("shop").await.unwrap().spec;
    let applied = server.client.put_service(&read, &PutService::default()).await.unwrap();
    assert!(applied.rollout.is_none(), "{applied:#?}");
    let state = server.engine.state();
    let peregrine_engine::model::Workload::Command { env, .. } = &state.services["shop"].spec.workload else {
        panic!("no command")
    };
    assert_eq!(env["SECRET"], "not-to-be-shown");
}

#[tokio::test]
async fn a_dry_run_tells_the_plan_and_changes_nothing() {
    let server = Server::start().await;
    let put = PutService { machine: Some("host-a".into()), ..PutService::default() };
    let dry = server.client.plan_put_service(&shop(), &put).await.unwrap();
    assert!(dry.dry_run && dry.would_start, "{dry:#?}");
    assert_eq!(dry.plan.add[0].machine, "host-a");
    assert_eq!(problem(server.client.service("shop").await).code, "service.unknown");
    server.with_shop().await;
    let scaled =
        server.client.plan_scale("shop", &ScaleRequest { replicas: 3, ..Default::default() }).await.unwrap();
    assert_eq!((scaled.plan.kind, scaled.plan.add.len()), (MoveKind::Scale, 2));
    let deployed = server
        .client
        .plan_deploy("shop", &DeployRequest { service: Some(other_shop()), ..Default::default() })
        .await
        .unwrap();
    assert_eq!((deployed.plan.from_version, deployed.plan.to_version), (Some(1), 2));
    assert_eq!(server.client.instances(Some("shop"), false).await.unwrap().len(), 1);
    assert_eq!(server.client.moves(&Default::default()).await.unwrap().items.len(), 1);
}

fn other_shop() -> peregrine_api::types::ServiceSpec {
    let mut other = shop();
    other.workload = instance(&[("SECRET", "another")]);
    other
}

#[tokio::test]
async fn deploy_rollback_and_scale_are_moves_and_the_versions_are_listed_newest_first() {
    let server = Server::start().await;
    server.with_shop().await;
    let request =
        DeployRequest { service: Some(other_shop()), reason: Some("ticket 7".into()), ..Default::default() };
    let deployed = server.client.deploy("shop", &request, &patient()).await.unwrap();
    let rollout = deployed.rollout.unwrap();
    assert_eq!((rollout.state, rollout.kind), (MoveState::Succeeded, MoveKind::Deploy), "{rollout:#?}");
    assert_eq!(rollout.reason, "ticket 7");
    assert_eq!(deployed.service.version, Some(2));
    let versions = server.client.deployments("shop").await.unwrap();
    let told: Vec<_> =
        versions.iter().map(|version| (version.version, version.current, version.previous)).collect();
    assert_eq!(told, [(2, true, false), (1, false, true)]);

    let dry = server.client.plan_rollback("shop", &RollbackRequest::default()).await.unwrap();
    assert_eq!((dry.plan.kind, dry.plan.to_version), (MoveKind::Rollback, 1));
    let back = server.client.rollback("shop", &RollbackRequest::default(), &patient()).await.unwrap();
    assert_eq!(back.rollout.unwrap().state, MoveState::Succeeded);
    assert_eq!(back.service.version, Some(1));

    let scale = ScaleRequest { replicas: 2, ..ScaleRequest::default() };
    let scaled = server.client.scale("shop", &scale, &patient()).await.unwrap();
    assert_eq!(scaled.rollout.unwrap().state, MoveState::Succeeded);
    assert_eq!(server.client.instances(Some("shop"), false).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_copy_that_never_gets_healthy_leaves_the_service_as_it_was_and_says_why() {
    let server = Server::start().await;
    server.with_shop().await;
    let mut sick = shop();
    sick.workload = instance(&[("SICK", "1")]);
    sick.move_settings.start_timeout_ms = 500;
    let request = DeployRequest { service: Some(sick), ..Default::default() };
    let rollout = server.client.deploy("shop", &request, &patient()).await.unwrap().rollout.unwrap();
    assert!(matches!(rollout.state, MoveState::Failed | MoveState::RolledBack), "{rollout:#?}");
    assert!(!rollout.problem.unwrap().hint.is_empty());
    assert_eq!(rollout.actions, Vec::<Action>::new());
    assert_eq!(server.client.service("shop").await.unwrap().version, Some(1));
}

#[tokio::test]
async fn what_cannot_be_asked_of_a_service_is_refused_with_the_field() {
    let server = Server::start().await;
    server.with_shop().await;
    let image = DeployRequest { image: Some("shop:2".into()), ..DeployRequest::default() };
    let refused = problem(server.client.deploy("shop", &image, &patient()).await);
    assert_eq!((refused.status, refused.errors[0].pointer.as_str()), (422, "/image"));

    let mut renamed = shop();
    renamed.name = "other".into();
    let request = DeployRequest { service: Some(renamed), ..DeployRequest::default() };
    let refused = problem(server.client.deploy("shop", &request, &patient()).await);
    assert_eq!((refused.status, refused.errors[0].pointer.as_str()), (422, "/service/name"));

    let mut bad_steps = shop();
    bad_steps.move_settings.steps = vec![50, 10];
    let refused = problem(server.client.put_service(&bad_steps, &PutService::default()).await);
    assert_eq!((refused.code.as_str(), refused.kind), ("spec.invalid", ProblemKind::Invalid));

    let stale = ScaleRequest { replicas: 2, plan_hash: Some("0".repeat(64)), ..ScaleRequest::default() };
    let refused = problem(server.client.scale("shop", &stale, &patient()).await);
    assert_eq!((refused.status, refused.code.as_str()), (409, "plan.changed"));

    let version = RollbackRequest { to_version: Some(9), ..RollbackRequest::default() };
    let refused = problem(server.client.rollback("shop", &version, &patient()).await);
    assert!(refused.status == 404 || refused.status == 422, "{refused:?}");
}

#[tokio::test]
async fn a_service_that_is_removed_is_gone_with_its_copies() {
    let server = Server::start().await;
    server.with_shop().await;
    assert_eq!(server.client.remove_service("shop", Some(30_000)).await.unwrap(), Removal::Done);
    assert_eq!(problem(server.client.service("shop").await).status, 404);
    assert_eq!(server.client.instances(None, false).await.unwrap(), []);
}

#[tokio::test]
async fn status_tells_places_versions_weights_and_machines_in_one_document() {
    let server = Server::start().await;
    server.with_shop().await;
    let status = server.client.status().await.unwrap();
    assert_eq!(status.services[0].name, "shop");
    let place = &status.services[0].places[0];
    assert_eq!((place.machine.as_str(), place.instances, &place.versions[..]), ("host-a", 1, &[1][..]));
    assert!((place.weight_percent - 100.0).abs() < 0.01, "{place:?}");
    let machines: Vec<_> =
        status.machines.iter().map(|machine| (machine.name.as_str(), machine.instances)).collect();
    assert_eq!(machines, [("host-a", 1), ("host-b", 0)]);
    assert!(status.moves.is_empty());
    assert_eq!(status.last_event, server.engine.last_event());
}

#[tokio::test]
async fn an_instance_is_told_with_what_it_uses() {
    let server = Server::start().await;
    server.with_shop().await;
    let listed = server.client.instances(Some("shop"), true).await.unwrap();
    let one = server.client.instance(&listed[0].id).await.unwrap();
    assert_eq!((&one.machine, one.version), (&"host-a".to_owned(), 1));
    assert!(one.usage.is_some_and(|usage| usage.memory_bytes > 0), "{one:?}");
    assert!(one.address.is_some_and(|address| address.starts_with("127.0.0.2:")));
}

#[tokio::test]
async fn rules_that_no_edge_could_follow_are_refused_with_what_to_write_and_sound_ones_are_shown_again() {
    let server = Server::start().await;
    let put = async |rules: &str| {
        let body = format!(
            r#"{{"workload":{{"kind":"fixed","upstreams":[{{"address":"127.0.0.1:9","weight":1}}]}},
            "health":{{"probe":"none"}},"traffic":{{"rules":{rules}}}}}"#
        );
        server.ask("PUT", "/api/v1/services/web", Some(&body)).await
    };
    for (rules, said) in [
        (r#"{"headers":{"request":{"set":{"Host":"hunter2"}}}}"#, "\\\"Host\\\" cannot be changed"),
        (r#"{"headers":{"response":{"remove":["bad name"]}}}"#, "no name of a header field"),
        (r#"{"headers":{"request":{"add":{"x-a":"hunter2\n"}}}}"#, "the value for the header field"),
        (r#"{"redirects":[{"from":"/a","to":"//evil.test"}]}"#, "no path and no address"),
        (r#"{"redirects":[{"from":"/a","to":"/b","status":200}]}"#, "the status 200"),
        (r#"{"rewrite":{"strip_prefix":"/a/../b"}}"#, "no path as requests are matched"),
        (r#"{"basic_auth":{"realm":"r","users":{"alice":"hunter2"}}}"#, "no argon2id or bcrypt hash"),
        (r#"{"basic_auth":{"realm":"r","users":{}}}"#, "0 users"),
        (r#"{"forward_auth":{"url":"https://auth.test/"}}"#, "no address on plain HTTP"),
        (r#"{"forward_auth":{"url":"http://a:1/","copy_headers":["host"]}}"#, "cannot be changed"),
        (r#"{"compression":{"codings":[]}}"#, "no codings"),
        (r#"{"compression":{"types":["html"]}}"#, "no media type"),
        (r#"{"error_pages":{"200":"x"}}"#, "no status that a page is for"),
        (r#"{"redirects":[{"from":"/a","to":"/b"},{"from":"/b","to":"/a"}]}"#, "leads in a circle"),
    ] {
        let answer = put(rules).await;
        assert_eq!(answer.status, 422, "{rules}: {answer:?}");
        assert!(answer.body.contains(said) && !answer.body.contains("hunter2"), "{rules}: {}", answer.body);
    }
    let rules = r#"{"headers":{"request":{"set":{"x-tenant":"blue"}}},"redirects":[{"from":"/a/*","to":"/b"}],"rewrite":{"strip_prefix":"/c"}}"#;
    let answer = put(rules).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let shown = server.ask("GET", "/api/v1/services/web", None).await.json();
    let shown = &shown["spec"]["traffic"]["rules"];
    assert_eq!(shown["headers"]["request"]["set"]["x-tenant"], "***", "it may be a credential");
    let kept = put(&shown.to_string()).await;
    assert_eq!(kept.status, 200, "what was shown can be sent back: {kept:?}");
    let new = put(r#"{"headers":{"request":{"set":{"x-other":"***"}}}}"#).await;
    assert!(new.status == 422 && new.body.contains("/traffic/rules/headers/request/set/x-other"), "{new:?}");
    assert_eq!(shown["redirects"][0]["status"], 308);
    assert_eq!(shown["rewrite"]["strip_prefix"], "/c");
}

#[tokio::test]
async fn who_is_told_for_whom_connections_are_is_shown_again_and_refused_where_many_share_one() {
    let server = Server::start().await;
    let put = async |traffic: &str| {
        let body = format!(
            r#"{{"workload":{{"kind":"fixed","upstreams":[{{"address":"127.0.0.1:9","weight":1}}]}},
            "health":{{"probe":"none"}},"traffic":{traffic}}}"#
        );
        server.ask("PUT", "/api/v1/services/web", Some(&body)).await
    };
    let answer = put(r#"{"protocol":"h2c","send_proxy_protocol":"v1"}"#).await;
    assert!(answer.status == 422 && answer.body.contains("serves many clients"), "{answer:?}");
    for version in [r#""v1""#, r#""v2""#, "null"] {
        let answer = put(&format!(r#"{{"send_proxy_protocol":{version}}}"#)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let shown = server.ask("GET", "/api/v1/services/web", None).await.json();
        assert_eq!(shown["spec"]["traffic"]["send_proxy_protocol"].to_string(), version);
        let policy = server.engine.state().services["web"].spec.traffic.send_proxy_protocol;
        assert_eq!(policy.is_some(), version != "null");
    }
}
