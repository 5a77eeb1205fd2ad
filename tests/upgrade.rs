//! One process of an edge takes over from another: what clients, the engine and receipts see of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use peregrine_bench::load::{Load, LoadHandle, LoadOptions, Pace, Summary};
use peregrine_bench::oracle::check_exactly_once;

use crate::support::apart::{Apart, Edge, answers, is_alive, seen, wait_for_state};
use crate::support::server::{http_get, signal};
use crate::support::traffic::Traffic;
use crate::support::wait_for;

/// What takes long has this long after a hand-over.
const DRAIN: &str = r#"
[service.shop.move]
steps = [100]
step_hold = "30ms"
step_max = "120ms"
warm = { probes = 2, interval = "20ms" }
abort_on = { p95_increase = false }

[service.shop.move.drain]
request = "20s"
websocket = "4s"
"#;

/// Upgrades under load.
const UPGRADES: usize = 50;

/// One connection for each request: whoever is refused or reset is a failure.
fn newcomers(runtime: &tokio::runtime::Runtime, edge: SocketAddr, per_second: u32) -> LoadHandle {
    let _inside = runtime.enter();
    let options = LoadOptions {
        host: "shop.test".to_owned(),
        path: "/bytes/100".to_owned(),
        connections: 8,
        pace: Pace::Open { per_second },
        connection_per_request: true,
        ..LoadOptions::new(edge)
    };
    Load::start(options).expect("options are fine")
}

/// What a client of HTTP/2 says of a request that it has not sent, because GOAWAY without an error came first (RFC 9113
/// §6.8), or the connection had ended when its turn came: other clients send it on another connection without a word; that of the
/// tests sends nothing twice. That no origin has executed it is looked up.
const NOT_SENT: [&str; 2] = ["not a result of an error", "operation was canceled: connection closed"];

/// Nobody was refused or reset, and every request was executed once, or was not sent.
#[track_caller]
fn assert_all_answered(summaries: &[Summary], records: &[peregrine_bench::origin::Record]) {
    for summary in summaries {
        let is_not_sent = |detail: &str| NOT_SENT.iter().any(|known| detail.contains(known));
        let not_sent = summary.failures.iter().filter(|failure| is_not_sent(&failure.detail)).count() as u64;
        eprintln!("{} requests, {} answered, {not_sent} not sent after GOAWAY", summary.sent, summary.ok);
        assert_eq!(summary.failed.total(), not_sent, "{:?} of {}", summary.failures, summary.sent);
        assert_eq!(summary.ok + not_sent, summary.sent);
        // Also of what was not acknowledged nothing was executed.
        let verdict = check_exactly_once(&summary.acknowledged, records);
        assert!(verdict.is_exactly_once() && verdict.executed_unacknowledged == 0, "{verdict:#?}");
    }
}

/// A WebSocket at the origin's echo.
struct Socket(TcpStream);

impl Socket {
    fn open(edge: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(edge).expect("the edge accepts");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
        let ask = "GET /ws HTTP/1.1\r\nhost: shop.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(ask.as_bytes()).expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a head");
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        Self(stream)
    }

    /// The next frame: its first byte, and its payload, which is short.
    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).expect("a frame");
        let mut payload = vec![0; usize::from(head[1])];
        self.0.read_exact(&mut payload).expect("the whole frame");
        (head[0], payload)
    }

    /// Whether what is sent comes back.
    #[track_caller]
    fn assert_echoes(&mut self, text: &str) {
        let mut frame = vec![0x81, 0x80 | u8::try_from(text.len()).expect("short"), 0, 0, 0, 0];
        frame.extend(text.as_bytes());
        self.0.write_all(&frame).expect("sent");
        assert_eq!(self.frame(), (0x81, text.as_bytes().to_vec()));
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

#[test]
fn an_edge_is_upgraded_under_load_and_nobody_is_refused_or_reset() {
    let mut apart = Apart::open(DRAIN);
    let runtime = runtime();
    let (kept, new) = (Traffic::start(apart.edge.http(), 200), newcomers(&runtime, apart.edge.http(), 100));
    for number in 0..UPGRADES {
        let before = apart.edge.upgrade();
        assert_ne!(before, apart.edge.pid());
        let answered = kept.answered();
        wait_for("answers by the process that took over", || (kept.answered() > answered + 20).then_some(()));
        assert!(is_alive(apart.edge.pid()), "upgrade {number}\n{}", apart.edge.log_text());
    }
    let mut summaries = kept.stop();
    summaries.push(runtime.block_on(new.stop()));
    assert_all_answered(&summaries, &apart.shop.records());
    let last = apart.edge.pid();
    wait_for("those before to have ended", || (apart.edge.pids() == [last]).then_some(()));
    wait_for("one process at the engine", || {
        (seen(&apart.shop.server, "edge-1")["state"] == "connected").then_some(())
    });
}

#[test]
fn a_websocket_lives_on_in_the_process_before_until_the_deadline_of_its_class_and_is_closed_politely() {
    let mut apart = Apart::open(DRAIN);
    let mut socket = Socket::open(apart.edge.http());
    socket.assert_echoes("before");
    let (before, begun) = (apart.edge.upgrade(), Instant::now());
    socket.assert_echoes("after");
    assert!(answers(apart.edge.http()), "the new one serves meanwhile");
    let mut other = Socket::open(apart.edge.http());
    other.assert_echoes("at the new one");
    assert!(is_alive(before), "it has a WebSocket");
    let (first, payload) = socket.frame();
    assert_eq!((first, &payload[..2]), (0x88, &1012_u16.to_be_bytes()[..]), "service restart");
    let lived = begun.elapsed();
    assert!(lived >= Duration::from_secs(3), "closed after {lived:?}");
    drop(socket);
    apart.edge.wait_gone(before);
    other.assert_echoes("still");
}

#[test]
fn a_move_waits_for_what_is_inside_of_the_process_before_and_its_receipt_counts_it() {
    let mut apart = Apart::open(DRAIN);
    let edge = apart.edge.http();
    let slow = std::thread::spawn(move || http_get(edge, "/slow?ms=5000").expect("an answer"));
    let old = apart.shop.instances()[0]["id"].as_str().expect("an id").to_owned();
    let in_flight = |apart: &Apart| {
        let known = apart.shop.instances();
        let old = known.iter().find(|instance| instance["id"] == *old);
        old.and_then(|old| old["in_flight"].as_u64()).unwrap_or(0)
    };
    wait_for("it to be inside", || (in_flight(&apart) == 1).then_some(()));
    let before = apart.edge.upgrade();
    assert!(answers(edge), "the new one serves");
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    assert_eq!(in_flight(&apart), 1, "what the process before has is counted");
    let ended = apart.shop.move_to("host-b");
    assert!(slow.is_finished(), "the move has waited for it");
    assert!(slow.join().expect("it ended").starts_with("HTTP/1.1 200"));
    let moved = ended.get("move").unwrap_or(&ended);
    assert_eq!(moved["state"], "succeeded", "{ended:#}");
    let receipt = apart.shop.server.ok(&["moves", "receipt", moved["id"].as_str().expect("id")]);
    assert_eq!(
        (&receipt["failed"], &receipt["hard_cut"]),
        (&0.into(), &serde_json::json!([])),
        "{receipt:#}"
    );
    assert!(receipt.get("lost").is_none_or(|lost| *lost == serde_json::json!([])), "{receipt:#}");
    apart.edge.wait_gone(before);
    assert!(answers(edge));
}

#[test]
fn an_engine_that_is_killed_during_a_hand_over_waits_for_both_processes_when_it_is_back() {
    let mut apart = Apart::open(DRAIN);
    let edge = apart.edge.http();
    let slow = std::thread::spawn(move || http_get(edge, "/slow?ms=12000").expect("an answer"));
    wait_for("it to be inside", || (apart.shop.instances()[0]["in_flight"] == 1).then_some(()));
    let before = apart.edge.upgrade();
    apart.shop.server.kill();
    apart.shop.server.start_again();
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    assert!(is_alive(before));
    let ended = apart.shop.move_to("host-b");
    assert!(slow.is_finished(), "the move has waited for what the process before has");
    assert!(slow.join().expect("it ended").starts_with("HTTP/1.1 200"));
    let moved = ended.get("move").unwrap_or(&ended);
    assert_eq!(moved["state"], "succeeded", "{ended:#}");
}

/// A program that waits until it is let go, and becomes the edge then.
struct Gate {
    program: PathBuf,
    opened: PathBuf,
}

impl Gate {
    fn in_folder_of(edge: &Edge) -> Self {
        let folder = edge.data().parent().expect("a folder").to_owned();
        let (program, opened) = (folder.join("gate"), folder.join("opened"));
        let text = format!(
            "#!/bin/sh\nwhile [ ! -e '{}' ]; do sleep 0.02; done\nexec '{}' \"$@\"\n",
            opened.display(),
            env!("CARGO_BIN_EXE_peregrine")
        );
        std::fs::write(&program, text).expect("a program");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("it can be run");
        Self { program, opened }
    }

    fn open(&self) {
        std::fs::write(&self.opened, "").expect("a file");
    }
}

/// Asks for an upgrade by the program behind the gate, and waits until it stands there.
fn upgrade_at_gate(edge: &Edge, gate: &Gate) -> (std::thread::JoinHandle<i32>, u32) {
    let (before, arguments) = (edge.pids(), ["--binary".to_owned(), gate.program.display().to_string()]);
    let data = edge.data();
    let asking = std::thread::spawn(move || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_peregrine"));
        command.args(["--json", "edge", "upgrade"]).args(arguments).env("PEREGRINE_DATA", data);
        let ended = command.output().expect("peregrine runs");
        ended.status.code().unwrap_or(-1)
    });
    let new =
        wait_for("the new process at the gate", || edge.pids().into_iter().find(|pid| !before.contains(pid)));
    (asking, new)
}

#[test]
fn the_new_process_is_killed_before_it_is_ready_and_the_one_before_goes_on() {
    let apart = Apart::open(DRAIN);
    let traffic = Traffic::start(apart.edge.http(), 200);
    let gate = Gate::in_folder_of(&apart.edge);
    let old = apart.edge.pid();
    let (asking, new) = upgrade_at_gate(&apart.edge, &gate);
    signal(new, "KILL");
    assert_eq!(asking.join().expect("it ended"), 9, "it is told that nothing was done");
    let answered = traffic.answered();
    wait_for("answers", || (traffic.answered() > answered + 50).then_some(()));
    assert_eq!(apart.edge.pids(), [old]);
    crate::support::traffic::assert_nothing_lost(&traffic.stop(), &apart.shop.records());
}

#[test]
fn the_process_before_is_killed_before_the_new_one_is_ready_and_the_new_one_serves() {
    let mut apart = Apart::open(DRAIN);
    let gate = Gate::in_folder_of(&apart.edge);
    let old = apart.edge.pid();
    let (asking, new) = upgrade_at_gate(&apart.edge, &gate);
    signal(old, "KILL");
    apart.edge.is_taken_over_by(new);
    apart.edge.wait_gone(old);
    // Nobody accepts, and nobody is refused: the sockets are on their way to the new one.
    let mut waiting = TcpStream::connect(apart.edge.http()).expect("it is not refused");
    waiting.write_all(b"GET / HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n").expect("sent");
    gate.open();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_ne!(asking.join().expect("it ended"), 0, "nobody was there to say that it went well");
    wait_for_state(&apart.shop.server, "edge-1", "connected");
    assert_eq!(apart.edge.pids(), [new]);
    apart.edge.upgrade();
    assert!(answers(apart.edge.http()), "it can be upgraded as any other");
}

#[test]
fn the_new_process_is_killed_while_the_one_before_ends_what_it_has_and_that_one_serves_again() {
    let mut apart = Apart::open(DRAIN);
    let mut socket = Socket::open(apart.edge.http());
    let before = apart.edge.upgrade();
    let new = apart.edge.pid();
    assert!(answers(apart.edge.http()));
    signal(new, "KILL");
    wait_for("the one before to serve again", || answers(apart.edge.http()).then_some(()));
    socket.assert_echoes("it has never left");
    assert_eq!(apart.edge.pids(), [before]);
    // It is an edge like any other: it is upgraded, and those that it had go on.
    apart.edge.is_taken_over_by(before);
    apart.edge.upgrade();
    socket.assert_echoes("nor now");
    assert!(answers(apart.edge.http()));
}

/// What takes long has longer than whatever a test does meanwhile.
fn patient(websocket: &str) -> String {
    DRAIN.replace("\"4s\"", &format!("{websocket:?}"))
}

/// In the log of an edge that accepts again.
const AGAIN: &str = "serves again";

#[test]
fn after_two_upgrades_the_first_process_accepts_nothing_and_ends_at_its_deadline() {
    let mut apart = Apart::open(&patient("15s"));
    let mut socket = Socket::open(apart.edge.http());
    let first = apart.edge.upgrade();
    let second = apart.edge.upgrade();
    apart.edge.wait_gone(second);
    socket.assert_echoes("in the first");
    assert_eq!(apart.edge.pids(), [first.min(apart.edge.pid()), first.max(apart.edge.pid())]);
    assert_eq!(socket.frame().0, 0x88, "its deadline");
    drop(socket);
    apart.edge.wait_gone(first);
    assert!(!apart.edge.log_text().contains(AGAIN), "the last one serves all the time");
    assert!(answers(apart.edge.http()));
    apart.edge.upgrade();
    assert!(answers(apart.edge.http()), "the socket at which an upgrade is asked for is its own");
}

#[test]
fn the_second_process_is_killed_after_it_has_handed_over_and_the_first_one_accepts_nothing() {
    let mut apart = Apart::open(&patient("15s"));
    let _in_first = Socket::open(apart.edge.http());
    let first = apart.edge.upgrade();
    let _in_second = Socket::open(apart.edge.http());
    let second = apart.edge.upgrade();
    assert!(is_alive(first) && is_alive(second), "they have WebSockets");
    signal(second, "KILL");
    apart.edge.wait_gone(second);
    assert!(answers(apart.edge.http()));
    apart.edge.wait_gone(first);
    assert!(!apart.edge.log_text().contains(AGAIN), "the last one serves all the time");
    assert_eq!(apart.edge.pids(), [apart.edge.pid()]);
    assert!(answers(apart.edge.http()));
}

#[test]
fn of_three_processes_those_that_serve_are_killed_one_after_the_other_and_the_one_that_is_left_serves() {
    let mut apart = Apart::open(&patient("120s"));
    let mut in_first = Socket::open(apart.edge.http());
    let first = apart.edge.upgrade();
    let mut in_second = Socket::open(apart.edge.http());
    let second = apart.edge.upgrade();
    for (killed, left) in [(apart.edge.pid(), second), (second, first)] {
        in_first.assert_echoes("in the first");
        if killed != second {
            in_second.assert_echoes("in the second");
        }
        signal(killed, "KILL");
        apart.edge.wait_gone(killed);
        apart.edge.is_taken_over_by(left);
        wait_for("the one before to serve", || answers(apart.edge.http()).then_some(()));
    }
    assert_eq!(apart.edge.pids(), [first]);
    assert_eq!(apart.edge.log_text().matches(AGAIN).count(), 2, "each of them once");
    in_first.assert_echoes("it has never left");
}

/// An edge that listens where its file says.
fn by_file(apart: &mut Apart, http: &str) -> PathBuf {
    assert_eq!(apart.edge.stop(), Some(0));
    let config = apart.edge.data().with_file_name("edge.toml");
    std::fs::write(&config, listens(http)).expect("a file");
    apart.edge.start_by_file(&config);
    wait_for("it to serve", || answers(apart.edge.http()).then_some(()));
    config
}

fn listens(http: &str) -> String {
    format!("[edge]\nhttp = [\"{http}\"]\n")
}

#[test]
fn an_upgrade_to_a_wider_address_leaves_no_socket_at_which_a_client_waits_in_vain() {
    let mut apart = Apart::open(&patient("60s"));
    let edge = apart.edge.http();
    let config = by_file(&mut apart, &edge.to_string());
    let mut socket = Socket::open(edge);
    std::fs::write(&config, listens(&format!("0.0.0.0:{}", edge.port()))).expect("a file");
    let before = apart.edge.upgrade();
    // The kernel prefers the narrower address, if anybody listens there.
    for _ in 0..20 {
        assert!(answers(edge));
    }
    socket.assert_echoes("at the one before");
    let new = apart.edge.pid();
    signal(new, "KILL");
    apart.edge.is_taken_over_by(before);
    apart.edge.wait_gone(new);
    wait_for("the one before to serve on its own address again", || answers(edge).then_some(()));
    socket.assert_echoes("and still");
}

#[test]
fn an_address_that_was_given_up_is_refused_and_the_one_before_tries_again_until_it_has_it_back() {
    let mut apart = Apart::open(&patient("60s"));
    let (edge, other) = (apart.edge.http(), crate::support::server::free_address());
    let config = by_file(&mut apart, &edge.to_string());
    let mut socket = Socket::open(edge);
    std::fs::write(&config, listens(&other.to_string())).expect("a file");
    let before = apart.edge.upgrade();
    assert!(answers(other));
    wait_for("the old address to be closed", || TcpStream::connect(edge).is_err().then_some(()));
    let occupant = std::net::TcpListener::bind(edge).expect("it is free");
    let new = apart.edge.pid();
    signal(new, "KILL");
    apart.edge.is_taken_over_by(before);
    apart.edge.wait_gone(new);
    wait_for("it to try", || apart.edge.log_text().contains("cannot serve again yet").then_some(()));
    socket.assert_echoes("it goes on");
    drop(occupant);
    wait_for("it to have its address back", || answers(edge).then_some(()));
    socket.assert_echoes("and still");
}

#[test]
fn whoever_is_killed_at_whatever_moment_of_an_upgrade_one_serves() {
    let mut apart = Apart::open(&patient("60s"));
    for round in 0..24_u64 {
        let (old, edge) = (apart.edge.pid(), apart.edge.http());
        // With it the old one does not end by itself before the new one is killed.
        let tunnel = (round % 2 == 1).then(|| Socket::open(edge));
        signal(old, "USR2");
        let new = wait_for("the new process", || apart.edge.pids().into_iter().find(|pid| *pid != old));
        // Over the time that an upgrade takes, and beyond: the moment is what is varied.
        #[expect(clippy::disallowed_methods, reason = "no state is awaited")]
        std::thread::sleep(Duration::from_millis(round / 2 * 25));
        let (killed, left) = if round % 2 == 0 { (old, new) } else { (new, old) };
        assert!(round % 2 == 0 || is_alive(old), "round {round}\n{}", apart.edge.log_text());
        signal(killed, "KILL");
        apart.edge.is_taken_over_by(left);
        apart.edge.wait_gone(killed);
        wait_for("one to serve", || answers(edge).then_some(()));
        assert_eq!(apart.edge.pids(), [left], "round {round}\n{}", apart.edge.log_text());
        if let Some(mut tunnel) = tunnel {
            tunnel.assert_echoes("it is where it was");
        }
        wait_for_state(&apart.shop.server, "edge-1", "connected");
    }
}

#[test]
fn a_new_process_that_cannot_serve_says_why_and_the_one_before_goes_on() {
    let mut apart = Apart::open(DRAIN);
    assert_eq!(apart.edge.stop(), Some(0));
    let config = apart.edge.data().with_file_name("edge.toml");
    std::fs::write(&config, "[edge]\nidle = true\n".replace("idle = true", "cores = 2")).expect("a file");
    apart.edge.start_with_arguments(&["--config", &config.display().to_string()]);
    wait_for("it to serve", || answers(apart.edge.http()).then_some(()));
    std::fs::write(&config, "[edge]\ncores = \"many\"\n").expect("a file");
    let said = apart.edge.ask_upgrade(&[]);
    assert_eq!(
        (said.code, said.error()["code"].as_str()),
        (9, Some("edge.upgrade_failed")),
        "{:?}",
        said.stderr
    );
    let message = said.error()["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("edge.cores"), "{message}");
    assert!(answers(apart.edge.http()));
    // And what cannot be run at all.
    let said = apart.edge.ask_upgrade(&["--binary", "/nowhere/peregrine"]);
    assert_eq!(said.code, 9);
    assert!(said.error()["message"].as_str().expect("a message").contains("/nowhere/peregrine"));
    assert!(answers(apart.edge.http()));
    // Mended, with more cores than sockets, then with fewer: whichever socket a connection is in, it is accepted.
    for cores in [3, 1] {
        std::fs::write(&config, format!("[edge]\ncores = {cores}\n")).expect("a file");
        apart.edge.upgrade();
        for _ in 0..60 {
            assert!(answers(apart.edge.http()));
        }
    }
}

#[test]
fn an_edge_that_is_not_there_cannot_be_upgraded_and_one_with_an_engine_says_why() {
    let edge = Edge::fresh("edge-9");
    let said = edge.ask_upgrade(&[]);
    assert_eq!((said.code, said.error()["code"].as_str()), (4, Some("edge.not_running")));
    let shop = crate::support::shop::Shop::open("");
    signal(shop.server.pid(), "USR2");
    wait_for("it to be told", || shop.server.log_text().contains("is not upgraded in place").then_some(()));
    shop.server.ok(&["status"]);
}

#[test]
fn an_edge_that_is_stopped_after_an_upgrade_is_stopped_with_the_process_that_ends_what_it_has() {
    let mut apart = Apart::open(DRAIN);
    assert_eq!(apart.edge.stop(), Some(0));
    let config = apart.edge.data().with_file_name("edge.toml");
    std::fs::write(&config, "[edge]\ndrain_timeout = \"1s\"\n").expect("a file");
    apart.edge.start_with_arguments(&["--config", &config.display().to_string()]);
    wait_for("it to serve", || answers(apart.edge.http()).then_some(()));
    let mut socket = Socket::open(apart.edge.http());
    let before = apart.edge.upgrade();
    socket.assert_echoes("it lives");
    apart.edge.stop();
    apart.edge.wait_gone(before);
    assert_eq!(apart.edge.pids(), [0; 0]);
    wait_for_state(&apart.shop.server, "edge-1", "away");
}

/// What a service manager would be told.
struct Manager {
    socket: std::os::unix::net::UnixDatagram,
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Manager {
    fn listen() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
        Self { socket, _folder: folder, path }
    }

    /// The next thing that is told: its lines.
    fn told(&self) -> Vec<String> {
        let mut bytes = vec![0; 4_096];
        let length = self.socket.recv(&mut bytes).expect("something is told");
        String::from_utf8_lossy(&bytes[..length]).lines().map(str::to_owned).collect()
    }

    /// Waits until this line is told; those that are told with it.
    fn wait_for(&self, line: &str) -> Vec<String> {
        loop {
            let told = self.told();
            if told.iter().any(|one| one == line) {
                return told;
            }
        }
    }
}

#[test]
fn a_service_manager_is_told_of_readiness_of_the_main_process_and_of_the_end() {
    let mut apart = Apart::open(DRAIN);
    let manager = Manager::listen();
    assert_eq!(apart.edge.stop(), Some(0));
    apart.edge.environment = vec![("NOTIFY_SOCKET".to_owned(), manager.path.display().to_string())];
    apart.edge.start();
    let main = |told: &[String], pid: u32| assert!(told.contains(&format!("MAINPID={pid}")), "{told:?}");
    main(&manager.wait_for("READY=1"), apart.edge.pid());
    let before = apart.edge.upgrade();
    let told = manager.wait_for("RELOADING=1");
    main(&told, apart.edge.pid());
    assert!(told.iter().any(|line| line.starts_with("MONOTONIC_USEC=")), "{told:?}");
    main(&manager.wait_for("READY=1"), apart.edge.pid());
    apart.edge.wait_gone(before);
    // One that does not come up: the service's process is the one that it was.
    assert_eq!(apart.edge.ask_upgrade(&["--binary", "/bin/false"]).code, 9);
    main(&manager.wait_for("READY=1"), apart.edge.pid());
    apart.edge.stop();
    manager.wait_for("STOPPING=1");
}

/// Lines of a process's or a thread's status, by name.
fn status(path: &std::path::Path) -> std::collections::BTreeMap<String, String> {
    let text = std::fs::read_to_string(path.join("status")).expect("a status");
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .map(|(name, value)| (name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

/// A user of every Debian, who owns nothing.
const NOBODY: (&str, &str) = ("nobody", "65534");

#[test]
fn an_edge_binds_a_low_port_as_root_and_serves_as_a_user_who_has_nothing_left_of_root() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give its rights up");
        return;
    }
    let mut apart = Apart::open(DRAIN);
    assert_eq!(apart.edge.stop(), Some(0));
    let folder = apart.edge.data().parent().expect("a folder").to_owned();
    let owned = std::process::Command::new("chown").args(["-R", NOBODY.0]).arg(&folder).status();
    assert!(owned.expect("chown runs").success());
    // An address of the loopback network of its own: no other test has the port there.
    let low: SocketAddr =
        format!("127.{}.0.1:80", 100 + std::process::id() % 100).parse().expect("an address");
    apart.edge.start_with_arguments(&["--user", NOBODY.0, "--http", &low.to_string()]);
    wait_for("it to serve on a low port", || answers(low).then_some(()));
    assert_no_root(apart.edge.pid());
    // A user may hand over what root has bound. The program is where he can run it, wherever it was built.
    let program = folder.join("peregrine");
    let built = env!("CARGO_BIN_EXE_peregrine");
    std::fs::hard_link(built, &program)
        .or_else(|_| std::fs::copy(built, &program).map(drop))
        .expect("a program");
    let (before, said) =
        (apart.edge.pid(), apart.edge.ask_upgrade(&["--binary", &program.display().to_string()]));
    assert_eq!(said.code, 0, "{}\n{}", said.stderr, apart.edge.log_text());
    apart.edge.is_taken_over_by(
        said.data()["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a process"),
    );
    apart.edge.wait_gone(before);
    assert!(answers(low));
    assert_no_root(apart.edge.pid());
}

#[test]
fn a_private_key_that_root_alone_may_read_is_refused_at_the_start_and_not_at_the_next_reload() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give its rights up");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let made = rcgen::generate_simple_self_signed(["shop.test".to_owned()]).expect("a certificate");
    let write = |name: &str, text: &str, mode: u32| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("a mode");
        path
    };
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("a mode");
    write("chain.pem", &made.cert.pem(), 0o644);
    let key = write("key.pem", &made.signing_key.serialize_pem(), 0o600);
    let text = "[domain.\"shop.test\"]\ncertificate = \"chain.pem\"\nkey = \"key.pem\"\n";
    let config = write("edge.toml", text, 0o644);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_peregrine"));
    command.args(["edge", "--http", "127.0.0.1:0", "--user", NOBODY.0, "--config"]).arg(config);
    let output = command.arg("--data").arg(folder.path().join("data")).output().expect("peregrine runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("Permission denied") && said.contains(&key.display().to_string()), "{said}");
}

#[track_caller]
fn assert_no_root(pid: u32) {
    let threads = PathBuf::from(format!("/proc/{pid}/task"));
    let mut count = 0;
    for thread in std::fs::read_dir(threads).expect("threads") {
        let status = status(&thread.expect("a thread").path());
        let ids = [NOBODY.1; 4].join(" ");
        assert_eq!((&status["Uid"], &status["Gid"], &status["Groups"]), (&ids, &ids, &NOBODY.1.to_owned()));
        assert_eq!(status["NoNewPrivs"], "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set}");
        }
        count += 1;
    }
    assert!(count > 3, "cores, control and the runtime");
}

#[test]
fn a_user_who_is_not_there_is_an_error_that_says_what_to_do() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_peregrine"));
    let folder = tempfile::tempdir().expect("a folder");
    command
        .args(["--json", "edge", "--http", "127.0.0.1:0", "--user", "no-such-user", "--data"])
        .arg(folder.path());
    let output = command.output().expect("peregrine runs");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(9), "{text}");
    assert!(text.contains("there is no user no-such-user") && text.contains("useradd"), "{text}");
}
