//! The file: where it is, who may read it, what is in it, and whether it is sound.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::fault::{damaged, file_error, store_error};
use super::leader::{self, Leader};
use crate::store::StoreError;

/// Name of the database in the data folder.
pub(crate) const FILE: &str = "store.db";
/// Name of the file that is locked while a process has the store open.
pub(crate) const LOCK_FILE: &str = "store.lock";
/// `PRAGMA application_id`: "PRGN".
const APPLICATION_ID: i64 = 0x5052_474E;
/// `PRAGMA user_version` of [`SCHEMA`].
const SCHEMA_VERSION: i64 = 1;
/// Only another program (such as the `sqlite3` shell) can make us wait: we have one writer.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// A store that is larger is served from before all of it was looked at: that takes a second for each so many bytes, longer from a
/// slow disk, and what is read is checked anyway.
const MAX_CHECKED_FIRST_BYTES: i64 = if cfg!(test) { 4 << 20 } else { 256 << 20 };
/// The write-ahead log is cut back to this after a checkpoint.
const WAL_SIZE_LIMIT_BYTES: i64 = 16 << 20;

const SCHEMA: &str = "
    CREATE TABLE entry (
        key      TEXT PRIMARY KEY NOT NULL,
        value    BLOB NOT NULL,
        revision INTEGER NOT NULL,
        checksum BLOB NOT NULL
    ) STRICT;
    CREATE TABLE log (
        revision INTEGER PRIMARY KEY,
        record   BLOB NOT NULL
    ) STRICT;
    CREATE TABLE lease (
        name       TEXT PRIMARY KEY NOT NULL,
        holder     TEXT NOT NULL,
        token      INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT;
";

/// Takes the data folder for this process. The kernel gives the lock back however the process ends.
pub(crate) fn lock(dir: &Path) -> Result<File, StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| file_error("cannot create the data folder", dir, &e))?;
    let path = dir.join(LOCK_FILE);
    let file = private_file(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked),
        Err(TryLockError::Error(e)) => Err(file_error("cannot lock", &path, &e)),
    }
}

/// Opens the database for the writer, makes it if there is none, and looks whether it is sound.
pub(super) fn open_writer(dir: &Path) -> Result<Connection, StoreError> {
    let path = dir.join(FILE);
    drop(private_file(&path)?); // SQLite gives its other files the mode of this one
    let connection = connect(&path)?;
    (|| {
        let mode: String = connection.pragma_update_and_check(None, "journal_mode", "wal", |r| r.get(0))?;
        connection.pragma_update(None, "journal_size_limit", WAL_SIZE_LIMIT_BYTES)?;
        Ok(mode)
    })()
    .map_err(|e: rusqlite::Error| store_error(&Arc::new(e)))
    .and_then(|mode| match mode.as_str() {
        "wal" => Ok(()),
        _ => Err(StoreError::Io(
            format!("{}: the file system allows no write-ahead log", path.display()).into(),
        )),
    })?;
    check(&connection)?;
    Ok(connection)
}

/// Who leads, looked at from outside; `None` before there is a store.
pub(super) fn leader(dir: &Path) -> Result<Option<Leader>, StoreError> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let connection = open_reader(dir)?;
    leader::present(&connection).map_err(|e| store_error(&Arc::new(e)))
}

/// Opens the database once more, for reading only.
pub(super) fn open_reader(dir: &Path) -> Result<Connection, StoreError> {
    let connection = connect(&dir.join(FILE))?;
    connection.pragma_update(None, "query_only", true).map_err(|e| store_error(&Arc::new(e)))?;
    Ok(connection)
}

pub(super) fn connect(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || {
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "synchronous", "full")?; // durable when acknowledged, even if the power goes
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        Ok(connection)
    };
    open().map_err(|e: rusqlite::Error| store_error(&Arc::new(e)))
}

fn check(connection: &Connection) -> Result<(), StoreError> {
    let failed = |e: rusqlite::Error| store_error(&Arc::new(e));
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", (), |r| r.get(0)).map_err(failed)?;
    if tables == 0 {
        return create(connection).map_err(failed);
    }
    recognize(connection)?;
    if is_large(connection)? { Ok(()) } else { check_pages(connection) }
}

/// Whether the store is looked at while it is in use.
pub(super) fn is_large(connection: &Connection) -> Result<bool, StoreError> {
    let bytes = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size";
    let bytes: i64 = connection.query_row(bytes, (), |r| r.get(0)).map_err(|e| store_error(&Arc::new(e)))?;
    Ok(bytes > MAX_CHECKED_FIRST_BYTES)
}

/// Looks at every page of the database.
pub(super) fn check_pages(connection: &Connection) -> Result<(), StoreError> {
    let verdict: String = connection
        .query_row("PRAGMA quick_check(1)", (), |r| r.get(0))
        .map_err(|e| store_error(&Arc::new(e)))?;
    if verdict != "ok" {
        return Err(damaged(format_args!("{FILE}: {verdict}")));
    }
    Ok(())
}

/// Whether the database is a store of ours, in a form that this version knows.
pub(super) fn recognize(connection: &Connection) -> Result<(), StoreError> {
    let number = |name: &str| {
        connection
            .pragma_query_value(None, name, |r| r.get::<_, i64>(0))
            .map_err(|e| store_error(&Arc::new(e)))
    };
    if number("application_id")? != APPLICATION_ID {
        return Err(damaged(format_args!("{FILE} is a database of another program")));
    }
    let found = number("user_version")?;
    if found != SCHEMA_VERSION {
        return Err(StoreError::Newer { found, known: SCHEMA_VERSION });
    }
    Ok(())
}

fn create(connection: &Connection) -> Result<(), rusqlite::Error> {
    let transaction = connection.unchecked_transaction()?;
    transaction.execute_batch(SCHEMA)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}

fn private_file(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| file_error("cannot open", path, &e))
}
