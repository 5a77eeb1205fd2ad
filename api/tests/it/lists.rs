//! Lists and machines: pages, cursors, what may be added and removed.

use peregrine_api::client::Submit;
use peregrine_api::types::{Machine, Page};

use crate::support::{Server, machine, problem};

#[tokio::test]
async fn a_list_is_read_page_by_page_to_its_end() {
    let server = Server::start().await;
    for name in ["host-c", "host-d", "host-e"] {
        server.client.add_machine(&machine(name, "127.0.0.9"), &Submit::default()).await.unwrap();
    }
    let mut names = Vec::new();
    let mut path = "/api/v1/machines?limit=2".to_owned();
    let mut pages = 0;
    loop {
        let page: Page<Machine> = serde_json::from_str(&server.ask("GET", &path, None).await.body).unwrap();
        assert!(page.items.len() <= 2);
        names.extend(page.items.into_iter().map(|machine| machine.name));
        pages += 1;
        let Some(cursor) = page.next_cursor else { break };
        path = format!("/api/v1/machines?limit=2&cursor={cursor}");
    }
    assert_eq!(
        (pages, names),
        (3, ["host-a", "host-b", "host-c", "host-d", "host-e"].map(str::to_owned).to_vec())
    );
    assert_eq!(server.client.machines().await.unwrap().len(), 5);
}

#[tokio::test]
async fn a_page_that_cannot_be_is_refused() {
    let server = Server::start().await;
    for (query, code) in [
        ("limit=0", "request.invalid_query"),
        ("limit=501", "request.invalid_query"),
        ("limit=x", "request.invalid_query"),
        ("cursor=nonsense", "request.invalid_cursor"),
    ] {
        let problem = server.ask("GET", &format!("/api/v1/moves?{query}"), None).await.problem();
        assert_eq!((problem.status, problem.code.as_str()), (400, code), "{query}");
    }
}

#[tokio::test]
async fn a_machine_is_added_changed_checked_and_removed() {
    let server = Server::start().await;
    let body = r#"{"name":"host-c","runtime":"process","address":"127.0.0.4","labels":{"rack":"7"}}"#;
    let added = server.ask("POST", "/api/v1/machines", Some(body)).await;
    assert_eq!((added.status, added.header("location")), (201, Some("/api/v1/machines/host-c")));
    let changed = server.ask("POST", "/api/v1/machines", Some(&body.replace('7', "8"))).await;
    assert_eq!((changed.status, &changed.json()["spec"]["labels"]["rack"]), (200, &"8".into()));
    let check = server.client.check_machine("host-c").await.unwrap();
    assert!(check.ok && check.runtime.is_some() && check.orphans.is_empty(), "{check:?}");
    server.client.remove_machine("host-c").await.unwrap();
    assert_eq!(problem(server.client.machine("host-c").await).code, "machine.unknown");
}

#[tokio::test]
async fn a_machine_that_cannot_be_reached_is_told_with_the_reason() {
    let server = Server::start().await;
    let body = r#"{"name":"far","runtime":"docker","address":"127.0.0.4",
        "endpoint":{"transport":"unix","path":"/nonexistent/docker.sock"}}"#;
    assert_eq!(server.ask("POST", "/api/v1/machines", Some(body)).await.status, 201);
    let check = server.client.check_machine("far").await.unwrap();
    let problem = check.problem.unwrap();
    assert!(!check.ok && check.runtime.is_none());
    assert!(!problem.code.is_empty() && !problem.hint.is_empty(), "{problem:?}");
}

#[tokio::test]
async fn a_machine_that_cannot_be_meant_or_is_in_use_is_refused() {
    let server = Server::start().await;
    server.with_shop().await;
    for (body, pointer) in [
        (r#"{"name":"x","runtime":"docker","address":"127.0.0.4"}"#, "/endpoint"),
        (r#"{"name":"x","runtime":"process","address":"not an address"}"#, "/address"),
        (r#"{"name":"x","runtime":"vm","address":"127.0.0.4"}"#, "/runtime"),
    ] {
        let problem = server.ask("POST", "/api/v1/machines", Some(body)).await.problem();
        assert_eq!((problem.status, problem.errors[0].pointer.as_str()), (422, pointer), "{body}");
    }
    let named = machine("Not A Label", "127.0.0.4");
    assert_eq!(problem(server.client.add_machine(&named, &Submit::default()).await).code, "spec.invalid");
    let used = problem(server.client.remove_machine("host-a").await);
    assert_eq!((used.status, used.code.as_str()), (409, "machine.in_use"));
}
