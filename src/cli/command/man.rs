//! `peregrine man`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use serde_json::json;

use crate::cli::args;
use crate::cli::failure::{Failure, Result};
use crate::cli::output::Output;

/// Write the manual pages to a folder, or print the first one
#[derive(Args, Debug)]
pub(crate) struct Man {
    /// Folder for the pages, made if it is not there; without it, peregrine(1) goes to standard output
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    folder: Option<PathBuf>,
}

impl Man {
    /// Writes or prints the pages.
    pub(crate) fn run(&self, out: &Output) -> Result {
        let root = args::build();
        match &self.folder {
            None => {
                let page = render(&root)?;
                if out.json {
                    let page = String::from_utf8_lossy(&page);
                    return out.data(&json!({ "page": "peregrine.1", "text": page }), String::new);
                }
                out.raw(&page)
            }
            Some(folder) => {
                std::fs::create_dir_all(folder).map_err(|error| Failure::file(folder, "make", &error))?;
                let mut pages = Vec::new();
                write_pages(&root, "peregrine", folder, &mut pages)?;
                out.data(&json!({ "folder": folder, "pages": pages }), || {
                    format!("{} pages in {}", pages.len(), folder.display())
                })
            }
        }
    }
}

/// The page of a command and those of the commands below it, as `peregrine-moves-show.1`.
fn write_pages(command: &clap::Command, name: &str, folder: &Path, pages: &mut Vec<String>) -> Result {
    let file = format!("{name}.1");
    let path = folder.join(&file);
    let page = render(&command.clone().name(name.to_owned()))?;
    std::fs::write(&path, page).map_err(|error| Failure::file(&path, "write", &error))?;
    pages.push(file);
    command
        .get_subcommands()
        .try_for_each(|below| write_pages(below, &format!("{name}-{}", below.get_name()), folder, pages))
}

fn render(command: &clap::Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).map_err(|error| Failure::output(&error))?;
    Ok(page)
}
