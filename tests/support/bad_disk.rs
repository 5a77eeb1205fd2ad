//! A disk that fails at the N-th durable system call of a server, which knows nothing of it: a library that is loaded
//! before the C library (`bad_disk.c`, compiled here), and the small file by which it is told what to do.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::server::Peregrine;
use super::wait_for;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/bad_disk.c");
/// Fields of `struct control`, each of four bytes.
const FIELDS: usize = 9;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Commits of the store, but for the sign of life of each second.
    Commits,
    /// Every write and every flush of the store's files.
    Calls,
    /// Every flush of them.
    Flushes,
}

/// What is done at the N-th.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// SIGKILL before anything of it is written.
    DieBefore,
    /// SIGKILL when it is durable, before the program knows.
    DieAfter,
    /// Half of what was to be written is, then SIGKILL.
    Tear,
    /// It and those behind it fail with this error, so many in all.
    Fail { errno: u32, times: u32 },
}

/// No room.
pub(crate) const ENOSPC: u32 = 28;
/// The device failed.
pub(crate) const EIO: u32 = 5;

/// The disk of one server.
pub(crate) struct BadDisk {
    control: File,
}

impl BadDisk {
    /// Puts it under a server, which has to be started (again) for it. Until it is told otherwise it is a good one.
    pub(crate) fn under(server: &mut Peregrine) -> Self {
        let path = server.dir().join("bad-disk");
        std::fs::write(&path, [0; FIELDS * 4]).expect("it can be written");
        let control = File::options().read(true).write(true).open(&path).expect("it is there");
        let library = library().to_owned();
        server.set_environment(vec![("LD_PRELOAD".to_owned(), library), ("BAD_DISK".to_owned(), path)]);
        Self { control }
    }

    /// Waits until commits can be told from signs of life.
    pub(crate) fn wait_until_it_counts_commits(&self) {
        wait_for("a sign of life in the store", || (self.field(8) != 0).then_some(()));
    }

    /// Counts from now on, and does this at the N-th, from 1.
    pub(crate) fn arm(&self, scope: Scope, deed: Deed, target: u32) {
        self.disarm();
        let (deed, error, times) = match deed {
            Deed::DieBefore => (1, 0, 0),
            Deed::DieAfter => (2, 0, 0),
            Deed::Tear => (3, 0, 0),
            Deed::Fail { errno, times } => (4, errno, times),
        };
        for (field, value) in [target, deed, scope as u32, error, times].into_iter().enumerate() {
            self.set(field, value);
        }
        self.set(6, 0);
        self.set(7, 0);
        self.set(5, 1);
    }

    /// A good disk again.
    pub(crate) fn disarm(&self) {
        self.set(5, 0);
        self.set(0, 0);
    }

    /// How often it did its deed since it was armed.
    pub(crate) fn done(&self) -> u32 {
        self.field(7)
    }

    fn field(&self, field: usize) -> u32 {
        let mut bytes = [0; 4];
        self.control.read_exact_at(&mut bytes, field as u64 * 4).expect("it is there");
        u32::from_ne_bytes(bytes)
    }

    fn set(&self, field: usize, value: u32) {
        self.control.write_all_at(&value.to_ne_bytes(), field as u64 * 4).expect("it is there");
    }
}

/// The library, compiled once for each run of the tests. Whoever can build Peregrine has the compiler: it links.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        std::fs::create_dir_all(folder).expect("a folder of the target");
        let (built, place) =
            (folder.join(format!("bad_disk-{}.so", std::process::id())), folder.join("bad_disk.so"));
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let status = Command::new(&compiler)
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .args([&built, Path::new(SOURCE)])
            .arg("-ldl")
            .status();
        let status = status.unwrap_or_else(|why| panic!("{compiler} cannot be run: {why}"));
        assert!(status.success(), "{compiler} does not compile {SOURCE}");
        // Another run of the tests may have the one before mapped: it keeps it.
        std::fs::rename(&built, &place).expect("it can be renamed");
        place
    })
}
