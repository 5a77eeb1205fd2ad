//! `peregrine completion`.

use clap::Args;
use clap_complete::Shell;
use serde_json::json;

use crate::cli::args;
use crate::cli::failure::Result;
use crate::cli::output::Output;

/// Print a completion script for a shell
///
/// For bash: `peregrine completion bash > /etc/bash_completion.d/peregrine`; for zsh: `peregrine completion zsh >
/// ~/.zfunc/_peregrine`; for fish: `peregrine completion fish > ~/.config/fish/completions/peregrine.fish`.
#[derive(Args, Debug)]
pub(crate) struct Completion {
    /// Shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completion {
    /// Prints the script.
    pub(crate) fn run(&self, out: &Output) -> Result {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut args::build(), "peregrine", &mut script);
        if out.json {
            let script = String::from_utf8_lossy(&script);
            return out.data(&json!({ "shell": self.shell.to_string(), "script": script }), String::new);
        }
        out.raw(&script)
    }
}
