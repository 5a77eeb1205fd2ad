//! `peregrine logs`.

use clap::Args;
use jiff::Timestamp;
use peregrine_api::client::{LogQuery, LogStream};
use peregrine_api::types::{LogLine, LogSource};

use crate::cli::failure::Result;
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::parse;
use crate::cli::session::Session;
use crate::cli::table::clean;
use crate::cli::watch;

/// Print what the copies of a service have written; -f goes on
#[derive(Args, Debug)]
pub(crate) struct Logs {
    /// Service, or the id of one instance (ins_…)
    service: String,

    /// Go on with new lines, until Ctrl-C
    #[arg(long, short)]
    follow: bool,

    /// So many of the last lines of each copy first
    #[arg(long, short = 'n', value_name = "N")]
    tail: Option<u64>,

    /// Lines since then: 10m, 1h, or 2026-01-31T12:00:00Z
    #[arg(long, value_name = "WHEN", value_parser = parse::since)]
    since: Option<Timestamp>,
}

impl Logs {
    /// Prints them.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let query = LogQuery { follow: self.follow, tail: self.tail, since: self.since };
        let mut lines = if self.service.starts_with("ins_") {
            session.client.instance_logs(&self.service, query)
        } else {
            session.client.logs(&self.service, query)
        };
        session.ask("reading the logs", lines.connect()).await?;
        if self.follow {
            tokio::select! {
                result = print(session, &mut lines) => result,
                () = watch::interrupted() => Ok(()),
            }
        } else {
            history(session, &mut lines).await
        }
    }
}

async fn print(session: &Session, lines: &mut LogStream) -> Result {
    while let Some(line) = lines.next().await.map_err(|error| session.failure(&error))? {
        session.out.item("line", &line, || text(&line, &session.out))?;
    }
    Ok(())
}

/// As JSON, a history is one document.
async fn history(session: &Session, lines: &mut LogStream) -> Result {
    if !session.out.json {
        return print(session, lines).await;
    }
    let mut all = Vec::new();
    while let Some(line) = lines.next().await.map_err(|error| session.failure(&error))? {
        all.push(line);
    }
    session.out.data(&all, String::new)
}

fn text(line: &LogLine, out: &Output) -> String {
    let instance =
        if line.instance.len() > 8 { &line.instance[line.instance.len() - 8..] } else { &line.instance };
    let source = match line.source {
        LogSource::Stdout => "",
        LogSource::Stderr => " err",
        LogSource::Notice => " peregrine",
    };
    let time = if out.pretty() { human::clock(line.time) } else { human::stamp(line.time) };
    format!("{time} {}/{}{source} {}", clean(&line.machine), clean(instance), clean(&line.text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::Surroundings;

    #[test]
    fn a_line_says_when_and_where_and_cannot_draw_on_the_terminal() {
        let line: LogLine = serde_json::from_value(serde_json::json!({
            "time": "2026-01-31T12:00:00Z", "service": "shop", "instance": "ins_0123456789abcdef", "machine": "host-a",
            "source": "stderr", "text": "bad\u{1b}[31m news"
        }))
        .unwrap();
        let out = Output::new(&[], Surroundings::default());
        assert_eq!(text(&line, &out), "2026-01-31T12:00:00.000Z host-a/89abcdef err bad [31m news");
    }
}
