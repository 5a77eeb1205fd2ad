//! Moves: planned, started, steered, taken back.

use peregrine_api::client::{MoveFilter, Submit};
use peregrine_api::types::{Action, MoveKind, MoveRequest, MoveState, Overrides, Phase, ProblemKind};

use crate::support::{Server, patient, problem, shop};

fn to(machine: &str) -> MoveRequest {
    MoveRequest { service: "shop".into(), to: machine.into(), ..MoveRequest::default() }
}

/// A move that stays in its soak until it is told to go on.
fn soaking(machine: &str) -> MoveRequest {
    let settings = Overrides { soak_ms: Some(600_000), ..Overrides::default() };
    MoveRequest { settings, ..to(machine) }
}

async fn in_soak(server: &Server) -> String {
    let id = server.client.start_move(&soaking("host-b"), &Submit::default()).await.unwrap().id;
    server.until(&id, "the soak", |rollout| rollout.phase == Phase::Soak).await;
    id
}

#[tokio::test]
async fn a_move_is_planned_started_and_ends_with_a_receipt() {
    let server = Server::start().await;
    server.with_shop().await;
    let plan = server.client.plan_move(&to("host-b")).await.unwrap();
    assert_eq!((plan.kind, plan.add[0].machine.as_str(), plan.blockers.len()), (MoveKind::Move, "host-b", 0));
    assert_eq!(server.client.instances(None, false).await.unwrap()[0].machine, "host-a");

    let request = MoveRequest {
        plan_hash: Some(plan.hash.clone()),
        reason: Some("maintenance".into()),
        ..to("host-b")
    };
    let ended = server.client.start_move(&request, &patient()).await.unwrap();
    assert_eq!((ended.state, ended.weight_percent), (MoveState::Succeeded, 100), "{ended:#?}");
    assert_eq!((ended.plan_hash, ended.reason.as_str()), (plan.hash, "maintenance"));
    assert_eq!(ended.from[0].machine.as_deref(), Some("host-a"));
    assert_eq!(ended.to[0].machine.as_deref(), Some("host-b"));
    assert_eq!(ended.actions, [Action::Rollback]);
    assert!(ended.phases.iter().all(|phase| phase.duration_ms.is_some()), "{:?}", ended.phases);
    assert_eq!(ended.links.receipt, Some(format!("/api/v1/moves/{}/receipt", ended.id)));

    let receipt = server.client.receipt(&ended.id).await.unwrap();
    assert_eq!((receipt.move_id, receipt.failed, receipt.hard_cut.len()), (ended.id, 0, 0));
    assert_eq!(receipt.instances.len(), 2);
    assert_eq!(server.client.instances(None, false).await.unwrap()[0].machine, "host-b");
}

#[tokio::test]
async fn a_move_is_accepted_at_once_with_the_place_to_look_at() {
    let server = Server::start().await;
    server.with_shop().await;
    let answer = server.ask("POST", "/api/v1/moves", Some(r#"{"service":"shop","to":"host-b"}"#)).await;
    assert_eq!(answer.status, 202);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.header("location"), Some(format!("/api/v1/moves/{id}").as_str()));
    server.until(&id, "the end", |rollout| rollout.state == MoveState::Succeeded).await;
}

#[tokio::test]
async fn a_dry_run_of_a_move_starts_nothing() {
    let server = Server::start().await;
    server.with_shop().await;
    let body = r#"{"service":"shop","to":"host-b"}"#;
    let answer = server.ask("POST", "/api/v1/moves?dry_run=true", Some(body)).await;
    assert_eq!((answer.status, &answer.json()["would_start"]), (200, &true.into()));
    assert_eq!(server.client.moves(&MoveFilter::default()).await.unwrap().items.len(), 1);
}

#[tokio::test]
async fn a_second_move_is_refused_with_the_id_of_the_first() {
    let server = Server::start().await;
    server.with_shop().await;
    let first = in_soak(&server).await;
    let refused = problem(server.client.start_move(&to("host-a"), &Submit::default()).await);
    assert_eq!((refused.status, refused.code.as_str()), (409, "move.in_progress"));
    assert_eq!((refused.move_id.as_deref(), refused.kind), (Some(first.as_str()), ProblemKind::Conflict));
    assert!(refused.retryable);
}

#[tokio::test]
async fn a_move_to_a_machine_that_is_not_there_or_where_it_is_already_is_refused() {
    let server = Server::start().await;
    server.with_shop().await;
    for (request, codes) in [
        (to("nowhere"), ["machine.unknown", "plan.blocked"]),
        (to("host-a"), ["move.same_place", "plan.blocked"]),
    ] {
        let refused = problem(server.client.start_move(&request, &Submit::default()).await);
        let named = codes.contains(&refused.code.as_str());
        assert!(named && !refused.hint.is_empty(), "{refused:#?}");
        if refused.code == "plan.blocked" {
            assert_eq!((refused.status, refused.kind), (422, ProblemKind::Blocked));
            assert!(!refused.blockers.is_empty());
        }
    }
}

#[tokio::test]
async fn a_move_is_held_goes_on_and_is_hurried() {
    let server = Server::start().await;
    server.with_shop().await;
    let id = in_soak(&server).await;
    let held = server.client.pause_move(&id).await.unwrap();
    assert_eq!(held.state, MoveState::Paused);
    assert!(held.actions.contains(&Action::Resume) && !held.actions.contains(&Action::Pause));
    let on = server.client.resume_move(&id).await.unwrap();
    assert_eq!(on.state, MoveState::Running);
    assert!(on.actions.contains(&Action::Promote));
    server.client.promote_move(&id).await.unwrap();
    let ended = server.until(&id, "the end", |rollout| rollout.state.is_terminal()).await;
    assert_eq!(ended.state, MoveState::Succeeded);
}

#[tokio::test]
async fn an_aborted_move_goes_back_and_the_answer_comes_before_it_is_back() {
    let server = Server::start().await;
    server.with_shop().await;
    let id = in_soak(&server).await;
    let answer = server.ask("POST", &format!("/api/v1/moves/{id}/abort"), None).await;
    assert!(answer.status == 202 || answer.status == 200, "{answer:?}");
    let ended = server.until(&id, "the end", |rollout| rollout.state.is_terminal()).await;
    assert_eq!(ended.state, MoveState::Aborted);
    assert_eq!(server.client.instances(None, false).await.unwrap()[0].machine, "host-a");
    let again = problem(server.client.abort_move(&id, &Submit::default()).await);
    assert_eq!((again.status, again.code.as_str()), (409, "move.ended"));
}

#[tokio::test]
async fn a_move_that_has_ended_is_taken_back_by_a_move_of_its_own() {
    let server = Server::start().await;
    server.with_shop().await;
    let there = server.client.start_move(&to("host-b"), &patient()).await.unwrap();
    let back = server.client.rollback_move(&there.id, &patient()).await.unwrap();
    assert_ne!(back.id, there.id);
    assert_eq!((back.state, back.to[0].machine.as_deref()), (MoveState::Succeeded, Some("host-a")));
    assert_eq!(server.client.get_move(&there.id).await.unwrap().actions, []);
}

#[tokio::test]
async fn a_move_under_way_has_no_receipt_yet() {
    let server = Server::start().await;
    server.with_shop().await;
    let id = in_soak(&server).await;
    let refused = problem(server.client.receipt(&id).await);
    assert_eq!((refused.status, refused.code.as_str(), refused.retryable), (409, "move.running", true));
    assert_eq!(server.client.get_move(&id).await.unwrap().links.receipt, None);
}

#[tokio::test]
async fn the_list_of_moves_is_newest_first_and_can_be_narrowed() {
    let server = Server::start().await;
    server.with_shop().await;
    let mut other = shop();
    other.name = "web".into();
    other.routes[0].host = "web.test".into();
    server.put(&other).await;
    let running = in_soak(&server).await;
    let all = server.client.moves(&MoveFilter::default()).await.unwrap().items;
    let services: Vec<_> = all.iter().map(|rollout| rollout.service.as_str()).collect();
    assert_eq!(services, ["shop", "web", "shop"]);
    let of_web = MoveFilter { service: Some("web".into()), ..MoveFilter::default() };
    assert_eq!(server.client.moves(&of_web).await.unwrap().items.len(), 1);
    let now = MoveFilter { state: Some(MoveState::Running), ..MoveFilter::default() };
    let now = server.client.moves(&now).await.unwrap().items;
    assert_eq!(now.iter().map(|rollout| rollout.id.as_str()).collect::<Vec<_>>(), [running.as_str()]);
    let status = server.client.status().await.unwrap();
    assert_eq!(status.moves.len(), 1);
    assert_eq!(status.services[0].move_id, Some(running));
}
