//! Questions: asked only where somebody can answer.

use std::io::{BufRead, IsTerminal, Write};

use super::failure::{Failure, Result};

/// Asks before something that cannot be undone. `--yes` answers it; without a terminal it is a usage error
/// that names `--yes`, never a wait.
pub(crate) fn confirm(question: &str, yes: bool) -> Result {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Failure::usage(format!("{question} Nobody can be asked: there is no terminal"))
            .hint("give --yes to do it without a question"));
    }
    let mut stderr = std::io::stderr().lock();
    drop(write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush()));
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(|error| {
        Failure::usage(format!("the answer cannot be read: {error}"))
            .hint("give --yes to do it without a question")
    })?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Failure::usage("not confirmed; nothing was changed"))
}
