//! A session with the server: one client, one credential, and every error of a call turned into a failure.

use std::future::Future;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peregrine_api::client::{Client, ClientConfig, ClientError, HEAD_TIMEOUT_MS};
use peregrine_api::types::{Problem, ProblemKind};

use super::args::Global;
use super::connect::{self, Environment};
use super::exit::Exit;
use super::failure::{Failure, Result};
use super::output::Output;

/// A question that only reads what the server knows is answered at once, or the server is in trouble.
const READ_TIMEOUT_MS: u64 = 8_000;
/// A call that takes longer than this shows on a terminal what is waited for.
const PATIENCE_MS: u64 = 80;
/// The spinner turns so often.
const TICK_MS: u64 = 100;

/// A session with the server.
pub(crate) struct Session {
    /// For questions that the server answers from what it knows.
    pub(crate) client: Client,
    /// For calls during which the server may have to ask machines.
    pub(crate) patient: Client,
    /// Where to speak.
    pub(crate) out: Output,
    /// `--yes`.
    pub(crate) yes: bool,
    credential_source: String,
}

impl Session {
    /// Finds address and credential; connects with the first call.
    pub(crate) fn open(global: &Global, environment: &Environment, out: Output) -> Result<Self> {
        let credential = connect::credential(global, environment)?;
        let client = |head_timeout_ms| {
            let config =
                ClientConfig { url: global.api.clone(), token: credential.token.clone(), head_timeout_ms };
            Client::new(&config).map_err(|error| failure(&error, &credential.source))
        };
        Ok(Self {
            client: client(READ_TIMEOUT_MS)?,
            patient: client(HEAD_TIMEOUT_MS)?,
            out,
            yes: global.yes,
            credential_source: credential.source,
        })
    }

    /// Where the credential is from, in words.
    pub(crate) fn credential_source(&self) -> &str {
        &self.credential_source
    }

    /// Waits for a call; on a terminal it says `doing` when that takes longer than a blink.
    pub(crate) async fn ask<T>(
        &self,
        doing: &str,
        call: impl Future<Output = std::result::Result<T, ClientError>>,
    ) -> Result<T> {
        let answer =
            if self.out.live && !self.out.quiet { self.with_spinner(doing, call).await } else { call.await };
        answer.map_err(|error| self.failure(&error))
    }

    /// Waits for a call during which the server may have to ask machines. A server that does not answer at all
    /// is found out before, in the time of a question that only reads.
    pub(crate) async fn ask_patiently<T>(
        &self,
        doing: &str,
        call: impl Future<Output = std::result::Result<T, ClientError>>,
    ) -> Result<T> {
        self.ask(doing, async {
            self.client.version().await?;
            call.await
        })
        .await
    }

    async fn with_spinner<T>(&self, doing: &str, call: impl Future<Output = T>) -> T {
        let mut call = std::pin::pin!(call);
        if let Ok(answer) = tokio::time::timeout(Duration::from_millis(PATIENCE_MS), &mut call).await {
            return answer;
        }
        let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
            spinner.set_style(style);
        }
        spinner.set_message(format!("{doing} ({})", self.client.url()));
        spinner.enable_steady_tick(Duration::from_millis(TICK_MS));
        let answer = call.await;
        spinner.finish_and_clear();
        answer
    }

    /// The failure that an error of a call is.
    pub(crate) fn failure(&self, error: &ClientError) -> Failure {
        failure(error, &self.credential_source)
    }
}

/// Runs what needs the server on this thread.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Failure::new(Exit::Failed, "cli.runtime", format!("the runtime cannot be started: {error}"))
    })?;
    let result = runtime.block_on(work);
    // A name look-up that hangs in its own thread must not hold the exit back.
    runtime.shutdown_background();
    result
}

fn failure(error: &ClientError, credential_source: &str) -> Failure {
    match error {
        ClientError::Settings { detail } => Failure::new(Exit::Usage, "cli.address", detail.clone())
            .hint("--api URL or PEREGRINE_API says where the server is"),
        ClientError::Unreachable { url, detail, sent } => {
            let mut failure =
                Failure::new(Exit::Unreachable, "server.unreachable", format!("{url} cannot be reached"))
                    .why(detail.clone())
                    .why(format!("credential: {credential_source}"))
                    .hint("is `peregrine serve` running? --api URL or PEREGRINE_API says where; `peregrine doctor` looks closer");
            if *sent {
                failure = failure.why("the request may have been carried out: `peregrine status` shows it");
            }
            failure
        }
        ClientError::NotUnderstood { url, detail } => Failure::new(
            Exit::Failed,
            "server.not_understood",
            format!("{url} gave an answer that is not understood"),
        )
        .why(detail.clone())
        .hint("is that a Peregrine server of this version? `peregrine doctor` compares the two"),
        ClientError::Problem(problem) => of_problem(problem, credential_source),
    }
}

/// The failure that a problem of the server is.
fn of_problem(problem: &Problem, credential_source: &str) -> Failure {
    let exit = match problem.kind {
        ProblemKind::Invalid => Exit::Usage,
        ProblemKind::Auth => Exit::Auth,
        ProblemKind::NotFound => Exit::NotFound,
        ProblemKind::Conflict => Exit::Conflict,
        ProblemKind::Unreachable => Exit::Unreachable,
        ProblemKind::Blocked => Exit::Blocked,
        ProblemKind::Failed | ProblemKind::Internal => Exit::Failed,
    };
    let mut failure =
        Failure::new(exit, problem.code.clone(), problem.detail.clone()).hint(problem.hint.clone());
    if problem.kind == ProblemKind::Auth {
        failure = failure.why(format!("credential: {credential_source}"));
    }
    for error in &problem.errors {
        failure = failure.why(format!("{}: {}", error.pointer, error.message));
    }
    for blocker in &problem.blockers {
        failure = failure
            .why(format!("{} [{}] {}", blocker.message, blocker.code, blocker.hint).trim_end().to_owned());
    }
    if let Some(id) = &problem.move_id {
        failure = failure.detail("move", id);
    }
    if !problem.blockers.is_empty() {
        failure = failure.detail("blockers", &problem.blockers);
    }
    if !problem.errors.is_empty() {
        failure = failure.detail("errors", &problem.errors);
    }
    failure
        .detail("status", problem.status)
        .detail("request_id", &problem.request_id)
        .detail("retryable", problem.retryable)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problem(kind: &str) -> Problem {
        serde_json::from_value(json!({
            "type": "urn:peregrine:problem:x.y", "title": "t", "status": 400, "detail": "what happened",
            "instance": "/api/v1/moves", "code": "x.y", "kind": kind, "hint": "do that", "request_id": "r-1",
            "retryable": false, "errors": [], "move": "mov_1",
            "blockers": [{"code": "machine.unreachable", "message": "host-b does not answer", "hint": "start it"}]
        }))
        .expect("a problem")
    }

    #[test]
    fn every_kind_of_problem_has_its_exit_code() {
        let kinds = [
            ("invalid", 2),
            ("auth", 3),
            ("not_found", 4),
            ("conflict", 5),
            ("unreachable", 6),
            ("blocked", 8),
            ("failed", 9),
            ("internal", 9),
            ("a_kind_of_a_later_server", 9),
        ];
        for (kind, code) in kinds {
            assert_eq!(of_problem(&problem(kind), "x").exit.code(), code, "{kind}");
        }
    }

    #[test]
    fn a_problem_keeps_its_code_hint_move_and_blockers() {
        let failure = of_problem(&problem("blocked"), "x");
        let json = failure.to_json();
        assert_eq!(json["code"], "x.y");
        assert_eq!(json["hint"], "do that");
        assert_eq!(json["move"], "mov_1");
        assert_eq!(json["blockers"][0]["code"], "machine.unreachable");
        assert!(json["why"][0].as_str().unwrap().contains("host-b does not answer"));
    }

    #[test]
    fn a_refused_credential_is_named_by_its_source() {
        let failure = of_problem(&problem("auth"), "PEREGRINE_TOKEN");
        assert!(failure.why.iter().any(|why| why == "credential: PEREGRINE_TOKEN"), "{:?}", failure.why);
    }

    #[test]
    fn an_unreachable_server_names_address_credential_and_next_step() {
        let error =
            ClientError::Unreachable { url: "http://h:1/x".into(), detail: "refused".into(), sent: false };
        let failure = failure(&error, "--token");
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(
            failure.message.contains("http://h:1/x")
                && failure.why.contains(&"credential: --token".to_owned())
        );
        assert!(failure.hint.expect("a hint").contains("--api"));
    }
}
