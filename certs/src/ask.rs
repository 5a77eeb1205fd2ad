//! Asking somebody whether a name may have a certificate: `GET URL?domain=NAME`, and 200 is yes. Answers are remembered for a
//! bounded time and in a bounded number, the positive and the negative ones; no answer is no, and is not remembered for long.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::sync::Semaphore;

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AskConfig {
    /// `http://…` or `https://…`; the name is added as the parameter `domain`.
    pub url: String,
    /// How long an answer is waited for.
    pub timeout_ms: u64,
    /// How long a yes is remembered.
    pub yes_ms: u64,
    /// How long a no is remembered.
    pub no_ms: u64,
    /// How many answers are remembered.
    pub max_remembered: usize,
    /// Questions at once; a name beyond is refused for now.
    pub max_questions: usize,
}

impl AskConfig {
    /// With default limits.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            timeout_ms: 2_000,
            yes_ms: 600_000,
            no_ms: 60_000,
            max_remembered: 10_000,
            max_questions: 16,
        }
    }
}

/// How long it is remembered that there was no answer.
const NO_ANSWER_MS: u64 = 5_000;

/// Asks, and remembers.
pub(crate) struct Asker {
    config: AskConfig,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    answers: Mutex<Answers>,
    questions: Semaphore,
}

impl fmt::Debug for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Asker({})", self.config.url)
    }
}

/// The oldest goes first when there are too many.
#[derive(Default)]
struct Answers {
    by_name: HashMap<String, (bool, u64)>,
    in_order: VecDeque<String>,
}

impl Answers {
    fn get(&self, name: &str, now_ms: u64) -> Option<bool> {
        self.by_name.get(name).filter(|(_, until_ms)| *until_ms > now_ms).map(|(answer, _)| *answer)
    }

    fn put(&mut self, name: &str, answer: bool, until_ms: u64, max: usize) {
        if self.by_name.insert(name.to_owned(), (answer, until_ms)).is_none() {
            self.in_order.push_back(name.to_owned());
        }
        while self.by_name.len() > max {
            let Some(oldest) = self.in_order.pop_front() else { break };
            self.by_name.remove(&oldest);
        }
    }
}

impl Asker {
    pub(crate) fn new(config: AskConfig, tls: rustls::ClientConfig) -> Self {
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        let questions = Semaphore::new(config.max_questions);
        Self {
            config,
            client: Client::builder(TokioExecutor::new()).build(connector),
            answers: Mutex::default(),
            questions,
        }
    }

    /// Whether `name`, which is canonical, may have a certificate.
    pub(crate) async fn allows(&self, name: &str, now_ms: u64) -> bool {
        let answers = || self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = answers().get(name, now_ms) {
            return answer;
        }
        let Ok(_one) = self.questions.try_acquire() else { return false };
        let answer = self.ask(name).await;
        let for_ms = match answer {
            Some(true) => self.config.yes_ms,
            Some(false) => self.config.no_ms,
            None => NO_ANSWER_MS,
        };
        let answer = answer.unwrap_or(false);
        answers().put(name, answer, now_ms + for_ms, self.config.max_remembered);
        answer
    }

    async fn ask(&self, name: &str) -> Option<bool> {
        let joint = if self.config.url.contains('?') { '&' } else { '?' };
        // A canonical name has letters, digits, `-`, `_` and dots only: nothing to escape.
        let request = Request::get(format!("{}{joint}domain={name}", self.config.url)).body(Empty::new());
        let limit = Duration::from_millis(self.config.timeout_ms);
        match tokio::time::timeout(limit, self.client.request(request.ok()?)).await {
            Ok(Ok(answer)) => Some(answer.status() == http::StatusCode::OK),
            Ok(Err(e)) => {
                tracing::warn!(url = self.config.url, error = %e, "no answer on whether a name may have a certificate");
                None
            }
            Err(_) => {
                tracing::warn!(
                    url = self.config.url,
                    "no answer in time on whether a name may have a certificate"
                );
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_remembered_for_their_time_and_the_oldest_goes_first() {
        let mut answers = Answers::default();
        answers.put("a", true, 10, 2);
        answers.put("b", false, 10, 2);
        assert_eq!((answers.get("a", 9), answers.get("a", 10)), (Some(true), None));
        answers.put("a", true, 20, 2);
        answers.put("c", true, 20, 2);
        assert_eq!(answers.get("a", 5), None, "the first that came goes");
        assert_eq!((answers.get("b", 5), answers.get("c", 5)), (Some(false), Some(true)));
        for n in 0..10_000 {
            answers.put(&n.to_string(), false, 20, 2);
        }
        assert!(answers.by_name.len() <= 2 && answers.in_order.len() <= 2);
    }
}
