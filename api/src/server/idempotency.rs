//! `Idempotency-Key`: a POST that is repeated gets the answer of the first one, and nothing is done twice.
//!
//! Kept in memory, bounded in number and time. The starts of rollouts hand the key to the engine as well, which
//! keeps it in the store: they are safe across a restart of the server too.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};

use super::context::Context;
use super::error::ApiError;
use super::extract::{idempotency_key, read_body};
use crate::codes;
use crate::config::Limits;

/// Says that an answer is the one of an earlier request with the same key.
const REPLAYED: &str = "idempotency-replayed";

/// Marks an answer that is not kept for a repetition: it holds a secret, and asking changes nothing.
#[derive(Clone, Copy)]
pub(crate) struct Secret;

type Fingerprint = [u8; 32];

/// The answers by key. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Answers {
    kept: Arc<Mutex<Kept>>,
    max_keys: usize,
    ttl: Duration,
}

#[derive(Default)]
struct Kept {
    entries: HashMap<String, Entry>,
    /// Keys in the order of their coming. One whose entry has gone or was made anew is skipped.
    order: VecDeque<(Instant, String)>,
}

struct Entry {
    at: Instant,
    fingerprint: Fingerprint,
    answer: Option<Answer>,
}

/// An answer that can be given again.
#[derive(Clone)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    error: Option<ApiError>,
}

enum Claim {
    /// The first with this key: the answer goes in here.
    First(Claimed),
    /// Answered before.
    Again(Box<Answer>),
}

/// The right to answer for a key. Dropped without an answer, it frees the key.
struct Claimed {
    answers: Answers,
    key: String,
    answered: bool,
}

impl Answers {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            kept: Arc::default(),
            max_keys: limits.max_idempotency_keys,
            ttl: Duration::from_millis(limits.idempotency_ttl_ms),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self, key: &str, fingerprint: Fingerprint, now: Instant) -> Result<Claim, ApiError> {
        let mut kept = self.kept();
        kept.forget(now, self.ttl, self.max_keys.saturating_sub(1));
        if let Some(entry) = kept.entries.get(key) {
            if entry.fingerprint != fingerprint {
                return Err(ApiError::new(
                    &codes::KEY_REUSED,
                    format!("the key {key} belongs to another request"),
                ));
            }
            return match &entry.answer {
                Some(answer) => Ok(Claim::Again(Box::new(answer.clone()))),
                None => Err(ApiError::new(
                    &codes::KEY_BUSY,
                    format!("the request with the key {key} is under way"),
                )),
            };
        }
        kept.entries.insert(key.to_owned(), Entry { at: now, fingerprint, answer: None });
        kept.order.push_back((now, key.to_owned()));
        Ok(Claim::First(Claimed { answers: self.clone(), key: key.to_owned(), answered: false }))
    }
}

impl Kept {
    fn forget(&mut self, now: Instant, ttl: Duration, max_keys: usize) {
        while let Some((at, key)) = self.order.front() {
            let is_current = self.entries.get(key).is_some_and(|entry| entry.at == *at);
            let is_old = now.duration_since(*at) >= ttl || self.entries.len() > max_keys;
            if is_current && !is_old {
                return;
            }
            if is_current {
                self.entries.remove(key);
            }
            self.order.pop_front();
        }
    }
}

impl Claimed {
    fn answer(mut self, answer: Answer) {
        self.answered = true;
        if let Some(entry) = self.answers.kept().entries.get_mut(&self.key) {
            entry.answer = Some(answer);
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if !self.answered {
            self.answers.kept().entries.remove(&self.key);
        }
    }
}

/// The middleware.
pub(crate) async fn once(State(context): State<Context>, request: Request, next: Next) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    match keyed(&context, request, next).await {
        Ok(answer) => answer,
        Err(error) => error.into_response(),
    }
}

async fn keyed(context: &Context, request: Request, next: Next) -> Result<Response, ApiError> {
    let Some(key) = idempotency_key(request.headers())? else { return Ok(next.run(request).await) };
    let (parts, body) = request.into_parts();
    let limits = &context.config.limits;
    let body = read_body(Request::from_parts(parts.clone(), body), limits).await?;
    let target = parts.uri.path_and_query().map_or("", http::uri::PathAndQuery::as_str);
    let claimed = match context.answers.claim(&key, fingerprint(target, &body), Instant::now())? {
        Claim::First(claimed) => claimed,
        Claim::Again(answer) => return Ok(answer.again()),
    };
    let response = next.run(Request::from_parts(parts, body.into())).await;
    if response.extensions().get::<Secret>().is_some() {
        return Ok(response);
    }
    let (answer, is_final) = Answer::of(response).await?;
    if is_final {
        claimed.answer(answer.clone());
    }
    Ok(answer.into_response())
}

fn fingerprint(target: &str, body: &[u8]) -> Fingerprint {
    Sha256::new().chain_update(target).chain_update([0]).chain_update(body).finalize().into()
}

impl Answer {
    /// An answer and whether a repetition may get it: one that says "try again" may not.
    async fn of(response: Response) -> Result<(Self, bool), ApiError> {
        let (mut parts, body) = response.into_parts();
        let error = parts.extensions.remove::<ApiError>();
        // Answers to POST are whole documents of our own making, never streams.
        let body = body
            .collect()
            .await
            .map_err(|error| ApiError::new(&codes::INTERNAL, format!("the answer broke off: {error}")))?
            .to_bytes();
        let is_final =
            !parts.status.is_server_error() && error.as_ref().is_none_or(|error| !error.is_retryable());
        Ok((Self { status: parts.status, headers: parts.headers, body, error }, is_final))
    }

    fn again(mut self) -> Response {
        self.headers.insert(REPLAYED, HeaderValue::from_static("true"));
        self.into_response()
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.headers, self.body).into_response();
        if let Some(error) = self.error {
            response.extensions_mut().insert(error);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(max_keys: usize, ttl_ms: u64) -> Answers {
        Answers::new(&Limits {
            max_idempotency_keys: max_keys,
            idempotency_ttl_ms: ttl_ms,
            ..Limits::default()
        })
    }

    fn said(text: &'static str) -> Answer {
        Answer {
            status: StatusCode::OK,
            headers: HeaderMap::new(),
            body: Bytes::from_static(text.as_bytes()),
            error: None,
        }
    }

    fn first(answers: &Answers, key: &str, print: u8, now: Instant) -> Claimed {
        match answers.claim(key, [print; 32], now) {
            Ok(Claim::First(claimed)) => claimed,
            Ok(Claim::Again(_)) => panic!("{key} was answered before"),
            Err(error) => panic!("{key}: {}", error.code()),
        }
    }

    fn again(answers: &Answers, key: &str, print: u8, now: Instant) -> Result<Bytes, String> {
        match answers.claim(key, [print; 32], now) {
            Ok(Claim::Again(answer)) => Ok(answer.body),
            Ok(Claim::First(_)) => Err("first".to_owned()),
            Err(error) => Err(error.code().to_owned()),
        }
    }

    #[test]
    fn a_repeated_request_gets_the_first_answer_and_another_one_with_its_key_is_refused() {
        let (answers, now) = (answers(10, 1_000), Instant::now());
        first(&answers, "k", 1, now).answer(said("done"));
        assert_eq!(again(&answers, "k", 1, now).unwrap(), "done");
        assert_eq!(again(&answers, "k", 2, now).unwrap_err(), "idempotency.mismatch");
    }

    #[test]
    fn while_the_first_is_under_way_the_second_is_told_so_and_a_lost_first_frees_the_key() {
        let (answers, now) = (answers(10, 1_000), Instant::now());
        let claimed = first(&answers, "k", 1, now);
        assert_eq!(again(&answers, "k", 1, now).unwrap_err(), "idempotency.in_progress");
        drop(claimed);
        drop(first(&answers, "k", 2, now));
    }

    #[test]
    fn answers_go_after_their_time_and_the_oldest_go_beyond_the_number() {
        let (answers, now) = (answers(2, 1_000), Instant::now());
        first(&answers, "a", 1, now).answer(said("a"));
        first(&answers, "b", 1, now).answer(said("b"));
        first(&answers, "c", 1, now).answer(said("c"));
        assert_eq!(answers.kept().entries.len(), 2);
        assert_eq!(again(&answers, "c", 1, now).unwrap(), "c");
        assert_eq!(again(&answers, "a", 1, now).unwrap_err(), "first");
        let later = now + Duration::from_millis(1_000);
        assert_eq!(again(&answers, "c", 1, later).unwrap_err(), "first");
        assert!(answers.kept().order.len() <= 3);
    }
}
