//! Files that are there whole or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Makes a folder that nobody else reads.
pub(crate) fn private_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file that nobody else reads: beside it, flushed, then in its place, and the place flushed.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    write_flushed(&new, bytes)?;
    fs::rename(&new, path)?;
    flush_folder(path)
}

/// As [`write_whole`]; what was there is kept under `before`. There is no moment without a whole file at `path`.
pub(crate) fn write_keeping(path: &Path, before: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    write_flushed(&new, bytes)?;
    let linked = before.with_extension("link");
    match fs::remove_file(&linked) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    match fs::hard_link(path, &linked) {
        Ok(()) => fs::rename(&linked, before)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    fs::rename(&new, path)?;
    flush_folder(path)
}

/// Writes a file that nobody else reads, in its place; the place is not flushed.
pub(crate) fn write_flushed(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes what was renamed or removed in the folder of `path` durable.
pub(crate) fn flush_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// The bytes of a file, if it is there; refuses one that is larger than `max_bytes`.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    use io::Read;
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it is larger than {max_bytes} bytes")));
    }
    Ok(Some(bytes))
}
