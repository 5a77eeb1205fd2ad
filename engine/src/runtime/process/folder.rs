//! The state folder of one instance: what is to run, what runs, and what it said.
//!
//! ```text
//!   <root>/<instance>/spec.json    what it is and where it listens; written before the process is started
//!                     process.json pid, start time and boot of the process; written after
//!                     exit.json    how it ended last, if we were there to see it
//!                     stdout.log, stderr.log, work/
//! ```
//!
//! Environment values are not written down: they may be secrets, and every start is given them anew.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::limits;
use super::procfs::{self, ProcessKey, ProcessStat};
use crate::model::InstanceId;

/// Environment variable that marks the processes of an instance, so that they are found without their pid.
pub(super) const MARK_VARIABLE: &str = "PEREGRINE_INSTANCE_MARK";

/// Folders that are on their way out begin so.
const REMOVED_PREFIX: &str = ".removed-";
/// Longest id: file names end at 255 bytes, and a removed folder has a prefix.
const MAX_ID_BYTES: usize = 200;

/// What an instance is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Installation.
    pub(super) install: String,
    /// Id.
    pub(super) id: InstanceId,
    /// Service.
    pub(super) service: String,
    /// Version.
    pub(super) version: u32,
    /// Highest epoch that started it.
    pub(super) epoch: u64,
    /// Where it was told to listen.
    pub(super) address: SocketAddr,
    /// Random value of [`MARK_VARIABLE`].
    pub(super) mark: String,
    /// Starts so far.
    pub(super) starts: u64,
    /// Control groups of the last start.
    #[serde(default)]
    pub(super) groups: Vec<PathBuf>,
    /// Control groups of earlier starts that could not be taken away yet.
    #[serde(default)]
    pub(super) old_groups: Vec<PathBuf>,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ending {
    /// Which one.
    pub(super) process: ProcessKey,
    /// Its exit code; 128 + n if signal n ended it.
    pub(super) code: Option<i64>,
}

/// The state folder of one instance.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder of `id`, which need not be there.
    ///
    /// # Errors
    ///
    /// The id cannot be a file name.
    pub(super) fn of(root: &Path, id: &InstanceId) -> Result<Self, String> {
        let name = id.as_str();
        let good = !name.is_empty()
            && name.len() <= MAX_ID_BYTES
            && !name.starts_with('.')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'));
        if good {
            Ok(Self { path: root.join(name) })
        } else {
            Err(format!("{name:?} is no instance id: letters, digits, '_', '-' and '.' are"))
        }
    }

    /// The folders of every instance under `root`.
    pub(super) fn all(root: &Path) -> io::Result<Vec<Self>> {
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut folders = Vec::new();
        for entry in entries {
            let entry = entry?;
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                folders.push(Self { path: entry.path() });
            }
        }
        Ok(folders)
    }

    /// Sweeps away what a removal left that was cut short.
    pub(super) fn sweep(root: &Path) {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(REMOVED_PREFIX.as_bytes()) {
                drop(fs::remove_dir_all(entry.path())); // tried again at the next start
            }
        }
    }

    /// Makes the folder, readable by its owner alone.
    pub(super) fn create(&self) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(self.work())
    }

    /// Takes the folder away. It goes in one step, so that no half of it is ever read.
    pub(super) fn remove(&self) -> io::Result<()> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let gone = self.path.with_file_name(format!("{REMOVED_PREFIX}{name}"));
        if let Err(error) = fs::remove_dir_all(&gone)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        match fs::rename(&self.path, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed.and_then(|()| match fs::remove_dir_all(&gone) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()), // swept by another start
                removed => removed,
            }),
        }
    }

    /// Whether it is there.
    pub(super) fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Where the process runs when nothing else is said.
    pub(super) fn work(&self) -> PathBuf {
        self.path.join("work")
    }

    /// File of the standard output.
    pub(super) fn stdout(&self) -> PathBuf {
        self.path.join("stdout.log")
    }

    /// File of the standard error.
    pub(super) fn stderr(&self) -> PathBuf {
        self.path.join("stderr.log")
    }

    /// What the instance is; `None` before the first start.
    pub(super) fn record(&self) -> io::Result<Option<Record>> {
        self.read("spec.json")
    }

    /// Writes down what the instance is.
    pub(super) fn write_record(&self, record: &Record) -> io::Result<()> {
        self.write("spec.json", record)
    }

    /// The process that was started last.
    pub(super) fn process(&self) -> io::Result<Option<ProcessKey>> {
        self.read("process.json")
    }

    /// Writes down the process.
    pub(super) fn write_process(&self, key: &ProcessKey) -> io::Result<()> {
        self.write("process.json", key)
    }

    /// Forgets the process, before another one is started: without the file, the mark decides.
    pub(super) fn forget_process(&self) -> io::Result<()> {
        match fs::remove_file(self.path.join("process.json")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// How it ended last.
    pub(super) fn ending(&self) -> io::Result<Option<Ending>> {
        self.read("exit.json")
    }

    /// Writes down how it ended.
    pub(super) fn write_ending(&self, ending: &Ending) -> io::Result<()> {
        self.write("exit.json", ending)
    }

    /// The instance's main process, if it is alive: the one that was written down, or else the one that bears
    /// the mark (we were killed between starting it and writing it down).
    pub(super) fn main_process(&self, record: &Record) -> io::Result<Option<ProcessKey>> {
        if let Some(key) = self.process()? {
            // What it left behind (children that outlive it) is not the instance.
            return Ok(procfs::find(&key).is_some().then_some(key));
        }
        let marked = format!("{MARK_VARIABLE}={}", record.mark);
        let leader = procfs::all().into_iter().find(|process| {
            process.alive() && process.group == process.pid && procfs::environment_has(process.pid, &marked)
        });
        let Some(key) = leader.and_then(|leader| procfs::key(leader.pid)) else { return Ok(None) };
        self.write_process(&key)?;
        Ok(Some(key))
    }

    /// Every live process of the instance: its process group, those that left the group and bear the mark, and
    /// whatever is in its control groups.
    pub(super) fn processes(&self, record: &Record) -> io::Result<Vec<ProcessStat>> {
        // The group's number is only ours for certain while its leader lives; afterwards the mark decides alone.
        let group = self.process()?.as_ref().and_then(procfs::find).map(|leader| leader.pid);
        let marked = format!("{MARK_VARIABLE}={}", record.mark);
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let mut members = limits::members(&record.groups);
        members.extend(limits::members(&record.old_groups));
        let mut processes = procfs::all();
        processes.retain(|process| {
            process.alive()
                && process.pid != own
                && (Some(process.group) == group
                    || members.contains(&process.pid)
                    || procfs::environment_has(process.pid, &marked))
        });
        Ok(processes)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> io::Result<Option<T>> {
        match fs::read(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
                let file = self.path.join(name);
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", file.display()))
            }),
        }
    }

    /// Replaces a file as a whole: a reader sees the old one or the new one.
    fn write<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
        // Two may write at once: who asks for its state finds a process that its starter is just writing down.
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let write = WRITES.fetch_add(1, Ordering::Relaxed);
        let beside = self.path.join(format!(".{name}.{}-{write}", std::process::id()));
        let mut file = fs::OpenOptions::new();
        let mut file = file.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&beside, self.path.join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_would_leave_the_folder_is_refused() {
        for id in ["", "..", "a/b", ".removed-x", "a\0b"] {
            assert!(Folder::of(Path::new("/r"), &InstanceId(id.to_owned())).is_err(), "{id:?}");
        }
        assert!(Folder::of(Path::new("/r"), &InstanceId::generate()).is_ok());
    }

    #[test]
    fn what_is_written_is_read_back_and_is_not_for_others_to_read() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), &InstanceId::generate()).unwrap();
        folder.create().unwrap();
        assert_eq!(folder.process().unwrap(), None);
        let key = ProcessKey { pid: 7, start_ticks: 8, boot_id: "b".to_owned() };
        folder.write_process(&key).unwrap();
        assert_eq!(folder.process().unwrap(), Some(key));
        let mode = fs::metadata(folder.path.join("process.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }

    #[test]
    fn many_may_write_down_the_same_process_at_once() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::of(root.path(), &InstanceId::generate()).unwrap();
        folder.create().unwrap();
        let key = ProcessKey { pid: 7, start_ticks: 8, boot_id: "b".to_owned() };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| folder.write_process(&key).unwrap()));
            }
        });
        assert_eq!(folder.process().unwrap(), Some(key));
        assert_eq!(fs::read_dir(&folder.path).unwrap().count(), 2, "work/ and process.json");
    }

    #[test]
    fn a_removal_that_was_cut_short_is_swept_up_and_never_listed() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(".removed-ins_1")).unwrap();
        assert!(Folder::all(root.path()).unwrap().is_empty());
        Folder::sweep(root.path());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
