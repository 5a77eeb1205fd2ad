//! `peregrine serve` and its file: what it says is done, at the start and when it has changed.

use std::collections::BTreeMap;

use peregrine_bench::load::Summary;
use peregrine_bench::origin::{Origin, OriginOptions};

use crate::support::server::{Peregrine, http};
use crate::support::traffic::{Traffic, assert_nothing_lost};
use crate::support::{origin_program, wait_for};

/// A machine, the service that traffic goes to, and one that is run here.
fn file(services: &str, shop: std::net::SocketAddr) -> String {
    format!(
        r#"
[machine.here]
process = true

[service.shop]
hosts = ["shop.test"]
upstreams = ["{shop}"]
{services}
"#
    )
}

fn run_here(name: &str) -> String {
    format!(
        r#"
[service.{name}]
hosts = ["{name}.test"]
command = ["{}", "origin", "--listen", "{{host}}:{{port}}"]
health = {{ path = "/healthz", interval = "100ms" }}
"#,
        origin_program().display()
    )
}

/// Status of the edge's answer for a host.
fn status(server: &Peregrine, host: &str) -> String {
    let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let answer = http(server.edge(), &request).expect("the edge answers");
    answer.split(' ').nth(1).expect("a status").to_owned()
}

#[test]
fn a_changed_file_is_applied_at_sighup_a_broken_one_is_refused_and_no_connection_is_closed() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let origin = runtime.block_on(Origin::bind(OriginOptions::default())).expect("an origin");
    let server = Peregrine::start(&file(&run_here("old"), origin.addr()));
    wait_for("the first file's service", || (status(&server, "old.test") == "200").then_some(()));
    let traffic = Traffic::start(server.edge(), 300);
    wait_for("traffic", || (traffic.answered() > 100).then_some(()));

    server.configure(&file(&run_here("new"), origin.addr()));
    server.reload();
    wait_for("the new route", || (status(&server, "new.test") == "200").then_some(()));
    wait_for("the end of what left the file", || (status(&server, "old.test") == "404").then_some(()));
    wait_for("the old process to go", || (server.pids_of("").len() == 1).then_some(()));
    let names = || {
        let listed = server.ok(&["services", "list"]);
        let names = listed.as_array().expect("a list").iter().map(|of| of["name"].to_string());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(), ["\"new\"", "\"shop\""]);

    let before = (names(), server.pids_of(""), traffic.answered());
    server.configure(&file(
        "[service.third]\nhost = [\"third.test\"]\nupstreams = [\"127.0.0.1:9\"]\n",
        origin.addr(),
    ));
    server.reload();
    wait_for("the refusal", || server.log_text().contains("everything stays as it was").then_some(()));
    let log = server.log_text();
    assert!(
        log.contains("unknown key `host` in [service.third]") && log.contains("did you mean `hosts`?"),
        "{log}"
    );
    assert_eq!((names(), server.pids_of("")), (before.0, before.1), "a broken file changes nothing");
    assert_eq!((status(&server, "new.test"), status(&server, "third.test")), ("200".into(), "404".into()));
    wait_for("traffic to go on", || (traffic.answered() > before.2 + 100).then_some(()));

    let summaries: Vec<Summary> = traffic.stop();
    assert_nothing_lost(&summaries, &origin.records());
}

#[test]
fn the_api_has_the_names_and_the_open_metrics_that_the_file_gives_it_and_no_more() {
    let asked = |server: &Peregrine, host: &str, path: &str, token: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n{token}connection: close\r\n\r\n");
        let answer = http(server.api(), &request).expect("the API answers");
        answer.split(' ').nth(1).expect("a status").to_owned()
    };
    let open = Peregrine::start("allowed_hosts = [\"api.example.com\"]\nmetrics_without_token = true\n");
    let closed = Peregrine::start("");
    let mut told = BTreeMap::new();
    for (name, server) in [("open", &open), ("closed", &closed)] {
        let token = format!("authorization: Bearer {}\r\n", server.token());
        told.insert(
            name,
            [
                asked(server, "api.example.com", "/api/v1/status", &token),
                asked(server, "evil.example.com", "/api/v1/status", &token),
                asked(server, "127.0.0.1", "/metrics", ""),
                asked(server, "127.0.0.1", "/api/v1/status", ""),
            ],
        );
    }
    assert_eq!(told["open"], ["200", "403", "200", "401"]);
    assert_eq!(told["closed"], ["403", "403", "401", "401"]);
}

/// The file's rule is told in its own words, and the table's is the one that counts: they must not part.
#[test]
fn a_host_of_the_file_is_one_for_the_table_and_means_the_same() {
    use peregrine_config::{Manifest, Source};
    use peregrine_routing::HostPattern;
    let long = ["a".repeat(63), "b".repeat(64), ["a"; 127].join("."), ["a"; 128].join(".")];
    let odd = [
        "shop.example.com",
        "Shop.Example.COM.",
        "*.example.com",
        "*",
        "*.",
        "*.*.a",
        "a.*",
        "*a.b",
        "",
        ".",
        "a..b",
        ".a",
        "a b",
        "10.0.0.1",
        "256.0.0.1",
        "[::1]",
        "[2001:DB8::1]",
        "[::1",
        "::1",
        "[]",
        "[::ffff:10.0.0.1]",
        "*.[::1]",
        "my_service",
        "-a",
        "a-",
        "xn--bcher-kva.example",
        "ä.example",
        "u@a",
        "a?b",
        "a%20b",
        "a,b",
        "com",
        "*.com",
        "a\tb",
    ];
    for host in odd.into_iter().chain(long.iter().map(String::as_str)) {
        let text = format!("[service.a]\nhosts = [{host:?}]\nupstreams = [\"10.0.0.5:80\"]\n");
        let file = Manifest::parse(&Source::new("f", "/", text));
        let by_table = HostPattern::parse(host);
        assert_eq!(file.is_ok(), by_table.is_ok(), "{host:?}: {file:?} {by_table:?}");
        if let Ok(manifest) = file {
            let canonical = &manifest.services[0].spec.routes[0].host;
            let again = HostPattern::parse(canonical);
            assert_eq!(again.as_ref().ok(), by_table.as_ref().ok(), "{host:?} became {canonical:?}");
        }
    }
}
