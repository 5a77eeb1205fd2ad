//! Who leads: one process at a time writes, and each that takes over does so under a higher epoch.
//!
//! ```text
//!   free (the kernel's lock)  ──────────────────────────────► take: epoch + 1
//!   held, renewed             ──► wait
//!   held, not renewed for the whole patience of who waits ──► take: epoch + 1; the other one is fenced
//! ```
//!
//! The epoch is checked inside every transaction, so that a process that was paused and goes on writes nothing: it is
//! told so, and leaves a note for the one that leads. How long nothing was renewed is measured by who waits, on a
//! monotonic clock: no jump of the wall clock makes a leader.

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

/// Name of the lease whose token is the epoch.
const LEADER: &str = "engine";
/// What the names of notes of refused writes begin with; the epoch follows.
const REFUSED: &str = "engine/refused/";

/// Writes of a process that was replaced, which were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedWrites {
    /// Its epoch.
    pub epoch: u64,
    /// How many batches it tried to write; 0 if it only tried to show that it leads.
    pub batches: u64,
}

/// The lease of who leads, as it is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    holder: String,
    epoch: u64,
    renewed: u64,
}

impl Leader {
    pub(super) const fn epoch(&self) -> u64 {
        self.epoch
    }
}

/// The present leader; `None` if there never was one.
pub(super) fn present(connection: &Connection) -> Result<Option<Leader>, rusqlite::Error> {
    connection
        .prepare_cached("SELECT holder, token, expires_at FROM lease WHERE name = ?1")?
        .query_row([LEADER], |row| {
            Ok(Leader {
                holder: row.get(0)?,
                epoch: row.get::<_, i64>(1)?.cast_unsigned(),
                renewed: row.get::<_, i64>(2)?.cast_unsigned(),
            })
        })
        .optional()
}

/// Takes the lead from `seen`; the new epoch, or `None` if somebody else has the lead or has renewed it meanwhile.
pub(super) fn take(
    connection: &mut Connection,
    holder: &str,
    seen: Option<&Leader>,
) -> Result<Option<u64>, rusqlite::Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let before = present(&transaction)?;
    if before.as_ref() != seen {
        return Ok(None);
    }
    let epoch = before.map_or(0, |leader| leader.epoch) + 1;
    put(&transaction, LEADER, holder, epoch)?;
    transaction.commit()?;
    Ok(Some(epoch))
}

/// Leaves epochs out, for those that somebody may have seen already.
pub(super) fn skip(connection: &Connection, count: u64) -> Result<(), rusqlite::Error> {
    let (holder, epoch) =
        present(connection)?.map_or((String::new(), 0), |leader| (leader.holder, leader.epoch));
    put(connection, LEADER, &holder, epoch + count)
}

/// Shows that the leader lives.
pub(super) fn renew(connection: &Connection, holder: &str, epoch: u64) -> Result<(), rusqlite::Error> {
    // Any change will do: who stands by compares, and measures the time itself.
    connection
        .prepare_cached(
            "UPDATE lease SET expires_at = expires_at + 1 WHERE name = ?1 AND holder = ?2 AND token = ?3",
        )?
        .execute(params![LEADER, holder, epoch.cast_signed()])?;
    Ok(())
}

/// The epoch of who leads, if it is not `epoch`.
pub(super) fn overtaken(connection: &Connection, epoch: u64) -> Result<Option<u64>, rusqlite::Error> {
    Ok(present(connection)?.map(|leader| leader.epoch).filter(|theirs| *theirs != epoch))
}

/// Leaves a note of writes that were refused.
pub(super) fn note(connection: &Connection, epoch: u64, batches: usize) -> Result<(), rusqlite::Error> {
    let name = format!("{REFUSED}{epoch}");
    let before: Option<i64> = connection
        .prepare_cached("SELECT token FROM lease WHERE name = ?1")?
        .query_row([&name], |row| row.get(0))
        .optional()?;
    put(connection, &name, "", before.unwrap_or(0).cast_unsigned() + batches as u64)
}

/// The notes of refused writes.
pub(super) fn notes(connection: &Connection) -> Result<Vec<RefusedWrites>, rusqlite::Error> {
    let mut statement = connection.prepare_cached("SELECT name, token FROM lease WHERE name GLOB ?1")?;
    let notes = statement.query_map([format!("{REFUSED}*")], |row| {
        let name: String = row.get(0)?;
        let epoch = name.strip_prefix(REFUSED).and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
        Ok(RefusedWrites { epoch, batches: row.get::<_, i64>(1)?.cast_unsigned() })
    })?;
    notes.collect()
}

/// Forgets a note that was told. What was refused since it was read stays noted.
pub(super) fn forget(connection: &Connection, told: &RefusedWrites) -> Result<(), rusqlite::Error> {
    let (name, batches) = (format!("{REFUSED}{}", told.epoch), told.batches.cast_signed());
    connection
        .prepare_cached("DELETE FROM lease WHERE name = ?1 AND token <= ?2")?
        .execute(params![name, batches])?;
    connection
        .prepare_cached("UPDATE lease SET token = token - ?2 WHERE name = ?1")?
        .execute(params![name, batches])?;
    Ok(())
}

fn put(connection: &Connection, name: &str, holder: &str, token: u64) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("REPLACE INTO lease (name, holder, token, expires_at) VALUES (?1, ?2, ?3, 0)")?
        .execute(params![name, holder, token.cast_signed()])?;
    Ok(())
}
