//! What instances print: files that the processes write themselves, so that they need nobody to read along.
//!
//! A process appends to `stdout.log` and `stderr.log` in its folder, whether Peregrine runs or not. A file is
//! kept small without losing a line and without the process noticing: its oldest blocks are given back to the
//! file system (a hole at its head), so offsets never move. Where a file system cannot do that, the file is
//! emptied instead, and what was in it is lost.
//!
//! Plain output bears no times. A line's time is that of the last write seen at or after it (the files are
//! looked at every [`WATCH_INTERVAL_MS`]), so it is right to about that interval while Peregrine runs; lines
//! written while it was down bear the time of the last of them.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, fallocate};
use tokio::sync::mpsc;

use super::folder::Folder;
use crate::model::UnixMs;
use crate::runtime::{LogLine, LogOptions, RuntimeError};

/// Of each output file, at least so much is kept.
pub(super) const KEEP_BYTES: u64 = 4 << 20;
/// Time between two looks at the files.
pub(super) const WATCH_INTERVAL_MS: u64 = 250;
/// Time between two looks of somebody who follows.
const FOLLOW_INTERVAL_MS: u64 = 100;
/// A line that is longer is given in pieces.
const MAX_LINE_BYTES: usize = 64 << 10;
/// Read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Times kept for a file; with more, every second one is forgotten.
const MAX_TIMES: usize = 4_096;
/// Lines between reader and consumer.
const CHANNEL_LINES: usize = 256;
/// What an error quotes of the last output.
const LAST_LINES: usize = 20;
/// What an error quotes of the last output.
const LAST_BYTES: usize = 4 << 10;
/// Block size to which a hole is rounded; a multiple of every common file system's.
const BLOCK_BYTES: u64 = 64 << 10;

type Line = Result<LogLine, RuntimeError>;

/// When which part of which file was written.
#[derive(Debug, Default)]
pub(super) struct Times {
    files: Mutex<HashMap<PathBuf, VecDeque<(u64, UnixMs)>>>,
}

impl Times {
    /// Looks at a file: notes how far it has got, and gives back its oldest blocks if it is too big.
    pub(super) fn look(&self, path: &Path) -> io::Result<()> {
        let Some(size) = self.note(path)? else { return Ok(()) };
        bound(path, size)
    }

    /// Forgets the files of a folder that is gone.
    pub(super) fn forget(&self, folder: &Folder) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.remove(&folder.stdout());
        files.remove(&folder.stderr());
    }

    fn note(&self, path: &Path) -> io::Result<Option<u64>> {
        let metadata = match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata?,
        };
        let size = metadata.size();
        let written = metadata.modified().ok().map_or(0, unix_ms);
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let times = files.entry(path.to_owned()).or_default();
        if times.back().is_some_and(|(end, _)| *end > size) {
            times.clear(); // it was emptied
        }
        if times.back().is_none_or(|(end, _)| *end < size) {
            times.push_back((size, written));
        }
        if times.len() > MAX_TIMES {
            let mut index = 0;
            times.retain(|_| {
                index += 1;
                index % 2 == 0
            });
        }
        Ok(Some(size))
    }

    /// When the byte before `end` was written.
    fn at(&self, path: &Path, end: u64) -> UnixMs {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let times = files.get(path);
        let found = times.and_then(|times| times.get(times.partition_point(|(written, _)| *written < end)));
        found.map_or_else(|| unix_ms(SystemTime::now()), |(_, at)| *at)
    }
}

/// The last lines of both outputs, for an error.
pub(super) fn last_output(folder: &Folder, times: &Times) -> String {
    let lines = history(
        folder,
        times,
        &mut Tail::of(folder),
        LogOptions { tail: Some(LAST_LINES), ..Default::default() },
    );
    let mut text = String::new();
    for line in lines.unwrap_or_default() {
        text.push_str(&line.text);
        text.push('\n');
    }
    let text = text.trim_end();
    let mut start = text.len().saturating_sub(LAST_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    if text.is_empty() { "(it printed nothing)".to_owned() } else { text[start..].to_owned() }
}

/// Sends the lines that are asked for; with `follow`, until `ended` says that no more will come.
pub(super) async fn send<E>(
    folder: Folder,
    times: Arc<Times>,
    options: LogOptions,
    ended: E,
    to: mpsc::Sender<Line>,
    failed: impl Fn(io::Error) -> RuntimeError + Send,
) where
    E: Fn(&Folder) -> bool + Clone + Send + Sync + 'static,
{
    let mut tail = Tail::of(&folder);
    let mut first = true;
    let mut interval = tokio::time::interval(Duration::from_millis(FOLLOW_INTERVAL_MS));
    loop {
        let (folder, times, ended) = (folder.clone(), Arc::clone(&times), ended.clone());
        let read = tokio::task::spawn_blocking(move || {
            let last = !options.follow || ended(&folder); // asked before reading: nothing comes after it
            let lines = if first {
                history(&folder, &times, &mut tail, options)
            } else {
                tail.read(&folder, &times, false)
            };
            let rest = if last { tail.rest(&times) } else { Vec::new() };
            (
                lines.map(|mut lines| {
                    lines.extend(rest);
                    lines
                }),
                tail,
                last,
            )
        });
        let Ok((lines, now_tail, last)) = read.await else { return };
        (tail, first) = (now_tail, false);
        match lines {
            Ok(lines) => {
                for line in lines {
                    if to.send(Ok(line)).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => {
                drop(to.send(Err(failed(error))).await); // nobody listens any more: the same end
                return;
            }
        }
        if last {
            return;
        }
        tokio::select! {
            _ = interval.tick() => {}
            () = to.closed() => return,
        }
    }
}

/// A channel of the right size.
pub(super) fn channel() -> (mpsc::Sender<Line>, mpsc::Receiver<Line>) {
    mpsc::channel(CHANNEL_LINES)
}

fn history(folder: &Folder, times: &Times, tail: &mut Tail, options: LogOptions) -> io::Result<Vec<LogLine>> {
    let mut lines = tail.read(folder, times, true)?;
    if !options.follow {
        lines.extend(tail.rest(times));
    }
    lines.sort_by_key(|line| line.at); // stable: the order within each output stays
    if let Some(since) = options.since {
        lines.retain(|line| line.at >= since);
    }
    if let Some(count) = options.tail {
        lines.drain(..lines.len().saturating_sub(count));
    }
    Ok(lines)
}

/// How far both outputs have been read.
#[derive(Debug)]
struct Tail {
    stdout: Reader,
    stderr: Reader,
}

impl Tail {
    fn of(folder: &Folder) -> Self {
        Self { stdout: Reader::new(folder.stdout(), false), stderr: Reader::new(folder.stderr(), true) }
    }

    fn read(&mut self, folder: &Folder, times: &Times, from_start: bool) -> io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        if !folder.exists() {
            return Ok(lines);
        }
        self.stdout.read(times, from_start, &mut lines)?;
        self.stderr.read(times, from_start, &mut lines)?;
        Ok(lines)
    }

    /// Last lines that have no end.
    fn rest(&mut self, times: &Times) -> Vec<LogLine> {
        [self.stdout.rest(times), self.stderr.rest(times)].into_iter().flatten().collect()
    }
}

#[derive(Debug)]
struct Reader {
    path: PathBuf,
    stderr: bool,
    offset: u64,
    partial: Vec<u8>,
}

impl Reader {
    const fn new(path: PathBuf, stderr: bool) -> Self {
        Self { path, stderr, offset: 0, partial: Vec::new() }
    }

    fn read(&mut self, times: &Times, from_start: bool, lines: &mut Vec<LogLine>) -> io::Result<()> {
        let Some(size) = times.note(&self.path)? else { return Ok(()) };
        if size < self.offset {
            self.offset = 0; // it was emptied
            self.partial.clear();
        }
        if size == self.offset {
            return Ok(());
        }
        let mut file = File::open(&self.path)?;
        let mut skip_partial = false;
        if from_start {
            self.offset = first_data(&file, size)?;
            skip_partial = self.offset > 0; // the hole ends inside a line
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.offset < size {
            let wanted =
                usize::try_from(size - self.offset).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            let count = file.read(&mut chunk[..wanted])?;
            if count == 0 {
                break;
            }
            for byte in &chunk[..count] {
                self.offset += 1;
                if *byte != b'\n' {
                    self.partial.push(*byte);
                }
                if *byte == b'\n' || self.partial.len() == MAX_LINE_BYTES {
                    let line = self.line(times);
                    if !std::mem::take(&mut skip_partial) {
                        lines.push(line);
                    }
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, times: &Times) -> LogLine {
        let text = String::from_utf8_lossy(&self.partial).trim_end_matches('\r').to_owned();
        self.partial.clear();
        LogLine { at: times.at(&self.path, self.offset), stderr: self.stderr, text }
    }

    fn rest(&mut self, times: &Times) -> Option<LogLine> {
        (!self.partial.is_empty()).then(|| self.line(times))
    }
}

/// Where the file's data begins: behind the hole at its head.
fn first_data(file: &File, size: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)) {
        Ok(offset) => Ok(offset),
        Err(rustix::io::Errno::NXIO) => Ok(size), // nothing but a hole
        Err(rustix::io::Errno::INVAL) => Ok(0),   // a file system without holes
        Err(error) => Err(error.into()),
    }
}

fn bound(path: &Path, size: u64) -> io::Result<()> {
    if size <= 2 * KEEP_BYTES {
        return Ok(());
    }
    let file = File::options().write(true).open(path)?;
    let data = first_data(&file, size)?;
    if size - data <= 2 * KEEP_BYTES {
        return Ok(());
    }
    let hole = (size - KEEP_BYTES) / BLOCK_BYTES * BLOCK_BYTES;
    match fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, hole) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(0),
        Err(error) => Err(error.into()),
    }
}

fn unix_ms(time: SystemTime) -> UnixMs {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs::try_from(since.as_millis()).unwrap_or(UnixMs::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::model::InstanceId;

    fn folder(root: &Path) -> Folder {
        let folder = Folder::of(root, &InstanceId::generate()).unwrap();
        folder.create().unwrap();
        folder
    }

    fn texts(lines: &[LogLine]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn a_file_that_grows_without_end_keeps_its_newest_lines_and_little_disk() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        let times = Times::default();
        let mut file = File::options().append(true).create(true).open(folder.stdout()).unwrap();
        let line = format!("{}\n", "x".repeat(1_023));
        for round in 0..30 {
            for _ in 0..1_024 {
                file.write_all(line.as_bytes()).unwrap();
            }
            writeln!(file, "end of {round}").unwrap();
            times.look(&folder.stdout()).unwrap();
        }
        assert!(folder.stdout().metadata().unwrap().blocks() * 512 <= 3 * KEEP_BYTES);
        let lines = history(&folder, &times, &mut Tail::of(&folder), LogOptions::default()).unwrap();
        assert_eq!(lines.last().unwrap().text, "end of 29");
        assert!(lines.len() as u64 * 1_024 >= KEEP_BYTES);
        assert!(lines.iter().all(|line| line.text.len() == 1_023 || line.text.starts_with("end of")));
    }

    #[test]
    fn lines_bear_the_time_of_the_write_that_was_seen_after_them() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        let times = Times::default();
        let mut out = File::options().append(true).create(true).open(folder.stdout()).unwrap();
        let mut err = File::options().append(true).create(true).open(folder.stderr()).unwrap();
        writeln!(out, "first").unwrap();
        out.set_modified(UNIX_EPOCH + Duration::from_secs(10)).unwrap();
        times.look(&folder.stdout()).unwrap();
        writeln!(err, "second").unwrap();
        err.set_modified(UNIX_EPOCH + Duration::from_secs(20)).unwrap();
        times.look(&folder.stderr()).unwrap();
        writeln!(out, "third").unwrap();
        out.set_modified(UNIX_EPOCH + Duration::from_secs(30)).unwrap();
        let lines = history(&folder, &times, &mut Tail::of(&folder), LogOptions::default()).unwrap();
        assert_eq!(texts(&lines), ["first", "second", "third"]);
        assert_eq!(lines.iter().map(|line| line.at).collect::<Vec<_>>(), [10_000, 20_000, 30_000]);
        assert_eq!(lines.iter().map(|line| line.stderr).collect::<Vec<_>>(), [false, true, false]);
        let options = LogOptions { since: Some(20_000), ..Default::default() };
        let lines = history(&folder, &times, &mut Tail::of(&folder), options).unwrap();
        assert_eq!(texts(&lines), ["second", "third"]);
        let options = LogOptions { tail: Some(1), ..Default::default() };
        assert_eq!(texts(&history(&folder, &times, &mut Tail::of(&folder), options).unwrap()), ["third"]);
    }

    #[test]
    fn a_last_line_without_an_end_and_bytes_that_are_no_text_are_shown() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        let times = Times::default();
        std::fs::write(folder.stdout(), b"whole\r\npart \xff").unwrap();
        let lines = history(&folder, &times, &mut Tail::of(&folder), LogOptions::default()).unwrap();
        assert_eq!(texts(&lines), ["whole", "part \u{fffd}"]);
        assert_eq!(last_output(&folder, &times), "whole\npart \u{fffd}");
    }
}
