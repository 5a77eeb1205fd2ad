//! `peregrine server`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueHint};
use peregrine_engine::backup::{self, Summary};
use peregrine_engine::{EngineError, ErrorKind};
use serde::Serialize;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::session;

/// Back up and restore what the server knows
#[derive(Args, Debug)]
pub(crate) struct Server {
    #[command(subcommand)]
    action: ServerAction,
}

/// What to do with a server's data folder.
#[derive(Debug, Subcommand)]
enum ServerAction {
    /// Back up the store to a new file, while the server runs or not
    ///
    /// The copy is of one moment; it is checked page by page and flushed before it gets its name, and FILE.sha256 is
    /// written beside it. It holds what the store holds, also values of environments: keep it private. It does not hold
    /// the folder `link` beside the store, by which edges elsewhere know this installation: copy that one, too. Run it
    /// on the machine of the server, with its data folder (--data).
    Backup {
        /// File to write; must not be there
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Put a backup into an empty data folder (--data)
    ///
    /// The server must not run. Services, machines and moves are as they were at the backup; moves that were under way
    /// go on when the server starts. Copies that were started after the backup are removed by the server after a while.
    Restore {
        /// Backup to read
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Also into a folder that is not empty: the store that is there is put aside
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Serialize)]
struct Told<'a> {
    file: &'a Path,
    data: &'a Path,
    revision: u64,
    entries: usize,
    size_bytes: u64,
    sha256: &'a str,
    put_aside: Option<&'a Path>,
}

impl Server {
    /// Does it.
    pub(crate) fn run(self, data: &Path, out: &Output) -> Result {
        match self.action {
            ServerAction::Backup { file } => {
                let summary = backup::backup(data, &file).map_err(failure)?;
                tell(&summary, &file, data, out, "backed up")
            }
            ServerAction::Restore { file, force } => {
                let restored =
                    session::block_on(async { backup::restore(&file, data, force).await.map_err(failure) });
                tell(&restored?, &file, data, out, "restored")
            }
        }
    }
}

fn tell(summary: &Summary, file: &Path, data: &Path, out: &Output, verb: &str) -> Result {
    let told = Told {
        file,
        data,
        revision: summary.revision,
        entries: summary.entries,
        size_bytes: summary.size_bytes,
        sha256: &summary.sha256,
        put_aside: summary.put_aside.as_deref(),
    };
    out.data(&told, || {
        let aside = summary.put_aside.as_ref().map_or_else(String::new, |aside| {
            format!("; the store that was there is now {}", aside.display())
        });
        let entries = human::plural(summary.entries as u64, "entry", "entries");
        format!("{verb}: revision {}, {entries}, SHA-256 {}{aside}", summary.revision, summary.sha256)
    })
}

fn failure(error: EngineError) -> Failure {
    let exit = match error.kind {
        ErrorKind::Invalid => Exit::Usage,
        ErrorKind::NotFound => Exit::NotFound,
        ErrorKind::Conflict => Exit::Conflict,
        _ => Exit::Failed,
    };
    Failure::new(exit, error.code, error.message).hint(error.hint)
}
