//! Output of instances: history, then new lines, merged over the copies of a service.

use peregrine_api::client::{LogQuery, LogStream};
use peregrine_api::types::{LogLine, LogSource, MoveRequest, ScaleRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{PATIENCE, Server, patient, problem};

async fn say(address: &str, text: &str) {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /say/{text} HTTP/1.1\r\nHost: x\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    connection.read_to_end(&mut Vec::new()).await.unwrap();
}

async fn line(stream: &mut LogStream) -> LogLine {
    let next = tokio::time::timeout(PATIENCE, stream.next()).await.expect("a line");
    next.unwrap().expect("the stream goes on")
}

/// The next lines that an instance was told to say.
async fn said(stream: &mut LogStream, count: usize) -> Vec<String> {
    let mut lines = Vec::new();
    while lines.len() < count {
        let line = line(stream).await;
        if line.text.starts_with("word") {
            lines.push(line.text);
        }
    }
    lines
}

async fn history(server: &Server, query: LogQuery) -> Vec<LogLine> {
    let mut stream = server.client.logs("shop", query);
    let mut lines = Vec::new();
    while let Some(line) = tokio::time::timeout(PATIENCE, stream.next()).await.expect("an end").unwrap() {
        lines.push(line);
    }
    lines
}

async fn addresses(server: &Server) -> Vec<String> {
    let instances = server.client.instances(Some("shop"), false).await.unwrap();
    instances.into_iter().map(|instance| instance.address.unwrap()).collect()
}

#[tokio::test]
async fn history_is_merged_over_the_copies_and_ends() {
    let server = Server::start().await;
    server.with_shop().await;
    server
        .client
        .scale("shop", &ScaleRequest { replicas: 2, ..Default::default() }, &patient())
        .await
        .unwrap();
    let copies = addresses(&server).await;
    for (index, word) in ["word-0", "word-1", "word-2", "word-3"].iter().enumerate() {
        say(&copies[index % 2], word).await;
    }
    let all = loop {
        let lines = history(&server, LogQuery::default()).await;
        if lines.iter().filter(|line| line.text.starts_with("word")).count() == 4 {
            break lines; // what an instance wrote is read by its runtime a moment later
        }
    };
    assert!(all.windows(2).all(|pair| pair[0].time <= pair[1].time), "{all:#?}");
    assert!(all.iter().all(|line| line.service == "shop" && line.source == LogSource::Stdout), "{all:#?}");
    let instances: std::collections::BTreeSet<_> = all.iter().map(|line| &line.instance).collect();
    assert_eq!(instances.len(), 2);
    let tail = history(&server, LogQuery { tail: Some(2), ..LogQuery::default() }).await;
    assert_eq!(tail, all[all.len() - 2..]);
    let since = all[all.len() - 1].time;
    let late = history(&server, LogQuery { since: Some(since), ..LogQuery::default() }).await;
    assert!(!late.is_empty() && late.iter().all(|line| line.time >= since), "{late:#?}");
}

#[tokio::test]
async fn following_goes_on_with_new_lines_and_with_new_copies() {
    let server = Server::start().await;
    server.with_shop().await;
    let mut stream = server.client.logs("shop", LogQuery { follow: true, ..LogQuery::default() });
    stream.connect().await.unwrap();
    say(&addresses(&server).await[0], "word-old").await;
    assert_eq!(said(&mut stream, 1).await, ["word-old"]);
    let request = MoveRequest { service: "shop".into(), to: "host-b".into(), ..MoveRequest::default() };
    server.client.start_move(&request, &patient()).await.unwrap();
    say(&addresses(&server).await[0], "word-new").await;
    let line = loop {
        let line = line(&mut stream).await;
        if line.text == "word-new" {
            break line;
        }
    };
    assert_eq!(line.machine, "host-b");
}

#[tokio::test]
async fn following_goes_on_after_a_break_without_a_gap_or_a_duplicate() {
    let mut server = Server::start().await;
    server.with_shop().await;
    let copy = addresses(&server).await.remove(0);
    let mut stream = server.client.logs("shop", LogQuery { follow: true, ..LogQuery::default() });
    say(&copy, "word-0").await;
    assert_eq!(said(&mut stream, 1).await, ["word-0"]);
    server.stop_api().await;
    say(&copy, "word-1").await; // nobody listens
    server.start_api(|_| {}).await;
    say(&copy, "word-2").await;
    assert_eq!(said(&mut stream, 2).await, ["word-1", "word-2"]);
}

#[tokio::test]
async fn following_ends_when_the_service_is_removed() {
    let server = Server::start().await;
    server.with_shop().await;
    let mut stream = server.client.logs("shop", LogQuery { follow: true, ..LogQuery::default() });
    stream.connect().await.unwrap();
    server.client.remove_service("shop", Some(30_000)).await.unwrap();
    let end = async { while stream.next().await.unwrap().is_some() {} };
    tokio::time::timeout(PATIENCE, end).await.expect("the stream ends");
}

#[tokio::test]
async fn one_instance_is_heard_alone() {
    let server = Server::start().await;
    server.with_shop().await;
    server
        .client
        .scale("shop", &ScaleRequest { replicas: 2, ..Default::default() }, &patient())
        .await
        .unwrap();
    let instances = server.client.instances(Some("shop"), false).await.unwrap();
    for instance in &instances {
        say(instance.address.as_ref().unwrap(), "word").await;
    }
    let query = LogQuery { follow: true, ..LogQuery::default() };
    let mut stream = server.client.instance_logs(&instances[0].id, query);
    loop {
        let line = line(&mut stream).await;
        assert_eq!(line.instance, instances[0].id);
        if line.text == "word" {
            break;
        }
    }
}

#[tokio::test]
async fn lines_that_cannot_be_asked_for_are_refused() {
    let server = Server::start().await;
    server.with_shop().await;
    for query in ["tail=100001", "tail=x", "since=yesterday"] {
        let problem = server.ask("GET", &format!("/api/v1/services/shop/logs?{query}"), None).await.problem();
        assert_eq!((problem.status, problem.code.as_str()), (400, "request.invalid_query"), "{query}");
    }
    let mut none = server.client.logs("none", LogQuery::default());
    assert_eq!(problem(none.next().await).code, "service.unknown");
}
