//! The command line as scripts see it: one document on standard output, documented exit codes, no waiting
//! without end, no escape bytes without a terminal. Every leaf of the command tree is walked; one that is
//! added and forgotten here fails the walk.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::server::{Peregrine, free_address, signal};
use crate::support::shop::{Shop, id_of};
use crate::support::wait_for;

/// A command that cannot reach its server ends within this time.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Commands that need no server, or are one.
const LOCAL: &[&str] = &[
    "serve",
    "engine",
    "edge join",
    "edge upgrade",
    "server backup",
    "server restore",
    "demo",
    "doctor",
    "config check",
    "completion",
    "man",
    "version",
    "help",
];

/// Every other command, with arguments that are good as far as the command line can tell.
const ONLINE: &[(&str, &[&str])] = &[
    ("deploy", &["web", "--image", "nothing:1"]),
    ("move", &["nothing", "--to", "nowhere"]),
    ("moves list", &[]),
    ("moves show", &["mov_nothing"]),
    ("moves watch", &["mov_nothing"]),
    ("moves pause", &["mov_nothing"]),
    ("moves resume", &["mov_nothing"]),
    ("moves promote", &["mov_nothing"]),
    ("moves abort", &["mov_nothing"]),
    ("moves rollback", &["mov_nothing"]),
    ("moves cleanup", &["mov_nothing"]),
    ("moves receipt", &["mov_nothing"]),
    ("rollback", &["nothing"]),
    ("scale", &["nothing", "2"]),
    ("status", &[]),
    ("services list", &[]),
    ("services show", &["nothing"]),
    ("services remove", &["nothing", "--yes"]),
    ("instances", &["nothing"]),
    ("machines add", &["far", "--process", "--address", "127.0.0.9"]),
    ("machines list", &[]),
    ("machines show", &["nothing"]),
    ("machines check", &["nothing"]),
    ("machines remove", &["nothing", "--yes"]),
    ("domains add", &["far.test"]),
    ("domains check", &["a b"]),
    ("domains list", &[]),
    ("domains remove", &["nothing.test", "--yes"]),
    ("certs list", &[]),
    ("certs show", &["nothing.test"]),
    ("certs renew", &["nothing.test"]),
    ("certs import", &["nothing.test", "--chain", "/dev/null", "--key", "/dev/null"]),
    ("certs export", &["nothing.test", "--chain", "nothing.pem", "--key", "nothing.key"]),
    ("edges list", &[]),
    ("edges invite", &["nothing"]),
    ("edges remove", &["nothing", "--yes"]),
    ("audit list", &[]),
    ("audit verify", &[]),
    ("logs", &["nothing"]),
    ("events", &[]),
];

/// What is told of something that is not there is found out by the server: these succeed without it.
const NAMES_NOTHING: &[&str] = &[
    "moves list",
    "status",
    "services list",
    "machines add",
    "machines list",
    "domains list",
    "certs list",
    "edges list",
    "audit list",
    "audit verify",
    "events",
];

/// The same of what can be told from the words alone, or from the server's settings: exit codes.
const REFUSED: &[(&str, i32)] = &[("domains add", 5), ("domains check", 2), ("certs import", 2)];

const SLOW: &str = r#"
[service.shop.move]
steps = [50, 100]
step_hold = "30s"
step_max = "40s"
warm = { probes = 1, interval = "20ms" }
"#;

const QUICK: &str = r#"
[service.shop.move]
steps = [100]
step_hold = "50ms"
step_max = "100ms"
warm = { probes = 1, interval = "20ms" }
"#;

/// The binary with nothing of this process's environment that bears on it.
fn peregrine(arguments: &[&str], data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peregrine"));
    for name in ["PEREGRINE_API", "PEREGRINE_TOKEN", "PEREGRINE_TOKEN_FILE", "PEREGRINE_DATA"] {
        command.env_remove(name);
    }
    command.args(arguments).arg("--data").arg(data);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The output of a command that has to end by itself in time.
#[track_caller]
fn ended(mut command: Command, arguments: &[&str]) -> Output {
    let begin = Instant::now();
    let mut child = command.spawn().expect("peregrine runs");
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child can be asked") {
            break status;
        }
        if begin.elapsed() > END_TIMEOUT {
            child.kill().expect("it can be killed");
            panic!("{arguments:?} did not end within {END_TIMEOUT:?}");
        }
        std::thread::park_timeout(Duration::from_millis(10));
    };
    let text = |reader: std::thread::JoinHandle<Vec<u8>>| reader.join().expect("a reader");
    Output { status, stdout: text(stdout), stderr: text(stderr) }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    let mut pipe = pipe.expect("a pipe");
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("a pipe can be read");
        bytes
    })
}

/// The one document of a command with `--json`, which has to be all that it wrote there.
#[track_caller]
fn document(output: &Output, arguments: &[&str]) -> Value {
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|why| {
        panic!(
            "{arguments:?}: not one document ({why}):\n{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
    });
    assert!(!text.trim_end().contains('\n'), "{arguments:?}: one document is one line");
    let keys: Vec<_> = value.as_object().expect("an object").keys().collect();
    let code = output.status.code();
    match keys.as_slice() {
        [key] if *key == "data" => assert_eq!(code, Some(0), "{arguments:?}: {value:#}"),
        [key] if *key == "error" => {
            assert_eq!(code.map(i64::from), value["error"]["exit_code"].as_i64(), "{arguments:?}: {value:#}");
            for field in ["code", "message"] {
                assert!(
                    value["error"][field].as_str().is_some_and(|text| !text.is_empty()),
                    "{arguments:?}: {value:#}"
                );
            }
        }
        other => panic!("{arguments:?}: {other:?}"),
    }
    value
}

#[track_caller]
fn assert_plain(output: &Output, arguments: &[&str]) {
    for bytes in [&output.stdout, &output.stderr] {
        assert!(
            !bytes.contains(&0x1b),
            "{arguments:?}: an escape byte in {}",
            String::from_utf8_lossy(bytes)
        );
    }
}

fn words<'a>(path: &'a str, arguments: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    path.split(' ').chain(arguments.iter().copied()).chain(more.iter().copied()).collect()
}

fn leaves(node: &Value, into: &mut BTreeSet<String>) {
    for below in node["commands"].as_array().expect("commands") {
        if below["commands"].as_array().is_some_and(Vec::is_empty) {
            into.insert(below["path"].as_str().expect("a path").to_owned());
        }
        leaves(below, into);
    }
}

#[test]
fn every_command_of_the_tree_is_walked_here() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let arguments = ["help", "--json"];
    let tree = document(&ended(peregrine(&arguments, scratch.path()), &arguments), &arguments);
    let mut found = BTreeSet::new();
    leaves(&tree["data"], &mut found);
    let walked: BTreeSet<String> =
        LOCAL.iter().copied().chain(ONLINE.iter().map(|(path, _)| *path)).map(str::to_owned).collect();
    assert_eq!(found, walked);
    let codes: Vec<_> =
        tree["data"]["exit_codes"].as_array().expect("codes").iter().map(|c| &c["code"]).collect();
    assert_eq!(codes, [0, 2, 3, 4, 5, 6, 8, 9, 10]);
}

#[test]
fn without_a_server_every_command_ends_in_time_with_exit_code_6_and_one_document() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let api = format!("http://{}", free_address());
    for (path, arguments) in ONLINE {
        let json = words(path, arguments, &["--json", "--api", &api]);
        let output = ended(peregrine(&json, scratch.path()), &json);
        let error = document(&output, &json)["error"].clone();
        assert_eq!(
            (output.status.code(), &error["code"]),
            (Some(6), &"server.unreachable".into()),
            "{json:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&api) && text.contains("api-token") && text.contains("--api"),
            "{json:?}: {text}"
        );
        assert_plain(&output, &json);

        let human = words(path, arguments, &["--api", &api]);
        let output = ended(peregrine(&human, scratch.path()), &human);
        assert_eq!(output.status.code(), Some(6), "{human:?}");
        assert!(output.stdout.is_empty(), "{human:?}: errors do not go to standard output");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "), "{human:?}");
        assert_plain(&output, &human);
    }
}

#[test]
fn a_server_that_accepts_and_never_answers_is_given_up_in_time() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let api = format!("http://{}", silent.local_addr().expect("an address"));
    // Side by side: each waits for its whole time-out.
    std::thread::scope(|scope| {
        for (path, arguments) in ONLINE {
            let (api, scratch) = (&api, scratch.path());
            scope.spawn(move || {
                let json = words(path, arguments, &["--json", "--api", api]);
                let output = ended(peregrine(&json, scratch), &json);
                document(&output, &json);
                assert_eq!(output.status.code(), Some(6), "{json:?}");
            });
        }
    });
}

#[test]
fn what_is_not_there_is_told_with_exit_code_4_and_a_wrong_token_with_3() {
    let server = Peregrine::start("");
    let api = format!("http://{}", server.api());
    for (path, arguments) in ONLINE {
        let json = words(path, arguments, &["--json", "--api", &api]);
        let output = ended(peregrine(&json, &server.data()), &json);
        let said = document(&output, &json);
        let refused = REFUSED.iter().find(|(refused, _)| refused == path).map(|(_, code)| *code);
        let wanted = refused.unwrap_or(if NAMES_NOTHING.contains(path) { 0 } else { 4 });
        assert_eq!(output.status.code(), Some(wanted), "{json:?}: {said:#}");

        let refused = words(path, arguments, &["--json", "--api", &api, "--token", "pgn_wrong"]);
        let output = ended(peregrine(&refused, &server.data()), &refused);
        let said = document(&output, &refused).to_string();
        assert_eq!(output.status.code(), Some(3), "{refused:?}: {said}");
        assert!(said.contains("credential: --token") && !said.contains("pgn_wrong"), "{refused:?}: {said}");
    }
}

#[test]
fn a_mistake_on_the_command_line_is_exit_code_2_in_both_forms() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let bad = scratch.path().join("bad.toml");
    std::fs::write(&bad, "[service.web]\nimagee = \"x:1\"\nport = 80\n").expect("a file");
    let bad = bad.display().to_string();
    let mistakes: &[&[&str]] = &[
        &["depoly"],
        &["move", "shop"],
        &["move", "shop", "--to", "b", "--steps", "50,10"],
        &["move", "shop", "--to", "b", "--soak", "10"],
        &["move", "shop", "--to", "b", "--abort-on", "latency=1%"],
        &["move", "shop", "--to", "b", "--plan", "--detach"],
        &["machines", "add", "x", "--address", "10.0.0.1"],
        &["machines", "add", "x", "--docker", "ssh://a@h", "--address", "10.0.0.1"],
        &["services", "remove", "shop"],
        &["machines", "remove", "host-a"],
        &["scale", "shop", "0"],
        &["deploy", "-f", "/nowhere/peregrine.toml"],
        &["deploy", "-f", &bad],
        &["config", "check", &bad],
        &["config", "check", "/nowhere"],
        &["completion", "nosuchshell"],
        &["man", "/proc/nowhere"],
        &["help", "nosuch"],
        &["version", "--bogus"],
        &["demo", "--rate", "0"],
        &["serve", "--config", "/nowhere/server.toml"],
        &["status", "--api", "not a url"],
        &["status", "--token-file", "/nowhere/token"],
    ];
    for mistake in mistakes {
        let json = [mistake, &["--json"][..]].concat();
        let output = ended(peregrine(&json, scratch.path()), &json);
        let error = document(&output, &json)["error"].clone();
        assert_eq!(output.status.code(), Some(2), "{json:?}: {error:#}");
        let output = ended(peregrine(mistake, scratch.path()), mistake);
        assert_eq!(output.status.code(), Some(2), "{mistake:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{mistake:?}");
        assert_plain(&output, mistake);
    }
    let check = ["config", "check", &bad, "--json"];
    let error = document(&ended(peregrine(&check, scratch.path()), &check), &check)["error"].clone();
    let places = error["mistakes"].as_array().expect("a list");
    assert!(places.iter().any(|place| place["line"] == 2 && place["column"] == 1), "{error:#}");
    assert!(error.to_string().contains("image"), "the right key is suggested: {error:#}");
}

#[test]
fn commands_that_need_no_server_give_one_document() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let good = scratch.path().join("good.toml");
    std::fs::write(&good, "[edge]\nhttp = [\"127.0.0.1:8080\"]\n").expect("a file");
    let (good, pages) = (good.display().to_string(), scratch.path().join("man").display().to_string());
    let successes: &[&[&str]] = &[
        &["version"],
        &["--version"],
        &["help"],
        &["help", "moves", "abort"],
        &["--help"],
        &["move", "--help"],
        &["completion", "bash"],
        &["completion", "zsh"],
        &["completion", "fish"],
        &["man"],
        &["man", &pages],
        &["config", "check", &good],
    ];
    for success in successes {
        let json = [success, &["--json"][..]].concat();
        let output = ended(peregrine(&json, scratch.path()), &json);
        assert!(document(&output, &json).get("data").is_some(), "{json:?}");
        let output = ended(peregrine(success, scratch.path()), success);
        assert!(output.status.success() && !output.stdout.is_empty(), "{success:?}");
        assert_plain(&output, success);
    }
    assert!(Path::new(&pages).join("peregrine-moves-abort.1").exists());
}

#[test]
fn the_doctor_finds_a_good_server_good_and_a_missing_one_missing() {
    let server = Peregrine::start(crate::support::shop::TWO_HOSTS);
    let api = format!("http://{}", server.api());
    let config = server.dir().join("server.toml").display().to_string();
    let arguments = ["doctor", "--json", "--api", &api, "--config", &config];
    let output = ended(peregrine(&arguments, &server.data()), &arguments);
    let said = document(&output, &arguments);
    assert_eq!(output.status.code(), Some(0), "{said:#}");
    let names: Vec<_> =
        said["data"]["checks"].as_array().expect("checks").iter().map(|c| c["name"].to_string()).collect();
    for name in [
        "binary",
        "server",
        "token",
        "clock",
        "machine host-a",
        "machine host-b",
        "data folder",
        "token file",
    ] {
        assert!(names.iter().any(|found| found.contains(name)), "{name} in {names:?}");
    }
    let api = format!("http://{}", free_address());
    let arguments = ["doctor", "--json", "--api", &api];
    let output = ended(peregrine(&arguments, &server.data()), &arguments);
    let error = document(&output, &arguments)["error"].clone();
    assert_eq!(output.status.code(), Some(9), "{error:#}");
    let failed = error["checks"].as_array().expect("checks").iter().find(|check| check["state"] == "failed");
    assert!(failed.expect("a failed check")["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{error:#}");
}

/// Stands between a command and the API, loses the first answer to a change, and keeps what was sent.
struct LosesAnAnswer {
    address: std::net::SocketAddr,
    sent: Arc<Mutex<String>>,
}

impl LosesAnAnswer {
    fn before(api: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let sent = Arc::new(Mutex::new(String::new()));
        let all = Arc::clone(&sent);
        let loses = Arc::new(AtomicBool::new(true));
        // Ends with the test's process: nothing of it is waited for.
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let (connection, all, loses) =
                    (connection.expect("a connection"), all.clone(), loses.clone());
                std::thread::spawn(move || pass_on(connection, api, &all, &loses));
            }
        });
        Self { address, sent }
    }

    /// The idempotency keys of the requests that went through, in order.
    fn keys(&self) -> Vec<String> {
        let sent = self.sent.lock().expect("a lock");
        let keys = sent.lines().filter_map(|line| line.strip_prefix("idempotency-key: "));
        keys.map(|key| key.trim().to_owned()).collect()
    }
}

/// One request after the other, as the client waits for each answer.
fn pass_on(mut client: TcpStream, api: std::net::SocketAddr, all: &Mutex<String>, loses: &AtomicBool) {
    let mut server = TcpStream::connect(api).expect("the API listens");
    while let Some(request) = read_message(&mut client) {
        let is_change = request.starts_with("POST ");
        all.lock().expect("a lock").push_str(&request);
        server.write_all(request.as_bytes()).expect("the API reads");
        let answer = read_message(&mut server).expect("the API answers");
        if is_change && loses.swap(false, Ordering::Relaxed) {
            return;
        }
        if client.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// A head, and the body that its length announces.
fn read_message(from: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut piece = [0; 4_096];
    loop {
        let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length = length.map_or(0, |length| length.trim().parse().expect("a length"));
            if body.len() >= length {
                return Some(String::from_utf8(bytes).expect("UTF-8"));
            }
        }
        match from.read(&mut piece) {
            Ok(0) | Err(_) => return None,
            Ok(length) => bytes.extend_from_slice(&piece[..length]),
        }
    }
}

#[test]
fn an_answer_that_is_lost_is_asked_for_again_with_the_same_key_and_nothing_is_done_twice() {
    let shop = Shop::open(QUICK);
    let second_version = shop.manifest(&[("ORIGIN_VERSION", "two")], QUICK);
    let moves = || shop.server.ok(&["moves", "list"])["items"].as_array().expect("a list").len();
    let moved = id_of(&shop.move_to("host-b"));
    let changes: &[(&[&str], usize)] = &[
        (&["machines", "add", "host-c", "--process", "--address", "127.0.0.3"], 0),
        (&["moves", "rollback", &moved], 1),
        (&["move", "shop", "--to", "host-b"], 1),
        (&["deploy", "-f", &second_version], 1),
        (&["rollback", "shop"], 1),
        (&["scale", "shop", "2"], 1),
    ];
    let mut seen = BTreeSet::new();
    for (change, starts) in changes {
        let before = moves();
        let between = LosesAnAnswer::before(shop.server.api());
        let api = format!("http://{}", between.address);
        // Detached, so that a watch does not ask the API through what stands between.
        let detach: &[&str] = if *starts > 0 { &["--detach"] } else { &[] };
        let arguments = [change, detach, &["--json", "--api", &api]].concat();
        let output = ended(peregrine(&arguments, &shop.server.data()), &arguments);
        let said = document(&output, &arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said:#}");
        let keys = between.keys();
        assert_eq!(keys.len(), 2, "{change:?}: asked once more: {keys:?}");
        assert_eq!(keys[0], keys[1], "{change:?}");
        assert!(keys[0].len() == 36 && seen.insert(keys[0].clone()), "{change:?}: a fresh UUID: {keys:?}");
        assert_eq!(moves(), before + starts, "{change:?} was done once");
        wait_for("the change to end", || {
            let listed = shop.server.ok(&["moves", "list"]);
            let items = listed["items"].as_array().expect("a list").clone();
            items.iter().all(|of| of["state"] == "succeeded").then_some(())
        });
    }
}

#[test]
fn every_command_succeeds_on_a_real_service_in_both_forms() {
    let shop = Shop::open(QUICK);
    let api = format!("http://{}", shop.server.api());
    let manifest = shop.manifest(&[], QUICK);
    let moved = shop.move_to("host-b");
    let id = id_of(&moved);
    assert_eq!(moved["receipt"]["failed"], 0, "{moved:#}");
    assert!(moved["next"]["undo"].as_str().is_some_and(|undo| undo.contains(&id)), "{moved:#}");
    let commands: &[&[&str]] = &[
        &["status"],
        &["services", "list"],
        &["services", "show", "shop"],
        &["instances"],
        &["instances", "shop", "--stats"],
        &["machines", "list"],
        &["machines", "show", "host-a"],
        &["machines", "check", "host-a"],
        &["machines", "add", "host-c", "--process", "--address", "127.0.0.3", "--label", "zone=c"],
        &["machines", "remove", "host-c", "--yes"],
        &["moves", "list", "--service", "shop", "--state", "succeeded"],
        &["moves", "show", &id],
        &["moves", "watch", &id],
        &["moves", "receipt", &id],
        &["moves", "cleanup", &id],
        &["deploy", "-f", &manifest],
        &["deploy", "-f", &manifest, "--plan"],
        &["move", "shop", "--to", "host-a", "--plan"],
        &["scale", "shop", "2"],
        &["scale", "shop", "1"],
        &["logs", "shop", "--tail", "5"],
        &["events"],
        &["events", "--move", &id],
    ];
    for json in [true, false] {
        for command in commands {
            let form: &[&str] = if json { &["--json", "--api", &api] } else { &["--api", &api] };
            let arguments = [command, form].concat();
            let output = peregrine(&arguments, &shop.server.data()).output().expect("peregrine runs");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
            assert_plain(&output, &arguments);
            if json {
                document(&output, &arguments);
                assert!(stderr.is_empty(), "{arguments:?}: {stderr}");
            }
        }
    }
}

#[test]
fn waiting_without_a_terminal_writes_plain_lines_with_a_time_and_ends_with_receipt_and_undo() {
    let shop = Shop::open(QUICK);
    let api = format!("http://{}", shop.server.api());
    let arguments = ["move", "shop", "--to", "host-b", "--api", &api];
    let output = peregrine(&arguments, &shop.server.data()).output().expect("peregrine runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(
        stdout.starts_with("0 failed of ") && stdout.contains("peregrine moves rollback mov_"),
        "{stdout}"
    );
    let lines: Vec<_> = stderr.lines().filter(|line| line.starts_with("20")).collect();
    assert!(lines.iter().any(|line| line.contains("shop shift")), "{stderr}");
    assert!(lines.iter().all(|line| line.as_bytes().get(23) == Some(&b'Z')), "{stderr}");
    assert_plain(&output, &arguments);
}

#[test]
fn a_watched_move_is_a_stream_that_ends_with_the_result() {
    let shop = Shop::open(QUICK);
    let api = format!("http://{}", shop.server.api());
    let arguments = ["move", "shop", "--to", "host-b", "--watch", "--json", "--api", &api];
    let output = peregrine(&arguments, &shop.server.data()).output().expect("peregrine runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a document a line")).collect();
    let (last, events) = lines.split_last().expect("lines");
    assert_eq!(last["data"]["move"]["state"], "succeeded", "{text}");
    assert!(!events.is_empty() && events.iter().all(|line| line["event"]["type"].is_string()), "{text}");
    let ids: Vec<_> = events.iter().map(|line| line["event"]["id"].as_u64().expect("an id")).collect();
    assert!(ids.is_sorted(), "{ids:?}");
}

#[test]
fn streams_give_one_document_a_line_as_things_happen() {
    let shop = Shop::open(QUICK);
    let api = format!("http://{}", shop.server.api());
    for (command, key) in [(&["events", "-f", "--after", "0"][..], "event"), (&["status", "--watch"], "data")]
    {
        let arguments = [command, &["--json", "--api", &api]].concat();
        let mut child = peregrine(&arguments, &shop.server.data()).spawn().expect("peregrine runs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        for _ in 0..2 {
            let line = lines.next().expect("a line").expect("a line");
            let value: Value =
                serde_json::from_str(&line).unwrap_or_else(|why| panic!("{arguments:?}: {why}: {line}"));
            assert!(value.get(key).is_some(), "{arguments:?}: {line}");
        }
        assert_eq!(interrupted(child), Some(0), "{arguments:?}: Ctrl-C ends a stream as it should be");
    }
}

#[test]
fn ctrl_c_while_watching_leaves_the_move_alone_and_says_how_to_go_on() {
    let shop = Shop::open(SLOW);
    let api = format!("http://{}", shop.server.api());
    let arguments = ["move", "shop", "--to", "host-b", "--api", &api];
    let mut child = peregrine(&arguments, &shop.server.data()).spawn().expect("peregrine runs");
    let stdout = drain(child.stdout.take());
    let mut notes = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let shifting = notes.find(|line| line.as_ref().is_ok_and(|line| line.contains("shop shift")));
    assert!(shifting.is_some(), "the watch gets to the shift");
    assert_eq!(interrupted(child), Some(0), "detaching is no failure");
    let id = String::from_utf8(stdout.join().expect("a reader")).expect("UTF-8").trim().to_owned();
    let notes: Vec<_> = notes.map(|line| line.expect("a line")).collect();
    assert!(id.starts_with("mov_"), "{id}");
    assert!(notes.iter().any(|note| note.contains(&format!("peregrine moves watch {id}"))), "{notes:?}");
    assert_eq!(shop.the_move(&id)["state"], "running");
    shop.server.ok(&["moves", "abort", &id]);
    assert_eq!(shop.server.run(&["moves", "watch", &id]).code, 10);
}

#[test]
fn a_move_that_a_guard_or_an_operator_turns_back_ends_its_watch_with_exit_code_10() {
    let shop = Shop::open(SLOW);
    let child = shop.server.spawn(&["move", "shop", "--to", "host-b"]);
    let id = wait_for("the move", || {
        let listed = shop.server.ok(&["moves", "list", "--state", "running"]);
        listed["items"].get(0).and_then(|of| of["id"].as_str().map(str::to_owned))
    });
    shop.server.ok(&["moves", "abort", &id]);
    let output = child.wait_with_output().expect("it ends");
    let said = document(&output, &["move"]);
    assert_eq!(output.status.code(), Some(10), "{said:#}");
    assert_eq!(said["error"]["outcome"]["move"]["state"], "aborted", "{said:#}");
}

/// Sends Ctrl-C and waits for the exit code.
fn interrupted(mut child: Child) -> Option<i32> {
    signal(child.id(), "INT");
    let mut status = None;
    wait_for("the end after Ctrl-C", || {
        status = child.try_wait().expect("a child can be asked");
        status.map(drop)
    });
    status.and_then(|status| status.code())
}
