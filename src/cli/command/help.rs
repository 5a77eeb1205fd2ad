//! `peregrine help`.

use clap::Args;

use crate::cli::args;
use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::output::Output;
use crate::cli::tree;

/// Help on a command; with --json the whole command tree as data
#[derive(Args, Debug)]
pub(crate) struct Help {
    /// Words of the command, such as `moves abort`
    #[arg(value_name = "COMMAND")]
    words: Vec<String>,

    /// The page docs/cli.md
    #[arg(long, conflicts_with = "words")]
    markdown: bool,
}

impl Help {
    /// Prints the help.
    pub(crate) fn run(&self, out: &Output) -> Result {
        let root = args::build();
        if out.json {
            let tree = tree::tree(&root);
            if self.words.is_empty() {
                return out.data(&tree, String::new);
            }
            let node = tree.find(&self.words).ok_or_else(|| self.unknown())?;
            return out.data(&node, String::new);
        }
        if self.markdown {
            return out.raw(tree::tree(&root).markdown().as_bytes());
        }
        let mut command = &root;
        for word in &self.words {
            command = command.find_subcommand(word).ok_or_else(|| self.unknown())?;
        }
        let help = command.clone().render_long_help();
        let colored = out.color && out.stdout_terminal;
        out.raw(if colored { help.ansi().to_string() } else { help.to_string() }.as_bytes())
    }

    fn unknown(&self) -> Failure {
        Failure::new(
            Exit::Usage,
            "cli.unknown_command",
            format!("there is no command `{}`", self.words.join(" ")),
        )
        .hint("peregrine help lists the commands")
    }
}
