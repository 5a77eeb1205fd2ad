//! The records of edges on the disk: one engine writes them at a time, and one that was replaced writes where nobody looks.
//!
//! ```text
//!   edges/EPOCH/NAME.json    what the engine of that epoch knows of an edge
//!   edges/EPOCH.new/         a copy of the records before, until it is whole
//! ```
//!
//! Each engine that opens them takes a copy of the newest ones under its own epoch, and writes that copy alone. A record
//! that was removed is therefore gone for every engine of a higher epoch, whatever one that stood still meanwhile writes
//! down when it goes on: it needs no lock that a process could hold while it is stopped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::files;
use crate::registry::{EdgeRecord, MAX_FILE_BYTES, RegistryError, read_json, write_json};

/// Below the folder of the link.
pub(crate) const FOLDER: &str = "edges";

#[derive(Clone, Debug)]
pub(crate) struct Records {
    /// With a folder for each epoch.
    folder: PathBuf,
    epoch: u64,
}

impl Records {
    /// Takes up the newest records under this epoch.
    pub(crate) fn open(folder: PathBuf, epoch: u64) -> Result<Self, RegistryError> {
        files::private_folder(&folder)
            .map_err(|source| RegistryError::Io { path: folder.clone(), source })?;
        let records = Self { folder, epoch };
        records.take_up().map_err(|source| match source {
            TakeUpError::Replaced(theirs) => RegistryError::Replaced { ours: epoch, theirs },
            TakeUpError::Io(source) => RegistryError::Io { path: records.folder.clone(), source },
        })?;
        Ok(records)
    }

    /// Every edge, by name. A file that cannot be read is told and left out: it shuts out its edge and no other.
    pub(crate) fn all(&self) -> Result<Vec<(String, EdgeRecord)>, RegistryError> {
        let folder = self.of(self.epoch);
        let paths = files_in(&folder).map_err(|source| RegistryError::Io { path: folder, source })?;
        let mut edges = Vec::new();
        for path in paths {
            let Some(name) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".json")) else {
                continue;
            };
            match read_json(&path) {
                Ok(Some(record)) => edges.push((name.to_owned(), record)),
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the record of an edge cannot be read: it is shut out"),
            }
        }
        edges.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(edges)
    }

    pub(crate) fn put(&self, name: &str, record: &EdgeRecord) -> Result<(), RegistryError> {
        self.is_ours()?;
        write_json(&self.path(name), record)?;
        // What was written while another one took the records up is not in its copy.
        self.is_ours()
    }

    pub(crate) fn remove(&self, name: &str) -> Result<(), RegistryError> {
        self.is_ours()?;
        let path = self.path(name);
        match fs::remove_file(&path).and_then(|()| files::flush_folder(&path)) {
            Ok(()) => self.is_ours(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(RegistryError::Unknown(name.to_owned()))
            }
            Err(source) => Err(RegistryError::Io { path, source }),
        }
    }

    /// Says so when an engine of a higher epoch has taken the records up: what is written here counts no more.
    pub(crate) fn is_ours(&self) -> Result<(), RegistryError> {
        let newest =
            self.newest().map_err(|source| RegistryError::Io { path: self.folder.clone(), source })?;
        match newest.filter(|newest| *newest > self.epoch) {
            Some(theirs) => Err(RegistryError::Replaced { ours: self.epoch, theirs }),
            None => Ok(()),
        }
    }

    fn take_up(&self) -> Result<(), TakeUpError> {
        let mut is_whole = true;
        loop {
            let before = self.newest()?;
            match before {
                Some(theirs) if theirs > self.epoch => return Err(TakeUpError::Replaced(theirs)),
                Some(ours) if ours == self.epoch => break,
                _ => {}
            }
            let copy = self.folder.join(format!("{}.new", self.epoch));
            remove_folder(&copy)?; // of an engine that ended in the middle of it
            files::private_folder(&copy)?;
            // Before there were epochs the records lay beside their folders.
            let newest = before.map_or_else(|| self.folder.clone(), |epoch| self.of(epoch));
            is_whole = match copy_records(&newest, &copy) {
                Ok(is_whole) => is_whole,
                // Another one has taken them up and away meanwhile.
                Err(_) if self.newest()? != before => continue,
                Err(error) => return Err(error.into()),
            };
            // Another one takes them away only after it has a copy of its own: if there is none, this one is whole.
            if self.newest()? != before {
                continue;
            }
            let own = self.of(self.epoch);
            fs::rename(&copy, &own)?;
            files::flush_folder(&own)?;
            break;
        }
        if !is_whole {
            return Ok(());
        }
        if let Err(error) = self.remove_older() {
            tracing::debug!(%error, "records of edges of an engine before stay; nobody reads them");
        }
        Ok(())
    }

    fn remove_older(&self) -> io::Result<()> {
        for epoch in self.epochs()?.into_iter().filter(|epoch| *epoch < self.epoch) {
            remove_folder(&self.of(epoch))?;
        }
        // Copies that were never finished.
        for path in
            files_in(&self.folder)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "new"))
        {
            let epoch = path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
            if epoch.is_some_and(|epoch| epoch < self.epoch) {
                remove_folder(&path)?;
            }
        }
        files_in(&self.folder)?.into_iter().filter(|path| is_record(path)).try_for_each(fs::remove_file)
    }

    fn newest(&self) -> io::Result<Option<u64>> {
        Ok(self.epochs()?.into_iter().max())
    }

    fn epochs(&self) -> io::Result<Vec<u64>> {
        epochs_in(&self.folder)
    }

    fn of(&self, epoch: u64) -> PathBuf {
        self.folder.join(epoch.to_string())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.of(self.epoch).join(format!("{name}.json"))
    }
}

/// The epoch of the newest engine that has taken up the records of edges in the folder of a link; `None` if there was none.
#[must_use]
pub fn newest_epoch(folder: &Path) -> Option<u64> {
    epochs_in(&folder.join(FOLDER)).ok()?.into_iter().max()
}

fn epochs_in(folder: &Path) -> io::Result<Vec<u64>> {
    let entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

enum TakeUpError {
    /// An engine of this epoch has them.
    Replaced(u64),
    Io(io::Error),
}

impl From<io::Error> for TakeUpError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn is_record(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json") && path.is_file()
}

fn files_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}

/// As they are: what is in them shuts out its edge and no other. One that cannot even be read is left where it is, for whoever
/// mends it; false then.
fn copy_records(from: &Path, to: &Path) -> io::Result<bool> {
    let mut is_whole = true;
    for path in files_in(from)?.into_iter().filter(|path| is_record(path)) {
        let Some(name) = path.file_name() else { continue };
        match files::read_bounded(&path, MAX_FILE_BYTES) {
            Ok(Some(bytes)) => files::write_flushed(&to.join(name), &bytes)?,
            Ok(None) => {}
            Err(error) => {
                is_whole = false;
                let path = path.display();
                tracing::error!(%path, %error, "the record of an edge cannot be read: the edge is shut out");
            }
        }
    }
    files::flush_folder(&to.join("any"))?;
    Ok(is_whole)
}

fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(incarnation: u64) -> EdgeRecord {
        EdgeRecord {
            fingerprint: "ab".repeat(32),
            joined_at: 1,
            incarnation: Some(incarnation),
            beside: Vec::new(),
            cores: 2,
            seen_at: 3,
            away: false,
        }
    }

    fn named(name: &str, incarnation: u64) -> (String, EdgeRecord) {
        (name.to_owned(), record(incarnation))
    }

    fn open(folder: &Path, epoch: u64) -> Records {
        Records::open(folder.to_owned(), epoch).expect("records")
    }

    fn replaced(result: &Result<(), RegistryError>) -> bool {
        matches!(result, Err(RegistryError::Replaced { ours, theirs }) if ours < theirs)
    }

    #[test]
    fn what_an_engine_that_was_replaced_writes_is_seen_by_nobody() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = open(folder.path(), 4);
        first.put("gone", &record(1)).expect("written");
        first.put("stays", &record(2)).expect("written");
        let second = open(folder.path(), 6);
        second.remove("gone").expect("it is there");
        second.put("stays", &record(3)).expect("written");
        assert!(replaced(&first.put("gone", &record(1))));
        assert!(replaced(&first.put("stays", &record(2))));
        assert!(replaced(&first.remove("stays")));
        assert_eq!(second.all().expect("records"), [named("stays", 3)]);
        assert_eq!(open(folder.path(), 7).all().expect("records"), [named("stays", 3)]);
    }

    #[test]
    fn a_write_that_was_under_way_when_the_engine_was_replaced_is_seen_by_nobody() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = open(folder.path(), 4);
        first.put("gone", &record(1)).expect("written");
        // It stands still behind its look at who leads: its folder is there again when it writes.
        let late = first.path("gone");
        let second = open(folder.path(), 6);
        second.remove("gone").expect("it is there");
        files::private_folder(late.parent().expect("a folder")).expect("made");
        write_json(&late, &record(1)).expect("written");
        assert_eq!(open(folder.path(), 7).all().expect("records"), []);
    }

    #[test]
    fn an_engine_of_a_lower_epoch_takes_nothing_up() {
        let folder = tempfile::tempdir().expect("a folder");
        open(folder.path(), 6).put("edge", &record(1)).expect("written");
        let older = Records::open(folder.path().to_owned(), 5);
        assert!(matches!(older, Err(RegistryError::Replaced { ours: 5, theirs: 6 })), "{older:?}");
        assert_eq!(open(folder.path(), 6).all().expect("records"), [named("edge", 1)]);
    }

    #[test]
    fn a_copy_that_broke_off_is_made_anew_and_older_ones_go() {
        let folder = tempfile::tempdir().expect("a folder");
        open(folder.path(), 1).put("edge", &record(1)).expect("written");
        let torn = folder.path().join("2.new");
        fs::create_dir(&torn).expect("made");
        fs::write(torn.join("other.json"), "{").expect("written");
        let second = open(folder.path(), 2);
        assert_eq!(second.all().expect("records"), [named("edge", 1)]);
        let left = files_in(folder.path()).expect("a list");
        assert_eq!(left, [folder.path().join("2")]);
    }

    #[test]
    fn records_beside_the_folders_are_those_of_before() {
        let folder = tempfile::tempdir().expect("a folder");
        write_json(&folder.path().join("edge.json"), &record(1)).expect("written");
        fs::write(folder.path().join("damaged.json"), "{").expect("written");
        let first = open(folder.path(), 3);
        assert_eq!(first.all().expect("records"), [named("edge", 1)]);
        let damaged = folder.path().join("3").join("damaged.json");
        assert_eq!(fs::read_to_string(damaged).expect("it is kept"), "{");
        assert_eq!(files_in(folder.path()).expect("a list"), [folder.path().join("3")]);
    }
}
