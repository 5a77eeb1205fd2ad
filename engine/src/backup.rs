//! Backups: one file, made while the server runs, and put back only where nothing is lost by it.
//!
//! A backup is a consistent copy of the store at one revision, looked at page by page before it gets its name, with
//! its SHA-256 beside it (`FILE.sha256`, as `sha256sum` writes it). It holds what the store holds: also the values
//! of environments. Both files are readable by their owner alone.
//!
//! A restored store begins a new reign: epochs (also the one under which the engine leads) and generations go up by a great
//! step, because machines and edges may have seen higher ones than the backup knows, and refuse lower ones.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::audit::AuditAct;
use crate::draft::Draft;
use crate::engine::replay;
use crate::error::{EngineError, ErrorKind};
use crate::keys;
use crate::model::{Rollout, UnixMs};
use crate::outside::Outside;
use crate::store::{self, Batch, Revision, STORE_FILE, SqliteStore, Store as _};

/// By so much epochs and generations rise with a restoration: more than any installation gives out.
const REIGN_STEP: u64 = 1 << 32;
/// Services in one commit of a restoration.
const MAX_SERVICES_PER_COMMIT: usize = 500;
/// Folder inside the data folder in which a restoration is prepared.
const WORKSHOP: &str = "restore-part";

/// What was backed up or restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Revision of the backup.
    pub revision: Revision,
    /// Entries in it.
    pub entries: usize,
    /// Size of the file.
    pub size_bytes: u64,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// What was in the way of a restoration and was put aside, if anything.
    pub put_aside: Option<PathBuf>,
}

/// Backs up the store in `data` to `file`, which must not be there. The server may run or not.
///
/// # Errors
/// There is no store, the file is there, the disk is full, or the store is damaged: then nothing is left behind.
pub fn backup(data: &Path, file: &Path) -> Result<Summary, EngineError> {
    if !data.join(STORE_FILE).is_file() {
        return Err(EngineError::new(
            ErrorKind::NotFound,
            "backup.no_store",
            format!("there is no store in {}", data.display()),
            "Name the data folder of the server: --data DIR.",
        ));
    }
    if file.exists() {
        return Err(EngineError::new(
            ErrorKind::Conflict,
            "backup.exists",
            format!("{} is there already", file.display()),
            "Choose another name; a backup never replaces a file.",
        ));
    }
    let part = beside(file, ".part");
    let made = make(data, file, &part);
    if made.is_err() {
        drop(std::fs::remove_file(&part)); // it may not have come to be
    }
    made
}

fn make(data: &Path, file: &Path, part: &Path) -> Result<Summary, EngineError> {
    drop(std::fs::remove_file(part)); // of a backup that was killed
    // Made here, so that it is private from its first byte; SQLite writes into an empty file.
    private(part)?;
    store::copy_file(data, part)?;
    let (revision, entries) = store::check_file(part)?;
    synced(part)?;
    let (sha256, size_bytes) = digest(part)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let beside_it = beside(file, ".sha256");
    drop(std::fs::remove_file(&beside_it)); // of a backup of this name that is gone
    let mut sums = private(&beside_it)?;
    let written = sums.write_all(format!("{sha256}  {name}\n").as_bytes()).and_then(|()| sums.sync_all());
    written.map_err(|error| file_error("write", &beside_it, &error))?;
    std::fs::rename(part, file).map_err(|error| file_error("name", file, &error))?;
    synced(parent(file))?;
    Ok(Summary { revision, entries, size_bytes, sha256, put_aside: None })
}

/// Puts a backup into a data folder. One that is not empty is refused, unless `force`: then the store that is there
/// is put aside, and everything else in the folder stays.
///
/// # Errors
/// The folder is not empty, a server runs on it, the backup is damaged or of a later version, or the disk is full:
/// then the folder is as it was.
pub async fn restore(file: &Path, data: &Path, force: bool) -> Result<Summary, EngineError> {
    let (sha256, size_bytes) = digest(file)?;
    compare(file, &sha256)?;
    let (revision, entries) = store::check_file(file)?;
    refuse_full(data, force)?;
    // Held to the end: no server starts in the middle.
    let _lock = store::lock(data)?;
    let workshop = data.join(WORKSHOP);
    let restored = restore_in(file, data, &workshop, revision).await;
    drop(std::fs::remove_dir_all(&workshop)); // it may not have come to be
    let put_aside = restored?;
    Ok(Summary { revision, entries, size_bytes, sha256, put_aside })
}

async fn restore_in(
    file: &Path,
    data: &Path,
    workshop: &Path,
    revision: Revision,
) -> Result<Option<PathBuf>, EngineError> {
    drop(std::fs::remove_dir_all(workshop)); // of a restoration that was killed
    let made = DirBuilder::new().mode(0o700).create(workshop);
    made.map_err(|error| file_error("create", workshop, &error))?;
    let prepared = workshop.join(STORE_FILE);
    let mut to = private(&prepared)?;
    let copied = File::open(file).and_then(|mut from| std::io::copy(&mut from, &mut to));
    copied.map_err(|error| file_error("write", &prepared, &error))?;
    drop(to);
    begin_reign(workshop, revision).await?;
    synced(&prepared)?;
    let put_aside = put_aside(data)?;
    let store = data.join(STORE_FILE);
    std::fs::rename(&prepared, &store).map_err(|error| file_error("name", &store, &error))?;
    synced(data)?;
    Ok(put_aside)
}

/// Raises epochs (of who leads, of services and of copies) and generations, and says in the audit that the store was restored.
async fn begin_reign(dir: &Path, revision: Revision) -> Result<(), EngineError> {
    let store = SqliteStore::open_for_reign(dir, REIGN_STEP)?;
    let mut state = replay(store.survey_without(keys::VAULT).await?);
    let names: Vec<String> = state.services.keys().cloned().collect();
    let mut batches: Vec<Vec<String>> =
        names.chunks(MAX_SERVICES_PER_COMMIT).map(<[String]>::to_vec).collect();
    batches.push(Vec::new()); // the last one has the rest
    let last = batches.len() - 1;
    for (number, names) in batches.into_iter().enumerate() {
        let mut draft = Draft::new(&state, now());
        for name in &names {
            let mut service = state.services[name].clone();
            service.epoch += REIGN_STEP;
            draft.put_service(&service);
            // A running rollout acts under the epoch that its service has.
            if let Some(rollout) = service.rollout.as_ref().and_then(|id| state.rollouts.get(id)) {
                let mut rollout = Rollout::clone(rollout);
                rollout.epoch = service.epoch;
                draft.put_rollout(&rollout);
            }
            for instance in state.instances_of(name) {
                let mut instance = instance.clone();
                instance.epoch = instance.epoch.saturating_add(REIGN_STEP);
                draft.put_instance(&instance);
            }
        }
        if number == last {
            draft.skip_generations(REIGN_STEP);
            draft.audit(None, None, AuditAct::StoreRestored { revision });
        }
        commit(&store, draft).await?;
        state = replay(store.survey_without(keys::VAULT).await?);
    }
    Ok(())
}

async fn commit(store: &SqliteStore, draft: Draft<'_>) -> Result<(), EngineError> {
    let (Batch { preconditions, writes }, _) = draft.finish();
    if !writes.is_empty() {
        store.commit(Batch { preconditions, writes }).await?;
    }
    Ok(())
}

fn refuse_full(data: &Path, force: bool) -> Result<(), EngineError> {
    let Ok(entries) = std::fs::read_dir(data) else { return Ok(()) }; // it is not there, or cannot be used: told later
    let names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name != store::LOCK_FILE && name != WORKSHOP)
        .collect();
    if names.is_empty() || force {
        return Ok(());
    }
    Err(EngineError::new(
        ErrorKind::Conflict,
        "restore.not_empty",
        format!("the data folder {} is not empty: it has {}", data.display(), listed(names)),
        "Choose an empty folder, or use --force: the store that is there is put aside, not deleted.",
    ))
}

fn listed(mut names: Vec<String>) -> String {
    names.sort_unstable();
    let more = names.len().saturating_sub(3);
    names.truncate(3);
    let mut text = names.join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Gives the store that is there another name, with what its last process left beside it.
fn put_aside(data: &Path) -> Result<Option<PathBuf>, EngineError> {
    let store = data.join(STORE_FILE);
    if !store.exists() {
        return Ok(None);
    }
    let name = format!("{STORE_FILE}.before-restore-{}", now());
    let aside = data.join(&name);
    for ending in ["-wal", "-shm", ""] {
        let from = beside(&store, ending);
        if from.exists() {
            let to = beside(&aside, ending);
            std::fs::rename(&from, &to).map_err(|error| file_error("put aside", &from, &error))?;
        }
    }
    Ok(Some(aside))
}

/// What was written down beside a backup has to be true of it. A backup without it is checked by what is in it.
fn compare(file: &Path, sha256: &str) -> Result<(), EngineError> {
    let Ok(text) = std::fs::read_to_string(beside(file, ".sha256")) else { return Ok(()) };
    if text.split_whitespace().next() == Some(sha256) {
        return Ok(());
    }
    Err(EngineError::new(
        ErrorKind::Failed,
        "restore.checksum",
        format!("{} is not the file that was backed up: its SHA-256 is {sha256}", file.display()),
        "Use another copy of the backup; nothing was changed.",
    ))
}

fn digest(file: &Path) -> Result<(String, u64), EngineError> {
    let failed = |error: std::io::Error| file_error("read", file, &error);
    let mut from = File::open(file).map_err(failed)?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer).map_err(failed)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                size += read as u64;
            }
        }
    }
    let hex = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((hex, size))
}

fn private(path: &Path) -> Result<File, EngineError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(|error| file_error("create", path, &error))
}

/// A file's bytes, or a folder's names, are on the disk.
fn synced(path: &Path) -> Result<(), EngineError> {
    let done = File::open(path).and_then(|file| file.sync_all());
    done.map_err(|error| file_error("flush", path, &error))
}

/// Wall time: a backup is made outside of any engine.
fn now() -> UnixMs {
    (Outside::default().wall_clock)()
}

fn parent(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn file_error(verb: &str, path: &Path, error: &std::io::Error) -> EngineError {
    let (kind, code, hint) = match error.kind() {
        std::io::ErrorKind::NotFound => (ErrorKind::NotFound, "file.missing", "Check the path."),
        std::io::ErrorKind::PermissionDenied => {
            (ErrorKind::Invalid, "file.forbidden", "Check who may use it.")
        }
        std::io::ErrorKind::StorageFull => (ErrorKind::Failed, "file.disk_full", "Make room on that disk."),
        _ => (ErrorKind::Failed, "file.failed", "Check the path and the disk."),
    };
    EngineError::new(kind, code, format!("cannot {verb} {}: {error}", path.display()), hint)
}
