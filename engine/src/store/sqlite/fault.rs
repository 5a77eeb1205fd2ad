//! What SQLite says, in the store's words.

use std::path::Path;
use std::sync::Arc;

use rusqlite::ErrorCode;

use crate::store::StoreError;

/// What to do about damage, wherever it is found.
const AFTER_DAMAGE: &str = "stop peregrine, keep a copy of the data folder, and restore a backup of it";

/// SQLite's error as the store's. It is shared: one failed transaction answers every batch in it.
pub(super) fn store_error(error: &Arc<rusqlite::Error>) -> StoreError {
    let source = || Box::new(Arc::clone(error)) as Box<dyn std::error::Error + Send + Sync>;
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full(source()),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => damaged(error),
        Some(ErrorCode::ConstraintViolation) => StoreError::Conflict(error.to_string()),
        Some(ErrorCode::TooBig) => StoreError::TooLarge(error.to_string()),
        _ => StoreError::Io(source()),
    }
}

/// Whether writing to the file failed, so that nobody knows what is on the disk.
pub(super) fn is_io_failure(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::SystemIoFailure)
}

/// Damage, with what to do.
pub(super) fn damaged(what: impl std::fmt::Display) -> StoreError {
    StoreError::Corrupt(format!("{what}; {AFTER_DAMAGE}"))
}

/// A file or folder that cannot be used.
pub(super) fn file_error(what: &str, path: &Path, error: &std::io::Error) -> StoreError {
    let text = format!("{what} {}: {error}", path.display());
    if error.kind() == std::io::ErrorKind::StorageFull {
        return StoreError::Full(text.into());
    }
    StoreError::Io(text.into())
}

/// The threads of the store are gone: it was closed, or one of them panicked.
pub(super) fn closed() -> StoreError {
    StoreError::Io("the store is closed".into())
}
