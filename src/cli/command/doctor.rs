//! `peregrine doctor`.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueHint};
use futures_util::future::join_all;
use jiff::Timestamp;
use peregrine_api::types::{Readiness, Status};
use peregrine_config::ServerConfig;
use serde::Serialize;

use super::{config, machines};
use crate::cli::args::Global;
use crate::cli::connect::{self, Environment, TOKEN_FILE};
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::names::{MAX_SHOWN, Names};
use crate::cli::output::Output;
use crate::cli::session::Session;
use crate::cli::table::clean;

/// Clocks that differ by more make times in logs and events misleading.
const MAX_SKEW_MS: u64 = 2_000;
/// A port of this machine answers at once or not at all.
const PORT_TIMEOUT_MS: u64 = 1_000;

/// Look for what is wrong, from this binary to the machines, and say how to mend it
///
/// Checks the binary, the server and its parts, the token, the clocks, the names that are served over TLS, the engines of
/// all machines, the ports and the rights of the data folder. Exit code 9 if something has to be mended.
#[derive(Args, Debug)]
pub(crate) struct Doctor {
    /// Configuration of `serve`: also checks it and its ports
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: String,
    state: State,
    message: String,
    fix: Option<String>,
}

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// As it should be.
    Ok,
    /// Works, and deserves a look.
    Warn,
    /// Has to be mended.
    Failed,
    /// Could not be looked at.
    Skipped,
}

impl Check {
    fn ok(name: &str, message: impl Into<String>) -> Self {
        Self { name: name.to_owned(), state: State::Ok, message: message.into(), fix: None }
    }

    fn warn(name: &str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name: name.to_owned(), state: State::Warn, message: message.into(), fix: Some(fix.into()) }
    }

    fn failed(name: &str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { state: State::Failed, ..Self::warn(name, message, fix) }
    }

    fn skipped(name: &str, message: impl Into<String>) -> Self {
        Self { state: State::Skipped, ..Self::ok(name, message) }
    }

    fn of_failure(name: &str, failure: &Failure) -> Self {
        let why = failure.why.first().map(|why| format!(": {why}")).unwrap_or_default();
        Self::failed(name, format!("{}{why}", failure.message), failure.hint.as_deref().unwrap_or_default())
    }

    fn text(&self, out: &Output) -> String {
        use clap::builder::styling::AnsiColor;
        let mark = match self.state {
            State::Ok => out.paint(AnsiColor::Green, "ok     "),
            State::Warn => out.paint(AnsiColor::Yellow, "warning"),
            State::Failed => out.paint(AnsiColor::Red, "failed "),
            State::Skipped => out.dim("skipped"),
        };
        let mut text = format!("{mark} {:<18} {}", clean(&self.name), clean(&self.message));
        if let Some(fix) = self.fix.as_ref().filter(|fix| !fix.is_empty()) {
            text.push_str(&format!("\n{:27}fix: {}", "", clean(fix)));
        }
        text
    }
}

impl Doctor {
    /// Looks at everything; nothing stops at the first finding.
    pub(crate) async fn run(self, global: &Global, environment: &Environment, out: &Output) -> Result {
        let mut checks = vec![binary()];
        let session = Session::open(global, environment, *out);
        let mut reachable = false;
        match &session {
            Ok(session) => reachable = server(session, &mut checks).await,
            Err(failure) => checks.push(Check::of_failure("credential", failure)),
        }
        ports(self.config.as_deref(), reachable, &mut checks).await;
        data_folder(&connect::data_folder(global, environment), &mut checks);
        conclude(&checks, out)
    }
}

fn conclude(checks: &[Check], out: &Output) -> Result {
    let bad = checks.iter().filter(|check| check.state == State::Failed).count();
    let page = || checks.iter().map(|check| check.text(out)).collect::<Vec<_>>().join("\n") + "\n";
    if bad == 0 {
        return out.data(&serde_json::json!({ "ok": true, "checks": checks }), page);
    }
    if !out.json {
        out.raw(page().as_bytes())?;
    }
    let what = human::plural(bad as u64, "thing has", "things have");
    Err(Failure::new(Exit::Failed, "doctor.failed", format!("{what} to be mended"))
        .hint("each check above says how")
        .detail("checks", checks))
}

fn binary() -> Check {
    let version = env!("CARGO_PKG_VERSION");
    match std::env::current_exe() {
        Ok(path) => Check::ok("binary", format!("{version}, {}", path.display())),
        Err(error) => Check::warn("binary", format!("{version}, its path is not known: {error}"), ""),
    }
}

/// The server and what it knows; whether it answered.
async fn server(session: &Session, checks: &mut Vec<Check>) -> bool {
    match session.ask("looking for the server", session.client.readiness()).await {
        Err(failure) => {
            let mut check = Check::of_failure("server", &failure);
            if failure.exit == Exit::Unreachable {
                check.fix = Some(
                    "start it (peregrine serve --config FILE), or say where it is (--api URL)".to_owned(),
                );
            }
            checks.push(check);
            for name in ["token", "clock", "alarms", "domains", "machines"] {
                checks.push(Check::skipped(name, "needs the server"));
            }
            return false;
        }
        Ok(readiness) => ready(&readiness, session.client.url(), checks),
    }
    let asked_at = Timestamp::now();
    match session.ask("reading the status", session.client.status()).await {
        Err(failure) => {
            checks.push(Check::of_failure("token", &failure));
            for name in ["clock", "alarms", "domains", "machines"] {
                checks.push(Check::skipped(name, "needs the token"));
            }
        }
        Ok(status) => {
            checks.push(Check::ok("token", format!("accepted, from {}", session.credential_source())));
            checks.push(version(&status));
            checks.push(clock(status.time, asked_at, Timestamp::now()));
            alarms(&status, checks);
            domains(Names::ask(session, Timestamp::now()).await.as_ref(), checks);
            engines(session, &status, checks).await;
        }
    }
    true
}

fn ready(readiness: &Readiness, url: &str, checks: &mut Vec<Check>) {
    checks.push(Check::ok("server", format!("answers at {url}")));
    for part in &readiness.checks {
        let name = format!("server: {}", part.name);
        checks.push(if part.ok {
            Check::ok(&name, part.detail.clone())
        } else {
            Check::failed(&name, part.detail.clone(), "the log of `peregrine serve` says more")
        });
    }
}

/// What the server holds because it cannot read it.
fn alarms(status: &Status, checks: &mut Vec<Check>) {
    if status.alarms.is_empty() {
        checks.push(Check::ok("alarms", "none"));
    }
    for alarm in &status.alarms {
        checks.push(Check::failed(
            &format!("alarm {}", alarm.code),
            alarm.message.clone(),
            alarm.hint.clone(),
        ));
    }
}

/// Names that are served over TLS.
fn domains(names: Option<&Names>, checks: &mut Vec<Check>) {
    let Some(names) = names else {
        checks.push(Check::skipped("domains", "the server does not tell of them"));
        return;
    };
    checks.push(Check::ok(
        "domains",
        if names.by_state.is_empty() { "none".to_owned() } else { names.counts() },
    ));
    for concern in names.concerns.iter().take(MAX_SHOWN) {
        let name = format!("domain {}", concern.domain);
        let say = if concern.urgent { Check::failed } else { Check::warn };
        checks.push(say(&name, concern.message.clone(), concern.fix.clone()));
    }
    let rest = names.concerns.get(MAX_SHOWN..).unwrap_or_default();
    if !rest.is_empty() {
        let message = format!("{} more deserve a look", human::count(rest.len() as u64));
        // The worst come first.
        let say = if rest[0].urgent { Check::failed } else { Check::warn };
        checks.push(say("domains", message, "`peregrine domains list` shows them".to_owned()));
    }
}

fn version(status: &Status) -> Check {
    let ours = env!("CARGO_PKG_VERSION");
    if status.version == ours {
        return Check::ok("version", format!("server and command line are {ours}"));
    }
    let message = format!("the server is {}, the command line {ours}", status.version);
    Check::warn("version", message, "use the same version on both sides")
}

/// The server's clock lies between the moments of question and answer, or the clocks differ.
fn clock(theirs: Timestamp, asked: Timestamp, answered: Timestamp) -> Check {
    let behind = human::millis_between(theirs, asked);
    let ahead = human::millis_between(answered, theirs);
    let skew = behind.max(ahead);
    if skew <= MAX_SKEW_MS {
        return Check::ok("clock", format!("within {} of the server's", human::millis(MAX_SKEW_MS)));
    }
    let message =
        format!("{} {} the server's", human::millis(skew), if behind > 0 { "ahead of" } else { "behind" });
    Check::failed(
        "clock",
        message,
        "set the time on both machines (systemctl enable --now systemd-timesyncd)",
    )
}

async fn engines(session: &Session, status: &Status, checks: &mut Vec<Check>) {
    if status.machines.is_empty() {
        checks.push(Check::skipped("machines", "there is none: only fixed upstreams can be served"));
        return;
    }
    let asked = status.machines.iter().map(|machine| session.patient.check_machine(&machine.name));
    let answers =
        session.ask("asking the machines", async { Ok(join_all(asked).await) }).await.unwrap_or_default();
    for (machine, answer) in status.machines.iter().zip(answers) {
        let name = format!("machine {}", machine.name);
        checks.push(match answer {
            Err(error) => Check::of_failure(&name, &session.failure(&error)),
            Ok(check) => match machines::failed(&check) {
                Some(failure) => Check::of_failure(&name, &failure),
                None if !check.orphans.is_empty() => Check::warn(
                    &name,
                    format!("has copies that the server does not know: {}", check.orphans.join(", ")),
                    "if no move is under way, remove them there",
                ),
                None => {
                    let runtime = check.runtime.map(|runtime| runtime.version).unwrap_or_default();
                    Check::ok(&name, format!("{runtime}, answers in {:.1} ms", check.latency_ms))
                }
            },
        });
    }
}

/// The ports of the configuration: taken by the server when it runs, free when it does not.
async fn ports(file: Option<&Path>, server_runs: bool, checks: &mut Vec<Check>) {
    let config = match file.map(ServerConfig::load) {
        None if server_runs => {
            checks.push(Check::skipped("ports", "--config FILE says which ones to look at"));
            return;
        }
        None => ServerConfig::default(),
        Some(Ok(config)) => {
            checks.push(Check::ok("configuration", "without mistakes"));
            config
        }
        Some(Err(mistakes)) => {
            let path = file.unwrap_or_else(|| Path::new(""));
            checks.push(Check::of_failure("configuration", &config::wrong(path, &mistakes)));
            return;
        }
    };
    for address in config.edge.http.iter().copied() {
        checks.push(port("edge", address, server_runs).await);
    }
    checks.push(port("api", config.api.listen, server_runs).await);
}

async fn port(what: &str, address: SocketAddr, server_runs: bool) -> Check {
    let name = format!("port {} ({what})", address.port());
    if server_runs {
        let connect = tokio::net::TcpStream::connect(address);
        return match tokio::time::timeout(Duration::from_millis(PORT_TIMEOUT_MS), connect).await {
            Ok(Ok(_)) => Check::ok(&name, format!("{address} accepts connections")),
            Ok(Err(error)) => Check::failed(
                &name,
                format!("{address}: {error}"),
                "does the server run with this configuration?",
            ),
            Err(_) => Check::failed(&name, format!("{address} does not answer"), "is a firewall in between?"),
        };
    }
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(&name, format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Check::failed(
            &name,
            format!("{address} is taken by another program"),
            format!("`ss -ltnp sport = :{}` shows by which one", address.port()),
        ),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Check::failed(
            &name,
            format!("{address}: {error}"),
            "ports below 1024 need root or CAP_NET_BIND_SERVICE (AmbientCapabilities= in the systemd unit)",
        ),
        Err(error) => {
            Check::failed(&name, format!("{address}: {error}"), "is that an address of this machine?")
        }
    }
}

fn data_folder(folder: &Path, checks: &mut Vec<Check>) {
    let shown = folder.display();
    let rights = match std::fs::metadata(folder) {
        Ok(found) if !found.is_dir() => {
            checks.push(Check::failed(
                "data folder",
                format!("{shown} is not a folder"),
                "name another one with --data",
            ));
            return;
        }
        Ok(found) => found.permissions().mode() & 0o777,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            checks.push(Check::skipped(
                "data folder",
                format!("{shown} is not there; the first start makes it"),
            ));
            return;
        }
        Err(error) => {
            checks.push(Check::failed(
                "data folder",
                format!("{shown}: {error}"),
                "run as the user who owns it",
            ));
            return;
        }
    };
    checks.push(match rights & 0o077 {
        0 => Check::ok("data folder", format!("{shown}, for its owner only")),
        _ => Check::failed(
            "data folder",
            format!("{shown} is open to others ({rights:03o})"),
            format!("chmod 700 {shown}"),
        ),
    });
    let token = folder.join(TOKEN_FILE);
    let shown = token.display();
    if let Ok(found) = std::fs::metadata(&token) {
        let rights = found.permissions().mode() & 0o777;
        checks.push(match rights & 0o077 {
            0 => Check::ok("token file", format!("{shown}, for its owner only")),
            _ => Check::failed(
                "token file",
                format!("{shown} can be read by others ({rights:03o})"),
                format!("chmod 600 {shown}"),
            ),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::names::tests as names;
    use crate::cli::output::Surroundings;

    #[test]
    fn a_name_without_a_certificate_has_to_be_mended_and_one_that_waits_deserves_a_look() {
        let look = |all: &[peregrine_api::types::Domain]| {
            let mut checks = Vec::new();
            domains(Some(&Names::of(all, names::now())), &mut checks);
            checks
        };
        assert_eq!(look(&[]), [Check::ok("domains", "none")]);
        let checks = look(&[
            names::domain("well.test", "valid", Some(24 * 60)),
            names::domain("dns.test", "waiting_for_dns", None),
            names::domain("failed.test", "failed", None),
        ]);
        let states: Vec<_> = checks.iter().map(|check| (&*check.name, check.state)).collect();
        assert_eq!(
            states,
            [("domains", State::Ok), ("domain failed.test", State::Failed), ("domain dns.test", State::Warn)]
        );
        assert_eq!(checks[0].message, "1 failed, 1 valid, 1 waiting_for_dns");
        assert_eq!(checks[1].message, "failed: why");
        assert!(checks[1].fix.as_ref().is_some_and(|fix| fix.contains("domains check failed.test")));
        let many: Vec<_> =
            (0..MAX_SHOWN + 2).map(|n| names::domain(&format!("{n:02}.test"), "failed", None)).collect();
        let checks = look(&many);
        assert_eq!(checks.len(), MAX_SHOWN + 2);
        assert_eq!(checks.last().map(|check| &*check.message), Some("2 more deserve a look"));
        let mut silent = Vec::new();
        domains(None, &mut silent);
        assert_eq!(silent[0].state, State::Skipped);
    }

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(1_769_860_800_000 + ms).unwrap()
    }

    #[test]
    fn a_clock_is_right_when_it_lies_between_question_and_answer() {
        assert_eq!(clock(at(50), at(0), at(100)).state, State::Ok);
        assert_eq!(clock(at(-1_500), at(0), at(100)).state, State::Ok);
        let ahead = clock(at(-5_000), at(0), at(100));
        assert!(ahead.state == State::Failed && ahead.message.contains("5.00 s ahead of"), "{ahead:?}");
        let behind = clock(at(7_100), at(0), at(100));
        assert!(behind.state == State::Failed && behind.message.contains("7.00 s behind"), "{behind:?}");
    }

    #[test]
    fn a_folder_that_others_can_read_is_told_with_its_fix() {
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join(TOKEN_FILE);
        std::fs::write(&token, "x").unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
        };
        let look = || {
            let mut checks = Vec::new();
            data_folder(folder.path(), &mut checks);
            checks
        };
        set(folder.path(), 0o700);
        set(&token, 0o600);
        assert!(look().iter().all(|check| check.state == State::Ok), "{:?}", look());
        set(folder.path(), 0o755);
        set(&token, 0o644);
        let checks = look();
        assert!(checks.iter().all(|check| check.state == State::Failed), "{checks:?}");
        assert!(checks[0].fix.as_deref().unwrap().starts_with("chmod 700 "), "{checks:?}");
        assert!(checks[1].fix.as_deref().unwrap().starts_with("chmod 600 "), "{checks:?}");
    }

    #[tokio::test]
    async fn a_port_is_free_taken_or_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(port("edge", address, true).await.state, State::Ok);
        let taken = port("edge", address, false).await;
        assert!(taken.state == State::Failed && taken.fix.unwrap().contains("ss -ltnp"));
        drop(listener);
        assert_eq!(port("edge", address, false).await.state, State::Ok);
        assert_eq!(port("edge", address, true).await.state, State::Failed);
    }

    #[test]
    fn one_failed_check_makes_the_exit_code() {
        let out = Output::new(&["peregrine".into(), "--json".into()], Surroundings::default());
        let failure =
            conclude(&[Check::ok("a", ""), Check::failed("b", "bad", "mend it")], &out).expect_err("bad");
        assert_eq!(
            (failure.exit, failure.to_json()["checks"][1]["fix"].as_str()),
            (Exit::Failed, Some("mend it"))
        );
    }
}
