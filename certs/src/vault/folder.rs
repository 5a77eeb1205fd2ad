//! Records in a folder, one file each. A commit is first a journal beside them: it is renamed into place, and from then
//! on the commit has happened, whatever ends the process. Who opens the folder does again what the journal says.
//!
//! One process at a time: the folder is locked for as long as it is open.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{SHA256, digest};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{Record, Revision, Vault, VaultError, Write, met};

/// A file begins with this, then the revision (8 bytes, little end first) and the first 8 bytes of the content's SHA-256.
const MAGIC: &[u8; 8] = b"PGRECRD1";
const HEAD_BYTES: usize = 24;

/// Records in a folder.
pub struct FolderVault {
    inner: Arc<Mutex<Folder>>,
}

struct Folder {
    root: PathBuf,
    last: Revision,
    /// A commit that has happened and is not wholly in the records, because the disk failed meanwhile.
    behind: Option<Journal>,
    /// Locked as long as it is open.
    _lock: File,
}

/// The last commit.
#[derive(Serialize, Deserialize)]
struct Journal {
    revision: Revision,
    writes: Vec<(String, Option<Vec<u8>>)>,
}

impl FolderVault {
    /// Opens `folder`, or makes it (0700), and finishes a commit that was interrupted.
    ///
    /// # Errors
    /// [`VaultError::Unavailable`] when it cannot be read or written, or another process has it open;
    /// [`VaultError::Damaged`] if its journal cannot be read.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, VaultError> {
        let root = folder.into();
        let records = root.join("records");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&records).map_err(unavailable(&records))?;
        let lock_path = root.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(unavailable(&lock_path))?;
        if let Err(e) = lock.try_lock() {
            let cause = format!("{} is in use by another process ({e})", root.display());
            return Err(VaultError::Unavailable { cause });
        }
        let mut opened = Folder { root, last: 0, behind: None, _lock: lock };
        opened.replay()?;
        Ok(Self { inner: Arc::new(Mutex::new(opened)) })
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Folder) -> Result<T, VaultError> + Send + 'static,
    ) -> Result<T, VaultError> {
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || {
            work(&mut inner.lock().unwrap_or_else(PoisonError::into_inner))
        });
        done.await.unwrap_or_else(|e| Err(VaultError::Unavailable { cause: e.to_string() }))
    }
}

impl Vault for FolderVault {
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Record>, VaultError>> {
        let prefix = prefix.to_owned();
        async move { self.with(move |folder| folder.catch_up().and_then(|()| folder.list(&prefix))).await }
            .boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Record>, VaultError>> {
        let key = key.to_owned();
        async move { self.with(move |folder| folder.catch_up().and_then(|()| folder.get(&key))).await }
            .boxed()
    }

    fn commit(&self, writes: Vec<Write>) -> BoxFuture<'_, Result<Revision, VaultError>> {
        async move { self.with(move |folder| folder.commit(writes)).await }.boxed()
    }
}

impl Folder {
    fn list(&self, prefix: &str) -> Result<Vec<Record>, VaultError> {
        let folder = self.root.join("records");
        let mut keys = Vec::new();
        for entry in fs::read_dir(&folder).map_err(unavailable(&folder))? {
            let name = entry.map_err(unavailable(&folder))?.file_name();
            keys.extend(name.to_str().and_then(key_of).filter(|key| key.starts_with(prefix)));
        }
        keys.sort_unstable();
        let records = keys.into_iter().filter_map(|key| self.get(&key).transpose());
        records.collect()
    }

    fn get(&self, key: &str) -> Result<Option<Record>, VaultError> {
        let path = self.path(key);
        match fs::read(&path) {
            Ok(file) => {
                let (revision, bytes) = unframe(&file).map_err(|cause| VaultError::Damaged {
                    key: key.to_owned(),
                    cause: format!("{}: {cause}", path.display()),
                })?;
                Ok(Some(Record { key: key.to_owned(), bytes: bytes.to_vec(), revision }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(unavailable(&path)(e)),
        }
    }

    fn commit(&mut self, writes: Vec<Write>) -> Result<Revision, VaultError> {
        self.catch_up()?;
        for write in &writes {
            let found = self.get(&write.key)?.map(|record| record.revision);
            if !met(write.expected, found) {
                return Err(VaultError::Conflict { key: write.key.clone() });
            }
        }
        let journal = Journal {
            revision: self.last + 1,
            writes: writes.into_iter().map(|write| (write.key, write.bytes)).collect(),
        };
        let text = serde_json::to_vec(&journal)
            .map_err(|e| VaultError::Unavailable { cause: format!("journal: {e}") })?;
        write_whole(&self.journal(), &frame(journal.revision, &text))?;
        // It has happened. What fails from here on is done again by the next who reads, writes or opens.
        self.last = journal.revision;
        self.behind = Some(journal);
        self.catch_up()?;
        Ok(self.last)
    }

    fn catch_up(&mut self) -> Result<(), VaultError> {
        if let Some(journal) = &self.behind {
            self.apply(journal)?;
            self.behind = None;
        }
        Ok(())
    }

    fn replay(&mut self) -> Result<(), VaultError> {
        let path = self.journal();
        let damaged = |cause: String| VaultError::Damaged { key: path.display().to_string(), cause };
        let file = match fs::read(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(unavailable(&path)(e)),
        };
        let (_, text) = unframe(&file).map_err(|cause| damaged(cause.to_owned()))?;
        let journal: Journal = serde_json::from_slice(text).map_err(|e| damaged(e.to_string()))?;
        self.last = journal.revision;
        self.apply(&journal)
    }

    fn apply(&self, journal: &Journal) -> Result<(), VaultError> {
        for (key, bytes) in &journal.writes {
            let path = self.path(key);
            match bytes {
                Some(bytes) => write_whole(&path, &frame(journal.revision, bytes))?,
                None => match fs::remove_file(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(unavailable(&path)(e)),
                    _ => {}
                },
            }
        }
        sync_folder(&self.root.join("records"))
    }

    fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join("records").join(file_name(key))
    }
}

fn frame(revision: Revision, bytes: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEAD_BYTES + bytes.len());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&revision.to_le_bytes());
    file.extend_from_slice(&digest(&SHA256, bytes).as_ref()[..8]);
    file.extend_from_slice(bytes);
    file
}

fn unframe(file: &[u8]) -> Result<(Revision, &[u8]), &'static str> {
    let (head, bytes) = file.split_at_checked(HEAD_BYTES).ok_or("it is too short")?;
    if &head[..8] != MAGIC {
        return Err("it does not begin as a record does");
    }
    if digest(&SHA256, bytes).as_ref()[..8] != head[16..] {
        return Err("its checksum is wrong");
    }
    let revision: [u8; 8] = head[8..16].try_into().map_err(|_| "it is too short")?;
    Ok((Revision::from_le_bytes(revision), bytes))
}

/// Keys have slashes, and names are up to 253 bytes long: what is not plain is `%` and two hex digits.
fn file_name(key: &str) -> String {
    let mut name = String::with_capacity(key.len() + 8);
    for byte in key.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
            b'.' if !name.is_empty() => name.push('.'),
            b'/' => name.push('+'),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name
}

fn key_of(name: &str) -> Option<String> {
    let mut key = Vec::with_capacity(name.len());
    let mut bytes = name.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let pair = [bytes.next()?, bytes.next()?];
                key.push(u8::from_str_radix(std::str::from_utf8(&pair).ok()?, 16).ok()?);
            }
            b'+' => key.push(b'/'),
            // A file that is being written.
            b'~' => return None,
            _ => key.push(byte),
        }
    }
    String::from_utf8(key).ok()
}

/// Whole or not at all, and durable.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), VaultError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push("~");
    let beside = PathBuf::from(beside);
    let write = || {
        let mut file =
            OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(unavailable(path))?;
    path.parent().map_or(Ok(()), sync_folder)
}

fn sync_folder(folder: &Path) -> Result<(), VaultError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(unavailable(folder))
}

fn unavailable(path: &Path) -> impl Fn(io::Error) -> VaultError + '_ {
    move |e| VaultError::Unavailable { cause: format!("{}: {e}", path.display()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::Expected;

    #[test]
    fn keys_of_any_kind_are_names_of_files_and_back() {
        for key in ["domain/*.example.com", "a", "x/%~+ ü/..", ".hidden", "sealed/account/ca-1"] {
            let name = file_name(key);
            assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
            assert_eq!(key_of(&name).as_deref(), Some(key));
        }
        assert_eq!(key_of("domain+a~"), None, "a file that is being written is no record");
    }

    #[tokio::test]
    async fn a_commit_that_was_interrupted_after_its_journal_is_finished_by_the_next_who_opens() {
        let folder = tempfile::tempdir().unwrap();
        let vault = FolderVault::open(folder.path()).unwrap();
        let first = vault.commit(vec![Write::put("a/1", *b"one", Expected::Absent)]).await.unwrap();
        drop(vault);
        // As a process leaves it that dies right after the journal's rename.
        let journal = Journal {
            revision: first + 1,
            writes: vec![("a/1".into(), None), ("a/2".into(), Some(b"two".to_vec()))],
        };
        let text = serde_json::to_vec(&journal).unwrap();
        write_whole(&folder.path().join("journal"), &frame(first + 1, &text)).unwrap();
        let vault = FolderVault::open(folder.path()).unwrap();
        let records = vault.list("a/").await.unwrap();
        assert_eq!(records.len(), 1);
        assert_eq!((records[0].key.as_str(), records[0].bytes.as_slice()), ("a/2", &b"two"[..]));
        let next = vault.commit(vec![Write::put("a/1", *b"", Expected::Absent)]).await.unwrap();
        assert_eq!(next, first + 2, "a revision is never used twice");
    }

    #[tokio::test]
    async fn a_file_that_was_changed_by_somebody_else_is_told_as_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let vault = FolderVault::open(folder.path()).unwrap();
        vault.commit(vec![Write::put("a", *b"content", Expected::Absent)]).await.unwrap();
        let path = folder.path().join("records/a");
        let mut file = fs::read(&path).unwrap();
        *file.last_mut().unwrap() ^= 1;
        fs::write(&path, &file).unwrap();
        assert!(matches!(vault.get("a").await, Err(VaultError::Damaged { key, .. }) if key == "a"));
    }

    #[test]
    fn a_folder_is_open_in_one_place_only() {
        let folder = tempfile::tempdir().unwrap();
        let first = FolderVault::open(folder.path()).unwrap();
        let second = FolderVault::open(folder.path()).err().expect("it is locked");
        assert!(second.to_string().contains("in use"), "{second}");
        drop(first);
        FolderVault::open(folder.path()).unwrap();
    }
}
