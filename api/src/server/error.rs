//! One place that turns refusals into answers: problem+json (RFC 9457), whatever refused.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use peregrine_engine::{EngineError, ErrorKind};

use crate::codes::{self, Code};
use crate::request::BodyError;
use crate::types::{FieldError, Finding, Problem, ProblemKind};

/// A refusal on its way out. It gets the path and the id of the request in `server/outer.rs`.
#[derive(Clone, Debug)]
pub(crate) struct ApiError(Box<Refusal>); // small, as every `Result` on the way bears it

#[derive(Clone, Debug)]
struct Refusal {
    code: String,
    status: StatusCode,
    kind: ProblemKind,
    title: &'static str,
    detail: String,
    hint: String,
    retryable: bool,
    errors: Vec<FieldError>,
    move_id: Option<String>,
    blockers: Vec<Finding>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl ApiError {
    pub(crate) fn new(code: &Code, detail: impl Into<String>) -> Self {
        Self(Box::new(Refusal {
            code: code.code.to_owned(),
            status: StatusCode::from_u16(code.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            kind: code.kind,
            title: code.title,
            detail: detail.into(),
            hint: code.hint.to_owned(),
            retryable: code.retryable,
            errors: Vec::new(),
            move_id: None,
            blockers: Vec::new(),
            headers: Vec::new(),
        }))
    }

    /// A refusal of fields, each with its pointer.
    pub(crate) fn fields(errors: Vec<FieldError>) -> Self {
        let detail =
            errors.iter().map(|error| format!("{}: {}", error.pointer, error.message)).collect::<Vec<_>>();
        let mut error = Self::new(&codes::INVALID_FIELD, detail.join("; "));
        error.0.errors = errors;
        error
    }

    pub(crate) fn at(mut self, pointer: &str) -> Self {
        let message = self.0.detail.clone();
        self.0.errors.push(FieldError::new(pointer, message));
        self
    }

    pub(crate) fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.push((name, value));
        self
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.0.status
    }

    pub(crate) fn is_retryable(&self) -> bool {
        self.0.retryable
    }

    pub(crate) fn code(&self) -> &str {
        &self.0.code
    }

    pub(crate) fn detail(&self) -> &str {
        &self.0.detail
    }

    /// The answer, for a request with this path and id.
    pub(crate) fn into_problem(self, instance: &str, request_id: &str) -> Response {
        let refusal = *self.0;
        let problem = Problem {
            type_uri: format!("urn:peregrine:problem:{}", refusal.code),
            title: refusal.title.to_owned(),
            status: refusal.status.as_u16(),
            detail: refusal.detail,
            instance: instance.to_owned(),
            code: refusal.code,
            kind: refusal.kind,
            hint: refusal.hint,
            request_id: request_id.to_owned(),
            retryable: refusal.retryable,
            errors: refusal.errors,
            move_id: refusal.move_id,
            blockers: refusal.blockers,
        };
        let mut answer = (refusal.status, axum::Json(problem)).into_response();
        answer
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        answer.headers_mut().extend(refusal.headers);
        answer
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut answer = self.0.status.into_response();
        answer.extensions_mut().insert(self);
        answer
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        let mut refused = Self::new(error.code, error.detail);
        refused.0.errors = error.errors;
        refused
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        if error.code == codes::KEY_REUSED.code {
            return Self::new(&codes::KEY_REUSED, error.message); // the same, whoever remembers the key
        }
        let passes = codes::PASSING.contains(&error.code);
        let (status, kind, title, retryable) = match error.kind {
            ErrorKind::Invalid => (
                StatusCode::UNPROCESSABLE_ENTITY,
                ProblemKind::Invalid,
                "The request cannot be carried out",
                false,
            ),
            ErrorKind::NotFound => (StatusCode::NOT_FOUND, ProblemKind::NotFound, "It is not there", false),
            ErrorKind::Conflict => {
                (StatusCode::CONFLICT, ProblemKind::Conflict, "Something is in the way", passes)
            }
            ErrorKind::Unreachable => {
                (StatusCode::BAD_GATEWAY, ProblemKind::Unreachable, "A machine does not answer", true)
            }
            ErrorKind::Blocked => {
                (StatusCode::UNPROCESSABLE_ENTITY, ProblemKind::Blocked, "The plan is blocked", false)
            }
            ErrorKind::Failed => {
                (StatusCode::INTERNAL_SERVER_ERROR, ProblemKind::Failed, "It was tried and failed", passes)
            }
            ErrorKind::Internal => {
                (StatusCode::INTERNAL_SERVER_ERROR, ProblemKind::Internal, "The server is in trouble", true)
            }
        };
        Self(Box::new(Refusal {
            code: error.code.to_owned(),
            status,
            kind,
            title,
            detail: error.message,
            hint: error.hint,
            retryable,
            errors: Vec::new(),
            move_id: error.rollout.map(|id| id.to_string()),
            blockers: error.findings.iter().map(Into::into).collect(),
            headers: Vec::new(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_refusal_of_the_engine_has_its_own_kind_on_the_wire() {
        let told = |kind| {
            let error = ApiError::from(EngineError::new(kind, "a.b", "what", "do"));
            (error.0.status.as_u16(), error.0.kind)
        };
        assert_eq!(told(ErrorKind::Invalid), (422, ProblemKind::Invalid));
        assert_eq!(told(ErrorKind::NotFound), (404, ProblemKind::NotFound));
        assert_eq!(told(ErrorKind::Conflict), (409, ProblemKind::Conflict));
        assert_eq!(told(ErrorKind::Unreachable), (502, ProblemKind::Unreachable));
        assert_eq!(told(ErrorKind::Blocked), (422, ProblemKind::Blocked));
        assert_eq!(told(ErrorKind::Failed), (500, ProblemKind::Failed));
        assert_eq!(told(ErrorKind::Internal), (500, ProblemKind::Internal));
    }

    #[test]
    fn only_what_passes_is_worth_another_try() {
        let told = |kind, code| ApiError::from(EngineError::new(kind, code, "what", "do")).is_retryable();
        assert!(told(ErrorKind::Conflict, "move.in_progress"));
        assert!(!told(ErrorKind::Conflict, "move.ended"));
        assert!(told(ErrorKind::Failed, "cleanup.incomplete"));
        assert!(!told(ErrorKind::Failed, "image.missing"));
    }

    #[test]
    fn a_conflict_names_the_move_that_is_in_the_way() {
        let mut error = EngineError::new(ErrorKind::Conflict, "move.in_progress", "busy", "wait");
        error.rollout = Some(peregrine_engine::model::RolloutId("mov_1".into()));
        assert_eq!(ApiError::from(error).0.move_id.as_deref(), Some("mov_1"));
    }
}
