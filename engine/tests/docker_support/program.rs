//! What the test binary does inside a container, where it is the only program.

use std::io::Write;

/// Arguments that make the test binary play a role.
pub(crate) fn arguments(role: &str) -> Vec<String> {
    let role = format!("docker_support::program::{role}");
    [&role, "--exact", "--ignored", "--nocapture"].map(str::to_owned).to_vec()
}

/// Another user than root.
pub(crate) const NOBODY: u32 = 65_534;

fn is_in_container() -> bool {
    std::env::var_os("IN_TEST_IMAGE").is_some()
}

/// Listens at `PORT` and answers each connection with its environment and its confinement.
#[test]
#[ignore = "played as a program in a container"]
fn serve() {
    if !is_in_container() {
        return;
    }
    let port: u16 = std::env::var("PORT").unwrap().parse().unwrap();
    let socket = std::net::TcpListener::bind(("0.0.0.0", port)).unwrap();
    println!("to stdout");
    eprintln!("to stderr");
    for connection in socket.incoming() {
        let Ok(mut connection) = connection else { continue };
        let mut answer = String::new();
        for (name, value) in std::env::vars() {
            answer.push_str(&format!("env.{name}={value}\n"));
        }
        for line in std::fs::read_to_string("/proc/self/status").unwrap().lines() {
            if let Some((name, value)) = line.split_once(":\t") {
                answer.push_str(&format!("status.{name}={value}\n"));
            }
        }
        let first = std::fs::read_to_string("/proc/1/comm").unwrap();
        answer.push_str(&format!("first={first}"));
        println!("asked");
        drop(connection.write_all(answer.as_bytes())); // the other side may have gone: nothing to do
    }
}

/// Says why and ends with code 3.
#[test]
#[ignore = "played as a program in a container"]
fn fail() {
    if is_in_container() {
        println!("cannot find the thing");
        std::process::exit(3);
    }
}

/// Listens nowhere and does not end by itself.
#[test]
#[ignore = "played as a program in a container"]
fn hang() {
    if is_in_container() {
        println!("hanging");
        let (_sender, receiver) = std::sync::mpsc::channel::<()>();
        let _ = receiver.recv();
    }
}

/// Begins as root, as many images do, and serves as somebody else; code 4 if it may not.
#[test]
#[ignore = "played as a program in a container"]
fn serve_as_nobody() {
    use std::os::unix::process::CommandExt;
    if is_in_container() {
        let mut other = std::process::Command::new(std::env::current_exe().unwrap());
        let error = other.args(arguments("serve")).uid(NOBODY).gid(NOBODY).exec();
        println!("cannot change the user: {error}");
        std::process::exit(4);
    }
}

/// Takes more and more memory.
#[test]
#[ignore = "played as a program in a container"]
fn devour() {
    let mut taken = Vec::new();
    while is_in_container() {
        taken.push(vec![1_u8; 1 << 20]);
    }
}
