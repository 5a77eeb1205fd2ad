//! Starting a process of an instance.
//!
//! It gets its own process group (a Ctrl-C meant for Peregrine does not reach it), an empty environment but
//! for what is named here, no standard input, and files for its output: nothing ties it to our life.

use std::fs::OpenOptions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};

use super::folder::{Folder, MARK_VARIABLE, Record};
use crate::runtime::InstanceSpec;

/// Where programs are looked for, unless the service says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Starts `command` for the instance.
///
/// # Errors
///
/// Why it could not be started, in words for the operator.
pub(super) fn spawn(
    folder: &Folder,
    record: &Record,
    spec: &InstanceSpec,
    command: &[String],
    directory: Option<&PathBuf>,
) -> Result<Child, String> {
    let [program, arguments @ ..] = command else {
        return Err("the command is empty: give a program and its arguments".to_owned());
    };
    let directory = directory.cloned().unwrap_or_else(|| folder.work());
    let program = fill_in(program, record.address);
    let output = |path: PathBuf| {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        file.map(Stdio::from).map_err(|error| format!("{}: {error}", path.display()))
    };
    let mut command = Command::new(&program);
    command
        .args(arguments.iter().map(|argument| fill_in(argument, record.address)))
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", &directory)
        .envs(&spec.env)
        .env("HOST", record.address.ip().to_string())
        .env("PORT", record.address.port().to_string())
        .env("PEREGRINE_INSTANCE", spec.id.as_str())
        .env(MARK_VARIABLE, &record.mark)
        .current_dir(&directory)
        .process_group(0)
        .kill_on_drop(false)
        .stdin(Stdio::null())
        .stdout(output(folder.stdout())?)
        .stderr(output(folder.stderr())?);
    command.spawn().map_err(|error| match error.kind() {
        // The kernel says the same of a missing program and of a missing working directory.
        io::ErrorKind::NotFound if !directory.is_dir() => {
            format!("the working directory {} is not there", directory.display())
        }
        io::ErrorKind::NotFound => format!(
            "the program {program:?} is not there (looked for in {}); give its full path, or set PATH in the \
             service's environment",
            spec.env.get("PATH").map_or(PATH, String::as_str)
        ),
        io::ErrorKind::PermissionDenied => format!("the program {program:?} may not be executed: {error}"),
        _ => format!("the program {program:?} cannot be started: {error}"),
    })
}

fn fill_in(argument: &str, address: SocketAddr) -> String {
    argument.replace("{port}", &address.port().to_string()).replace("{host}", &address.ip().to_string())
}
