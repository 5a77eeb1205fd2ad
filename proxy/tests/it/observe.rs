//! What is written down: access log, metrics, error pages.

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use peregrine_proxy::{AccessLogConfig, AccessLogFormat, AccessLogTarget, Config};
use std::path::Path;
use std::sync::OnceLock;

use super::support::{Origin, TestEdge, config, dead_address, service, until, upstream};

fn logging(path: &Path, format: AccessLogFormat) -> Config {
    let target = AccessLogTarget::File(path.to_owned());
    Config { access_log: Some(AccessLogConfig { target, format }), ..config() }
}

#[test]
fn every_request_leaves_a_line_with_its_id_and_its_reason() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("access.log");
    let origin = Origin::ok();
    let mut web = service(vec![upstream(origin.addr)]);
    web.routes[0].host = peregrine_routing::HostPattern::parse("a.test").expect("pattern");
    let mut edge = TestEdge::start_with(logging(&path, AccessLogFormat::Json), vec![web]);
    let mut client = edge.client();
    client
        .send("POST /x?y=1 HTTP/1.1\r\nHost: a.test\r\nX-Request-Id: known\r\nContent-Length: 3\r\n\r\nabc")
        .answer();
    client.send("GET / HTTP/1.1\r\nHost: other.test\r\n\r\n").answer();
    edge.client().send("GET / HTTP/1.1\r\nX: \0\r\n\r\n").answer();
    let mut lines = Vec::new();
    until("three lines are written", || {
        lines = std::fs::read_to_string(&path).unwrap_or_default().lines().map(str::to_owned).collect();
        lines.len() == 3
    });
    for part in [
        "\"id\":\"known\"",
        "\"client\":\"127.0.0.1\"",
        "\"method\":\"POST\"",
        "\"host\":\"a.test\"",
        "\"path\":\"/x?y=1\"",
        "\"protocol\":\"HTTP/1.1\"",
        "\"status\":200",
        "\"service\":\"web\"",
        "\"upstream\":\"copy-",
        "\"attempts\":1",
        "\"bytes_in\":3",
        "\"bytes_out\":2",
    ] {
        assert!(lines[0].contains(part), "{part} is not in {}", lines[0]);
    }
    assert!(!lines[0].contains("\"reason\""));
    assert!(
        lines[1].contains("\"status\":404") && lines[1].contains("\"reason\":\"no_route\""),
        "{}",
        lines[1]
    );
    assert!(
        lines[2].contains("\"status\":400") && lines[2].contains("\"reason\":\"bad_request_head\""),
        "{}",
        lines[2]
    );
    edge.ask_to_stop();
    edge.wait_stopped();
}

#[test]
fn lines_that_are_still_on_their_way_are_written_at_the_end() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("access.log");
    let origin = Origin::ok();
    let mut edge = TestEdge::start_with(
        logging(&path, AccessLogFormat::Combined),
        vec![service(vec![upstream(origin.addr)])],
    );
    edge.client()
        .send("GET /page HTTP/1.1\r\nHost: a\r\nUser-Agent: test/1\r\nReferer: http://b/\r\nConnection: close\r\n\r\n")
        .answer();
    edge.ask_to_stop();
    edge.wait_stopped();
    let log = std::fs::read_to_string(&path).expect("log");
    assert!(log.starts_with("127.0.0.1 - - ["), "{log}");
    assert!(log.ends_with("\"GET /page HTTP/1.1\" 200 2 \"http://b/\" \"test/1\"\n"), "{log}");
}

#[test]
fn a_log_that_cannot_be_opened_is_an_error_that_says_what_to_do() {
    let (_writer, reader) = peregrine_routing::table();
    let mut config = logging(Path::new("/nowhere/at/all.log"), AccessLogFormat::Json);
    config.http = vec!["127.0.0.1:0".parse().expect("address")];
    let error = peregrine_proxy::Edge::bind(config, reader).expect_err("cannot be opened").to_string();
    assert!(error.contains("/nowhere/at/all.log") && error.contains("folder"), "{error}");
}

#[test]
fn an_address_in_use_is_an_error_that_says_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let (_writer, reader) = peregrine_routing::table();
    let config = Config { http: vec![taken.local_addr().expect("address")], ..config() };
    let error = peregrine_proxy::Edge::bind(config, reader).expect_err("is taken").to_string();
    assert!(error.contains("another program listens there"), "{error}");
}

pub(crate) fn recorder() -> &'static PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER.get_or_init(|| {
        let handle = PrometheusBuilder::new().install_recorder().expect("is the only one");
        peregrine_proxy::describe();
        handle
    })
}

pub(crate) fn value(series: &str) -> u64 {
    let text = recorder().render();
    // A name that only begins so is another one.
    let goes_on = |rest: &str| rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| !goes_on(rest)));
    line.and_then(|line| line.rsplit(' ').next())
        .map_or(0, |value| value.parse::<f64>().expect("number") as u64)
}

#[test]
fn requests_and_errors_are_counted_under_bounded_labels() {
    recorder();
    let origin = Origin::ok();
    let mut web = service(vec![upstream(origin.addr)]);
    web.name = "counted".into();
    let edge = TestEdge::start(web);
    let mut client = edge.client();
    for _ in 0..10 {
        client.get("/");
    }
    let mut broken = service(vec![upstream(dead_address())]);
    broken.name = "broken".into();
    let other = TestEdge::start(broken);
    assert_eq!(other.client().get("/").reason(), "upstream_connect_failed");
    until("everything has arrived", || {
        value("peregrine_edge_requests_total{service=\"counted\",code_class=\"2xx\"}") == 10
            && value("peregrine_edge_requests_total{service=\"broken\",code_class=\"5xx\"}") == 1
    });
    assert!(value("peregrine_edge_errors_total{reason=\"upstream_connect_failed\"}") >= 1);
    assert!(value("peregrine_edge_upstream_connections_total{outcome=\"reused\"}") >= 9);
    assert!(value("peregrine_edge_connections") >= 1);
    let text = recorder().render();
    assert!(text.contains("peregrine_edge_request_duration_seconds"), "{text}");
    assert!(!text.contains("a.test"), "a host is no label");
}

#[test]
fn an_error_is_one_page_in_the_form_that_is_asked_for() {
    let edge = TestEdge::start(service(Vec::new()));
    let mut client = edge.client();
    let json = client.get("/");
    assert_eq!(json.field("content-type"), Some("application/problem+json"));
    assert!(
        json.text().contains("\"reason\":\"no_upstream\"") && json.text().contains("\"status\":503"),
        "{}",
        json.text()
    );
    let html = client
        .send("GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: find-me\r\nAccept: text/html\r\n\r\n")
        .answer();
    assert_eq!(html.field("content-type"), Some("text/html; charset=utf-8"));
    assert!(html.text().contains("no_upstream") && html.text().contains("find-me"), "{}", html.text());
    assert_eq!(html.field("x-request-id"), Some("find-me"));
    let head = client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").answer_to("HEAD");
    assert_eq!((head.status, head.reason()), (503, "no_upstream"));
    assert_eq!(client.get("/").status, 503, "and the connection goes on");
}
