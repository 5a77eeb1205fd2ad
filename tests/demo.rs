//! The demo: what a newcomer sees first, and that nothing of it stays behind.

use std::process::{Command, Stdio};

use crate::support::docker;

fn demo(arguments: &[&str]) -> (bool, String) {
    let home = tempfile::tempdir().expect("a scratch folder");
    let output = Command::new(env!("CARGO_BIN_EXE_peregrine"))
        .args(["demo", "--rate", "200"])
        .args(arguments)
        .env("TMPDIR", home.path())
        .stdin(Stdio::null())
        .output()
        .expect("peregrine runs");
    let left: Vec<_> =
        std::fs::read_dir(home.path()).expect("folder").flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

fn assert_told(text: &str) {
    for told in [
        "host-a → host-b",
        "host-b → host-a",
        "receipt",
        "drained to the last one",
        "the clients say      0 failed",
    ] {
        assert!(text.contains(told), "{told:?} is missing in:\n{text}");
    }
    assert!(text.contains(" 0 failed\n"), "{text}");
    assert!(text.contains("everything is gone"), "{text}");
}

#[test]
fn the_demo_with_plain_processes_moves_to_and_fro_and_leaves_nothing_behind() {
    let (success, text) = demo(&["--runtime", "process"]);
    assert!(success, "{text}");
    assert_told(&text);
    assert!(text.contains("plain processes"), "{text}");
    assert!(docker::processes_with("demo-shop").is_empty(), "a shop still runs");
}

#[test]
fn the_demo_with_docker_streams_the_image_and_leaves_nothing_behind() {
    if !docker::is_there() {
        return;
    }
    let namespaces = docker::namespaces();
    let (success, text) = demo(&["--runtime", "docker"]);
    assert!(success, "{text}");
    assert_told(&text);
    assert!(text.contains("image  "), "the first move brings the image: {text}");
    assert_eq!(docker::namespaces(), namespaces, "a namespace is left");
    assert!(docker::processes_with("demo-shop").is_empty(), "a shop still runs");
}
