//! Events as server-sent events (WHATWG HTML §9.2), resumable by `Last-Event-ID` or `?after=`.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode};
use peregrine_engine::model::{self as engine, EventBody, RolloutId};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::codes;
use crate::server::context::Context;
use crate::server::error::ApiError;
use crate::server::extract::{Name, Query};
use crate::types::Event;

/// What a browser waits before it connects again.
const RETRY_MS: u64 = 1_000;
/// Longest time to read the stored events of a move that has ended.
const STORED_EVENTS_MS: u64 = 10_000;
/// Most topics of one stream.
const MAX_TOPICS: usize = 100;

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct EventsQuery {
    /// Stored events after this id come first; without it (and without `Last-Event-ID`) the stream begins now.
    after: Option<u64>,
    /// `service:NAME` and `move:ID`, separated by commas; without it everything.
    topics: Option<String>,
}

/// Events of everything, as they happen
///
/// A `text/event-stream`. Each event has the id of its place in the stream (samples have none: they are live only),
/// the type, and an `Event` as data. Without news there is a comment every 10 s. Never ends by itself.
#[utoipa::path(get, path = "/api/v1/events", tag = "events",
    params(EventsQuery, ("Last-Event-ID" = Option<u64>, Header, description = "Goes on after this event")),
    responses((status = 200, description = "The stream", body = Event, content_type = "text/event-stream")))]
pub(in crate::server) async fn follow_events(
    State(context): State<Context>,
    headers: HeaderMap,
    Query(query): Query<EventsQuery>,
) -> Result<Response, ApiError> {
    let topics = query.topics.as_deref().map(Topics::parse).transpose()?;
    let after = last_event_id(&headers)?.or(query.after).unwrap_or_else(|| context.engine.last_event());
    let events = context
        .engine
        .events(after)
        .filter(move |event| std::future::ready(topics.as_ref().is_none_or(|topics| topics.have(event))));
    Ok(streamed(&context, events.boxed()))
}

/// Which events of a move.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::server) struct MoveEventsQuery {
    /// Only events after this id; without it (and without `Last-Event-ID`) from the beginning of the move.
    after: Option<u64>,
}

/// Events of one move, from its beginning to its end
///
/// A `text/event-stream` that ends after `move.done`. 204 when there is nothing left to tell, which stops a
/// browser from connecting again.
#[utoipa::path(get, path = "/api/v1/moves/{id}/events", tag = "events",
    params(("id" = String, Path, description = "Id of the move"), MoveEventsQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "Goes on after this event")),
    responses((status = 200, description = "The stream", body = Event, content_type = "text/event-stream"),
        (status = 204, description = "The move has ended, and everything has been told")))]
pub(in crate::server) async fn follow_move(
    State(context): State<Context>,
    Name(id): Name,
    headers: HeaderMap,
    Query(query): Query<MoveEventsQuery>,
) -> Result<Response, ApiError> {
    let after = last_event_id(&headers)?.or(query.after).unwrap_or(0);
    let rollout = context.rollout(&RolloutId(id))?;
    let own = of_move(context.engine.events(after), rollout.id);
    if !rollout.state.is_terminal() {
        return Ok(streamed(&context, until_done(own)));
    }
    let told = stored(own, after, context.engine.last_event()).await?;
    if told.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Ok(streamed(&context, stream::iter(told).boxed()))
}

/// Each event with whether it is of the move: the others are needed to know how far the stream has come.
fn of_move(
    events: BoxStream<'static, engine::Event>,
    id: RolloutId,
) -> BoxStream<'static, (bool, engine::Event)> {
    events.map(move |event| (event.rollout.as_ref() == Some(&id), event)).boxed()
}

fn until_done(events: BoxStream<'static, (bool, engine::Event)>) -> BoxStream<'static, engine::Event> {
    let own = events.filter_map(|(own, event)| std::future::ready(own.then_some(event))).boxed();
    stream::unfold(Some(own), |events| async {
        let mut events = events?;
        let event = events.next().await?;
        let rest = if matches!(event.body, EventBody::Done { .. }) { None } else { Some(events) };
        Some((event, rest))
    })
    .boxed()
}

/// The stored events of a move that has ended: everything up to the newest event of the store.
async fn stored(
    events: BoxStream<'static, (bool, engine::Event)>,
    after: u64,
    newest: u64,
) -> Result<Vec<engine::Event>, ApiError> {
    if after >= newest {
        return Ok(Vec::new());
    }
    let reading = async {
        let mut own = Vec::new();
        let mut events = events;
        while let Some((is_own, event)) = events.next().await {
            let (id, is_done) = (event.id, matches!(event.body, EventBody::Done { .. }));
            if is_own && !matches!(event.body, EventBody::Sample(_)) {
                own.push(event);
            }
            if id >= newest || (is_own && is_done) {
                break;
            }
        }
        own
    };
    tokio::time::timeout(Duration::from_millis(STORED_EVENTS_MS), reading)
        .await
        .map_err(|_| ApiError::new(&codes::TIMEOUT, "the stored events could not be read in time"))
}

/// An event stream that ends with the server.
fn streamed(context: &Context, events: BoxStream<'static, engine::Event>) -> Response {
    let retry = SseEvent::default().retry(Duration::from_millis(RETRY_MS));
    let events = stream::once(std::future::ready(retry))
        .chain(events.map(|event| on_the_wire(&Event::from(&event))))
        .map(Ok::<_, Infallible>)
        .take_until(context.closing.clone().cancelled_owned());
    with_heartbeat(events, context.heartbeat())
}

fn with_heartbeat(
    events: impl Stream<Item = Result<SseEvent, Infallible>> + Send + 'static,
    heartbeat: Duration,
) -> Response {
    Sse::new(events).keep_alive(KeepAlive::new().interval(heartbeat).text("heartbeat")).into_response()
}

fn on_the_wire(event: &Event) -> SseEvent {
    let line = SseEvent::default().event(event.body.kind());
    let line = if event.body.is_stored() { line.id(event.id.to_string()) } else { line };
    // Wire types always become JSON, and JSON has no line ends.
    line.data(serde_json::to_string(event).unwrap_or_default())
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(id) = headers.get("last-event-id") else { return Ok(None) };
    let id = id.to_str().ok().and_then(|id| id.trim().parse().ok());
    let wrong = || ApiError::new(&codes::HEADER, "the id of an event is a number").at("Last-Event-ID");
    id.map(Some).ok_or_else(wrong)
}

/// What a stream is about: an event of any of them is told.
#[derive(Debug, PartialEq, Eq)]
struct Topics(Vec<Topic>);

#[derive(Debug, PartialEq, Eq)]
enum Topic {
    Service(String),
    Move(String),
}

impl Topics {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let topics = text.split(',').map(Topic::parse).collect::<Result<Vec<_>, _>>()?;
        if topics.len() > MAX_TOPICS {
            return Err(
                ApiError::new(&codes::QUERY, format!("there are more than {MAX_TOPICS} topics")).at("topics")
            );
        }
        Ok(Self(topics))
    }

    fn have(&self, event: &engine::Event) -> bool {
        self.0.iter().any(|topic| match topic {
            Topic::Service(name) => event.service.as_ref() == Some(name),
            Topic::Move(id) => event.rollout.as_ref().is_some_and(|rollout| rollout.as_str() == id),
        })
    }
}

impl Topic {
    fn parse(text: &str) -> Result<Self, ApiError> {
        match text.trim().split_once(':') {
            Some(("service", name)) if !name.is_empty() => Ok(Self::Service(name.to_owned())),
            Some(("move", id)) if !id.is_empty() => Ok(Self::Move(id.to_owned())),
            _ => {
                let detail = format!("{text:?} is not a topic: write service:NAME or move:ID");
                Err(ApiError::new(&codes::QUERY, detail).at("topics"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: u64, of: &str, body: EventBody) -> engine::Event {
        engine::Event { id, at: 0, service: Some("shop".into()), rollout: Some(RolloutId(of.into())), body }
    }

    fn done(id: u64, of: &str) -> engine::Event {
        event(id, of, EventBody::Done { state: engine::RolloutState::Succeeded, problem: None })
    }

    fn weight(id: u64, of: &str) -> engine::Event {
        event(id, of, EventBody::Weight { percent: 1 })
    }

    #[tokio::test]
    async fn the_stream_of_a_move_ends_with_its_end_though_the_engines_never_does() {
        let endless = stream::iter([weight(1, "a"), weight(2, "b"), done(3, "b"), done(4, "a")])
            .chain(stream::pending())
            .boxed();
        let own = until_done(of_move(endless, RolloutId("a".into())));
        let ids: Vec<u64> = own.map(|event| event.id).collect().await;
        assert_eq!(ids, [1, 4]);
    }

    #[tokio::test]
    async fn the_stored_events_of_a_move_are_read_up_to_the_newest_though_its_end_is_not_kept() {
        let endless = stream::iter([weight(1, "a"), weight(2, "b")]).chain(stream::pending()).boxed();
        let told = stored(of_move(endless, RolloutId("a".into())), 0, 2).await.unwrap();
        assert_eq!(told.iter().map(|event| event.id).collect::<Vec<_>>(), [1]);
        let nothing = stored(of_move(stream::pending().boxed(), RolloutId("a".into())), 2, 2).await.unwrap();
        assert!(nothing.is_empty());
    }

    #[test]
    fn a_topic_is_a_service_or_a_move_and_nothing_else() {
        let topics = Topics::parse("service:shop,move:mov_1").unwrap();
        assert!(topics.have(&weight(1, "other")));
        assert!(Topics::parse("move:mov_1").unwrap().have(&weight(1, "mov_1")));
        assert!(!Topics::parse("move:mov_1").unwrap().have(&weight(1, "mov_2")));
        assert!(!Topics::parse("service:web").unwrap().have(&weight(1, "mov_1")));
        for bad in ["", "shop", "service:", "machine:a", "service:a,"] {
            assert_eq!(Topics::parse(bad).unwrap_err().code(), "request.invalid_query", "{bad}");
        }
    }

    #[test]
    fn the_id_to_go_on_after_is_a_number() {
        let with = |id: &str| HeaderMap::from_iter([("last-event-id".parse().unwrap(), id.parse().unwrap())]);
        assert_eq!(last_event_id(&with("7")).unwrap(), Some(7));
        assert_eq!(last_event_id(&HeaderMap::new()).unwrap(), None);
        assert_eq!(last_event_id(&with("x")).unwrap_err().code(), "request.invalid_header");
    }
}
