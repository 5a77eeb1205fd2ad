//! The demo: what a newcomer sees first, and that nothing of it stays behind, however it ends.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;

use serde_json::Value;

use crate::support::server::{first_line_then_ctrl_c, signal};
use crate::support::{STATE_TIMEOUT, docker, wait_for};

/// From the start to the first request that is served.
const FIRST_REQUEST_LIMIT_S: f64 = 15.0;

/// A demo that runs, in a folder that holds all that it may make.
struct Demo {
    child: Child,
    lines: mpsc::Receiver<String>,
    told: String,
    home: tempfile::TempDir,
    network: Vec<String>,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        let home = tempfile::tempdir().expect("a scratch folder");
        let network = docker::network();
        let mut child = within(home.path(), env!("CARGO_BIN_EXE_peregrine"))
            .args(["demo", "--rate", "200"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("peregrine runs");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        Self { child, lines, told: String::new(), home, network }
    }

    /// Reads on to the line that has this in it.
    #[track_caller]
    fn until(&mut self, what: &str) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(STATE_TIMEOUT) else {
                panic!("{what:?} was not told:\n{}", self.told);
            };
            self.told.push_str(&line);
            self.told.push('\n');
            if line.contains(what) {
                return line;
            }
        }
    }

    fn interrupt(&self) {
        signal(self.child.id(), "INT");
    }

    /// Waits for its end; nothing of it is left then.
    #[track_caller]
    fn ended(mut self) -> (ExitStatus, String) {
        let mut status = None;
        wait_for("the end of the demo", || {
            status = self.child.try_wait().expect("a child can be asked");
            status
        });
        let rest: Vec<String> = self.lines.iter().map(|line| line + "\n").collect();
        self.told.extend(rest);
        let home = self.home.path();
        let left: Vec<_> =
            std::fs::read_dir(home).expect("folder").flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "left behind: {left:?}\n{}", self.told);
        assert_eq!(docker::processes_of(home), [] as [u32; 0], "processes are left\n{}", self.told);
        assert!(docker::processes_with("demo-shop").is_empty(), "a shop still runs\n{}", self.told);
        let set = |lines: &[String]| lines.iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!(
            set(&docker::network()),
            set(&self.network),
            "the network is not as before\n{}",
            self.told
        );
        (status.expect("it has ended"), std::mem::take(&mut self.told))
    }
}

/// A program that can make its files in this folder alone.
fn within(home: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    for name in ["TMPDIR", "HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"] {
        command.env(name, home);
    }
    command.current_dir(home).stdin(Stdio::null());
    command
}

impl Drop for Demo {
    /// A test that fails leaves nothing behind either, if the demo can help it.
    fn drop(&mut self) {
        if std::thread::panicking() && self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.interrupt();
            let _ended = self.child.wait();
        }
    }
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
    let served = text.split("first request served after ").nth(1).and_then(|rest| rest.split(" s").next());
    let served: f64 = served.and_then(|seconds| seconds.parse().ok()).unwrap_or_else(|| panic!("{text}"));
    assert!(served < FIRST_REQUEST_LIMIT_S, "{text}");
    assert!(text.contains("everything is gone"), "{text}");
}

#[test]
fn the_demo_with_plain_processes_moves_to_and_fro_and_leaves_nothing_behind() {
    let (status, text) = Demo::start(&["--runtime", "process"]).ended();
    assert!(status.success(), "{text}");
    assert_told(&text);
    assert!(text.contains("plain processes"), "{text}");
}

#[test]
fn the_demo_with_docker_streams_the_image_and_leaves_nothing_behind() {
    if !docker::is_there() {
        return;
    }
    let (status, text) = Demo::start(&["--runtime", "docker"]).ended();
    assert!(status.success(), "{text}");
    assert_told(&text);
    assert!(text.contains("image  "), "the first move brings the image: {text}");
}

#[test]
fn ctrl_c_at_any_point_of_the_demo_leaves_nothing_behind() {
    let mut runtimes = vec!["process"];
    runtimes.extend(docker::is_there().then_some("docker"));
    for runtime in runtimes {
        for point in ["starting two hosts", "move 1 of 2", "weight   50 %", "phase    drain", "move 2 of 2"] {
            let mut demo = Demo::start(&["--runtime", runtime]);
            demo.until(point);
            demo.interrupt();
            let (status, text) = demo.ended();
            assert!(status.success(), "{runtime} at {point:?}: {text}");
            assert!(text.contains("interrupted: taking everything down"), "{runtime} at {point:?}: {text}");
            assert!(text.ends_with("everything is gone\n"), "{runtime} at {point:?}: {text}");
        }
    }
}

#[test]
fn a_demo_that_stays_prints_commands_that_work_as_typed_and_ends_at_ctrl_c() {
    let mut demo = Demo::start(&["--runtime", "process", "--stay", "--moves", "1"]);
    demo.until("everything stays up until Ctrl-C");
    let surroundings = demo.until("export ").trim().to_owned();
    let mut typed = vec![demo.until("curl ")];
    while !typed.last().expect("a command").contains("events -f") {
        typed.push(demo.until("peregrine"));
    }
    assert!(typed.len() >= 6, "{typed:?}");
    for command in typed.iter().map(|line| line.trim()) {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{surroundings}\nexec {command}")]).stdin(Stdio::null());
        shell.env_remove("PEREGRINE_TOKEN").env_remove("PEREGRINE_TOKEN_FILE");
        if command.contains(" -f") {
            let (line, code) = first_line_then_ctrl_c(&mut shell);
            assert!(!line.is_empty() && code == Some(0), "{command}: {line} {code:?}");
            continue;
        }
        let output = shell.output().expect("sh runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{command}: {text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(!text.is_empty(), "{command}");
    }
    demo.interrupt();
    let (status, text) = demo.ended();
    assert!(status.success() && text.ends_with("everything is gone\n"), "{text}");
}

#[test]
fn the_demo_with_json_is_one_document_and_tells_its_story_beside_it() {
    let home = tempfile::tempdir().expect("a scratch folder");
    let output = within(home.path(), env!("CARGO_BIN_EXE_peregrine"))
        .args(["demo", "--json", "--rate", "200", "--moves", "2", "--runtime", "process"])
        .output()
        .expect("peregrine runs");
    let story = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{story}");
    assert_told(&story);
    let document: Value = serde_json::from_slice(&output.stdout).expect("one document, and nothing else");
    let data = &document["data"];
    let receipts = data["receipts"].as_array().expect("receipts");
    assert_eq!(receipts.len(), 2, "{document:#}");
    for receipt in receipts {
        assert_eq!((&receipt["service"], &receipt["failed"]), (&"shop".into(), &0.into()), "{receipt:#}");
        assert!(story.contains(receipt["move"].as_str().expect("an id")), "{receipt:#}");
    }
    let in_moves: u64 = receipts.iter().filter_map(|receipt| receipt["requests"].as_u64()).sum();
    let clients = &data["clients"];
    // What the clients had sent when it was read, and what was sent during the moves: nearly the same here.
    assert!(in_moves > 0 && clients["requests"].as_u64() > Some(in_moves / 2), "{document:#}");
    assert_eq!((&clients["failed"], &data["interrupted"]), (&0.into(), &false.into()), "{document:#}");
    assert_eq!(std::fs::read_dir(home.path()).expect("folder").count(), 0, "something is left behind");
}

#[test]
fn on_a_terminal_the_demo_shows_phases_weights_and_the_longest_extra_wait_as_they_are() {
    let home = tempfile::tempdir().expect("a scratch folder");
    // `script` is part of every Debian, and gives what it starts a terminal of its own: a wide one, so that no line is cut.
    let demo = format!(
        "stty cols 200 rows 50; exec '{}' demo --rate 200 --moves 1 --runtime process",
        env!("CARGO_BIN_EXE_peregrine")
    );
    let output = within(home.path(), "script")
        .args(["--quiet", "--return", "--command", &demo, "/dev/null"])
        .env("TERM", "xterm")
        .env("SHELL", "/bin/sh")
        .output()
        .expect("script runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    // Lines that are drawn again and again, each time whole.
    let shows = |words: &[&str]| {
        let line = text.split(['\r', '\n']).find(|line| words.iter().all(|word| line.contains(word)));
        assert!(line.is_some(), "no line with {words:?} in:\n{text}");
    };
    shows(&["✔ start", "✔ warm", "shift"]);
    shows(&["host-a", "░", " %", "req/s", "in flight"]);
    shows(&["host-b", "█", " 100 %", "req/s", "in flight"]);
    shows(&["clients", "req/s", "failed 0", "longest extra wait", " ms   "]);
    shows(&["everything is gone"]);
    assert_eq!(std::fs::read_dir(home.path()).expect("folder").count(), 0, "something is left behind");
}
