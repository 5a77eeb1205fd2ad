//! What holds for every route: problems for everything that is wrong, limits, ids, the document.

use std::time::{Duration, Instant};

use peregrine_api::openapi_json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::{PATIENCE, Server, exchange, machine, read_answer};

/// Every route of the document with an id or name that is not there filled in.
fn every_operation() -> Vec<(String, String, bool)> {
    let document: serde_json::Value = serde_json::from_str(&openapi_json()).unwrap();
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let path = path.replace("{name}", "no-such").replace("{id}", "no_such");
            operations.push((method.to_uppercase(), path, operation["requestBody"].is_object()));
        }
    }
    operations
}

#[tokio::test]
async fn every_route_that_needs_a_body_refuses_what_is_not_one() {
    let server = Server::start().await;
    let with_body: Vec<_> = every_operation().into_iter().filter(|(_, _, body)| *body).collect();
    assert!(with_body.len() >= 7, "{with_body:?}");
    for (method, path, _) in with_body {
        for (body, status, code) in [
            ("{", 400, "request.malformed_json"),
            ("", 400, "request.malformed_json"),
            ("[]", 422, "request.invalid_field"),
            ("7", 422, "request.invalid_field"),
        ] {
            let answer = server.ask(&method, &path, Some(body)).await;
            assert_eq!(
                (answer.status, answer.problem().code.as_str()),
                (status, code),
                "{method} {path} {body}"
            );
        }
        let undeclared = server.ask_with(&method, &path, &["Content-Type: text/plain"], "{}").await;
        assert_eq!((undeclared.status, undeclared.problem().code.as_str()), (415, "request.content_type"));
        let large = format!("{{\"x\":\"{}\"}}", "x".repeat(1 << 20));
        let large = server.ask(&method, &path, Some(&large)).await;
        assert_eq!((large.status, large.problem().code.as_str()), (413, "request.too_large"));
    }
}

#[tokio::test]
async fn every_route_about_something_that_is_not_there_says_so() {
    let server = Server::start().await;
    let mut seen = 0;
    for (method, path, needs_body) in every_operation() {
        if !path.contains("no-such") && !path.contains("no_such") {
            continue;
        }
        let body = match path.rsplit('/').next().unwrap() {
            "scale" => Some("{\"replicas\":2}"),
            _ if method == "PUT" => continue, // makes it
            _ if needs_body => Some("{}"),
            _ => None,
        };
        let answer = server.ask(&method, &path, body).await;
        let problem = answer.problem();
        assert_eq!(answer.status, 404, "{method} {path} {problem:?}");
        // This server has no keeper of domains, and says so where it would have to ask one.
        let said = problem.code.ends_with(".unknown") || problem.code == "domain.none_kept";
        assert!(said, "{method} {path} {problem:?}");
        assert_eq!(problem.instance, path);
        seen += 1;
    }
    assert!(seen >= 18, "{seen}");
}

#[tokio::test]
async fn every_route_refuses_a_query_parameter_that_it_does_not_know() {
    let server = Server::start().await;
    for (method, path, needs_body) in every_operation() {
        if ["/livez", "/metrics", "/api/openapi.json"].contains(&path.as_str()) {
            continue;
        }
        let answer = server.ask(&method, &format!("{path}?dryrun=true"), needs_body.then_some("{}")).await;
        let problem = answer.problem();
        assert_eq!((answer.status, problem.code.as_str()), (400, "request.invalid_query"), "{method} {path}");
        assert!(problem.detail.contains("dryrun"), "{problem:?}");
    }
}

#[tokio::test]
async fn a_route_or_method_that_is_not_there_is_a_problem_too() {
    let server = Server::start().await;
    let nowhere = server.ask("GET", "/api/v2/services", None).await;
    assert_eq!((nowhere.status, nowhere.problem().code.as_str()), (404, "request.no_such_route"));
    let method = server.ask("PATCH", "/api/v1/services", None).await;
    assert_eq!((method.status, method.problem().code.as_str()), (405, "request.method_not_allowed"));
    let allowed = method.header("allow").unwrap_or_default();
    assert!(allowed.contains("GET") && !allowed.contains("PATCH"), "{method:?}");
}

#[tokio::test]
async fn a_field_that_is_not_known_is_refused_with_its_pointer_and_what_was_meant() {
    let server = Server::start().await;
    let body = r#"{"service":"shop","to":"host-b","setings":{}}"#;
    let problem = server.ask("POST", "/api/v1/moves", Some(body)).await.problem();
    assert_eq!((problem.status, problem.code.as_str()), (422, "request.unknown_field"));
    assert_eq!(problem.errors[0].pointer, "/setings");
    assert!(problem.errors[0].message.contains("settings"), "{problem:?}");
}

#[tokio::test]
async fn an_action_without_fields_refuses_a_body_with_fields() {
    let server = Server::start().await;
    let problem =
        server.ask("POST", "/api/v1/machines/host-a/check", Some("{\"force\":true}")).await.problem();
    assert_eq!((problem.status, problem.errors[0].pointer.as_str()), (422, "/force"));
    assert_eq!(server.ask("POST", "/api/v1/machines/host-a/check", Some("{}")).await.status, 200);
}

#[tokio::test]
async fn a_request_id_comes_back_and_is_made_where_none_is_given() {
    let server = Server::start().await;
    let given = server.ask_with("GET", "/api/v1/version", &["x-request-id: mine-1"], "").await;
    assert_eq!(given.header("x-request-id"), Some("mine-1"));
    assert_eq!(given.header("cache-control"), Some("no-store"));
    let made = server.ask("GET", "/api/v1/version", None).await;
    assert!(made.header("x-request-id").unwrap().starts_with("req_"));
}

#[tokio::test]
async fn a_body_that_never_ends_is_given_up() {
    let server = Server::start_with(|config| config.limits.body_timeout_ms = 50).await;
    let mut connection = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /api/v1/moves HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{",
        server.token
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let answer = read_answer(connection).await;
    let problem = answer.problem();
    assert_eq!(
        (answer.status, problem.code.as_str(), problem.retryable),
        (408, "request.body_timeout", true)
    );
}

#[tokio::test]
async fn a_body_without_a_length_is_cut_at_the_limit() {
    let server = Server::start_with(|config| config.limits.max_body_bytes = 1_000).await;
    let piece = format!("3e8\r\n{}\r\n", " ".repeat(1_000));
    let request = format!(
        "POST /api/v1/moves HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{piece}{piece}0\r\n\r\n",
        server.token
    );
    let answer = exchange(server.address, &request).await;
    assert_eq!((answer.status, answer.problem().code.as_str()), (413, "request.too_large"));
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut_off() {
    let server = Server::start_with(|config| config.limits.head_timeout_ms = 50).await;
    let mut connection = TcpStream::connect(server.address).await.unwrap();
    connection.write_all(b"GET /livez HTTP/1.1\r\nHost: ").await.unwrap();
    let mut rest = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut connection, &mut rest);
    let ended = tokio::time::timeout(Duration::from_secs(10), read).await;
    assert!(ended.is_ok(), "the connection is kept open");
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_told_so_and_carried_through_all_the_same() {
    let mut server = Server::start().await;
    server.stop_api().await;
    server.start_api(|config| config.limits.request_timeout_ms = 0).await;
    // No time at all: whatever waits for the disk longer than the clock's tick is too late, and that is soon somebody.
    let mut late = None;
    for number in 0..100 {
        let name = format!("late-{number}");
        let body = serde_json::to_string(&machine(&name, "127.0.0.4")).unwrap();
        let answer = server.ask("POST", "/api/v1/machines", Some(&body)).await;
        if answer.status == 504 {
            assert_eq!(answer.problem().code, "request.timed_out");
            late = Some(name);
            break;
        }
        assert_eq!(answer.status, 201, "{answer:?}");
    }
    let late = late.expect("one of a hundred is too late");
    let begun = Instant::now();
    while !server.engine.state().machines.contains_key(&*late) {
        assert!(begun.elapsed() < PATIENCE, "the work was dropped");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_document_that_is_served_is_the_one_in_the_repository() {
    let server = Server::start().await;
    assert_eq!(server.ask("GET", "/api/openapi.json", None).await.body, openapi_json());
}

#[tokio::test]
async fn readiness_follows_its_checks_and_reports_them() {
    let server = Server::start_with(|config| {
        config.readiness = Some(std::sync::Arc::new(|| {
            let check = |name: &str, ok| peregrine_api::types::ReadinessCheck {
                name: name.to_owned(),
                ok,
                detail: String::new(),
            };
            vec![check("engine", true), check("edge", false)]
        }));
    })
    .await;
    assert_eq!(server.ask("GET", "/readyz", None).await.status, 503);
    let report = server.client.readiness().await.unwrap();
    assert!(!report.ready && report.checks[0].ok && !report.checks[1].ok, "{report:?}");
}

#[tokio::test]
async fn the_version_names_the_installation() {
    let server = Server::start().await;
    let version = server.client.version().await.unwrap();
    assert_eq!((version.name.as_str(), version.api.as_str()), ("peregrine", "v1"));
    assert_eq!(version.install, server.engine.install());
}
