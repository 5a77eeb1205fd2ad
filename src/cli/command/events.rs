//! `peregrine events`.

use clap::Args;
use peregrine_api::client::{EventFilter, EventStream};
use peregrine_api::types::Event;

use crate::cli::failure::Result;
use crate::cli::human;
use crate::cli::session::Session;
use crate::cli::table::clean;
use crate::cli::watch;

/// Print what has happened; -f goes on
#[derive(Args, Debug)]
pub(crate) struct Events {
    /// Go on with new events, until Ctrl-C
    #[arg(long, short)]
    follow: bool,

    /// Only events after this id [default: all that are kept; with -f, only new ones]
    #[arg(long, value_name = "ID")]
    after: Option<u64>,

    /// Of this service only
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,

    /// Of this move only
    #[arg(long = "move", value_name = "ID")]
    of_move: Option<String>,
}

impl Events {
    /// Prints them.
    pub(crate) async fn run(self, session: &Session) -> Result {
        if !self.follow {
            return self.history(session).await;
        }
        let filter = EventFilter { service: self.service, move_id: self.of_move, after: self.after };
        let mut events = session.client.events(&filter);
        session.ask("listening", events.connect()).await?;
        tokio::select! {
            result = follow(session, &mut events) => result,
            () = watch::interrupted() => Ok(()),
        }
    }

    /// Everything up to the newest event of this moment. The filter is applied here: a filtered stream would
    /// not say when it has reached that event.
    async fn history(self, session: &Session) -> Result {
        let after = self.after.unwrap_or(0);
        let last = session.ask("reading the status", session.client.status()).await?.last_event;
        let mut stream = session.client.events(&EventFilter { after: Some(after), ..EventFilter::default() });
        let mut found = Vec::new();
        let mut seen = after;
        while seen < last {
            let Some(event) = session.ask("reading the events", stream.next()).await? else { break };
            if event.body.is_stored() && event.id <= last {
                seen = event.id;
                found.extend(self.wants(&event).then_some(event));
            } else if event.id > last {
                break;
            }
        }
        session.out.data(&found, || found.iter().map(text).collect::<Vec<_>>().join("\n"))
    }

    fn wants(&self, event: &Event) -> bool {
        let wanted = |filter: &Option<String>, value: &Option<String>| filter.is_none() || filter == value;
        wanted(&self.service, &event.service) && wanted(&self.of_move, &event.move_id)
    }
}

async fn follow(session: &Session, events: &mut EventStream) -> Result {
    while let Some(event) = events.next().await.map_err(|error| session.failure(&error))? {
        session.out.item("event", &event, || text(&event))?;
    }
    Ok(())
}

/// `2026-01-31T12:00:00.000Z 418 move.phase shop mov_1 phase=shift`.
fn text(event: &Event) -> String {
    let mut text = format!("{} {} {}", human::stamp(event.time), event.id, event.body.kind());
    for name in [&event.service, &event.move_id].into_iter().flatten() {
        text.push_str(&format!(" {name}"));
    }
    // The data of an event is what its JSON form says: one list of fields, in one place.
    let json = serde_json::to_value(event).unwrap_or_default();
    if let Some(fields) = json["data"].as_object() {
        for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            match value.as_str() {
                Some(value) => text.push_str(&format!(" {name}={value}")),
                None => text.push_str(&format!(" {name}={value}")),
            }
        }
    }
    clean(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> Event {
        serde_json::from_value(serde_json::json!({
            "id": 418, "time": "2026-01-31T12:00:00Z", "service": "shop", "move": "mov_1", "type": "move.phase",
            "data": {"phase": "shift"}
        }))
        .unwrap()
    }

    #[test]
    fn an_event_is_one_line() {
        assert_eq!(text(&event()), "2026-01-31T12:00:00.000Z 418 move.phase shop mov_1 phase=shift");
    }

    #[test]
    fn a_filter_wants_what_it_names() {
        let filter = |service: Option<&str>, of_move: Option<&str>| Events {
            follow: false,
            after: None,
            service: service.map(ToOwned::to_owned),
            of_move: of_move.map(ToOwned::to_owned),
        };
        assert!(filter(None, None).wants(&event()));
        assert!(filter(Some("shop"), Some("mov_1")).wants(&event()));
        assert!(!filter(Some("blog"), None).wants(&event()));
        assert!(!filter(Some("shop"), Some("mov_2")).wants(&event()));
    }
}
