//! What an engine's refusals mean.

use bollard::errors::Error;

use crate::runtime::RuntimeError;

/// What a failed call says of the engine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The thing is not there (404).
    Missing,
    /// Something else is in the way, at least now (409).
    Conflict,
    /// The engine understood and refused.
    Refused,
    /// No answer: it may have been done or not.
    Unknown,
}

/// Sorts an error.
pub(super) const fn verdict(error: &Error) -> Verdict {
    match error {
        Error::DockerResponseServerError { status_code, .. } => match status_code {
            404 => Verdict::Missing,
            409 => Verdict::Conflict,
            502..=504 => Verdict::Unknown, // something between us and the engine
            _ => Verdict::Refused,
        },
        Error::DockerStreamError { .. } => Verdict::Refused,
        _ => Verdict::Unknown,
    }
}

/// The error for the caller, when there is nothing special to say.
pub(super) fn translate(machine: &str, error: &Error) -> RuntimeError {
    let machine = machine.to_owned();
    match (verdict(error), error) {
        (Verdict::Unknown, _) => RuntimeError::Unreachable { machine, detail: words(error) },
        (_, Error::DockerResponseServerError { status_code: 400..=499, .. }) => {
            RuntimeError::Refused { machine, detail: words(error) }
        }
        _ => RuntimeError::Other { machine, detail: words(error) },
    }
}

/// What the engine said, without the client's wrapping; for a broken connection, every cause in turn.
pub(super) fn words(error: &Error) -> String {
    match error {
        Error::DockerResponseServerError { message, .. } if !message.trim().is_empty() => {
            message.trim().to_owned()
        }
        Error::DockerStreamError { error } => error.trim().to_owned(),
        Error::RequestTimeoutError => "no answer in time".to_owned(),
        error => chain(error),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}
