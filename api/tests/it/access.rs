//! Who may ask.

use std::os::unix::fs::PermissionsExt;

use peregrine_api::{Api, BindError, Config, token_file};

use crate::support::{Server, exchange};

const PROTECTED: [&str; 6] =
    ["/api/v1/status", "/api/v1/services", "/api/v1/moves/mov_1/events", "/metrics", "/api/v1/nothing", "/"];

#[tokio::test]
async fn without_a_token_or_with_a_wrong_one_nothing_is_told_not_even_which_routes_there_are() {
    let server = Server::start().await;
    for path in PROTECTED {
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        let without = exchange(server.address, &format!("{head}\r\n")).await;
        assert_eq!((without.status, without.problem().code.as_str()), (401, "auth.missing"), "{path}");
        assert_eq!(without.header("www-authenticate"), Some("Bearer realm=\"peregrine\""));
        let wrong = exchange(server.address, &format!("{head}Authorization: Bearer pgn_wrong\r\n\r\n")).await;
        assert_eq!((wrong.status, wrong.problem().code.as_str()), (401, "auth.invalid"), "{path}");
        assert!(!wrong.body.contains("pgn_wrong"));
    }
}

#[tokio::test]
async fn life_readiness_and_the_document_need_no_token() {
    let server = Server::start().await;
    for path in ["/livez", "/readyz", "/api/openapi.json"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        assert_eq!(exchange(server.address, &request).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn metrics_need_no_token_when_that_is_configured() {
    let server = Server::start_with(|config| {
        config.metrics_without_token = true;
        config.metrics = Some(std::sync::Arc::new(|| "peregrine_up 1\n".to_owned()));
    })
    .await;
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let answer = exchange(server.address, request).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "peregrine_up 1\n"));
    assert!(answer.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
}

#[tokio::test]
async fn the_token_is_in_a_private_file_and_stays_the_same() {
    let mut server = Server::start().await;
    let mode = std::fs::metadata(token_file(server.folder.path())).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let first = server.token.clone();
    server.stop_api().await;
    server.start_api(|_| {}).await;
    assert_eq!(server.token, first);
}

#[tokio::test]
async fn a_strangers_name_is_refused_though_it_leads_here() {
    let server = Server::start().await;
    let with_host = |host: &str| format!("GET /livez HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    for host in ["localhost", "127.0.0.1:7070", "[::1]"] {
        assert_eq!(exchange(server.address, &with_host(host)).await.status, 200, "{host}");
    }
    let refused = exchange(server.address, &with_host("evil.example")).await;
    assert_eq!((refused.status, refused.problem().code.as_str()), (403, "auth.host_refused"));
    let absolute = "GET http://evil.example/livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert_eq!(exchange(server.address, absolute).await.status, 403);
    let without = exchange(server.address, "GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert_eq!((without.status, without.problem().code.as_str()), (400, "request.invalid_header"));
}

#[tokio::test]
async fn a_name_that_is_allowed_is_taken() {
    let server = Server::start_with(|config| config.allowed_hosts.push("api.example.com".into())).await;
    let request = "GET /livez HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n";
    assert_eq!(exchange(server.address, request).await.status, 200);
}

#[tokio::test]
async fn a_page_of_another_site_is_refused_even_with_the_token() {
    let server = Server::start().await;
    for line in ["Origin: http://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site"] {
        let answer = server.ask_with("GET", "/api/v1/status", &[line], "").await;
        assert_eq!((answer.status, answer.problem().code.as_str()), (403, "auth.origin_refused"), "{line}");
    }
    assert_eq!(server.ask_with("GET", "/api/v1/status", &["Origin: http://localhost"], "").await.status, 200);
}

#[tokio::test]
async fn an_address_that_others_can_reach_is_refused_unless_clear_text_is_allowed_in_so_many_words() {
    let server = Server::start().await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::new(([0, 0, 0, 0], 0).into(), folder.path());
    let refused = Api::bind(config.clone(), server.engine.clone()).await;
    let Err(error @ BindError::ClearText(_)) = refused.map(|_| ()) else { panic!("it listens") };
    assert!(error.to_string().contains("allow_clear_text_on_public_address"), "{error}");
    assert!(!token_file(folder.path()).exists(), "a token was made for nothing");
    config.allow_clear_text_on_public_address = true;
    assert!(Api::bind(config, server.engine.clone()).await.is_ok());
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let server = Server::start().await;
    let refused = Api::bind(Config::new(server.address, server.folder.path()), server.engine.clone()).await;
    let Err(error) = refused.map(|_| ()) else { panic!("it listens twice") };
    assert!(error.to_string().contains(&server.address.to_string()), "{error}");
}
