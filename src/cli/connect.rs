//! Which server, and with which credential.
//!
//! The order is fixed and documented: option, environment, data folder. A failure tells which of them was
//! used, never the value.

use std::path::{Path, PathBuf};

use super::args::Global;
use super::failure::{Failure, Result};

/// Name of the token file in the data folder.
pub(crate) const TOKEN_FILE: &str = "api-token";

/// No token is longer; a larger file is a wrong file.
const MAX_TOKEN_BYTES: u64 = 4096;

/// What of the environment bears on the connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Environment {
    /// `PEREGRINE_TOKEN`.
    pub(crate) token: Option<String>,
    /// `PEREGRINE_TOKEN_FILE`.
    pub(crate) token_file: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub(crate) data_home: Option<PathBuf>,
    /// `HOME`.
    pub(crate) home: Option<PathBuf>,
    /// The user is root.
    pub(crate) root: bool,
}

impl Environment {
    /// That of this process.
    pub(crate) fn of_this_process() -> Self {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            token: std::env::var("PEREGRINE_TOKEN").ok().filter(|token| !token.is_empty()),
            token_file: path("PEREGRINE_TOKEN_FILE"),
            data_home: path("XDG_DATA_HOME"),
            home: path("HOME"),
            root: effective_user_is_root(),
        }
    }
}

/// A token, and where it is from.
#[derive(Clone)]
pub(crate) struct Credential {
    /// The token. Never printed.
    pub(crate) token: Option<String>,
    /// Where it is from, in words.
    pub(crate) source: String,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential").field("source", &self.source).finish_non_exhaustive()
    }
}

/// The data folder: `--data` or `PEREGRINE_DATA`, else the default of the user.
pub(crate) fn data_folder(global: &Global, environment: &Environment) -> PathBuf {
    global.data.clone().unwrap_or_else(|| default_data_folder(environment))
}

fn default_data_folder(environment: &Environment) -> PathBuf {
    if environment.root {
        return PathBuf::from("/var/lib/peregrine");
    }
    let home = || environment.home.as_ref().map(|home| home.join(".local/share"));
    match environment.data_home.clone().filter(|path| path.is_absolute()).or_else(home) {
        Some(folder) => folder.join("peregrine"),
        None => PathBuf::from("/var/lib/peregrine"),
    }
}

/// The credential, from the first place that has one.
pub(crate) fn credential(global: &Global, environment: &Environment) -> Result<Credential> {
    let of = |token: &str, source: String| -> Result<Credential> {
        Ok(Credential { token: Some(checked(token, &source)?), source })
    };
    if let Some(token) = &global.token {
        return of(token, "--token".into());
    }
    if let Some(path) = &global.token_file {
        return of(&read(path)?, format!("--token-file {}", path.display()));
    }
    if let Some(token) = &environment.token {
        return of(token, "PEREGRINE_TOKEN".into());
    }
    if let Some(path) = &environment.token_file {
        return of(&read(path)?, format!("PEREGRINE_TOKEN_FILE ({})", path.display()));
    }
    let path = data_folder(global, environment).join(TOKEN_FILE);
    match std::fs::metadata(&path) {
        Ok(_) => of(&read(&path)?, path.display().to_string()),
        Err(error) => {
            // The server may ask for none; it decides, and then the message names this place.
            Ok(Credential { token: None, source: format!("no token: {}: {error}", path.display()) })
        }
    }
}

fn read(path: &Path) -> Result<String> {
    let length =
        std::fs::metadata(path).map_err(|error| Failure::file(path, "read the token file", &error))?.len();
    if length > MAX_TOKEN_BYTES {
        return Err(Failure::usage(format!("{} is not a token file: it has {length} bytes", path.display())));
    }
    std::fs::read_to_string(path).map_err(|error| Failure::file(path, "read the token file", &error))
}

/// A token goes into a header: anything but visible ASCII is a mistake that is told here.
fn checked(token: &str, source: &str) -> Result<String> {
    let token = token.trim();
    if token.is_empty() {
        return Err(Failure::usage(format!("the token is empty (from {source})")));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::usage(format!("the token has characters that no token has (from {source})")));
    }
    Ok(token.to_owned())
}

fn effective_user_is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of our own entry in /proc is the effective user; elsewhere the home folder decides.
    std::fs::metadata("/proc/self")
        .map_or_else(|_| std::env::var_os("USER").is_some_and(|u| u == "root"), |m| m.uid() == 0)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::Cli;

    fn global(arguments: &[&str]) -> Global {
        let arguments = [&["peregrine"], arguments, &["version"]].concat();
        Cli::try_parse_from(arguments).expect("arguments").global
    }

    fn environment() -> Environment {
        Environment { home: Some("/home/ana".into()), ..Environment::default() }
    }

    #[test]
    fn an_option_beats_the_environment_and_the_environment_beats_the_data_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(TOKEN_FILE), "from-data\n").unwrap();
        let file = folder.path().join("other");
        std::fs::write(&file, "from-file").unwrap();
        let data = format!("--data={}", folder.path().display());

        let plain = credential(&global(&[&data]), &environment()).unwrap();
        assert_eq!(plain.token.as_deref(), Some("from-data"));
        let by_environment = Environment { token: Some("from-env".into()), ..environment() };
        let of_environment = credential(&global(&[&data]), &by_environment).unwrap();
        assert_eq!(
            (of_environment.token.as_deref(), &*of_environment.source),
            (Some("from-env"), "PEREGRINE_TOKEN")
        );
        let of_file =
            credential(&global(&["--token-file", file.to_str().unwrap()]), &by_environment).unwrap();
        assert_eq!(of_file.token.as_deref(), Some("from-file"));
        let of_option = credential(&global(&["--token", "from-option"]), &by_environment).unwrap();
        assert_eq!((of_option.token.as_deref(), &*of_option.source), (Some("from-option"), "--token"));
    }

    #[test]
    fn a_missing_token_names_the_place_where_it_was_looked_for() {
        let credential = credential(&global(&["--data", "/nowhere"]), &environment()).unwrap();
        assert!(credential.token.is_none());
        assert!(credential.source.contains("/nowhere/api-token"), "{}", credential.source);
    }

    #[test]
    fn a_token_is_never_shown() {
        let credential = credential(&global(&["--token", "s3cret"]), &environment()).unwrap();
        assert!(!format!("{credential:?}").contains("s3cret"));
        let bad = super::credential(&global(&["--token", "s3 cret"]), &environment()).unwrap_err();
        assert!(!bad.message.contains("s3") && bad.message.contains("--token"), "{}", bad.message);
    }

    #[test]
    fn the_default_data_folder_follows_the_user() {
        let folder = |environment: &Environment| data_folder(&global(&[]), environment);
        assert_eq!(folder(&environment()), PathBuf::from("/home/ana/.local/share/peregrine"));
        assert_eq!(folder(&Environment { root: true, ..environment() }), PathBuf::from("/var/lib/peregrine"));
        let xdg = Environment { data_home: Some("/data".into()), ..environment() };
        assert_eq!(folder(&xdg), PathBuf::from("/data/peregrine"));
    }
}
