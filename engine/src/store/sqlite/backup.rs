//! A copy of the database while it is being written, and whether a database file is sound.

use std::path::Path;
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags};

use super::fault::{damaged, store_error};
use super::{reader, schema};
use crate::store::{Revision, StoreError};

/// Writes a consistent copy of the store in `dir` to `to`, which must not be there (or be empty). The process
/// that serves from the store goes on meanwhile: the copy is of one revision.
pub(crate) fn copy(dir: &Path, to: &Path) -> Result<(), StoreError> {
    let failed = |e: rusqlite::Error| store_error(&Arc::new(e));
    let connection = schema::connect(&dir.join(schema::FILE))?;
    let to = to.to_str().ok_or_else(|| StoreError::Io("the name of the file is not UTF-8".into()))?;
    connection.execute("VACUUM INTO ?1", [to]).map_err(failed)?;
    Ok(())
}

/// Looks at every page, every index and every value of a database file; changes nothing. Its revision, and how
/// many entries it has.
pub(crate) fn check(file: &Path) -> Result<(Revision, usize), StoreError> {
    let failed = |e: rusqlite::Error| store_error(&Arc::new(e));
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(file, flags).map_err(failed)?;
    schema::recognize(&connection)?;
    let verdict: String =
        connection.query_row("PRAGMA integrity_check(1)", (), |r| r.get(0)).map_err(failed)?;
    if verdict != "ok" {
        return Err(damaged(verdict));
    }
    let survey = reader::survey(&mut connection, "", &reader::Part::ALL)?;
    if let Some((_, why)) = survey.unsound.first() {
        return Err(damaged(why));
    }
    let (mut after, _) = reader::span(&connection).map_err(failed)?;
    while after < survey.revision {
        after = reader::page(&mut connection, after)?.last().map_or(survey.revision, |last| last.revision);
    }
    Ok((survey.revision, survey.entries.len()))
}
