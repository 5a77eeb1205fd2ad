//! Files as they are read: a name to call them by, a folder that their paths are relative to, and text.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use crate::mistake::{Mistake, Mistakes};

/// Largest file. A service is a few hundred bytes: this is room for thousands.
pub const MAX_FILE_BYTES: u64 = 4 << 20;

/// A file as it was read.
#[derive(Clone, PartialEq, Eq)]
pub struct Source {
    /// What the operator calls it.
    pub name: String,
    /// Relative paths inside it are relative to this folder.
    pub folder: PathBuf,
    /// What it says.
    pub text: String,
}

impl Source {
    /// A text that is not in a file.
    pub fn new(name: impl Into<String>, folder: impl Into<PathBuf>, text: impl Into<String>) -> Self {
        Self { name: name.into(), folder: folder.into(), text: text.into() }
    }

    /// Reads a file.
    ///
    /// # Errors
    ///
    /// One mistake without a line when it cannot be read, is larger than [`MAX_FILE_BYTES`] or is not UTF-8.
    pub fn read(path: &Path) -> Result<Self, Mistakes> {
        let name = path.display().to_string();
        let fail = |why: String, hint: &str| Mistakes::of(vec![Mistake::unreadable(&name, why, hint)]);
        let io = |error: std::io::Error| fail(error.to_string(), "check the path, and that you may read it");
        let absolute = std::path::absolute(path).map_err(io)?;
        let mut bytes = Vec::new();
        File::open(path).map_err(io)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(fail(format!("it is larger than {MAX_FILE_BYTES} bytes"), "is it the right file?"));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            fail(format!("byte {} is not UTF-8", error.utf8_error().valid_up_to()), "save it as UTF-8")
        })?;
        let folder = absolute.parent().unwrap_or(Path::new("/")).to_owned();
        Ok(Self { name, folder, text })
    }

    /// A path of the file, made whole: relative ones are relative to the file.
    pub(crate) fn resolve(&self, path: &str) -> PathBuf {
        let parts = Path::new(path).components().filter(|part| *part != Component::CurDir);
        self.folder.join(parts.collect::<PathBuf>())
    }
}

/// The text may hold secrets.
impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}
