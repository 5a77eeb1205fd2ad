//! The reader: one thread with a connection of its own, so that reads never queue behind writes.

use std::sync::Arc;

use bytes::Bytes;
use rusqlite::{Connection, Row, Transaction};
use tokio::sync::{mpsc, oneshot};

use super::fault::{damaged, store_error};
use crate::store::record::{self, CHECKSUM_BYTES};
use crate::store::{Committed, Entry, Revision, StoreError, Survey};

/// Most commits that a watch reads from the log at once…
const MAX_PAGE_COMMITS: usize = 256;
/// …and about so many bytes of them.
const MAX_PAGE_BYTES: usize = 4 << 20;

/// A question.
pub(super) enum Query {
    /// Every entry with this prefix.
    Range { prefix: String, reply: oneshot::Sender<Result<(Revision, Vec<Entry>), StoreError>> },
    /// Every entry with this prefix, and which cannot be trusted.
    Survey { prefix: String, part: Part, reply: oneshot::Sender<Result<Survey, StoreError>> },
    /// The next commits after a revision; none if it is the newest.
    Page { after: Revision, reply: oneshot::Sender<Result<Vec<Committed>, StoreError>> },
}

/// Which entries of a prefix.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Keys before this one are left out.
    pub(super) from: String,
    /// So many at most.
    pub(super) max: usize,
    /// Keys that begin so are left out, and not read.
    pub(super) without: Option<String>,
}

impl Part {
    /// All of them.
    pub(super) const ALL: Self = Self { from: String::new(), max: usize::MAX, without: None };
}

/// Answers until every asker is gone.
pub(super) fn run(mut connection: Connection, mut queries: mpsc::Receiver<Query>) {
    while let Some(query) = queries.blocking_recv() {
        // Each answer is one read transaction: a snapshot. An asker that is gone wants no answer.
        match query {
            Query::Range { prefix, reply } => drop(reply.send(range(&mut connection, &prefix))),
            Query::Survey { prefix, part, reply } => {
                drop(reply.send(survey(&mut connection, &prefix, &part)));
            }
            Query::Page { after, reply } => drop(reply.send(page(&mut connection, after))),
        }
    }
}

fn range(connection: &mut Connection, prefix: &str) -> Result<(Revision, Vec<Entry>), StoreError> {
    let (newest, rows) = stored(connection, prefix, &Part::ALL)?;
    let entries = rows.into_iter().map(StoredEntry::checked).collect::<Result<_, _>>()?;
    Ok((newest, entries))
}

/// As [`range`], but an entry that cannot be trusted is named and does not hide the others.
pub(super) fn survey(connection: &mut Connection, prefix: &str, part: &Part) -> Result<Survey, StoreError> {
    let (revision, rows) = stored(connection, prefix, part)?;
    let mut survey = Survey { revision, ..Survey::default() };
    for row in rows {
        let key = row.key.clone();
        match row.checked() {
            Ok(entry) => survey.entries.push(entry),
            Err(error) => survey.unsound.push((key, error.to_string())),
        }
    }
    Ok(survey)
}

fn stored(
    connection: &mut Connection,
    prefix: &str,
    part: &Part,
) -> Result<(Revision, Vec<StoredEntry>), StoreError> {
    let mut read = || {
        let snapshot = connection.transaction()?;
        let (_, newest) = span(&snapshot)?;
        Ok((newest, entries(&snapshot, prefix, part)?))
    };
    flatten(read())
}

pub(super) fn page(connection: &mut Connection, after: Revision) -> Result<Vec<Committed>, StoreError> {
    let mut read = || {
        let snapshot = connection.transaction()?;
        let span = span(&snapshot)?;
        let records = if after < span.1 { records(&snapshot, after)? } else { Vec::new() };
        Ok((span, records))
    };
    let ((oldest, newest), records) = flatten(read())?;
    if after < oldest || after > newest {
        return Err(StoreError::Compacted { after, oldest, newest });
    }
    let mut commits = Vec::with_capacity(records.len());
    for (position, (revision, bytes)) in (after + 1..).zip(records) {
        if revision != position {
            return Err(damaged(format_args!("commit {position} is missing from the log")));
        }
        let writes = record::decode(revision, &Bytes::from(bytes))
            .map_err(|e| damaged(format_args!("commit {revision} cannot be read: {e}")))?;
        commits.push(Committed { revision, writes });
    }
    Ok(commits)
}

/// The revision that the log begins after, and its newest one.
pub(super) fn span(connection: &Connection) -> Result<(Revision, Revision), rusqlite::Error> {
    let (first, last): (Option<i64>, Option<i64>) = connection
        .prepare_cached("SELECT (SELECT min(revision) FROM log), (SELECT max(revision) FROM log)")?
        .query_row((), |row| Ok((row.get(0)?, row.get(1)?)))?;
    let revision = |number: i64| u64::try_from(number).unwrap_or(0);
    Ok((first.map_or(0, |first| revision(first).saturating_sub(1)), last.map_or(0, revision)))
}

fn entries(
    snapshot: &Transaction<'_>,
    prefix: &str,
    part: &Part,
) -> Result<Vec<StoredEntry>, rusqlite::Error> {
    let mut statement = snapshot
        .prepare_cached("SELECT key, value, revision, checksum FROM entry WHERE key >= ?1 ORDER BY key")?;
    let mut from = prefix.max(&part.from).to_owned();
    let mut entries = Vec::new();
    'query: loop {
        let mut rows = statement.query([&from])?;
        while entries.len() < part.max {
            let Some(row) = rows.next()? else { break };
            let entry = StoredEntry::from_row(row)?;
            if !entry.key.starts_with(prefix) {
                break; // keys are in order of their bytes: nothing after this one has the prefix
            }
            if let Some(family) = part.without.as_deref().filter(|family| entry.key.starts_with(family)) {
                from = behind(family);
                continue 'query;
            }
            entries.push(entry);
        }
        return Ok(entries);
    }
}

/// A key that no key of a family is behind. Families end with an ASCII character.
fn behind(family: &str) -> String {
    let (before, last) = family.split_at(family.len() - 1);
    let next = last.bytes().next().map_or('\u{0}', |byte| char::from(byte + 1));
    format!("{before}{next}")
}

fn records(snapshot: &Transaction<'_>, after: Revision) -> Result<Vec<(Revision, Vec<u8>)>, rusqlite::Error> {
    let mut statement =
        snapshot.prepare_cached("SELECT revision, record FROM log WHERE revision > ?1 ORDER BY revision")?;
    let mut rows = statement.query([after.cast_signed()])?;
    let (mut records, mut bytes) = (Vec::new(), 0);
    while records.len() < MAX_PAGE_COMMITS && bytes < MAX_PAGE_BYTES {
        let Some(row) = rows.next()? else { break };
        let record: Vec<u8> = row.get(1)?;
        bytes += record.len();
        records.push((row.get::<_, i64>(0)?.cast_unsigned(), record));
    }
    Ok(records)
}

/// A row of the table, not yet checked.
struct StoredEntry {
    key: String,
    value: Vec<u8>,
    revision: Revision,
    checksum: Vec<u8>,
}

impl StoredEntry {
    fn from_row(row: &Row<'_>) -> Result<Self, rusqlite::Error> {
        Ok(Self {
            key: row.get(0)?,
            value: row.get(1)?,
            revision: row.get::<_, i64>(2)?.cast_unsigned(),
            checksum: row.get(3)?,
        })
    }

    fn checked(self) -> Result<Entry, StoreError> {
        let expected: [u8; CHECKSUM_BYTES] = record::entry_checksum(&self.key, self.revision, &self.value);
        if self.checksum != expected {
            return Err(damaged(format_args!("the value of {} has a wrong checksum", self.key)));
        }
        Ok(Entry { key: self.key, value: self.value.into(), revision: self.revision })
    }
}

fn flatten<T>(result: Result<T, rusqlite::Error>) -> Result<T, StoreError> {
    result.map_err(|error| match error {
        // A column that is not of its type, in a STRICT table, or text that is not UTF-8.
        rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..) => {
            damaged(error)
        }
        other => store_error(&Arc::new(other)),
    })
}
