//! The last table on an edge's disk, and the one before it.
//!
//! ```text
//!   write table.new, flush ─► keep table as table.before ─► rename table.new to table ─► flush the folder
//! ```
//!
//! A file that is torn or damaged in any way is noticed (length and SHA-256) and the one before it is used. An edge
//! that finds files and none of them whole has no table: it does not take that for an empty one.

use std::io;
use std::path::{Path, PathBuf};

use peregrine_routing::ServiceSpec;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::files;
use crate::wire::{self, WireService};

const FILE: &str = "table";
const FILE_BEFORE: &str = "table.before";
/// Names the form of what follows.
const MAGIC: &[u8; 16] = b"peregrine table\x01";
const CHECKSUM_BYTES: usize = 32;
/// A table of a million services is a fifth of it.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A table that was saved.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedTable {
    /// Epoch of the engine that it is from.
    pub epoch: u64,
    /// Its services.
    pub services: Vec<ServiceSpec>,
}

/// What was found on the disk.
#[derive(Debug, PartialEq)]
pub enum Saved {
    /// Nothing: this edge has never had a table.
    Never,
    /// The last table.
    Last(SavedTable),
    /// The table before it, and what is wrong with the last one.
    Before(SavedTable, String),
    /// There are files, and none can be used. The reasons.
    Damaged(String),
}

/// Why a table could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// The disk.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is beyond the limit.
    #[error("the table has {0} bytes, the limit is {MAX_FILE_BYTES}")]
    TooLarge(u64),
}

#[derive(Serialize, Deserialize)]
struct Content {
    wire_version: u16,
    epoch: u64,
    services: Vec<WireService>,
}

/// Reads what is there.
pub(crate) fn load(folder: &Path) -> Saved {
    match read(&folder.join(FILE)) {
        Ok(Some(table)) => Saved::Last(table),
        last => match (last, read(&folder.join(FILE_BEFORE))) {
            (Ok(None), Ok(None)) => Saved::Never,
            (Ok(None), Ok(Some(table))) => Saved::Before(table, format!("{FILE} is not there")),
            (Err(why), Ok(Some(table))) => Saved::Before(table, format!("{FILE}: {why}")),
            (Err(why), Ok(None)) => Saved::Damaged(format!("{FILE}: {why}")),
            (Ok(None), Err(why)) => Saved::Damaged(format!("{FILE_BEFORE}: {why}")),
            (Err(why), Err(before)) => Saved::Damaged(format!("{FILE}: {why}; {FILE_BEFORE}: {before}")),
            (Ok(Some(_)), _) => unreachable!("matched above"),
        },
    }
}

/// Saves a table; the one that was there is kept as the one before, unless it is damaged.
pub(crate) fn save(folder: &Path, epoch: u64, services: Vec<WireService>) -> Result<(), SavedError> {
    let content = Content { wire_version: wire::VERSION, epoch, services };
    let bytes = encode(&content);
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(SavedError::TooLarge(bytes.len() as u64));
    }
    let path = folder.join(FILE);
    // A damaged file must not take the place of the good one before it.
    let keep = read(&path).is_ok();
    let written = if keep {
        files::write_keeping(&path, &folder.join(FILE_BEFORE), &bytes)
    } else {
        files::write_whole(&path, &bytes)
    };
    written.map_err(|source| SavedError::Io { path, source })
}

fn encode(content: &Content) -> Vec<u8> {
    let payload = postcard::to_stdvec(content).expect("plain data can be written");
    let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + payload.len() + CHECKSUM_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&payload);
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum);
    bytes
}

fn read(path: &Path) -> Result<Option<SavedTable>, String> {
    let bytes = files::read_bounded(path, MAX_FILE_BYTES).map_err(|error| error.to_string())?;
    bytes.map(|bytes| decode(&bytes)).transpose()
}

fn decode(bytes: &[u8]) -> Result<SavedTable, String> {
    let head = MAGIC.len() + 8;
    if bytes.len() < head + CHECKSUM_BYTES {
        return Err("it ends too early".into());
    }
    let (signed, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    if Sha256::digest(signed)[..] != *checksum {
        return Err("its checksum is wrong".into());
    }
    let (magic, rest) = signed.split_at(MAGIC.len());
    let (length, payload) = rest.split_at(8);
    if magic != MAGIC || length != (payload.len() as u64).to_le_bytes() {
        return Err("it is no table of this version".into());
    }
    let content: Content = postcard::from_bytes(payload).map_err(|error| error.to_string())?;
    if content.wire_version != wire::VERSION {
        return Err(format!("it is of version {} of the link", content.wire_version));
    }
    let services = content.services.into_iter().map(|service| {
        let mut service = ServiceSpec::try_from(service).map_err(|error| error.to_string())?;
        // Copies are made for an engine that looks at them: from the disk comes what clients need.
        service.policy.mirror = None;
        Ok::<_, String>(service)
    });
    Ok(SavedTable { epoch: content.epoch, services: services.collect::<Result<_, _>>()? })
}

#[cfg(test)]
mod tests {
    use peregrine_routing::{Balance, ServicePolicy};

    use super::*;
    use crate::wire::spec_tests::service;

    fn services(count: usize) -> Vec<ServiceSpec> {
        let one = |n: usize| service(&format!("shop-{n}"), Balance::default(), ServicePolicy::default());
        (0..count).map(one).collect()
    }

    fn put(folder: &Path, epoch: u64, count: usize) {
        let services = services(count).iter().map(WireService::from).collect();
        save(folder, epoch, services).expect("it is saved");
    }

    #[test]
    fn the_last_table_and_the_one_before_it_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(load(folder.path()), Saved::Never);
        for epoch in 1..=3 {
            put(folder.path(), epoch, epoch as usize);
            let table = SavedTable { epoch, services: services(epoch as usize) };
            assert_eq!(load(folder.path()), Saved::Last(table));
        }
        std::fs::remove_file(folder.path().join(FILE)).expect("it is there");
        let Saved::Before(table, _) = load(folder.path()) else { panic!("the one before") };
        assert_eq!(table, SavedTable { epoch: 2, services: services(2) });
    }

    #[test]
    fn a_table_from_the_disk_mirrors_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut mirroring = services(1);
        mirroring[0].policy.mirror = Some(Box::new(wire::mirror_tests::spec()));
        save(folder.path(), 1, mirroring.iter().map(WireService::from).collect()).expect("it is saved");
        assert_eq!(load(folder.path()), Saved::Last(SavedTable { epoch: 1, services: services(1) }));
    }

    #[test]
    fn a_file_that_is_cut_at_any_byte_gives_way_to_the_one_before_it() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), 1, 1);
        put(folder.path(), 2, 2);
        let whole = std::fs::read(folder.path().join(FILE)).expect("it is there");
        for length in 0..whole.len() {
            std::fs::write(folder.path().join(FILE), &whole[..length]).expect("it is cut");
            let Saved::Before(table, _) = load(folder.path()) else { panic!("cut at {length}") };
            assert_eq!(table, SavedTable { epoch: 1, services: services(1) }, "cut at {length}");
        }
        // What is saved next does not put the damaged one in the place of the good one.
        put(folder.path(), 3, 3);
        std::fs::write(folder.path().join(FILE), &whole[..7]).expect("it is cut");
        let Saved::Before(table, _) = load(folder.path()) else { panic!("cut again") };
        assert_eq!(table.epoch, 1);
    }

    #[test]
    fn a_file_with_any_bit_flipped_gives_way_to_the_one_before_it() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), 1, 1);
        put(folder.path(), 2, 1);
        let whole = std::fs::read(folder.path().join(FILE)).expect("it is there");
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(folder.path().join(FILE), &bytes).expect("it is damaged");
            assert!(matches!(load(folder.path()), Saved::Before(table, _) if table.epoch == 1), "byte {at}");
        }
    }

    #[test]
    fn two_damaged_files_are_not_an_empty_table() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), 1, 1);
        std::fs::write(folder.path().join(FILE), b"").expect("it is emptied");
        assert!(matches!(load(folder.path()), Saved::Damaged(_)));
        std::fs::write(folder.path().join(FILE_BEFORE), b"x").expect("it is damaged");
        assert!(matches!(load(folder.path()), Saved::Damaged(_)));
    }
}
