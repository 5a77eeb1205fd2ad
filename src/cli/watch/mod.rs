//! Watching a move to its end, or leaving it alone.
//!
//! The server does the work; a watcher that goes away (Ctrl-C, a broken connection, a laptop that sleeps)
//! changes nothing. Two sources feed the picture: the stream of events, and a reading of the whole move each
//! second, which also holds what no event tells and what a broken stream has missed.

mod live;
mod plain;
mod story;

use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt};
use jiff::Timestamp;
use peregrine_api::client::{Client, ClientError, EventStream};
use peregrine_api::types::{Action, Event, Move, MoveKind, MoveState, Receipt};
use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};

use self::live::Live;
use self::plain::Plain;
use self::story::{News, Story};
use super::exit::Exit;
use super::failure::{Failure, Result};
use super::output::Output;
use super::render;
use super::rollout_options::Follow;
use super::session::Session;

/// Time between two readings of the whole move.
const READ_EVERY_MS: u64 = 1_000;

/// What came of a move that was started or watched.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    /// The move, as it was when it was looked at last.
    #[serde(rename = "move")]
    pub(crate) of: Move,
    /// Its receipt, once it has ended.
    pub(crate) receipt: Option<Receipt>,
    /// It goes on, and nobody watches.
    pub(crate) detached: bool,
    /// What may be typed next.
    pub(crate) next: Next,
}

/// Commands to go on with.
#[derive(Debug, Serialize)]
pub(crate) struct Next {
    /// To see how it goes; while it goes on.
    pub(crate) watch: Option<String>,
    /// To go back at once; while it goes on.
    pub(crate) abort: Option<String>,
    /// To undo it; after it has succeeded.
    pub(crate) undo: Option<String>,
    /// To remove what is left over; after it has ended with something left.
    pub(crate) cleanup: Option<String>,
}

impl Outcome {
    /// A move that goes on by itself.
    pub(crate) fn detached(of: Move) -> Self {
        Self { receipt: None, detached: true, next: Next::of(&of), of }
    }

    /// The failure that a move is which did not succeed.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let of = &self.of;
        let (exit, code, ended) = match of.state {
            MoveState::Running | MoveState::Paused | MoveState::RollingBack | MoveState::Succeeded => {
                return None;
            }
            MoveState::RolledBack => {
                (Exit::WentBack, "move.rolled_back", "rolled back; the old copies serve")
            }
            MoveState::Aborted => (Exit::WentBack, "move.aborted", "aborted; the old copies serve"),
            MoveState::Failed => (Exit::Failed, "move.failed", "failed; the service is as it was"),
            MoveState::NeedsOperator => {
                (Exit::Failed, "move.needs_operator", "stopped half-way: an undo failed")
            }
        };
        let look = format!("peregrine moves show {} and peregrine logs {} tell more", of.id, of.service);
        let look = match &self.next.cleanup {
            Some(cleanup) => format!("{look}; {cleanup} tries again to remove what is left"),
            None => look,
        };
        let mut failure = match &of.problem {
            Some(problem) => {
                Failure::new(exit, problem.code.clone(), format!("{}: {ended}", render::what(of)))
                    .why(problem.message.clone())
                    .hint(if problem.hint.is_empty() { look } else { problem.hint.clone() })
            }
            None => Failure::new(exit, code, format!("{}: {ended}", render::what(of))).hint(look),
        };
        for left in &of.leftovers {
            failure = failure.why(format!("left behind: {left}"));
        }
        Some(failure.detail("outcome", self))
    }

    fn text(&self, out: &Output) -> String {
        if self.detached {
            return self.of.id.clone();
        }
        let mut text = match &self.receipt {
            Some(receipt) => render::receipt(receipt, out),
            None => format!("{}\n", render::state(self.of.state)),
        };
        if let Some(undo) = &self.next.undo {
            text.push_str(&format!("  {:<9} {undo}\n", out.dim("undo")));
        }
        text
    }
}

impl Next {
    fn of(of: &Move) -> Self {
        let running = !of.state.is_terminal();
        // A first deploy has nothing to go back to.
        let undo = of.actions.contains(&Action::Rollback)
            && (of.kind != MoveKind::Deploy || of.from_version.is_some());
        Self {
            watch: running.then(|| format!("peregrine moves watch {}", of.id)),
            abort: running.then(|| format!("peregrine moves abort {}", of.id)),
            undo: undo.then(|| format!("peregrine moves rollback {}", of.id)),
            cleanup: (of.actions.contains(&Action::Cleanup))
                .then(|| format!("peregrine moves cleanup {}", of.id)),
        }
    }
}

/// Watches a move to its end, if that is what is wanted.
pub(crate) async fn follow(session: &Session, started: Move, follow: Follow) -> Result<Outcome> {
    if follow == Follow::Detach {
        return Ok(Outcome::detached(started));
    }
    session.out.note(&format!("{} ({})", render::what(&started), started.id));
    let id = started.id.clone();
    match watch(session, started, follow).await? {
        Some(left) => Ok(Outcome::detached(left)),
        None => outcome(session, &id).await,
    }
}

/// A move that has ended, with its receipt if it got so far.
pub(crate) async fn outcome(session: &Session, id: &str) -> Result<Outcome> {
    let of = session.ask("reading the move", session.client.get_move(id)).await?;
    let receipt = match session.client.receipt(id).await {
        Ok(receipt) => Some(receipt),
        Err(ClientError::Problem(_)) => None, // it ended before there was anything to count
        Err(error) => return Err(session.failure(&error)),
    };
    let detached = !of.state.is_terminal();
    Ok(Outcome { next: Next::of(&of), receipt, detached, of })
}

/// Tells what came of it: as the result, or as the failure that it is.
pub(crate) fn conclude(session: &Session, outcome: &Outcome) -> Result {
    let out = &session.out;
    if let Some(failure) = outcome.failure() {
        if let Some(receipt) = outcome.receipt.as_ref().filter(|_| !out.json) {
            out.raw(render::receipt(receipt, out).as_bytes())?;
        }
        return Err(failure);
    }
    out.data(outcome, || outcome.text(out))?;
    if outcome.detached {
        say_detached(out, &outcome.next);
    }
    Ok(())
}

fn say_detached(out: &Output, next: &Next) {
    if let Some(watch) = &next.watch {
        out.note(&format!("  not watching; the move goes on. Watch it: {watch}"));
    }
    if let Some(abort) = &next.abort {
        out.note(&format!("  go back: {abort}"));
    }
}

/// Watches until the end (`None`), or until Ctrl-C: then the move as it was seen last.
async fn watch(session: &Session, started: Move, follow: Follow) -> Result<Option<Move>> {
    let mut screen = Screen::new(session.out, follow, &started);
    let mut story = Story::default();
    let mut events = std::pin::pin!(events(session.client.move_events(&started.id, None)));
    let mut readings = std::pin::pin!(readings(session.client.clone(), started.id.clone()));
    let mut interrupt = std::pin::pin!(interrupted());
    let mut latest = started;
    screen.tell(&story.read(&latest, Timestamp::now()));
    while !story.has_ended() {
        tokio::select! {
            () = &mut interrupt => return Ok(Some(latest)),
            Some(event) = events.next() => {
                let event = event.map_err(|error| lost(session, &error, &latest))?;
                screen.event(&event)?;
                screen.tell(&story.hear(&event));
            }
            Some(reading) = readings.next() => match reading {
                Ok(of) => {
                    latest = of;
                    screen.tell(&story.read(&latest, Timestamp::now()));
                }
                Err(ClientError::Unreachable { detail, .. }) => {
                    screen.tell(&[News::Waiting(format!("the server to answer again ({detail})"))]);
                }
                Err(error) => return Err(lost(session, &error, &latest)),
            },
        }
    }
    Ok(None)
}

/// The picture is lost, the move is not: says so.
fn lost(session: &Session, error: &ClientError, of: &Move) -> Failure {
    let failure = session.failure(error);
    let hint = format!("the move goes on at the server; watch it again: peregrine moves watch {}", of.id);
    failure.hint(hint).detail("move", &of.id)
}

/// Events as a stream whose next item can be awaited beside others without losing one.
fn events(stream: EventStream) -> impl Stream<Item = std::result::Result<Event, ClientError>> {
    stream::unfold(Some(stream), |stream| async move {
        let mut stream = stream?;
        match stream.next().await {
            Ok(Some(event)) => Some((Ok(event), Some(stream))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// The whole move, each second.
fn readings(client: Client, id: String) -> impl Stream<Item = std::result::Result<Move, ClientError>> {
    let mut every: Interval = tokio::time::interval(Duration::from_millis(READ_EVERY_MS));
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    stream::unfold((every, client, id), |(mut every, client, id)| async move {
        every.tick().await;
        let reading = client.get_move(&id).await;
        Some((reading, (every, client, id)))
    })
}

/// Resolves at Ctrl-C; never, where signals cannot be had.
pub(crate) async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Where news goes.
struct Screen {
    out: Output,
    stream: bool,
    teller: Teller,
}

enum Teller {
    Live(Box<Live>),
    Plain(Plain),
    Silent,
}

impl Screen {
    fn new(out: Output, follow: Follow, of: &Move) -> Self {
        let teller = if out.quiet || out.json {
            Teller::Silent
        } else if out.live {
            Teller::Live(Box::new(Live::new(out)))
        } else {
            Teller::Plain(Plain::new(out, &of.service))
        };
        Self { out, stream: follow == Follow::Stream, teller }
    }

    fn event(&self, event: &Event) -> Result {
        if self.stream { self.out.item("event", event, String::new) } else { Ok(()) }
    }

    fn tell(&mut self, news: &[News]) {
        let now = Timestamp::now();
        for news in news {
            match &mut self.teller {
                Teller::Live(live) => live.tell(news),
                Teller::Plain(plain) => plain.tell(news, now),
                Teller::Silent => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::render::tests::{a_move, a_receipt};

    fn ended(state: &str) -> Outcome {
        let mut of = a_move(state);
        of.actions = if state == "succeeded" { vec![Action::Rollback] } else { Vec::new() };
        Outcome { next: Next::of(&of), receipt: Some(a_receipt()), detached: false, of }
    }

    #[test]
    fn every_end_of_a_move_has_its_exit_code() {
        let code = |state: &str| ended(state).failure().map_or(0, |failure| failure.exit.code());
        assert_eq!(code("succeeded"), 0);
        assert_eq!(code("rolled_back"), 10);
        assert_eq!(code("aborted"), 10);
        assert_eq!(code("failed"), 9);
        assert_eq!(code("needs_operator"), 9);
        for goes_on in ["running", "paused", "rolling_back"] {
            assert_eq!(code(goes_on), 0, "{goes_on}");
        }
    }

    #[test]
    fn a_move_that_went_back_tells_why_and_carries_its_receipt() {
        let mut outcome = ended("rolled_back");
        outcome.of.problem = Some(peregrine_api::types::Finding {
            code: "guard.error_rate".into(),
            message: "3 % errors".into(),
            hint: "look at the logs".into(),
        });
        let json = outcome.failure().expect("a failure").to_json();
        assert_eq!(json["code"], "guard.error_rate");
        assert_eq!(json["why"][0], "3 % errors");
        assert_eq!(json["outcome"]["receipt"]["requests"], 31_204);
        assert_eq!(json["outcome"]["move"]["id"], "mov_1");
    }

    #[test]
    fn what_an_undo_left_behind_is_listed() {
        let mut outcome = ended("needs_operator");
        outcome.of.leftovers = vec!["container ins_2 on host-b".into()];
        let failure = outcome.failure().expect("a failure");
        assert!(failure.why.iter().any(|why| why.contains("ins_2")), "{:?}", failure.why);
    }

    #[test]
    fn a_move_that_ended_well_names_its_undo_and_one_that_goes_on_how_to_watch_it() {
        let out = Output::new(&[], crate::cli::output::Surroundings::default());
        assert!(ended("succeeded").text(&out).contains("undo      peregrine moves rollback mov_1"));
        let mut first = ended("succeeded").of;
        (first.kind, first.from_version) = (MoveKind::Deploy, None);
        assert_eq!(Next::of(&first).undo, None, "a first deploy has nothing to go back to");
        let detached = Outcome::detached(a_move("running"));
        assert_eq!(detached.text(&out), "mov_1");
        assert_eq!(detached.next.watch.as_deref(), Some("peregrine moves watch mov_1"));
        assert_eq!(detached.next.abort.as_deref(), Some("peregrine moves abort mov_1"));
    }
}
