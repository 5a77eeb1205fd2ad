//! Exit codes: the part of the command line that scripts read first.
//!
//! The numbers are a promise. [`Exit::ALL`] is the only list; `--help` and `docs/cli.md` are written from it.

use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok,
    /// The command line or a file that it names is wrong.
    Usage,
    /// The server does not accept the credential.
    Auth,
    /// Something named is not there.
    NotFound,
    /// Something else is in the way.
    Conflict,
    /// The server cannot be reached.
    Unreachable,
    /// The plan has blockers.
    Blocked,
    /// It was tried and failed.
    Failed,
    /// A rollout went back; the service is unharmed.
    WentBack,
}

impl Exit {
    /// Every exit code with its meaning.
    pub(crate) const ALL: &'static [(Self, &'static str)] = &[
        (Self::Ok, "done (also: a watch from which you detached)"),
        (Self::Usage, "the command line, or a manifest or configuration file, is wrong"),
        (Self::Auth, "the server does not accept the token, or there is none"),
        (Self::NotFound, "no such service, machine, move, version or instance"),
        (Self::Conflict, "something else is in the way, such as a running move of the same service"),
        (
            Self::Unreachable,
            "the server, or a machine that it needs, cannot be reached or does not answer in time",
        ),
        (Self::Blocked, "the plan has blockers; nothing was changed"),
        (Self::Failed, "it was tried and failed; the message says what is left to do"),
        (Self::WentBack, "rolled back or aborted: the old copies serve, the service is unharmed"),
    ];

    /// The number that the shell sees.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Usage => 2,
            Self::Auth => 3,
            Self::NotFound => 4,
            Self::Conflict => 5,
            Self::Unreachable => 6,
            Self::Blocked => 8,
            Self::Failed => 9,
            Self::WentBack => 10,
        }
    }

    /// For `--help`.
    pub(crate) fn help() -> String {
        let mut text = String::from("Exit codes:\n");
        for (exit, meaning) in Self::ALL {
            text.push_str(&format!("  {:>2}  {meaning}\n", exit.code()));
        }
        text
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_promise() {
        let numbers: Vec<u8> = Exit::ALL.iter().map(|(exit, _)| exit.code()).collect();
        assert_eq!(numbers, [0, 2, 3, 4, 5, 6, 8, 9, 10]);
    }

    #[test]
    fn the_help_names_every_number() {
        let help = Exit::help();
        for (exit, meaning) in Exit::ALL {
            assert!(help.contains(&format!("{:>2}  {meaning}", exit.code())), "{help}");
        }
    }
}
