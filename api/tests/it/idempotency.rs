//! A repeated request does nothing twice.

use peregrine_api::client::{MoveFilter, Submit};
use peregrine_api::types::MoveRequest;

use crate::support::{Server, keyed, machine, problem};

fn to_b() -> MoveRequest {
    MoveRequest { service: "shop".into(), to: "host-b".into(), ..MoveRequest::default() }
}

#[tokio::test]
async fn a_start_that_is_repeated_with_its_key_is_the_same_move() {
    let server = Server::start().await;
    server.with_shop().await;
    let first = server.client.start_move(&to_b(), &keyed("k1")).await.unwrap();
    let second = server.client.start_move(&to_b(), &keyed("k1")).await.unwrap();
    assert_eq!(first.id, second.id);
    assert_eq!(server.client.moves(&MoveFilter::default()).await.unwrap().items.len(), 2);
}

#[tokio::test]
async fn a_start_is_the_same_move_also_after_a_restart_of_the_api() {
    let mut server = Server::start().await;
    server.with_shop().await;
    let first = server.client.start_move(&to_b(), &keyed("k1")).await.unwrap();
    server.stop_api().await;
    server.start_api(|_| {}).await;
    assert_eq!(server.client.start_move(&to_b(), &keyed("k1")).await.unwrap().id, first.id);
}

#[tokio::test]
async fn a_key_that_was_used_for_another_request_is_refused() {
    let server = Server::start().await;
    server.with_shop().await;
    server.client.start_move(&to_b(), &keyed("k1")).await.unwrap();
    let other = MoveRequest { to: "host-a".into(), ..to_b() };
    let refused = problem(server.client.start_move(&other, &keyed("k1")).await);
    assert_eq!((refused.status, refused.code.as_str()), (422, "idempotency.mismatch"));
}

#[tokio::test]
async fn any_post_that_is_repeated_gets_the_same_answer_and_says_that_it_is_one() {
    let server = Server::start().await;
    let body = serde_json::to_string(&machine("host-c", "127.0.0.4")).unwrap();
    let lines = ["Content-Type: application/json", "Idempotency-Key: k2"];
    let first = server.ask_with("POST", "/api/v1/machines", &lines, &body).await;
    let second = server.ask_with("POST", "/api/v1/machines", &lines, &body).await;
    assert_eq!((first.status, second.status), (201, 201));
    assert_eq!((first.body, first.head.contains("idempotency-replayed")), (second.body.clone(), false));
    assert_eq!(second.header("idempotency-replayed"), Some("true"));
    assert_eq!(second.header("location"), Some("/api/v1/machines/host-c"));
}

#[tokio::test]
async fn a_refusal_is_repeated_too_with_the_id_of_the_new_request() {
    let server = Server::start().await;
    let lines = ["Content-Type: application/json", "Idempotency-Key: k3"];
    let first =
        server.ask_with("POST", "/api/v1/moves", &lines, "{\"service\":\"none\",\"to\":\"host-b\"}").await;
    let second =
        server.ask_with("POST", "/api/v1/moves", &lines, "{\"service\":\"none\",\"to\":\"host-b\"}").await;
    let (first, second) = (first.problem(), second.problem());
    assert_eq!((first.code.as_str(), &first.code), ("service.unknown", &second.code));
    assert_ne!(first.request_id, second.request_id);
}

#[tokio::test]
async fn a_conflict_that_passes_is_not_kept() {
    let server = Server::start().await;
    server.with_shop().await;
    let soaking = MoveRequest {
        settings: peregrine_api::types::Overrides { soak_ms: Some(600_000), ..Default::default() },
        ..to_b()
    };
    let first = server.client.start_move(&soaking, &Submit::default()).await.unwrap();
    let back = MoveRequest { to: "host-a".into(), ..to_b() };
    assert_eq!(problem(server.client.start_move(&back, &keyed("k4")).await).code, "move.in_progress");
    server.until(&first.id, "the soak", |rollout| rollout.phase == peregrine_api::types::Phase::Soak).await;
    server.client.promote_move(&first.id).await.unwrap();
    server.until(&first.id, "the end", |rollout| rollout.state.is_terminal()).await;
    server.client.start_move(&back, &keyed("k4")).await.unwrap();
}

#[tokio::test]
async fn a_key_that_cannot_be_one_is_refused() {
    let server = Server::start().await;
    let lines = ["Content-Type: application/json", "Idempotency-Key: "];
    let problem = server.ask_with("POST", "/api/v1/moves", &lines, "{}").await.problem();
    assert_eq!((problem.status, problem.code.as_str()), (400, "request.invalid_header"));
}
