//! The command tree as data: `help --json`, and the page `docs/cli.md` that is written from it.

use clap::{Arg, Command};
use serde::Serialize;

use super::exit::Exit;

/// Commands that change something on the server (or start one). All others only read.
const CHANGING: &[&str] = &[
    "serve",
    "engine",
    "edge",
    "edge join",
    "edge upgrade",
    "demo",
    "deploy",
    "move",
    "moves pause",
    "moves resume",
    "moves promote",
    "moves abort",
    "moves rollback",
    "moves cleanup",
    "rollback",
    "scale",
    "services remove",
    "machines add",
    "machines remove",
    "domains add",
    "domains remove",
    "certs renew",
    "certs import",
    "edges invite",
    "edges remove",
    "server backup",
    "server restore",
];

/// The command line as a document.
#[derive(Debug, Serialize)]
pub(crate) struct Tree {
    /// Version of the binary.
    pub(crate) version: &'static str,
    /// Options that every command has.
    pub(crate) global_options: Vec<Parameter>,
    /// Commands.
    pub(crate) commands: Vec<Node>,
    /// Exit codes.
    pub(crate) exit_codes: Vec<ExitCode>,
}

/// A command.
#[derive(Debug, Serialize)]
pub(crate) struct Node {
    /// Words after `peregrine`.
    pub(crate) path: String,
    /// What it does, in a line.
    pub(crate) about: String,
    /// What it does, in full.
    pub(crate) description: String,
    /// How it is called.
    pub(crate) usage: String,
    /// It changes something on the server.
    pub(crate) changes: bool,
    /// Positional arguments in order.
    pub(crate) arguments: Vec<Parameter>,
    /// Its own options.
    pub(crate) options: Vec<Parameter>,
    /// Commands below it; empty for one that does something.
    pub(crate) commands: Vec<Self>,
}

/// An argument or option.
#[derive(Debug, Serialize)]
pub(crate) struct Parameter {
    /// Name, as in `--name` for an option.
    pub(crate) name: String,
    /// `-n`.
    pub(crate) short: Option<char>,
    /// What it is.
    pub(crate) help: String,
    /// Placeholder of the value; `null` for a switch.
    pub(crate) value: Option<String>,
    /// Values that are accepted, if there is a list.
    pub(crate) possible_values: Vec<String>,
    /// Value if it is not given.
    pub(crate) default: Option<String>,
    /// Environment variable that gives it.
    pub(crate) environment: Option<String>,
    /// It must be given.
    pub(crate) required: bool,
    /// It may be given more than once.
    pub(crate) repeated: bool,
}

/// An exit code.
#[derive(Debug, Serialize)]
pub(crate) struct ExitCode {
    /// Number.
    pub(crate) code: u8,
    /// Meaning.
    pub(crate) meaning: &'static str,
}

/// The tree of a command line that was built.
pub(crate) fn tree(root: &Command) -> Tree {
    Tree {
        version: env!("CARGO_PKG_VERSION"),
        global_options: root.get_arguments().filter(|arg| visible(arg)).map(option).collect(),
        commands: root.get_subcommands().map(|command| node(command, "")).collect(),
        exit_codes: Exit::ALL.iter().map(|(exit, meaning)| ExitCode { code: exit.code(), meaning }).collect(),
    }
}

impl Tree {
    /// The command at a path of words.
    pub(crate) fn find(self, words: &[String]) -> Option<Node> {
        let mut level = self.commands;
        let mut found = None;
        for (depth, _) in words.iter().enumerate() {
            let path = words[..=depth].join(" ");
            let mut node = level.into_iter().find(|node| node.path == path)?;
            level = std::mem::take(&mut node.commands);
            found = Some(node);
        }
        found.map(|node| Node { commands: level, ..node })
    }

    /// Every command that does something.
    #[cfg(test)]
    pub(crate) fn leaves(&self) -> Vec<&Node> {
        fn walk<'a>(nodes: &'a [Node], into: &mut Vec<&'a Node>) {
            for node in nodes {
                if node.commands.is_empty() {
                    into.push(node);
                }
                walk(&node.commands, into);
            }
        }
        let mut leaves = Vec::new();
        walk(&self.commands, &mut leaves);
        leaves
    }

    /// The page `docs/cli.md`.
    pub(crate) fn markdown(&self) -> String {
        let mut page = String::from(PREFACE);
        page.push_str("\n## Exit codes\n\n| code | meaning |\n|---|---|\n");
        for exit in &self.exit_codes {
            page.push_str(&format!("| {} | {} |\n", exit.code, cell(exit.meaning)));
        }
        page.push_str("\n## Global options\n\n");
        options_table(&self.global_options, &mut page);
        page.push_str("\n## Commands\n");
        for node in &self.commands {
            node_markdown(node, &mut page);
        }
        page
    }
}

const PREFACE: &str = "\
# The command line

This page is written from the binary (`peregrine help --markdown`); a test compares the two. `peregrine help --json` gives the same as data.

Standard output carries data and nothing else. Progress, notes and errors go to standard error, with colours and redrawing only on a terminal.

- `--json` gives exactly one document on standard output: `{\"data\": …}`, or `{\"error\": {\"code\", \"message\", \"hint\", \"exit_code\", …}}`.
- Streams (`logs -f`, `events -f`, `status --watch`, `deploy`, `move`, `rollback` and `scale` with `--watch`, `moves watch`) give one document a line: `{\"event\": …}`,
  `{\"line\": …}` or `{\"data\": …}` for each element. A watched move ends with one `{\"data\": …}` or `{\"error\": …}`.
- Without a terminal, tables are tab-separated with a header line, nothing is ever asked (what would be asked about needs `--yes`), and waiting
  writes one plain line an event.
- Ctrl-C while watching only stops watching (exit code 0): the move goes on, and the command to watch it again is printed.
- The token is taken from `--token`, `--token-file`, `PEREGRINE_TOKEN`, `PEREGRINE_TOKEN_FILE`, or `api-token` in the data folder (`--data`, `PEREGRINE_DATA`),
  in this order.
";

fn visible(arg: &Arg) -> bool {
    !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version")
}

fn node(command: &Command, above: &str) -> Node {
    let path = [above, command.get_name()].join(" ").trim().to_owned();
    let own = |arg: &&Arg| visible(arg) && !arg.is_global_set();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    Node {
        description: command.get_long_about().map_or_else(|| about.clone(), ToString::to_string),
        usage: command.clone().render_usage().to_string().trim_start_matches("Usage: ").to_owned(),
        changes: CHANGING.contains(&path.as_str()),
        arguments: command.get_positionals().filter(own).map(option).collect(),
        options: command.get_arguments().filter(own).filter(|arg| !arg.is_positional()).map(option).collect(),
        commands: command.get_subcommands().map(|below| node(below, &path)).collect(),
        about,
        path,
    }
}

fn option(arg: &Arg) -> Parameter {
    let takes_value = arg.get_action().takes_values();
    let names = || {
        arg.get_value_names().map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
    };
    let text = |values: &[clap::builder::OsStr]| {
        let values: Vec<_> = values.iter().map(|value| value.to_string_lossy().into_owned()).collect();
        (!values.is_empty()).then(|| values.join(","))
    };
    Parameter {
        name: arg.get_long().map_or_else(|| arg.get_id().to_string(), ToOwned::to_owned),
        short: arg.get_short(),
        help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
        value: takes_value.then(|| names().unwrap_or_else(|| arg.get_id().to_string().to_uppercase())),
        possible_values: if takes_value {
            arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect()
        } else {
            Vec::new()
        },
        default: if takes_value { text(arg.get_default_values()) } else { None },
        environment: arg.get_env().map(|name| name.to_string_lossy().into_owned()),
        required: arg.is_required_set(),
        repeated: matches!(arg.get_action(), clap::ArgAction::Append | clap::ArgAction::Count)
            || arg.get_num_args().is_some_and(|range| range.max_values() > 1),
    }
}

fn node_markdown(node: &Node, page: &mut String) {
    page.push_str(&format!("\n### peregrine {}\n\n{}\n\n    {}\n", node.path, node.description, node.usage));
    if !node.arguments.is_empty() || !node.options.is_empty() {
        page.push('\n');
        let all: Vec<&Parameter> = node.arguments.iter().chain(&node.options).collect();
        table(&all, node.arguments.len(), page);
    }
    for below in &node.commands {
        node_markdown(below, page);
    }
}

fn options_table(options: &[Parameter], page: &mut String) {
    table(&options.iter().collect::<Vec<_>>(), 0, page);
}

fn table(options: &[&Parameter], positional: usize, page: &mut String) {
    page.push_str("| | |\n|---|---|\n");
    for (index, option) in options.iter().enumerate() {
        let name = if index < positional {
            option.value.clone().unwrap_or_default()
        } else {
            let short = option.short.map(|short| format!("-{short}, ")).unwrap_or_default();
            let value = option.value.as_ref().map(|value| format!(" {value}")).unwrap_or_default();
            format!("{short}--{}{value}", option.name)
        };
        let mut help = option.help.clone();
        if !option.possible_values.is_empty() {
            help.push_str(&format!(" (`{}`)", option.possible_values.join("`, `")));
        }
        if let Some(default) = &option.default {
            help.push_str(&format!("; default `{default}`"));
        }
        if let Some(environment) = &option.environment {
            help.push_str(&format!("; environment `{environment}`"));
        }
        page.push_str(&format!("| `{name}` | {} |\n", cell(&help)));
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args;

    /// Commands that only read; `certs export` writes files of this machine, and nothing on the server.
    const READING: &[&str] = &[
        "moves list",
        "moves show",
        "moves watch",
        "moves receipt",
        "status",
        "services list",
        "services show",
        "instances",
        "machines list",
        "machines show",
        "machines check",
        "domains check",
        "domains list",
        "certs list",
        "certs show",
        "certs export",
        "edges list",
        "logs",
        "events",
        "audit list",
        "audit verify",
        "doctor",
        "config check",
        "completion",
        "man",
        "version",
        "help",
    ];

    /// Paths of the commands that do something by themselves: also of one that has others below it, such as `edge`.
    fn doing(above: &Command, path: &str, into: &mut Vec<String>) {
        for command in above.get_subcommands() {
            let path = [path, command.get_name()].join(" ").trim().to_owned();
            if !command.is_subcommand_required_set() {
                into.push(path.clone());
            }
            doing(command, &path, into);
        }
    }

    #[test]
    fn every_command_says_whether_it_changes_something_and_none_is_forgotten() {
        let mut commands = Vec::new();
        doing(&args::build(), "", &mut commands);
        for command in &commands {
            let (changes, reads) = (CHANGING.contains(&&**command), READING.contains(&&**command));
            assert!(changes != reads, "{command} belongs in one of the two lists: {changes} {reads}");
        }
        for path in CHANGING.iter().chain(READING) {
            assert!(commands.iter().any(|command| command == path), "there is no {path}");
        }
        let words: Vec<String> = ["domains", "add"].map(str::to_owned).into();
        assert!(tree(&args::build()).find(&words).expect("a command").changes);
    }

    #[test]
    fn every_command_and_option_has_a_help_text() {
        let tree = tree(&args::build());
        for leaf in tree.leaves() {
            assert!(!leaf.about.is_empty(), "{}", leaf.path);
            for option in leaf.arguments.iter().chain(&leaf.options) {
                assert!(!option.help.is_empty(), "{} {}", leaf.path, option.name);
            }
        }
    }

    /// `docs/cli.md` is a promise: rewrite it with `peregrine help --markdown > docs/cli.md`.
    #[test]
    fn the_page_on_the_command_line_is_what_the_binary_says() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
        let page = std::fs::read_to_string(&path).expect("docs/cli.md");
        let wanted = tree(&args::build()).markdown();
        let differs = page.lines().zip(wanted.lines()).position(|(page, wanted)| page != wanted);
        assert!(
            page == wanted,
            "docs/cli.md differs from line {differs:?}: peregrine help --markdown > docs/cli.md"
        );
    }
}
