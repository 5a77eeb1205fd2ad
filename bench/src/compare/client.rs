//! The closed-loop load: wrk for HTTP/1.1 and h2load for HTTP/2, as Debian has them, and what they report.
//!
//! Clients that others wrote, because they are cheap enough to share a core with the origin, and because a proxy should
//! not be measured by its own authors' client alone. The open loop, which neither can do, is this crate's own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::process::Command;

use super::CompareError;
use super::process::find_program;
use super::scenario::{CONNECTIONS, Client, H2_CONNECTIONS, Scenario, TLS_HOST, Wire};
use crate::load::{EchoOptions, Load, Tls, echo};

/// How much longer than its own time a client may take, in seconds.
const CLIENT_GRACE_S: u64 = 20;

/// The installed clients.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) wrk: PathBuf,
    pub(super) h2load: PathBuf,
}

/// What a closed loop came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Served {
    /// Requests with an answer, failed ones included.
    pub(super) requests: u64,
    /// Answers other than 2xx and 3xx, and connections that ended or stalled under a request.
    pub(super) failed: u64,
}

impl Clients {
    pub(super) fn find() -> Result<Self, CompareError> {
        Ok(Self {
            wrk: find_program("wrk").ok_or(CompareError::Missing("wrk", "wrk"))?,
            h2load: find_program("h2load").ok_or(CompareError::Missing("h2load", "nghttp2-client"))?,
        })
    }

    /// As many requests as `target` can take for `seconds`.
    pub(super) async fn run(
        &self,
        scenario: &Scenario,
        (target, tls): (SocketAddr, Option<Tls>),
        seconds: u64,
    ) -> Result<Served, CompareError> {
        match scenario.client {
            Client::Theirs => self.theirs(scenario, target, seconds).await,
            Client::Handshakes { resume } => {
                let summary = Load::run(scenario.handshakes(target, tls, seconds * 1000)).await?;
                // The first of each worker has nothing to resume, and those that race for a ticket neither.
                if resume && summary.tls_resumed * 10 < summary.connections_opened * 9 {
                    let (resumed, all) = (summary.tls_resumed, summary.connections_opened);
                    return Err(CompareError::Client(format!("{resumed} of {all} handshakes were resumed")));
                }
                Ok(Served { requests: summary.sent, failed: summary.failed.total() })
            }
            Client::Echo => {
                let options = EchoOptions {
                    target,
                    host: TLS_HOST.to_owned(),
                    path: "/ws".to_owned(),
                    tls,
                    connections: CONNECTIONS,
                    message_bytes: usize::try_from(scenario.reply_bytes).unwrap_or(usize::MAX),
                    duration_ms: seconds * 1000,
                };
                let echoed = echo(options).await?;
                Ok(Served { requests: echoed.messages, failed: echoed.failed })
            }
        }
    }

    async fn theirs(
        &self,
        scenario: &Scenario,
        target: SocketAddr,
        seconds: u64,
    ) -> Result<Served, CompareError> {
        // The name that certificates are chosen by: the clients take it from the address.
        let url = if scenario.tls {
            format!("https://{TLS_HOST}:{}{}", target.port(), scenario.path)
        } else {
            format!("http://{target}{}", scenario.path)
        };
        let (mut command, parse): (_, fn(&str) -> Option<Served>) = match scenario.wire {
            Wire::H2 => (self.h2load(scenario, seconds), parse_h2load),
            Wire::H1 => (self.wrk(scenario, seconds), parse_wrk),
        };
        command.arg(url).kill_on_drop(true);
        let limit = Duration::from_secs(seconds + CLIENT_GRACE_S);
        let output = tokio::time::timeout(limit, command.output())
            .await
            .map_err(|_| CompareError::Client(format!("{command:?} did not end")))?
            .map_err(|error| CompareError::Client(format!("{command:?}: {error}")))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match parse(&text) {
            Some(served) if output.status.success() && served.requests > 0 => Ok(served),
            _ => {
                let errors = String::from_utf8_lossy(&output.stderr);
                Err(CompareError::Client(format!("{command:?} said: {text}{errors}")))
            }
        }
    }

    fn wrk(&self, scenario: &Scenario, seconds: u64) -> Command {
        let mut command = Command::new(&self.wrk);
        command.args(["--threads", "1", "--connections", &CONNECTIONS.to_string()]);
        command.args(["--duration", &format!("{seconds}s"), "--timeout", "10s"]);
        if scenario.connection_per_request {
            command.args(["--header", "Connection: close"]);
        }
        command
    }

    fn h2load(&self, scenario: &Scenario, seconds: u64) -> Command {
        let mut command = Command::new(&self.h2load);
        command.args(["--threads=1", &format!("--clients={H2_CONNECTIONS}")]);
        command.arg(format!("--max-concurrent-streams={}", scenario.h2_streams));
        // Windows of 1 GiB, so that the client never is what holds an answer back.
        command.args(["--window-bits=30", "--connection-window-bits=30", &format!("--duration={seconds}")]);
        command
    }
}

fn parse_wrk(text: &str) -> Option<Served> {
    let requests = number_before(text, " requests in ")?;
    let statuses = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Non-2xx or 3xx responses:"))
        .map_or(Some(0), |count| count.trim().parse().ok())?;
    let sockets = match text.lines().find_map(|line| line.trim().strip_prefix("Socket errors:")) {
        Some(counts) => counts
            .split(',')
            .map(|count| count.trim().rsplit(' ').next().and_then(|number| number.parse::<u64>().ok()))
            .sum::<Option<u64>>()?,
        None => 0,
    };
    Some(Served { requests, failed: statuses + sockets })
}

fn parse_h2load(text: &str) -> Option<Served> {
    let line = text.lines().find_map(|line| line.strip_prefix("requests: "))?;
    let succeeded = number_before(line, " succeeded")?;
    let failed = number_before(line, " failed")?;
    // Requests that the end of the run cut off are neither: h2load only counts what was answered as done.
    Some(Served { requests: succeeded + failed, failed })
}

/// The number that stands right before `label`.
fn number_before(text: &str, label: &str) -> Option<u64> {
    text[..text.find(label)?].rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_wrk_run_is_read() {
        let text =
            "Running 2s test\n  1 threads and 64 connections\n  80391 requests in 2.00s, 23.00MB read\n";
        assert_eq!(parse_wrk(text), Some(Served { requests: 80_391, failed: 0 }));
    }

    #[test]
    fn every_error_that_wrk_tells_is_a_failure() {
        let text = "  80 requests in 2.00s, 1MB read\n  Socket errors: connect 1, read 2, write 3, timeout 4\n  \
                    Non-2xx or 3xx responses: 5\n";
        assert_eq!(parse_wrk(text), Some(Served { requests: 80, failed: 15 }));
    }

    #[test]
    fn an_h2load_run_is_read() {
        let text = "finished in 2.00s, 22550.00 req/s\nrequests: 45103 total, 45164 started, 45103 done, 45100 \
                    succeeded, 3 failed, 3 errored, 0 timeout\n";
        assert_eq!(parse_h2load(text), Some(Served { requests: 45_103, failed: 3 }));
    }

    #[test]
    fn what_is_not_a_report_is_not_read_as_one() {
        assert_eq!(parse_wrk("unable to connect"), None);
        assert_eq!(parse_h2load("unable to connect"), None);
    }
}
