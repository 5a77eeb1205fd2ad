//! What containers print and use.

use std::time::Duration;

use bollard::container::LogOutput;
use bollard::models::ContainerStatsResponse;
use bollard::query_parameters::{LogsOptionsBuilder, StatsOptionsBuilder};
use futures_util::stream::{self, BoxStream, StreamExt};

use super::Engine;
use crate::model::{InstanceId, UnixMs};
use crate::runtime::{InstanceStats, LogLine, LogOptions, RuntimeError};

/// What an error quotes of the last output.
const LAST_LINES: usize = 20;
/// What an error quotes of the last output.
const LAST_BYTES: usize = 4 << 10;
/// Longest wait for that quotation: the error itself is more important.
const LAST_OUTPUT_TIMEOUT_MS: u64 = 2_000;
/// A line that is longer is given in pieces.
const MAX_LINE_BYTES: usize = 64 << 10;

/// See [`crate::runtime::Runtime::logs`].
pub(super) fn logs(
    engine: Engine,
    id: InstanceId,
    options: LogOptions,
) -> BoxStream<'static, Result<LogLine, RuntimeError>> {
    let ask = LogsOptionsBuilder::default()
        .follow(options.follow)
        .stdout(true)
        .stderr(true)
        .timestamps(true)
        .tail(&options.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string()))
        .since(options.since.and_then(|ms| i32::try_from(ms / 1_000).ok()).unwrap_or(0))
        .build();
    let connect = async move { (engine.docker().await, engine) };
    stream::once(connect)
        .flat_map(move |(docker, engine)| match docker {
            Err(error) => stream::once(async { Err(error) }).boxed(),
            Ok(docker) => docker
                .logs(id.as_str(), Some(ask.clone()))
                .map(move |output| output.map_err(|error| engine.translate(&error)))
                .boxed(),
        })
        // The engine counts `since` in whole seconds.
        .scan(Lines::default(), |lines, output| {
            let out: Vec<_> = match output {
                Ok(output) => lines.take(&output).into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            futures_util::future::ready(Some(stream::iter(out)))
        })
        .flatten()
        .filter(move |line| {
            let wanted =
                line.as_ref().map_or(true, |line| options.since.is_none_or(|since| line.at >= since));
            futures_util::future::ready(wanted)
        })
        .boxed()
}

/// The last lines, for an error; says so if they cannot be had.
pub(super) async fn last_output(engine: &Engine, id: &InstanceId) -> String {
    let options = LogOptions { tail: Some(LAST_LINES), ..LogOptions::default() };
    let lines = logs(engine.clone(), id.clone(), options).collect::<Vec<_>>();
    let Ok(lines) = tokio::time::timeout(Duration::from_millis(LAST_OUTPUT_TIMEOUT_MS), lines).await else {
        return "(its output could not be read in time)".to_owned();
    };
    let lines: Vec<String> = lines.into_iter().flatten().map(|line| line.text).collect();
    let text = lines.join("\n");
    let mut start = text.len().saturating_sub(LAST_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    if text.is_empty() { "(it printed nothing)".to_owned() } else { text[start..].to_owned() }
}

/// See [`crate::runtime::Runtime::stats`].
pub(super) async fn stats(engine: &Engine, id: &InstanceId) -> Result<InstanceStats, RuntimeError> {
    let options = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
    let docker = engine.docker().await?;
    let answer = Box::pin(docker.stats(id.as_str(), Some(options))).next().await;
    match answer {
        Some(Ok(stats)) => Ok(read(&stats)),
        Some(Err(error)) => Err(engine.translate(&error)),
        None => Err(engine.other("the engine gave no figures")),
    }
}

fn read(stats: &ContainerStatsResponse) -> InstanceStats {
    let cpu = stats.cpu_stats.as_ref().and_then(|cpu| cpu.cpu_usage.as_ref()?.total_usage);
    let memory = stats.memory_stats.as_ref();
    let used = memory.and_then(|memory| memory.usage).unwrap_or(0);
    // The page cache goes when somebody needs the room: version 1 and version 2 of control groups name it.
    let cache = memory
        .and_then(|memory| memory.stats.as_ref())
        .and_then(|stats| stats.get("total_inactive_file").or_else(|| stats.get("inactive_file")).copied());
    InstanceStats {
        cpu_seconds: Duration::from_nanos(cpu.unwrap_or(0)).as_secs_f64(),
        memory_bytes: used.saturating_sub(cache.unwrap_or(0)),
        pids: stats.pids_stats.as_ref().and_then(|pids| pids.current).unwrap_or(0),
    }
}

/// Pieces of output put together to lines, for each of both outputs.
#[derive(Debug, Default)]
struct Lines {
    partial: [Option<(UnixMs, Vec<u8>)>; 2],
}

impl Lines {
    /// The lines that end in `output`. Every piece begins with its time; a line of more than 16 KiB comes in
    /// several pieces, of which only the last one ends with a line break.
    fn take(&mut self, output: &LogOutput) -> Vec<LogLine> {
        let (stderr, message) = match output {
            LogOutput::StdErr { message } => (true, message),
            LogOutput::StdOut { message } | LogOutput::Console { message } => (false, message),
            LogOutput::StdIn { .. } => return Vec::new(),
        };
        let mut lines = Vec::new();
        for piece in message.split_inclusive(|byte| *byte == b'\n') {
            let (at, text) = split_time(piece);
            let partial = &mut self.partial[usize::from(stderr)];
            let (first, bytes) = partial.get_or_insert_with(|| (at.unwrap_or_default(), Vec::new()));
            let first = *first;
            bytes.extend_from_slice(text);
            if bytes.last() == Some(&b'\n') || bytes.len() >= MAX_LINE_BYTES {
                let text = String::from_utf8_lossy(bytes).trim_end_matches(['\n', '\r']).to_owned();
                *partial = None;
                lines.push(LogLine { at: first, stderr, text });
            }
        }
        lines
    }
}

fn split_time(piece: &[u8]) -> (Option<UnixMs>, &[u8]) {
    let Some(blank) = piece.iter().position(|byte| *byte == b' ') else { return (None, piece) };
    let time =
        std::str::from_utf8(&piece[..blank]).ok().and_then(|time| time.parse::<jiff::Timestamp>().ok());
    match time {
        Some(time) => (UnixMs::try_from(time.as_millisecond()).ok(), &piece[blank + 1..]),
        None => (None, piece),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(text: &str) -> LogOutput {
        LogOutput::StdOut { message: text.as_bytes().to_vec().into() }
    }

    #[test]
    fn a_long_line_in_pieces_is_one_line_with_the_time_of_its_beginning() {
        let mut lines = Lines::default();
        assert!(lines.take(&out("2026-01-02T03:04:05.678901234Z first ")).is_empty());
        let err = LogOutput::StdErr { message: "2026-01-02T03:04:06Z other\n".into() };
        assert_eq!(lines.take(&err)[0].text, "other");
        let found = lines.take(&out("2026-01-02T03:04:07Z second\n"));
        assert_eq!(
            found,
            [LogLine { at: 1_767_323_045_678, stderr: false, text: "first second".to_owned() }]
        );
    }

    #[test]
    fn an_empty_line_is_a_line() {
        assert_eq!(Lines::default().take(&out("2026-01-02T03:04:05Z \n"))[0].text, "");
    }
}
