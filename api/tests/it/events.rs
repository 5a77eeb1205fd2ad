//! Events: in order, resumable without a gap or a duplicate, narrowed by topics, with signs of life.

use std::time::Duration;

use peregrine_api::client::{EventFilter, Submit};
use peregrine_api::types::{Event, EventBody, MoveKind, MoveRequest, MoveState, Phase};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{PATIENCE, Server, machine, patient, problem};

async fn told(stream: &mut peregrine_api::client::EventStream) -> Event {
    let next = tokio::time::timeout(PATIENCE, stream.next()).await.expect("an event");
    next.unwrap().expect("the stream goes on")
}

fn to(machine: &str) -> MoveRequest {
    MoveRequest { service: "shop".into(), to: machine.into(), ..MoveRequest::default() }
}

async fn story_of(server: &Server, id: &str, after: Option<u64>) -> Vec<Event> {
    let mut stream = server.client.move_events(id, after);
    let mut story = Vec::new();
    while let Some(event) = tokio::time::timeout(PATIENCE, stream.next()).await.expect("an end").unwrap() {
        story.push(event);
    }
    story
}

#[tokio::test]
async fn the_story_of_a_move_is_told_while_it_goes_on_and_ends_with_it() {
    let server = Server::start().await;
    server.with_shop().await;
    let started = server.client.start_move(&to("host-b"), &Submit::default()).await.unwrap();
    let story = story_of(&server, &started.id, None).await;
    assert!(matches!(story[0].body, EventBody::MoveCreated { kind: MoveKind::Move }), "{:?}", story[0]);
    assert!(matches!(story.last().unwrap().body, EventBody::MoveDone { state: MoveState::Succeeded, .. }));
    let stored: Vec<u64> =
        story.iter().filter(|event| event.body.is_stored()).map(|event| event.id).collect();
    assert!(stored.windows(2).all(|pair| pair[0] < pair[1]), "{stored:?}");
    assert!(story.iter().all(|event| event.move_id.as_deref() == Some(started.id.as_str())));
    let phase = |wanted| story.iter().any(|event| event.body == EventBody::MovePhase { phase: wanted });
    assert!(phase(Phase::Start) && phase(Phase::Shift) && phase(Phase::Drain), "{story:#?}");
}

#[tokio::test]
async fn the_story_of_a_move_that_has_ended_is_told_from_any_place_and_then_nothing_more() {
    let server = Server::start().await;
    server.with_shop().await;
    let id = server.client.start_move(&to("host-b"), &patient()).await.unwrap().id;
    let whole = story_of(&server, &id, None).await;
    for cut in 1..whole.len() {
        let rest = story_of(&server, &id, Some(whole[cut - 1].id)).await;
        assert_eq!(rest, whole[cut..], "after {}", whole[cut - 1].id);
    }
    let newest = server.engine.last_event();
    let answer = server.ask("GET", &format!("/api/v1/moves/{id}/events?after={newest}"), None).await;
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
}

#[tokio::test]
async fn a_reader_that_comes_back_after_a_break_misses_nothing_and_hears_nothing_twice() {
    let mut server = Server::start().await;
    let begin = server.engine.last_event();
    let mut stream = server.client.events(&EventFilter { after: Some(begin), ..EventFilter::default() });
    stream.connect().await.unwrap();
    server.client.add_machine(&machine("m0", "127.0.0.4"), &Submit::default()).await.unwrap();
    let mut heard = vec![told(&mut stream).await];
    for round in 1..4 {
        server.stop_api().await; // the connection breaks
        let spec = machine(&format!("m{round}"), "127.0.0.4").to_engine().unwrap();
        server.engine.add_machine(spec).await.unwrap(); // nobody listens
        server.start_api(|_| {}).await;
        let late = machine(&format!("late{round}"), "127.0.0.4");
        server.client.add_machine(&late, &Submit::default()).await.unwrap();
        heard.push(told(&mut stream).await);
        heard.push(told(&mut stream).await);
    }
    let names: Vec<_> = heard
        .iter()
        .map(|event| match &event.body {
            EventBody::MachineAdded { machine } => machine.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names, ["m0", "m1", "late1", "m2", "late2", "m3", "late3"]);
    let ids: Vec<u64> = heard.iter().map(|event| event.id).collect();
    assert_eq!(ids, (begin + 1..=begin + 7).collect::<Vec<_>>());
}

#[tokio::test]
async fn topics_narrow_the_stream() {
    let server = Server::start().await;
    let begin = server.engine.last_event();
    server.with_shop().await;
    let moved = server.client.start_move(&to("host-b"), &patient()).await.unwrap();
    server.client.add_machine(&machine("host-c", "127.0.0.4"), &Submit::default()).await.unwrap();
    let of_move =
        EventFilter { move_id: Some(moved.id.clone()), after: Some(begin), ..EventFilter::default() };
    let mut stream = server.client.events(&of_move);
    loop {
        let event = told(&mut stream).await;
        assert_eq!(event.move_id.as_ref(), Some(&moved.id), "{event:?}");
        if matches!(event.body, EventBody::MoveDone { .. }) {
            break;
        }
    }
    let of_service =
        EventFilter { service: Some("shop".into()), after: Some(begin), ..EventFilter::default() };
    let mut stream = server.client.events(&of_service);
    for _ in 0..5 {
        assert_eq!(told(&mut stream).await.service.as_deref(), Some("shop"));
    }
}

#[tokio::test]
async fn a_stream_that_cannot_be_is_refused_before_it_begins() {
    let server = Server::start().await;
    let bad = server.ask("GET", "/api/v1/events?topics=planet:mars", None).await.problem();
    assert_eq!((bad.status, bad.code.as_str()), (400, "request.invalid_query"));
    let bad = server.ask_with("GET", "/api/v1/events", &["Last-Event-ID: x"], "").await.problem();
    assert_eq!((bad.status, bad.code.as_str()), (400, "request.invalid_header"));
    let mut nothing = server.client.move_events("mov_none", None);
    assert_eq!(problem(nothing.next().await).code, "move.unknown");
}

/// Reads a stream as it comes until it holds what is looked for.
async fn read_until(connection: &mut TcpStream, wanted: &str) -> String {
    let mut text = String::new();
    let mut piece = [0; 4096];
    while !text.contains(wanted) {
        let read =
            tokio::time::timeout(PATIENCE, connection.read(&mut piece)).await.expect("more of the stream");
        let read = read.unwrap();
        assert_ne!(read, 0, "the stream has ended: {text}");
        text.push_str(&String::from_utf8_lossy(&piece[..read]));
    }
    text
}

async fn open(server: &Server, path: &str, line: &str) -> TcpStream {
    let mut connection = TcpStream::connect(server.address).await.unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n{line}\r\n\r\n",
        server.token
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    connection
}

#[tokio::test]
async fn on_the_wire_an_event_has_id_type_and_data_and_silence_has_signs_of_life() {
    let server = Server::start_with(|config| config.limits.heartbeat_ms = 20).await;
    let begin = server.engine.last_event();
    let mut connection = open(&server, "/api/v1/events?after=0", &format!("Last-Event-ID: {begin}")).await;
    let text = read_until(&mut connection, "heartbeat").await;
    assert!(text.contains("text/event-stream") && text.contains("retry: 1000"), "{text}");
    assert!(!text.contains("machine.added"), "Last-Event-ID goes before ?after=: {text}");
    server.client.add_machine(&machine("host-c", "127.0.0.4"), &Submit::default()).await.unwrap();
    let text = read_until(&mut connection, "host-c").await;
    assert!(text.contains(&format!("id: {}", begin + 1)) && text.contains("event: machine.added"), "{text}");
}

#[tokio::test]
async fn without_a_place_to_begin_the_stream_begins_now() {
    let server = Server::start().await;
    let mut stream = server.client.events(&EventFilter::default());
    stream.connect().await.unwrap();
    server.client.add_machine(&machine("host-c", "127.0.0.4"), &Submit::default()).await.unwrap();
    let EventBody::MachineAdded { machine } = told(&mut stream).await.body else { panic!("another event") };
    assert_eq!(machine, "host-c");
    let more = tokio::time::timeout(Duration::from_millis(50), stream.next()).await;
    assert!(more.is_err(), "{more:?}");
}
